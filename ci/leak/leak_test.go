package leak

import (
	"encoding/base64"
	"encoding/hex"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const secret = "marker-5b2e0c77a91d4f6e8d3c"

// TestFind is the control of every test that finds nothing: each form is found
// where it is, whatever is around it.
func TestFind(t *testing.T) {
	escaped := ""
	for _, c := range secret {
		escaped += `\u00` + hex.EncodeToString([]byte(string(c)))
	}
	wide := func(order func(c byte) string) (s string) {
		for i := range len(secret) {
			s += order(secret[i])
		}
		return s
	}
	reversed := wide(func(c byte) string { return string(c) })
	b := []byte(reversed)
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
	for name, text := range map[string]string{
		"as it is":        secret,
		"half of it":      secret[len(secret)/2-2:],
		"reversed":        string(b),
		"hexadecimal":     hex.EncodeToString([]byte(secret)),
		"HEXADECIMAL":     strings.ToUpper(hex.EncodeToString([]byte(secret))),
		"JSON-escaped":    escaped,
		"UTF-16LE":        wide(func(c byte) string { return string([]byte{c, 0}) }),
		"UTF-16BE":        wide(func(c byte) string { return string([]byte{0, c}) }),
		"percent-encoded": url.QueryEscape(secret),
	} {
		if len(Find([]byte("before "+text+" after"), []byte(secret))) == 0 {
			t.Errorf("%s: not found", name)
		}
	}
	for before := range 4 {
		text := []byte(strings.Repeat("x", before) + secret + "y")
		for _, e := range []*base64.Encoding{base64.StdEncoding, base64.RawURLEncoding} {
			if len(Find([]byte(e.EncodeToString(text)), []byte(secret))) == 0 {
				t.Errorf("base64 after %d bytes: not found", before)
			}
		}
	}
	if found := Find([]byte("nothing of it is here, only marker-"), []byte(secret)); len(found) > 0 {
		t.Errorf("found %v where it is not", found)
	}
}

func TestFindInFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b.log")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(path, []byte("quiet"), 0o600)
	if found, size, err := FindInFiles(dir, []byte(secret)); len(found) > 0 || size != 5 || err != nil {
		t.Errorf("%v, %d bytes, %v", found, size, err)
	}
	os.WriteFile(path, []byte("loud: "+hex.EncodeToString([]byte(secret))), 0o600)
	if found, _, err := FindInFiles(dir, []byte(secret)); len(found) == 0 || err != nil {
		t.Errorf("%v, %v", found, err)
	}
}
