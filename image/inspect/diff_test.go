package inspect_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"chrysalis/image/inspect"
	"chrysalis/verity/gpt"
)

// first returns the first difference in words, or "equal", and checks that the
// list of all begins with it and that the other way round is a difference too.
func first(t *testing.T, a, b []byte) string {
	t.Helper()
	pathA, pathB := save(t, a), save(t, b)
	one, err := inspect.Diff(t.Context(), pathA, pathB, false)
	if err != nil {
		t.Fatal(err)
	}
	all, err := inspect.Diff(t.Context(), pathA, pathB, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(one) != min(1, len(all)) || len(one) > 0 && one[0] != all[0] {
		t.Errorf("first %v, all %v", one, all)
	}
	back, err := inspect.Diff(t.Context(), pathB, pathA, false)
	if err != nil || len(back) != len(one) {
		t.Errorf("the other way round: %v, %v", back, err)
	}
	if len(one) == 0 {
		return "equal"
	}
	return one[0].String()
}

func TestDiffUKI(t *testing.T) {
	const pe = 0x80
	put16 := func(at int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint16(b[at:], v); return b }
	}
	put32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[at:], v); return b }
	}
	packedSize := len(pack(cpioArchive(initrdEntries()), zstd.SpeedDefault))
	for _, c := range []struct {
		name   string
		change func(*uki)
		want   string
	}{
		{"nothing", func(*uki) {}, "equal"},
		{"time stamp", func(u *uki) { u.file = put32(pe+8, 7) },
			"PE header: time stamp is 0x0 in A, 0x7 in B"},
		{"subsystem", func(u *uki) { u.file = put16(pe+24+68, 11) },
			"PE header: subsystem is 0xa in A, 0xb in B"},
		{"checksum, a consequence", func(u *uki) { u.file = put32(pe+24+64, 5) },
			"PE header: checksum is 0x0 in A, 0x5 in B"},
		{"a section more", func(u *uki) { u.sections = append(u.sections, peSection{".splash", []byte("12345")}) },
			"section .splash: only B has it, 5 bytes"},
		{"a section less", func(u *uki) { u.sections = slices.Delete(u.sections, 1, 2) },
			"section .sdmagic: only A has it, 41 bytes"},
		{"sections in another order", func(u *uki) { u.sections[1], u.sections[2] = u.sections[2], u.sections[1] },
			"order of sections is .text .sdmagic .osrel .cmdline .uname .linux .initrd in A, .text .osrel .sdmagic .cmdline .uname .linux .initrd in B"},
		{"a section twice", func(u *uki) { u.sections = append(u.sections, peSection{".uname", []byte("x")}) },
			"section .uname (number 2): only B has it, 1 bytes"},
		{"flags of a section", func(u *uki) { u.file = put32(0x188+36, 0x60000020) },
			"section .text: characteristics is 0x40000040 in A, 0x60000020 in B"},
		{"code", func(u *uki) { u.section(".text").data[9] = 0xcc },
			"section .text: byte 9 is 9090909090909090 in A, cc90909090909090 in B"},
		{"a longer section", func(u *uki) { s := u.section(".linux"); s.data = append(s.data, 1) },
			"section .linux: byte 1200 is the end of 1200 bytes in A, 01 in B"},
		{"command line", func(u *uki) { u.section(".cmdline").data = []byte("console=ttyS0 panic=0\x00") },
			`section .cmdline: line 1 is "console=ttyS0 panic=-1\x00" in A, "console=ttyS0 panic=0\x00" in B`},
		{"long command line", func(u *uki) {
			u.section(".cmdline").data = []byte("console=ttyS0 panic=-1" + strings.Repeat(" again", 50))
		}, `section .cmdline: line 1 is "console=ttyS0 panic=-1\x00" in A, "console=ttyS0 panic=-1` + strings.Repeat(" again", 22) + ` agai… in B`},
		{"os-release", func(u *uki) { u.section(".osrel").data = []byte("ID=chrysalis\nNAME=Other\n") },
			`section .osrel: line 2 is "NAME=\"Chrysalis VM\"\n" in A, "NAME=Other\n" in B`},
		{"a line less", func(u *uki) { u.section(".osrel").data = []byte("ID=chrysalis\n") },
			`section .osrel: line 2 is "NAME=\"Chrysalis VM\"\n" in A, behind the end in B`},
		{"bytes behind the sections", func(u *uki) { u.file = func(b []byte) []byte { return append(b, 1, 2) } },
			"outside of the sections: byte 6144 is the end of 6144 bytes in A, 0102 in B"},
		{"padding of a section", func(u *uki) { u.file = func(b []byte) []byte { b[1024+700] = 1; return b } },
			"padding of section .text: byte 1724 is 0000000000000000 in A, 0100000000000000 in B"},
		{"DOS stub", func(u *uki) { u.file = func(b []byte) []byte { b[0x50] = 1; return b } },
			"DOS header: byte 80 is 0000000000000000 in A, 0100000000000000 in B"},

		{"entry more", func(u *uki) {
			u.entries = append(u.entries, cpioEntry{name: "evil\n", mode: typeFile | 0o755, mtime: epoch, data: []byte("sh")})
		}, `section .initrd: "evil\n": only B has it, a file of 2 bytes`},
		{"folder less", func(u *uki) { u.entries = slices.Delete(u.entries, 4, 5) },
			`section .initrd: lib: only A has it, a link to "usr/lib"`},
		{"type", func(u *uki) { u.entry("lib").mode, u.entry("lib").data = typeFolder|0o777, nil },
			"section .initrd: lib: type is link in A, folder in B"},
		{"mode", func(u *uki) { u.entry("init").mode = typeFile | 0o4755 },
			"section .initrd: init: mode is 100755 in A, 104755 in B"},
		{"owner", func(u *uki) { u.entry("init").uid = 1000 },
			"section .initrd: init: owner is 0:0 in A, 1000:0 in B"},
		{"time", func(u *uki) { u.entry("etc").mtime++ },
			"section .initrd: etc: time is 2023-11-14T22:13:20Z (1700000000) in A, 2023-11-14T22:13:21Z (1700000001) in B"},
		{"hard link", func(u *uki) { u.entry("init").links = 2 },
			"section .initrd: init: number of hard links is 1 in A, 2 in B"},
		{"device", func(u *uki) { u.entry("null").rdevMinor = 5 },
			"section .initrd: null: device number is 1:3 in A, 1:5 in B"},
		{"target", func(u *uki) { u.entry("lib").data = []byte("usr/lib64") },
			`section .initrd: lib: target is "usr/lib" in A, "usr/lib64" in B`},
		{"ELF section", func(u *uki) { u.entry("init").data = elfFile("code", "konstants") },
			"section .initrd: init: ELF section .rodata: byte 0 is 636f6e7374616e74 in A, 6b6f6e7374616e74 in B"},
		{"outside of ELF sections", func(u *uki) { u.entry("init").data[9] = 1 },
			"section .initrd: init: outside of the ELF sections: byte 9 is 0000000000000001 in A, 0100000000000001 in B"},
		{"one is a signed module", func(u *uki) {
			u.entry("init").data = append(u.entry("init").data, "signature~Module signature appended~\n"...)
		}, "section .initrd: init: outside of the ELF sections: byte 358 is the end of 358 bytes in A, 7369676e61747572 in B"},
		{"line of a text", func(u *uki) { u.entry("etc/os-release").data = []byte("ID=chrysalis\nVERSION=2\n") },
			`section .initrd: etc/os-release: line 2 is "VERSION=1\n" in A, "VERSION=2\n" in B`},
		{"end of a text", func(u *uki) { u.entry("etc/os-release").data = []byte("ID=chrysalis\nVERSION=1") },
			`section .initrd: etc/os-release: line 2 is "VERSION=1\n" in A, "VERSION=1" in B`},
		{"JSON value", func(u *uki) { u.entry("image.json").data = []byte(`{"list":[1,3],"name":"chrysalis"}`) },
			"section .initrd: image.json: $.list[1] is 2 in A, 3 in B"},
		{"JSON list", func(u *uki) { u.entry("image.json").data = []byte(`{"list":[1,2,3],"name":"chrysalis"}`) },
			"section .initrd: image.json: length of $.list is 2 in A, 3 in B"},
		{"JSON key", func(u *uki) { u.entry("image.json").data = []byte(`{"list":[1,2]}`) },
			`section .initrd: image.json: $.name is "chrysalis" in A, missing in B`},
		{"JSON form", func(u *uki) { u.entry("image.json").data = []byte(`{"list":[1,2], "name":"chrysalis"}`) },
			`section .initrd: image.json: line 1 is "{\"list\":[1,2],\"name\":\"chrysalis\"}" in A, "{\"list\":[1,2], \"name\":\"chrysalis\"}" in B`},
		{"byte", func(u *uki) { u.entry("random").data = []byte{0, 1, 9, 3, 4} },
			"section .initrd: random: byte 2 is 020304 in A, 090304 in B"},
		{"order of entries", func(u *uki) { u.entries[1], u.entries[2] = u.entries[2], u.entries[1] },
			"section .initrd: entry 2 is etc/os-release in A, image.json in B"},
		{"inode", func(u *uki) { u.entry("init").inode = 99 },
			"section .initrd: init: inode is 4 in A, 99 in B"},
		{"layout of the archive", func(u *uki) {
			u.archive = func(b []byte) []byte { return append(b, make([]byte, 512)...) }
		}, "section .initrd: unpacked: byte 1396 is the end of 1396 bytes in A, 0000000000000000 in B"},
		{"other compression", func(u *uki) { u.packed = func(b []byte) []byte { return b } },
			"section .initrd: compression is zstd in A, none in B"},
		{"padded frame", func(u *uki) {
			u.packed = func(b []byte) []byte { return append(pack(b, zstd.SpeedDefault), 0, 0) }
		}, fmt.Sprintf("section .initrd: packed size of the same archive is %d in A, %d in B", packedSize, packedSize+2)},
	} {
		t.Run(c.name, func(t *testing.T) {
			changed := newUKI()
			c.change(changed)
			if got := first(t, newUKI().bytes(), changed.bytes()); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// The signature of a kernel module is outside of its sections.
func TestDiffModuleSignature(t *testing.T) {
	signed := func(signature string) []byte {
		u := newUKI()
		u.entry("init").data = append(elfFile("code", ""), signature+"~Module signature appended~\n"...)
		return u.bytes()
	}
	want := "section .initrd: init: outside of the ELF sections: signature of the kernel module: byte 349 is 787e4d6f64756c65 in A, 797e4d6f64756c65 in B"
	if got := first(t, signed("x"), signed("y")); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// All lists every cause, and no consequence.
func TestDiffAll(t *testing.T) {
	changed := newUKI()
	changed.section(".cmdline").data = []byte("quiet")
	changed.entry("init").mode |= 0o4000
	changed.entry("init").data = elfFile("kode", "konstants")
	changed.entry("random").uid = 1
	found, err := inspect.Diff(t.Context(), save(t, newUKI().bytes()), save(t, changed.bytes()), true)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range found {
		got = append(got, d.Where+": "+d.What)
	}
	want := []string{
		"section .cmdline: line 1",
		"section .initrd: init: mode",
		"section .initrd: init: ELF section .text: byte 0",
		"section .initrd: init: ELF section .rodata: byte 0",
		"section .initrd: random: owner",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, expected %q", got, want)
	}
}

func TestDiffDisk(t *testing.T) {
	// The disks' partitions: data from 1 MiB on, the hash tree from 2 MiB on.
	const data, hash = 1 << 20, 2 << 20
	table := func(change func(*gpt.Table)) func([]byte) []byte {
		return func(b []byte) []byte {
			read, err := gpt.Read(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				panic(err)
			}
			change(&read)
			out := &memory{b}
			if err := gpt.Write(out, read, int64(len(b))); err != nil {
				panic(err)
			}
			return out.b
		}
	}
	for _, c := range []struct {
		name   string
		change func(*diskImage)
		want   string
	}{
		{"nothing", func(*diskImage) {}, "equal"},
		{"disk GUID", func(d *diskImage) { d.uuid = 2 },
			"GPT: disk GUID is 01000000-0000-0000-0000-000000000000 in A, 02000000-0000-0000-0000-000000000000 in B"},
		{"partition name", func(d *diskImage) { d.file = table(func(t *gpt.Table) { t.Partitions[0].Name = "x" }) },
			`GPT: partition 1: name is "root-x86-64" in A, "x" in B`},
		{"partition type", func(d *diskImage) { d.file = table(func(t *gpt.Table) { t.Partitions[1].Type[0] ^= 1 }) },
			"GPT: partition 2: type is verity hash tree in A, 2d7357ed-ebd2-46d9-aec1-23d437ec2bf5 in B"},
		{"attributes", func(d *diskImage) { d.file = table(func(t *gpt.Table) { t.Partitions[1].Attributes = 0 }) },
			"GPT: partition 2: attributes is 0x1000000000000000 in A, 0x0 in B"},
		{"partition more", func(d *diskImage) {
			d.file = func(b []byte) []byte {
				b = append(b, make([]byte, 1<<20)...)
				return table(func(t *gpt.Table) {
					t.Partitions = append(t.Partitions, gpt.Partition{Type: gpt.MustGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), UUID: gpt.GUID{9}, Offset: hash + 4*4096, Size: 4096, Name: "esp"})
				})(b)
			}
		}, `GPT: partition 3: only B has it, 4096 bytes of type EFI system partition, named "esp"`},

		{"file more", func(d *diskImage) { d.files["/etc/shadow"] = treeFile{data: []byte("x"), mode: 0o400, time: epoch} },
			"partition 1: etc/shadow: only B has it, a file of 1 bytes"},
		{"file less", func(d *diskImage) { delete(d.files, "/etc/motd") },
			"partition 1: etc/motd: only A has it, a file of 8 bytes"},
		{"mode", func(d *diskImage) { d.set("/etc/motd", func(f *treeFile) { f.mode = 0o644 }) },
			"partition 1: etc/motd: mode is 100444 in A, 100644 in B"},
		{"owner", func(d *diskImage) { d.set("/etc/motd", func(f *treeFile) { f.uid = 3 }) },
			"partition 1: etc/motd: owner is 0:0 in A, 3:0 in B"},
		{"time", func(d *diskImage) { d.set("/etc/motd", func(f *treeFile) { f.time++ }) },
			"partition 1: etc/motd: time is 2023-11-14T22:13:20Z (1700000000) in A, 2023-11-14T22:13:21Z (1700000001) in B"},
		{"attribute", func(d *diskImage) { d.set("/etc/motd", func(f *treeFile) { f.attr = "v" }) },
			`partition 1: etc/motd: attribute "user.test" is missing in A, 0x76 in B`},
		{"target", func(d *diskImage) { d.set("/lib", func(f *treeFile) { f.link = "usr/lob" }) },
			`partition 1: lib: target is "usr/lib" in A, "usr/lob" in B`},
		{"type", func(d *diskImage) { d.files["/etc/motd"] = treeFile{device: true, mode: 0o444, time: epoch} },
			"partition 1: etc/motd: type is file in A, character device in B"},
		{"line", func(d *diskImage) { d.set("/etc/motd", func(f *treeFile) { f.data = []byte("one\nTwo\n") }) },
			`partition 1: etc/motd: line 2 is "two\n" in A, "Two\n" in B`},
		{"JSON", func(d *diskImage) { d.set("/etc/config.json", func(f *treeFile) { f.data = []byte(`{"a":{"b":2}}`) }) },
			"partition 1: etc/config.json: $.a.b is 1 in A, 2 in B"},
		{"ELF", func(d *diskImage) {
			d.set("/usr/lib/x.so", func(f *treeFile) { f.data = elfFile("kode", "constants") })
		},
			"partition 1: usr/lib/x.so: ELF section .text: byte 0 is 636f6465 in A, 6b6f6465 in B"},
		{"byte", func(d *diskImage) { d.set("/usr/data", func(f *treeFile) { f.data[9000] = 7 }) },
			"partition 1: usr/data: byte 9000 is 0001020300010203 in A, 0701020300010203 in B"},

		{"time of the file system", func(d *diskImage) { d.buildTime++ },
			"partition 1: EROFS: time of the file system is 0x6553f100 in A, 0x6553f101 in B"},
		{"UUID of the file system", func(d *diskImage) { d.erofs = func(b []byte) { b[1024+48] = 7 } },
			"partition 1: EROFS: UUID of the file system is 00000000000000000000000000000000 in A, 07000000000000000000000000000000 in B"},
		{"unused bytes of the file system", func(d *diskImage) { d.erofs = func(b []byte) { b[5] = 7 } },
			"partition 1: EROFS: layout of the same files, block 0: byte 5 is 0000000000000000 in A, 0700000000000000 in B"},
		{"salt", func(d *diskImage) { d.salt = []byte("pepper") },
			"partition 1: salt of the hash tree is 73616c74 in A, 706570706572 in B"},

		{"superblock of the hash tree", func(d *diskImage) { d.file = func(b []byte) []byte { b[hash+16] = 9; return b } },
			"partition 2: superblock of the hash tree: byte 16 is 0100000000000000 in A, 0900000000000000 in B"},
		{"padding of the hash tree", func(d *diskImage) { d.file = func(b []byte) []byte { b[hash+1000] = 9; return b } },
			"partition 2: hash tree over the same data, block 0: byte 1000 is 0000000000000000 in A, 0900000000000000 in B"},
		{"data that is not the hash tree's", func(d *diskImage) {
			d.file = func(b []byte) []byte {
				at := bytes.Index(b[data:], []byte("one\ntwo\n"))
				b[data+at] = 'O'
				return b
			}
		}, `partition 1: etc/motd: line 1 is "one\n" in A, "One\n" in B`},
		{"top of the tree", func(d *diskImage) { d.file = func(b []byte) []byte { b[hash+4096] ^= 1; return b } },
			"partition 1: hash tree is there in A, unusable (no hash partition belongs to it: open verity disk: disk is corrupt: hash block 1 does not match the root hash; fetch or make the disk again) in B"},
		{"UUID of a partition", func(d *diskImage) {
			d.file = table(func(t *gpt.Table) {
				t.Partitions = append(t.Partitions[:1:1], gpt.Partition{Type: t.Partitions[1].Type, UUID: gpt.GUID{1}, Offset: hash, Size: 8192, Name: t.Partitions[1].Name, Attributes: gpt.ReadOnly})
			})
		}, "partition 1: hash tree is there in A, unusable (no hash partition belongs to it: open verity disk: disk is corrupt: hash block 1 does not match the root hash; fetch or make the disk again) in B"},
		{"backup table", func(d *diskImage) { d.file = func(b []byte) []byte { b[len(b)-100] = 1; return b } },
			"backup GPT: byte 2125724 is 0000000000000000 in A, 0100000000000000 in B"},
		{"MBR", func(d *diskImage) { d.file = func(b []byte) []byte { b[3] = 1; return b } },
			"protective MBR: byte 3 is 0000000000000000 in A, 0100000000000000 in B"},
		{"between partitions", func(d *diskImage) { d.file = func(b []byte) []byte { b[hash-1] = 1; return b } },
			"outside of the partitions: byte 2097151 is 0076657269747900 in A, 0176657269747900 in B"},
	} {
		t.Run(c.name, func(t *testing.T) {
			changed := newDisk()
			c.change(changed)
			if got := first(t, newDisk().bytes(t), changed.bytes(t)); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// memory is a disk in memory.
type memory struct{ b []byte }

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if n := at + int64(len(p)); n > int64(len(m.b)) {
		m.b = append(m.b, make([]byte, n-int64(len(m.b)))...)
	}
	return copy(m.b[at:], p), nil
}

const manifestText = `{"engine":{"data_blocks":1,"root_hash":"%064x","salt":""},"gpus":0,"limits":{"body_bytes":1024,"concurrency":%d,"idle_seconds":1,"total_seconds":1},"models":[{"disk":{"data_blocks":1,"root_hash":"%064x","salt":""},"name":"a/b","revision":"1"}],"parameters":{},"version":1}`

func manifestDisk(t *testing.T, concurrency int) []byte {
	t.Helper()
	var m memory
	size, err := gpt.WriteManifestDisk(&m, fmt.Appendf(nil, manifestText, 1, concurrency, 2), nil)
	if err != nil {
		t.Fatal(err)
	}
	return append(m.b, make([]byte, size-int64(len(m.b)))...)
}

func TestDiffManifest(t *testing.T) {
	want := "partition 1: manifest: $.limits.concurrency is 1 in A, 2 in B"
	if got := first(t, manifestDisk(t, 1), manifestDisk(t, 2)); got != want {
		t.Errorf("got %s, expected %s", got, want)
	}
}

func TestDiffRefuses(t *testing.T) {
	dir := t.TempDir()
	uki, disk := save(t, newUKI().bytes()), save(t, newDisk().bytes(t))
	for _, c := range []struct {
		name, a, b, want string
	}{
		{"missing", filepath.Join(dir, "none"), uki, "no such file"},
		{"missing second", uki, filepath.Join(dir, "none"), "no such file"},
		{"folder", dir, uki, "not a file"},
		{"pipe-like", "/dev/null", uki, "not a file"},
		{"two kinds", uki, disk, "compare two of a kind"},
		{"text, twice", save(t, []byte("hello")), save(t, []byte("hello")), "neither a UKI"},
		{"empty", save(t, nil), uki, "neither a UKI"},
		{"qcow2", save(t, []byte("QFI\xfb.......")), uki, "convert"},
		{"cut", save(t, newUKI().bytes()[:5000]), uki, "the file ends at 0x1388"},
		{"bare kernel", save(t, (&kernelOnly).bytes()), uki, "without a .linux section"},
	} {
		t.Run(c.name, func(t *testing.T) {
			found, err := inspect.Diff(t.Context(), c.a, c.b, false)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, %v; expected an error with %q", found, err, c.want)
			}
		})
	}
}

var kernelOnly = uki{sections: []peSection{{".text", []byte("x")}}, file: func(b []byte) []byte { return b }}

// Real artefacts against each other: everything that there is, named.
func TestDiffArtefacts(t *testing.T) {
	plain, debug := artefact(t, "chrysalis.efi"), artefact(t, "chrysalis-debug.efi")
	found, err := inspect.Diff(t.Context(), plain, debug, true)
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, d := range found {
		text = append(text, d.String())
	}
	all := strings.Join(text, "\n")
	for _, want := range []string{
		`section .osrel: line 4 is "IMAGE_ID=\"chrysalis\"\n" in A, "IMAGE_ID=\"chrysalis-debug\"\n" in B`,
		`section .initrd: image.json: $.name is "chrysalis" in A, "chrysalis-debug" in B`,
		`section .initrd: init: Go build information: `,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("nothing says %s in:\n%s", want, all)
		}
	}
	if found, err := inspect.Diff(t.Context(), debug, debug, false); err != nil || len(found) > 0 {
		t.Errorf("a UKI and itself: %v, %v", found, err)
	}

	// One bit of the model.
	disk := artefact(t, "demo.disk")
	data, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	data[2<<20] ^= 1
	found, err = inspect.Diff(t.Context(), disk, save(t, data), false)
	if err != nil || len(found) != 1 || !strings.HasPrefix(found[0].String(), "partition 1: model.gguf: byte ") {
		t.Errorf("one bit of a model: %v, %v", found, err)
	}
}
