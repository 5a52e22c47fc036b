package main

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/launcher"
	"chrysalis/launcher/till"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/registry"
)

func filled(n int, b byte) record.Hex { return bytes.Repeat([]byte{b}, n) }

// vmRecords are the records of a VM on a TPM.
func vmRecords() *record.File {
	i := record.Image{
		Version: record.Version, Kind: record.KindImage, Name: "chrysalis", Platform: record.TPM, Boot: record.BootKernel,
		Commit: strings.Repeat("a", 40), Lock: filled(32, 4), UKI: filled(32, 5), Firmware: filled(32, 6), QEMU: "10.0.2",
	}
	for _, n := range record.ImagePCRs {
		i.PCRs = append(i.PCRs, record.PCR{Index: n, SHA256: filled(32, byte(n))})
	}
	key := i.Key()
	return &record.File{
		Version: record.Version, Image: i,
		Shapes: []record.Shape{{Version: record.Version, Kind: record.KindShape, Name: "small", Platform: i.Platform, Image: key[:],
			PCR1: filled(32, 1), VCPUs: 2, Memory: 2 << 30, PhysBits: 46, Disks: 3}},
		Engines: []record.Engine{{Version: record.Version, Kind: record.KindEngine, Name: "llama.cpp", RootHash: filled(32, 9), Profile: filled(32, 10)}},
		Models:  []record.Model{{Version: record.Version, Kind: record.KindModel, Name: "acme/model", Revision: "1", RootHash: filled(32, 11)}},
	}
}

// TestUpList boots, which a stand-in does, only what a pinned publisher has all records
// of, and then lists it.
func TestUpList(t *testing.T) {
	dir := t.TempDir()
	chain, _ := serveDevnet(t, dir)
	publisher, owner := filepath.Join(dir, "publisher.key"), filepath.Join(dir, "owner.key")
	address, own := fundedKey(t, chain, publisher), fundedKey(t, chain, owner)
	file := vmRecords()
	do := func(args ...string) string {
		t.Helper()
		out, err := runCommand(t, args...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return out
	}
	booted := 0
	platform := launcher.PlatformTCG
	up := func(args ...string) error {
		t.Helper()
		c, err := parse(t, append([]string{"up", "--list", "--key-file", owner, "--endpoint", "worker.example:8443",
			"--prompt-price", "0", "--completion-price", "3000"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		_, err = capture(t, func() error {
			return c.Up.run(t.Context(), func() (*record.File, error) { return file, nil }, func() (*launcher.Instance, error) {
				booted++
				return &launcher.Instance{State: launcher.State{Platform: platform}}, nil
			})
		})
		return err
	}
	refused := func(want error, what string, args ...string) {
		t.Helper()
		if err := up(args...); err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), what) || booted > 0 {
			t.Errorf("%d were booted: %v, want %q", booted, err, what)
		}
	}
	do("registry", "init", "--key-file", publisher)
	do("registry", "init", "--key-file", owner)
	// What the owner has published itself counts for nothing unless it is named.
	publish(t, owner, &file.Image, &file.Shapes[0], &file.Engines[0], &file.Models[0])
	refused(registry.ErrUnpublished, "of the image", "--registry", address)
	publish(t, publisher, &file.Image)
	refused(registry.ErrUnpublished, "of the model acme/model@1", "--registry", address)
	publish(t, publisher, &file.Models[0], &file.Shapes[0])
	refused(registry.ErrUnpublished, "of the engine llama.cpp", "--registry", address)
	publish(t, publisher, &file.Engines[0])
	refused(registry.ErrSignatures, "demands", "--registry", address, "--auditor", strings.Repeat("0", 64), "--signatures", "1")
	refused(nil, "endpoint", "--registry", address, "--endpoint", "worker")
	poor := filepath.Join(dir, "poor.key")
	do("registry", "new-key", poor)
	refused(registry.ErrNoFunds, "send", "--registry", address, "--key-file", poor)

	platform = launcher.PlatformTDX
	if err := up("--registry", address); err == nil || !strings.Contains(err.Error(), "runs on tdx") || booted != 1 {
		t.Errorf("another platform than was predicted: %v", err)
	}
	platform = launcher.PlatformTCG
	if out, err := runCommand(t, "listing", "find"); err == nil {
		t.Errorf("something is listed:\n%s", out)
	}
	if err := up("--registry", own, "--registry", address); err != nil || booted != 2 {
		t.Fatalf("%d were booted: %v", booted, err)
	}
	if out := do("listing", "find", "--model", "acme/model"); !strings.Contains(out, "acme/model@1") || !strings.Contains(out, "worker.example:8443") {
		t.Errorf("it lists\n%s", out)
	}

	// Another price, and nothing else.
	reprice := func(id string, price pay.Price) error {
		t.Helper()
		c, err := parse(t, "price", "--list", "--key-file", owner, "--prompt-price", "1")
		if err != nil {
			t.Fatal(err)
		}
		_, err = capture(t, func() error { return c.Price.relist(t.Context(), []till.ModelState{{ID: id}}, []pay.Price{price}) })
		return err
	}
	before := do("listing", "find", "--json")
	for range 2 { // the second time there is nothing to do
		if err := reprice("acme/model@1", pay.Price{Prompt: 5, Completion: 6}); err != nil {
			t.Fatal(err)
		}
	}
	want := strings.NewReplacer(`"prompt_price":0`, `"prompt_price":5`, `"completion_price":3000000000000`, `"completion_price":6`).Replace(before)
	if after := do("listing", "find", "--json"); after != want || after == before {
		t.Errorf("before %safter %s", before, after)
	}
	if err := reprice("acme/other@1", pay.Price{}); !errors.Is(err, registry.ErrNoOffer) {
		t.Errorf("of a model that is not offered: %v", err)
	}
}

func TestUpListFlags(t *testing.T) {
	t.Setenv("CHRYSALIS_TON_KEY", "")
	for want, args := range map[string][]string{
		"--endpoint=HOST:PORT, --prompt-price=TON, --completion-price=TON, --registry=ADDRESS": {"up", "--list", "--key-file", "k"},
		"missing flags: --key-file": {"up", "--list"},
		"without --list":            {"up", "--endpoint", "a:1"},
		"missing flags: --registry": {"listing", "put", "--key-file", "k", "--image", strings.Repeat("0", 64), "--model", "m",
			"--endpoint", "a:1", "--prompt-price", "0", "--completion-price", "0"},
	} {
		if _, err := parse(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}
