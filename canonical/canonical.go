// Package canonical reads and writes the JSON documents whose hash is trusted:
// manifests, records, evidence. One meaning has exactly one encoding (RFC 8785),
// and everything else is refused.
//
// Documents hold objects, arrays, booleans, integers of at most 2^53 − 1 and
// strings of printable ASCII without characters that JSON escapes. Within these,
// sorting the keys by bytes and leaving out white space is all that RFC 8785,
// section 3.2, asks for.
package canonical

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// maxDepth bounds how deep objects and arrays may nest.
const maxDepth = 8

// maxInteger is the largest integer that RFC 8785 carries exactly.
const maxInteger = 1<<53 - 1

// Encode returns the canonical encoding of a value: no white space, keys in
// order, no final newline. It refuses what the package does not carry.
func Encode(v any) ([]byte, error) {
	plain, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	a := arranger{in: plain, out: make([]byte, 0, len(plain))}
	if err := a.value(); err != nil {
		return nil, err
	}
	return a.out, nil
}

// arranger copies what encoding/json wrote, which has no white space, with the
// keys of objects in order. It refuses values whose encoding by encoding/json might
// not be RFC 8785's.
type arranger struct {
	in  []byte
	at  int
	out []byte
}

func (a *arranger) value() error {
	switch c := a.in[a.at]; c {
	case '{':
		return a.object()
	case '[':
		a.copy(1)
		for i := 0; a.in[a.at] != ']'; i++ {
			if i > 0 {
				a.copy(1)
			}
			if err := a.value(); err != nil {
				return fmt.Errorf("[%d]: %w", i, err)
			}
		}
		a.copy(1)
	case '"':
		n, err := a.text()
		if err != nil {
			return err
		}
		a.copy(n)
	case 'n':
		return errors.New("null is not allowed")
	case 't':
		a.copy(len("true"))
	case 'f':
		a.copy(len("false"))
	default:
		n := 0
		for a.at+n < len(a.in) && a.in[a.at+n] != ',' && a.in[a.at+n] != ']' && a.in[a.at+n] != '}' {
			n++
		}
		number := a.in[a.at : a.at+n]
		if v, err := strconv.ParseInt(string(number), 10, 64); err != nil || v > maxInteger || v < -maxInteger {
			return fmt.Errorf("%.40s is not an integer of at most 2^53 - 1", number)
		}
		a.copy(n)
	}
	return nil
}

func (a *arranger) copy(n int) {
	a.out = append(a.out, a.in[a.at:a.at+n]...)
	a.at += n
}

// text returns the length of the string that comes, quotes included.
func (a *arranger) text() (int, error) {
	for n := 1; ; n++ {
		switch c := a.in[a.at+n]; {
		case c == '"':
			return n + 1, nil
		case c < 0x20 || c > 0x7e || c == '\\': // what JSON escapes has a backslash here
			return 0, errors.New("a string has another character than printable ASCII without quotes, backslashes, '<', '>' and '&'")
		}
	}
}

// object copies an object's fields in the order in which they come, and then, if
// that is another, in the right one.
func (a *arranger) object() error {
	type field struct {
		key        string
		begin, end int // in out
	}
	var fields []field
	a.copy(1)
	begin := len(a.out)
	for a.in[a.at] != '}' {
		if len(fields) > 0 {
			a.at++
		}
		f := field{begin: len(a.out)}
		n, err := a.text()
		if err != nil {
			return err
		}
		f.key = string(a.in[a.at+1 : a.at+n-1])
		a.copy(n + 1)
		if err := a.value(); err != nil {
			return fmt.Errorf("%s: %w", f.key, err)
		}
		f.end = len(a.out)
		fields = append(fields, f)
	}
	slices.SortFunc(fields, func(x, y field) int { return strings.Compare(x.key, y.key) })
	sorted := make([]byte, 0, len(a.out)-begin+len(fields))
	for i, f := range fields {
		if i > 0 {
			if fields[i-1].key == f.key {
				return fmt.Errorf("field %q is there twice", f.key)
			}
			sorted = append(sorted, ',')
		}
		sorted = append(sorted, a.out[f.begin:f.end]...)
	}
	a.out = append(a.out[:begin], sorted...)
	a.copy(1)
	return nil
}

// Document is what Decode reads.
type Document interface {
	// Validate reports the first value that is missing or out of bounds.
	Validate() error
}

// Decode reads the canonical encoding of a valid document into v, and names what
// is wrong with anything else: unknown, missing or repeated fields, white space,
// another order or number format, a value out of bounds. limit is the largest
// document, in bytes.
func Decode(data []byte, limit int, v Document) error {
	if len(data) > limit {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(data), limit)
	}
	if err := CheckKeys(data, nil); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if err := v.Validate(); err != nil {
		return err
	}
	encoded, err := Encode(v)
	if err != nil {
		return err
	}
	return compare(data, encoded)
}

// compare reports where data differs from its canonical encoding.
func compare(data, canonical []byte) error {
	if bytes.Equal(canonical, data) {
		return nil
	}
	at := 0
	for at < len(canonical) && at < len(data) && canonical[at] == data[at] {
		at++
	}
	around := func(b []byte) []byte { return b[max(at-12, 0):min(at+12, len(b))] }
	return fmt.Errorf("not canonical JSON (RFC 8785): at byte %d it has %#q, expected %#q", at, around(data), around(canonical))
}

// CheckKeys refuses JSON with an object that has one key twice: encoding/json
// would let the last one win, where another reader lets the first one. It calls
// each, if there is one, with every key. What follows the first value is checked
// like it, and left to the caller to refuse.
func CheckKeys(data []byte, each func(key string) error) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	type level struct {
		object bool
		key    bool // the next token is a key
		seen   []string
	}
	var stack []level
	for {
		token, err := dec.Token()
		if err == io.EOF {
			if len(stack) == 0 {
				return nil
			}
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		if top := len(stack) - 1; top >= 0 && stack[top].object && stack[top].key {
			if key, ok := token.(string); ok {
				if slices.Contains(stack[top].seen, key) {
					return fmt.Errorf("field %q is there twice", key)
				}
				if each != nil {
					if err := each(key); err != nil {
						return err
					}
				}
				stack[top].seen = append(stack[top].seen, key)
				stack[top].key = false
				continue
			}
		}
		switch token {
		case json.Delim('{'):
			stack = append(stack, level{object: true, key: true})
		case json.Delim('['):
			stack = append(stack, level{})
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:len(stack)-1]
		}
		if len(stack) > maxDepth {
			return errors.New("nested too deeply")
		}
		if token == json.Delim('{') || token == json.Delim('[') {
			continue
		}
		if top := len(stack) - 1; top >= 0 && stack[top].object {
			stack[top].key = true
		}
	}
}
