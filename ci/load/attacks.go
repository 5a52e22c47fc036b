package load

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Attack is something that a client can do to a VM. While it lasts others are
// served.
type Attack struct {
	Name string
	// Do attacks for some time, and returns what the VM should not have let it do.
	Do func(ctx context.Context, c Config) error
}

// Attacks are all of them. Config.Idle says how many connections they take, Config.For how long the slow ones last.
var Attacks = []Attack{
	{"headers that dribble", dribbleHeaders},
	{"bodies that dribble", dribbleBodies},
	{"answers that nobody reads", neverRead},
	{"headers that are huge", hugeHeaders},
	{"HTTP/2", http2},
	{"many requests on one connection", pipeline},
	{"requests that are taken back at once", rapidResets},
	{"handshakes that are broken off", brokenHandshakes},
	{"data before the handshake", earlyData},
	{"resumption and old versions", oldTLS},
	{"a flood of connections", flood},
}

// Defend attacks, asks as an honest client does meanwhile, over a new connection
// each time, and returns what went wrong: the VM let the attack pass, refused the
// honest client, or kept something of the attack.
func Defend(ctx context.Context, c Config, a Attack) (served int, slowest time.Duration, err error) {
	before, err := c.Sample()
	if err != nil {
		return 0, 0, err
	}
	done := make(chan error, 1)
	go func() { done <- a.Do(ctx, c) }()
	var attack error
	honest := func() error {
		begin := time.Now()
		by := client()
		defer by.CloseIdleConnections()
		limit, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		short := c
		short.Events, short.Pause = 2, time.Millisecond
		status, _, err := short.stream(limit, by, c.Tokens[0], func(time.Duration) {})
		if err != nil || status != http.StatusOK {
			return fmt.Errorf("an honest client got %d, %v", status, err)
		}
		served, slowest = served+1, max(slowest, time.Since(begin))
		return nil
	}
	for over := false; !over; {
		if err := honest(); err != nil {
			return served, slowest, err
		}
		select {
		case attack = <-done:
			over = true
		case <-time.After(100 * time.Millisecond):
		}
	}
	if attack != nil {
		return served, slowest, attack
	}
	if err := honest(); err != nil {
		return served, slowest, fmt.Errorf("afterwards %w", err)
	}
	var after Sample
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
		if after, err = c.Sample(); err != nil {
			return served, slowest, err
		}
		if after.Active == 0 && after.Agent.Descriptors <= before.Agent.Descriptors+4 && after.Agent.Goroutines <= before.Agent.Goroutines+8 && after.Relay.Descriptors <= before.Relay.Descriptors+8 {
			return served, slowest, nil
		}
	}
	return served, slowest, fmt.Errorf("it is over and something is left of it: %+v, before %+v", after, before)
}

func (c *Config) dial(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{Timeout: 30 * time.Second}).DialContext(ctx, "tcp", c.Address)
}

// secure dials and shakes hands.
func (c *Config) secure(ctx context.Context) (*tls.Conn, error) {
	raw, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true})
	conn.SetDeadline(time.Now().Add(time.Minute))
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

const postHead = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

// each runs f for so many connections at a time. One that cannot be made any more
// was refused, which is the VM's right.
func (c *Config) each(ctx context.Context, n int, f func(conn *tls.Conn) error) error {
	var all sync.WaitGroup
	errs := make(chan error, n)
	for i := range n {
		all.Go(func() {
			time.Sleep(time.Duration(i) * 5 * time.Millisecond)
			conn, err := c.secure(ctx)
			if err != nil {
				return
			}
			defer conn.NetConn().Close()
			errs <- f(conn)
		})
	}
	all.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// dribble writes a byte now and then, until it is hung up on or for limit, and
// returns what it was answered.
func dribble(conn net.Conn, text string, limit time.Duration) (answer string, closed bool) {
	conn.SetDeadline(time.Now().Add(limit))
	gone := make(chan string, 1)
	go func() {
		data, err := io.ReadAll(io.LimitReader(conn, 64<<10))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			closed = true
		}
		gone <- string(data)
	}()
	for i := 0; ; i++ {
		if _, err := io.WriteString(conn, text[i%len(text):i%len(text)+1]); err != nil {
			return <-gone, closed
		}
		select {
		case answer = <-gone:
			return answer, closed
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func dribbleHeaders(ctx context.Context, c Config) error {
	return c.each(ctx, c.Idle/2, func(conn *tls.Conn) error {
		io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\nA: ")
		if _, closed := dribble(conn, "a", 45*time.Second); !closed {
			return errors.New("a header of a byte every half second was not hung up on in 45 s")
		}
		return nil
	})
}

// A body may come slowly: it holds no place, and is given up on after two minutes,
// longer than this.
func dribbleBodies(ctx context.Context, c Config) error {
	return c.each(ctx, c.Idle/2, func(conn *tls.Conn) error {
		io.WriteString(conn, postHead+"Authorization: Bearer "+c.Tokens[0]+"\r\nContent-Length: 1000\r\n\r\n")
		dribble(conn, " ", c.For)
		return nil
	})
}

// neverRead asks for more than sockets hold, and reads none of it. A client that
// takes nothing keeps its place for as long as the idle limit.
func neverRead(ctx context.Context, c Config) error {
	var refused, asked atomic.Int64
	err := c.each(ctx, c.Active, func(conn *tls.Conn) error {
		conn.NetConn().(*net.TCPConn).SetReadBuffer(4 << 10)
		body := fmt.Sprintf(`{"model":%q,"stream":true,"messages":[{"role":"user","content":"100000 1"}]}`, c.Model)
		fmt.Fprintf(conn, postHead+"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", c.Tokens[1], len(body), body)
		asked.Add(1)
		time.Sleep(c.For)
		return nil
	})
	if asked.Load() == 0 {
		return fmt.Errorf("nothing could be asked, %d refused", refused.Load())
	}
	return err
}

func hugeHeaders(ctx context.Context, c Config) error {
	big := strings.Repeat("a", 1<<20)
	return c.each(ctx, 16, func(conn *tls.Conn) error {
		go io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\nA: "+big+"\r\n\r\n")
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			return fmt.Errorf("a header of 1 MB was answered %d", answer.StatusCode)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("a header of 1 MB was not answered")
		}
		return nil
	})
}

// http2 asks for HTTP/2, and speaks it unasked. There is none: no streams on one
// connection, no resets of them, no compressed headers.
func http2(ctx context.Context, c Config) error {
	raw, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(30 * time.Second))
	if err := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).HandshakeContext(ctx); err == nil {
		return errors.New("HTTP/2 was agreed on")
	}
	return c.each(ctx, 8, func(conn *tls.Conn) error {
		// The preface, and a SETTINGS frame: RFC 9113, section 3.4.
		io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
		data, err := io.ReadAll(io.LimitReader(conn, 64<<10))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.New("the preface of HTTP/2 was not hung up on")
		}
		if len(data) > 0 && !strings.HasPrefix(string(data), "HTTP/1.1 ") {
			return fmt.Errorf("the preface of HTTP/2 was answered %q", data)
		}
		return nil
	})
}

// pipeline sends many requests at once on one connection: they are answered one
// after the other.
func pipeline(ctx context.Context, c Config) error {
	const n = 300
	return c.each(ctx, 2, func(conn *tls.Conn) error {
		one := "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + c.Tokens[1] + "\r\n\r\n"
		go io.WriteString(conn, strings.Repeat(one, n))
		in := bufio.NewReader(conn)
		for i := range n {
			answer, err := http.ReadResponse(in, nil)
			if err != nil || answer.StatusCode != http.StatusOK {
				return fmt.Errorf("request %d of %d on one connection: %v", i, n, err)
			}
			io.Copy(io.Discard, answer.Body)
		}
		return nil
	})
}

// rapidResets asks, and hangs up as soon as the request is out.
func rapidResets(ctx context.Context, c Config) error {
	body := fmt.Sprintf(`{"model":%q,"stream":true,"messages":[{"role":"user","content":"1000 100"}]}`, c.Model)
	for range 5 {
		err := c.each(ctx, c.Idle/5, func(conn *tls.Conn) error {
			fmt.Fprintf(conn, postHead+"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", c.Tokens[1], len(body), body)
			conn.NetConn().(*net.TCPConn).SetLinger(0)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// cutConn is a connection on which only the first bytes go out.
type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.Conn.Write(p[:c.left])
		c.Conn.Close()
		return 0, net.ErrClosed
	}
	c.left -= len(p)
	return c.Conn.Write(p)
}

// brokenHandshakes ends handshakes in the middle of the client's first message,
// after it, and before the last.
func brokenHandshakes(ctx context.Context, c Config) error {
	var all sync.WaitGroup
	for i := range c.Idle {
		all.Go(func() {
			time.Sleep(time.Duration(i) * 2 * time.Millisecond)
			raw, err := c.dial(ctx)
			if err != nil {
				return
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(10 * time.Second))
			raw.(*net.TCPConn).SetLinger(i % 2 * -1) // one half with a reset
			cut := &cutConn{raw, []int{1, 100, 1 << 20}[i%3]}
			conn := tls.Client(cut, &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return errors.New("no") }})
			conn.HandshakeContext(ctx)
		})
	}
	all.Wait()
	return nil
}

// eagerConn sends a record with data right behind the first message.
type eagerConn struct {
	net.Conn
	sent bool
}

func (c *eagerConn) Write(p []byte) (int, error) {
	if !c.sent {
		c.sent = true
		early := append([]byte{23, 3, 3, 0, 32}, make([]byte, 32)...)
		if _, err := c.Conn.Write(append(append([]byte{}, p...), early...)); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func earlyData(ctx context.Context, c Config) error {
	for range 8 {
		raw, err := c.dial(ctx)
		if err != nil {
			return err
		}
		raw.SetDeadline(time.Now().Add(30 * time.Second))
		conn := tls.Client(&eagerConn{Conn: raw}, &tls.Config{InsecureSkipVerify: true})
		io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
		data, err := io.ReadAll(io.LimitReader(conn, 64<<10))
		raw.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) || len(data) > 0 {
			return fmt.Errorf("data before the handshake's end was not hung up on: %v, answered %q", err, data)
		}
	}
	return nil
}

// oldTLS asks for what TLS 1.3 without tickets does not have: sessions to resume,
// with which early data would come, and versions that can renegotiate.
func oldTLS(ctx context.Context, c Config) error {
	try := func(config *tls.Config) (tls.ConnectionState, error) {
		raw, err := c.dial(ctx)
		if err != nil {
			return tls.ConnectionState{}, err
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(30 * time.Second))
		config.InsecureSkipVerify = true
		conn := tls.Client(raw, config)
		if err := conn.HandshakeContext(ctx); err != nil {
			return tls.ConnectionState{}, err
		}
		fmt.Fprintf(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		_, err = io.ReadAll(conn) // a ticket would come with it
		return conn.ConnectionState(), err
	}
	if _, err := try(&tls.Config{MaxVersion: tls.VersionTLS12, Renegotiation: tls.RenegotiateFreelyAsClient}); err == nil {
		return errors.New("TLS 1.2 was agreed on, which has renegotiation")
	}
	cache := tls.NewLRUClientSessionCache(4)
	for range 2 {
		state, err := try(&tls.Config{ClientSessionCache: cache, ServerName: "vm"})
		if err != nil {
			return err
		}
		if state.DidResume {
			return errors.New("a session was resumed")
		}
	}
	if _, ok := cache.Get("vm"); ok {
		return errors.New("a ticket was given out")
	}
	return nil
}

// flood makes connections that do nothing, more than the VM has room for, and makes
// each anew when it is hung up on.
func flood(ctx context.Context, c Config) error {
	ctx, cancel := context.WithTimeout(ctx, c.For)
	defer cancel()
	var all sync.WaitGroup
	for i := range c.Idle * 2 {
		all.Go(func() {
			time.Sleep(time.Duration(i) * time.Millisecond)
			for ctx.Err() == nil {
				conn, err := c.dial(ctx)
				if err != nil {
					return
				}
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				conn.Read(make([]byte, 1))
				stop()
				conn.Close()
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
				}
			}
		})
	}
	all.Wait()
	return nil
}
