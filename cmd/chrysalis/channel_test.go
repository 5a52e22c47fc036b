package main

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/xssnick/tonutils-go/address"

	"chrysalis/channel"
	"chrysalis/registry"
)

// TestChannelCommands is docs/market.md's way of a client, on a devnet.
func TestChannelCommands(t *testing.T) {
	dir := t.TempDir()
	chain, _ := serveDevnet(t, dir)
	key := filepath.Join(dir, "wallet.key")
	t.Setenv("CHRYSALIS_TON_KEY", key)
	must := func(want string, args ...string) string {
		t.Helper()
		out, err := runCommand(t, args...)
		if err != nil || !regexp.MustCompile(want).MatchString(out) {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return out
	}
	fails := func(want error, args ...string) {
		t.Helper()
		if out, err := runCommand(t, args...); err == nil || want != nil && !errors.Is(err, want) {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	wallet := strings.TrimSpace(must(`^UQ`, "wallet", "new", key))
	fails(nil, "wallet", "new", key)
	must(regexp.QuoteMeta(wallet), "wallet", "address")
	must(`^\{"wallet":"UQ.*"\}\n$`, "wallet", "address", "--json")
	must(`\t0 TON`, "wallet", "balance")
	to, err := address.ParseAddr(wallet)
	if err != nil {
		t.Fatal(err)
	}
	payee := "0:" + strings.Repeat("55", 32)
	must(`^CHANNEL`, "channel", "list")
	fails(registry.ErrNoFunds, "channel", "open", payee, "1")
	if err := chain.Fund(to, tonAmount(10)); err != nil {
		t.Fatal(err)
	}
	must(`\t10 TON`, "wallet", "balance")
	must(`"balance":10000000000`, "wallet", "balance", "--json")
	for _, bad := range [][]string{
		{"me", "1"}, {payee, "0"}, {payee, "1.0000000001"}, {payee, "x"}, {payee, "1", "--delay=721h"}, {payee, "1", "--delay=1.5s"},
	} {
		fails(nil, append([]string{"channel", "open"}, bad...)...)
	}
	fails(channel.ErrCover, "channel", "open", payee, "0.01")
	must(`dry run`, "channel", "open", payee, "1", "--dry-run")
	must(`^open EQ.*: done`, "channel", "open", payee, "1", "--delay=0s")
	must(`"status":"open"`, "channel", "list", "--json")
	must(`forget|CHANNEL`, "channel", "list", "--forget") // those that were never opened
	out := must(`"status":"open"`, "channel", "list", "--json")
	var list []channelLine
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 || list[0].Balance < 900_000_000 {
		t.Fatalf("%v: %s", err, out)
	}
	a := list[0].Address.String()
	must(`^top up `, "channel", "top-up", a, "0.5")
	fails(nil, "channel", "top-up", a, "none")
	fails(nil, "channel", "top-up", "x", "1")
	must(`(?s)^begin to close .*take the rest`, "channel", "close", a)
	must(`closing until`, "channel", "list")
	fails(channel.ErrClosing, "channel", "top-up", a, "0.5")
	must(`^finish `, "channel", "close", a)
	must(`closed`, "channel", "list")
	fails(channel.ErrNoChannel, "channel", "close", a)
	must(`closed`, "channel", "list", "--forget")
	must(`^\[\]\n$`, "channel", "list", "--json")
	must(`\t9\.99`, "wallet", "balance")
}
