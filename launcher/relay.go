package launcher

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Relay carries TCP connections to one vsock port of the VM. It sees ciphertext
// and neither looks at it nor logs it. A connection that does not read holds
// back its peer: at most relayBuffer bytes of each direction are in the relay.
type Relay struct {
	dial  func(ctx context.Context) (Conn, error)
	slots chan struct{} // one for each connection; more wait in the listen queue
	quiet time.Duration // see carry

	active   atomic.Int64
	total    atomic.Int64
	failed   atomic.Int64
	mu       sync.Mutex
	conns    map[*net.Conn]struct{} // by the address of a variable, because a net.Conn need not be hashable
	wg       sync.WaitGroup
	stopping chan struct{}
}

// RelayCounters are what a Relay has done since it started.
type RelayCounters struct {
	Active int64 `json:"active"` // connections open now
	Total  int64 `json:"total"`  // accepted
	Failed int64 `json:"failed"` // the VM could not be reached
}

// NewRelay returns a relay that reaches the VM through dial and carries at most
// limit connections at a time.
func NewRelay(limit int, dial func(ctx context.Context) (Conn, error)) *Relay {
	return &Relay{
		dial:     dial,
		slots:    make(chan struct{}, limit),
		quiet:    5 * time.Second,
		conns:    make(map[*net.Conn]struct{}),
		stopping: make(chan struct{}),
	}
}

// Counters returns the counters.
func (r *Relay) Counters() RelayCounters {
	return RelayCounters{Active: r.active.Load(), Total: r.total.Load(), Failed: r.failed.Load()}
}

// Serve accepts connections from l until ctx ends or accepting fails for good.
// It does not close l, which can be served again, here or by another process.
func (r *Relay) Serve(ctx context.Context, l *net.TCPListener) error {
	l.SetDeadline(time.Time{})
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { l.SetDeadline(time.Unix(1, 0)); close(woken) })
	defer func() {
		// A deadline that is set later would end whoever serves l next.
		if !stop() {
			<-woken
		}
	}()
	for {
		select {
		case r.slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		case <-r.stopping:
			return net.ErrClosed
		}
		client, err := l.Accept()
		if err != nil {
			<-r.slots
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, net.ErrClosed):
				return err
			}
			// Out of descriptors, or a client that left before it was accepted.
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		r.total.Add(1)
		r.active.Add(1)
		r.wg.Add(1)
		go func() {
			defer func() { r.active.Add(-1); <-r.slots; r.wg.Done() }()
			r.one(client)
		}()
	}
}

func (r *Relay) one(client net.Conn) {
	defer client.Close()
	if !r.track(&client) {
		return
	}
	defer r.untrack(&client)
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	dialled := make(chan struct{})
	go func() {
		select {
		case <-r.stopping:
			cancel()
		case <-dialled:
		}
	}()
	vm, err := r.dial(ctx)
	close(dialled)
	cancel()
	if err != nil {
		r.failed.Add(1)
		// A reset, not an orderly end: the client must not take this for an answer.
		if tcp, ok := client.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		return
	}
	defer vm.Close()
	other := net.Conn(vm)
	if !r.track(&other) {
		return
	}
	defer r.untrack(&other)
	r.carry(client, vm)
}

// carry copies both directions. When the client has sent all, the VM is told
// where the transport can say so; where it cannot, the connection stays as long
// as the VM keeps sending, and is closed when it was quiet for r.quiet, so that
// a client that has gone does not hold a generation.
func (r *Relay) carry(client net.Conn, vm Conn) {
	var sent atomic.Int64 // bytes from the VM to the client
	ended := make(chan struct{})
	var both sync.WaitGroup
	both.Add(2)
	go func() { // the VM's bytes
		defer both.Done()
		defer close(ended)
		if pump(client, vm, &sent) != nil {
			client.Close()
			vm.Close()
			return
		}
		if half, ok := client.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
			// The VM closes a connection as a whole; give the client a moment to
			// finish, then stop reading from it.
			client.SetReadDeadline(time.Now().Add(r.quiet))
			return
		}
		client.Close()
	}()
	go func() { // the client's bytes
		defer both.Done()
		var received atomic.Int64
		if pump(vm, client, &received) != nil {
			client.Close()
			vm.Close()
			return
		}
		if vm.CloseWrite() == nil {
			return
		}
		for last := int64(-1); ; {
			now := sent.Load()
			if now == last {
				client.Close()
				vm.Close()
				return
			}
			last = now
			select {
			case <-ended:
				return
			case <-time.After(r.quiet):
			}
		}
	}()
	both.Wait()
}

// relayBuffer is how much is read before it is written, in bytes: about one TLS
// record. The VM's Conn splits it as its transport needs.
const relayBuffer = 16 << 10

// pump copies until the end of src. Nothing is read before all that was read
// earlier is written.
func pump(dst io.Writer, src io.Reader, count *atomic.Int64) error {
	buf := make([]byte, relayBuffer)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			count.Add(int64(n))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *Relay) track(c *net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns == nil {
		return false
	}
	r.conns[c] = struct{}{}
	return true
}

func (r *Relay) untrack(c *net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
}

// Drain waits until no connection is left, or until ctx ends; it then closes
// what remains and returns ctx's error. Stop accepting first.
func (r *Relay) Drain(ctx context.Context) error {
	done := make(chan struct{})
	go func() { r.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		r.Close()
		<-done
		return ctx.Err()
	}
}

// Close closes every connection. The relay cannot be used again.
func (r *Relay) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns == nil {
		return
	}
	close(r.stopping)
	for c := range r.conns {
		(*c).Close()
	}
	r.conns = nil
}
