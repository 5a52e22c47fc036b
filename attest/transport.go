package attest

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/measure/record"
)

// DefaultTimeout bounds connecting, the TLS handshake and the evidence together.
const DefaultTimeout = 30 * time.Second

// overhead bounds an answer's headers and framing, and the body of one that is not
// what was asked for, in bytes.
const overhead = 64 << 10

// Transport is an http.RoundTripper that sends a request only over a connection
// whose peer is verified. Evidence is fetched over a new connection before that
// carries anything else; a connection to a key that was verified within the
// policy's age needs none. A connection whose key was verified longer ago carries
// no further request.
//
// It speaks HTTP/1.1 over TLS 1.3, follows no proxy settings and asks for no
// compression. Its fields must not change once it is used; Trust replaces the
// records. It may be used from several goroutines.
type Transport struct {
	Policy     *Policy
	Records    []*record.File
	Collateral Source
	GPU        *GPUCollateral // to be shared with other transports; nil has what VMs carry
	Timeout    time.Duration  // 0 is DefaultTimeout

	// Dial connects; nil is the net package's.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Verified is called with every verdict, good or bad, and what it is about.
	Verified func(*Session)
	// IdleConns is how many unused connections are kept for each host; 0 is 32.
	IdleConns int

	mu      sync.Mutex
	peers   map[string]*peer
	trusted *[]*record.File  // instead of Records, after Trust
	epoch   uint64           // how often Trust was called
	now     func() time.Time // tests only
}

// Trust replaces the records, when some were published or revoked, and forgets what
// was verified by the old ones: no connection made before carries another request,
// and requests in flight go on.
func (t *Transport) Trust(records []*record.File) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.trusted = &records
	t.epoch++
	for _, p := range t.peers {
		p.mu.Lock()
		if p.gen != nil {
			p.gen.inner.CloseIdleConnections()
			p.gen = nil
		}
		p.mu.Unlock()
	}
}

// records are those that a verification is made by now, and which they are.
func (t *Transport) records() ([]*record.File, uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.trusted != nil {
		return *t.trusted, t.epoch
	}
	return t.Records, t.epoch
}

// errChanged says that a verification was made by records that were replaced
// meanwhile.
var errChanged = errors.New("the records were replaced meanwhile; try again")

// Session is one verification.
type Session struct {
	Host       string // HOST:PORT
	Verdict    *Verdict
	Document   []byte // the evidence as it came
	Nonce      []byte
	TLSKey     []byte // SPKI, DER
	Collateral *Collateral
	Fetch      time.Duration // how long the evidence took to come
	Took       time.Duration // how long it took to check

	epoch uint64           // of the records that it was made by
	gpu   *nvidia.Verifier // that judged the GPUs
}

// peer is what is known of one host.
type peer struct {
	busy chan struct{} // holds one token: one verification at a time
	mu   sync.Mutex
	gen  *generation
}

// generation is a pool of connections whose keys were all verified since a time.
// When it has grown too old, another takes its place: requests in flight go on,
// and no later one can get a connection of it.
type generation struct {
	inner *http.Transport
	keys  map[[32]byte]time.Time // when each SPKI was verified; guarded by the peer's mu
	since time.Time              // the earliest of them
}

func (t *Transport) clock() time.Time {
	if t.now != nil {
		return t.now()
	}
	return time.Now()
}

func (t *Transport) peer(host string) *peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.peers == nil {
		t.peers = map[string]*peer{}
	}
	p := t.peers[host]
	if p == nil {
		p = &peer{busy: make(chan struct{}, 1)}
		t.peers[host] = p
	}
	return p
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(request *http.Request) (*http.Response, error) {
	host, err := hostPort(request.URL)
	if err != nil {
		if request.Body != nil {
			request.Body.Close()
		}
		return nil, err
	}
	return t.current(t.peer(host)).inner.RoundTrip(request)
}

// hostPort is the HOST:PORT of an https URL.
func hostPort(u *url.URL) (string, error) {
	if u.Scheme != "https" || u.Hostname() == "" {
		return "", fmt.Errorf("%q is not an https URL; only those are verified", u.Redacted())
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}

// current returns the peer's generation, a new one when the last is too old.
func (t *Transport) current(p *peer) *generation {
	p.mu.Lock()
	defer p.mu.Unlock()
	if g := p.gen; g != nil {
		if g.since.IsZero() || t.clock().Sub(g.since) < t.Policy.MaxAge() {
			return g
		}
		g.inner.CloseIdleConnections()
	}
	p.gen = t.generation(p)
	return p.gen
}

func (t *Transport) generation(p *peer) *generation {
	idle := t.IdleConns
	if idle == 0 {
		idle = 32
	}
	g := &generation{keys: map[[32]byte]time.Time{}}
	g.inner = &http.Transport{
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return t.connect(ctx, p, g, network, address)
		},
		DisableCompression:     true, // a receipt is about the bytes as sent
		MaxIdleConnsPerHost:    idle,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}
	return g
}

// connect makes a verified connection for a generation.
func (t *Transport) connect(ctx context.Context, p *peer, g *generation, network, address string) (net.Conn, error) {
	conn, key, deadline, err := t.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(key)
	verified := func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		at, ok := g.keys[sum]
		return ok && t.clock().Sub(at) < t.Policy.MaxAge()
	}
	if !verified() {
		err = p.exclusive(ctx, deadline, func() error {
			if verified() { // by the one before
				return nil
			}
			at := t.clock()
			s, err := t.verify(ctx, conn, address, key, deadline)
			if err != nil {
				return err
			}
			if _, now := t.records(); now != s.epoch {
				return errChanged
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			g.add(sum, at)
			return nil
		})
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (g *generation) add(key [32]byte, at time.Time) {
	g.keys[key] = at
	g.since = at
	for _, when := range g.keys {
		if when.Before(g.since) {
			g.since = when
		}
	}
}

// exclusive runs f when no other verification of the peer runs.
func (p *peer) exclusive(ctx context.Context, deadline time.Time, f func() error) error {
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case p.busy <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return errors.New("another verification of this VM takes too long")
	}
	defer func() { <-p.busy }()
	return f()
}

// dial connects and shakes hands. The connection has the deadline that it
// returns.
func (t *Transport) dial(ctx context.Context, network, address string) (*tls.Conn, []byte, time.Time, error) {
	timeout := t.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	deadline := time.Now().Add(timeout)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	dial := t.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	raw, err := dial(ctx, network, address)
	if err != nil {
		return nil, nil, deadline, err
	}
	// No authority vouches for a VM's key: its evidence does. TLS proves that the
	// peer holds the key that it shows.
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	conn.SetDeadline(deadline)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, nil, deadline, fmt.Errorf("TLS with %s: %w", address, err)
	}
	return conn, conn.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo, deadline, nil
}

// verify fetches evidence over a connection and checks it.
func (t *Transport) verify(ctx context.Context, conn net.Conn, host string, key []byte, deadline time.Time) (*Session, error) {
	s := &Session{Host: host, TLSKey: key, Nonce: make([]byte, evidence.NonceSize)}
	rand.Read(s.Nonce)
	begin := time.Now()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var err error
	if s.Document, err = fetch(conn, host, s.Nonce); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("evidence of %s: %w", host, err)
	}
	s.Fetch = time.Since(begin)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	begin = time.Now()
	var records []*record.File
	records, s.epoch = t.records()
	in := Input{
		Policy: t.Policy, Records: records, Collateral: t.Collateral, GPU: t.GPU, Nonce: s.Nonce, TLSKey: key, Time: t.clock(),
		carried: func(ctx context.Context) (*nvidia.Collateral, error) {
			return t.fetchGPUCollateral(ctx, host, deadline)
		},
	}
	s.Verdict = verifyAll(ctx, s.Document, &in)
	s.Collateral, s.gpu = in.used, in.usedGPU
	s.Took = time.Since(begin)
	if t.Verified != nil {
		t.Verified(s)
	}
	return s, s.Verdict.Err()
}

// fetchGPUCollateral asks a VM for the collateral that it carries. It asks over a
// connection of its own: who answers need not be trusted, and whatever the answer
// is, the connection that the evidence came over can still be used.
func (t *Transport) fetchGPUCollateral(ctx context.Context, host string, deadline time.Time) (*nvidia.Collateral, error) {
	conn, _, _, err := t.dial(ctx, "tcp", host)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// A VM that does not answer must leave time to ask NVIDIA.
	conn.SetDeadline(time.Now().Add(time.Until(deadline) / 2))
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	status, data, err := get(conn, host, evidence.GPUCollateralPath, nvidia.MaxCollateralSize)
	switch {
	case status == http.StatusNotFound:
		return nil, nil
	case status != 0 && status != http.StatusOK:
		return nil, fmt.Errorf("it answered %d to the question for GPU collateral", status)
	case err != nil:
		return nil, err
	}
	return nvidia.ParseCollateral(data)
}

// fetch asks for evidence.
func fetch(conn net.Conn, host string, nonce []byte) ([]byte, error) {
	status, document, err := get(conn, host, evidence.Path+"?nonce="+base64.RawURLEncoding.EncodeToString(nonce), evidence.MaxSize)
	if status != 0 && status != http.StatusOK {
		return nil, fmt.Errorf("the server answered %d", status)
	}
	return document, err
}

// get asks for something before anything else is sent. The peer gets no more of an
// answer than limit bytes and no longer than the connection's deadline. After an
// error the connection cannot be used any more. The status is 0 when none came.
func get(conn net.Conn, host, path string, limit int) (status int, body []byte, err error) {
	request, err := http.NewRequest(http.MethodGet, "https://"+host+path, nil)
	if err != nil {
		return 0, nil, err
	}
	request.Header.Set("User-Agent", "chrysalis")
	if err := request.Write(conn); err != nil {
		return 0, nil, err
	}
	limited := &io.LimitedReader{R: conn, N: int64(limit) + overhead}
	in := bufio.NewReader(limited)
	tooLarge := func(err error) error {
		if limited.N <= 0 {
			return fmt.Errorf("the answer is more than %d bytes", limit+overhead)
		}
		if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
			return errors.New("it does not come in time")
		}
		return err
	}
	answer, err := http.ReadResponse(in, request)
	if err != nil {
		return 0, nil, tooLarge(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		limit = overhead
	}
	body, err = io.ReadAll(io.LimitReader(answer.Body, int64(limit)+1))
	if err != nil {
		return answer.StatusCode, nil, tooLarge(err)
	}
	if len(body) > limit {
		return answer.StatusCode, nil, fmt.Errorf("it is more than %d bytes", limit)
	}
	// What follows would be taken for the answer to the next request.
	if answer.Close || answer.Uncompressed || in.Buffered() > 0 {
		return answer.StatusCode, nil, errors.New("the server does not keep the connection for a request after it")
	}
	return answer.StatusCode, body, nil
}

// Attest fetches and checks evidence of an endpoint, https://HOST:PORT, over a new
// connection, whatever is known of it. When it is good, connections to its key
// count as verified from now on; requests in flight are not disturbed. When it is
// refused, no connection is used again until one is verified anew. The session is
// nil when no evidence came.
func (t *Transport) Attest(ctx context.Context, endpoint string) (*Session, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("%q is not an endpoint", endpoint)
	}
	host, err := hostPort(u)
	if err != nil {
		return nil, err
	}
	p := t.peer(host)
	conn, key, deadline, err := t.dial(ctx, "tcp", host)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var s *Session
	at := t.clock()
	err = p.exclusive(ctx, deadline, func() (err error) {
		s, err = t.verify(ctx, conn, host, key, deadline)
		return err
	})
	_, epoch := t.records()
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.gen
	if err == nil && epoch != s.epoch {
		err = errChanged
	}
	if err != nil {
		if refused, ok := errors.AsType[*RefusedError](err); ok && refused.Verdict.Refused() && old != nil {
			p.gen = nil
			old.inner.CloseIdleConnections()
		}
		return s, err
	}
	sum := sha256.Sum256(key)
	if old != nil && len(old.keys) == 1 {
		if _, same := old.keys[sum]; same {
			old.add(sum, at)
			return s, nil
		}
	}
	p.gen = t.generation(p)
	p.gen.add(sum, at)
	if old != nil {
		old.inner.CloseIdleConnections()
	}
	return s, nil
}

// CloseIdleConnections closes connections that carry no request.
func (t *Transport) CloseIdleConnections() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		p.mu.Lock()
		if p.gen != nil {
			p.gen.inner.CloseIdleConnections()
		}
		p.mu.Unlock()
	}
}
