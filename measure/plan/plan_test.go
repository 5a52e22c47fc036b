package plan

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis"
	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/measure"
	"chrysalis/measure/record"
)

func TestQEMUVersions(t *testing.T) {
	for version, want := range map[string]struct {
		order   measure.PageOrder
		patches bool
	}{
		"8.2.2": {measure.TwoPass, true}, "9.0": {measure.Interleaved, true}, "10.1.5": {measure.Interleaved, true},
		"10.2": {measure.Interleaved, false}, "11.1.3": {measure.Interleaved, false},
	} {
		order, err := PageOrder(version)
		patches, err2 := Patches(version)
		if err != nil || err2 != nil || order != want.order || patches != want.patches {
			t.Errorf("%s: %v, %v, %v, %v", version, order, patches, err, err2)
		}
	}
	for _, bad := range []string{"", "ten", "10"} {
		if _, err := PageOrder(bad); err == nil {
			t.Errorf("%q is a version", bad)
		}
		if _, err := Patches(bad); err == nil {
			t.Errorf("%q is a version", bad)
		}
	}
	lock, err := image.ParseLock(chrysalis.ImageLock)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := QEMUVersion(lock); err != nil || strings.Count(v, ".") != 2 {
		t.Errorf("%q, %v", v, err)
	}
}

func TestProcessors(t *testing.T) {
	madt := func(entries ...byte) []byte {
		b := append([]byte("APIC\x00\x00\x00\x00"), make([]byte, 36)...)
		b = append(b, entries...)
		binary.LittleEndian.PutUint32(b[4:], uint32(len(b)))
		return b
	}
	other := append([]byte("FACP\x10\x00\x00\x00"), make([]byte, 8)...)
	tables := append(append(other, madt(0, 8, 0, 0, 1, 0, 0, 0, 1, 4, 0, 0, 9, 4, 0, 0)...), make([]byte, 100)...)
	if n, err := processors(tables); n != 2 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	for name, bad := range map[string][]byte{
		"none":      other,
		"cut short": madt(0, 8)[:40],
		"entry":     madt(0, 1),
		"beyond":    madt(0, 9),
	} {
		if n, err := processors(bad); err == nil {
			t.Errorf("%s: %d", name, n)
		}
	}
}

// The firmware of TDs is made of what the tools root has, always the same, and
// is one whose measurements are known.
func TestConfigB(t *testing.T) {
	tools := imagetest.Tools(t)
	f, err := OpenFirmware(tools, record.TDX, "")
	if err != nil {
		t.Fatal(err)
	}
	if f.Profile.Name != "debian-2026.08-config-b" {
		t.Errorf("profile %q of the firmware with SHA-256 %x", f.Profile.Name, f.SHA256)
	}
	keys, err := OpenFirmware(tools, record.TDX, filepath.Join(tools.Dir, tdxFirmware))
	if err != nil {
		t.Fatal(err)
	}
	a, err := f.MRTD(measure.Interleaved)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := keys.MRTD(measure.Interleaved); err != nil || string(a) != string(b) {
		t.Errorf("MRTD differs from that of the build with keys: %x, %x, %v", a, b, err)
	}
	if generic, err := OpenFirmware(tools, record.TPM, ""); err != nil || generic.Profile.Name != "debian-2026.08-generic" {
		t.Errorf("profile of the generic firmware: %v, %v", generic.Profile.Name, err)
	}
}

// A missing input is an error that names it, never a register.
func TestRunRefuses(t *testing.T) {
	tools := imagetest.Tools(t)
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	good := Options{Platform: record.TDX, Boot: record.BootKernel, Image: empty, Lock: chrysalis.ImageLock, Tools: tools, ExitFailures: -1}
	for name, tt := range map[string]struct {
		change func(*Options)
		want   string
	}{
		"empty image":    {func(*Options) {}, "empty: 0 bytes"},
		"no image":       {func(o *Options) { o.Image = filepath.Join(dir, "none") }, "no such file"},
		"no firmware":    {func(o *Options) { o.Firmware = filepath.Join(dir, "none") }, "no such file"},
		"empty firmware": {func(o *Options) { o.Firmware = empty }, "a firmware has 1 to"},
		"profile":        {func(o *Options) { o.Profile = "none" }, "the profiles are"},
		"no engine":      {func(o *Options) { o.Models = []string{empty} }, "give its disk with --engine"},
		"engine":         {func(o *Options) { o.Engine = empty }, "engine disk"},
	} {
		t.Run(name, func(t *testing.T) {
			o := good
			tt.change(&o)
			if r, err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, %v; expected %q", r, err, tt.want)
			}
		})
	}
}
