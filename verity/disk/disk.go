// Package disk packs a tree of files into a verity disk and reads one back on
// the host: package verity's disk format with an EROFS image as its data.
//
// It is apart from package verity so that the VM, which leaves file systems to
// the kernel, links no EROFS code.
package disk

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/erofs/go-erofs"

	"chrysalis/verity"
)

// Options are the inputs of PackTree besides the files.
type Options struct {
	// Salt of the hash tree, at most verity.MaxSalt bytes. Give different
	// kinds of disks different salts; it need not be secret.
	Salt []byte
	// Replace lets the disk take the place of what is at out.
	Replace bool
	// Progress, if set, is called with the bytes done and their total: first
	// for the files' content, then for the hash tree over the image.
	Progress func(step string, done, total int64)
}

// PackTree makes a verity disk out of fsys at path out: uncompressed EROFS,
// 4096-byte blocks, and the hash tree. Needs no privileges and no tools.
//
// Directories, regular files and symbolic links are packed with their
// permission bits; owner and group are 0, times are the Unix epoch, set-id
// bits and extended attributes are dropped, hard links become copies. Other
// kinds of files are refused. The same tree and salt give the same bytes.
//
// Each file is read once: files of more than a block in order of path, then
// the small ones among the metadata, again in order. Memory grows with the number of
// files and by 64 KiB for each GiB of data.
//
// The disk appears at out when it is whole and on stable storage, or not at
// all: also after a crash or when ctx ends. The error wraps fs.ErrExist if
// out exists, the file system's error if it cannot be written, and ctx.Err().
func PackTree(ctx context.Context, fsys fs.FS, out string, o Options) (verity.Description, error) {
	d, err := packTree(ctx, fsys, out, o)
	if err != nil {
		return d, fmt.Errorf("pack %s: %w", out, err)
	}
	return d, nil
}

func packTree(ctx context.Context, fsys fs.FS, out string, o Options) (d verity.Description, err error) {
	progress := func(step string) func(done, total int64) {
		if o.Progress == nil {
			return func(int64, int64) {}
		}
		return func(done, total int64) { o.Progress(step, done, total) }
	}

	f, err := createOutput(out, o.Replace)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, f.discard()) }()

	src := &source{FS: fsys, ctx: ctx, report: progress("pack"), links: map[string]uint32{".": 2}}
	if err := src.survey(); err != nil {
		return d, err
	}
	image := &imageWriter{w: io.NewOffsetWriter(f, verity.DataOffset)}
	// With the image's time equal to the files', inodes take the short form.
	w := erofs.Create(image, erofs.WithBlockSize(verity.BlockSize), erofs.WithBuildTime(0, 0))
	if err := w.CopyFrom(src); err != nil {
		return d, err
	}
	for path, n := range src.links {
		// CopyFrom gives every directory two links.
		if err := w.SetNlink(path, n); err != nil {
			return d, err
		}
	}
	if err := w.Close(); err != nil {
		return d, err
	}

	d, err = verity.SealDisk(ctx, f, image.size, verity.TreeOptions{
		Salt:     o.Salt,
		UUID:     diskUUID(o.Salt),
		Progress: progress("hash"),
	})
	if err != nil {
		return d, err
	}
	return d, f.commit()
}

// diskUUID makes the disk's GUID, which nothing relies on: any constant would
// do, and this one differs where the salt does. Version 8 of RFC 9562.
func diskUUID(salt []byte) [16]byte {
	sum := sha256.Sum256(append([]byte("chrysalis/disk-uuid/v1"), salt...))
	u := [16]byte(sum[:16])
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

// imageWriter notes how far the EROFS image reaches: its writer comes back to
// the superblock last.
type imageWriter struct {
	w    *io.OffsetWriter
	at   int64
	size int64
}

func (i *imageWriter) Write(p []byte) (int, error) {
	n, err := i.w.Write(p)
	i.at += int64(n)
	i.size = max(i.size, i.at)
	return n, err
}

func (i *imageWriter) Seek(offset int64, whence int) (int64, error) {
	at, err := i.w.Seek(offset, whence)
	if err == nil {
		i.at = at
	}
	return at, err
}

// source shows fsys to the EROFS writer without what must not get into the
// image, and opens a file only when its turn comes: the writer opens all of
// them at once.
type source struct {
	fs.FS
	ctx         context.Context
	report      func(done, total int64)
	done, total int64
	links       map[string]uint32 // directory → links to it
}

// survey walks the tree once, for the total size, the link counts, and to
// refuse before anything is written.
func (s *source) survey() error {
	return fs.WalkDir(s.FS, ".", func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = s.ctx.Err()
		}
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			if path != "." {
				s.links[path] = 2
				s.links[parent(path)]++
			}
		case e.Type().IsRegular():
			info, err := e.Info()
			if err != nil {
				return err
			}
			s.total += info.Size()
		case e.Type() != fs.ModeSymlink:
			return fmt.Errorf("%s: %v: only files, directories and symbolic links can be packed", path, e.Type())
		}
		return nil
	})
}

func parent(path string) string {
	for i := len(path) - 1; i > 0; i-- {
		if path[i] == '/' {
			return path[:i]
		}
	}
	return "."
}

func (s *source) Open(name string) (fs.File, error) {
	info, err := s.Stat(name)
	if err != nil {
		return nil, err
	}
	return &lazyFile{src: s, name: name, info: info, left: info.Size()}, nil
}

func (s *source) Stat(name string) (fs.FileInfo, error) {
	info, err := fs.Lstat(s.FS, name)
	if err != nil {
		return nil, err
	}
	return plainInfo{info}, nil
}

func (s *source) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := fs.ReadDir(s.FS, name)
	for i, e := range list {
		list[i] = plainEntry{e}
	}
	return list, err
}

func (s *source) ReadLink(name string) (string, error) { return fs.ReadLink(s.FS, name) }

// plainInfo keeps of a file's information only what goes into the image.
type plainInfo struct{ fs.FileInfo }

func (i plainInfo) Mode() fs.FileMode {
	m := i.FileInfo.Mode()
	return m.Type() | m.Perm()
}
func (i plainInfo) ModTime() time.Time { return time.Unix(0, 0) }
func (i plainInfo) Sys() any           { return nil }

type plainEntry struct{ fs.DirEntry }

func (e plainEntry) Info() (fs.FileInfo, error) {
	info, err := e.DirEntry.Info()
	if err != nil {
		return nil, err
	}
	return plainInfo{info}, nil
}

// lazyFile opens its file at the first Read. It insists on as many bytes as
// the directory promised: the EROFS writer does not, for short files.
type lazyFile struct {
	src  *source
	name string
	info fs.FileInfo
	left int64
	file fs.File
}

func (f *lazyFile) Stat() (fs.FileInfo, error) { return f.info, nil }

func (f *lazyFile) Read(p []byte) (int, error) {
	if err := f.src.ctx.Err(); err != nil {
		return 0, err
	}
	if f.left == 0 {
		return 0, io.EOF
	}
	if f.file == nil {
		file, err := f.src.FS.Open(f.name)
		if err != nil {
			return 0, err
		}
		f.file = file
	}
	n, err := f.file.Read(p[:min(int64(len(p)), f.left)])
	f.left -= int64(n)
	f.src.done += int64(n)
	f.src.report(f.src.done, f.src.total)
	if err == io.EOF && f.left > 0 {
		err = fmt.Errorf("%s: %w: the file became shorter while it was packed", f.name, io.ErrUnexpectedEOF)
	}
	return n, err
}

func (f *lazyFile) Close() error {
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}

// OpenTree describes the verity disk of size bytes in r (verity.OpenDisk) and
// opens the EROFS image on it, on the host. Nothing is mounted and no block is
// checked against the root hash: use verity.VerifyDisk first where that
// matters. Reads stay inside the data partition. A malformed image gives
// errors, from here or from the file system.
func OpenTree(r io.ReaderAt, size int64) (verity.Description, fs.FS, error) {
	d, err := verity.OpenDisk(r, size)
	if err != nil {
		return d, nil, err
	}
	fsys, err := erofs.Open(io.NewSectionReader(r, d.DataOffset, int64(d.DataBlocks)*verity.BlockSize))
	if err != nil {
		return d, nil, fmt.Errorf("open EROFS image: %w", err)
	}
	return d, fsys, nil
}
