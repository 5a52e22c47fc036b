// Package proof answers clients' nonces with evidence. A quote takes its time, and
// there is one at a time; so whoever asks while one is being made waits for the
// next, and that one answers all who wait. Nothing is kept between quotes.
package proof

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"chrysalis/agent/port"
	"chrysalis/attest/evidence"
)

// The errors that are for another try.
var (
	ErrBusy    = errors.New("too many clients wait for evidence")
	ErrTimeout = errors.New("the platform gave no evidence in time")
)

// limit is how long a client waits at most: for the quote that is being made and
// for its own.
const limit = 30 * time.Second

// Prover makes evidence.
type Prover struct {
	base  evidence.Document
	prove func(*evidence.Document) error
	limit time.Duration

	mu      sync.Mutex
	waiting *batch // those whom the next quote answers; nil when nobody waits
	busy    bool   // a quote is being made
}

// batch is the clients of one quote.
type batch struct {
	nonces []evidence.Bytes
	done   chan struct{} // closed when data or err is there
	data   []byte
	err    error
}

// New returns a Prover. base is what all documents of the VM have in common, and
// prove adds the platform's proof to one that is complete but for it; it is never
// called while it runs.
func New(base evidence.Document, prove func(*evidence.Document) error) *Prover {
	return &Prover{base: base, prove: prove, limit: limit}
}

// Evidence returns an encoded document that lists the nonce. Other callers may get
// the same bytes.
func (p *Prover) Evidence(ctx context.Context, nonce [evidence.NonceSize]byte) ([]byte, error) {
	b, err := p.join(nonce)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(p.limit)
	defer timeout.Stop()
	select {
	case <-b.done:
		return b.data, b.err
	case <-timeout.C:
		return nil, ErrTimeout
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// join adds a nonce to those that the next quote answers.
func (p *Prover) join(nonce [evidence.NonceSize]byte) (*batch, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == nil {
		p.waiting = &batch{done: make(chan struct{})}
	}
	b := p.waiting
	if len(b.nonces) == evidence.MaxNonces {
		return nil, ErrBusy
	}
	b.nonces = append(b.nonces, nonce[:])
	if !p.busy {
		p.busy = true
		go p.run()
	}
	return b, nil
}

// run makes quotes until nobody waits.
func (p *Prover) run() {
	for {
		p.mu.Lock()
		b := p.waiting
		p.waiting = nil
		if b == nil {
			p.busy = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		b.data, b.err = p.make(b.nonces)
		close(b.done)
	}
}

func (p *Prover) make(nonces []evidence.Bytes) (data []byte, err error) {
	defer func() {
		// What a host's TPM answers may meet a bug in what reads it.
		if r := recover(); r != nil {
			port.Bugs.Add(1)
			data, err = nil, errors.New("a bug in the agent")
		}
	}()
	d := p.base
	d.Nonces = nonces
	if err := p.prove(&d); err != nil {
		return nil, fmt.Errorf("make evidence: %w", err)
	}
	return d.Encode()
}
