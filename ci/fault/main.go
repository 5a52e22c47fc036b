// Command fault runs a program and lets one of its system calls go wrong.
//
//	fault [-at N] [-do kill|cut|ERROR] [-class CLASS] [-count FILE] PROGRAM [ARGUMENT]...
//
// The calls are counted that change something that others see: files, folders, locks,
// processes, sockets (see classes). The Nth is not made: with kill its process gets
// SIGKILL instead, with cut so does every other process of this program, and with an
// error's name (ENOSPC, EROFS, EIO) it fails with that error, as do all calls of the
// class from then on, for a disk that is full stays full. With -at 0, or more than
// there are, nothing goes wrong. -count has the number of calls written to a file.
//
// Every process that executes the program is traced and counted, whoever starts it
// (a supervisor, say). A process that executes another one is let go at that moment
// and runs untraced. Status: the first process's, 128 plus the signal's number where a
// signal ended it.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"chrysalis/ci/ptrace"
)

// classes are the calls that are counted. A call is made by a path, a descriptor or
// neither; of those that write, only the ones to files count where a class says so.
var classes = map[string][]uint64{
	"write": {unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_WRITEV, unix.SYS_PWRITEV, unix.SYS_COPY_FILE_RANGE, unix.SYS_SENDFILE, unix.SYS_SPLICE, unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE},
	"name":  {unix.SYS_RENAME, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINK, unix.SYS_LINKAT, unix.SYS_SYMLINK, unix.SYS_SYMLINKAT, unix.SYS_UNLINK, unix.SYS_UNLINKAT, unix.SYS_RMDIR, unix.SYS_MKDIR, unix.SYS_MKDIRAT, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_CHMOD, unix.SYS_MKNODAT},
	"sync":  {unix.SYS_FSYNC, unix.SYS_FDATASYNC},
	"open":  {unix.SYS_OPENAT, unix.SYS_CREAT, unix.SYS_OPEN}, // those that create only
	"lock":  {unix.SYS_FLOCK},
	"start": {unix.SYS_CLONE, unix.SYS_CLONE3, unix.SYS_VFORK, unix.SYS_FORK, unix.SYS_EXECVE, unix.SYS_KILL, unix.SYS_PRCTL}, // CLONE_THREAD is none
	"talk":  {unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_CONNECT, unix.SYS_ACCEPT4, unix.SYS_SENDTO, unix.SYS_SENDMSG},
}

// Only the thread that traces may, and only the main one is traced from the start.
func init() { runtime.LockOSThread() }

const waiting = "CHRYSALIS_CI_FAULT" // in the environment of what is to be traced

func main() {
	if os.Getenv(waiting) != "" {
		if err := ptrace.Await(); err != nil {
			fmt.Fprintln(os.Stderr, "fault:", err)
			os.Exit(127)
		}
		os.Unsetenv(waiting)
		fmt.Fprintln(os.Stderr, "fault:", unix.Exec(os.Args[1], os.Args[1:], os.Environ()))
		os.Exit(127)
	}
	at := flag.Int("at", 0, "the call that goes wrong, from 1")
	do := flag.String("do", "kill", "what happens: kill, cut, or an error's name")
	class := flag.String("class", "", "only calls of this class: "+strings.Join(names(), ", "))
	count := flag.String("count", "", "write how many calls there were to this `file`")
	flag.Parse()
	t, err := newTracer(*at, *do, *class, flag.Args())
	status := 1
	if err == nil {
		status, err = t.trace(flag.Args())
	}
	if err == nil && *count != "" {
		err = os.WriteFile(*count, []byte(strconv.Itoa(t.seen)), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fault:", err)
		status = 1
	}
	os.Exit(status)
}

func names() (list []string) {
	for name := range classes {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}

type tracer struct {
	at, seen int
	kill     bool
	all      bool       // kill all of them
	errno    unix.Errno // or fail
	counted  map[uint64]bool
	self     string
	program  string       // as /proc/PID/exe has it
	fails    map[int]bool // threads whose call is to fail
	groups   map[int]bool // processes that execute the program
}

func newTracer(at int, do, class string, args []string) (*tracer, error) {
	t := &tracer{at: at, counted: map[uint64]bool{}, fails: map[int]bool{}, groups: map[int]bool{}}
	switch do {
	case "kill", "cut":
		t.kill, t.all = true, do == "cut"
	case "ENOSPC", "EROFS", "EIO":
		t.errno = map[string]unix.Errno{"ENOSPC": unix.ENOSPC, "EROFS": unix.EROFS, "EIO": unix.EIO}[do]
	default:
		return nil, fmt.Errorf("there is no way to go wrong called %q", do)
	}
	for name, calls := range classes {
		if class == "" || class == name {
			for _, nr := range calls {
				t.counted[nr] = true
			}
		}
	}
	if len(t.counted) == 0 || len(args) == 0 {
		return nil, errors.New("usage: fault [-at N] [-do kill|cut|ERROR] [-class CLASS] [-count FILE] PROGRAM [ARGUMENT ...]")
	}
	path, err := exec.LookPath(args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	args[0], t.program = path, path
	return t, err
}

// trace runs the program until all that is traced has ended.
func (t *tracer) trace(args []string) (int, error) {
	self, err := os.Executable()
	if err == nil {
		t.self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		return 1, err
	}
	const options = unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE |
		unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL
	first, err := ptrace.Start(waiting, args, options)
	if err != nil {
		return 1, err
	}
	status := 1
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return status, nil
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		}
		if !ws.Stopped() {
			delete(t.fails, pid)
			delete(t.groups, pid)
			if pid == first {
				if status = ws.ExitStatus(); ws.Signaled() {
					status = 128 + int(ws.Signal())
				}
			}
			continue
		}
		if err := t.stopped(pid, ws); err != nil && !errors.Is(err, unix.ESRCH) { // it was killed meanwhile
			return 1, fmt.Errorf("process %d: %w", pid, err)
		}
	}
}

// stopped looks at why a thread stopped, and lets it go on.
func (t *tracer) stopped(pid int, ws unix.WaitStatus) error {
	request, signal := unix.PTRACE_SYSCALL, 0
	switch event := int(ws>>16) & 0xff; {
	case event == unix.PTRACE_EVENT_EXEC:
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err == nil && exe == t.self {
			break // the end of its start, in which this is not the program yet
		}
		if err != nil || exe != t.program {
			delete(t.groups, pid)
			return ptrace.Do(unix.PTRACE_DETACH, pid, 0)
		}
		t.groups[pid] = true
	case event == unix.PTRACE_EVENT_STOP && ws.StopSignal() != unix.SIGTRAP:
		request = unix.PTRACE_LISTEN // until it is continued
	case event != 0:
	case ws.StopSignal() == unix.SIGTRAP|0x80:
		if err := t.call(pid); err != nil {
			return err
		}
	default:
		signal = int(ws.StopSignal())
	}
	return ptrace.Do(request, pid, signal)
}

// call is at the start or at the end of a thread's call.
func (t *tracer) call(pid int) error {
	var info [88]byte // struct ptrace_syscall_info
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(pid), uintptr(len(info)), uintptr(unsafe.Pointer(&info)), 0, 0); errno != 0 {
		return errno
	}
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &r); err != nil {
		return err
	}
	if info[0] != unix.PTRACE_SYSCALL_INFO_ENTRY {
		if !t.fails[pid] {
			return nil
		}
		delete(t.fails, pid)
		r.Rax = uint64(-int64(t.errno))
		return unix.PtraceSetRegs(pid, &r)
	}
	if !t.counted[r.Orig_rax] {
		return nil
	}
	group, err := groupOf(pid)
	if err != nil || !t.groups[group] || !t.counts(group, &r) {
		return nil
	}
	t.seen++
	if t.at == 0 || t.seen < t.at || t.kill && t.seen > t.at {
		return nil
	}
	if t.kill {
		if t.all {
			for g := range t.groups {
				unix.Kill(g, unix.SIGKILL)
			}
		}
		return unix.Kill(group, unix.SIGKILL) // the call is not made any more
	}
	t.fails[pid] = true
	r.Orig_rax = ^uint64(0) // no such call, and so none is made
	return unix.PtraceSetRegs(pid, &r)
}

// counts tells calls that change something from others of the same number.
func (t *tracer) counts(group int, r *unix.PtraceRegs) bool {
	switch r.Orig_rax {
	case unix.SYS_OPENAT:
		return r.Rdx&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0
	case unix.SYS_OPEN:
		return r.Rsi&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0
	case unix.SYS_CLONE:
		return r.Rdi&unix.CLONE_THREAD == 0
	case unix.SYS_PRCTL:
		return r.Rdi == unix.PR_SET_CHILD_SUBREAPER || r.Rdi == unix.PR_SET_PDEATHSIG
	case unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_WRITEV, unix.SYS_PWRITEV:
		// Wake-ups of the runtime, and what is shown to a person, are nothing. A socket's
		// or a pipe's bytes count when the process is to be killed, and cannot fail for
		// want of space.
		if r.Rdi < 3 {
			return false
		}
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", group, r.Rdi))
		return err == nil && !strings.HasPrefix(to, "anon_inode:") && (t.kill || strings.HasPrefix(to, "/"))
	}
	return true
}

// groupOf returns the process that a thread belongs to.
func groupOf(tid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(status), "\nTgid:\t")
	line, _, _ := strings.Cut(after, "\n")
	return strconv.Atoi(line)
}
