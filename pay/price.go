// Package pay decides what a client owes and whether it is served: prices under
// their ceilings, what a request costs, what of it is covered by vouchers, and the
// terms that a client without cover is told. It is pure: no clock, no network, no
// disk. The agent asks it (agent/api), and clients reckon with it what they owe.
//
// Amounts are nanotons. Prices are nanotons for a million tokens.
package pay

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"regexp"
)

// MaxPrice bounds prices, in nanotons for a million tokens: a million TON. It is
// that of offers.
const MaxPrice = 1_000_000_000_000_000

// MaxStep bounds a voucher step, in nanotons: a thousand TON.
const MaxStep = 1_000_000_000_000

// Errors of prices.
var (
	ErrPrice = errors.New("the price is out of bounds")
	ErrAbove = errors.New("the price is above its ceiling")
)

// A Price is what the tokens of one model cost. Tokens that the engine had in a
// cache cost as much as others: a price of their own would tell what others asked.
type Price struct {
	Prompt     int64 `json:"prompt_price"`
	Completion int64 `json:"completion_price"`
}

// Validate reports a price that is out of bounds.
func (p Price) Validate() error {
	if p.Prompt < 0 || p.Prompt > MaxPrice || p.Completion < 0 || p.Completion > MaxPrice {
		return fmt.Errorf("%w: %d and %d, from 0 to %d are possible", ErrPrice, p.Prompt, p.Completion, int64(MaxPrice))
	}
	return nil
}

// Free reports whether nothing costs anything.
func (p Price) Free() bool { return p == Price{} }

// Under reports, as an error, a price that is above its ceiling.
func (p Price) Under(ceiling Price) error {
	if err := p.Validate(); err != nil {
		return err
	}
	if p.Prompt > ceiling.Prompt || p.Completion > ceiling.Completion {
		return fmt.Errorf("%w: %d and %d, at most %d and %d", ErrAbove, p.Prompt, p.Completion, ceiling.Prompt, ceiling.Completion)
	}
	return nil
}

// million is how many tokens a price is for.
const million = 1_000_000

// Cost is what so many tokens cost: both products are added up exactly, and the sum
// is divided by a million and rounded down, once for a request. So nobody is charged
// more than the price, and less than a nanoton a request is given away. What is more
// than fits is math.MaxUint64; counts below 0 count as 0.
func (p Price) Cost(prompt, completion int64) uint64 {
	hi1, lo1 := bits.Mul64(uint64(max(prompt, 0)), uint64(max(p.Prompt, 0)))
	hi2, lo2 := bits.Mul64(uint64(max(completion, 0)), uint64(max(p.Completion, 0)))
	lo, carry := bits.Add64(lo1, lo2, 0)
	hi, over := bits.Add64(hi1, hi2, carry)
	if over != 0 || hi >= million {
		return math.MaxUint64
	}
	cost, _ := bits.Div64(hi, lo, million)
	return cost
}

// least is the smaller of both, each by itself.
func (p Price) least(q Price) Price {
	return Price{min(p.Prompt, q.Prompt), min(p.Completion, q.Completion)}
}

var modelRE = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,129}@[A-Za-z0-9._-]{1,64}$`)

// A Tariff is a price for each model, by NAME@REVISION, and the smallest voucher
// step. As ceilings it stands in a VM's manifest, where the client sees the most that
// it can be charged; as current prices the launcher sets it.
type Tariff struct {
	Step   uint64 // nanotons that a voucher adds at least, and that use can be ahead of cover at most
	Models map[string]Price
}

// Validate reports the first value that is out of bounds.
func (t Tariff) Validate() error {
	if t.Step == 0 || t.Step > MaxStep {
		return fmt.Errorf("a voucher step of %d nanotons; from 1 to %d are possible", t.Step, int64(MaxStep))
	}
	if len(t.Models) == 0 || len(t.Models) > maxModels {
		return fmt.Errorf("prices of %d models; from 1 to %d are possible", len(t.Models), maxModels)
	}
	for id, p := range t.Models {
		if !modelRE.MatchString(id) {
			return fmt.Errorf("%.140q is not NAME@REVISION", id)
		}
		if err := p.Validate(); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
	}
	return nil
}

const maxModels = 16

// Under reports, as an error, prices that are not of the same models as the ceilings,
// or above them, or with another step.
func (t Tariff) Under(ceilings Tariff) error {
	if err := t.Validate(); err != nil {
		return err
	}
	if t.Step != ceilings.Step || len(t.Models) != len(ceilings.Models) {
		return fmt.Errorf("%w: they are for another step or other models", ErrAbove)
	}
	for id, p := range t.Models {
		ceiling, ok := ceilings.Models[id]
		if !ok {
			return fmt.Errorf("%w: there is no model %s", ErrAbove, id)
		}
		if err := p.Under(ceiling); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
	}
	return nil
}
