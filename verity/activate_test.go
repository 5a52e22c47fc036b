//go:build linux && inside

package verity_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// TestActivate overwrites the two disks of 8 MiB or more that
// CHRYSALIS_SCRATCH_DISKS names, as /dev/a:/dev/b. It needs root, device-mapper
// with dm-verity, and erofs; ci/vmtest.TestInside runs it in a VM.
func TestActivate(t *testing.T) {
	disks := filepath.SplitList(os.Getenv("CHRYSALIS_SCRATCH_DISKS"))
	if len(disks) != 2 {
		t.Fatalf("the scratch disks are %q, expected two in CHRYSALIS_SCRATCH_DISKS", disks)
	}
	content := bytes.Repeat([]byte("chrysalis"), 100_000)
	path := filepath.Join(t.TempDir(), "disk")
	d, err := disk.PackTree(context.Background(), fstest.MapFS{"dir/file": {Data: content, Mode: 0o444}}, path, disk.Options{Salt: []byte("salt")})
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p := verity.Params{RootHash: d.RootHash, Salt: d.Salt, DataBlocks: d.DataBlocks}

	// put writes an image to a scratch disk, with one bit flipped at each of
	// the given bytes.
	put := func(t *testing.T, dev string, image []byte, flip ...int64) {
		t.Helper()
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			t.Fatal(err)
		}
		b := append(bytes.Clone(image), make([]byte, size-int64(len(image)))...)
		for _, at := range flip {
			b[at] ^= 1
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	closeDevice := func(t *testing.T, dev *verity.Device) {
		t.Helper()
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}
	corrupted := func(t *testing.T, dev *verity.Device, want bool) {
		t.Helper()
		if got, err := dev.Corrupted(); got != want || err != nil {
			t.Errorf("Corrupted: %v, %v; want %v", got, err, want)
		}
	}
	readAll := func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		got, err := io.ReadAll(f)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, good[d.DataOffset:][:d.DataBlocks*verity.BlockSize]) {
			return errors.New("other data than was written")
		}
		return nil
	}

	t.Run("good disk", func(t *testing.T) {
		put(t, disks[0], nil)
		put(t, disks[1], good)
		dev, err := p.Find("good", disks)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("active at %s", dev.Path)
		if err := readAll(dev.Path); err != nil {
			t.Error(err)
		}
		// The kernel may let a read-only device be opened for writing, but
		// not be written to.
		if f, err := os.OpenFile(dev.Path, os.O_RDWR, 0); err == nil {
			_, err = f.WriteAt(make([]byte, verity.BlockSize), 0)
			if err = errors.Join(err, f.Sync()); err == nil {
				t.Error("written to")
			}
			f.Close()
		}
		mnt := t.TempDir()
		if err := unix.Mount(dev.Path, mnt, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(mnt, "dir/file")); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if err := dev.Close(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("closed while mounted: %v", err)
		}
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
		corrupted(t, dev, false)
		closeDevice(t, dev)
		if left, _ := os.ReadDir("/sys/class/block"); strings.Contains(names(left), "dm-") {
			t.Errorf("left: %s", names(left))
		}
	})

	t.Run("nowhere", func(t *testing.T) {
		other := p
		other.RootHash[0] ^= 1
		if _, err := other.Find("nowhere", disks); !errors.Is(err, verity.ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if _, err := p.Find("missing", []string{"/dev/none", "/dev/null", path}); !errors.Is(err, verity.ErrNotFound) {
			t.Errorf("got %v", err)
		}
	})

	t.Run("one bad candidate, one good", func(t *testing.T) {
		put(t, disks[0], good, d.DataOffset)
		dev, err := p.Find("second", disks)
		if err != nil {
			t.Fatal(err)
		}
		if err := readAll(dev.Path); err != nil {
			t.Error(err)
		}
		corrupted(t, dev, false)
		closeDevice(t, dev)
	})

	t.Run("only bad candidates", func(t *testing.T) {
		put(t, disks[0], good, d.DataOffset)
		put(t, disks[1], good, d.HashOffset+verity.BlockSize)
		if _, err := p.Find("bad", disks); !errors.Is(err, verity.ErrCorrupt) {
			t.Errorf("got %v", err)
		} else {
			t.Log(err)
		}
	})

	t.Run("another salt or size", func(t *testing.T) {
		put(t, disks[0], nil)
		put(t, disks[1], good)
		salt, one := p, p
		salt.Salt = []byte("pepper")
		one.DataBlocks = 100 // the tree over 100 blocks has one level, not two
		long := p
		long.DataBlocks++
		unsalted := verity.Params{RootHash: p.RootHash, DataBlocks: p.DataBlocks}
		for what, q := range map[string]verity.Params{"salt": salt, "no salt": unsalted, "one level": one, "too large": long} {
			if _, err := q.Find("other", disks); !errors.Is(err, verity.ErrCorrupt) {
				t.Errorf("%s: got %v", what, err)
			}
		}
	})

	t.Run("superblock is not looked at", func(t *testing.T) {
		put(t, disks[1], good, d.HashOffset, d.HashOffset+8, d.HashOffset+80, d.HashOffset+100)
		dev, err := p.Find("super", disks)
		if err != nil {
			t.Fatal(err)
		}
		if err := readAll(dev.Path); err != nil {
			t.Error(err)
		}
		closeDevice(t, dev)
	})

	t.Run("corruption is told", func(t *testing.T) {
		put(t, disks[1], good, d.DataOffset+100*verity.BlockSize+17)
		dev, err := p.Find("watched", disks)
		if err != nil {
			t.Fatal(err)
		}
		defer closeDevice(t, dev)
		corrupted(t, dev, false)

		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		if _, err := verity.Watch(ctx, []*verity.Device{dev}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("watch of a good device: %v", err)
		}
		cancel()

		found, done := make(chan *verity.Device, 1), make(chan error, 1)
		go func() {
			d, err := verity.Watch(context.Background(), []*verity.Device{dev})
			done <- err
			found <- d
		}()
		time.Sleep(200 * time.Millisecond)
		start := time.Now()
		if err := readAll(dev.Path); !errors.Is(err, unix.EIO) {
			t.Errorf("read of a corrupt block: %v", err)
		}
		select {
		case got := <-found:
			t.Logf("told after %v", time.Since(start))
			if got != dev || time.Since(start) > 4*time.Second { // without an event it looks every 5 s
				t.Errorf("told of %v after %v: not woken by the uevent", got, time.Since(start))
			}
		case <-time.After(20 * time.Second):
			t.Fatal("not told")
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		corrupted(t, dev, true)
		// Already corrupt when the watch begins.
		if got, err := verity.Watch(context.Background(), []*verity.Device{dev}); err != nil || got != dev {
			t.Errorf("second watch: %v, %v", got, err)
		}
	})

	t.Run("name is taken", func(t *testing.T) {
		put(t, disks[1], good)
		dev, err := p.Find("taken", disks)
		if err != nil {
			t.Fatal(err)
		}
		defer closeDevice(t, dev)
		if _, err := p.Find("taken", disks); !errors.Is(err, unix.EBUSY) || errors.Is(err, verity.ErrCorrupt) || errors.Is(err, verity.ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if err := readAll(dev.Path); err != nil {
			t.Errorf("the first device afterwards: %v", err)
		}
	})

	t.Run("names", func(t *testing.T) {
		for _, name := range []string{"", "a/b", "a b", strings.Repeat("x", 65)} {
			if _, err := p.Activate(name, disks[1]); err == nil || errors.Is(err, verity.ErrNotFound) {
				t.Errorf("%q: got %v", name, err)
			}
		}
		if _, err := p.Activate("file", path); err == nil || !strings.Contains(err.Error(), "block device") {
			t.Errorf("ordinary file: got %v", err)
		}
	})
}

func names(list []fs.DirEntry) string {
	var b strings.Builder
	for _, e := range list {
		b.WriteString(e.Name() + " ")
	}
	return b.String()
}
