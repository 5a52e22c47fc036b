package channel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/channel/voucher"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/ledger"
	"chrysalis/registry/lite"
)

// callValue is attached to messages in nanotons; what it does not take comes back
// in the same transaction. It is ten times what a claim takes at the prices of June
// 2026.
const callValue = 10_000_000

// MaxDelay is the longest delay of a channel that Open makes: a payer who mistypes
// it waits for its money no longer than this.
const MaxDelay = 30 * 24 * time.Hour

// MinDeposit is the least that a channel can be opened with, in nanotons: its rent
// and the gas.
const MinDeposit = contract.ChannelRent + callValue

func operation(name string, value uint64, a lite.Address, body func(queryID uint64) *cell.Cell) registry.Operation {
	return registry.Operation{
		Name: name, Value: value,
		To:      func(*registry.Publisher) lite.Address { return a },
		Body:    func(_ *registry.Publisher, id uint64) (*cell.Cell, error) { return body(id), nil },
		Explain: contract.ExplainChannel,
	}
}

// Open makes a channel and deposits so much in it. The wallet must be the payer of
// the terms.
func Open(t Terms, deposit uint64) registry.Operation {
	a := Address(t)
	op := operation("open "+a.String(), deposit, a, contract.OpenChannel)
	op.Init = func(*registry.Publisher) *tlb.StateInit { return contract.ChannelStateInit(t) }
	op.Done = func(ctx context.Context, p *registry.Publisher, view *lite.View) (string, error) {
		switch {
		case t.Payer != p.Wallet.Address.ID:
			return "", fmt.Errorf("%w: its payer is %s, and this is %s", ErrPayer, lite.Address{ID: t.Payer}, p.Wallet.Address)
		case t.GlobalID != p.Reader.Client.Network().GlobalID:
			return "", ErrNetwork
		case time.Duration(t.Delay)*time.Second > MaxDelay:
			return "", fmt.Errorf("a delay of %v would keep the rest from the payer; at most %v is possible", time.Duration(t.Delay)*time.Second, MaxDelay)
		case deposit < MinDeposit:
			return "", fmt.Errorf("%w: a deposit of %s, at least %s is needed", ErrCover, registry.TON(deposit), registry.TON(MinDeposit))
		}
		if err := voucher.CheckKey(t.PayerKey); err != nil {
			return "", err
		}
		s, err := Read(ctx, view, a)
		if errors.Is(err, ErrNoChannel) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if s.Status == contract.ChannelNew {
			return "", nil
		}
		return fmt.Sprintf("the channel %s is %s", a, s.Status), nil
	}
	return op
}

// TopUp adds to a channel's deposit, from any wallet.
func TopUp(a lite.Address, nano uint64) registry.Operation {
	op := operation("top up "+a.String(), nano, a, func(uint64) *cell.Cell { return contract.TopUp() })
	before, first := uint64(0), true
	op.Done = func(ctx context.Context, p *registry.Publisher, view *lite.View) (string, error) {
		s, err := Read(ctx, view, a)
		if err != nil {
			return "", err
		}
		if s.Status == contract.ChannelClosing {
			return "", ErrClosing
		}
		// Claims in between take nothing from the sum of both, rent does.
		if sum := s.Claimed + s.Balance; first {
			before, first = sum, false
		} else if sum > before+nano/2 {
			return fmt.Sprintf("the channel has %s", registry.TON(s.Balance)), nil
		}
		return "", nil
	}
	return op
}

// Claim has the payee of a channel paid what a voucher adds, from any wallet.
func Claim(v voucher.Voucher) registry.Operation {
	a := lite.Address{ID: v.Channel}
	op := operation("claim from "+a.String(), callValue, a, func(id uint64) *cell.Cell { return contract.Claim(id, v) })
	op.Done = claimed(v)
	return op
}

func claimed(v voucher.Voucher) func(context.Context, *registry.Publisher, *lite.View) (string, error) {
	return func(ctx context.Context, _ *registry.Publisher, view *lite.View) (string, error) {
		s, err := Read(ctx, view, lite.Address{ID: v.Channel})
		if err != nil {
			return "", err
		}
		if s.Claimed >= v.Total {
			return fmt.Sprintf("%s has been claimed from %s", registry.TON(s.Claimed), s.Address), nil
		}
		return "", s.CheckVoucher(v)
	}
}

// Close closes a channel at once, for its payee, with a last voucher or nil. The
// payer gets the rest.
func Close(a lite.Address, last *voucher.Voucher) registry.Operation {
	op := operation("close "+a.String(), callValue, a, func(id uint64) *cell.Cell { return contract.CloseChannel(id, last) })
	op.Done = ended(a, func(p *registry.Publisher, s *State) error {
		if s.Payee != p.Wallet.Address.ID {
			return fmt.Errorf("%w: %s, and this is %s; its payer begins to close it", ErrPayee, lite.Address{ID: s.Payee}, p.Wallet.Address)
		}
		if last != nil {
			return s.CheckVoucher(*last)
		}
		return nil
	})
	return op
}

// BeginClose begins to close a channel, for its payer.
func BeginClose(a lite.Address) registry.Operation {
	op := operation("begin to close "+a.String(), callValue, a, contract.BeginClose)
	op.Done = func(ctx context.Context, p *registry.Publisher, view *lite.View) (string, error) {
		s, err := Read(ctx, view, a)
		if err != nil {
			return "", err
		}
		if err := mine(p, s); err != nil {
			return "", err
		}
		if s.Status == contract.ChannelClosing {
			return fmt.Sprintf("the channel %s is closing; the rest can be taken from %s on", a, s.FinishAt().Format(time.RFC3339)), nil
		}
		return "", nil
	}
	return op
}

// Finish takes the rest of a channel whose delay is over, for its payer.
func Finish(a lite.Address) registry.Operation {
	op := operation("finish "+a.String(), callValue, a, contract.FinishClose)
	op.Done = ended(a, func(p *registry.Publisher, s *State) error {
		if err := mine(p, s); err != nil {
			return err
		}
		if at := s.FinishAt(); s.Status == contract.ChannelClosing && s.Time.Before(at) {
			return fmt.Errorf("%w: the rest can be taken from %s on", ErrClosing, at.Format(time.RFC3339))
		}
		return nil
	})
	return op
}

func mine(p *registry.Publisher, s *State) error {
	if s.Payer != p.Wallet.Address.ID {
		return fmt.Errorf("%w: its payer is %s, and this is %s", ErrPayer, lite.Address{ID: s.Payer}, p.Wallet.Address)
	}
	return nil
}

// ended is done when the channel is gone.
func ended(a lite.Address, check func(*registry.Publisher, *State) error) func(context.Context, *registry.Publisher, *lite.View) (string, error) {
	return func(ctx context.Context, p *registry.Publisher, view *lite.View) (string, error) {
		s, err := Read(ctx, view, a)
		if errors.Is(err, ErrNoChannel) {
			return fmt.Sprintf("the channel %s is closed", a), nil
		}
		if err != nil {
			return "", err
		}
		return "", check(p, s)
	}
}

// A Claimed is what became of one voucher of ClaimAll.
type Claimed struct {
	Voucher voucher.Voucher
	Paid    uint64 // nanotons that the payee got by it, before the wallet's fees
	Err     error  // why it was not claimed
}

// readers is how many channels are read at a time.
const readers = 16

// ClaimAll claims many vouchers, of different channels, with as few messages of the
// wallet as can be. Those that cannot be claimed are left out, and said to be.
func ClaimAll(ctx context.Context, p *registry.Publisher, list []voucher.Voucher) (results []Claimed, err error) {
	view, err := p.Reader.Client.Sync(ctx)
	if err != nil {
		return nil, err
	}
	results = make([]Claimed, len(list))
	var wait sync.WaitGroup
	next := make(chan int)
	for range min(readers, len(list)) {
		wait.Go(func() {
			mine := *view // it notes failures
			mine.Failures = nil
			for i := range next {
				results[i] = claimable(ctx, &mine, list[i])
			}
		})
	}
	for i := range list {
		next <- i
	}
	close(next)
	wait.Wait()
	var left []int
	seen := map[voucher.Channel]bool{}
	for i, r := range results {
		switch {
		case r.Err != nil:
		case seen[r.Voucher.Channel]:
			results[i].Err = fmt.Errorf("%w: the list has another one", voucher.ErrChannel)
		default:
			seen[r.Voucher.Channel] = true
			left = append(left, i)
		}
	}
	for size := p.Wallet.MaxBatch(); len(left) > 0; {
		chunk := left[:min(size, len(left))]
		var ops []registry.Operation
		for _, i := range chunk {
			ops = append(ops, Claim(results[i].Voucher))
		}
		plan, err := p.PlanBatch(ctx, fmt.Sprintf("claim from %d channels", len(chunk)), ops)
		if errors.Is(err, registry.ErrNoFunds) && len(chunk) > 1 {
			size = (len(chunk) + 1) / 2 // what is attached comes back, but must be there first
			continue
		}
		if err == nil && plan.Nothing == "" {
			err = p.Send(ctx, plan)
		}
		if err != nil {
			for _, i := range left {
				results[i].Err = err
			}
			return results, err
		}
		left = left[len(chunk):]
	}
	return results, nil
}

func claimable(ctx context.Context, view *lite.View, v voucher.Voucher) Claimed {
	s, err := Read(ctx, view, lite.Address{ID: v.Channel})
	if err == nil {
		err = s.CheckVoucher(v)
	}
	if err != nil {
		return Claimed{Voucher: v, Err: err}
	}
	return Claimed{Voucher: v, Paid: v.Total - s.Claimed}
}

// ClaimExternal claims a voucher by an external message, which needs no wallet: the
// fees come out of what the payee gets. It waits until that is proved to be done, at
// most until the context ends, when the error is registry.ErrUnknown; to send it again
// is safe. got is what the payee gets, as run on this machine.
func ClaimExternal(ctx context.Context, client *lite.Client, v voucher.Voucher) (got uint64, err error) {
	a := lite.Address{ID: v.Channel}
	view, err := client.Sync(ctx)
	if err != nil {
		return 0, err
	}
	s, err := Read(ctx, view, a)
	if err != nil {
		return 0, err
	}
	if err := s.CheckVoucher(v); err != nil {
		return 0, err
	}
	account, err := view.Account(ctx, a)
	if err != nil {
		return 0, err
	}
	message := contract.ExternalClaim(v)
	if got, err = rehearse(ctx, view, account, s.Payee, message); err != nil {
		return 0, err
	}
	sent := client.Send(ctx, message)
	pause := 50 * time.Millisecond
	for {
		view, err := client.Sync(ctx)
		if err == nil {
			// Not by the claimed total alone: another voucher may have come first.
			if s, err = Read(ctx, view, a); err == nil && s.Claimed >= v.Total {
				return got, nil
			}
			if errors.Is(err, ErrNoChannel) {
				return 0, err
			}
		}
		select {
		case <-ctx.Done():
			return 0, errors.Join(registry.ErrUnknown, err, sent)
		case <-time.After(pause):
		}
		pause = min(pause*2, 2*time.Second)
	}
}

// rehearse runs an external message on this machine, and returns what the payee
// gets.
func rehearse(ctx context.Context, view *lite.View, account *lite.Account, payee [32]byte, message *cell.Cell) (got uint64, err error) {
	l, err := registry.Ledger(ctx, view, account)
	if err != nil {
		return 0, err
	}
	defer func() {
		if r := recover(); r != nil {
			got, err = 0, fmt.Errorf("the message cannot be run on this machine: %v", r)
		}
	}()
	txs, _, err := l.Run(message, max(view.Head.Time, account.LastPaid), account.Shard.LastTransLT+1_000_000)
	if refused, ok := errors.AsType[*ledger.NotAccepted](err); ok {
		return 0, fmt.Errorf("%w: %s", registry.ErrRefused, contract.ExplainChannel(refused.Exit))
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %w", registry.ErrRefused, err)
	}
	at := slices.IndexFunc(txs, func(tx ledger.Transaction) bool { return tx.Account == payee })
	if at < 0 || txs[0].Exit != 0 {
		return 0, fmt.Errorf("%w: it would pay nothing", registry.ErrRefused)
	}
	var tx tlb.Transaction
	if err := tlb.Parse(&tx, txs[at].Cell); err != nil {
		return 0, err
	}
	return tx.IO.In.AsInternal().Amount.Nano().Uint64(), nil
}
