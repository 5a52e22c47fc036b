package proxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/pay"
	"chrysalis/terminal"
)

// A Quote is what is known of one worker before it is asked anything.
type Quote struct {
	Endpoint   string
	Problem    string // why it is not used; "" of one that is
	Model      string // NAME@REVISION; "" where it does not serve the one that is asked for
	Free       bool
	Ceiling    pay.Price // nanotons for a million tokens
	Price      pay.Price // now
	Payee      voucher.Channel
	MinDeposit uint64        // nanotons
	Delay      time.Duration // for which the payee can claim when a channel closes
}

// Plan verifies every worker and asks those that want to be paid for their terms. It
// pays nothing. The order is that in which they would be asked for the model.
func (p *Proxy) Plan(ctx context.Context, model string) []Quote {
	workers := p.list()
	quotes := make(map[*worker]Quote, len(workers))
	var mu sync.Mutex
	var wait sync.WaitGroup
	for _, w := range workers {
		wait.Go(func() {
			q := w.quote(ctx, model)
			mu.Lock()
			defer mu.Unlock()
			quotes[w] = q
		})
	}
	wait.Wait()
	var list []Quote
	for _, w := range p.order(model) {
		if q, ok := quotes[w]; ok {
			list = append(list, q)
			delete(quotes, w)
		}
	}
	for _, w := range workers { // those that are refused
		if q, ok := quotes[w]; ok {
			list = append(list, q)
		}
	}
	slices.SortStableFunc(list, func(a, b Quote) int {
		return cmp.Compare(one(a.Problem != ""), one(b.Problem != ""))
	})
	return list
}

func (w *worker) quote(ctx context.Context, model string) Quote {
	q := Quote{Endpoint: w.endpoint}
	fail := func(err error) Quote {
		q.Problem = terminal.Line(err.Error())
		return q
	}
	if _, err := w.transport.Attest(ctx, w.endpoint); err != nil {
		w.failed(err)
		return fail(err)
	}
	session, m := w.verifiedSession()
	if m == nil {
		return fail(errors.New("it is not verified"))
	}
	var ok bool
	if q.Model, ok = modelOf(m, model); !ok {
		if model != "" {
			return fail(fmt.Errorf("it does not serve the model %q", model))
		}
		q.Model = m.Models[0].ID()
	}
	ceilings, paid := m.Ceilings()
	q.Ceiling = ceilings.Models[q.Model]
	if q.Free = q.Ceiling.Free(); !paid || q.Free {
		return q
	}
	payment := w.proxy.options.Payment
	if payment == nil {
		return fail(ErrUnpaid)
	}
	t := w.paying
	if err := payment.acceptable(m, q.Ceiling); err != nil {
		return fail(t.note(err))
	}
	t.setup.Lock()
	defer t.setup.Unlock()
	t.mu.Lock()
	t.booted(sha256.Sum256(session.TLSKey))
	if token := w.proxy.options.Token; token != "" {
		t.authority = "Bearer " + token
	}
	t.mu.Unlock()
	terms, _, err := t.exchange(ctx, nil)
	if err == nil {
		err = t.learn(terms)
	}
	if err != nil {
		return fail(t.note(err))
	}
	t.mu.Lock()
	a := t.accept
	t.mu.Unlock()
	q.Payee, q.Delay = payeeOf(a), time.Duration(a.Extra.MinDelay)*time.Second
	q.MinDeposit, _ = pay.ParseAmount(a.Extra.MinDeposit)
	q.Price = t.price(m, q.Model)
	q.Free = q.Price.Free()
	if err := payment.Purse.Barred(q.Payee); err != nil {
		return fail(t.note(err))
	}
	return q
}

// Prepare has a channel to the worker that would be asked for a model first, so that
// the first request does not wait for one.
func (p *Proxy) Prepare(ctx context.Context, model string) error {
	for _, q := range p.Plan(ctx, model) {
		if q.Problem != "" || q.Free {
			if q.Problem == "" {
				return nil
			}
			continue
		}
		workers := p.list()
		at := slices.IndexFunc(workers, func(w *worker) bool { return w.endpoint == q.Endpoint })
		if at < 0 {
			continue
		}
		session, _ := workers[at].verifiedSession()
		if session == nil {
			continue
		}
		_, _, err := workers[at].paying.prepare(ctx, sha256.Sum256(session.TLSKey))
		return workers[at].paying.note(err)
	}
	return nil
}
