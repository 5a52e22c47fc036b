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

// Where the agent keeps the engines' doors and their cgroups: a folder in each for
// each model.
const (
	doorPath   = "/run/door"
	enginePath = "/sys/fs/cgroup/engine"
)

// agentReserve is the memory, in bytes, that is the agent's.
const agentReserve = 128 << 20

// startEngine starts an engine for each model, each in a sandbox of its own in
// which it sees that model only, and waits until all of them answer. Meanwhile the
// weights are read ahead.
func (a *agent) startEngine(ctx context.Context) error {
	if err := checkSyscalls(a.profile.Seccomp); err != nil {
		return because(guest.ReasonEngineProfile, err)
	}
	reserve := uint64(agentReserve)
	if a.gpuSet != nil {
		reserve += helperMemory
	}
	if err := makeCgroup(a.profile.Needs.MemoryMiB, reserve); err != nil {
		return fmt.Errorf("limit the engine: %w", err)
	}
	for i, m := range a.models {
		child, err := a.newEngine(i, m)
		if err != nil {
			return err
		}
		a.children = append(a.children, child)
	}
	a.prefetch(ctx)
	started := make(chan error, len(a.children))
	for _, child := range a.children {
		go a.guard(func() {
			err := child.run(ctx, started)
			a.end(a.diskError(err))
		})
	}
	for range a.children {
		if err := <-started; err != nil {
			return a.diskError(err)
		}
	}
	return nil
}

// newEngine renders the command for a model and prepares the engine's sandbox.
func (a *agent) newEngine(i int, m model) (*supervisor, error) {
	argv, env, err := a.profile.Command(a.manifest, m.card, runtime.NumCPU())
	if err != nil {
		return nil, because(guest.ReasonEngineProfile, err)
	}
	number := strconv.Itoa(i)
	cgroup, group, err := makeEngineCgroup(number)
	if err != nil {
		return nil, fmt.Errorf("limit the engine: %w", err)
	}
	door := filepath.Join(doorPath, number)
	box := sandbox{
		Root: a.engine, Model: m.path, Name: m.card.Name, Door: door,
		Argv: argv, Env: env, Seccomp: a.profile.Seccomp, Loopback: a.profile.Loopback, Devices: a.gpuNodes,
	}
	return &supervisor{
		start: func(output *os.File) (<-chan syscall.WaitStatus, error) {
			if err := makeDoor(door); err != nil {
				return nil, err
			}
			return box.start(cgroup, output)
		},
		kill:    func() { killEngine(group) },
		socket:  filepath.Join(door, "engine.sock"),
		health:  a.profile.Health,
		patient: a.profile.ReadyTime(),
		output:  &a.engineLog,
		changed: a.engineChanged,

		restarts: &a.restarts,
	}, nil
}

// engineChanged says whether the engines of all models answer.
func (a *agent) engineChanged() {
	a.engines.Lock() // so that the last to ask is the last to say
	defer a.engines.Unlock()
	up := true
	for _, child := range a.children {
		up = up && child.ready()
	}
	a.state.SetEngine(up)
}

// anyReady reports whether some engine answers. A request for a model whose engine
// does not is told so when it is dialled.
func (a *agent) anyReady() bool {
	for _, child := range a.children {
		if child.ready() {
			return true
		}
	}
	return false
}

// makeDoor makes the folder that an engine's socket appears in: a file system
// of its own, so small that an engine cannot hoard anything in it, and a new one
// for every start, so that an engine leaves nothing to the next.
func makeDoor(door string) error {
	if err := os.MkdirAll(door, 0o700); err != nil {
		return err
	}
	// EINVAL: nothing is mounted there, this is the first.
	if err := unix.Unmount(door, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
		return fmt.Errorf("take away the last engine's door: %w", err)
	}
	data := fmt.Sprintf("mode=0700,uid=%d,gid=%d,size=64k,nr_inodes=16", engineID, engineID)
	if err := unix.Mount("tmpfs", door, "tmpfs", safe|unix.MS_NOSYMFOLLOW, data); err != nil {
		return fmt.Errorf("mount the engine's door: %w", err)
	}
	return nil
}

// makeCgroup makes the cgroup that all engines are in. What they take beyond its
// limits they take from themselves, and however many threads they have, they share
// the processors with the agent as one. reserve is the memory, in bytes, that they can
// never have.
func makeCgroup(needMiB int, reserve uint64) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	total := uint64(info.Totalram) * uint64(info.Unit)
	if need := max(2*reserve, reserve+uint64(needMiB)<<20); total < need {
		return fmt.Errorf("the VM has %d MiB of memory, expected at least %d", total>>20, need>>20)
	}
	return writeCgroup([]setting{
		{"/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids"},
		{enginePath, ""},
		{enginePath + "/memory.max", strconv.FormatUint(total-reserve, 10)},
		{enginePath + "/cgroup.subtree_control", "+memory +pids"},
	})
}

// makeEngineCgroup makes one engine's cgroup and returns it as an open folder, and
// its path. If it runs out of memory, all of it dies, and no other engine.
func makeEngineCgroup(number string) (int, string, error) {
	path := enginePath + "/" + number
	err := writeCgroup([]setting{
		{path, ""},
		{path + "/memory.oom.group", "1"},
		{path + "/pids.max", "1024"},
	})
	if err != nil {
		return 0, "", err
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, "", fmt.Errorf("open %s: %w", path, err)
	}
	return fd, path, nil
}

// A setting is a cgroup's file and what to write to it, or a cgroup to make.
type setting struct{ path, value string }

func writeCgroup(settings []setting) error {
	for _, f := range settings {
		var err error
		if f.value == "" {
			err = os.Mkdir(f.path, 0o755)
		} else {
			err = os.WriteFile(f.path, []byte(f.value), 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// killEngine kills whatever is in an engine's cgroup.
func killEngine(cgroup string) {
	err := os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.printf("kill the engine: %v", err)
	}
}
