package models

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"chrysalis/models/card"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// tree is a model's files by path.
type tree map[string][]byte

func (t tree) write(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	for name, data := range t {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	return dir
}

func (t tree) with(name string, data []byte) tree {
	c := maps.Clone(t)
	if c[name] = data; data == nil {
		delete(c, name)
	}
	return c
}

// tar returns the files as a stream, in the order of the names given or, without
// any, of their paths.
func (t tree) tar(names ...string) io.Reader {
	if len(names) == 0 {
		names = slices.Sorted(maps.Keys(t))
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, name := range names {
		w.WriteHeader(&tar.Header{Name: "./" + name, Mode: 0o600, Size: int64(len(t[name])), Uid: i, ModTime: time.Unix(int64(i), 0)})
		w.Write(t[name])
	}
	w.Close()
	return &b
}

// safetensors makes a file with a header and data bytes of data.
func safetensors(header string, data int) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	b = append(b, header...)
	body := make([]byte, data)
	rand.NewChaCha8([32]byte{byte(data)}).Read(body)
	return append(b, body...)
}

// shard makes a file with tensors of 1024 bytes.
func shard(names ...string) []byte {
	var parts []string
	for i, name := range names {
		parts = append(parts, fmt.Sprintf(`%q:{"dtype":"BF16","shape":[16,32],"data_offsets":[%d,%d]}`, name, i*1024, i*1024+1024))
	}
	return safetensors("{"+strings.Join(parts, ",")+"}", 1024*len(names))
}

func index(of map[string]string) []byte {
	b, _ := json.Marshal(map[string]any{"metadata": map[string]any{"total_size": 3072}, "weight_map": of})
	return b
}

// hub is a small model as a hub lays it out.
func hub() tree {
	return tree{
		"config.json":                      []byte(`{"architectures":["X"],"max_position_embeddings":4096,"rope":[1.5,-2e3,null,true]}`),
		"generation_config.json":           []byte(`{}`),
		"tokenizer.json":                   bytes.Repeat([]byte(`{"model":{}}`), 20000),
		"README.md":                        []byte("---\nlanguage: en\nlicense: apache-2.0\n---\n# X\n"),
		"model.safetensors.index.json":     index(map[string]string{"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}),
		"model-00001-of-00002.safetensors": shard("a", "b"),
		"model-00002-of-00002.safetensors": shard("c"),
		"sub/vocab.txt":                    []byte("x\n"),
		"empty.txt":                        {},
	}
}

// big has files of several groups, and one that ends a byte into a block.
func big() tree {
	t := hub()
	names := []string{}
	for i := range 3000 {
		names = append(names, fmt.Sprintf("t%d", i))
	}
	return t.with("model-00001-of-00002.safetensors", nil).with("model-00002-of-00002.safetensors", nil).
		with("model.safetensors.index.json", nil).with("model.safetensors", shard(names...)).
		with("blob.dat", bytes.Repeat([]byte{7, 6, 5}, 1<<20)).with("a/b/c.dat", bytes.Repeat([]byte{9}, 4097))
}

func packInto(tb testing.TB, src string, o PackOptions) (Info, []byte) {
	tb.Helper()
	info, err := Pack(context.Background(), src, o)
	if err != nil {
		tb.Fatal(err)
	}
	data, err := os.ReadFile(o.Out)
	if err != nil {
		tb.Fatal(err)
	}
	return info, data
}

// The same bytes from a folder, whatever its times and modes, from a tar stream in
// order, and from one in any order.
func TestPackHub(t *testing.T) {
	for name, files := range map[string]tree{"small": hub(), "big": big()} {
		t.Run(name, func(t *testing.T) {
			o := packOptions(t.TempDir())
			info, want := packInto(t, files.write(t), o)
			if info.Format != card.Safetensors || info.Entry != "" || info.ContextLength != 4096 || info.Licence != "apache-2.0" ||
				info.Quantisation != "BF16" || len(info.Files) != len(files) {
				t.Errorf("%+v", info.Card)
			}
			if got, err := Verify(context.Background(), o.Out, VerifyOptions{Full: true, RootHash: info.Disk.RootHash.String()}); err != nil || got.Ref() != info.Ref() {
				t.Errorf("%+v, %v", got, err)
			}
			var fragment Fragment
			raw, err := os.ReadFile(o.Out + disk.FragmentSuffix)
			if err == nil {
				err = json.Unmarshal(raw, &fragment)
			}
			if err != nil || fragment.Disk.RootHash != info.Disk.RootHash.String() || fragment.Disk.HashOffset != info.Disk.HashOffset || len(fragment.Files) != len(files) {
				t.Errorf("%s, %v", raw, err)
			}

			dir := files.write(t)
			filepath.WalkDir(dir, func(path string, d fs.DirEntry, _ error) error {
				os.Chtimes(path, time.Unix(1, 0), time.Unix(2, 0))
				return os.Chmod(path, 0o700)
			})
			names := slices.Collect(maps.Keys(files)) // in some order
			for what, from := range map[string]func(PackOptions) (string, PackOptions){
				"another folder": func(o PackOptions) (string, PackOptions) { return dir, o },
				"a tar stream":   func(o PackOptions) (string, PackOptions) { o.Stream = files.tar(); return "-", o },
				"another order":  func(o PackOptions) (string, PackOptions) { o.Stream = files.tar(names...); return "-", o },
				"another order, kept": func(o PackOptions) (string, PackOptions) {
					o.KeepPartial, o.Stream = true, files.tar(names...)
					return "-", o
				},
				"links": func(o PackOptions) (string, PackOptions) {
					files := files.with("config.json", nil).with(".real/config.json", files["config.json"])
					dir := files.write(t)
					if err := os.Symlink(".real/config.json", filepath.Join(dir, "config.json")); err != nil {
						t.Fatal(err)
					}
					return dir, o
				},
			} {
				src, o := from(packOptions(t.TempDir()))
				if _, got := packInto(t, src, o); !bytes.Equal(got, want) {
					t.Errorf("%s gives another disk", what)
				}
				left, _ := os.ReadDir(filepath.Dir(o.Out))
				if len(left) != 2 {
					t.Errorf("%s leaves %v", what, left)
				}
			}
		})
	}
}

func TestPackHubRefuses(t *testing.T) {
	h := hub()
	st := func(b []byte) tree { return h.with("model-00002-of-00002.safetensors", b) }
	cut := shard("c")
	part := func(no, of, tensors int, name string) []byte {
		return build(shape{tensors: []tensor{{name, []uint64{8}, 0, 0}}, data: 32, keys: func(g *gguf) uint64 {
			g.str("split.no").u32(typeUint16).u16(uint16(no))
			g.str("split.count").u32(typeUint16).u16(uint16(of))
			g.str("split.tensors.count").u32(typeInt32).u32(uint32(tensors))
			return 3
		}})
	}
	split := tree{"x-00001-of-00002.gguf": part(0, 2, 2, "a"), "x-00002-of-00002.gguf": part(1, 2, 2, "b")}
	o := packOptions(t.TempDir())
	if info, _ := packInto(t, split.write(t), o); info.Entry != "x-00001-of-00002.gguf" || info.Parameters != 16 {
		t.Errorf("a split model: %+v", info.Card)
	}

	for _, tt := range []struct {
		name string
		tree tree
		want error
		says string
	}{
		{"pickle", h.with("pytorch_model.bin", []byte("x")), ErrRefused, "pickle"},
		{"pickle .pt", h.with("sub/x.PT", []byte("x")), ErrRefused, "pickle"},
		{"pickle .pkl", h.with("x.pkl", []byte("x")), ErrRefused, "--allow x.pkl"},
		{"pickle .ckpt", h.with("x.ckpt", []byte("x")), ErrRefused, "pickle"},
		{"pickle by content", h.with("weights.dat", []byte("\x80\x04\x95")), ErrRefused, "pickle"},
		{"ZIP by content", h.with("weights.dat", []byte("PK\x03\x04")), ErrRefused, "ZIP"},
		{"Python", h.with("modeling_x.py", []byte("import os")), ErrRefused, "Python"},
		{"script", h.with("run.sh", []byte("rm")), ErrRefused, "script"},
		{"script by content", h.with("run", []byte("#!/bin/sh")), ErrRefused, "script"},
		{"program", h.with("tool", []byte("\x7fELF\x02")), ErrRefused, "program"},
		{"library", h.with("x.so", []byte("x")), ErrRefused, "library"},
		{"a card of its own", h.with("model.json", []byte("{}")), ErrRefused, "in the way"},
		{"a name that is not plain", h.with("a\"b", []byte("x")), ErrRefused, "file name"},
		{"no config", h.with("config.json", nil), ErrIncomplete, "config.json"},
		{"config is no JSON", h.with("config.json", []byte("{,}")), errJSON, "config.json"},
		{"config is cut", h.with("config.json", []byte(`{"a":`)), errJSON, "middle"},
		{"config nested for ever", h.with("config.json", []byte(strings.Repeat(`{"a":`, 100000))), errJSON, "nested"},
		{"no weights", tree{"config.json": []byte("{}")}, ErrIncomplete, "no *.gguf"},
		{"no index", h.with("model.safetensors.index.json", nil), ErrIncomplete, "index"},
		{"a shard is missing", st(nil), ErrIncomplete, "missing"},
		{"a shard is cut", st(cut[:len(cut)-1]), ErrNotSafetensors, "download"},
		{"a shard is cut in its header", st(cut[:20]), ErrNotSafetensors, "download"},
		{"a shard is empty", st([]byte{}), ErrNotSafetensors, "download"},
		{"a shard too many", h.with("consolidated.safetensors", shard("z")), ErrIncomplete, "--exclude"},
		{"a tensor in another shard", st(shard("c", "a")), ErrIncomplete, "tensor"},
		{"a tensor is missing", st(shard("d")), ErrIncomplete, `tensor "c"`},
		{"a tensor twice in the index", h.with("model.safetensors.index.json", []byte(`{"weight_map":{"a":"x","a":"y"}}`)), ErrNotSafetensors, "twice"},
		{"an empty index", h.with("model.safetensors.index.json", []byte(`{"weight_map":{}}`)), ErrNotSafetensors, "names no tensors"},
		{"both kinds", h.with("x.gguf", build(shape{})), ErrIncomplete, "both"},
		{"two GGUF models", tree{"a.gguf": build(shape{}), "b.gguf": build(shape{})}, ErrIncomplete, "whole model"},
		{"a part is missing", split.with("x-00002-of-00002.gguf", nil), ErrIncomplete, "1 of 2 parts"},
		{"the first part is missing", split.with("x-00001-of-00002.gguf", nil), ErrIncomplete, "part 1 of 2"},
		{"a part under another name", split.with("x-00002-of-00002.gguf", nil).with("y.gguf", part(1, 2, 2, "b")), ErrIncomplete, "name must end"},
		{"parts of two models", split.with("x-00002-of-00002.gguf", nil).with("y-00002-of-00002.gguf", part(1, 2, 2, "b")), ErrIncomplete, "different models"},
		{"a tensor in two parts", split.with("x-00002-of-00002.gguf", part(1, 2, 2, "a")), ErrIncomplete, "in both"},
		{"parts with too few tensors", tree{"x-00001-of-00002.gguf": part(0, 2, 3, "a"), "x-00002-of-00002.gguf": part(1, 2, 3, "b")}, ErrIncomplete, "2 tensors"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := packOptions(t.TempDir())
			for _, src := range []string{tt.tree.write(t), "-"} {
				o.Stream = tt.tree.tar()
				_, err := Pack(context.Background(), src, o)
				if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%s: got %v, expected one about %q", src, err, tt.says)
				}
				if left, _ := os.ReadDir(filepath.Dir(o.Out)); len(left) != 0 {
					t.Errorf("left behind: %v", left)
				}
			}
		})
	}
}

// What is refused for what it is can be allowed, or left out.
func TestPackAllows(t *testing.T) {
	files := hub().with("old/pytorch_model.bin", []byte("PK\x03\x04")).with("modeling.py", []byte("x")).with(".git/config", []byte("x"))
	o := packOptions(t.TempDir())
	var notes []string
	o.Note = func(s string) { notes = append(notes, s) }
	o.Exclude, o.Allow = []string{"old"}, []string{"*.py"}
	info, _ := packInto(t, files.write(t), o)
	var names []string
	for _, f := range info.Files {
		names = append(names, f.Path)
	}
	if slices.Contains(names, "old/pytorch_model.bin") || slices.Contains(names, ".git/config") || !slices.Contains(names, "modeling.py") {
		t.Errorf("packed %v", names)
	}
	if text := strings.Join(notes, "\n"); !strings.Contains(text, "left out: .git, old") {
		t.Errorf("notes: %s", text)
	}
}

func TestPackSpecialFiles(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret.txt")
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(path string) error{
		"link outside": func(path string) error { return os.Symlink(outside, path) },
		"link that climbs": func(path string) error {
			return os.Symlink("../"+filepath.Base(filepath.Dir(outside))+"/secret.txt", path)
		},
		"link to nothing":         func(path string) error { return os.Symlink("none", path) },
		"link to itself":          func(path string) error { return os.Symlink("x", path) },
		"link to a folder":        func(path string) error { return os.Symlink("sub", path) },
		"link to a folder around": func(path string) error { return os.Symlink(".", path) },
		"named pipe":              func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"socket": func(path string) error {
			fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer syscall.Close(fd)
			return syscall.Bind(fd, &syscall.SockaddrUnix{Name: path})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := hub().write(t)
			if err := make(filepath.Join(dir, "x")); err != nil {
				t.Fatal(err)
			}
			o := packOptions(t.TempDir())
			if _, err := Pack(context.Background(), dir, o); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "x is ") {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("tar", func(t *testing.T) {
		for name, h := range map[string]*tar.Header{
			"link":      {Name: "a", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
			"hard link": {Name: "a", Typeflag: tar.TypeLink, Linkname: "b"},
			"device":    {Name: "a", Typeflag: tar.TypeChar},
			"climbs":    {Name: "../a", Typeflag: tar.TypeReg},
			"absolute":  {Name: "/a", Typeflag: tar.TypeReg},
		} {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			w.WriteHeader(h)
			w.Close()
			o := packOptions(t.TempDir())
			o.Stream = &b
			if _, err := Pack(context.Background(), "-", o); !errors.Is(err, ErrRefused) {
				t.Errorf("%s: %v", name, err)
			}
		}
		o := packOptions(t.TempDir())
		whole, _ := io.ReadAll(hub().tar())
		o.Stream = bytes.NewReader(whole[:len(whole)/2])
		if _, err := Pack(context.Background(), "-", o); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a stream that is cut: %v", err)
		}
		twice := hub()
		o.Stream = twice.tar(append(slices.Sorted(maps.Keys(twice)), "config.json")...)
		if _, err := Pack(context.Background(), "-", o); err == nil || !strings.Contains(err.Error(), "twice") {
			t.Errorf("a file twice: %v", err)
		}
	})
}

// An interrupted run goes on where it was, wherever that is, and gives the same
// disk; after a change of the source it starts over.
func TestResume(t *testing.T) {
	files := big()
	_, want := packInto(t, files.write(t), packOptions(t.TempDir()))
	for _, at := range []int64{1, 1 << 20, 3 << 20, 6 << 20} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			dir, o := files.write(t), packOptions(t.TempDir())
			interrupt := func() {
				t.Helper()
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				o.Progress = func(step string, done, total int64) {
					if done >= at {
						cancel()
					}
				}
				if _, err := Pack(ctx, dir, o); !errors.Is(err, context.Canceled) {
					t.Fatal(err)
				}
			}
			interrupt()
			if left, _ := os.ReadDir(filepath.Dir(o.Out)); len(left) != 2 {
				t.Fatalf("left %v", left)
			}
			resumed := int64(0)
			o.Progress = func(step string, done, total int64) {
				if step == "resume" {
					resumed = done
				}
			}
			if _, got := packInto(t, dir, o); !bytes.Equal(got, want) {
				t.Error("another disk")
			}
			if resumed == 0 && at > 1<<20 {
				t.Error("it started over")
			}
			os.Remove(o.Out)

			interrupt()
			other := bytes.Clone(files["blob.dat"])
			other[5] ^= 1
			if err := os.WriteFile(filepath.Join(dir, "blob.dat"), other, 0o644); err != nil {
				t.Fatal(err)
			}
			_, fresh := packInto(t, files.with("blob.dat", other).write(t), packOptions(t.TempDir()))
			resumed = 0
			o.Progress = func(step string, done, total int64) {
				if step == "resume" {
					resumed = done
				}
			}
			if _, got := packInto(t, dir, o); !bytes.Equal(got, fresh) || resumed != 0 {
				t.Errorf("after a change: resumed at %d, or another disk", resumed)
			}
			os.Remove(o.Out)

			// What is left over is not trusted.
			interrupt()
			partial := filepath.Join(filepath.Dir(o.Out), ".model.disk.partial")
			for _, spoil := range []func() error{
				func() error { return os.WriteFile(partial+".json", []byte("{"), 0o644) },
				func() error {
					return os.WriteFile(partial+".json", []byte(`{"version":1,"plan":"x","chains":[{"file":-1}]}`), 0o644)
				},
				func() error { return os.Truncate(partial, 100) },
			} {
				if err := spoil(); err != nil {
					t.Fatal(err)
				}
				o.Progress = nil
				if _, got := packInto(t, dir, o); !bytes.Equal(got, fresh) {
					t.Error("another disk from a spoilt state")
				}
				os.Remove(o.Out)
				interrupt()
			}
		})
	}
}

func TestKeepPartial(t *testing.T) {
	for _, keep := range []bool{false, true} {
		files := big()
		dir, o := files.write(t), packOptions(t.TempDir())
		o.KeepPartial = keep
		o.Progress = func(step string, done, total int64) { os.Truncate(filepath.Join(dir, "model.safetensors"), 10) }
		if _, err := Pack(context.Background(), dir, o); err == nil {
			t.Fatal("packed")
		}
		if left, _ := os.ReadDir(filepath.Dir(o.Out)); (len(left) > 0) != keep {
			t.Errorf("keep %v left %v", keep, left)
		}
	}
}

// TestDiskFull packs onto a file system that is too small; it needs root.
func TestDiskFull(t *testing.T) {
	small := t.TempDir()
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	defer syscall.Unmount(small, 0)
	files := big()
	for _, src := range []string{files.write(t), "-"} {
		o := packOptions(small)
		o.Stream = files.tar()
		_, err := Pack(context.Background(), src, o)
		if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "make room") {
			t.Errorf("%v", err)
		}
		if left, _ := os.ReadDir(small); len(left) != 0 {
			t.Errorf("left %v", left)
		}
	}
}

// A flipped bit anywhere is found, and named.
func TestVerifyNames(t *testing.T) {
	files := big()
	o := packOptions(t.TempDir())
	info, whole := packInto(t, files.write(t), o)
	find := func(content []byte) int64 {
		at := bytes.Index(whole, content)
		if at < 0 {
			t.Fatal("not on the disk")
		}
		return int64(at)
	}
	for _, tt := range []struct {
		name string
		at   int64
		says string
	}{
		{"in the weights", find(files["model.safetensors"]) + 1<<20, "/model.safetensors: verify disk: disk is corrupt: data block"},
		{"in a small file", find(files["README.md"]), "/README.md: verify disk: disk is corrupt: data block"},
		{"behind a file's end", find(files["README.md"]) + int64(len(files["README.md"])), "data block"},
		{"in the card", find([]byte(`{"context_length"`)), "/model.json: "},
		{"in the inodes", info.Disk.DataOffset + int64(info.Disk.DataBlocks-5)*4096, "data block"},
		{"in the superblock", info.Disk.DataOffset + 1024, "file system's own"},
		{"in the tree", info.Disk.HashOffset + 2*4096, "hash block"},
	} {
		bad := filepath.Join(t.TempDir(), "bad.disk")
		data := bytes.Clone(whole)
		data[tt.at] ^= 1
		if err := os.WriteFile(bad, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Verify(context.Background(), bad, VerifyOptions{Full: true})
		if !errors.Is(err, verity.ErrCorrupt) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, expected %q", tt.name, err, tt.says)
		}
	}
	if _, err := Verify(context.Background(), o.Out, VerifyOptions{RootHash: strings.Repeat("0", 64)}); err == nil || !strings.Contains(err.Error(), "another disk") {
		t.Errorf("another root hash: %v", err)
	}
}

func TestDiffAndList(t *testing.T) {
	dir := t.TempDir()
	files := hub()
	a := packOptions(dir)
	a.Out = filepath.Join(dir, "a.disk")
	one, _ := packInto(t, files.write(t), a)
	b := a
	b.Out, b.Revision = filepath.Join(dir, "b.disk"), "v2"
	two, _ := packInto(t, files.with("sub/vocab.txt", nil).with("new.txt", []byte("n")).
		with("README.md", []byte("---\nlicense: mit\n---\nxxxxxxxxxxxxxxxxxxxxxx")).with("generation_config.json", []byte(`[]`)).write(t), b)
	got := strings.Join(Diff(one, two), "\n")
	for _, want := range []string{"revision: v1 → v2", "licence: apache-2.0 → mit", "sub/vocab.txt: removed", "new.txt: added, 1 bytes",
		"generation_config.json: other content of the same size", "README.md: "} {
		if !strings.Contains(got, want) {
			t.Errorf("diff lacks %q:\n%s", want, got)
		}
	}
	if d := Diff(one, one); len(d) != 0 {
		t.Errorf("a disk differs from itself: %v", d)
	}
	os.WriteFile(filepath.Join(dir, "other.disk"), []byte("x"), 0o600)
	list, err := List(dir)
	if err != nil || len(list) != 2 || list[0].Info.Ref() != one.Ref() || list[1].Info.Ref() != two.Ref() {
		t.Errorf("%+v, %v", list, err)
	}
}

// A disk of 1 TiB is described in the time and memory of a small one.
func TestInspectHuge(t *testing.T) {
	const size = 1 << 40
	c := &card.Card{
		Version: card.Version, Name: "huge/model", Revision: "1", Format: card.GGUF, Entry: GGUFName,
		Files: []card.File{{Path: GGUFName, Size: size, SHA256: strings.Repeat("0", 64)}},
	}
	data, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "huge.disk")
	d, err := disk.WriteSparse(path, GGUFName, size, card.Path, data)
	if err != nil {
		t.Skipf("no sparse file of 1 TiB here: %v", err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	info, err := Inspect(path)
	runtime.ReadMemStats(&after)
	if err != nil || info.Disk.RootHash != d.RootHash || info.Size() != size {
		t.Errorf("%+v, %v", info, err)
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 4<<20 {
		t.Errorf("it took %d bytes", grown)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := verity.FindPartitions(f, d.Size, d.RootHash, d.DataBlocks); err != nil {
		t.Error(err)
	}
}
