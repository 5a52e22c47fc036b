package till

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"
	"golang.org/x/sys/unix"

	"chrysalis/channel"
	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/guest"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

const (
	ton   = 1_000_000_000
	model = "acme/model@1"
	step  = 1_000_000
)

// price is a nanoton a token, for either kind.
var price = pay.Price{Prompt: 1_000_000, Completion: 1_000_000}

// net is a chain with one liteserver, a payer, an owner with a wallet, and a clock
// that can be set forward.
type net struct {
	testing.TB
	chain   *devnet.Chain
	server  atomic.Pointer[devnet.Server]
	listen  string
	timeout time.Duration // of a query
	ahead   atomic.Int64

	payer, owner *registry.Publisher
	key          ed25519.PrivateKey // signs vouchers
	client       *lite.Client
}

func (n *net) now() time.Time { return time.Now().Add(time.Duration(n.ahead.Load())) }

func newNet(t testing.TB) *net {
	t.Helper()
	// An address that nobody else binds, so that its port stays free while the server is away.
	n := &net{TB: t, key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32)), listen: "127.0.0.2:0", timeout: 10 * time.Second}
	c, err := devnet.Open(devnet.Options{Now: n.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	n.chain = c
	n.serve()
	n.listen = n.server.Load().Addr() // where it is found again
	t.Cleanup(func() { n.server.Load().Close() })
	if n.client, err = n.connect(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.client.Close)
	n.payer, n.owner = n.wallet(1), n.wallet(2)
	return n
}

func (n *net) serve() {
	n.Helper()
	var err error
	for range 50 {
		var server *devnet.Server
		if server, err = n.chain.Serve(n.listen); err == nil {
			n.server.Store(server)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	n.Fatal(err)
}

func (n *net) connect() (*lite.Client, error) {
	network := lite.Network{GlobalID: n.chain.GlobalID()}
	if err := network.ReadGlobalConfig(n.chain.GlobalConfig(n.server.Load())); err != nil {
		return nil, err
	}
	return lite.New(network, lite.Options{Timeout: n.timeout, Now: n.now})
}

func (n *net) wallet(seed byte) *registry.Publisher {
	n.Helper()
	w, err := registry.NewWallet(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32)), "v5r1", n.chain.GlobalID())
	if err != nil {
		n.Fatal(err)
	}
	if err := n.chain.Fund(w.Address.Std(), big.NewInt(10*ton)); err != nil {
		n.Fatal(err)
	}
	return &registry.Publisher{Reader: registry.Reader{Client: n.client}, Wallet: w, Wait: 20 * time.Second}
}

func (n *net) terms(change ...func(*channel.Terms)) channel.Terms {
	t := channel.Terms{
		PayerKey: voucher.Key(n.key.Public().(ed25519.PublicKey)), Payer: n.payer.Wallet.Address.ID, Payee: n.owner.Wallet.Address.ID,
		Salt: channel.NewSalt(), Delay: 3600, GlobalID: n.chain.GlobalID(),
	}
	for _, f := range change {
		f(&t)
	}
	return t
}

func (n *net) raw(to lite.Address, value int64, body *cell.Cell, init *tlb.StateInit) {
	n.Helper()
	message, err := tlb.ToCell(&tlb.InternalMessage{
		IHRDisabled: true, Bounce: true, SrcAddr: n.payer.Wallet.Address.Std(), DstAddr: to.Std(), Amount: tlb.FromNanoTON(big.NewInt(value)),
		StateInit: init, Body: body,
	})
	if err == nil {
		err = n.chain.Send(message)
	}
	if err != nil {
		n.Fatal(err)
	}
}

// open opens a channel with no wallet in between, which is quick.
func (n *net) open(t channel.Terms, deposit int64) voucher.Channel {
	n.Helper()
	a := channel.Address(t)
	n.raw(a, deposit, contract.OpenChannel(1), contract.ChannelStateInit(t))
	return voucher.Channel(a.ID)
}

func (n *net) voucher(id voucher.Channel, total uint64) voucher.Voucher {
	return voucher.Sign(n.key, devnet.DefaultGlobalID, id, total)
}

func (n *net) read(id voucher.Channel) *channel.State {
	n.Helper()
	view, err := n.client.Sync(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	s, err := channel.Read(n.Context(), view, lite.Address{ID: id})
	if err != nil {
		n.Fatal(err)
	}
	return s
}

func (n *net) balance(a lite.Address) uint64 {
	if s := n.chain.Account(a.Std()); s != nil && s.IsValid {
		return s.Balance.Nano().Uint64()
	}
	return 0
}

// vm is the control port of a VM, with the agent's own book.
type vm struct {
	mu     sync.Mutex
	book   *pay.Book
	paid   *guest.ControlPayment
	wanted map[voucher.Channel]bool
	deaf   bool
	asked  int                 // how often channels were wanted
	forge  *guest.ControlReply // is told until it is acknowledged, and once at least
	forged bool
}

func newVM(t testing.TB, network int32) *vm {
	t.Helper()
	book, err := pay.NewBook(network, [32]byte{7}, pay.Tariff{Step: step, Models: map[string]pay.Price{model: price}}, 64)
	if err != nil {
		t.Fatal(err)
	}
	return &vm{book: book, wanted: map[voucher.Channel]bool{}}
}

func (v *vm) Control(ctx context.Context, r guest.ControlRequest) (guest.ControlReply, error) {
	v.mu.Lock()
	deaf := v.deaf
	v.mu.Unlock()
	if deaf {
		return guest.ControlReply{}, errors.New("no answer")
	}
	done := func(err error) (guest.ControlReply, error) {
		if err != nil {
			return guest.ControlReply{Error: guest.ErrorRefused}, nil
		}
		return guest.ControlReply{OK: true}, nil
	}
	switch r.Op {
	case guest.OpPrices:
		err := v.book.SetPrices(pay.Tariff{Step: step, Models: map[string]pay.Price{model: r.Payment.Prices[0]}})
		v.mu.Lock()
		v.paid = r.Payment
		v.mu.Unlock()
		return done(err)
	case guest.OpDrop:
		id, err := voucher.ParseChannel(r.Channel)
		if err == nil && !v.book.Drop(id) {
			err = errors.New("in use")
		}
		return done(err)
	case guest.OpAdmit:
		a := pay.Admission{Limit: r.Admit.Limit, Used: r.Admit.Used, Closing: r.Admit.Closing}
		var err error
		if a.Channel, err = voucher.ParseChannel(r.Admit.Channel); err != nil {
			return done(err)
		}
		key, err := hex.DecodeString(r.Admit.Key)
		if err != nil {
			return done(err)
		}
		a.Key = voucher.Key(key)
		if r.Admit.Best != "" {
			best, err := voucher.Parse(r.Admit.Best)
			if err != nil {
				return done(err)
			}
			a.Best = &best
		}
		return done(v.book.Admit(a))
	}
	wait := time.After(min(time.Duration(r.WaitMS)*time.Millisecond, 20*time.Millisecond))
	for {
		v.mu.Lock()
		if f := v.forge; f != nil {
			defer v.mu.Unlock()
			if v.forged && r.Ack == f.Batch {
				v.forge, v.forged = nil, false
				return guest.ControlReply{OK: true}, nil
			}
			v.forged = true
			return *f, nil
		}
		reply := guest.ControlReply{OK: true}
		for id := range v.wanted {
			if len(reply.Wanted) < guest.MaxWanted {
				reply.Wanted = append(reply.Wanted, id.String())
				delete(v.wanted, id)
			}
		}
		v.mu.Unlock()
		room := 8
		batch, list, err := v.book.Collect(r.Ack, func(pay.Balance) bool { room--; return room >= 0 })
		if err != nil {
			return done(err)
		}
		reply.Batch = batch
		for _, b := range list {
			balance := guest.Balance{Channel: b.Channel.String()}
			if b.Best != nil {
				balance.Voucher = b.Best.String()
			}
			for _, u := range b.Uses {
				balance.Uses = append(balance.Uses, guest.Use{
					Requests: u.Requests, PromptTokens: u.PromptTokens, CompletionTokens: u.CompletionTokens, Earned: u.Earned,
				})
			}
			reply.Balances = append(reply.Balances, balance)
		}
		if batch > 0 || len(reply.Wanted) > 0 {
			return reply, nil
		}
		select {
		case <-v.book.Tell():
		case <-time.After(2 * time.Millisecond):
		case <-wait:
			return reply, nil
		}
	}
}

// session waits until the channel is served on, at most so long.
func (v *vm) session(n *net, id voucher.Channel, wait time.Duration) (pay.Session, bool) {
	payer := pay.SignPayer(n.key, id, [32]byte{7})
	for deadline := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		s, err := v.book.Session(payer)
		if err == nil {
			return s, true
		}
		if time.Now().After(deadline) {
			return s, false
		}
		v.mu.Lock()
		v.wanted[id] = true
		v.asked++
		v.mu.Unlock()
	}
}

// pay hands a voucher in and waits until it covers.
func (v *vm) pay(n *net, w voucher.Voucher, wait time.Duration) bool {
	s, err := v.book.Session(pay.SignPayer(n.key, w.Channel, [32]byte{7}))
	if err != nil || v.book.Pay(w) != nil {
		return false
	}
	for deadline := time.Now().Add(wait); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if v.book.Covers(s, w.Total) {
			return true
		}
	}
	return false
}

// use serves so many tokens.
func (v *vm) use(n *net, id voucher.Channel, tokens int64) error {
	s, err := v.book.Session(pay.SignPayer(n.key, id, [32]byte{7}))
	if err != nil {
		return err
	}
	r, err := v.book.Start(s, model, tokens, 0)
	if err != nil {
		return err
	}
	r.End(&pay.Usage{Prompt: tokens}, true)
	return nil
}

// log is a till's log, which tests look into.
type log struct {
	mu    sync.Mutex
	lines []string
}

func (l *log) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

// has reports whether a line has all of these texts.
func (l *log) has(texts ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.lines, func(line string) bool {
		return !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) })
	})
}

// counting counts what is read. While it is locked, nothing is.
type counting struct {
	Chain
	sync.Mutex
	reads, channels atomic.Int64
}

func (c *counting) Read(ctx context.Context, ids []voucher.Channel) ([]Reading, error) {
	c.Lock()
	defer c.Unlock()
	c.reads.Add(1)
	c.channels.Add(int64(len(ids)))
	return c.Chain.Read(ctx, ids)
}

func (n *net) options(dir string, v VM, l *log) Options {
	return Options{
		Terms: Terms{GlobalID: n.chain.GlobalID(), Payee: n.owner.Wallet.Address, MinDeposit: ton / 10, MinDelay: time.Hour},
		Name:  "worker", Models: []string{model}, Ceilings: []pay.Price{price},
		Policy: store.Policy{Threshold: ton / 2, Age: 24 * time.Hour, Minimum: 5_000_000},
		Dir:    dir + "/till", Holders: dir + "/holders", VM: v, Chain: &TON{Connect: n.connect}, Log: l.printf, Now: n.now, Tick: 10 * time.Millisecond,
	}
}

// run starts a till, which the test's end closes.
func (n *net) run(o Options) *Till {
	n.Helper()
	t, err := New(o)
	if err != nil {
		n.Fatal(err)
	}
	go t.Run(context.Background())
	n.Cleanup(func() { t.Close() })
	return t
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// TestPaid is a till's life: terms are told, a channel is admitted, vouchers are
// durable before they count, uses are earned, prices change below their ceilings, and
// in the end everything is claimed to the nanoton.
func TestPaid(t *testing.T) {
	n := newNet(t)
	v, l, dir := newVM(t, n.chain.GlobalID()), &log{}, t.TempDir()
	o := n.options(dir, v, l)
	till := n.run(o)
	id := n.open(n.terms(), ton)
	if _, ok := v.session(n, id, 10*time.Second); !ok {
		t.Fatalf("a good channel is not served on: %v", l.lines)
	}
	v.mu.Lock()
	paid := *v.paid
	v.mu.Unlock()
	if paid.Payee != voucher.Channel(o.Payee.ID).String() || paid.MinDeposit != ton/10 || paid.MinDelay != 3600 || !slices.Equal(paid.Prices, []pay.Price{price}) {
		t.Errorf("the VM was told %+v", paid)
	}
	if err := v.use(n, id, 100); !errors.Is(err, pay.ErrNoCover) {
		t.Errorf("served without cover: %v", err)
	}
	if !v.pay(n, n.voucher(id, 20*step), 5*time.Second) {
		t.Fatal("a voucher does not count")
	}
	for range 3 {
		if err := v.use(n, id, 1_000_000); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "what was used is known", func() bool { return till.State().Earned == 3_000_000 })
	// Another price; what has been paid is served at the one of then.
	half := pay.Price{Prompt: price.Prompt / 2}
	if err := till.SetPrices(t.Context(), []pay.Price{half}); err != nil || till.Prices()[0] != half {
		t.Errorf("%v, %v", err, till.Prices())
	}
	for name, bad := range map[string][]pay.Price{"above": {{Prompt: price.Prompt + 1}}, "below nothing": {{Prompt: -1}}, "too many": {half, half}, "none": nil} {
		if err := till.SetPrices(t.Context(), bad); err == nil || till.Prices()[0] != half {
			t.Errorf("prices %s: %v", name, err)
		}
	}
	st := till.State()
	if st.Channels != 1 || st.Pending != 20*step || st.Claimed != 0 || len(st.Trouble) > 0 || st.Models[0].Price != half || st.Models[0].Ceiling != price {
		t.Errorf("%+v", st)
	}

	// Used in the last moment, and then the end.
	if err := v.use(n, id, 1_000_000); err != nil {
		t.Fatal(err)
	}
	before := n.balance(o.Payee)
	if err := till.Finish(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	s := n.read(id)
	if s.Claimed != 20*step {
		t.Errorf("%d is claimed", s.Claimed)
	}
	rows := till.rows(t, o)
	sum := store.Total(rows)
	if sum.Earned != 4_000_000 || sum.Claimed != 4_000_000 || sum.Requests != 4 || sum.PromptTokens != 4_000_000 || sum.Lost != 0 || sum.Fees == 0 {
		t.Errorf("%+v", sum)
	}
	// What lies between is what the owner's account took for the message.
	if got, want := n.balance(o.Payee)-before, 20*step-sum.Fees-n.received(o.Payee); got != want {
		t.Errorf("the owner got %d, not %d", got, want)
	}

	// Another VM of this name goes on where this one ended.
	v = newVM(t, n.chain.GlobalID())
	o.VM = v
	n.run(o)
	s2, ok := v.session(n, id, 10*time.Second)
	if !ok {
		t.Fatal("not admitted again")
	}
	if c, _ := v.book.Credit(s2); c.Used != 4_000_000 || c.Cover != 20*step {
		t.Errorf("%+v", c)
	}
	// But on another one of this owner's it is not served on.
	other, elsewhere := newVM(t, n.chain.GlobalID()), &log{}
	o2 := n.options(dir, other, elsewhere)
	o2.Name, o2.Dir = "other", dir+"/other"
	n.run(o2)
	eventually(t, "it is said who has the channel", func() bool {
		other.session(n, id, time.Millisecond) // names it
		return elsewhere.has(id.String(), ErrHeld.Error())
	})
	if _, ok := other.session(n, id, 500*time.Millisecond); ok {
		t.Error("served on by two VMs")
	}
}

// rows reads what a till that is closed has left.
func (t *Till) rows(tb testing.TB, o Options) []store.Row {
	tb.Helper()
	s, err := store.Open(o.Dir)
	if err != nil {
		tb.Fatal(err)
	}
	defer s.Close()
	return s.Earnings()
}

// received is what an account's last transaction took for itself.
func (n *net) received(a lite.Address) uint64 {
	n.Helper()
	txs, err := n.chain.Transactions(a.Std())
	if err != nil {
		n.Fatal(err)
	}
	return txs[len(txs)-1].TotalFees.Coins.Nano().Uint64()
}

// TestBadChannels names every kind of channel that nobody must serve on. None is
// admitted, and nobody's balance but its own payer's is another afterwards.
func TestBadChannels(t *testing.T) {
	n := newNet(t)
	v, l := newVM(t, n.chain.GlobalID()), &log{}
	o := n.options(t.TempDir(), v, l)
	o.Chain.(*TON).Wallet = nil
	n.run(o)
	stranger := n.wallet(3)

	foreign := n.terms()
	data := cell.BeginCell().MustStoreUInt(1, 2).MustStoreUInt(0, 64).MustStoreUInt(0, 40).
		MustStoreSlice(foreign.PayerKey[:], 256).MustStoreSlice(foreign.Payer[:], 256).MustStoreSlice(foreign.Payee[:], 256).
		MustStoreUInt(foreign.Salt, 64).MustStoreUInt(uint64(foreign.Delay), 32).MustStoreInt(int64(foreign.GlobalID), 32).EndCell()
	from := func(code *cell.Cell) voucher.Channel {
		init := &tlb.StateInit{Code: code, Data: data}
		c, err := tlb.ToCell(init)
		if err != nil {
			t.Fatal(err)
		}
		a := lite.Address{ID: [32]byte(c.Hash())}
		n.raw(a, ton, contract.TopUp(), init)
		return voucher.Channel(a.ID)
	}
	closing := n.open(n.terms(), ton)
	n.raw(lite.Address{ID: closing}, 10_000_000, contract.BeginClose(2), nil)
	if n.read(closing).FinishAt().IsZero() {
		t.Fatal("it is not closing")
	}
	unopened := n.terms()
	weak := n.terms(func(t *channel.Terms) { t.PayerKey = voucher.Key{1} })
	cases := []struct {
		name string
		id   voucher.Channel
		want string
	}{
		{"too short a delay", n.open(n.terms(func(t *channel.Terms) { t.Delay = 3599 }), ton), channel.ErrDelay.Error()},
		{"foreign code", from(contract.ListingCode()), channel.ErrNotChannel.Error()},
		{"a state from nowhere", from(contract.ChannelCode()), "did not begin"},
		{"closing", closing, channel.ErrClosing.Error()},
		{"another payee", n.open(n.terms(func(t *channel.Terms) { t.Payee = stranger.Wallet.Address.ID }), ton), channel.ErrPayee.Error()},
		{"too little", n.open(n.terms(), ton/10-10_000_000), channel.ErrCover.Error()},
		{"another network", n.open(n.terms(func(t *channel.Terms) { t.GlobalID = -239 }), ton), ""},
		{"a bad key", n.open(weak, ton), ""},
		{"never opened", voucher.Channel(channel.Address(unopened).ID), channel.ErrNoChannel.Error()},
		{"a wallet", voucher.Channel(stranger.Wallet.Address.ID), channel.ErrNoChannel.Error()},
	}
	balances := map[lite.Address]uint64{}
	accounts := []lite.Address{n.owner.Wallet.Address, stranger.Wallet.Address}
	for _, tt := range cases {
		accounts = append(accounts, lite.Address{ID: tt.id})
	}
	for _, a := range accounts {
		balances[a] = n.balance(a)
	}
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			if _, ok := v.session(n, tt.id, 300*time.Millisecond); ok {
				t.Error("it is served on")
			}
			eventually(t, "it is said: "+tt.want, func() bool { return l.has(tt.id.String(), tt.want) })
		})
	}
	for _, a := range accounts {
		if got := n.balance(a); got != balances[a] {
			t.Errorf("%v has %d, and had %d", a, got, balances[a])
		}
	}
	// A good one is still admitted, at exactly what the terms say.
	good := n.open(n.terms(), ton/10)
	if _, ok := v.session(n, good, 10*time.Second); !ok {
		t.Errorf("the least deposit is not enough: %v", l.lines)
	}
}

// TestRefusesVouchers has the VM say what no VM of ours would, in one batch with what
// is good: that is kept, and the rest is not.
func TestRefusesVouchers(t *testing.T) {
	n := newNet(t)
	v, l := newVM(t, n.chain.GlobalID()), &log{}
	o := n.options(t.TempDir(), v, l)
	till := n.run(o)
	a, b := n.open(n.terms(), ton), n.open(n.terms(), ton)
	for _, id := range []voucher.Channel{a, b} {
		if _, ok := v.session(n, id, 10*time.Second); !ok {
			t.Fatal("not admitted")
		}
	}
	batch := uint64(0)
	put := func(balances ...guest.Balance) {
		t.Helper()
		batch++
		v.mu.Lock()
		v.forge = &guest.ControlReply{OK: true, Batch: batch, Balances: balances}
		v.mu.Unlock()
		eventually(t, "the batch is acknowledged", func() bool {
			v.mu.Lock()
			defer v.mu.Unlock()
			return v.forge == nil
		})
	}
	forged := n.voucher(a, 30*step)
	forged.Signature[3] ^= 1
	foreign := voucher.Sign(n.key, -239, a, 30*step)
	use := func(i int, earned uint64) []guest.Use { return []guest.Use{{Model: i, Requests: 1, Earned: earned}} }
	for name, bad := range map[string]guest.Balance{
		"forged":             {Channel: a.String(), Voucher: forged.String()},
		"of another network": {Channel: a.String(), Voucher: foreign.String()},
		"of another channel": {Channel: a.String(), Voucher: n.voucher(b, 30*step).String()},
		"for too much":       {Channel: a.String(), Voucher: n.voucher(a, 2*ton).String()},
		"no voucher":         {Channel: a.String(), Voucher: "AAAA"},
		"no channel":         {Channel: "x", Voucher: n.voucher(a, 30*step).String()},
		"unknown channel":    {Channel: voucher.Channel{9}.String(), Voucher: n.voucher(a, 30*step).String()},
		"no model":           {Channel: a.String(), Uses: use(1, 5)},
		"a model below":      {Channel: a.String(), Uses: use(-1, 5)},
		"more than there is": {Channel: a.String(), Uses: use(0, 1<<63)},
	} {
		t.Run(name, func(t *testing.T) {
			before := till.State()
			good := n.voucher(b, before.Pending+1000)
			put(bad, guest.Balance{Channel: b.String(), Voucher: good.String(), Uses: use(0, 7)})
			if st := till.State(); st.Pending != before.Pending+1000 || st.Earned != before.Earned+7 {
				t.Errorf("%d pending after %d, %d earned after %d", st.Pending, before.Pending, st.Earned, before.Earned)
			}
		})
	}
	// A use counts though the voucher beside it does not.
	before := till.State()
	put(guest.Balance{Channel: a.String(), Voucher: forged.String(), Uses: use(0, 11)})
	if st := till.State(); st.Earned != before.Earned+11 || st.Pending != before.Pending {
		t.Errorf("%+v", st)
	}
	// A batch that is told again counts once.
	batch--
	put(guest.Balance{Channel: a.String(), Uses: use(0, 13)})
	if st := till.State(); st.Earned != before.Earned+11 {
		t.Errorf("told again: %+v", st)
	}
}

// TestAway stops the liteserver for an hour: what is admitted is served on, nothing
// else is, a claim is tried again, and nothing is lost.
func TestAway(t *testing.T) {
	n := newNet(t)
	n.timeout = time.Second
	v, l := newVM(t, n.chain.GlobalID()), &log{}
	o := n.options(t.TempDir(), v, l)
	till := n.run(o)
	id, late := n.open(n.terms(), ton), n.open(n.terms(), ton)
	if _, ok := v.session(n, id, 10*time.Second); !ok {
		t.Fatal("not admitted")
	}
	// Connections that are there stay open, as those of a machine without power do.
	if err := n.server.Load().Lie(devnet.Stalled); err != nil {
		t.Fatal(err)
	}
	n.server.Load().Close()
	n.ahead.Add(int64(10 * time.Minute))
	// Paying goes on, beyond what is to be claimed at once.
	for i := uint64(1); i <= 6; i++ {
		if !v.pay(n, n.voucher(id, i*ton/10), 5*time.Second) {
			t.Fatal("a voucher does not count while no liteserver answers")
		}
		if err := v.use(n, id, 1_000_000); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := v.session(n, late, 300*time.Millisecond); ok {
		t.Error("a channel that nobody could read is served on")
	}
	eventually(t, "the owner is told", func() bool { return strings.Contains(strings.Join(till.State().Trouble, "\n"), "cannot be claimed") })
	n.ahead.Add(int64(50 * time.Minute))
	if !v.pay(n, n.voucher(id, 7*ton/10), 5*time.Second) || v.use(n, id, 1_000_000) != nil {
		t.Error("an hour later nothing is served")
	}
	eventually(t, "it is all there", func() bool { return till.State().Earned == 7_000_000 })
	if st := till.State(); st.Pending != 7*ton/10 || st.Claimed != 0 || st.Lost != 0 {
		t.Errorf("%+v", st)
	}
	n.serve()
	n.ahead.Add(int64(time.Minute))
	n.chain.Mine()
	eventually(t, "it is claimed", func() bool { return till.State().Claimed == 7_000_000 })
	if got := n.read(id).Claimed; got != 7*ton/10 {
		t.Errorf("%d is claimed", got)
	}
	if _, ok := v.session(n, late, 10*time.Second); !ok {
		t.Error("what could not be read then is not served on now")
	}
	eventually(t, "all is well", func() bool { return len(till.State().Trouble) == 0 })
}

// TestClaims claims for each of the reasons, and not without one.
func TestClaims(t *testing.T) {
	n := newNet(t)
	v, l := newVM(t, n.chain.GlobalID()), &log{}
	o := n.options(t.TempDir(), v, l)
	chain := &counting{Chain: o.Chain}
	o.Chain = chain
	till := n.run(o)
	channels := make([]voucher.Channel, 4)
	for i := range channels {
		channels[i] = n.open(n.terms(), ton)
		if _, ok := v.session(n, channels[i], 10*time.Second); !ok {
			t.Fatal("not admitted")
		}
	}
	threshold, age, closing, little := channels[0], channels[1], channels[2], channels[3]
	pay := func(id voucher.Channel, total uint64) {
		t.Helper()
		if !v.pay(n, n.voucher(id, total), 5*time.Second) {
			t.Fatal("a voucher does not count")
		}
	}
	pay(threshold, ton/2)
	pay(age, ton/4)
	pay(closing, ton/5)
	pay(little, contract.MinDifference-1) // the contract takes no external claim of it
	claimed := func(id voucher.Channel, want uint64) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d is claimed", want), func() bool { return n.read(id).Claimed == want })
	}
	claimed(threshold, ton/2)
	if n.read(age).Claimed+n.read(closing).Claimed+n.read(little).Claimed > 0 {
		t.Error("claimed without a reason")
	}
	// The payer begins to close: found within a minute, claimed, and nothing more served.
	n.raw(lite.Address{ID: closing}, 10_000_000, contract.BeginClose(2), nil)
	n.ahead.Add(int64(time.Minute))
	n.chain.Mine()
	claimed(closing, ton/5)
	eventually(t, "nothing more is served", func() bool { return v.use(n, closing, 5) != nil })
	// The payer finishes: the channel is gone, and after some minutes forgotten.
	chain.Lock() // it is not seen in between, an hour idle and still there
	n.ahead.Add(int64(time.Hour))
	n.chain.Mine()
	n.raw(lite.Address{ID: closing}, 10_000_000, contract.FinishClose(3), nil)
	chain.Unlock()
	forgotten := func() bool { _, ok := till.opened().Channel(closing); return !ok }
	for range 5 {
		before := chain.reads.Load()
		n.ahead.Add(int64(time.Minute))
		n.chain.Mine()
		eventually(t, "it is looked for", func() bool { return forgotten() || chain.reads.Load() > before })
	}
	eventually(t, "it is forgotten", forgotten)
	if n.read(age).Claimed > 0 {
		t.Error("claimed before it is a day old")
	}
	// After an hour without a request the VM has forgotten the channel; it is asked for,
	// and back. Topped up: the limit of the VM follows.
	eventually(t, "what is idle is dropped", func() bool { return till.State().Channels == 0 })
	if _, ok := v.session(n, threshold, 10*time.Second); !ok {
		t.Error("one that was dropped does not come back")
	}
	n.raw(lite.Address{ID: threshold}, ton, contract.TopUp(), nil)
	n.ahead.Add(int64(time.Minute))
	n.chain.Mine()
	eventually(t, "more can be paid", func() bool {
		v.pay(n, n.voucher(threshold, ton+ton/2), 100*time.Millisecond)
		return n.read(threshold).Claimed > ton
	})
	claimed(threshold, ton+ton/2)
	n.ahead.Add(int64(24 * time.Hour))
	n.chain.Mine()
	claimed(age, ton/4)
	eventually(t, "one is left", func() bool { return till.State().Pending == contract.MinDifference-1 })
	if _, ok := v.session(n, little, 10*time.Second); !ok {
		t.Error("one that was dropped does not come back")
	}
	pay(little, contract.MinDifference+2*step)
	if err := till.Finish(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if got := n.read(little).Claimed; got != contract.MinDifference+2*step {
		t.Errorf("on the way down %d is claimed", got)
	}
	if sum := store.Total(till.rows(t, o)); sum.Fees == 0 {
		t.Errorf("%+v", sum)
	}
}

// TestWallet claims by a wallet, many at a time, also what the contract would not take
// by an external message.
func TestWallet(t *testing.T) {
	n := newNet(t)
	v, l := newVM(t, n.chain.GlobalID()), &log{}
	o := n.options(t.TempDir(), v, l)
	stranger := n.wallet(3)
	for i, p := range []*registry.Publisher{n.owner, stranger} {
		o.Dir = t.TempDir()
		o.Chain = &TON{Connect: n.connect, Payee: o.Payee, Wallet: func(client *lite.Client) (*registry.Publisher, error) {
			return &registry.Publisher{Reader: registry.Reader{Client: client}, Wallet: p.Wallet, Wait: 20 * time.Second}, nil
		}}
		v = newVM(t, n.chain.GlobalID())
		o.VM = v
		till := n.run(o)
		var paid uint64
		for range 5 {
			id := n.open(n.terms(), ton)
			if _, ok := v.session(n, id, 10*time.Second); !ok || !v.pay(n, n.voucher(id, 6_000_000), 5*time.Second) || v.use(n, id, 6_000_000) != nil {
				t.Fatal("not paid")
			}
			paid += 6_000_000
		}
		owner, other := n.balance(o.Payee), n.balance(stranger.Wallet.Address)
		if err := till.Finish(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		sum := store.Total(till.rows(t, o))
		if sum.Claimed != paid || sum.Fees == 0 {
			t.Errorf("%d: %+v", i, sum)
		}
		// The owner's money, and that of who pays, to the nanoton.
		if got := n.balance(o.Payee) + n.balance(stranger.Wallet.Address) + sum.Fees - owner - other; i == 0 && got != paid || got > paid {
			t.Errorf("%d: both have %d more and paid %d in fees, and %d was claimed", i, got-sum.Fees, sum.Fees, paid)
		}
	}
}

// TestNoise names channels that are none, as fast as it can: only so many are read,
// and honest ones are served on all the while.
func TestNoise(t *testing.T) {
	n := newNet(t)
	v, l := newVM(t, n.chain.GlobalID()), &log{}
	o := n.options(t.TempDir(), v, l)
	chain := &counting{Chain: o.Chain}
	o.Chain = chain
	till := n.run(o)
	known := n.open(n.terms(), ton)
	if _, ok := v.session(n, known, 10*time.Second); !ok {
		t.Fatal("not admitted")
	}
	begin := chain.channels.Load()
	start := time.Now()
	stop := make(chan struct{})
	var noise sync.WaitGroup
	noise.Go(func() {
		for i := uint32(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			v.mu.Lock()
			full := len(v.wanted) >= 2*guest.MaxWanted // a VM does not remember many
			if !full {
				v.wanted[voucher.Channel{0: 0xee, 1: byte(i), 2: byte(i >> 8), 3: byte(i >> 16)}] = true
			}
			v.mu.Unlock()
			if full {
				time.Sleep(5 * time.Millisecond)
			}
		}
	})
	if !v.pay(n, n.voucher(known, 20*step), 5*time.Second) || v.use(n, known, 1000) != nil {
		t.Error("a channel that is admitted suffers")
	}
	fresh := n.open(n.terms(), ton)
	if _, ok := v.session(n, fresh, 20*time.Second); !ok {
		t.Error("an honest channel is never read")
	}
	time.Sleep(500 * time.Millisecond)
	close(stop)
	noise.Wait()
	most := readBurst + int64(readRate*time.Since(start).Seconds()) + 20
	if got := chain.channels.Load() - begin; got > most {
		t.Errorf("%d channels were read in %v, at most %d should be", got, time.Since(start), most)
	}
	till.mu.Lock()
	if len(till.wanted) > maxWanted || len(till.refused) > maxRefusals {
		t.Errorf("%d are wanted, %d refused", len(till.wanted), len(till.refused))
	}
	till.mu.Unlock()
	l.mu.Lock()
	if len(l.lines) > 50 {
		t.Errorf("%d lines of log", len(l.lines))
	}
	l.mu.Unlock()
	// One that was refused is not read again at once, however often it is named.
	chain.channels.Store(0)
	id := voucher.Channel{0: 0xff}
	n.ahead.Add(int64(time.Minute))
	n.chain.Mine()
	if _, ok := v.session(n, id, 400*time.Millisecond); ok {
		t.Error("noise is served on")
	}
	v.mu.Lock()
	asked := v.asked
	v.mu.Unlock()
	if got := chain.channels.Load(); asked < 20 || got > readBurst+10 {
		t.Errorf("named %d times, read %d", asked, got)
	}
}

// still is a chain on which nothing changes but what is claimed.
type still struct{ state channel.State }

func (c still) Read(_ context.Context, ids []voucher.Channel) ([]Reading, error) {
	list := make([]Reading, len(ids))
	for i, id := range ids {
		s := c.state
		if list[i].State = &s; id != voucher.Channel(s.Address.ID) {
			list[i] = Reading{Err: channel.ErrNoChannel}
		}
	}
	return list, nil
}

func (still) Claim(_ context.Context, list []voucher.Voucher) []Claimed {
	return slices.Repeat([]Claimed{{Err: errors.New("not today")}}, len(list))
}

func (still) Least() uint64 { return 1 }

// alone is a net without a chain, and its one channel.
func alone(t testing.TB) (n *net, o Options, v *vm, id voucher.Channel) {
	n = &net{TB: t, key: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32))}
	terms := channel.Terms{PayerKey: voucher.Key(n.key.Public().(ed25519.PublicKey)), Payee: [32]byte{5}, Delay: 3600, GlobalID: devnet.DefaultGlobalID}
	a := channel.Address(terms)
	v = newVM(t, devnet.DefaultGlobalID)
	return n, Options{
		Terms: Terms{GlobalID: devnet.DefaultGlobalID, Payee: lite.Address{ID: terms.Payee}, MinDeposit: ton / 10, MinDelay: time.Hour},
		Name:  "worker", Models: []string{model}, Ceilings: []pay.Price{price}, VM: v, Tick: 5 * time.Millisecond,
		Chain: still{channel.State{ChannelState: contract.ChannelState{ChannelTerms: terms, Status: contract.ChannelOpen}, Address: a, Balance: 1 << 60}},
	}, v, voucher.Channel(a.ID)
}

// TestKilled kills a till's process at any moment: what counted for the client, and
// what the till said was earned, is there afterwards.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("CHRYSALIS_TEST_TILL"); dir != "" {
		payForever(t, dir)
	}
	if testing.Short() {
		t.Skip("it starts processes")
	}
	dir := t.TempDir()
	var covered, earned uint64
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "CHRYSALIS_TEST_TILL="+dir)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			var c, e uint64
			if _, err := fmt.Sscanf(lines.Text(), "%d %d", &c, &e); err != nil {
				t.Fatalf("%q: %v", lines.Text(), err)
			}
			covered, earned = max(covered, c), max(earned, e)
			if n == 5+round*17 {
				cmd.Process.Kill()
			}
		}
		cmd.Wait()
		s, err := store.Open(dir + "/till")
		if err != nil || len(s.Damage()) > 0 {
			t.Fatalf("%v, %v", err, s.Damage())
		}
		list := s.Channels()
		if len(list) != 1 || list[0].Best.Total < covered || list[0].Used < earned || store.Total(s.Earnings()).Earned != list[0].Used {
			t.Errorf("round %d: %d was paid and %d earned: %+v", round, covered, earned, list)
		}
		s.Close()
	}
	if covered == 0 || earned == 0 {
		t.Error("nothing was paid or earned")
	}
	t.Logf("%d was paid, %d earned", covered, earned)
}

func payForever(t *testing.T, dir string) {
	n, o, v, id := alone(t)
	o.Dir, o.Holders = dir+"/till", dir+"/holders"
	till := n.run(o)
	s, ok := v.session(n, id, 20*time.Second)
	if !ok {
		t.Fatal("not admitted")
	}
	credit, _ := v.book.Credit(s)
	for total := max(credit.Cover, credit.Used) + step; ; total += step {
		if !v.pay(n, n.voucher(id, total), 10*time.Second) {
			t.Fatal("it does not count")
		}
		if err := v.use(n, id, step/2); err != nil {
			t.Fatal(err)
		}
		fmt.Println(total, till.State().Earned)
	}
}

// TestDamaged flips a byte of the store: the owner is told, the last whole state is
// used, and clients go on.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	n, o, v, id := alone(t)
	l := &log{}
	o.Dir, o.Holders, o.Log = dir+"/till", dir+"/holders", l.printf
	till := n.run(o)
	if _, ok := v.session(n, id, 10*time.Second); !ok {
		t.Fatal("not admitted")
	}
	for i := uint64(1); i <= 4; i++ {
		if !v.pay(n, n.voucher(id, i*10*step), 5*time.Second) || v.use(n, id, 1_000_000) != nil {
			t.Fatal("not paid")
		}
		eventually(t, "it is earned", func() bool { return till.State().Earned == i*1_000_000 })
	}
	till.Close()
	path := dir + "/till/vouchers.log"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-40] ^= 0x41
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	v = newVM(t, o.GlobalID)
	o.VM = v
	till = n.run(o)
	s, ok := v.session(n, id, 10*time.Second)
	if !ok {
		t.Fatal("not admitted")
	}
	// The last record was a use, of a voucher that an earlier one has.
	if c, _ := v.book.Credit(s); c.Cover != 40*step || c.Used != 3_000_000 {
		t.Errorf("%+v", c)
	}
	if st := till.State(); len(st.Trouble) != 1 || !strings.Contains(st.Trouble[0], "damaged") || !l.has("the last state that is whole is used") {
		t.Errorf("the owner is told %q", st.Trouble)
	}
	if kept, _ := filepath.Glob(path + ".damaged-*"); len(kept) != 1 {
		t.Error("the damaged file is not kept")
	}
	if !v.pay(n, n.voucher(id, 50*step), 5*time.Second) {
		t.Error("nothing more can be paid")
	}
}

// TestFullDisk has the store fail: nothing counts meanwhile, and everything does once
// it can be written again, once each.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	n, o, v, id := alone(t)
	o.Dir, o.Holders = dir+"/till", dir+"/holders"
	till := n.run(o)
	if _, ok := v.session(n, id, 10*time.Second); !ok || !v.pay(n, n.voucher(id, 10*step), 5*time.Second) {
		t.Fatal("not admitted")
	}
	// Somebody takes the store away under it.
	till.mu.Lock()
	till.store.Close()
	till.mu.Unlock()
	blocker := dir + "/aside"
	if err := os.WriteFile(blocker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	swap := func() { // at once, or it makes a new store in between
		if err := unix.Renameat2(unix.AT_FDCWD, o.Dir, unix.AT_FDCWD, blocker, unix.RENAME_EXCHANGE); err != nil {
			t.Fatal(err)
		}
	}
	swap()
	if v.pay(n, n.voucher(id, 20*step), 300*time.Millisecond) {
		t.Error("a voucher counts that is nowhere on disk")
	}
	eventually(t, "the owner is told", func() bool { return len(till.State().Trouble) > 0 })
	if err := v.use(n, id, 1_000_000); err != nil {
		t.Error("what was paid before does not count any more")
	}
	swap()
	s, _ := v.session(n, id, 0)
	eventually(t, "it counts", func() bool { return v.book.Covers(s, 20*step) })
	eventually(t, "it is earned", func() bool { return till.State().Earned == 1_000_000 })
	if st := till.State(); st.Pending != 20*step || len(st.Trouble) > 0 {
		t.Errorf("%+v", st)
	}
}

// TestOptions refuses what is not in order before anything runs.
func TestOptions(t *testing.T) {
	_, good, _, _ := alone(t)
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"nobody is paid":       func(o *Options) { o.Payee = lite.Address{} },
		"a price above":        func(o *Options) { o.Prices = []pay.Price{{Prompt: price.Prompt + 1}} },
		"too few prices":       func(o *Options) { o.Models = append(o.Models, "acme/other@1") },
		"a deposit too little": func(o *Options) { o.MinDeposit = channel.MinDeposit - 1 },
		"a delay too long":     func(o *Options) { o.MinDelay = channel.MaxDelay + time.Second },
		"a delay below none":   func(o *Options) { o.MinDelay = -time.Second },
		"parts of seconds":     func(o *Options) { o.MinDelay = 1500 * time.Millisecond },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// source is a rule that halves the price each time, and one that asks too much.
type source struct{ calls, changes atomic.Int64 }

func (s *source) Changed(context.Context, []pay.Price) error {
	s.changes.Add(1)
	return errors.New("which is not heard")
}

func (s *source) Prices(_ context.Context, current []pay.Price) ([]pay.Price, error) {
	switch s.calls.Add(1) {
	case 1:
		return []pay.Price{{Prompt: current[0].Prompt / 2}}, nil
	case 2:
		return nil, errors.New("no idea")
	case 3:
		return nil, nil
	}
	return []pay.Price{{Prompt: 1 << 50, Completion: price.Completion}}, nil
}

// TestPriceSource follows a rule below the ceilings.
func TestPriceSource(t *testing.T) {
	n, o, v, _ := alone(t)
	rule := &source{}
	var ahead atomic.Int64
	o.Dir, o.Holders, o.Source = t.TempDir(), t.TempDir(), rule
	o.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	till := n.run(o)
	half := pay.Price{Prompt: price.Prompt / 2}
	eventually(t, "the price is half", func() bool { return till.Prices()[0] == half && v.book.Prices().Models[model] == half })
	for range 2 {
		before := rule.calls.Load()
		ahead.Add(int64(defaultEvery))
		eventually(t, "it is asked", func() bool { return rule.calls.Load() > before })
		if till.Prices()[0] != half {
			t.Error("another price")
		}
	}
	ahead.Add(int64(defaultEvery))
	eventually(t, "the price is the ceiling", func() bool { return till.Prices()[0] == price && v.book.Prices().Models[model] == price })
	eventually(t, "the source is told", func() bool { return rule.changes.Load() == 2 })
	// A VM that does not answer keeps its prices, and says so.
	v.mu.Lock()
	v.deaf = true
	v.mu.Unlock()
	if err := till.SetPrices(t.Context(), []pay.Price{half}); err == nil || till.Prices()[0] != price {
		t.Errorf("%v", err)
	}
	eventually(t, "the owner is told", func() bool { return len(till.State().Trouble) > 0 })
}
