package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// An output is a file without a name, which it gets when it is whole. With
// O_TMPFILE the kernel itself forgets an unfinished one, whatever happens to
// the process; on a file system without it there is a hidden file for a time.
type output struct {
	*os.File
	path    string
	replace bool   // path may be taken: what is there gives way to the whole file
	temp    string // its name meanwhile, or "" with O_TMPFILE or after commit
}

func createOutput(path string, replace bool) (*output, error) {
	dir := filepath.Dir(path)
	if replace {
		return createNamed(path, replace) // a file without a name cannot take another's
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, exists(path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err == nil {
		return &output{File: os.NewFile(uintptr(fd), path), path: path}, nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, &fs.PathError{Op: "create a file in", Path: dir, Err: err}
	}
	return createNamed(path, replace)
}

func createNamed(path string, replace bool) (*output, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(0o644); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return &output{File: f, path: path, replace: replace, temp: f.Name()}, nil
}

func exists(path string) error {
	return fmt.Errorf("%s: %w: remove it or choose another name", path, fs.ErrExist)
}

// commit syncs the file, gives it its name unless that is taken by now, and
// syncs the directory.
func (o *output) commit() error {
	if err := o.Sync(); err != nil {
		return err
	}
	var err error
	if o.replace {
		err = os.Rename(o.temp, o.path)
	} else if o.temp == "" {
		err = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(o.Fd())), unix.AT_FDCWD, o.path, unix.AT_SYMLINK_FOLLOW)
	} else {
		err = unix.Renameat2(unix.AT_FDCWD, o.temp, unix.AT_FDCWD, o.path, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // NFS: no such flag, but hard links
			err = errors.Join(os.Link(o.temp, o.path), os.Remove(o.temp))
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return exists(o.path)
	}
	if err != nil {
		return &fs.PathError{Op: "name", Path: o.path, Err: err}
	}
	o.temp = ""
	dir, err := os.Open(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// discard closes the file and, unless commit named it, removes it.
func (o *output) discard() error {
	err := o.Close()
	if o.temp != "" {
		err = errors.Join(err, os.Remove(o.temp))
	}
	return err
}
