package proxy

import (
	"bytes"
	"encoding/hex"
	"errors"
	"hash"

	"chrysalis/attest/receipt"
	"chrysalis/pay"
)

// maxLine bounds a line of a stream that is read as one, in bytes: more than an event
// of a VM has.
const maxLine = 1 << 20

// maxWhole bounds an answer that is read as one, in bytes: more than a VM that is paid
// makes.
const maxWhole = 16 << 20

// meter reads an answer on its way to the client: how much text it has, and its
// receipt.
type meter struct {
	stream bool
	text   func(bytes int64) // told of each event that has some

	covered hash.Hash // what the receipt is about
	line    []byte    // a stream's that is not whole, or what there is of another answer
	long    bool      // there is more than is kept
	done    bool      // the stream said [DONE]
	failed  bool      // the stream has an event that is an error
	beyond  bool      // the stream goes on after its receipt
	receipt []byte
}

func newMeter(salt [receipt.SaltSize]byte, stream bool, text func(int64)) *meter {
	return &meter{stream: stream, text: text, covered: receipt.NewHash(salt)}
}

// write takes the next part of the answer.
func (m *meter) write(p []byte) {
	if !m.stream {
		m.covered.Write(p)
		if m.long = m.long || len(m.line)+len(p) > maxWhole; !m.long {
			m.line = append(m.line, p...)
		}
		return
	}
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n') + 1
		part := p
		if end > 0 {
			part = p[:end]
		}
		p = p[len(part):]
		if m.line = append(m.line, part...); end > 0 || len(m.line) > maxLine {
			m.oneLine(m.line)
			m.line = m.line[:0]
		}
	}
}

// oneLine reads a line of a stream.
func (m *meter) oneLine(line []byte) {
	if m.receipt != nil {
		m.beyond = m.beyond || line[0] != ':' && line[0] != '\n' || bytes.HasPrefix(line, []byte(receipt.CommentPrefix))
		return
	}
	if signed, ok := bytes.CutPrefix(line, []byte(receipt.CommentPrefix)); ok && len(line) <= maxLine {
		m.receipt = bytes.Clone(bytes.TrimSuffix(signed, []byte("\n")))
		return
	}
	m.covered.Write(line)
	data, ok := bytes.CutPrefix(line, []byte("data:"))
	if !ok {
		return
	}
	data = bytes.TrimSpace(data)
	switch {
	case bytes.Equal(data, []byte("[DONE]")):
		m.done = true
	case bytes.HasPrefix(data, []byte(`{"error":`)):
		m.failed = true
	default:
		if n := pay.ReadEvent(data).Text; n > 0 {
			m.text(n)
		}
	}
}

// end is called when the answer is whole.
func (m *meter) end() {
	if !m.stream && !m.long {
		if n := pay.ReadEvent(m.line).Text; n > 0 {
			m.text(n)
		}
	}
}

// check reports, as an error, a receipt that is not about this request and answer.
func (m *meter) check(r *receipt.Receipt, request string) error {
	switch {
	case m.beyond:
		return errors.New("the stream goes on after it")
	case r.Request != request:
		return errors.New("it is about another request")
	case r.Response != hex.EncodeToString(m.covered.Sum(nil)):
		return errors.New("it is about another answer")
	}
	return nil
}
