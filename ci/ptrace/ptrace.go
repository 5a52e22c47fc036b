// Package ptrace starts a program under ptrace(2), and with it all that it starts.
// Only the thread that called Start may trace: the caller locks it.
package ptrace

import (
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// Start runs this program again with arguments, with the variable mark in its
// environment, and traces it with options. It is to call Await, and then to execute
// what is to be traced.
func Start(mark string, args []string, options int) (pid int, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	ready, traced, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer traced.Close()
	defer ready.Close()
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), mark+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdin, os.Stdout, os.Stderr, []*os.File{ready}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	// Seized, and so will its children be: of these, a stopped one stays stopped. Its
	// other threads end when it executes the program, and it becomes the first.
	if err := Do(unix.PTRACE_SEIZE, cmd.Process.Pid, options); err != nil {
		return 0, fmt.Errorf("trace it: %w", err)
	}
	_, err = traced.Write([]byte{0})
	return cmd.Process.Pid, err
}

// Await waits, in what Start has started, until it is traced.
func Await() error {
	traced := os.NewFile(3, "traced")
	defer traced.Close()
	if _, err := traced.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("the tracer has gone: %w", err)
	}
	return nil
}

// Do is ptrace(2) without an address.
func Do(request, pid, data int) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), 0, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
