package inspect_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/klauspost/compress/zstd"

	"chrysalis/verity"
)

// This file makes small artefacts of which every byte can be chosen.

// Types of files, as st_mode has them.
const (
	typeFile   = 0o100000
	typeFolder = 0o040000
	typeLink   = 0o120000
)

// cpioEntry is an entry of a newc archive: the header's fields, in its order.
type cpioEntry struct {
	name                                          string
	inode, mode, uid, gid, links, mtime, size     uint32
	devMajor, devMinor, rdevMajor, rdevMinor, crc uint32
	data                                          []byte
	magic                                         string
	forgeSize, forgeNameSize, forgePadding        bool
}

func (e cpioEntry) append(out []byte) []byte {
	name := e.name + "\x00"
	size, nameSize := uint32(len(e.data)), uint32(len(name))
	if e.forgeSize {
		size = e.size
	}
	if e.forgeNameSize {
		nameSize = 0xffffffff
	}
	magic := e.magic
	if magic == "" {
		magic = "070701"
	}
	out = append(out, magic...)
	for _, v := range []uint32{e.inode, e.mode, e.uid, e.gid, e.links, e.mtime, size,
		e.devMajor, e.devMinor, e.rdevMajor, e.rdevMinor, nameSize, e.crc} {
		out = fmt.Appendf(out, "%08X", v)
	}
	pad := func() {
		for len(out)%4 != 0 {
			if e.forgePadding {
				out = append(out, 'x')
			} else {
				out = append(out, 0)
			}
		}
	}
	out = append(out, name...)
	pad()
	out = append(out, e.data...)
	pad()
	return out
}

func cpioArchive(entries []cpioEntry) []byte {
	var out []byte
	for _, e := range entries {
		out = e.append(out)
	}
	return cpioEntry{name: "TRAILER!!!", links: 1}.append(out)
}

const epoch = 1_700_000_000 // 2023-11-14T22:13:20Z

// initrdEntries is an archive like those that the build makes.
func initrdEntries() []cpioEntry {
	return []cpioEntry{
		{name: "etc", mode: typeFolder | 0o755, mtime: epoch, links: 2, inode: 1},
		{name: "etc/os-release", mode: typeFile | 0o444, mtime: epoch, links: 1, inode: 2, data: []byte("ID=chrysalis\nVERSION=1\n")},
		{name: "image.json", mode: typeFile | 0o444, mtime: epoch, links: 1, inode: 3, data: []byte(`{"list":[1,2],"name":"chrysalis"}`)},
		{name: "init", mode: typeFile | 0o755, mtime: epoch, links: 1, inode: 4, data: elfFile("code", "constants")},
		{name: "lib", mode: typeLink | 0o777, mtime: epoch, links: 1, inode: 5, data: []byte("usr/lib")},
		{name: "null", mode: 0o020666, mtime: epoch, links: 1, inode: 6, rdevMajor: 1, rdevMinor: 3},
		{name: "random", mode: typeFile | 0o444, mtime: epoch, links: 1, inode: 7, data: []byte{0, 1, 2, 3, 4}},
	}
}

// elfFile makes an ELF object with two sections and nothing else: gABI, chapters
// "ELF Header" and "Sections".
func elfFile(text, rodata string) []byte {
	names := "\x00.text\x00.rodata\x00.shstrtab\x00"
	b := make([]byte, 64)
	type section struct {
		name, kind uint32
		data       string
	}
	sections := []section{{}, {1, 1, text}, {7, 1, rodata}, {15, 3, names}}
	var table []byte
	for _, s := range sections {
		h := make([]byte, 64)
		binary.LittleEndian.PutUint32(h[0:], s.name)
		binary.LittleEndian.PutUint32(h[4:], s.kind)
		if s.kind != 0 {
			binary.LittleEndian.PutUint64(h[24:], uint64(len(b)))
			binary.LittleEndian.PutUint64(h[32:], uint64(len(s.data)))
		}
		b, table = append(b, s.data...), append(table, h...)
	}
	copy(b, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(b[16:], 1)  // ET_REL
	binary.LittleEndian.PutUint16(b[18:], 62) // EM_X86_64
	binary.LittleEndian.PutUint32(b[20:], 1)
	binary.LittleEndian.PutUint64(b[40:], uint64(len(b))) // section table
	binary.LittleEndian.PutUint16(b[52:], 64)
	binary.LittleEndian.PutUint16(b[58:], 64)
	binary.LittleEndian.PutUint16(b[60:], uint16(len(sections)))
	binary.LittleEndian.PutUint16(b[62:], 3) // .shstrtab
	return append(b, table...)
}

func pack(data []byte, level zstd.EncoderLevel) []byte {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithWindowSize(1<<20))
	if err != nil {
		panic(err)
	}
	return e.EncodeAll(data, nil)
}

// peSection is a section of a UKI.
type peSection struct {
	name string
	data []byte
}

// uki is a UKI of which everything can be changed before it is written.
type uki struct {
	sections []peSection
	entries  []cpioEntry
	archive  func([]byte) []byte // changes the archive
	packed   func([]byte) []byte // packs it
	file     func([]byte) []byte // changes the whole file
}

func newUKI() *uki {
	same := func(b []byte) []byte { return b }
	return &uki{
		sections: []peSection{
			{".text", bytes.Repeat([]byte{0x90}, 700)},
			{".sdmagic", []byte("#### LoaderInfo: systemd-stub 257.13 ####")},
			{".osrel", []byte("ID=chrysalis\nNAME=\"Chrysalis VM\"\n")},
			{".cmdline", []byte("console=ttyS0 panic=-1\x00")},
			{".uname", []byte("6.18.15")},
			{".linux", bytes.Repeat([]byte{0, 0xfe}, 600)},
			{".initrd", nil},
		},
		entries: initrdEntries(),
		archive: same,
		packed:  func(b []byte) []byte { return pack(b, zstd.SpeedDefault) },
		file:    same,
	}
}

func (u *uki) section(name string) *peSection {
	return &u.sections[slices.IndexFunc(u.sections, func(s peSection) bool { return s.name == name })]
}

func (u *uki) entry(name string) *cpioEntry {
	return &u.entries[slices.IndexFunc(u.entries, func(e cpioEntry) bool { return e.name == name })]
}

// bytes lays the image out: a DOS header, the PE header at 0x80, sections that
// are aligned to 512 bytes in the file and to 4096 in memory.
func (u *uki) bytes() []byte {
	const pe, table = 0x80, 0x80 + 4 + 20 + 112 + 16*8
	head := make([]byte, 1024)
	copy(head, "MZ")
	binary.LittleEndian.PutUint32(head[0x3c:], pe)
	copy(head[pe:], "PE\x00\x00")
	binary.LittleEndian.PutUint16(head[pe+4:], 0x8664)
	binary.LittleEndian.PutUint16(head[pe+6:], uint16(len(u.sections)))
	binary.LittleEndian.PutUint16(head[pe+20:], 112+16*8)
	binary.LittleEndian.PutUint16(head[pe+24:], 0x20b)
	binary.LittleEndian.PutUint16(head[pe+24+68:], 10) // EFI application
	binary.LittleEndian.PutUint32(head[pe+24+108:], 16)
	out, address := head, uint32(4096)
	for i, s := range u.sections {
		data := s.data
		if s.name == ".initrd" && data == nil {
			data = u.packed(u.archive(cpioArchive(u.entries)))
		}
		h := out[table+40*i:]
		copy(h[:8], s.name)
		raw := (len(data) + 511) &^ 511
		binary.LittleEndian.PutUint32(h[8:], uint32(len(data)))
		binary.LittleEndian.PutUint32(h[12:], address)
		binary.LittleEndian.PutUint32(h[16:], uint32(raw))
		binary.LittleEndian.PutUint32(h[20:], uint32(len(out)))
		binary.LittleEndian.PutUint32(h[36:], 0x40000040)
		out = append(out, data...)
		out = append(out, make([]byte, raw-len(data))...)
		address += uint32(len(data)+4095) &^ 4095
	}
	binary.LittleEndian.PutUint32(out[pe+24+56:], address) // size of the image
	return u.file(out)
}

// treeFile is a file on a disk.
type treeFile struct {
	data   []byte
	mode   uint16 // permissions
	uid    int
	time   int64
	link   string
	attr   string // value of user.test
	device bool
}

// diskImage is a verity disk of which everything can be changed before it is
// written.
type diskImage struct {
	files     map[string]treeFile
	salt      []byte
	uuid      byte
	buildTime uint64
	erofs     func([]byte)        // changes the file system
	file      func([]byte) []byte // changes the whole disk
}

func newDisk() *diskImage {
	return &diskImage{
		files: map[string]treeFile{
			"/etc/config.json": {data: []byte(`{"a":{"b":1}}`), mode: 0o444, time: epoch},
			"/etc/motd":        {data: []byte("one\ntwo\n"), mode: 0o444, time: epoch},
			"/usr/lib/x.so":    {data: elfFile("code", "constants"), mode: 0o755, time: epoch},
			"/usr/data":        {data: bytes.Repeat([]byte{0, 1, 2, 3}, 3000), mode: 0o444, time: epoch},
			"/lib":             {link: "usr/lib", time: epoch},
		},
		salt:      []byte("salt"),
		uuid:      1,
		buildTime: epoch,
		erofs:     func([]byte) {},
		file:      func(b []byte) []byte { return b },
	}
}

// set changes one file.
func (d *diskImage) set(name string, change func(*treeFile)) {
	f := d.files[name]
	change(&f)
	d.files[name] = f
}

func (d *diskImage) bytes(t testing.TB) []byte {
	t.Helper()
	fail := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "erofs"))
	fail(err)
	defer f.Close()
	w := erofs.Create(f, erofs.WithBlockSize(verity.BlockSize), erofs.WithBuildTime(d.buildTime, 0))
	folders := []string{"/", "/etc", "/usr", "/usr/lib"}
	for _, name := range folders[1:] {
		fail(w.Mkdir(name, 0o755))
	}
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		file := d.files[name]
		switch {
		case file.link != "":
			fail(w.Symlink(file.link, name))
		case file.device:
			fail(w.Mknod(name, 0o020000|file.mode, 0x103))
		default:
			out, err := w.Create(name)
			fail(err)
			_, err = out.Write(file.data)
			fail(err)
			fail(out.Chmod(os.FileMode(file.mode)))
			fail(out.Close())
		}
		fail(w.Chown(name, file.uid, 0))
		at := time.Unix(file.time, 0)
		fail(w.Chtimes(name, at, at))
		if file.attr != "" {
			fail(w.Setxattr(name, "user.test", file.attr))
		}
	}
	for _, name := range folders {
		at := time.Unix(epoch, 0)
		fail(w.Chtimes(name, at, at))
	}
	fail(w.Close())
	data, err := os.ReadFile(f.Name())
	fail(err)
	data = append(data, make([]byte, -len(data)&(verity.BlockSize-1))...)
	d.erofs(data)

	out, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	fail(err)
	defer out.Close()
	_, err = verity.WriteDisk(t.Context(), out, bytes.NewReader(data), int64(len(data)), verity.TreeOptions{Salt: d.salt, UUID: [16]byte{d.uuid}})
	fail(err)
	disk, err := os.ReadFile(out.Name())
	fail(err)
	return d.file(disk)
}

// save writes an artefact to a file.
func save(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "artefact")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func sha256Of(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }
