// Package imagetest lets tests use the programs of the tools root as oracles:
// the pinned veritysetup, fsck.erofs, QEMU, never the host's.
package imagetest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"chrysalis/image"
	"chrysalis/image/toolsroot"
)

// Required names the environment variable with which 'make test' turns skips
// for missing artefacts into failures.
const Required = "CHRYSALIS_REQUIRE_VM"

// Missing skips the test, or fails it where nothing may be missing.
func Missing(t testing.TB, reason error) {
	t.Helper()
	if os.Getenv(Required) != "" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// Source returns the top of the source tree that the test runs in.
func Source() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, image.LockName)); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("the test does not run in a checkout of Chrysalis")
}

// Tools opens the tools root, or ends the test as Missing does.
func Tools(t testing.TB) *toolsroot.Root {
	t.Helper()
	source, err := Source()
	if err != nil {
		t.Fatal(err)
	}
	lock, err := image.ReadLock(source)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("bwrap"); err != nil {
		Missing(t, err)
	}
	root, err := image.OpenTools(lock)
	if err != nil {
		Missing(t, err)
	}
	return root
}

// Command returns a command in the tools root that sees a folder of the test.
func Command(t testing.TB, dir string, args ...string) *exec.Cmd {
	t.Helper()
	return Tools(t).Cmd(t.Context(), toolsroot.Command{Args: args, Dir: dir, ReadWrite: []string{dir}, Offline: true})
}
