package launcher

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/terminal"
)

// spawner starts processes from one thread that lives as long as this process.
// The children ask the kernel to be killed when the thread that made them ends,
// and an ordinary goroutine's thread may end at any time.
type spawner struct{ work chan func() }

func newSpawner() *spawner {
	s := &spawner{work: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range s.work {
			f()
		}
		select {} // never give the thread back
	}()
	return s
}

// child is a running program.
type child struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it and all that held its output are gone
	err  error         // how it ended, after done
}

// start runs cmd, with its output line by line in the supervisor's log.
func (s *spawner) start(name string, cmd *exec.Cmd, log *log.Logger) (*child, error) {
	out := &lineLog{prefix: name + ": ", log: log, left: maxChildLog}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 5 * time.Second
	started := make(chan error)
	s.work <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	c := &child{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		out.flush()
		close(c.done)
	}()
	return c, nil
}

// kill ends the program and everything below it, and waits.
func (c *child) kill() {
	if c == nil {
		return
	}
	select {
	case <-c.done:
		return
	default:
	}
	syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
	<-c.done
}

// killSession kills what is left of a supervisor's session: the processes that belong
// to session and have dir in their command line, as the sandboxes of a run have its
// folder. It waits until they are gone.
//
// A sandbox dies with the supervisor, by PR_SET_PDEATHSIG (prctl(2)), but not all of
// it from its first moment: bubblewrap 0.8 makes its first process inside before that
// process asks for the same, and when the one outside is killed in between, the one
// inside waits for it for ever, or goes on alone.
func killSession(session int, dir string) error {
	var pids []int
	for range 500 {
		// Process ids are used again, and a session's with them: both must fit.
		pids = slices.DeleteFunc(naming(dir), func(pid int) bool {
			sid, err := unix.Getsid(pid)
			return err != nil || sid != session
		})
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("the processes %v are left from a supervisor that was killed, and do not end", pids)
}

// naming lists the other processes that have text in their command line. That of a
// process which has ended and waits for its parent is empty.
func naming(text string) (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		line, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if bytes.Contains(line, []byte(text)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// maxChildLog bounds what one program may write to the log, in bytes.
const maxChildLog = 256 << 10

// lineLog writes whole lines to a logger, cleaned, up to a limit.
type lineLog struct {
	mu     sync.Mutex
	prefix string
	log    *log.Logger
	left   int
	line   strings.Builder
}

func (l *lineLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range p {
		if b == '\n' || l.line.Len() >= 1024 {
			l.emit()
		}
		if b != '\n' {
			l.line.WriteByte(b)
		}
	}
	return len(p), nil
}

func (l *lineLog) emit() {
	if l.left > 0 && l.line.Len() > 0 {
		l.left -= l.line.Len() + 1
		l.log.Print(l.prefix + terminal.Line(l.line.String()))
		if l.left <= 0 {
			l.log.Print(l.prefix + "(it wrote too much; the rest is not kept)")
		}
	}
	l.line.Reset()
}

func (l *lineLog) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.emit()
}
