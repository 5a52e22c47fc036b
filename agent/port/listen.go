// Package port serves what a VM's vsock ports have in common, and the two that
// its host talks to: the read-only status port and the control port.
//
// Both face the untrusted host. They give out enumerated values and coarse
// counters, what the owner is paid, and the engine's own output until the first
// client connects; they take in the few operations of package guest. Nothing that a peer does or leaves undone here can hold up
// the agent: every buffer is bounded, every write has a deadline, and no lock is
// held while a byte moves.
package port

import (
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"

	"chrysalis/guest"
)

// Bound wraps a raw vsock listener. Its connections write at most
// guest.MaxChunk bytes at a time, so it belongs below TLS: above it, records of
// up to 16,406 bytes would be put together again. At most max connections are
// open at a time; more are closed at once, because one that waits in the backlog
// looks to its client like a VM that hangs. accepted, if not nil, is called for
// each connection that is let in, before a byte of it is read. makeRoom, if not
// nil, is called when one is too many: it may close another, and Bound then lets
// the new one in.
func Bound(ln net.Listener, max int, accepted, makeRoom func()) net.Listener {
	return &boundListener{Listener: ln, slots: make(chan struct{}, max), accepted: accepted, makeRoom: makeRoom}
}

type boundListener struct {
	net.Listener
	slots    chan struct{}
	accepted func()
	makeRoom func()
}

func (l *boundListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		taken := l.take()
		if !taken && l.makeRoom != nil {
			l.makeRoom()
			taken = l.take()
		}
		if !taken {
			conn.Close()
			continue
		}
		if l.accepted != nil {
			l.accepted()
		}
		return &boundConn{Conn: conn, release: func() { <-l.slots }}, nil
	}
}

func (l *boundListener) take() bool {
	select {
	case l.slots <- struct{}{}:
		return true
	default:
		return false
	}
}

// boundConn has no ReadFrom, although the connection below may: that one would
// write pieces of its own size.
type boundConn struct {
	net.Conn
	once    sync.Once
	release func()
	broken  atomic.Bool
}

// Write fails for good once it has failed: bytes are missing from the stream.
// Without this crypto/tls tries for 5 s to say goodbye to a peer that reads
// nothing, and its request keeps its place in the engine meanwhile.
func (c *boundConn) Write(p []byte) (int, error) {
	if c.broken.Load() {
		return 0, net.ErrClosed
	}
	written := 0
	for {
		n, err := c.Conn.Write(p[written:min(len(p), written+guest.MaxChunk)])
		written += n
		if err != nil {
			c.broken.Store(true)
		}
		if err != nil || written == len(p) {
			return written, err
		}
	}
}

// SyscallConn implements syscall.Conn, for who wants to know whether there is
// something to read.
func (c *boundConn) SyscallConn() (syscall.RawConn, error) {
	if below, ok := c.Conn.(syscall.Conn); ok {
		return below.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

func (c *boundConn) Close() error {
	c.once.Do(c.release)
	return c.Conn.Close()
}

// HTTP1 is HTTP/1.1 and nothing else.
func HTTP1() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	return p
}

// Bugs counts the bugs in the agent that cost a peer its connection or its
// request. The rest of the VM went on, so this is the only trace of them; it is on
// /metrics.
var Bugs atomic.Int64

// contain, deferred, keeps a panic to the goroutine of one connection. Without it
// a bug that one peer can reach ends PID 1, and with it every other peer's VM.
func contain() {
	if recover() != nil {
		Bugs.Add(1)
	}
}
