// Package api is the door between clients and the engine: an OpenAI-compatible
// HTTPS server that runs inside PID 1 of the VM and forwards what it has checked
// to the engine's unix socket.
//
// TLS ends here, so whatever is outside the VM sees ciphertext only. Clients are
// hostile to each other and to the agent; the engine is hostile once it has read
// a prompt. Therefore:
//
//   - Paths, methods and fields are an allow-list (see routes.go). A request is
//     encoded anew from what was understood of it; no header crosses in either
//     direction.
//   - All that a client can make the agent hold is bounded: connections, headers,
//     bodies and the memory for all of them together, time, places in the engine.
//   - Nothing of a prompt, an answer or a key is logged or counted.
//   - What has a price is served as far as it is covered (package pay; till.go is the
//     owner's side, payment.go the clients').
//
// It speaks HTTP/1.1 only. HTTP/2 is left out on purpose: its multiplexing,
// header compression and flow control are a large part of what has gone wrong in
// HTTP servers, and here one request has a connection of its own anyway: hanging
// up is how a client cancels it.
package api

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"chrysalis/agent/http1"
	"chrysalis/agent/port"
	"chrysalis/attest/evidence"
	"chrysalis/manifest"
	"chrysalis/pay"
)

// Limits that are not the manifest's to set.
const (
	maxHeader        = 16 << 10         // bytes
	handshakeLimit   = 10 * time.Second // for a handshake, and for each request's header
	keepAliveLimit   = 60 * time.Second // between requests, where nobody needs the connection: see waiting
	bodyIdle         = 15 * time.Second // for a body without a byte of it, unless the manifest allows less
	bodyTotal        = 2 * time.Minute  // for a whole body, unless the manifest allows less
	spareConnections = 1024             // past those that can be in the engine or wait for it: idle ones and ones to refuse
	refusalLimit     = 2 * time.Second  // for saying what went wrong, the time limit included
	defaultMemory    = 64 << 20         // bytes
)

// Config says what a Server serves and to whom it forwards.
type Config struct {
	Models []manifest.Model
	Limits manifest.Limits
	// Tokens are the hashes of the tokens that are let in (manifest.Manifest). None
	// let everybody in.
	Tokens []string
	// Certificate holds the TLS key made at boot.
	Certificate tls.Certificate
	// Payment is what clients can be charged at most. Nil serves for free.
	Payment *manifest.Payment
	// ReceiptKey signs receipts (package attest/receipt).
	ReceiptKey ed25519.PrivateKey
	// Manifest is the SHA-384 of the VM's manifest.
	Manifest [48]byte
	// Engine dials the socket of the engine that serves a model, an index of Models.
	Engine func(ctx context.Context, model int) (net.Conn, error)
	// Evidence returns an attest/evidence document that lists the nonce. It may take
	// as long as a quote does.
	Evidence func(ctx context.Context, nonce [evidence.NonceSize]byte) ([]byte, error)
	// GPUCollateral is what the VM's GPUs are judged by (package attest/nvidia),
	// for clients that have none of their own. Nil without GPUs.
	GPUCollateral []byte
	// Ready reports whether the engine answers.
	Ready func() bool
	// FirstClient is called once, before a byte of the first client is read. May
	// be nil.
	FirstClient func()
	// Counters are counted into. May be nil.
	Counters *Counters
	// BodyMemory bounds what all bodies that are being received or forwarded and all
	// answers that are being held may take together, in bytes, but for the first
	// 16 KiB of each. 0 is 64 MiB; less than one body is one body.
	BodyMemory int64
}

// Server is the inference port's server.
type Server struct {
	engine    func(ctx context.Context, model int) (net.Conn, error)
	evidence  func(context.Context, [evidence.NonceSize]byte) ([]byte, error)
	gpus      []byte // collateral
	ready     func() bool
	first     func()
	counters  *Counters
	limits    manifest.Limits
	idle      time.Duration
	total     time.Duration
	bodyIdle  time.Duration
	bodyTotal time.Duration
	places    *places                   // in the engine
	names     map[string]string         // what a client may call a model, and what the engine is told
	engines   map[string]int            // a model's index, by what its engine is told
	models    []byte                    // the answer to /v1/models
	served    map[string]manifest.Model // by what the engine is told
	tokens    [][sha256.Size]byte
	till      *till // nil in a VM that serves for free

	receiptKey ed25519.PrivateKey
	manifest   string       // SHA-384, hexadecimal
	sequence   atomic.Int64 // of the last receipt
	tick       time.Duration
	queueLimit time.Duration
	memory     atomic.Int64 // bytes left for bodies and held answers
	releasing  atomic.Bool  // soon, to the system
	waiting    waiting
	draining   atomic.Bool
	http       *http1.Server
}

// New returns a server. The configuration comes from a manifest that has been
// validated.
func New(c Config) *Server {
	s := &Server{
		engine:   c.Engine,
		evidence: c.Evidence,
		gpus:     c.GPUCollateral,
		ready:    c.Ready,
		first:    c.FirstClient,
		counters: c.Counters,
		limits:   c.Limits,
		idle:     time.Duration(c.Limits.IdleSeconds) * time.Second,
		total:    time.Duration(c.Limits.TotalSeconds) * time.Second,
		waiting:  waiting{since: map[net.Conn]wait{}},
		places:   newPlaces(c.Limits.Concurrency),
		names:    map[string]string{},
		engines:  map[string]int{},
		served:   map[string]manifest.Model{},
		models:   modelList(c.Models),
		tokens:   tokenHashes(c.Tokens),

		receiptKey: c.ReceiptKey,
		manifest:   hex.EncodeToString(c.Manifest[:]),
		tick:       tick,
		queueLimit: queueLimit,
	}
	if s.counters == nil {
		s.counters = new(Counters)
	}
	if len(c.Tokens) > 1 {
		s.places.reserve()
	}
	for i, m := range c.Models {
		// A client that wants one model and no other says its root hash, too.
		for _, name := range []string{m.Name, m.ID(), m.ID() + ":" + m.Disk.RootHash} {
			s.names[name] = m.Name
		}
		s.engines[m.Name], s.served[m.Name] = i, m
	}
	if c.Payment != nil {
		s.till = newTill(c.Models, c.Payment, c.Certificate.Certificate[0])
	}
	memory := c.BodyMemory
	if memory == 0 {
		memory = defaultMemory
	}
	s.memory.Store(max(memory, c.Limits.BodyBytes+1))
	s.bodyIdle, s.bodyTotal = min(bodyIdle, s.idle), min(bodyTotal, s.total)
	s.http = &http1.Server{
		Handler: s,
		TLS: &tls.Config{
			Certificates: []tls.Certificate{c.Certificate},
			MinVersion:   tls.VersionTLS13,
			// A ticket would let a later connection go on without the key that a
			// client has verified.
			SessionTicketsDisabled: true,
			NextProtos:             []string{"http/1.1"},
		},
		HeaderLimit: handshakeLimit,
		IdleLimit:   keepAliveLimit,
		MaxHeader:   maxHeader,
		State:       s.waiting.state,
	}
	return s
}

// Serve serves a raw vsock listener, with TLS on top, until Shutdown. It always
// returns an error; after Shutdown it is http.ErrServerClosed.
func (s *Server) Serve(ln net.Listener) error {
	var once sync.Once
	bound := port.Bound(ln, s.connections(), func() {
		s.counters.Connections.Add(1)
		if s.first != nil {
			once.Do(s.first)
		}
	}, s.waiting.closeOne)
	return s.http.Serve(bound)
}

// baseHeap is what the rest of the agent needs, and connectionHeap what a connection
// does, in bytes.
const (
	baseHeap       = 16 << 20
	connectionHeap = 18 << 10
)

// HeapLimit is the soft limit on the Go heap that a process with this server needs.
// Past it the collector works harder rather than taking memory from the engine.
// Bodies that are in flight may exceed it for a time.
func (s *Server) HeapLimit() int64 {
	limit := baseHeap + int64(s.connections())*connectionHeap
	if s.till != nil {
		limit += tillHeap
	}
	return limit
}

// connections is how many there may be.
func (s *Server) connections() int { return s.places.size + s.places.queue + spareConnections }

// Drain admits no new requests from now on. Those that are in the engine go on;
// Active says how many there are.
func (s *Server) Drain() {
	s.draining.Store(true)
	s.places.close()
	s.http.Drain()
}

// Active is the number of requests that hold a place in the engine.
func (s *Server) Active() int64 { return int64(s.places.active()) }

// Shutdown drains, and waits until the last answer has been written or ctx is
// done. Active falls to 0 a moment before the last bytes are out.
func (s *Server) Shutdown(ctx context.Context) error {
	s.Drain()
	return s.http.Shutdown(ctx)
}

// modelList is the answer to GET /v1/models, with two fields more than OpenAI's.
func modelList(models []manifest.Model) []byte {
	type entry struct {
		ID       string `json:"id"`
		Object   string `json:"object"`
		Created  int64  `json:"created"` // clients insist on it; the VM's clock is the host's
		OwnedBy  string `json:"owned_by"`
		Revision string `json:"revision"`
		RootHash string `json:"root_hash"`
	}
	list := struct {
		Object string  `json:"object"`
		Data   []entry `json:"data"`
	}{Object: "list", Data: []entry{}}
	for _, m := range models {
		org, _, _ := strings.Cut(m.Name, "/")
		list.Data = append(list.Data, entry{m.ID(), "model", 0, org, m.Revision, m.Disk.RootHash})
	}
	body, err := json.Marshal(list)
	if err != nil {
		panic(err) // a struct of strings always encodes
	}
	return body
}

// exchange is one request and its answer.
type exchange struct {
	s         *Server
	w         http.ResponseWriter
	r         *http.Request
	rc        *http.ResponseController
	end       time.Time // of the time limit for the whole request
	reserved  int64     // bytes taken from the memory for bodies
	started   bool      // the answer's header is out
	streaming bool      // and it is a stream of events
	padding   padding
	receipt   *pending
	route     *route
	bill      *pay.Request // nil where nothing is charged
	session   pay.Session  // who pays
	unknown   error        // why nobody does
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &exchange{s: s, w: w, r: r, rc: http.NewResponseController(w), end: time.Now().Add(s.total)}
	defer func() { s.release(x.reserved) }()
	defer func() {
		if p := recover(); p != nil {
			if p == http.ErrAbortHandler {
				panic(p) // the connection is closed, and nothing said
			}
			x.fail(errInternal)
		}
	}()
	if err := s.handle(x); err != nil {
		x.fail(err)
	}
}

// handle is the way of every request, in order of what it costs to refuse it.
func (s *Server) handle(x *exchange) error {
	rt, query, err := find(x.w, x.r)
	if err != nil {
		return err
	}
	if rt.gpus && s.gpus == nil || rt.payment && s.till == nil {
		return errPath
	}
	x.route = rt
	client, admitted := s.admits(x.r)
	if !rt.open && !admitted {
		x.w.Header().Set("WWW-Authenticate", "Bearer")
		return errToken
	}
	if rt.fields == nil {
		if x.r.ContentLength != 0 {
			return errNoBody
		}
		if rt.payment { // while draining, too: for the streams that go on
			return x.payment()
		}
		if s.draining.Load() {
			return errDraining
		}
		switch {
		case rt.query:
			return x.evidence(query)
		case rt.gpus:
			// All clients share its bytes.
			x.end = time.Now().Add(evidenceTotal)
			return x.answer(http.StatusOK, s.gpus)
		}
		return x.answer(http.StatusOK, s.models)
	}
	if err := s.checkHead(x.r); err != nil {
		return err
	}
	if x.receipt, err = openReceipt(x.r.Header); err != nil {
		return err
	}
	if err := s.available(); err != nil {
		return err
	}
	if err := x.payer(); err != nil {
		return err
	}
	conn := http1.Conn(x.r)
	switch {
	case client != nil:
	case s.till != nil && x.unknown == nil:
		client = x.session
	default:
		client = conn
	}
	// Who would be refused is told before it has sent its body.
	if s.places.full(client) {
		return errBusy
	}
	// Nobody holds a place while its body is on the way: a few clients that send a
	// byte now and then would keep all others out.
	body, readErr := x.readBody()
	if readErr != nil {
		return readErr
	}
	req, err := parse(rt, s.names, body)
	if err != nil {
		return err
	}
	x.receipt.about(body, req, s.served[req.model])
	if err := x.charge(req, len(body)); err != nil {
		return err
	}
	if x.bill != nil {
		// What has not ended well by then is not charged.
		defer x.bill.End(nil, true)
	}
	settled := func() { s.waiting.done(conn) }
	if err := s.places.take(x.r.Context(), client, min(s.queueLimit, time.Until(x.end)), settled); err != nil {
		return err
	}
	settled()
	s.counters.Active.Add(1)
	defer func() {
		s.counters.Active.Add(-1)
		s.places.give(client)
	}()
	// Again, now that the place shows in Active: once Active is 0 after Drain,
	// nobody comes in any more.
	if err := s.available(); err != nil {
		return err
	}
	s.counters.Requests.Add(1)
	if x.bill != nil {
		s.counters.Paid.Add(1)
	}
	return x.ended(x.forward(req))
}

// find looks a request up in the table, and returns its query as well. The path
// is compared as it was sent: nothing is unescaped, cleaned or redirected.
func find(w http.ResponseWriter, r *http.Request) (*route, string, *apiError) {
	path, query, asked := strings.Cut(r.RequestURI, "?")
	var allow []string
	for i := range routes {
		rt := &routes[i]
		switch {
		case rt.path != path:
		case rt.method != r.Method:
			allow = append(allow, rt.method)
		case asked && !rt.query:
			return nil, "", errQuery
		default:
			return rt, query, nil
		}
	}
	if allow != nil {
		w.Header().Set("Allow", strings.Join(allow, ", "))
		return nil, "", errMethod
	}
	return nil, "", errPath
}

func (s *Server) available() *apiError {
	switch {
	case s.draining.Load():
		return errDraining
	case !s.ready():
		return errNotReady
	}
	return nil
}

// freeBuffer is how much of a body or of a held answer is not counted, in bytes.
// It is bounded by the number of connections, as their own buffers are, and it lets
// short requests through whatever others do with the memory set aside.
const freeBuffer = 16 << 10

// grow returns buf with more capacity, but at most most bytes of it, out of the
// memory set aside. It reports whether there is more.
func (x *exchange) grow(buf []byte, most int64) ([]byte, bool) {
	have := int64(cap(buf))
	size := min(most, max(freeBuffer, 2*have))
	if size <= have || !x.reserve(max(0, size-freeBuffer)-max(0, have-freeBuffer)) {
		return buf, false
	}
	grown := make([]byte, len(buf), size)
	copy(grown, buf)
	return grown, true
}

// reserve takes bytes from the memory set aside, if there are as many, until the
// exchange ends.
func (x *exchange) reserve(bytes int64) bool {
	for {
		left := x.s.memory.Load()
		if left < bytes {
			return false
		}
		if x.s.memory.CompareAndSwap(left, left-bytes) {
			x.reserved += bytes
			return true
		}
	}
}

// Memory that an exchange had goes back to the system a moment after it, if it was
// much: an agent that has nothing to do would collect it only minutes later, and the
// engine has use for it.
const (
	muchMemory   = 1 << 20 // bytes
	releaseDelay = time.Second
)

// release gives back what an exchange has reserved.
func (s *Server) release(bytes int64) {
	s.memory.Add(bytes)
	if bytes >= muchMemory && s.releasing.CompareAndSwap(false, true) {
		time.AfterFunc(releaseDelay, func() {
			s.releasing.Store(false)
			debug.FreeOSMemory()
		})
	}
}

// answer writes a whole answer.
func (x *exchange) answer(status int, body []byte) error {
	x.w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	x.start(status, "application/json")
	return x.write(body)
}

func (x *exchange) start(status int, contentType string) {
	x.started = true
	x.w.Header().Set("Content-Type", contentType)
	x.w.Header().Set("Cache-Control", "no-store")
	x.w.WriteHeader(status)
}

// write writes to the client and lets it go out at once. A client that takes
// nothing for as long as the idle limit has gone.
func (x *exchange) write(p []byte) error {
	x.rc.SetWriteDeadline(x.deadline())
	if _, err := x.w.Write(p); err != nil {
		return errGone
	}
	if err := x.rc.Flush(); err != nil {
		return errGone
	}
	return nil
}

// deadline is the end of a write that begins now.
func (x *exchange) deadline() time.Time { return earlier(time.Now().Add(x.s.idle), x.end) }

// fail ends an exchange with an error: as an HTTP status where the answer has not
// begun, as an event where it is a stream, and by closing the connection.
func (x *exchange) fail(err error) {
	e, ok := err.(*apiError)
	if !ok { // errGone
		x.s.counters.Cancelled.Add(1)
		panic(http.ErrAbortHandler)
	}
	x.s.counters.count(e)
	// The time limit may be what it has to tell.
	if soon := time.Now().Add(refusalLimit); x.end.Before(soon) {
		x.end = soon
	}
	if x.started {
		if x.streaming {
			x.write(x.padding.event(nil, e.body()))
		}
		panic(http.ErrAbortHandler)
	}
	if e == errDraining {
		x.w.Header().Set("Connection", "close")
	}
	if e.retry != "" {
		x.w.Header().Set("Retry-After", e.retry)
	}
	// Padded: what an engine says about a request is about its prompt. A client that
	// has gone in the meantime misses nothing.
	body := e.terms
	if body == nil {
		body = e.body()
		body = append(body, spaces(int64(len(body)))...)
	}
	x.answer(e.status, body)
}
