package proxy

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"chrysalis/attest"
	"chrysalis/manifest"
	"chrysalis/terminal"
)

// state is what is known of a worker.
type state int

const (
	verified    state = iota
	unknown           // not tried yet
	unreachable       // it does not answer, or could not be checked
	refused           // a check failed
)

func (s state) String() string {
	return [...]string{"verified", "not tried yet", "unreachable", "refused"}[s]
}

// worker is one VM.
type worker struct {
	proxy     *Proxy
	endpoint  string
	transport *attest.Transport
	inFlight  atomic.Int64
	silent    atomic.Int64  // requests in a row that it did not begin to answer
	wake      chan struct{} // to verify again now

	mu      sync.Mutex
	state   state
	session *attest.Session // the last
	at      time.Time       // when the state was found
	problem string
	limits  manifest.Limits // of the manifest verified last
}

func newWorker(p *Proxy, endpoint string) *worker {
	w := &worker{proxy: p, endpoint: endpoint, state: unknown, wake: make(chan struct{}, 1)}
	w.transport = &attest.Transport{
		Policy: p.options.Policy, Records: p.options.Records, Collateral: p.options.Collateral, GPU: p.options.GPU, IdleConns: 256,
		Timeout: p.options.Timeout, Verified: w.judged,
	}
	return w
}

// judged takes note of a verdict.
func (w *worker) judged(s *attest.Session) {
	result := "ok"
	w.mu.Lock()
	w.session, w.at, w.problem = s, time.Now(), ""
	switch {
	case s.Verdict.OK:
		w.state, w.limits = verified, limitsOf(s)
	default:
		w.state = unreachable
		if s.Verdict.Refused() {
			w.state = refused
		}
		result = string(s.Verdict.Failed)
		w.problem = terminal.Line(s.Verdict.Err().Error())
	}
	now := w.state
	w.mu.Unlock()
	w.proxy.metrics.judged(w.endpoint, result, now == verified, s.Took)
}

// failed takes note of an error that came with no verdict.
func (w *worker) failed(err error) {
	if _, ok := errors.AsType[*attest.RefusedError](err); ok {
		return // judged has it
	}
	w.mu.Lock()
	w.state, w.at, w.problem = unreachable, time.Now(), terminal.Line(err.Error())
	w.mu.Unlock()
	w.proxy.metrics.lost(w.endpoint)
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// why says in a few words why a worker is not used.
func (w *worker) why() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return cmp.Or(w.problem, w.state.String())
}

// keep verifies the worker again and again: at two thirds of the policy's age
// while it is good, sooner and sooner less often while it is not.
func (w *worker) keep(ctx context.Context, tried func()) {
	const slowest = time.Minute
	retry := time.Second
	for {
		session, err := w.transport.Attest(ctx, w.endpoint)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			w.failed(err)
		}
		if w.proxy.options.Verified != nil {
			w.proxy.options.Verified(w.endpoint, session, err)
		}
		if tried != nil {
			tried()
			tried = nil
		}
		wait := w.proxy.options.Policy.MaxAge() * 2 / 3
		if err != nil {
			wait, retry = min(retry, wait), min(2*retry, slowest)
		} else {
			retry = time.Second
		}
		wait -= time.Duration(rand.Int64N(int64(wait)/10 + 1)) // not all at once
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-w.wake:
			timer.Stop()
			if err != nil { // a failure is no reason to hurry more
				select {
				case <-time.After(wait):
				case <-ctx.Done():
					return
				}
			}
		}
	}
}

// order lists the workers that may get a request: verified ones first, the least
// loaded first among them. Refused ones get none until the background finds them
// good again. One whose evidence is good, but that left the last request without an
// answer, comes after all that answer.
func (p *Proxy) order() []*worker {
	type rank struct {
		w     *worker
		state state
		mute  int64
		load  int64
		dice  uint32
	}
	var ranks []rank
	for _, w := range p.workers {
		w.mu.Lock()
		s := w.state
		w.mu.Unlock()
		if s != refused {
			ranks = append(ranks, rank{w, s, min(w.silent.Load(), 1), w.inFlight.Load(), rand.Uint32()})
		}
	}
	slices.SortFunc(ranks, func(a, b rank) int {
		return cmp.Or(cmp.Compare(a.state, b.state), cmp.Compare(a.mute, b.mute), cmp.Compare(a.load, b.load), cmp.Compare(a.dice, b.dice))
	})
	out := make([]*worker, len(ranks))
	for i, r := range ranks {
		out[i] = r.w
	}
	return out
}
