package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// What follows takes a JSON text apart without copying it: a value is a slice of
// the request's body. encoding/json would decode a 16 MiB body into several times
// its size, takes "Messages" for "messages", and lets the last of two equal keys
// win where the engine may let the first one.

// maxDepth is how deeply a request's arrays and objects may be nested.
const maxDepth = 64

// maxKey bounds a field's name, in bytes as it is written.
const maxKey = 256

// maxModel bounds how a model is named, in bytes: ORG/NAME@REVISION:ROOTHASH.
const maxModel = 2*64 + 1 + 1 + 64 + 1 + 64

// checkText reports whether data is one JSON text (RFC 8259) that every reader
// reads alike: UTF-8, no half of a surrogate pair, nested at most maxDepth deep.
// Everything else in this file relies on it.
func checkText(data []byte) error {
	switch {
	case !utf8.Valid(data):
		return errors.New("it is not UTF-8")
	case depth(data) > maxDepth:
		return errors.New("it is nested more than " + strconv.Itoa(maxDepth) + " levels deep")
	case !json.Valid(data):
		return errors.New("it is not one JSON text")
	case !surrogatesPaired(data):
		return errors.New("it has half of a surrogate pair")
	}
	return nil
}

// depth returns how deeply arrays and objects are nested. Of a text that is not
// JSON it returns some number.
func depth(data []byte) int {
	deepest, level, quoted := 0, 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			level++
			deepest = max(deepest, level)
		case c == '}' || c == ']':
			level--
		}
	}
	return deepest
}

// surrogatesPaired reports whether each \u escape of a surrogate belongs to a
// pair. Those that do not are not text: one reader replaces them, another refuses
// the whole.
func surrogatesPaired(data []byte) bool {
	unit := func(at int) rune {
		v, _ := strconv.ParseUint(string(data[at:at+4]), 16, 16)
		return rune(v)
	}
	for i := 0; ; {
		next := bytes.IndexByte(data[i:], '\\')
		if next < 0 {
			return true
		}
		i += next
		switch {
		case data[i+1] != 'u':
			i += 2
		case !utf16.IsSurrogate(unit(i + 2)):
			i += 6
		case !bytes.HasPrefix(data[i+6:], []byte(`\u`)),
			utf16.DecodeRune(unit(i+2), unit(i+8)) == utf8.RuneError:
			return false
		default:
			i += 12
		}
	}
}

// cursor steps through a text that checkText accepts.
type cursor struct {
	data []byte
	at   int
}

func (c *cursor) space() {
	for c.at < len(c.data) {
		switch c.data[c.at] {
		case ' ', '\t', '\r', '\n':
			c.at++
		default:
			return
		}
	}
}

// next steps over white space and the given structural characters and returns
// the character it then stands on, or 0 at the end.
func (c *cursor) next(skip byte) byte {
	c.space()
	if c.at < len(c.data) && c.data[c.at] == skip {
		c.at++
		c.space()
	}
	if c.at == len(c.data) {
		return 0
	}
	return c.data[c.at]
}

// value steps over the value that the cursor stands on and returns it.
func (c *cursor) value() []byte {
	from, level, quoted := c.at, 0, false
	for ; c.at < len(c.data); c.at++ {
		switch b := c.data[c.at]; {
		case quoted && b == '\\':
			c.at++
		case b == '"':
			quoted = !quoted
		case quoted:
		case b == '{' || b == '[':
			level++
		case level == 0 && (b == ',' || b == ':' || b == '}' || b == ']' || b == ' ' || b == '\t' || b == '\r' || b == '\n'):
			return c.data[from:c.at]
		case b == '}' || b == ']':
			level--
		}
	}
	return c.data[from:c.at]
}

// members calls visit for each member of an object, in the text's order, until it
// returns an error. It does not look for keys that are there twice: visit does,
// as it knows how few there can be.
func members(object []byte, visit func(key string, value []byte) error) error {
	c := &cursor{data: object}
	for b := c.next('{'); b != '}' && b != 0; b = c.next(',') {
		name := c.value()
		c.next(':')
		value := c.value()
		if len(name) > maxKey {
			return invalid{reason: "has a field whose name is too long"}
		}
		if err := visit(unquote(name), value); err != nil {
			return err
		}
	}
	return nil
}

// elements calls visit for each element of an array until it returns an error.
func elements(array []byte, visit func(i int, value []byte) error) error {
	c := &cursor{data: array}
	i := 0
	for b := c.next('['); b != ']' && b != 0; b = c.next(',') {
		if err := visit(i, c.value()); err != nil {
			return err
		}
		i++
	}
	return nil
}

// unquote returns the string that a JSON string stands for.
func unquote(raw []byte) string {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1])
	}
	var s string
	json.Unmarshal(raw, &s) // checkText has accepted it
	return s
}

func isString(raw []byte) bool { return raw[0] == '"' }
func isObject(raw []byte) bool { return raw[0] == '{' }
func isArray(raw []byte) bool  { return raw[0] == '[' }
func isBool(raw []byte) bool   { return raw[0] == 't' || raw[0] == 'f' }
func isNull(raw []byte) bool   { return raw[0] == 'n' }
