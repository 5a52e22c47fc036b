//go:build !debug

package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// log discards: the console is the host's to read.
var log silent

type silent struct{}

func (silent) printf(string, ...any) {}

// quietConsole makes the kernel and the agent write nothing more to the
// console, not even the Go runtime's last words.
func quietConsole() error {
	// Console and minimum level 0: not even emergencies, and a panic's registers
	// and stack neither (console_verbose in linux/printk.h leaves a level of 0).
	if err := os.WriteFile("/proc/sys/kernel/printk", []byte("0 0 0 0"), 0); err != nil {
		return fmt.Errorf("turn the console off: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open the null device: %w", err)
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return fmt.Errorf("leave the console: %w", err)
		}
	}
	return nil
}
