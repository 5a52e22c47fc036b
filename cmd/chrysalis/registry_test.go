package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"chrysalis/attest/attesttest"
	"chrysalis/devnet"
	"chrysalis/devnet/devnettest"
	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// runCommand runs a command as the program does, and returns what it prints.
func runCommand(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var c cli
	parser, err := kong.New(&c, kong.Name("chrysalis"), kong.Exit(func(int) { t.Error("it exits") }))
	if err != nil {
		t.Fatal(err)
	}
	k, err := parser.Parse(args)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	k.BindTo(t.Context(), (*context.Context)(nil))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan string)
	go func() {
		var b bytes.Buffer
		io.Copy(&b, r)
		out <- b.String()
	}()
	stdout := os.Stdout
	os.Stdout = w
	err = k.Run()
	os.Stdout = stdout
	w.Close()
	return <-out, err
}

// serveDevnet runs a chain that commands find in the state folder.
func serveDevnet(t *testing.T, state string) (*devnet.Chain, *devnet.Server) {
	t.Helper()
	t.Setenv("XDG_STATE_HOME", state)
	t.Setenv("CHRYSALIS_TON_NETWORK", "devnet")
	chain, server := devnettest.Serve(t, devnet.Options{})
	dir := filepath.Join(state, "chrysalis", "devnet")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, globalConfigName), chain.GlobalConfig(server), 0o644); err != nil {
		t.Fatal(err)
	}
	return chain, server
}

// publish publishes records in the registry of a key's wallet.
func publish(t *testing.T, keyFile string, records ...record.Record) {
	t.Helper()
	for _, r := range records {
		data, err := record.Encode(r)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "record.json")
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := runCommand(t, "registry", "publish", "--key-file", keyFile, path); err != nil {
			t.Fatal(err)
		}
	}
}

// fundedKey makes the key of a wallet with money, and tells the wallet's registry.
func fundedKey(t *testing.T, chain *devnet.Chain, path string) string {
	t.Helper()
	if _, err := runCommand(t, "registry", "new-key", path); err != nil {
		t.Fatal(err)
	}
	private, err := registry.LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	wallet, err := registry.NewWallet(private, "v5r1", chain.GlobalID())
	if err != nil {
		t.Fatal(err)
	}
	if err := chain.Fund(wallet.Address.Std(), tonAmount(10)); err != nil {
		t.Fatal(err)
	}
	return registry.AddressOfWallet(wallet).String()
}

// TestRegistryCommands is docs/ton.md, on a devnet.
func TestRegistryCommands(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_STATE_HOME", dir)
	t.Setenv("CHRYSALIS_TON_NETWORK", "devnet")
	if _, err := runCommand(t, "registry", "list", "EQABAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAJYa"); err == nil || !strings.Contains(err.Error(), "chrysalis devnet") {
		t.Errorf("no devnet: %v", err)
	}
	chain, server := serveDevnet(t, dir)
	key, auditor := filepath.Join(dir, "publisher.key"), filepath.Join(dir, "auditor.key")
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
		if out, err := runCommand(t, args...); !errors.Is(err, want) {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	must(`^[0-9a-f]{64}\n$`, "registry", "new-key", key)
	public := strings.TrimSpace(must(`^[0-9a-f]{64}\n$`, "registry", "new-key", auditor))
	fails(registry.ErrNoFunds, "registry", "init")
	must(`(?m)^wallet\tUQ.*\nregistry\tEQ`, "registry", "address")
	private, err := registry.LoadKey(key)
	if err != nil {
		t.Fatal(err)
	}
	wallet, err := registry.NewWallet(private, "v5r1", chain.GlobalID())
	if err != nil {
		t.Fatal(err)
	}
	if err := chain.Fund(wallet.Address.Std(), tonAmount(10)); err != nil {
		t.Fatal(err)
	}
	height := chain.Height()
	must(`dry run`, "registry", "init", "--dry-run")
	if chain.Height() > height+1 {
		t.Error("a dry run sent something")
	}
	must(`^init: done`, "registry", "init")
	must(`^nothing to do`, "registry", "init")
	address := registry.AddressOfWallet(wallet).String()

	model := &record.Model{Version: record.Version, Kind: record.KindModel, Name: "acme/model", Revision: "1", RootHash: make([]byte, 32)}
	data, err := record.Encode(model)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "model.json")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	sum := model.Key()
	id := hex.EncodeToString(sum[:])
	must(`^publish .*: done`, "registry", "publish", file)
	must(`^nothing to do`, "registry", "publish", file)
	must(id+`  model  active`, "registry", "list", address)
	must(`"records":\[{"key":"`+id, "registry", "list", address, "--json")
	fails(registry.ErrSignatures, "registry", "show", address, id, "--auditor", public, "--signatures", "1")
	must(`^cosign .*: done`, "registry", "cosign", file, "--registry", address, "--auditor-key", auditor)
	must(`signed by +`+public, "registry", "show", address, id, "--auditor", public, "--signatures", "1")
	bundle := filepath.Join(dir, "bundle.json")
	must(`1 records`, "registry", "bundle", address, "-o", bundle)
	must(`^top-up: done`, "registry", "top-up", address, "0.5")
	must(`^deprecate .*: done`, "registry", "deprecate", id)
	fails(registry.ErrDeprecated, "registry", "show", address, id)
	must(`^revoke .*: done`, "registry", "revoke", id)
	fails(registry.ErrRevoked, "registry", "show", address, id)
	fails(registry.ErrRevoked, "registry", "publish", file)
	fails(registry.ErrNoRecord, "registry", "revoke", strings.Repeat("0", 64))

	// Without a connection, the bundle still has it as it was.
	server.Close()
	must(`status +active`, "registry", "show", address, id, "--bundle", bundle)
	fails(lite.ErrStale, "registry", "show", address, id, "--bundle", bundle, "--bundle-age", "1ns")
}

func TestTONFlags(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	config := filepath.Join(t.TempDir(), "global.json")
	if err := os.WriteFile(config, []byte(`{"liteservers":[{"ip":1,"port":1,"id":{"key":"n4VDnSCUuSpjnCyUk9e3QOOd6o0ItSWYbTnW3Wnn8wk="}}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	mainnet, _ := lite.Known("mainnet")
	n, err := (&tonFlags{Network: "mainnet", GlobalConfig: config}).network()
	if err != nil || n.GlobalID != -239 || n.KeyBlock != mainnet.KeyBlock {
		t.Errorf("%+v, %v", n, err)
	}
	n, err = (&tonFlags{Network: "-5", GlobalConfig: config, KeyBlock: mainnet.KeyBlock.String()}).network()
	if err != nil || n.GlobalID != -5 || n.KeyBlock != mainnet.KeyBlock {
		t.Errorf("%+v, %v", n, err)
	}
	for name, f := range map[string]tonFlags{
		"no config":                {Network: "mainnet"},
		"unknown network":          {Network: "nonsense", GlobalConfig: config},
		"no block to trust":        {Network: "-5", GlobalConfig: config},
		"a key block that is none": {Network: "mainnet", GlobalConfig: config, KeyBlock: "1:2:3"},
	} {
		if _, err := f.network(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestTONDocument has docs/ton.md name the blocks that the program trusts.
func TestTONDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/ton.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"mainnet", "testnet"} {
		known, _ := lite.Known(name)
		if !bytes.Contains(text, []byte(name+"  "+known.KeyBlock.String()+"\n")) {
			t.Errorf("it does not name %s of the %s", known.KeyBlock, name)
		}
	}
}

// TestRegistryGPUs verifies a VM with GPUs by what a registry says: the records are
// of image, shape, engine and model, and NVIDIA answers for the rest.
func TestRegistryGPUs(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_STATE_HOME", dir)
	t.Setenv("XDG_CACHE_HOME", dir)
	t.Setenv("CHRYSALIS_TON_NETWORK", "devnet")
	chain, _ := serveDevnet(t, dir)
	key := filepath.Join(dir, "publisher.key")
	address := fundedKey(t, chain, key)
	t.Setenv("CHRYSALIS_TON_KEY", key)
	vm := attesttest.NewVM(record.TDX)
	vm.AddGPUs(2)
	f := files(t, vm)
	for _, args := range [][]string{{"registry", "init"}, {"registry", "publish", f.Record[0]}} {
		if out, err := runCommand(t, args...); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	worker := attesttest.Serve(vm)
	defer worker.Close()
	f.Record, f.Registry = nil, []string{address}
	f.TON.Network = "devnet"
	trusted, err := f.load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	transport := trusted.transport()
	transport.Collateral = vm.Intel.Collateral()
	session, err := transport.Attest(t.Context(), worker.URL)
	if err != nil || len(session.Verdict.GPUs) != 2 {
		t.Fatalf("%v", err)
	}
	vm.GPUs[1] = vm.Vendor.NewGPU()
	vm.Carried = vm.Vendor.Collateral(vm.GPUs...)
	if session, err = transport.Attest(t.Context(), worker.URL); session == nil || session.Verdict.Failed != "gpu-identity" {
		t.Errorf("%v", err)
	}
}
