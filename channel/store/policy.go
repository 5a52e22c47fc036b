package store

import (
	"cmp"
	"slices"
	"time"
)

// A Policy says when vouchers are claimed.
type Policy struct {
	Threshold uint64        // nanotons of one channel that are claimed at once; 0 is no threshold
	Age       time.Duration // after which anything is claimed; 0 is never
	Minimum   uint64        // nanotons of one channel that are worth the fees of a claim
}

// DefaultPolicy claims a TON, and whatever is a day old; less than 0.005 TON is left
// until there is more.
var DefaultPolicy = Policy{Threshold: 1_000_000_000, Age: 24 * time.Hour, Minimum: 5_000_000}

// A Reason is why a voucher is to be claimed.
type Reason string

// The reasons.
const (
	NotDue      Reason = ""
	ByClosing   Reason = "the channel is closing"
	ByDown      Reason = "the launcher goes down"
	ByThreshold Reason = "the threshold is reached"
	ByAge       Reason = "it is old"
)

// Due says whether a channel's best voucher is to be claimed now. Of a channel that
// is closing it is at once: nothing is served on it any more, and the delay is there
// for the claim to be tried again in. down says that the launcher is about to end.
func (p Policy) Due(c Channel, now time.Time, down bool) Reason {
	amount := c.Unclaimed()
	switch {
	case amount == 0 || amount < p.Minimum:
		return NotDue
	case c.Chain.ClosingAt != 0:
		return ByClosing
	case down:
		return ByDown
	case p.Threshold > 0 && amount >= p.Threshold:
		return ByThreshold
	case p.Age > 0 && c.Since != 0 && now.Unix()-c.Since >= int64(p.Age/time.Second):
		return ByAge
	}
	return NotDue
}

// A Claim is a voucher to be claimed, and why.
type Claim struct {
	Channel Channel
	Reason  Reason
}

// Select picks what is to be claimed now: channels that are closing first, those that
// close soonest before the others, then the larger amounts.
func (p Policy) Select(channels []Channel, now time.Time, down bool) []Claim {
	var list []Claim
	for _, c := range channels {
		if reason := p.Due(c, now, down); reason != NotDue {
			list = append(list, Claim{c, reason})
		}
	}
	closing := func(c Claim) int64 {
		if c.Channel.Chain.ClosingAt == 0 {
			return 1<<63 - 1
		}
		return c.Channel.Chain.ClosingAt
	}
	slices.SortFunc(list, func(a, b Claim) int {
		return cmp.Or(cmp.Compare(closing(a), closing(b)), cmp.Compare(b.Channel.Unclaimed(), a.Channel.Unclaimed()),
			slices.Compare(a.Channel.ID[:], b.Channel.ID[:]))
	})
	return list
}
