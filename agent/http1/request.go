package http1

import (
	"bufio"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	readBuffer  = 4 << 10                // bytes
	writeBuffer = 4 << 10                // bytes
	lingerLimit = 2 * time.Second        // for reading on after a refusal, so that it is not lost in a reset
	lingerBytes = 256 << 10              // the same
	leaveLimit  = 500 * time.Millisecond // for a client that sends more to see the answer
	refuseLimit = 500 * time.Millisecond // for writing one of the server's own
)

var (
	readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readBuffer) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, writeBuffer) }}
)

// requests serves the requests that are there: one, but for a client that does not
// wait for answers. It reports whether there may be more later.
func (c *conn) requests() bool {
	in := readers.Get().(*bufio.Reader)
	header := &io.LimitedReader{R: c}
	in.Reset(header)
	defer func() {
		in.Reset(nil)
		readers.Put(in)
	}()
	for {
		header.N = int64(c.s.MaxHeader)
		// For what TLS writes while it reads, as well: a client can ask for new keys
		// and take none.
		c.net.SetDeadline(time.Now().Add(c.s.HeaderLimit))
		r, err := http.ReadRequest(in)
		if err != nil {
			if status := refusal(err, header.N <= 0); status != 0 {
				c.refuse(status)
			}
			return false
		}
		if status := check(r); status != 0 {
			c.refuse(status)
			return false
		}
		header.N = math.MaxInt64 // the handler bounds the body
		c.net.SetDeadline(time.Time{})
		if !c.s.set(c, http.StateActive) || !c.exchange(r) {
			return false
		}
		// The deadline is in the past: this is about what has been read already, and
		// only package tls knows whether that is more.
		if _, err := in.Peek(1); err != nil {
			var t interface{ Timeout() bool }
			return errors.As(err, &t) && t.Timeout()
		}
	}
}

// refusal returns what a client is told whose request cannot be read, or 0 where
// there is nobody to tell.
func refusal(err error, long bool) int {
	var broken *net.OpError
	switch {
	case long:
		return http.StatusRequestHeaderFieldsTooLarge
	case err == io.EOF, err == io.ErrUnexpectedEOF, errors.As(err, &broken), errors.Is(err, os.ErrDeadlineExceeded):
		return 0
	case strings.HasPrefix(err.Error(), "unsupported transfer encoding"), strings.HasPrefix(err.Error(), "too many transfer encodings"):
		return http.StatusNotImplemented
	}
	return http.StatusBadRequest
}

// check refuses, with a status, what http.ReadRequest lets through and net/http's
// server does not, HTTP/1.0, and what is said to proxies: http.ReadRequest drops the
// host of that.
func check(r *http.Request) int {
	if r.ProtoMajor != 1 || r.ProtoMinor != 1 {
		return http.StatusHTTPVersionNotSupported
	}
	if !strings.HasPrefix(r.RequestURI, "/") && r.RequestURI != "*" {
		return http.StatusBadRequest
	}
	if r.Host == "" || strings.Trim(r.Host, hostBytes) != "" {
		return http.StatusBadRequest
	}
	for name, values := range r.Header {
		if name == "" || strings.Trim(name, tokenBytes) != "" {
			return http.StatusBadRequest
		}
		for _, v := range values {
			if !valid(v) {
				return http.StatusBadRequest
			}
		}
	}
	if expect := r.Header["Expect"]; len(expect) > 0 && (len(expect) > 1 || !strings.EqualFold(expect[0], "100-continue")) {
		return http.StatusExpectationFailed
	}
	return 0
}

// hostBytes are those of a host and its port (RFC 3986, section 3.2).
const hostBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:%[]"

// tokenBytes are those of a header's name (RFC 9110, section 5.6.2).
const tokenBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~"

// valid reports whether a header's value has no control characters (RFC 9110,
// section 5.5).
func valid(value string) bool {
	for i := range len(value) {
		if b := value[i]; b < ' ' && b != '\t' || b == 0x7f {
			return false
		}
	}
	return true
}

// exchange has a request answered. It reports whether the connection can have another
// one.
func (c *conn) exchange(r *http.Request) bool {
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), connKey{}, c.net))
	defer cancel()
	out := writers.Get().(*bufio.Writer)
	out.Reset(c.tls)
	defer func() {
		out.Reset(nil)
		writers.Put(out)
	}()
	w := &response{c: c, out: out, header: http.Header{}, head: r.Method == http.MethodHead, left: -1, closes: r.Close}
	b := &body{r: r.Body, w: w, expected: r.Header["Expect"] != nil && r.ContentLength != 0, gone: cancel}
	defer b.stop()
	w.body = b
	if r.ContentLength == 0 {
		b.end()
	}
	r.Body = b
	c.s.Handler.ServeHTTP(w, r.WithContext(ctx))
	b.stop()
	if err := w.finish(); err != nil {
		return false
	}
	if !b.ended {
		c.linger(b.r, c)
	}
	return b.ended && !w.closes
}

// body is a request's body.
type body struct {
	r        io.Reader
	w        *response
	expected bool // the client waits to be told to send it
	ended    bool
	gone     context.CancelFunc
	unwatch  func()
}

func (b *body) Read(p []byte) (int, error) {
	if b.ended {
		return 0, io.EOF
	}
	if b.expected {
		b.expected = false
		if err := b.w.cont(); err != nil {
			return 0, err
		}
	}
	n, err := b.r.Read(p)
	if err == io.EOF {
		b.end()
	}
	return n, err
}

// Close does nothing: what nobody has read ends the connection.
func (b *body) Close() error { return nil }

// end notes that all of it was read. From now on its client's end is watched for.
func (b *body) end() {
	b.ended = true
	b.unwatch = b.w.c.watch(b.gone)
}

// stop ends that.
func (b *body) stop() {
	if b.unwatch != nil {
		b.unwatch()
		b.unwatch = nil
	}
}

// linger reads on for a while, and then waits for the client to leave: bytes that
// nobody reads would turn the connection's end into a reset, which takes the answer
// with it. Where a body is broken it reads from what is below it.
func (c *conn) linger(from ...io.Reader) {
	c.net.SetDeadline(time.Now().Add(lingerLimit))
	for _, r := range from {
		if _, err := io.CopyN(io.Discard, r, lingerBytes); err == io.EOF {
			return
		}
	}
	c.net.SetReadDeadline(time.Now().Add(leaveLimit))
	c.raw.Read(left)
}

// refuse answers what is no request, and reads on for a while.
func (c *conn) refuse(status int) {
	c.net.SetWriteDeadline(time.Now().Add(refuseLimit))
	if _, err := c.tls.Write(own(status)); err == nil {
		c.linger(c)
	}
}
