package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeDevice is a device as sysfs shows it.
type fakeDevice struct {
	bus, name             string
	vendor, device, class string
	driver                string // bound to it
}

// The launcher's q35 machine, with disk and vsock bound.
var machine = []fakeDevice{
	{"pci", "0000:00:00.0", "0x8086", "0x29c0", "0x060000", ""},
	{"pci", "0000:00:01.0", "0x1b36", "0x000c", "0x060400", "pcieport"},
	{"pci", "0000:00:1f.0", "0x8086", "0x2918", "0x060100", ""},
	{"pci", "0000:01:00.0", "0x1af4", "0x1042", "0x010000", "virtio-pci"},
	{"pci", "0000:02:00.0", "0x1af4", "0x1053", "0x078000", "virtio-pci"},
	{"virtio", "virtio0", "0x1af4", "0x0002", "", "virtio_blk"},
	{"virtio", "virtio1", "0x1af4", "0x0013", "", "vmw_vsock_virtio_transport"},
}

func fakeSysfs(t *testing.T, devices []fakeDevice) string {
	t.Helper()
	root := t.TempDir()
	for _, d := range devices {
		dir := filepath.Join(root, "bus", d.bus, "devices", d.name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{"vendor": d.vendor, "device": d.device, "class": d.class} {
			if value == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if d.driver != "" {
			if err := os.Symlink("../../../../bus/"+d.bus+"/drivers/"+d.driver, filepath.Join(dir, "driver")); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

func TestCheckDevices(t *testing.T) {
	gpu := func(name, driver string) fakeDevice {
		return fakeDevice{"pci", name, "0x10de", "0x2331", "0x030200", driver}
	}
	for _, tt := range []struct {
		name  string
		add   []fakeDevice
		gpus  int
		fails string // part of the error
	}{
		{name: "the launcher's machine"},
		{name: "nothing bound yet", add: []fakeDevice{{"virtio", "virtio2", "0x1af4", "0x0002", "", ""}, {"pci", "0000:03:00.0", "0x1af4", "0x1042", "0x010000", ""}}},
		{name: "vsock with a network device's class", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1af4", "0x1053", "0x028000", "virtio-pci"}}},
		{name: "one GPU", add: []fakeDevice{gpu("0000:05:00.0", "")}, gpus: 1},
		{name: "three GPUs", add: []fakeDevice{gpu("0000:05:00.0", ""), gpu("0000:06:00.0", ""), gpu("0000:07:00.0", "")}, gpus: 3},

		{name: "a network card", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1af4", "0x1041", "0x020000", ""}}, fails: "0000:03:00.0 (0x1af4:0x1041 class 0x020000)"},
		{name: "an NVMe disk", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1b36", "0x0010", "0x010802", "nvme"}}, fails: "not one that a VM may have"},
		{name: "a USB controller", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1b36", "0x000d", "0x0c0330", ""}}, fails: "not one that a VM may have"},
		{name: "known IDs with another class", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1af4", "0x1042", "0x020000", ""}}, fails: "not one that a VM may have"},
		{name: "another maker's GPU", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1002", "0x74a1", "0x030200", ""}}, fails: "not one that a VM may have"},
		{name: "a GPU's audio function", add: []fakeDevice{{"pci", "0000:05:00.1", "0x10de", "0x22ba", "0x040300", ""}}, fails: "not one that a VM may have"},
		{name: "a device that says nothing", add: []fakeDevice{{bus: "pci", name: "0000:03:00.0"}}, fails: "not one that a VM may have"},
		{name: "SATA controller", add: []fakeDevice{{"pci", "0000:00:1f.2", "0x8086", "0x2922", "0x010601", ""}}, fails: "is not one that a VM may have"},
		{name: "a disk bound to a driver of ours for something else", add: []fakeDevice{{"pci", "0000:03:00.0", "0x1af4", "0x1042", "0x010000", "vfio-pci"}}, fails: "is bound to vfio-pci"},
		{name: "a GPU bound", add: []fakeDevice{gpu("0000:05:00.0", "nvidia")}, fails: "is bound to nvidia"},
		{name: "a virtio network card", add: []fakeDevice{{"virtio", "virtio2", "0x1af4", "0x0001", "", ""}}, fails: "virtio device virtio2 of type 0x0001"},
		{name: "a virtio console", add: []fakeDevice{{"virtio", "virtio2", "0x1af4", "0x0003", "", "virtio_console"}}, fails: "of type 0x0003"},
		{name: "a virtio file system", add: []fakeDevice{{"virtio", "virtio2", "0x1af4", "0x001a", "", ""}}, fails: "of type 0x001a"},
		{name: "a virtio device that says nothing", add: []fakeDevice{{bus: "virtio", name: "virtio2"}}, fails: "virtio2"},
		{name: "a virtio disk with vsock's driver", add: []fakeDevice{{"virtio", "virtio2", "0x1af4", "0x0002", "", "vmw_vsock_virtio_transport"}}, fails: "virtio2 is bound to vmw_vsock_virtio_transport"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			devices := tt.add
			for _, d := range machine {
				// A row may bring its own version of a device.
				if len(tt.add) == 0 || d.name != tt.add[0].name {
					devices = append(devices, d)
				}
			}
			gpus, err := checkDevices(fakeSysfs(t, devices), "")
			if gpus != tt.gpus || (err == nil) != (tt.fails == "") {
				t.Errorf("%d GPUs, error %v; expected %d and %q", gpus, err, tt.gpus, tt.fails)
			}
			if err != nil && !strings.Contains(err.Error(), tt.fails) {
				t.Errorf("error %q does not say %q", err, tt.fails)
			}
		})
	}
}

// Each virtio device that may be used has a row in both tables.
func TestDeviceTables(t *testing.T) {
	virtio := 0
	for _, d := range pciDevices {
		if d.what == "" || len(d.class) != len("0x0000") || (d.device == "" && !d.gpu) {
			t.Errorf("%+v: incomplete", d)
		}
		if d.gpu && d.driver != "" {
			t.Errorf("%s: a GPU's driver is on the engine disk, none is bound before", d.what)
		}
		// A virtio device of version 1 has 0x1040 added to its type: VIRTIO 1.3,
		// section 4.1.2.1.
		if kind, ok := strings.CutPrefix(d.device, "0x10"); ok && d.vendor == "0x1af4" {
			want := map[string]string{"42": "0x0002", "53": "0x0013"}[kind]
			if virtioDrivers[want] == "" || d.driver != "virtio-pci" {
				t.Errorf("%s: no driver for its virtio device", d.what)
			}
			virtio++
		}
	}
	if virtio < len(virtioDrivers) {
		t.Errorf("%d virtio devices on PCI for %d drivers", virtio, len(virtioDrivers))
	}
}
