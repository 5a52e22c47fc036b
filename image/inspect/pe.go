package inspect

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
)

// Sizes and places in a PE image (Microsoft's "PE Format"); all integers are
// little-endian.
const (
	dosHeader      = 64   // "MS-DOS Stub": the PE header's offset is at 0x3c
	peOffsetAt     = 0x3c // in the DOS header
	coffHeader     = 20   // "COFF File Header", behind "PE\0\0"
	optionalFixed  = 112  // "Optional Header", PE32+, without its data directories
	maxDirectories = 16
	sectionHeader  = 40 // "Section Table"
	maxSections    = 96 // what Windows takes; edk2 has no limit of its own
	maxPEOffset    = 4096
	certificates   = 4 // data directory: its address is an offset in the file
)

// A Section is a section of a PE image.
type Section struct {
	Name string
	// Content is its bytes: as many as the file holds, and no padding. What
	// VirtualSize is larger by is zeros in memory.
	Content *io.SectionReader
	// As the section's header has them.
	VirtualAddress, VirtualSize, Offset, RawSize, Characteristics uint32
}

// A field of a header in a file, all of whose integers are little-endian.
type field struct {
	name   string
	offset int
	size   int
	// follows says that the value follows from the sections' content, so that a
	// difference there is not the cause.
	follows bool
}

// peFields are the fields of the COFF header and of the optional header, from
// the COFF header's start.
var peFields = []field{
	{"machine", 0, 2, false},
	{"number of sections", 2, 2, true},
	{"time stamp", 4, 4, false},
	{"symbol table", 8, 4, false},
	{"number of symbols", 12, 4, false},
	{"size of the optional header", 16, 2, false},
	{"characteristics", 18, 2, false},
	{"magic", 20, 2, false},
	{"linker version", 22, 2, false},
	{"size of code", 24, 4, true},
	{"size of initialized data", 28, 4, true},
	{"size of uninitialized data", 32, 4, true},
	{"entry point", 36, 4, true},
	{"base of code", 40, 4, true},
	{"image base", 44, 8, true}, // systemd takes it from the stub's hash
	{"section alignment", 52, 4, false},
	{"file alignment", 56, 4, false},
	{"operating system version", 60, 4, false},
	{"image version", 64, 4, false},
	{"subsystem version", 68, 4, false},
	{"Win32 version", 72, 4, false},
	{"size of image", 76, 4, true},
	{"size of headers", 80, 4, true},
	{"checksum", 84, 4, true},
	{"subsystem", 88, 2, false},
	{"DLL characteristics", 90, 2, false},
	{"stack reserve", 92, 8, false},
	{"stack commit", 100, 8, false},
	{"heap reserve", 108, 8, false},
	{"heap commit", 116, 8, false},
	{"loader flags", 124, 4, false},
	{"number of data directories", 128, 4, false},
}

// A PE is a PE32+ image, which is what UEFI loads on x86-64.
type PE struct {
	Sections []Section // in the order of the file's table

	size        int64
	header      []byte // from the COFF header to the last data directory
	headerAt    int64  // of the COFF header
	tableEnd    int64
	certificate [2]uint32 // offset and size of the signatures, or zeros
}

// ReadPE reads the headers of the PE32+ image of size bytes in r. It is strict:
// sections lie in the file, behind the headers, in order and apart, and their
// names are printable. It reads at most 8 KiB, whatever the headers say. Errors
// name the byte that is not as it has to be.
func ReadPE(r io.ReaderAt, size int64) (*PE, error) {
	dos := make([]byte, dosHeader)
	if err := readAt(r, dos, 0, size, "a DOS header"); err != nil {
		return nil, err
	}
	if string(dos[:2]) != "MZ" {
		return nil, fmt.Errorf("byte 0: %q, expected the signature \"MZ\" of a PE image", dos[:2])
	}
	at := int64(binary.LittleEndian.Uint32(dos[peOffsetAt:]))
	if at < dosHeader || at > maxPEOffset {
		return nil, fmt.Errorf("byte %#x: the PE header is at %#x, expected %#x to %#x", peOffsetAt, at, dosHeader, maxPEOffset)
	}
	fixed := make([]byte, 4+coffHeader+optionalFixed)
	if err := readAt(r, fixed, at, size, "a PE header"); err != nil {
		return nil, err
	}
	if string(fixed[:4]) != "PE\x00\x00" {
		return nil, fmt.Errorf("byte %#x: %q, expected the signature \"PE\\0\\0\"", at, fixed[:4])
	}
	p := &PE{size: size, headerAt: at + 4}
	coff, optional := fixed[4:4+coffHeader], fixed[4+coffHeader:]
	if magic := binary.LittleEndian.Uint16(optional); magic != 0x20b {
		return nil, fmt.Errorf("byte %#x: optional header of type %#x, expected 0x20b (PE32+)", p.headerAt+coffHeader, magic)
	}
	count := int(binary.LittleEndian.Uint16(coff[2:]))
	if count < 1 || count > maxSections {
		return nil, fmt.Errorf("byte %#x: %d sections, expected 1 to %d", p.headerAt+2, count, maxSections)
	}
	directories := binary.LittleEndian.Uint32(optional[108:])
	if got := binary.LittleEndian.Uint16(coff[16:]); directories > maxDirectories || uint32(got) != optionalFixed+8*directories {
		return nil, fmt.Errorf("byte %#x: optional header of %d bytes with %d data directories, expected %d bytes and 8 for each of at most %d",
			p.headerAt+16, got, directories, optionalFixed, maxDirectories)
	}
	p.header = make([]byte, coffHeader+optionalFixed+8*directories)
	if err := readAt(r, p.header, p.headerAt, size, "data directories"); err != nil {
		return nil, err
	}
	if directories > certificates {
		d := p.header[coffHeader+optionalFixed+8*certificates:]
		p.certificate = [2]uint32{binary.LittleEndian.Uint32(d), binary.LittleEndian.Uint32(d[4:])}
	}

	tableAt := p.headerAt + int64(len(p.header))
	table := make([]byte, count*sectionHeader)
	if err := readAt(r, table, tableAt, size, "a section table"); err != nil {
		return nil, err
	}
	p.tableEnd = tableAt + int64(len(table))
	end, before := p.tableEnd, "the headers"
	for i := range count {
		s, err := readSection(r, table[i*sectionHeader:][:sectionHeader])
		here := tableAt + int64(i)*sectionHeader
		if err != nil {
			return nil, fmt.Errorf("byte %#x: section %d: %w", here, i+1, err)
		}
		if s.RawSize > 0 {
			from, to := int64(s.Offset), int64(s.Offset)+int64(s.RawSize)
			if from < end {
				return nil, fmt.Errorf("byte %#x: section %s begins at %#x, before the end %#x of %s", here, s.Name, from, end, before)
			}
			if to > size {
				return nil, fmt.Errorf("byte %#x: section %s reaches to byte %#x, the file ends at %#x", here, s.Name, to, size)
			}
			end, before = to, "section "+s.Name
		}
		p.Sections = append(p.Sections, s)
	}
	if from, n := int64(p.certificate[0]), int64(p.certificate[1]); n > 0 && (from < end || from+n > size) {
		return nil, fmt.Errorf("signatures at %#x to %#x, expected them between the sections' end %#x and the file's %#x", from, from+n, end, size)
	}
	return p, nil
}

func readSection(r io.ReaderAt, h []byte) (Section, error) {
	name, padding, _ := bytes.Cut(h[:8], []byte{0})
	if len(name) == 0 || len(bytes.Trim(padding, "\x00")) > 0 || bytes.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return Section{}, fmt.Errorf("name %q, expected printable characters, then zeros", h[:8])
	}
	s := Section{
		Name:            string(name),
		VirtualSize:     binary.LittleEndian.Uint32(h[8:]),
		VirtualAddress:  binary.LittleEndian.Uint32(h[12:]),
		RawSize:         binary.LittleEndian.Uint32(h[16:]),
		Offset:          binary.LittleEndian.Uint32(h[20:]),
		Characteristics: binary.LittleEndian.Uint32(h[36:]),
	}
	if uint64(s.VirtualAddress)+uint64(s.VirtualSize) > 1<<32 {
		return Section{}, fmt.Errorf("%s: address %#x and size %#x go beyond 4 GiB", s.Name, s.VirtualAddress, s.VirtualSize)
	}
	s.Content = io.NewSectionReader(r, int64(s.Offset), int64(min(s.VirtualSize, s.RawSize)))
	return s, nil
}

// Section returns the first section of that name, or nil.
func (p *PE) Section(name string) *Section {
	for i := range p.Sections {
		if p.Sections[i].Name == name {
			return &p.Sections[i]
		}
	}
	return nil
}

// value is a field of a header as text: a number, or bytes where it is too long
// for one.
func (f field) value(header []byte) string {
	b := header[f.offset:][:f.size]
	if f.size > 8 {
		return fmt.Sprintf("%x", b)
	}
	var v uint64
	for i := range b {
		v |= uint64(b[i]) << (8 * i)
	}
	return fmt.Sprintf("%#x", v)
}

// region names the part of the file that a byte belongs to.
func (p *PE) region(at int64) string {
	switch {
	case at < p.headerAt-4:
		return "DOS header"
	case at < p.headerAt+int64(len(p.header)):
		return "PE header"
	case at < p.tableEnd:
		return "section table"
	}
	if from := int64(p.certificate[0]); p.certificate[1] > 0 && at >= from && at < from+int64(p.certificate[1]) {
		return "signatures"
	}
	for _, s := range p.Sections {
		from := int64(s.Offset)
		switch {
		case s.RawSize == 0 || at < from || at >= from+int64(s.RawSize):
		case at < from+s.Content.Size():
			return "section " + s.Name
		default:
			return "padding of section " + s.Name
		}
	}
	return "outside of the sections"
}

// maxText is the longest section that is taken for text, in bytes.
const maxText = 64 << 10

// Text returns a section's content as text, without the NULs that some builders
// append. It is "" where there is no such section.
func (p *PE) Text(name string) (string, error) {
	s := p.Section(name)
	if s == nil {
		return "", nil
	}
	if s.Content.Size() > maxText {
		return "", fmt.Errorf("section %s has %d bytes, expected at most %d of text", name, s.Content.Size(), maxText)
	}
	b := make([]byte, s.Content.Size())
	if _, err := s.Content.ReadAt(b, 0); err != nil && err != io.EOF {
		return "", fmt.Errorf("section %s: %w", name, err)
	}
	return strings.TrimRight(string(b), "\x00"), nil
}

// readAt fills p from r, a file of size bytes. The error names what was to be read.
func readAt(r io.ReaderAt, p []byte, at, size int64, what string) error {
	if at < 0 || at > size || int64(len(p)) > size-at {
		return fmt.Errorf("byte %#x: %s of %d bytes is cut short, the file ends at %#x", at, what, len(p), size)
	}
	if n, err := r.ReadAt(p, at); n < len(p) {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("byte %#x: read %s: %w", at, what, err)
	}
	return nil
}
