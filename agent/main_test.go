package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"chrysalis/guest"
)

// childVariable names what the test binary is to be instead, when a test starts
// it again as a child. What the children do cannot be undone in a process.
const childVariable = "CHRYSALIS_AGENT_TEST_CHILD"

var children = map[string]func() error{
	"filtered":  filteredChild,
	"attempts":  attemptsChild,
	"interrupt": interruptChild,
	"reaper":    reaperChild,
}

func TestMain(m *testing.M) {
	if name := os.Getenv(childVariable); name != "" {
		if err := children[name](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child returns the test binary as one of the children.
func child(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	cmd.Env = append(os.Environ(), childVariable+"="+name)
	return cmd
}

func TestPhasesAreTheGuestPackages(t *testing.T) {
	var names []guest.Phase
	for _, phase := range phases {
		names = append(names, phase.name)
		if !phase.reason.Known() || phase.reason == guest.ReasonNone {
			t.Errorf("phase %s fails with %q, which is no reason", phase.name, phase.reason)
		}
	}
	if got, want := fmt.Sprint(names), fmt.Sprint(guest.Phases); got != want {
		t.Errorf("phases %s, the guest package says %s", got, want)
	}
}

// reason is what the host would be told of an error.
func reason(err error) guest.Reason {
	var f *fault
	if !errors.As(err, &f) {
		return guest.ReasonNone
	}
	return f.reason
}

func TestBecause(t *testing.T) {
	plain := errors.New("plain")
	for _, tt := range []struct {
		name string
		err  error
		want guest.Reason
	}{
		{"no error", nil, guest.ReasonNone},
		{"an error without a reason", plain, guest.ReasonDiskFormat},
		{"an error with a reason keeps it", because(guest.ReasonDiskCorrupt, plain), guest.ReasonDiskCorrupt},
		{"also below another", fmt.Errorf("engine disk: %w", because(guest.ReasonDiskCorrupt, plain)), guest.ReasonDiskCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := because(guest.ReasonDiskFormat, tt.err)
			if reason(got) != tt.want || (tt.err != nil && (!errors.Is(got, plain) || !strings.HasSuffix(got.Error(), "plain"))) {
				t.Errorf("%v with reason %q, expected %q", got, reason(got), tt.want)
			}
		})
	}
}

// TestRunsOnlyAsPID1 starts the agent itself where it has no business.
func TestRunsOnlyAsPID1(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the agent")
	}
	program := t.TempDir() + "/agent"
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := exec.CommandContext(t.Context(), program).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), "PID 1") {
		t.Errorf("%v: %s", err, out)
	}
}
