// Command agent is PID 1 of a Chrysalis VM: the only program in its initrd. It
// checks and opens what the manifest names, starts the engine in a sandbox, and
// serves clients over vsock and TLS. phases.go is the boot, top to bottom.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
)

func main() {
	if len(os.Args) == 1 && os.Args[0] == engineArg {
		fmt.Fprintln(os.Stderr, "chrysalis: the engine could not be started:", enterSandbox())
		os.Exit(sandboxExit)
	}
	if len(os.Args) == 1 && os.Args[0] == helperArg {
		fmt.Fprintln(os.Stderr, "chrysalis: the GPU helper could not be started:", enterHelper())
		os.Exit(sandboxExit)
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "chrysalis agent: runs as PID 1 of a VM and nowhere else")
		os.Exit(2)
	}
	// A soft limit on the Go heap: past it the collector works harder rather than
	// taking memory from the engine. Clients get more: see serve.
	debug.SetMemoryLimit(heapLimit)
	// With huge pages the kernel would give the heap back what the collector has just
	// given up: one page in use brings 2 MiB. The engine may have them: enterSandbox.
	_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
	// For as many connections as the manifest can allow, on both sides.
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: maxDescriptors, Max: maxDescriptors})
	a := newAgent(time.Now(), kernelTime())
	a.guard(func() {
		a.end(a.boot())
	})
}

const (
	heapLimit      = 16 << 20 // bytes
	maxDescriptors = 16 << 10
)

// fault is an error together with the reason that the host is told.
type fault struct {
	reason guest.Reason
	err    error
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

// because gives an error a reason, unless it has one already.
func because(reason guest.Reason, err error) error {
	var f *fault
	if err == nil || errors.As(err, &f) {
		return err
	}
	return &fault{reason, err}
}

// guard runs f and ends the VM if it panics. The agent's own goroutines start
// with it; a server contains the panics of its connections.
func (a *agent) guard(f func()) {
	defer func() {
		if p := recover(); p != nil {
			a.end(&fault{guest.ReasonPanic, fmt.Errorf("panic: %v", p)})
		}
	}()
	f()
}

// endGrace is how long a VM that ends waits for its host to read the reason. A
// host that reads it ends the wait, so this is only long where nobody listens, or
// where an emulated VM's host is busy.
const endGrace = 20 * time.Second

// endExtra is how much longer everything else that end does may take.
const endExtra = 10 * time.Second

// end ends the VM. It is the only way out, from wherever it is called: the
// reason is told, the engine is killed, the machine is powered off.
func (a *agent) end(err error) {
	a.ending.Lock() // the first caller wins; it never unlocks
	// Whatever goes wrong from here on, even a panic, the machine goes off.
	time.AfterFunc(endGrace+endExtra, powerOff)
	a.stop() // no request is admitted and no engine started any more
	reason := guest.ReasonPanic
	var f *fault
	if errors.As(err, &f) {
		reason = f.reason
	}
	log.printf("the VM ends: %s: %v", reason, err)
	a.state.End(reason)
	killEngine(enginePath)
	killEngine(helperCgroup)
	if a.status == nil {
		a.lastWords()
	}
	if a.status != nil {
		ctx, cancel := context.WithTimeout(context.Background(), endGrace)
		defer cancel()
		a.state.WaitDelivered(ctx)
	}
	powerOff()
}

// lastWords opens the status port for a VM that ends before its time came, so
// that the host learns the reason. No driver but vsock's is bound for it.
func (a *agent) lastWords() {
	if err := stopAutoBinding(); err != nil {
		return
	}
	if err := loadModules(modulesPath, false); err != nil {
		log.printf("last words: %v", err)
	}
	if err := bindDevices(virtioVsock); err != nil {
		log.printf("last words: %v", err)
	}
	if err := a.openStatus(); err != nil {
		log.printf("last words: %v", err)
	}
}

// powerOff never returns. Nothing is mounted for writing, so there is nothing
// to flush.
func powerOff() {
	for {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		// It cannot fail for PID 1. If it did, ending PID 1 is what is left: the
		// kernel panics, and panic=-1 ends the machine.
		os.Exit(1)
	}
}

// kernelTime is the time since the kernel's start.
func kernelTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
