package market

import (
	"cmp"
	"math"
	"slices"
	"time"

	"chrysalis/pay"
)

// A Candidate is a worker that a client could give a request.
type Candidate struct {
	Price   pay.Price
	Latency time.Duration // to the first byte, as this client saw it; 0 if not known
	// InFlight is how many of this client's requests it has. What its owner says of its
	// capacity counts for nothing: who says too much would get all requests.
	InFlight int
	// Busy says that it refused the client lately since all its places were held, or did
	// not answer.
	Busy bool
}

// A Taste says what a client takes, and when two workers are as good as one another.
// Thousandths count from 0 to 1000.
type Taste struct {
	// Max is the most that the client pays, of each kind; with 0 there is no limit.
	Max pay.Price
	// Near are those that cost at most so many thousandths more than the cheapest. Among
	// them requests are spread.
	Near int64
	// Second is how many thousandths of its price a worker counts as dearer for each second
	// that it is slower than the fastest, and Slowest the most that this comes to.
	Second, Slowest int64
}

// DefaultTaste is that of this program, but for a limit.
func DefaultTaste() Taste { return Taste{Near: 50, Second: 250, Slowest: 500} }

// Tokens is what a request is expected to come to.
type Tokens struct{ Prompt, Completion int64 }

// Order lists the candidates that fit, by index, in the order in which a client asks
// them: those that are not busy first, of them those near the cheapest, and of these the
// one with the fewest requests in flight. Beyond, the cheaper one is first. Latency
// makes a worker count as dearer. What is still equal is decided by dice, which must
// return random numbers: clients that decide alike would all ask the same worker.
func (t Taste) Order(candidates []Candidate, size Tokens, dice func() uint32) []int {
	type rank struct {
		index, busy, far int
		cost             uint64
		load             int
		dice             uint32
	}
	fastest := time.Duration(math.MaxInt64)
	var list []rank
	for i, c := range candidates {
		if !t.Fits(c.Price) {
			continue
		}
		list = append(list, rank{index: i, load: c.InFlight, dice: dice()})
		if c.Busy {
			list[len(list)-1].busy = 1
		}
		if c.Latency > 0 {
			fastest = min(fastest, c.Latency)
		}
	}
	cheapest := [2]uint64{math.MaxUint64, math.MaxUint64} // of those that are not busy, and of those that are
	for i := range list {
		r, c := &list[i], candidates[list[i].index]
		// In thousandths, and one nanoton more: of what costs nothing, too, the slower one is
		// dearer.
		r.cost = min(c.Price.Cost(size.Prompt, size.Completion), math.MaxUint64/1000-1)*1000 + 1000
		// Of one that nobody has tried the best is assumed, else nobody would try it.
		if slower := c.Latency - fastest; c.Latency > 0 && slower > 0 {
			r.cost = more(r.cost, min(t.Second*slower.Milliseconds()/1000, t.Slowest))
		}
		cheapest[r.busy] = min(cheapest[r.busy], r.cost)
	}
	for i := range list {
		if r := &list[i]; r.cost > more(cheapest[r.busy], t.Near) {
			r.far = 1
		}
	}
	slices.SortFunc(list, func(a, b rank) int {
		if c := cmp.Or(cmp.Compare(a.busy, b.busy), cmp.Compare(a.far, b.far)); c != 0 {
			return c
		}
		if a.far > 0 {
			return cmp.Or(cmp.Compare(a.cost, b.cost), cmp.Compare(a.load, b.load), cmp.Compare(a.dice, b.dice), cmp.Compare(a.index, b.index))
		}
		return cmp.Or(cmp.Compare(a.load, b.load), cmp.Compare(a.dice, b.dice), cmp.Compare(a.index, b.index))
	})
	order := make([]int, len(list))
	for i, r := range list {
		order[i] = r.index
	}
	return order
}

// Fits reports whether the client pays that price.
func (t Taste) Fits(p pay.Price) bool {
	return p.Validate() == nil && (t.Max.Prompt == 0 || p.Prompt <= t.Max.Prompt) && (t.Max.Completion == 0 || p.Completion <= t.Max.Completion)
}

// more is a cost and so many thousandths of it, up to as much again; what does not fit
// is the most.
func more(cost uint64, thousandths int64) uint64 {
	if cost > math.MaxUint64/2 {
		return math.MaxUint64
	}
	part := uint64(min(max(thousandths, 0), 1000))
	return cost + cost/1000*part + cost%1000*part/1000
}

// Pause is for how long a client takes a worker for busy that has refused it, or not
// answered, so many times in a row: 10 seconds, then twice as long each time, up to two
// hours. So who offers much and serves nothing is soon asked no more, and one that was full
// for a moment gets the next request.
func Pause(inARow int) time.Duration {
	const shortest, longest = 10 * time.Second, 2 * time.Hour
	return min(shortest<<min(max(inARow-1, 0), 10), longest)
}
