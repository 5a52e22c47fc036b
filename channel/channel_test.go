package channel

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math"
	"math/big"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

const ton = 1_000_000_000

// net is a chain with a liteserver, a payer and a payee with wallets, and somebody
// else.
type net struct {
	testing.TB
	chain   *devnet.Chain
	network lite.Network
	client  *lite.Client
	ahead   atomic.Int64

	payer, payee, stranger *registry.Publisher
	key                    ed25519.PrivateKey // signs vouchers
}

func (n *net) now() time.Time { return time.Now().Add(time.Duration(n.ahead.Load())) }

func newNet(t testing.TB) *net {
	t.Helper()
	n := &net{TB: t, key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32))}
	c, err := devnet.Open(devnet.Options{Now: n.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := c.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	n.chain, n.network = c, lite.Network{GlobalID: c.GlobalID()}
	if err := n.network.ReadGlobalConfig(c.GlobalConfig(s)); err != nil {
		t.Fatal(err)
	}
	if n.client, err = lite.New(n.network, lite.Options{Timeout: 5 * time.Second, Now: n.now}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.client.Close)
	n.payer, n.payee, n.stranger = n.wallet(1, "v5r1"), n.wallet(2, "v5r1"), n.wallet(3, "v4r2")
	return n
}

func (n *net) wallet(seed byte, version string) *registry.Publisher {
	n.Helper()
	w, err := registry.NewWallet(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32)), version, n.chain.GlobalID())
	if err != nil {
		n.Fatal(err)
	}
	if err := n.chain.Fund(w.Address.Std(), big.NewInt(10*ton)); err != nil {
		n.Fatal(err)
	}
	return &registry.Publisher{Reader: registry.Reader{Client: n.client}, Wallet: w, Wait: 20 * time.Second}
}

func (n *net) terms() Terms {
	return Terms{
		PayerKey: voucher.Key(n.key.Public().(ed25519.PublicKey)), Payer: n.payer.Wallet.Address.ID, Payee: n.payee.Wallet.Address.ID,
		Salt: NewSalt(), Delay: 3600, GlobalID: n.chain.GlobalID(),
	}
}

func (n *net) voucher(a lite.Address, total uint64) voucher.Voucher {
	return voucher.Sign(n.key, n.chain.GlobalID(), voucher.Channel(a.ID), total)
}

func (n *net) do(p *registry.Publisher, op registry.Operation) {
	n.Helper()
	plan, err := p.Do(n.Context(), op)
	if err != nil {
		n.Fatalf("%s: %v", op.Name, err)
	}
	if plan.Nothing != "" {
		n.Fatalf("%s: %s", op.Name, plan.Nothing)
	}
}

func (n *net) read(a lite.Address) *State {
	n.Helper()
	s, err := Read(n.Context(), n.view(), a)
	if err != nil {
		n.Fatal(err)
	}
	return s
}

func (n *net) view() *lite.View {
	n.Helper()
	v, err := n.client.Sync(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	return v
}

func (n *net) balance(a lite.Address) int64 {
	if s := n.chain.Account(a.Std()); s != nil && s.IsValid {
		return s.Balance.Nano().Int64()
	}
	return 0
}

// fee is what one transaction took, and who bore it.
type fee struct {
	name, payer string
	nano        int64
}

// fees lists what everything took: each transaction's own fees and those of the
// messages that it sent. Whoever sent a channel a message bears what that takes there,
// the payee bears an external claim, and the payer a channel's rent.
func (n *net) fees(channels ...lite.Address) (list []fee) {
	n.Helper()
	names := map[lite.Address]string{n.payer.Wallet.Address: "payer", n.payee.Wallet.Address: "payee", n.stranger.Wallet.Address: "stranger"}
	isChannel := map[lite.Address]bool{}
	for _, c := range channels {
		isChannel[c] = true
	}
	accounts := n.chain.Accounts()
	for _, c := range channels { // which are not there any more
		accounts = append(accounts, c.Std())
	}
	for _, account := range accounts {
		a, err := lite.AddressOf(account)
		if err != nil {
			n.Fatal(err)
		}
		txs, err := n.chain.Transactions(account)
		if err != nil {
			n.Fatal(err)
		}
		for _, tx := range txs {
			took := tx.TotalFees.Coins.Nano().Int64()
			out, err := tx.IO.Out.ToSlice()
			if err != nil && tx.OutMsgCount > 0 {
				n.Fatal(err)
			}
			for _, m := range out {
				took += m.AsInternal().FwdFee.Nano().Int64()
			}
			who := names[a]
			if isChannel[a] {
				d := tx.Description.(tlb.TransactionDescriptionOrdinary)
				rent := int64(0)
				if d.StoragePhase != nil {
					rent = d.StoragePhase.StorageFeesCollected.Nano().Int64()
				}
				list = append(list, fee{"rent of a channel", "payer", rent})
				took -= rent
				who = "payee"
				if tx.IO.In.MsgType == tlb.MsgTypeInternal {
					from, err := lite.AddressOf(tx.IO.In.AsInternal().SrcAddr)
					if err != nil {
						n.Fatal(err)
					}
					who = names[from]
				}
				list = append(list, fee{"a channel's transaction", who, took})
				continue
			}
			list = append(list, fee{"the wallet's own transaction", who, took})
		}
	}
	return list
}

// TestEndToEnd opens channels over the chain's liteserver, tops up, pays, claims in
// every way, closes by the payee and by the payer. In the end everybody has what they
// must, to the nanoton.
func TestEndToEnd(t *testing.T) {
	n := newNet(t)
	one, two := n.terms(), n.terms()
	two.Delay = 60 // less than a wallet's message lives, by this machine's clock
	a, b := Address(one), Address(two)
	if _, err := Read(t.Context(), n.view(), a); !errors.Is(err, ErrNoChannel) {
		t.Fatalf("a channel that nobody has opened: %v", err)
	}
	n.do(n.payer, Open(one, ton))
	n.do(n.payer, TopUp(a, ton/2))
	s := n.read(a)
	demand := Demand{GlobalID: n.chain.GlobalID(), Payee: n.payee.Wallet.Address, MinDelay: time.Hour, MinCover: ton}
	if err := demand.Check(s); err != nil || s.ChannelTerms != one {
		t.Fatalf("%+v, %v", s, err)
	}
	if plan, err := n.payer.Do(t.Context(), Open(one, ton)); err != nil || plan.Nothing == "" {
		t.Errorf("open again: %v", err)
	}

	claimed := uint64(0)
	n.do(n.payee, Claim(n.voucher(a, ton/10)))
	n.do(n.stranger, Claim(n.voucher(a, ton/5)))
	if plan, err := n.stranger.Do(t.Context(), Claim(n.voucher(a, ton/10))); err != nil || plan.Nothing == "" {
		t.Errorf("claim again: %v", err)
	}
	before := n.balance(n.payee.Wallet.Address)
	got, err := ClaimExternal(t.Context(), n.client, n.voucher(a, ton/2))
	if err != nil {
		t.Fatal(err)
	}
	// The wallet's own fee for taking the money is all that lies between.
	if more := n.balance(n.payee.Wallet.Address) - before; more > int64(got) || more < int64(got)-1_000_000 {
		t.Errorf("the payee got %d, and %d was foretold", more, got)
	}
	last := n.voucher(a, ton)
	n.do(n.payee, Close(a, &last))
	claimed += ton
	if _, err := Read(t.Context(), n.view(), a); !errors.Is(err, ErrNoChannel) {
		t.Errorf("a channel that is closed: %v", err)
	}
	if _, err := ClaimExternal(t.Context(), n.client, n.voucher(a, ton+1)); !errors.Is(err, ErrNoChannel) {
		t.Errorf("claim from a channel that is closed: %v", err)
	}

	n.do(n.payer, Open(two, ton))
	n.do(n.payer, BeginClose(b))
	if _, err := n.payer.Do(t.Context(), Finish(b)); !errors.Is(err, ErrClosing) {
		t.Errorf("finish early: %v", err)
	}
	if err := demand.Check(n.read(b)); !errors.Is(err, ErrClosing) {
		t.Errorf("a channel that is closing: %v", err)
	}
	if _, err := ClaimExternal(t.Context(), n.client, n.voucher(b, ton/3)); err != nil {
		t.Errorf("claim while it is closing: %v", err)
	}
	claimed += ton / 3
	n.ahead.Add(int64(time.Minute))
	n.do(n.payer, Finish(b))

	paid := map[string]int64{}
	for _, f := range n.fees(a, b) {
		paid[f.payer] += f.nano
		t.Logf("%-28s %-8s %9d", f.name, f.payer, f.nano)
	}
	for _, tt := range []struct {
		name string
		of   *registry.Publisher
		want int64
	}{
		{"payer", n.payer, 10*ton - int64(claimed)},
		{"payee", n.payee, 10*ton + int64(claimed)},
		{"stranger", n.stranger, 10 * ton},
	} {
		if got, want := n.balance(tt.of.Wallet.Address), tt.want-paid[tt.name]; got != want {
			t.Errorf("the %s has %d, not %d: fees are %d", tt.name, got, want, paid[tt.name])
		}
	}
	if n.balance(a) != 0 || n.balance(b) != 0 {
		t.Error("something is left in a channel")
	}
	t.Logf("claimed %d; fees: payer %d, payee %d, stranger %d", claimed, paid["payer"], paid["payee"], paid["stranger"])
}

// open has the payer open a channel with no wallet in between, which is quick.
func (n *net) open(t Terms, deposit int64) lite.Address {
	n.Helper()
	a := Address(t)
	n.raw(n.payer.Wallet.Address.Std(), a, deposit, contract.OpenChannel(1), contract.ChannelStateInit(t))
	return a
}

func (n *net) raw(from *address.Address, to lite.Address, value int64, body *cell.Cell, init *tlb.StateInit) {
	n.Helper()
	message, err := tlb.ToCell(&tlb.InternalMessage{
		IHRDisabled: true, Bounce: true, SrcAddr: from, DstAddr: to.Std(), Amount: tlb.FromNanoTON(big.NewInt(value)), StateInit: init, Body: body,
	})
	if err == nil {
		err = n.chain.Send(message)
	}
	if err != nil {
		n.Fatal(err)
	}
}

// TestClaimAll claims from more channels than fit into one message, and some that
// cannot be claimed from.
func TestClaimAll(t *testing.T) {
	n := newNet(t)
	count := 300
	if testing.Short() {
		count = 20
	}
	var list []voucher.Voucher
	for i := range count {
		list = append(list, n.voucher(n.open(n.terms(), ton/10), uint64(i+1)*1000))
	}
	good := len(list)
	closed := n.voucher(Address(n.terms()), 1000)
	forged := list[1]
	forged.Signature[0] ^= 1
	list = append(list, closed, forged, n.voucher(lite.Address{ID: list[2].Channel}, ton), list[0])
	begin := time.Now()
	results, err := ClaimAll(t.Context(), n.payee, list)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d claims in %v", good, time.Since(begin))
	for i, want := range []error{ErrNoChannel, voucher.ErrSignature, ErrCover, voucher.ErrChannel} {
		if r := results[good+i]; !errors.Is(r.Err, want) {
			t.Errorf("%d: %v", i, r.Err)
		}
	}
	for i, r := range results[:good] {
		if r.Err != nil || r.Paid != uint64(i+1)*1000 {
			t.Fatalf("%d: %+v", i, r)
		}
		if s := n.read(lite.Address{ID: r.Voucher.Channel}); s.Claimed != r.Voucher.Total {
			t.Errorf("%d: %d is claimed", i, s.Claimed)
		}
	}
	txs, err := n.chain.Transactions(n.payee.Wallet.Address.Std())
	if err != nil {
		t.Fatal(err)
	}
	external := 0
	for _, tx := range txs {
		if tx.IO.In.MsgType == tlb.MsgTypeExternalIn {
			external++
		}
	}
	if want := (count + 254) / 255; external != want {
		t.Errorf("the wallet sent %d messages, %d are enough", external, want)
	}
	again, err := ClaimAll(t.Context(), n.payee, list[:2])
	if err != nil || !errors.Is(again[0].Err, voucher.ErrStale) {
		t.Errorf("%+v, %v", again, err)
	}
	if results, err := ClaimAll(t.Context(), n.payee, nil); err != nil || len(results) != 0 {
		t.Errorf("%v, %v", results, err)
	}

	// A wallet with little has to do with less at a time.
	poor, err := registry.NewWallet(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{4}, 32)), "v5r1", n.chain.GlobalID())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.chain.Fund(poor.Address.Std(), big.NewInt(50_000_000)); err != nil {
		t.Fatal(err)
	}
	var more []voucher.Voucher
	for _, v := range list[:9] {
		more = append(more, n.voucher(lite.Address{ID: v.Channel}, 10_000_000))
	}
	p := &registry.Publisher{Reader: n.payee.Reader, Wallet: poor, Wait: 20 * time.Second}
	if results, err := ClaimAll(t.Context(), p, more); err != nil || results[8].Err != nil || n.read(lite.Address{ID: more[8].Channel}).Claimed != 10_000_000 {
		t.Errorf("%+v, %v", results, err)
	}
	if _, err := n.stranger.PlanBatch(t.Context(), "claim", make([]registry.Operation, 5)); err == nil || !strings.Contains(err.Error(), "1 to 4") {
		t.Errorf("five messages of a v4r2: %v", err)
	}
}

// TestOthers reads what is no channel, or did not begin as one.
func TestOthers(t *testing.T) {
	n := newNet(t)
	n.do(n.payer, Open(n.terms(), ton)) // which makes the wallet a contract
	if _, err := Read(t.Context(), n.view(), n.payer.Wallet.Address); !errors.Is(err, ErrNotChannel) {
		t.Errorf("a wallet: %v", err)
	}
	if _, err := Read(t.Context(), n.view(), n.stranger.Wallet.Address); !errors.Is(err, ErrNoChannel) {
		t.Errorf("an account without code: %v", err)
	}
	// The channel's code, with a state in which much has been claimed, or is open,
	// from the beginning.
	for _, claimed := range []uint64{0, 1 << 62} {
		terms := n.terms()
		data := cell.BeginCell().MustStoreUInt(1, 2).MustStoreUInt(claimed, 64).MustStoreUInt(0, 40).
			MustStoreSlice(terms.PayerKey[:], 256).MustStoreSlice(terms.Payer[:], 256).MustStoreSlice(terms.Payee[:], 256).
			MustStoreUInt(terms.Salt, 64).MustStoreUInt(uint64(terms.Delay), 32).MustStoreInt(int64(terms.GlobalID), 32).EndCell()
		init := &tlb.StateInit{Code: contract.ChannelCode(), Data: data}
		c, err := tlb.ToCell(init)
		if err != nil {
			t.Fatal(err)
		}
		a := lite.Address{ID: [32]byte(c.Hash())}
		n.raw(n.payer.Wallet.Address.Std(), a, ton, contract.TopUp(), init)
		if _, err := Read(t.Context(), n.view(), a); !errors.Is(err, ErrNotChannel) {
			t.Errorf("a state from nowhere: %v", err)
		}
	}
	// One that nobody has opened yet, and one that is gone.
	unopened := n.terms()
	n.raw(n.stranger.Wallet.Address.Std(), Address(unopened), ton, contract.OpenChannel(1), contract.ChannelStateInit(unopened))
	demand := Demand{GlobalID: n.chain.GlobalID(), Payee: n.payee.Wallet.Address}
	if s, err := Read(t.Context(), n.view(), Address(unopened)); err == nil {
		if err := demand.Check(s); !errors.Is(err, ErrNotOpen) {
			t.Errorf("not opened: %v", err)
		}
	} else if !errors.Is(err, ErrNoChannel) {
		t.Errorf("not opened: %v", err)
	}
}

func TestDemand(t *testing.T) {
	key := voucher.Key(ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey))
	payee := lite.Address{ID: [32]byte{5}}
	demand := Demand{GlobalID: -3, Payee: payee, MinDelay: time.Hour, MinCover: 100}
	for _, tt := range []struct {
		name   string
		change func(*State)
		want   error
	}{
		{"good", func(*State) {}, nil},
		{"more claimed", func(s *State) { s.Claimed += 1000 }, nil},
		{"network", func(s *State) { s.GlobalID = -239 }, ErrNetwork},
		{"payee", func(s *State) { s.Payee[0]++ }, ErrPayee},
		{"closing", func(s *State) { s.Status, s.ClosingAt = contract.ChannelClosing, 7 }, ErrClosing},
		{"not open", func(s *State) { s.Status = contract.ChannelNew }, ErrNotOpen},
		{"delay", func(s *State) { s.Delay = 3599 }, ErrDelay},
		{"cover", func(s *State) { s.Balance-- }, ErrCover},
		{"nothing", func(s *State) { s.Balance = 0 }, ErrCover},
		{"key", func(s *State) { s.PayerKey = voucher.Key{1} }, voucher.ErrKey},
	} {
		s := &State{ChannelState: contract.ChannelState{
			ChannelTerms: Terms{PayerKey: key, Payee: payee.ID, Delay: 3600, GlobalID: -3}, Status: contract.ChannelOpen, Claimed: 50,
		}, Balance: contract.ChannelRent + 100}
		tt.change(s)
		if err := demand.Check(s); !errors.Is(err, tt.want) || tt.want == nil && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	s := State{Balance: math.MaxUint64}
	if s.Claimed = math.MaxUint64 - 5; s.Cover() != math.MaxUint64 {
		t.Errorf("cover %d", s.Cover())
	}
}

// TestOperationsRefuse is what is refused before anything is sent.
func TestOperationsRefuse(t *testing.T) {
	n := newNet(t)
	terms := n.terms()
	a := n.open(terms, ton)
	change := func(f func(*Terms)) Terms {
		t := n.terms()
		f(&t)
		return t
	}
	none := Address(n.terms())
	stale, much := n.voucher(a, 0), n.voucher(a, 2*ton)
	for _, tt := range []struct {
		name string
		p    *registry.Publisher
		op   registry.Operation
		want error
	}{
		{"open with another's money", n.stranger, Open(n.terms(), ton), ErrPayer},
		{"open on another network", n.payer, Open(change(func(t *Terms) { t.GlobalID = -239 }), ton), ErrNetwork},
		{"open with too little", n.payer, Open(n.terms(), MinDeposit-1), ErrCover},
		{"open with a bad key", n.payer, Open(change(func(t *Terms) { t.PayerKey = voucher.Key{1} }), ton), voucher.ErrKey},
		{"open for more than there is", n.payer, Open(n.terms(), 100*ton), registry.ErrNoFunds},
		{"top up nothing", n.payer, TopUp(none, ton), ErrNoChannel},
		{"claim nothing", n.payee, Claim(n.voucher(none, 5)), ErrNoChannel},
		{"claim too much", n.payee, Claim(much), ErrCover},
		{"claim by another key", n.payee, Claim(voucher.Sign(ed25519.NewKeyFromSeed(make([]byte, 32)), n.chain.GlobalID(), voucher.Channel(a.ID), 5)), voucher.ErrSignature},
		{"claim of another network", n.payee, Claim(voucher.Sign(n.key, -239, voucher.Channel(a.ID), 5)), voucher.ErrNetwork},
		{"close another's", n.stranger, Close(a, nil), ErrPayee},
		{"close at once as the payer", n.payer, Close(a, nil), ErrPayee},
		{"close with a stale voucher", n.payee, Close(a, &stale), voucher.ErrStale},
		{"close with too much", n.payee, Close(a, &much), ErrCover},
		{"begin to close as the payee", n.payee, BeginClose(a), ErrPayer},
		{"begin to close nothing", n.payer, BeginClose(none), ErrNoChannel},
		{"finish as the payee", n.payee, Finish(a), ErrPayer},
		{"finish an open one", n.payer, Finish(a), registry.ErrRefused},
	} {
		if _, err := tt.p.Do(t.Context(), tt.op); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	long := n.terms()
	long.Delay = uint32(MaxDelay/time.Second) + 1
	if _, err := n.payer.Do(t.Context(), Open(long, ton)); err == nil || !strings.Contains(err.Error(), "delay") {
		t.Errorf("a long delay: %v", err)
	}
	for name, v := range map[string]voucher.Voucher{"too little": n.voucher(a, contract.MinDifference-1), "too much": much, "stale": stale} {
		if _, err := ClaimExternal(t.Context(), n.client, v); err == nil || errors.Is(err, registry.ErrUnknown) {
			t.Errorf("external, %s: %v", name, err)
		}
	}
	if s := n.read(a); s.Claimed != 0 || s.Status != contract.ChannelOpen {
		t.Errorf("%+v", s)
	}
	// A liteserver that does not answer makes nobody believe anything.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ClaimExternal(ctx, n.client, n.voucher(a, ton/2)); err == nil {
		t.Error("claimed without a network")
	}
	gone := lite.Failures{{Server: "a", Err: lite.ErrNoAccount}, {Server: "b", Err: errors.New("no answer")}}
	if absent(gone) || absent(nil) || absent(fmt.Errorf("%w", lite.ErrNoAccount)) || !absent(gone[:1]) {
		t.Error("one liteserver alone hides a channel")
	}
}
