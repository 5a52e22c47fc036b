package contract

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/registry/ledger"
)

var (
	payer = person(4)
	payee = person(5)
	// payerKey signs vouchers; it is not the key of payer's wallet.
	payerKey = auditor(6)
)

const (
	ton          = 1_000_000_000
	deposit      = ton
	channelDelay = 3600
)

func channelTerms() ChannelTerms {
	return ChannelTerms{
		PayerKey: voucher.Key(payerKey.Public().(ed25519.PublicKey)), Payer: [32]byte(payer.Data()), Payee: [32]byte(payee.Data()),
		Salt: 42, Delay: channelDelay, GlobalID: devnet.DefaultGlobalID,
	}
}

// channelWorld is a channel on a chain of its own.
type channelWorld struct {
	*world
	terms ChannelTerms
	id    voucher.Channel
}

func newChannel(t *testing.T) *channelWorld {
	t.Helper()
	terms := channelTerms()
	w := &channelWorld{world: &world{T: t, registry: ChannelAddress(terms), now: time.Unix(1_780_000_000, 0)}, terms: terms}
	w.id = voucher.Channel(w.registry.Data())
	c, err := devnet.Open(devnet.Options{Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	w.chain = c
	return w
}

func openChannel(t *testing.T) *channelWorld {
	t.Helper()
	w := newChannel(t)
	if r := w.send(payer, deposit, OpenChannel(7), ChannelStateInit(w.terms)); r.exit != 0 || r.bounce {
		t.Fatalf("%+v: %s", r, ExplainChannel(r.exit))
	}
	return w
}

func (w *channelWorld) voucher(total uint64) voucher.Voucher {
	return voucher.Sign(payerKey, w.terms.GlobalID, w.id, total)
}

func (w *channelWorld) state() ChannelState {
	w.Helper()
	a := w.chain.Account(w.registry)
	if a == nil || a.Status != tlb.AccountStatusActive {
		w.Fatal("the channel is not there")
	}
	s, err := Channel(a.StateInit.Data).Channel()
	if err != nil {
		w.Fatal(err)
	}
	return s
}

func (w *channelWorld) gone() bool {
	a := w.chain.Account(w.registry)
	return a == nil || !a.IsValid || a.Status == tlb.AccountStatusNonExist
}

// external sends an external message and returns the channel's transaction, or the
// exit code with which it was not accepted.
func (w *channelWorld) external(message *cell.Cell) (*tlb.Transaction, int32) {
	w.Helper()
	err := w.chain.Send(message)
	var refused *ledger.NotAccepted
	if errors.As(err, &refused) {
		return nil, refused.Exit
	}
	if err != nil {
		return nil, -1 // there is nothing to pay its import with
	}
	list, err := w.chain.Transactions(w.registry)
	if err != nil {
		w.Fatal(err)
	}
	return list[len(list)-1], 0
}

func (w *channelWorld) fees(tx *tlb.Transaction) (total, forward int64) {
	d := tx.Description.(tlb.TransactionDescriptionOrdinary)
	if d.ActionPhase != nil && d.ActionPhase.TotalFwdFees != nil {
		forward = d.ActionPhase.TotalFwdFees.Nano().Int64()
		if d.ActionPhase.TotalActionFees != nil { // the part of it that is in the transaction's fees
			forward -= d.ActionPhase.TotalActionFees.Nano().Int64()
		}
	}
	return tx.TotalFees.Coins.Nano().Int64(), forward
}

// last are the fees of the channel's last transaction, those for forwarding included.
func (w *channelWorld) last() int64 {
	w.Helper()
	list, err := w.chain.Transactions(w.registry)
	if err != nil {
		w.Fatal(err)
	}
	total, forward := w.fees(list[len(list)-1])
	return total + forward
}

// TestChannelLife opens, tops up, claims in both ways, and closes in both ways. After
// each step everybody's balance is what it must be, to the nanoton. Nothing in this
// world has a contract but the channel, so nobody else pays fees but for storage.
func TestChannelLife(t *testing.T) {
	if got := ChannelCode().Hash(); !bytes.Equal(got, voucher.CodeHash[:]) {
		t.Errorf("the code's hash is %x", got)
	}
	w := openChannel(t)
	held := int64(deposit) - w.last()
	check := func(what string, channel int64) {
		t.Helper()
		if got := w.balance(w.registry); got != channel {
			t.Errorf("%s: the channel has %d, not %d", what, got, channel)
		}
	}
	check("open", held)
	if v, err := Channel(w.chain.Account(w.registry).StateInit.Data).Version(); v != ChannelVersion || err != nil {
		t.Errorf("version %d, %v", v, err)
	}
	if s := w.state(); s != (ChannelState{w.terms, ChannelOpen, 0, 0}) {
		t.Errorf("%+v", s)
	}

	r := w.send(stranger, ton/2, TopUp(), nil)
	held += ton/2 - w.last()
	check("top-up by anyone", held)
	if r.exit != 0 || r.back != 0 {
		t.Errorf("top-up: %+v", r)
	}

	// By a stranger's internal message: the payee gets all of it, the stranger pays.
	before := w.balance(payee)
	r = w.send(stranger, plenty, Claim(7, w.voucher(ton/10)), nil)
	held -= ton / 10
	check("claim by a stranger", held)
	if got := w.balance(payee) - before; r.exit != 0 || got != ton/10 {
		t.Errorf("the payee got %d: %+v", got, r)
	}
	if want := plenty - w.last(); r.back != want {
		t.Errorf("%d came back, not %d", r.back, want)
	}
	// By the payee's own: what is left of the value comes with the money.
	r = w.send(payee, plenty, Claim(7, w.voucher(ton/10+1)), nil)
	held--
	check("claim of a nanoton by the payee", held)
	if want := plenty + 1 - w.last(); r.exit != 0 || r.back != want {
		t.Errorf("%d came back, not %d: %+v", r.back, want, r)
	}
	// By an external message: the payee pays all of it.
	before = w.balance(payee)
	total := uint64(ton/10 + 1 + MinDifference)
	tx, exit := w.external(ExternalClaim(w.voucher(total)))
	if exit != 0 {
		t.Fatalf("external: %s", ExplainChannel(exit))
	}
	held -= MinDifference
	check("external claim", held)
	if got := w.balance(payee) - before; got != MinDifference-w.last() || w.last() < 500_000 {
		t.Errorf("the payee got %d, fees are %d", got, w.last())
	}
	t.Logf("an external claim costs %d nanotons and %d gas", w.last(), gasOf(tx))
	if s := w.state(); s.Claimed != total || s.Status != ChannelOpen {
		t.Errorf("%+v", s)
	}

	// The payer begins to close, the payee still claims, also late, and nobody else
	// can end it.
	r = w.send(payer, plenty, BeginClose(7), nil)
	check("begin to close", held)
	if want := plenty - w.last(); r.exit != 0 || r.back != want {
		t.Errorf("%d came back, not %d: %+v", r.back, want, r)
	}
	if s := w.state(); s.Status != ChannelClosing || s.ClosingAt != uint64(w.now.Unix())+channelDelay {
		t.Errorf("%+v", s)
	}
	w.now = w.now.Add(channelDelay * time.Second)
	storage := held
	r = w.send(stranger, plenty, Claim(7, w.voucher(total+5)), nil)
	held = w.balance(w.registry)
	if storage -= held + 5; r.exit != 0 || storage < 0 || storage > 1000 {
		t.Errorf("a claim while it is closing: %+v; rent %d", r, storage)
	}
	r = w.send(payer, plenty, FinishClose(7), nil)
	// The payer's own account has paid rent in that hour.
	list, err := w.chain.Transactions(payer)
	if err != nil {
		t.Fatal(err)
	}
	rent, _ := w.fees(list[len(list)-1])
	if got, want := r.back, plenty+held-w.last()-rent; r.exit != 0 || got != want || !w.gone() {
		t.Errorf("the payer got %d, not %d: %+v", got, want, r)
	}
	if w.balance(w.registry) != 0 {
		t.Error("something is left in the channel")
	}

	for _, last := range []uint64{0, ton / 3, deposit - 10_000_000} {
		w := openChannel(t)
		held := w.balance(w.registry)
		payerBefore := w.balance(payer)
		var v *voucher.Voucher
		if last > 0 {
			v = new(w.voucher(last))
		}
		r := w.send(payee, plenty, CloseChannel(7, v), nil)
		if want := plenty + int64(last) - w.last(); r.exit != 0 || r.back != want || !w.gone() {
			t.Errorf("close by the payee: it got %d, not %d: %+v", r.back, want, r)
		}
		if got := w.balance(payer) - payerBefore; got != held-int64(last) {
			t.Errorf("close by the payee: the payer got %d, not %d", got, held-int64(last))
		}
	}
	// All of it, to the last nanoton, while it closes.
	w = openChannel(t)
	w.send(payer, plenty, BeginClose(7), nil)
	all := w.voucher(uint64(w.balance(w.registry)))
	payerBefore := w.balance(payer)
	if r := w.send(payee, plenty, CloseChannel(7, &all), nil); r.exit != 0 || r.back != plenty+int64(all.Total)-w.last() || w.balance(payer) != payerBefore {
		t.Errorf("close with everything: %+v", r)
	}
}

func gasOf(tx *tlb.Transaction) int64 {
	phase, _ := tx.Description.(tlb.TransactionDescriptionOrdinary).ComputePhase.Phase.(tlb.ComputePhaseVM)
	return phase.Details.GasUsed.Int64()
}

// TestChannelRefusals is every way in which a channel refuses an internal message:
// each bounces and changes nothing.
func TestChannelRefusals(t *testing.T) {
	fresh := newChannel(t)
	// Somebody else brings the code along.
	fresh.send(stranger, ton, OpenChannel(7), ChannelStateInit(fresh.terms))
	open := openChannel(t)
	open.send(stranger, plenty, Claim(7, open.voucher(1000)), nil)
	closing := openChannel(t)
	closing.send(payer, plenty, BeginClose(7), nil)

	other := channelTerms()
	other.Salt++
	elsewhere := voucher.Sign(payerKey, open.terms.GlobalID, voucher.Channel(ChannelAddress(other).Data()), 2000)
	network := voucher.Sign(payerKey, -239, open.id, 2000)
	forged := voucher.Sign(auditor(7), open.terms.GlobalID, open.id, 2000)
	moved, renamed := elsewhere, network
	moved.Channel, renamed.GlobalID = open.id, open.terms.GlobalID
	raised := open.voucher(2000)
	raised.Total++
	held := uint64(open.balance(open.registry))
	short := cell.BeginCell().MustStoreUInt(opClaim, 32).MustStoreUInt(7, 64).EndCell()
	last := open.voucher(1000 + held + 1)
	for _, tt := range []struct {
		name  string
		w     *channelWorld
		from  *address.Address
		value int64
		body  *cell.Cell
		exit  int32
	}{
		{"begin to close by the payee", open, payee, plenty, BeginClose(7), 200},
		{"begin to close by a stranger", open, stranger, plenty, BeginClose(7), 200},
		{"open by a stranger", open, stranger, plenty, OpenChannel(7), 200},
		{"finish by a stranger", closing, stranger, plenty, FinishClose(7), 200},
		{"finish by the payee", closing, payee, plenty, FinishClose(7), 200},
		{"close by the payer", open, payer, plenty, CloseChannel(7, nil), 201},
		{"close by a stranger with a voucher", open, stranger, plenty, CloseChannel(7, new(open.voucher(2000))), 201},
		{"open again", open, payer, plenty, OpenChannel(7), 203},
		{"open what is closing", closing, payer, plenty, OpenChannel(7), 203},
		{"begin to close twice", closing, payer, plenty, BeginClose(7), 204},
		{"top up what is closing", closing, payer, plenty, TopUp(), 204},
		{"finish without beginning", open, payer, plenty, FinishClose(7), 205},
		{"finish early", closing, payer, plenty, FinishClose(7), 205},
		{"a voucher for another network", open, stranger, plenty, Claim(7, network), 206},
		{"a voucher for another channel", open, stranger, plenty, Claim(7, elsewhere), 207},
		{"a voucher for another channel, renamed", open, stranger, plenty, Claim(7, moved), 208},
		{"a voucher for another network, renamed", open, stranger, plenty, Claim(7, renamed), 208},
		{"a voucher by another key", open, stranger, plenty, Claim(7, forged), 208},
		{"a voucher with another total", open, stranger, plenty, Claim(7, raised), 208},
		{"a close with a forged voucher", open, payee, plenty, CloseChannel(7, &forged), 208},
		{"the same voucher again", open, stranger, plenty, Claim(7, open.voucher(1000)), 209},
		{"a voucher for less", open, stranger, plenty, Claim(7, open.voucher(999)), 209},
		{"a voucher for nothing", open, stranger, plenty, Claim(7, open.voucher(0)), 209},
		{"a close with a stale voucher", open, payee, plenty, CloseChannel(7, new(open.voucher(1000))), 209},
		{"too little for a claim", open, stranger, 900_000, Claim(7, open.voucher(2000)), 211},
		{"too little for a close", open, payee, 900_000, CloseChannel(7, nil), 211},
		{"too little for a beginning", open, payer, 900_000, BeginClose(7), 211},
		{"a voucher for more than there is", open, stranger, plenty, Claim(7, last), 212},
		{"a voucher for far more than there is", open, stranger, plenty, Claim(7, open.voucher(1<<64-1)), 212},
		{"a close with more than there is", open, payee, plenty, CloseChannel(7, &last), 212},
		{"an unknown operation", open, payer, plenty, begin(0x43430007, 7).EndCell(), 0xffff},
		{"an external claim by an internal message", open, payer, plenty, begin(opExternalClaim, 7).EndCell(), 0xffff},
		{"a comment", open, payer, plenty, begin(0, 7).EndCell(), 0xffff},
		{"half an operation", open, payer, plenty, cell.BeginCell().MustStoreUInt(0x4343, 16).EndCell(), 0xffff},
		{"a claim cut short", open, payer, plenty, short, 9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *tt.w
			w.world = new(*tt.w.world)
			w.T = t
			before, balance, paid := w.state(), w.balance(w.registry), w.balance(payee)
			r := w.send(tt.from, tt.value, tt.body, nil)
			if r.exit != tt.exit || !r.bounce {
				t.Errorf("exit code %d (%s), bounced %t", r.exit, ExplainChannel(r.exit), r.bounce)
			}
			if w.state() != before {
				t.Error("the state changed")
			}
			if now := w.balance(w.registry); now != balance {
				t.Errorf("the balance went from %d to %d", balance, now)
			}
			if got := w.balance(payee) - paid; tt.from != payee && got != 0 {
				t.Errorf("the payee got %d", got)
			}
			if r.back <= 0 && tt.value == plenty {
				t.Errorf("%d of %d came back", r.back, r.value)
			}
		})
	}
}

// TestChannelReopened makes a channel anew that was closed: nothing counts but the
// payer's own words.
func TestChannelReopened(t *testing.T) {
	w := openChannel(t)
	v := w.voucher(ton / 2)
	w.send(payee, plenty, CloseChannel(7, &v), nil)
	if !w.gone() {
		t.Fatal("it is not closed")
	}
	if _, exit := w.external(ExternalClaim(v)); exit != -1 || !w.gone() {
		t.Fatal("an external message made it anew")
	}
	// The payee, or anyone, brings the code along, and somebody has sent money.
	for _, tt := range []struct {
		name string
		from *address.Address
		body *cell.Cell
		exit int32
	}{
		{"claim", payee, Claim(7, v), 202},
		{"close", payee, CloseChannel(7, nil), 202},
		{"top-up", stranger, TopUp(), 202},
		{"begin to close", payer, BeginClose(7), 202},
		{"open", payee, OpenChannel(7), 200},
		{"finish", payee, FinishClose(7), 200},
	} {
		if err := w.chain.Fund(w.registry, big.NewInt(ton)); err != nil {
			t.Fatal(err)
		}
		paid := w.balance(payee)
		if r := w.send(tt.from, plenty, tt.body, ChannelStateInit(w.terms)); r.exit != tt.exit {
			t.Errorf("%s: %+v: %s", tt.name, r, ExplainChannel(r.exit))
		}
		if got := w.balance(payee) - paid; got > 0 && tt.from != payee || got > plenty {
			t.Errorf("%s: the payee got %d", tt.name, got)
		}
	}
	// The payer gets back what was sent there by mistake.
	before := w.balance(w.registry)
	if r := w.send(payer, plenty, FinishClose(7), ChannelStateInit(w.terms)); r.exit != 0 || r.back != before+plenty-w.last() || !w.gone() {
		t.Errorf("%+v", r)
	}
	// Too little, or for another network.
	if r := w.send(payer, ChannelRent, OpenChannel(7), ChannelStateInit(w.terms)); r.exit != 211 {
		t.Errorf("opened with the rent alone: %+v", r)
	}
	w.terms.GlobalID = -239
	w.registry = ChannelAddress(w.terms)
	if r := w.send(payer, deposit, OpenChannel(7), ChannelStateInit(w.terms)); r.exit != 206 {
		t.Errorf("for another network: %+v", r)
	}
}

// TestChannelExternal is every way in which a channel does not accept an external
// message, for which nobody pays then.
func TestChannelExternal(t *testing.T) {
	w := openChannel(t)
	w.send(stranger, plenty, Claim(7, w.voucher(1000)), nil)
	held := uint64(w.balance(w.registry))
	const enough = 1000 + MinDifference
	other := channelTerms()
	other.Salt++
	elsewhere := voucher.Sign(payerKey, w.terms.GlobalID, voucher.Channel(ChannelAddress(other).Data()), enough)
	forged := voucher.Sign(auditor(7), w.terms.GlobalID, w.id, enough)
	network := voucher.Sign(payerKey, -239, w.id, enough)
	to := func(v voucher.Voucher) *cell.Cell { // whatever the voucher names, sent to this channel
		body := storeVoucher(cell.BeginCell().MustStoreUInt(opExternalClaim, 32), v).EndCell()
		return message(w.registry, nil, body)
	}
	good := to(w.voucher(enough))
	if !bytes.Equal(good.Hash(), ExternalClaim(w.voucher(enough)).Hash()) {
		t.Fatal("the messages differ")
	}
	body := storeVoucher(cell.BeginCell().MustStoreUInt(opExternalClaim, 32), w.voucher(enough))
	for _, tt := range []struct {
		name string
		m    *cell.Cell
		exit int32
	}{
		{"the same voucher again", to(w.voucher(1000)), 209},
		{"for less", to(w.voucher(999)), 209},
		{"for too little more", to(w.voucher(enough - 1)), 210},
		{"for one nanoton more", to(w.voucher(1001)), 210},
		{"for more than there is", to(w.voucher(1000 + held + 1)), 212},
		{"for far more than there is", to(w.voucher(1<<64 - 1)), 212},
		{"another channel", to(elsewhere), 207},
		{"another network", to(network), 206},
		{"another key", to(forged), 208},
		{"with code", message(w.registry, ChannelStateInit(w.terms), body.EndCell()), 213},
		{"with another cell", message(w.registry, nil, cell.BeginCell().MustStoreBuilder(body).MustStoreRef(Snake(nil)).EndCell()), 213},
		{"with a bit more", message(w.registry, nil, cell.BeginCell().MustStoreBuilder(body).MustStoreUInt(1, 1).EndCell()), 9},
		{"nothing", message(w.registry, nil, cell.BeginCell().EndCell()), 0xffff},
		{"an internal claim", message(w.registry, nil, Claim(7, w.voucher(enough))), 0xffff},
		{"open", message(w.registry, nil, OpenChannel(7)), 0xffff},
	} {
		before := w.state()
		tx, exit := w.external(tt.m)
		if tx != nil || exit != tt.exit {
			t.Errorf("%s: exit code %d (%s), accepted %t", tt.name, exit, ExplainChannel(exit), tx != nil)
		}
		if w.state() != before || uint64(w.balance(w.registry)) != held {
			t.Errorf("%s: something changed", tt.name)
		}
	}
	// Whatever is claimed, what the deposit pays is exactly that.
	if _, exit := w.external(ExternalClaim(w.voucher(1000 + held))); exit != 0 || w.balance(w.registry) != 0 {
		t.Errorf("all of it: exit code %d, %d is left", exit, w.balance(w.registry))
	}
	if _, exit := w.external(ExternalClaim(w.voucher(1000 + held))); exit != -1 {
		t.Errorf("again, with nothing left: exit code %d", exit)
	}
	w.send(stranger, ton, TopUp(), nil)
	if _, exit := w.external(ExternalClaim(w.voucher(1000 + held))); exit != 209 {
		t.Errorf("again: exit code %d", exit)
	}
}

func message(to *address.Address, init *tlb.StateInit, body *cell.Cell) *cell.Cell {
	b := cell.BeginCell().MustStoreUInt(0b1000, 4).MustStoreAddr(to).MustStoreUInt(0, 4)
	if init == nil {
		b.MustStoreBoolBit(false)
	} else {
		c, err := tlb.ToCell(init)
		if err != nil {
			panic(err)
		}
		b.MustStoreUInt(0b11, 2).MustStoreRef(c)
	}
	return b.MustStoreBoolBit(true).MustStoreRef(body).EndCell()
}

// TestChannelIdle lets a channel lie for a year, and for ten: the rent that it was
// opened with pays for that, and a voucher that leaves it there is good still.
func TestChannelIdle(t *testing.T) {
	for years, external := range map[int]bool{1: false, 6: true} {
		w := openChannel(t)
		before := w.balance(w.registry)
		cover := uint64(before) - ChannelRent
		w.now = w.now.Add(time.Duration(years) * 365 * 24 * time.Hour)
		if external {
			if _, exit := w.external(ExternalClaim(w.voucher(cover))); exit != 0 {
				t.Fatalf("%s", ExplainChannel(exit))
			}
		} else if r := w.send(stranger, plenty, Claim(7, w.voucher(cover)), nil); r.exit != 0 {
			t.Fatalf("%+v: %s", r, ExplainChannel(r.exit))
		}
		rent := ChannelRent - w.balance(w.registry)
		if rent < 0 || rent > ChannelRent {
			t.Errorf("%d years: the rent is %d", years, rent)
		}
		t.Logf("%d years idle cost %d nanotons", years, rent)
	}
}

// TestChannelFees prints what the operations take at the mainnet's prices of June
// 2026, which are the devnet's.
func TestChannelFees(t *testing.T) {
	w := newChannel(t)
	line := func(what string, r result) {
		t.Helper()
		if r.exit != 0 {
			t.Fatalf("%s: %s", what, ExplainChannel(r.exit))
		}
		if r.gas > 12000 {
			t.Errorf("%s: %d gas are more than the contract reckons with", what, r.gas)
		}
		t.Logf("%-28s %6d gas  %9d nanotons", what, r.gas, w.last())
	}
	line("open", w.send(payer, deposit, OpenChannel(7), ChannelStateInit(w.terms)))
	line("top-up", w.send(payer, deposit, TopUp(), nil))
	line("claim by anyone", w.send(stranger, plenty, Claim(7, w.voucher(ton/10)), nil))
	line("claim by the payee", w.send(payee, plenty, Claim(7, w.voucher(ton/5)), nil))
	tx, _ := w.external(ExternalClaim(w.voucher(ton / 2)))
	line("claim by an external message", result{gas: gasOf(tx)})
	line("begin to close", w.send(payer, plenty, BeginClose(7), nil))
	line("close with a voucher", w.send(payee, plenty, CloseChannel(7, new(w.voucher(ton))), nil))
}

// TestChannelMalformed reads the state of what is no channel.
func TestChannelMalformed(t *testing.T) {
	good := ChannelState{channelTerms(), ChannelOpen, 5, 0}
	if got, err := Channel(channelData(good)).Channel(); err != nil || got != good {
		t.Fatalf("%+v, %v", got, err)
	}
	bad := func(change func(*ChannelState)) *cell.Cell {
		s := good
		change(&s)
		return channelData(s)
	}
	for name, data := range map[string]*cell.Cell{
		"empty":          cell.BeginCell().EndCell(),
		"noise":          cell.BeginCell().MustStoreSlice(bytes.Repeat([]byte{0xa5}, 100), 800).EndCell(),
		"a bit more":     cell.BeginCell().MustStoreBuilder(channelData(good).ToBuilder()).MustStoreUInt(0, 1).EndCell(),
		"a cell more":    cell.BeginCell().MustStoreBuilder(channelData(good).ToBuilder()).MustStoreRef(Snake(nil)).EndCell(),
		"status 3":       bad(func(s *ChannelState) { s.Status = 3 }),
		"open, closing":  bad(func(s *ChannelState) { s.ClosingAt = 1 }),
		"claimed, new":   bad(func(s *ChannelState) { s.Status = ChannelNew }),
		"a registry's":   Data(owner),
		"closing, a new": bad(func(s *ChannelState) { s.Status, s.Claimed, s.ClosingAt = ChannelNew, 0, 9 }),
	} {
		if s, err := Channel(data).Channel(); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// FuzzChannel reads whatever an account's data can be.
func FuzzChannel(f *testing.F) {
	f.Add(channelData(ChannelState{channelTerms(), ChannelOpen, 5, 0}).ToBOC())
	f.Add(channelData(ChannelState{channelTerms(), ChannelClosing, 5, 9}).ToBOC())
	f.Fuzz(func(t *testing.T, boc []byte) {
		c, err := cell.FromBOC(boc)
		if err != nil {
			return
		}
		// A bag can give a cell a level that its contents do not; such a cell has a hash
		// that no cell of a chain has, and so no proof.
		if !bytes.Equal(c.ToBuilder().EndCell().Hash(), c.Hash()) {
			return
		}
		s, err := Channel(c).Channel()
		if err == nil && !bytes.Equal(channelData(s).Hash(), c.Hash()) {
			t.Errorf("%+v is read from another state", s)
		}
	})
}
