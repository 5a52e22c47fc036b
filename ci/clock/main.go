// Command clock runs a command, and all that it starts, with another wall clock.
//
//	clock SECONDS COMMAND [ARGUMENT]...
//
// A time namespace cannot do it, for it has no CLOCK_REALTIME, and a library that
// is loaded first is not seen by static programs, of which the go command is one.
// So the processes are traced: the vDSO is hidden from each new program, which
// then asks the kernel for the time, and a seccomp filter hands these calls, and no
// others, to the tracer, which answers them.
//
// It needs root, because a filter without no_new_privs does, and programs that
// become another user (newuidmap) must still be able to. The times that the kernel
// gives to files are the real ones.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"chrysalis/ci/ptrace"
)

// filtered is in the environment of this program where it is to put itself under
// the filter and to become the command.
const filtered = "CHRYSALIS_CI_CLOCK"

// Only the thread that traces may, and only the main one is traced from the start.
func init() { runtime.LockOSThread() }

func main() {
	if os.Getenv(filtered) != "" {
		fmt.Fprintln(os.Stderr, "clock:", become(os.Args[1:]))
		os.Exit(127)
	}
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: clock SECONDS COMMAND [ARGUMENT]...")
		os.Exit(2)
	}
	seconds, err := strconv.ParseInt(os.Args[1], 10, 64)
	status := 1
	if err == nil {
		status, err = trace(seconds, os.Args[2:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "clock:", err)
	}
	os.Exit(status)
}

// become waits until it is traced, puts itself under the filter and executes the
// command.
func become(args []string) error {
	if err := ptrace.Await(); err != nil {
		return err
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	const (
		nr, arch, low0, low1 = 0, 4, 16, 24 // offsets in struct seccomp_data
		allow, toTracer      = unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_TRACE
	)
	load := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: k}
	}
	// Jumps count instructions from the next one.
	when := func(code uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | code, K: k, Jt: yes, Jf: no}
	}
	ret := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET, K: k} }
	filter := []unix.SockFilter{
		load(arch),
		when(unix.BPF_JEQ, unix.AUDIT_ARCH_X86_64, 0, 11), // allow
		load(nr),
		when(unix.BPF_JEQ, unix.SYS_GETTIMEOFDAY, 10, 0), // to the tracer
		when(unix.BPF_JEQ, unix.SYS_TIME, 9, 0),
		when(unix.BPF_JEQ, unix.SYS_CLOCK_GETTIME, 3, 0),
		when(unix.BPF_JEQ, unix.SYS_FUTEX, 0, 6), // allow
		load(low1),
		when(unix.BPF_JSET, futexClockRealtime, 5, 4),
		load(low0),
		when(unix.BPF_JEQ, unix.CLOCK_REALTIME, 3, 0),
		when(unix.BPF_JEQ, unix.CLOCK_REALTIME_COARSE, 2, 0),
		when(unix.BPF_JEQ, unix.CLOCK_TAI, 1, 0),
		ret(allow),
		ret(toTracer),
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("set the filter: %w; it takes root", errno)
	}
	os.Unsetenv(filtered)
	return unix.Exec(path, args, os.Environ())
}

const (
	futexClockRealtime = 256 // FUTEX_CLOCK_REALTIME
	atIgnore, atVDSO   = 1, 33
	options            = unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE |
		unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACESECCOMP | unix.PTRACE_O_EXITKILL
)

// trace runs the command and answers for the clock until all that it started has
// ended. It returns the status that the command ended with.
func trace(offset int64, args []string) (int, error) {
	first, err := ptrace.Start(filtered, args, options)
	if err != nil {
		return 1, err
	}
	status := 1
	for {
		var ws unix.WaitStatus
		pid, err := wait(&ws)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return status, nil
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		}
		if !ws.Stopped() {
			if pid == first {
				if status = ws.ExitStatus(); ws.Signaled() {
					status = 128 + int(ws.Signal())
				}
			}
			continue
		}
		request, signal := unix.PTRACE_CONT, 0
		switch event := int(ws>>16) & 0xff; {
		case event == unix.PTRACE_EVENT_SECCOMP:
			err = answer(pid, offset)
		case event == unix.PTRACE_EVENT_EXEC:
			err = hideVDSO(pid)
		case event == unix.PTRACE_EVENT_STOP && ws.StopSignal() != unix.SIGTRAP:
			request = unix.PTRACE_LISTEN // until it is continued
		case event == 0:
			signal = int(ws.StopSignal())
		}
		if err == nil {
			err = ptrace.Do(request, pid, signal)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) { // it was killed meanwhile
			return 1, fmt.Errorf("process %d: %w", pid, err)
		}
	}
}

// wait waits for any process. It does not tell Go's scheduler, for which there is
// nothing else to run: a build asks for the time a million times.
func wait(ws *unix.WaitStatus) (int, error) {
	pid, _, errno := unix.RawSyscall6(unix.SYS_WAIT4, ^uintptr(0), uintptr(unsafe.Pointer(ws)), unix.WALL, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(pid), nil
}

// answer does what one of the filtered calls would do, with another time.
func answer(pid int, offset int64) error {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &r); err != nil {
		return err
	}
	now := time.Now()
	seconds, nanoseconds := uint64(now.Unix()+offset), uint64(now.Nanosecond())
	var at, result uint64 // where the answer goes; what is returned
	var data []byte
	pair := func(b uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, seconds), b)
	}
	switch r.Orig_rax {
	case unix.SYS_CLOCK_GETTIME:
		at, data = r.Rsi, pair(nanoseconds)
	case unix.SYS_GETTIMEOFDAY:
		at, data = r.Rdi, pair(nanoseconds/1000)
	case unix.SYS_TIME:
		at, data, result = r.Rdi, pair(0)[:8], seconds
	case unix.SYS_FUTEX:
		return shiftDeadline(pid, &r, offset)
	default:
		return fmt.Errorf("system call %d was not asked for", r.Orig_rax)
	}
	if at != 0 {
		local := []unix.Iovec{{Base: &data[0], Len: uint64(len(data))}}
		if _, err := unix.ProcessVMWritev(pid, local, []unix.RemoteIovec{{Base: uintptr(at), Len: len(data)}}, 0); err != nil {
			return nil // a bad address: the call itself says so
		}
	}
	r.Orig_rax, r.Rax = ^uint64(0), result // no call is made
	return unix.PtraceSetRegs(pid, &r)
}

// shiftDeadline turns an absolute time of the shifted clock into the kernel's.
func shiftDeadline(pid int, r *unix.PtraceRegs, offset int64) error {
	const waitBitset = 9
	// Below what a function may use under its stack pointer.
	at := (r.Rsp - 512) &^ 15
	// A call that a signal interrupted is made again with the address of then.
	if r.Rsi&0x7f != waitBitset || r.R10 == 0 || r.R10 == at {
		return nil
	}
	spec := make([]byte, 16)
	if _, err := unix.PtracePeekData(pid, uintptr(r.R10), spec); err != nil {
		return nil
	}
	binary.LittleEndian.PutUint64(spec, binary.LittleEndian.Uint64(spec)-uint64(offset))
	if _, err := unix.PtracePokeData(pid, uintptr(at), spec); err != nil {
		return nil
	}
	r.R10 = at
	return unix.PtraceSetRegs(pid, r)
}

// hideVDSO takes the vDSO out of a new program's auxiliary vector, so that it has
// to ask the kernel for the time.
func hideVDSO(pid int) error {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &r); err != nil {
		return err
	}
	at := uintptr(r.Rsp)
	word := func() (uint64, error) {
		var b [8]byte
		_, err := unix.PtracePeekData(pid, at, b[:])
		at += 8
		return binary.LittleEndian.Uint64(b[:]), err
	}
	if _, err := word(); err != nil { // argc
		return err
	}
	for range 2 { // argv, envp
		for {
			w, err := word()
			if err != nil {
				return err
			}
			if w == 0 {
				break
			}
		}
	}
	for {
		kind, err := word()
		if err != nil || kind == 0 {
			return err
		}
		if kind == atVDSO {
			_, err := unix.PtracePokeData(pid, at-8, []byte{atIgnore, 0, 0, 0, 0, 0, 0, 0})
			return err
		}
		at += 8
	}
}
