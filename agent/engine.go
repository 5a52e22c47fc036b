package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
)

// Where the agent keeps the engine's door and its cgroup.
const (
	doorPath   = "/run/door"
	enginePath = "/sys/fs/cgroup/engine"
)

// agentReserve is the memory, in bytes, that the engine can never have.
const agentReserve = 128 << 20

// startEngine renders the engine's command, prepares its sandbox, starts it
// under supervision and waits until it answers.
func (a *agent) startEngine(ctx context.Context) error {
	argv, env, err := a.profile.Command(a.manifest, runtime.NumCPU())
	if err == nil {
		err = checkSyscalls(a.profile.Seccomp)
	}
	if err != nil {
		return because(guest.ReasonEngineProfile, err)
	}
	cgroup, err := makeCgroup()
	if err != nil {
		return fmt.Errorf("limit the engine: %w", err)
	}
	box := sandbox{
		Root: a.engine, Models: a.models, Door: doorPath,
		Argv: argv, Env: env, Seccomp: a.profile.Seccomp,
	}
	a.child = &supervisor{
		start: func(output *os.File) (<-chan syscall.WaitStatus, error) {
			if err := makeDoor(); err != nil {
				return nil, err
			}
			return box.start(cgroup, output)
		},
		kill:    a.killEngine,
		socket:  filepath.Join(doorPath, "engine.sock"),
		health:  a.profile.Health,
		patient: a.profile.ReadyTime(),
		output:  &a.engineLog,
		state:   a.state,

		restarts: &a.restarts,
	}
	started := make(chan error, 1)
	go a.guard(func() {
		err := a.child.run(ctx, started)
		a.end(a.diskError(err))
	})
	return a.diskError(<-started)
}

// makeDoor makes the folder that the engine's socket appears in: a file system
// of its own, so small that an engine cannot hoard anything in it, and a new one
// for every start, so that an engine leaves nothing to the next.
func makeDoor() error {
	if err := os.MkdirAll(doorPath, 0o700); err != nil {
		return err
	}
	// EINVAL: nothing is mounted there, this is the first.
	if err := unix.Unmount(doorPath, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
		return fmt.Errorf("take away the last engine's door: %w", err)
	}
	data := fmt.Sprintf("mode=0700,uid=%d,gid=%d,size=64k,nr_inodes=16", engineID, engineID)
	if err := unix.Mount("tmpfs", doorPath, "tmpfs", safe|unix.MS_NOSYMFOLLOW, data); err != nil {
		return fmt.Errorf("mount the engine's door: %w", err)
	}
	return nil
}

// makeCgroup makes the engine's cgroup and returns it as an open folder. What
// the engine takes beyond its limits it takes from itself, and however many
// threads it has, they share the processors with the agent as one.
func makeCgroup() (int, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, err
	}
	total := uint64(info.Totalram) * uint64(info.Unit)
	if total < 2*agentReserve {
		return 0, fmt.Errorf("the VM has %d MiB of memory, expected at least %d", total>>20, 2*agentReserve>>20)
	}
	for _, f := range []struct{ path, value string }{
		{"/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids"},
		{enginePath, ""},
		{enginePath + "/memory.max", strconv.FormatUint(total-agentReserve, 10)},
		{enginePath + "/memory.oom.group", "1"},
		{enginePath + "/pids.max", "1024"},
	} {
		var err error
		if f.value == "" {
			err = os.Mkdir(f.path, 0o755)
		} else {
			err = os.WriteFile(f.path, []byte(f.value), 0)
		}
		if err != nil {
			return 0, err
		}
	}
	fd, err := unix.Open(enginePath, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", enginePath, err)
	}
	return fd, nil
}

// killEngine kills whatever is in the engine's cgroup.
func (a *agent) killEngine() {
	err := os.WriteFile(filepath.Join(enginePath, "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.printf("kill the engine: %v", err)
	}
}
