package disk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"chrysalis/outfile"
	"chrysalis/verity"
)

// An output is a file without a name, which it gets when it is whole. With
// O_TMPFILE the kernel itself forgets an unfinished one, whatever happens to
// the process; on a file system without it there is a hidden file for a time.
type output struct {
	*os.File
	path    string
	keep    string        // its name while it is unfinished and may be kept, or ""
	replace bool          // path may be taken: what is there gives way to the whole file
	hidden  *outfile.File // nil with O_TMPFILE, and for one that may be kept
	temp    string        // the name of one that may be kept, or "" after commit

	direct  *os.File   // the same file, past the page cache; nil where that cannot be
	writing sync.Mutex // held while a group goes through the page cache

	allocating sync.Mutex
	allocated  map[int64]bool // windows that have their blocks, see allocate; nil where that cannot be
}

func createOutput(path string, replace bool) (*output, error) {
	dir := filepath.Dir(path)
	if replace {
		return named(path, replace) // a file without a name cannot take another's
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
	return named(path, replace)
}

// openOutput opens the disk to be made at path: without a name where nothing of
// it is to be kept, or as the unfinished disk of this path, which may be there.
func openOutput(path string, o Options) (*output, error) {
	out, err := openWhole(path, o)
	if err == nil {
		out.openDirect()
	}
	return out, err
}

func openWhole(path string, o Options) (*output, error) {
	if o.Resume == "" && !o.KeepPartial {
		return createOutput(path, o.Replace)
	}
	if _, err := os.Lstat(path); err == nil && !o.Replace {
		return nil, exists(path)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	name := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".partial")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: another program is making this disk", name), f.Close())
	}
	// The one who held the lock may have given the file its name, or removed it.
	if info, err := os.Lstat(name); err != nil || !sameFile(f, info) {
		return nil, errors.Join(fmt.Errorf("%s: another program has just made this disk; run it again", name), f.Close())
	}
	out := &output{File: f, path: path, replace: o.Replace, temp: name, keep: name}
	if o.Resume == "" {
		if err := f.Truncate(0); err != nil {
			return nil, errors.Join(err, out.discard())
		}
	}
	return out, nil
}

// openDirect opens the file once more for writeGroup, if the file system says that
// it can write so and at which alignment (statx(2), STATX_DIOALIGN).
func (o *output) openDirect() {
	name := "/proc/self/fd/" + strconv.Itoa(int(o.Fd()))
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, 0, unix.STATX_DIOALIGN, &st); err != nil || st.Mask&unix.STATX_DIOALIGN == 0 ||
		st.Dio_offset_align == 0 || st.Dio_mem_align == 0 || verity.BlockSize%st.Dio_offset_align != 0 || verity.BlockSize%st.Dio_mem_align != 0 {
		return
	}
	if fd, err := unix.Open(name, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0); err == nil {
		o.direct = os.NewFile(uintptr(fd), o.path)
		o.allocated = map[int64]bool{}
	}
}

// window is how many bytes are allocated at a time. A disk that is mostly zeros takes
// so much at each place that is not.
const window = 16 << 20

// allocate gives the window around a group its blocks, if the file reaches so far. A
// direct write into a hole has the file to itself, on ext4 at least; one into blocks
// that are there goes on beside others.
func (o *output) allocate(at int64) error {
	o.allocating.Lock()
	defer o.allocating.Unlock()
	n := at / window
	if o.allocated == nil || o.allocated[n] {
		return nil
	}
	info, err := o.Stat()
	if err != nil {
		return err
	}
	size := min(window, info.Size()-n*window)
	if size <= 0 || at+groupSize > info.Size() {
		return nil // a stream's file grows as it is written
	}
	switch err := unix.Fallocate(int(o.Fd()), unix.FALLOC_FL_KEEP_SIZE, n*window, size); {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINTR):
		o.allocated = nil // it is only faster with it
	case err != nil:
		return &fs.PathError{Op: "allocate", Path: o.path, Err: err}
	default:
		o.allocated[n] = true
	}
	return nil
}

// writeGroup writes a buffer of alignedBuffer's at a multiple of its alignment. It
// goes past the page cache where the file system can do that: a model larger than
// memory then costs no copy and pushes nothing out, and little is left to wait for
// when the file is synced. It may be called from several goroutines.
func (o *output) writeGroup(p []byte, at int64) error {
	if o.direct != nil {
		if err := o.allocate(at); err != nil {
			return err
		}
		_, err := o.direct.WriteAt(p, at)
		return err
	}
	// The kernel lets one writer at a time at a file, and the others spin.
	o.writing.Lock()
	defer o.writing.Unlock()
	_, err := o.WriteAt(p, at)
	return err
}

// alignedBuffer returns a buffer that a direct write takes: its address is a
// multiple of the block size.
func alignedBuffer(size int) []byte {
	b := make([]byte, size+verity.BlockSize)
	skip := -uintptr(unsafe.Pointer(&b[0])) % verity.BlockSize
	return b[skip:][:size:size]
}

func sameFile(f *os.File, info fs.FileInfo) bool {
	own, err := f.Stat()
	return err == nil && os.SameFile(own, info)
}

// end closes the file at the end of the work, and decides what is left of it.
func (o *output) end(ctx context.Context, err error, options Options) error {
	if o.temp != "" && err != nil && o.keep != "" && (options.KeepPartial || ctx.Err() != nil) {
		return o.close()
	}
	return o.discard()
}

func (o *output) close() error {
	if o.direct == nil {
		return o.Close()
	}
	return errors.Join(o.direct.Close(), o.Close())
}

// room checks that a file of size bytes will fit before anything is written.
func (o *output) room(size int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(o.Fd()), &st); err != nil {
		return &fs.PathError{Op: "free space of", Path: o.path, Err: err}
	}
	var own unix.Stat_t // what an unfinished disk has already
	if err := unix.Fstat(int(o.Fd()), &own); err != nil {
		return &fs.PathError{Op: "stat", Path: o.path, Err: err}
	}
	if free := int64(st.Bavail)*st.Bsize + own.Blocks*512; free < size {
		return fmt.Errorf("%s: %w: the disk takes %d bytes, there is room for %d; make room or choose another place", o.path, unix.ENOSPC, size, free)
	}
	return nil
}

// explain adds what a user can do to an error that comes from a full disk.
func (o *output) explain(err error, size int64) error {
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	needs := ""
	if size > 0 {
		needs = fmt.Sprintf(" of %d bytes", size)
	}
	return fmt.Errorf("the file system is full before the disk%s was whole: %w; make room or choose another place, then run it again", needs, err)
}

// temporary returns an empty file beside path that no name leads to.
func temporary(path string) (*os.File, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// named makes an output of a file that has a hidden name until it is whole.
func named(path string, replace bool) (*output, error) {
	f, err := outfile.Create(path)
	if err != nil {
		return nil, err
	}
	return &output{File: f.File, path: path, replace: replace, hidden: f}, nil
}

func exists(path string) error {
	return fmt.Errorf("%s: %w: remove it or choose another name", path, fs.ErrExist)
}

// commit writes the fragment of what is whole now, and gives it its name.
func (p *packer) commit(d verity.Description) error {
	if p.o.Fragment != nil {
		// Another program may have made a disk of that name, with its own fragment.
		if _, err := os.Lstat(p.file.path); err == nil && !p.o.Replace {
			return exists(p.file.path)
		}
		if err := p.file.Sync(); err != nil { // so that the fragment is not of a disk that never comes
			return err
		}
		if err := writeFragment(p.file.path, p.o.Fragment(d)); err != nil {
			return err
		}
	}
	return p.file.commit()
}

// commit syncs the file, gives it its name unless that is taken by now, and
// syncs the directory.
func (o *output) commit() error {
	if err := o.Sync(); err != nil {
		return err
	}
	var err error
	if o.hidden != nil {
		if err := o.hidden.Commit(0o644, o.replace); errors.Is(err, fs.ErrExist) {
			return exists(o.path)
		} else {
			return err
		}
	}
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
	if o.hidden != nil {
		if o.direct != nil {
			o.direct.Close()
		}
		o.hidden.Discard()
		return nil
	}
	err := o.close()
	if o.temp != "" {
		err = errors.Join(err, os.Remove(o.temp))
	}
	if o.keep != "" {
		if e := os.Remove(o.keep + journalSuffix); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// FragmentSuffix is what the name of a disk's fragment has behind the disk's own.
const FragmentSuffix = ".json"

// writeFragment writes what is to be known of the disk at path to a file beside it,
// in whose place it comes as a whole.
func writeFragment(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return outfile.Write(path+FragmentSuffix, append(data, '\n'), 0o644)
}
