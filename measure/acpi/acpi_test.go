package acpi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"chrysalis/measure"
)

func TestArgv(t *testing.T) {
	got, err := Argv([]string{
		"qemu", "-nodefaults", "-S", "-accel", "kvm", "-machine", "q35,memory-backend=ram,kernel-irqchip=split,confidential-guest-support=tdx0",
		"-object", `{"qom-type":"tdx-guest","id":"tdx0"}`, "-cpu", "host,host-phys-bits=off,phys-bits=52", "-smp", "cpus=2", "-m", "size=64M",
		"-object", "memory-backend-ram,id=ram,size=64M", "-bios", "/vm/firmware.fd", "-smbios", "type=4,processor-id=1", "-kernel", "/x",
		"-chardev", "file,id=console,path=/x", "-serial", "chardev:console", "-object", "monitor-qmp,id=qmp0,chardev=qmp",
		"-device", "vhost-vsock-pci,id=vsock,guest-cid=4711,bus=pcie.0,addr=0x2,disable-legacy=on,iommu_platform=on",
		"-blockdev", `{"driver":"raw","node-name":"disk0","file":{}}`, "-device", "virtio-blk-pci,drive=disk0,bus=pcie.0,addr=0x3",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"qemu", "-nodefaults", "-S", "-accel", "qtest", "-machine", "q35,memory-backend=ram,pic=off",
		"-cpu", "max,phys-bits=52,vendor=GenuineIntel", "-smp", "cpus=2", "-m", "size=64M",
		"-object", "memory-backend-ram,id=ram,size=64M,reserve=off", "-bios", firmware, "-smbios", "type=4,processor-id=1", "-kernel", kernel,
		"-serial", "null",
		"-device", "virtio-rng-pci,id=vsock,bus=pcie.0,addr=0x2,disable-legacy=on,iommu_platform=on",
		"-blockdev", `{"driver":"null-co","node-name":"disk0","read-only":true,"size":1048576}`, "-device", "virtio-blk-pci,drive=disk0,bus=pcie.0,addr=0x3",
		"-qtest", "unix:" + qtestPath, "-qtest-log", "none",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q\nexpected %q", got, want)
	}
	for name, argv := range map[string][]string{
		"nothing":        nil,
		"unknown option": {"qemu", "-numa", "node"},
		"unknown device": {"qemu", "-device", "e1000e"},
		"unknown object": {"qemu", "-object", "filter-dump,id=f"},
		"GPU":            {"qemu", "-device", "vfio-pci,host=0000:01:00.0"},
		"no value":       {"qemu", "-device"},
		"other CPU":      {"qemu", "-cpu", "host"},
		"other vsock":    {"qemu", "-device", "vhost-vsock-pci,romfile=x"},
		"disk":           {"qemu", "-blockdev", "driver=raw,node-name=x"},
	} {
		if got, err := Argv(argv); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestWindow(t *testing.T) {
	hyperTransport := binary.LittleEndian.AppendUint64(nil, 0xfd00000000)
	hyperTransport = binary.LittleEndian.AppendUint64(hyperTransport, 0x300000000)
	hyperTransport = append(hyperTransport, 2, 0, 0, 0)
	for _, tt := range []struct {
		bits int
		e820 []byte
		want uint64
	}{
		{40, nil, 0xe000000000}, {40, hyperTransport, 0xc000000000},
		{46, hyperTransport, 0x380000000000}, {52, nil, 0x380000000000},
	} {
		if got := window(tt.bits, tt.e820); got != tt.want {
			t.Errorf("%d bits: %#x, expected %#x", tt.bits, got, tt.want)
		}
	}
}

// A program that is not QEMU, or says what QEMU does not, is an error that shows
// what it wrote.
func TestReadFails(t *testing.T) {
	argv := []string{"qemu", "-cpu", "max,phys-bits=40"}
	start := func(context.Context, []string, string) (func() string, error) {
		return nil, errors.New("no such program")
	}
	if _, err := Read(t.Context(), start, argv, 40); err == nil || !strings.Contains(err.Error(), "no such program") {
		t.Error(err)
	}
}

func TestCache(t *testing.T) {
	dir := t.TempDir()
	c := Cache{Dir: dir, QEMU: "1"}
	key := []byte(`["a"]`)
	tables := &measure.Tables{Loader: []byte("loader"), Files: map[string][]byte{"x": []byte("y"), "z": {}}}
	path := filepath.Join(dir, "entry")
	if err := c.store(path, key, tables); err != nil {
		t.Fatal(err)
	}
	if got, ok := load(path, key); !ok || !bytes.Equal(got.Loader, tables.Loader) || string(got.Files["x"]) != "y" {
		t.Errorf("%v, %v", got, ok)
	}
	if _, ok := load(path, []byte(`["b"]`)); ok {
		t.Error("another's entry is taken")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		bad := bytes.Clone(data)
		bad[i] ^= 1
		if err := os.WriteFile(path, bad, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, ok := load(path, key); ok && !reflect.DeepEqual(sum(got), sum(tables)) {
			t.Errorf("a damaged entry is taken (byte %d)", i)
		}
	}
}
