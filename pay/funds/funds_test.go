package funds

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"math/big"
	"path/filepath"
	"testing"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/devnet/devnettest"
	"chrysalis/pay/purse"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

const ton = 1_000_000_000

// world is a chain and a payer with 10 TON.
type world struct {
	chain  *devnet.Chain
	server *devnet.Server
	key    ed25519.PrivateKey
	payer  *registry.Publisher
	own    channel.Own
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)), own: channel.Own{Path: filepath.Join(t.TempDir(), "channels.json")}}
	w.chain, w.server = devnettest.Serve(t, devnet.Options{})
	client := devnettest.Client(t, w.chain, w.server, lite.Options{Timeout: 2 * time.Second})
	wallet, err := registry.NewWallet(w.key, "v5r1", w.chain.GlobalID())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.chain.Fund(wallet.Address.Std(), big.NewInt(10*ton)); err != nil {
		t.Fatal(err)
	}
	w.payer = &registry.Publisher{Reader: registry.Reader{Client: client}, Wallet: wallet, Wait: 5 * time.Second}
	return w
}

func (w *world) funds(budget, deposit uint64) *Funds {
	return New(Options{Publisher: w.payer, Own: w.own, Key: w.key, Budget: budget, Deposit: deposit, MaxDelay: time.Hour})
}

// TestFunds opens, finds, tops up and closes, within a budget.
func TestFunds(t *testing.T) {
	w := newWorld(t)
	f := w.funds(ton, 400_000_000)
	demand := purse.Demand{Payee: [32]byte{5}, Deposit: 100_000_000, Delay: time.Minute}
	if _, ok, err := f.Find(t.Context(), demand); ok || err != nil {
		t.Fatal(ok, err)
	}
	a, err := f.Channel(t.Context(), demand)
	if err != nil || !a.Fresh || a.Payee != demand.Payee || a.Claimed != 0 || a.Limit < 400_000_000 || f.Deposited() != 400_000_000 {
		t.Fatalf("%+v, %v", a, err)
	}
	// The same one is found, by another that has the list, too.
	for _, f := range []*Funds{f, w.funds(1, 1)} {
		if b, err := f.Channel(t.Context(), demand); err != nil || b.ID != a.ID || b.Fresh {
			t.Fatalf("%+v, %v", b, err)
		}
	}
	// For another worker, another payee or a longer delay another one is opened.
	other := demand
	other.Except = func(id voucher.Channel) bool { return id == a.ID }
	b, err := f.Channel(t.Context(), other)
	if err != nil || b.ID == a.ID || f.Deposited() != 800_000_000 {
		t.Fatalf("%+v, %v", b, err)
	}
	// A top-up is what is left of the budget, to the nanoton.
	c, err := f.TopUp(t.Context(), a.ID)
	if err != nil || c.ID != a.ID || f.Deposited() != ton || c.Limit < 590_000_000 || c.Limit > 600_000_000+Overhead {
		t.Fatalf("%+v, %v, %d", c, err, f.Deposited())
	}
	if _, err := f.TopUp(t.Context(), a.ID); !errors.Is(err, ErrBudget) || !errors.Is(err, purse.ErrBudget) {
		t.Fatal(err)
	}
	other.Payee = [32]byte{6}
	if _, err := f.Channel(t.Context(), other); !errors.Is(err, ErrBudget) {
		t.Fatal(err)
	}
	// One that is closing is not found any more.
	at, err := f.Close(t.Context(), b.ID)
	if err != nil || time.Until(at) > time.Hour {
		t.Fatal(at, err)
	}
	other = demand
	other.Except = func(id voucher.Channel) bool { return id == a.ID }
	if _, ok, err := f.Find(t.Context(), other); ok || err != nil {
		t.Fatal(ok, err)
	}
}

// TestFundsRefuse has a row for each deposit that is not made.
func TestFundsRefuse(t *testing.T) {
	w := newWorld(t)
	before := w.chain.Account(w.payer.Wallet.Address.Std()).Balance.Nano().Int64()
	for name, tt := range map[string]struct {
		funds  *Funds
		demand purse.Demand
		want   error
	}{
		"more than the budget is demanded": {w.funds(100_000_000, 1), purse.Demand{Deposit: 100_000_001 + Overhead}, ErrBudget},
		"a longer delay than is allowed":   {w.funds(ton, ton), purse.Demand{Delay: time.Hour + time.Second}, ErrDelay},
		"more than the wallet has":         {w.funds(100*ton, 100*ton), purse.Demand{}, registry.ErrNoFunds},
	} {
		if _, err := tt.funds.Channel(t.Context(), tt.demand); !errors.Is(err, tt.want) || tt.funds.Deposited() != 0 {
			t.Errorf("%s: %v, %d deposited", name, err, tt.funds.Deposited())
		}
	}
	if list, err := w.own.List(); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
	if after := w.chain.Account(w.payer.Wallet.Address.Std()).Balance.Nano().Int64(); after != before {
		t.Errorf("%d is gone", before-after)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.funds(ton, ton).Channel(ctx, purse.Demand{}); err == nil {
		t.Error("a channel without a network")
	}
}
