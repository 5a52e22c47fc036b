package pay

import "encoding/json"

// An Event is what counts of one event of a stream, or of an answer that is none.
// Worker and client read it alike, so that they come to the same Bounds.
type Event struct {
	Text int64 // bytes of it that the engine made: contents, reasoning and calls of tools
	// Prompt and Completion are the engine's figures, in tokens; nil where the event
	// has none.
	Prompt, Completion *int64
	OnlyUsage          bool // there is nothing but the figures in it
}

type spoken struct {
	Choices []struct {
		Text    string
		Delta   said
		Message said
	}
	Usage *struct {
		Prompt     *int64 `json:"prompt_tokens"`
		Completion *int64 `json:"completion_tokens"`
	}
}

type said struct {
	Content   string
	Reasoning string          `json:"reasoning_content"`
	ToolCalls json.RawMessage `json:"tool_calls"`
}

// ReadEvent reads the data of an event, or an answer, in JSON as OpenAI's API has it.
// Of what cannot be read nothing counts.
func ReadEvent(data []byte) Event {
	var s spoken
	if json.Unmarshal(data, &s) != nil {
		s.Usage = nil // which may be half read
	}
	var e Event
	for _, c := range s.Choices {
		e.Text += int64(len(c.Text))
		for _, m := range []said{c.Delta, c.Message} {
			e.Text += int64(len(m.Content) + len(m.Reasoning) + len(m.ToolCalls))
		}
	}
	if s.Usage != nil {
		e.Prompt, e.Completion = s.Usage.Prompt, s.Usage.Completion
		e.OnlyUsage = len(s.Choices) == 0
	}
	return e
}

// Add counts an event of a stream, or an answer that is none.
func (b *Bounds) Add(e Event) {
	b.TextBytes = sum(b.TextBytes, e.Text)
	if e.Text > 0 {
		b.Events++
	}
}
