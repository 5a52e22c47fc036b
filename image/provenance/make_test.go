package provenance

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/image"
	"chrysalis/models"
	"chrysalis/models/card"
	"chrysalis/verity/disk"
)

// A model of the tree is made as 'chrysalis model pack' makes it.
func TestPackModel(t *testing.T) {
	const source = "../.."
	b := &image.Builder{Source: source, Out: t.TempDir(), Progress: func(string, int64, int64) {}}
	info, err := packModel(t.Context(), b, "demo")
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "demo.disk")
	want, err := models.Pack(t.Context(), filepath.Join(source, "models/demo/demo.gguf"), models.PackOptions{Name: "chrysalis/demo", Revision: "1", Out: other})
	if err != nil || info.Ref() != want.Ref() {
		t.Fatalf("%v: it is %+v, want %+v", err, info, want)
	}
	one, _ := os.ReadFile(filepath.Join(b.Out, "demo.disk"))
	two, _ := os.ReadFile(other)
	if len(one) == 0 || !bytes.Equal(one, two) {
		t.Error("the disk is another")
	}
}

func TestPackModelRefuses(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"no such model", "", `there is no model "mine"`},
		{"not JSON", "<html>", "model.json: "},
		{"unknown field", `{"url":"x"}`, `unknown field "url"`},
		{"a path", `{"name":"a/b","revision":"1","weights":"../x.gguf"}`, `"../x.gguf" is not a file beside it`},
		{"no such file", `{"name":"a/b","revision":"1","weights":"x.gguf"}`, "no such file"},
		{"a name that is none", `{"name":"b","revision":"1","weights":"model.json"}`, `"b"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			source := t.TempDir()
			dir := filepath.Join(source, "models", "mine")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if c.text != "" {
				if err := os.WriteFile(filepath.Join(dir, "model.json"), []byte(c.text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			b := &image.Builder{Source: source, Out: t.TempDir(), Progress: func(string, int64, int64) {}}
			if _, err := packModel(t.Context(), b, "mine"); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("it says %v, want %q", err, c.want)
			}
			if left, _ := os.ReadDir(b.Out); len(left) > 0 {
				t.Errorf("it leaves %v", left)
			}
		})
	}
}

func TestWriteManifest(t *testing.T) {
	dir := t.TempDir()
	engine, err := disk.PackTree(t.Context(), os.DirFS("../engines/llama.cpp"), filepath.Join(dir, "e.disk"), disk.Options{Salt: []byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	info := models.Info{Card: card.Card{Name: "a/b", Revision: "1"}, Disk: engine}
	want, err := models.Manifest(engine, []models.Info{info}, 0, nil).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := writeManifest(dir, "e", []models.Info{info}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "e.manifest.json")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v: it is %s, want %s", err, got, want)
	}
	if err := writeManifest(dir, "none", []models.Info{info}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no engine disk: %v", err)
	}
	// An engine without models serves nothing.
	if err := writeManifest(dir, "none", nil); err != nil {
		t.Error(err)
	}
}
