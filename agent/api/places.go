package api

import (
	"context"
	"slices"
	"sync"
	"time"
)

// queueLimit is how long a request waits for a place. Longer, and its client cannot
// tell this VM from a dead one, and would do better to ask another.
const queueLimit = 5 * time.Second

// places are what requests need to be in the engine, and the queue for them. Both
// are bounded. A place goes to the client that has the fewest, and among those to
// the one that was given one longest ago, so that who sends many requests at once
// waits behind itself, not before everybody else.
//
// A client is a token's holder where the manifest names tokens, and else who pays with
// a channel. Of others all that is known is their connection, and many connections get
// as many turns: every address outside of the VM is the host's word.
type places struct {
	mu      sync.Mutex
	size    int // places
	most    int // of them that one client may have
	queue   int // turns that may wait
	taken   int
	closed  bool
	clients map[any]*share
	waiting []*turn // by arrival
	count   int64   // of places given
}

// share is what one client has.
type share struct {
	held, waiting int
	last          int64 // places.count when it was given one
}

// turn is a request that waits.
type turn struct {
	client any
	given  chan error // nil for a place
}

func newPlaces(size int) *places {
	return &places{size: size, most: size, queue: size, clients: map[any]*share{}}
}

// reserve keeps some places from whoever has all the others: answers can take
// minutes, and nobody is sent away once it has a place.
func (p *places) reserve() {
	if p.size > 1 {
		p.most = p.size - max(1, p.size/8)
	}
}

// active is how many places are taken.
func (p *places) active() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

// full reports whether a request of a client would be refused now.
func (p *places) full(client any) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.open(client) && len(p.waiting) >= p.queue && p.greediest(client) == nil
}

// take waits for a place. queued is called if it has to.
func (p *places) take(ctx context.Context, client any, limit time.Duration, queued func()) error {
	p.mu.Lock()
	switch {
	case p.closed:
		p.mu.Unlock()
		return errDraining
	case p.open(client):
		p.hold(client)
		p.mu.Unlock()
		return nil
	case len(p.waiting) >= p.queue:
		greedy := p.greediest(client)
		if greedy == nil {
			p.mu.Unlock()
			return errBusy
		}
		p.leave(greedy)
		greedy.given <- errBusy
	}
	t := &turn{client, make(chan error, 1)}
	p.waiting = append(p.waiting, t)
	p.of(client).waiting++
	p.mu.Unlock()
	queued()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	var why error
	select {
	case err := <-t.given:
		return err
	case <-ctx.Done():
		why = errGone
	case <-timer.C:
		why = errBusy
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case err := <-t.given: // just now
		if err != nil || why == errBusy {
			return err
		}
		p.free(client)
	default:
		p.leave(t)
	}
	return why
}

// give gives a place back, to whose turn it is.
func (p *places) give(client any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free(client)
}

// close refuses all that wait, and all that come.
func (p *places) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for len(p.waiting) > 0 {
		t := p.waiting[0]
		p.leave(t)
		t.given <- errDraining
	}
}

// The rest is called with the lock held.

// open reports whether there is a place that a client may have.
func (p *places) open(client any) bool {
	s := p.clients[client]
	return p.taken < p.size && (s == nil || s.held < p.most)
}

func (p *places) of(client any) *share {
	s := p.clients[client]
	if s == nil {
		s = new(share)
		p.clients[client] = s
	}
	return s
}

func (p *places) hold(client any) {
	s := p.of(client)
	p.count++
	p.taken++
	s.held, s.last = s.held+1, p.count
}

func (p *places) free(client any) {
	p.taken--
	p.clients[client].held--
	p.forget(client)
	var next *turn
	for _, t := range p.waiting {
		if p.open(t.client) && (next == nil || p.before(t, next)) {
			next = t
		}
	}
	if next != nil {
		p.leave(next)
		p.hold(next.client)
		next.given <- nil
	}
}

// before reports whether a's client is to get a place before b's.
func (p *places) before(a, b *turn) bool {
	x, y := p.clients[a.client], p.clients[b.client]
	return x.held < y.held || x.held == y.held && x.last < y.last
}

// leave takes a turn out of the queue.
func (p *places) leave(t *turn) {
	p.waiting = slices.DeleteFunc(p.waiting, func(o *turn) bool { return o == t })
	p.clients[t.client].waiting--
	p.forget(t.client)
}

// forget drops a client that neither has nor wants anything.
func (p *places) forget(client any) {
	if s := p.clients[client]; s.held == 0 && s.waiting == 0 {
		delete(p.clients, client)
	}
}

// greediest returns the turn that makes room in a full queue for one more of a
// client: the latest of the client with the most turns there, if that has at least
// two more.
func (p *places) greediest(client any) *turn {
	most := 1
	if s := p.clients[client]; s != nil {
		most = s.waiting + 1
	}
	var latest *turn
	for _, t := range p.waiting {
		n := p.clients[t.client].waiting
		if n > most || latest != nil && t.client == latest.client {
			most, latest = n, t
		}
	}
	return latest
}
