package pay

import "math"

// What a template adds to a prompt, in tokens, and tokens without text in an answer,
// such as the one that ends it. They are those of receipts.
const (
	TemplateTokens = 1024
	SilentTokens   = 64
)

// bytesPerToken is for prompts that the engine has not counted, because the client
// left early: no tokenizer in use makes tokens of so many bytes on the average, so
// that leaving early is never charged more than staying.
const bytesPerToken = 8

// Bounds are what the tokens of a request can be at most, by what the agent has seen
// itself: a token of a prompt takes at least a byte of the request or of the engine's
// template, one of an answer at least a byte of text, but for SilentTokens.
type Bounds struct {
	RequestBytes int64
	Asked        int64 // tokens that the client asked for at most; 0 where it set no limit
	TextBytes    int64 // of the answer so far
	Events       int64 // of the answer so far that have text; 1 for one that is not a stream
}

// MaxPrompt is how many tokens the prompt can have.
func (b Bounds) MaxPrompt() int64 { return sum(b.RequestBytes, TemplateTokens) }

// MaxCompletion is how many tokens the answer so far can have.
func (b Bounds) MaxCompletion() int64 {
	most := sum(b.TextBytes, SilentTokens)
	if b.Asked > 0 {
		most = min(most, b.Asked)
	}
	return most
}

// sum stays at the largest number.
func sum(a, b int64) int64 {
	if a, b = max(a, 0), max(b, 0); a <= math.MaxInt64-b {
		return a + b
	}
	return math.MaxInt64
}

// Usage is what the engine says about an answer.
type Usage struct {
	Prompt, Completion int64 // tokens
}

// Tokens are how many tokens an answer is charged for. The engine's figures count
// where they are within the bounds; where one is not, or an answer that is whole has
// none, nothing is charged. An answer that the client did not wait for is charged for
// what was sent: a token for each event with text, and the prompt at bytesPerToken,
// once anything was sent; by the engine's figures, if it gave some, where they are
// less.
func (b Bounds) Tokens(usage *Usage, whole bool) (prompt, completion int64) {
	if usage != nil && (usage.Prompt < 0 || usage.Completion < 0 || usage.Prompt > b.MaxPrompt() || usage.Completion > b.MaxCompletion()) {
		return 0, 0
	}
	if whole {
		if usage == nil {
			return 0, 0
		}
		return usage.Prompt, usage.Completion
	}
	if b.Events <= 0 {
		return 0, 0
	}
	prompt = max(b.RequestBytes, 0) / bytesPerToken
	completion = min(b.Events, max(b.TextBytes, 0), b.MaxCompletion())
	if usage != nil {
		prompt, completion = min(prompt, usage.Prompt), min(completion, usage.Completion)
	}
	return prompt, completion
}
