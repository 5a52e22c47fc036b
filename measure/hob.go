package measure

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Places where QEMU's q35 puts memory (hw/i386/pc_q35.c, pc_q35_init).
const (
	lowMemoryLimit = 0xb0000000 // with this much memory or more,
	lowMemory      = 0x80000000 // this much is below 4 GiB
	fourGiB        = 1 << 32
)

// ErrMemory is a size of memory that no VM has.
var ErrMemory = errors.New("a VM has 16 MiB to 64 TiB of memory, in multiples of 4096 bytes")

// TDHOB returns the list of memory that QEMU hands to a TD's firmware
// (hw/i386/tdvf-hob.c), without its end, which the firmware does not measure.
// memory is in bytes. Memory that a TD_HOB or TEMP_MEM section takes is there
// already (type 0), the rest is to be accepted (type 7).
func (f *Firmware) TDHOB(memory uint64) ([]byte, error) {
	if memory < 16<<20 || memory > 64<<40 || memory%4096 != 0 {
		return nil, fmt.Errorf("%d bytes: %w", memory, ErrMemory)
	}
	hob, err := f.section(SectionTDHOB)
	if err != nil {
		return nil, err
	}
	type ram struct {
		start, size uint64
		added       bool
	}
	list := []ram{{0, memory, false}}
	if memory >= lowMemoryLimit {
		list = []ram{{0, lowMemory, false}, {fourGiB, memory - lowMemory, false}}
	}
	for _, s := range f.Sections {
		if s.Type != SectionTDHOB && s.Type != SectionTempMem {
			continue
		}
		i := slices.IndexFunc(list, func(r ram) bool { return s.Address < r.start+r.size && r.start < s.Address+s.Size })
		if i < 0 || list[i].start > s.Address || list[i].start+list[i].size < s.Address+s.Size || list[i].added {
			return nil, fmt.Errorf("%s: section %s at %#x to %#x is not in %d bytes of memory", f.in.name, s.typeName(), s.Address, s.Address+s.Size, memory)
		}
		whole := list[i]
		list[i] = ram{s.Address, s.Size, true}
		if before := s.Address - whole.start; before > 0 {
			list = append(list, ram{whole.start, before, false})
		}
		if after := whole.start + whole.size - s.Address - s.Size; after > 0 {
			list = append(list, ram{s.Address + s.Size, after, false})
		}
	}
	slices.SortFunc(list, func(a, b ram) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})

	le := binary.LittleEndian
	out := make([]byte, 56) // EFI_HOB_HANDOFF_INFO_TABLE (PI 1.7, volume 3, section 5.3)
	le.PutUint16(out, 1)    // EFI_HOB_TYPE_HANDOFF
	le.PutUint16(out[2:], 56)
	le.PutUint32(out[8:], 9) // EFI_HOB_HANDOFF_TABLE_VERSION
	le.PutUint64(out[48:], hob.Address+56+48*uint64(len(list))+8)
	for _, r := range list {
		d := make([]byte, 48)   // EFI_HOB_RESOURCE_DESCRIPTOR (section 5.5)
		le.PutUint16(d, 3)      // EFI_HOB_TYPE_RESOURCE_DESCRIPTOR
		le.PutUint16(d[2:], 48) // the owner, at 8, is zeros
		if !r.added {
			le.PutUint32(d[24:], 7) // EFI_RESOURCE_MEMORY_UNACCEPTED
		}
		le.PutUint32(d[28:], 7) // present, initialised, tested
		le.PutUint64(d[32:], r.start)
		le.PutUint64(d[40:], r.size)
		out = append(out, d...)
	}
	if uint64(len(out)) > hob.Size-8 {
		return nil, fmt.Errorf("%s: the list of memory has %d bytes, the TD_HOB section %d", f.in.name, len(out)+8, hob.Size)
	}
	return out, nil
}
