package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// pciDevice is a device that a VM may have. IDs are as sysfs writes them. A
// driver of "" means that nothing may be bound to it.
type pciDevice struct {
	vendor, device string // device "" is any
	class          string // prefix of the class code, base class first
	driver         string
	gpu            bool
	what           string
}

// pciDevices is the whole list: what the launcher's q35 machine has and
// nothing else. A device that is not on it ends the VM, because its driver
// would be one more reader of what the host writes.
var pciDevices = []pciDevice{
	{vendor: "0x8086", device: "0x29c0", class: "0x0600", what: "q35 host bridge"},
	{vendor: "0x8086", device: "0x2918", class: "0x0601", what: "ICH9 LPC bridge"},
	{vendor: "0x1b36", device: "0x000c", class: "0x0604", driver: "pcieport", what: "PCIe root port"},
	{vendor: "0x1af4", device: "0x1042", class: "0x0100", driver: "virtio-pci", what: "virtio block"},
	{vendor: "0x1af4", device: "0x1053", class: "0x0780", driver: "virtio-pci", what: "virtio vsock"},
	{vendor: "0x1af4", device: "0x1053", class: "0x0280", driver: "virtio-pci", what: "virtio vsock"},
	{vendor: "0x10de", class: "0x0302", gpu: true, what: "NVIDIA GPU"},
}

// The virtio device types that may be used (VIRTIO 1.3, section 5), as sysfs
// writes them, and their drivers.
const (
	virtioBlock = "0x0002"
	virtioVsock = "0x0013"
)

var virtioDrivers = map[string]string{
	virtioBlock: "virtio_blk",
	virtioVsock: "vmw_vsock_virtio_transport",
}

// sysfs is where the kernel shows the devices.
const sysfs = "/sys"

// stopAutoBinding makes the kernel leave devices alone unless the agent binds
// them.
func stopAutoBinding() error {
	for _, bus := range []string{"pci", "virtio"} {
		path := "/sys/bus/" + bus + "/drivers_autoprobe"
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			return fmt.Errorf("stop the %s bus from binding drivers: %w", bus, err)
		}
	}
	return nil
}

// checkDevices compares every PCI and virtio device with the tables, and what
// is bound to it, as the sysfs at a path shows them. GPUs may be bound to one
// driver, or to none before it is loaded (""). It returns the number of GPUs. Its
// error names every device that is refused.
func checkDevices(sysfs, gpuDriver string) (gpus int, err error) {
	devices, err := filepath.Glob(filepath.Join(sysfs, "bus/pci/devices/*"))
	if err != nil {
		return 0, err
	}
	var refused []error
	for _, dir := range devices {
		driver := boundDriver(dir)
		i := knownDevice(dir)
		if i < 0 {
			refused = append(refused, fmt.Errorf("PCI device %s (%s:%s class %s) is not one that a VM may have; %s",
				filepath.Base(dir), attribute(dir, "vendor"), attribute(dir, "device"), attribute(dir, "class"), boundTo(driver)))
			continue
		}
		known := pciDevices[i]
		if known.gpu {
			known.driver = gpuDriver
		}
		if driver != "" && driver != known.driver {
			refused = append(refused, fmt.Errorf("PCI device %s (%s) is bound to %s", filepath.Base(dir), known.what, driver))
		}
		if known.gpu {
			gpus++
		}
	}
	devices, err = filepath.Glob(filepath.Join(sysfs, "bus/virtio/devices/*"))
	if err != nil {
		return 0, err
	}
	for _, dir := range devices {
		want, ok := virtioDrivers[attribute(dir, "device")]
		driver := boundDriver(dir)
		switch {
		case !ok:
			refused = append(refused, fmt.Errorf("virtio device %s of type %s is not one that a VM may have; %s",
				filepath.Base(dir), attribute(dir, "device"), boundTo(driver)))
		case driver != "" && driver != want:
			refused = append(refused, fmt.Errorf("virtio device %s is bound to %s", filepath.Base(dir), driver))
		}
	}
	if refused != nil {
		return 0, errors.Join(refused...)
	}
	return gpus, nil
}

// knownDevice returns a PCI device's place in the table, or -1.
func knownDevice(dir string) int {
	vendor, device, class := attribute(dir, "vendor"), attribute(dir, "device"), attribute(dir, "class")
	return slices.IndexFunc(pciDevices, func(d pciDevice) bool {
		return d.vendor == vendor && (d.device == "" || d.device == device) && strings.HasPrefix(class, d.class)
	})
}

// gpuDevices lists the GPUs' folders in sysfs, by address.
func gpuDevices(sysfs string) ([]string, error) {
	devices, err := filepath.Glob(filepath.Join(sysfs, "bus/pci/devices/*"))
	return slices.DeleteFunc(devices, func(dir string) bool {
		i := knownDevice(dir)
		return i < 0 || !pciDevices[i].gpu
	}), err
}

// boundTo says whether a driver of the kernel's own got to a refused device
// before the agent could keep it from that.
func boundTo(driver string) string {
	if driver == "" {
		return "no driver is bound to it"
	}
	return "it is bound to " + driver
}

// bindDevices binds each virtio device of some types to its driver.
func bindDevices(types ...string) error {
	devices, err := filepath.Glob("/sys/bus/virtio/devices/*")
	if err != nil {
		return err
	}
	for _, dir := range devices {
		kind, name := attribute(dir, "device"), filepath.Base(dir)
		if !slices.Contains(types, kind) || boundDriver(dir) != "" {
			continue
		}
		driver := virtioDrivers[kind]
		if err := os.WriteFile("/sys/bus/virtio/drivers/"+driver+"/bind", []byte(name), 0); err != nil {
			return fmt.Errorf("bind %s to %s: %w", name, driver, err)
		}
	}
	return nil
}

// blockDevices lists the disks that the host attached, by name.
func blockDevices() ([]string, error) {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, fmt.Errorf("list the disks: %w", err)
	}
	var paths []string
	for _, e := range entries {
		// Only what sits on a bus: no device-mapper, loop or RAM disks.
		if _, err := os.Stat(filepath.Join("/sys/block", e.Name(), "device")); err == nil {
			paths = append(paths, "/dev/"+e.Name())
		} else if !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("look at disk %s: %w", e.Name(), err)
		}
	}
	return paths, nil
}

func attribute(dir, name string) string {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func boundDriver(dir string) string {
	link, err := os.Readlink(filepath.Join(dir, "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(link)
}
