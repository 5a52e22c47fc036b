package main

import (
	"fmt"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// engineSyscalls is what every engine may call. Anything else fails with EPERM.
// What is left out matters more than what is there: no mount, ptrace, bpf,
// io_uring, userfaultfd, keyctl, perf_event_open, kexec, module or namespace
// call, no open_by_handle_at, no process_vm_*. A profile can add to the list, but
// not what neverSyscalls names.
var engineSyscalls = []string{
	// files
	"read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev",
	"open", "openat", "close", "close_range", "stat", "fstat", "lstat", "newfstatat", "statx",
	"statfs", "fstatfs", "access", "faccessat", "faccessat2", "lseek", "fcntl", "flock",
	"fsync", "fdatasync", "ftruncate", "fallocate", "fadvise64", "readahead", "getdents64",
	"getcwd", "chdir", "mkdir", "mkdirat", "rmdir", "rename", "renameat", "renameat2",
	"unlink", "unlinkat", "readlink", "readlinkat", "chmod", "fchmod", "fchmodat", "umask",
	"dup", "dup2", "dup3", "pipe", "pipe2", "ioctl", "copy_file_range", "sendfile", "utimensat",
	// memory
	"brk", "mmap", "munmap", "mprotect", "mremap", "madvise", "mincore", "mlock", "munlock",
	"msync", "membarrier", "memfd_create",
	// processes and threads; clone and prctl are narrowed below
	"clone",
	"execve", "exit", "exit_group", "wait4", "waitid", "kill", "tgkill",
	"getpid", "getppid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getpgrp", "getpgid", "getsid",
	"set_tid_address", "set_robust_list", "get_robust_list", "rseq", "arch_prctl", "prctl",
	"futex", "futex_waitv", "sched_yield", "sched_getaffinity", "sched_setaffinity",
	"sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min",
	"getpriority", "getcpu", "getrlimit", "prlimit64", "getrusage", "sysinfo", "uname", "times",
	"capget", "restart_syscall", "get_mempolicy",
	// signals
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigpending", "sigaltstack", "pause",
	// time
	"clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time",
	"timerfd_create", "timerfd_settime", "timerfd_gettime",
	// waiting
	"poll", "ppoll", "select", "pselect6", "epoll_create1", "epoll_create", "epoll_ctl", "epoll_wait", "epoll_pwait",
	"eventfd", "eventfd2", "signalfd4", "inotify_init1", "inotify_add_watch", "inotify_rm_watch",
	// the unix socket; the families are narrowed below
	"socket", "socketpair", "bind", "listen", "accept", "accept4", "connect", "shutdown", "getsockname", "getpeername",
	"setsockopt", "getsockopt", "sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg",
	// randomness
	"getrandom",
}

// neverSyscalls are refused even to a profile that asks for them.
var neverSyscalls = map[string]bool{
	"clone3": true, "unshare": true, "setns": true,
	"mount": true, "umount2": true, "pivot_root": true, "chroot": true, "move_mount": true, "open_tree": true, "open_tree_attr": true,
	"fsopen": true, "fsconfig": true, "fsmount": true, "fspick": true, "mount_setattr": true,
	"ptrace": true, "process_vm_readv": true, "process_vm_writev": true, "pidfd_getfd": true,
	"bpf": true, "perf_event_open": true, "userfaultfd": true,
	"io_uring_setup": true, "io_uring_enter": true, "io_uring_register": true,
	"init_module": true, "finit_module": true, "delete_module": true, "kexec_load": true, "kexec_file_load": true,
	"keyctl": true, "add_key": true, "request_key": true, "open_by_handle_at": true,
	"reboot": true, "swapon": true, "swapoff": true, "iopl": true, "ioperm": true, "seccomp": true,
	"clock_settime": true, "settimeofday": true, "adjtimex": true, "clock_adjtime": true,
	"process_madvise": true, "process_mrelease": true, "kcmp": true, "fanotify_init": true, "name_to_handle_at": true,
	"acct": true, "quotactl": true, "quotactl_fd": true, "syslog": true, "lookup_dcookie": true, "vhangup": true,
	"modify_ldt": true, "execveat": true, "sethostname": true, "setdomainname": true,
}

// enginePrctls are the options of prctl that an engine may use: names for what it
// has, and questions. Among the others is PR_SET_SECCOMP, by which every thread
// could take hundreds of KiB of the kernel's memory, and the seccomp call in
// another dress.
var enginePrctls = []uint64{
	unix.PR_SET_PDEATHSIG, unix.PR_GET_PDEATHSIG, unix.PR_GET_DUMPABLE, unix.PR_SET_DUMPABLE, unix.PR_SET_NAME, unix.PR_GET_NAME,
	unix.PR_GET_SECCOMP, unix.PR_CAPBSET_READ, unix.PR_SET_TIMERSLACK, unix.PR_GET_TIMERSLACK,
	unix.PR_SET_CHILD_SUBREAPER, unix.PR_GET_CHILD_SUBREAPER, unix.PR_SET_NO_NEW_PRIVS, unix.PR_GET_NO_NEW_PRIVS,
	unix.PR_SET_THP_DISABLE, unix.PR_GET_THP_DISABLE, unix.PR_GET_SPECULATION_CTRL,
	unix.PR_SET_VMA, unix.PR_GET_AUXV,
}

// newNamespaces are clone's flags that make namespaces.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// checkSyscalls refuses system calls that a profile asks for in vain.
func checkSyscalls(extra []string) error {
	info, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("engine profile: %w", err)
	}
	for _, name := range extra {
		if neverSyscalls[name] {
			return fmt.Errorf("engine profile: no engine may call %s", name)
		}
		if _, known := info.SyscallNames[name]; !known {
			return fmt.Errorf("engine profile: there is no system call %q", name)
		}
	}
	return nil
}

// enginePolicies are the engine's filters, in the order in which they are
// loaded. The kernel runs all of them on every call and the strictest answer
// counts. The list of allowed calls comes last: it does not allow to load more.
//
// Each condition has a filter of its own because the library, after a condition
// that does not hold, compares what it last loaded of the argument with the
// numbers of the calls that follow: in one filter, socket(56<<32|AF_VSOCK) is
// taken for call 56, clone, and allowed.
func enginePolicies(extra []string, loopback bool) []seccomp.Policy {
	allowed := slices.Clone(engineSyscalls)
	for _, name := range extra {
		if !neverSyscalls[name] && !slices.Contains(allowed, name) {
			allowed = append(allowed, name)
		}
	}
	families := refuse("socket", seccomp.NotEqual, unix.AF_UNIX)
	if loopback {
		// AF_INET is the family behind AF_UNIX. Its network namespace has no interface
		// but a loopback device of its own.
		families = refuse("socket", seccomp.GreaterThan, unix.AF_INET)
	}
	return []seccomp.Policy{
		// A network namespace does not contain vsock: AF_VSOCK reaches the host
		// from any of them. This condition is the only thing that keeps the
		// engine, once it has read a prompt, from telling the host.
		families,
		refuse("socketpair", seccomp.NotEqual, unix.AF_UNIX),
		refuse("clone", seccomp.BitsSet, newNamespaces),
		// Not equal to any of them, in all 64 bits: the kernel looks at 32 only, so a
		// list of what is refused would be got around.
		refuse("prctl", seccomp.NotEqual, enginePrctls...),
		{
			DefaultAction: seccomp.ActionErrno,
			Syscalls: []seccomp.SyscallGroup{
				{
					// clone3's flags are out of a filter's sight. ENOSYS makes the C library
					// fall back to clone, whose flags are not.
					Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS),
					Names:  []string{"clone3"},
				},
				{Action: seccomp.ActionAllow, Names: allowed},
			},
		},
	}
}

// refuse is a filter that refuses a call for which a condition of its first
// argument, all 64 bits of it, holds with each of some values, and nothing else.
func refuse(name string, operation seccomp.Operation, values ...uint64) seccomp.Policy {
	var all seccomp.ArgumentConditions
	for _, value := range values {
		all = append(all, seccomp.Condition{Argument: 0, Operation: operation, Value: value})
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{{
			Action:             seccomp.ActionErrno,
			NamesWithCondtions: []seccomp.NameWithConditions{{Name: name, Conditions: all}},
		}},
	}
}

// loadFilters puts the engine's filters on this thread, for the rest of its life
// and of what it executes.
func loadFilters(extra []string, loopback bool) error {
	for _, policy := range enginePolicies(extra, loopback) {
		if err := seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Policy: policy}); err != nil {
			return fmt.Errorf("load the system call filters: %w", err)
		}
	}
	return nil
}
