package inspect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"chrysalis/manifest"
	"chrysalis/models"
	"chrysalis/verity"
	"chrysalis/verity/disk"
	"chrysalis/verity/gpt"
)

// A Disk is a disk with a GPT, open for reading. It may carry several verity
// disks' partitions, a manifest, and others.
type Disk struct {
	Table gpt.Table
	// Trees has the file system of each data partition, by its index in the
	// table, that has a hash partition of its own.
	Trees map[int]*Tree

	file   *file
	broken map[int]error // why a data partition is not in Trees
}

// A Tree is a file system with its hash tree.
type Tree struct {
	verity.Description
	HashPartition int     // index in the partition table
	Entries       []Entry // in order of their paths, "." first

	r    io.ReaderAt // the disk, as if it held nothing else
	size int64
	data *io.SectionReader // the data partition
}

// OpenDisk opens the disk at path and lists its file systems. Files are not
// hashed, and no block is checked against a root hash.
func OpenDisk(ctx context.Context, path string) (*Disk, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, err
	}
	d, err := newDisk(ctx, f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// Close closes the file.
func (d *Disk) Close() error { return d.file.Close() }

// newDisk takes over the file if it succeeds.
func newDisk(ctx context.Context, f *file) (*Disk, error) {
	t, err := gpt.Read(f, f.size)
	if err != nil {
		return nil, err
	}
	d := &Disk{Table: t, Trees: map[int]*Tree{}, file: f, broken: map[int]error{}}
	for i, p := range t.Partitions {
		if p.Type != verity.TypeData {
			continue
		}
		tree, err := d.tree(i)
		if err != nil {
			d.broken[i] = err
			continue
		}
		tree.data = io.NewSectionReader(f, p.Offset, p.Size)
		if err := tree.list(ctx); err != nil {
			return nil, fmt.Errorf("partition %d: %w", i+1, err)
		}
		d.Trees[i] = tree
	}
	return d, nil
}

// tree finds the hash partition that belongs to a data partition: the one with
// which the two make a verity disk.
func (d *Disk) tree(data int) (*Tree, error) {
	candidates, why := 0, errors.New("there is none")
	for i, p := range d.Table.Partitions {
		if p.Type != verity.TypeHash {
			continue
		}
		candidates++
		r, err := d.only(data, i)
		if err != nil {
			return nil, err
		}
		description, err := verity.OpenDisk(r, d.file.size)
		if err == nil {
			return &Tree{Description: description, HashPartition: i, r: r, size: d.file.size}, nil
		}
		why = err
	}
	if candidates > 1 {
		why = fmt.Errorf("none of %d fits", candidates)
	}
	return nil, fmt.Errorf("no hash partition belongs to it: %w", why)
}

// only shows the disk as if it had just some of its partitions: the packages
// that read one kind of disk want nothing else on it.
func (d *Disk) only(partitions ...int) (io.ReaderAt, error) {
	t := gpt.Table{Disk: d.Table.Disk}
	for _, i := range partitions {
		t.Partitions = append(t.Partitions, d.Table.Partitions[i])
	}
	var start startOfDisk
	if err := gpt.Write(&start, t, d.file.size); err != nil {
		return nil, err
	}
	return overlay{start[:], d.file}, nil
}

// startOfDisk keeps what is written to a disk's first bytes: MBR, partition
// table, and the whole of the first alignment unit behind them.
type startOfDisk [5 * gpt.Alignment]byte

func (s *startOfDisk) WriteAt(p []byte, at int64) (int, error) {
	if at < int64(len(s)) {
		copy(s[at:], p)
	}
	return len(p), nil
}

// overlay reads start in place of the same bytes of r.
type overlay struct {
	start []byte
	r     io.ReaderAt
}

func (o overlay) ReadAt(p []byte, at int64) (int, error) {
	n, err := o.r.ReadAt(p, at)
	if at >= 0 && at < int64(len(o.start)) {
		copy(p[:n], o.start[at:])
	}
	return n, err
}

// partition is a partition's content.
func (d *Disk) partition(i int) *content {
	p := d.Table.Partitions[i]
	return sectionContent(io.NewSectionReader(d.file, p.Offset, p.Size))
}

// manifest returns the manifest that a partition carries, or nil if that is not
// what the partition is for.
func (d *Disk) manifest(i int) ([]byte, error) {
	if d.Table.Partitions[i].Type != gpt.ManifestType {
		return nil, nil
	}
	r, err := d.only(i)
	if err != nil {
		return nil, err
	}
	raw, err := gpt.ReadManifestDisk(r, d.file.size)
	if err != nil {
		return nil, err
	}
	if _, err := manifest.Parse(raw); err != nil {
		return nil, err
	}
	return raw, nil
}

// kind names the partition types that Chrysalis makes.
func kind(t gpt.GUID) string {
	switch t {
	case verity.TypeData:
		return "verity data"
	case verity.TypeHash:
		return "verity hash tree"
	case gpt.ManifestType:
		return "manifest"
	case typeESP:
		return "EFI system partition"
	}
	return ""
}

// typeESP is the "EFI System Partition": UEFI 2.10, table 5-7.
var typeESP = gpt.MustGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

func (v *Tree) verify(ctx context.Context, progress func(done, total int64)) error {
	_, err := verity.VerifyDisk(ctx, v.r, v.size, progress)
	return err
}

func (v *Tree) model() (info models.Info, err error) {
	err = guard("model disk", func() error {
		info, err = models.InspectDisk(v.r, v.size)
		return err
	})
	return info, err
}

// guard calls f, which hands a file to a parser that is not ours, and turns a
// panic into an error.
func guard(what string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%s: malformed: %v", what, v)
		}
	}()
	return f()
}

// guarded is a file of a file system that guard has let in.
type guarded struct{ fs.File }

func (g guarded) Read(p []byte) (n int, err error) {
	err = guard("EROFS", func() error {
		n, err = g.File.Read(p)
		return err
	})
	return n, err
}

// maxDepth is how deep folders may be nested: PATH_MAX allows no more.
const maxDepth = 2048

// list reads the EROFS file system's folders and inodes. Beyond what go-erofs
// checks: folders list names in order, each once; no folder is in two places; a
// file's type is the same where it is listed and in its inode; and files cannot
// hold more bytes than the partition, so that no listing takes for ever.
func (v *Tree) list(ctx context.Context) error {
	return guard("EROFS", func() error {
		_, fsys, err := disk.OpenTree(v.r, v.size)
		if err != nil {
			return err
		}
		top, err := fs.Lstat(fsys, ".")
		if err != nil {
			return fmt.Errorf("EROFS: top folder: %w", err)
		}
		w := walker{ctx: ctx, fsys: fsys, left: v.data.Size(), files: map[uint64]*content{}, folders: map[uint64]bool{}}
		if err := w.add(".", top, 0); err != nil {
			return fmt.Errorf("EROFS: %w", err)
		}
		v.Entries = w.entries
		return nil
	})
}

type walker struct {
	ctx     context.Context
	fsys    fs.FS
	entries []Entry
	left    int64               // bytes that files may still have
	files   map[uint64]*content // by inode
	folders map[uint64]bool     // by inode
}

func (w *walker) add(name string, info fs.FileInfo, depth int) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if len(w.entries) == maxEntries || depth > maxDepth || len(name) > maxName {
		return fmt.Errorf("%.200q: more than %d entries, %d folders deep or %d bytes of path", name, maxEntries, maxDepth, maxName)
	}
	stat, ok := info.Sys().(*erofs.Stat)
	if !ok {
		return fmt.Errorf("%q: no attributes", name)
	}
	e := Entry{
		Path: name,
		// go-erofs leaves st_mode's 16 bits beside its own.
		Mode: Mode(info.Mode() & 0o177777), UID: stat.UID, GID: stat.GID,
		Time: time.Unix(int64(stat.Mtime), int64(stat.MtimeNs)).UTC(), Links: uint32(stat.Nlink), Inode: uint64(stat.Ino),
		Device: deviceNumber(stat.Rdev),
	}
	for key, value := range stat.Xattrs {
		if e.Xattrs == nil {
			e.Xattrs = map[string]string{}
		}
		e.Xattrs[key] = fmt.Sprintf("%x", value)
	}
	if listed := typeOf(info.Mode().Type()); !e.Mode.is(listed) || listed == 0 {
		return fmt.Errorf("%q: listed as a %s, its inode says %s", name, listed.Type(), e.Mode)
	}
	switch {
	case info.Mode().IsRegular():
		if e.Size = info.Size(); e.Size < 0 {
			return fmt.Errorf("%q: %d bytes", name, e.Size)
		}
		if e.content = w.files[e.Inode]; e.content != nil {
			break // a hard link
		}
		if e.Size > w.left {
			return fmt.Errorf("%q: with its %d bytes, the files have more than the partition", name, e.Size)
		}
		w.left -= e.Size
		e.content = &content{e.Size, func() (io.ReadCloser, error) {
			f, err := w.fsys.Open(name)
			return guarded{f}, err
		}}
		w.files[e.Inode] = e.content
	case e.Mode.is(unix.S_IFLNK):
		target, err := fs.ReadLink(w.fsys, name)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		e.Target, e.Size = target, int64(len(target))
	}
	w.entries = append(w.entries, e)
	if !info.IsDir() {
		return nil
	}
	if w.folders[e.Inode] {
		return fmt.Errorf("%q: the folder is in two places", name)
	}
	w.folders[e.Inode] = true
	return w.folder(name, depth)
}

func (w *walker) folder(name string, depth int) error {
	f, err := w.fsys.Open(name)
	if err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	defer f.Close()
	dir, ok := f.(fs.ReadDirFile)
	if !ok {
		return fmt.Errorf("%q: cannot be listed", name)
	}
	for last, end := "", false; !end; {
		list, err := dir.ReadDir(256) // in the disk's order
		if end = err == io.EOF; err != nil && !end {
			return fmt.Errorf("%q: %w", name, err)
		}
		for _, d := range list {
			if !fs.ValidPath(d.Name()) || path.Base(d.Name()) != d.Name() || d.Name() == "." || bytes.IndexByte([]byte(d.Name()), 0) >= 0 {
				return fmt.Errorf("%q: lists %q, which cannot be a name", name, d.Name())
			}
			if d.Name() <= last {
				return fmt.Errorf("%q: lists %q behind %q, expected names in order", name, d.Name(), last)
			}
			last = d.Name()
			info, err := d.Info()
			if err != nil {
				return fmt.Errorf("%q: %w", path.Join(name, d.Name()), err)
			}
			if err := w.add(path.Join(name, d.Name()), info, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// typeOf translates a type of file into st_mode's.
func typeOf(m fs.FileMode) Mode {
	switch m {
	case 0:
		return unix.S_IFREG
	case fs.ModeDir:
		return unix.S_IFDIR
	case fs.ModeSymlink:
		return unix.S_IFLNK
	case fs.ModeDevice:
		return unix.S_IFBLK
	case fs.ModeDevice | fs.ModeCharDevice:
		return unix.S_IFCHR
	case fs.ModeNamedPipe:
		return unix.S_IFIFO
	case fs.ModeSocket:
		return unix.S_IFSOCK
	}
	return 0
}

// deviceNumber takes apart the kernel's new_encode_dev, which EROFS keeps.
func deviceNumber(v uint32) uint64 {
	return uint64(v>>8&0xfff)<<32 | uint64(v&0xff|v>>12&0xfff00)
}
