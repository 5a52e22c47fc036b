// Package gpu finds the NVIDIA GPUs of a host, tells what confidential-computing
// mode each is in, and hands them to VMs and back.
//
// It works on the kernel's own files below a root that the caller gives, so that
// a test can give it a tree of its own. It is not trusted by any client: a VM asks
// its GPUs itself.
package gpu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mode is a GPU's confidential-computing mode.
type Mode string

// The modes.
const (
	ModeOff      Mode = "off"
	ModeOn       Mode = "on"
	ModeDevTools Mode = "devtools" // encrypted, but debuggers can look in
	ModeUnknown  Mode = "unknown"
)

// GPU is what the host sees of one.
type GPU struct {
	Address  string `json:"address"`   // PCI, DDDD:BB:DD.F
	DeviceID string `json:"device_id"` // PCI, four hexadecimal digits
	Name     string `json:"name"`      // for example H100; empty when the ID is not known
	// Confidential says whether this GPU has a confidential-computing mode that
	// Chrysalis can use.
	Confidential bool     `json:"confidential"`
	Mode         Mode     `json:"mode"`
	ModeNote     string   `json:"mode_note,omitempty"`  // why it is unknown
	Driver       string   `json:"driver"`               // bound to it; empty when none
	Group        string   `json:"iommu_group"`          // empty without an IOMMU
	VBIOS        string   `json:"vbios,omitempty"`      // where NVIDIA's driver tells it
	BARs         []uint64 `json:"bars"`                 // bytes of each memory region, by number, up to 6
	NUMANode     int      `json:"numa_node"`            // -1 when there is none
	Display      string   `json:"display,omitempty"`    // why it cannot be taken away from the host
	Processes    []string `json:"processes,omitempty"`  // those that use it, as NAME (PID)
	Neighbours   []string `json:"neighbours,omitempty"` // of its IOMMU group, bridges left out, as ADDRESS (DRIVER)
}

const (
	vendorNVIDIA = "0x10de"
	driverVFIO   = "vfio-pci"
)

// names are the PCI device IDs of Hopper, from NVIDIA's gpu-admin-tools
// (gpu/devid_names.py).
var names = map[uint16]string{
	0x2313: "H100 CNX", 0x2321: "H100 NVL", 0x2330: "H100 SXM", 0x2331: "H100 PCIe", 0x2336: "H100", 0x2337: "H100",
	0x2338: "H100", 0x2339: "H100", 0x233d: "H100",
	0x2335: "H200 SXM", 0x233b: "H200 NVL", 0x2342: "GH200", 0x2343: "GH200", 0x2345: "GH200", 0x2348: "GH200",
	0x2322: "H800", 0x2324: "H800", 0x233a: "H800", 0x2309: "H20", 0x230c: "H20", 0x230e: "H20", 0x2328: "H20", 0x2329: "H20",
}

// hopper reports whether a device ID is of a GH100.
func hopper(id uint16) bool { return id>>8 == 0x23 }

// Host is a machine.
type Host struct {
	Root string // "/" on a real one
	// Write writes to a file of the kernel's; os.WriteFile when nil.
	Write func(path, data string) error
	// Run runs a program; as it is when nil.
	Run func(argv ...string) error
}

func (h *Host) path(elements ...string) string {
	return filepath.Join(append([]string{h.Root}, elements...)...)
}

func (h *Host) device(address string, elements ...string) string {
	return h.path(append([]string{"sys/bus/pci/devices", address}, elements...)...)
}

// read returns a small file's first line, or "".
func read(path string) string {
	data, err := os.ReadFile(path)
	if err != nil || len(data) > 64<<10 {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return strings.TrimSpace(line)
}

// link returns the last element of what a link points at, or "".
func link(path string) string {
	target, err := os.Readlink(path)
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// List returns the NVIDIA GPUs, by address. A host without any has none; it is
// an error only where the kernel's own files cannot be read.
func (h *Host) List() ([]GPU, error) {
	entries, err := os.ReadDir(h.path("sys/bus/pci/devices"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list PCI devices: %w", err)
	}
	var out []GPU
	for _, e := range entries {
		if gpu, ok := h.look(e.Name()); ok {
			out = append(out, gpu)
		}
	}
	if len(out) > 0 {
		h.findProcesses(out)
	}
	return out, nil
}

// Find returns the GPU at an address, which may leave out the domain 0000.
func (h *Host) Find(address string) (GPU, error) {
	all, err := h.List()
	if err != nil {
		return GPU{}, err
	}
	var known []string
	for _, g := range all {
		if g.Address == address || g.Address == "0000:"+address {
			return g, nil
		}
		known = append(known, g.Address)
	}
	if len(known) == 0 {
		return GPU{}, fmt.Errorf("there is no NVIDIA GPU on this machine; 'lspci -d 10de:' lists what the kernel sees")
	}
	return GPU{}, fmt.Errorf("there is no NVIDIA GPU at %q; there are %s", address, strings.Join(known, ", "))
}

func (h *Host) look(address string) (GPU, bool) {
	if read(h.device(address, "vendor")) != vendorNVIDIA {
		return GPU{}, false
	}
	// 0x0300 is a VGA controller, 0x0302 a 3D controller.
	class := read(h.device(address, "class"))
	if !strings.HasPrefix(class, "0x0300") && !strings.HasPrefix(class, "0x0302") {
		return GPU{}, false
	}
	id, err := strconv.ParseUint(strings.TrimPrefix(read(h.device(address, "device")), "0x"), 16, 16)
	if err != nil {
		return GPU{}, false
	}
	g := GPU{
		Address: address, DeviceID: fmt.Sprintf("%04x", id), Name: names[uint16(id)], Confidential: hopper(uint16(id)),
		Driver: link(h.device(address, "driver")), Group: link(h.device(address, "iommu_group")), NUMANode: -1,
		BARs: []uint64{},
	}
	if node, err := strconv.Atoi(read(h.device(address, "numa_node"))); err == nil {
		g.NUMANode = node
	}
	g.BARs = h.bars(address)
	g.Mode, g.ModeNote = h.mode(g)
	g.VBIOS = h.information(address, "Video BIOS")
	g.Display = h.display(address)
	if g.Group != "" {
		g.Neighbours = h.neighbours(address)
	}
	return g, true
}

// information reads a line of what NVIDIA's driver says about a GPU.
func (h *Host) information(address, key string) string {
	data, err := os.ReadFile(h.path("proc/driver/nvidia/gpus", address, "information"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// bars reads the sizes of the memory regions (Documentation/PCI/sysfs-pci.rst:
// start, end and flags of each, one a line).
func (h *Host) bars(address string) []uint64 {
	data, err := os.ReadFile(h.device(address, "resource"))
	if err != nil {
		return []uint64{}
	}
	out := []uint64{}
	for line := range strings.Lines(string(data)) {
		var start, end, flags uint64
		if n, _ := fmt.Sscanf(line, "%v %v %v", &start, &end, &flags); n != 3 || len(out) == 6 {
			break
		}
		size := uint64(0)
		if end > start {
			size = end - start + 1
		}
		out = append(out, size)
	}
	return out
}

// The register that holds the mode of a GH100, in its first memory region, as
// NVIDIA's gpu-admin-tools read it. The low two bits are 0 off, 1 on, 3 devtools.
const (
	hopperModeRegister = 0x1182cc
	notAnswering       = 0xffffffff // what a PCI read gives when nothing answers
)

// mode reads the mode without touching anything: it maps one page of the first
// memory region read-only.
func (h *Host) mode(g GPU) (Mode, string) {
	if !g.Confidential {
		return ModeUnknown, "the mode of this model cannot be read"
	}
	config := make([]byte, 6)
	f, err := os.Open(h.device(g.Address, "config"))
	if err == nil {
		_, err = f.ReadAt(config, 0)
		f.Close()
	}
	if err != nil {
		return ModeUnknown, "its configuration cannot be read"
	}
	// PCI 3.0, section 6.2.2: bit 1 of the command register is memory decoding.
	if binary.LittleEndian.Uint16(config[4:])&2 == 0 {
		return ModeUnknown, "its memory regions are off; bind it to a driver first"
	}
	if state := read(h.device(g.Address, "power_state")); state != "" && state != "D0" && state != "unknown" {
		return ModeUnknown, "it sleeps in " + state
	}
	value, err := mapRegister(h.device(g.Address, "resource0"), hopperModeRegister)
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return ModeUnknown, "only root can read it"
	case errors.Is(err, fs.ErrPermission):
		return ModeUnknown, "the kernel lets not even root map its registers: it is locked down, or root here lacks CAP_SYS_RAWIO"
	case err != nil:
		return ModeUnknown, fmt.Sprintf("its register cannot be read: %v", err)
	case value == notAnswering:
		return ModeUnknown, "it does not answer"
	}
	switch value & 3 {
	case 0:
		return ModeOff, ""
	case 1:
		return ModeOn, ""
	case 3:
		return ModeDevTools, ""
	}
	return ModeUnknown, fmt.Sprintf("its register holds %#x", value)
}

// mapRegister reads 4 bytes at an offset of a memory region. The kernel lets
// such files be mapped only.
func mapRegister(path string, offset int64) (uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() < offset+4 {
		return 0, fmt.Errorf("the region has %d bytes, the register is at %#x", info.Size(), offset)
	}
	page := int64(os.Getpagesize())
	mapped, err := unix.Mmap(int(f.Fd()), offset&^(page-1), int(page), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, &fs.PathError{Op: "mmap", Path: path, Err: err}
	}
	defer unix.Munmap(mapped)
	return binary.LittleEndian.Uint32(mapped[offset&(page-1):]), nil
}

// display tells why the GPU drives the host's display, or "".
func (h *Host) display(address string) string {
	if read(h.device(address, "boot_vga")) == "1" {
		return "it is the machine's first display"
	}
	connectors, _ := filepath.Glob(h.device(address, "drm", "card*", "card*-*"))
	for _, c := range connectors {
		if read(filepath.Join(c, "enabled")) == "enabled" {
			return "its connector " + filepath.Base(c) + " is in use"
		}
	}
	return ""
}

// neighbours lists the other devices of the IOMMU group, which go where the GPU
// goes. Bridges do not count (Documentation/driver-api/vfio.rst).
func (h *Host) neighbours(address string) []string {
	entries, err := os.ReadDir(h.device(address, "iommu_group", "devices"))
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		other := e.Name()
		if other == address || strings.HasPrefix(read(h.device(other, "class")), "0x0604") {
			continue
		}
		driver := link(h.device(other, "driver"))
		if driver == "" {
			driver = "no driver"
		}
		out = append(out, fmt.Sprintf("%s (%s)", other, driver))
	}
	return out
}

// nodes lists the device nodes through which a process can use a GPU.
func (h *Host) nodes(g GPU) []string {
	var out []string
	if minor := h.information(g.Address, "Device Minor"); minor != "" {
		out = append(out, "/dev/nvidia"+minor)
	}
	cards, _ := os.ReadDir(h.device(g.Address, "drm"))
	for _, c := range cards {
		out = append(out, "/dev/dri/"+c.Name())
	}
	if g.Group != "" {
		out = append(out, "/dev/vfio/"+g.Group)
	}
	vfio, _ := os.ReadDir(h.device(g.Address, "vfio-dev"))
	for _, v := range vfio {
		out = append(out, "/dev/vfio/devices/"+v.Name())
	}
	return out
}

// findProcesses notes which processes hold a GPU's device node open.
func (h *Host) findProcesses(gpus []GPU) {
	users := map[string][]int{}
	for i, g := range gpus {
		for _, node := range h.nodes(g) {
			users[node] = append(users[node], i)
		}
	}
	processes, _ := os.ReadDir(h.path("proc"))
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		descriptors, err := os.ReadDir(h.path("proc", p.Name(), "fd"))
		if err != nil {
			continue // gone, or not ours to see
		}
		for _, d := range descriptors {
			target, err := os.Readlink(h.path("proc", p.Name(), "fd", d.Name()))
			if err != nil {
				continue
			}
			for _, i := range users[target] {
				who := fmt.Sprintf("%s (%s)", read(h.path("proc", p.Name(), "comm")), p.Name())
				if !slices.Contains(gpus[i].Processes, who) {
					gpus[i].Processes = append(gpus[i].Processes, who)
				}
			}
		}
	}
}
