package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	"chrysalis/image/imagetest"
	"chrysalis/verity"
)

var testSalt = []byte("disk_test")

// sampleTree has what the EROFS writer treats differently: empty, inline and
// block-sized files, a directory of many blocks, links, nesting, modes.
func sampleTree() fstest.MapFS {
	m := fstest.MapFS{
		"etc/empty":           {Mode: 0o600},
		"etc/short":           {Data: []byte("short\n"), Mode: 0o644},
		"etc/link":            {Data: []byte("../usr/bin/tool"), Mode: fs.ModeSymlink | 0o777},
		"usr/bin/tool":        {Data: bytes.Repeat([]byte{1, 2, 3}, 50000), Mode: 0o755 | fs.ModeSetuid},
		"usr/one-block":       {Data: bytes.Repeat([]byte{7}, 4096), Mode: 0o444},
		"usr/nearly-a-block":  {Data: bytes.Repeat([]byte{8}, 4090), Mode: 0o444},
		"usr/block-and-a-bit": {Data: bytes.Repeat([]byte{9}, 4097), Mode: 0o444},
		"var/empty":           {Mode: fs.ModeDir | 0o700},
		"long":                {Data: bytes.Repeat([]byte{4}, 1<<20+11), Mode: 0o400},
	}
	for i := range 1500 {
		m[fmt.Sprintf("many/file-%04d", i)] = &fstest.MapFile{Data: bytes.Repeat([]byte{byte(i)}, i*3), Mode: 0o444}
	}
	return m
}

func packSample(t testing.TB, dir string) (string, verity.Description) {
	out := filepath.Join(dir, "disk")
	d, err := PackTree(context.Background(), sampleTree(), out, Options{Salt: testSalt})
	if err != nil {
		t.Fatal(err)
	}
	return out, d
}

func TestPackTree(t *testing.T) {
	path, d := packSample(t, t.TempDir())
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := verity.VerifyDisk(context.Background(), f, d.Size, nil); err != nil {
		t.Fatal(err)
	}
	got, fsys, err := OpenTree(f, d.Size)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(d) {
		t.Fatalf("%+v, %v", got, err)
	}
	want := sampleTree()
	for name, w := range want {
		info, err := fs.Lstat(fsys, name)
		if err != nil {
			t.Fatal(err)
		}
		if got, m := info.Mode().Type()|info.Mode().Perm(), w.Mode.Type()|w.Mode.Perm(); got != m {
			t.Errorf("%s: mode %v, want %v", name, got, m)
		}
		if info.ModTime().Unix() != 0 {
			t.Errorf("%s: time %v", name, info.ModTime())
		}
		if w.Mode.IsRegular() {
			if b, err := fs.ReadFile(fsys, name); err != nil || !bytes.Equal(b, w.Data) {
				t.Errorf("%s: %d bytes, %v", name, len(b), err)
			}
		}
	}
	if st, err := os.Stat(path); err != nil || st.Size() != d.Size {
		t.Errorf("disk of %d bytes described as %d (%v)", st.Size(), d.Size, err)
	}
}

// The root hash of sampleTree: a change of it changes every model's root hash
// for the same input and so needs a new name for the format.
const sampleRoot = "b00db4f74dd5abdf755e19ddd85b30772099a988fec3ef2a1bf6aa75447d1f6b"

func TestPackTreeIsReproducible(t *testing.T) {
	one, d1 := packSample(t, t.TempDir())
	// The same tree out of real files, of another time and owner's umask.
	dir := t.TempDir()
	if err := os.CopyFS(dir, sampleTree()); err != nil {
		t.Fatal(err)
	}
	err := fs.WalkDir(sampleTree(), ".", func(name string, e fs.DirEntry, _ error) error {
		info, err := e.Info()
		if err != nil || info.Mode()&fs.ModeSymlink != 0 {
			return err
		}
		return os.Chmod(filepath.Join(dir, name), info.Mode().Perm())
	})
	if err != nil {
		t.Fatal(err)
	}
	two := filepath.Join(t.TempDir(), "disk")
	d2, err := PackTree(context.Background(), os.DirFS(dir), two, Options{Salt: testSalt})
	if err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(one)
	b, _ := os.ReadFile(two)
	if d1.RootHash != d2.RootHash || !bytes.Equal(a, b) {
		t.Errorf("two disks of one tree differ: %s, %s", d1.RootHash, d2.RootHash)
	}
	if d1.RootHash.String() != sampleRoot {
		t.Errorf("root hash %s, was %s", d1.RootHash, sampleRoot)
	}
}

// TestThroughThePageCache packs where a file cannot be written past the page cache,
// and where the host's file system decides that.
func TestThroughThePageCache(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "chrysalis-test-")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	memory, _ := packSample(t, dir)
	out, _ := packSample(t, t.TempDir())
	f, err := openOutput(filepath.Join(dir, "direct"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if f.direct != nil {
		t.Error("a file in memory is written past the page cache")
	}
	if err := f.discard(); err != nil {
		t.Error(err)
	}
	a, _ := os.ReadFile(memory)
	b, _ := os.ReadFile(out)
	if len(a) == 0 || !bytes.Equal(a, b) {
		t.Errorf("two disks of one tree differ, of %d and %d bytes", len(a), len(b))
	}
}

// TestErofsUtils has erofs-utils read the image: they share no code with the
// writer.
func TestErofsUtils(t *testing.T) {
	imagetest.Tools(t)
	dir := t.TempDir()
	path, d := packSample(t, dir)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, whole[d.DataOffset:][:d.DataBlocks*verity.BlockSize], 0o600); err != nil {
		t.Fatal(err)
	}
	extracted := filepath.Join(dir, "extracted")
	out, err := imagetest.Command(t, dir, "fsck.erofs", "--extract="+extracted, image).CombinedOutput()
	if err != nil {
		t.Fatalf("fsck.erofs: %v: %s", err, out)
	}
	for name, w := range sampleTree() {
		if !w.Mode.IsRegular() {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(extracted, name)); err != nil || !bytes.Equal(b, w.Data) {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
	if link, err := os.Readlink(filepath.Join(extracted, "etc/link")); link != "../usr/bin/tool" {
		t.Errorf("link to %q, %v", link, err)
	}
}

// shrinking pretends to files longer than they are.
type shrinking struct{ fs.FS }

func (s shrinking) Lstat(name string) (fs.FileInfo, error) {
	info, err := fs.Stat(s.FS, name)
	return longer{info}, err
}
func (s shrinking) ReadLink(string) (string, error) { return "", fs.ErrInvalid }

func (s shrinking) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := fs.ReadDir(s.FS, name)
	for i, e := range list {
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		list[i] = fs.FileInfoToDirEntry(longer{info})
	}
	return list, err
}

type longer struct{ fs.FileInfo }

func (l longer) Size() int64 { return l.FileInfo.Size() + 1 }

func TestPackTreeRefuses(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context
		fsys fs.FS
		out  string
		want error
	}{
		{name: "existing output", out: "taken", want: fs.ErrExist},
		{name: "no such directory", out: "none/disk", want: fs.ErrNotExist},
		{name: "directory is a file", out: "taken/disk"},
		{name: "cancelled", ctx: cancelled, want: context.Canceled},
		{name: "device", fsys: fstest.MapFS{"dev/null": {Mode: fs.ModeDevice | fs.ModeCharDevice}}},
		{name: "fifo", fsys: fstest.MapFS{"fifo": {Mode: fs.ModeNamedPipe}}},
		{name: "short file becomes shorter", fsys: shrinking{fstest.MapFS{"a": {Data: []byte("a")}}}, want: io.ErrUnexpectedEOF},
		{name: "long file becomes shorter", fsys: shrinking{fstest.MapFS{"a": {Data: make([]byte, 1<<20)}}}, want: io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "taken"), []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
			if tt.ctx == nil {
				tt.ctx = context.Background()
			}
			if tt.fsys == nil {
				tt.fsys = sampleTree()
			}
			if tt.out == "" {
				tt.out = "disk"
			}
			_, err := PackTree(tt.ctx, tt.fsys, filepath.Join(dir, tt.out), Options{})
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			left, _ := os.ReadDir(dir)
			if b, _ := os.ReadFile(filepath.Join(dir, "taken")); len(left) != 1 || string(b) != "mine" {
				t.Errorf("left behind: %v, %q", left, b)
			}
		})
	}
}

func TestPackTreeCancelledHalfway(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	_, err := PackTree(ctx, sampleTree(), filepath.Join(dir, "disk"), Options{Progress: func(s string, done, total int64) {
		if done > total/4 {
			cancel()
		}
	}})
	left, _ := os.ReadDir(dir)
	if !errors.Is(err, context.Canceled) || len(left) != 0 {
		t.Errorf("cancelled: %v, left %v", err, left)
	}
}

// TestOutputWithoutTmpfile is for file systems that lack O_TMPFILE.
func TestOutputWithoutTmpfile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	open := func() *output {
		f, err := os.CreateTemp(dir, ".out.*")
		if err != nil {
			t.Fatal(err)
		}
		return &output{File: f, path: path, temp: f.Name()}
	}
	first, second := open(), open()
	for _, o := range []*output{first, second} {
		if _, err := o.WriteString("whole"); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(first.commit(), first.discard()); err != nil {
		t.Fatal(err)
	}
	if err := second.commit(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second commit: %v", err)
	}
	if err := second.discard(); err != nil {
		t.Error(err)
	}
	left, _ := os.ReadDir(dir)
	if b, _ := os.ReadFile(path); len(left) != 1 || string(b) != "whole" {
		t.Errorf("left %v, %q", left, b)
	}
}

// FuzzOpenTree changes the image on a disk as a hostile one would be, and
// walks it as Inspect does. Only the absence of panics and of endless work is
// checked.
func FuzzOpenTree(f *testing.F) {
	small := fstest.MapFS{
		"model.gguf": {Data: bytes.Repeat([]byte{1}, 9000), Mode: 0o444},
		"model.json": {Data: []byte("{}"), Mode: 0o444},
		"dir/link":   {Data: []byte("../model.json"), Mode: fs.ModeSymlink},
	}
	path := filepath.Join(f.TempDir(), "disk")
	d, err := PackTree(context.Background(), small, path, Options{})
	if err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	image := whole[d.DataOffset:][:d.DataBlocks*verity.BlockSize]
	meta := bytes.Index(image, []byte("model.json")) / verity.BlockSize * verity.BlockSize
	f.Add(image[1024:1152], image[meta:meta+512])
	f.Fuzz(func(t *testing.T, super, inodes []byte) {
		disk := bytes.Clone(whole)
		copy(disk[d.DataOffset+1024:d.DataOffset+verity.BlockSize], super)
		copy(disk[d.DataOffset+int64(meta):d.HashOffset], inodes)
		_, fsys, err := OpenTree(bytes.NewReader(disk), d.Size)
		if err != nil {
			return
		}
		for _, name := range []string{"model.gguf", "model.json", "dir/link"} {
			if file, err := fsys.Open(name); err == nil {
				io.Copy(io.Discard, io.LimitReader(file, 4097))
				file.Close()
			}
		}
	})
}
