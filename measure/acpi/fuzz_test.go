package acpi

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"testing"
)

// FuzzLoad reads a file of the cache, which may be damaged.
func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"Key":1,"Tables":{"Loader":"AAAA","Files":{"etc/acpi/rsdp":"AAAA"}},"Sum":"AAAA"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(data)
		z.Close()
		path := filepath.Join(t.TempDir(), "tables")
		for _, content := range [][]byte{data, b.Bytes()} {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if tables, ok := load(path, []byte("1")); ok && tables == nil {
				t.Error("no tables")
			}
		}
	})
}
