package pay

import "chrysalis/channel/voucher"

// A Balance is what the launcher is told of a channel: what is new.
type Balance struct {
	Channel voucher.Channel
	Best    *voucher.Voucher // nil where there is no better one than was told
	Uses    []Use            // one for each model, of those that were used
}

// A Use is what was served and charged on a channel.
type Use struct {
	Model            string // NAME@REVISION
	Requests         uint64
	PromptTokens     uint64
	CompletionTokens uint64
	Earned           uint64 // nanotons
}

// use adds a charge to what is to be told.
func (a *account) use(model string, c Charge) {
	at := 0
	for at < len(a.uses) && a.uses[at].Model != model {
		at++
	}
	if at == len(a.uses) {
		a.uses = append(a.uses, Use{Model: model})
	}
	u := &a.uses[at]
	u.Requests++
	u.PromptTokens = add(u.PromptTokens, uint64(c.Prompt))
	u.CompletionTokens = add(u.CompletionTokens, uint64(c.Completion))
	u.Earned = add(u.Earned, c.Amount)
}

// enqueue notes that there is something to tell of an account. The book is locked.
func (b *Book) enqueue(a *account) {
	if !a.queued {
		a.queued = true
		b.queue = append(b.queue, a)
	}
	select {
	case b.tell <- struct{}{}:
	default:
	}
}

// Tell returns a channel on which something comes when there is something new for
// Collect. It is for one reader.
func (b *Book) Tell() <-chan struct{} { return b.tell }

// Collect takes that a batch is durable, by its number, and returns what has been
// paid and used since, as the next batch. A batch that is not acknowledged is
// returned again, the same under the same number; ack is 0 as long as none was
// durable. Only by its acknowledgement do a batch's vouchers begin to cover: a VM
// that serves on a voucher that is nowhere on disk would serve for nothing if it
// ended.
//
// fits is asked for each balance whether there is still room for it in the batch; the
// first one must fit. With nothing to tell the number is 0. The error is ErrBatch.
func (b *Book) Collect(ack uint64, fits func(Balance) bool) (batch uint64, list []Balance, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case ack > b.batch:
		return 0, nil, ErrBatch
	case len(b.told) > 0 && ack < b.batch:
		return b.batch, b.told, nil
	case len(b.told) > 0:
		b.acknowledge()
	}
	for len(b.queue) > 0 {
		a := b.queue[0]
		balance := Balance{Channel: a.channel, Uses: a.uses}
		if a.next.Total > 0 {
			next := a.next
			balance.Best = &next
		}
		if !fits(balance) {
			break
		}
		b.queue = b.queue[1:]
		a.uses, a.queued, a.told = nil, false, true
		b.told = append(b.told, balance)
	}
	if len(b.told) == 0 {
		return 0, nil, nil
	}
	b.batch++
	return b.batch, b.told, nil
}

// acknowledge has the vouchers of the last batch cover.
func (b *Book) acknowledge() {
	for _, balance := range b.told {
		a := b.accounts[balance.Channel] // not dropped: it was told
		a.told = false
		if balance.Best == nil {
			continue
		}
		a.best, a.cover = *balance.Best, balance.Best.Total
		if a.next == a.best {
			a.next = voucher.Voucher{}
		}
	}
	b.told = nil
	b.change()
}
