package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"math/big"
	"syscall"
	"time"

	"chrysalis/devnet"
	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// ton measures the registry on a devnet, whose prices are the mainnet's of June 2026.
func ton() error {
	b := &tonBench{ctx: context.Background()}
	defer b.close()
	if err := b.fees(); err != nil {
		return err
	}
	if err := b.read(); err != nil {
		return err
	}
	return b.cold()
}

type tonBench struct {
	ctx     context.Context
	closers []func()
	chain   *devnet.Chain
	network lite.Network
	publisher
}

type publisher = registry.Publisher

func (b *tonBench) close() {
	for i := len(b.closers) - 1; i >= 0; i-- {
		b.closers[i]()
	}
}

// open starts a chain and a client of it.
func (b *tonBench) open(validators int) error {
	chain, err := devnet.Open(devnet.Options{Validators: validators})
	if err != nil {
		return err
	}
	server, err := chain.Serve("127.0.0.1:0")
	if err != nil {
		return err
	}
	b.closers = append(b.closers, func() { server.Close(); chain.Close() })
	b.chain, b.network = chain, lite.Network{Name: "devnet", GlobalID: chain.GlobalID()}
	return b.network.ReadGlobalConfig(chain.GlobalConfig(server))
}

func (b *tonBench) reader() (registry.Reader, error) {
	client, err := lite.New(b.network, lite.Options{})
	if err == nil {
		b.closers = append(b.closers, client.Close)
	}
	return registry.Reader{Client: client, Key: registry.DeriveKey}, err
}

// imageRecord is one as large as a real one.
func imageRecord(n int) registry.Publication {
	random := func(size int) record.Hex {
		h := make(record.Hex, size)
		rand.Read(h)
		return h
	}
	r := &record.Image{
		Version: record.Version, Kind: record.KindImage, Name: fmt.Sprintf("chrysalis-%d", n), Platform: record.TDX, Boot: record.BootKernel,
		MRTD: random(48), RTMR1: random(48), RTMR2: random(48), Commit: random(20).String(),
		Lock: random(32), UKI: random(32), Firmware: random(32), QEMU: "11.1.3",
	}
	data, err := record.Encode(r)
	if err != nil {
		panic(err) // it is a valid one
	}
	return registry.Publication{
		Kind: contract.Image, Key: r.Key(), Record: data,
		NotBefore: time.Unix(1, 0), NotAfter: time.Now().Add(365 * 24 * time.Hour),
	}
}

// fees prints what operations cost a V5R1 wallet, all in.
func (b *tonBench) fees() (err error) {
	if err := b.open(1); err != nil {
		return err
	}
	if b.Reader, err = b.reader(); err != nil {
		return err
	}
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	if b.Wallet, err = registry.NewWallet(key, "v5r1", b.network.GlobalID); err != nil {
		return err
	}
	b.Registry = registry.AddressOfWallet(b.Wallet)
	if err := b.chain.Fund(b.Wallet.Address.Std(), big.NewInt(1000e9)); err != nil {
		return err
	}
	do := func(what string, limit float64, op registry.Operation) error {
		plan, err := b.Do(b.ctx, op)
		if err != nil {
			return err
		}
		if limit > 0 {
			row(what, "TON", float64(plan.Cost)/1e9, limit, true)
		} else if what != "" {
			figure(what, "TON", float64(plan.Cost)/1e9)
		}
		return nil
	}
	first := imageRecord(0)
	if err := do("make a registry, and the wallet; most stays there as rent paid ahead", 0, registry.Init()); err != nil {
		return err
	}
	if err := do(fmt.Sprintf("publish an image's record of %d bytes, a year's rent included", len(first.Record)), 0.02, registry.Publish(first)); err != nil {
		return err
	}
	begin := time.Now()
	for i := 1; i < 99; i++ {
		if err := do("", 0, registry.Publish(imageRecord(i))); err != nil {
			return err
		}
	}
	figure("publish and see it confirmed, on the devnet, mean of 98", "ms", float64(time.Since(begin).Milliseconds())/98)
	last := imageRecord(99)
	if err := do("publish the hundredth", 0.02, registry.Publish(last)); err != nil {
		return err
	}
	if err := do("co-sign it, ten years' rent included", 0, registry.Cosign(last.Key, sha256.Sum256(last.Record), key)); err != nil {
		return err
	}
	if err := do("revoke it", 0, registry.Mark(last.Key, contract.Revoked)); err != nil {
		return err
	}
	view, err := b.Reader.Client.Sync(b.ctx)
	if err != nil {
		return err
	}
	info, err := b.Reader.Info(b.ctx, view, b.Registry)
	if err != nil {
		return err
	}
	figure("a year's storage of 100 such records", "TON", float64(info.YearlyFee)/1e9)
	return nil
}

// read prints what a proved read takes, of a client that has the last key block.
func (b *tonBench) read() error {
	reader, err := b.reader()
	if err != nil {
		return err
	}
	view, err := reader.Client.Sync(b.ctx)
	if err != nil {
		return err
	}
	entries, err := reader.List(b.ctx, view, b.Registry)
	if err != nil {
		return err
	}
	measure := func(what string, read func(*lite.View) error) error {
		var times []float64
		var bytes int64
		for range 21 {
			if err := b.chain.Mine(); err != nil {
				return err
			}
			before, begin := reader.Client.Received(), time.Now()
			view, err := reader.Client.Sync(b.ctx)
			if err != nil {
				return err
			}
			if err := read(view); err != nil {
				return err
			}
			times = append(times, float64(time.Since(begin).Microseconds())/1000)
			bytes = reader.Client.Received() - before
		}
		row(what+", median of 21", "ms", median(times), 20, true)
		row(what, "kB", float64(bytes)/1000, 50, true)
		return nil
	}
	if err := measure("prove the last block and one of 100 records", func(v *lite.View) error {
		_, err := reader.Record(b.ctx, v, b.Registry, entries[50].Key)
		return err
	}); err != nil {
		return err
	}
	return measure("prove the last block and the list of 100 records", func(v *lite.View) error {
		list, err := reader.List(b.ctx, v, b.Registry)
		if err == nil && len(list) != 100 {
			err = fmt.Errorf("%d records", len(list))
		}
		return err
	})
}

// Of the mainnet: validators, and key blocks a day: one that names the next validators
// and one that they begin with, each 65,536 s, and now and then a configuration's.
const (
	mainnetValidators = 392
	keyBlocksADay     = 3
	coldDays          = 90
)

// cold estimates a start from an old key block, from links as large as the mainnet's.
func (b *tonBench) cold() error {
	if err := b.open(mainnetValidators); err != nil {
		return err
	}
	const links = 32
	for range links {
		if err := b.chain.Rotate(); err != nil {
			return err
		}
	}
	reader, err := b.reader()
	if err != nil {
		return err
	}
	view, err := reader.Client.ProveFrom(b.ctx, b.network.KeyBlock)
	if err != nil {
		return err
	}
	bytes := float64(reader.Client.Received()) / links
	// In the processor's time, of which the machine may have little to spare.
	const times = 5
	begin := processorTime(syscall.RUSAGE_SELF)
	for range times {
		if _, err := lite.VerifyChain(b.network.KeyBlock, view.Head.Block, b.network.GlobalID, view.Chain(), time.Hour, time.Now()); err != nil {
			return err
		}
	}
	each := float64((processorTime(syscall.RUSAGE_SELF) - begin).Microseconds()) / 1000 / times / links
	figure(fmt.Sprintf("one link between key blocks of %d validators", mainnetValidators), "kB", bytes/1000)
	figure("verify it, processor time", "ms", each)
	n := float64(keyBlocksADay * coldDays)
	figure(fmt.Sprintf("estimate: start from a key block %d days old, %d links", coldDays, keyBlocksADay*coldDays), "MB", bytes*n/1e6)
	figure("estimate: verify them, processor time", "s", each*n/1000)
	return nil
}
