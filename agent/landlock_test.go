package main

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What the rules may say: devices are made nowhere, files in one place only, and
// programs are run from none of the folders that the sandbox adds.
func TestLandlockRules(t *testing.T) {
	for _, rule := range landlockRules {
		for _, c := range []struct {
			what    string
			access  uint64
			allowed string // the only path, if any
		}{
			{"make devices", unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK, ""},
			{"run programs", unix.LANDLOCK_ACCESS_FS_EXECUTE, ""},
			{"make files", landlockMake &^ unix.LANDLOCK_ACCESS_FS_MAKE_SOCK, "/tmp"},
			{"change files' sizes", unix.LANDLOCK_ACCESS_FS_TRUNCATE, "/tmp"},
			{"speak to devices", unix.LANDLOCK_ACCESS_FS_IOCTL_DEV, "/dev"},
		} {
			if rule.access&c.access != 0 && rule.path != c.allowed {
				t.Errorf("%s: the engine can %s", rule.path, c.what)
			}
		}
		if top := strings.TrimPrefix(strings.SplitN(rule.path, "/", 3)[1], "/"); top != "" && !notPrograms[top] {
			t.Errorf("%s would have two rules", rule.path)
		}
	}
	// Bits 0 to 15 are what version 5 and 6 know: landlock(7).
	if landlockFiles != 1<<16-1 {
		t.Errorf("the rules cover %#x, expected %#x", landlockFiles, 1<<16-1)
	}
}

// Everything that is written is read back, and nothing is written once the kernel
// is locked down.
func TestLockdownTable(t *testing.T) {
	seen := map[string]bool{}
	locked := false
	for _, l := range lockdowns {
		if seen[l.path] || l.readBack == "" || l.what == "" {
			t.Errorf("%s: twice, or incomplete", l.path)
		}
		seen[l.path] = true
		if l.value != "" && locked {
			t.Errorf("%s is written after the lockdown", l.path)
		}
		if l.value != "" && !strings.Contains(l.readBack, l.value) {
			t.Errorf("%s: %q is written and %q expected", l.path, l.value, l.readBack)
		}
		locked = locked || strings.HasSuffix(l.path, "/lockdown")
	}
	if !locked {
		t.Error("the kernel is not locked down")
	}
}
