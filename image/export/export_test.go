package export

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"chrysalis/image/imagetest"
	"chrysalis/image/inspect"
	"chrysalis/image/profile"
	"chrysalis/manifest"
	"chrysalis/models"
	"chrysalis/verity"
	"chrysalis/verity/disk"
	"chrysalis/verity/gpt"
)

// artefacts are what 'make image' makes.
func artefacts(t *testing.T) Options {
	t.Helper()
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(source, "out")
	o := Options{
		Image:  filepath.Join(out, "chrysalis.efi"),
		Engine: filepath.Join(out, "llama.cpp.disk"),
		Models: []string{filepath.Join(out, "demo.disk")},
		Format: Raw, Out: filepath.Join(t.TempDir(), "disk"),
	}
	for _, path := range []string{o.Image, o.Engine, o.Models[0]} {
		if _, err := os.Stat(path); err != nil {
			imagetest.Missing(t, err)
		}
	}
	return o
}

func export(t *testing.T, o Options) Result {
	t.Helper()
	r, err := Write(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestWrite reads the disk with everything that reads one: image inspect, what
// the VM uses, sfdisk, fsck.fat and mtools.
func TestWrite(t *testing.T) {
	o := artefacts(t)
	steps := map[string]bool{}
	o.Progress = func(step string, done, total int64) { steps[step] = steps[step] || done == total && total > 0 }
	r := export(t, o)
	if want := map[string]bool{"check " + o.Engine: true, "check " + o.Models[0]: true, "write": true}; !maps.Equal(steps, want) {
		t.Errorf("progress: %v, expected %v", steps, want)
	}
	// What is exported without more ado is the VM that a release's manifest describes.
	if published := filepath.Join(filepath.Dir(o.Image), "llama.cpp.manifest.json"); !bytes.Equal(read(t, published), r.Manifest) {
		t.Errorf("the manifest is %s, and not what %s says", r.Manifest, published)
	}
	raw := read(t, o.Out)
	if int64(len(raw)) != r.Size {
		t.Fatalf("%d bytes, said to be %d", len(raw), r.Size)
	}
	report, err := inspect.Inspect(t.Context(), o.Out, nil)
	if err != nil || len(report.Problems) > 0 || len(report.Disk.Partitions) != 6 {
		t.Fatalf("inspect: %v, %+v", err, report)
	}
	var kinds []string
	for _, p := range report.Disk.Partitions {
		kinds = append(kinds, p.Kind+" "+p.Name)
	}
	if want := []string{
		"EFI system partition chrysalis-esp", "manifest chrysalis-manifest",
		"verity data chrysalis-engine", "verity hash tree chrysalis-engine-verity",
		"verity data chrysalis-model-0", "verity hash tree chrysalis-model-0-verity",
	}; !slices.Equal(kinds, want) {
		t.Errorf("partitions: %q, expected %q", kinds, want)
	}

	carried, err := gpt.ReadManifestDisk(bytes.NewReader(raw), r.Size)
	if err != nil || !bytes.Equal(carried, r.Manifest) || r.ManifestSHA384 != manifest.SHA384(carried) {
		t.Errorf("manifest: %s, %v", carried, err)
	}
	for _, path := range []string{o.Engine, o.Models[0]} {
		own := read(t, path)
		d, err := verity.OpenDisk(bytes.NewReader(own), int64(len(own)))
		if err != nil {
			t.Fatal(err)
		}
		at, err := verity.FindPartitions(bytes.NewReader(raw), r.Size, d.RootHash, d.DataBlocks)
		if err != nil {
			t.Fatal(err)
		}
		data, hash := int64(d.DataBlocks)*verity.BlockSize, int64(d.HashBlocks)*verity.BlockSize
		if !bytes.Equal(raw[at.DataOffset:][:data], own[d.DataOffset:][:data]) || !bytes.Equal(raw[at.HashOffset:][:hash], own[d.HashOffset:][:hash]) {
			t.Errorf("%s is not on the disk byte for byte", path)
		}
	}

	dir := filepath.Dir(o.Out)
	run := func(want string, args ...string) {
		t.Helper()
		out, err := imagetest.Command(t, dir, args...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v: %s", args[0], err, out)
		}
	}
	run("No errors detected", "sfdisk", "--verify", o.Out)
	esp := report.Disk.Partitions[0]
	if err := os.WriteFile(filepath.Join(dir, "esp"), raw[esp.Offset:][:esp.Size], 0o600); err != nil {
		t.Fatal(err)
	}
	run("5 files", "fsck.fat", "-n", "-v", filepath.Join(dir, "esp"))
	run("", "mcopy", "-i", filepath.Join(dir, "esp"), "::/EFI/BOOT/BOOTX64.EFI", filepath.Join(dir, "uki"))
	if !bytes.Equal(read(t, filepath.Join(dir, "uki")), read(t, o.Image)) {
		t.Error("mtools reads another UKI")
	}
}

// A disk may carry several models, in the order of the manifest.
func TestModels(t *testing.T) {
	o := artefacts(t)
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(t.TempDir(), "second")
	if _, err := models.Pack(t.Context(), filepath.Join(source, "models/demo/demo.gguf"), models.PackOptions{Name: "a/second", Revision: "2", Out: second}); err != nil {
		t.Fatal(err)
	}
	o.Models = append(o.Models, second)
	o.Engine = testEngine(t, "safetensors")
	if _, err := Write(t.Context(), o); err == nil || !strings.Contains(err.Error(), "reads safetensors") {
		t.Errorf("for an engine that cannot read them: %v", err)
	}
	o.Engine = testEngine(t, "gguf")
	m, err := manifest.Parse(export(t, o).Manifest)
	if err != nil || len(m.Models) != 2 || m.Models[1].ID() != "a/second@2" {
		t.Fatalf("manifest: %+v, %v", m, err)
	}
	report, err := inspect.Inspect(t.Context(), o.Out, nil)
	if err != nil || len(report.Problems) > 0 || len(report.Disk.Partitions) != 8 {
		t.Fatalf("inspect: %v, %+v", err, report)
	}
	for i, number := range []int{4, 6} {
		p := report.Disk.Partitions[number]
		if want := m.Models[i].ID() + ":" + m.Models[i].Disk.RootHash; p.Verity == nil || p.Verity.Model != want {
			t.Errorf("partition %d: %+v, expected the model %s", number+1, p, want)
		}
	}
}

// testEngine packs an engine disk with nothing but a profile, for one format.
func testEngine(t *testing.T, format string) string {
	t.Helper()
	p, err := json.Marshal(profile.Profile{
		Version: 1, Name: "test", Health: "/health", ReadySeconds: 5,
		Argv:        []profile.Args{{Args: []string{"/engine"}}},
		Environment: map[string]string{}, Parameters: map[string]profile.Parameter{},
		Formats: []string{format}, Cache: profile.CacheNone, Status: profile.Tested, Seccomp: []string{},
	})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "engine")
	if _, err := disk.PackTree(t.Context(), fstest.MapFS{profile.Path: {Data: p, Mode: 0o444}}, out, disk.Options{}); err != nil {
		t.Fatal(err)
	}
	return out
}

// Twice the same, in both formats; another manifest gives another disk.
func TestReproducible(t *testing.T) {
	for _, format := range []Format{Raw, QCOW2} {
		t.Run(string(format), func(t *testing.T) {
			a, b := artefacts(t), artefacts(t)
			a.Format, b.Format = format, format
			first, second := export(t, a), export(t, b)
			if !bytes.Equal(read(t, a.Out), read(t, b.Out)) {
				t.Error("two exports of the same inputs differ")
			}
			b.Manifest, b.Replace = filepath.Join(t.TempDir(), "manifest"), true
			m, err := manifest.Parse(second.Manifest)
			if err != nil {
				t.Fatal(err)
			}
			m.Limits.Concurrency++
			encoded, err := m.Encode()
			if err == nil {
				err = os.WriteFile(b.Manifest, encoded, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			if other := export(t, b); other.Disk == first.Disk || bytes.Equal(read(t, a.Out), read(t, b.Out)) {
				t.Error("another manifest gives the same disk")
			}
		})
	}
}

// What goes wrong leaves nothing behind, and what was there as it was.
func TestRefuses(t *testing.T) {
	good := artefacts(t)
	info, err := models.Inspect(good.Models[0])
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	damaged := read(t, good.Models[0])
	damaged[info.Disk.DataOffset+int64(info.Disk.DataBlocks)*verity.BlockSize/2] ^= 1
	corrupt := file("corrupt", damaged)
	cut := file("cut", damaged[:len(damaged)/2])
	text := string(export(t, good).Manifest)
	valid := func(old, with string) string {
		if !strings.Contains(text, old) {
			t.Fatalf("the manifest has no %s", old)
		}
		return file("manifest", []byte(strings.Replace(text, old, with, 1)))
	}
	root := info.Disk.RootHash.String()

	for _, tt := range []struct {
		name   string
		change func(*Options)
		is     error
		says   string
	}{
		{"no such format", func(o *Options) { o.Format = "vmdk" }, nil, "no format"},
		{"no image", func(o *Options) { o.Image += "x" }, fs.ErrNotExist, "image"},
		{"the image is none", func(o *Options) { o.Image = o.Engine }, nil, "image"},
		{"no engine", func(o *Options) { o.Engine = "" }, fs.ErrNotExist, ""},
		{"the engine is no disk", func(o *Options) { o.Engine = o.Image }, verity.ErrInvalid, ""},
		{"the engine is a model", func(o *Options) { o.Engine = o.Models[0] }, nil, "root hash of"},
		{"no model", func(o *Options) { o.Models = nil }, nil, "--model"},
		{"the model is an engine", func(o *Options) { o.Models[0] = o.Engine }, nil, "root hash of"},
		{"a model twice", func(o *Options) { o.Models = append(o.Models, o.Models[0]) }, nil, "once"},
		{"a corrupt model", func(o *Options) { o.Models[0] = corrupt }, verity.ErrCorrupt, "corrupt"},
		{"a truncated model", func(o *Options) { o.Models[0] = cut }, verity.ErrInvalid, ""},
		{"no such parameter", func(o *Options) { o.Parameters = map[string]int64{"tools": 1} }, nil, "tools"},
		{"too many GPUs", func(o *Options) { o.GPUs = 9 }, nil, "gpus"},
		{"manifest and parameters", func(o *Options) {
			o.Manifest, o.Parameters = valid("{", "{"), map[string]int64{"context": 1}
		}, nil, "either"},
		{"no such manifest", func(o *Options) { o.Manifest = "none" }, fs.ErrNotExist, "manifest"},
		{"malformed manifest", func(o *Options) { o.Manifest = valid("}", "") }, nil, "manifest"},
		{"huge manifest", func(o *Options) { o.Manifest = o.Models[0] }, nil, "at most"},
		{"the manifest names another model", func(o *Options) {
			o.Manifest = valid(root, strings.Repeat("0", 64))
		}, nil, root},
		{"the output is there", func(o *Options) { o.Replace = false }, fs.ErrExist, "--force"},
		{"the output's folder is not", func(o *Options) { o.Out = filepath.Join(filepath.Dir(o.Out), "a", "b") }, fs.ErrNotExist, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := good
			o.Models = slices.Clone(good.Models)
			o.Out, o.Replace = filepath.Join(t.TempDir(), "disk"), true
			if err := os.WriteFile(o.Out, []byte("before"), 0o600); err != nil {
				t.Fatal(err)
			}
			kept := o.Out
			tt.change(&o)
			_, err := Write(t.Context(), o)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v", err)
			}
			if string(read(t, kept)) != "before" {
				t.Error("what was there has changed")
			}
			if list, _ := os.ReadDir(filepath.Dir(kept)); len(list) != 1 {
				t.Errorf("left behind: %v", list)
			}
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		o := good
		o.Out = filepath.Join(t.TempDir(), "disk")
		o.Progress = func(step string, done, _ int64) {
			if step == "write" && done > 8<<20 {
				cancel()
			}
		}
		if _, err := Write(ctx, o); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if list, _ := os.ReadDir(filepath.Dir(o.Out)); len(list) != 0 {
			t.Errorf("left behind: %v", list)
		}
	})
}
