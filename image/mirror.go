package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A mirror is a place that may have packages.
type mirror interface {
	String() string
	// open opens a package at an offset in bytes, or at 0 where it cannot start
	// anywhere else; it returns where the content begins.
	open(ctx context.Context, p Package, offset int64) (body io.ReadCloser, at int64, err error)
}

// mirrors are places to look in, in order.
type mirrors []mirror

// openMirrors makes mirrors of what the user named: an http(s) address, a
// directory laid out like a mirror, or a bundle.
func openMirrors(names []string) (mirrors, error) {
	var list mirrors
	for _, name := range names {
		m, err := openMirror(name)
		if err != nil {
			list.close()
			return nil, err
		}
		list = append(list, m)
	}
	return list, nil
}

func openMirror(name string) (mirror, error) {
	if scheme, _, ok := strings.Cut(name, "://"); ok {
		if u, err := url.Parse(name); err != nil || (scheme != "http" && scheme != "https") || u.Host == "" {
			return nil, fmt.Errorf("mirror %s: a mirror is an http or https address, a directory or a bundle", name)
		}
		return httpMirror(name), nil
	}
	// One that is not there is like one that has nothing: others may do.
	if info, err := os.Stat(name); err != nil || info.IsDir() {
		return dirMirror(name), nil
	}
	b, err := openBundle(name)
	if err != nil {
		return nil, fmt.Errorf("mirror %s: %w", name, err)
	}
	return b, nil
}

func (list mirrors) close() {
	for _, m := range list {
		if b, ok := m.(*bundle); ok {
			b.file.Close()
		}
	}
}

// dirMirror is the top of a directory laid out like a mirror.
type dirMirror string

func (m dirMirror) String() string { return string(m) }

func (m dirMirror) open(_ context.Context, p Package, offset int64) (io.ReadCloser, int64, error) {
	path := filepath.Join(string(m), filepath.FromSlash(p.Path))
	switch info, err := os.Stat(path); {
	case err != nil:
		return nil, 0, err
	case !info.Mode().IsRegular():
		return nil, 0, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, offset, nil
}

// httpMirror is the address of a mirror's top.
type httpMirror string

func (m httpMirror) String() string { return string(m) }

func (m httpMirror) open(ctx context.Context, p Package, offset int64) (io.ReadCloser, int64, error) {
	address, err := url.JoinPath(string(m), p.Path)
	if err != nil {
		return nil, 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, 0, err
	}
	// Lengths and offsets are those of the package itself.
	req.Header.Set("Accept-Encoding", "identity")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, 0, err
	}
	at, err := startOf(resp, p, offset)
	if err == nil {
		return resp.Body, at, nil
	}
	resp.Body.Close()
	if offset > 0 {
		// Whatever it has against a range, it may still send the whole.
		return m.open(ctx, p, 0)
	}
	return nil, 0, err
}

// startOf returns where in a package the content of an answer begins.
func startOf(resp *http.Response, p Package, offset int64) (int64, error) {
	switch {
	case resp.StatusCode == http.StatusOK:
		if resp.ContentLength >= 0 && resp.ContentLength != p.Size {
			return 0, fmt.Errorf("%w: the mirror sends %d bytes", errLength(p), resp.ContentLength)
		}
		return 0, nil
	case resp.StatusCode == http.StatusPartialContent && offset > 0:
		want := fmt.Sprintf("bytes %d-%d/", offset, p.Size-1)
		total, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), want)
		if ok && (total == "*" || total == strconv.FormatInt(p.Size, 10)) {
			return offset, nil
		}
	}
	return 0, fmt.Errorf("the mirror answered %s", resp.Status)
}

func errLength(p Package) error {
	return fmt.Errorf("it is not %d bytes long as the lock says", p.Size)
}
