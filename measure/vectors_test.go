package measure

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"chrysalis/image"
	"chrysalis/image/imagetest"
)

// Packages of Debian 12 that the vectors are made of.
var (
	packageOVMF = image.Package{
		Name: "ovmf", Version: "2022.11-6+deb12u2", Arch: "all",
		Path: "pool/main/e/edk2/ovmf_2022.11-6+deb12u2_all.deb",
		Size: 7683456, SHA256: "e73d3d1a8799f7f6fc16b73501d913edcdd86237556fbff30693e747e6dc262e",
	}
	packageKernel = image.Package{
		Name: "linux-image-6.1.0-56-cloud-amd64", Version: "6.1.192-2", Arch: "amd64",
		Path: "pool/updates/main/l/linux-signed-amd64/linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb",
		Size: 26713492, SHA256: "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee",
	}
)

// fromPackage returns a file of a Debian package, which is fetched once and
// known by its hash. Where none of the mirrors that the host's apt knows has it any
// more the test is skipped.
func fromPackage(t testing.TB, p image.Package, name, sha256 string) []byte {
	t.Helper()
	mirrors, err := image.HostMirrors(t.Context())
	if err != nil {
		t.Skipf("the package's mirrors are not known: %v", err)
	}
	paths, err := image.Fetch(t.Context(), &image.Tree{Name: "vectors", Packages: []image.Package{p}}, mirrors, func(string, int64, int64) {})
	if err != nil {
		t.Skipf("the vector's package is out of reach: %v", err)
	}
	dir := t.TempDir()
	if out, err := imagetest.Command(t, dir, "true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	deb := filepath.Join(dir, "package.deb")
	data, err := os.ReadFile(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(deb, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := imagetest.Command(t, dir, "dpkg-deb", "-x", deb, filepath.Join(dir, "tree")).CombinedOutput(); err != nil {
		t.Fatalf("unpack %s: %v: %s", p.Name, err, out)
	}
	content, err := os.ReadFile(filepath.Join(dir, "tree", name))
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(SHA256.Sum(content)); got != sha256 {
		t.Fatalf("%s has SHA-256 %s, expected %s", name, got, sha256)
	}
	return content
}

func debianOVMF(t testing.TB) []byte {
	return fromPackage(t, packageOVMF, "usr/share/ovmf/OVMF.fd", "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773")
}

func debianKernel(t testing.TB) []byte {
	return fromPackage(t, packageKernel, "boot/vmlinuz-6.1.0-56-cloud-amd64", "51349501a3d1ff83836437d2b365fd2d57f2feb8642d315e5181dec23d4c3275")
}

func parseFirmware(t testing.TB, data []byte) *Firmware {
	t.Helper()
	f, err := ReadFirmware("firmware", bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func wantHex(t testing.TB, what string, got []byte, want string) {
	t.Helper()
	if hex.EncodeToString(got) != want {
		t.Errorf("%s is %x, expected %s", what, got, want)
	}
}

// MRTD as two implementations of others have it for this firmware.
func TestVectorMRTD(t *testing.T) {
	f := parseFirmware(t, debianOVMF(t))
	for order, want := range map[PageOrder]string{
		TwoPass:     "acccbcc870a381adab0d3919d90a7f268ac3b0364771f202ed4bb4e892d045b33db3b32e6924cba830a724eed443f7e1",
		Interleaved: "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057fb887fed0744d5631a212967fb231c47",
	} {
		got, err := f.MRTD(order)
		if err != nil {
			t.Fatal(err)
		}
		wantHex(t, "MRTD", got, want)
	}
}

// RTMR1 and RTMR2 of a bare kernel, patched by QEMU and not.
func TestVectorKernel(t *testing.T) {
	kernel := debianKernel(t)
	m, err := ReadKernel("vmlinuz", bytes.NewReader(kernel), int64(len(kernel)), make([]byte, 1<<20), "console=ttyS0")
	if err != nil {
		t.Fatal(err)
	}
	patched, err := m.PatchKernel(2 << 30)
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]struct {
		image *Image
		rtmr1 string
	}{
		"patched":     {patched, "63e7d40925eb7b918386330734acd9980b8668315d438e3fd119663a93cca9a75e20c274ddd6e4c9f717b90d87774a8a"},
		"not patched": {m, "7c8fc1156aa7d170c971af918b68aa22cda486113fbf513d3031b2dc792fc78a6c534d8382b9205b16b2aa2d16b6557c"},
	} {
		t.Run(name, func(t *testing.T) {
			profile, err := LookupProfile("edk2-2025.02")
			if err != nil {
				t.Fatal(err)
			}
			s := System{Platform: "tdx", Boot: "kernel", Image: v.image, Firmware: &Firmware{Profile: profile}}
			events, err := s.Events()
			if err != nil {
				t.Fatal(err)
			}
			registers := RTMRs(events)
			wantHex(t, "RTMR1", registers[1].Value, v.rtmr1)
			wantHex(t, "RTMR2", registers[2].Value, "a3905fc6b2583c5142043413f1a47cf1099a96eec5444405087e1f4797c653c7841e747aadf0076340474acc5b9038cd")
			if registers[0].Value != nil || registers[0].Missing == "" {
				t.Errorf("RTMR0 is %x (%q) without a machine", registers[0].Value, registers[0].Missing)
			}
		})
	}
}

// golden returns a file that was recorded on a real machine. Those are not part
// of this repository.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	dir := os.Getenv("CHRYSALIS_GOLDEN")
	if dir == "" {
		dir = "../../shared/golden"
	}
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Skipf("golden data is not here: %v; set CHRYSALIS_GOLDEN to its folder", err)
	}
	return data
}

// goldenSections are those of the firmware that the TD below ran.
var goldenSections = []Section{
	{Type: SectionTempMem, Address: 0x810000 + 0x1000, Size: 0xf000},
	{Type: SectionTempMem, Address: 0x80b000, Size: 0x2000},
	{Type: SectionTDHOB, Address: 0x809000, Size: 0x2000},
	{Type: SectionTempMem, Address: 0x800000, Size: 0x6000},
}

// RTMR0 of a TD that ran, with 8 vCPUs and 16 GiB.
func TestVectorRTMR0(t *testing.T) {
	const dir = "rtmr0-8cpu-16g/"
	profile, err := LookupProfile("edk2-2025.02")
	if err != nil {
		t.Fatal(err)
	}
	s := System{
		Platform: "tdx", Boot: "kernel", Memory: 16 << 30,
		Firmware: &Firmware{Profile: profile, Sections: goldenSections, in: input{name: "firmware"}},
		Tables: &Tables{Loader: golden(t, dir+"table_loader.bin"), Files: map[string][]byte{
			"etc/acpi/rsdp": golden(t, dir+"rsdp.bin"), "etc/acpi/tables": golden(t, dir+"acpi_tables.bin"),
		}},
		Variables: []Variable{{"BootOrder", golden(t, dir+"BootOrder.bin")}, {"Boot0000", golden(t, dir+"Boot0000.bin")}},
	}
	cfv, _ := hex.DecodeString("344bc51c980ba621aaa00da3ed7436f7d6e549197dfe699515dfa2c6583d95e6412af21c097d473155875ffd561d6790")
	events, err := func() ([]Event, error) {
		s.Firmware.Sections = append(s.Firmware.Sections, Section{Type: SectionCFV})
		return s.Events()
	}()
	if err != nil {
		t.Fatal(err)
	}
	for i := range events {
		if events[i].Name == "cfv" { // the file is not here, its variable store's digest is
			events[i].Digest, events[i].Missing = cfv, ""
		}
	}
	r := RTMRs(events)[0]
	if len(r.Events) != 13 {
		t.Errorf("%d events, expected 13", len(r.Events))
	}
	wantHex(t, "RTMR0", r.Value, "a2749c840579faca6adf0c9c3ab69f277556cda67f8a6b3553c2c7fbf00e9706ec77a6f6960d802433b339ff8b72eefb")
	// The profile's own boot options are the ones that this TD had.
	s.Variables = nil
	if events, err = s.Events(); err != nil {
		t.Fatal(err)
	}
	for i, e := range RTMRs(events)[0].Events {
		if e.Name != "cfv" && !bytes.Equal(e.Digest, r.Events[i].Digest) {
			t.Errorf("%s is %x, the TD had %x", e.Name, e.Digest, r.Events[i].Digest)
		}
	}
}
