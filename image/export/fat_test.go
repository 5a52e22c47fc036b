package export

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/image/imagetest"
	"chrysalis/verity/gpt"
)

// TestFAT has dosfstools and mtools read file systems for files of all sizes
// that make a difference to the layout.
func TestFAT(t *testing.T) {
	imagetest.Tools(t)
	for _, size := range []int64{1, 511, 512, 513, 40 << 20, 256 << 20, 256<<20 + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			f, err := newFAT(size)
			if err != nil {
				t.Fatal(err)
			}
			if f.size()%gpt.Alignment != 0 || f.clusters < fatMinimum {
				t.Errorf("%d bytes, %d clusters", f.size(), f.clusters)
			}
			dir := t.TempDir()
			path := filepath.Join(dir, "esp")
			disk, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer disk.Close()
			_, err = disk.WriteAt(f.head(1<<20, 0x12345678), 0)
			if err == nil { // the last byte tells whether the chain reaches it
				_, err = disk.WriteAt([]byte{'!'}, f.fileOffset()+size-1)
			}
			if err == nil {
				err = disk.Truncate(f.size())
			}
			if err != nil {
				t.Fatal(err)
			}
			out, err := imagetest.Command(t, dir, "fsck.fat", "-n", "-v", path).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "5 files") || strings.Contains(string(out), "ifferences") {
				t.Errorf("fsck.fat: %v: %s", err, out)
			}
			if out, err := imagetest.Command(t, dir, "mcopy", "-i", path, "::/EFI/BOOT/BOOTX64.EFI", filepath.Join(dir, "file")).CombinedOutput(); err != nil {
				t.Fatalf("mcopy: %v: %s", err, out)
			}
			got, err := os.Open(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			defer got.Close()
			info, err := got.Stat()
			if err != nil || info.Size() != size {
				t.Fatalf("the file has %d bytes, %v", info.Size(), err)
			}
			last := make([]byte, 1)
			if _, err := got.ReadAt(last, size-1); err != nil || last[0] != '!' {
				t.Errorf("its last byte is %q, %v", last, err)
			}
		})
	}
	for _, size := range []int64{-1, 0, math.MaxUint32 + 1} {
		if _, err := newFAT(size); err == nil {
			t.Errorf("laid out a file of %d bytes", size)
		}
	}
	f, err := newFAT(100)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.head(0, 1), f.head(0, 1)) {
		t.Error("two of the same differ")
	}
}
