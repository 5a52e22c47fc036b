package api

import (
	"net"
	"net/http"
	"sync"
	"time"
)

// waiting holds the connections that have no place in the engine: those in their
// handshake, between requests, or sending a request. When all connections are in
// use, a new one is let in at the cost of one of them, so that clients that do
// nothing, or as little as the time limits allow, shut nobody out. Who has a place
// keeps its connection.
type waiting struct {
	mu    sync.Mutex
	since map[net.Conn]wait
}

type wait struct {
	at     time.Time
	active bool // a request's header is here
}

// state is the server's ConnState. It is called by Serve before it accepts the
// next connection, and from then on by the connection's own goroutine.
func (w *waiting) state(conn net.Conn, state http.ConnState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if state == http.StateClosed {
		delete(w.since, conn)
		return
	}
	w.since[conn] = wait{time.Now(), state == http.StateActive}
}

// done says that a connection waits no more.
func (w *waiting) done(conn net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.since, conn)
}

// closeOne closes the connection that has waited longest, of those without a
// request if there are any: a client that uploads much is not at fault.
func (w *waiting) closeOne() {
	w.mu.Lock()
	var conn net.Conn
	var most wait
	for c, v := range w.since { // at most some thousand
		if conn == nil || v.active == most.active && v.at.Before(most.at) || most.active && !v.active {
			conn, most = c, v
		}
	}
	delete(w.since, conn)
	w.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}
