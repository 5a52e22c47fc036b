package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"chrysalis/agent/platform"
	"chrysalis/guest"
	"chrysalis/measure/cel"
)

// hasTDX reports whether the CPU says that this is a TD. The kernel asks CPUID
// leaf 0x21, which the TDX module answers and no host can fake inside a TD.
func hasTDX() bool {
	data, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && tdxFlag(string(data))
}

func tdxFlag(cpuinfo string) bool {
	for line := range strings.Lines(cpuinfo) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "flags" {
			return slices.Contains(strings.Fields(value), "tdx_guest")
		}
	}
	return false
}

// findPlatform finds what evidence will come from.
func (a *agent) findPlatform(context.Context) (err error) {
	tdx := hasTDX()
	if tdx {
		if err := configfs.do(); err != nil {
			return err
		}
	}
	a.platform, err = platform.Open("/", tdx)
	return err
}

// record measures an event. Whoever calls it uses what the event names only
// afterwards.
func (a *agent) record(e cel.Event) error {
	if err := a.platform.Extend(e); err != nil {
		return because(guest.ReasonPlatform, fmt.Errorf("measure the event %s: %w", e.Name, err))
	}
	a.events = append(a.events, e)
	return nil
}

// closeLog measures the separator, after which nothing is measured any more, and
// makes sure that the log is what the register holds.
func (a *agent) closeLog() error {
	if err := a.record(cel.SeparatorEvent()); err != nil {
		return err
	}
	return because(guest.ReasonPlatform, a.platform.Holds(a.events))
}

// residentMemory returns a process's resident memory and its peak, in KiB.
func residentMemory(pid int) (now, peak int64) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(data)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &now)
		fmt.Sscanf(line, "VmHWM: %d kB", &peak)
	}
	return now, peak
}

// openDescriptors counts the files and sockets that this process has open, the one
// that it takes to count them among them.
func openDescriptors() int64 {
	entries, _ := os.ReadDir("/proc/self/fd")
	return int64(len(entries))
}
