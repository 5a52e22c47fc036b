// Package gputest makes the kernel's files of a host with GPUs in a temporary
// folder, which change when they are written to as the kernel's do. Nothing in
// it touches a real device.
package gputest

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/launcher/gpu"
)

// Tree is such a folder.
type Tree struct {
	gpu.Host
	t testing.TB
	// Written lists what was written, as PATH=DATA, and Ran what was run.
	Written, Ran []string
	// Refuse makes a write to a path that ends with this fail.
	Refuse string
	// Tool is what running NVIDIA's tool does; it sets the mode when nil.
	Tool func(argv []string) error
}

// New makes a tree without devices.
func New(t testing.TB) *Tree {
	tree := &Tree{t: t}
	tree.Host = gpu.Host{Root: t.TempDir(), Write: tree.write, Run: tree.run}
	for _, dir := range []string{"sys/bus/pci/devices", "sys/bus/pci/drivers/vfio-pci", "sys/bus/pci/drivers/nvidia", "sys/kernel/iommu_groups", "proc"} {
		tree.Dir(dir)
	}
	tree.File("sys/bus/pci/drivers_probe", "")
	return tree
}

func (tree *Tree) path(p string) string { return filepath.Join(tree.Root, p) }

// Dir makes a folder.
func (tree *Tree) Dir(path string) {
	tree.check(os.MkdirAll(tree.path(path), 0o755))
}

// File makes a file.
func (tree *Tree) File(path, content string) {
	tree.Dir(filepath.Dir(path))
	tree.check(os.WriteFile(tree.path(path), []byte(content), 0o644))
}

// Link makes a symbolic link, in place of what was there.
func (tree *Tree) Link(path, target string) {
	tree.Dir(filepath.Dir(path))
	os.Remove(tree.path(path))
	tree.check(os.Symlink(target, tree.path(path)))
}

func (tree *Tree) check(err error) {
	tree.t.Helper()
	if err != nil {
		tree.t.Fatal(err)
	}
}

// Device is a GPU's folder.
func Device(address string) string { return "sys/bus/pci/devices/" + address }

// Add adds an H100 PCIe, bound to NVIDIA's driver, alone in its IOMMU group.
func (tree *Tree) Add(address, group string) {
	d := Device(address)
	for name, content := range map[string]string{
		"vendor": "0x10de\n", "device": "0x2331\n", "class": "0x030200\n", "numa_node": "0\n", "boot_vga": "0\n",
		"driver_override": "(null)\n", "power_state": "D0\n", "enable": "1\n",
		"resource": "0x0000380000000000 0x0000380000ffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 0x0000000000000000\n" +
			"0x0000340000000000 0x00003417ffffffff 0x000000000014220c\n",
		"config": "\xde\x10\x31\x23\x06\x04", // memory decoding and bus mastering on
	} {
		tree.File(d+"/"+name, content)
	}
	tree.SetMode(address, 0)
	tree.Bind(address, "nvidia")
	tree.Dir("sys/kernel/iommu_groups/" + group + "/devices")
	tree.Link(d+"/iommu_group", "../../../../kernel/iommu_groups/"+group)
	tree.Link("sys/kernel/iommu_groups/"+group+"/devices/"+address, "../../../../bus/pci/devices/"+address)
	tree.File("proc/driver/nvidia/gpus/"+address+"/information", "Model: \t\t NVIDIA H100 PCIe\nVideo BIOS: \t 96.00.9f.00.01\nDevice Minor: \t 0\n")
}

// Bind links a device to a driver; "" unbinds it.
func (tree *Tree) Bind(address, driver string) {
	path := Device(address) + "/driver"
	os.Remove(tree.path(path))
	if driver != "" {
		tree.Link(path, "../../drivers/"+driver)
	}
}

// SetMode sets the register that holds the mode.
func (tree *Tree) SetMode(address string, value uint32) {
	f, err := os.OpenFile(tree.path(Device(address)+"/resource0"), os.O_RDWR|os.O_CREATE, 0o644)
	tree.check(err)
	defer f.Close()
	tree.check(f.Truncate(16 << 20))
	_, err = f.WriteAt(binary.LittleEndian.AppendUint32(nil, value), 0x1182cc)
	tree.check(err)
}

// Process adds a process that holds a node open.
func (tree *Tree) Process(pid int, name, node string) {
	tree.File(fmt.Sprintf("proc/%d/comm", pid), name+"\n")
	tree.Link(fmt.Sprintf("proc/%d/fd/3", pid), node)
}

// write does what the kernel does.
func (tree *Tree) write(path, data string) error {
	rel, err := filepath.Rel(tree.Root, path)
	if err != nil {
		return err
	}
	tree.Written = append(tree.Written, rel+"="+strings.TrimSpace(data))
	if tree.Refuse != "" && strings.HasSuffix(rel, tree.Refuse) {
		return fmt.Errorf("write %s: device or resource busy", rel)
	}
	switch {
	case strings.HasSuffix(rel, "/driver/unbind"):
		tree.Bind(data, "")
	case strings.HasPrefix(rel, "sys/bus/pci/drivers/") && strings.HasSuffix(rel, "/bind"):
		tree.Bind(data, filepath.Base(filepath.Dir(rel)))
	case strings.HasSuffix(rel, "/driver_override"):
		if data == "\n" {
			data = "(null)\n"
		}
		tree.File(rel, data)
	case rel == "sys/bus/pci/drivers_probe":
		override, _ := os.ReadFile(tree.path(Device(data) + "/driver_override"))
		if driver := strings.TrimSpace(string(override)); driver != "(null)" {
			tree.Bind(data, driver)
		}
	case strings.HasSuffix(rel, "/enable"):
		config, _ := os.ReadFile(tree.path(filepath.Dir(rel) + "/config"))
		config[4] |= 2
		tree.File(filepath.Dir(rel)+"/config", string(config))
	default:
		return fmt.Errorf("write %s: no such file", rel)
	}
	return nil
}

func (tree *Tree) run(argv ...string) error {
	tree.Ran = append(tree.Ran, strings.Join(argv, " "))
	if tree.Tool != nil {
		return tree.Tool(argv)
	}
	var address string
	value := uint32(0)
	for _, arg := range argv {
		if a, ok := strings.CutPrefix(arg, "--gpu-bdf="); ok {
			address = a
		}
		if arg == "--set-cc-mode=on" {
			value = 1
		}
	}
	if address != "" {
		tree.SetMode(address, value)
	}
	return nil
}
