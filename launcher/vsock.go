package launcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/vsock"

	"chrysalis/guest"
)

// Conn is a connection to a port of the VM. A Write goes out in pieces of at
// most guest.MaxChunk bytes.
type Conn interface {
	net.Conn
	// CloseWrite tells the VM that no more bytes come, and keeps reading. It
	// returns errors.ErrUnsupported where the transport cannot do that.
	CloseWrite() error
}

// Dialer reaches the VM's vsock ports.
type Dialer interface {
	// Dial connects to a port. It returns when ctx ends at the latest.
	Dial(ctx context.Context, port uint32) (Conn, error)
	// Close ends what the dialer still does in the background.
	Close() error
}

// KernelDialer dials the VM with this CID through the host kernel's AF_VSOCK.
type KernelDialer struct{ CID uint32 }

// Dial implements Dialer.
func (d KernelDialer) Dial(ctx context.Context, port uint32) (Conn, error) {
	type result struct {
		conn *vsock.Conn
		err  error
	}
	// The library's Dial knows no context, and a connect to an address that
	// nobody serves can last for minutes.
	done := make(chan result, 1)
	go func() {
		conn, err := vsock.Dial(d.CID, port, nil)
		done <- result{conn, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return nil, fmt.Errorf("connect to the VM's port %d: %w", port, r.err)
		}
		return &chunkedConn{Conn: r.conn, closeWrite: r.conn.CloseWrite}, nil
	case <-ctx.Done():
		go func() {
			if r := <-done; r.conn != nil {
				r.conn.Close()
			}
		}()
		return nil, fmt.Errorf("connect to the VM's port %d: %w", port, context.Cause(ctx))
	}
}

// Close implements Dialer.
func (d KernelDialer) Close() error { return nil }

// UserDialer dials through vhost-device-vsock's unix socket: it writes
// "CONNECT port\n" and reads "OK ...\n", after which the connection is the VM's.
type UserDialer struct {
	path string

	mu        sync.Mutex
	closed    bool
	abandoned map[net.Conn]struct{}
}

// NewUserDialer returns a dialer for the unix socket at path.
func NewUserDialer(path string) *UserDialer {
	return &UserDialer{path: path, abandoned: make(map[net.Conn]struct{})}
}

// maxAbandoned bounds the connections that wait for an answer nobody needs.
const maxAbandoned = 64

// Dial implements Dialer.
func (d *UserDialer) Dial(ctx context.Context, port uint32) (Conn, error) {
	fail := func(err error) (Conn, error) {
		return nil, fmt.Errorf("connect to the VM's port %d: %w", port, err)
	}
	d.mu.Lock()
	full := len(d.abandoned) >= maxAbandoned
	closed := d.closed
	d.mu.Unlock()
	if closed {
		return fail(net.ErrClosed)
	}
	if full {
		return fail(errors.New("too many earlier connections were never answered"))
	}
	var nd net.Dialer
	raw, err := nd.DialContext(ctx, "unix", d.path)
	if err != nil {
		return fail(err)
	}
	conn := raw.(*net.UnixConn)
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		conn.Close()
		return fail(err)
	}
	answered := make(chan error, 1)
	go func() { answered <- readOK(conn) }()
	select {
	case err := <-answered:
		if err != nil {
			conn.Close()
			return fail(err)
		}
		return &chunkedConn{Conn: conn, closeWrite: func() error {
			// vhost-device-vsock 0.3.0 takes the end of our stream for the end of
			// both directions, so the VM's answer would be lost.
			return errors.ErrUnsupported
		}}, nil
	case <-ctx.Done():
		// Do not close it yet: vhost-device-vsock 0.3.0 dies when it cannot write
		// its OK. It answers or hangs up once the VM's driver runs.
		d.abandon(conn, answered)
		return fail(context.Cause(ctx))
	}
}

func (d *UserDialer) abandon(conn net.Conn, answered <-chan error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		conn.Close()
		return
	}
	d.abandoned[conn] = struct{}{}
	go func() {
		<-answered
		conn.Close()
		d.mu.Lock()
		delete(d.abandoned, conn)
		d.mu.Unlock()
	}()
}

// Close implements Dialer. It is called when the VM has ended.
func (d *UserDialer) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for conn := range d.abandoned {
		conn.Close()
	}
	return nil
}

// maxOK bounds the line that answers CONNECT, in bytes.
const maxOK = 64

// readOK reads "OK ...\n" byte by byte, because what follows the newline is
// already the VM's.
func readOK(r io.Reader) error {
	var line strings.Builder
	var b [1]byte
	for line.Len() < maxOK {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return errRefused
			}
			return err
		}
		if b[0] == '\n' {
			if s := line.String(); s != "OK" && !strings.HasPrefix(s, "OK ") {
				return fmt.Errorf("the vsock device answered %q", s)
			}
			return nil
		}
		line.WriteByte(b[0])
	}
	return fmt.Errorf("the vsock device answered more than %d bytes", maxOK)
}

var errRefused = errors.New("nothing in the VM listens there")

// chunkedConn splits writes at guest.MaxChunk.
type chunkedConn struct {
	net.Conn
	closeWrite func() error
}

func (c *chunkedConn) CloseWrite() error { return c.closeWrite() }

func (c *chunkedConn) Write(p []byte) (int, error) {
	written := 0
	for {
		piece := p[written:min(len(p), written+guest.MaxChunk)]
		n, err := c.Conn.Write(piece)
		written += n
		if err != nil || written == len(p) {
			return written, err
		}
	}
}

// dialTimeout bounds one connect while the VM runs. It is generous: an emulated
// VM that computes an answer may take seconds to accept.
const dialTimeout = 30 * time.Second
