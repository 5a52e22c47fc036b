package launcher

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/guest"
)

// wire watches what goes to the VM, below the relay's Conn.
type wire struct {
	net.Conn
	largest *atomic.Int64 // the largest single Write
	_       func()        // not hashable, as a connection may be
}

func (w wire) Write(p []byte) (int, error) {
	for {
		old := w.largest.Load()
		if int64(len(p)) <= old || w.largest.CompareAndSwap(old, int64(len(p))) {
			return w.Conn.Write(p)
		}
	}
}

// tcpVM is a Conn whose transport can close one direction, like AF_VSOCK.
type tcpVM struct{ *net.TCPConn }

// relayTo runs a relay whose VM is serve, and returns the address to dial.
func relayTo(t *testing.T, limit int, whole bool, serve func(*net.TCPConn)) (address string, relay *Relay, largest *atomic.Int64) {
	t.Helper()
	listen := func() *net.TCPListener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l.(*net.TCPListener)
	}
	backend, front := listen(), listen()
	go func() {
		for {
			c, err := backend.AcceptTCP()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	largest = new(atomic.Int64)
	relay = NewRelay(limit, func(ctx context.Context) (Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", backend.Addr().String())
		if err != nil {
			return nil, err
		}
		closeWrite := c.(*net.TCPConn).CloseWrite
		if whole { // a transport that cannot close one direction, like vhost-device-vsock
			closeWrite = func() error { return errors.ErrUnsupported }
		}
		return &chunkedConn{Conn: wire{Conn: c, largest: largest}, closeWrite: closeWrite}, nil
	})
	relay.quiet = 200 * time.Millisecond
	if whole {
		relay.quiet = 1500 * time.Millisecond // a busy machine pauses, too
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { relay.Serve(ctx, front); close(done) }()
	t.Cleanup(func() { relay.Close(); cancel(); <-done; relay.wg.Wait() })
	return front.Addr().String(), relay, largest
}

func dialTCP(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.Close()
}

func randomBytes(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}

// Everything arrives, whole and in order, in pieces of at most MaxChunk, and the
// end of the client's stream reaches the VM while its answer still comes back.
func TestRelayHalfClose(t *testing.T) {
	address, relay, largest := relayTo(t, 4, false, func(c *net.TCPConn) {
		all, _ := io.ReadAll(c) // answers only after the client's end
		sum := sha256.Sum256(all)
		c.Write(sum[:])
		c.Write(all)
		c.Close()
	})
	c := dialTCP(t, address)
	data := randomBytes(3<<20 + 17)
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	if !bytes.Equal(got, append(sum[:], data...)) {
		t.Errorf("%d bytes came back, not the %d expected", len(got), len(sum)+len(data))
	}
	if n := largest.Load(); n > guest.MaxChunk || n == 0 {
		t.Errorf("the largest write to the VM has %d bytes; at most %d are allowed", n, guest.MaxChunk)
	}
	waitActive(t, relay, 0)
}

// Where the transport cannot close one direction, the VM's answer still arrives,
// and the connection ends when it has been quiet.
func TestRelayWithoutHalfClose(t *testing.T) {
	address, relay, _ := relayTo(t, 4, true, func(c *net.TCPConn) {
		line := make([]byte, 5)
		io.ReadFull(c, line)
		for range 6 { // longer than quiet in all, never silent for as long
			time.Sleep(300 * time.Millisecond)
			c.Write(line)
		}
		io.Copy(io.Discard, c) // never hangs up by itself
		c.Close()
	})
	c := dialTCP(t, address)
	c.Write([]byte("hello"))
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if string(got) != strings.Repeat("hello", 6) {
		t.Errorf("%q, %v", got, err)
	}
	waitActive(t, relay, 0)
}

func waitActive(t *testing.T, r *Relay, want int64) {
	t.Helper()
	for range 500 {
		if r.Counters().Active == want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%d connections are active, want %d", r.Counters().Active, want)
}

// A client that does not read holds back the VM: the relay does not buffer.
func TestRelayBackpressure(t *testing.T) {
	var sent atomic.Int64
	address, _, _ := relayTo(t, 4, false, func(c *net.TCPConn) {
		piece := make([]byte, 8<<10)
		for {
			n, err := c.Write(piece)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	c := dialTCP(t, address)
	last := int64(-1)
	for now := sent.Load(); now != last || now == 0; now = sent.Load() {
		if now > 64<<20 {
			t.Fatalf("the VM could send %d bytes to a client that reads none", now)
		}
		last = now
		time.Sleep(200 * time.Millisecond)
	}
	if _, err := io.CopyN(io.Discard, c, last+1<<20); err != nil {
		t.Errorf("when it reads again: %v", err)
	}
}

func TestRelayManyConnections(t *testing.T) {
	address, relay, largest := relayTo(t, 16, false, echo)
	var all sync.WaitGroup
	for i := range 100 { // many more than may be open at a time
		all.Go(func() {
			c, err := net.Dial("tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			data := randomBytes(20000 + i)
			go func() { c.Write(data); c.(*net.TCPConn).CloseWrite() }()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("connection %d: %d of %d bytes, %v", i, len(got), len(data), err)
			}
		})
	}
	all.Wait()
	waitActive(t, relay, 0)
	if n := relay.Counters().Total; n != 100 {
		t.Errorf("%d connections were counted", n)
	}
	if n := largest.Load(); n > guest.MaxChunk {
		t.Errorf("a write of %d bytes", n)
	}
}

// A peer that vanishes takes the other side with it.
func TestRelayPeerVanishes(t *testing.T) {
	t.Run("client", func(t *testing.T) {
		gone := make(chan struct{})
		address, relay, _ := relayTo(t, 4, true, func(c *net.TCPConn) {
			defer close(gone)
			defer c.Close()
			for {
				if _, err := c.Write(make([]byte, 100)); err != nil {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
		c := dialTCP(t, address)
		io.ReadFull(c, make([]byte, 100))
		c.SetLinger(0)
		c.Close()
		select {
		case <-gone:
		case <-time.After(5 * time.Second):
			t.Error("the VM was not told")
		}
		waitActive(t, relay, 0)
	})
	t.Run("VM", func(t *testing.T) {
		address, relay, _ := relayTo(t, 4, false, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
			c.Close()
		})
		c := dialTCP(t, address)
		c.Write([]byte{1})
		if _, err := io.ReadAll(c); err == nil {
			c.Write([]byte{1})
		}
		waitActive(t, relay, 0)
	})
	t.Run("no VM", func(t *testing.T) {
		relay := NewRelay(2, func(context.Context) (Conn, error) { return nil, errRefused })
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go relay.Serve(t.Context(), l.(*net.TCPListener))
		// The reset may come before Dial returns.
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			defer c.Close()
			if _, err := io.ReadAll(c); err == nil {
				t.Error("a VM that cannot be reached looks like an empty answer")
			}
		}
		waitActive(t, relay, 0)
		if relay.Counters().Failed != 1 {
			t.Errorf("%+v", relay.Counters())
		}
	})
}

// Accepting can stop and go on, also when all slots are taken; Drain waits, and
// closes what is left when its time is over.
func TestRelayDrain(t *testing.T) {
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer backend.Close()
	go func() {
		for {
			c, err := backend.Accept()
			if err != nil {
				return
			}
			go echo(c.(*net.TCPConn))
		}
	}()
	relay := NewRelay(1, func(context.Context) (Conn, error) {
		c, err := net.Dial("tcp", backend.Addr().String())
		if err != nil {
			return nil, err
		}
		return tcpVM{c.(*net.TCPConn)}, nil
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serve := func() (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { relay.Serve(ctx, l.(*net.TCPListener)); close(done) }()
		return func() {
			cancel()
			select {
			case <-done:
			case <-time.After(5 * time.Second):
				t.Error("Serve does not stop")
			}
		}
	}
	stop := serve()
	first := dialTCP(t, l.Addr().String())
	first.Write([]byte("a"))
	io.ReadFull(first, make([]byte, 1))
	second := dialTCP(t, l.Addr().String()) // waits: the only slot is taken
	second.Write([]byte("b"))
	stop()
	if relay.Counters().Active != 1 {
		t.Errorf("%+v", relay.Counters())
	}
	stop = serve() // what waited is served now
	first.Close()
	if _, err := io.ReadFull(second, make([]byte, 1)); err != nil {
		t.Errorf("a connection made while nobody accepted: %v", err)
	}
	stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := relay.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("draining with an open connection: %v", err)
	}
	if _, err := second.Read(make([]byte, 1)); err == nil {
		t.Error("the connection outlived the drain")
	}
	if err := relay.Drain(t.Context()); err != nil {
		t.Errorf("draining nothing: %v", err)
	}
}

// fakeDevice plays vhost-device-vsock's unix socket.
func fakeDevice(t *testing.T, serve func(c net.Conn, port string)) *UserDialer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "v.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				var b [1]byte
				var line strings.Builder
				for b[0] != '\n' {
					if _, err := c.Read(b[:]); err != nil {
						return
					}
					line.WriteByte(b[0])
				}
				serve(c, strings.TrimSpace(strings.TrimPrefix(line.String(), "CONNECT ")))
			}()
		}
	}()
	d := NewUserDialer(path)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestUserDialer(t *testing.T) {
	t.Run("bytes right after OK are the VM's", func(t *testing.T) {
		d := fakeDevice(t, func(c net.Conn, port string) {
			fmt.Fprintf(c, "OK %s\nfirst words", port)
			c.Close()
		})
		c, err := d.Dial(t.Context(), 9000)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, _ := io.ReadAll(c); string(got) != "first words" {
			t.Errorf("%q", got)
		}
	})
	t.Run("large writes are split", func(t *testing.T) {
		sizes := make(chan int, 100)
		ours, theirs := net.Pipe() // one Read for each Write
		go func() {
			defer close(sizes)
			buf := make([]byte, 1<<20)
			for {
				n, err := theirs.Read(buf)
				if err != nil {
					return
				}
				sizes <- n
			}
		}()
		c := &chunkedConn{Conn: ours}
		if n, err := c.Write(make([]byte, 100<<10)); n != 100<<10 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		c.Close()
		total := 0
		for n := range sizes {
			total += n
			if n > guest.MaxChunk {
				t.Errorf("a write of %d bytes", n)
			}
		}
		if total != 100<<10 {
			t.Errorf("%d bytes arrived", total)
		}
	})
	t.Run("refused", func(t *testing.T) {
		d := fakeDevice(t, func(c net.Conn, _ string) { c.Close() })
		if _, err := d.Dial(t.Context(), 443); !errors.Is(err, errRefused) {
			t.Errorf("%v", err)
		}
	})
	for name, answer := range map[string]string{"no newline": strings.Repeat("x", 1000), "not OK": "NO 443\n", "OKAY": "OKAY\n"} {
		t.Run(name, func(t *testing.T) {
			d := fakeDevice(t, func(c net.Conn, _ string) { io.WriteString(c, answer) })
			if _, err := d.Dial(t.Context(), 443); err == nil {
				t.Error("no error")
			}
		})
	}
	// vhost-device-vsock dies when it cannot write its OK.
	t.Run("a dial that is given up stays open until it is answered", func(t *testing.T) {
		wrote := make(chan error, 1)
		d := fakeDevice(t, func(c net.Conn, _ string) {
			time.Sleep(200 * time.Millisecond)
			_, err := io.WriteString(c, "OK 443\n")
			wrote <- err
		})
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := d.Dial(ctx, 443); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if err := <-wrote; err != nil {
			t.Errorf("the device could not answer: %v", err)
		}
		for range 100 {
			d.mu.Lock()
			n := len(d.abandoned)
			d.mu.Unlock()
			if n == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Error("it is never closed")
	})
	t.Run("no socket", func(t *testing.T) {
		if _, err := NewUserDialer("/nonexistent").Dial(t.Context(), 443); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v", err)
		}
	})
}
