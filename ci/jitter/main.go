// Command jitter runs tests in a Go that pauses at random, now and then, between what
// follows each other: in the standard library just after something can be seen that
// more is to follow, which is a write to a file, a socket or a pipe, a mutex that is
// unlocked, a channel that is sent to or closed; and in this tree before any
// statement. A test that takes the first for the second passes by luck, and fails
// here, in one run of many where two pauses must meet.
//
//	jitter [-longest MS] [-rarer N] [-- GO TEST ARGUMENT...]
//
// The race detector does not find this kind, since every access is in order: it
// finds that there is no order, this that it is another one than the test believes.
//
// Neither Go's sources nor this tree are changed: the go command is given other
// texts. Tests that measure time, or count writes by the ten thousand, fail without
// being wrong.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"chrysalis/ci/overlay"
)

// A place is where a pause goes: a text that a file of the standard library holds
// exactly once, and what stands there instead.
type place struct{ file, old, new string }

var places = []place{
	{"internal/poll/fd_unix.go",
		"func (fd *FD) Write(p []byte) (int, error) {", "func (fd *FD) Write(p []byte) (int, error) {\n\tdefer jitter()"},
	{"internal/sync/mutex.go",
		"func (m *Mutex) Unlock() {", "func (m *Mutex) Unlock() {\n\tdefer jitter()"},
	{"runtime/chan.go",
		"\tchansend(c, elem, true, sys.GetCallerPC())\n}\n", "\tchansend(c, elem, true, sys.GetCallerPC())\n\tjitter(300)\n}\n"},
	{"runtime/chan.go",
		"\treturn chansend(c, elem, false, sys.GetCallerPC())\n}\n", "\tselected = chansend(c, elem, false, sys.GetCallerPC())\n\tif selected {\n\t\tjitter(20)\n\t}\n\treturn\n}\n"},
	{"runtime/chan.go",
		"func closechan(c *hchan) {\n", "func closechan(c *hchan) {\n\tclosechan1(c)\n\tjitter(20)\n}\n\nfunc closechan1(c *hchan) {\n"},
}

// added are files that the standard library gets. A number is how many times
// something happens for each pause after it.
var added = map[string]string{
	"runtime/jitter.go": `package runtime

import _ "unsafe"

func jitter(per uint32) {
	gp := getg()
	if !mainStarted || gp.m.curg != gp || gp.m.locks != 0 || gp.m.throwing != 0 || gp.m.preemptoff != "" ||
		gp.bubble != nil || isSystemGoroutine(gp, false) || cheaprandn(per*RARER) != 0 {
		return
	}
	timeSleep(int64(cheaprandn(LONGEST)+1) * 1000000)
}

// Jitter comes before a statement, and counts how often. The more often, the rarer
// the pauses: those that run once are what is looked for, and loops stay fast.
func Jitter(n *uint32) {
	if *n < 1<<30 {
		*n++
	}
	jitter(30 + *n)
}

//go:linkname jitterPoll internal/poll.jitter
func jitterPoll() { jitter(20) }

//go:linkname jitterSync internal/sync.jitter
func jitterSync() { jitter(3000) }
`,
	"internal/poll/jitter.go": "package poll\n\nimport _ \"unsafe\"\n\n//go:linkname jitter\nfunc jitter()\n",
	"internal/sync/jitter.go": "package sync\n\nimport _ \"unsafe\"\n\n//go:linkname jitter\nfunc jitter()\n",
}

func main() {
	longest := flag.Uint("longest", 20, "the longest pause, in milliseconds")
	rarer := flag.Uint("rarer", 1, "how many times rarer than usual pauses are")
	flag.Parse()
	if *longest < 1 || *longest > 60_000 || *rarer < 1 || *rarer > 10_000 {
		fmt.Fprintln(os.Stderr, "jitter: a pause has 1 to 60000 ms, and is 1 to 10000 times rarer than usual")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *longest, *rarer, flag.Args()); err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
			os.Exit(exit.ExitCode())
		}
		fmt.Fprintln(os.Stderr, "jitter:", err)
		os.Exit(1)
	}
}

// run runs the tests.
func run(ctx context.Context, longest, rarer uint, args []string) error {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("ask go where its sources are: %w", err)
	}
	src := filepath.Join(strings.TrimSpace(string(root)), "src")
	texts := overlay.Files{}
	for file, text := range added {
		texts[filepath.Join(src, file)] = strings.NewReplacer("LONGEST", fmt.Sprint(longest), "RARER", fmt.Sprint(rarer)).Replace(text)
	}
	for _, p := range places {
		if err := texts.Replace(filepath.Join(src, p.file), p.old, p.new); err != nil {
			return err
		}
	}
	if err := statements(ctx, texts); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "chrysalis-jitter-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	flag, err := texts.Flag(dir)
	if err != nil {
		return err
	}
	// Not in the environment: what a test builds must have the hash that it has.
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", flag, "-count=1"}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd.Run()
}
