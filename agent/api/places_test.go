package api

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/agent/agenttest"
	"chrysalis/manifest"
)

// queued is how many requests wait for a place.
func (s *Server) queued() int {
	s.places.mu.Lock()
	defer s.places.mu.Unlock()
	return len(s.places.waiting)
}

// queue queues a turn, and returns when it waits, or has ended. ended is then called
// with how.
func queue(t *testing.T, p *places, client string, ended func(error)) {
	t.Helper()
	in := make(chan struct{})
	var once sync.Once
	waits := func() { once.Do(func() { close(in) }) }
	go func() {
		err := p.take(t.Context(), client, time.Minute, waits)
		waits()
		ended(err)
	}()
	<-in
}

// order takes the places of p, queues turns of the clients named, one after the
// other, and returns in which order they get a place when each gives it back.
func order(t *testing.T, p *places, clients string) string {
	t.Helper()
	got := make(chan string, len(clients))
	for range p.size {
		if err := p.take(t.Context(), "first", time.Minute, nil); err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	for _, c := range clients {
		all.Add(1)
		queue(t, p, string(c), func(err error) {
			defer all.Done()
			if err != nil {
				got <- "-"
				return
			}
			got <- string(c)
			p.give(string(c))
		})
	}
	for range p.size {
		p.give("first")
	}
	all.Wait()
	close(got)
	var out []string
	for c := range got {
		out = append(out, c)
	}
	if p.taken != 0 || len(p.waiting) != 0 || len(p.clients) != 0 {
		t.Errorf("left behind: %d taken, %d wait, %d clients", p.taken, len(p.waiting), len(p.clients))
	}
	return strings.Join(out, "")
}

func TestTurns(t *testing.T) {
	for _, c := range []struct{ clients, want string }{
		{"abcd", "abcd"},     // nobody has more than another: by arrival
		{"aaab", "abaa"},     // one of many turns waits behind itself
		{"aaaabb", "ababaa"}, // in turn
		{"aabbcc", "abcabc"},
	} {
		p := newPlaces(1)
		p.queue = len(c.clients)
		if got := order(t, p, c.clients); got != c.want {
			t.Errorf("%s got places in the order %s, want %s", c.clients, got, c.want)
		}
	}
}

// Who has places already comes after who has none.
func TestFewestFirst(t *testing.T) {
	p := newPlaces(3)
	for range 3 {
		p.take(t.Context(), "a", time.Minute, nil)
	}
	got := make(chan string, 3)
	for _, c := range []string{"a", "b", "b"} {
		queue(t, p, c, func(error) { got <- c })
	}
	var out []string
	for range 2 {
		p.give("a")
		out = append(out, <-got)
	}
	p.give("a")
	// When the second is given back, both have one; a was given its own longer ago.
	if out = append(out, <-got); !slices.Equal(out, []string{"b", "a", "b"}) {
		t.Errorf("%v", out)
	}
}

// A queue that one client has filled has room for another.
func TestQueueIsShared(t *testing.T) {
	p := newPlaces(2)
	for range 2 {
		p.take(t.Context(), "a", time.Minute, nil)
	}
	lost := make(chan error, 4)
	add := func(client string) { queue(t, p, client, func(err error) { lost <- err }) }
	add("a")
	add("a")
	if !p.full("a") || p.full("b") {
		t.Errorf("full for a: %t, for b: %t", p.full("a"), p.full("b"))
	}
	if err := p.take(t.Context(), "a", time.Minute, nil); err != errBusy {
		t.Errorf("one more of the client that fills it: %v", err)
	}
	add("b")
	if err := <-lost; err != errBusy {
		t.Errorf("the one that made room: %v", err)
	}
	// Now each has one turn, and a third client has none to take.
	if !p.full("c") {
		t.Error("a turn would be taken from a client that has one")
	}
	p.close()
	for range 2 {
		if err := <-lost; err != errDraining {
			t.Errorf("one that waited while the server drained: %v", err)
		}
	}
	if err := p.take(t.Context(), "c", time.Minute, nil); err != errDraining {
		t.Errorf("one that came later: %v", err)
	}
}

// A client that has all places it may have leaves the others to other clients, at
// once and not when it has finished.
func TestReserve(t *testing.T) {
	for size, most := range map[int]int{1: 1, 2: 1, 8: 7, 200: 175} {
		p := newPlaces(size)
		if p.reserve(); p.most != most {
			t.Errorf("one client may have %d of %d places, want %d", p.most, size, most)
		}
	}
	p := newPlaces(4)
	p.reserve()
	for range 3 {
		if err := p.take(t.Context(), "a", 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	got := make(chan error, 1)
	queue(t, p, "a", func(err error) { got <- err })
	if err := p.take(t.Context(), "b", 0, nil); err != nil {
		t.Errorf("another client: %v", err)
	}
	p.give("b")
	select {
	case err := <-got:
		t.Fatalf("the reserved place went to the client that has all others: %v", err)
	default:
	}
	p.give("a")
	if err := <-got; err != nil {
		t.Errorf("its own place: %v", err)
	}
}

func TestTurnEnds(t *testing.T) {
	p := newPlaces(1)
	p.take(t.Context(), "a", time.Minute, nil)
	if err := p.take(t.Context(), "b", 10*time.Millisecond, func() {}); err != errBusy {
		t.Errorf("after the limit: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := p.take(ctx, "b", time.Minute, cancel); err != errGone {
		t.Errorf("when the client has gone: %v", err)
	}
	p.give("a")
	if p.taken != 0 || len(p.clients) != 0 || len(p.waiting) != 0 {
		t.Errorf("left behind: %+v", p)
	}
}

// Under all sorts of ends no place is lost or given twice.
func TestPlacesAreKept(t *testing.T) {
	p := newPlaces(4)
	var all sync.WaitGroup
	var mu sync.Mutex
	held := 0
	for i := range 64 {
		all.Go(func() {
			for n := range 50 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration((i+n)%7)*100*time.Microsecond)
				if p.take(ctx, i%5, time.Duration((i*n)%5)*100*time.Microsecond, func() {}) == nil {
					mu.Lock()
					if held++; held > p.size {
						t.Error("more hold a place than there are")
					}
					mu.Unlock()
					time.Sleep(time.Duration(n%3) * 50 * time.Microsecond)
					mu.Lock()
					held--
					mu.Unlock()
					p.give(i % 5)
				}
				cancel()
			}
		})
	}
	all.Wait()
	if p.taken != 0 || len(p.waiting) != 0 || len(p.clients) != 0 {
		t.Errorf("left behind: %d taken, %d wait, %d clients", p.taken, len(p.waiting), len(p.clients))
	}
}

// TestFairness has a client with one token ask all the time over many connections,
// and one with another token over one. The second gets its share, not what the
// first leaves over.
func TestFairness(t *testing.T) {
	const greedy, modest = "sk-greedy-0123456789abcdef0123456789", "sk-modest-0123456789abcdef0123456789"
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		time.Sleep(20 * time.Millisecond)
		sayJSON(w, 200, `{}`)
	}, func(c *Config) {
		c.Limits.Concurrency = 2
		c.Tokens = []string{manifest.TokenHash(greedy), manifest.TokenHash(modest)}
		slices.Sort(c.Tokens)
	}, nil)
	ask := func(ctx context.Context, token string) (int, error) {
		req := b.request(t, "POST", "/v1/chat/completions", hello).WithContext(ctx)
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := b.client.Do(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, err
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for ctx.Err() == nil {
				if status, err := ask(ctx, greedy); err == nil && status != 200 && status != 429 {
					t.Errorf("the greedy client got %d", status)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	agenttest.Eventually(t, "the queue is full", func() bool { return b.queued() == 2 })
	for i := range 20 {
		if status, err := ask(ctx, modest); status != 200 || err != nil {
			t.Errorf("request %d of the modest client: %d, %v", i, status, err)
		}
	}
	cancel()
	all.Wait()
	if b.counters.Busy.Load() == 0 {
		t.Error("nobody was told to try again")
	}
}
