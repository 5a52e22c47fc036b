package image

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzBundle opens a bundle and reads all that its index names.
func FuzzBundle(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"modules/" + strings.Repeat("0", 64) + ".zip", "packages/" + strings.Repeat("1", 64) + ".deb"} {
		w.WriteHeader(&tar.Header{Format: tar.FormatUSTAR, Typeflag: tar.TypeReg, Name: name, Size: 3, Mode: 0o644})
		w.Write([]byte("abc"))
	}
	w.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "bundle")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := openBundle(path)
		if err != nil {
			return
		}
		defer b.file.Close()
		for name, e := range b.entries {
			if n, err := io.Copy(io.Discard, io.NewSectionReader(b.file, e.offset, e.size)); err != nil || n != e.size {
				t.Errorf("%s: %d bytes, %v", name, n, err)
			}
		}
	})
}

// FuzzModule reads a Go module's zip, which comes from a proxy or a bundle.
func FuzzModule(f *testing.F) {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, name := range []string{"a/b@v1.0.0/go.mod", "a/b@v1.0.0/x.go"} {
		file, _ := w.Create(name)
		file.Write([]byte("module a/b\n"))
	}
	w.Close()
	f.Add(b.Bytes())
	m := Module{Path: "a/b", Version: "v1.0.0"}
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "zip")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		walkModule(path, m, func(name string, content io.Reader) error {
			if !filepath.IsLocal(name) || !strings.HasPrefix(name, "a/b@v1.0.0/") {
				t.Errorf("it shows %q", name)
			}
			_, err := io.Copy(io.Discard, io.LimitReader(content, 1<<20))
			return err
		})
	})
}

// FuzzStanza reads what apt says about a package.
func FuzzStanza(f *testing.F) {
	f.Add("Package: a\nVersion: 1\nDescription: x\n more: y\n")
	f.Fuzz(func(t *testing.T, stanza string) {
		for name, value := range fields(stanza) {
			if strings.Contains(name, "\n") || strings.TrimSpace(value) != value {
				t.Errorf("%q: %q", name, value)
			}
		}
	})
}
