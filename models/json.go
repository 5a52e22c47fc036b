package models

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// errJSON is what a scanner's refusals wrap.
var errJSON = errors.New("not valid JSON")

// maxDepth is how deeply arrays and objects of a hub's files may be nested.
const maxDepth = 64

// A scanner reads one JSON text (RFC 8259) from its start to its end, value by
// value, and holds no more of it than the strings that are asked for, which are
// bounded. encoding/json would hold a whole header or index of 100 MB, several
// times over, before anything is known about it.
type scanner struct {
	r     *bufio.Reader
	left  int64 // bytes that may still be read
	at    int64
	depth int
	// python also takes NaN, Infinity and -Infinity, as Python's json writes them
	// into configurations.
	python bool
}

func newScanner(r io.Reader, size int64) *scanner {
	return &scanner{r: bufio.NewReaderSize(io.LimitReader(r, size), 64<<10), left: size}
}

func (s *scanner) bad(format string, args ...any) error {
	return fmt.Errorf("%w: at byte %d: "+format, append([]any{errJSON, s.at}, args...)...)
}

// end turns the end of the text into an error that says so.
func (s *scanner) end(err error) error {
	if err == io.EOF {
		return s.bad("it ends in the middle")
	}
	return err
}

func (s *scanner) read() (byte, error) {
	b, err := s.r.ReadByte()
	if err != nil {
		return 0, s.end(err)
	}
	s.at++
	return b, nil
}

// peek skips white space and returns the next byte without taking it.
func (s *scanner) peek() (byte, error) {
	for {
		b, err := s.r.ReadByte()
		if err != nil {
			return 0, s.end(err)
		}
		switch b {
		case ' ', '\t', '\r', '\n':
			s.at++
			continue
		}
		return b, s.r.UnreadByte()
	}
}

func (s *scanner) take(want byte) error {
	b, err := s.peek()
	if err != nil {
		return err
	}
	if b != want {
		return s.bad("%q, expected %q", b, want)
	}
	_, err = s.read()
	return err
}

// finish checks that only white space is left.
func (s *scanner) finish() error {
	for {
		b, err := s.r.ReadByte()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch b {
		case ' ', '\t', '\r', '\n':
		default:
			return s.bad("%q behind the end", b)
		}
	}
}

func (s *scanner) enter() error {
	if s.depth++; s.depth > maxDepth {
		return s.bad("nested more than %d levels deep", maxDepth)
	}
	return nil
}

// list reads what is between two brackets: items with commas between them.
func (s *scanner) list(open, end byte, item func() error) error {
	if err := s.take(open); err != nil {
		return err
	}
	if err := s.enter(); err != nil {
		return err
	}
	b, err := s.peek()
	if err != nil {
		return err
	}
	for b != end {
		if err := item(); err != nil {
			return err
		}
		if b, err = s.peek(); err != nil {
			return err
		}
		if b == ',' {
			if err := s.take(','); err != nil {
				return err
			}
			if b, err = s.peek(); err != nil {
				return err
			}
			if b == end {
				return s.bad("a comma before %q", end)
			}
		} else if b != end {
			return s.bad("%q, expected ',' or %q", b, end)
		}
	}
	s.depth--
	return s.take(end)
}

// object reads an object; visit must read each member's value. Keys are bounded,
// and not compared with each other.
func (s *scanner) object(maxKey int, visit func(key string) error) error {
	return s.list('{', '}', func() error {
		key, err := s.string(maxKey)
		if err != nil {
			return err
		}
		if err := s.take(':'); err != nil {
			return err
		}
		return visit(key)
	})
}

// array reads an array; visit must read each element.
func (s *scanner) array(visit func() error) error { return s.list('[', ']', visit) }

// string reads a string of at most bound bytes. A bound below 0 skips one of any
// length.
func (s *scanner) string(bound int) (string, error) {
	if err := s.take('"'); err != nil {
		return "", err
	}
	var out []byte
	var partial [utf8.UTFMax]byte // of a character, to see whether it is UTF-8
	have := 0
	add := func(p ...byte) error {
		if bound < 0 {
			return nil
		}
		if len(out)+len(p) > bound {
			return s.bad("a string of more than %d bytes", bound)
		}
		out = append(out, p...)
		return nil
	}
	for {
		b, err := s.read()
		if err != nil {
			return "", err
		}
		if have > 0 || b >= utf8.RuneSelf {
			partial[have] = b
			have++
			switch {
			case !utf8.FullRune(partial[:have]):
				continue
			case !utf8.Valid(partial[:have]):
				return "", s.bad("a string is not UTF-8")
			}
			if err := add(partial[:have]...); err != nil {
				return "", err
			}
			have = 0
			continue
		}
		switch {
		case b == '"':
			return string(out), nil
		case b < ' ':
			return "", s.bad("a string has the control character %#x", b)
		case b != '\\':
			if err := add(b); err != nil {
				return "", err
			}
			continue
		}
		r, err := s.escape()
		if err != nil {
			return "", err
		}
		if err := add(utf8.AppendRune(nil, r)...); err != nil {
			return "", err
		}
	}
}

// escape reads what follows a backslash.
func (s *scanner) escape() (rune, error) {
	b, err := s.read()
	if err != nil {
		return 0, err
	}
	switch b {
	case '"', '\\', '/':
		return rune(b), nil
	case 'b':
		return '\b', nil
	case 'f':
		return '\f', nil
	case 'n':
		return '\n', nil
	case 'r':
		return '\r', nil
	case 't':
		return '\t', nil
	case 'u':
		first, err := s.unit()
		if err != nil || !utf16.IsSurrogate(first) {
			return first, err
		}
		for _, want := range []byte(`\u`) {
			b, err := s.read()
			if err != nil {
				return 0, err
			}
			if b != want {
				return 0, s.bad("half of a surrogate pair")
			}
		}
		second, err := s.unit()
		if err != nil {
			return 0, err
		}
		if r := utf16.DecodeRune(first, second); r != utf8.RuneError {
			return r, nil
		}
		return 0, s.bad("half of a surrogate pair")
	}
	return 0, s.bad("the escape \\%c", b)
}

// unit reads four hexadecimal digits.
func (s *scanner) unit() (rune, error) {
	var digits [4]byte
	for i := range digits {
		b, err := s.read()
		if err != nil {
			return 0, err
		}
		digits[i] = b
	}
	v, err := strconv.ParseUint(string(digits[:]), 16, 16)
	if err != nil || digits[0] == '+' || digits[0] == '-' || digits[0] == '_' {
		return 0, s.bad("the escape \\u%q", digits[:])
	}
	return rune(v), nil
}

// maxNumber bounds a number's text, in bytes. Python writes doubles in up to 24.
const maxNumber = 64

// word reads a number or literal's text.
func (s *scanner) word() (string, error) {
	if _, err := s.peek(); err != nil {
		return "", err
	}
	var out []byte
	for {
		b, err := s.r.ReadByte()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", err
		}
		if !(b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b == '-' || b == '+' || b == '.') {
			if err := s.r.UnreadByte(); err != nil {
				return "", err
			}
			break
		}
		if s.at++; len(out) == maxNumber {
			return "", s.bad("a number of more than %d bytes", maxNumber)
		}
		out = append(out, b)
	}
	return string(out), nil
}

// integer reads an integer from 0 to 2^63 - 1, written in digits only.
func (s *scanner) integer() (int64, error) {
	w, err := s.word()
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(w, 10, 64)
	if err != nil || v < 0 || strconv.FormatInt(v, 10) != w {
		return 0, s.bad("%q, expected an integer from 0 to 2^63 - 1", w)
	}
	return v, nil
}

// skip reads a value of any kind.
func (s *scanner) skip() error {
	b, err := s.peek()
	if err != nil {
		return err
	}
	switch b {
	case '{':
		return s.list('{', '}', func() error {
			if _, err := s.string(-1); err != nil {
				return err
			}
			if err := s.take(':'); err != nil {
				return err
			}
			return s.skip()
		})
	case '[':
		return s.array(s.skip)
	case '"':
		_, err := s.string(-1)
		return err
	}
	w, err := s.word()
	if err != nil {
		return err
	}
	switch w {
	case "true", "false", "null":
		return nil
	case "NaN", "Infinity", "-Infinity":
		if s.python {
			return nil
		}
	default:
		if isNumber(w) {
			return nil
		}
	}
	return s.bad("%q, expected a value", w)
}

// isNumber reports whether w is a number as RFC 8259 section 6 has it.
func isNumber(w string) bool {
	digits := func() bool {
		n := 0
		for n < len(w) && w[n] >= '0' && w[n] <= '9' {
			n++
		}
		w = w[n:]
		return n > 0
	}
	if len(w) > 0 && w[0] == '-' {
		w = w[1:]
	}
	if len(w) > 1 && w[0] == '0' && w[1] >= '0' && w[1] <= '9' || !digits() {
		return false
	}
	if len(w) > 0 && w[0] == '.' {
		if w = w[1:]; !digits() {
			return false
		}
	}
	if len(w) > 0 && (w[0] == 'e' || w[0] == 'E') {
		if w = w[1:]; len(w) > 0 && (w[0] == '+' || w[0] == '-') {
			w = w[1:]
		}
		if !digits() {
			return false
		}
	}
	return w == ""
}
