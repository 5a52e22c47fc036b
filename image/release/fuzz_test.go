package release_test

import (
	"bytes"
	"testing"

	"chrysalis/image/release"
)

// FuzzParse reads release.json: what is accepted is as it is written.
func FuzzParse(f *testing.F) {
	f.Add([]byte("{\n  \"version\": 1\n}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := release.Parse(data); err == nil && !bytes.Equal(r.Encode(), data) {
			t.Errorf("%q is read, and written as %q", data, r.Encode())
		}
	})
}
