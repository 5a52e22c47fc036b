package acpi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
)

// A region is address space that a device's register or a bridge asks for, in
// the firmware's 64-bit window.
type region struct {
	size, align uint64 // bytes; align is a power of two
	padding     bool   // room for devices that may come later
	inside      []*region
	set         func(at, size uint64) // writes where it is; nil for padding
	at          uint64                // from the beginning of what it is in
}

// insert puts a region where edk2's list of a bridge has it: the most aligned
// first (MdeModulePkg/Bus/Pci/PciBusDxe/PciResourceSupport.c, InsertResourceNode).
func insert(list []*region, r *region) []*region {
	i := slices.IndexFunc(list, func(other *region) bool {
		if r.align != other.align {
			return r.align > other.align
		}
		rest := r.size & (r.align - 1)
		return rest == 0 || rest >= other.size&(other.align-1)
	})
	if i < 0 {
		i = len(list)
	}
	return slices.Insert(list, i, r)
}

// layOut decides where in a bridge's window each region is, and how large that
// is (PciResourceSupport.c, CalculateResourceAperture). A window is a multiple of
// 1 MiB; padding takes no more room than what it is for.
func (r *region) layOut() {
	const granule = 1 << 20
	var end [2]uint64
	for _, c := range r.inside {
		which := 0
		if c.padding {
			which = 1
		}
		c.at = alignUp(end[which], c.align)
		end[which] = c.at + c.size
	}
	r.size, r.align = alignUp(max(end[0], end[1]), granule), granule
	if len(r.inside) > 0 {
		r.align = max(r.align, r.inside[0].align)
	}
}

// place writes where everything is.
func (r *region) place(at uint64) {
	if r.set != nil {
		r.set(at, r.size)
	}
	for _, c := range r.inside {
		c.place(at + c.at)
	}
}

func alignUp(v, align uint64) uint64 { return (v + align - 1) &^ (align - 1) }

// aperture is the firmware's 64-bit window.
type aperture struct{ base, size uint64 }

// window is where OVMF's 64-bit window is: the last eighth of the address space,
// of which it uses 46 bits at most, and below what QEMU's memory map has reserved
// in it, as it does for an AMD processor (edk2,
// OvmfPkg/Library/PlatformInitLib/MemDetect.c, PlatformAddressWidthFromCpuid,
// PlatformDynamicMmioWindow, PlatformReservationConflictCB). e820 has entries of
// 20 bytes: start, length, type.
func window(bits int, e820 []byte) aperture {
	bits = min(bits, 46)
	size := uint64(1) << (bits - 3)
	base := 1<<bits - size
	for ; len(e820) >= 20; e820 = e820[20:] {
		start, length := binary.LittleEndian.Uint64(e820), binary.LittleEndian.Uint64(e820[8:])
		if kind := binary.LittleEndian.Uint32(e820[16:]); kind == 2 && start < base+size && base < start+length {
			base = (start - size) &^ (size - 1)
		}
	}
	return aperture{base, size}
}

// padding is what the firmware keeps free behind a port that devices can be
// plugged into (edk2, OvmfPkg/PciHotPlugInitDxe/PciHotPlugInit.c,
// GetResourcePadding): a 256th of a window above 32 GiB, rounded up to a power of
// two.
func (a aperture) padding() uint64 {
	if a.size <= 32<<30 {
		return 0
	}
	return 1 << bits.Len64(a.size>>8-1)
}

// A function is the address of a PCI function, as the configuration port takes
// it: bus, slot and function in bits 23 to 8.
type function uint32

func (f function) String() string { return fmt.Sprintf("%02x:%02x.%x", f>>16, f>>11&31, f>>8&7) }

// configure writes a PCI configuration register.
func (q *qtest) configure(f function, register int, value uint32) {
	q.do("outl 0xcf8 %#x", 0x80000000|int(f)|register)
	q.do("outl 0xcfc %#x", value)
}

func (q *qtest) config(f function, register int) (v uint32) {
	q.do("outl 0xcf8 %#x", 0x80000000|int(f)|register)
	answer := q.do("inl 0xcfc")
	if q.err == nil {
		if _, err := fmt.Sscanf(answer, "0x%x", &v); err != nil {
			q.err = fmt.Errorf("qtest: inl: %.80q", answer)
		}
	}
	return v
}

// Registers and bits of configuration space (PCI Local Bus Specification 3.0,
// section 6; PCI-to-PCI Bridge Architecture Specification 1.2, section 3.2).
const (
	regCommand    = 0x04
	regHeader     = 0x0c
	regBAR        = 0x10
	regBuses      = 0x18
	regPrefetch   = 0x24 // base and limit, bits 31 to 20 of each
	regBaseUpper  = 0x28
	regLimitUpper = 0x2c

	commandMemory = 2
	commandMaster = 4
)

// assign gives the 64-bit regions of all devices addresses as OVMF does. The
// DSDT's window is made from where those on bus 0 begin and end, of which the
// windows of bridges are part (QEMU, hw/pci/pci.c, pci_dev_get_w64; bus 0's alone
// are looked at). gpus are the slots of the ports that have a GPU behind them.
func (q *qtest) assign(w aperture, gpus []int, gpu []uint64) {
	root := &region{}
	var found []*region
	bus := 0
	for slot := 1; slot < 31 && q.err == nil; slot++ {
		f := function(slot << 11)
		if id := q.config(f, 0); id == 0xffffffff || id == 0 {
			continue
		}
		switch header := q.config(f, regHeader) >> 16 & 0x7f; {
		case header == 0:
			for _, r := range q.regions(f) {
				found = insert(found, r)
			}
		case header == 1:
			bus++
			var behind []uint64
			if slices.Contains(gpus, slot) {
				behind = gpu
			}
			if port := q.port(f, bus, behind, w.padding()); port.size > 0 {
				found = insert(found, port)
			}
		default:
			q.err = fmt.Errorf("%v has a header of type %d, expected a device or a bridge", f, header)
		}
	}
	// The lists of prefetchable and of other regions are merged on bus 0, one by
	// one (PciResourceSupport.c, MergeResourceTree).
	for _, r := range found {
		root.inside = insert(root.inside, r)
	}
	root.layOut()
	if q.err == nil && root.size > w.size {
		q.err = fmt.Errorf("the devices' memory regions take %d GiB with their alignment, and the firmware's window has %d", root.size>>30, w.size>>30)
		return
	}
	root.place(w.base)
}

// regions are the 64-bit, prefetchable regions of a device.
func (q *qtest) regions(f function) (list []*region) {
	for register := regBAR; register < 0x28 && q.err == nil; register += 4 {
		low := q.config(f, register)
		if low&1 != 0 || low&6 != 4 { // a port, or not of 64 bits
			continue
		}
		q.configure(f, register, 0xffffffff)
		q.configure(f, register+4, 0xffffffff)
		size := ^(uint64(q.config(f, register+4))<<32 | uint64(q.config(f, register)&^15)) + 1
		if low&8 != 0 && size != 0 {
			first := register
			list = append(list, &region{size: size, align: size, set: func(at, _ uint64) { q.setBAR(f, first, at) }})
		}
		register += 4
	}
	return list
}

func (q *qtest) setBAR(f function, register int, at uint64) {
	q.set(f, register, uint32(at), 15)
	q.set(f, register+4, uint32(at>>32), 0)
	q.set(f, regCommand, commandMemory, 0xffff0000)
}

// set writes a register and requires that it then has the value, but for the bits
// of mask.
func (q *qtest) set(f function, register int, value, mask uint32) {
	q.configure(f, register, value)
	if got := q.config(f, register); q.err == nil && (got^value)&^mask != 0 {
		q.err = fmt.Errorf("register %#x of %v has %#x after %#x was written", register, f, got, value)
	}
}

// standInBAR is the register of a stand-in's large region (QEMU,
// hw/misc/pci-testdev.c: region 2).
const standInBAR = regBAR + 2*4

// port is the window of a port and what is behind it: the device's own regions
// or, where it stands in for a GPU, that GPU's, of which the stand-in has the
// largest.
func (q *qtest) port(f function, bus int, gpu []uint64, padding uint64) *region {
	p := &region{set: func(at, size uint64) {
		last := at + size - 1
		q.set(f, regPrefetch, uint32(at>>16&0xfff0)|uint32(last>>16&0xfff0)<<16, 0x000f000f)
		q.set(f, regBaseUpper, uint32(at>>32), 0)
		q.set(f, regLimitUpper, uint32(last>>32), 0)
		q.set(f, regCommand, commandMemory|commandMaster, 0xffff0000)
	}}
	q.configure(f, regBuses, uint32(bus<<16|bus<<8))
	functions := 1
	for i := 0; i < functions && q.err == nil; i++ {
		d := function(bus<<16 | i<<8)
		if id := q.config(d, 0); id == 0xffffffff || id == 0 {
			continue
		}
		header := q.config(d, regHeader) >> 16
		if header&0x7f != 0 {
			q.err = errors.Join(q.err, fmt.Errorf("%v has a bridge behind a bridge, which is not predicted", f))
		}
		if header&0x80 != 0 {
			functions = 8
		}
		own := q.regions(d)
		if gpu != nil {
			own = nil
			for _, size := range gpu {
				r := &region{size: size, align: size}
				if size == slices.Max(gpu) {
					r.set = func(at, _ uint64) { q.setBAR(d, standInBAR, at) }
				}
				own = append(own, r)
			}
		}
		for _, r := range own {
			p.inside = insert(p.inside, r)
		}
	}
	if padding > 0 {
		p.inside = insert(p.inside, &region{size: padding, align: padding, padding: true})
	}
	p.layOut()
	return p
}
