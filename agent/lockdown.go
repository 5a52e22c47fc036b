package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// A lockdown is what is written to a file of the kernel, "" for nothing, and what
// it must say then.
type lockdown struct{ path, value, readBack, what string }

// lockdowns is worked through in order. Much of it the engine cannot reach anyway:
// it has no capability, no /proc and a filter of system calls. This is for the day
// on which one of these fails.
var lockdowns = []lockdown{
	{"/proc/sys/kernel/modules_disabled", "1", "1", "loading of kernel modules"},
	{"/proc/sys/kernel/kexec_load_disabled", "1", "1", "kexec"},
	{"/proc/sys/kernel/sysrq", "0", "0", "SysRq keys"},
	{"/proc/sys/kernel/dmesg_restrict", "1", "1", "the kernel's log for others"},
	{"/proc/sys/kernel/kptr_restrict", "2", "2", "kernel addresses"},
	{"/proc/sys/kernel/core_pattern", "|/nowhere", "|/nowhere", "core dumps"},
	{"/proc/sys/fs/suid_dumpable", "0", "0", "core dumps of privileged processes"},
	// A kernel that has gone wrong does not go on.
	{"/proc/sys/kernel/panic_on_oops", "1", "1", "a kernel that is damaged"},
	{"/proc/sys/kernel/randomize_va_space", "2", "2", "predictable addresses"},
	{"/proc/sys/vm/mmap_min_addr", "65536", "65536", "memory at address zero"},
	{"/proc/sys/vm/unprivileged_userfaultfd", "0", "0", "userfaultfd"},
	{"/proc/sys/vm/oom_dump_tasks", "0", "0", "lists of processes in the kernel's log"},
	{"/proc/sys/kernel/io_uring_disabled", "2", "2", "io_uring"},
	{"/proc/sys/kernel/unprivileged_bpf_disabled", "1", "1", "bpf"},
	{"/proc/sys/net/core/bpf_jit_harden", "2", "2", "filters as a way to place code"},
	{"/proc/sys/kernel/perf_event_paranoid", "3", "3", "performance counters"},
	{"/proc/sys/kernel/yama/ptrace_scope", "3", "3", "ptrace"},
	{"/proc/sys/user/max_user_namespaces", "0", "0", "user namespaces"},
	{"/proc/sys/dev/tty/ldisc_autoload", "0", "0", "line disciplines"},
	{"/proc/sys/fs/protected_symlinks", "1", "1", "other users' links"},
	{"/proc/sys/fs/protected_hardlinks", "1", "1", "links to other users' files"},
	{"/proc/sys/fs/protected_fifos", "2", "2", "other users' pipes"},
	{"/proc/sys/fs/protected_regular", "2", "2", "other users' files"},
	// Nothing reads kernel memory or changes the kernel, PID 1 included:
	// kernel_lockdown(7).
	{"/sys/kernel/security/lockdown", "confidentiality", "none integrity [confidentiality]", "access to the kernel"},
	// What follows from the kernel's command line, and from the rows above.
	{"/sys/power/disk", "", "[disabled]", "hibernation"},
	{"/proc/swaps", "", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority", "swap"},
}

func lockDown() error {
	for _, l := range lockdowns {
		if l.value != "" {
			if err := os.WriteFile(l.path, []byte(l.value), 0); err != nil {
				return fmt.Errorf("close %s: %w", l.what, err)
			}
		}
		data, err := os.ReadFile(l.path)
		if err != nil {
			return fmt.Errorf("close %s: read it back: %w", l.what, err)
		}
		if got := strings.TrimSpace(string(data)); got != l.readBack {
			return fmt.Errorf("close %s: %s says %q, expected %q", l.what, l.path, got, l.readBack)
		}
	}
	return nil
}

// ignoreSignals keeps the kernel from acting on signals to PID 1 that only a
// person at a console would send. The control port is the way to stop a VM.
func ignoreSignals() {
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGPIPE,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPWR, syscall.SIGTSTP)
}
