package launcher

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"chrysalis/launcher/till"
	"chrysalis/market"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// Auto has the prices follow the use of the VM (market.Rule), between floors and the
// ceilings of the manifest.
type Auto struct {
	Floors []pay.Price `json:"floors"` // one for all models, or one for each
	// OfferKey is the file of the key of the wallet whose offer is put again whenever a
	// price has changed, of version OfferWallet; when it is empty none is.
	OfferKey    string `json:"offer_key,omitempty"`
	OfferWallet string `json:"offer_wallet,omitempty"`
}

// How often prices follow: each change of an offer costs its owner fees.
const (
	followEvery     = 10 * time.Minute
	followListEvery = time.Hour
)

func (a *Auto) plan(ceilings []pay.Price) (*Auto, error) {
	floors, err := forEach("floors", a.Floors, len(ceilings))
	if err != nil {
		return nil, err
	}
	for i, floor := range floors {
		if ceilings[i].Free() {
			floors[i] = pay.Price{} // and stays so
			continue
		}
		if err := (market.Bounds{Floor: floor, Ceiling: ceilings[i]}).Validate(); err != nil {
			return nil, err
		}
		if floor.Free() {
			return nil, errors.New("a floor of 0, at which an idle VM would serve for free; give one with --prompt-floor or --completion-floor")
		}
	}
	planned := &Auto{Floors: floors, OfferWallet: a.OfferWallet}
	if a.OfferKey != "" {
		if planned.OfferKey, err = absolute("key of the offer's wallet", a.OfferKey); err != nil {
			return nil, err
		}
	}
	return planned, nil
}

// usage is how many of a VM's places are held, on average.
type usage struct {
	mu         sync.Mutex
	sum, count int64
}

func (u *usage) add(active int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sum += active
	u.count++
}

// take returns the average since the last time, in thousandths of so many places; -1
// where it is not known.
func (u *usage) take(places int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	defer func() { u.sum, u.count = 0, 0 }()
	if u.count == 0 || places <= 0 {
		return -1
	}
	return int(min(1000, u.sum*1000/(u.count*int64(places))))
}

// watch samples how many requests a VM serves, until the context ends.
func (u *usage) watch(ctx context.Context, active func() (int64, bool)) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if n, ok := active(); ok {
				u.add(n)
			}
		}
	}
}

// follower is a till.PriceSource by the market's rule.
type follower struct {
	rule     market.Rule
	paid     *paid
	use      *usage
	relist   func(context.Context, []pay.Price) error // nil where nothing is offered
	trends   []market.Trend
	unlisted bool // the offer has other prices than the VM
}

// Prices implements till.PriceSource. Where a price rises the offer is put again first,
// so that nobody is charged more than what is offered.
func (f *follower) Prices(ctx context.Context, current []pay.Price) ([]pay.Price, error) {
	if f.trends == nil {
		f.trends = make([]market.Trend, len(current))
	}
	if f.unlisted && f.relist != nil {
		if err := f.relist(ctx, current); err != nil {
			return nil, fmt.Errorf("put the offer again: %w", err)
		}
		f.unlisted = false
	}
	used := f.use.take(f.paid.Concurrency)
	next, rises := make([]pay.Price, len(current)), false
	for i, price := range current {
		ceiling := f.paid.Ceilings[i]
		if next[i] = price; ceiling.Free() {
			continue
		}
		result, err := f.rule.Next(price, market.Bounds{Floor: f.paid.Auto.Floors[i], Ceiling: ceiling}, used, nil, f.trends[i])
		if err != nil {
			return nil, err
		}
		next[i], f.trends[i] = result.Price, result.Trend
		rises = rises || next[i].Prompt > price.Prompt || next[i].Completion > price.Completion
	}
	if rises && f.relist != nil {
		if err := f.relist(ctx, next); err != nil {
			return nil, fmt.Errorf("put the offer again: %w", err)
		}
	}
	return next, nil
}

// Changed implements till.PriceSource: where a price has fallen the offer comes
// afterwards. Putting what is offered already does nothing.
func (f *follower) Changed(ctx context.Context, prices []pay.Price) error {
	if f.relist == nil {
		return nil
	}
	err := f.relist(ctx, prices)
	f.unlisted = err != nil
	return err
}

// follow is what sets a VM's prices by its use.
func (c *paid) follow(use *usage, chain *till.TON) *follower {
	f := &follower{rule: market.Default(), paid: c, use: use}
	if c.Auto.OfferKey == "" {
		return f
	}
	f.relist = func(ctx context.Context, prices []pay.Price) error {
		key, err := registry.LoadKey(c.Auto.OfferKey)
		if err != nil {
			return err
		}
		wallet, err := registry.NewWallet(key, c.Auto.OfferWallet, c.Terms.GlobalID)
		if err != nil {
			return err
		}
		change := map[string]pay.Price{}
		for i, id := range c.Models {
			change[id] = prices[i]
		}
		return chain.Do(func(client *lite.Client) error {
			p := &registry.Publisher{Reader: registry.Reader{Client: client, Key: registry.DeriveKey}, Wallet: wallet}
			_, err := p.Do(ctx, registry.RepriceOffer(change))
			return err
		})
	}
	return f
}
