package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/launcher/till"
	"chrysalis/pay"
	"chrysalis/registry"
)

func TestTonPrice(t *testing.T) {
	for text, want := range map[string]tonPrice{"0": 0, "1": 1e9, "0.000000001": 1, "12.5": 12_500_000_000, "999999999.999999999": 999_999_999_999_999_999} {
		var p tonPrice
		if err := p.UnmarshalText([]byte(text)); err != nil || p != want {
			t.Errorf("%s: %d, %v", text, p, err)
		}
	}
	for _, text := range []string{"", "-1", "+1", "1e3", "1/3", ".5", "5.", "0.0000000001", "1000000000", "1 ", "0x1", "١"} {
		var p tonPrice
		if err := p.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %d", text, p)
		}
	}
}

// TestUpPay is what flags make of payments, and what they refuse.
func TestUpPay(t *testing.T) {
	dir := t.TempDir()
	chain, _ := serveDevnet(t, dir)
	t.Setenv("CHRYSALIS_TON_KEY", "")
	key := filepath.Join(dir, "owner.key")
	fundedKey(t, chain, key)
	payout := "0:" + strings.Repeat("55", 32)
	parsed, err := parse(t, "up", "--prompt-price", "0.001", "--completion-price", "0.003", "--completion-ceiling", "0.005", "--payout", payout,
		"--min-delay", "2h", "--min-deposit", "0.5", "--voucher-step", "0.01")
	if err != nil {
		t.Fatal(err)
	}
	p, err := parsed.Up.payment()
	if err != nil {
		t.Fatal(err)
	}
	if p.GlobalID != chain.GlobalID() || p.Payee.Raw() != payout || p.MinDelay != 2*time.Hour || p.MinDeposit != 500_000_000 || p.Step != 10_000_000 ||
		p.Prices[0] != (pay.Price{Prompt: 1_000_000, Completion: 3_000_000}) || p.Ceilings[0] != (pay.Price{Prompt: 1_000_000, Completion: 5_000_000}) ||
		!filepath.IsAbs(p.Network.GlobalConfig) || !strings.HasPrefix(p.Network.Memory, dir) {
		t.Errorf("%+v", p)
	}
	client, err := p.Network.Open()
	if err != nil {
		t.Fatal(err)
	}
	client.Close()
	// The wallet is paid unless somebody else is named; a ceiling is price enough.
	parsed, err = parse(t, "up", "--prompt-ceiling", "1", "--key-file", key)
	if err != nil {
		t.Fatal(err)
	}
	private, _ := registry.LoadKey(key)
	wallet, _ := registry.NewWallet(private, "v5r1", chain.GlobalID())
	if p, err = parsed.Up.payment(); err != nil || p.Payee != wallet.Address || p.Prices[0] != (pay.Price{Prompt: 1e9}) || p.Prices[0] != p.Ceilings[0] {
		t.Errorf("%+v, %v", p, err)
	}
	if parsed, err = parse(t, "up", "--completion-ceiling", "1", "--prompt-price=0", "--price=auto", "--completion-floor=0.2", "--payout", payout); err != nil {
		t.Fatal(err)
	}
	if p, err = parsed.Up.payment(); err != nil || p.Auto == nil || p.Auto.Floors[0] != (pay.Price{Completion: 200_000_000}) || p.Auto.OfferKey != "" || p.Prices[0] != (pay.Price{Completion: 1e9}) {
		t.Errorf("%+v, %v", p, err)
	}
	for _, args := range [][]string{{"up"}, {"up", "--prompt-price", "0", "--payout", payout}} {
		if parsed, err = parse(t, args...); err != nil {
			t.Fatal(err)
		}
		if p, err := parsed.Up.payment(); p != nil || err != nil {
			t.Errorf("%v: %+v, %v", args, p, err)
		}
	}
	for want, args := range map[string][]string{
		"--payout":          {"--prompt-price", "1"},
		"above its ceiling": {"--prompt-price", "1", "--prompt-ceiling", "0.5", "--payout", payout},
		"--voucher-step: a": {"--prompt-price", "1", "--voucher-step", "0", "--payout", payout},
		"out of bounds":     {"--prompt-price", "1000001", "--payout", payout},
		"--payout: ":        {"--prompt-price", "1", "--payout", "me"},
		"global config":     {"--prompt-price", "1", "--payout", payout, "--ton-network", "mainnet"},
	} {
		parsed, err := parse(t, append([]string{"up"}, args...)...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		if p, err := parsed.Up.payment(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %+v, %v, want %q", args, p, err, want)
		}
	}
	for want, args := range map[string][]string{
		"without prices":    {"up", "--voucher-step", "1"},
		"--price=auto":      {"up", "--prompt-price", "1", "--prompt-floor", "1"},
		"TON in decimal":    {"up", "--prompt-price", "1e3"},
		"CSV":               {"earnings", "--csv", "--json"},
		"flags of payments": {"up", "--claim-key", "k"},
	} {
		if _, err := parse(t, args...); err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(want)) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
	if _, err := runCommand(t, "price"); err == nil || !strings.Contains(err.Error(), "--prompt-price") {
		t.Errorf("price without one: %v", err)
	}
	if _, err := runCommand(t, "price", "--prompt-price", "1"); err == nil || !strings.Contains(err.Error(), "no such VM") {
		t.Errorf("price of nothing: %v", err)
	}
	var c PriceCmd
	c.CompletionPrice = new(tonPrice(5))
	models := []till.ModelState{
		{ID: "acme/a@1", Price: pay.Price{Prompt: 3, Completion: 4}, Ceiling: pay.Price{Prompt: 5, Completion: 5}},
		{ID: "acme/b@1", Price: pay.Price{Prompt: 3, Completion: 9}, Ceiling: pay.Price{Prompt: 5, Completion: 9}},
	}
	if list, rises, err := c.prices(models); err != nil || !rises || list[0] != (pay.Price{Prompt: 3, Completion: 5}) || list[1] != (pay.Price{Prompt: 3, Completion: 5}) {
		t.Errorf("%+v, %v, %v", list, rises, err)
	}
	c.Model = "acme/b@1"
	if list, rises, err := c.prices(models); err != nil || rises || list[0] != models[0].Price || list[1].Completion != 5 {
		t.Errorf("of one model: %+v, %v, %v", list, rises, err)
	}
	c.Model, c.CompletionPrice = "acme/c@1", nil
	if _, _, err := c.prices(models); err == nil {
		t.Error("of a model that there is not")
	}
}

// TestEarnings shows what is in the stores of two VMs that do not run, on two networks,
// and claims what one of them has.
func TestEarnings(t *testing.T) {
	dir := t.TempDir()
	chain, _ := serveDevnet(t, dir)
	key := filepath.Join(dir, "client.key")
	fundedKey(t, chain, key)
	payout := "0:" + strings.Repeat("55", 32)
	do := func(args ...string) string {
		t.Helper()
		out, err := runCommand(t, args...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return out
	}
	do("channel", "open", payout, "1", "--key-file", key)
	list, err := channel.Own{Path: filepath.Join(dir, "chrysalis", "ton", "channels.json")}.List()
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	private, err := registry.LoadKey(key)
	if err != nil {
		t.Fatal(err)
	}
	id := voucher.Channel(list[0].Address.ID)
	day := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	for _, vm := range []struct {
		path    string
		network int32
		total   uint64
	}{{"a/till/-7077", -7077, 300_000_000}, {"b/till/-7077", -7077, 100_000_000}, {"b/till/-239", -239, 7}} {
		s, err := store.Open(filepath.Join(dir, "chrysalis", "vms", vm.path))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Admit(id, vm.network, voucher.Key(list[0].PayerKey), store.Chain{Cover: 900_000_000}); err != nil {
			t.Fatal(err)
		}
		v := voucher.Sign(private, vm.network, id, vm.total)
		use := []store.Use{{Model: "acme/model@1", Requests: 1, PromptTokens: 10, CompletionTokens: 20, Earned: vm.total / 2}}
		if err := s.Put(day, store.Update{Channel: id, Voucher: &v, Uses: use}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if out := do("earnings", "--csv"); !strings.HasSuffix(out, "\n2026-06-01,acme/model@1,2,20,40,200000000,0,200000000,0,0\n") {
		t.Errorf("both together: %s", out)
	}
	if out := do("earnings", "b"); !strings.Contains(out, "0.05 TON") || !strings.Contains(out, "total") {
		t.Errorf("one: %s", out)
	}
	if out := do("earnings", "--ton-network=-239", "--csv"); !strings.HasSuffix(out, ",3,0,3,0,0\n") {
		t.Errorf("the other network: %s", out)
	}
	if _, err := runCommand(t, "earnings", "--claim"); err == nil || !strings.Contains(err.Error(), "name the VM") {
		t.Errorf("claim for all: %v", err)
	}
	if _, err := runCommand(t, "earnings", "c", "--claim"); err == nil || !strings.Contains(err.Error(), "earned nothing") {
		t.Errorf("claim for nobody: %v", err)
	}
	var doc struct {
		Total struct{ Claimed, Fees uint64 }
	}
	out := do("earnings", "a", "--claim", "--json")
	if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.Total.Claimed != 150_000_000 || doc.Total.Fees == 0 {
		t.Errorf("claimed: %v: %s", err, out)
	}
	// The other VM's voucher for the same channel, which no till would have taken, is
	// worth nothing any more.
	if _, err := runCommand(t, "earnings", "b", "--claim"); err != nil {
		t.Errorf("claim once more: %v", err)
	}
	path := filepath.Join(dir, "chrysalis", "vms", "a", "till", "-7077", "vouchers.log")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := do("earnings", "a", "--csv"); !strings.Contains(out, "acme/model@1") {
		t.Errorf("of a damaged store: %s", out)
	}
}
