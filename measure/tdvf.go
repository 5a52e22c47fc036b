package measure

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"io"
)

// Types of sections of a TDVF (Intel TDX Virtual Firmware Design Guide, section
// 11.2).
const (
	SectionBFV     = 0 // boot firmware volume: the code
	SectionCFV     = 1 // configuration firmware volume: the variable store
	SectionTDHOB   = 2
	SectionTempMem = 3
)

// Attributes of a section: the guide's table 11-3.
const (
	attrExtend = 1 << 0 // its content is measured into MRTD
	attrPage   = 1 << 1 // PAGE.AUG: it is not added before the TD runs
)

// Section is a part of a TD's memory that its firmware asks for.
type Section struct {
	Offset, RawSize uint32 // in the file; RawSize is 0 for memory without content
	Address, Size   uint64 // guest physical
	Type, Attr      uint32
}

func (s Section) typeName() string {
	if names := []string{"BFV", "CFV", "TD_HOB", "TEMP_MEM"}; int(s.Type) < len(names) {
		return names[s.Type]
	}
	return fmt.Sprintf("type %d", s.Type)
}

// Bounds of a firmware.
const (
	MaxFirmware = 64 << 20 // bytes of a file
	maxTDVF     = 64       // sections
	maxTDMemory = 1 << 30  // bytes of a section in memory
)

// Firmware is a firmware image.
type Firmware struct {
	SHA256   [32]byte
	Sections []Section // empty where it has no TDX metadata
	Profile  Profile   // what this build measures; Profile.Name is "" where it is not known

	in    input
	noTDX error // why Sections is empty
}

// ReadFirmware reads a firmware image of size bytes; name is for errors. A file
// without TDX metadata is one: what needs the metadata says that it is missing.
// Metadata that is there and wrong is an error.
func ReadFirmware(name string, r io.ReaderAt, size int64) (*Firmware, error) {
	if size <= 0 || size > MaxFirmware {
		return nil, fmt.Errorf("%s: %d bytes, a firmware has 1 to %d", name, size, MaxFirmware)
	}
	data := make([]byte, size)
	if _, err := r.ReadAt(data, 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f := &Firmware{SHA256: sha256.Sum256(data), in: input{name, data}}
	f.Profile = profileOf(f.SHA256)
	at, err := f.metadata()
	if err != nil {
		f.noTDX = err
		return f, nil
	}
	if f.Sections, err = f.sections(at); err != nil {
		return nil, err
	}
	return f, nil
}

// GUIDs of the table that ends OVMF's reset vector (edk2,
// OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm).
var (
	guidFooter   = mustGUID("96b582de-1fb2-45f7-baea-a366c55a082d")
	guidMetadata = mustGUID("e47a6535-984a-4798-865e-4685a7bf8ec2")
)

// metadata finds the TDVF metadata's offset. The table of GUIDed entries ends 32
// bytes before the file does and is read backwards: each entry is its data, a
// 2-byte length that counts the whole entry, and a GUID.
func (f *Firmware) metadata() (uint64, error) {
	size := uint64(len(f.in.data))
	const entry = 2 + 16
	if size < 32+entry {
		return 0, f.in.errorf(0, "%d bytes are no OVMF", size)
	}
	end := size - 32
	footer := f.in.data[end-entry:]
	if !bytes.Equal(footer[2:entry], guidFooter[:]) {
		return 0, f.in.errorf(end-16, "the GUID %x, expected the footer of OVMF's table; it has no TDX metadata", footer[2:entry])
	}
	total := uint64(binary.LittleEndian.Uint16(footer))
	if total < entry || total > end {
		return 0, f.in.errorf(end-entry, "the table of GUIDs has %d bytes, expected %d to %d", total, entry, end)
	}
	start := end - total
	for at := end - entry; at > start; {
		if at-start < entry {
			return 0, f.in.errorf(start, "%d bytes are no entry of the table of GUIDs", at-start)
		}
		header := f.in.data[at-entry:]
		length := uint64(binary.LittleEndian.Uint16(header))
		if length < entry || length > at-start {
			return 0, f.in.errorf(at-entry, "an entry of %d bytes, expected %d to %d", length, entry, at-start)
		}
		if bytes.Equal(header[2:entry], guidMetadata[:]) {
			if length != entry+4 {
				return 0, f.in.errorf(at-entry, "the TDX metadata's entry has %d bytes, expected %d", length, entry+4)
			}
			back := uint64(binary.LittleEndian.Uint32(f.in.data[at-length:]))
			if back > size {
				return 0, f.in.errorf(at-length, "the TDX metadata is %#x bytes before the file's end, the file has %#x", back, size)
			}
			return size - back, nil
		}
		at -= length
	}
	return 0, f.in.errorf(start, "the table of GUIDs has no TDX metadata; it is a firmware without TDX")
}

// sections reads and checks the list of sections: 16 bytes of header, then 32
// bytes a section.
func (f *Firmware) sections(at uint64) ([]Section, error) {
	head, err := f.in.slice(at, 16, "the TDX metadata")
	if err != nil {
		return nil, err
	}
	if string(head[:4]) != "TDVF" {
		return nil, f.in.errorf(at, "%q, expected the TDX metadata's signature \"TDVF\"", head[:4])
	}
	le := binary.LittleEndian
	length, version, count := le.Uint32(head[4:]), le.Uint32(head[8:]), le.Uint32(head[12:])
	if version != 1 {
		return nil, f.in.errorf(at+8, "TDX metadata of version %d, expected 1", version)
	}
	if count < 1 || count > maxTDVF || length != 16+32*count {
		return nil, f.in.errorf(at+4, "%d bytes of TDX metadata for %d sections, expected 1 to %d sections of 32 bytes and a header of 16", length, count, maxTDVF)
	}
	table, err := f.in.slice(at+16, 32*uint64(count), "the list of sections")
	if err != nil {
		return nil, err
	}
	var list []Section
	kinds := map[uint32]int{}
	for i := range int(count) {
		here, b := at+16+32*uint64(i), table[32*i:]
		s := Section{le.Uint32(b), le.Uint32(b[4:]), le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint32(b[24:]), le.Uint32(b[28:])}
		bad := func(format string, args ...any) error {
			return f.in.errorf(here, "section %d, %s: %w", i, s.typeName(), fmt.Errorf(format, args...))
		}
		switch {
		case s.Type > SectionTempMem:
			return nil, bad("expected a type of 0 to 3")
		case s.Attr&^(attrExtend|attrPage) != 0:
			return nil, bad("attributes %#x, expected bits 0 and 1 only", s.Attr)
		case s.Address%4096 != 0 || s.Size%4096 != 0 || s.Size == 0 || s.Size > maxTDMemory || s.Address+s.Size < s.Address:
			return nil, bad("memory %#x of %#x bytes, expected whole pages and at most %#x bytes", s.Address, s.Size, maxTDMemory)
		case s.RawSize == 0 && s.Type <= SectionCFV:
			return nil, bad("it has no content")
		case s.RawSize != 0 && s.Type > SectionCFV:
			return nil, bad("it has %#x bytes of content, expected none", s.RawSize)
		case uint64(s.RawSize) > s.Size:
			return nil, bad("%#x bytes of content for %#x bytes of memory", s.RawSize, s.Size)
		case s.Type <= SectionCFV && uint64(s.RawSize) != s.Size:
			return nil, bad("%#x bytes of content for %#x bytes of memory, expected as many", s.RawSize, s.Size)
		case uint64(s.Offset)+uint64(s.RawSize) > uint64(len(f.in.data)):
			return nil, bad("its content ends at byte %#x, the file at %#x", uint64(s.Offset)+uint64(s.RawSize), len(f.in.data))
		case s.Attr&attrPage != 0 && s.Attr&attrExtend != 0:
			return nil, bad("it is to be measured and is not there before the TD runs")
		}
		for j, other := range list {
			if s.Address < other.Address+other.Size && other.Address < s.Address+s.Size {
				return nil, bad("memory %#x to %#x overlaps section %d's %#x to %#x", s.Address, s.Address+s.Size, j, other.Address, other.Address+other.Size)
			}
		}
		kinds[s.Type]++
		list = append(list, s)
	}
	for _, kind := range []uint32{SectionBFV, SectionCFV, SectionTDHOB} {
		if n := kinds[kind]; n != 1 && !(kind == SectionBFV && n > 1) {
			return nil, f.in.errorf(at+16, "%d sections of type %s, expected one", n, Section{Type: kind}.typeName())
		}
	}
	return list, nil
}

// section returns the first section of a type.
func (f *Firmware) section(kind uint32) (Section, error) {
	for _, s := range f.Sections {
		if s.Type == kind {
			return s, nil
		}
	}
	return Section{}, f.noTDX
}

// PageOrder is in which order a VMM adds and measures the pages of a section.
type PageOrder int

// The orders.
const (
	// Interleaved measures each page as it is added: QEMU 9 and later, which call
	// KVM_TDX_INIT_MEM_REGION.
	Interleaved PageOrder = iota
	// TwoPass adds all pages of a section, then measures them: QEMU 8.
	TwoPass
)

// MRTD is the measurement of the TD's initial memory (Intel TDX Module
// Architecture Specification, section "Build-Time Measurement: MRTD"): one
// SHA-384 stream of a 128-byte record for each page that is added and each 256
// bytes that are measured, in the order of the sections.
func (f *Firmware) MRTD(order PageOrder) ([]byte, error) {
	if len(f.Sections) == 0 {
		return nil, f.noTDX
	}
	h := sha512.New384()
	var record [128]byte
	write := func(what string, address uint64) {
		clear(record[:])
		copy(record[:], what)
		binary.LittleEndian.PutUint64(record[16:], address)
		h.Write(record[:])
	}
	for _, s := range f.Sections {
		if s.Attr&attrPage != 0 {
			continue
		}
		extend := func(page uint64) {
			if s.Attr&attrExtend == 0 {
				return
			}
			var content [4096]byte
			if s.RawSize != 0 {
				copy(content[:], f.in.data[uint64(s.Offset)+page:][:4096])
			}
			for chunk := uint64(0); chunk < 4096; chunk += 256 {
				write("MR.EXTEND", s.Address+page+chunk)
				h.Write(content[chunk : chunk+256])
			}
		}
		for page := uint64(0); page < s.Size; page += 4096 {
			write("MEM.PAGE.ADD", s.Address+page)
			if order == Interleaved {
				extend(page)
			}
		}
		if order == TwoPass {
			for page := uint64(0); page < s.Size; page += 4096 {
				extend(page)
			}
		}
	}
	return h.Sum(nil), nil
}

// cfv returns the content of the variable store.
func (f *Firmware) cfv() ([]byte, error) {
	s, err := f.section(SectionCFV)
	if err != nil {
		return nil, err
	}
	return f.in.data[s.Offset:][:s.RawSize], nil
}

// ConfigB returns edk2's Config-B firmware with an empty variable store: code is
// a build with keys enrolled (Debian's OVMF.inteltdx.ms.fd), and vars the empty
// store of the same edk2 (OVMF_VARS_4M.fd), which takes the place of the CFV. The
// store is not part of MRTD: only RTMR0 changes.
func ConfigB(code *Firmware, vars []byte) ([]byte, error) {
	cfv, err := code.section(SectionCFV)
	if err != nil {
		return nil, err
	}
	if uint64(len(vars)) != uint64(cfv.RawSize) {
		return nil, fmt.Errorf("the empty variable store has %#x bytes, expected the %#x of the firmware's own", len(vars), cfv.RawSize)
	}
	if string(vars[40:44]) != "_FVH" {
		return nil, fmt.Errorf("byte 0x28: %q, expected the signature \"_FVH\" of a firmware volume", vars[40:44])
	}
	out := bytes.Clone(code.in.data)
	copy(out[cfv.Offset:], vars)
	return out, nil
}
