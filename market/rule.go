// Package market has the rules of a market of workers: how an owner's price follows
// it, in which order a client takes offers, and pictures of both. It is pure: no clock,
// no network, no disk, and the same input gives the same output.
//
// Prices are nanotons for a million tokens. Where two prices are compared, or one is
// moved, what counts is the sum of that of prompts and that of completions, as in
// the order of a listing.
package market

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"chrysalis/pay"
)

// ErrBounds says that an owner's bounds are none.
var ErrBounds = errors.New("the floor of the price must not be above its ceiling, and the ceiling must not be 0")

// Bounds are between which prices an owner lets its own follow the market, both
// included. The ceiling is that of the VM's manifest, or less.
type Bounds struct {
	Floor   pay.Price
	Ceiling pay.Price
}

// Validate reports, as ErrBounds or pay.ErrPrice, bounds that no price is between.
func (b Bounds) Validate() error {
	if err := errors.Join(b.Floor.Validate(), b.Ceiling.Validate()); err != nil {
		return err
	}
	if b.Floor.Under(b.Ceiling) != nil || b.Ceiling.Free() {
		return fmt.Errorf("%w: %d and %d to %d and %d", ErrBounds, b.Floor.Prompt, b.Floor.Completion, b.Ceiling.Prompt, b.Ceiling.Completion)
	}
	return nil
}

// Sum is what counts of a price where it is compared with another.
func Sum(p pay.Price) int64 { return p.Prompt + p.Completion }

// at is the price with this sum, cut to the bounds. Prompts and completions have the
// same place between their bounds.
func (b Bounds) at(sum int64) pay.Price {
	low, high := Sum(b.Floor), Sum(b.Ceiling)
	sum = min(max(sum, low), high)
	if low == high {
		return b.Ceiling
	}
	// The quotient is no more than the difference of the prompt prices, and the rest
	// of the sum no more than that of the completion prices.
	hi, lo := bits.Mul64(uint64(b.Ceiling.Prompt-b.Floor.Prompt), uint64(sum-low))
	part, _ := bits.Div64(hi, lo, uint64(high-low))
	prompt := b.Floor.Prompt + int64(part)
	return pay.Price{Prompt: prompt, Completion: sum - prompt}
}

// An Offer is what is known of somebody's offer of one model.
type Offer struct {
	Owner string // who listed it: the account, 0:HEX
	// Worker is the SHA-256 of the public key (SubjectPublicKeyInfo) that an
	// attestation of its endpoint was for, which no two VMs share. It is zero where
	// the offer was not verified, or did not hold.
	Worker   [32]byte
	Price    pay.Price
	Capacity int // requests at a time, as its owner says
}

// Attested reports whether the offer's worker was verified.
func (o Offer) Attested() bool { return o.Worker != [32]byte{} }

// A Trend is what the rule remembers from one interval to the next: in which direction
// the price moves, 1 up, -1 down, 0 neither. It is 0 for a VM that has just started;
// anything else counts as 0.
type Trend int

// A Reason says why a price is what it is.
type Reason string

// The reasons.
const (
	Steady    Reason = "steady"         // neither full nor idle
	Full      Reason = "full"           // up: the places are held
	Idle      Reason = "idle"           // down: places are free
	AtCeiling Reason = "at the ceiling" // full, and the owner lets it rise no more
	AtFloor   Reason = "at the floor"   // idle, and the owner lets it fall no more
	OutOfTurn Reason = "out of bounds"  // the price was not between the bounds, and is now
	Unseen    Reason = "not seen"       // nothing is known of the interval: held
	First     Reason = "first"          // of a VM that starts
)

// A Result is what a rule comes to.
type Result struct {
	Price  pay.Price
	Reason Reason
	Trend  Trend // for the next interval
	// Reference is what the market asks, as a sum; 0 when too few owners show it.
	Reference int64
}

// A Rule makes a price follow the market. Which way it goes is decided by the owner's
// own VM alone: up when it is full, down when it is idle. What others ask decides how
// fast, and with what a VM starts. So nobody can talk the price of a busy VM down, nor
// that of an idle one up.
type Rule struct {
	// Target is the utilisation that the rule is after, in thousandths. A price begins to
	// move when it is Begin or more away from that, and goes on until it is less than End.
	Target, Begin, End int
	// Gain is by how many thousandths a price would change at a distance of 1000 from
	// the target; the change is in proportion. So on average the target is held to: a rule
	// whose steps do not depend on the distance holds to the median.
	Gain int64
	// A price that is Far or more thousandths beyond what others ask, on the side that it
	// moves away from, changes twice as fast.
	Far int64
	// MinOwners is how many others must show what the market asks.
	MinOwners int
}

// Default is the rule of this program. docs/market.md justifies it.
func Default() Rule {
	return Rule{Target: 750, Begin: 100, End: 25, Gain: 80, Far: 250, MinOwners: 3}
}

// Stride is the most that one interval changes a price by, in thousandths of it.
func (r Rule) Stride() (up, down int64) {
	return 2 * r.Gain * int64(1000-r.Target) / 1000, 2 * r.Gain * int64(r.Target) / 1000
}

// least is the part of the ceiling that a price moves at least, so that a price of
// nothing can rise.
const least = 100_000

// Validate reports the first value that makes no rule.
func (r Rule) Validate() error {
	switch {
	case r.End < 1 || r.End > r.Begin || r.Begin > r.Target || r.Target+r.Begin > 1000:
		return errors.New("the rule's marks of utilisation are not in order")
	case r.Gain < 1 || r.Gain > 500:
		return errors.New("the rule's gain is out of bounds")
	case r.Far < 0 || r.Far > 1000:
		return errors.New("the rule's mark for a faster change is out of bounds")
	case r.MinOwners < 1:
		return errors.New("the rule wants no owners")
	}
	return nil
}

// Start is the price of a VM that starts: what the market asks, or the ceiling when
// that is not known.
func (r Rule) Start(b Bounds, others []Offer) (Result, error) {
	if err := errors.Join(r.Validate(), b.Validate()); err != nil {
		return Result{}, err
	}
	result := Result{Reason: First}
	sum := Sum(b.Ceiling)
	if reference, ok := r.Reference(others); ok {
		sum, result.Reference = reference, reference
	}
	result.Price = b.at(sum)
	return result, nil
}

// Next is the price for the next interval. own is the price of the last one, trend what
// the result before this one said, others what else is offered of the same model and
// root hash. utilisation is how many of the VM's places were held, on average over the
// interval, in thousandths of all that it has; less than 0 if that is not known, when
// the price stays. Requests that were refused do not count: they cost who sends them
// nothing, and a VM that refuses is full.
//
// A price that is not between the bounds is brought there at once. Otherwise
// the sum changes by at most what Stride says, or by a hundred-thousandth of the
// ceiling where that is more; prompts and completions then have the same place between
// their bounds. own must be what the rule has made, or the owner's own.
func (r Rule) Next(own pay.Price, b Bounds, utilisation int, others []Offer, trend Trend) (Result, error) {
	if err := errors.Join(r.Validate(), b.Validate(), own.Validate()); err != nil {
		return Result{}, err
	}
	result := Result{Price: own}
	reference, known := r.Reference(others)
	if known {
		result.Reference = reference
	}
	sum := Sum(own)
	if b.Floor.Under(own) != nil || own.Under(b.Ceiling) != nil {
		result.Price, result.Reason = b.at(sum), OutOfTurn
		return result, nil
	}
	if utilisation < 0 || utilisation > 1000 {
		result.Reason, result.Trend = Unseen, trend
		return result, nil
	}
	distance := int64(utilisation - r.Target)
	hurry := false
	switch {
	case distance >= int64(r.Begin), distance >= int64(r.End) && trend == 1:
		hurry = known && sum <= reference-part(reference, r.Far)
		result.Reason, result.Trend = Full, 1
	case -distance >= int64(r.Begin), -distance >= int64(r.End) && trend == -1:
		hurry = known && sum >= reference+part(reference, r.Far)
		result.Reason, result.Trend = Idle, -1
	default:
		result.Reason = Steady
		return result, nil
	}
	if hurry {
		distance *= 2
	}
	move := part(part(sum, r.Gain), max(distance, -distance))
	move = max(move, Sum(b.Ceiling)/least, 1)
	result.Price = b.at(sum + int64(result.Trend)*move)
	if Sum(result.Price) == sum {
		result.Price, result.Reason = own, AtCeiling
		if result.Trend < 0 {
			result.Reason = AtFloor
		}
	}
	return result, nil
}

// part is so many thousandths of a sum of two prices, up to twice of it.
func part(sum, thousandths int64) int64 { return sum/1000*thousandths + sum%1000*thousandths/1000 }

// Reference is what the market asks: the median of the sums of attested offers. Of
// each owner, and of each worker, the cheapest counts, once: to move the median beyond
// what honest owners ask takes as many verified VMs as they have. It is false when
// fewer than MinOwners are left.
func (r Rule) Reference(others []Offer) (int64, bool) {
	list := slices.Clone(others)
	list = slices.DeleteFunc(list, func(o Offer) bool { return !o.Attested() || o.Price.Validate() != nil })
	slices.SortFunc(list, cheaper)
	owners, workers := map[string]bool{}, map[[32]byte]bool{}
	var sums []int64
	for _, o := range list {
		if owners[o.Owner] || workers[o.Worker] {
			continue
		}
		owners[o.Owner], workers[o.Worker] = true, true
		sums = append(sums, Sum(o.Price))
	}
	if len(sums) < r.MinOwners {
		return 0, false
	}
	// The lower one of two in the middle.
	return sums[(len(sums)-1)/2], true
}

// cheaper is the order of the listing, in which no two different offers are equal.
func cheaper(a, b Offer) int {
	return cmp.Or(cmp.Compare(Sum(a.Price), Sum(b.Price)), cmp.Compare(a.Owner, b.Owner),
		bytes.Compare(a.Worker[:], b.Worker[:]), cmp.Compare(a.Price.Prompt, b.Price.Prompt), cmp.Compare(a.Capacity, b.Capacity))
}
