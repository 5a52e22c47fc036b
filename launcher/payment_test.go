package launcher

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	vouchers "chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/guest"
	"chrysalis/launcher/till"
	"chrysalis/manifest"
	"chrysalis/pay"
	"chrysalis/registry/lite"
)

var onePrice = pay.Price{Prompt: 1000, Completion: 3000}

// paidManifest is one of two models.
func paidManifest() *manifest.Manifest {
	disk := manifest.Disk{RootHash: strings.Repeat("0", 64), DataBlocks: 1}
	return &manifest.Manifest{
		Version: manifest.Version, Engine: disk, Parameters: map[string]int64{}, Limits: manifest.DefaultLimits,
		Models: []manifest.Model{{Name: "acme/model", Revision: "1", Disk: disk}, {Name: "acme/other", Revision: "1", Disk: disk}},
	}
}

func goodPayment() *Payment {
	return &Payment{
		Terms:    till.Terms{GlobalID: -7, Payee: lite.Address{ID: [32]byte{5}}, MinDeposit: 100_000_000, MinDelay: time.Hour},
		Ceilings: []pay.Price{onePrice},
		Network: till.Network{Network: lite.Network{GlobalID: -7, KeyBlock: lite.BlockID{SeqNo: 1, RootHash: [32]byte{1}}, Liteservers: []lite.Liteserver{
			{Address: "127.0.0.1:1", Key: ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)},
		}}},
	}
}

// TestPaymentRefusals is what is not in order before a VM is booted.
func TestPaymentRefusals(t *testing.T) {
	plan := func(p *Payment, m *manifest.Manifest, file bool) (*paid, error) {
		if !file && p != nil {
			if err := p.manifest(m); err != nil {
				return nil, err
			}
		}
		encoded, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return Options{Payment: p}.payment(encoded)
	}
	good, err := plan(goodPayment(), paidManifest(), false)
	if err != nil || len(good.Prices) != 2 || good.Prices[1] != onePrice || good.Ceilings[0] != onePrice || good.Models[1] != "acme/other@1" {
		t.Fatalf("%+v, %v", good, err)
	}
	if free, err := plan(nil, paidManifest(), false); free != nil || err != nil {
		t.Errorf("for free: %+v, %v", free, err)
	}
	m := paidManifest()
	if err := goodPayment().manifest(m); err != nil || m.Payment.Step != 300 || m.Payment.Network != -7 {
		t.Errorf("%+v, %v", m.Payment, err)
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*Payment)
		want   string
	}{
		{"nobody is paid", func(p *Payment) { p.Payee = lite.Address{} }, "--payout"},
		{"a price above its ceiling", func(p *Payment) { p.Prices = []pay.Price{{Prompt: 1001}} }, "above its ceiling"},
		{"ceilings of other models", func(p *Payment) { p.Ceilings = make([]pay.Price, 3) }, "3 ceilings for 2 models"},
		{"prices of other models", func(p *Payment) { p.Prices = make([]pay.Price, 3) }, "3 prices for 2 models"},
		{"a step too large", func(p *Payment) { p.Step = pay.MaxStep + 1 }, "voucher step"},
		{"a step above the deposit", func(p *Payment) { p.Step = 100_000_000 }, "least deposit"},
		{"a deposit too small", func(p *Payment) { p.MinDeposit = 1000 }, "least deposit"},
		{"a delay too long", func(p *Payment) { p.MinDelay = 1000 * time.Hour }, "least delay"},
		{"a floor above the ceiling", func(p *Payment) { p.Auto = &Auto{Floors: []pay.Price{{Prompt: 1001}}} }, "floor"},
		{"a floor of nothing", func(p *Payment) { p.Auto = &Auto{Floors: []pay.Price{{}}} }, "for free"},
		{"floors of other models", func(p *Payment) { p.Auto = &Auto{Floors: make([]pay.Price, 3)} }, "3 floors for 2 models"},
		{"another network", func(p *Payment) { p.Network.Network.GlobalID = -239 }, "would be read on -239"},
		{"no liteserver", func(p *Payment) { p.Network.Network.Liteservers = nil }, "liteserver"},
		{"a key that is none", func(p *Payment) { p.ClaimKey = key }, "key"},
		{"a key that is not there", func(p *Payment) { p.ClaimKey = key + "x" }, "key that pays for claims"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := goodPayment()
			tt.change(p)
			if _, err := plan(p, paidManifest(), false); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	paying := paidManifest()
	if err := goodPayment().manifest(paying); err != nil {
		t.Fatal(err)
	}
	other := goodPayment()
	other.GlobalID, other.Network.Network.GlobalID = -239, -239
	if _, err := plan(other, paying, true); err == nil || !strings.Contains(err.Error(), "--ton-network") {
		t.Errorf("a manifest for another network: %v", err)
	}
	if _, err := plan(nil, paying, true); err == nil || !strings.Contains(err.Error(), "--payout") {
		t.Errorf("a manifest with payment, and nobody is paid: %v", err)
	}
	if _, err := plan(goodPayment(), paidManifest(), true); err == nil || !strings.Contains(err.Error(), "for free") {
		t.Errorf("a manifest without payment: %v", err)
	}
}

// paidAgent answers on a control port; it takes prices, and once tells of a voucher
// and what was used.
type paidAgent struct {
	mu      sync.Mutex
	prices  []pay.Price
	deaf    bool
	balance *guest.Balance
	ops     []guest.ControlOp
}

func (a *paidAgent) Dial(context.Context, uint32) (Conn, error) {
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		var r guest.ControlRequest
		if json.NewDecoder(theirs).Decode(&r) != nil {
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		a.ops = append(a.ops, r.Op)
		reply := guest.ControlReply{OK: !a.deaf}
		switch r.Op {
		case guest.OpPrices:
			a.prices = r.Payment.Prices
		case guest.OpCollect:
			if a.balance != nil && r.Ack == 0 {
				reply.Batch, reply.Balances = 1, []guest.Balance{*a.balance}
			}
		}
		json.NewEncoder(theirs).Encode(reply)
	}()
	return pipeConn{ours}, nil
}

func (a *paidAgent) Close() error { return nil }

type pipeConn struct{ net.Conn }

func (pipeConn) CloseWrite() error { return nil }

// TestPaidSupervisor has a supervisor take prices and money without a VM: prices
// change over its API, earnings and state are told, and the last of what was paid is
// kept when it ends.
func TestPaidSupervisor(t *testing.T) {
	st := store{t.TempDir()}
	r, lock, err := st.newRun("paid", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s := testSupervisor(t, r)
	s.store = st
	m := paidManifest()
	p := goodPayment()
	if err := p.manifest(m); err != nil {
		t.Fatal(err)
	}
	if s.cfg.Payment, err = p.plan(m); err != nil {
		t.Fatal(err)
	}
	// What the store knows from before: a channel with its key.
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	id := voucher.Channel{7}
	kept, err := vouchers.Open(st.till("paid", -7))
	if err != nil {
		t.Fatal(err)
	}
	if err := kept.Admit(id, -7, voucher.Key(key.Public().(ed25519.PublicKey)), vouchers.Chain{Cover: 1 << 40}); err != nil {
		t.Fatal(err)
	}
	// Another process has it: that is no reason not to begin, but for clients to wait.
	agent := &paidAgent{deaf: true}
	if err := s.startTill(agent); err == nil || !strings.Contains(err.Error(), "prices") {
		t.Errorf("a VM that takes no prices: %v", err)
	}
	agent.deaf = false
	agent.balance = &guest.Balance{
		Channel: id.String(), Voucher: voucher.Sign(key, -7, id, 900).String(), Uses: []guest.Use{{Model: 1, Requests: 2, Earned: 500}},
	}
	if err := s.startTill(agent); err != nil {
		t.Fatal(err)
	}
	s.update(func(st *State) { st.Life = LifeReady })
	api, err := s.serveAPI()
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	if state := s.snapshot(); state.Payment == nil || len(state.Payment.Trouble) != 1 {
		t.Errorf("the owner is not told that another process has the store: %+v", state.Payment)
	}
	if err := r.call(t.Context(), "GET", "/v1/earnings", nil, nil); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("%v", err)
	}
	kept.Close()

	halve := func(models []till.ModelState) (prices []pay.Price, err error) {
		for _, m := range models {
			prices = append(prices, pay.Price{Prompt: m.Prompt / 2, Completion: m.Completion})
		}
		return prices, nil
	}
	state, err := SetPrices(t.Context(), st.dir, "paid", halve)
	agent.mu.Lock()
	if err != nil || agent.prices[1].Prompt != 500 || state.Payment.Models[0].Prompt != 500 || state.Payment.Models[0].Ceiling != onePrice {
		t.Errorf("%v, %+v, %+v", err, agent.prices, state.Payment)
	}
	agent.mu.Unlock()
	for name, change := range map[string]func([]till.ModelState) ([]pay.Price, error){
		"above the ceiling": func([]till.ModelState) ([]pay.Price, error) { return []pay.Price{{Prompt: 1001}, {}}, nil },
		"too few":           func([]till.ModelState) ([]pay.Price, error) { return []pay.Price{{}}, nil },
		"none":              func([]till.ModelState) ([]pay.Price, error) { return nil, errors.New("no idea") },
	} {
		if _, err := SetPrices(t.Context(), st.dir, "paid", change); err == nil {
			t.Errorf("prices %s are taken", name)
		}
	}
	if _, err := SetPrices(t.Context(), st.dir, "other", halve); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a VM that does not run: %v", err)
	}
	if err := Settle(t.Context(), st.dir, "paid", *p, t.Logf); err == nil || !strings.Contains(err.Error(), "runs") {
		t.Errorf("settle for a VM that runs: %v", err)
	}

	deadline := time.Now().Add(20 * time.Second)
	for {
		list, err := Earnings(t.Context(), st.dir, "")
		if err == nil && len(list) == 1 && list[0].Pending == 900 && len(list[0].Rows) == 1 && list[0].Rows[0].Model == "acme/other@1" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v, %v", list, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.settle(stopRequest{Now: true})
	if state := s.snapshot(); state.Payment == nil || state.Payment.Earned != 500 || state.Payment.Pending != 900 {
		t.Errorf("what it said last: %+v", state.Payment)
	}
	for name, path := range map[string]string{"GET": "/v1/earnings", "POST": "/v1/prices"} {
		if err := r.call(t.Context(), name, path, []pay.Price{}, nil); err == nil || !strings.Contains(err.Error(), "free, or is ending") {
			t.Errorf("%s %s: %v", name, path, err)
		}
	}
	api.Close()
	lock.Close() // it is over
	list, err := Earnings(t.Context(), st.dir, "paid")
	if err != nil || len(list) != 1 || list[0].Pending != 900 || vouchers.Total(list[0].Rows).Earned != 500 {
		t.Errorf("when it is over: %+v, %v", list, err)
	}
	if err := Settle(t.Context(), st.dir, "paid", Payment{Terms: till.Terms{GlobalID: -239}}, t.Logf); err == nil {
		t.Error("settled on a network where nothing was earned")
	}
}

// TestFollower moves prices by how much of a VM is in use, between floor and ceiling,
// and puts the offer again: first where a price rises, and afterwards where it falls.
func TestFollower(t *testing.T) {
	u := &usage{}
	c := &paid{
		Models: []string{"acme/model@1", "acme/free@1"}, Ceilings: []pay.Price{{Prompt: 1000, Completion: 1000}, {}}, Concurrency: 4,
		Auto: &Auto{Floors: []pay.Price{{Prompt: 100, Completion: 100}, {}}},
	}
	f := c.follow(u, nil)
	var listed []pay.Price
	var failed error
	f.relist = func(_ context.Context, prices []pay.Price) error {
		if failed == nil {
			listed = prices
		}
		return failed
	}
	now := []pay.Price{{Prompt: 500, Completion: 500}, {}}
	step := func(active int64) []pay.Price {
		t.Helper()
		if active >= 0 {
			u.add(active)
		}
		next, err := f.Prices(t.Context(), now)
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	if next := step(-1); next[0] != now[0] || listed != nil {
		t.Errorf("nothing is known, and the price is %v", next)
	}
	if next := step(4); next[0].Prompt <= now[0].Prompt || next[1] != (pay.Price{}) || listed[0] != next[0] {
		t.Errorf("full, and the price is %v, listed %v", next, listed)
	}
	listed = nil
	next := step(0)
	if next[0].Prompt >= now[0].Prompt || listed != nil {
		t.Errorf("idle, and the price is %v, listed %v", next, listed)
	}
	if err := f.Changed(t.Context(), next); err != nil || listed[0] != next[0] {
		t.Errorf("%v, listed %v", err, listed)
	}
	for now = next; ; now = next {
		if next = step(0); next[0] == now[0] {
			break
		}
	}
	if now[0] != c.Auto.Floors[0] {
		t.Errorf("it falls to %v", now)
	}
	// An offer that cannot be put: prices do not rise.
	failed = errors.New("no network")
	u.add(4)
	if next, err := f.Prices(t.Context(), now); err == nil {
		t.Errorf("%v", next)
	}
	if err := f.Changed(t.Context(), now); err == nil || !f.unlisted {
		t.Error("not known to be unlisted")
	}
	if u.take(4); u.take(4) != -1 {
		t.Error("use is known of no time")
	}
}
