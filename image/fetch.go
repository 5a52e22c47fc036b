package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/image/toolsroot"
)

// Progress is told what long work is at. Total is 0 when it is not known; units
// are bytes for downloads, as they arrive. Downloads call it from several
// goroutines at once.
type Progress func(what string, done, total int64)

// stallAfter is how long a mirror may send nothing.
var stallAfter = time.Minute

// maxResumes is how often one mirror may break off a package, as long as each
// time brings more of it.
const maxResumes = 5

// meter adds up what several downloads have brought.
type meter struct {
	what     string
	done     atomic.Int64
	total    int64
	progress Progress
}

func (m *meter) add(n int64) {
	if n != 0 {
		m.progress(m.what, m.done.Add(n), m.total)
	}
}

// Fetch brings a tree's packages into the cache and returns their paths, in the
// tree's order. Each is keyed by its SHA-256 and checked against it whenever it
// is used. Mirrors are tried in turn: http(s) addresses, directories laid out
// like a mirror, and bundles. A download that broke off goes on where it
// stopped, even in a later run. Progress counts only what is not yet there.
func Fetch(ctx context.Context, tree *Tree, mirrorNames []string, progress Progress) ([]string, error) {
	cache, err := toolsroot.CacheDir()
	if err != nil {
		return nil, err
	}
	from, err := openMirrors(mirrorNames)
	if err != nil {
		return nil, err
	}
	defer from.close()
	f := fetcher{
		packages: filepath.Join(cache, "packages"), partial: filepath.Join(cache, "partial"),
		mirrors: from, meter: &meter{what: "fetch " + tree.Name, progress: progress},
	}
	for _, dir := range []string{f.packages, f.partial} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make the package cache: %w", err)
		}
	}
	paths := make([]string, len(tree.Packages))
	var missing []int
	for i, p := range tree.Packages {
		paths[i] = filepath.Join(f.packages, p.SHA256+".deb")
		ok, err := cached(paths[i], p)
		if err != nil {
			return nil, err
		}
		if !ok {
			missing = append(missing, i)
			f.meter.total += p.Size
		}
	}
	var (
		group sync.WaitGroup
		slots = make(chan struct{}, 8)
		errs  = make([]error, len(missing))
	)
	for n, i := range missing {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			errs[n] = f.fetch(ctx, paths[i], tree.Packages[i])
		})
	}
	group.Wait()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", tree.Name, err)
	}
	if err := joinFirst(errs, 10); err != nil {
		return nil, err
	}
	return paths, nil
}

// joinFirst joins errors, but not more of them than anybody reads.
func joinFirst(errs []error, n int) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if more := len(errs) - n; more > 0 {
		errs = append(errs[:n:n], fmt.Errorf("and %d more", more))
	}
	return errors.Join(errs...)
}

// cached says whether a package is in the cache, whole. A cache that rotted is
// no reason to stop: the damaged entry is dropped.
func cached(path string, p Package) (bool, error) {
	sum, size, err := HashFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err == nil && sum == p.SHA256 && size == p.Size:
		return true, nil
	}
	if err := os.RemoveAll(path); err != nil {
		return false, fmt.Errorf("package %s: drop its damaged cache entry: %w", p.Name, err)
	}
	return false, nil
}

// fetcher brings packages into a cache.
type fetcher struct {
	packages, partial string // folders; what is whole, and what is not yet
	mirrors           mirrors
	meter             *meter
}

func (f *fetcher) fetch(ctx context.Context, path string, p Package) error {
	what := fmt.Sprintf("package %s %s (sha256 %s)", p.Name, p.Version, p.SHA256)
	if len(f.mirrors) == 0 {
		return fmt.Errorf("%s is not in the cache and there is no mirror; give a mirror, or a bundle, with --mirror", what)
	}
	part, err := openPart(ctx, filepath.Join(f.partial, p.SHA256))
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	defer part.Close()
	// Somebody else may have fetched it while we waited for the part.
	if ok, err := cached(path, p); ok || err != nil {
		os.Remove(part.Name())
		f.meter.add(p.Size)
		return err
	}
	d := download{p: p, part: part, meter: f.meter}
	var tried []string
	for _, m := range f.mirrors {
		err := d.from(ctx, m)
		if err == nil {
			return errors.Join(part.Chmod(0o644), os.Rename(part.Name(), path))
		}
		tried = append(tried, fmt.Sprintf("  %s: %v", m, err))
		if ctx.Err() != nil {
			break
		}
	}
	if d.size == 0 {
		os.Remove(part.Name())
	}
	d.drop()
	return fmt.Errorf("%s is neither in the cache nor on any mirror; looked in\n%s", what, strings.Join(tried, "\n"))
}

// openPart opens what there is of a package and keeps other processes from it
// until it is closed.
func openPart(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, err
		}
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			// Whoever had it may have moved it away since.
			ours, err1 := f.Stat()
			there, err2 := os.Stat(path)
			if err1 == nil && err2 == nil && os.SameFile(ours, there) {
				return f, nil
			}
		}
		f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// download is one package on its way.
type download struct {
	p     Package
	part  *os.File
	size  int64 // of part
	meter *meter
	told  int64 // bytes that the meter counts for this package
}

// errBroken is a download that broke off: what came of it may be good.
type errBroken struct{ error }

func (e errBroken) Unwrap() error { return e.error }

// errStale is a resumed download that turns out wrong: its beginning may be
// from elsewhere.
var errStale = errors.New("it does not fit what was there of it")

// from fetches the package from a mirror, resuming what an earlier one left.
func (d *download) from(ctx context.Context, m mirror) error {
	info, err := d.part.Stat()
	if err != nil {
		return err
	}
	d.size = info.Size()
	d.tell()
	stale := false
	for resumes := 0; ; resumes++ {
		before := d.size
		err := d.attempt(ctx, m)
		switch broken := (errBroken{}); {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return err
		case errors.Is(err, errStale) && !stale:
			stale = true
		case errors.As(err, &broken) && d.size > before && resumes < maxResumes:
		default:
			return err
		}
	}
}

// attempt asks a mirror once for what is missing.
func (d *download) attempt(ctx context.Context, m mirror) error {
	offset := d.size
	if offset < d.p.Size {
		ctx, stop := context.WithCancelCause(ctx)
		defer stop(nil)
		body, at, err := m.open(ctx, d.p, offset)
		if err != nil {
			return err
		}
		defer body.Close()
		if offset = at; at != d.size {
			if err := d.truncate(at); err != nil {
				return err
			}
		}
		watch := time.AfterFunc(stallAfter, func() {
			stop(fmt.Errorf("the mirror sent nothing for %v", stallAfter))
		})
		defer watch.Stop()
		if err := d.append(body, watch); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = errBroken{cause}
			}
			return err
		}
	}
	sum := ""
	if d.size == d.p.Size {
		if _, err := d.part.Seek(0, io.SeekStart); err != nil {
			return err
		}
		h := sha256.New()
		if _, err := io.Copy(h, d.part); err != nil {
			return err
		}
		if sum = hex.EncodeToString(h.Sum(nil)); sum == d.p.SHA256 {
			return nil
		}
	}
	size := d.size
	if err := d.truncate(0); err != nil {
		return err
	}
	switch {
	case offset > 0:
		return errStale
	case size != d.p.Size:
		return errLength(d.p)
	}
	return fmt.Errorf("its SHA-256 is %s", sum)
}

// append writes what arrives to the end of the part, and at most a byte more
// than the package has.
func (d *download) append(body io.Reader, watch *time.Timer) error {
	if _, err := d.part.Seek(d.size, io.SeekStart); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := body.Read(buf[:min(int64(len(buf)), d.p.Size+1-d.size)])
		watch.Reset(stallAfter)
		if _, err := d.part.Write(buf[:n]); err != nil {
			return err
		}
		d.size += int64(n)
		d.tell()
		switch {
		case err == io.EOF || d.size > d.p.Size:
			return nil
		case err != nil:
			return errBroken{err}
		}
	}
}

func (d *download) truncate(size int64) error {
	if err := d.part.Truncate(size); err != nil {
		return err
	}
	d.size = size
	d.tell()
	return nil
}

// tell brings the meter up to date.
func (d *download) tell() {
	at := min(d.size, d.p.Size)
	d.meter.add(at - d.told)
	d.told = at
}

// drop takes what did not become a package back from the meter.
func (d *download) drop() {
	d.meter.add(-d.told)
	d.told = 0
}

// HashFile returns a file's SHA-256 in hexadecimal and its size in bytes.
func HashFile(path string) (string, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), n, err
}
