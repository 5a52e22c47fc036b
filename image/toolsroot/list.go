package toolsroot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// ErrDamaged is a root that is not as it was when it was made.
var ErrDamaged = errors.New("the tools root is not as it was made")

// List returns all that is in the root, a line each, in the order of the paths:
// kind, mode, SHA-256 of a file or target of a link, path. Owners and times are
// left out: the whole root belongs to whoever made it, and no build takes a time
// from it.
func (r *Root) List(ctx context.Context) ([]byte, error) {
	type entry struct {
		path, head, tail string
		err              error
	}
	var entries []*entry
	err := filepath.WalkDir(r.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(r.Dir, path)
		if err != nil || rel == "." || rel == stamp {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := &entry{path: rel}
		switch mode := info.Mode(); {
		case mode.IsDir():
			e.head, e.tail = "folder", "-"
		case mode.IsRegular():
			e.head = "file"
		case mode&fs.ModeSymlink != 0:
			e.head = "link"
			if e.tail, err = os.Readlink(path); err != nil {
				return err
			}
			e.tail = fmt.Sprintf("%q", e.tail)
		default:
			return fmt.Errorf("%s is neither a file nor a folder nor a link", path)
		}
		bits := info.Mode().Perm()
		for bit, value := range map[fs.FileMode]fs.FileMode{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
			if info.Mode()&bit != 0 {
				bits |= value
			}
		}
		e.head += fmt.Sprintf(" %04o", uint32(bits))
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the tools root: %w", err)
	}
	work := make(chan *entry)
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for e := range work {
				e.tail, e.err = hashFile(filepath.Join(r.Dir, e.path))
			}
		})
	}
	for _, e := range entries {
		if e.tail == "" && ctx.Err() == nil {
			work <- e
		}
	}
	close(work)
	group.Wait()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var list bytes.Buffer
	for _, e := range entries {
		if e.err != nil {
			return nil, fmt.Errorf("list the tools root: %w", e.err)
		}
		fmt.Fprintf(&list, "%s %s %q\n", e.head, e.tail, e.path)
	}
	return list.Bytes(), nil
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Verify compares the root with what Seal found in it, which reads all of it. The
// error wraps ErrDamaged where something was changed, added or taken away. It
// finds what rots or is changed by mistake; whoever can write to the cache can
// write the root's seal as well.
func (r *Root) Verify(ctx context.Context) error {
	sealed, err := os.ReadFile(filepath.Join(r.Dir, stamp))
	if err != nil {
		return fmt.Errorf("open the tools root: %w", err)
	}
	list, err := r.List(ctx)
	if err != nil {
		return err
	}
	if !bytes.Equal(sealed, seal(list)) {
		return fmt.Errorf("%w: %s", ErrDamaged, r.Dir)
	}
	return nil
}

// seal is what the stamp of a root with that list holds.
func seal(list []byte) []byte {
	return fmt.Appendf(nil, "sha256 %x\n", sha256.Sum256(list))
}
