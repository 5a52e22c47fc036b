package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptrace"
	"sync"
	"time"

	"chrysalis/manifest"
)

// uploadLimit is how long a worker may take to accept a request, bodies of MaxBody
// included: what a VM gives its clients for one.
const uploadLimit = 2 * time.Minute

// grace is what a worker gets on top of its manifest's limits, for a place in its
// engine and for the way.
const grace = 30 * time.Second

// patience ends a request that a worker takes too long over, in each of its steps.
// A host can hold back what its VM says for as long as it likes; what a VM may take
// itself is in its manifest.
type patience struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	most   time.Duration // Options.Patience
	answer time.Duration // until the header of the answer
	idle   time.Duration // between pieces of it

	mu     sync.Mutex
	timer  *time.Timer
	steps  int  // that were begun or ended
	header bool // of the answer: it is there
}

// wait returns the patience with one request, and the context to make it in. The
// step that begins is to get a connection, evidence included, which the transport
// bounds.
func (w *worker) wait(ctx context.Context, stream bool) (context.Context, *patience) {
	w.mu.Lock()
	limits := manifest.DefaultLimits
	if w.manifest != nil {
		limits = w.manifest.Limits
	}
	w.mu.Unlock()
	seconds := func(n int) time.Duration { return time.Duration(n)*time.Second + grace }
	ctx, cancel := context.WithCancelCause(ctx)
	p := &patience{ctx: ctx, cancel: cancel, most: w.proxy.options.Patience, answer: seconds(limits.TotalSeconds), idle: seconds(limits.IdleSeconds)}
	if stream {
		p.answer = p.idle // what a VM waits for an engine's first event
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:      func(httptrace.GotConnInfo) { p.asking(uploadLimit, "it did not take the request") },
		WroteRequest: func(httptrace.WroteRequestInfo) { p.asking(p.answer, "it did not begin to answer") },
	}), p
}

// step gives the next step so long. One that has ended in time ends nothing, even if
// its timer has fired and only waits for the lock. p.mu is held.
func (p *patience) step(limit time.Duration, otherwise string) {
	if p.most > 0 {
		limit = min(limit, p.most)
	}
	p.stop()
	step := p.steps
	p.timer = time.AfterFunc(limit, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.steps == step {
			p.cancel(fmt.Errorf("%s in %s", otherwise, limit))
		}
	})
}

// stop ends the step. p.mu is held.
func (p *patience) stop() {
	p.steps++
	if p.timer != nil {
		p.timer.Stop()
	}
}

// asking is a step of the request, which may still be on its way when the answer
// begins.
func (p *patience) asking(limit time.Duration, otherwise string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.header {
		p.step(limit, otherwise)
	}
}

// answers ends the steps of the request. It returns what has ended it before: the
// transport takes an answer, too, that comes while it hangs up.
func (p *patience) answers() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.header = true
	p.stop()
	return context.Cause(p.ctx)
}

// piece is the step until the next piece of an answer.
func (p *patience) piece() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step(p.idle, "it broke off in the middle: nothing more came")
}

// pause stops the clock: it is the client that is waited for.
func (p *patience) pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop()
}

// end ends it.
func (p *patience) end() {
	p.pause()
	p.cancel(nil)
}

// over reports whether it has ended the request. What comes after that is not the
// end of an answer, even where it looks like one.
func (p *patience) over() bool { return p.ctx.Err() != nil }

// why is what ended a request, where patience did.
func (p *patience) why(err error) error {
	if cause := context.Cause(p.ctx); errors.Is(err, context.Canceled) && cause != nil {
		return cause
	}
	return err
}
