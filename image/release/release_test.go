package release_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/image/imagetest"
	"chrysalis/image/provenance"
	"chrysalis/image/release"
)

func sample() *release.Release {
	return &release.Release{
		Version: 1, Lock: "aa",
		Artefacts: []release.File{{Name: "chrysalis.efi", Size: 1, SHA256: "bb"}, {Name: "demo.disk", Size: 2, SHA256: "cc"}},
		Tools:     release.Tools{Key: "0123456789abcdef", Entries: 3, SHA256: "dd"},
		Inputs: release.Measurement{
			Sections:  []release.Section{{Name: ".linux", Size: 4, SHA384: "ee"}},
			Manifests: []release.Section{}, Firmware: []release.File{}, QEMU: "1:11",
		},
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(r *release.Release)
		want   []string
	}{
		{"nothing", func(*release.Release) {}, nil},
		{"an artefact", func(r *release.Release) { r.Artefacts[0].SHA256 = "b0" },
			[]string{"artefacts chrysalis.efi.sha256 is b0, bb expected"}},
		{"the lock", func(r *release.Release) { r.Lock = "a0" }, []string{"lock is a0, aa expected"}},
		{"a tool", func(r *release.Release) { r.Tools.SHA256 = "d0" }, []string{"tools.sha256 is d0, dd expected"}},
		{"a section", func(r *release.Release) { r.Inputs.Sections[0].SHA384 = "e0" },
			[]string{"measurement_inputs.uki_sections .linux.sha384 is e0, ee expected"}},
		{"QEMU", func(r *release.Release) { r.Inputs.QEMU = "1:12" }, []string{"measurement_inputs.qemu is 1:12, 1:11 expected"}},
		{"an artefact less", func(r *release.Release) { r.Artefacts = r.Artefacts[:1] },
			[]string{"artefacts demo.disk.sha256 is not there, cc expected", "artefacts demo.disk.size is not there, 2 expected"}},
		{"an artefact more", func(r *release.Release) {
			r.Artefacts = append(r.Artefacts, release.File{Name: "x", Size: 1, SHA256: "ff"})
		}, []string{"artefacts x.sha256 is ff and was not expected", "artefacts x.size is 1 and was not expected"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			found := sample()
			c.change(found)
			if got := release.Diff(sample(), found); !slices.Equal(got, c.want) {
				t.Errorf("it says %q, want %q", got, c.want)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	good := string(sample().Encode())
	if r, err := release.Parse([]byte(good)); err != nil || !bytes.Equal(r.Encode(), []byte(good)) {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, data, want string }{
		{"nothing", "", "not the hashes of a release"},
		{"an HTML page", "<html>", "not the hashes of a release"},
		{"unknown field", strings.Replace(good, `"version"`, `"more": 1, "version"`, 1), "unknown field"},
		{"other version", strings.Replace(good, `"version": 1`, `"version": 2`, 1), "version is 2"},
		{"other form", strings.Replace(good, "  ", " ", 1), "not as 'chrysalis image release' writes it"},
		{"field twice", strings.Replace(good, `"lock"`, `"lock": "x", "lock"`, 1), "not as"},
		{"something behind it", good + "{}", "not as"},
		{"too much", strings.Repeat(" ", release.MaxSize+1), "more than"},
	} {
		if _, err := release.Parse([]byte(c.data)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: it says %v, want %q", c.name, err, c.want)
		}
	}
}

// TestDescribe describes what 'make image' has made, and what it has not.
func TestDescribe(t *testing.T) {
	imagetest.Tools(t)
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	p, err := provenance.NewParameters("", []string{"llama.cpp"}, []string{"demo"})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(source, "out")
	for _, name := range p.Artefacts() {
		if _, err := os.Stat(filepath.Join(out, name)); err != nil {
			imagetest.Missing(t, err)
		}
	}
	r, err := release.Describe(t.Context(), source, out, p)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range r.Artefacts {
		names = append(names, f.Name)
	}
	if want := []string{"chrysalis.efi", "demo.disk", "demo.disk.json", "llama.cpp.disk", "llama.cpp.manifest.json"}; !slices.Equal(names, want) {
		t.Errorf("it names %q, want %q", names, want)
	}
	if r.Tools.Entries < 1000 || len(r.Inputs.Sections) < 5 || len(r.Inputs.Manifests) != 1 || len(r.Inputs.Firmware) != 3 || r.Inputs.QEMU == "" {
		t.Errorf("%+v", r)
	}
	dir := t.TempDir()
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	if again, err := release.Read(dir); err != nil || len(release.Diff(r, again)) != 0 {
		t.Errorf("it is not read as it was written: %v", err)
	}
	if _, err := release.Describe(t.Context(), source, dir, p); err == nil || !strings.Contains(err.Error(), "chrysalis image build") {
		t.Errorf("a folder without artefacts: %v", err)
	}
}

// The committed file can be read. CI compares it with what it has built.
func TestCommitted(t *testing.T) {
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := release.Read(source); err != nil {
		t.Errorf("%v; write it with 'make release'", err)
	}
}
