package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	"chrysalis/verity"
	"chrysalis/verity/sha256x2"
)

// TestHashes computes the root hash and the files' SHA-256 once more, one hash after
// the other: of files that end at, before and behind the ends of blocks and groups,
// one of them long enough to begin a run of its own.
func TestHashes(t *testing.T) {
	random := rand.NewChaCha8([32]byte{3})
	files := fstest.MapFS{}
	for name, size := range map[string]int{
		"a": 3*groupSize - 4096, "b": groupSize, "c": groupSize - 1, "d": 2*groupSize + 1, "e": 63, "f": 4096, "g": 0,
		"h": bigFile + 12345, "i": 5*groupSize + 777,
	} {
		data := make([]byte, size)
		random.Read(data)
		files[name] = &fstest.MapFile{Data: data, Mode: 0o444}
	}
	var sums map[string][32]byte
	o := Options{Salt: testSalt, Late: &Late{
		Path: "late", Mode: 0o444,
		Size:    func() (int64, error) { return 5, nil },
		Content: func(s map[string][32]byte) ([]byte, error) { sums = s; return []byte("later"), nil },
	}}
	out := filepath.Join(t.TempDir(), "disk")
	d, err := PackTree(context.Background(), files, out, o)
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range files {
		if sums[name] != sha256.Sum256(f.Data) {
			t.Errorf("%s has another SHA-256", name)
		}
	}
	raw, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	level := raw[d.DataOffset:][:d.DataBlocks*verity.BlockSize]
	for len(level) > verity.BlockSize {
		var above []byte
		for ; len(level) > 0; level = level[verity.BlockSize:] {
			sum := sha256.Sum256(append(testSalt[:len(testSalt):len(testSalt)], level[:verity.BlockSize]...))
			above = append(above, sum[:]...)
		}
		level = append(above, make([]byte, -len(above)&(verity.BlockSize-1))...)
	}
	if root := sha256.Sum256(append(testSalt[:len(testSalt):len(testSalt)], level...)); d.RootHash != root {
		t.Errorf("root hash %s, want %x", d.RootHash, root)
	}
}

type brokenWriter struct{}

func (brokenWriter) WriteAt([]byte, int64) (int, error) { return 0, fs.ErrPermission }

// A chain does not pass a group whose leaf was not written: the journal would have
// it that all is there.
func TestChainStopsWithoutLeaf(t *testing.T) {
	if !sha256x2.Fast() {
		t.Skip("the chain makes no leaves on this processor")
	}
	p := &packer{leaves: brokenWriter{}, free: make(chan *group, 1)}
	c := newChain(0, 1)
	g := &group{buf: make([]byte, groupSize), users: 1}
	s := segment{node: &node{chain: c}, hi: groupSize}
	g.segs = []segment{s}
	if err := c.deliver(p, g, s, newHasher(nil)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("got %v", err)
	}
	if c.finished(0) {
		t.Error("passed")
	}
	if len(p.free) != 1 {
		t.Error("the group is lost")
	}
}

// BenchmarkWriteTree is package verity's, as programs that make disks have it.
func BenchmarkWriteTree(b *testing.B) {
	const size = 256 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	b.SetBytes(size)
	for b.Loop() {
		if _, err := verity.WriteTree(context.Background(), nowhere{}, bytes.NewReader(data), size, verity.TreeOptions{Salt: make([]byte, 32)}); err != nil {
			b.Fatal(err)
		}
	}
}

type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
