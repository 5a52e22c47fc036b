package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/attest/attesttest"
	"chrysalis/channel"
	"chrysalis/devnet/devnettest"
	"chrysalis/manifest"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/pay/purse"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

func TestPayFlags(t *testing.T) {
	t.Setenv("CHRYSALIS_TON_KEY", "")
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	for want, args := range map[string][]string{
		"missing flags: --budget=TON, --key-file=FILE": {"--worker", "https://127.0.0.1:1", "--max-price", "1"},
		"missing flags: --key-file=FILE":               {"--worker", "https://127.0.0.1:1", "--max-price", "1", "--budget", "1"},
		"--budget, --dry-run: only with --max-price":   {"--worker", "https://127.0.0.1:1", "--budget", "1", "--dry-run"},
		"--close-idle: not a time":                     {"--worker", "https://127.0.0.1:1", "--max-price", "1", "--budget", "1", "--key-file", "k", "--close-idle=-1s"},
		"to find workers that offer --model":           {"--model", "m"},
		`--max-price: "free" is no amount`:             {"--worker", "https://127.0.0.1:1", "--max-price", "free", "--budget", "1", "--key-file", "k"},
		`--budget: "0" is no amount`:                   {"--worker", "https://127.0.0.1:1", "--max-price", "1", "--budget", "0", "--key-file", "k"},
	} {
		c, err := parse(t, append([]string{"proxy", "--listen", "127.0.0.1:0"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Proxy.Run(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

// said runs something and returns what it wrote to standard error.
func said(t *testing.T, run func()) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := os.Stderr
	os.Stderr = f
	defer func() { os.Stderr = before }()
	run()
	out, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestProxyPays is docs/market.md's way of a client, on a devnet: it finds who offers a
// model, shows the plan, opens a channel, pays, and closes it at the end.
func TestProxyPays(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", dir)
	chain, _ := serveDevnet(t, dir)
	payer, owner := filepath.Join(dir, "payer.key"), filepath.Join(dir, "owner.key")
	fundedKey(t, chain, payer)
	address := fundedKey(t, chain, owner)
	ton := tonFlags{Network: "devnet", MaxAge: 2 * time.Minute, Liteservers: 1}
	flags := payerFlags{KeyFile: owner, Wallet: "v5r1"}
	publisher, err := flags.wallet(false).publisher(&ton, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer publisher.Reader.Client.Close()

	vm := attesttest.NewVM(record.TPM)
	price := pay.Price{Prompt: 1_000_000_000, Completion: 2_000_000_000}
	vm.Manifest.Payment = &manifest.Payment{Network: chain.GlobalID(), Step: 1_000_000, Ceilings: []pay.Price{price}}
	vm.Boot()
	demand := channel.Demand{GlobalID: chain.GlobalID(), Payee: publisher.Wallet.Address, MinDelay: time.Minute, MinCover: 1}
	worker, _ := devnettest.PaidWorker(t, vm, publisher.Reader.Client, demand, price)

	// The offer, with the records that one must have.
	file := vm.Record()
	if _, err := runCommand(t, "registry", "init", "--key-file", owner); err != nil {
		t.Fatal(err)
	}
	publish(t, owner, &file.Image, &file.Models[0])
	at, err := lite.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	image := file.Image.Key()
	publisher.Progress = nil
	if _, err := publisher.Do(t.Context(), registry.PutOffer(registry.OfferDocument{
		Version: registry.OfferVersion, Endpoint: worker.Address, Image: image[:], Capacity: 1, Payout: publisher.Wallet.Address.String(),
		Models: []registry.OfferedModel{{ID: "test/model@1", RootHash: file.Models[0].RootHash, PromptPrice: price.Prompt, CompletionPrice: price.Completion}},
	}, time.Now().Add(time.Hour), []lite.Address{at}, registry.Policy{})); err != nil {
		t.Fatal(err)
	}

	trust := files(t, vm)
	with := func(more ...string) []string {
		return append([]string{"proxy", "--listen", "127.0.0.1:0", "--policy", trust.Policy, "--record", trust.Record[0], "--model", "test/model", "--key-file", payer}, more...)
	}
	serve := func(ctx context.Context, out *os.File, args ...string) (text string, err error) {
		t.Helper()
		c, bad := parse(t, args...)
		if bad != nil {
			t.Fatal(bad)
		}
		before := os.Stdout
		os.Stdout = out
		defer func() { os.Stdout = before }()
		text = said(t, func() { err = c.Proxy.Run(ctx) })
		return text, err
	}
	run := func(ctx context.Context, args ...string) (text string, err error) {
		t.Helper()
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		return serve(ctx, null, args...)
	}
	deposits := func() string {
		out, err := runCommand(t, "channel", "list")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	// What costs too much, what nobody offers, a plan, and nobody to ask.
	if _, err := run(t.Context(), with("--max-price", "1.9", "--budget", "1")...); err == nil || !strings.Contains(err.Error(), "nobody offers") {
		t.Error(err)
	}
	if _, err := run(t.Context(), with("--max-price", "3", "--budget", "1", "--model", "test/other")...); err == nil || !strings.Contains(err.Error(), "nobody offers") {
		t.Error(err)
	}
	text, err := run(t.Context(), with("--max-price", "3", "--budget", "1", "--dry-run")...)
	for _, want := range []string{worker.URL, "test/model@1", "1 TON", "2 TON", publisher.Wallet.Address.String(), "dry run", "at most 1 TON is paid"} {
		if err != nil || !strings.Contains(text, want) {
			t.Errorf("%v, want %q in\n%s", err, want, text)
		}
	}
	if _, err := run(t.Context(), with("--max-price", "3", "--budget", "1")...); err == nil || !strings.Contains(err.Error(), "--yes") {
		t.Error(err)
	}
	if out := deposits(); strings.Count(out, "\n") != 1 {
		t.Errorf("channels were opened:\n%s", out)
	}

	// A stranger's offer costs less, and there is no worker: it is named, and the other used.
	stranger := payerFlags{KeyFile: filepath.Join(dir, "stranger.key"), Wallet: "v5r1"}
	fundedKey(t, chain, stranger.KeyFile)
	cheap, err := stranger.wallet(false).publisher(&ton, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cheap.Reader.Client.Close()
	cheap.Progress = nil
	if _, err := cheap.Do(t.Context(), registry.PutOffer(registry.OfferDocument{
		Version: registry.OfferVersion, Endpoint: "127.0.0.1:1", Image: image[:], Capacity: 1, Payout: cheap.Wallet.Address.String(),
		Models: []registry.OfferedModel{{ID: "test/model@1", RootHash: file.Models[0].RootHash, PromptPrice: 1, CompletionPrice: 1}},
	}, time.Now().Add(time.Hour), []lite.Address{at}, registry.Policy{})); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t.Context(), with("--max-price", "1.9", "--budget", "1", "--yes")...); err == nil || !strings.Contains(err.Error(), "no worker that can be used") {
		t.Error(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	printed, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer printed.Close()
	defer stdout.Close()
	var page string
	go func() {
		defer cancel()
		var url string // it is printed once requests can come
		if _, err := fmt.Fscanln(printed, &url); err != nil {
			return
		}
		ask := func() (int, string) {
			answer, err := http.Post(url+"/chat/completions", "application/json",
				strings.NewReader(`{"model":"test/model","stream":true,"max_tokens":8,"messages":[{"role":"user","content":"hello"}]}`))
			if err != nil {
				return 0, err.Error()
			}
			defer answer.Body.Close()
			data, _ := io.ReadAll(answer.Body)
			return answer.StatusCode, string(data)
		}
		for range 3 {
			status, text := ask()
			if status != 200 || !strings.Contains(text, "[DONE]") {
				t.Errorf("%d %s", status, text)
			}
		}
		if answer, err := http.Get(strings.TrimSuffix(url, "v1")); err == nil {
			data, _ := io.ReadAll(answer.Body)
			answer.Body.Close()
			page = string(data)
		}
	}()
	text, err = serve(ctx, stdout, with("--max-price", "3", "--budget", "1", "--yes", "--close-idle", "0s")...)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	for _, want := range []string{"not used: dial tcp 127.0.0.1:1", "opening the channel", "is closing", "was paid"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if !strings.Contains(page, "of it used") || !strings.Contains(page, "Channel <code>0:") {
		t.Errorf("the page:\n%s", page)
	}
	if out := deposits(); strings.Count(out, "closing until") != 1 {
		t.Errorf("%s", out)
	}
	// A payee that broke the rules is listed, and forgiven once.
	key, err := registry.LoadKey(payer)
	if err != nil {
		t.Fatal(err)
	}
	wallet, err := registry.NewWallet(key, "v5r1", chain.GlobalID())
	if err != nil {
		t.Fatal(err)
	}
	ledger, err := purse.Open(purseDir(filepath.Join(dir, "chrysalis"), wallet, chain.GlobalID()), chain.GlobalID(), key, 1)
	if err != nil {
		t.Fatal(err)
	}
	list := ledger.States()
	if len(list) != 1 || list[0].Used == 0 || list[0].Signed < list[0].Used {
		t.Fatalf("%+v", list)
	}
	// Two at a time are refused.
	if _, err := run(t.Context(), with("--max-price", "3", "--budget", "1", "--yes")...); !errors.Is(err, purse.ErrLocked) {
		t.Error(err)
	}
	account, err := ledger.Use(purse.Channel{ID: list[0].Channel, Payee: list[0].Payee, Limit: 1 << 40}, worker.URL)
	if err != nil {
		t.Fatal(err)
	}
	account.Bar(purse.ErrNoReceipt)
	if err := ledger.Close(); err != nil {
		t.Fatal(err)
	}
	if text, err := run(t.Context(), with("--max-price", "3", "--budget", "1", "--yes")...); err == nil || !strings.Contains(text, purse.ErrNoReceipt.Error()) {
		t.Errorf("%v\n%s", err, text)
	}
	owned := publisher.Wallet.Address.String()
	if out, err := runCommand(t, "channel", "forgive", "--key-file", payer); err != nil || !strings.Contains(out, owned) || !strings.Contains(out, purse.ErrNoReceipt.Error()) {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := runCommand(t, "channel", "forgive", "--key-file", payer, owned); err != nil {
		t.Error(err)
	}
	if _, err := runCommand(t, "channel", "forgive", "--key-file", payer, owned); err == nil {
		t.Error("forgiven twice")
	}
	// chat says what is to be done, and does it.
	chat := func(more ...string) (out, text string, err error) {
		t.Helper()
		c, bad := parse(t, append([]string{"chat", "--endpoint", worker.URL, "--policy", trust.Policy, "--record", trust.Record[0], "--model", "test/model", "--key-file", payer, "hello"}, more...)...)
		if bad != nil {
			t.Fatal(bad)
		}
		text = said(t, func() {
			out, err = capture(t, func() error { return c.Chat.Run(t.Context()) })
		})
		return out, text, err
	}
	if _, _, err := chat(); err == nil || !strings.Contains(err.Error(), "add --max-price") {
		t.Error(err)
	}
	if _, _, err := chat("--max-price", "3"); err == nil || !strings.Contains(err.Error(), "--budget") {
		t.Error(err)
	}
	if out, _, err := chat("--max-price", "1.9", "--budget", "1", "--yes"); err == nil || out != "" {
		t.Errorf("%v, %s", err, out)
	}
	saved := filepath.Join(dir, "saved")
	out, text, err := chat("--max-price", "3", "--budget", "1", "--yes", "--checks", "--save", saved, "--close-idle", "0s")
	if err != nil || strings.TrimSpace(out) == "" || !strings.Contains(text, "✔") || !strings.Contains(text, "was paid") || !strings.Contains(text, "is closing") || strings.Contains(text, "stays open") {
		t.Errorf("%v\n%s\n%s", err, out, text)
	}
	if out, err := runCommand(t, "verify", "receipt", "--policy", trust.Policy, "--record", trust.Record[0], saved); err != nil || !strings.Contains(out, "TON charged") {
		t.Errorf("%v\n%s", err, out)
	}
}
