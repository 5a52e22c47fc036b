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
	// Proven says that it has served this client.
	Proven bool
}

// A Taste says what a client takes, and when two workers are as good as one another.
// Thousandths count from 0 to 1000.
type Taste struct {
	// Max is the most that the client pays, of each kind; with 0 there is no limit.
	Max pay.Price
	// Near is by how many thousandths costs may differ that count as the same. Requests are
	// spread among such workers.
	Near int64
	// Second is how many thousandths of its price a worker counts as dearer for each second
	// that it is slower than the fastest, and Slowest the most that this comes to.
	Second, Slowest int64
}

// DefaultTaste is that of this program, but for a limit.
func DefaultTaste() Taste { return Taste{Near: 100, Second: 250, Slowest: 500} }

// Tokens is what a request is expected to come to.
type Tokens struct{ Prompt, Completion int64 }

// Order lists the candidates that fit, by index, in the order in which a client asks
// them: those that are not busy first; of them the cheapest and all that are near it, then
// the next one and all near that, and so on; of such the one with the fewest requests in
// flight first. Latency makes a worker count as dearer. What is still equal is
// decided by dice, which must return random numbers: clients that decide alike would all
// ask the same worker.
//
// That requests are spread on every level matters. If only those near the cheapest were
// alike, one offer that is too good to be true would make all others dear, and all clients
// ask the same few of them.
func (t Taste) Order(candidates []Candidate, size Tokens, dice func() uint32) []int {
	type rank struct {
		cost  uint64 // with busyBit where it is busy
		among uint64 // in a level: requests in flight, then chance
		index int
	}
	const busyBit, most = 1 << 63, 1 << 62
	fastest := time.Duration(math.MaxInt64)
	list := make([]rank, 0, len(candidates))
	for i, c := range candidates {
		if !t.Fits(c.Price) {
			continue
		}
		// In thousandths, and one nanoton more: of what costs nothing, too, the slower one is
		// dearer.
		cost := min(c.Price.Cost(size.Prompt, size.Completion), most/4000)*1000 + 1000
		load := uint64(min(max(c.InFlight, 0), math.MaxInt32))
		list = append(list, rank{cost, load<<32 | uint64(dice()), i})
		if c.Latency > 0 {
			fastest = min(fastest, c.Latency)
		}
	}
	for i := range list {
		c, r := &candidates[list[i].index], &list[i]
		// Of one that nobody has tried the best is assumed, else nobody would try it.
		if c.Latency > fastest {
			r.cost = more(r.cost, min(t.Second*(c.Latency-fastest).Milliseconds()/1000, t.Slowest))
		}
		if c.Busy {
			r.cost |= busyBit
		}
	}
	slices.SortFunc(list, func(a, b rank) int { return cmp.Compare(a.cost, b.cost) })
	for rest := list; len(rest) > 0; {
		end := 1 // of the level; since no cost reaches the bit, busy ones are in another
		for last := more(rest[0].cost&^busyBit, t.Near) | rest[0].cost&busyBit; end < len(rest) && rest[end].cost <= last; {
			end++
		}
		slices.SortFunc(rest[:end], func(a, b rank) int { return cmp.Or(cmp.Compare(a.among, b.among), a.index-b.index) })
		rest = rest[end:]
	}
	order := make([]int, len(list))
	for i, r := range list {
		order[i] = r.index
	}
	return order
}

// Shortlist picks at most n of the candidates, in the order in which they are to be asked,
// and while there are others at most half of them such as have not served this client yet:
// who offers much cheaply and serves nothing does not drive those out that do.
func (t Taste) Shortlist(candidates []Candidate, n int, size Tokens, dice func() uint32) []int {
	order := t.Order(candidates, size, dice)
	var list []int // places in the order
	for _, proven := range []bool{false, true} {
		room := n - len(list)
		if !proven {
			room = n / 2
		}
		for at, i := range order {
			if room > 0 && candidates[i].Proven == proven {
				list = append(list, at)
				room--
			}
		}
	}
	for at := range order {
		if len(list) < n && !slices.Contains(list, at) {
			list = append(list, at)
		}
	}
	slices.Sort(list)
	for k, at := range list {
		list[k] = order[at]
	}
	return list
}

// Fits reports whether the client pays that price.
func (t Taste) Fits(p pay.Price) bool {
	return p.Validate() == nil && (t.Max.Prompt == 0 || p.Prompt <= t.Max.Prompt) && (t.Max.Completion == 0 || p.Completion <= t.Max.Completion)
}

// more is a cost and so many thousandths of it, up to as much again.
func more(cost uint64, thousandths int64) uint64 {
	part := uint64(min(max(thousandths, 0), 1000))
	return cost + cost/1000*part + cost%1000*part/1000
}

// Pause is for how long a client takes a worker for busy that has refused it, or not
// answered, so many times in a row: one that is proven 10 seconds, then twice as long
// each time, up to 80; another an hour, up to a day. So one that is full for a
// moment is soon asked again, and who offers much and serves nothing soon is not.
func Pause(inARow int, proven bool) time.Duration {
	first, longest := time.Hour, 24*time.Hour
	if proven {
		first, longest = 10*time.Second, 80*time.Second
	}
	return min(first<<min(max(inARow-1, 0), 10), longest)
}
