// Package enginetest makes small OCI layouts for tests.
package enginetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// Layer is the entries of a layer in order. Entries whose name begins with .wh. are
// whiteouts.
type Layer []Entry

// Entry is an entry of a layer: a tar header and, for a file, its content. Size is
// filled in, and the mode of what has none.
type Entry struct {
	tar.Header
	Content string
}

// File returns an entry for a file.
func File(name, content string, mode int64) Entry {
	return Entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode}, content}
}

// Dir returns an entry for a folder.
func Dir(name string) Entry {
	return Entry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}

// Link returns an entry for a symbolic link.
func Link(name, target string) Entry {
	return Entry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, ""}
}

// Tar returns the layer as a tar stream.
func (l Layer) Tar(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range l {
		h := e.Header
		h.Size = int64(len(e.Content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.Content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// An Image is what a layout's manifest and configuration say; a test may change
// them before Write.
type Image struct {
	Manifest map[string]any
	Config   map[string]any
	Blobs    map[string][]byte // by digest, sha256:…
}

// New makes an image of layers, compressed in turn with gzip, zstd, and not at all.
func New(t testing.TB, layers ...Layer) *Image {
	t.Helper()
	im := &Image{Blobs: map[string][]byte{}}
	var descriptors []any
	var diffIDs []string
	for i, l := range layers {
		plain := l.Tar(t)
		packed, kind := plain, "application/vnd.oci.image.layer.v1.tar"
		switch i % 3 {
		case 0:
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			w.Write(plain)
			w.Close()
			packed, kind = b.Bytes(), kind+"+gzip"
		case 1:
			w, err := zstd.NewWriter(nil)
			if err != nil {
				t.Fatal(err)
			}
			packed, kind = w.EncodeAll(plain, nil), kind+"+zstd"
		}
		descriptors = append(descriptors, im.add(packed, kind))
		diffIDs = append(diffIDs, Digest(plain))
	}
	im.Config = map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}}
	im.Manifest = map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": descriptors}
	return im
}

// Digest returns sha256: and the digits.
func Digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func (im *Image) add(b []byte, kind string) map[string]any {
	im.Blobs[Digest(b)] = b
	return map[string]any{"mediaType": kind, "digest": Digest(b), "size": len(b)}
}

// AddJSON adds a blob and returns its descriptor.
func (im *Image) AddJSON(t testing.TB, v any, kind string) map[string]any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return im.add(b, kind)
}

// Seal adds configuration and manifest, and returns the manifest's digest.
func (im *Image) Seal(t testing.TB) string {
	t.Helper()
	im.Manifest["config"] = im.AddJSON(t, im.Config, "application/vnd.oci.image.config.v1+json")
	return im.AddJSON(t, im.Manifest, "application/vnd.oci.image.manifest.v1+json")["digest"].(string)
}

// Write writes the layout into a new folder and returns how the image is named:
// oci:DIR@sha256:…
func (im *Image) Write(t testing.TB) string {
	t.Helper()
	im.Manifest["config"] = im.AddJSON(t, im.Config, "application/vnd.oci.image.config.v1+json")
	return im.WriteAs(t, im.AddJSON(t, im.Manifest, "application/vnd.oci.image.manifest.v1+json"))
}

// WriteAs is Write for a given top descriptor.
func (im *Image) WriteAs(t testing.TB, top map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{top}})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index}
	for digest, b := range im.Blobs {
		files[filepath.Join("blobs", "sha256", digest[len("sha256:"):])] = b
	}
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "oci:" + dir + "@" + top["digest"].(string)
}
