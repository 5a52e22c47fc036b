package card

import (
	"bytes"
	"testing"
)

// FuzzParse reads the card of a model disk: what is accepted is canonical.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"a/b","revision":"1","format":"gguf","files":[{"path":"m.gguf","size":1,"sha256":"00"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data)
		if err != nil {
			return
		}
		if again, err := c.Encode(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("%q is read, and written as %q, %v", data, again, err)
		}
	})
}
