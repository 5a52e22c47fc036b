package pay

import (
	"errors"
	"fmt"
	"math"
	"sync"

	"chrysalis/channel/voucher"
)

// Errors of requests and vouchers.
var (
	ErrNoChannel = errors.New("the channel is not one that this VM serves on; the owner's launcher admits it when it is open, pays the owner and has the delay that the terms say")
	ErrNoCover   = errors.New("what was paid is used up; send a voucher for more")
	ErrStep      = errors.New("the voucher adds less than a step")
	ErrLimit     = errors.New("the voucher is for more than the channel holds; top it up")
	ErrFull      = errors.New("there are as many channels as this VM serves on")
	ErrModel     = errors.New("the model has no price")
	ErrEnded     = errors.New("the request has ended")
)

// maxSpans bounds how many prices wait on one channel for what was paid at them to
// be used.
const maxSpans = 8

// An Admission is a channel that the launcher has checked with proofs. The launcher
// is the owner's: whatever it says here, it can only cost the owner money, or the
// owner's good name.
type Admission struct {
	Channel voucher.Channel
	Key     voucher.Key
	Limit   uint64 // the largest total of a voucher that the channel pays
	Used    uint64 // of that total, what was served before this VM ran
	Closing bool   // nothing more is served
	// Best is the best voucher that was taken before this VM ran; nil for none. What it
	// covers beyond Used is the client's to use still.
	Best *voucher.Voucher
}

// span is cover that was bought at one tariff.
type span struct {
	until  uint64 // the voucher's total
	tariff Tariff
}

type account struct {
	Admission
	best  voucher.Voucher
	cover uint64 // best's total, or what was used before
	used  uint64 // charged
	held  uint64 // what requests that run can still come to
	spans []span
}

// Book has an account for each channel. Its methods may be called from any
// goroutine.
//
// Of each channel it keeps that what is charged, and what running requests can still
// be charged, is never more than what vouchers cover and one step.
type Book struct {
	globalID int32
	spki     [32]byte // SHA-256 of the VM's TLS key
	ceilings Tariff
	limit    int // of channels

	mu       sync.Mutex
	tariff   Tariff
	accounts map[voucher.Channel]*account
}

// NewBook makes a book for a network and the VM whose TLS key has this SHA-256, with
// the ceilings that clients have verified and at most so many channels. The first
// prices are the ceilings.
func NewBook(globalID int32, spki [32]byte, ceilings Tariff, channels int) (*Book, error) {
	if err := ceilings.Validate(); err != nil {
		return nil, err
	}
	return &Book{globalID: globalID, spki: spki, ceilings: ceilings, limit: channels, tariff: ceilings, accounts: map[voucher.Channel]*account{}}, nil
}

// SetPrices changes the prices of what will be paid for from now on. What has been
// paid for already is served at the prices of then.
func (b *Book) SetPrices(t Tariff) error {
	if err := t.Under(b.ceilings); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tariff = t
	return nil
}

// Prices are those of what will be paid for from now on.
func (b *Book) Prices() Tariff {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tariff
}

// Admit begins to serve on a channel, or takes what has changed of it. What was used
// and the key do not change while the VM runs.
func (b *Book) Admit(a Admission) error {
	if err := voucher.CheckKey(a.Key); err != nil {
		return err
	}
	cover := a.Used
	if v := a.Best; v != nil {
		switch {
		case v.GlobalID != b.globalID:
			return voucher.ErrNetwork
		case v.Channel != a.Channel:
			return voucher.ErrChannel
		}
		if err := v.Verify(a.Key); err != nil {
			return err
		}
		cover = max(cover, v.Total)
	}
	if cover > a.Limit {
		return fmt.Errorf("%w: %d of %d", ErrLimit, cover, a.Limit)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	known := b.accounts[a.Channel]
	if known == nil {
		if len(b.accounts) >= b.limit {
			return ErrFull
		}
		known = &account{Admission: a, cover: cover, used: a.Used}
		if a.Best != nil {
			known.best = *a.Best
		}
		if cover > a.Used {
			known.spans = []span{{cover, b.tariff}}
		}
		b.accounts[a.Channel] = known
		return nil
	}
	if known.Key != a.Key {
		return fmt.Errorf("channel %v is known with another key", a.Channel)
	}
	known.Limit, known.Closing = a.Limit, a.Closing
	return nil
}

// Drop forgets a channel on which nothing runs, and reports whether it did.
func (b *Book) Drop(channel voucher.Channel) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[channel]
	if a == nil || a.held > 0 {
		return false
	}
	delete(b.accounts, channel)
	return true
}

// Pay takes a voucher. It must add at least a step to the one before, or all that is
// left of the channel; the same one again is no error and changes nothing.
func (b *Book) Pay(v voucher.Voucher) error {
	b.mu.Lock()
	a := b.accounts[v.Channel]
	if a == nil || a.Closing {
		b.mu.Unlock()
		return ErrNoChannel
	}
	key := a.Key
	same := a.best == v
	b.mu.Unlock()
	if same {
		return nil
	}
	if v.GlobalID != b.globalID {
		return voucher.ErrNetwork
	}
	if err := v.Verify(key); err != nil { // without the lock, since it takes a while
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if a = b.accounts[v.Channel]; a == nil || a.Closing {
		return ErrNoChannel
	}
	switch {
	case v.Total <= max(a.best.Total, a.cover):
		return fmt.Errorf("%w: %d, after %d", voucher.ErrStale, v.Total, max(a.best.Total, a.cover))
	case v.Total > a.Limit:
		return fmt.Errorf("%w: %d of %d", ErrLimit, v.Total, a.Limit)
	case v.Total-a.cover < b.tariff.Step && v.Total < a.Limit:
		return fmt.Errorf("%w: %d, at least %d", ErrStep, v.Total-a.cover, b.tariff.Step)
	}
	a.best, a.cover = v, v.Total
	last := len(a.spans) - 1
	switch {
	case last >= 0 && sameTariff(a.spans[last].tariff, b.tariff):
		a.spans[last].until = v.Total
	case len(a.spans) == maxSpans:
		// So many changes of price: what is joined is served at the lower of both.
		a.spans[last] = span{v.Total, lower(a.spans[last].tariff, b.tariff)}
	default:
		a.spans = append(a.spans, span{v.Total, b.tariff})
	}
	return nil
}

func sameTariff(s, t Tariff) bool {
	if s.Step != t.Step || len(s.Models) != len(t.Models) {
		return false
	}
	for id, p := range s.Models {
		if q, ok := t.Models[id]; !ok || p != q {
			return false
		}
	}
	return true
}

func lower(s, t Tariff) Tariff {
	joined := Tariff{Step: t.Step, Models: map[string]Price{}}
	for id, p := range t.Models {
		joined.Models[id] = p.least(s.Models[id])
	}
	return joined
}

// tariffAt is what the next request is charged at: that of the cover which comes
// next.
func (b *Book) tariffAt(a *account) Tariff {
	for len(a.spans) > 1 && a.spans[0].until <= a.used {
		a.spans = a.spans[1:]
	}
	if len(a.spans) == 0 {
		return b.tariff
	}
	return a.spans[0].tariff
}

// A Session is a client that has proved to have a channel's key.
type Session struct{ channel voucher.Channel }

// Session checks a client's proof.
func (b *Book) Session(p Payer) (Session, error) {
	b.mu.Lock()
	a := b.accounts[p.Channel]
	var key voucher.Key
	if a != nil {
		key = a.Key
	}
	b.mu.Unlock()
	if a == nil {
		return Session{}, ErrNoChannel
	}
	if err := p.Verify(key, b.spki); err != nil {
		return Session{}, err
	}
	return Session{p.Channel}, nil
}

// A Request is one that runs. Its price is fixed when it starts.
type Request struct {
	book   *Book
	a      *account
	price  Price
	step   uint64
	bounds Bounds
	hold   uint64
	ended  bool
}

// Start admits a request, or says why not: ErrNoChannel and ErrNoCover are answered
// with the terms. The channel must have cover that is not used up, and what the
// request's prompt can come to must be covered but for one step.
func (b *Book) Start(s Session, model string, requestBytes, asked int64) (*Request, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[s.channel]
	if a == nil || a.Closing {
		return nil, ErrNoChannel
	}
	tariff := b.tariffAt(a)
	price, ok := tariff.Models[model]
	if !ok {
		return nil, fmt.Errorf("%w: %.140q", ErrModel, model)
	}
	r := &Request{book: b, a: a, price: price, step: tariff.Step, bounds: Bounds{RequestBytes: requestBytes, Asked: asked}}
	if add(a.used, a.held) >= a.cover && !price.Free() {
		return nil, ErrNoCover
	}
	if !r.reserve() {
		return nil, ErrNoCover
	}
	return r, nil
}

// reserve holds what the request can come to by its bounds, if that is covered but
// for one step. The book is locked.
func (r *Request) reserve() bool {
	most := r.price.Cost(r.bounds.MaxPrompt(), r.bounds.MaxCompletion())
	others := r.a.held - r.hold
	if add(add(r.a.used, others), most) > add(r.a.cover, r.step) {
		return false
	}
	r.a.held, r.hold = others+most, most
	return true
}

// Price is what the request is charged at.
func (r *Request) Price() Price { return r.price }

// Send asks whether so many more bytes of text, in one event, may be sent. When it
// says no, they must not be: they may be once another voucher has been paid in.
func (r *Request) Send(textBytes int64) bool {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	if r.ended {
		return false
	}
	before := r.bounds
	r.bounds.TextBytes = sum(r.bounds.TextBytes, textBytes)
	if textBytes > 0 {
		r.bounds.Events++
	}
	if !r.reserve() {
		r.bounds = before
		return false
	}
	return true
}

// A Charge is what a request came to.
type Charge struct {
	Prompt     int64 // tokens charged for
	Completion int64
	Price      Price
	Amount     uint64 // nanotons
	Credit     Credit // after it
}

// End charges the request: by the engine's figures, or nil where it gave none. whole
// is false where the client did not wait for the whole answer; an answer that the
// engine did not end well is not to be charged at all, which is End(nil, true). Only
// the first call counts.
func (r *Request) End(usage *Usage, whole bool) Charge {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	c := Charge{Price: r.price}
	if !r.ended {
		r.ended = true
		r.a.held -= r.hold
		c.Prompt, c.Completion = r.bounds.Tokens(usage, whole)
		c.Amount = min(r.price.Cost(c.Prompt, c.Completion), r.hold)
		r.a.used = add(r.a.used, c.Amount)
	}
	c.Credit = r.a.credit()
	return c
}

// Credit is where a channel stands.
type Credit struct {
	Channel voucher.Channel
	Used    uint64 // of the channel's total, what was charged
	Cover   uint64 // the total of the best voucher
	Limit   uint64 // the largest total that a voucher can have
}

func (a *account) credit() Credit { return Credit{a.Channel, a.used, a.cover, a.Limit} }

// Credit says where a client's channel stands.
func (b *Book) Credit(s Session) (Credit, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[s.channel]
	if a == nil {
		return Credit{}, false
	}
	return a.credit(), true
}

// A Balance is what the launcher is told of a channel.
type Balance struct {
	Credit
	Best *voucher.Voucher // nil where there is none
}

// Balances are those of channels on which something has been paid or used since the
// VM began to run, for the launcher to keep.
func (b *Book) Balances() []Balance {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []Balance
	for _, a := range b.accounts {
		if a.best.Total == 0 && a.used == a.Used {
			continue
		}
		balance := Balance{Credit: a.credit()}
		if a.best.Total > 0 {
			best := a.best
			balance.Best = &best
		}
		list = append(list, balance)
	}
	return list
}

// add stays at the largest number.
func add(a, b uint64) uint64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return math.MaxUint64
}
