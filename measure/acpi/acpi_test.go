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
		"-object", "iommufd,id=iommufd0",
		"-device", "pcie-root-port,id=gpuport0,bus=pcie.0,chassis=1,addr=0x15",
		"-device", "vfio-pci,id=gpu0,host=0000:b8:00.0,bus=gpuport0,iommufd=iommufd0,rombar=0",
	}, h100)
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
		"-device", "pcie-root-port,id=gpuport0,bus=pcie.0,chassis=1,addr=0x15",
		"-device", "pci-testdev,id=gpu0,bus=gpuport0,membar=137438953472",
		"-qtest", "unix:" + qtestPath, "-qtest-log", "none",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q\nexpected %q", got, want)
	}
	const port = "pcie-root-port,id=p,bus=pcie.0,chassis=1,addr=0x15"
	for name, argv := range map[string][]string{
		"nothing":        nil,
		"unknown option": {"qemu", "-numa", "node"},
		"unknown device": {"qemu", "-device", "e1000e"},
		"unknown object": {"qemu", "-object", "filter-dump,id=f"},
		"GPU on bus 0":   {"qemu", "-device", "vfio-pci,host=0000:01:00.0,rombar=0"},
		"GPU with a ROM": {"qemu", "-device", port, "-device", "vfio-pci,host=0000:01:00.0,bus=p"},
		"other GPU":      {"qemu", "-device", port, "-device", "vfio-pci,host=0000:01:00.0,bus=p,rombar=0,x-igd-opregion=on"},
		"GPU twice":      {"qemu", "-device", port, "-device", "vfio-pci,host=0000:01:00.0,bus=p,rombar=0", "-device", "vfio-pci,host=0000:02:00.0,bus=p,rombar=0"},
		"GPU not at 0":   {"qemu", "-device", port, "-device", "vfio-pci,host=0000:01:00.0,bus=p,rombar=0,addr=1"},
		"port twice":     {"qemu", "-device", port, "-device", port},
		"port elsewhere": {"qemu", "-device", "pcie-root-port,id=p,bus=q,chassis=1,addr=0x15"},
		"reserving port": {"qemu", "-device", port + ",pref64-reserve=1G"},
		"port at 0":      {"qemu", "-device", "pcie-root-port,id=p,bus=pcie.0,chassis=1,addr=0x0"},
		"no value":       {"qemu", "-device"},
		"other CPU":      {"qemu", "-cpu", "host"},
		"other vsock":    {"qemu", "-device", "vhost-vsock-pci,romfile=x"},
		"disk":           {"qemu", "-blockdev", "driver=raw,node-name=x"},
	} {
		if got, err := Argv(argv, h100); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
	good := []string{"qemu", "-device", port, "-device", "vfio-pci,host=0000:01:00.0,bus=p,rombar=0"}
	if _, err := Argv(good, h100); err != nil {
		t.Error(err)
	}
	for name, sizes := range map[string][]uint64{"no sizes": nil, "small": {1 << 30, 16}, "no power of two": {3 << 30}, "huge": {1 << 50}} {
		if got, err := Argv(good, sizes); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// What the firmware was seen to do with two H100s and two virtio devices: each
// port's window is as aligned as the largest region in it, what is of one size
// is in the order of the slots.
func TestLayOut(t *testing.T) {
	at := map[string]uint64{}
	note := func(name string) func(uint64, uint64) { return func(a, _ uint64) { at[name] = a } }
	w := aperture{0x380000000000, 1 << 43}
	if got := w.padding(); got != 32<<30 {
		t.Errorf("padding %#x", got)
	}
	var found []*region
	for _, d := range []string{"disk0", "disk1"} {
		found = insert(found, &region{size: 16 << 10, align: 16 << 10, set: note(d)})
	}
	for _, p := range []string{"port0", "port1", "port2"} {
		r := &region{set: note(p)}
		for i, size := range h100 {
			if p != "port2" { // nothing is behind that one
				r.inside = insert(r.inside, &region{size: size, align: size, set: note(p + "." + string(rune('0'+i)))})
			}
		}
		r.inside = insert(r.inside, &region{size: w.padding(), align: w.padding(), padding: true})
		r.layOut()
		found = insert(found, r)
	}
	root := &region{}
	for _, r := range found {
		root.inside = insert(root.inside, r)
	}
	root.layOut()
	root.place(w.base)
	want := map[string]uint64{
		"port0": 0x380000000000, "port0.1": 0x380000000000, "port0.2": 0x382000000000, "port0.0": 0x382002000000,
		"port1": 0x384000000000, "port1.1": 0x384000000000, "port1.2": 0x386000000000, "port1.0": 0x386002000000,
		"port2": 0x386800000000, "disk0": 0x387000000000, "disk1": 0x387000004000,
	}
	if !reflect.DeepEqual(at, want) {
		t.Errorf("%#x\nexpected %#x", at, want)
	}
	for size, want := range map[uint64]uint64{1 << 35: 0, 1 << 36: 256 << 20, 1<<36 + 1<<30: 512 << 20, 1 << 37: 512 << 20} {
		if got := (aperture{0, size}).padding(); got != want {
			t.Errorf("a window of %#x: padding %#x, expected %#x", size, got, want)
		}
	}
}

var h100 = []uint64{16 << 20, 128 << 30, 32 << 20}

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
		if got := window(tt.bits, tt.e820); got.base != tt.want || got.size != 1<<(min(tt.bits, 46)-3) {
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
	if _, err := Read(t.Context(), start, argv, Machine{Bits: 40}); err == nil || !strings.Contains(err.Error(), "no such program") {
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
