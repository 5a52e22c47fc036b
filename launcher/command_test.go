package launcher

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

func testManifestHash() (h [48]byte) {
	for i := range h {
		h[i] = byte(i)
	}
	return h
}

// The golden files are what measurements are predicted from: a change there is a
// change of every VM's RTMR0 or PCR 1, and never an accident.
func TestCommandGolden(t *testing.T) {
	small, _ := LookupShape("small")
	h100, _ := LookupShape("h100x1")
	h200, _ := LookupShape("h200x8")
	var eight []string
	for i := range 8 {
		eight = append(eight, fmt.Sprintf("0000:%02x:00.0", 0x1b+i))
	}
	for _, tt := range []struct {
		name  string
		shape Shape
		art   Artefacts
	}{
		{"tdx-h200x8", h200, Artefacts{Platform: PlatformTDX, Transport: TransportKernel, Firmware: insideFirmware, Disks: 3, ManifestSHA384: testManifestHash(), GuestCID: 4711, GPUs: eight}},
		{"tdx-small", small, Artefacts{Platform: PlatformTDX, Transport: TransportKernel, Firmware: insideFirmware, Disks: 3, ManifestSHA384: testManifestHash(), GuestCID: 4711}},
		{"tdx-h100x1", h100, Artefacts{Platform: PlatformTDX, Transport: TransportKernel, Firmware: insideFirmware, Disks: 4, ManifestSHA384: testManifestHash(), GuestCID: 4711, GPUs: []string{"0000:b8:00.0"}}},
		{"kvm-small", small, Artefacts{Platform: PlatformKVM, Transport: TransportKernel, Firmware: tpmFirmware, Disks: 3, ManifestSHA384: testManifestHash(), GuestCID: 4711}},
		{"kvm-small-user", small, Artefacts{Platform: PlatformKVM, Transport: TransportUser, Firmware: tpmFirmware, Disks: 3, ManifestSHA384: testManifestHash(), GuestCID: 3}},
		{"tcg-small", small, Artefacts{Platform: PlatformTCG, Transport: TransportUser, Firmware: tpmFirmware, Disks: 3, ManifestSHA384: testManifestHash(), GuestCID: 3}},
		{"tdx-small-from-disk", small, Artefacts{Platform: PlatformTDX, Transport: TransportKernel, Firmware: insideFirmware, Disks: 1, FromDisk: true, ManifestSHA384: testManifestHash(), GuestCID: 4711}},
		{"tcg-small-18-disks", small, Artefacts{Platform: PlatformTCG, Transport: TransportUser, Firmware: tpmFirmware, Disks: 18, ManifestSHA384: testManifestHash(), GuestCID: 3}},
		{"tcg-small-disk-rate", small, Artefacts{Platform: PlatformTCG, Transport: TransportUser, Firmware: tpmFirmware, Disks: 3, ManifestSHA384: testManifestHash(), GuestCID: 3, DiskRate: 32e6}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.art.Check(tt.shape); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(Command(tt.shape, tt.art), "\n") + "\n"
			path := filepath.Join("testdata", "argv", tt.name+".txt")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatalf("%v; run 'go test ./launcher -run Golden -update'", err)
			}
			if got != string(want) {
				t.Errorf("the command line is\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// A TD's devices sit where a TPM VM's do, and no slot is used twice.
func TestCommandSlots(t *testing.T) {
	shape := Shape{Name: "all", VCPUs: 2, Memory: gib, PhysBits: 46, TDXBits: 52, GPUModel: "H100", GPUs: 8}
	art := Artefacts{Platform: PlatformTDX, Transport: TransportKernel, Firmware: "/f", Disks: maxDisks, GuestCID: 3}
	for i := range 8 {
		art.GPUs = append(art.GPUs, "0000:b8:00."+string(rune('0'+i)))
	}
	if err := art.Check(shape); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{"0x0": true, "0x1f": true}
	for _, arg := range Command(shape, art) {
		if !strings.Contains(arg, "bus=pcie.0") {
			continue
		}
		_, slot, _ := strings.Cut(arg, "addr=")
		slot, _, _ = strings.Cut(slot, ",")
		if seen[slot] {
			t.Errorf("slot %s is used twice, by %s", slot, arg)
		}
		seen[slot] = true
	}
	if len(seen) != 2+1+maxDisks+8 {
		t.Errorf("%d slots", len(seen))
	}
}

func TestArtefactsCheck(t *testing.T) {
	small, _ := LookupShape("small")
	h100, _ := LookupShape("h100x1")
	good := Artefacts{Platform: PlatformKVM, Transport: TransportKernel, Disks: 3, GuestCID: 3}
	for _, tt := range []struct {
		name  string
		shape Shape
		edit  func(*Artefacts)
		want  string // "" is accepted
	}{
		{"good", small, func(*Artefacts) {}, ""},
		{"unknown platform", small, func(a *Artefacts) { a.Platform = "xen" }, "no platform"},
		{"TD without a kernel transport", small, func(a *Artefacts) { a.Platform = PlatformTDX; a.Transport = TransportUser }, "vhost-vsock"},
		{"a disk rate below zero", small, func(a *Artefacts) { a.DiskRate = -1 }, "disk rate"},
		{"no model", small, func(a *Artefacts) { a.Disks = 2 }, "2 disks"},
		{"17 models", small, func(a *Artefacts) { a.Disks = 19 }, "19 disks"},
		{"the host's address", small, func(a *Artefacts) { a.GuestCID = 2 }, "reserved"},
		{"a GPU that the shape has not", small, func(a *Artefacts) { a.GPUs = []string{"0000:b8:00.0"} }, "has 0 GPUs"},
		{"no GPU", h100, func(*Artefacts) {}, "has 1 GPUs"},
		{"a GPU", h100, func(a *Artefacts) { a.GPUs = []string{"0000:b8:00.0"} }, ""},
		{"a GPU under TCG", h100, func(a *Artefacts) { a.Platform = PlatformTCG; a.GPUs = []string{"0000:b8:00.0"} }, "without KVM"},
		{"options in a PCI address", h100, func(a *Artefacts) { a.GPUs = []string{"0000:b8:00.0,rombar=1"} }, "not a PCI address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			art := good
			tt.edit(&art)
			err := art.Check(tt.shape)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

func TestLookupShape(t *testing.T) {
	for _, name := range ShapeNames() {
		s, err := LookupShape(name)
		if err != nil || s.Memory%mib != 0 || s.VCPUs < 1 || (s.GPUs > 0) != (s.GPUModel != "") || (s.GPUs > 0) != (len(s.GPUBARs) > 0) || s.GPUs > 8 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if _, err := LookupShape("huge"); err == nil || !strings.Contains(err.Error(), "small") {
		t.Errorf("an unknown shape: %v", err)
	}
}
