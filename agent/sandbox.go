package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// engineID is the user and group that the engine runs as. Nothing else does.
const engineID = 1000

// sandbox is what the agent tells its child about the engine to become. The
// child is this same program, started in namespaces of its own; see
// enterSandbox.
type sandbox struct {
	Root    string // the engine disk's mount point
	Model   string // the model disk's mount point
	Name    string // of the model, ORG/NAME
	Door    string // the folder in which the engine makes its socket
	Argv    []string
	Env     []string
	Seccomp []string // beside engineSyscalls
	Devices []string // in /dev, beside those that every engine has: the GPUs'
	// Loopback gives its network namespace, which has no other interface, a working
	// 127.0.0.1.
	Loopback bool
}

// engineNamespaces: own mounts, processes, network without interfaces, IPC,
// host name and cgroup view.
const engineNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

const (
	initPath    = "/init"  // this program, in the initrd
	engineArg   = "engine" // how it is called to become the engine
	sandboxExit = 125      // the child's status when it could not
)

// start starts the engine's process in a cgroup, given as an open folder, and
// returns a channel that gets its exit status.
func (s *sandbox) start(cgroup int, output *os.File) (<-chan syscall.WaitStatus, error) {
	config, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	defer w.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	_, exit, err := reaper.fork(initPath, []string{engineArg}, &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{null.Fd(), output.Fd(), output.Fd(), r.Fd()},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  engineNamespaces,
			UseCgroupFD: true, CgroupFD: cgroup,
			Setsid: true,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("start the engine's process: %w", err)
	}
	// The child has the only other end: if it is gone, this fails rather than waits.
	r.Close()
	if _, err := w.Write(config); err != nil {
		return nil, fmt.Errorf("tell the engine's process what to run: %w", err)
	}
	return exit, nil
}

// enterSandbox runs in the child: it gives up everything, step by step, and
// becomes the engine. It returns only on an error.
func enterSandbox() error {
	runtime.LockOSThread() // capabilities and filters belong to threads
	config, err := io.ReadAll(io.LimitReader(os.NewFile(3, "config"), 1<<20))
	if err != nil {
		return err
	}
	var s sandbox
	if err := json.Unmarshal(config, &s); err != nil {
		return err
	}
	if err := s.buildRoot(); err != nil {
		return err
	}
	if s.Loopback {
		if err := raiseLoopback(); err != nil {
			return fmt.Errorf("raise the loopback device: %w", err)
		}
	}
	if err := limitResources(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("allow huge pages: %w", err)
	}
	if err := dropPrivileges(engineID, 0); err != nil {
		return err
	}
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited files: %w", err)
	}
	if err := restrictFiles(); err != nil {
		return err
	}
	// The last step: from here on only the allowed calls work.
	if err := loadFilters(s.Seccomp, s.Loopback); err != nil {
		return err
	}
	return fmt.Errorf("execute %s: %w", s.Argv[0], unix.Exec(s.Argv[0], s.Argv, s.Env))
}

// buildRoot makes the engine disk the root, with what the engine may see beside
// it, and unmounts everything else.
func (s *sandbox) buildRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	type step struct {
		what   string
		source string
		target string
		fstype string
		flags  uintptr
		data   string
	}
	const readOnly = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	at := func(path string) string { return filepath.Join(s.Root, path) }
	steps := []step{
		{"engine disk", s.Root, s.Root, "", unix.MS_BIND, ""},
		{"engine disk read-only", "", s.Root, "", readOnly, ""},
		{"/tmp", "tmpfs", at("tmp"), "tmpfs", safe, "mode=0700,uid=1000,gid=1000,size=64m,nr_inodes=4k"},
		{"/run", "tmpfs", at("run"), "tmpfs", safe, "mode=0755,size=64k,nr_inodes=16"},
		{"/dev", "tmpfs", at("dev"), "tmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=32"},
		{"/models", "tmpfs", at("models"), "tmpfs", safe, "mode=0755,size=64k,nr_inodes=64"},
	}
	for _, m := range steps {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.what, err)
		}
	}
	bind := func(source, target string, folder bool, flags uintptr) error {
		var err error
		if folder {
			err = os.Mkdir(target, 0o755)
		} else {
			err = os.WriteFile(target, nil, 0o644)
		}
		if err != nil {
			return err
		}
		if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		if flags != 0 {
			return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
		}
		return nil
	}
	var errs []error
	for _, name := range append([]string{"null", "zero", "full", "random", "urandom"}, s.Devices...) {
		errs = append(errs, bind("/dev/"+name, at("dev/"+name), false, 0))
	}
	errs = append(errs, bind(s.Door, at("run/engine"), true, safe))
	errs = append(errs,
		os.Mkdir(at(filepath.Join("models", filepath.Dir(s.Name))), 0o755),
		bind(s.Model, at(filepath.Join("models", s.Name)), true, safe|unix.MS_RDONLY))
	for _, path := range []string{"dev", "run", "models"} {
		errs = append(errs, unix.Mount("", at(path), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lay out the engine's root: %w", err)
	}
	return pivot(s.Root)
}

// pivot makes a mounted folder the root and leaves the agent's.
func pivot(root string) error {
	// pivot_root(".", ".") stacks the old root on the new one, from where it is
	// taken off: pivot_root(2), "pivot_root(".", ".")".
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot to the new root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the agent's root: %w", err)
	}
	return unix.Chdir("/")
}

// raiseLoopback turns the network namespace's own loopback device on.
func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, request); err != nil {
		return err
	}
	request.SetUint16(request.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

// limitResources bounds what cgroups do not.
func limitResources() error {
	for _, l := range []struct {
		what     string
		resource int
		limit    uint64
	}{
		{"core dumps", unix.RLIMIT_CORE, 0},
		{"open files", unix.RLIMIT_NOFILE, 4096},
		{"message queues", unix.RLIMIT_MSGQUEUE, 0},
	} {
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.limit, Max: l.limit}); err != nil {
			return fmt.Errorf("limit %s: %w", l.what, err)
		}
	}
	return nil
}

// dropPrivileges gives up every capability but those of a mask (bits of the first
// 32), all groups, and with id other than 0 being root. There is no way back.
func dropPrivileges(id int, keep uint32) error {
	for capability := uintptr(0); ; capability++ {
		if capability < 32 && keep&(1<<capability) != 0 {
			continue
		}
		// EINVAL: past the last one that this kernel knows.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err == unix.EINVAL {
			break
		} else if err != nil {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("drop groups: %w", err)
	}
	if id != 0 {
		if err := syscall.Setresgid(id, id, id); err != nil {
			return fmt.Errorf("change group: %w", err)
		}
		if err := syscall.Setresuid(id, id, id); err != nil {
			return fmt.Errorf("change user: %w", err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	kept := [2]unix.CapUserData{{Effective: keep, Permitted: keep}}
	if err := unix.Capset(&header, &kept[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}
