package inspect

import (
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Sizes of a cpio archive in the format that the kernel calls newc:
// Documentation/driver-api/early-userspace/buffer-format.rst.
const (
	cpioHeader  = 110
	cpioMagic   = "070701"
	cpioTrailer = "TRAILER!!!"
	maxName     = 4096    // the kernel's PATH_MAX, with the NUL
	maxEntries  = 200_000 // of an archive or a disk; keeps a list of them small
	maxTarget   = 4096
)

// ReadCPIO lists the newc archive of size bytes in r, in its order. Files are
// not hashed. There must be one archive and only zeros behind it; names must be
// relative, clean (fs.ValidPath) and different from each other; only files and
// links have content; padding must be zero. So whatever the kernel makes of the
// archive is on the list. Errors name the byte of the archive.
func ReadCPIO(r io.ReaderAt, size int64) ([]Entry, error) {
	var entries []Entry
	seen := map[string]bool{}
	for at := int64(0); ; {
		e, next, err := readCPIOEntry(r, at, size)
		if err != nil {
			return nil, fmt.Errorf("cpio archive: byte %d: %w", at, err)
		}
		if e.Path == cpioTrailer {
			if err := zeros(r, next, size); err != nil {
				return nil, fmt.Errorf("cpio archive: behind its end: %w", err)
			}
			return entries, nil
		}
		if !fs.ValidPath(e.Path) {
			return nil, fmt.Errorf("cpio archive: byte %d: name %.200q, expected a clean relative path", at, e.Path)
		}
		if seen[e.Path] {
			return nil, fmt.Errorf("cpio archive: byte %d: %.200q is there twice", at, e.Path)
		}
		if len(entries) == maxEntries {
			return nil, fmt.Errorf("cpio archive: byte %d: more than %d entries", at, maxEntries)
		}
		seen[e.Path] = true
		entries = append(entries, e)
		at = next
	}
}

// readCPIOEntry reads the entry at a byte and returns where the next one begins.
func readCPIOEntry(r io.ReaderAt, at, size int64) (e Entry, next int64, err error) {
	header := make([]byte, cpioHeader)
	if err := readAt(r, header, at, size, "a cpio header"); err != nil {
		return e, 0, err
	}
	if string(header[:6]) != cpioMagic {
		return e, 0, fmt.Errorf("%q, expected %q, the start of a header", header[:6], cpioMagic)
	}
	var f [13]uint64
	for i := range f {
		digits := string(header[6+8*i:][:8])
		if f[i], err = strconv.ParseUint(digits, 16, 32); err != nil {
			return e, 0, fmt.Errorf("header field %d is %q, expected 8 hexadecimal digits", i+1, digits)
		}
	}
	length, nameSize := int64(f[6]), int64(f[11])
	if nameSize < 2 || nameSize > maxName {
		return e, 0, fmt.Errorf("name of %d bytes, expected 2 to %d", nameSize, maxName)
	}
	raw := make([]byte, nameSize)
	if err := readAt(r, raw, at+cpioHeader, size, "a name"); err != nil {
		return e, 0, err
	}
	name, ok := strings.CutSuffix(string(raw), "\x00")
	if !ok || strings.Contains(name, "\x00") {
		return e, 0, fmt.Errorf("name %.200q, expected one NUL and that at its end", raw)
	}
	if f[12] != 0 {
		return e, 0, fmt.Errorf("%.200q: checksum %#x, expected 0 in this format", name, f[12])
	}
	data := align4(at + cpioHeader + nameSize)
	end := data + length
	if end > size {
		return e, 0, fmt.Errorf("%.200q: content to byte %d, the archive ends at %d", name, end, size)
	}
	next = align4(end)
	if name == cpioTrailer {
		if length != 0 {
			return e, 0, fmt.Errorf("the end has %d bytes of content, expected none", length)
		}
		return Entry{Path: name}, min(end, size), nil // what follows is zeros to the end
	}
	for _, gap := range [][2]int64{{at + cpioHeader + nameSize, data}, {end, next}} {
		if err := zeros(r, gap[0], min(gap[1], size)); err != nil {
			return e, 0, fmt.Errorf("%.200q: padding: %w", name, err)
		}
	}
	e = Entry{
		Path: name, Mode: Mode(f[1]), UID: uint32(f[2]), GID: uint32(f[3]), Links: uint32(f[4]), Inode: f[0],
		Time: time.Unix(int64(f[5]), 0).UTC(), Size: length,
		Device: f[9]<<32 | f[10], on: f[7]<<32 | f[8],
	}
	switch {
	case e.Mode&^0o177777 != 0 || e.Mode.Type() == "":
		return e, 0, fmt.Errorf("%.200q: mode %s, expected a type of file and permissions", name, e.Mode)
	case e.Mode.is(unix.S_IFREG):
		e.content = sectionContent(io.NewSectionReader(r, data, length))
	case e.Mode.is(unix.S_IFLNK):
		if length < 1 || length > maxTarget {
			return e, 0, fmt.Errorf("%.200q: link target of %d bytes, expected 1 to %d", name, length, maxTarget)
		}
		target := make([]byte, length)
		if err := readAt(r, target, data, size, "a link target"); err != nil {
			return e, 0, err
		}
		e.Target = string(target)
	case length != 0:
		return e, 0, fmt.Errorf("%.200q: a %s with %d bytes of content, expected none", name, e.Mode.Type(), length)
	}
	return e, next, nil
}

func align4(n int64) int64 { return (n + 3) &^ 3 }

// zeros fails on the first byte from from to to that is not zero.
func zeros(r io.ReaderAt, from, to int64) error {
	buf := make([]byte, min(max(to-from, 0), 64<<10))
	for from < to {
		part := buf[:min(int64(len(buf)), to-from)]
		if n, err := r.ReadAt(part, from); n < len(part) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		for i, c := range part {
			if c != 0 {
				return fmt.Errorf("byte %d is %#02x, expected 0", from+int64(i), c)
			}
		}
		from += int64(len(part))
	}
	return nil
}
