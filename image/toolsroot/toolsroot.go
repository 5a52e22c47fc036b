// Package toolsroot runs programs out of the pinned Debian tree that holds
// everything Chrysalis does not write itself: mkosi, ukify, QEMU, OVMF, swtpm,
// vhost-device-vsock, erofs-utils, cryptsetup. Nothing of these ever comes from
// the host, so what is measured on one machine is what runs on another.
package toolsroot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// Root is a tools root on this machine.
type Root struct {
	Dir string // the tree's top, absolute
}

// CacheDir returns the folder that holds all of Chrysalis's caches:
// $XDG_CACHE_HOME/chrysalis, by default ~/.cache/chrysalis.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w; set XDG_CACHE_HOME", err)
	}
	return filepath.Join(dir, "chrysalis"), nil
}

// Path returns where the tools root made from a lock belongs. The key is the
// hash of what the lock says about the tree, so two versions live side by side.
func Path(key string) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "tools", key), nil
}

// stamp is written last, so a tree without it is half made.
const stamp = ".chrysalis-complete"

// Open returns the tools root at dir, or an error that says how to make it.
func Open(dir string) (*Root, error) {
	if _, err := os.Stat(filepath.Join(dir, stamp)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no tools root at %s; make it with 'chrysalis image tools'", dir)
		}
		return nil, fmt.Errorf("open the tools root: %w", err)
	}
	return &Root{Dir: dir}, nil
}

// Seal marks the tree at dir as complete and notes what is in it, for Verify.
func Seal(ctx context.Context, dir string) error {
	list, err := (&Root{Dir: dir}).List(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, stamp), seal(list), 0o644); err != nil {
		return fmt.Errorf("complete the tools root: %w", err)
	}
	return nil
}

// Command is one run of a program inside the root.
type Command struct {
	Args      []string // program and arguments, as the root sees them
	Dir       string   // working directory; "/" when empty
	ReadOnly  []string // host paths seen at the same path, read-only
	ReadWrite []string // host paths seen at the same path, writable
	Bind      []Bind   // host paths seen elsewhere
	Devices   []string // the host's device nodes, or folders of them, that it sees beside a minimal /dev
	Offline   bool     // a network namespace without interfaces
	// Privileged leaves the program the capabilities that the caller has. Any
	// other has none, even where the caller is root.
	Privileged bool
	Env        []string // the whole environment beside PATH, HOME, LOGNAME and LC_ALL
}

// Bind shows a host path at another place.
type Bind struct {
	Host, Inside string
	Writable     bool
}

// Cmd returns the command, ready to be started. The program sees the tree
// read-only, its own process namespace, and of the host only what c names, all of
// which must be there. It is killed when the thread that started it ends: start a
// long-lived one from a locked thread.
func (r *Root) Cmd(ctx context.Context, c Command) *exec.Cmd {
	args := []string{
		"--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
		"--hostname", "chrysalis",
		// The root itself is a fresh tmpfs, so that any host path can be bound.
		"--ro-bind", filepath.Join(r.Dir, "usr"), "/usr",
		"--ro-bind", filepath.Join(r.Dir, "etc"), "/etc",
		"--ro-bind", filepath.Join(r.Dir, "var"), "/var",
		"--symlink", "usr/bin", "/bin", "--symlink", "usr/sbin", "/sbin",
		"--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64",
		"--proc", "/proc", "--dir", "/tmp", "--dir", "/run", "--dir", "/root", "--tmpfs", "/var/tmp",
		"--dir", "/home", "--dir", "/srv", "--dir", "/mnt", "--dir", "/media", "--dir", "/opt", "--dir", "/boot", "--dir", "/sys",
		"--clearenv",
		"--setenv", "PATH", "/usr/sbin:/usr/bin:/sbin:/bin",
		"--setenv", "HOME", "/root", "--setenv", "LOGNAME", "chrysalis",
		"--setenv", "LC_ALL", "C.UTF-8",
	}
	args = append(args, "--dev", "/dev")
	for _, path := range c.Devices {
		args = append(args, "--dev-bind", path, path)
	}
	if !c.Privileged {
		args = append(args, "--cap-drop", "ALL")
	}
	if c.Offline {
		args = append(args, "--unshare-net")
	}
	for _, path := range c.ReadOnly {
		args = append(args, "--ro-bind", path, path)
	}
	for _, path := range c.ReadWrite {
		args = append(args, "--bind", path, path)
	}
	for _, b := range c.Bind {
		how := "--ro-bind"
		if b.Writable {
			how = "--bind"
		}
		args = append(args, how, b.Host, b.Inside)
	}
	for _, entry := range c.Env {
		for i := range entry {
			if entry[i] == '=' {
				args = append(args, "--setenv", entry[:i], entry[i+1:])
				break
			}
		}
	}
	dir := c.Dir
	if dir == "" {
		dir = "/"
	}
	args = append(args, "--chdir", dir, "--")
	cmd := exec.CommandContext(ctx, "bwrap", append(args, c.Args...)...)
	// A group of its own, so that an interrupt at the terminal reaches us first
	// and a cancelled context ends the whole tree. --die-with-parent acts from when
	// bwrap runs, Pdeathsig before that.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}
