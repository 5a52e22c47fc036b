package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"chrysalis/agent/gpu"
	"chrysalis/image/driver"
)

const (
	helperArg = "gpu-helper" // how this program is called to become the helper
	// helperRoot is the helper's root, as the agent sees it.
	helperRoot   = enginePoint + "/" + driver.HelperRoot
	helperCgroup = "/sys/fs/cgroup/gpu"
	// helperMemory bounds the helper's memory, in bytes. It takes about a third.
	helperMemory = 64 << 20
)

// startHelper starts the NVML helper in a sandbox of its own and returns a client
// of it, and a channel that gets its exit status.
func startHelper() (*gpu.Client, <-chan syscall.WaitStatus, error) {
	err := writeCgroup([]setting{
		{"/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids"},
		{helperCgroup, ""},
		{helperCgroup + "/memory.max", strconv.Itoa(helperMemory)},
		{helperCgroup + "/memory.oom.group", "1"},
		{helperCgroup + "/pids.max", "64"},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("limit the GPU helper: %w", err)
	}
	cgroup, err := unix.Open(helperCgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open %s: %w", helperCgroup, err)
	}
	defer unix.Close(cgroup)
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer theirIn.Close()
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, in.Close())
	}
	defer theirOut.Close()
	_, ended, err := reaper.fork(initPath, []string{helperArg}, &syscall.ProcAttr{
		Env: []string{},
		// Where the agent's own words go: nowhere, but in a debug image.
		Files: []uintptr{theirIn.Fd(), theirOut.Fd(), os.Stderr.Fd()},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  engineNamespaces,
			UseCgroupFD: true, CgroupFD: cgroup,
			Setsid: true,
		},
	})
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("start the GPU helper: %w", err), in.Close(), out.Close())
	}
	return gpu.NewClient(in, out, func() { killEngine(helperCgroup) }, gpu.Timeout), ended, nil
}

// enterHelper runs in the child: it becomes the helper, with no more than that
// needs. It returns only on an error.
func enterHelper() error {
	runtime.LockOSThread() // capabilities and filters belong to threads
	if err := buildHelperRoot(); err != nil {
		return err
	}
	if err := limitResources(); err != nil {
		return err
	}
	// NVIDIA's driver asks for this one before it changes the ready state. What else
	// it allows, the system call filter does not.
	if err := dropPrivileges(0, 1<<unix.CAP_SYS_ADMIN); err != nil {
		return err
	}
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited files: %w", err)
	}
	// What an engine may call is more than enough.
	if err := loadFilters(nil, false); err != nil {
		return err
	}
	return fmt.Errorf("execute %s: %w", driver.Helper, unix.Exec(driver.Helper, []string{driver.Helper}, []string{}))
}

// buildHelperRoot makes the helper's folder of the engine disk the root, with the
// driver's device nodes. NVIDIA's library works without /proc and /sys.
func buildHelperRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	nodes, err := filepath.Glob("/dev/nvidia*")
	if err != nil {
		return err
	}
	at := func(path string) string { return filepath.Join(helperRoot, path) }
	for _, m := range []mount{
		{helperRoot, helperRoot, "", unix.MS_BIND, ""},
		{"", helperRoot, "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV, ""},
		{"tmpfs", at("dev"), "tmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=32"},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for _, node := range append(nodes, "/dev/null", "/dev/urandom") {
		target := at("dev/" + strings.TrimPrefix(node, "/dev/"))
		if err := os.WriteFile(target, nil, 0o644); err != nil {
			return err
		}
		if err := unix.Mount(node, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
	}
	if err := unix.Mount("", at("dev"), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("close /dev: %w", err)
	}
	return pivot(helperRoot)
}
