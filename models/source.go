package models

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"chrysalis/verity/disk"
)

// GGUFName is the name that a GGUF file gets that is packed by itself.
const GGUFName = "model.gguf"

// A sourceFile is a file to pack.
type sourceFile struct {
	path string
	open func() (*os.File, error)
	info fs.FileInfo // when it was checked
}

// A source is what a model is packed from, where that is files.
type source struct {
	files []sourceFile
	left  []string // out, for their names
	close func() error
}

// openSource lists the files of a folder, or takes the one file. Nothing outside
// the folder is ever read: the kernel resolves each path below it (os.Root).
func openSource(ctx context.Context, name string, exclude []string) (*source, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		if !info.Mode().IsRegular() {
			return nil, errors.New("neither a folder nor a regular file")
		}
		return &source{
			files: []sourceFile{{GGUFName, func() (*os.File, error) { return os.Open(name) }, info}},
			close: func() error { return nil },
		}, nil
	}
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	s := &source{close: root.Close}
	if err := s.walk(ctx, root, exclude); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return s, nil
}

func (s *source) walk(ctx context.Context, root *os.Root, exclude []string) error {
	return fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || name == "." {
			return err
		}
		if hidden(name) || matches(exclude, name) {
			if s.left = append(s.left, name); d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() {
			return nil
		}
		info, err := root.Stat(name) // follows links, inside the folder
		switch {
		case err != nil && d.Type() == fs.ModeSymlink:
			return fmt.Errorf("%w: %s is a link that does not lead to a file inside the folder: %w; let the download copy files instead of linking them", ErrRefused, name, err)
		case err != nil:
			return err
		case !info.Mode().IsRegular():
			return fmt.Errorf("%w: %s is %s; only files and folders can be packed", ErrRefused, name, typeName(info.Mode()))
		}
		s.files = append(s.files, sourceFile{name, func() (*os.File, error) { return openRegular(root, name) }, info})
		return nil
	})
}

// openRegular opens a file without waiting for the other end of a pipe that took
// its place.
func openRegular(root *os.Root, name string) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s became %s", ErrRefused, name, typeName(info.Mode()))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func typeName(m fs.FileMode) string {
	switch m.Type() {
	case fs.ModeDir:
		return "a link to a folder"
	case fs.ModeNamedPipe:
		return "a named pipe"
	case fs.ModeSocket:
		return "a socket"
	}
	return "a special file"
}

// hidden reports whether a file is one of the tools' that fetched the model: a name
// that begins with a dot.
func hidden(name string) bool { return strings.HasPrefix(path.Base(name), ".") }

// check looks at all files.
func (s *source) check(ctx context.Context, c *checker) error {
	for _, f := range s.files {
		if err := ctx.Err(); err != nil {
			return err
		}
		file, err := f.open()
		if err != nil {
			return err
		}
		info, err := file.Stat()
		if err == nil && !sameState(info, f.info) {
			err = errChanged(f.path)
		}
		if err == nil {
			err = c.look(f.path, f.info.Size(), file)
		}
		if err = errors.Join(err, file.Close()); err != nil {
			return err
		}
	}
	return nil
}

func errChanged(name string) error { return fmt.Errorf("%s changed while it was packed", name) }

// sameState reports whether a file was left alone between two looks at it.
func sameState(a, b fs.FileInfo) bool { return state(a) == state(b) }

// state is what changes when a file is written to.
func state(i fs.FileInfo) string {
	return fmt.Sprintf("%d %d", i.Size(), i.ModTime().UnixNano()) + inode(i)
}

// unchanged checks at the end that the files are still the ones that were checked.
func (s *source) unchanged() error {
	for _, f := range s.files {
		file, err := f.open()
		if err != nil {
			return err
		}
		info, err := file.Stat()
		if err == nil && !sameState(info, f.info) {
			err = errChanged(f.path)
		}
		if err = errors.Join(err, file.Close()); err != nil {
			return err
		}
	}
	return nil
}

// fingerprint changes when the files may have: see disk.Options.Resume.
func (s *source) fingerprint() string {
	var b strings.Builder
	for _, f := range s.files {
		fmt.Fprintf(&b, "%q %s\n", f.path, state(f.info))
	}
	return b.String()
}

func (s *source) entries() []disk.Entry {
	var list []disk.Entry
	for _, f := range s.files {
		list = append(list, disk.Entry{
			Path: f.path, Mode: 0o444, Size: f.info.Size(),
			Open: func() (disk.Content, error) { return f.open() },
		})
	}
	return list
}

// maxPeek bounds what of a file in a stream is held while it is looked at.
const maxPeek = 32 << 20

// tarEntries reads a tar stream for disk.PackStream. Each file is looked at before
// it is passed on.
func tarEntries(r io.Reader, c *checker, exclude []string, left *[]string) func() (disk.Entry, io.Reader, error) {
	t := tar.NewReader(r)
	var none disk.Entry
	return func() (disk.Entry, io.Reader, error) {
		for {
			h, err := t.Next()
			if err == io.EOF {
				return none, nil, io.EOF
			}
			if err != nil {
				return none, nil, fmt.Errorf("read the tar stream: %w", err)
			}
			name := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
			if h.Typeflag == tar.TypeXGlobalHeader || h.Typeflag == tar.TypeDir {
				continue // folders come with their files
			}
			if !fs.ValidPath(name) {
				return none, nil, fmt.Errorf("%w: %.80q in the tar stream cannot be a path", ErrRefused, h.Name)
			}
			out := matches(exclude, name)
			for at := name; at != "."; at = path.Dir(at) {
				out = out || hidden(at)
			}
			if out {
				*left = append(*left, name)
				continue
			}
			if disk.SparseEntry(h) {
				return none, nil, fmt.Errorf("%w: %s in the tar stream is kept as a sparse file; make it without --sparse", ErrRefused, name)
			}
			switch h.Typeflag {
			case tar.TypeReg:
			case tar.TypeSymlink, tar.TypeLink:
				return none, nil, fmt.Errorf("%w: %s in the tar stream is a link; make it with tar --dereference --hard-dereference", ErrRefused, name)
			default:
				return none, nil, fmt.Errorf("%w: %s in the tar stream is neither a file nor a folder", ErrRefused, name)
			}
			var seen bytes.Buffer
			if err := c.look(name, h.Size, io.TeeReader(t, &bounded{&seen, maxPeek})); err != nil {
				return none, nil, err
			}
			return disk.Entry{Path: name, Mode: 0o444, Size: h.Size}, io.MultiReader(&seen, t), nil
		}
	}
}

// bounded is a buffer that refuses to grow beyond a limit.
type bounded struct {
	*bytes.Buffer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, fmt.Errorf("its header is larger than %d bytes, too large for a stream; pack the folder", maxPeek)
	}
	return b.Buffer.Write(p)
}
