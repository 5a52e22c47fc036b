// Package store keeps the vouchers that an owner has been paid with, and what has
// been earned by them, on disk. A voucher is money: Put returns when it is durable
// and not before, and what was durable survives the process, however it ends.
//
// The store is a log. Each record holds the whole of what it is about, as it is
// then, so that reading a record twice or an older one first does no harm. When the
// log is much longer than what it says, it is written anew, and the one before is
// kept. A record whose checksum is wrong is passed over and reported; what it was
// about is then as the records around it say.
package store

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"regexp"
	"slices"
	"sync"
	"time"

	"chrysalis/channel/voucher"
)

// Errors of the store.
var (
	ErrUnknown = errors.New("the channel is not one that has been admitted")
	ErrCover   = errors.New("the voucher is for more than the channel is known to hold")
	ErrUse     = errors.New("what is said to have been used cannot be")
	ErrBroken  = errors.New("the store cannot be written; nothing more is acknowledged")
	ErrLocked  = errors.New("another process uses the store")
)

// Limits.
const (
	maxChannels = 1 << 20
	maxShares   = 4096 // of one channel that are not claimed yet; older ones are joined
)

// A Chain is what was proved of a channel on the chain.
type Chain struct {
	Claimed   uint64 `json:"claimed"`              // nanotons
	Cover     uint64 `json:"cover"`                // the largest total that a voucher may have
	ClosingAt int64  `json:"closing_at,omitempty"` // Unix time in seconds from which the payer can take the rest; 0 of one that is not closing
}

// A Channel is what the store knows of a channel.
type Channel struct {
	ID       voucher.Channel
	GlobalID int32
	Key      voucher.Key
	Chain    Chain
	Best     voucher.Voucher // with total 0 where there is none
	// Since is when the oldest of what is not claimed came, Unix time in seconds; 0
	// where everything is.
	Since int64
	// Used is how much of the channel's total has been served for, in nanotons. What had
	// been claimed before the channel was first admitted counts as used.
	Used uint64
}

// Unclaimed is what the best voucher adds to what has been claimed, in nanotons.
func (c *Channel) Unclaimed() uint64 {
	if c.Best.Total <= c.Chain.Claimed {
		return 0
	}
	return c.Best.Total - c.Chain.Claimed
}

// A Use is what was served on a channel.
type Use struct {
	Model            string // NAME@REVISION
	Requests         uint64
	PromptTokens     uint64
	CompletionTokens uint64
	Earned           uint64 // nanotons
}

// An Update is a voucher, what was served, or both.
type Update struct {
	Channel voucher.Channel
	Voucher *voucher.Voucher
	Uses    []Use
}

// share is what one model earned on one day on one channel, and has not been
// claimed.
type share struct {
	Day    string `json:"d"`
	Model  string `json:"m"`
	Amount uint64 `json:"a"`
}

type channel struct {
	Channel
	settled uint64 // of Chain.Claimed: what shares have been paid by
	shares  []share
}

type rowKey struct{ day, model string }

// Store is a store that is open. Its methods may be called from any goroutine.
type Store struct {
	dir    string
	lock   *os.File
	damage []string

	mu       sync.Mutex
	channels map[voucher.Channel]*channel
	rows     map[rowKey]*Row
	names    map[string]string // of models, each once
	buffer   []byte            // records that are not written yet
	appended uint64            // how many there have been
	broken   error

	io      sync.Mutex // held by who writes
	file    *os.File
	size    int64
	compact int64 // the size after the last compaction
	synced  uint64
}

var modelRE = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,129}@[A-Za-z0-9._-]{1,64}$`)

// Damage says what of the store could not be read when it was opened; empty where
// everything could.
func (s *Store) Damage() []string { return s.damage }

// Admit adds a channel that has been checked with proofs, or changes what is known
// of it.
func (s *Store) Admit(id voucher.Channel, globalID int32, key voucher.Key, chain Chain) error {
	if err := voucher.CheckKey(key); err != nil {
		return err
	}
	s.mu.Lock()
	c := s.channels[id]
	switch {
	case c == nil && len(s.channels) >= maxChannels:
		s.mu.Unlock()
		return fmt.Errorf("there are %d channels already", maxChannels)
	case c == nil:
		c = &channel{Channel: Channel{ID: id, GlobalID: globalID, Key: key}, settled: chain.Claimed}
		s.channels[id] = c
	case c.GlobalID != globalID || c.Key != key:
		s.mu.Unlock()
		return fmt.Errorf("channel %v is known with another key or network", id)
	}
	return s.commit(s.see(c, chain, 0, ""))
}

// Put takes vouchers and what was served, all of them or none, and returns when they
// are durable. It refuses a voucher for no more than the best one (voucher.ErrStale).
func (s *Store) Put(now time.Time, updates ...Update) error {
	for _, u := range updates {
		if err := s.check(u); err != nil {
			return err
		}
	}
	day := now.UTC().Format(time.DateOnly)
	s.mu.Lock()
	// Once more what may have changed meanwhile, and before anything is done.
	totals := map[voucher.Channel]uint64{}
	for _, u := range updates {
		c := s.channels[u.Channel]
		if c == nil {
			s.mu.Unlock()
			return ErrUnknown
		}
		if u.Voucher == nil {
			continue
		}
		if u.Voucher.Total <= max(c.Best.Total, c.Chain.Claimed, totals[u.Channel]) {
			s.mu.Unlock()
			return voucher.ErrStale
		}
		totals[u.Channel] = u.Voucher.Total
	}
	var r record
	for _, u := range updates {
		c := s.channels[u.Channel]
		if u.Voucher != nil {
			c.Best = *u.Voucher
			if c.Since == 0 {
				c.Since = now.Unix()
			}
		}
		for _, use := range u.Uses {
			s.use(c, day, use, &r)
		}
		r.settled(s, c.settle())
		r.Channels = append(r.Channels, c.record())
	}
	return s.commit(r)
}

// check is what of an update can be checked without what others do at the same time;
// signatures above all.
func (s *Store) check(u Update) error {
	s.mu.Lock()
	c := s.channels[u.Channel]
	var known Channel
	if c != nil {
		known = c.Channel
	}
	s.mu.Unlock()
	if c == nil {
		return fmt.Errorf("%w: %v", ErrUnknown, u.Channel)
	}
	for _, use := range u.Uses {
		if !modelRE.MatchString(use.Model) || max(use.Requests, use.PromptTokens, use.CompletionTokens, use.Earned) > math.MaxInt64/2 {
			return fmt.Errorf("%w: %.140q", ErrUse, use.Model)
		}
	}
	v := u.Voucher
	switch {
	case v == nil:
		return nil
	case v.Channel != u.Channel:
		return voucher.ErrChannel
	case v.GlobalID != known.GlobalID:
		return voucher.ErrNetwork
	case v.Total <= max(known.Best.Total, known.Chain.Claimed):
		return fmt.Errorf("%w: %d, and there is one for %d", voucher.ErrStale, v.Total, max(known.Best.Total, known.Chain.Claimed))
	case v.Total > known.Chain.Cover:
		return fmt.Errorf("%w: %d of %d", ErrCover, v.Total, known.Chain.Cover)
	}
	return v.Verify(known.Key)
}

// Seen takes what was proved of a channel, after a claim or at any time, and what
// the claim took in fees, in nanotons.
func (s *Store) Seen(id voucher.Channel, chain Chain, fees uint64, now time.Time) error {
	s.mu.Lock()
	c := s.channels[id]
	if c == nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: %v", ErrUnknown, id)
	}
	return s.commit(s.see(c, chain, fees, now.UTC().Format(time.DateOnly)))
}

// Gone takes that a channel is closed, and what had been claimed in the end. What was
// earned and not claimed is lost.
func (s *Store) Gone(id voucher.Channel, claimed, fees uint64, now time.Time) error {
	s.mu.Lock()
	c := s.channels[id]
	if c == nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: %v", ErrUnknown, id)
	}
	chain := c.Chain
	chain.Claimed = max(chain.Claimed, claimed)
	r := s.see(c, chain, fees, now.UTC().Format(time.DateOnly))
	for _, sh := range c.shares {
		row := s.row(sh.Day, sh.Model)
		row.Lost = add(row.Lost, sh.Amount)
		r.row(row)
	}
	delete(s.channels, id)
	r.Channels = []channelRecord{{ID: id, Gone: true}}
	return s.commit(r)
}

// see changes what is known of a channel. Claims are never undone: a view of the
// chain that is behind changes nothing of them.
func (s *Store) see(c *channel, chain Chain, fees uint64, day string) (r record) {
	chain.Claimed = max(chain.Claimed, c.Chain.Claimed)
	c.Chain = chain
	if c.Unclaimed() == 0 {
		c.Since = 0
	}
	paid := c.settle()
	r.settled(s, paid)
	if fees > 0 {
		s.spread(paid, fees, day, &r)
	}
	r.Channels = append(r.Channels, c.record())
	return r
}

// spread divides the fees of a claim by what it paid for, to the nanoton.
func (s *Store) spread(paid []share, fees uint64, day string, r *record) {
	var sum uint64
	for _, p := range paid {
		sum = add(sum, p.Amount)
	}
	left := fees
	for i, p := range paid {
		part := left
		if i < len(paid)-1 {
			part = min(left, mulDiv(fees, p.Amount, sum))
		}
		left -= part
		row := s.row(day, p.Model)
		row.Fees = add(row.Fees, part)
		r.row(row)
	}
	if left > 0 { // the claim paid ahead of any use
		row := s.row(day, NoModel)
		row.Fees = add(row.Fees, left)
		r.row(row)
	}
}

// use adds what was served.
func (s *Store) use(c *channel, day string, u Use, r *record) {
	row := s.row(day, u.Model)
	row.Requests = add(row.Requests, u.Requests)
	row.PromptTokens = add(row.PromptTokens, u.PromptTokens)
	row.CompletionTokens = add(row.CompletionTokens, u.CompletionTokens)
	row.Earned = add(row.Earned, u.Earned)
	r.row(row)
	if u.Earned == 0 {
		return
	}
	at := slices.IndexFunc(c.shares, func(sh share) bool { return sh.Day == row.Day && sh.Model == row.Model })
	switch {
	case at >= 0:
		c.shares[at].Amount = add(c.shares[at].Amount, u.Earned)
	case len(c.shares) >= maxShares:
		// Nobody has so many models in so many days without a claim; what is joined
		// keeps its sum.
		last := &c.shares[len(c.shares)-1]
		last.Amount = add(last.Amount, u.Earned)
	default:
		c.shares = append(c.shares, share{row.Day, row.Model, u.Earned})
	}
}

// settle has what was claimed pay for what was earned, the oldest first, and returns
// what it paid for.
func (c *channel) settle() (paid []share) {
	for c.Chain.Claimed > c.settled && len(c.shares) > 0 {
		first := &c.shares[0]
		amount := min(first.Amount, c.Chain.Claimed-c.settled)
		paid = append(paid, share{first.Day, first.Model, amount})
		c.settled += amount
		if first.Amount -= amount; first.Amount == 0 {
			c.shares = c.shares[1:]
		}
	}
	if len(c.shares) == 0 {
		c.shares = nil
	}
	return paid
}

// settled adds what was paid for to the rows.
func (r *record) settled(s *Store, paid []share) {
	for _, p := range paid {
		row := s.row(p.Day, p.Model)
		row.Claimed = add(row.Claimed, p.Amount)
		r.row(row)
	}
}

func (s *Store) row(day, model string) *Row {
	if name, ok := s.names[model]; ok {
		model = name
	} else {
		s.names[model] = model
	}
	key := rowKey{day, model}
	row := s.rows[key]
	if row == nil {
		row = &Row{Day: day, Model: model}
		s.rows[key] = row
	}
	return row
}

// public is what others see of the channel.
func (c *channel) public() Channel {
	p := c.Channel
	p.Used = c.settled
	for _, sh := range c.shares {
		p.Used = add(p.Used, sh.Amount)
	}
	return p
}

// Channel returns what is known of a channel.
func (s *Store) Channel(id voucher.Channel) (Channel, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.channels[id]
	if c == nil {
		return Channel{}, false
	}
	return c.public(), true
}

// Channels returns all channels, in the order of their ids.
func (s *Store) Channels() []Channel {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Channel, 0, len(s.channels))
	for _, c := range s.channels {
		list = append(list, c.public())
	}
	slices.SortFunc(list, func(a, b Channel) int { return slices.Compare(a.ID[:], b.ID[:]) })
	return list
}

// add is a sum that stays at the largest number rather than become small.
func add(a, b uint64) uint64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return math.MaxUint64
}

// mulDiv is a·b/c, rounded down; b is at most c.
func mulDiv(a, b, c uint64) uint64 {
	if c == 0 {
		return 0
	}
	hi, lo := bits.Mul64(a, b)
	q, _ := bits.Div64(hi, lo, c)
	return q
}
