package api

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"unicode/utf8"
)

// maxEvent bounds one event of a stream, in bytes.
const maxEvent = 256 << 10

// lineBuffer is what a stream's reader takes from the start, in bytes; a longer line
// gets more.
const lineBuffer = 2 << 10

var (
	doneEvent = []byte("[DONE]")
	errEvent  = errors.New("the engine's stream has an event that is not a JSON object, or a line that is too long")
)

// events reads a stream of server-sent events (WHATWG HTML, section 9.2) and
// gives out what OpenAI's clients know: the data of each event. Comments, event
// names, ids and retry times are dropped.
type events struct {
	lines *bufio.Reader
	line  []byte // the current line, where it is longer than the reader's buffer
	data  []byte
	out   bytes.Buffer
}

func newEvents(r io.Reader) *events { return &events{lines: bufio.NewReaderSize(r, lineBuffer)} }

// next returns the next event's data: a JSON object on one line, or doneEvent. The
// bytes are good until the next call. It returns io.EOF where the stream ends, and
// drops an event that is cut off there, as the standard says.
func (e *events) next() ([]byte, error) {
	e.data = e.data[:0]
	for seen := false; ; {
		line, err := e.readLine()
		if err != nil {
			return nil, err
		}
		if len(line) == 0 {
			if seen {
				return e.checked()
			}
			continue
		}
		value, ok := bytes.CutPrefix(line, []byte("data:"))
		if !ok {
			continue
		}
		if seen {
			e.data = append(e.data, '\n')
		}
		seen = true
		e.data = append(e.data, bytes.TrimPrefix(value, []byte(" "))...)
		if len(e.data) > maxEvent {
			return nil, errEvent
		}
	}
}

// checked returns the collected data in the form in which it is forwarded.
func (e *events) checked() ([]byte, error) {
	data := bytes.TrimSpace(e.data)
	if bytes.Equal(data, doneEvent) {
		return doneEvent, nil
	}
	e.out.Reset()
	// Compact also takes out line breaks, which would end the event early.
	if len(data) == 0 || data[0] != '{' || !utf8.Valid(data) || json.Compact(&e.out, data) != nil {
		return nil, errEvent
	}
	return e.out.Bytes(), nil
}

// readLine returns a line without its end.
func (e *events) readLine() ([]byte, error) {
	e.line = e.line[:0]
	for {
		part, err := e.lines.ReadSlice('\n')
		if err == nil && len(e.line) == 0 {
			return trimEnd(part), nil
		}
		e.line = append(e.line, part...)
		switch {
		case len(e.line) > maxEvent:
			return nil, errEvent
		case err == nil:
			return trimEnd(e.line), nil
		case err != bufio.ErrBufferFull:
			return nil, err
		}
	}
}

func trimEnd(line []byte) []byte {
	return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))
}
