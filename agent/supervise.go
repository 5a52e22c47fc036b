package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"chrysalis/guest"
)

// How an engine that dies is treated. One poisonous prompt costs its sender an
// answer and the others a restart; it must not be able to use up the VM, and an
// engine that cannot work must not spin for ever.
const (
	firstTries    = 3  // starts before the engine has answered once
	maxDeaths     = 10 // in deathWindow, after it has
	deathWindow   = 10 * time.Minute
	firstBackoff  = 200 * time.Millisecond // doubled with every death in a row
	maxBackoff    = 10 * time.Second
	steadyAfter   = time.Minute // running that long forgets the deaths in a row
	healthEvery   = 10 * time.Second
	healthMissing = 2 * time.Minute // without an answer: it hangs, and is killed
	outputGrace   = 200 * time.Millisecond
)

// supervisor keeps one engine running.
type supervisor struct {
	start   func(output *os.File) (<-chan syscall.WaitStatus, error) // starts it once
	kill    func()                                                   // kills all that is left of it
	socket  string                                                   // the engine's door, as the agent sees it
	health  string                                                   // path that answers 200 once requests are taken
	patient time.Duration                                            // until it does so for the first time
	output  io.Writer
	changed func() // it began to answer, or no longer does

	up       atomic.Bool
	restarts *atomic.Int64
}

// errHung says that the engine was killed because it did not answer.
var errHung = errors.New("the engine did not answer in time")

// ready reports whether the engine answers.
func (s *supervisor) ready() bool { return s.up.Load() }

// dial opens a connection to the engine.
func (s *supervisor) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", s.socket)
}

// run keeps the engine running until ctx ends, or returns why it no longer can. Started gets
// one value: nil when the engine first answers, or the error of the last try.
func (s *supervisor) run(ctx context.Context, started chan<- error) error {
	var (
		once   bool        // it has answered at least once
		deaths []time.Time // since then, within deathWindow
		inRow  int
	)
	for {
		begin := time.Now()
		err := s.runOnce(ctx, func() {
			if !once {
				once = true
				started <- nil
			}
			s.changed()
		})
		s.up.Store(false)
		s.changed()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		log.printf("the engine ended: %v", err)
		now := time.Now()
		if now.Sub(begin) > steadyAfter {
			inRow = 0
		}
		inRow++
		reason := guest.ReasonEngineStart
		if errors.Is(err, errHung) {
			reason = guest.ReasonEngineTimeout
		}
		if !once {
			// An engine that does not get ready at all will not do so later, and
			// waiting its whole patience again helps nobody.
			if inRow >= firstTries || reason == guest.ReasonEngineTimeout {
				err = because(reason, err)
				started <- err
				return err
			}
		} else {
			deaths = append(deaths, now)
			for now.Sub(deaths[0]) > deathWindow {
				deaths = deaths[1:]
			}
			if len(deaths) >= maxDeaths {
				return because(guest.ReasonEngineFailing, err)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(firstBackoff<<(min(inRow, 10)-1), maxBackoff)):
		}
		s.restarts.Add(1)
	}
}

// runOnce starts the engine, calls up when it answers, and returns how it ended.
func (s *supervisor) runOnce(ctx context.Context, up func()) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(s.output, r)
	}()
	defer func() {
		// What it wrote last says why it ended. Nothing holds the other end by now,
		// unless the kernel is slow to kill it.
		select {
		case <-copied:
		case <-time.After(outputGrace):
		}
		r.Close()
	}()
	exit, err := s.start(w)
	w.Close()
	// Whatever happens, nothing of this run outlives it.
	defer s.kill()
	if err != nil {
		return err
	}
	watched, cancel := context.WithCancel(ctx)
	hung := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() { s.watch(watched, up, hung) })
	// An answer that comes in late must not count for the next run.
	defer func() { cancel(); watch.Wait() }()
	select {
	case status := <-exit:
		return fmt.Errorf("the engine ended: %s", describe(status))
	case <-hung:
		s.kill()
		<-exit
		return errHung
	case <-ctx.Done():
		s.kill()
		<-exit
		return ctx.Err()
	}
}

// watch asks the engine whether it is well: quickly until it first is, then now
// and again. It closes hung when the engine has not answered for too long.
func (s *supervisor) watch(ctx context.Context, up func(), hung chan<- struct{}) {
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx) },
		DisableKeepAlives: true,
		// The engine may be hostile by now.
		MaxResponseHeaderBytes: 16 << 10,
	}}
	last, patience, pause := time.Now(), s.patient, 50*time.Millisecond
	for {
		wait := time.Second
		if s.up.Load() {
			wait = 30 * time.Second
		}
		err := askHealth(ctx, client, s.health, wait)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			last, patience, pause = time.Now(), healthMissing, healthEvery
			if s.up.CompareAndSwap(false, true) {
				up()
			}
		} else if time.Since(last) > patience {
			log.printf("the engine's health: %v", err)
			close(hung)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func askHealth(ctx context.Context, client *http.Client, path string, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("it answers %s", resp.Status)
	}
	return nil
}

func describe(status syscall.WaitStatus) string {
	switch {
	case status.Signaled():
		return "signal " + status.Signal().String()
	case status.ExitStatus() == sandboxExit:
		return "its sandbox could not be made"
	default:
		return fmt.Sprintf("exit status %d", status.ExitStatus())
	}
}
