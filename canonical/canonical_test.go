package canonical

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

type document struct {
	Version int            `json:"version"`
	Name    string         `json:"name"`
	List    []int64        `json:"list"`
	Extra   map[string]any `json:"extra,omitempty"`
}

func (d *document) Validate() error {
	if d.Version != 1 {
		return errors.New("version is not 1")
	}
	return nil
}

func TestEncode(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   any
		want string
		err  string
	}{
		{"order", map[string]any{"b": 1, "a": []string{"x"}, "A": true}, `{"A":true,"a":["x"],"b":1}`, ""},
		{"struct", document{Version: 1, Name: "n", List: []int64{3, -1}}, `{"list":[3,-1],"name":"n","version":1}`, ""},
		{"largest", 1<<53 - 1, `9007199254740991`, ""},
		{"too large", int64(1 << 53), "", "2^53"},
		{"too small", int64(-1 << 53), "", "2^53"},
		{"fraction", 1.5, "", "not an integer"},
		{"exponent", 1e30, "", "not an integer"},
		{"null", []any{nil}, "", "null"},
		{"umlaut", "ä", "", "printable ASCII"},
		{"quote", map[string]any{"k": `a"b`}, "", "printable ASCII"},
		{"HTML", "a<b", "", "printable ASCII"},
		{"newline", "a\nb", "", "printable ASCII"},
		{"bad key", map[string]any{"ä": 1}, "", "printable ASCII"},
		{"not JSON", func() {}, "", "encode"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Encode(tt.in)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("%s, %v; expected an error with %q", got, err, tt.err)
				}
				return
			}
			if err != nil || string(got) != tt.want {
				t.Errorf("%s, %v; expected %s", got, err, tt.want)
			}
		})
	}
}

func TestDecode(t *testing.T) {
	const good = `{"list":[3,-1],"name":"n","version":1}`
	for _, tt := range []struct{ name, in, err string }{
		{"good", good, ""},
		{"empty", "", "EOF"},
		{"white space", " " + good, "at byte 0"},
		{"final newline", good + "\n", "not canonical"},
		{"two documents", good + good, "not canonical"},
		{"another order", `{"name":"n","list":[3,-1],"version":1}`, "not canonical"},
		{"unknown field", `{"list":[],"name":"n","other":1,"version":1}`, "unknown field"},
		{"missing field", `{"list":[],"version":1}`, "not canonical"},
		{"null", `{"list":null,"name":"n","version":1}`, "null"},
		{"twice", `{"list":[],"name":"n","name":"n","version":1}`, "is there twice"},
		{"twice, deep", `{"extra":{"a":{"b":1,"b":1}},"list":[],"name":"n","version":1}`, "is there twice"},
		{"another case", `{"List":[3,-1],"name":"n","version":1}`, "not canonical"},
		{"number format", `{"list":[3,-1],"name":"n","version":1.0}`, "number 1.0"},
		{"exponent", `{"list":[3,-1],"name":"n","version":1e0}`, "number 1e0"},
		{"escape", `{"list":[3,-1],"name":"\u006e","version":1}`, "not canonical"},
		{"invalid", `{"list":[],"name":"n","version":2}`, "version is not 1"},
		{"cut short", good[:10], "unexpected"},
		{"too deep", strings.Repeat("[", 9), "too deeply"},
		{"too long", strings.Repeat(" ", 1000), "at most 200"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var d document
			err := Decode([]byte(tt.in), 200, &d)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%v, expected %q", err, tt.err)
			}
		})
	}
}

// What Decode takes has one encoding, and it is what was read.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"list":[3,-1],"name":"n","version":1}`, `{"extra":{"a":[{}]},"list":[],"name":"","version":1}`,
		`{"list":[],"name":"n","name":"n","version":1}`, `[[[[[[[[[`, `{"list":[1e3],"name":"n","version":1}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var d document
		if Decode(data, 1<<12, &d) != nil {
			return
		}
		if !json.Valid(data) {
			t.Fatal("it is not JSON")
		}
		again, err := Encode(&d)
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%s, %v; it was read from %s", again, err, data)
		}
	})
}

// FuzzEncode compares with the slow way: decode into a tree, which encoding/json
// writes with its keys in order.
func FuzzEncode(f *testing.F) {
	for _, s := range []string{`{"b":[1,{"d":true,"c":"x"}],"a":-5}`, `{"a":1.5}`, `{"é":1}`, `["<"]`, `null`, `{"a":{},"b":[]}`, `9007199254740992`, `-0`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if !json.Valid(data) || CheckKeys(data, nil) != nil {
			return
		}
		got, err := Encode(json.RawMessage(data))
		if err != nil {
			return
		}
		var tree any
		dec := json.NewDecoder(bytes.NewReader(data))
		dec.UseNumber()
		if err := dec.Decode(&tree); err != nil {
			t.Fatal(err)
		}
		if want, err := json.Marshal(tree); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s, expected %s", got, want)
		}
	})
}
