package outfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("new")
	if got := names(t, dir); len(got) != 1 || got[0] == "x" {
		t.Errorf("while it is written: %v", got)
	}
	if err := f.Commit(0o640, false); err != nil {
		t.Fatal(err)
	}
	f.Discard()
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o640 || info.Size() != 3 || len(names(t, dir)) != 1 {
		t.Errorf("%v, %v, %v", info, err, names(t, dir))
	}

	// A taken name stays as it is, unless it is to be replaced.
	if f, err = Create(path); err != nil {
		t.Fatal(err)
	}
	if err := f.Commit(0o600, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a taken name: %v", err)
	}
	f.Discard()
	if err := Write(path, []byte("newer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(path); string(data) != "newer" || len(names(t, dir)) != 1 {
		t.Errorf("%q, %v", data, names(t, dir))
	}
	// A folder in its place is not replaced, and nothing is left.
	if err := Write(dir, nil, 0o600); err == nil {
		t.Error("a folder was replaced")
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), "."+filepath.Base(dir)+".*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What a killed writer left goes; what somebody writes, and what only looks like it,
// stays.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	keep := []string{".x.12a", ".x.partial", ".y.1", "x.1"}
	for _, name := range append([]string{".x.1", ".x.999"}, keep...) {
		os.WriteFile(filepath.Join(dir, name), nil, 0o600)
	}
	os.Mkdir(filepath.Join(dir, ".x.5"), 0o700)
	os.Symlink(".y.1", filepath.Join(dir, ".x.6"))
	live, err := Create(filepath.Join(dir, "x"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Discard()
	if err := Write(filepath.Join(dir, "x"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := append([]string{"x", ".x.5", ".x.6", filepath.Base(live.Name())}, keep...)
	slices.Sort(want)
	if got := names(t, dir); !slices.Equal(got, want) {
		t.Errorf("%v, expected %v", got, want)
	}
	if err := live.Commit(0o600, true); err != nil {
		t.Error(err)
	}
}

// Many writers of one name: each has its file, and the last one counts.
func TestTogether(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				if err := Write(filepath.Join(dir, "x"), []byte("whole"), 0o600); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	if data, err := os.ReadFile(filepath.Join(dir, "x")); string(data) != "whole" || err != nil || len(names(t, dir)) != 1 {
		t.Errorf("%q, %v, %v", data, err, names(t, dir))
	}
}

// A full file system leaves nothing, under no name.
func TestNoRoom(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("a small file system cannot be mounted: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := Write(filepath.Join(dir, "x"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v", err)
	}
	if got := names(t, dir); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
}

// A lock is one process's, or one file's, at a time, and free once that is closed.
func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(path); !errors.Is(err, ErrLocked) {
		t.Error(err)
	}
	f.Close()
	if f, err = Lock(path); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := Lock(filepath.Join(path, "lock")); err == nil || errors.Is(err, ErrLocked) {
		t.Errorf("a file for a folder: %v", err)
	}
}

// Read takes files up to a size, and waits for no pipe.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if _, err := Read(path, 3); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := Read(path, 3); err != nil || string(data) != "abc" {
		t.Errorf("%q, %v", data, err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{dir, pipe} {
		if _, err := Read(bad, 3); !errors.Is(err, ErrNoFile) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := Read(path, 2); !errors.Is(err, ErrNoFile) {
		t.Error(err)
	}
}
