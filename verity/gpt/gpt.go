// Package gpt writes and reads the GUID partition tables of Chrysalis disks.
//
// The reader runs inside the VM on disks that the host made, so it is strict
// and bounded: it reads the primary table only, at most 18 KiB, accepts one
// geometry, and refuses whatever it does not need to understand. The backup
// table is written for the benefit of other tools and never read: two tables
// that disagree would let two readers see two disks.
//
// The format is UEFI Specification 2.10, section 5 (GUID Partition Table
// Disk Layout). All integers on disk are little-endian.
package gpt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"unicode/utf16"
)

const (
	// SectorSize is the only logical block size accepted, in bytes.
	SectorSize = 512
	// Alignment is what the start and the length of every partition are a
	// multiple of, in bytes: dm-verity and EROFS count in 4 KiB blocks.
	Alignment = 4096

	headerSize = 92  // UEFI 2.10, table 5-5: the fixed part of the header
	entrySize  = 128 // table 5-6
	maxEntries = 128
	tableSize  = maxEntries * entrySize

	// The writer's geometry: MBR, header and table, then the first partition.
	firstUsable = 2 + tableSize/SectorSize
	// backupSize is the room that the backup table and header take at the
	// end of the disk, rounded up to Alignment.
	backupSize = (tableSize + SectorSize + Alignment - 1) / Alignment * Alignment

	// maxDisk keeps byte offsets far from the end of int64 (1 PiB).
	maxDisk = 1 << 50
)

// ErrInvalid is what every refusal by Read wraps: the disk carries no
// partition table, or one that this package does not accept.
var ErrInvalid = errors.New("not a valid partition table")

// A GUID holds its 16 bytes in the order of its text form, as systemd's
// sd_id128 does; on disk the first three fields are little-endian (UEFI 2.10,
// appendix A). The zero GUID means "unused" in a table.
type GUID [16]byte

// String returns the lower-case form 8-4-4-4-12.
func (g GUID) String() string {
	h := hex.EncodeToString(g[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// MustGUID parses a constant in the form 8-4-4-4-12 and panics if it is none.
func MustGUID(s string) GUID {
	var g GUID
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		h := s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
		if _, err := hex.Decode(g[:], []byte(h)); err == nil {
			return g
		}
	}
	panic("gpt: not a GUID: " + s)
}

// swapped converts between text order and disk order; it is its own inverse.
func (g GUID) swapped() GUID {
	slices.Reverse(g[0:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return g
}

// Attributes of a partition, UEFI 2.10 table 5-7; the bits from 48 on belong
// to the partition's type.
const (
	// ReadOnly is the Discoverable Partitions Specification's flag that the
	// partition must not be written to.
	ReadOnly uint64 = 1 << 60
)

// A Partition is one entry of the table.
type Partition struct {
	Type   GUID
	UUID   GUID
	Offset int64 // bytes from the start of the disk, a multiple of Alignment
	Size   int64 // bytes, a positive multiple of Alignment
	Name   string
	// Attributes is the raw attribute word.
	Attributes uint64
}

// A Table is a disk's GUID and its partitions, in the order of the table.
type Table struct {
	Disk       GUID
	Partitions []Partition
}

// DiskSize returns the size in bytes of the disk that Write lays out for a
// last partition that ends at byte end.
func DiskSize(end int64) int64 {
	return (end+Alignment-1)/Alignment*Alignment + backupSize
}

// Write writes the protective MBR, the primary table and the backup table of
// a disk of size bytes. It touches nothing else. The same table and size give
// the same bytes. It refuses a table that Read would refuse.
func Write(w io.WriterAt, t Table, size int64) error {
	last := size/SectorSize - 1
	array := make([]byte, tableSize)
	if len(t.Partitions) > maxEntries {
		return fmt.Errorf("write partition table: %d partitions, at most %d fit", len(t.Partitions), maxEntries)
	}
	for i, p := range t.Partitions {
		name := utf16.Encode([]rune(p.Name))
		if len(name) > 36 {
			return fmt.Errorf("write partition table: name of partition %d is longer than 36 characters", i+1)
		}
		e := array[i*entrySize:][:entrySize]
		typ, id := p.Type.swapped(), p.UUID.swapped()
		copy(e[0:], typ[:])
		copy(e[16:], id[:])
		binary.LittleEndian.PutUint64(e[32:], uint64(p.Offset/SectorSize))
		binary.LittleEndian.PutUint64(e[40:], uint64((p.Offset+p.Size)/SectorSize-1))
		binary.LittleEndian.PutUint64(e[48:], p.Attributes)
		for j, c := range name {
			binary.LittleEndian.PutUint16(e[56+2*j:], c)
		}
	}

	header := func(my, other, tableLBA int64) []byte {
		h := make([]byte, SectorSize)
		copy(h, "EFI PART")
		binary.LittleEndian.PutUint32(h[8:], 0x00010000)
		binary.LittleEndian.PutUint32(h[12:], headerSize)
		binary.LittleEndian.PutUint64(h[24:], uint64(my))
		binary.LittleEndian.PutUint64(h[32:], uint64(other))
		binary.LittleEndian.PutUint64(h[40:], firstUsable)
		binary.LittleEndian.PutUint64(h[48:], uint64(last-1-tableSize/SectorSize))
		id := t.Disk.swapped()
		copy(h[56:], id[:])
		binary.LittleEndian.PutUint64(h[72:], uint64(tableLBA))
		binary.LittleEndian.PutUint32(h[80:], maxEntries)
		binary.LittleEndian.PutUint32(h[84:], entrySize)
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(array))
		binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:headerSize]))
		return h
	}

	// UEFI 2.10, table 5-4: one record of type 0xEE over the whole disk.
	mbr := make([]byte, SectorSize)
	rec := mbr[446:]
	copy(rec, []byte{0, 0x00, 0x02, 0x00, 0xEE, 0xFF, 0xFF, 0xFF})
	binary.LittleEndian.PutUint32(rec[8:], 1)
	binary.LittleEndian.PutUint32(rec[12:], uint32(min(last, 0xFFFFFFFF)))
	mbr[510], mbr[511] = 0x55, 0xAA

	start := slices.Concat(mbr, header(1, last, 2), array)
	// The reader is the judge of what a good table is.
	if _, err := Read(bytes.NewReader(start), size); err != nil {
		return fmt.Errorf("write partition table: %w", err)
	}
	if _, err := w.WriteAt(start, 0); err != nil {
		return fmt.Errorf("write partition table: %w", err)
	}
	tableLBA := last - tableSize/SectorSize
	end := slices.Concat(array, header(last, 1, tableLBA))
	if _, err := w.WriteAt(end, tableLBA*SectorSize); err != nil {
		return fmt.Errorf("write backup partition table: %w", err)
	}
	return nil
}

// Read reads the primary table of a disk of size bytes. It reads at most
// 18 KiB. It accepts 512-byte sectors, at most 128 entries of 128 bytes, and
// partitions that are aligned to Alignment, inside the disk, disjoint, and
// with distinct UUIDs. Every refusal wraps ErrInvalid; a failing read of the
// disk does not.
func Read(r io.ReaderAt, size int64) (Table, error) {
	invalid := func(format string, args ...any) (Table, error) {
		return Table{}, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
	}
	if size%SectorSize != 0 || size < (firstUsable+1)*SectorSize || size > maxDisk {
		return invalid("a disk of %d bytes", size)
	}
	sectors := uint64(size / SectorSize)

	var start [2 * SectorSize]byte
	if err := readFull(r, start[:], 0); err != nil {
		return Table{}, fmt.Errorf("read partition table header: %w", err)
	}
	mbr, h := start[:SectorSize], start[SectorSize:]
	if mbr[510] != 0x55 || mbr[511] != 0xAA || mbr[446+4] != 0xEE ||
		binary.LittleEndian.Uint32(mbr[446+8:]) != 1 || !allZero(mbr[446+16:510]) {
		return invalid("no protective MBR")
	}

	if string(h[:8]) != "EFI PART" {
		return invalid("no signature in sector 1")
	}
	if v := binary.LittleEndian.Uint32(h[8:]); v != 0x00010000 {
		return invalid("revision %#x", v)
	}
	if n := binary.LittleEndian.Uint32(h[12:]); n != headerSize {
		return invalid("header of %d bytes", n)
	}
	crc := binary.LittleEndian.Uint32(h[16:])
	clear(h[16:20]) // the checksum is over the header with this field zero
	if crc != crc32.ChecksumIEEE(h[:headerSize]) {
		return invalid("header checksum")
	}
	if !allZero(h[20:24]) || !allZero(h[headerSize:]) {
		return invalid("reserved bytes are set")
	}
	var (
		my       = binary.LittleEndian.Uint64(h[24:])
		other    = binary.LittleEndian.Uint64(h[32:])
		first    = binary.LittleEndian.Uint64(h[40:])
		last     = binary.LittleEndian.Uint64(h[48:])
		tableLBA = binary.LittleEndian.Uint64(h[72:])
		count    = binary.LittleEndian.Uint32(h[80:])
		each     = binary.LittleEndian.Uint32(h[84:])
		tableCRC = binary.LittleEndian.Uint32(h[88:])
	)
	switch {
	case my != 1:
		return invalid("header says it is in sector %d", my)
	case each != entrySize || count == 0 || count > maxEntries:
		return invalid("%d entries of %d bytes", count, each)
	case first > last || last >= sectors || other <= last || other >= sectors:
		return invalid("usable sectors %d to %d, backup %d of %d", first, last, other, sectors)
	}
	tableSectors := (uint64(count)*entrySize + SectorSize - 1) / SectorSize
	// first is below sectors, so the subtraction cannot wrap once tableLBA is
	// below first.
	if tableLBA < 2 || tableLBA >= first || tableSectors > first-tableLBA {
		return invalid("entries in sector %d, before sector %d", tableLBA, first)
	}

	array := make([]byte, count*entrySize)
	if err := readFull(r, array, int64(tableLBA)*SectorSize); err != nil {
		return Table{}, fmt.Errorf("read partition entries: %w", err)
	}
	if crc32.ChecksumIEEE(array) != tableCRC {
		return invalid("checksum of the entries")
	}

	t := Table{Disk: GUID(h[56:72]).swapped()}
	for i := range int(count) {
		e := array[i*entrySize:][:entrySize]
		typ := GUID(e[:16]).swapped()
		if typ == (GUID{}) {
			continue
		}
		a := binary.LittleEndian.Uint64(e[32:])
		b := binary.LittleEndian.Uint64(e[40:])
		if a < first || b > last || a > b {
			return invalid("partition %d has sectors %d to %d", i+1, a, b)
		}
		p := Partition{
			Type:       typ,
			UUID:       GUID(e[16:32]).swapped(),
			Offset:     int64(a) * SectorSize,
			Size:       int64(b-a+1) * SectorSize,
			Attributes: binary.LittleEndian.Uint64(e[48:]),
			Name:       name(e[56:]),
		}
		if p.Offset%Alignment != 0 || p.Size%Alignment != 0 {
			return invalid("partition %d is not aligned to %d bytes", i+1, Alignment)
		}
		for j, q := range t.Partitions {
			if p.Offset < q.Offset+q.Size && q.Offset < p.Offset+p.Size {
				return invalid("partition %d overlaps another (%d)", i+1, j+1)
			}
			if p.UUID == q.UUID {
				return invalid("UUID %s is used twice", p.UUID)
			}
		}
		t.Partitions = append(t.Partitions, p)
	}
	return t, nil
}

// name decodes a partition's name up to its first NUL.
func name(b []byte) string {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		c := binary.LittleEndian.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}

// readFull reads exactly len(p) bytes at off: a disk that is shorter than it
// was said to be is an error, not an end of file.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
