package launcher

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/terminal"
)

// DownOptions say how Down ends a VM.
type DownOptions struct {
	StateDir string
	Now      bool          // end it at once, whatever it is doing
	Timeout  time.Duration // for running requests to finish; DefaultDrain when zero
}

// ErrNotRunning is Down's answer when there is nothing to stop.
var ErrNotRunning = errors.New("no such VM is running")

// Down ends the VM of that name: it lets running requests finish, asks the VM to
// stop, and ends it by force when it does not. It returns when nothing of it is
// left but the logs of this last run. When ctx ends, what is left is killed.
func Down(ctx context.Context, name string, o DownOptions) error {
	if err := checkName(name); err != nil {
		return err
	}
	st, err := openStore(o.StateDir)
	if err != nil {
		return err
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultDrain
	}
	alive, err := st.live(name)
	if err != nil {
		return err
	}
	if len(alive) == 0 {
		return fmt.Errorf("%w: %q; 'chrysalis status' lists those that are", ErrNotRunning, name)
	}
	var failed error
	for _, r := range alive {
		failed = errors.Join(failed, r.stop(ctx, stopRequest{Now: o.Now, Timeout: o.Timeout}))
	}
	return failed
}

// stop ends one run and waits for the end.
func (r run) stop(ctx context.Context, req stopRequest) error {
	patience := 30 * time.Second // QEMU may have to be told twice, and swtpm and bwrap be reaped
	if !req.Now {
		patience += req.Timeout
		if state, err := r.readState(); err == nil && state.Payment != nil {
			patience += claimPatience
		}
	}
	limit, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	asked := r.askUntilHeard(limit, req)
	for asked == nil {
		if alive, err := r.settle(); err != nil || !alive {
			r.awaitExit()
			return err
		}
		select {
		case <-limit.Done():
			asked = limit.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	// It does not answer or does not end. Its children die with it.
	if alive, err := r.settle(); err != nil || !alive {
		r.awaitExit()
		return err
	}
	pid, err := r.holder()
	if err != nil {
		return fmt.Errorf("the VM %q does not stop (%w), and its supervisor cannot be found: %w", r.name, asked, err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return fmt.Errorf("end the supervisor of the VM %q: %w", r.name, err)
	}
	for range 500 {
		if alive, err := r.settle(); err != nil || !alive {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("the VM %q does not stop; its supervisor is process %d", r.name, pid)
}

// askPatience is how long a run may have nobody who hears what it is asked. `up`
// makes the run and then its supervisor, which then makes the control socket; and a
// supervisor that is ending closes it, whoever is asking, then frees its address, and
// writes down how its VM ended. To be killed meanwhile would take that from it.
const askPatience = 5 * time.Second

// askUntilHeard is askToStop for a run whose supervisor may not listen yet, or no
// longer.
func (r run) askUntilHeard(ctx context.Context, req stopRequest) error {
	deadline := time.Now().Add(askPatience)
	for {
		err := r.askToStop(ctx, req)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		if alive, settleErr := r.settle(); settleErr != nil || !alive {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// awaitExit gives a supervisor that has freed its lock, which is the last thing
// it does, the moment that it takes to be gone as a process.
func (r run) awaitExit() {
	state, err := r.readState()
	if err != nil || state.Supervisor == 0 {
		return
	}
	for range 100 {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", state.Supervisor))
		if err != nil || !bytes.Contains(line, []byte(r.id)) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// holder returns the process that the state names as supervisor, when that
// process really has this run's lock open: process ids are used again.
func (r run) holder() (int, error) {
	state, err := r.readState()
	if err != nil {
		return 0, err
	}
	want, err := os.Stat(r.path("lock"))
	if err != nil {
		return 0, err
	}
	dir := fmt.Sprintf("/proc/%d/fd", state.Supervisor)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if info, err := os.Stat(dir + "/" + e.Name()); err == nil && os.SameFile(info, want) {
			return state.Supervisor, nil
		}
	}
	return 0, fmt.Errorf("process %d is another program", state.Supervisor)
}

// Running lists the names of the VMs that are alive.
func Running(stateDir string) ([]string, error) {
	st, err := openStore(stateDir)
	if err != nil {
		return nil, err
	}
	names, err := st.names()
	if err != nil {
		return nil, err
	}
	var running []string
	for _, name := range names {
		alive, err := st.live(name)
		if err != nil {
			return nil, err
		}
		if len(alive) > 0 {
			running = append(running, name)
		}
	}
	return running, nil
}

// Status returns the state of the VM of that name, or of all VMs when name is
// empty: of each its live runs (two while one replaces the other), or else how
// its last run ended.
func Status(ctx context.Context, stateDir, name string) ([]State, error) {
	st, err := openStore(stateDir)
	if err != nil {
		return nil, err
	}
	names, err := st.named(name)
	if err != nil {
		return nil, err
	}
	states := []State{}
	for _, n := range names {
		alive, err := st.live(n)
		if err != nil {
			return nil, err
		}
		for _, r := range alive {
			state, err := r.current(ctx)
			if errors.Is(err, fs.ErrNotExist) {
				state, err = State{Name: n, Run: r.id, Life: LifeStarting}, nil // up has just made it
			}
			if err != nil {
				return nil, fmt.Errorf("read the state of the VM %q: %w", n, err)
			}
			states = append(states, state)
		}
		if len(alive) > 0 {
			continue
		}
		runs, err := st.runs(n)
		if err != nil {
			return nil, err
		}
		if len(runs) == 0 {
			continue
		}
		state, _ := runs[len(runs)-1].lastState()
		states = append(states, state)
	}
	if name != "" && len(states) == 0 {
		return nil, fmt.Errorf("there is no VM %q; 'chrysalis status' lists those that there are", name)
	}
	return states, nil
}

// LogKind names one of a VM's logs.
type LogKind string

// The logs.
const (
	LogEngine     LogKind = "engine"     // the engine's output until the first client connected
	LogConsole    LogKind = "console"    // firmware and kernel; the agent's too with a debug image
	LogSupervisor LogKind = "supervisor" // the launcher's own, with QEMU's and its helpers' messages
)

// Log writes a log of the VM's newest run to w, cleaned for a terminal. With
// follow it goes on until the run is over or ctx ends.
func Log(ctx context.Context, stateDir, name string, kind LogKind, follow bool, w io.Writer) error {
	if err := checkName(name); err != nil {
		return err
	}
	st, err := openStore(stateDir)
	if err != nil {
		return err
	}
	runs, err := st.runs(name)
	if err != nil {
		return err
	}
	if len(runs) == 0 {
		return fmt.Errorf("there is no VM %q; 'chrysalis status' lists those that there are", name)
	}
	r := runs[len(runs)-1]
	var path string
	switch kind {
	case LogEngine:
		path = r.path("engine.log")
	case LogConsole:
		path = r.path("io", "console.log")
	case LogSupervisor:
		path = r.path("supervisor.log")
	default:
		return fmt.Errorf("there is no log %q", kind)
	}
	out := terminal.NewWriter(w)
	defer out.Close()
	var f *os.File
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	for {
		alive, err := r.settle()
		if err != nil {
			return err
		}
		if f == nil {
			f, err = os.Open(path)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("read the log: %w", err)
			}
		}
		if f != nil {
			// The console is cut when it floods: begin again where it begins.
			if info, err := f.Stat(); err == nil {
				if at, err := f.Seek(0, io.SeekCurrent); err == nil && info.Size() < at {
					f.Seek(0, io.SeekStart)
				}
			}
			if _, err := io.Copy(out, f); err != nil {
				return fmt.Errorf("show the log: %w", err)
			}
		}
		if !follow || !alive {
			if f == nil {
				return fmt.Errorf("the VM %q has written no %s log", name, kind)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}
