package till

import (
	"context"
	"errors"
	"fmt"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/registry"
)

const (
	claimAtOnce  = 64
	claimTimeout = 2 * time.Minute
	claimRetry   = 5 * time.Second // doubled with each failure
	claimRetries = 7               // how often it is doubled
)

// claiming claims what is due.
func (t *Till) claiming(ctx context.Context) {
	for t.pause(ctx, 2*t.o.Tick, nil) {
		if t.opened() != nil {
			t.claim(ctx, false)
		}
	}
}

// claim claims what the policy says. Before the launcher ends it is everything, and
// whatever failed lately is tried again.
func (t *Till) claim(ctx context.Context, down bool) {
	tried := map[voucher.Channel]bool{}
	for ctx.Err() == nil {
		list := t.claims(down, tried)
		if len(list) == 0 {
			return
		}
		vouchers := make([]voucher.Voucher, len(list))
		for i, c := range list {
			vouchers[i] = c.Channel.Best
			tried[c.Channel.ID] = true
		}
		claiming, cancel := context.WithTimeout(ctx, claimTimeout)
		results := t.o.Chain.Claim(claiming, vouchers)
		cancel()
		var failed error
		for i, c := range list {
			if err := t.claimed(c, results[i]); err != nil {
				failed = fmt.Errorf("%s cannot be claimed from the channel %v, which is tried again: %w", registry.TON(c.Channel.Unclaimed()), c.Channel.ID, err)
			}
		}
		t.noted(&t.claimErr, failed)
	}
}

// claims picks what is to be claimed now.
func (t *Till) claims(down bool, tried map[voucher.Channel]bool) (list []store.Claim) {
	s := t.opened()
	if s == nil {
		return nil
	}
	now := t.o.Now()
	least := t.o.Chain.Least()
	for _, c := range t.o.Policy.Select(s.Channels(), now, down) {
		if len(list) == claimAtOnce {
			break
		}
		if c.Channel.Unclaimed() < least || c.Channel.GlobalID != t.o.GlobalID || tried[c.Channel.ID] {
			continue
		}
		t.mu.Lock()
		wait := t.backoff[c.Channel.ID].until
		t.mu.Unlock()
		if now.Before(wait) && !down {
			continue
		}
		list = append(list, c)
	}
	return list
}

// claimed takes what became of a claim.
func (t *Till) claimed(c store.Claim, r Claimed) error {
	id, now := c.Channel.ID, t.o.Now()
	s := t.opened()
	if s == nil {
		return ErrNoStore
	}
	if r.Err == nil {
		// What else is known of the channel may have changed meanwhile.
		known, ok := s.Channel(id)
		if !ok {
			return nil
		}
		chain := known.Chain
		chain.Claimed = max(chain.Claimed, c.Channel.Best.Total)
		if err := s.Seen(id, chain, r.Fees, now); err != nil {
			return err
		}
		t.o.Log("claimed %s from the channel %v, since %s; %s of it were fees", registry.TON(c.Channel.Unclaimed()), id, c.Reason, registry.TON(r.Fees))
		t.mu.Lock()
		delete(t.backoff, id)
		t.mu.Unlock()
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.backoff[id]
	b.until = now.Add(claimRetry << min(b.tries, claimRetries))
	b.tries++
	t.backoff[id] = b
	if errors.Is(r.Err, voucher.ErrStale) || errors.Is(r.Err, channel.ErrNoChannel) {
		// It is another one than is known here.
		t.read[id] = time.Time{}
		if a := t.admitted[id]; a != nil {
			a.read = time.Time{}
		}
		if errors.Is(r.Err, voucher.ErrStale) {
			return nil // a claim before is found to have been done
		}
	}
	return r.Err
}
