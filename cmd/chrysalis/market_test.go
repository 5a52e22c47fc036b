package main

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"chrysalis/attest/attesttest"
	"chrysalis/market"
	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// TestMarketCommand lists what four owners offer: a worker that holds, the same for a
// model that it does not serve, one that is refused, one that is not there, and what is
// no address.
func TestMarketCommand(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	dir := t.TempDir()
	chain, server := serveDevnet(t, dir)
	publisher := filepath.Join(dir, "publisher.key")
	address := fundedKey(t, chain, publisher)
	do := func(args ...string) string {
		t.Helper()
		out, err := runCommand(t, args...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return out
	}
	vm, other := attesttest.NewVM(record.TPM), attesttest.NewVM(record.TPM)
	f := files(t, vm)
	good, bad := attesttest.Serve(vm), attesttest.Serve(other)
	defer good.Close()
	defer bad.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()

	do("registry", "init", "--key-file", publisher)
	image, model := vm.Record().Image, vm.Record().Models[0]
	another := model
	another.Name, another.RootHash = "acme/model", filled(32, 7)
	publish(t, publisher, &image, &model, &another)
	key := image.Key()
	publishers := []lite.Address{}
	if a, err := lite.ParseAddress(address); err == nil {
		publishers = append(publishers, a)
	}
	ton := &tonFlags{Network: "devnet", MaxAge: 2 * time.Minute, Liteservers: 1}
	put := func(name, endpoint string, price int64, m record.Model) {
		t.Helper()
		owner := filepath.Join(dir, name+".key")
		fundedKey(t, chain, owner)
		p, err := (&walletFlags{KeyFile: owner, Wallet: "v5r1"}).publisher(ton, "", newSteps())
		if err != nil {
			t.Fatal(err)
		}
		defer p.Reader.Client.Close()
		o := registry.OfferDocument{
			Version: registry.OfferVersion, Endpoint: endpoint, Image: key[:], Payout: p.Wallet.Address.String(), Capacity: 3,
			Models: []registry.OfferedModel{{ID: m.Name + "@" + m.Revision, RootHash: m.RootHash, PromptPrice: price, CompletionPrice: 1_500_000_000}},
		}
		if _, err := p.Do(t.Context(), registry.PutOffer(o, time.Now().Add(24*time.Hour).Truncate(time.Second), publishers, registry.Policy{})); err != nil {
			t.Fatal(err)
		}
	}
	host := func(url string) string { return strings.TrimPrefix(url, "https://") }
	put("good", host(good.URL), 4_000_000, model)
	put("cheap", host(good.URL), 1_000_000, another)
	put("bad", host(bad.URL), 2_000_000, model)
	put("gone", gone.Addr().String(), 3_000_000, model)
	put("none", "x@"+host(good.URL), 5_000_000, model)

	trusted := []string{"--policy", f.Policy, "--record", f.Record[0]}
	line := func(out string, want ...string) {
		t.Helper()
		if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != len(want)+1 {
			t.Errorf("%d lines in\n%s", len(lines), out)
		} else {
			for i, w := range want {
				if !regexp.MustCompile(w).MatchString(lines[i+1]) {
					t.Errorf("%q is not in line %d of\n%s", w, i+1, out)
				}
			}
		}
	}
	// Without a probe nobody is asked, and nothing is known.
	line(do("market"), `acme/model@1 .* \? .* never `, ` \? .* never `, ` \? .* never `, ` \? .* never `, ` \? .* never `)
	if evidence, connections := good.Counts(); evidence+connections > 0 {
		t.Errorf("a list without probes made %d connections", connections)
	}
	line(do(append([]string{"market", "--probe"}, trusted...)...),
		`^acme/model@1 +0707\S+ +0\.001 +1\.5 +3 +no: other-model +\d+ ms +0 of 1 +\S+ ago +127`,
		`^test/model@1 +\S+ +0\.002 .* no: [a-z0-9-]+ +\d+ ms +0 of 1 `,
		` 0\.003 .* no: unreachable +\? +0 of 1 `,
		` 0\.004 .* yes, NOT CONFIDENTIAL +\d+ ms +1 of 1 `,
		` 0\.005 .* no: unreachable +\? +0 of 1 .* x@127`)
	if evidence, _ := good.Counts(); evidence != 1 {
		t.Errorf("the worker of two offers was asked %d times", evidence)
	}
	// What was found is remembered, and added up.
	good.Close()
	do(append([]string{"market", "--probe", "--model", model.RootHash.String()}, trusted...)...)
	out := do("market", "--model", "test/model", "--json")
	var document struct {
		Offers []marketRow `json:"offers"`
		All    int         `json:"all"`
	}
	if err := json.Unmarshal([]byte(out), &document); err != nil || document.All != 4 || len(document.Offers) != 4 {
		t.Fatalf("%v: %s", err, out)
	}
	if r := document.Offers[2]; r.Probe == nil || r.Probe.Result != market.Unreachable || r.Good != 1 || r.Probes != 2 || r.PromptPrice != 4_000_000 || r.Capacity != 3 {
		t.Errorf("%+v", r)
	}
	line(do("market", "--limit", "1"), "acme/model@1 .* no: other-model .* 0 of 1 ")
	line(do("market", "--max-price", "1.5", "--limit", "1"), "acme/model@1 ")
	if out := do("market", "--max-price", "1.499999999"); out != "" {
		t.Errorf("too dear, and shown:\n%s", out)
	}

	// What was remembered is damaged: the file is named, and nothing is lost by itself.
	paths, _ := filepath.Glob(filepath.Join(dir, "chrysalis", "ton", "probes-*.json"))
	if len(paths) != 1 {
		t.Fatal(paths)
	}
	if err := os.WriteFile(paths[0], []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := runCommand(t, "market"); err == nil || !strings.Contains(err.Error(), paths[0]) || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("a damaged history: %v", err)
	}
	os.Remove(paths[0])
	for _, args := range [][]string{{"market", "--limit", "0"}, {"market", "--limit", "513"}, {"market", "--timeout", "0s"}, {"market", "--max-price", "x"}, {"market", "--probe", "--record", publisher}} {
		if out, err := runCommand(t, args...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}
	server.Close()
	if out, err := runCommand(t, "market", "--ton-max-age", "1ns"); err == nil {
		t.Errorf("without a network: %s", out)
	}
}

// What strangers and an old file say is made harmless.
func TestPrintMarket(t *testing.T) {
	var out strings.Builder
	now := time.Unix(1000, 0)
	rows := []marketRow{
		{Model: "a/b@1", RootHash: filled(32, 1), PromptPrice: 1, CompletionPrice: 2_000_000_000, Capacity: 1, Endpoint: "\x1b]0;x\x07h\n\u202e:1", Owner: "o",
			Probe: &market.Probe{At: 940, Result: market.Attested, Confidential: true, Latency: 12}, Good: 3, Probes: 4},
		{Model: "a/b@2", RootHash: filled(32, 2), Endpoint: "h:2", Owner: "p", Probe: &market.Probe{At: 5000, Result: "pcr4"}, Probes: 1},
	}
	if err := printMarket(&out, rows, now); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	if len(lines) != 4 || strings.ContainsAny(out.String(), "\x1b\x07\u202e") {
		t.Errorf("%q", out.String())
	}
	for i, want := range []string{
		"MODEL", `^a/b@1 +010101010101 +0\.000000001 +2 +1 +yes +12 ms +3 of 4 +1m0s ago +h :1 +o$`, `^a/b@2 .* no: pcr4 +\? +0 of 1 +0s ago +h:2 +p$`,
	} {
		if !regexp.MustCompile(want).MatchString(lines[i]) {
			t.Errorf("%q is not %q", lines[i], want)
		}
	}
}
