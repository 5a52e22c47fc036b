// Package terminal makes text that somebody else wrote safe to print. A log, a
// console or an answer of a model can hold escape sequences that move the
// cursor, rewrite what was printed, set the title or make some terminals type.
package terminal

import (
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Clean returns s as it may be printed: newlines and tabs stay, every other
// control or format character is dropped, and bytes that are not UTF-8 become
// U+FFFD. A carriage return is dropped, so CRLF becomes LF. Escape sequences
// lose their introducer, and CSI and OSC sequences go as a whole.
func Clean(s string) string {
	var out strings.Builder
	w := Writer{out: &out}
	w.Write([]byte(s))
	w.Close()
	return out.String()
}

// Line is Clean for one line: newlines and tabs become spaces.
func Line(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		return r
	}, Clean(s))
}

// Writer cleans what is written to it, also across writes: a sequence or a
// character that is split between two is recognised.
type Writer struct {
	out     io.Writer
	state   state
	partial []byte // the beginning of a UTF-8 character
}

type state int

const (
	text state = iota
	escape
	csi       // ESC [ parameters, to a final byte 0x40-0x7e (ECMA-48 section 5.4)
	str       // ESC ] P X ^ _ : a string, to BEL or ST
	strEscape // ESC inside such a string
)

// NewWriter returns a Writer to out.
func NewWriter(out io.Writer) *Writer { return &Writer{out: out} }

// Write implements io.Writer. It reports all of p as written unless out fails.
func (w *Writer) Write(p []byte) (int, error) {
	data := p
	if len(w.partial) > 0 {
		data = append(w.partial, p...)
		w.partial = nil
	}
	clean := make([]byte, 0, len(data))
	for len(data) > 0 {
		if !utf8.FullRune(data) {
			w.partial = append([]byte(nil), data...)
			break
		}
		r, size := utf8.DecodeRune(data)
		data = data[size:]
		clean = w.next(clean, r)
	}
	if len(clean) > 0 {
		if _, err := w.out.Write(clean); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// Close writes what an unfinished character left. It does not close the writer
// underneath.
func (w *Writer) Close() error {
	if len(w.partial) == 0 {
		return nil
	}
	w.partial = nil
	_, err := w.out.Write([]byte(string(utf8.RuneError)))
	return err
}

func (w *Writer) next(out []byte, r rune) []byte {
	switch w.state {
	case escape:
		switch r {
		case '[':
			w.state = csi
		case ']', 'P', 'X', '^', '_':
			w.state = str
		case 0x1b:
		default:
			w.state = text
			if r < 0x20 || r > 0x7e {
				return w.next(out, r)
			}
		}
		return out
	case csi:
		switch {
		case r >= 0x40 && r <= 0x7e:
			w.state = text
		case r == 0x1b:
			w.state = escape
		case r < 0x20 || r > 0x7e:
			w.state = text
			return w.next(out, r)
		}
		return out
	case str, strEscape:
		// A newline ends it too, so that an unfinished string cannot swallow a log.
		switch {
		case r == 0x07, r == 0x9c, w.state == strEscape && r == '\\':
			w.state = text
		case r == '\n':
			w.state = text
			return append(out, '\n')
		case r == 0x1b:
			w.state = strEscape
		default:
			w.state = str
		}
		return out
	}
	switch {
	case r == '\n' || r == '\t':
		return append(out, byte(r))
	case r == 0x1b:
		w.state = escape
		return out
	case r == 0x9b:
		w.state = csi
		return out
	case r == 0x90 || r == 0x98 || r == 0x9d || r == 0x9e || r == 0x9f:
		w.state = str
		return out
	case unicode.IsControl(r), unicode.In(r, unicode.Cf), r == 0x2028, r == 0x2029:
		// Cf holds the bidirectional overrides, which reorder what is seen.
		// Joiners in it are needed by scripts and emoji and move nothing.
		if r == 0x200c || r == 0x200d {
			return utf8.AppendRune(out, r)
		}
		return out
	}
	return utf8.AppendRune(out, r)
}
