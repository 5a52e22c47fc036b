package proof

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/agent/port"
	"chrysalis/attest/evidence"
)

var base = evidence.Document{
	Version: evidence.Version, TLSKey: []byte("key"), ReceiptKey: make([]byte, 32),
	Manifest: []byte("manifest"), CEL: []byte("cel"),
}

func proven(d *evidence.Document) error {
	d.TDX = &evidence.TDX{Quote: []byte("quote"), CCEL: []byte("ccel")}
	return nil
}

// gate is a platform whose quotes wait to be let through.
type gate struct {
	begun   chan int // how many nonces each has
	open    chan error
	running atomic.Int32
}

func newGate() *gate { return &gate{begun: make(chan int), open: make(chan error)} }

func (g *gate) prove(d *evidence.Document) error {
	if g.running.Add(1) > 1 {
		panic("two quotes at once")
	}
	defer g.running.Add(-1)
	g.begun <- len(d.Nonces)
	if err := <-g.open; err != nil {
		return err
	}
	return proven(d)
}

func nonce(i int) (n [32]byte) {
	n[0], n[1] = byte(i), byte(i>>8)
	return n
}

// ask asks for evidence from n clients at once and returns when all of them wait.
func ask(p *Prover, from, n int) (answers chan error) {
	answers = make(chan error, n)
	for i := from; i < from+n; i++ {
		go func() {
			data, err := p.Evidence(context.Background(), nonce(i))
			if err == nil {
				var d *evidence.Document
				id := nonce(i)
				if d, err = evidence.Parse(data); err == nil && !d.Lists(id[:]) {
					err = errors.New("the nonce is not listed")
				}
			}
			answers <- err
		}()
	}
	return answers
}

func (p *Prover) awaitWaiting(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		have := 0
		if p.waiting != nil {
			have = len(p.waiting.nonces)
		}
		p.mu.Unlock()
		if have == n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d wait, expected %d", have, n)
		}
	}
}

func TestBatches(t *testing.T) {
	g := newGate()
	p := New(base, g.prove)
	first := ask(p, 0, 1)
	if n := <-g.begun; n != 1 {
		t.Fatalf("the first quote has %d nonces", n)
	}
	rest := ask(p, 1, evidence.MaxNonces)
	p.awaitWaiting(t, evidence.MaxNonces)
	if _, err := p.Evidence(t.Context(), nonce(1000)); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many got %v", err)
	}
	g.open <- nil
	if err := <-first; err != nil {
		t.Error(err)
	}
	// Everybody who waited is in the next one, and there is room again.
	if n := <-g.begun; n != evidence.MaxNonces {
		t.Fatalf("the second quote has %d nonces", n)
	}
	last := ask(p, 2000, 1)
	p.awaitWaiting(t, 1)
	g.open <- nil
	for range evidence.MaxNonces {
		if err := <-rest; err != nil {
			t.Error(err)
		}
	}
	<-g.begun
	g.open <- nil
	if err := <-last; err != nil {
		t.Error(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting != nil {
		t.Error("a batch is left")
	}
}

// A platform that fails fails those who waited for it, and nobody after them.
func TestFailures(t *testing.T) {
	g := newGate()
	p := New(base, g.prove)
	broken := errors.New("no quote")
	for _, want := range []error{broken, nil} {
		answers := ask(p, 0, 1)
		<-g.begun
		g.open <- want
		if err := <-answers; !errors.Is(err, want) {
			t.Errorf("got %v, expected %v", err, want)
		}
	}

	panics := New(base, func(*evidence.Document) error { panic("a bug") })
	before := port.Bugs.Load()
	if _, err := panics.Evidence(t.Context(), nonce(1)); err == nil || port.Bugs.Load() != before+1 {
		t.Errorf("a panic became %v, and %d bugs are counted", err, port.Bugs.Load()-before)
	}
	empty := New(base, func(*evidence.Document) error { return nil })
	if _, err := empty.Evidence(t.Context(), nonce(1)); err == nil {
		t.Error("a document without a proof was given out")
	}
}

// A quote that takes too long costs those who wait their answer, never a second
// quote at the same time.
func TestTimeout(t *testing.T) {
	g := newGate()
	p := New(base, g.prove)
	p.limit = 20 * time.Millisecond
	answers := ask(p, 0, 1)
	<-g.begun
	if err := <-answers; !errors.Is(err, ErrTimeout) {
		t.Errorf("got %v", err)
	}
	if err := <-ask(p, 1, 1); !errors.Is(err, ErrTimeout) {
		t.Errorf("while the first still runs: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Evidence(ctx, nonce(2)); !errors.Is(err, context.Canceled) && !errors.Is(err, ErrTimeout) {
		t.Errorf("a client that has gone got %v", err)
	}
	g.open <- nil
	p.limit = time.Minute
	<-g.begun // those who have given up
	answers = ask(p, 3, 1)
	p.awaitWaiting(t, 1)
	g.open <- nil
	<-g.begun
	g.open <- nil
	if err := <-answers; err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	var quotes atomic.Int32
	p := New(base, func(d *evidence.Document) error {
		quotes.Add(1)
		time.Sleep(time.Millisecond)
		return proven(d)
	})
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			if err := <-ask(p, i, 1); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := quotes.Load(); n > 100 {
		t.Errorf("200 clients took %d quotes", n)
	}
}
