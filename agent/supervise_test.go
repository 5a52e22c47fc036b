package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"chrysalis/agent/port"
	"chrysalis/guest"
)

// Wait statuses as wait4(2) gives them.
const (
	exitedWith1 = syscall.WaitStatus(1 << 8)
	killed      = syscall.WaitStatus(syscall.SIGKILL)
)

// fakeEngine stands for the engine's process: what it does once started is a
// function of which start it is. It answers on a real socket, served by
// goroutines outside the test's bubble of time, because a bubble's time stands
// still while one of its goroutines waits for a socket.
type fakeEngine struct {
	socket string
	listen chan int   // asks for a socket that answers with a status
	done   chan error // outside the bubble, like listen

	mu    sync.Mutex
	lives func(start int) life
	begun []time.Time
	alive chan syscall.WaitStatus // the running one's exit, nil when none runs
	ln    net.Listener
}

// life is what an engine does. The zero value dies at once.
type life struct {
	refused  error         // it cannot even be started
	answers  int           // HTTP status; 0 is no socket at all
	lifetime time.Duration // then it exits with 1; forever is never
}

const forever = time.Duration(1<<63 - 1)

func newFakeEngine(t *testing.T, lives func(start int) life) *fakeEngine {
	dir, err := os.MkdirTemp("", "engine-") // a socket's path is at most 108 bytes long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	e := &fakeEngine{lives: lives, socket: filepath.Join(dir, "engine.sock"), listen: make(chan int), done: make(chan error)}
	go func() {
		for status := range e.listen {
			var err error
			if e.ln, err = net.Listen("unix", e.socket); err == nil {
				go http.Serve(e.ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
			}
			e.done <- err
		}
	}()
	t.Cleanup(func() { close(e.listen) })
	return e
}

func (e *fakeEngine) start(output *os.File) (<-chan syscall.WaitStatus, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.lives(len(e.begun))
	e.begun = append(e.begun, time.Now())
	if l.refused != nil {
		return nil, l.refused
	}
	fmt.Fprintf(output, "start %d\n", len(e.begun))
	exit := make(chan syscall.WaitStatus, 1)
	e.alive = exit
	if l.answers != 0 {
		e.listen <- l.answers
		if err := <-e.done; err != nil {
			return nil, err
		}
	}
	if l.lifetime != forever {
		time.AfterFunc(l.lifetime, func() { e.end(exit, exitedWith1) })
	}
	return exit, nil
}

// kill ends what runs.
func (e *fakeEngine) kill() { e.end(nil, killed) }

// end ends one run, or any, if it still goes on.
func (e *fakeEngine) end(which chan syscall.WaitStatus, status syscall.WaitStatus) {
	e.mu.Lock()
	defer e.mu.Unlock()
	exit := e.alive
	if exit == nil || (which != nil && which != exit) {
		return
	}
	e.alive = nil
	if e.ln != nil {
		e.ln.Close()
		e.ln = nil
	}
	exit <- status
}

// starts are the times at which the engine was started.
func (e *fakeEngine) starts() []time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.begun)
}

// dieFromNowOn lets the supervisor come to an end: every engine dies at once.
func (e *fakeEngine) dieFromNowOn() {
	e.mu.Lock()
	e.lives = func(int) life { return life{} }
	e.mu.Unlock()
	e.kill()
}

// stall makes the engine live on and answer no more.
func (e *fakeEngine) stall() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ln.Close()
}

// supervise runs a fake engine for a time and returns what the supervisor said.
func supervise(t *testing.T, limit time.Duration, lives func(start int) life, check func(*supervisor, *fakeEngine, *port.State, error, error)) {
	t.Helper()
	e := newFakeEngine(t, lives)
	synctest.Test(t, func(t *testing.T) {
		state := port.NewState("test", time.Now(), 0, nil)
		s := &supervisor{
			restarts: new(atomic.Int64),
			start:    e.start, kill: e.kill, socket: e.socket, health: "/health",
			patient: time.Minute, output: io.Discard,
		}
		s.changed = func() { state.SetEngine(s.ready()) }
		started, ended := make(chan error, 1), make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { ended <- s.run(ctx, started) }()
		first := <-started
		if first == nil {
			state.SetServing() // as the last phase does
		}
		var last error
		select {
		case last = <-ended:
		case <-time.After(limit):
			last = context.DeadlineExceeded
		}
		check(s, e, state, first, last)
		if last != context.DeadlineExceeded {
			return
		}
		e.dieFromNowOn()
		<-ended
	})
}

func reasonOf(err error) guest.Reason {
	var f *fault
	if errors.As(err, &f) {
		return f.reason
	}
	return guest.ReasonNone
}

func pauses(times []time.Time) (between []time.Duration) {
	for i := 1; i < len(times); i++ {
		between = append(between, times[i].Sub(times[i-1]))
	}
	return between
}

func TestEngineThatNeverStarts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		life   life
		starts int
		reason guest.Reason
	}{
		{"exits at once", life{}, firstTries, guest.ReasonEngineStart},
		{"cannot be started", life{refused: errors.New("no memory")}, firstTries, guest.ReasonEngineStart},
		{"exits before it answers well", life{answers: 503, lifetime: time.Second}, firstTries, guest.ReasonEngineStart},
		{"never answers", life{lifetime: forever}, 1, guest.ReasonEngineTimeout},
		{"never answers well", life{answers: 503, lifetime: forever}, 1, guest.ReasonEngineTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			begin := time.Now()
			supervise(t, time.Hour, func(int) life { return tt.life }, func(s *supervisor, e *fakeEngine, state *port.State, first, last error) {
				if reasonOf(first) != tt.reason || first != last {
					t.Errorf("first %v, last %v, expected reason %s", first, last, tt.reason)
				}
				if len(e.starts()) != tt.starts || s.restarts.Load() != int64(tt.starts-1) || s.ready() || state.Status().Ready {
					t.Errorf("%d starts, %d restarts, ready %v", len(e.starts()), s.restarts.Load(), s.ready())
				}
				if e.alive != nil {
					t.Error("an engine is left")
				}
			})
			if took := time.Since(begin); took > 30*time.Second {
				t.Errorf("took %v of real time", took)
			}
		})
	}
}

func TestEngineStartsAtTheSecondTry(t *testing.T) {
	lives := func(start int) life {
		if start == 0 {
			return life{}
		}
		return life{answers: 200, lifetime: forever}
	}
	supervise(t, time.Hour, lives, func(s *supervisor, e *fakeEngine, state *port.State, first, last error) {
		if first != nil || last != context.DeadlineExceeded || !s.ready() || !state.Status().Ready || s.restarts.Load() != 1 {
			t.Errorf("first %v, last %v, ready %v, %d restarts", first, last, s.ready(), s.restarts.Load())
		}
	})
}

func TestEngineThatKeepsDying(t *testing.T) {
	supervise(t, time.Hour, func(int) life { return life{answers: 200, lifetime: time.Second} }, func(s *supervisor, e *fakeEngine, state *port.State, first, last error) {
		if first != nil || reasonOf(last) != guest.ReasonEngineFailing || !strings.Contains(last.Error(), "exit status 1") {
			t.Errorf("first %v, last %v", first, last)
		}
		if len(e.starts()) != maxDeaths || s.restarts.Load() != maxDeaths-1 || state.Status().Ready {
			t.Errorf("%d starts, %d restarts, ready %v", len(e.starts()), s.restarts.Load(), state.Status().Ready)
		}
		back := firstBackoff
		for i, pause := range pauses(e.starts()) {
			if got := pause - time.Second; got != back {
				t.Errorf("pause %d: %v, expected %v", i, got, back)
			}
			back = min(2*back, maxBackoff)
		}
	})
}

// One death a minute and more often is within what a VM bears: it goes on.
func TestEngineThatDiesNowAndThen(t *testing.T) {
	const lifetime = deathWindow/(maxDeaths-1) + time.Second
	supervise(t, 10*time.Hour, func(int) life { return life{answers: 200, lifetime: lifetime} }, func(s *supervisor, e *fakeEngine, state *port.State, first, last error) {
		if first != nil || last != context.DeadlineExceeded {
			t.Errorf("first %v, last %v", first, last)
		}
		for i, pause := range pauses(e.starts()) {
			// It ran long enough for the deaths before to be forgotten.
			if pause != lifetime+firstBackoff {
				t.Errorf("pause %d: %v, expected %v", i, pause, lifetime+firstBackoff)
			}
		}
		if n := s.restarts.Load(); n != int64(len(e.starts())-1) || n < 500 {
			t.Errorf("%d starts, %d restarts", len(e.starts()), n)
		}
	})
}

// An engine that has answered and stops to is killed and started again; clients
// are told meanwhile that it is not ready.
func TestEngineThatHangs(t *testing.T) {
	e := newFakeEngine(t, func(int) life { return life{answers: 200, lifetime: forever} })
	synctest.Test(t, func(t *testing.T) {
		state := port.NewState("test", time.Now(), 0, nil)
		s := &supervisor{restarts: new(atomic.Int64), start: e.start, kill: e.kill, socket: e.socket, health: "/", patient: time.Minute, output: io.Discard}
		s.changed = func() { state.SetEngine(s.ready()) }
		started := make(chan error, 1)
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { ended <- s.run(ctx, started) }()
		if err := <-started; err != nil {
			t.Fatal(err)
		}
		state.SetServing()
		time.Sleep(time.Minute)
		e.stall()
		hungAt := time.Now()
		during := guest.Status{Ready: true}
		for len(e.starts()) == 1 {
			time.Sleep(50 * time.Millisecond)
			if !s.ready() {
				during = state.Status()
			}
		}
		if took := time.Since(hungAt); took < healthMissing-healthEvery || took > healthMissing+2*healthEvery {
			t.Errorf("it was started again after %v", took)
		}
		time.Sleep(time.Second)
		if !s.ready() || !state.Status().Ready || s.restarts.Load() != 1 {
			t.Errorf("ready %v, %v, %d restarts", s.ready(), state.Status().Ready, s.restarts.Load())
		}
		if during.Ready {
			t.Error("the VM said that it is ready while the engine was not")
		}
		e.dieFromNowOn()
		if err := <-ended; reasonOf(err) != guest.ReasonEngineFailing {
			t.Errorf("%v", err)
		}
	})
}
