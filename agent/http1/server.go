// Package http1 is a server of HTTP/1.1 (RFC 9110 and 9112) over TLS, for clients of
// whom there are a thousand and most say nothing.
//
// A connection of net/http's server waits for its next request deep within TLS, with
// 8 KiB of buffers and as much of stack. Here it waits for its socket to become
// readable, and has nothing but its TLS state meanwhile. Requests are parsed by
// net/http. What its server refuses is refused, and HTTP/1.0 and requests to proxies
// as well.
package http1

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"chrysalis/agent/port"
)

// Server serves one listener.
type Server struct {
	Handler http.Handler
	TLS     *tls.Config
	// HeaderLimit bounds a handshake, and the header of each request.
	HeaderLimit time.Duration
	// IdleLimit bounds the time between two requests.
	IdleLimit time.Duration
	// MaxHeader bounds a request's header, in bytes, with what is read together
	// with its end.
	MaxHeader int
	// State is called as net/http's ConnState is, with the connection that was
	// accepted: StateNew before the next one is, then StateActive and StateIdle with
	// the beginning and the end of each request, and StateClosed. May be nil.
	State func(net.Conn, http.ConnState)

	mu       sync.Mutex
	ln       net.Listener
	conns    map[*conn]http.ConnState
	none     chan struct{} // closed when no connection is left, after closed
	draining bool
	closed   bool
}

// connKey is where a request's context holds its connection.
type connKey struct{}

// Conn returns the connection that a request came over, as it was accepted, or nil.
func Conn(r *http.Request) net.Conn {
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	return conn
}

// Serve serves ln until it fails. Its connections must implement syscall.Conn. It
// returns http.ErrServerClosed after Shutdown and Close.
func (s *Server) Serve(ln net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		ln.Close()
		return http.ErrServerClosed
	}
	s.ln, s.conns = ln, map[*conn]http.ConnState{}
	s.mu.Unlock()
	for wait := time.Duration(0); ; {
		accepted, err := ln.Accept()
		switch {
		case err == nil:
			wait = 0
		case s.isClosed():
			return http.ErrServerClosed
		case passes(err):
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			time.Sleep(wait)
			continue
		default:
			return err
		}
		c := &conn{s: s, net: accepted}
		if !s.set(c, http.StateNew) {
			accepted.Close()
			continue
		}
		go c.serve()
	}
}

// passes reports whether a failure to accept is one that later calls may not have.
func passes(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.ECONNRESET, syscall.EPROTO, syscall.EAGAIN, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *Server) isDraining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}

// set notes what a connection does, unless it is to end.
func (s *Server) set(c *conn, state http.ConnState) bool {
	s.mu.Lock()
	ok := !s.closed && (state != http.StateIdle || !s.draining)
	if ok {
		s.conns[c] = state
	}
	s.mu.Unlock()
	if ok && s.State != nil {
		s.State(c.net, state)
	}
	return ok
}

// gone forgets a connection.
func (s *Server) gone(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	if s.closed && len(s.conns) == 0 && s.none != nil {
		close(s.none)
		s.none = nil
	}
	s.mu.Unlock()
	if s.State != nil {
		s.State(c.net, http.StateClosed)
	}
}

// Drain ends connections with the requests that they are at, and those at once that
// wait for their next one. New ones are let in as before, for one request.
func (s *Server) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
	s.end(func(state http.ConnState) bool { return state == http.StateIdle })
}

// Shutdown drains, lets nobody in any more, and waits for the requests that are
// there, or until ctx is done.
func (s *Server) Shutdown(ctx context.Context) error {
	none := s.stop(func(state http.ConnState) bool { return state != http.StateActive })
	select {
	case <-none:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends all there is.
func (s *Server) Close() { s.stop(func(http.ConnState) bool { return true }) }

// stop lets nobody in and ends the connections whose state is as asked. It returns a
// channel that is closed when none is left.
func (s *Server) stop(which func(http.ConnState) bool) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining, s.closed = true, true
	if s.ln != nil {
		s.ln.Close()
	}
	none := s.none
	if none == nil {
		none = make(chan struct{})
		if len(s.conns) == 0 {
			close(none)
			return none
		}
		s.none = none
	}
	s.end(which)
	return none
}

// end closes connections; their own goroutines do the rest. TLS would take up to 5 s
// to say goodbye.
func (s *Server) end(which func(http.ConnState) bool) {
	for c, state := range s.conns {
		if which(state) {
			c.net.Close()
		}
	}
}

// conn is a connection.
type conn struct {
	s   *Server
	net net.Conn // as accepted
	raw syscall.RawConn
	tls *tls.Conn

	ahead [1]byte // of the next request, where kept
	kept  bool
}

// serve is a connection's goroutine. What it calls may take much of its stack, and
// gives it back: it itself takes little, since this is where a connection waits.
func (c *conn) serve() {
	defer c.end()
	if !c.open() {
		return
	}
	for limit := c.s.HeaderLimit; c.wait(limit); limit = c.s.IdleLimit {
		if !c.requests() || !c.s.set(c, http.StateIdle) {
			return
		}
	}
}

// end closes the connection, whatever ended it.
func (c *conn) end() {
	if p := recover(); p != nil && p != http.ErrAbortHandler {
		port.Bugs.Add(1) // and says nothing of it: it may speak of a prompt
	}
	if c.tls != nil {
		c.tls.Close()
	}
	c.net.Close()
	c.s.gone(c)
}

const plainAnswer = "HTTP/1.0 400 Bad Request\r\nContent-Length: 48\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"

// open does the handshake.
func (c *conn) open() bool {
	below, ok := c.net.(syscall.Conn)
	if !ok {
		return false
	}
	var err error
	if c.raw, err = below.SyscallConn(); err != nil {
		return false
	}
	c.net.SetDeadline(time.Now().Add(c.s.HeaderLimit))
	t := tls.Server(&records{Conn: c.net}, c.s.TLS)
	if err := t.Handshake(); err != nil {
		var header tls.RecordHeaderError
		if errors.As(err, &header) && looksLikeHTTP(header.RecordHeader) {
			io.WriteString(c.net, plainAnswer)
			c.linger(c.net)
		}
		return false
	}
	c.tls = t
	return c.net.SetDeadline(time.Time{}) == nil
}

func looksLikeHTTP(header [5]byte) bool {
	switch string(header[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO":
		return true
	}
	return false
}
