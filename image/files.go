package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"chrysalis/outfile"
)

// lockFile takes an exclusive lock that ends with the process, waiting for its
// holder.
func lockFile(path string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the cache folder: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// stageDir makes a folder for one build in a cache, and removes those whose builds
// were killed. A build holds a lock on its folder, which the kernel drops with it.
func stageDir(cache, prefix string) (dir string, remove func(), err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", nil, err
	}
	left, _ := filepath.Glob(filepath.Join(cache, prefix+"[0-9]*"))
	for _, path := range left {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		if info, err := f.Stat(); err == nil && info.IsDir() && unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			removeTree(path) // one that does not go is in nobody's way
		}
		f.Close()
	}
	for {
		dir, err := os.MkdirTemp(cache, prefix)
		if err != nil {
			return "", nil, fmt.Errorf("make a build folder: %w", err)
		}
		f, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue // taken for an abandoned one before it was locked
		}
		if err != nil {
			return "", nil, fmt.Errorf("make a build folder: %w", err)
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			own, err := f.Stat()
			if there, e := os.Stat(dir); err == nil && e == nil && os.SameFile(own, there) {
				return dir, func() { removeTree(dir); f.Close() }, nil
			}
		}
		f.Close()
	}
}

// removeTree removes a half-made tree. Debian's trees have folders without
// write permission, which an ordinary user's RemoveAll trips over.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	walkErr := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return nil
	})
	if walkErr != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return os.RemoveAll(dir)
}

// copyFile copies a file to a new path, with exactly that mode.
func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(mode), out.Close())
}

// replaceFile copies a file to a path, under which it appears only when it is
// whole and on disk.
func replaceFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := outfile.Create(to)
	if err != nil {
		return err
	}
	defer out.Discard()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Commit(0o644, true)
}

// lastLines returns the end of a program's output, for an error.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
