package proxy

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
)

// LocalEndpoint is what requests through a Local's Transport are sent to.
const LocalEndpoint = "http://localhost"

// Local serves a proxy to its own process, over connections that never leave it.
type Local struct {
	pipes  *pipes
	server *http.Server
}

// Local serves p until Close.
func (p *Proxy) Local() *Local {
	l := &Local{
		pipes:  &pipes{conns: make(chan net.Conn), closed: make(chan struct{})},
		server: &http.Server{Handler: p, ErrorLog: log.New(io.Discard, "", 0)},
	}
	go l.server.Serve(l.pipes)
	return l
}

// Close ends what is being answered.
func (l *Local) Close() error { return l.server.Close() }

// Transport returns a transport to the proxy, for the caller to close.
func (l *Local) Transport() *http.Transport {
	return &http.Transport{DialContext: l.pipes.dial, DisableCompression: true}
}

// pipes is a listener whose connections never leave the process.
type pipes struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// Addr implements net.Listener.
func (p *pipes) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "localhost" }
