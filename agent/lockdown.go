package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// lockdowns is written in order, and read back where the kernel allows it.
var lockdowns = []struct{ path, value, readBack, what string }{
	{"/proc/sys/kernel/modules_disabled", "1", "1", "loading of kernel modules"},
	{"/proc/sys/kernel/kexec_load_disabled", "1", "1", "kexec"},
	{"/proc/sys/kernel/sysrq", "0", "0", "SysRq keys"},
	{"/proc/sys/kernel/dmesg_restrict", "1", "1", "the kernel's log for others"},
	{"/proc/sys/kernel/kptr_restrict", "2", "2", "kernel addresses"},
	{"/proc/sys/kernel/core_pattern", "|/nowhere", "|/nowhere", "core dumps"},
	// Nothing reads kernel memory or changes the kernel, PID 1 included:
	// kernel_lockdown(7).
	{"/sys/kernel/security/lockdown", "confidentiality", "none integrity [confidentiality]", "access to the kernel"},
}

func lockDown() error {
	for _, l := range lockdowns {
		if err := os.WriteFile(l.path, []byte(l.value), 0); err != nil {
			return fmt.Errorf("close %s: %w", l.what, err)
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
