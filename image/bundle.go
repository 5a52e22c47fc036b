package image

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"chrysalis/outfile"
)

// A bundle is a tar of everything that a lock names, so that an image can be
// built when no mirror has it any more:
//
//	modules/HEX.zip    a Go module, by its h1 sum in hexadecimal
//	packages/HEX.deb   a package, by its SHA-256
//
// Entries are sorted, with one mode, owner and time, so that a lock has one
// bundle. Nothing of a bundle is trusted: what is taken out of it is checked as
// if it came from the network.
type bundle struct {
	name    string
	file    *os.File
	entries map[string]bundleEntry
}

type bundleEntry struct{ offset, size int64 }

// bundleEntryRE is every name that a bundle may hold.
var bundleEntryRE = regexp.MustCompile(`^(modules/[0-9a-f]{64}\.zip|packages/[0-9a-f]{64}\.deb)$`)

// maxBundleEntries bounds the memory that an index takes.
const maxBundleEntries = 1 << 16

func packageEntry(p Package) string { return "packages/" + p.SHA256 + ".deb" }
func moduleEntry(m Module) string   { return "modules/" + m.key() + ".zip" }

// openBundle reads a bundle's index. Anything that WriteBundle would not have
// written is an error.
func openBundle(name string) (_ *bundle, err error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
			err = fmt.Errorf("not a bundle, or a damaged one: %w; 'chrysalis image bundle' makes one", err)
		}
	}()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	b := &bundle{name: name, file: file, entries: map[string]bundleEntry{}}
	reader := tar.NewReader(file)
	var end int64
	last := ""
	for {
		h, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		offset, err := file.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		switch {
		case !bundleEntryRE.MatchString(h.Name):
			return nil, fmt.Errorf("entry %q has no place in it", h.Name)
		case h.Typeflag != tar.TypeReg:
			return nil, fmt.Errorf("entry %s is not a file", h.Name)
		case h.Name <= last:
			return nil, fmt.Errorf("entry %s is there twice or out of order", h.Name)
		case h.Size <= 0 || h.Size > maxPackageSize:
			return nil, fmt.Errorf("entry %s: a size of %d bytes is out of bounds", h.Name, h.Size)
		case offset != end+512:
			return nil, fmt.Errorf("entry %s has a header that 'chrysalis image bundle' does not write", h.Name)
		case offset+h.Size > info.Size():
			return nil, fmt.Errorf("it ends within entry %s", h.Name)
		case len(b.entries) == maxBundleEntries:
			return nil, fmt.Errorf("it has more than %d entries", maxBundleEntries)
		}
		b.entries[h.Name] = bundleEntry{offset, h.Size}
		last, end = h.Name, offset+(h.Size+511)/512*512
	}
	if info.Size() != end+1024 {
		return nil, fmt.Errorf("it is %d bytes long, its entries make %d", info.Size(), end+1024)
	}
	return b, nil
}

func (b *bundle) String() string { return b.name }

func (b *bundle) open(_ context.Context, p Package, offset int64) (io.ReadCloser, int64, error) {
	e, ok := b.entries[packageEntry(p)]
	if !ok {
		return nil, 0, errors.New("the bundle does not hold it")
	}
	if e.size != p.Size {
		return nil, 0, fmt.Errorf("%w: the bundle's has %d", errLength(p), e.size)
	}
	return io.NopCloser(io.NewSectionReader(b.file, e.offset+offset, e.size-offset)), offset, nil
}

// module opens a Go module's zip.
func (b *bundle) module(m Module) (io.Reader, error) {
	e, ok := b.entries[moduleEntry(m)]
	if !ok {
		return nil, errors.New("the bundle does not hold it")
	}
	return io.NewSectionReader(b.file, e.offset, e.size), nil
}

// Bundle writes everything that the lock names, and the GPU helper's Go modules,
// into one file, which appears under its name when it is whole. It fetches what the cache lacks.
func (b *Builder) Bundle(ctx context.Context, out string) error {
	lock, err := ReadLock(b.Source)
	if err != nil {
		return err
	}
	files := map[string]string{} // path by entry
	for i := range lock.Trees {
		tree := &lock.Trees[i]
		if err := checkRecipe(tree); err != nil {
			return err
		}
		paths, err := Fetch(ctx, tree, b.Mirrors, b.Progress)
		if err != nil {
			return err
		}
		for i, p := range tree.Packages {
			files[packageEntry(p)] = paths[i]
		}
	}
	modules := []Go{lock.Go}
	if _, err := lock.Tree("gpu-compiler"); err == nil {
		helper, err := helperGo(b.Source, lock)
		if err != nil {
			return err
		}
		modules = append(modules, helper)
	}
	for _, g := range modules {
		zips, err := fetchModules(ctx, b.Source, g, b.Mirrors, b.Progress)
		if err != nil {
			return err
		}
		for i, m := range g.Modules {
			files[moduleEntry(m)] = zips[i]
		}
	}
	if err := writeBundle(ctx, out, files, b.Progress); err != nil {
		return fmt.Errorf("write the bundle: %w", err)
	}
	return nil
}

func writeBundle(ctx context.Context, out string, files map[string]string, progress Progress) error {
	type entry struct {
		name, path string
		size       int64
	}
	var (
		entries     []entry
		total, done int64
	)
	for name, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		entries = append(entries, entry{name, path, info.Size()})
		total += info.Size()
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	if info, err := os.Stat(out); err == nil && !info.Mode().IsRegular() {
		return &fs.PathError{Op: "write", Path: out, Err: errors.New("there is something that is no file")}
	}
	tmp, err := outfile.Create(out)
	if err != nil {
		return err
	}
	defer tmp.Discard()
	w := tar.NewWriter(tmp)
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{
			Format: tar.FormatUSTAR, Typeflag: tar.TypeReg, Name: e.name, Size: e.size,
			Mode: 0o644, ModTime: time.Unix(0, 0),
		}); err != nil {
			return err
		}
		if err := copyEntry(w, e.name, e.path); err != nil {
			return err
		}
		done += e.size
		progress("write the bundle", done, total)
	}
	if err := w.Close(); err != nil {
		return err
	}
	return tmp.Commit(0o644, true)
}

// copyEntry copies a file and checks a package's hash once more on its way: the
// cache may be on a disk that rots.
func copyEntry(w io.Writer, name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(w, h), f); err != nil {
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); filepath.Ext(name) == ".deb" && packageEntry(Package{SHA256: sum}) != name {
		return fmt.Errorf("%s changed while it was read: its SHA-256 is %s", path, sum)
	}
	return nil
}
