// Package till takes the money of one VM: it collects what clients have paid over
// the VM's control port and keeps it, decides on which channels the VM serves, sets
// prices, and claims.
//
// What it promises: a voucher counts for the client only once it is on this disk. A
// channel is served on only when proofs say that it pays this owner, holds enough and
// gives the owner time to claim. A VM or a chain that is away costs service and never
// money that is here already.
//
// It trusts neither side. What the VM says is bounded and parsed, and each voucher is
// verified again; what liteservers say is proved (package channel).
package till

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/guest"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// Errors of tills.
var (
	ErrRefused = errors.New("the VM refused")
	ErrClosed  = errors.New("the till is closed")
	ErrHeld    = errors.New("the channel is used on another VM of this owner")
	ErrSpent   = errors.New("the channel is at its end; top it up")
	ErrNoStore = errors.New("what the VM earned is kept by another process, such as that of a VM that it replaces")
)

// A VM is the control port of a VM. The error says that it did not answer; whether it
// did what it was asked for is in the reply.
type VM interface {
	Control(context.Context, guest.ControlRequest) (guest.ControlReply, error)
}

// A Reading is a channel as it was proved, or why it could not be.
type Reading struct {
	State *channel.State
	Err   error
}

// A Claimed is what became of a claim.
type Claimed struct {
	Fees uint64 // nanotons
	Err  error
}

// A Chain reads channels and claims from them.
type Chain interface {
	// Read proves channels as of one recent block. The error says that no such block
	// could be had.
	Read(context.Context, []voucher.Channel) ([]Reading, error)
	// Claim claims vouchers of different channels.
	Claim(context.Context, []voucher.Voucher) []Claimed
	// Least is what a claim must add to what has been claimed, in nanotons.
	Least() uint64
}

// A PriceSource says what to charge from now on, given what is charged: as many
// prices, in the order of the VM's models. What is above a ceiling is cut to it.
type PriceSource interface {
	Prices(ctx context.Context, current []pay.Price) ([]pay.Price, error)
	// Changed is called when the VM has taken other prices.
	Changed(ctx context.Context, prices []pay.Price) error
}

// Terms are what an owner demands of those who pay.
type Terms struct {
	GlobalID   int32         `json:"global_id"`
	Payee      lite.Address  `json:"payee"`
	MinDeposit uint64        `json:"min_deposit"`  // nanotons that a channel is to be opened with
	MinDelay   time.Duration `json:"min_delay_ns"` // for the owner to claim when the payer closes
}

// Options of a till.
type Options struct {
	Terms
	Name     string        // the VM's
	Models   []string      // NAME@REVISION, in the order of its manifest
	Ceilings []pay.Price   // in the same order
	Prices   []pay.Price   // to begin with
	Source   PriceSource   // nil: they stay until SetPrices
	Every    time.Duration // how often the source is asked; 0 is ten minutes
	Policy   store.Policy

	Dir     string // the store's folder
	Holders string // a folder that all VMs of the owner share

	VM    VM
	Chain Chain
	Log   func(format string, args ...any)
	Now   func() time.Time // nil is the clock
	Tick  time.Duration    // how often it looks what is due; 0 is a second
}

// How often things are done.
const (
	readAdmitted = time.Minute      // a channel that is served on
	readPending  = 5 * time.Minute  // one with something to claim
	readOther    = time.Hour        // one that is kept otherwise
	goneAgain    = time.Minute      // one that is not there is looked for again, before its vouchers are forgotten
	idleDrop     = time.Hour        // one that nobody uses is dropped from the VM
	maxBackoff   = 30 * time.Second // where nothing can be read
	defaultEvery = 10 * time.Minute // the source of prices is asked
)

// Limits.
const (
	pollMS      = 3000
	maxWanted   = 64 // channels that wait to be read
	maxRefusals = 4096
	readAtOnce  = 16
	readBurst   = 64 // of channels that are not known here
	readRate    = 10 // a second
	maxAdmitted = 4096
)

type admitted struct {
	read    time.Time // when it was last read
	used    time.Time // when the VM last said something of it
	closing bool
	limit   uint64
}

// Till is a till. Run works it; the other methods may be called from any goroutine.
type Till struct {
	o Options

	mu       sync.Mutex
	store    *store.Store // nil until it is open
	damage   []string
	prices   []pay.Price
	set      bool // the VM has been told them
	admitted map[voucher.Channel]*admitted
	wanted   map[voucher.Channel]int       // how often the VM has named it
	refused  map[voucher.Channel]time.Time // until when a channel is not read again
	read     map[voucher.Channel]time.Time // of channels that are not admitted
	missing  map[voucher.Channel]time.Time // since when a channel is not there
	backoff  map[voucher.Channel]backoff   // of claims
	reads    bucket                        // of channels that are not known here
	lines    bucket                        // of log that anybody can cause
	vmErr    string
	chainErr string
	storeErr string
	claimErr string
	chainTry time.Time
	chainBad int
	pricesAt time.Time
	refusals uint64
	last     Sums // when the store was closed
	closed   bool

	acked uint64 // only the collecting goroutine

	wake   chan struct{} // something is wanted
	cancel context.CancelFunc
	done   chan struct{} // closed when Run has ended; nil before it begins
}

type backoff struct {
	until time.Time
	tries int
}

// New makes a till and refuses options that are not in order. Nothing is opened or
// asked before Run.
func New(o Options) (*Till, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	o.Tick = cmp.Or(o.Tick, time.Second)
	o.Every = cmp.Or(o.Every, defaultEvery)
	if len(o.Prices) == 0 {
		o.Prices = o.Ceilings
	}
	if err := CheckPrices(o.Models, o.Prices, o.Ceilings); err != nil {
		return nil, err
	}
	if err := o.Terms.Validate(); err != nil {
		return nil, err
	}
	return &Till{
		o: o, prices: slices.Clone(o.Prices), admitted: map[voucher.Channel]*admitted{}, wanted: map[voucher.Channel]int{},
		refused: map[voucher.Channel]time.Time{}, read: map[voucher.Channel]time.Time{}, missing: map[voucher.Channel]time.Time{},
		backoff: map[voucher.Channel]backoff{}, reads: bucket{burst: readBurst, rate: readRate}, lines: bucket{burst: 16, rate: 0.1}, wake: make(chan struct{}, 1),
	}, nil
}

// Validate reports the first value that is out of bounds.
func (t Terms) Validate() error {
	if t.Payee == (lite.Address{}) {
		return errors.New("nobody is paid; give the payout address with --payout")
	}
	if t.MinDeposit < channel.MinDeposit {
		return fmt.Errorf("a least deposit of %s; a channel is opened with %s or more", registry.TON(t.MinDeposit), registry.TON(channel.MinDeposit))
	}
	if t.MinDelay < 0 || t.MinDelay > channel.MaxDelay || t.MinDelay%time.Second != 0 {
		return fmt.Errorf("a least delay of %v; whole seconds, at most %v", t.MinDelay, channel.MaxDelay)
	}
	return nil
}

// CheckPrices fails unless there is a price for each model and none is above its
// ceiling.
func CheckPrices(models []string, prices, ceilings []pay.Price) error {
	if len(models) == 0 || len(prices) != len(models) || len(ceilings) != len(models) {
		return fmt.Errorf("%d prices and %d ceilings for %d models; one of each is needed for each", len(prices), len(ceilings), len(models))
	}
	for i, p := range prices {
		if err := p.Under(ceilings[i]); err != nil {
			return fmt.Errorf("%s: %w", models[i], err)
		}
	}
	return nil
}

// Run works the till until Finish or Close is called or the context ends.
func (t *Till) Run(ctx context.Context) {
	t.mu.Lock()
	if t.closed || t.done != nil {
		t.mu.Unlock()
		return
	}
	ctx, t.cancel = context.WithCancel(ctx)
	done := make(chan struct{})
	t.done = done
	t.mu.Unlock()
	defer close(done)
	var loops sync.WaitGroup
	loops.Go(func() { t.collecting(ctx) })
	loops.Go(func() { t.reading(ctx) })
	loops.Go(func() { t.claiming(ctx) })
	loops.Go(func() { t.pricing(ctx) })
	loops.Wait()
}

// halt ends Run.
func (t *Till) halt() {
	t.mu.Lock()
	t.closed = true
	cancel, done := t.cancel, t.done
	t.mu.Unlock()
	if done != nil {
		cancel()
		<-done
	}
}

// Close ends the till at once. What has not been collected is lost with the VM; what
// has not been claimed stays in the store.
func (t *Till) Close() error {
	t.halt()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.store == nil {
		return nil
	}
	t.last = t.sums()
	s := t.store
	t.store = nil
	return s.Close()
}

// Finish takes what a VM that has been drained still has, claims all that is worth it
// if it is to, and closes the till. What the context leaves no time for stays in the
// store.
func (t *Till) Finish(ctx context.Context, claim bool) error {
	t.halt()
	collected := func() error {
		if err := t.openStore(); err != nil {
			return err
		}
		for ctx.Err() == nil {
			if more, err := t.collect(ctx, 0); err != nil || !more {
				return err
			}
		}
		return ctx.Err()
	}()
	if collected != nil {
		collected = fmt.Errorf("collect what was paid last: %w", collected)
	}
	if claim && t.opened() != nil {
		t.claim(ctx, true)
	}
	return errors.Join(collected, t.Close())
}

// Settle claims all that is worth it of what a store has that no till uses.
func Settle(ctx context.Context, o Options) error {
	if o.Now == nil {
		o.Now = time.Now
	}
	t := &Till{
		o: o, closed: true, read: map[voucher.Channel]time.Time{}, admitted: map[voucher.Channel]*admitted{},
		backoff: map[voucher.Channel]backoff{},
	}
	if err := t.openStore(); err != nil {
		return err
	}
	t.claim(ctx, true)
	t.mu.Lock()
	failed := t.claimErr
	t.mu.Unlock()
	err := t.Close()
	if failed != "" {
		err = errors.Join(errors.New(failed), err)
	}
	return err
}

// Open opens the store, so that State says what is wrong with it. Run does that, too,
// and tries again where it fails.
func (t *Till) Open() error { return t.openStore() }

func (t *Till) opened() *store.Store {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.store
}

// openStore opens the store, unless it is open or somebody else has it.
func (t *Till) openStore() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.store != nil {
		return nil
	}
	s, err := store.Open(t.o.Dir)
	if err != nil {
		if errors.Is(err, store.ErrLocked) {
			err = fmt.Errorf("%w (%s)", ErrNoStore, t.o.Dir)
		}
		t.note(&t.storeErr, err)
		return err
	}
	t.note(&t.storeErr, nil)
	t.store = s
	if damage := s.Damage(); len(damage) > 0 {
		t.damage = damage
		t.o.Log("the store of vouchers was damaged, and the last state that is whole is used: %s", strings.Join(damage, "; "))
	}
	return nil
}

// note keeps what is wrong, and logs it when that changes. t.mu is held.
func (t *Till) note(where *string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != *where {
		t.o.Log("%s", text)
	}
	*where = text
}

func (t *Till) noted(where *string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.note(where, err)
}

// pause waits, and reports whether the context goes on.
func (t *Till) pause(ctx context.Context, wait time.Duration, wake <-chan struct{}) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-wake:
	case <-timer.C:
	}
	return ctx.Err() == nil
}

// ask sends a request that must be carried out.
func (t *Till) ask(ctx context.Context, request guest.ControlRequest) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	reply, err := t.o.VM.Control(ctx, request)
	if err != nil {
		return err
	}
	if !reply.OK {
		return refusedBy(request.Op, reply)
	}
	return nil
}

// refusedBy is a reply that is not OK. What the VM says is one of a few words.
func refusedBy(op guest.ControlOp, reply guest.ControlReply) error {
	switch reply.Error {
	case guest.ErrorBadMessage, guest.ErrorUnknownOp, guest.ErrorPayment, guest.ErrorRefused:
		return fmt.Errorf("%w to %s (%s)", ErrRefused, op, reply.Error)
	}
	return fmt.Errorf("%w to %s", ErrRefused, op)
}

// Prices returns the current prices.
func (t *Till) Prices() []pay.Price {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.prices)
}

// SetPrices changes what is charged from now on, and returns when the VM has taken it.
// What has been paid for is served at the prices of then.
func (t *Till) SetPrices(ctx context.Context, prices []pay.Price) error {
	if err := CheckPrices(t.o.Models, prices, t.o.Ceilings); err != nil {
		return err
	}
	if err := t.tell(ctx, prices); err != nil {
		return err
	}
	t.mu.Lock()
	t.prices, t.set = slices.Clone(prices), true
	t.mu.Unlock()
	return nil
}

func (t *Till) tell(ctx context.Context, prices []pay.Price) error {
	return t.ask(ctx, guest.ControlRequest{Op: guest.OpPrices, Payment: &guest.ControlPayment{
		Payee: voucher.Channel(t.o.Payee.ID).String(), MinDeposit: t.o.MinDeposit, MinDelay: int64(t.o.MinDelay / time.Second), Prices: prices,
	}})
}

// pricing tells the VM its first prices, and asks the source for others.
func (t *Till) pricing(ctx context.Context) {
	for first := true; first || t.pause(ctx, t.o.Tick, nil); first = false {
		t.mu.Lock()
		prices, set := slices.Clone(t.prices), t.set
		due := t.o.Source != nil && !t.o.Now().Before(t.pricesAt)
		if due {
			t.pricesAt = t.o.Now().Add(t.o.Every)
		}
		t.mu.Unlock()
		if !set {
			err := t.SetPrices(ctx, prices)
			if t.noted(&t.vmErr, err); err != nil {
				continue
			}
		}
		if !due {
			continue
		}
		asking, cancel := context.WithTimeout(ctx, 2*time.Minute)
		next, err := t.o.Source.Prices(asking, slices.Clone(prices))
		cancel()
		if err == nil && len(next) != len(prices) {
			err = fmt.Errorf("%d prices for %d models", len(next), len(prices))
		}
		if err != nil {
			t.o.Log("the prices stay as they are: %v", err)
			continue
		}
		for i := range next {
			next[i].Prompt, next[i].Completion = min(next[i].Prompt, t.o.Ceilings[i].Prompt), min(next[i].Completion, t.o.Ceilings[i].Completion)
		}
		if slices.Equal(next, prices) {
			continue
		}
		if err := t.SetPrices(ctx, next); err != nil {
			t.o.Log("set prices: %v", err)
			continue
		}
		t.o.Log("prices are now %v", next)
		changed, cancel := context.WithTimeout(ctx, 2*time.Minute)
		if err := t.o.Source.Changed(changed, next); err != nil {
			t.o.Log("the prices have changed: %v", err)
		}
		cancel()
	}
}

// State is what an owner wants to know at a glance.
type State struct {
	GlobalID int32        `json:"global_id"`
	Payee    lite.Address `json:"payee"`
	Models   []ModelState `json:"models"`
	Channels int          `json:"channels"` // that are served on
	Sums
	Refused uint64   `json:"refused"` // channels that were named and are not served on
	Trouble []string `json:"trouble,omitempty"`
}

// Sums are nanotons since the store began.
type Sums struct {
	Earned  uint64 `json:"earned"`
	Claimed uint64 `json:"claimed"`
	Lost    uint64 `json:"lost"`
	Fees    uint64 `json:"fees"`
	Pending uint64 `json:"pending"` // vouchers that can be claimed; part of it may not be used yet
}

// ModelState is a model and what it costs.
type ModelState struct {
	ID string `json:"id"`
	pay.Price
	Ceiling pay.Price `json:"ceiling"`
}

// State says how the till does.
func (t *Till) State() State {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := State{GlobalID: t.o.GlobalID, Payee: t.o.Payee, Channels: len(t.admitted), Refused: t.refusals}
	for i, id := range t.o.Models {
		st.Models = append(st.Models, ModelState{id, t.prices[i], t.o.Ceilings[i]})
	}
	if len(t.damage) > 0 {
		st.Trouble = append(st.Trouble, "the store of vouchers was damaged: "+strings.Join(t.damage, "; "))
	}
	for _, text := range []string{t.storeErr, t.vmErr, t.chainErr, t.claimErr} {
		if text != "" {
			st.Trouble = append(st.Trouble, text)
		}
	}
	st.Sums = t.last
	if t.store != nil {
		st.Sums = t.sums()
	}
	return st
}

// sums adds up what the store has, which is open. t.mu is held.
func (t *Till) sums() (s Sums) {
	total := store.Total(t.store.Earnings())
	s.Earned, s.Claimed, s.Lost, s.Fees = total.Earned, total.Claimed, total.Lost, total.Fees
	for _, c := range t.store.Channels() {
		s.Pending += c.Unclaimed()
	}
	return s
}

// Earnings returns what was earned, by day and model.
func (t *Till) Earnings() ([]store.Row, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.store == nil {
		if t.storeErr != "" {
			return nil, errors.New(t.storeErr)
		}
		return nil, ErrNoStore
	}
	return t.store.Earnings(), nil
}
