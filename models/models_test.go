package models

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/models/card"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// gguf builds a GGUF file value by value.
type gguf struct{ bytes.Buffer }

func (g *gguf) u16(v uint16) *gguf { binary.Write(g, binary.LittleEndian, v); return g }
func (g *gguf) u32(v uint32) *gguf { binary.Write(g, binary.LittleEndian, v); return g }
func (g *gguf) u64(v uint64) *gguf { binary.Write(g, binary.LittleEndian, v); return g }
func (g *gguf) str(s string) *gguf { g.u64(uint64(len(s))).WriteString(s); return g }

type tensor struct {
	name   string
	dims   []uint64
	typ    uint32
	offset uint64
}

// shape is a file to build; the zero value of a field means a good one.
type shape struct {
	magic   string
	version uint32
	keys    func(*gguf) uint64 // writes further keys and returns their number
	noArch  bool
	tensors []tensor
	count   uint64 // of tensors, as the header says
	data    int    // bytes of the data section
}

func build(s shape) []byte {
	if s.magic == "" {
		s.magic = "GGUF"
	}
	if s.version == 0 {
		s.version = 3
	}
	if s.tensors == nil {
		s.tensors = []tensor{{"a", []uint64{64, 4}, 0, 0}, {"b", []uint64{64}, 8, 1024}}
	}
	if s.count == 0 {
		s.count = uint64(len(s.tensors))
	}
	if s.data == 0 {
		s.data = 1024 + 2*34
	}
	var kv gguf
	keys := uint64(2)
	if !s.noArch {
		kv.str("general.architecture").u32(typeString).str("llama")
		keys++
	}
	kv.str("llama.block_count").u32(typeUint32).u32(1)
	kv.str("tokenizer.ggml.tokens").u32(typeArray).u32(typeString).u64(2).str("<s>").str("</s>")
	if s.keys != nil {
		keys += s.keys(&kv)
	}
	var g gguf
	g.WriteString(s.magic)
	g.u32(s.version).u64(s.count).u64(keys)
	g.Write(kv.Bytes())
	for _, t := range s.tensors {
		g.str(t.name).u32(uint32(len(t.dims)))
		for _, d := range t.dims {
			g.u64(d)
		}
		g.u32(t.typ).u64(t.offset)
	}
	for g.Len()%32 != 0 {
		g.WriteByte(0)
	}
	data := make([]byte, s.data)
	rand.NewChaCha8([32]byte{'g'}).Read(data)
	g.Write(data)
	return g.Bytes()
}

func check(b []byte) error { return CheckGGUF(bytes.NewReader(b), int64(len(b))) }

func TestCheckGGUFAccepts(t *testing.T) {
	for name, s := range map[string]shape{
		"small":        {},
		"version 2":    {version: 2},
		"unknown type": {tensors: []tensor{{"a", []uint64{7}, 200, 0}}},
		"aligned to 64": {keys: func(g *gguf) uint64 {
			g.str("general.alignment").u32(typeUint32).u32(64)
			return 1
		}, data: 4096},
		"one part of one": {keys: func(g *gguf) uint64 { g.str("split.count").u32(typeUint16).u16(1); return 1 }},
		"every fixed type": {keys: func(g *gguf) uint64 {
			for typ, n := range valueSizes {
				g.str(fmt.Sprint("k", typ)).u32(typ).Write(make([]byte, n))
			}
			return uint64(len(valueSizes))
		}},
		"array of numbers": {keys: func(g *gguf) uint64 {
			g.str("k").u32(typeArray).u32(typeUint16).u64(3).Write(make([]byte, 6))
			return 1
		}},
	} {
		if err := check(build(s)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckGGUFRefuses(t *testing.T) {
	key := func(name string, typ uint32) func(*gguf) uint64 {
		return func(g *gguf) uint64 { g.str(name).u32(typ).u64(0); return 1 }
	}
	one := func(x tensor) []tensor { return []tensor{x} }
	good := build(shape{})
	for _, tt := range []struct {
		name string
		file []byte
		says string
	}{
		{"empty", nil, "complete"},
		{"not GGUF", []byte("PK\x03\x04 something else altogether"), "convert"},
		{"old GGML", build(shape{magic: "ggjt"}), "convert"},
		{"version 1", build(shape{version: 1}), "version 1"},
		{"big-endian", build(shape{version: 0x03000000}), "version"},
		{"header cut", good[:100], "complete"},
		{"data cut by a byte", good[:len(good)-1], "complete"},
		{"data missing", good[:len(good)-1100], "complete"},
		{"2^64 - 1 tensors", build(shape{count: 1<<64 - 1}), "tensors"},
		{"more tensors than there are", build(shape{count: 60000}), ""},
		{"no architecture", build(shape{noArch: true}), "architecture"},
		{"duplicate key", build(shape{keys: key("general.architecture", 10)}), "twice"},
		{"empty key", build(shape{keys: key("", 10)}), "empty"},
		{"unknown value type", build(shape{keys: key("k", 13)}), "type 13"},
		{"array of arrays", build(shape{keys: func(g *gguf) uint64 {
			g.str("k").u32(typeArray).u32(typeArray).u64(1)
			return 1
		}}), "type 9"},
		{"huge array", build(shape{keys: func(g *gguf) uint64 {
			g.str("k").u32(typeArray).u32(12).u64(1 << 61)
			return 1
		}}), ""},
		{"huge string", build(shape{keys: func(g *gguf) uint64 {
			g.str("k").u32(typeString).u64(1<<64 - 1)
			return 1
		}}), ""},
		{"huge key", build(shape{keys: func(g *gguf) uint64 { g.u64(1 << 40); return 1 }}), "at most"},
		{"alignment of 3", build(shape{keys: func(g *gguf) uint64 {
			g.str("general.alignment").u32(typeUint32).u32(3)
			return 1
		}}), "alignment"},
		{"alignment of another type", build(shape{keys: key("general.alignment", 10)}), "alignment"},
		{"tensors that overlap", build(shape{tensors: []tensor{{"a", []uint64{64, 4}, 0, 0}, {"b", []uint64{64}, 8, 992}}}), "overlap"},
		{"tensor twice", build(shape{tensors: []tensor{{"a", []uint64{1}, 0, 0}, {"a", []uint64{1}, 0, 32}}}), "twice"},
		{"long tensor name", build(shape{tensors: one(tensor{strings.Repeat("x", 65), []uint64{1}, 0, 0})}), "at most"},
		{"five dimensions", build(shape{tensors: one(tensor{"a", []uint64{1, 1, 1, 1, 1}, 0, 0})}), "dimensions"},
		{"dimension of 0", build(shape{tensors: one(tensor{"a", []uint64{0}, 0, 0})}), "dimension of 0"},
		{"dimensions that wrap", build(shape{tensors: one(tensor{"a", []uint64{1 << 33, 1 << 33}, 0, 0})}), "dimension"},
		{"half a quantised block", build(shape{tensors: one(tensor{"a", []uint64{48}, 8, 0})}), "multiple"},
		{"offset not aligned", build(shape{tensors: one(tensor{"a", []uint64{1}, 0, 4})}), "begins"},
		{"offset far away", build(shape{tensors: one(tensor{"a", []uint64{1}, 0, 1 << 63})}), "begins"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := check(tt.file)
			if !errors.Is(err, ErrNotGGUF) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want one about %q", err, tt.says)
			}
		})
	}
}

func FuzzCheckGGUF(f *testing.F) {
	f.Add(build(shape{}))
	f.Add(build(shape{version: 2, keys: func(g *gguf) uint64 {
		g.str("k").u32(typeArray).u32(typeUint16).u64(3).Write(make([]byte, 6))
		return 1
	}}))
	f.Add(build(shape{})[:60])
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := check(b); err != nil && !errors.Is(err, ErrNotGGUF) {
			t.Errorf("%v does not wrap ErrNotGGUF", err)
		}
	})
}

func TestNames(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, s := range []string{"a/b@c", "Org.1/Model_2-x@v1.0", long + "/" + long + "@" + long} {
		name, revision, err := ParseName(s)
		if err != nil || name+"@"+revision != s {
			t.Errorf("%q: %q %q %v", s, name, revision, err)
		}
	}
	for s, says := range map[string]string{
		"":                  "ORG/NAME@REVISION",
		"a/b":               "ORG/NAME@REVISION",
		"b@c":               "want ORG/NAME",
		"a/b/c@d":           "want ORG/NAME",
		"/b@c":              "organisation",
		"a/@c":              "name",
		"a/b@":              "revision",
		"a/b@c@d":           "revision",
		"a/b@c\n":           "revision",
		".a/b@c":            "organisation",
		"a/-b@c":            "name",
		"a/..@c":            "name",
		"a/b@c d":           "revision",
		"a/b@é":             "revision",
		long + "x/b@c":      "organisation",
		"a/b@" + long + "x": "revision",
	} {
		if _, _, err := ParseName(s); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: got %v, want one about %s", s, err, says)
		}
	}
}

func packOptions(dir string) PackOptions {
	return PackOptions{Name: "chrysalis/demo", Revision: "v1", Out: filepath.Join(dir, "model.disk")}
}

func writeModel(t testing.TB, dir string, b []byte) string {
	path := filepath.Join(dir, "source.gguf")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The root hashes of two models that any later version must make again.
var goldenModels = []struct {
	name, root string
	s          shape
}{
	{"inline", "b1c9133545344630d82c0ed2af9fe3a47396031114a2323fc3c52e4fd310d8d6", shape{}},
	{"in blocks", "c1774555da4e375b5626567e5807a3efc2e20221359035a8890db28cc7d2882c", shape{data: 1 << 20}},
}

func TestPackAndInspect(t *testing.T) {
	for _, tt := range goldenModels {
		t.Run(tt.name, func(t *testing.T) {
			src, b := t.TempDir(), build(tt.s)
			var steps []string
			o := packOptions(t.TempDir())
			o.Progress = func(step string, done, total int64) {
				if done == total {
					steps = append(steps, step)
				}
			}
			info, err := Pack(context.Background(), writeModel(t, src, b), o)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(steps) != "[pack]" {
				t.Errorf("steps finished: %v", steps)
			}
			sum := fmt.Sprintf("%x", sha256.Sum256(b))
			if info.Name != o.Name || info.Revision != o.Revision || info.Size() != int64(len(b)) || info.Files[0].SHA256 != sum {
				t.Errorf("packed %+v", info)
			}
			if got := info.Disk.RootHash.String(); got != tt.root || info.Ref() != "chrysalis/demo@v1:"+tt.root {
				t.Errorf("root hash %s, was %s", got, tt.root)
			}
			if again, err := Inspect(o.Out); err != nil || fmt.Sprint(again) != fmt.Sprint(info) {
				t.Errorf("inspected %+v, %v; packed %+v", again, err, info)
			}

			f, err := os.Open(o.Out)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := verity.VerifyDisk(context.Background(), f, info.Disk.Size, nil); err != nil {
				t.Error(err)
			}
			_, fsys, err := disk.OpenTree(f, info.Disk.Size)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := fs.ReadFile(fsys, GGUFName); err != nil || !bytes.Equal(got, b) {
				t.Errorf("/%s: %d bytes, %v", GGUFName, len(got), err)
			}
			want := fmt.Sprintf(`{"context_length":0,"entry":"model.gguf","files":[{"path":"model.gguf","sha256":"%s","size":%d}],`+
				`"format":"gguf","licence":"","name":"chrysalis/demo","parameters":320,"quantisation":"","revision":"v1","version":1}`, sum, len(b))
			if got, err := fs.ReadFile(fsys, card.Path); err != nil || string(got) != want {
				t.Errorf("/%s: %s, %v", card.Path, got, err)
			}

			// Reproducible from another path, at another time.
			o2 := packOptions(t.TempDir())
			if _, err := Pack(context.Background(), writeModel(t, t.TempDir(), b), o2); err != nil {
				t.Fatal(err)
			}
			one, _ := os.ReadFile(o.Out)
			two, _ := os.ReadFile(o2.Out)
			if len(one) == 0 || !bytes.Equal(one, two) {
				t.Error("two disks of one model differ")
			}
			// Name and revision are part of what is named by the root hash.
			o3 := packOptions(t.TempDir())
			o3.Revision = "v2"
			if other, err := Pack(context.Background(), writeModel(t, t.TempDir(), b), o3); err != nil || other.Disk.RootHash == info.Disk.RootHash {
				t.Errorf("another revision: %s, %v", other.Ref(), err)
			}
		})
	}
}

func TestPackRefuses(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name   string
		ctx    context.Context
		file   []byte
		change func(t *testing.T, src *string, o *PackOptions)
		want   error
	}{
		{name: "truncated", file: build(shape{})[:1000], want: ErrNotGGUF},
		{name: "not GGUF", file: []byte("hello"), want: ErrNotGGUF},
		{name: "bad name", change: func(t *testing.T, _ *string, o *PackOptions) { o.Name = "demo" }},
		{name: "bad revision", change: func(t *testing.T, _ *string, o *PackOptions) { o.Revision = "" }},
		{name: "existing output", change: func(t *testing.T, src *string, o *PackOptions) { o.Out = *src }, want: fs.ErrExist},
		{name: "no such directory", change: func(t *testing.T, _ *string, o *PackOptions) { o.Out = filepath.Join(o.Out, "x") }, want: fs.ErrNotExist},
		{name: "unwritable directory", change: func(t *testing.T, _ *string, o *PackOptions) {
			dir := "/sys" // nobody creates files here, not even root
			if os.Geteuid() != 0 {
				dir = filepath.Dir(o.Out)
				os.Chmod(dir, 0o500)
				t.Cleanup(func() { os.Chmod(dir, 0o700) })
			}
			o.Out = filepath.Join(dir, "model.disk")
		}, want: fs.ErrPermission},
		{name: "source missing", change: func(t *testing.T, src *string, o *PackOptions) { *src += "x" }, want: fs.ErrNotExist},
		{name: "cancelled", ctx: cancelled, want: context.Canceled},
		{name: "source changes", change: func(t *testing.T, src *string, o *PackOptions) {
			o.Progress = func(step string, done, total int64) {
				f, err := os.OpenFile(*src, os.O_WRONLY|os.O_APPEND, 0)
				if err != nil {
					t.Fatal(err)
				}
				f.WriteString("more")
				f.Close()
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.ctx == nil {
				tt.ctx = context.Background()
			}
			if tt.file == nil {
				tt.file = build(shape{data: 1 << 20})
			}
			src, out := writeModel(t, t.TempDir(), tt.file), t.TempDir()
			o := packOptions(out)
			if tt.change != nil {
				tt.change(t, &src, &o)
			}
			_, err := Pack(tt.ctx, src, o)
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if left, _ := os.ReadDir(out); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestInspectRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Inspect(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if _, err := Inspect(writeModel(t, dir, build(shape{}))); !errors.Is(err, verity.ErrInvalid) {
		t.Errorf("not a disk: %v", err)
	}
	good := `{"context_length":0,"entry":"model.gguf","files":[{"path":"model.gguf","sha256":"` + strings.Repeat("ab", 32) +
		`","size":3}],"format":"gguf","licence":"","name":"a/b","parameters":1,"quantisation":"","revision":"c","version":1}`
	change := func(from, to string) string {
		if !strings.Contains(good, from) {
			t.Fatal(from)
		}
		return strings.Replace(good, from, to, 1)
	}
	for _, tt := range []struct{ name, json, model, says string }{
		{"good", good, "abc", ""},
		{"no card", "", "abc", "not a model disk"},
		{"no file", good, "", "not on the disk"},
		{"another size", good, "abcd", "has 4 bytes"},
		{"not JSON", "{", "abc", "not valid"},
		{"unknown field", change(`{`, `{"x":1,`), "abc", "canonical"},
		{"duplicate field", change(`"name":"a/b"`, `"name":"a/b","name":"a/b"`), "abc", "canonical"},
		{"spaces", change(`:3`, `: 3`), "abc", "canonical"},
		{"bad name", change(`a/b`, `ab`), "abc", "ORG/NAME"},
		{"short hash", change(`abab`, `ab`), "abc", "SHA-256"},
		{"upper case", change(`abab`, `ABab`), "abc", "SHA-256"},
		{"another version", change(`"version":1`, `"version":2`), "abc", "version"},
		{"unknown format", change(`"format":"gguf"`, `"format":"onnx"`), "abc", "format"},
		{"entry elsewhere", change(`"entry":"model.gguf"`, `"entry":"../x"`), "abc", "entry"},
		{"path that climbs", change(`"path":"model.gguf"`, `"path":"../model.gguf"`), "abc", "file name"},
		{"no files", change(`[{"path":"model.gguf","sha256":"`+strings.Repeat("ab", 32)+`","size":3}]`, `[]`), "abc", "0 files"},
		{"too long", good + strings.Repeat(" ", card.MaxSize), "abc", "at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tree := t.TempDir()
			for name, s := range map[string]string{card.Path: tt.json, GGUFName: tt.model} {
				if s != "" {
					if err := os.WriteFile(filepath.Join(tree, name), []byte(s), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			out := filepath.Join(t.TempDir(), "disk")
			if _, err := disk.PackTree(context.Background(), os.DirFS(tree), out, disk.Options{}); err != nil {
				t.Fatal(err)
			}
			_, err := Inspect(out)
			if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, expected %q", err, tt.says)
			}
		})
	}
}

// BenchmarkPack packs 256 MiB. The reading, the copy and the SHA-256 of the
// file go on one processor, the tree on all of them.
func BenchmarkPack(b *testing.B) {
	const size = 256 << 20
	dir := b.TempDir()
	src := writeModel(b, dir, build(shape{data: size}))
	o := packOptions(dir)
	b.SetBytes(size)
	for b.Loop() {
		if _, err := Pack(context.Background(), src, o); err != nil {
			b.Fatal(err)
		}
		os.Remove(o.Out)
	}
}
