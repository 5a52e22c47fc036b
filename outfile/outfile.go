// Package outfile writes files that appear under their name only when they are
// whole and on disk, whatever happens to the process or the machine meanwhile.
//
// While it is written, a file is beside its place and has a hidden name,
// ".NAME.DIGITS". Its writer holds a lock on it, which the kernel drops with the
// process: one whose lock is free is what a killed process left, and goes when the
// next one writes a file of that name. Files that one process keeps open and adds to are
// locked and read here, too.
package outfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A File is one that is being written.
type File struct {
	*os.File
	path string
	temp string // "" once it has its name
}

// Create begins a file that is to be at path. Its mode is 0600 until Commit.
func Create(path string) (*File, error) {
	dir, prefix := filepath.Dir(path), "."+filepath.Base(path)+"."
	sweep(dir, prefix)
	for {
		f, err := os.CreateTemp(dir, prefix+"*")
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			own, err := f.Stat()
			if there, e := os.Lstat(f.Name()); err == nil && e == nil && os.SameFile(own, there) {
				return &File{File: f, path: path, temp: f.Name()}, nil
			}
		} else if !errors.Is(err, unix.EWOULDBLOCK) {
			// A file system without locks: nobody sweeps there either.
			return &File{File: f, path: path, temp: f.Name()}, nil
		}
		// Somebody took it for an abandoned one before it was locked.
		f.Close()
	}
}

// sweep removes what killed writers left. What cannot be removed is in nobody's way.
func sweep(dir, prefix string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), prefix)
		if !ok || digits == "" || strings.Trim(digits, "0123456789") != "" || !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.Remove(path)
		}
		f.Close()
	}
}

// Commit syncs the file, closes it and gives it its mode and its name, in one step.
// Unless replace is set, an error that wraps fs.ErrExist says that the name is taken.
func (f *File) Commit(mode fs.FileMode, replace bool) error {
	if err := errors.Join(f.Chmod(mode), f.Sync()); err != nil {
		return err
	}
	var err error
	if replace {
		err = os.Rename(f.temp, f.path)
	} else {
		err = unix.Renameat2(unix.AT_FDCWD, f.temp, unix.AT_FDCWD, f.path, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // NFS: no such flag, but hard links
			if err = os.Link(f.temp, f.path); err == nil {
				err = os.Remove(f.temp)
			}
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", f.path, fs.ErrExist)
	}
	if err != nil {
		return &fs.PathError{Op: "name", Path: f.path, Err: err}
	}
	f.temp = ""
	dir, err := os.Open(filepath.Dir(f.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close(), f.Close())
}

// Discard closes the file, and removes it unless Commit has named it. It may be
// called after Commit, and more than once.
func (f *File) Discard() {
	f.Close()
	if f.temp != "" {
		os.Remove(f.temp)
		f.temp = ""
	}
}

// ErrLocked is a lock that another process holds.
var ErrLocked = errors.New("another process holds the lock")

// Lock takes the lock of a file, which is made if it is not there, without waiting for
// it. It is given back when the file is closed, or with the process.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, ErrLocked
	}
	return f, nil
}

// ErrNoFile is what is not a file, or not one of the size that is allowed.
var ErrNoFile = errors.New("not a file, or too large a one")

// Read reads a whole file of at most limit bytes.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, ErrNoFile
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// Write replaces the file at path by one with this content.
func Write(path string, data []byte, mode fs.FileMode) error {
	f, err := Create(path)
	if err != nil {
		return err
	}
	defer f.Discard()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Commit(mode, true)
}
