package till

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/guest"
)

// want notes channels that clients named. Anybody can name any, so that there are only
// so many at a time, and one that has just been refused is not read again at once.
func (t *Till) want(names []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.o.Now()
	for _, name := range names[:min(len(names), 64)] {
		id, err := voucher.ParseChannel(name)
		if err != nil || t.admitted[id] != nil || now.Before(t.refused[id]) {
			continue
		}
		if len(t.wanted) >= maxWanted && t.wanted[id] == 0 {
			for other, times := range t.wanted {
				if times == 1 {
					delete(t.wanted, other)
					break
				}
			}
			if len(t.wanted) >= maxWanted {
				continue
			}
		}
		t.wanted[id]++
	}
	if len(t.wanted) > 0 {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// reading admits channels that are wanted, and reads again those that are known.
func (t *Till) reading(ctx context.Context) {
	for {
		if t.opened() != nil {
			for t.readOnce(ctx) {
			}
		}
		if !t.pause(ctx, t.o.Tick, t.wake) {
			return
		}
	}
}

// told reports whether the VM knows the prices. What a channel has been paid and not
// used is served at those of its admission.
func (t *Till) told() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.set
}

// readOnce reads what is due, at most readAtOnce channels, and reports whether there
// may be more.
func (t *Till) readOnce(ctx context.Context) bool {
	s := t.opened()
	if s == nil || ctx.Err() != nil || !t.told() {
		return false
	}
	began := t.o.Now() // what is read is as of then, or newer
	list, asked := t.due(s)
	if len(list) == 0 {
		return false
	}
	reading, cancel := context.WithTimeout(ctx, 30*time.Second)
	readings, err := t.o.Chain.Read(reading, list)
	cancel()
	if ctx.Err() != nil {
		return false
	}
	t.mu.Lock()
	if err != nil {
		// What is wanted stays so, as far as the VM still says it.
		t.note(&t.chainErr, fmt.Errorf("channels cannot be read, so that none is served on anew: %w", err))
		wait := min(t.o.Tick<<min(t.chainBad, 10), maxBackoff)
		t.chainTry = t.o.Now().Add(wait)
		t.chainBad++
		t.mu.Unlock()
		return false
	}
	t.note(&t.chainErr, nil)
	t.chainBad = 0
	t.mu.Unlock()
	for i, r := range readings {
		t.take(ctx, s, list[i], r, asked[list[i]], began)
	}
	return len(list) == readAtOnce
}

// due picks the channels to be read now: those that are known here before those that
// anybody may have named, of which there are only so many a second. asked has those
// that the VM wants to serve on.
func (t *Till) due(s *store.Store) (list []voucher.Channel, asked map[voucher.Channel]bool) {
	known := s.Channels()
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.o.Now()
	if now.Before(t.chainTry) && t.chainTry.Sub(now) <= maxBackoff {
		return nil, nil
	}
	asked = map[voucher.Channel]bool{}
	type candidate struct {
		id   voucher.Channel
		late time.Duration
	}
	var again []candidate
	have := make(map[voucher.Channel]bool, len(known))
	for _, c := range known {
		have[c.ID] = true
		if t.wanted[c.ID] > 0 && len(list) < readAtOnce {
			list = append(list, c.ID)
			continue
		}
		last, every := t.read[c.ID], readOther
		if a := t.admitted[c.ID]; a != nil {
			last, every = a.read, readAdmitted
		} else if c.Unclaimed() > 0 {
			every = readPending
		}
		if _, gone := t.missing[c.ID]; gone {
			every = goneAgain
		}
		if late := now.Sub(last) - every; late >= 0 {
			again = append(again, candidate{c.ID, late})
		}
	}
	slices.SortFunc(again, func(a, b candidate) int { return cmp.Compare(b.late, a.late) })
	// What is new gets some of the room, however much is to be read again.
	for _, c := range again[:min(len(again), max(0, readAtOnce*3/4-len(list)))] {
		list = append(list, c.id)
	}
	// Who really wants to pay asks again and again; who names many to keep others out
	// has named most of them once.
	strange := slices.DeleteFunc(slices.Collect(maps.Keys(t.wanted)), func(id voucher.Channel) bool { return have[id] })
	slices.SortFunc(strange, func(a, b voucher.Channel) int { return cmp.Compare(t.wanted[b], t.wanted[a]) })
	for _, id := range strange {
		if len(list) >= readAtOnce || !t.reads.take(now) {
			break
		}
		list = append(list, id)
	}
	for _, id := range list {
		asked[id] = t.wanted[id] > 0
		delete(t.wanted, id)
	}
	return list, asked
}

// take decides on a channel that has been read.
func (t *Till) take(ctx context.Context, s *store.Store, id voucher.Channel, r Reading, asked bool, now time.Time) {
	known, kept := s.Channel(id)
	t.mu.Lock()
	if kept {
		t.read[id] = now
	}
	if r.Err == nil {
		delete(t.missing, id)
	}
	t.mu.Unlock()
	err := r.Err
	if err == nil {
		err = t.admit(ctx, s, r.State, known, kept, asked, now)
	} else if errors.Is(err, channel.ErrNoChannel) && kept {
		t.gone(ctx, s, known, now)
	}
	if err == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	_, again := t.refused[id]
	if asked {
		t.refusals++
		if len(t.refused) >= maxRefusals {
			clear(t.refused) // whoever fills it pays for nothing but some readings
		}
		t.refused[id] = now.Add(patience(err))
	}
	if again || !t.lines.take(now) { // anybody can cause this line
		return
	}
	if asked {
		t.o.Log("the channel %v is not served on: %v", id, err)
	} else {
		t.o.Log("the channel %v, read again: %v", id, err)
	}
}

// A bucket allows so much at once and so much a second.
type bucket struct {
	burst, rate float64
	left        float64
	filled      time.Time
}

func (b *bucket) take(now time.Time) bool {
	b.left = min(b.burst, b.left+b.rate*max(0, now.Sub(b.filled).Seconds()))
	b.filled = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// errVM is that the VM and not the channel is why it is not served on.
var errVM = errors.New("tell the VM")

// patience is how long a channel that was refused is not read again: what its payer
// can mend or has just done is looked at soon.
func patience(err error) time.Duration {
	switch {
	case errors.Is(err, channel.ErrCover), errors.Is(err, ErrSpent):
		return 10 * time.Second
	case errors.Is(err, channel.ErrClosing), errors.Is(err, ErrHeld):
		return time.Minute
	case errors.Is(err, channel.ErrPayee), errors.Is(err, channel.ErrNotChannel), errors.Is(err, channel.ErrDelay),
		errors.Is(err, channel.ErrNetwork), errors.Is(err, voucher.ErrKey):
		return 10 * time.Minute // it cannot become better
	}
	return 3 * time.Second
}

// admit begins to serve on a channel, or takes what has changed of it.
func (t *Till) admit(ctx context.Context, s *store.Store, state *channel.State, known store.Channel, kept, asked bool, now time.Time) error {
	id := voucher.Channel(state.Address.ID)
	t.mu.Lock()
	a := t.admitted[id]
	t.mu.Unlock()
	demand := channel.Demand{GlobalID: t.o.GlobalID, Payee: t.o.Payee, MinDelay: t.o.MinDelay}
	if !kept {
		// What opening takes is not in the channel, and rent is not counted on.
		demand.MinCover = max(t.o.MinDeposit-channel.MinDeposit, 1)
	}
	bad := demand.Check(state)
	if bad != nil && !kept {
		return bad
	}
	chain := store.Chain{Claimed: state.Claimed, Cover: state.Cover()}
	if at := state.FinishAt(); !at.IsZero() {
		chain.ClosingAt = at.Unix()
	}
	if state.GlobalID != t.o.GlobalID || kept && known.Key != state.PayerKey {
		return channel.ErrNetwork
	}
	// The VM may hold a voucher for all that it was told the channel pays. Rent has
	// taken a little since, which is not counted on, so that the contract still pays it.
	if told := known.Chain.Cover; kept && told > chain.Cover && told > state.Claimed && told-state.Claimed <= state.Balance {
		chain.Cover = told
	}
	if !kept {
		if err := t.hold(id); err != nil {
			return err
		}
	}
	if err := s.Admit(id, state.GlobalID, state.PayerKey, chain); err != nil {
		return err
	}
	known, _ = s.Channel(id)
	closing := bad != nil
	if a == nil {
		switch {
		case !asked:
			return nil
		case bad != nil:
			return bad
		case known.Used >= chain.Cover:
			return fmt.Errorf("%w: %d of %d nanotons are used", ErrSpent, known.Used, chain.Cover)
		}
		t.makeRoom(ctx, now)
	} else {
		t.mu.Lock()
		a.read = now
		same, idle := a.closing == closing && a.limit == chain.Cover, now.Sub(a.used) >= idleDrop
		t.mu.Unlock()
		if idle && t.drop(ctx, id) || same {
			return nil
		}
	}
	admission := guest.Admission{
		Channel: id.String(), Key: hex.EncodeToString(state.PayerKey[:]), Limit: chain.Cover, Used: known.Used, Closing: closing,
	}
	if known.Best.Total > 0 {
		admission.Best = known.Best.String()
		admission.Limit = max(admission.Limit, known.Best.Total)
	}
	admission.Limit = max(admission.Limit, known.Used)
	if err := t.ask(ctx, guest.ControlRequest{Op: guest.OpAdmit, Admit: &admission}); err != nil {
		return fmt.Errorf("%w: %w", errVM, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if a == nil {
		t.o.Log("the channel %v is served on, for %d nanotons more", id, chain.Cover-known.Used)
		a = &admitted{used: now}
		t.admitted[id] = a
		delete(t.refused, id)
	}
	a.read, a.closing, a.limit = now, closing, chain.Cover
	return nil
}

// shut has the VM serve no more on a channel, which it may know.
func (t *Till) shut(ctx context.Context, c store.Channel) error {
	t.mu.Lock()
	a := t.admitted[c.ID]
	t.mu.Unlock()
	if a == nil {
		return nil
	}
	limit := max(c.Chain.Cover, c.Used, c.Best.Total)
	admission := guest.Admission{Channel: c.ID.String(), Key: hex.EncodeToString(c.Key[:]), Limit: limit, Used: c.Used, Closing: true}
	if err := t.ask(ctx, guest.ControlRequest{Op: guest.OpAdmit, Admit: &admission}); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	a.closing = true
	return nil
}

// gone is called when a channel is proved not to be there. Its vouchers are worth
// nothing then, but are kept until it is proved once more.
func (t *Till) gone(ctx context.Context, s *store.Store, c store.Channel, now time.Time) {
	t.mu.Lock()
	since, again := t.missing[c.ID]
	if !again {
		t.missing[c.ID] = now
	}
	t.mu.Unlock()
	if err := t.shut(ctx, c); err != nil {
		t.o.Log("%v", err)
	}
	if !again || now.Sub(since) < goneAgain {
		return
	}
	if err := s.Gone(c.ID, c.Chain.Claimed, 0, now); err != nil {
		t.o.Log("forget the channel %v: %v", c.ID, err)
		return
	}
	t.drop(ctx, c.ID)
	t.mu.Lock()
	delete(t.admitted, c.ID)
	delete(t.missing, c.ID)
	delete(t.read, c.ID)
	delete(t.backoff, c.ID)
	t.mu.Unlock()
	os.Remove(t.holder(c.ID))
	t.o.Log("the channel %v is closed; vouchers for %d nanotons were not claimed", c.ID, c.Unclaimed())
}

// drop has the VM forget a channel on which nothing runs.
func (t *Till) drop(ctx context.Context, id voucher.Channel) bool {
	if err := t.ask(ctx, guest.ControlRequest{Op: guest.OpDrop, Channel: id.String()}); err != nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.admitted, id)
	return true
}

// makeRoom drops the channel that has been idle for the longest where there are as
// many as can be.
func (t *Till) makeRoom(ctx context.Context, now time.Time) {
	t.mu.Lock()
	var oldest voucher.Channel
	var idle time.Duration
	for id, a := range t.admitted {
		if d := now.Sub(a.used); d > idle {
			oldest, idle = id, d
		}
	}
	full := len(t.admitted) >= maxAdmitted && idle > time.Minute
	t.mu.Unlock()
	if full {
		t.drop(ctx, oldest)
	}
}

// holder is where it says which of the owner's VMs has a channel: a link to the VM's
// name, which is made in one step or not at all.
func (t *Till) holder(id voucher.Channel) string {
	return filepath.Join(t.o.Holders, strconv.FormatInt(int64(t.o.GlobalID), 10), hex.EncodeToString(id[:]))
}

// hold takes a channel for this VM. Two VMs that serve on one channel would be shown
// the same vouchers, and are paid once.
func (t *Till) hold(id voucher.Channel) error {
	path := t.holder(id)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	err := os.Symlink(t.o.Name, path)
	if errors.Is(err, os.ErrExist) {
		name, err := os.Readlink(path)
		if err != nil {
			return err
		}
		if name != t.o.Name {
			return fmt.Errorf("%w, %q", ErrHeld, name)
		}
		return nil
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
