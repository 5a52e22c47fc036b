package platform

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-configfs-tsm/configfs/configfsi"

	"chrysalis/attest/evidence"
	"chrysalis/measure/cel"
)

// fakeTD is a TD's sysfs in a folder, and its interface for quotes.
type fakeTD struct {
	t    *testing.T
	root string
	// quotes
	provider string
	inblob   []byte
	writes   int
	entries  []string
}

func newFakeTD(t *testing.T) *fakeTD {
	f := &fakeTD{t: t, root: t.TempDir(), provider: "tdx_guest\n"}
	f.write(tdxDevice, nil)
	f.write(tdxMeasurements+"/"+tdxRTMR3, make([]byte, 48))
	f.write(tdxMeasurements+"/"+tdxConfigID, make([]byte, 48))
	f.write(ccelData, []byte("events\xff\xff\xff\xff"))
	return f
}

func (f *fakeTD) write(path string, data []byte) {
	f.t.Helper()
	path = filepath.Join(f.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeTD) open() *tdx {
	f.t.Helper()
	p, err := openTDX(f.root, f.client)
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

func (f *fakeTD) client() (configfsi.Client, error) { return f, nil }

// What follows is configfs-tsm as the kernel has it:
// Documentation/ABI/testing/configfs-tsm-report.

func (f *fakeTD) MkdirTemp(dir, pattern string) (string, error) {
	entry := fmt.Sprintf("%s/%s%d", dir, pattern, len(f.entries))
	f.entries = append(f.entries, entry)
	f.writes = 0
	return entry, nil
}

func (f *fakeTD) ReadFile(name string) ([]byte, error) {
	switch filepath.Base(name) {
	case "generation":
		return fmt.Appendf(nil, "%d\n", f.writes), nil
	case "provider":
		return []byte(f.provider), nil
	case "outblob":
		return append([]byte("a quote over "), f.inblob...), nil
	}
	return nil, os.ErrNotExist
}

func (f *fakeTD) WriteFile(name string, contents []byte) error {
	if filepath.Base(name) != "inblob" {
		return os.ErrNotExist
	}
	f.inblob = slices.Clone(contents)
	f.writes++
	return nil
}

func (f *fakeTD) RemoveAll(path string) error {
	f.entries = slices.DeleteFunc(f.entries, func(e string) bool { return e == path })
	return nil
}

func (f *fakeTD) ReadDir(string) ([]os.DirEntry, error) { return nil, errors.New("nobody lists it") }

// extended plays the kernel: it takes what was written to RTMR3 as an extension of
// the value before.
func (f *fakeTD) extended(before [48]byte) [48]byte {
	f.t.Helper()
	written, err := os.ReadFile(filepath.Join(f.root, tdxMeasurements, tdxRTMR3))
	if err != nil || len(written) != 48 {
		f.t.Fatalf("%d bytes were written to RTMR3: %v", len(written), err)
	}
	after := sha512.Sum384(append(before[:], written...))
	f.write(tdxMeasurements+"/"+tdxRTMR3, after[:])
	return after
}

func TestTDXExtends(t *testing.T) {
	f := newFakeTD(t)
	p := f.open()
	if p.Register() != cel.RTMR3 {
		t.Errorf("events go to %s", p.Register())
	}
	events := []cel.Event{cel.ManifestEvent([]byte("{}")), cel.SeparatorEvent()}
	var value [48]byte
	for i, e := range events {
		if err := p.Extend(e); err != nil {
			t.Fatal(err)
		}
		value = f.extended(value)
		if err := p.Holds(events[:i+1]); err != nil {
			t.Error(err)
		}
		if err := p.Holds(events[:i]); err == nil {
			t.Errorf("RTMR3 after %d events passes for that after %d", i+1, i)
		}
	}
	// The host's kernel is not the guest's; but a guest's may lack the interface.
	if err := os.Remove(filepath.Join(f.root, tdxMeasurements, tdxRTMR3)); err != nil {
		t.Fatal(err)
	}
	if err := p.Extend(events[0]); err == nil {
		t.Error("an event was measured into a register that is not there")
	}
	f.write(tdxMeasurements+"/"+tdxRTMR3, make([]byte, 47))
	if err := p.Holds(nil); err == nil {
		t.Error("a register of 47 bytes passes")
	}
}

func TestTDXConfigID(t *testing.T) {
	manifest := []byte(`{"version":1}`)
	right := sha512.Sum384(manifest)
	wrong := right
	wrong[47] ^= 1
	for _, c := range []struct {
		name string
		id   []byte
		ok   bool
	}{
		{"the manifest's", right[:], true},
		{"not set", make([]byte, 48), true},
		{"one bit differs", wrong[:], false},
		{"too short", right[:47], false},
		{"too long", append(right[:], 0), false},
		{"empty", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeTD(t)
			f.write(tdxMeasurements+"/"+tdxConfigID, c.id)
			if err := f.open().CheckManifest(manifest); (err == nil) != c.ok {
				t.Errorf("got %v", err)
			}
		})
	}
	f := newFakeTD(t)
	if err := os.Remove(filepath.Join(f.root, tdxMeasurements, tdxConfigID)); err != nil {
		t.Fatal(err)
	}
	if f.open().CheckManifest(manifest) == nil {
		t.Error("MRCONFIGID is not there, and the manifest passes")
	}
}

func TestTDXProves(t *testing.T) {
	f := newFakeTD(t)
	d := evidence.Document{Version: evidence.Version, Nonces: []evidence.Bytes{make([]byte, 32)}}
	if err := f.open().Prove(&d); err != nil {
		t.Fatal(err)
	}
	data := d.ReportData()
	if d.TPM != nil || d.TDX == nil || !bytes.Equal(d.TDX.Quote, append([]byte("a quote over "), data[:]...)) {
		t.Errorf("got %+v", d.TDX)
	}
	if string(d.TDX.CCEL) != "events" {
		t.Errorf("the firmware's log is %q, with what the firmware has not used", d.TDX.CCEL)
	}
	if len(f.entries) != 0 {
		t.Errorf("entries are left in configfs: %q", f.entries)
	}
	f.provider = "sev_guest\n"
	if err := f.open().Prove(&d); err == nil || !strings.Contains(err.Error(), "sev_guest") {
		t.Errorf("another provider's quote: %v", err)
	}
}

// In a TD the TPM is the host's. Whatever is missing of TDX, nothing falls back on
// it.
func TestTPMIsIgnoredInTD(t *testing.T) {
	f := newFakeTD(t)
	f.write(tpmDevice, nil)
	f.write(tpmVersion, []byte("2\n"))
	f.write(tpmLog, []byte("the host's"))
	p := f.open()
	d := evidence.Document{}
	if err := p.Prove(&d); err != nil || d.TPM != nil || d.TDX == nil || bytes.Contains(d.TDX.CCEL, []byte("host")) {
		t.Errorf("got %+v, %v", d, err)
	}
	for _, missing := range []string{tdxDevice, ccelData} {
		f := newFakeTD(t)
		f.write(tpmDevice, nil)
		f.write(tpmVersion, []byte("2\n"))
		f.write(tpmLog, []byte("the host's"))
		if err := os.Remove(filepath.Join(f.root, missing)); err != nil {
			t.Fatal(err)
		}
		if p, err := Open(f.root, true); err == nil {
			t.Errorf("without %s: %T", missing, p)
		}
	}
}

func TestReadLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, c := range []struct {
		name string
		data []byte
		ok   bool
	}{
		{"the largest", make([]byte, maxLog), true},
		{"too large", make([]byte, maxLog+1), false},
		{"empty", nil, false},
	} {
		if err := os.WriteFile(path, c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readLog(path); (err == nil) != c.ok || c.ok && !bytes.Equal(got, c.data) {
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		}
	}
	if _, err := readLog(path + ".missing"); err == nil {
		t.Error("a log that is not there is read")
	}
	f := newFakeTD(t)
	f.write(ccelData, bytes.Repeat([]byte{0xff}, 100))
	if _, err := openTDX(f.root, f.client); err == nil {
		t.Error("a CCEL that the firmware never wrote to passes")
	}
}
