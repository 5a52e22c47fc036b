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
	ErrClosing   = errors.New("the channel is closing, and nothing more is served on it; open another one")
	ErrNoCover   = errors.New("what was paid is used up, or held for requests that run; send a voucher for more")
	ErrStep      = errors.New("the voucher adds less than a step")
	ErrLimit     = errors.New("the voucher is for more than the channel holds; top it up")
	ErrFull      = errors.New("there are as many channels as this VM serves on")
	ErrModel     = errors.New("the model has no price")
	ErrBatch     = errors.New("the batch that is acknowledged was never told")
)

// maxSpans bounds how many prices wait on one channel for what was paid at them to
// be used.
const maxSpans = 8

// An Admission is a channel that the launcher has checked with proofs. The launcher
// is the owner's. What it says here can cost the owner money; a client it can cost
// what that has paid ahead, by saying that more was used, which the client sees.
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
	channel voucher.Channel
	key     voucher.Key
	limit   uint64
	closing bool
	best    voucher.Voucher // with total 0 where there is none, like next
	next    voucher.Voucher // taken, and not known to be durable
	cover   uint64          // best's total, or what was used before
	used    uint64          // charged
	held    uint64          // what requests that run can still come to
	running int             // how many requests
	spans   []span          // in ascending order; those past cover wait for next
	uses    []Use           // that have not been told
	queued  bool            // there is something to tell
	told    bool            // in the batch that has not been acknowledged
}

// Book has an account for each channel. Its methods may be called from any
// goroutine.
//
// Of each channel it keeps that what is charged, and what running requests can still
// be charged, is never more than what vouchers cover and one step. A voucher covers
// once the launcher has said that it is durable: see Collect.
type Book struct {
	globalID int32
	spki     [32]byte // SHA-256 of the VM's TLS key
	ceilings Tariff
	limit    int // of channels

	mu       sync.Mutex
	tariff   Tariff
	accounts map[voucher.Channel]*account
	queue    []*account // with something to tell, the longest there first
	batch    uint64     // number of the last one
	told     []Balance  // the last batch, until it is acknowledged
	tell     chan struct{}
	changed  chan struct{}
}

// NewBook makes a book for a network and the VM whose TLS key has this SHA-256, with
// the ceilings that clients have verified and at most so many channels. The first
// prices are the ceilings.
func NewBook(globalID int32, spki [32]byte, ceilings Tariff, channels int) (*Book, error) {
	if err := ceilings.Validate(); err != nil {
		return nil, err
	}
	return &Book{
		globalID: globalID, spki: spki, ceilings: ceilings, limit: channels, tariff: ceilings,
		accounts: map[voucher.Channel]*account{},
		tell:     make(chan struct{}, 1), changed: make(chan struct{}),
	}, nil
}

// Changed returns a channel that is closed as soon as a channel has been admitted or
// dropped, vouchers have begun to cover, or a request has ended, which may leave more
// for others. Who waits for that asks for the channel first, and then looks whether it
// need wait.
func (b *Book) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

// change wakes those who wait. The book is locked.
func (b *Book) change() {
	close(b.changed)
	b.changed = make(chan struct{})
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
	defer b.change()
	if known == nil {
		if len(b.accounts) >= b.limit {
			return ErrFull
		}
		known = &account{channel: a.Channel, key: a.Key, limit: a.Limit, closing: a.Closing, cover: cover, used: a.Used}
		if a.Best != nil {
			known.best = *a.Best
		}
		if cover > a.Used {
			known.spans = []span{{cover, b.tariff}}
		}
		b.accounts[a.Channel] = known
		return nil
	}
	if known.key != a.Key {
		return fmt.Errorf("channel %v is known with another key", a.Channel)
	}
	known.limit, known.closing = a.Limit, a.Closing
	return nil
}

// Drop forgets a channel, and reports whether it is unknown now: one on which
// something runs, or of which there is something to tell, is kept.
func (b *Book) Drop(channel voucher.Channel) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[channel]
	if a == nil {
		return true
	}
	if a.running > 0 || a.queued || a.told {
		return false
	}
	delete(b.accounts, channel)
	b.change()
	return true
}

// Pay takes a voucher. It must add at least a step to the one before, or all that is
// left of the channel; the same one again is no error and changes nothing. It covers
// once it is durable: Covers says whether it does.
func (b *Book) Pay(v voucher.Voucher) error {
	b.mu.Lock()
	a, err := b.open(v.Channel)
	if err != nil {
		b.mu.Unlock()
		return err
	}
	key := a.key
	same := a.best == v || a.next == v
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
	if a, err = b.open(v.Channel); err != nil {
		return err
	}
	if a.best == v || a.next == v { // sent twice at a time
		return nil
	}
	before := max(a.next.Total, a.cover)
	switch {
	case a.key != key: // dropped and admitted anew meanwhile
		return voucher.ErrSignature
	case v.Total <= before:
		return fmt.Errorf("%w: %d, after %d", voucher.ErrStale, v.Total, before)
	case v.Total > a.limit:
		return fmt.Errorf("%w: %d of %d", ErrLimit, v.Total, a.limit)
	case v.Total-before < b.tariff.Step && v.Total < a.limit:
		return fmt.Errorf("%w: %d, at least %d", ErrStep, v.Total-before, b.tariff.Step)
	}
	a.next = v
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
	b.enqueue(a)
	return nil
}

// open returns the account of a channel on which something can be served. The book
// is locked.
func (b *Book) open(channel voucher.Channel) (*account, error) {
	a := b.accounts[channel]
	switch {
	case a == nil:
		return nil, ErrNoChannel
	case a.closing:
		return nil, ErrClosing
	}
	return a, nil
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

// priceAt is what the next request for a model is charged: the price of the cover
// that comes next. What was free then costs what it costs now: nobody has paid for
// it.
func (b *Book) priceAt(a *account, model string) (price Price, step uint64, err error) {
	for len(a.spans) > 1 && a.spans[0].until <= a.used {
		a.spans = a.spans[1:]
	}
	price, ok := b.tariff.Models[model]
	if !ok {
		return price, 0, fmt.Errorf("%w: %.140q", ErrModel, model)
	}
	if len(a.spans) > 0 {
		if then := a.spans[0].tariff.Models[model]; !then.Free() {
			price = then
		}
	}
	return price, b.tariff.Step, nil
}

// A Session is a client that has proved to have a channel's key.
type Session struct{ channel voucher.Channel }

// Session checks a client's proof.
func (b *Book) Session(p Payer) (Session, error) {
	b.mu.Lock()
	a := b.accounts[p.Channel]
	var key voucher.Key
	if a != nil {
		key = a.key
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
	model  string
	price  Price
	step   uint64
	bounds Bounds
	sent   Bounds // what of them has gone out
	whole  bool   // the answer is sent as a whole, and held for as one
	hold   uint64
	ended  bool
}

// Start admits a request whose answer is a stream of events, or has no tokens; or it
// says why not. The channel must have cover that is not used up, and what the
// request's prompt can come to must be covered but for one step. What it sends is
// asked for with Send.
func (b *Book) Start(s Session, model string, requestBytes, asked int64) (*Request, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r, err := b.begin(s, model, Bounds{RequestBytes: requestBytes, Asked: asked})
	if err != nil {
		return nil, err
	}
	if !r.reserve() {
		return nil, ErrNoCover
	}
	r.a.running++
	return r, nil
}

// MaxAsked is the largest number of tokens that a request can ask for.
const MaxAsked = 1<<31 - 1

// DefaultAnswer is how many tokens an answer that is paid for and sent as a whole can
// have where the client set no limit. Without it the first such request would hold all
// that is covered.
const DefaultAnswer = 4096

// StartWhole is Start for a request whose answer is sent as a whole. Since all of it
// is made before any of it can be paid for, it must be covered but for one step when
// it starts: most is how many tokens are, of those that were asked for (0 where the
// client set no limit, which asks for DefaultAnswer), and the engine must not make
// more. MaxAsked means any number.
func (b *Book) StartWhole(s Session, model string, requestBytes, asked int64) (r *Request, most int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r, err = b.begin(s, model, Bounds{RequestBytes: requestBytes}); err != nil {
		return nil, 0, err
	}
	switch {
	case asked <= 0 && r.price.Completion > 0:
		asked = DefaultAnswer
	case asked <= 0 || asked > MaxAsked:
		asked = MaxAsked
	}
	r.whole = true
	// The most that is covered, between what is and what is not.
	low, high := int64(0), asked+1
	for high-low > 1 {
		r.bounds.Asked = low + (high-low)/2
		if r.covered(r.most()) {
			low = r.bounds.Asked
		} else {
			high = r.bounds.Asked
		}
	}
	if r.bounds.Asked = low; low == 0 || !r.reserve() {
		return nil, 0, ErrNoCover
	}
	r.a.running++
	return r, low, nil
}

// begin prices a request. The book is locked.
func (b *Book) begin(s Session, model string, bounds Bounds) (*Request, error) {
	a, err := b.open(s.channel)
	if err != nil {
		return nil, err
	}
	price, step, err := b.priceAt(a, model)
	if err != nil {
		return nil, err
	}
	if add(a.used, a.held) >= a.cover && !price.Free() {
		return nil, ErrNoCover
	}
	return &Request{book: b, a: a, model: model, price: price, step: step, bounds: bounds}, nil
}

// most is what the request can come to by its bounds.
func (r *Request) most() uint64 {
	completion := r.bounds.MaxCompletion()
	if r.whole {
		completion = r.bounds.Asked
	}
	return r.price.Cost(r.bounds.MaxPrompt(), completion)
}

// covered reports whether so much is covered for the request, but for one step. The
// book is locked.
func (r *Request) covered(most uint64) bool {
	others := r.a.held - r.hold
	return add(add(r.a.used, others), most) <= add(r.a.cover, r.step)
}

// reserve holds what the request can come to by its bounds, if that is covered. The
// book is locked.
func (r *Request) reserve() bool {
	most := r.most()
	if !r.covered(most) {
		return false
	}
	r.a.held, r.hold = r.a.held-r.hold+most, most
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
	r.bounds.Add(Event{Text: textBytes})
	if !r.reserve() {
		r.bounds = before
		return false
	}
	return true
}

// Sent says that all that Send allowed has gone out.
func (r *Request) Sent() {
	r.book.mu.Lock()
	defer r.book.mu.Unlock()
	r.sent = r.bounds
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
		r.a.running--
		r.a.held -= r.hold
		r.book.change()
		c.Prompt, c.Completion = r.bounds.Tokens(usage, whole)
		if !whole {
			p, n := r.sent.Tokens(nil, false)
			c.Prompt, c.Completion = min(c.Prompt, p), min(c.Completion, n)
		}
		c.Amount = r.price.Cost(c.Prompt, c.Completion) // within what is held, as the tokens are within the bounds
		r.a.used = add(r.a.used, c.Amount)
		if c.Prompt > 0 || c.Completion > 0 {
			r.a.use(r.model, c)
			r.book.enqueue(r.a)
		}
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

func (a *account) credit() Credit { return Credit{a.channel, a.used, a.cover, a.limit} }

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

// Covers reports whether what was paid on a client's channel covers a voucher's
// total: whether the voucher, or a later one, is durable.
func (b *Book) Covers(s Session, total uint64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[s.channel]
	return a != nil && a.cover >= total
}

// add stays at the largest number.
func add(a, b uint64) uint64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return math.MaxUint64
}
