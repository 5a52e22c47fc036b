package till

import (
	"context"
	"errors"
	"fmt"
	"time"

	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/guest"
)

// collecting asks the VM all the time what has been paid and used.
func (t *Till) collecting(ctx context.Context) {
	for ctx.Err() == nil {
		err := t.openStore()
		if err == nil {
			_, err = t.collect(ctx, pollMS)
			if ctx.Err() == nil {
				t.noted(&t.vmErr, err)
			}
			if err == nil {
				continue
			}
		}
		if !t.pause(ctx, t.o.Tick, nil) {
			return
		}
	}
}

// collect asks once, and makes durable what it is told. more says that there was
// something: it is acknowledged by asking again.
func (t *Till) collect(ctx context.Context, waitMS int) (more bool, err error) {
	asking, cancel := context.WithTimeout(ctx, time.Duration(waitMS)*time.Millisecond+10*time.Second)
	defer cancel()
	reply, err := t.o.VM.Control(asking, guest.ControlRequest{Op: guest.OpCollect, Ack: t.acked, WaitMS: waitMS})
	if err != nil {
		return false, err
	}
	if !reply.OK {
		return false, refusedBy(guest.OpCollect, reply)
	}
	t.want(reply.Wanted)
	if len(reply.Balances) == 0 {
		return false, nil
	}
	if reply.Batch <= t.acked {
		// It has not heard yet that this is durable.
		return true, nil
	}
	if err := t.keep(reply.Balances); err != nil {
		return false, err
	}
	t.acked = reply.Batch
	return true, nil
}

// keep makes what a VM said durable, all of it at once. What no VM of ours can say is
// left out, so that it keeps nothing else from being kept.
func (t *Till) keep(balances []guest.Balance) error {
	s := t.opened()
	if s == nil {
		return ErrNoStore
	}
	var updates []store.Update
	for _, b := range balances {
		u, err := t.update(s, b)
		if err != nil {
			t.o.Log("the VM said something that cannot be, which is left out: %v", err)
			continue
		}
		if u.Voucher != nil || len(u.Uses) > 0 {
			updates = append(updates, u)
		}
	}
	now := t.o.Now()
	t.mu.Lock()
	for _, u := range updates {
		if a := t.admitted[u.Channel]; a != nil {
			a.used = now
		}
	}
	t.mu.Unlock()
	if len(updates) == 0 {
		return nil
	}
	before, _ := s.Channel(updates[0].Channel)
	err := s.Put(now, updates...)
	if err == nil {
		return nil
	}
	if errors.Is(err, store.ErrBroken) {
		return t.reopen(before, updates, err)
	}
	// One of them is not in order.
	for _, u := range updates {
		err := s.Put(now, u)
		if err == nil {
			continue
		}
		if errors.Is(err, store.ErrBroken) {
			return t.reopen(before, nil, err)
		}
		t.o.Log("a voucher of the channel %v is left out: %v", u.Channel, err)
		if u.Voucher = nil; len(u.Uses) > 0 {
			if err := s.Put(now, u); err != nil {
				t.o.Log("what was used on the channel %v is left out: %v", u.Channel, err)
			}
		}
	}
	return nil
}

// reopen closes a store that could not be written. Whether the last record is on the
// disk all the same shows when it is opened again.
func (t *Till) reopen(before store.Channel, updates []store.Update, why error) error {
	t.mu.Lock()
	if t.store != nil {
		t.store.Close()
		t.store = nil
	}
	t.note(&t.storeErr, why)
	t.mu.Unlock()
	if len(updates) == 0 || t.openStore() != nil {
		return why
	}
	after, ok := t.opened().Channel(before.ID)
	if ok && (after.Used != before.Used || after.Best != before.Best) {
		return nil // a record is written whole or not at all
	}
	return why
}

// update is a balance as the store takes it.
func (t *Till) update(s *store.Store, b guest.Balance) (u store.Update, err error) {
	if u.Channel, err = voucher.ParseChannel(b.Channel); err != nil {
		return u, err
	}
	if _, ok := s.Channel(u.Channel); !ok {
		return u, fmt.Errorf("%w: %v", store.ErrUnknown, u.Channel)
	}
	if b.Voucher != "" {
		v, err := voucher.Parse(b.Voucher)
		if err != nil {
			return u, err
		}
		u.Voucher = &v
	}
	for _, use := range b.Uses {
		if use.Model < 0 || use.Model >= len(t.o.Models) {
			return u, fmt.Errorf("%w: there is no model %d", store.ErrUse, use.Model)
		}
		u.Uses = append(u.Uses, store.Use{
			Model: t.o.Models[use.Model], Requests: use.Requests, PromptTokens: use.PromptTokens,
			CompletionTokens: use.CompletionTokens, Earned: use.Earned,
		})
	}
	return u, nil
}
