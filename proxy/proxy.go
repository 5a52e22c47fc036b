// Package proxy is a local OpenAI-compatible endpoint that forwards to verified
// VMs only. An application that knows nothing of attestation points its client at
// it and gets all of the checks of package attest.
//
// A request goes to the cheapest worker that has room for it, and among those that
// cost about the same to the one with the fewest requests in flight. Until the first
// byte of its answer it can go to another one instead; both have been verified. A
// worker is verified over the very connection that carries the request, and again
// in the background before the policy's age is reached, so that no request waits
// for it.
//
// Neither prompts nor answers nor tokens are written anywhere.
package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/receipt"
	"chrysalis/channel/voucher"
	"chrysalis/measure/record"
	"chrysalis/terminal"
)

// MaxBody is the largest request, in bytes: the largest that a VM takes.
const MaxBody = 16 << 20

// Options are what a proxy needs.
type Options struct {
	Workers    []string // endpoints, https://HOST:PORT; none where Choose picks them
	Policy     *attest.Policy
	Records    []*record.File
	Collateral attest.Source
	GPU        *attest.GPUCollateral
	// Token, if there is one, is sent to the workers in place of what the client
	// sends as its API key.
	Token string
	// Timeout bounds connecting to a worker, TLS and its evidence together; 0 is
	// attest.DefaultTimeout.
	Timeout time.Duration
	// Patience bounds each later step of a request: that the worker takes it, begins
	// to answer, and goes on. 0 is what the worker's own manifest allows.
	Patience time.Duration
	// Loopback says that only this machine can connect: then requests that a web
	// page elsewhere makes a browser send are refused.
	Loopback bool
	// Payment says how workers that want it are paid; nil pays nobody.
	Payment *Payment
	// Verified is called after every verification, good or bad.
	Verified func(endpoint string, session *attest.Session, err error)
}

// Proxy is an http.Handler.
type Proxy struct {
	options Options
	mux     *http.ServeMux
	metrics *metrics
	lack    chan struct{} // a request found no worker that takes it

	choosing sync.Mutex // held while workers are chosen

	mu      sync.Mutex
	workers []*worker       // replaced as a whole, never changed in place
	running context.Context // of Run; nil before
	listed  []Listed
	avoid   map[string]time.Time // endpoints and owners that are not tried again until then
	model   string               // that workers are chosen for
}

// New returns a proxy. Nothing is verified until Run or a request.
func New(options Options) (*Proxy, error) {
	if len(options.Workers) == 0 && (options.Payment == nil || options.Payment.Offers == nil) {
		return nil, errors.New("there is no worker to forward to")
	}
	p := &Proxy{options: options, metrics: newMetrics(), lack: make(chan struct{}, 1), avoid: map[string]time.Time{}}
	if options.Payment != nil {
		p.listed = options.Payment.Listed
	}
	for _, endpoint := range options.Workers {
		u, err := url.Parse(endpoint)
		if err != nil || u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("%q is not an endpoint; write it like https://127.0.0.1:8443", endpoint)
		}
		if slices.ContainsFunc(p.workers, func(w *worker) bool { return w.endpoint == endpoint }) {
			return nil, fmt.Errorf("the worker %s is there twice", endpoint)
		}
		var payees []voucher.Channel
		for _, l := range p.listed {
			if l.Endpoint == endpoint && l.Payee != (voucher.Channel{}) {
				payees = append(payees, l.Payee)
			}
		}
		p.workers = append(p.workers, newWorker(p, endpoint, payees))
	}
	p.mux = http.NewServeMux()
	p.mux.HandleFunc("GET /{$}", p.page)
	p.mux.Handle("GET /metrics", p.metrics.handler())
	p.mux.HandleFunc("/v1/", p.forward)
	return p, nil
}

// Run verifies every worker now and before its verification grows too old, until
// ctx ends. It calls ready once each worker has been tried.
func (p *Proxy) Run(ctx context.Context, ready func()) {
	p.mu.Lock()
	p.running = ctx
	workers := p.workers
	tried := make(chan struct{}, len(workers))
	for _, w := range workers {
		p.attend(w, func() { tried <- struct{}{} })
	}
	p.mu.Unlock()
	for range workers {
		select {
		case <-tried:
		case <-ctx.Done():
			return
		}
	}
	ready()
	if p.options.Payment != nil && p.options.Payment.Offers != nil {
		p.follow(ctx)
	}
	<-ctx.Done()
	for _, w := range p.list() {
		w.transport.CloseIdleConnections()
	}
}

// list returns the workers.
func (p *Proxy) list() []*worker {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.workers
}

// Trust replaces the records, and has every worker verified anew; until it is, it
// gets no request.
func (p *Proxy) Trust(records []*record.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.options.Records = records
	for _, w := range p.workers {
		w.transport.Trust(records)
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// Session returns what was last verified of the worker with this endpoint, or nil.
func (p *Proxy) Session(endpoint string) *attest.Session {
	for _, w := range p.list() {
		if w.endpoint == endpoint {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.session
		}
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if p.options.Loopback {
		// A page can make its visitor's browser ask here: under a name of its own that
		// it points at this machine, or as itself.
		if !local(r.Host) {
			refuse(w, http.StatusForbidden, "forbidden", "this proxy answers to localhost only")
			return
		}
		if origin := r.Header.Get("Origin"); origin != "" {
			if u, err := url.Parse(origin); err != nil || !local(u.Host) {
				refuse(w, http.StatusForbidden, "forbidden", "this proxy does not answer to web pages")
				return
			}
		}
	}
	p.mux.ServeHTTP(w, r)
}

// local reports whether HOST or HOST:PORT is this machine.
func local(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// refuse answers as the API does.
func refuse(w http.ResponseWriter, status int, kind, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{"message": message, "type": kind, "param": nil, "code": nil}})
}

// forwarded are the only header fields of a request that reach a worker.
var forwarded = []string{"Accept", "Authorization", "Content-Type", receipt.SaltHeader, receipt.TimeHeader}

// WorkerHeader is the header field of an answer that names the endpoint of the
// worker that gave it.
const WorkerHeader = "Chrysalis-Worker"

// hop are the header fields of an answer that are about the connection.
var hop = []string{"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// forward sends a request to the workers in turn until one begins to answer.
func (p *Proxy) forward(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			refuse(w, http.StatusRequestEntityTooLarge, "invalid_request_error", fmt.Sprintf("the request is more than %d bytes", MaxBody))
		}
		return
	}
	var problems []string
	status := http.StatusServiceUnavailable
	unpaid := false
	ask := readAsked(body)
	workers := p.order(ask.Model)
	for i, worker := range workers {
		answer, charge, patience, done, err := p.tryPaid(worker, r, body, ask)
		if r.Context().Err() != nil {
			if err == nil {
				answer.Body.Close()
				charge.leave()
				done(0)
			}
			return // the client has left
		}
		if err == nil && i+1 < len(workers) && busy(answer.StatusCode) {
			err = fmt.Errorf("it answered %d", answer.StatusCode)
			answer.Body.Close()
			charge.leave()
			done(answer.StatusCode)
		} else if err == nil {
			if busy(answer.StatusCode) {
				p.wanting()
			}
			answer.Header.Set(WorkerHeader, worker.endpoint)
			p.answer(w, r, worker, answer, charge, patience, func() { done(answer.StatusCode) })
			return
		}
		if _, ok := errors.AsType[payError](err); ok {
			unpaid = true
		} else if _, refused := errors.AsType[*attest.RefusedError](err); !refused {
			status = http.StatusBadGateway
		}
		p.metrics.failover(worker.endpoint)
		problems = append(problems, worker.endpoint+": "+terminal.Line(err.Error()))
	}
	p.wanting()
	for _, worker := range p.list() {
		if !slices.Contains(workers, worker) {
			problems = append(problems, worker.endpoint+": "+worker.why())
		}
	}
	if unpaid && status == http.StatusServiceUnavailable {
		refuse(w, http.StatusPaymentRequired, "payment_required", "no worker that can be paid answers. "+strings.Join(problems, "; "))
		return
	}
	refuse(w, status, "no_verified_worker", "no verified worker answers; your request was not sent to any other. "+strings.Join(problems, "; "))
}

// wanting says that no worker took a request.
func (p *Proxy) wanting() {
	select {
	case p.lack <- struct{}{}:
	default:
	}
}

// busy reports whether another worker may do what this one cannot now.
func busy(status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable || status == http.StatusBadGateway
}

// tryPaid is try for a worker that may want to be paid. What it does not cover at once
// is tried once more, with another voucher.
func (p *Proxy) tryPaid(worker *worker, r *http.Request, body []byte, ask asked) (answer *http.Response, c *charge, patience *patience, done func(status int), err error) {
	worker.asked.Add(1)
	defer func() {
		if err != nil {
			worker.asked.Add(-1)
			return
		}
		end := done
		done = func(status int) {
			end(status)
			worker.asked.Add(-1)
		}
	}()
	header, salt := http.Header{}, r.Header.Get(receipt.SaltHeader)
	for try := 1; ; try++ {
		c, err = worker.charge(r.Context(), r, ask, body, salt, try > 1)
		if err != nil {
			return nil, nil, nil, nil, err
		}
		if c != nil {
			c.head(header, salt == "")
		}
		answer, patience, done, err = p.try(worker, r, body, header, ask.Stream)
		if err != nil {
			// It may have got the request all the same.
			c.leave()
			if r.Context().Err() == nil && isPriced(r) {
				worker.refuses()
			}
			return nil, nil, nil, nil, err
		}
		if answer.StatusCode != http.StatusPaymentRequired {
			if isPriced(r) && (answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode >= 500) {
				worker.refuses()
			}
			c.begin(answer)
			if c != nil && salt == "" {
				answer.Header.Set(receipt.SaltHeader, receipt.FormatSalt(c.salt))
			}
			return answer, c, patience, done, nil
		}
		err = worker.refused(r.Context(), c, answer, patience)
		answer.Body.Close()
		done(answer.StatusCode)
		switch {
		case !errors.Is(err, ErrHonour):
			return nil, nil, nil, nil, payError{err}
		case try >= 2 && (c == nil || !c.account.Doubted()) || try >= 5:
			worker.refuses()
			return nil, nil, nil, nil, payError{worker.paying.note(err)}
		case try >= 2:
			// It may still hold what requests that were left could come to.
			select {
			case <-r.Context().Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
}

// try sends a request to a worker, with more header fields. When it returns no error,
// done must be called at the end of the answer.
func (p *Proxy) try(worker *worker, r *http.Request, body []byte, more http.Header, stream bool) (answer *http.Response, patience *patience, done func(status int), err error) {
	target := worker.endpoint + r.URL.EscapedPath()
	if r.URL.RawQuery != "" {
		target += "?" + r.URL.RawQuery
	}
	ctx, patience := worker.wait(r.Context(), stream)
	request, err := http.NewRequestWithContext(ctx, r.Method, target, bytes.NewReader(body))
	if err != nil {
		patience.end()
		return nil, nil, nil, err
	}
	for _, name := range forwarded {
		if v := r.Header.Values(name); len(v) > 0 {
			request.Header[name] = v
		}
	}
	if p.options.Token != "" {
		request.Header.Set("Authorization", "Bearer "+p.options.Token)
	}
	maps.Copy(request.Header, more)
	request.Header.Set("User-Agent", "chrysalis")
	begin := time.Now()
	p.metrics.begin(worker.endpoint)
	worker.inFlight.Add(1)
	done = func(status int) {
		patience.end()
		worker.inFlight.Add(-1)
		p.metrics.end(worker.endpoint, status)
	}
	answer, err = worker.transport.RoundTrip(request)
	if err == nil {
		if err = patience.answers(); err != nil {
			answer.Body.Close()
		}
	}
	if err != nil {
		err = patience.why(err)
		done(0)
		if r.Context().Err() == nil {
			worker.failed(err)
			worker.silent.Add(1)
		}
		return nil, nil, nil, err
	}
	worker.silent.Store(0)
	took := time.Since(begin)
	p.metrics.firstByte(worker.endpoint, took)
	worker.began(took)
	return answer, patience, done, nil
}

// answer passes an answer on as it comes, with its trailer.
func (p *Proxy) answer(w http.ResponseWriter, r *http.Request, worker *worker, answer *http.Response, charge *charge, patience *patience, done func()) {
	defer done()
	defer charge.leave()
	defer answer.Body.Close()
	header := w.Header()
	maps.Copy(header, answer.Header)
	for _, name := range hop {
		header.Del(name)
	}
	for name := range answer.Trailer {
		header.Add("Trailer", name)
	}
	w.WriteHeader(answer.StatusCode)
	flush := http.NewResponseController(w).Flush
	if answer.ContentLength < 0 {
		flush() // a stream's client waits for the header
	}
	buffer := make([]byte, 16<<10)
	for {
		patience.piece()
		heard := charge.listen()
		n, err := answer.Body.Read(buffer)
		heard()
		patience.pause()
		if n > 0 {
			charge.write(buffer[:n])
			if _, err := w.Write(buffer[:n]); err != nil {
				return // the client has left; its request's context ends the worker's
			}
			flush()
		}
		if err == io.EOF && !patience.over() {
			charge.end(answer.Trailer)
			if isPriced(r) && answer.StatusCode == http.StatusOK {
				worker.serves()
			}
			break
		}
		if err != nil {
			if r.Context().Err() == nil && isPriced(r) {
				worker.refuses()
			}
			// The client must not take what it has for the whole.
			panic(http.ErrAbortHandler)
		}
	}
	for name, values := range answer.Trailer {
		header[name] = values
	}
}
