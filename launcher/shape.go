package launcher

import (
	"fmt"
	"sort"
	"strings"
)

// Shape is a named VM profile. Together with Artefacts it decides the QEMU
// command line, and so the ACPI tables and RTMR0: two VMs of one shape measure
// the same on any host.
type Shape struct {
	Name     string
	VCPUs    int    // cores of one socket, one thread each
	Memory   uint64 // bytes, a multiple of 1 MiB
	PhysBits int    // guest physical address bits where the launcher chooses them (KVM, TCG)
	TDXBits  int    // the same in a TD, where they must be the host's own
	GPUModel string // empty without GPUs
	GPUs     int    // how many are passed through, 0 to 8
	// GPUBARs are the sizes of each GPU's memory regions, in bytes, in the order of
	// its registers: all of 64 bits, prefetchable. Where the firmware puts them is in
	// the ACPI tables. Empty without GPUs.
	GPUBARs  []uint64
	StandIns int // devices that stand in for GPUs; no shape has any outside of tests
}

const (
	mib = 1 << 20
	gib = 1 << 30
)

// shapes is the table of published shapes.
//
// No shape has more memory than fits below 1 TiB: above, QEMU's memory map is
// another on a host of AMD's (hw/i386/pc.c, pc_memory_init).
//
// 40 physical address bits are QEMU's own default: 1 TiB, with OVMF's 64-bit PCI
// window in its upper part, enough for devices with small BARs. A GPU's BARs (an
// H100 has one of 128 GiB) need the larger window that 46 bits give. QEMU refuses
// a TD whose bits differ from the host's (target/i386/kvm/tdx.c,
// tdx_check_features); Xeons with TDX have 52.
var shapes = []Shape{
	{Name: "small", VCPUs: 2, Memory: 1 * gib, PhysBits: 40, TDXBits: 52},
	{Name: "medium", VCPUs: 8, Memory: 16 * gib, PhysBits: 40, TDXBits: 52},
	{Name: "large", VCPUs: 16, Memory: 64 * gib, PhysBits: 40, TDXBits: 52},
	{Name: "h100x1", VCPUs: 16, Memory: 128 * gib, PhysBits: 46, TDXBits: 52, GPUModel: "H100", GPUs: 1, GPUBARs: barsH100},
	{Name: "h100x2", VCPUs: 32, Memory: 256 * gib, PhysBits: 46, TDXBits: 52, GPUModel: "H100", GPUs: 2, GPUBARs: barsH100},
	{Name: "h100x4", VCPUs: 64, Memory: 512 * gib, PhysBits: 46, TDXBits: 52, GPUModel: "H100", GPUs: 4, GPUBARs: barsH100},
	{Name: "h100x8", VCPUs: 128, Memory: 960 * gib, PhysBits: 46, TDXBits: 52, GPUModel: "H100", GPUs: 8, GPUBARs: barsH100},
	{Name: "h200x1", VCPUs: 16, Memory: 192 * gib, PhysBits: 46, TDXBits: 52, GPUModel: "H200", GPUs: 1, GPUBARs: barsH200},
	{Name: "h200x8", VCPUs: 128, Memory: 960 * gib, PhysBits: 46, TDXBits: 52, GPUModel: "H200", GPUs: 8, GPUBARs: barsH200},
}

// What Linux shows of an H100 80GB HBM3 and of an H200 in a virtual machine
// (/sys/bus/pci/devices/…/resource): registers, GPU's memory, channels.
var (
	barsH100 = []uint64{16 * mib, 128 * gib, 32 * mib}
	barsH200 = []uint64{16 * mib, 256 * gib, 32 * mib}
)

// LookupShape returns the shape of that name, or an error that lists the names.
func LookupShape(name string) (Shape, error) {
	for _, s := range shapes {
		if s.Name == name {
			return s, nil
		}
	}
	return Shape{}, fmt.Errorf("there is no shape %q; the shapes are %s", name, strings.Join(ShapeNames(), ", "))
}

// ShapeNames lists the names of all shapes in alphabetical order.
func ShapeNames() []string {
	names := make([]string, len(shapes))
	for i, s := range shapes {
		names[i] = s.Name
	}
	sort.Strings(names)
	return names
}
