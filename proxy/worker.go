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
	"chrysalis/channel/voucher"
	"chrysalis/manifest"
	"chrysalis/market"
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
	asked     atomic.Int64  // requests that it has, or that are being paid for
	silent    atomic.Int64  // requests in a row that it did not begin to answer
	wake      chan struct{} // to verify again now

	mu       sync.Mutex
	state    state
	session  *attest.Session // the last
	at       time.Time       // when the state was found
	problem  string
	manifest *manifest.Manifest // verified last
	latency  time.Duration      // until an answer begins, on the average; 0 before the first
	payees   []voucher.Channel  // whom its offers name; none where it was named by hand
	proven   bool               // it has served this client
	refusals int                // in a row
	until    time.Time          // it is asked after others

	stop   context.CancelFunc // of keep; nil before
	paying *paying
}

func newWorker(p *Proxy, endpoint string, payees []voucher.Channel) *worker {
	w := &worker{proxy: p, endpoint: endpoint, state: unknown, wake: make(chan struct{}, 1), payees: payees}
	w.paying = &paying{worker: w, except: map[voucher.Channel]bool{}}
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
		w.state, w.manifest = verified, manifestOf(s)
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

// began takes into account how long an answer took to begin.
func (w *worker) began(took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.latency == 0 {
		w.latency = took
	} else {
		w.latency += (took - w.latency) / 8
	}
}

// order lists the workers that may get a request for a model: verified ones first.
// Refused ones get none until the background finds them good again. One whose evidence
// is good, but that left the last request without an answer, comes after all that
// answer, and so does one that does not serve the model, that refused lately, or that
// answers as many requests as it can at a time. The others are asked in the order of
// market.Taste.
func (p *Proxy) order(model string) []*worker {
	type rank struct {
		w                         *worker
		state                     state
		mute, lacks, paused, full int
	}
	var ranks []rank
	var candidates []market.Candidate
	now := time.Now()
	for _, w := range p.list() {
		r := rank{w: w, mute: int(min(w.silent.Load(), 1))}
		c := market.Candidate{InFlight: int(w.inFlight.Load())}
		w.mu.Lock()
		m := w.manifest
		r.state, c.Latency, r.paused = w.state, w.latency, one(now.Before(w.until))
		w.mu.Unlock()
		if r.state == refused {
			continue
		}
		if m != nil {
			r.full = one(c.InFlight >= m.Limits.Concurrency)
			if id, ok := modelOf(m, model); ok {
				c.Price = w.paying.price(m, id)
			} else {
				r.lacks = 1
			}
		}
		c.Busy = r.state != verified || r.mute+r.lacks+r.paused+r.full > 0
		ranks, candidates = append(ranks, r), append(candidates, c)
	}
	order := make([]rank, 0, len(ranks))
	for _, i := range market.DefaultTaste().Order(candidates, size, rand.Uint32) {
		order = append(order, ranks[i])
	}
	slices.SortStableFunc(order, func(a, b rank) int {
		return cmp.Or(cmp.Compare(a.state, b.state), cmp.Compare(a.mute, b.mute), cmp.Compare(a.lacks, b.lacks), cmp.Compare(a.paused, b.paused), cmp.Compare(a.full, b.full))
	})
	out := make([]*worker, len(order))
	for i, r := range order {
		out[i] = r.w
	}
	return out
}

// refuses takes note that the worker did not serve a request that it could have been paid
// for. What it refuses while it is asked after others anyway does not count.
func (w *worker) refuses() {
	if w.proxy.options.Payment == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if now := time.Now(); now.After(w.until) {
		w.refusals++
		w.until = now.Add(market.Pause(w.refusals, w.proven))
	}
}

// pause has the worker asked after others for a while, through no fault of its own.
func (w *worker) pause(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if until := time.Now().Add(d); until.After(w.until) {
		w.until = until
	}
}

// serves takes note that the worker has served a request.
func (w *worker) serves() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.proven, w.refusals, w.until = true, 0, time.Time{}
}

// usable reports whether a request may well be served: the worker is verified, can be
// paid, and has not refused lately.
func (w *worker) usable(now time.Time) bool {
	w.mu.Lock()
	good := w.state == verified && !now.Before(w.until) && w.silent.Load() == 0
	w.mu.Unlock()
	t := w.paying
	t.mu.Lock()
	defer t.mu.Unlock()
	return good && (t.accept == nil || w.proxy.options.Payment.Purse.Barred(payeeOf(t.accept)) == nil)
}

// idle reports whether nothing is asked of the worker.
func (w *worker) idle() bool { return w.asked.Load() == 0 }

func one(yes bool) int {
	if yes {
		return 1
	}
	return 0
}
