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
	var tree any
	dec := json.NewDecoder(bytes.NewReader(plain))
	dec.UseNumber()
	if err := dec.Decode(&tree); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	if err := check(tree); err != nil {
		return nil, err
	}
	out, err := json.Marshal(tree) // encoding/json sorts a map's keys by bytes
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return out, nil
}

// check refuses values whose encoding by encoding/json might not be RFC 8785's.
func check(v any) error {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if err := check(key); err != nil {
				return err
			}
			if err := check(value); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
	case []any:
		for i, value := range v {
			if err := check(value); err != nil {
				return fmt.Errorf("[%d]: %w", i, err)
			}
		}
	case string:
		for i := range len(v) {
			if c := v[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
				return fmt.Errorf("a string has the byte %#02x; only printable ASCII without quotes, backslashes, '<', '>' and '&' is allowed", c)
			}
		}
	case json.Number:
		if n, err := v.Int64(); err != nil || n > maxInteger || n < -maxInteger {
			return fmt.Errorf("%.40s is not an integer of at most 2^53 - 1", v)
		}
	case nil:
		return errors.New("null is not allowed")
	}
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
