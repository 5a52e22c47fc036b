package main

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"math/big"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/xssnick/tonutils-go/tlb"

	"chrysalis/channel"
	"chrysalis/channel/store"
	"chrysalis/channel/voucher"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// channels measures payment channels on a devnet, whose prices are the mainnet's of
// June 2026.
func channels() error {
	b := &channelBench{tonBench: tonBench{ctx: context.Background()}, key: ed25519.NewKeyFromSeed(make([]byte, 32))}
	defer b.close()
	if err := b.open(1); err != nil {
		return err
	}
	var err error
	if b.Reader, err = b.reader(); err != nil {
		return err
	}
	if b.payer, err = b.wallet(1); err != nil {
		return err
	}
	if b.payee, err = b.wallet(2); err != nil {
		return err
	}
	for _, part := range []func() error{b.life, b.batch, b.verify, b.keep} {
		if err := part(); err != nil {
			return err
		}
	}
	return nil
}

type channelBench struct {
	tonBench
	payer, payee *publisher
	key          ed25519.PrivateKey
}

func (b *channelBench) wallet(seed byte) (*publisher, error) {
	w, err := registry.NewWallet(ed25519.NewKeyFromSeed(append(make([]byte, 31), seed)), "v5r1", b.network.GlobalID)
	if err != nil {
		return nil, err
	}
	p := &publisher{Reader: b.Reader, Wallet: w}
	if err := b.chain.Fund(w.Address.Std(), big.NewInt(1000e9)); err != nil {
		return nil, err
	}
	// Its first message brings the wallet's own code along, which is no channel's cost.
	_, err = p.Do(b.ctx, channel.Open(channel.Terms{
		PayerKey: voucher.Key(b.key.Public().(ed25519.PublicKey)), Payer: w.Address.ID, Salt: channel.NewSalt(), GlobalID: b.network.GlobalID,
	}, 1e9))
	return p, err
}

func (b *channelBench) terms() channel.Terms {
	return channel.Terms{
		PayerKey: voucher.Key(b.key.Public().(ed25519.PublicKey)), Payer: b.payer.Wallet.Address.ID, Payee: b.payee.Wallet.Address.ID,
		Salt: channel.NewSalt(), GlobalID: b.network.GlobalID,
	}
}

func (b *channelBench) voucher(a lite.Address, total uint64) voucher.Voucher {
	return voucher.Sign(b.key, b.network.GlobalID, voucher.Channel(a.ID), total)
}

// both is what the two have together.
func (b *channelBench) both() float64 {
	sum := 0.0
	for _, p := range []*publisher{b.payer, b.payee} {
		sum += float64(b.chain.Account(p.Wallet.Address.Std()).Balance.Nano().Int64())
	}
	return sum
}

// life prints what a channel costs both sides together, all in.
func (b *channelBench) life() error {
	const paid = 300_000_000
	for _, way := range []struct {
		name  string
		claim func(lite.Address) error
		end   func(lite.Address) error
	}{
		{"open, claim by an external message, close by the payee", func(a lite.Address) error {
			_, err := channel.ClaimExternal(b.ctx, b.Reader.Client, b.voucher(a, paid))
			return err
		}, func(a lite.Address) error {
			_, err := b.payee.Do(b.ctx, channel.Close(a, nil))
			return err
		}},
		{"open, claim from a wallet, begin to close and finish by the payer", func(a lite.Address) error {
			_, err := b.payee.Do(b.ctx, channel.Claim(b.voucher(a, paid)))
			return err
		}, func(a lite.Address) error {
			if _, err := b.payer.Do(b.ctx, channel.BeginClose(a)); err != nil {
				return err
			}
			_, err := b.payer.Do(b.ctx, channel.Finish(a))
			return err
		}},
	} {
		t := b.terms()
		before := b.both()
		if _, err := b.payer.Do(b.ctx, channel.Open(t, 1e9)); err != nil {
			return err
		}
		if err := way.claim(channel.Address(t)); err != nil {
			return err
		}
		if err := way.end(channel.Address(t)); err != nil {
			return err
		}
		row(way.name, "TON", (before-b.both())/1e9, 0.02, true)
	}
	return nil
}

// batch claims from a thousand channels.
func (b *channelBench) batch() error {
	const count = 1000
	var list []voucher.Voucher
	for range count {
		t := b.terms()
		a := channel.Address(t)
		// With no wallet in between, which is quick.
		message, err := tlb.ToCell(&tlb.InternalMessage{
			IHRDisabled: true, Bounce: true, SrcAddr: b.payer.Wallet.Address.Std(), DstAddr: a.Std(),
			Amount: tlb.FromNanoTON(big.NewInt(1e9)), StateInit: contract.ChannelStateInit(t), Body: contract.OpenChannel(1),
		})
		if err == nil {
			err = b.chain.Send(message)
		}
		if err != nil {
			return err
		}
		list = append(list, b.voucher(a, 100_000_000))
	}
	txs, err := b.chain.Transactions(b.payee.Wallet.Address.Std())
	if err != nil {
		return err
	}
	before, sent := b.both(), external(txs)
	begin := time.Now()
	results, err := channel.ClaimAll(b.ctx, b.payee, list)
	if err != nil {
		return err
	}
	took := time.Since(begin)
	for _, r := range results {
		if r.Err != nil {
			return r.Err
		}
	}
	if txs, err = b.chain.Transactions(b.payee.Wallet.Address.Std()); err != nil {
		return err
	}
	figure(fmt.Sprintf("claim from %d channels, messages of a V5R1 wallet", count), "", float64(external(txs)-sent))
	figure("the same, each claim", "TON", (before+count*0.1e9-b.both())/count/1e9)
	figure("the same, reading all with proofs before and after, on the devnet", "s", took.Seconds())
	return nil
}

func external(txs []*tlb.Transaction) (n int) {
	for _, tx := range txs {
		if tx.IO.In.MsgType == tlb.MsgTypeExternalIn {
			n++
		}
	}
	return n
}

// verify prints what a voucher costs whoever takes it, in the processor's time.
func (b *channelBench) verify() error {
	const times = 5000
	text := b.voucher(lite.Address{}, 5).String()
	key := voucher.Key(b.key.Public().(ed25519.PublicKey))
	begin := processorTime(syscall.RUSAGE_SELF)
	for range times {
		v, err := voucher.Parse(text)
		if err == nil {
			err = v.Verify(key)
		}
		if err != nil {
			return err
		}
	}
	row("parse and verify a voucher, processor time", "ms", float64((processorTime(syscall.RUSAGE_SELF)-begin).Microseconds())/1000/times, 0.1, true)
	return nil
}

// keep prints what a launcher needs for many channels.
func (b *channelBench) keep() error {
	const count = 10_000
	dir, err := os.MkdirTemp("", "chrysalis-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s, err := store.Open(dir)
	if err != nil {
		return err
	}
	defer s.Close()
	key := voucher.Key(b.key.Public().(ed25519.PublicKey))
	var updates []store.Update
	for i := range count {
		id := voucher.Channel{byte(i), byte(i >> 8)}
		v := voucher.Sign(b.key, b.network.GlobalID, id, 1000)
		updates = append(updates, store.Update{Channel: id, Voucher: &v, Uses: []store.Use{{Model: "acme/model@1", Requests: 1, Earned: 1000}}})
	}
	begin := time.Now()
	for _, u := range updates {
		if err := s.Admit(u.Channel, b.network.GlobalID, key, store.Chain{Cover: 1e9}); err != nil {
			return err
		}
		if err := s.Put(time.Now(), u); err != nil {
			return err
		}
	}
	took := time.Since(begin)
	updates = nil
	runtime.GC()
	runtime.ReadMemStats(&after)
	row(fmt.Sprintf("memory of %d channels with a voucher each", count), "MB", (float64(after.HeapAlloc)-float64(before.HeapAlloc))/1e6, 200, true)
	figure("admit a channel and keep a voucher, each durable before the next", "ms", float64(took.Microseconds())/1000/count)
	return nil
}
