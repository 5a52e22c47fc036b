package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"chrysalis/launcher"
	"chrysalis/launcher/till"
	"chrysalis/pay"
	"chrysalis/registry"
)

// PriceCmd changes prices.
type PriceCmd struct {
	Name            string    `arg:"" optional:"" default:"default" help:"Name of the VM."`
	PromptPrice     *tonPrice `placeholder:"TON" help:"For a million tokens of prompts (default: as it is)."`
	CompletionPrice *tonPrice `placeholder:"TON" help:"For a million tokens of completions (default: as it is)."`
	Model           string    `placeholder:"NAME@REVISION" help:"Change this model only (default: all)."`

	List bool     `help:"Put the wallet's offer again, with these prices."`
	TON  tonFlags `embed:"" prefix:"ton-" group:"With --list:"`
	payerFlags
}

// Run changes them, below the ceilings that clients have seen. What has been paid for
// is served at the prices of then.
func (c *PriceCmd) Run(ctx context.Context) error {
	if c.PromptPrice == nil && c.CompletionPrice == nil {
		return errors.New("say what it costs from now on, with --prompt-price or --completion-price")
	}
	if c.List && c.KeyFile == "" {
		return errors.New("missing flags: --key-file=FILE")
	}
	listed := false
	state, err := launcher.SetPrices(ctx, "", c.Name, func(models []till.ModelState) ([]pay.Price, error) {
		prices, rises, err := c.prices(models)
		if err == nil && c.List && rises {
			// Nobody is to be charged more than what is offered.
			err = c.relist(ctx, models, prices)
			listed = err == nil
		}
		return prices, err
	})
	if err != nil {
		if listed {
			err = fmt.Errorf("the offer has the new prices, and the VM does not: %w", err)
		}
		return err
	}
	if c.List && !listed {
		var prices []pay.Price
		for _, m := range state.Payment.Models {
			prices = append(prices, m.Price)
		}
		if err := c.relist(ctx, state.Payment.Models, prices); err != nil {
			return fmt.Errorf("the VM has the new prices, and the offer is not known to have them: %w", err)
		}
	}
	printPayment(os.Stdout, c.Name, state.Payment)
	return nil
}

// prices are those that there will be, and whether one of them rises.
func (c *PriceCmd) prices(models []till.ModelState) (prices []pay.Price, rises bool, err error) {
	if c.Model != "" && !slices.ContainsFunc(models, func(m till.ModelState) bool { return m.ID == c.Model }) {
		return nil, false, fmt.Errorf("the VM %q has no model %s", c.Name, c.Model)
	}
	for _, m := range models {
		p := m.Price
		if c.Model == "" || c.Model == m.ID {
			if c.PromptPrice != nil {
				p.Prompt = int64(*c.PromptPrice)
			}
			if c.CompletionPrice != nil {
				p.Completion = int64(*c.CompletionPrice)
			}
		}
		if err := p.Under(m.Ceiling); err != nil {
			return nil, false, fmt.Errorf("%s: %w; boot the VM with higher ceilings to charge more", m.ID, err)
		}
		rises = rises || p.Prompt > m.Prompt || p.Completion > m.Completion
		prices = append(prices, p)
	}
	return prices, rises, nil
}

func (c *PriceCmd) relist(ctx context.Context, models []till.ModelState, prices []pay.Price) error {
	change := map[string]pay.Price{}
	for i, m := range models {
		change[m.ID] = prices[i]
	}
	return c.wallet(false).write(ctx, &c.TON, "", registry.RepriceOffer(change))
}
