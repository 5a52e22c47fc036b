package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReaper runs in a process of its own: the reaper takes every child, those
// of other tests too.
func TestReaper(t *testing.T) {
	if out, err := child(t, "reaper").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// reaperChild is to its children what PID 1 is to all.
func reaperChild() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	go reaper.run()
	output, input, err := os.Pipe()
	if err != nil {
		return err
	}
	sh := func(script string) (int, <-chan syscall.WaitStatus, error) {
		return reaper.fork("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{0, input.Fd(), 2}})
	}
	for _, tt := range []struct{ script, want string }{
		{"exit 0", "exit status 0"},
		{"exit 7", "exit status 7"},
		{"exit 125", "its sandbox could not be made"},
		{"kill -KILL $$", "signal killed"},
	} {
		_, exit, err := sh(tt.script)
		if err != nil {
			return err
		}
		if got := describe(<-exit); got != tt.want {
			return fmt.Errorf("%q: %s, expected %s", tt.script, got, tt.want)
		}
	}
	if _, _, err := reaper.fork("/nonexistent", []string{"x"}, &syscall.ProcAttr{}); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("a program that is not there: %v", err)
	}

	// Many at a time; SIGCHLD does not count them.
	var exits []<-chan syscall.WaitStatus
	for i := range 40 {
		_, exit, err := sh(fmt.Sprintf("exit %d", i))
		if err != nil {
			return err
		}
		exits = append(exits, exit)
	}
	for i, exit := range exits {
		if status := <-exit; status.ExitStatus() != i {
			return fmt.Errorf("child %d ended with %d", i, status.ExitStatus())
		}
	}

	// An orphan ends after its parent and stays nobody's zombie.
	_, exit, err := sh(`(sleep 0.2; exit 3) & echo $!`)
	if err != nil {
		return err
	}
	var orphan int
	if _, err := fmt.Fscan(output, &orphan); err != nil {
		return err
	}
	if status := <-exit; status.ExitStatus() != 0 {
		return fmt.Errorf("the orphan's parent ended with %d", status.ExitStatus())
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", orphan))
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the orphan is still there: %s", strings.TrimSpace(string(stat)))
		}
	}
	if len(reaper.exits) != 0 {
		return fmt.Errorf("%d children are still waited for", len(reaper.exits))
	}
	return nil
}
