package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"chrysalis/launcher"
	"chrysalis/launcher/till"
	"chrysalis/manifest"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// priceFlags say on which terms a VM is paid. Its prices and who is paid are those of an
// offer.
type priceFlags struct {
	PromptCeiling     *tonPrice     `placeholder:"TON" help:"The most that a million tokens of prompts can ever cost while the VM runs, which clients see (default: the price)."`
	CompletionCeiling *tonPrice     `placeholder:"TON" help:"The same of completions (default: the price)."`
	Price             string        `enum:"fixed,auto" default:"fixed" help:"Leave prices as they are, or have them follow the use of the VM: fixed or auto (default: ${default})."`
	PromptFloor       *tonPrice     `placeholder:"TON" help:"With --price=auto, the least for a million tokens of prompts (default: a tenth of the ceiling)."`
	CompletionFloor   *tonPrice     `placeholder:"TON" help:"The same of completions (default: a tenth of the ceiling)."`
	VoucherStep       *tonPrice     `placeholder:"TON" help:"What a client pays at a time, which is also what either side can lose (default: a tenth of the highest ceiling)."`
	MinDeposit        tonPrice      `default:"0.1" placeholder:"TON" help:"What a client's channel must be opened with at least (default: ${default})."`
	MinDelay          time.Duration `default:"24h" help:"How long you must have to claim when a client closes its channel; be never away for longer (default: ${default})."`
	ClaimKey          string        `placeholder:"FILE" help:"The key of a wallet that pays for claims, many at a time (default: the fees are taken out of each claim)."`
}

// paid reports whether clients pay by these flags.
func (f *priceFlags) paid(o *upOffer) bool {
	for _, p := range []*tonPrice{o.PromptPrice, o.CompletionPrice, f.PromptCeiling, f.CompletionCeiling} {
		if p != nil && *p > 0 {
			return true
		}
	}
	return false
}

// validate refuses flags that say nothing. A manifest file may have ceilings.
func (f *priceFlags) validate(o *upOffer, file bool) error {
	if f.Price == "fixed" && (f.PromptFloor != nil || f.CompletionFloor != nil) {
		return errors.New("floors are given without --price=auto")
	}
	if f.paid(o) || file {
		return nil
	}
	if f.VoucherStep != nil || f.ClaimKey != "" || f.Price != "fixed" {
		return errors.New("flags of payments are given without prices; say what is paid with --prompt-price and --completion-price")
	}
	return nil
}

func orZero(p *tonPrice) int64 {
	if p == nil {
		return 0
	}
	return int64(*p)
}

// payment is who is paid for what the VM will serve, or nil.
func (c *UpCmd) payment() (*launcher.Payment, error) {
	o, f := &c.Offer, &c.Pay
	var file *manifest.Manifest
	if c.Manifest != "" {
		if data, err := os.ReadFile(c.Manifest); err == nil {
			// What is wrong with it is said later.
			if m, err := manifest.Parse(data); err == nil && m.Payment != nil {
				file = m
			}
		}
	}
	if !f.paid(o) && file == nil {
		return nil, nil
	}
	payee, err := o.payee()
	if err != nil {
		return nil, err
	}
	network, err := o.TON.lasting()
	if err != nil {
		return nil, fmt.Errorf("clients pay on TON, so that the network is needed: %w", err)
	}
	p := &launcher.Payment{
		Terms:   till.Terms{GlobalID: network.Network.GlobalID, Payee: payee, MinDeposit: uint64(f.MinDeposit), MinDelay: f.MinDelay},
		Step:    uint64(orZero(f.VoucherStep)),
		Network: network, ClaimKey: f.ClaimKey, ClaimWallet: o.Wallet,
	}
	if f.VoucherStep != nil && *f.VoucherStep == 0 {
		return nil, errors.New("--voucher-step: a nanoton at least")
	}
	if file != nil {
		if f.PromptCeiling != nil || f.CompletionCeiling != nil {
			return nil, errors.New("the manifest file already holds the ceilings")
		}
		for _, ceiling := range file.Payment.Ceilings {
			p.Prices = append(p.Prices, o.price(ceiling))
		}
		p.Auto = f.auto(c, file.Payment.Ceilings)
		return p, nil
	}
	ceiling := o.price(pay.Price{})
	if f.PromptCeiling != nil {
		ceiling.Prompt = int64(*f.PromptCeiling)
	}
	if f.CompletionCeiling != nil {
		ceiling.Completion = int64(*f.CompletionCeiling)
	}
	price := o.price(ceiling)
	p.Ceilings, p.Prices = []pay.Price{ceiling}, []pay.Price{price}
	if err := errors.Join(ceiling.Validate(), price.Under(ceiling)); err != nil {
		return nil, err
	}
	p.Auto = f.auto(c, p.Ceilings)
	return p, nil
}

// auto is by what prices follow the use of the VM, or nil.
func (f *priceFlags) auto(c *UpCmd, ceilings []pay.Price) *launcher.Auto {
	if f.Price != "auto" {
		return nil
	}
	a := &launcher.Auto{}
	for _, ceiling := range ceilings {
		floor := pay.Price{Prompt: ceiling.Prompt / 10, Completion: ceiling.Completion / 10}
		if f.PromptFloor != nil {
			floor.Prompt = int64(*f.PromptFloor)
		}
		if f.CompletionFloor != nil {
			floor.Completion = int64(*f.CompletionFloor)
		}
		a.Floors = append(a.Floors, floor)
	}
	if c.List {
		a.OfferKey, a.OfferWallet = c.Offer.KeyFile, c.Offer.Wallet
	}
	return a
}

// price is what the flags say, and otherwise as much as it can be.
func (o *upOffer) price(ceiling pay.Price) pay.Price {
	p := ceiling
	if o.PromptPrice != nil {
		p.Prompt = int64(*o.PromptPrice)
	}
	if o.CompletionPrice != nil {
		p.Completion = int64(*o.CompletionPrice)
	}
	return p
}

// payee is who is paid: who the flags name, or else the wallet.
func (o *upOffer) payee() (lite.Address, error) {
	if o.Payout != "" {
		a, err := lite.ParseAddress(o.Payout)
		if err != nil {
			return a, fmt.Errorf("--payout: %w", err)
		}
		return a, nil
	}
	if o.KeyFile == "" {
		return lite.Address{}, errors.New("clients pay, but whom? give an address with --payout, or a wallet's key with --key-file")
	}
	network, err := o.TON.named()
	if err != nil {
		return lite.Address{}, err
	}
	key, err := registry.LoadKey(o.KeyFile)
	if err != nil {
		return lite.Address{}, err
	}
	wallet, err := registry.NewWallet(key, o.Wallet, network.GlobalID)
	if err != nil {
		return lite.Address{}, err
	}
	return wallet.Address, nil
}
