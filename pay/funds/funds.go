// Package funds has the channels that a payer pays from: it finds those that are open,
// opens others, tops them up and closes them, on TON. What it reads is proved, and what
// it deposits stays within a budget.
package funds

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"sync"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/voucher"
	"chrysalis/pay/purse"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// Overhead is what of a deposit no voucher can be for, in nanotons: the channel's rent
// and the gas to open it. What of it is left comes back with the rest.
const Overhead = channel.MinDeposit

// Errors of deposits.
var (
	ErrBudget = errors.New("the budget has no room for the deposit")
	ErrDelay  = errors.New("the payee demands that money stays locked for too long after a close")
)

// Options are what deposits are made by.
type Options struct {
	Publisher *registry.Publisher // wallet and network
	Own       channel.Own
	Key       ed25519.PrivateKey // signs vouchers
	Budget    uint64             // nanotons that are deposited in all, without Overhead
	Deposit   uint64             // nanotons that vouchers for one channel can be for at first, and that a top-up adds
	MaxDelay  time.Duration      // that a payee may demand
	// Progress is told what is done; nil is nobody.
	Progress func(what string)
}

// Funds implements proxy.Funds. Its methods may be called from any goroutine.
type Funds struct {
	options Options

	mu        sync.Mutex // one operation of the wallet at a time
	deposited uint64
}

// New returns funds of which nothing is deposited yet.
func New(o Options) *Funds { return &Funds{options: o} }

// Deposited is what was deposited, without Overhead, in nanotons.
func (f *Funds) Deposited() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.deposited
}

func (f *Funds) key() voucher.Key { return voucher.Key(f.options.Key.Public().(ed25519.PublicKey)) }

func (f *Funds) globalID() int32 { return f.options.Publisher.Reader.Client.Network().GlobalID }

func (f *Funds) progress(format string, args ...any) {
	if f.options.Progress != nil {
		f.options.Progress(fmt.Sprintf(format, args...))
	}
}

// Find returns a channel of this machine's list that is open and meets a demand but
// for its deposit; false where there is none.
func (f *Funds) Find(ctx context.Context, d purse.Demand) (purse.Channel, bool, error) {
	list, err := f.options.Own.List()
	if err != nil {
		return purse.Channel{}, false, err
	}
	var view *lite.View
	for _, known := range list {
		if known.GlobalID != f.globalID() || known.Payee.ID != d.Payee || voucher.Key(known.PayerKey) != f.key() ||
			time.Duration(known.Delay)*time.Second < d.Delay || d.Except != nil && d.Except(voucher.Channel(known.Address.ID)) {
			continue
		}
		if view == nil {
			if view, err = f.options.Publisher.Reader.Client.Sync(ctx); err != nil {
				return purse.Channel{}, false, err
			}
		}
		s, err := channel.Read(ctx, view, known.Address)
		if errors.Is(err, channel.ErrNoChannel) {
			continue
		}
		if err != nil {
			return purse.Channel{}, false, fmt.Errorf("the channel %s: %w", known.Address, err)
		}
		if s.Status == contract.ChannelOpen {
			return proved(s), true, nil
		}
	}
	return purse.Channel{}, false, nil
}

func proved(s *channel.State) purse.Channel {
	return purse.Channel{ID: voucher.Channel(s.Address.ID), Payee: s.Payee, Limit: s.Cover(), Claimed: s.Claimed}
}

// Channel finds a channel that meets a demand, or opens one within the budget.
func (f *Funds) Channel(ctx context.Context, d purse.Demand) (purse.Channel, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok, err := f.Find(ctx, d)
	if err != nil || ok {
		return c, err
	}
	if d.Delay > min(f.options.MaxDelay, channel.MaxDelay) {
		return c, fmt.Errorf("%w: %v", ErrDelay, d.Delay)
	}
	amount, err := f.amount(d.Deposit)
	if err != nil {
		return c, err
	}
	t := channel.Terms{
		PayerKey: f.key(), Payer: f.options.Publisher.Wallet.Address.ID, Payee: d.Payee,
		Salt: channel.NewSalt(), Delay: uint32(d.Delay / time.Second), GlobalID: f.globalID(),
	}
	// First of all, so that an open channel is never forgotten.
	a, err := f.options.Own.Add(t, time.Now())
	if err != nil {
		return c, err
	}
	f.progress("opening the channel %s to %s with %s", a, lite.Address{ID: d.Payee}, registry.TON(amount+Overhead))
	f.deposited += amount // also where what became of it is not known
	s, err := f.do(ctx, a, channel.Open(t, amount+Overhead))
	if err != nil {
		if !errors.Is(err, registry.ErrUnknown) {
			f.deposited -= amount
			err = errors.Join(err, f.options.Own.Remove(a))
		}
		return c, fmt.Errorf("open a channel: %w", err)
	}
	c = proved(s)
	c.Fresh = true
	return c, nil
}

// amount is what is deposited next, without Overhead: at least so much with it, and no
// more than the budget has left.
func (f *Funds) amount(least uint64) (uint64, error) {
	need := uint64(1)
	if least > Overhead {
		need = least - Overhead
	}
	left := f.options.Budget - f.deposited
	amount := min(max(f.options.Deposit, need), left)
	if amount < need {
		return 0, fmt.Errorf("%w: %s is left, and %s is demanded", ErrBudget, registry.TON(left), registry.TON(need))
	}
	return amount, nil
}

// do does an operation and returns the channel after it.
func (f *Funds) do(ctx context.Context, a lite.Address, op registry.Operation) (*channel.State, error) {
	if _, err := f.options.Publisher.Do(ctx, op); err != nil {
		return nil, err
	}
	view, err := f.options.Publisher.Reader.Client.Sync(ctx)
	if err != nil {
		return nil, errors.Join(registry.ErrUnknown, err)
	}
	s, err := channel.Read(ctx, view, a)
	if err != nil {
		return nil, errors.Join(registry.ErrUnknown, err)
	}
	return s, nil
}

// TopUp adds to a channel, within the budget.
func (f *Funds) TopUp(ctx context.Context, id voucher.Channel) (purse.Channel, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	amount, err := f.amount(0)
	if err != nil {
		return purse.Channel{}, fmt.Errorf("%w: %w", purse.ErrBudget, err)
	}
	a := lite.Address{ID: id}
	f.progress("topping up the channel %s by %s", a, registry.TON(amount))
	f.deposited += amount
	s, err := f.do(ctx, a, channel.TopUp(a, amount))
	if err != nil {
		if !errors.Is(err, registry.ErrUnknown) {
			f.deposited -= amount
		}
		return purse.Channel{}, fmt.Errorf("top up a channel: %w", err)
	}
	return proved(s), nil
}

// Close begins to close a channel, and says from when on the rest can be taken.
func (f *Funds) Close(ctx context.Context, id voucher.Channel) (time.Time, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := lite.Address{ID: id}
	f.progress("beginning to close the channel %s", a)
	s, err := f.do(ctx, a, channel.BeginClose(a))
	if err != nil {
		return time.Time{}, fmt.Errorf("close a channel: %w", err)
	}
	return s.FinishAt(), nil
}
