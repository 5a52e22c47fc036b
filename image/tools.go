package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"chrysalis/image/toolsroot"
)

// toolsRecipe changes whenever the way in which a tools root is made does, so
// that an old one in the cache is not taken for a new one.
const toolsRecipe = "tools/3"

// OpenTools returns the tools root that the lock names, which must have been
// made before.
func OpenTools(lock *Lock) (*toolsroot.Root, error) {
	dir, err := toolsDir(lock)
	if err != nil {
		return nil, err
	}
	return toolsroot.Open(dir)
}

func toolsDir(lock *Lock) (string, error) {
	tree, err := lock.Tree("tools")
	if err != nil {
		return "", err
	}
	return toolsroot.Path(tree.Key(toolsRecipe))
}

// MakeTools returns the tools root that the lock names and makes it when it is
// not there, or is not as it was made: it fetches the packages and lets mmdebstrap
// unpack and configure them from a local folder, without any network.
func MakeTools(ctx context.Context, lock *Lock, mirrors []string, progress Progress) (*toolsroot.Root, error) {
	dir, err := toolsDir(lock)
	if err != nil {
		return nil, err
	}
	tree, err := lock.Tree("tools")
	if err != nil {
		return nil, err
	}
	if err := checkRecipe(tree); err != nil {
		return nil, err
	}
	if root, err := openSound(ctx, dir, progress); err == nil || ctx.Err() != nil {
		return root, err
	}
	if err := errors.Join(checkSandbox(ctx), checkSubIDs()); err != nil {
		return nil, err
	}
	unlock, err := lockFile(dir + ".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Somebody else may have made it while we waited.
	if root, err := openSound(ctx, dir, progress); err == nil || ctx.Err() != nil {
		return root, err
	}

	paths, err := Fetch(ctx, tree, mirrors, progress)
	if err != nil {
		return nil, err
	}
	repo, err := os.MkdirTemp("", "chrysalis-repo-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(repo)
	// An ordinary user's mmdebstrap reads it as somebody else.
	if err := os.Chmod(repo, 0o755); err != nil {
		return nil, err
	}
	if err := writeRepository(ctx, repo, tree, paths); err != nil {
		return nil, fmt.Errorf("make a local repository of the tools: %w", err)
	}

	progress("unpack tools", 0, 0)
	half := dir + ".new"
	if err := removeTree(half); err != nil {
		return nil, err
	}
	names := make([]string, len(tree.Packages))
	for i, p := range tree.Packages {
		names[i] = p.Name
	}
	if err := os.Mkdir(half, 0o755); err != nil {
		return nil, err
	}
	// By way of a tar, because the tree that mmdebstrap makes for an ordinary user
	// belongs to subordinate user ids: this one is the user's own.
	build := exec.CommandContext(ctx, "mmdebstrap",
		"--variant=apt", "--format=tar", "--architectures=amd64", "--skip=check/qemu,output/dev",
		"--include="+strings.Join(names, ","),
		"--aptopt=APT::Install-Recommends \"false\"",
		"--aptopt=Acquire::Languages \"none\"",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=force-unsafe-io",
		tree.Suites[0].Name, "-",
		// apt takes the address apart at spaces.
		"deb [trusted=yes] "+(&url.URL{Scheme: "copy", Path: repo}).String()+" ./")
	build.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", tree.Epoch().Unix()), "LC_ALL=C.UTF-8")
	if os.Geteuid() == 0 {
		// An ordinary user's mmdebstrap needs newuidmap, which works in no namespace of
		// ours. Its only source is the local folder in any case.
		build.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	unpack := exec.CommandContext(ctx, "tar", "--extract", "--no-same-owner", "--preserve-permissions", "--exclude=./dev/*", "--directory="+half)
	if err := pipe(build, unpack); err != nil {
		return nil, err
	}
	if err := forget(half); err != nil {
		return nil, err
	}
	if err := toolsroot.Seal(ctx, half); err != nil {
		return nil, err
	}
	// A damaged one goes now that there is another.
	if err := removeTree(dir); err != nil {
		return nil, err
	}
	if err := os.Rename(half, dir); err != nil {
		return nil, fmt.Errorf("put the tools root in place: %w", err)
	}
	return toolsroot.Open(dir)
}

// openSound opens the tools root at dir if it is as it was made.
func openSound(ctx context.Context, dir string, progress Progress) (*toolsroot.Root, error) {
	root, err := toolsroot.Open(dir)
	if err != nil {
		return nil, err
	}
	progress("check tools", 0, 0)
	if err := root.Verify(ctx); err != nil {
		return nil, err
	}
	return root, nil
}

// forget takes out of a new tools root what tells when and where it was made, and
// what keeps an ordinary user from reading all of it.
func forget(root string) error {
	// It names the local folder, which is elsewhere each time.
	if err := os.WriteFile(filepath.Join(root, "etc/apt/sources.list"), nil, 0o644); err != nil {
		return err
	}
	// Logs have times, and ldconfig's cache has inodes.
	for _, dir := range []string{"var/log", "var/cache"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			return os.Remove(path)
		})
		if err != nil {
			return fmt.Errorf("empty %s of the tools root: %w", dir, err)
		}
	}
	// Python's compiler does not write the same bytes each time: they tell which
	// strings it happened to share. Without them Python reads the packages' own source.
	//
	// The shadow files are nobody's to read, and there are no passwords in them;
	// whoever made the root must be able to check it.
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == "__pycache__" {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			return fs.SkipDir
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Mode()&0o400 != 0 {
			return err
		}
		return os.Chmod(path, info.Mode()|0o400)
	})
}

// pipe runs two commands, the output of one being the input of the other.
func pipe(from, to *exec.Cmd) error {
	var fromErrors, toErrors bytes.Buffer
	from.Stderr, to.Stderr = &fromErrors, &toErrors
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	from.Stdout, to.Stdin = w, r
	if err := to.Start(); err != nil {
		r.Close()
		w.Close()
		return fmt.Errorf("%s: %w", to.Args[0], err)
	}
	r.Close()
	fromErr := from.Run()
	w.Close()
	toErr := to.Wait()
	if fromErr != nil {
		return fmt.Errorf("%s: %w\n%s", from.Args[0], fromErr, lastLines(fromErrors.String(), 20))
	}
	if toErr != nil {
		return fmt.Errorf("%s: %w\n%s", to.Args[0], toErr, lastLines(toErrors.String(), 20))
	}
	return nil
}

// writeRepository lays out a flat Debian repository of hash-checked packages.
func writeRepository(ctx context.Context, dir string, tree *Tree, paths []string) error {
	stanzas := make([]string, len(paths))
	errs := make([]error, len(paths))
	var group sync.WaitGroup
	slots := make(chan struct{}, 4)
	for i, p := range tree.Packages {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			name := p.SHA256[:16] + ".deb"
			if errs[i] = copyFile(paths[i], filepath.Join(dir, name), 0o644); errs[i] != nil {
				return
			}
			control, err := exec.CommandContext(ctx, "dpkg-deb", "-f", paths[i]).Output()
			if err != nil {
				errs[i] = fmt.Errorf("package %s: %w", p.Name, err)
				return
			}
			stanzas[i] = fmt.Sprintf("%s\nFilename: ./%s\nSize: %d\nSHA256: %s\n", strings.TrimSpace(string(control)), name, p.Size, p.SHA256)
		})
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "Packages"), []byte(strings.Join(stanzas, "\n")), 0o644)
}
