package toolsroot_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"chrysalis/image/toolsroot"
)

// smallRoot makes a sealed root of some entries.
func smallRoot(t *testing.T) *toolsroot.Root {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "root")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "usr", "bin"), 0o755),
		os.WriteFile(filepath.Join(dir, "usr", "bin", "a b"), []byte("x"), 0o644),
		os.Chmod(filepath.Join(dir, "usr", "bin", "a b"), 0o755|os.ModeSetuid),
		os.Symlink("usr/bin", filepath.Join(dir, "bin")),
		toolsroot.Seal(t.Context(), dir),
	); err != nil {
		t.Fatal(err)
	}
	return &toolsroot.Root{Dir: dir}
}

func TestList(t *testing.T) {
	const want = `link 0777 "usr/bin" "bin"
folder 0755 - "usr"
folder 0755 - "usr/bin"
file 4755 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881 "usr/bin/a b"
`
	list, err := smallRoot(t).List(t.Context())
	if err != nil || string(list) != want {
		t.Errorf("%v\n%s\nexpected\n%s", err, list, want)
	}
}

func TestVerify(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(dir string) error
		same   bool
	}{
		{"as made", func(string) error { return nil }, true},
		{"a time", func(dir string) error { return os.Chtimes(filepath.Join(dir, "usr"), t0, t0) }, true},
		{"content", func(dir string) error { return os.WriteFile(filepath.Join(dir, "usr/bin/a b"), []byte("y"), 0o755) }, false},
		{"mode", func(dir string) error { return os.Chmod(filepath.Join(dir, "usr/bin/a b"), 0o755) }, false},
		{"one more", func(dir string) error { return os.WriteFile(filepath.Join(dir, "usr/bin/c"), nil, 0o755) }, false},
		{"one less", func(dir string) error { return os.Remove(filepath.Join(dir, "usr/bin/a b")) }, false},
		{"a link's target", func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "bin")), os.Symlink("usr/sbin", filepath.Join(dir, "bin")))
		}, false},
		{"a seal of an older program", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, ".chrysalis-complete"), nil, 0o644)
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := smallRoot(t)
			if err := c.change(root.Dir); err != nil {
				t.Fatal(err)
			}
			err := root.Verify(t.Context())
			if c.same && err != nil || !c.same && (!errors.Is(err, toolsroot.ErrDamaged) || !strings.Contains(err.Error(), root.Dir)) {
				t.Errorf("it says %v", err)
			}
		})
	}
	t.Run("a pipe", func(t *testing.T) {
		root := smallRoot(t)
		if err := mkfifo(filepath.Join(root.Dir, "usr/pipe")); err != nil {
			t.Fatal(err)
		}
		if err := root.Verify(t.Context()); err == nil || !strings.Contains(err.Error(), "usr/pipe is neither") {
			t.Errorf("it says %v", err)
		}
	})
}

var t0 = time.Unix(1, 0)

func mkfifo(path string) error { return syscall.Mkfifo(path, 0o644) }
