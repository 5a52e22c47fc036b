package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"chrysalis/verity/disk"
)

// ErrRoot is what the refusal of a root file system wraps.
var ErrRoot = errors.New("not a usable root file system")

// Bounds of a root file system.
const (
	maxEntries = 1 << 20
	maxPath    = 4096 // bytes, PATH_MAX
	maxTarget  = 4032 // bytes, what a disk can hold
	maxLinks   = 40   // that are followed on the way to a file, as Linux does
)

func refuseRoot(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrRoot}, args...)...)
}

// A root is a root file system that comes in layers. Names are in memory, content
// is in a file without a name beside the disk to be: a later layer can hide what an
// earlier one brought, so nothing is in its place before all are read.
type root struct {
	top     *item
	spool   *os.File
	end     int64 // of what is in spool
	entries int
	layer   int // that is being read
	dropped int // special files
}

// An item is a file, a folder or a link.
type item struct {
	disk.Entry
	sub   map[string]*item // of a folder
	layer int              // that it came with
}

// newRoot makes an empty root whose content is kept beside out.
func newRoot(out string) (*root, error) {
	f, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &root{top: newFolder(0o755, 0), spool: f}, nil
}

func newFolder(mode fs.FileMode, layer int) *item {
	return &item{Entry: disk.Entry{Mode: fs.ModeDir | mode.Perm()}, sub: map[string]*item{}, layer: layer}
}

// clean returns the parts of a path inside a root.
func clean(name string) ([]string, error) {
	if len(name) > maxPath || strings.ContainsRune(name, 0) {
		return nil, refuseRoot("a path of %d bytes, or with a NUL: %.80q", len(name), name)
	}
	var parts []string
	for _, p := range strings.Split(name, "/") {
		switch p {
		case "", ".":
		case "..":
			return nil, refuseRoot("the path %.200q climbs", name)
		default:
			parts = append(parts, p)
		}
	}
	return parts, nil
}

// folder returns the folder at a path, whose links it follows inside the root, and
// makes what is not there.
func (r *root) folder(parts []string) (*item, error) {
	type step struct{ at *item }
	stack := []step{{r.top}}
	links := 0
	for len(parts) > 0 {
		p := parts[0]
		parts = parts[1:]
		at := stack[len(stack)-1].at
		switch p {
		case "", ".":
			continue
		case "..": // of a link
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		next := at.sub[p]
		switch {
		case next == nil:
			if err := r.count(); err != nil {
				return nil, err
			}
			next = newFolder(0o755, r.layer)
			at.sub[p] = next
		case next.Mode.Type() == fs.ModeSymlink:
			if links++; links > maxLinks {
				return nil, refuseRoot("links lead round in circles at %.80q", p)
			}
			if path.IsAbs(next.Target) {
				stack = stack[:1]
			}
			parts = append(strings.Split(next.Target, "/"), parts...)
			continue
		case !next.Mode.IsDir():
			return nil, refuseRoot("%.80q is no folder, but holds something", p)
		}
		if stack = append(stack, step{next}); len(stack) > maxPath/2 {
			return nil, refuseRoot("folders are nested more than %d deep", maxPath/2)
		}
	}
	return stack[len(stack)-1].at, nil
}

func (r *root) count() error {
	if r.entries++; r.entries > maxEntries {
		return refuseRoot("more than %d files and folders", maxEntries)
	}
	return nil
}

// Whiteouts, OCI image specification, "layer.md".
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// readTar reads a layer. Without whiteouts it is a root by itself, and such names
// are names like any other.
func (r *root) readTar(ctx context.Context, src io.Reader, whiteouts bool) error {
	r.layer++
	t := tar.NewReader(src)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the tar stream: %w", err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if disk.SparseEntry(h) {
			return refuseRoot("%.200s is kept as a sparse file; make the stream without --sparse", h.Name)
		}
		if err := r.readEntry(h, t, whiteouts); err != nil {
			return err
		}
	}
}

func (r *root) readEntry(h *tar.Header, src io.Reader, whiteouts bool) error {
	parts, err := clean(h.Name)
	if err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode).Perm()
	if len(parts) == 0 {
		if h.Typeflag != tar.TypeDir {
			return refuseRoot("the top folder is no folder")
		}
		r.top.Mode = fs.ModeDir | mode
		return nil
	}
	up, err := r.folder(parts[:len(parts)-1])
	if err != nil {
		return fmt.Errorf("%.200s: %w", h.Name, err)
	}
	name := parts[len(parts)-1]
	if whiteouts && strings.HasPrefix(name, whiteout) {
		return r.hide(up, name)
	}
	if len(name) > 255 {
		return refuseRoot("a name of %d bytes: %.80q", len(name), name)
	}
	old := up.sub[name]
	var it *item
	switch h.Typeflag {
	case tar.TypeDir:
		if old != nil && old.Mode.IsDir() {
			old.Mode, old.layer = fs.ModeDir|mode, r.layer
			return nil
		}
		it = newFolder(mode, r.layer)
	case tar.TypeReg:
		it = &item{Entry: disk.Entry{Mode: mode, Size: h.Size}, layer: r.layer}
		at := r.end
		n, err := io.Copy(io.NewOffsetWriter(r.spool, at), src)
		if err != nil {
			return fmt.Errorf("unpack %.200s: %w", h.Name, err)
		}
		if n != h.Size {
			return refuseRoot("%.200s has %d bytes, was said to have %d", h.Name, n, h.Size)
		}
		r.end += n
		it.Open = func() (disk.Content, error) { return noClose{io.NewSectionReader(r.spool, at, n)}, nil }
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxTarget || strings.ContainsRune(h.Linkname, 0) {
			return refuseRoot("%.200s is a link to %.80q", h.Name, h.Linkname)
		}
		it = &item{Entry: disk.Entry{Mode: fs.ModeSymlink | 0o777, Target: h.Linkname}, layer: r.layer}
	case tar.TypeLink:
		to, err := clean(h.Linkname)
		if err != nil {
			return err
		}
		if len(to) == 0 {
			return refuseRoot("%.200s is a hard link to the top folder", h.Name)
		}
		from, err := r.folder(to[:len(to)-1])
		if err != nil {
			return fmt.Errorf("%.200s: %w", h.Linkname, err)
		}
		target := from.sub[to[len(to)-1]]
		if target == nil || target.Mode.IsDir() {
			return refuseRoot("%.200s is a hard link to %.200q, which is no file", h.Name, h.Linkname)
		}
		it = &item{Entry: target.Entry, layer: r.layer}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		r.dropped++ // the sandbox has devices of its own
		delete(up.sub, name)
		return nil
	default:
		return refuseRoot("%.200s has the type %q", h.Name, h.Typeflag)
	}
	if old == nil {
		if err := r.count(); err != nil {
			return err
		}
	}
	up.sub[name] = it
	return nil
}

// hide carries out a whiteout: what earlier layers brought is gone, what this one
// has brought stays.
func (r *root) hide(up *item, name string) error {
	if name == opaque {
		for n, it := range up.sub {
			r.below(up, n, it)
		}
		return nil
	}
	hidden := strings.TrimPrefix(name, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." || strings.HasPrefix(hidden, whiteout) {
		return refuseRoot("the whiteout %.80q", name)
	}
	if it := up.sub[hidden]; it != nil {
		r.below(up, hidden, it)
	}
	return nil
}

// below takes away an item unless it, or something in it, is this layer's.
func (r *root) below(up *item, name string, it *item) {
	for n, s := range it.sub {
		r.below(it, n, s)
	}
	if it.layer < r.layer && len(it.sub) == 0 {
		delete(up.sub, name)
	}
}

type noClose struct{ io.ReaderAt }

func (noClose) Close() error { return nil }

// list returns the entries for a disk.
func (r *root) list() []disk.Entry {
	var out []disk.Entry
	var walk func(at string, it *item)
	walk = func(at string, it *item) {
		e := it.Entry
		e.Path = at
		out = append(out, e)
		for name, s := range it.sub {
			walk(path.Join(at, name), s)
		}
	}
	walk(".", r.top)
	return out
}
