package proxy

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/market"
)

// MaxKept is how many workers are used of those that offer a model.
const MaxKept = 8

const (
	// atATime is how many offers are tried at the same time, and maxTries how many of one
	// reading of the listing: anyone can offer anything.
	atATime  = 32
	maxTries = 128
	// tryLimit bounds the time that one try takes, and chooseLimit all of them.
	tryLimit    = 25 * time.Second
	chooseLimit = 2 * time.Minute
	// avoidFor is for how long an offer that did not hold is not tried again. It is more
	// than the time between two readings, so that the second goes further down the list.
	avoidFor = 12 * time.Minute
	// renewEvery is how often at most the listing is read anew.
	renewEvery = 5 * time.Minute
)

// size is what a request is taken to come to when workers are compared.
var size = market.Tokens{Prompt: 1_000_000, Completion: 1_000_000}

// option is an endpoint that could be kept.
type option struct {
	endpoint  string
	owners    []string // of its offers
	payees    []voucher.Channel
	worker    *worker // nil until it was tried
	found     bool    // tried just now
	candidate market.Candidate
}

// Choose verifies who offers a model, by Payment.Listed, until enough of them hold, and
// makes the best of them the proxy's workers. It pays nothing. It returns what is known
// of all that were tried, those that are used first.
func (p *Proxy) Choose(ctx context.Context, model string) []Quote {
	p.mu.Lock()
	p.model = model
	p.mu.Unlock()
	return p.choose(ctx)
}

// renew reads the listing anew and chooses again. Workers that are in use stay.
func (p *Proxy) renew(ctx context.Context) {
	listed, err := p.options.Payment.Offers(ctx)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.listed = listed
	p.mu.Unlock()
	p.choose(ctx)
}

func (p *Proxy) choose(ctx context.Context) []Quote {
	p.choosing.Lock()
	defer p.choosing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, chooseLimit)
	defer cancel()
	options := p.choices()
	taste := market.DefaultTaste()
	pick := func(n int) []*option {
		var candidates []market.Candidate
		for _, o := range options {
			candidates = append(candidates, o.candidate)
		}
		var list []*option
		// They have been shuffled: what is equal keeps its order while this goes on.
		for _, i := range taste.Shortlist(candidates, n, size, func() uint32 { return 0 }) {
			list = append(list, options[i])
		}
		return list
	}
	var quotes, failed []Quote
	var mu sync.Mutex
	untried := func(o *option) bool { return o.worker == nil }
	for tries := 0; slices.ContainsFunc(pick(MaxKept), untried); {
		if tries >= maxTries || ctx.Err() != nil {
			options = slices.DeleteFunc(options, untried)
			break
		}
		var wait sync.WaitGroup
		bad := map[*option]bool{}
		for _, o := range pick(atATime) {
			if !untried(o) || tries >= maxTries {
				continue
			}
			tries++
			wait.Go(func() {
				p.mu.Lock() // of the records
				w := newWorker(p, o.endpoint, o.payees)
				p.mu.Unlock()
				w.proven = o.candidate.Proven
				try, cancel := context.WithTimeout(ctx, tryLimit)
				defer cancel()
				q := w.quote(try, p.model)
				if q.Problem != "" && ctx.Err() == nil {
					p.shun(o, time.Now().Add(avoidFor))
				}
				mu.Lock()
				defer mu.Unlock()
				if q.Problem != "" {
					bad[o] = true
					failed = append(failed, q)
					p.discard(w)
					return
				}
				o.worker, o.found, o.candidate.Price = w, true, q.Price
				quotes = append(quotes, q)
			})
		}
		wait.Wait()
		options = slices.DeleteFunc(options, func(o *option) bool { return bad[o] })
	}
	kept := pick(MaxKept)
	p.keep(kept, options)
	place := func(q Quote) int {
		at := slices.IndexFunc(kept, func(o *option) bool { return o.endpoint == q.Endpoint })
		return cmp.Or(one(at < 0)*MaxKept, at)
	}
	slices.SortStableFunc(quotes, func(a, b Quote) int { return cmp.Compare(place(a), place(b)) })
	for i := range quotes {
		if place(quotes[i]) == MaxKept {
			quotes[i].Problem = "there are enough others"
		}
	}
	return append(quotes, failed...)
}

// choices are the workers and what is offered beside them, in no order.
func (p *Proxy) choices() []*option {
	now := time.Now()
	payment := p.options.Payment
	p.mu.Lock()
	listed, workers, model := slices.Clone(p.listed), p.workers, p.model
	for name, until := range p.avoid {
		if now.After(until) {
			delete(p.avoid, name)
		}
	}
	avoided := func(name string) bool { _, ok := p.avoid[name]; return ok }
	rand.Shuffle(len(listed), func(i, j int) { listed[i], listed[j] = listed[j], listed[i] })
	options := map[string]*option{}
	var list []*option
	for _, l := range listed {
		used := slices.ContainsFunc(workers, func(w *worker) bool { return w.endpoint == l.Endpoint })
		if l.Payee == (voucher.Channel{}) || max(l.Price.Prompt, l.Price.Completion) > payment.MaxPrice || !used && (avoided(l.Endpoint) || avoided(l.Owner)) {
			continue
		}
		o := options[l.Endpoint]
		if o == nil {
			o = &option{endpoint: l.Endpoint, candidate: market.Candidate{Price: l.Price}}
			options[l.Endpoint] = o
			list = append(list, o)
		}
		// Anyone can name anyone's endpoint: which payee is the worker's own, and what it
		// costs, it says itself.
		o.owners, o.payees = append(o.owners, l.Owner), append(o.payees, l.Payee)
		if l.Price.Cost(size.Prompt, size.Completion) < o.candidate.Price.Cost(size.Prompt, size.Completion) {
			o.candidate.Price = l.Price
		}
	}
	p.mu.Unlock()
	for _, s := range payment.Purse.States() {
		if o := options[s.Worker]; o != nil && s.Used > 0 {
			o.candidate.Proven = true
		}
	}
	for _, w := range workers {
		o := options[w.endpoint]
		if o == nil {
			if w.idle() {
				continue // nobody offers it any more
			}
			o = &option{endpoint: w.endpoint}
			list = append(list, o)
		}
		o.worker = w
		w.mu.Lock()
		if o.payees != nil {
			w.payees = o.payees
		}
		m := w.manifest
		o.candidate.Latency, o.candidate.Proven = w.latency, w.proven
		w.mu.Unlock()
		o.candidate.Busy = !w.usable(now)
		if m != nil {
			if id, ok := modelOf(m, model); ok {
				o.candidate.Price = w.paying.price(m, id)
			}
		}
	}
	return list
}

// keep makes the options that were picked the proxy's workers. Others that have
// something to do stay, too, and all do where nobody who was picked is offered: a
// listing that is empty says nothing about who is good.
func (p *Proxy) keep(picked, options []*option) {
	offered := slices.ContainsFunc(picked, func(o *option) bool { return len(o.payees) > 0 })
	chosen := func(w *worker) bool {
		return slices.ContainsFunc(picked, func(o *option) bool { return o.worker == w })
	}
	p.mu.Lock()
	var workers, gone []*worker
	for _, w := range p.workers {
		if !offered || chosen(w) || !w.idle() {
			workers = append(workers, w)
		} else {
			gone = append(gone, w)
		}
	}
	for _, o := range picked {
		if o.found {
			workers = append(workers, o.worker)
			o.worker.transport.Trust(p.options.Records) // they may have been replaced meanwhile
			if p.running != nil {
				p.attend(o.worker, nil)
			}
		}
	}
	p.workers = workers
	p.mu.Unlock()
	for _, o := range options {
		if o.found && !chosen(o.worker) {
			p.discard(o.worker)
		}
	}
	for _, w := range gone {
		if at := slices.IndexFunc(options, func(o *option) bool { return o.worker == w }); at >= 0 {
			w.mu.Lock()
			until := w.until
			w.mu.Unlock()
			p.shun(options[at], until)
		}
		p.discard(w)
	}
}

// attend has a worker verified again and again while the proxy runs. p.mu is held.
func (p *Proxy) attend(w *worker, tried func()) {
	var ctx context.Context
	ctx, w.stop = context.WithCancel(p.running)
	go w.keep(ctx, tried)
}

// discard ends what there is of a worker that is not used any more.
func (p *Proxy) discard(w *worker) {
	if w.stop != nil {
		w.stop()
	}
	w.transport.CloseIdleConnections()
	p.metrics.forget(w.endpoint)
}

// shun has an endpoint, and who offers it, not tried again until then.
func (p *Proxy) shun(o *option, until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range append(slices.Clone(o.owners), o.endpoint) {
		if name != "" && until.After(p.avoid[name]) {
			p.avoid[name] = until
		}
	}
}

// short reports whether less than half of the workers are of use.
func (p *Proxy) short() bool {
	now, usable := time.Now(), 0
	workers := p.list()
	for _, w := range workers {
		usable += one(w.usable(now))
	}
	return 2*usable < len(workers)
}

// follow reads the listing anew when workers are wanting, until ctx ends.
func (p *Proxy) follow(ctx context.Context) {
	every := cmp.Or(p.options.Payment.Renew, renewEvery)
	tick := time.NewTicker(max(every/10, 1))
	defer tick.Stop()
	last, lacking := time.Now(), false
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.lack:
			lacking = true
		case <-tick.C:
		}
		if time.Since(last) < every || !lacking && !p.short() {
			continue
		}
		p.renew(ctx)
		last, lacking = time.Now(), false
	}
}
