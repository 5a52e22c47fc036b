package launcher

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"chrysalis/image/imagetest"
	"chrysalis/measure"
)

// The tables depend on the shape and on what the VM has, and on nothing else; a
// second read is the cache's and equal. That they are those of a VM that boots
// is for ci/vmtest.
func TestTables(t *testing.T) {
	tools := imagetest.Tools(t)
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	small, _ := LookupShape("small")
	tdx := Artefacts{Platform: PlatformTDX, Transport: TransportKernel, Firmware: insideFirmware, Disks: 3, GuestCID: 4711}
	read := func(shape Shape, a Artefacts) *measure.Tables {
		t.Helper()
		begin := time.Now()
		tables, err := Tables(t.Context(), tools, shape, a)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s, %s: %v", shape.Name, a.Platform, time.Since(begin))
		return tables
	}
	acpi := func(tables *measure.Tables) []byte { return tables.Files["etc/acpi/tables"] }
	first := read(small, tdx)
	again := read(small, tdx)
	if !bytes.Equal(acpi(first), acpi(again)) || !bytes.Equal(first.Loader, again.Loader) {
		t.Error("the cache returns something else")
	}
	other := tdx
	other.GuestCID, other.ManifestSHA384 = 5, [48]byte{1}
	if !bytes.Equal(acpi(first), acpi(read(small, other))) {
		t.Error("the tables depend on the manifest or the vsock address")
	}
	if string(first.Files["bootorder"]) != "/rom@genroms/linuxboot_dma.bin\x00" {
		t.Errorf("bootorder is %q", first.Files["bootorder"])
	}
	for name, change := range map[string]func(*Shape, *Artefacts){
		"vCPUs":     func(s *Shape, _ *Artefacts) { s.VCPUs = 3 },
		"a disk":    func(_ *Shape, a *Artefacts) { a.Disks = 4 },
		"from disk": func(_ *Shape, a *Artefacts) { a.Disks, a.FromDisk = 1, true },
		"bits":      func(s *Shape, _ *Artefacts) { s.TDXBits = 42 },
		"a TPM":     func(_ *Shape, a *Artefacts) { a.Platform = PlatformTCG },
	} {
		shape, a := small, tdx
		change(&shape, &a)
		if bytes.Equal(acpi(first), acpi(read(shape, a))) {
			t.Errorf("%s makes no difference to the tables", name)
		}
	}
	// So they do on how many GPUs there are and how large their regions.
	gpus := map[string]string{}
	for _, name := range []string{"none", "h100x1", "h100x2", "h100x4", "h100x8", "h200x1", "h200x8"} {
		shape, a := small, tdx
		if name != "none" {
			gpu, err := LookupShape(name)
			if err != nil {
				t.Fatal(err)
			}
			shape.GPUs, shape.GPUBARs = gpu.GPUs, gpu.GPUBARs
			for i := range gpu.GPUs {
				a.GPUs = append(a.GPUs, fmt.Sprintf("0000:%02x:00.0", i+1))
			}
		}
		got := string(acpi(read(shape, a)))
		if other, ok := gpus[got]; ok {
			t.Errorf("%s and %s have the same tables", name, other)
		}
		gpus[got] = name
	}
	tight := small
	tight.TDXBits, tight.GPUs, tight.GPUBARs = 41, 2, barsH200
	a := tdx
	a.GPUs = []string{"0000:01:00.0", "0000:02:00.0"}
	if _, err := Tables(t.Context(), tools, tight, a); err == nil || !strings.Contains(err.Error(), "the firmware's window has 256") {
		t.Errorf("GPUs that do not fit: %v", err)
	}
	more := small
	more.Memory *= 2
	if bytes.Equal(first.Files["etc/smbios/smbios-tables"], read(more, tdx).Files["etc/smbios/smbios-tables"]) {
		t.Error("memory makes no difference to SMBIOS")
	}
	// A user's transport and the kernel's make the same tables.
	tcg := Artefacts{Platform: PlatformTCG, Transport: TransportUser, Firmware: tpmFirmware, Disks: 3, GuestCID: 3}
	kvm := tcg
	kvm.Transport = TransportKernel
	if !bytes.Equal(acpi(read(small, tcg)), acpi(read(small, kvm))) {
		t.Error("the tables depend on the transport")
	}
}
