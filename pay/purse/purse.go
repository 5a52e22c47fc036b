// Package purse is a payer's ledger: what it has signed for on each payment channel,
// what of that has been used, and which payees broke the rules. It decides how much is
// signed next, and signs it.
//
// A signature is money. It is on disk before it is given out, so that a process that
// is killed never signs less than it did before, and one process at a time has a purse.
//
// Nothing is signed beyond the purse's budget, beyond what a channel holds, or more
// than a step beyond what is used or must be held for the requests that run. That is
// metered here, by what was sent and received, whatever the payee says.
package purse

import (
	"cmp"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/pay"
)

// Errors of a purse.
var (
	ErrLocked    = errors.New("another process uses the purse")
	ErrDamaged   = errors.New("the purse is damaged")
	ErrBroken    = errors.New("the purse cannot be written; nothing more is signed")
	ErrBudget    = errors.New("the budget is used up")
	ErrLimit     = errors.New("the channel holds no more; top it up")
	ErrUnseen    = errors.New("the payee has not seen yet that the channel was topped up; it looks every minute")
	ErrAhead     = errors.New("nothing is due: what is signed is a step ahead already")
	ErrBarred    = errors.New("the payee broke the rules, and is paid no more")
	ErrUnknown   = errors.New("what was used of the channel must be asked first")
	ErrForeign   = errors.New("the payee has a voucher that this purse does not know; another machine or an older purse signed it, so close the channel")
	ErrElsewhere = errors.New("what is said is about another channel")
)

// Reasons for which a payee is barred. They are errors, so that tests can tell them.
var (
	ErrOvercharged = errors.New("it charged more than it may")
	ErrNoReceipt   = errors.New("it gave no receipt for an answer that was to be paid")
	ErrBadReceipt  = errors.New("its receipt does not hold")
	ErrLostCredit  = errors.New("it has lost credit that was paid")
)

// doubtAge is how long a payee may take to charge for a request that this side left: it
// may notice only when the answer is at its end.
const doubtAge = 20 * time.Minute

// A Channel is one that pays a payee, as it was proved.
type Channel struct {
	ID      voucher.Channel
	Payee   [32]byte // account in the basechain
	Limit   uint64   // the largest total of a voucher, nanotons
	Claimed uint64   // of that
	Fresh   bool     // it was opened just now: nothing can have been signed for it
}

// A Bar says why a payee is paid no more.
type Bar struct {
	Payee   voucher.Channel `json:"payee"` // 0:HEX
	Channel voucher.Channel `json:"channel"`
	Reason  string          `json:"reason"`
	Time    time.Time       `json:"time"`
}

// State is where a channel stands.
type State struct {
	Channel voucher.Channel
	Payee   voucher.Channel
	Worker  string
	Signed  uint64 // the total of the last voucher
	Taken   uint64 // of that, what the payee is known to have
	Used    uint64 // what was charged
	Limit   uint64 // 0 where the channel was not read yet
	Last    time.Time
	Running int
}

// Purse is a purse that is open. Its methods may be called from any goroutine.
type Purse struct {
	path     string
	globalID int32
	key      ed25519.PrivateKey
	now      func() time.Time
	lock     *os.File

	mu       sync.Mutex
	file     *os.File
	size     int64 // of the file, bytes
	base     int64 // after it was written anew
	broken   error
	budget   uint64
	spent    uint64 // signed in this run
	accounts map[voucher.Channel]*Account
	bars     map[[32]byte]Bar
}

// An Account is one channel of a purse.
type Account struct {
	purse  *Purse
	id     voucher.Channel
	payee  [32]byte
	worker string // that is paid through it, and no other: two would be shown one voucher

	// On disk:
	signed, taken, used, step uint64
	dirty                     bool // requests may have run that are not in used

	// Not on disk:
	limit   uint64
	theirs  uint64 // the limit that the payee goes by; 0 where it has said none
	known   bool   // the payee has said where it stands since the purse was opened
	ready   bool   // the channel was proved
	retired bool   // it is to be closed
	held    uint64
	running map[*Request]bool
	ended   uint64 // how many requests have that may have been charged
	doubts  []doubt
	last    time.Time
}

// doubt is what a request that was left can still be charged.
type doubt struct {
	amount uint64 // by the rules, for what has come
	most   uint64 // with what may have been on its way
	until  time.Time
}

// Budget is how much may still be signed in this run, and how much was.
func (p *Purse) Budget() (left, spent uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.budget - p.spent, p.spent
}

// GlobalID is that of the purse's network.
func (p *Purse) GlobalID() int32 { return p.globalID }

// Key is the public key of the purse's vouchers.
func (p *Purse) Key() voucher.Key { return voucher.Key(p.key.Public().(ed25519.PublicKey)) }

// Payer is the proof for one VM that the purse has a channel's key.
func (p *Purse) Payer(channel voucher.Channel, spki [32]byte) pay.Payer {
	return pay.SignPayer(p.key, channel, spki)
}

// Use takes a channel that was proved into the purse, to pay one worker by its
// endpoint through it, or takes what has changed of it. One that the purse does not
// know begins with what was claimed.
func (p *Purse) Use(c Channel, worker string) (*Account, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if bar, ok := p.bars[c.Payee]; ok {
		return nil, bar.err()
	}
	a := p.accounts[c.ID]
	if a == nil {
		a = &Account{purse: p, id: c.ID, payee: c.Payee, worker: worker, signed: c.Claimed, taken: c.Claimed, used: c.Claimed, running: map[*Request]bool{}}
		if len(worker) > maxReason {
			return nil, fmt.Errorf("%.80q is not an endpoint", worker)
		}
		if err := p.append(true, record{Accounts: []accountRecord{a.record()}}); err != nil {
			return nil, err
		}
		p.accounts[c.ID] = a
	}
	switch {
	case a.payee != c.Payee:
		return nil, fmt.Errorf("%w: %v is known with another payee", ErrElsewhere, c.ID)
	case a.worker != worker:
		return nil, fmt.Errorf("%w: %v is for the worker %s", ErrElsewhere, c.ID, a.worker)
	case c.Claimed > a.signed:
		return nil, fmt.Errorf("%w: %d has been claimed, and %d was signed", ErrForeign, c.Claimed, a.signed)
	}
	a.limit, a.ready, a.known = c.Limit, true, a.known || c.Fresh
	return a, nil
}

// For reports whether a channel can be used to pay a worker: it is not another's.
func (p *Purse) For(id voucher.Channel, worker string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.accounts[id]
	return a == nil || a.worker == worker
}

// Retire has nothing more paid through a channel on which nothing runs, since it is to
// be closed, and reports whether it did. It is not remembered: what is said of the
// channel on the chain is.
func (p *Purse) Retire(id voucher.Channel) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.accounts[id]
	if a == nil || a.retired || len(a.running) > 0 {
		return false
	}
	a.retired = true
	return true
}

// Retired reports whether the channel is to be closed.
func (a *Account) Retired() bool {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return a.retired
}

// States are where the channels stand, in the order of their ids.
func (p *Purse) States() []State {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]State, 0, len(p.accounts))
	for _, a := range p.accounts {
		list = append(list, a.state())
	}
	slices.SortFunc(list, func(a, b State) int { return slices.Compare(a.Channel[:], b.Channel[:]) })
	return list
}

// State says where the channel stands.
func (a *Account) State() State {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return a.state()
}

func (a *Account) state() State {
	return State{a.id, voucher.Channel(a.payee), a.worker, a.signed, a.taken, a.used, a.limit, a.last, len(a.running)}
}

// ID is the channel's.
func (a *Account) ID() voucher.Channel { return a.id }

func (b Bar) err() error {
	return fmt.Errorf("%w: %s (%s)", ErrBarred, b.Reason, b.Time.Format(time.DateOnly))
}

// Barred says, as an error, why a payee is paid no more; nil of one that is.
func (p *Purse) Barred(payee [32]byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if bar, ok := p.bars[payee]; ok {
		return bar.err()
	}
	return nil
}

// Bars are the payees that are paid no more.
func (p *Purse) Bars() []Bar {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Bar, 0, len(p.bars))
	for _, b := range p.bars {
		list = append(list, b)
	}
	slices.SortFunc(list, func(a, b Bar) int { return cmp.Or(a.Time.Compare(b.Time), slices.Compare(a.Payee[:], b.Payee[:])) })
	return list
}

// Forgive has a payee paid again, and reports whether it was barred.
func (p *Purse) Forgive(payee [32]byte) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.bars[payee]; !ok {
		return false, nil
	}
	if err := p.append(true, record{Forgiven: []voucher.Channel{voucher.Channel(payee)}}); err != nil {
		return false, err
	}
	delete(p.bars, payee)
	return true, nil
}

// maxReason bounds what is kept of a reason, in bytes.
const maxReason = 300

// Bar has the channel's payee paid no more, for good. Only the first reason counts.
func (a *Account) Bar(reason error) error {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return a.bar(reason)
}

func (a *Account) bar(reason error) error {
	p := a.purse
	if _, ok := p.bars[a.payee]; ok {
		return reason
	}
	text := strings.ToValidUTF8(reason.Error()[:min(len(reason.Error()), maxReason)], "")
	bar := Bar{voucher.Channel(a.payee), a.id, text, p.now().UTC().Truncate(time.Second)}
	p.bars[a.payee] = bar // also where it cannot be written
	if err := p.append(true, record{Bars: []Bar{bar}}); err != nil {
		return errors.Join(reason, err)
	}
	return reason
}

// doubted is what requests that were left can still be charged: by what has come of
// them, and at most.
func (a *Account) doubted() (sum, most uint64) {
	now := a.purse.now()
	a.doubts = slices.DeleteFunc(a.doubts, func(d doubt) bool { return !now.Before(d.until) })
	for _, d := range a.doubts {
		sum, most = add(sum, d.amount), add(most, d.most)
	}
	return sum, most
}

// charged takes away from doubts what has come of them.
func (a *Account) charged(amount uint64) {
	for i := range a.doubts {
		d := &a.doubts[i]
		part := min(amount, d.most)
		d.most -= part
		d.amount -= min(part, d.amount)
		amount -= part
	}
}

// Known reports whether the payee has said where it stands since the purse was opened.
func (a *Account) Known() bool {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return a.known
}

// Asked is what was known of a channel when its payee was asked where it stands.
type Asked struct{ taken, ended uint64 }

// Asking is for Reconcile, and called before the payee is asked.
func (a *Account) Asking() Asked {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return Asked{a.taken, a.ended}
}

// Reconcile takes what a payee says of the channel, of which it must never say less
// than was known here when it was asked: vouchers that it took count, and nothing was
// used but what was charged. One that does is barred, and the error is ErrLostCredit.
// What it says may be older than what has become known here meanwhile.
func (a *Account) Reconcile(c pay.Credit, asked Asked) error {
	p := a.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.Channel != a.id {
		return ErrElsewhere
	}
	_, doubted := a.doubted()
	most := add(a.used, doubted)
	if a.dirty && !a.known || len(a.running) > 0 {
		// What ran, or runs, can have come to all that was ever covered.
		most = max(most, add(a.signed, a.step))
	}
	switch {
	case c.Cover > a.signed:
		return fmt.Errorf("%w: a voucher for %d nanotons, where %d was signed", ErrForeign, c.Cover, a.signed)
	case c.Cover < asked.taken:
		return a.bar(fmt.Errorf("%w: it had taken vouchers for %d nanotons, and says %d", ErrLostCredit, asked.taken, c.Cover))
	case c.Used > most:
		return a.bar(fmt.Errorf("%w: it says that %d nanotons were used, and it can be %d at most", ErrLostCredit, c.Used, most))
	}
	a.theirs = c.Limit
	if len(a.running) > 0 || a.ended != asked.ended {
		a.known = true
		return nil
	}
	if c.Used > a.used {
		a.charged(c.Used - a.used)
	}
	taken := max(a.taken, c.Cover)
	changed := a.used != c.Used || a.taken != taken || a.dirty
	a.used, a.taken, a.known, a.dirty = c.Used, taken, true, doubted > 0
	if !changed {
		return nil
	}
	return p.append(false, record{Accounts: []accountRecord{a.record()}})
}

// A Request is one that runs on a channel, as it is metered here.
type Request struct {
	account *Account
	price   pay.Price
	ceiling pay.Price
	bounds  pay.Bounds
	reserve int64 // tokens of an answer that must be covered before there is any
	hold    uint64
	taken   uint64 // when it was sent
	ended   bool
}

// A Begin is what is known of a request before it is sent.
type Begin struct {
	Price   pay.Price // that the payee says
	Ceiling pay.Price // that it can charge at most
	Step    uint64    // nanotons
	Request int64     // bytes
	Asked   int64     // tokens of an answer at most; 0 where no limit is set
	// Reserve is how many tokens of an answer must be covered before there is any: of
	// one that is no stream.
	Reserve int64
}

// Begin takes a request into account before it is sent. It fails where what it needs
// at least cannot be signed: with ErrLimit or ErrBudget.
func (a *Account) Begin(b Begin) (*Request, error) {
	p := a.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	if bar, ok := p.bars[a.payee]; ok {
		return nil, bar.err()
	}
	switch {
	case p.broken != nil:
		return nil, p.broken
	case !a.known || !a.ready || a.retired:
		return nil, ErrUnknown
	case b.Step == 0 || b.Step > pay.MaxStep:
		return nil, fmt.Errorf("a voucher step of %d nanotons; from 1 to %d are possible", b.Step, int64(pay.MaxStep))
	}
	if err := b.Price.Under(b.Ceiling); err != nil {
		return nil, err
	}
	r := &Request{
		account: a, price: b.Price, ceiling: b.Ceiling, reserve: max(b.Reserve, 0),
		bounds: pay.Bounds{RequestBytes: b.Request, Asked: b.Asked},
	}
	if r.bounds.Asked > 0 {
		r.reserve = min(r.reserve, r.bounds.Asked)
	}
	// A payee demands that the prompt's bounds are covered but for a step, and a token of
	// an answer that is no stream, or those of a stream that need no text.
	tokens := r.bounds.MaxCompletion()
	if r.reserve > 0 {
		tokens = min(tokens, 1)
	}
	least := add(a.owed(), r.price.Cost(r.bounds.MaxPrompt(), tokens))
	if most, why := a.most(b.Step); least > add(most, b.Step) || a.owed() >= most && !r.price.Free() {
		return nil, why
	}
	if !a.dirty || a.step != b.Step {
		a.dirty, a.step = true, b.Step
		if err := p.append(true, record{Accounts: []accountRecord{a.record()}}); err != nil {
			return nil, err
		}
	}
	a.running[r] = true
	r.rehold()
	a.last = p.now()
	return r, nil
}

// owed is what is used or must be held.
func (a *Account) owed() uint64 {
	doubted, _ := a.doubted()
	return add(add(a.used, a.held), doubted)
}

// most is the largest total that can be signed, and what bounds it. A voucher that adds
// less than a step is none, but for the channel's last.
func (a *Account) most(step uint64) (uint64, error) {
	p := a.purse
	left := p.budget - p.spent
	limit, why := a.limit, ErrLimit
	if a.theirs != 0 && a.theirs < limit {
		if limit = a.theirs; add(limit, step) <= a.limit {
			why = ErrUnseen
		}
	}
	room := limit - min(limit, a.signed)
	switch {
	case room == 0, room <= left && room < step && limit != a.theirs:
		return a.signed, fmt.Errorf("%w: %d nanotons, of which %d are signed", why, limit, a.signed)
	case room <= left:
		return limit, fmt.Errorf("%w: %d nanotons, of which %d are signed", why, limit, a.signed)
	case left < step:
		return a.signed, fmt.Errorf("%w: %d of %d nanotons are signed, and the next voucher would add %d at least", ErrBudget, p.spent, p.budget, step)
	}
	return a.signed + left, fmt.Errorf("%w: %d of %d nanotons are signed", ErrBudget, p.spent, p.budget)
}

// Low reports whether the channel should be topped up, before that is waited for:
// there is room for less than so much.
func (a *Account) Low(room uint64) bool {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return a.ready && a.limit-min(a.limit, a.signed) < room
}

// Doubted reports whether the payee may still reckon with requests that were left.
func (a *Account) Doubted() bool {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	_, most := a.doubted()
	return most > 0
}

func (r *Request) rehold() {
	a := r.account
	a.held -= r.hold
	r.hold = r.price.Cost(r.bounds.MaxPrompt(), max(r.bounds.MaxCompletion(), r.reserve))
	a.held = add(a.held, r.hold)
}

// Raise reckons with a higher price from now on, where the payee says one, up to the
// ceiling.
func (r *Request) Raise(p pay.Price) {
	r.account.purse.mu.Lock()
	defer r.account.purse.mu.Unlock()
	p = pay.Price{Prompt: max(p.Prompt, r.price.Prompt), Completion: max(p.Completion, r.price.Completion)}
	if r.ended || p == r.price || p.Under(r.ceiling) != nil {
		return
	}
	r.price = p
	r.rehold()
}

// Sent is called when the request is about to be sent: what the payee has by then it
// must not have lost when it answers.
func (r *Request) Sent() {
	r.account.purse.mu.Lock()
	defer r.account.purse.mu.Unlock()
	r.taken = r.account.taken
}

// Text takes into account that so many bytes of text of the answer have come.
func (r *Request) Text(bytes int64) {
	r.account.purse.mu.Lock()
	defer r.account.purse.mu.Unlock()
	if r.ended || bytes <= 0 {
		return
	}
	r.bounds.TextBytes, r.bounds.Events = saturate(r.bounds.TextBytes, bytes), r.bounds.Events+1
	r.rehold()
}

// Due reports whether a voucher is to be sent, so that what is used or held stays
// covered.
func (a *Account) Due() bool {
	a.purse.mu.Lock()
	defer a.purse.mu.Unlock()
	return a.signed < a.owed() || a.taken < a.signed && a.taken < a.owed()
}

// Sign returns the voucher that is to be sent now. Where what is owed is covered it is
// the last one, if the payee may not have it, and else none, unless the payee asks for
// more: then one for up to a step more than is owed. A new one is durable when Sign
// returns. The error is ErrBudget or ErrLimit where nothing more can be signed.
func (a *Account) Sign(step uint64, more bool) (*voucher.Voucher, error) {
	p := a.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	if bar, ok := p.bars[a.payee]; ok {
		return nil, bar.err()
	}
	if !a.known || !a.ready || a.retired {
		return nil, ErrUnknown
	}
	if step == 0 || step > pay.MaxStep {
		return nil, fmt.Errorf("a voucher step of %d nanotons", step)
	}
	owed := a.owed()
	ceiling := add(owed, step)
	switch {
	case a.signed < owed:
	case a.taken < a.signed && (a.taken < owed || more):
		v := p.voucher(a) // it was signed before, and may never have arrived
		return &v, nil
	case !more:
		return nil, nil
	case add(a.signed, step) > ceiling:
		return nil, ErrAhead
	}
	total := max(owed, add(a.signed, step))
	if more {
		total = max(total, ceiling)
	}
	most, why := a.most(step)
	if total = min(total, most, ceiling); total <= a.signed || total-a.signed < step && total != a.theirs {
		return nil, why
	}
	before, spent := a.signed, p.spent
	a.signed, a.step, p.spent = total, step, p.spent+(total-a.signed)
	if err := p.append(true, record{Accounts: []accountRecord{a.record()}}); err != nil {
		// Whether it is on disk is not known; nothing more is signed, and this is not
		// given out.
		a.signed, p.spent = before, spent
		return nil, err
	}
	v := p.voucher(a)
	return &v, nil
}

func (p *Purse) voucher(a *Account) voucher.Voucher {
	return voucher.Sign(p.key, p.globalID, a.id, a.signed)
}

// Took takes into account that the payee has a voucher for this total, durably.
func (a *Account) Took(total uint64) {
	p := a.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	if total > a.taken && total <= a.signed {
		a.taken = total
		p.append(false, record{Accounts: []accountRecord{a.record()}})
	}
}

// A Receipt is what a payee says, signed, that an answer came to.
type Receipt struct {
	Channel    voucher.Channel
	Price      pay.Price
	Prompt     int64 // tokens charged for
	Completion int64
	Charged    uint64 // nanotons
	Used       uint64 // of the channel, after the answer
	Cover      uint64
}

// Settle ends the request with its receipt. One that does not fit what was sent and
// received bars the payee, and the error says why.
func (r *Request) Settle(c Receipt) error {
	a := r.account
	p := a.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	if !r.end() {
		return nil
	}
	a.ended++
	if err := r.check(c); err != nil {
		// What it says it is owed is not believed; what it could be is.
		a.used = add(a.used, min(c.Charged, r.hold))
		return errors.Join(a.bar(err), p.append(false, record{Accounts: []accountRecord{a.record()}}))
	}
	// Not what the receipt says is used: those of requests at the same time come in any
	// order.
	a.used = add(a.used, c.Charged)
	a.last, a.taken = p.now(), max(a.taken, c.Cover)
	return p.append(false, record{Accounts: []accountRecord{a.record()}})
}

// end takes the request from those that run.
func (r *Request) end() bool {
	if r.ended {
		return false
	}
	r.ended = true
	r.account.held -= r.hold
	delete(r.account.running, r)
	return true
}

func (r *Request) check(c Receipt) error {
	a := r.account
	prompt, completion := r.bounds.MaxPrompt(), r.bounds.MaxCompletion()
	over := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrOvercharged, fmt.Sprintf(format, args...))
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrBadReceipt, fmt.Sprintf(format, args...))
	}
	switch {
	case c.Channel != a.id:
		return bad("it is about the channel %v", c.Channel)
	case c.Price.Under(r.ceiling) != nil:
		return over("prices of %d and %d nanotons for a million tokens, where its ceilings are %d and %d", c.Price.Prompt, c.Price.Completion, r.ceiling.Prompt, r.ceiling.Completion)
	case c.Prompt < 0 || c.Completion < 0:
		return bad("it counts less than no tokens")
	case c.Prompt > prompt:
		return over("%d tokens of a prompt that can have %d", c.Prompt, prompt)
	case c.Completion > completion:
		return over("%d tokens of an answer that can have %d", c.Completion, completion)
	case c.Charged > c.Price.Cost(c.Prompt, c.Completion):
		return over("%d nanotons for what costs %d", c.Charged, c.Price.Cost(c.Prompt, c.Completion))
	case c.Charged < c.Price.Cost(c.Prompt, c.Completion):
		return bad("%d nanotons for what costs %d", c.Charged, c.Price.Cost(c.Prompt, c.Completion))
	case c.Cover > a.signed:
		return bad("it has a voucher for %d nanotons, and %d is signed", c.Cover, a.signed)
	case c.Cover < r.taken:
		return fmt.Errorf("%w: it had taken vouchers for %d nanotons, and its receipt says %d", ErrLostCredit, r.taken, c.Cover)
	}
	// Others that run, or were left, may have been charged meanwhile, for what has not
	// arrived here.
	most := add(a.used, c.Charged)
	if _, doubted := a.doubted(); len(a.running) > 0 || doubted > 0 {
		most = max(most, add(a.signed, a.step))
	}
	if c.Used > most {
		return over("it says that %d nanotons of the channel are used, and it can be %d at most", c.Used, most)
	}
	return nil
}

// Unanswered ends the request: the payee refused it, or it was never sent. Nothing may
// be charged for it.
func (r *Request) Unanswered() {
	p := r.account.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	r.end()
}

// Left ends the request, of which the answer was not seen to its end. The payee may
// charge for what it sent.
func (r *Request) Left() {
	p := r.account.purse
	p.mu.Lock()
	defer p.mu.Unlock()
	if !r.end() {
		return
	}
	a := r.account
	a.ended++
	// What is on its way has been covered but for a step, and no more than that can be
	// charged.
	most := add(a.signed, a.step)
	most -= min(most, a.owed())
	prompt, completion := r.bounds.Tokens(nil, false)
	a.doubts = append(a.doubts, doubt{min(most, r.price.Cost(prompt, completion)), min(most, add(r.hold, a.step)), p.now().Add(doubtAge)})
	a.last = p.now()
}

// add is a sum that stays at the largest number rather than become small.
func add(a, b uint64) uint64 {
	if sum := a + b; sum >= a {
		return sum
	}
	return math.MaxUint64
}

func saturate(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// A Demand is what a channel must be to pay a payee through.
type Demand struct {
	Payee   [32]byte
	Deposit uint64                     // nanotons that it must hold beyond what is claimed
	Delay   time.Duration              // of its closing, at least
	Except  func(voucher.Channel) bool // channels that cannot be used
}
