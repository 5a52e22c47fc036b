// Package sim is a market of owners and clients on which the rules of package market
// are tried: owners that set their prices by Rule.Next and know their own costs, and
// clients that choose by Taste.Order and know what a token is worth to them. It is
// deterministic: a seed, whole numbers, no clock.
//
// Time goes in ticks of 10 seconds, and an interval of the rule is 60 of them. A request
// takes 5 to 15 ticks, and its client sends the next one 1 to 5 ticks later.
package sim

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"chrysalis/market"
	"chrysalis/pay"
)

const (
	tick     = 10 * time.Second
	interval = 60 // ticks

	shortest, longest               = 5, 15 // ticks that a request takes
	shortestThought, longestThought = 1, 5  // ticks until the next

	known    = 12 // workers that a client keeps
	verified = 32 // offers that a client verifies in an interval, at most
	sampled  = 24 // offers that an owner verifies in an interval
)

// forever is a tick that does not come.
const forever = 1 << 30

// mTON is the unit of the simulation's curves, in nanotons.
const mTON = 1_000_000

// of is the price with this sum: a completion costs three times as much as a prompt.
func of(sum int64) pay.Price { return pay.Price{Prompt: sum / 4, Completion: sum - sum/4} }

// An owner serves, unless it is one that lies.
type owner struct {
	name    string
	cost    int64 // what it must get for a million tokens of each kind, in nanotons
	places  int
	latency time.Duration
	start   int    // tick from which it is there
	away    [2]int // ticks from which it is not, and is again

	attested bool
	lies     bool  // refuses every request
	fixed    bool  // keeps its price
	price    int64 // sum, in nanotons

	trend           market.Trend
	held, heldTicks int
}

func (o *owner) there(now int) bool { return now >= o.start && (now < o.away[0] || now >= o.away[1]) }

// A client has streams, each with one request at a time.
type client struct {
	worth   int64 // the most that it pays, in nanotons
	streams []int // of each the tick when it sends its next request
	start   int

	knows  []acquaintance // by owner
	list   []int          // owners that it verified
	looked int            // when it last read the listing
}

// An acquaintance is what a client knows of an owner.
type acquaintance struct {
	latency  time.Duration
	refusals int // in a row
	until    int // busy
	bad      bool
	inFlight int
}

// A Market is one run.
type Market struct {
	rule    market.Rule
	rand    *rand.Rand
	owners  []*owner
	clients []*client
	ends    map[int][]func() // requests' ends, by tick
	now     int

	// Of the interval.
	prices      []int64 // of what was served
	heldTicks   int64
	turned, out int64

	reused []market.Candidate
}

// A Point is an interval of a run.
type Point struct {
	Price    int64 // mean of what was paid, nanotons for a million tokens of each kind
	Low      int64 // a tenth of the requests paid this or less
	High     int64 // a tenth paid this or more
	Held     int64 // places that were held on average, in thousandths of a place
	Requests int64 // served
	Turned   int64 // of which a client found no free worker, and tried again
	Out      int64 // tries of clients to whom every worker was too dear
}

func newMarket(seed uint64) *Market {
	return &Market{rule: market.Default(), rand: rand.New(rand.NewPCG(seed, 0)), ends: map[int][]func(){}}
}

// between is a random number, both ends included.
func (m *Market) between(low, high int64) int64 { return low + m.rand.Int64N(high-low+1) }

// addOwners adds honest owners with 1 to 5 places and costs between 50 and 800 mTON.
// They begin anywhere between their costs and 2 TON.
func (m *Market) addOwners(n int, away [2]int) {
	for range n {
		o := &owner{
			name: fmt.Sprintf("0:%04d", len(m.owners)), cost: m.between(50, 800) * mTON, places: int(m.between(1, 5)),
			latency: time.Duration(m.between(50, 500)) * time.Millisecond, away: away, attested: true,
		}
		o.price = m.between(o.cost, ceiling)
		m.owners = append(m.owners, o)
	}
}

// ceiling is that of all owners, in nanotons.
const ceiling = 2000 * mTON

// addLiars adds owners that serve nobody.
func (m *Market) addLiars(n int, price int64, attested bool, start int) {
	for range n {
		m.owners = append(m.owners, &owner{
			name: fmt.Sprintf("0:%04d", len(m.owners)), cost: price, price: price, places: 1000, latency: time.Millisecond,
			start: start, attested: attested, lies: true, fixed: true,
		})
	}
}

// addClients adds clients with 1 to 3 streams, to whom a million tokens of each kind are
// worth between 100 and 1500 mTON.
func (m *Market) addClients(n, start int) {
	for range n {
		c := &client{
			worth: m.between(100, 1500) * mTON, streams: make([]int, m.between(1, 3)), start: start, looked: -forever}
		for i := range c.streams {
			c.streams[i] = start + int(m.between(0, interval))
		}
		m.clients = append(m.clients, c)
	}
}

// worker is what an attestation of an owner says.
func (o *owner) worker(index int) (id [32]byte) {
	if o.attested {
		id[0], id[1], id[2] = 1, byte(index), byte(index>>8)
	}
	return id
}

// Run lets so many intervals pass, and returns them.
func (m *Market) Run(intervals int) []Point {
	var points []Point
	for range intervals {
		for range interval {
			m.step()
		}
		p := Point{Requests: int64(len(m.prices)), Turned: m.turned, Out: m.out, Held: m.heldTicks * 1000 / interval}
		slices.Sort(m.prices)
		for _, price := range m.prices {
			p.Price += price
		}
		if n := len(m.prices); n > 0 {
			p.Price, p.Low, p.High = p.Price/int64(n), m.prices[n/10], m.prices[n*9/10]
		}
		points = append(points, p)
		m.turned, m.out, m.heldTicks, m.prices = 0, 0, 0, m.prices[:0]
	}
	return points
}

func (m *Market) step() {
	for _, end := range m.ends[m.now] {
		end()
	}
	delete(m.ends, m.now)
	for i, o := range m.owners {
		// Not all at once: each has its own beginning of intervals.
		if o.there(m.now) && !o.fixed && (m.now+i)%interval == 0 && m.now > o.start {
			m.reprice(i, o)
		}
	}
	for _, c := range m.clients {
		if m.now < c.start {
			continue
		}
		for i, at := range c.streams {
			if at <= m.now {
				c.streams[i] = forever
				m.request(c, i)
			}
		}
	}
	for _, o := range m.owners {
		o.heldTicks += o.held
		m.heldTicks += int64(o.held)
	}
	m.now++
}

// reprice is an owner's turn.
func (m *Market) reprice(index int, o *owner) {
	var others []market.Offer
	for range sampled {
		i := m.rand.IntN(len(m.owners))
		if other := m.owners[i]; other != o && other.there(m.now) {
			others = append(others, market.Offer{Owner: other.name, Worker: other.worker(i), Price: of(other.price), Capacity: other.places})
		}
	}
	result, err := m.rule.Next(of(o.price), market.Bounds{Floor: of(o.cost), Ceiling: of(ceiling)}, o.heldTicks*1000/(interval*o.places), others, o.trend)
	if err != nil {
		panic(err) // the simulation's own bounds
	}
	o.price, o.trend = market.Sum(result.Price), result.Trend
	o.heldTicks = 0
}

// size is what every request comes to.
var size = market.Tokens{Prompt: 1_000_000, Completion: 1_000_000}

// look has a client read the listing, and verify until it has enough workers.
func (m *Market) look(c *client) {
	c.looked = m.now
	c.knows = append(c.knows, make([]acquaintance, len(m.owners)-len(c.knows))...)
	for tries := 0; ; {
		c.list = c.list[:0]
		for i, o := range m.owners {
			if o.price <= c.worth && o.there(m.now) && !c.knows[i].bad {
				c.list = append(c.list, i)
			}
		}
		picked := c.taste().Shortlist(m.candidates(c), known, size, m.rand.Uint32)
		good := picked[:0]
		for _, i := range picked {
			if i = c.list[i]; m.owners[i].attested {
				good = append(good, i)
			} else if tries++; tries <= verified {
				c.knows[i].bad = true
			}
		}
		if again := len(good) < len(picked); !again || tries >= verified {
			c.list = append(c.list[:0], good...)
			return
		}
	}
}

func (c *client) taste() market.Taste {
	t := market.DefaultTaste()
	t.Max = of(c.worth)
	return t
}

// candidates is what a client knows of the owners in its list. It is good until the next
// call.
func (m *Market) candidates(c *client) []market.Candidate {
	m.reused = m.reused[:0]
	for _, i := range c.list {
		k := &c.knows[i]
		m.reused = append(m.reused, market.Candidate{
			Price: of(m.owners[i].price), Latency: k.latency, InFlight: k.inFlight, Busy: k.until > m.now, Proven: k.latency > 0,
		})
	}
	return m.reused
}

// request is a client's try to have one served.
func (m *Market) request(c *client, stream int) {
	// It reads the listing once an interval, and every five minutes while nobody takes it.
	if m.now-c.looked >= interval {
		m.look(c)
	}
	taken := m.ask(c, stream)
	if !taken && m.now-c.looked >= int(5*time.Minute/tick) {
		m.look(c)
		taken = m.ask(c, stream)
	}
	switch {
	case taken:
		return
	case len(c.list) == 0:
		m.out++
	default:
		m.turned++
	}
	c.streams[stream] = m.now + m.thought()
}

func (m *Market) thought() int { return int(m.between(shortestThought, longestThought)) }

func (m *Market) ask(c *client, stream int) bool {
	for _, i := range c.taste().Order(m.candidates(c), size, m.rand.Uint32) {
		o, k := m.owners[c.list[i]], &c.knows[c.list[i]]
		if !o.there(m.now) || o.lies || o.held == o.places {
			k.refusals++
			k.until = m.now + int(market.Pause(k.refusals, k.latency > 0)/tick)
			continue
		}
		o.held++
		k.inFlight++
		k.refusals, k.latency = 0, o.latency
		m.prices = append(m.prices, o.price)
		end := m.now + int(m.between(shortest, longest))
		m.ends[end] = append(m.ends[end], func() {
			o.held--
			k.inFlight--
			c.streams[stream] = m.now + m.thought()
		})
		return true
	}
	return false
}

// demand is how many places clients would hold at a price, in thousandths of a place.
func (m *Market) demand(price int64) int64 {
	// What a request takes, and the time to the next one, on average, twice each.
	const request, thought = shortest + longest, shortestThought + longestThought
	var streams int64
	for _, c := range m.clients {
		if m.now >= c.start && c.worth >= price {
			streams += int64(len(c.streams))
		}
	}
	return streams * 1000 * request / (request + thought)
}

// supply is how many places owners would have held at a price when each holds so many
// thousandths of its own.
func (m *Market) supply(price int64, utilisation int) int64 {
	var places int64
	for _, o := range m.owners {
		if o.there(m.now) && !o.lies && o.cost <= price {
			places += int64(o.places)
		}
	}
	return places * int64(utilisation)
}

// Equilibrium is the competitive price at this moment, in nanotons, and the places that are
// held at it, in thousandths: the lowest price at which as many places are offered as are
// asked for, by the curves of costs and of worth alone. The rule keeps a part of the
// places free, so an owner's supply is utilisation thousandths of its places.
func (m *Market) Equilibrium(utilisation int) (price, held int64) {
	var steps []int64
	for _, o := range m.owners {
		steps = append(steps, o.cost)
	}
	for _, c := range m.clients {
		steps = append(steps, c.worth+1)
	}
	slices.SortFunc(steps, cmp.Compare[int64])
	for _, price := range steps {
		if d := m.demand(price); m.supply(price, utilisation) >= d {
			return price, d
		}
	}
	return 0, 0
}
