package vmtest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"chrysalis/models"
)

// TestBadDisks boots a VM with a manifest that is right and disks that are not.
func TestBadDisks(t *testing.T) {
	model := describe(t, demo)
	flip := func(offset int64) func([]byte) []byte {
		return func(data []byte) []byte {
			data[offset] ^= 1
			return data
		}
	}
	// Other weights under the same name: one byte of the last tensor differs.
	weights, err := os.ReadFile(filepath.Join(source, "models/demo/demo.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	weights[len(weights)-100] ^= 1
	gguf, other := filepath.Join(t.TempDir(), "other.gguf"), filepath.Join(t.TempDir(), "other.disk")
	if err := os.WriteFile(gguf, weights, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := models.Pack(t.Context(), gguf, models.PackOptions{Name: "chrysalis/demo", Revision: "1", Out: other}); err != nil {
		t.Fatal(err)
	}
	// Another model's data and tree under the right model's UUIDs.
	impostor := damaged(t, other, func(data []byte) []byte {
		right, err := os.ReadFile(demo)
		if err != nil {
			t.Fatal(err)
		}
		copy(data[:1<<20], right[:1<<20])
		return data
	})

	for _, c := range []struct {
		name   string
		model  string // "" attaches none
		reason string
	}{
		{"flipped data byte", damaged(t, demo, flip(model.DataOffset+int64(model.DataBlocks)*4096/2)), "disk-corrupt"},
		{"flipped hash byte", damaged(t, demo, flip(model.HashOffset+4096*int64(model.HashBlocks)-4096+100)), "disk-corrupt"},
		{"truncated", damaged(t, demo, func(data []byte) []byte { return data[:len(data)/2] }), "disk-missing"},
		{"another model's", other, "disk-missing"},
		{"another model's under the right UUIDs", impostor, "disk-corrupt"},
		{"absent", "", "disk-missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			args := []string{"--engine", llama, "--manifest", writeManifest(t, llama, demo, nil)}
			if c.model != "" {
				args = append(args, "--model", c.model)
			} else {
				// The launcher wants a model disk; the engine's is not one.
				args = append(args, "--model", llama)
			}
			h.upFails(c.reason, args...)
		})
	}
}

// TestBadManifests boots a VM with the right disks and a manifest that the
// agent must refuse.
func TestBadManifests(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func([]byte) []byte
		reason string
	}{
		{"malformed", func(b []byte) []byte { return b[:len(b)-1] }, "manifest-invalid"},
		{"unknown field", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"gpus":0`), []byte(`"debug":1,"gpus":0`), 1)
		}, "manifest-invalid"},
		{"duplicate key", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"gpus":0`), []byte(`"gpus":0,"gpus":0`), 1)
		}, "manifest-invalid"},
		{"no disk has the root hash", func(b []byte) []byte {
			root := []byte(describe(t, demo).RootHash.String())
			return bytes.Replace(b, root, bytes.Repeat([]byte("0"), len(root)), 1)
		}, "disk-missing"},
		{"more GPUs than there are", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"gpus":0`), []byte(`"gpus":1`), 1)
		}, "gpu-count"},
		{"a parameter that the engine lacks", func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"parameters":{}`), []byte(`"parameters":{"tools":1}`), 1)
		}, "engine-profile"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			newHost(t).upFails(c.reason, "--engine", llama, "--model", demo,
				"--manifest", writeManifest(t, llama, demo, c.change))
		})
	}
}

// TestBadEngines boots engines that never work.
func TestBadEngines(t *testing.T) {
	for mode, reason := range map[string]string{"exit": "engine-start", "hang": "engine-timeout"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			newHost(t).upFails(reason, "--engine", testEngine(t, mode), "--model", demo)
		})
	}
}
