package inspect_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/inspect"
)

// artefact returns the path of a built artefact.
func artefact(t testing.TB, name string) string {
	t.Helper()
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(source, "out", name)
	if _, err := os.Stat(path); err != nil {
		imagetest.Missing(t, fmt.Errorf("%w; make it with 'make image'", err))
	}
	return path
}

func TestInspectUKI(t *testing.T) {
	r, err := inspect.Inspect(t.Context(), save(t, newUKI().bytes()), nil)
	if err != nil {
		t.Fatal(err)
	}
	u := r.UKI
	if u == nil || r.Disk != nil || len(r.Problems) > 0 {
		t.Fatalf("%+v", r)
	}
	if u.CommandLine != "console=ttyS0 panic=-1" || u.Kernel != "6.18.15" || !strings.Contains(u.Stub, "257.13") ||
		u.OSRelease["NAME"] != "Chrysalis VM" || u.OSRelease["ID"] != "chrysalis" {
		t.Errorf("%+v", u)
	}
	if s := u.Sections[4]; len(u.Sections) != 7 || s.Name != ".uname" || s.Size != 7 || s.SHA256 != sha256Of("6.18.15") {
		t.Errorf("%+v", s)
	}
	got, err := json.Marshal(u.Initrd.Entries[1])
	want := `{"path":"etc/os-release","mode":"100444","uid":0,"gid":0,"time":"2023-11-14T22:13:20Z","size":23,` +
		`"sha256":"` + sha256Of("ID=chrysalis\nVERSION=1\n") + `","links":1,"inode":2}`
	if err != nil || string(got) != want {
		t.Errorf("got  %s (%v)\nwant %s", got, err, want)
	}
	if link := u.Initrd.Entries[4]; link.Target != "usr/lib" || link.SHA256 != "" {
		t.Errorf("%+v", link)
	}
	if u.Initrd.Compression != "zstd" || len(u.Initrd.Entries) != 7 {
		t.Errorf("%+v", u.Initrd)
	}
}

func TestInspectDisk(t *testing.T) {
	d := newDisk()
	d.files["/chrysalis.txt"] = treeFile{data: []byte("x"), mode: 0o444, time: epoch}
	good := d.bytes(t)
	r, err := inspect.Inspect(t.Context(), save(t, good), nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.UKI != nil || len(r.Problems) > 0 || len(r.Disk.Partitions) != 2 {
		t.Fatalf("%+v", r)
	}
	v := r.Disk.Partitions[0].Verity
	uuids := strings.ReplaceAll(r.Disk.Partitions[0].UUID+r.Disk.Partitions[1].UUID, "-", "")
	if v == nil || v.RootHash != uuids || v.Salt != fmt.Sprintf("%x", "salt") || v.HashPartition != 2 || r.Disk.Partitions[1].Verity != nil {
		t.Fatalf("%+v", v)
	}
	var paths []string
	for _, e := range v.Entries {
		paths = append(paths, e.Path)
		if e.Path == "usr/data" && (e.SHA256 != sha256Of(string(d.files["/usr/data"].data)) || e.Size != 12000 || e.Time.Unix() != epoch) {
			t.Errorf("%+v", e)
		}
	}
	if got := strings.Join(paths, " "); got != ". chrysalis.txt etc etc/config.json etc/motd lib usr usr/data usr/lib usr/lib/x.so" {
		t.Errorf("%s", got)
	}

	// What it says of itself and is not so.
	for _, c := range []struct {
		name   string
		change func(*diskImage)
		want   string
	}{
		{"a byte of a file", func(d *diskImage) {
			d.file = func(b []byte) []byte {
				b[bytes.Index(b, []byte("one\ntwo\n"))] = 'O'
				return b
			}
		}, "does not match the root hash"},
		{"the tree's top", func(d *diskImage) { d.file = func(b []byte) []byte { b[2<<20+4096] ^= 1; return b } },
			"no hash partition belongs to it"},
		{"profile", func(d *diskImage) {
			d.files["/chrysalis/profile.json"] = treeFile{data: []byte(`{"version":9}`), mode: 0o444}
		}, "version is 9"},
		{"model", func(d *diskImage) { d.files["/model.json"] = treeFile{data: []byte(`{}`), mode: 0o444} },
			"model.json"},
		{"model's hash", func(d *diskImage) {
			d.files["/model.gguf"] = treeFile{data: []byte("GGUF"), mode: 0o444}
			card := fmt.Sprintf(`{"context_length":0,"entry":"model.gguf","files":[{"path":"model.gguf","sha256":"%064x","size":4}],`+
				`"format":"gguf","licence":"","name":"a/b","parameters":1,"quantisation":"","revision":"1","version":1}`, 1)
			d.files = map[string]treeFile{"/model.gguf": d.files["/model.gguf"], "/model.json": {data: []byte(card), mode: 0o444}}
		}, "has the SHA-256"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk()
			c.change(d)
			r, err := inspect.Inspect(t.Context(), save(t, d.bytes(t)), nil)
			if err != nil || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], c.want) {
				t.Errorf("%q, %v; expected a problem with %q", r.Problems, err, c.want)
			}
		})
	}
}

func TestInspectManifest(t *testing.T) {
	r, err := inspect.Inspect(t.Context(), save(t, manifestDisk(t, 3)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if p := r.Disk.Partitions[0]; p.Kind != "manifest" || string(p.Manifest) != fmt.Sprintf(manifestText, 1, 3, 2) || len(r.Problems) > 0 {
		t.Errorf("%+v", r)
	}
}

func TestInspectArtefacts(t *testing.T) {
	r, err := inspect.Inspect(t.Context(), artefact(t, "chrysalis.efi"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.UKI.Kernel != image.Kernel || r.UKI.Initrd.Entries[2].Path != "init" || len(r.Problems) > 0 {
		t.Errorf("%+v", r.UKI)
	}
	r, err = inspect.Inspect(t.Context(), artefact(t, "llama.cpp.disk"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if v := r.Disk.Partitions[0].Verity; v == nil || v.Profile == nil || v.Profile.Name != "llama.cpp" || len(r.Problems) > 0 {
		t.Errorf("%+v %v", v, r.Problems)
	}
	r, err = inspect.Inspect(t.Context(), artefact(t, "demo.disk"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if v := r.Disk.Partitions[0].Verity; v == nil || v.Model != "chrysalis/demo@1:"+v.RootHash || len(r.Problems) > 0 {
		t.Errorf("%+v %v", v, r.Problems)
	}
}

func TestUKIRefuses(t *testing.T) {
	const pe, table = 0x80, 0x188
	put := func(at int, v uint32) func(*uki) {
		return func(u *uki) {
			u.file = func(b []byte) []byte { binary.LittleEndian.PutUint32(b[at:], v); return b }
		}
	}
	packed := func(f func([]byte) []byte) func(*uki) { return func(u *uki) { u.packed = f } }
	entry := func(e cpioEntry) func(*uki) {
		return func(u *uki) { u.entries = append(u.entries, e) }
	}
	file := uint32(typeFile | 0o444)
	for _, c := range []struct {
		name   string
		change func(*uki)
		want   string
	}{
		{"PE header far away", put(0x3c, 1<<30), "byte 0x3c: the PE header is at 0x40000000"},
		{"PE header in the DOS header", put(0x3c, 4), "the PE header is at 0x4"},
		{"no PE signature", put(pe, 0), `byte 0x80: "\x00\x00\x00\x00", expected the signature`},
		{"PE32", put(pe+24, 0x10b), "expected 0x20b"},
		{"no sections", put(pe+4, 0x8664), "0 sections"},
		{"65535 sections", put(pe+4, 0xffff8664), "65535 sections"},
		{"many data directories", put(pe+24+108, 1<<31), "2147483648 data directories"},
		{"section beyond the end", put(table+16, 0xfffffe00), "the file ends at"},
		{"section in the headers", put(table+20, 0), "before the end"},
		{"sections overlap", put(table+40+20, 1024), "section .sdmagic begins at 0x400, before the end"},
		{"section's name", put(table, 0x0a2e), "expected printable"},
		{"section beyond 4 GiB", put(table+8, 0xffffffff), "beyond 4 GiB"},
		{"signatures inside", put(pe+24+112+4*8+4, 8), "signatures at"},
		{"long command line", func(u *uki) { u.section(".cmdline").data = make([]byte, 65537) }, "section .cmdline has 65537 bytes"},
		{"no kernel", func(u *uki) { u.section(".linux").name = ".lunix" }, "without a .linux section"},

		{"gzip", packed(func([]byte) []byte { return []byte("\x1f\x8b\x08\x00\x00\x00\x00") }), "expected a zstd frame or a newc archive"},
		{"empty initrd", packed(func([]byte) []byte { return []byte{} }), "an initrd of 6 bytes is cut short"},
		{"cut frame", packed(func(b []byte) []byte { b = pack(b, 1); return b[:len(b)-20] }), "the block goes beyond the end"},
		{"damaged frame", packed(func(b []byte) []byte { b = pack(b, 1); b[len(b)-1] ^= 1; return b }), "zstd: "},
		{"second frame", packed(func(b []byte) []byte { return append(pack(b, 1), pack(b, 1)...) }), "behind the frame"},
		{"huge window", packed(func([]byte) []byte {
			return []byte("\x28\xb5\x2f\xfd\x00\xf8\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
		}), "expected at most 16777216 bytes"},
		{"huge single segment", packed(func([]byte) []byte {
			return []byte("\x28\xb5\x2f\xfd\xe0\xff\xff\xff\xff\xff\xff\xff\x0f\x01\x00\x00\x00\x00\x00\x00")
		}), "expected at most 16777216 bytes"},
		{"bomb", packed(func([]byte) []byte {
			// 256 MiB of zeros and more, in blocks of 128 KiB that repeat one byte.
			b := []byte("\x28\xb5\x2f\xfd\x00\x58")
			for range 1<<11 + 1 {
				b = append(b, 2, 0, 0x10, 0)
			}
			return append(b, 1, 0, 0)
		}), "more than"},

		{"no trailer", func(u *uki) { u.archive = func(b []byte) []byte { return b[:len(b)-124] } }, "cut short"},
		{"second archive", func(u *uki) { u.archive = func(b []byte) []byte { return append(b, b...) } }, "behind its end: byte"},
		{"other format", entry(cpioEntry{name: "x", mode: file, magic: "070702"}), `"070702", expected "070701"`},
		{"digits", entry(cpioEntry{name: "x", mode: file, magic: "070701+0000001"}), "expected 8 hexadecimal digits"},
		{"long content", entry(cpioEntry{name: "x", mode: file, forgeSize: true, size: 0xffffffff}), "content to byte"},
		{"long name", entry(cpioEntry{name: "x", mode: file, forgeNameSize: true}), "name of 4294967295 bytes"},
		{"absolute", entry(cpioEntry{name: "/init", mode: file}), "expected a clean relative path"},
		{"dots", entry(cpioEntry{name: "a/../init", mode: file}), "expected a clean relative path"},
		{"NUL in a name", entry(cpioEntry{name: "init\x00x", mode: file}), "expected one NUL"},
		{"twice", entry(cpioEntry{name: "init", mode: file}), `"init" is there twice`},
		{"no type", entry(cpioEntry{name: "x", mode: 0o444}), "expected a type of file"},
		{"mode of 32 bits", entry(cpioEntry{name: "x", mode: file | 1<<20}), "expected a type of file"},
		{"folder with content", entry(cpioEntry{name: "x", mode: typeFolder, data: []byte("x")}), "a folder with 1 bytes"},
		{"empty link", entry(cpioEntry{name: "x", mode: typeLink}), "link target of 0 bytes"},
		{"padding", entry(cpioEntry{name: "xy", mode: file, data: []byte("1"), forgePadding: true}), "padding: byte"},
		{"checksum", entry(cpioEntry{name: "x", mode: file, crc: 1}), "checksum"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUKI()
			c.change(u)
			path := save(t, u.bytes())
			r, err := inspect.Inspect(t.Context(), path, nil)
			if err == nil || !strings.HasPrefix(err.Error(), path+": ") || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v, %v; expected an error with %q", r, err, c.want)
			}
		})
	}
}

// Beside what go-erofs refuses.
func TestDiskRefuses(t *testing.T) {
	// dirent finds the entry of a folder that a name belongs to: EROFS has the
	// entries of 12 bytes first (inode, offset of the name, type), then the names.
	dirent := func(b []byte, name string) []byte {
		for at := 0; ; at++ {
			next := bytes.Index(b[at:], []byte(name))
			if next < 0 {
				panic(name)
			}
			at += next
			for start := at - 12; start > at-500; start-- {
				first := int(binary.LittleEndian.Uint16(b[start+8:]))
				if first == 0 || first%12 != 0 || start+first > at {
					continue
				}
				for entry := start; entry < start+first; entry += 12 {
					if start+int(binary.LittleEndian.Uint16(b[entry+8:])) == at {
						return b[entry:]
					}
				}
			}
		}
	}
	inode := func(b []byte, name string) []byte {
		meta := int(binary.LittleEndian.Uint32(b[1024+40:])) * 4096
		return b[meta+int(binary.LittleEndian.Uint64(dirent(b, name)))*32:]
	}
	for _, c := range []struct {
		name  string
		erofs func(b []byte)
		want  string
	}{
		{"no superblock", func(b []byte) { clear(b[1024:1152]) }, "EROFS"},
		{"names out of order", func(b []byte) { copy(b[bytes.Index(b, []byte("config.json")):], "zonfig.json") }, "expected names in order"},
		{"slash in a name", func(b []byte) { copy(b[bytes.Index(b, []byte("config.json")):], "config/json") }, "cannot be a name"},
		{"file larger than the disk", func(b []byte) { binary.LittleEndian.PutUint32(inode(b, "data")[8:], 0x7fffffff) }, "the files have more than the partition"},
		{"file beyond the partition", func(b []byte) {
			binary.LittleEndian.PutUint32(inode(b, "data")[16:], 0x7fffffff)
		}, `"usr/data": `},
		{"file listed as a file, and a folder", func(b []byte) { binary.LittleEndian.PutUint16(inode(b, "data")[4:], 0o040755) }, "listed as a file, its inode says 40755"},
		{"folder in itself", func(b []byte) {
			binary.LittleEndian.PutUint64(dirent(b, "usr"), uint64(binary.LittleEndian.Uint16(b[1024+14:])))
		}, "the folder is in two places"},
		{"root is elsewhere", func(b []byte) { binary.LittleEndian.PutUint16(b[1024+14:], 0xffff) }, "EROFS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDisk()
			d.erofs = c.erofs
			r, err := inspect.Inspect(t.Context(), save(t, d.bytes(t)), nil)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v, %v; expected an error with %q", r, err, c.want)
			}
		})
	}
}

func FuzzReadPE(f *testing.F) {
	u := newUKI()
	u.section(".text").data, u.section(".linux").data = []byte("x"), []byte("x")
	f.Add(u.bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := inspect.ReadPE(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		for _, s := range p.Sections {
			if s.RawSize > 0 && int64(s.Offset)+s.Content.Size() > int64(len(data)) {
				t.Errorf("section %s is outside of the file", s.Name)
			}
			p.Text(s.Name)
		}
	})
}

func FuzzReadCPIO(f *testing.F) {
	f.Add(cpioArchive(initrdEntries()))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := inspect.ReadCPIO(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		total := int64(0)
		for _, e := range entries {
			total += e.Size
		}
		if total > int64(len(data)) {
			t.Errorf("%d bytes of content in %d", total, len(data))
		}
	})
}

func FuzzOpenInitrd(f *testing.F) {
	f.Add(pack(cpioArchive(initrdEntries()), zstd.SpeedFastest))
	f.Fuzz(func(t *testing.T, data []byte) {
		i, err := inspect.OpenInitrd(t.Context(), bytes.NewReader(data), int64(len(data)))
		if err == nil {
			i.Close()
		}
	})
}

// FuzzUKI gives the whole reader an image with one section changed.
func FuzzUKI(f *testing.F) {
	good := newUKI().bytes()
	f.Add(good[:1024], []byte("console=ttyS0"))
	f.Fuzz(func(t *testing.T, header, rest []byte) {
		data := append(bytes.Clone(header), rest...)
		if len(data) < len(good) {
			data = append(data, good[len(data):]...)
		}
		inspect.Diff(t.Context(), save(t, good), save(t, data), true)
	})
}
