package load

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Config is the load.
type Config struct {
	Address string   // HOST:PORT of the relay
	Model   string   // that the engine serves
	Tokens  []string // one for each modest client; the greedy one has the last
	Idle    int      // clients that keep a connection and ask little
	Active  int      // streams at a time, of all modest clients together
	Greedy  int      // streams at a time of one client that never waits
	Events  int      // of a stream
	Pause   time.Duration
	For     time.Duration
	Sample  func() (Sample, error)
}

// Sample is the state of the processes under load.
type Sample struct {
	Agent, Relay Process
	Active       int64 // places that are taken
	Busy         int64 // answers with 429 since the start
}

// Process is what a process takes.
type Process struct {
	RSS, Peak   int64 // KiB
	Goroutines  int64 // 0 where nobody can tell
	Descriptors int64
}

// Report is what the load did.
type Report struct {
	Samples     []Sample  // before, at the start, in the middle, at the end, and after
	First       Latencies // from the request to the first event, less what the engine took: the queue
	Added       Latencies // how much later an event came than the promptest of its stream
	Streams     int64
	Events      int64
	Refused     int64   // 429
	Without     int64   // 429 without Retry-After
	Failed      int64   // anything else
	Why         string  // the first that failed
	Shares      []int64 // streams by modest client
	GreedyShare int64   // of the greedy one
	IdleAlive   int     // idle clients connected at the end
	IdleAgain   int64   // times that one had to connect again
}

// Latencies counts durations in buckets 10 % apart.
type Latencies struct {
	mu      sync.Mutex
	buckets [200]int64
	n       int64
}

func (l *Latencies) add(d time.Duration) {
	at, edge := 0, 50*time.Microsecond
	for ; at < len(l.buckets)-1 && d > edge; at++ {
		edge += edge / 10
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buckets[at]++
	l.n++
}

// At returns the upper edge of the bucket that a share of the durations is in or
// below.
func (l *Latencies) At(share float64) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen, edge := int64(0), 50*time.Microsecond
	for _, n := range l.buckets {
		if seen += n; float64(seen) >= share*float64(l.n) {
			return edge
		}
		edge += edge / 10
	}
	return edge
}

// client is an HTTP client with a connection of its own.
func client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		// Evidence is another test's matter.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxConnsPerHost: 1, IdleConnTimeout: 5 * time.Minute,
		WriteBufferSize: 1 << 10, ReadBufferSize: 2 << 10,
	}}
}

func (c *Config) request(ctx context.Context, token string, events int, pause time.Duration) *http.Request {
	body := fmt.Sprintf(`{"model":%q,"stream":true,"messages":[{"role":"user","content":"%d %d"}]}`, c.Model, events, pause.Milliseconds())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+c.Address+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		panic(err) // the address is a host and a port
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

// stream asks for one stream and reads it. seen is called for each event with how much
// later it came than the engine sent it, by a clock that begins with the request.
func (c *Config) stream(ctx context.Context, by *http.Client, token string, seen func(late time.Duration)) (status int, retry string, err error) {
	begin := time.Now()
	answer, err := by.Do(c.request(ctx, token, c.Events, c.Pause))
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		io.Copy(io.Discard, answer.Body)
		return answer.StatusCode, answer.Header.Get("Retry-After"), nil
	}
	lines, i, done := bufio.NewReaderSize(answer.Body, 4<<10), 0, false
	for {
		line, err := lines.ReadString('\n')
		if data, ok := strings.CutPrefix(line, "data: {"); ok {
			var event struct {
				Choices []struct{ Delta struct{ Content string } }
			}
			var sent int64
			if json.Unmarshal([]byte("{"+data), &event) == nil && len(event.Choices) == 1 {
				if _, err := fmt.Sscan(event.Choices[0].Delta.Content, &sent); err == nil {
					seen(time.Since(begin) - time.Duration(sent)*time.Microsecond)
					i++
				}
			}
		}
		done = done || line == "data: [DONE]\n"
		switch {
		case err == io.EOF && done && i == c.Events:
			return answer.StatusCode, "", nil
		case err == io.EOF:
			return 0, "", fmt.Errorf("a stream of %d events ended after %d", c.Events, i)
		case err != nil:
			return 0, "", err
		}
	}
}

// Run puts the load on, and returns when it is over.
func Run(ctx context.Context, c Config) (*Report, error) {
	r := &Report{Shares: make([]int64, len(c.Tokens)-1)}
	sample := func() error {
		s, err := c.Sample()
		r.Samples = append(r.Samples, s)
		return err
	}
	if err := sample(); err != nil {
		return nil, err
	}
	var all sync.WaitGroup
	working, stop := context.WithCancel(ctx)
	defer stop()
	var ending atomic.Bool
	var again, alive atomic.Int64
	var failure sync.Once

	// Each connects some time after the one before, or it would be the test of
	// another thing.
	spread := min(c.For/8, time.Minute)
	pause := func(d time.Duration) bool {
		select {
		case <-time.After(d):
			return !ending.Load()
		case <-working.Done():
			return false
		}
	}
	for i := range c.Idle {
		all.Go(func() {
			by := client()
			defer by.CloseIdleConnections()
			if !pause(spread * time.Duration(i) / time.Duration(c.Idle)) {
				return
			}
			for connected := false; ; {
				begin := time.Now()
				request, _ := http.NewRequestWithContext(working, http.MethodGet, "https://"+c.Address+"/v1/models", nil)
				request.Header.Set("Authorization", "Bearer "+c.Tokens[i%len(c.Tokens)])
				answer, err := by.Do(request)
				if err == nil {
					io.Copy(io.Discard, answer.Body)
					answer.Body.Close()
				}
				ok := err == nil && answer.StatusCode == http.StatusOK
				switch {
				case ok && !connected:
					alive.Add(1)
				case !ok && connected:
					alive.Add(-1)
				}
				if !ok && working.Err() == nil {
					again.Add(1)
				}
				connected = ok
				// Within the time for which a connection is kept.
				if !pause(time.Duration(30+rand.IntN(20))*time.Second - time.Since(begin)) {
					return
				}
			}
		})
	}
	streams := func(token string, share *int64, polite bool, delay time.Duration) {
		by := client()
		defer by.CloseIdleConnections()
		if !pause(delay) {
			return
		}
		for !ending.Load() {
			var late []time.Duration
			status, retry, err := c.stream(working, by, token, func(by time.Duration) { late = append(late, by) })
			if len(late) > 0 {
				atomic.AddInt64(&r.Events, int64(len(late)))
				r.First.add(late[0])
				for least, i := slices.Min(late), 0; i < len(late); i++ {
					r.Added.add(late[i] - least)
				}
			}
			wait := time.Duration(0)
			switch {
			case working.Err() != nil:
				return
			case err == nil && status == http.StatusOK:
				atomic.AddInt64(&r.Streams, 1)
				atomic.AddInt64(share, 1)
			case err == nil && status == http.StatusTooManyRequests:
				atomic.AddInt64(&r.Refused, 1)
				if retry == "" {
					atomic.AddInt64(&r.Without, 1)
				}
				if wait = 50 * time.Millisecond; polite {
					wait = time.Second
				}
			default:
				atomic.AddInt64(&r.Failed, 1)
				failure.Do(func() { r.Why = fmt.Sprintf("status %d, %v", status, err) })
				wait = time.Second
			}
			if wait > 0 && !pause(wait) {
				return
			}
		}
	}
	modest := len(c.Tokens) - 1
	for i := range c.Active {
		all.Go(func() {
			streams(c.Tokens[i%modest], &r.Shares[i%modest], true, spread*time.Duration(i)/time.Duration(c.Active))
		})
	}
	for range c.Greedy {
		all.Go(func() { streams(c.Tokens[modest], &r.GreedyShare, false, spread) })
	}

	steps := []time.Duration{spread * 2, c.For / 2, c.For}
	begin := time.Now()
	for _, at := range steps {
		select {
		case <-time.After(time.Until(begin.Add(at))):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if err := sample(); err != nil {
			return nil, err
		}
	}
	// Streams that have begun may end; who only idles leaves.
	ending.Store(true)
	r.IdleAlive, r.IdleAgain = int(alive.Load()), again.Load()
	end := time.AfterFunc(2*time.Duration(c.Events)*c.Pause+10*time.Second, stop)
	defer end.Stop()
	all.Wait()
	for range 40 { // what the clients left is cleared away
		time.Sleep(500 * time.Millisecond)
		if s, err := c.Sample(); err == nil && s.Agent.Descriptors <= r.Samples[0].Agent.Descriptors+4 {
			break
		}
	}
	return r, sample()
}

// Leaks says what the processes still have that they did not have before.
func (r *Report) Leaks() (leaks []string) {
	before, after := r.Samples[0], r.Samples[len(r.Samples)-1]
	for _, p := range []struct {
		name          string
		before, after Process
	}{{"agent", before.Agent, after.Agent}, {"relay", before.Relay, after.Relay}} {
		if p.after.Goroutines > p.before.Goroutines+8 {
			leaks = append(leaks, fmt.Sprintf("%s: %d goroutines, %d before", p.name, p.after.Goroutines, p.before.Goroutines))
		}
		if p.after.Descriptors > p.before.Descriptors+8 {
			leaks = append(leaks, fmt.Sprintf("%s: %d descriptors, %d before", p.name, p.after.Descriptors, p.before.Descriptors))
		}
	}
	// Memory may go up to what the load needs, but not on from there.
	middle, end := r.Samples[2], r.Samples[3]
	if end.Agent.RSS > middle.Agent.RSS*5/4+4<<10 {
		leaks = append(leaks, fmt.Sprintf("agent: %d KiB at the end, %d KiB in the middle", end.Agent.RSS, middle.Agent.RSS))
	}
	if end.Relay.RSS > middle.Relay.RSS*5/4+4<<10 {
		leaks = append(leaks, fmt.Sprintf("relay: %d KiB at the end, %d KiB in the middle", end.Relay.RSS, middle.Relay.RSS))
	}
	return leaks
}

// Unfair says which modest client got less than its share of the streams, and by
// what the greedy one got more.
func (r *Report) Unfair() string {
	low, high := slices.Min(r.Shares), slices.Max(r.Shares)
	switch {
	case low*2 < high:
		return fmt.Sprintf("of clients that ask alike one got %d streams and another %d", low, high)
	// A place that is free goes to whoever asks, so on a busy machine, where modest
	// clients are slow to ask again, the greedy one gets more than its turn. Without
	// turns it has its part of all requests, which is eight times theirs.
	case r.GreedyShare > high*3+2:
		return fmt.Sprintf("a client that asks more got %d streams, the others %d to %d", r.GreedyShare, low, high)
	}
	return ""
}

// String is the report as lines of a table: what, measured.
func (r *Report) String() string {
	var out strings.Builder
	row := func(what, format string, args ...any) {
		fmt.Fprintf(&out, "| %s | %s |\n", what, fmt.Sprintf(format, args...))
	}
	each := func(what string, of func(Sample) any) {
		var values []string
		for _, s := range r.Samples {
			values = append(values, fmt.Sprint(of(s)))
		}
		row(what+": before, start, middle, end, after", "%s", strings.Join(values, ", "))
	}
	row("streams answered; events", "%d; %d", r.Streams, r.Events)
	row("answered 429; without Retry-After", "%d; %d", r.Refused, r.Without)
	row("failed", "%d %s", r.Failed, r.Why)
	row("streams by client that asks alike, fewest to most", "%d to %d", slices.Min(r.Shares), slices.Max(r.Shares))
	row("streams of the client that asks more and never waits", "%d", r.GreedyShare)
	row("idle clients connected at the end; that had to connect again", "%d; %d", r.IdleAlive, r.IdleAgain)
	ms := func(l *Latencies) string {
		return fmt.Sprintf("%.1f ms, %.1f ms", l.At(0.5).Seconds()*1000, l.At(0.99).Seconds()*1000)
	}
	row("added to a stream's first event, the queue included, p50, p99", "%s", ms(&r.First))
	row("added to an event beyond the promptest of its stream, p50, p99", "%s", ms(&r.Added))
	each("agent's resident memory, MB", func(s Sample) any { return fmt.Sprintf("%.1f", float64(s.Agent.RSS)*1024/1e6) })
	row("agent's resident memory, peak", "%.1f MB", float64(r.Samples[len(r.Samples)-1].Agent.Peak)*1024/1e6)
	each("agent's goroutines", func(s Sample) any { return s.Agent.Goroutines })
	each("agent's descriptors", func(s Sample) any { return s.Agent.Descriptors })
	each("relay's resident memory, MB", func(s Sample) any { return fmt.Sprintf("%.1f", float64(s.Relay.RSS)*1024/1e6) })
	if r.Samples[0].Relay.Goroutines > 0 {
		each("relay's goroutines", func(s Sample) any { return s.Relay.Goroutines })
	}
	each("relay's descriptors", func(s Sample) any { return s.Relay.Descriptors })
	return out.String()
}
