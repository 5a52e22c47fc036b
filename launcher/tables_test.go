package launcher

import (
	"bytes"
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
