package inspect

import (
	"encoding/binary"
	"fmt"
	"io"
)

// WriteAuthenticode writes to w what the Authenticode digest of the PE image is
// the hash of (Microsoft's "Windows Authenticode Portable Executable Signature
// Format", "Calculating the PE Image Hash"), as edk2 does before it starts an
// image (HashPeImage): the headers but for checksum and the directory entry of
// the signatures, the sections, and what follows them but for the signatures. r
// is the image that ReadPE has read.
func (p *PE) WriteAuthenticode(w io.Writer, r io.ReaderAt) error {
	const checksumAt = 84 // from the COFF header, as peFields has it
	const directoryAt = coffHeader + optionalFixed + 8*certificates
	headers := int64(binary.LittleEndian.Uint32(p.header[80:]))
	if headers < p.tableEnd || headers > p.size {
		return fmt.Errorf("byte %#x: the headers end at %#x, expected %#x to %#x", p.headerAt+80, headers, p.tableEnd, p.size)
	}
	if len(p.header) < directoryAt+8 {
		return fmt.Errorf("byte %#x: the image has no room for signatures, expected at least %d data directories", p.headerAt+128, certificates+1)
	}
	hashed := int64(0)
	write := func(from, to int64) error {
		_, err := io.Copy(w, io.NewSectionReader(r, from, to-from))
		return err
	}
	checksum, directory := p.headerAt+checksumAt, p.headerAt+directoryAt
	for _, part := range [][2]int64{{0, checksum}, {checksum + 4, directory}, {directory + 8, headers}} {
		if err := write(part[0], part[1]); err != nil {
			return err
		}
	}
	hashed = headers
	// ReadPE has seen to it that the sections are in the order of their offsets.
	for _, s := range p.Sections {
		if s.RawSize == 0 {
			continue
		}
		if int64(s.Offset) < headers {
			return fmt.Errorf("section %s begins at %#x, before the end %#x of the headers", s.Name, s.Offset, headers)
		}
		if err := write(int64(s.Offset), int64(s.Offset)+int64(s.RawSize)); err != nil {
			return err
		}
		hashed += int64(s.RawSize)
	}
	if rest := p.size - int64(p.certificate[1]); rest > hashed {
		return write(hashed, rest)
	}
	return nil
}
