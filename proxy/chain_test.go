package proxy_test

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"math/big"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/attest/attesttest"
	"chrysalis/channel"
	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/devnet/devnettest"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/pay/funds"
	"chrysalis/pay/purse"
	"chrysalis/proxy"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// TestChain pays the agent's own server through a channel on a chain: it opens the
// channel, pays for streams and other answers, tops up, and closes; then the payee
// claims what it was given, and everybody has what is theirs.
func TestChain(t *testing.T) {
	const ton = 1_000_000_000
	chain, server := devnettest.Serve(t, devnet.Options{})
	client := devnettest.Client(t, chain, server, lite.Options{Timeout: 5 * time.Second})
	wallet := func(seed byte) (ed25519.PrivateKey, *registry.Publisher) {
		key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32))
		w, err := registry.NewWallet(key, "v5r1", chain.GlobalID())
		if err != nil {
			t.Fatal(err)
		}
		if err := chain.Fund(w.Address.Std(), big.NewInt(10*ton)); err != nil {
			t.Fatal(err)
		}
		return key, &registry.Publisher{Reader: registry.Reader{Client: client}, Wallet: w, Wait: 20 * time.Second}
	}
	key, payer := wallet(1)
	_, payee := wallet(2)
	balance := func(a lite.Address) int64 { return chain.Account(a.Std()).Balance.Nano().Int64() }
	read := func(id voucher.Channel) *channel.State {
		t.Helper()
		view, err := client.Sync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s, err := channel.Read(t.Context(), view, lite.Address{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}

	// A VM whose evidence holds, in front of the agent's server.
	vm := attesttest.NewVM(record.TDX)
	price := pay.Price{Prompt: 100_000_000_000, Completion: 100_000_000_000} // so that a little text is a lot of money
	vm.Manifest.Payment = &manifest.Payment{Network: chain.GlobalID(), Step: 5_000_000, Ceilings: []pay.Price{price}}
	vm.Boot()
	demand := channel.Demand{GlobalID: chain.GlobalID(), Payee: payee.Wallet.Address, MinDelay: time.Second, MinCover: 1}
	worker, till := devnettest.PaidWorker(t, vm, client, demand, price)

	const budget, deposit = 2 * ton, 600_000_000
	dir := t.TempDir()
	ledger, err := purse.Open(dir, chain.GlobalID(), key, budget)
	if err != nil {
		t.Fatal(err)
	}
	defer ledger.Close()
	money := funds.New(funds.Options{Publisher: payer, Own: channel.Own{Path: filepath.Join(dir, "channels.json")}, Key: key, Budget: budget, Deposit: deposit, MaxDelay: time.Hour})
	p, err := proxy.New(proxy.Options{
		Workers: []string{worker.URL}, Policy: vm.Policy(), Records: []*record.File{vm.Record()}, Collateral: vm.Intel.Collateral(), Loopback: true,
		Payment: &proxy.Payment{Purse: ledger, MaxPrice: price.Prompt, Funds: money},
	})
	if err != nil {
		t.Fatal(err)
	}
	before := balance(payer.Wallet.Address)
	if quotes := p.Plan(t.Context(), "test/model"); len(quotes) != 1 || quotes[0].Problem != "" || quotes[0].Price != price || quotes[0].MinDeposit != 100_000_000 {
		t.Fatalf("%+v", quotes)
	}
	if balance(payer.Wallet.Address) != before || money.Deposited() != 0 {
		t.Fatal("a plan costs something")
	}
	if err := p.Prepare(t.Context(), "test/model"); err != nil {
		t.Fatal(err)
	}
	if got := money.Deposited(); got != deposit {
		t.Fatalf("%d is deposited", got)
	}
	front := httptest.NewServer(p)
	defer front.Close()
	w := &paidWorld{world: &world{url: front.URL}, purse: ledger}
	for i := range 6 {
		w.served(t, body(i%2 == 0, `,"max_tokens":8`), "Content-Type", "application/json")
	}
	s := w.quiet(t, 0)
	on := read(s.Channel)
	if s.Used == 0 || s.Signed < s.Used || s.Signed > on.Cover() || on.Claimed != 0 || len(ledger.Bars()) > 0 {
		t.Fatalf("%+v, on the chain %+v: %v", s, on, ledger.Bars())
	}
	if lost := before - balance(payer.Wallet.Address); lost < deposit || lost > deposit+funds.Overhead+20_000_000 {
		t.Errorf("opening took %d", lost)
	}
	// Another process cannot sign at the same time.
	if _, err := purse.Open(dir, chain.GlobalID(), key, budget); !errors.Is(err, purse.ErrLocked) {
		t.Error(err)
	}
	if c, err := money.TopUp(t.Context(), s.Channel); err != nil || c.Limit < on.Cover()+deposit-10_000_000 || money.Deposited() != 2*deposit {
		t.Fatalf("%+v, %v", c, err)
	}
	// The worker sees that at its next look at the chain.
	for _, a := range till.Wanted() {
		if admission, ok := till.Admit(a); ok {
			worker.Ask(guest.ControlRequest{Op: guest.OpAdmit, Admit: &admission})
		}
	}
	w.served(t, body(true, `,"max_tokens":8`), "Content-Type", "application/json")
	s = w.quiet(t, 0)
	// What the worker was given is what the purse signed.
	best := voucher.Voucher{}
	for deadline := time.Now().Add(5 * time.Second); best.Total != s.Signed && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		for _, b := range till.Balances() {
			if v, err := voucher.Parse(b.Voucher); err == nil && v.Total > best.Total {
				best = v
			}
		}
	}
	if best.Total != s.Signed {
		t.Fatalf("the worker has a voucher for %d, and %d is signed", best.Total, s.Signed)
	}
	if !ledger.Retire(s.Channel) {
		t.Fatal("not retired")
	}
	if _, err := money.Close(t.Context(), s.Channel); err != nil {
		t.Fatal(err)
	}
	had := balance(payee.Wallet.Address)
	if _, err := channel.ClaimExternal(t.Context(), client, best); err != nil {
		t.Fatal(err)
	}
	if gain := balance(payee.Wallet.Address) - had; gain > int64(best.Total) || gain < int64(best.Total)-10_000_000 {
		t.Errorf("the payee got %d for a voucher of %d", gain, best.Total)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		_, err := payer.Do(t.Context(), channel.Finish(lite.Address{ID: s.Channel}))
		if err == nil {
			break
		}
		if !errors.Is(err, channel.ErrClosing) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	// All but what was signed is back, less fees.
	if lost := before - balance(payer.Wallet.Address); lost < int64(s.Signed) || lost > int64(s.Signed)+60_000_000 {
		t.Errorf("the payer lost %d of which %d was paid", lost, s.Signed)
	}
	// What is closed is paid through no more; the next request opens another channel.
	w.served(t, body(true, `,"max_tokens":8`), "Content-Type", "application/json")
	if list := ledger.States(); len(list) != 2 || money.Deposited() != 3*deposit {
		t.Errorf("%+v, %d deposited", list, money.Deposited())
	}
	// Until the budget has no room for one.
	for _, s := range ledger.States() {
		ledger.Retire(s.Channel)
		money.Close(t.Context(), s.Channel)
	}
	w.served(t, body(true, `,"max_tokens":8`), "Content-Type", "application/json")
	for _, s := range ledger.States() {
		ledger.Retire(s.Channel)
		money.Close(t.Context(), s.Channel)
	}
	if answer, text := w.post(t, body(true, ""), "Content-Type", "application/json"); answer.StatusCode != 402 || !strings.Contains(text, funds.ErrBudget.Error()) || money.Deposited() != budget {
		t.Errorf("%d %s, %d deposited", answer.StatusCode, text, money.Deposited())
	}
}
