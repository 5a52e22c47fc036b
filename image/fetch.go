package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"chrysalis/image/toolsroot"
)

// Progress is told what long work is at. Total is 0 when it is not known; units
// are bytes for downloads. Downloads call it from several goroutines at once.
type Progress func(what string, done, total int64)

// maxMirrorWait bounds how long one package may take to arrive.
const maxMirrorWait = 10 * time.Minute

// Fetch brings a tree's packages into the cache and returns their paths, in the
// tree's order. Each is keyed by its SHA-256 and checked against it whenever it
// is used; mirrors are tried in turn.
func Fetch(ctx context.Context, tree *Tree, mirrors []string, progress Progress) ([]string, error) {
	cache, err := toolsroot.CacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "packages")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the package cache: %w", err)
	}
	var total int64
	for _, p := range tree.Packages {
		total += p.Size
	}
	var (
		done  atomic.Int64
		group sync.WaitGroup
		slots = make(chan struct{}, 8)
		paths = make([]string, len(tree.Packages))
		errs  = make([]error, len(tree.Packages))
	)
	for i, p := range tree.Packages {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			paths[i], errs[i] = fetch(ctx, dir, p, mirrors)
			progress("fetch "+tree.Name, done.Add(p.Size), total)
		})
	}
	group.Wait()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", tree.Name, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return paths, nil
}

func fetch(ctx context.Context, dir string, p Package, mirrors []string) (string, error) {
	path := filepath.Join(dir, p.SHA256+".deb")
	if sum, size, err := HashFile(path); err == nil {
		if sum == p.SHA256 && size == p.Size {
			return path, nil
		}
		// A cache that rotted is no reason to stop.
		if err := os.Remove(path); err != nil {
			return "", fmt.Errorf("package %s: drop its damaged cache entry: %w", p.Name, err)
		}
	}
	if len(mirrors) == 0 {
		return "", fmt.Errorf("package %s %s (sha256 %s) is not in the cache and there is no mirror; give one with --mirror", p.Name, p.Version, p.SHA256)
	}
	var tried []error
	for _, mirror := range mirrors {
		err := download(ctx, path, p, mirror)
		if err == nil {
			return path, nil
		}
		tried = append(tried, fmt.Errorf("%s: %w", mirror, err))
		if ctx.Err() != nil {
			break
		}
	}
	return "", fmt.Errorf("package %s %s (sha256 %s) could not be had: %w", p.Name, p.Version, p.SHA256, errors.Join(tried...))
}

// download writes one package to path, which appears only when it is whole.
func download(ctx context.Context, path string, p Package, mirror string) error {
	ctx, cancel := context.WithTimeout(ctx, maxMirrorWait)
	defer cancel()
	body, err := openMirror(ctx, mirror, p.Path)
	if err != nil {
		return err
	}
	defer body.Close()
	tmp, err := os.CreateTemp(filepath.Dir(path), ".fetch-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(tmp, h), io.LimitReader(body, p.Size+1))
	if err != nil {
		return err
	}
	if n != p.Size {
		return fmt.Errorf("it is not %d bytes long as the lock says", p.Size)
	}
	if sum := hex.EncodeToString(h.Sum(nil)); sum != p.SHA256 {
		return fmt.Errorf("its SHA-256 is %s", sum)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// openMirror opens a file below a mirror: an http(s) address or a directory.
func openMirror(ctx context.Context, mirror, path string) (io.ReadCloser, error) {
	if !strings.Contains(mirror, "://") {
		return os.Open(filepath.Join(mirror, filepath.FromSlash(path)))
	}
	address, err := url.JoinPath(mirror, path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("the mirror answered %s", resp.Status)
	}
	return resp.Body, nil
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
