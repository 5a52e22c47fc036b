package http1

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/agent/agenttest"
	"chrysalis/agent/port"
)

// echo says what it was asked.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	said := fmt.Sprintf("%s %s %s %q", r.Method, r.RequestURI, r.Host, body)
	status := http.StatusOK
	if err != nil {
		status, said = http.StatusTeapot, "a broken body"
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(said)))
	w.WriteHeader(status)
	io.WriteString(w, said)
}

// serve returns the address of a server. change may be nil.
func serve(t testing.TB, handler http.HandlerFunc, change func(*Server)) (*Server, string) {
	t.Helper()
	before := runtime.NumGoroutine()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		Handler: handler, TLS: &tls.Config{Certificates: []tls.Certificate{agenttest.Certificate()}, SessionTicketsDisabled: true},
		HeaderLimit: 5 * time.Second, IdleLimit: 5 * time.Second, MaxHeader: 16 << 10,
	}
	if change != nil {
		change(s)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != http.ErrServerClosed {
			t.Errorf("Serve returned %v", err)
		}
		if _, fuzzing := t.(*testing.F); fuzzing {
			return
		}
		agenttest.Eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
	})
	return s, ln.Addr().String()
}

func dial(t testing.TB, address string) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn
}

// answer is what a client sees of one.
type answer struct {
	status  int
	body    string
	trailer http.Header
	closes  bool
}

// read reads an answer.
func read(t testing.TB, in *bufio.Reader, method string) answer {
	t.Helper()
	resp, err := http.ReadResponse(in, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, string(body), resp.Trailer, resp.Close}
}

// answers sends bytes and reads the whole answers that come until the end. A server
// that does not take all of the bytes is none the worse for it.
func answers(conn net.Conn, end func() error, sent []byte) (all []answer) {
	go func() {
		conn.Write(sent)
		end()
	}()
	for in := bufio.NewReader(conn); ; {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return all
		}
		if resp.StatusCode == http.StatusContinue {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return all
		}
		all = append(all, answer{resp.StatusCode, string(body), nil, resp.Close})
	}
}

// oracle is net/http's server, without TLS.
func oracle(t testing.TB) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(echo), DisableGeneralOptionsHandler: true, ErrorLog: log.New(io.Discard, "", 0), MaxHeaderBytes: 12 << 10}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return ln.Addr().String()
}

// both asks this server and net/http's the same.
func both(t testing.TB, address, other string, sent []byte) (got, want []answer) {
	t.Helper()
	ours, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	theirs, err := net.Dial("tcp", other)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	for _, conn := range []net.Conn{ours, theirs} {
		conn.SetDeadline(time.Now().Add(10 * time.Second))
	}
	got = answers(ours, func() error {
		ours.CloseWrite()
		return ours.NetConn().(*net.TCPConn).CloseWrite()
	}, sent)
	return got, answers(theirs, theirs.(*net.TCPConn).CloseWrite, sent)
}

// cases are requests, by what they are. All but those of strict are answered as
// net/http's server does.
var cases = map[string]string{
	"plain":             "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
	"length":            "POST /a?b HTTP/1.1\r\nHost: x:1\r\nContent-Length: 5\r\n\r\nhello",
	"chunks":            "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
	"trailer":           "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n1\r\nh\r\n0\r\nA: b\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n",
	"three at once":     "GET /1 HTTP/1.1\r\nHost: x\r\n\r\nPOST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhiGET /3 HTTP/1.1\r\nHost: x\r\n\r\n",
	"more than it says": "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhello, world",
	"less than it says": "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhello",
	"the last":          "GET /1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n",
	"a quoted encoding": "GET transfer encoding\r\n\r\n",
	"all":               "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
	"bare line feeds":   "GET / HTTP/1.1\nHost: x\n\n",
	"no host":           "GET / HTTP/1.1\r\n\r\n",
	"two hosts":         "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
	"a bad host":        "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
	"a bad path":        "GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n",
	"no version":        "GET /\r\nHost: x\r\n\r\n",
	"another protocol":  "GET / HTTQ/1.1\r\nHost: x\r\n\r\n",
	"a bad method":      "G(T / HTTP/1.1\r\nHost: x\r\n\r\n",
	"a bad name":        "GET / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n",
	"a space, colon":    "GET / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello",
	"no colon":          "GET / HTTP/1.1\r\nHost: x\r\nhello\r\n\r\n",
	"a control byte":    "GET / HTTP/1.1\r\nHost: x\r\nA: b\x01c\r\n\r\n",
	"a zero byte":       "GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n",
	"a folded line":     "GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
	"another encoding":  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nhello",
	"two encodings":     "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"a signed length":   "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello",
	"two lengths":       "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
	"a length twice":    "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
	"length and chunks": "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n",
	"a bad chunk":       "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
	"a huge chunk":      "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
	"expected":          "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
	"other expected":    "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: more\r\n\r\nhello",
	"nothing":           "",
}

// strict are refused here alone.
var strict = map[string]struct {
	sent   string
	status int
}{
	"HTTP/1.0":            {"GET / HTTP/1.0\r\nHost: x\r\n\r\n", 505},
	"a later version":     {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
	"to a proxy":          {"GET http://y/1 HTTP/1.1\r\nHost: x\r\n\r\n", 400},
	"to a proxy, no host": {"GET http://y/1 HTTP/1.1\r\n\r\n", 400},
	"a tunnel":            {"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n", 400},
	"an empty host":       {"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400},
	"two expectations":    {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\nExpect: 100-continue\r\n\r\nh", 417},
	"a half header":       {"GET / HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 16<<10) + "\r\n\r\n", 431},
	"many small fields":   {"GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", 4<<10) + "\r\n", 431},
}

func TestAsNetHTTP(t *testing.T) {
	_, address := serve(t, echo, nil)
	other := oracle(t)
	for name, sent := range cases {
		t.Run(name, func(t *testing.T) {
			got, want := both(t, address, other, []byte(sent))
			if len(got) != len(want) {
				t.Fatalf("%d answers %v, net/http gives %d %v", len(got), got, len(want), want)
			}
			for i := range got {
				if got[i].status != want[i].status || got[i].status < 400 && got[i].body != want[i].body {
					t.Errorf("answer %d: %v, net/http gives %v", i, got[i], want[i])
				}
			}
		})
	}
	for name, test := range strict {
		t.Run(name, func(t *testing.T) {
			got, _ := both(t, address, other, []byte(test.sent))
			if len(got) != 1 || got[0].status != test.status || !got[0].closes {
				t.Errorf("got %v, want %d", got, test.status)
			}
		})
	}
}

func TestConnectionIsKept(t *testing.T) {
	var connections atomic.Int64
	_, address := serve(t, echo, func(s *Server) {
		s.State = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				connections.Add(1)
			}
		}
	})
	conn := dial(t, address)
	in := bufio.NewReader(conn)
	for i := range 3 {
		// In pieces, each a record of its own.
		for _, piece := range []string{"POST /", fmt.Sprint(i), " HTTP/1.1\r\nHost: x\r\nContent-Len", "gth: 5\r\n\r\nhe", "llo"} {
			io.WriteString(conn, piece)
			time.Sleep(time.Millisecond)
		}
		if got := read(t, in, "POST"); got.body != fmt.Sprintf(`POST /%d x "hello"`, i) || got.closes {
			t.Errorf("got %v", got)
		}
	}
	if connections.Load() != 1 {
		t.Errorf("%d connections", connections.Load())
	}
}

// Two requests in one record, and a half one: what package tls has decrypted is not
// forgotten while the connection waits for its socket.
func TestRecordWithTwoRequests(t *testing.T) {
	for _, size := range []int{0, 1, 4000, 4096, 5000, 12000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			_, address := serve(t, echo, nil)
			conn := dial(t, address)
			body := strings.Repeat("x", size)
			fmt.Fprintf(conn, "POST /1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%sGET /2 HTTP/1.1\r\nHost: x\r\n\r\nGET /3 HT", size, body)
			in := bufio.NewReader(conn)
			for i := 1; i <= 2; i++ {
				if got := read(t, in, "GET"); got.status != 200 || !strings.Contains(got.body, fmt.Sprintf(" /%d x ", i)) {
					t.Fatalf("answer %d: %v", i, got)
				}
			}
			io.WriteString(conn, "TP/1.1\r\nHost: x\r\n\r\n")
			if got := read(t, in, "GET"); got.body != `GET /3 x ""` {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestHead(t *testing.T) {
	_, address := serve(t, echo, nil)
	conn := dial(t, address)
	in := bufio.NewReader(conn)
	for range 2 {
		io.WriteString(conn, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
		if got := read(t, in, "HEAD"); got.status != 200 || got.body != "" {
			t.Errorf("got %v", got)
		}
	}
}

func TestStreamWithTrailer(t *testing.T) {
	next := make(chan struct{})
	_, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Trailer"] = []string{"After"}
		w.Header().Set("After", "too early")
		io.WriteString(w, "one")
		http.NewResponseController(w).Flush()
		<-next
		io.WriteString(w, "two")
		w.Header().Set("After", "all\r\nof: it")
		w.Header().Set("Unannounced", "x")
	}, nil)
	conn := dial(t, address)
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Header.Get("After") != "" || resp.Header.Get("Date") == "" || len(resp.TransferEncoding) != 1 {
		t.Errorf("header %v, %v", resp.Header, resp.TransferEncoding)
	}
	first := make([]byte, 3)
	if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "one" {
		t.Fatalf("%q, %v", first, err)
	}
	close(next)
	rest, err := io.ReadAll(resp.Body)
	if err != nil || string(rest) != "two" || resp.Trailer.Get("After") != "all  of: it" || len(resp.Trailer) != 1 {
		t.Errorf("%q, %v, %v", rest, err, resp.Trailer)
	}
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := read(t, in, "GET"); got.body != "onetwo" {
		t.Errorf("got %v", got)
	}
}

// However a client leaves, the request's context ends.
func TestClientLeaves(t *testing.T) {
	for name, leave := range map[string]func(*tls.Conn){
		"politely":                  func(c *tls.Conn) { c.Close() },
		"with no more than goodbye": func(c *tls.Conn) { c.CloseWrite() },
		"without goodbye":           func(c *tls.Conn) { c.NetConn().Close() },
		"with a reset":              func(c *tls.Conn) { c.NetConn().(*net.TCPConn).SetLinger(0); c.NetConn().Close() },
		"after one more request":    func(c *tls.Conn) { io.WriteString(c, "GET /2 HTTP/1.1\r\nHost: x\r\n\r\n"); c.NetConn().Close() },
		"its sending side":          func(c *tls.Conn) { c.NetConn().(*net.TCPConn).CloseWrite() },
		"after bytes in its wake":   func(c *tls.Conn) { io.WriteString(c, "x"); time.Sleep(20 * time.Millisecond); c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			begun, gone := make(chan struct{}), make(chan struct{})
			var once sync.Once
			_, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				once.Do(func() { close(begun) })
				select {
				case <-r.Context().Done():
					once = sync.Once{}
					close(gone)
				case <-time.After(5 * time.Second):
				}
				panic(http.ErrAbortHandler)
			}, nil)
			conn := dial(t, address)
			io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
			<-begun
			leave(conn)
			select {
			case <-gone:
			case <-time.After(5 * time.Second):
				t.Error("nobody noticed")
			}
		})
	}
}

// A request ends as well when its connection is closed here, for whatever reason.
func TestClosedHere(t *testing.T) {
	for name, close := range map[string]func(*Server, net.Conn){
		"the server":     func(s *Server, _ net.Conn) { s.Close() },
		"the connection": func(_ *Server, conn net.Conn) { conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			begun, gone := make(chan net.Conn), make(chan bool)
			s, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
				begun <- Conn(r)
				select {
				case <-r.Context().Done():
					gone <- true
				case <-time.After(5 * time.Second):
					gone <- false
				}
			}, nil)
			io.WriteString(dial(t, address), "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			close(s, <-begun)
			if !<-gone {
				t.Error("the request goes on")
			}
		})
	}
}

// watched is a connection that knows its deadlines.
type watched struct {
	*net.TCPConn
	read, write    atomic.Int64 // of reads and writes, in ns since 1970; 0 is none
	unbound, stale atomic.Int64 // reads during which a write could take for ever, or not be done
}

func nano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func (c *watched) SetDeadline(t time.Time) error {
	c.read.Store(nano(t))
	c.write.Store(nano(t))
	return c.TCPConn.SetDeadline(t)
}

func (c *watched) SetReadDeadline(t time.Time) error {
	c.read.Store(nano(t))
	return c.TCPConn.SetReadDeadline(t)
}

func (c *watched) SetWriteDeadline(t time.Time) error {
	c.write.Store(nano(t))
	return c.TCPConn.SetWriteDeadline(t)
}

func (c *watched) Read(p []byte) (int, error) {
	now, read, write := time.Now().UnixNano(), c.read.Load(), c.write.Load()
	switch {
	case read != 0 && read < now: // reads nothing
	case write == 0 || write > read:
		c.unbound.Add(1)
	case write < now:
		c.stale.Add(1)
	}
	return c.TCPConn.Read(p)
}

type watchedListener struct {
	net.Listener
	conns chan *watched
}

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &watched{TCPConn: conn.(*net.TCPConn)}
	l.conns <- c
	return c, nil
}

// TLS writes when it reads: to a client that asks for new keys. Such a write has a
// limit, so that nobody is held for ever by one who takes nothing, and not one that
// has passed, so that nobody is cut off who asks late.
func TestWritesWhileReading(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := watchedListener{inner, make(chan *watched, 1)}
	after := make(chan http.ConnState, 3) // each of the two requests, and the end
	s := &Server{
		TLS:         &tls.Config{Certificates: []tls.Certificate{agenttest.Certificate()}, SessionTicketsDisabled: true},
		HeaderLimit: 5 * time.Second, IdleLimit: 5 * time.Second, MaxHeader: 16 << 10,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rc := http.NewResponseController(w)
			rc.SetReadDeadline(time.Now().Add(5 * time.Second))
			body, _ := io.ReadAll(r.Body)
			rc.SetWriteDeadline(time.Now().Add(5 * time.Second))
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			w.Write(body)
			rc.Flush()
			rc.SetWriteDeadline(past)
		}),
		State: func(_ net.Conn, state http.ConnState) {
			if state == http.StateIdle || state == http.StateClosed {
				after <- state
			}
		},
	}
	go s.Serve(ln)
	defer s.Close()
	conn := dial(t, inner.Addr().String())
	c := <-ln.conns
	in := bufio.NewReader(conn)
	for _, expect := range []string{"", "Expect: 100-continue\r\n"} {
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n%s\r\n", expect)
		if expect != "" {
			if got := read(t, in, "POST"); got.status != 100 {
				t.Fatal(got)
			}
			time.Sleep(refuseLimit) // for which there was time to say so
		}
		time.Sleep(10 * time.Millisecond)
		io.WriteString(conn, "hello")
		if got := read(t, in, "POST"); got.body != "hello" {
			t.Fatal(got)
		}
		// A request that comes sooner is read by who watches for the client's end.
		if state := <-after; state != http.StateIdle {
			t.Fatal(state)
		}
	}
	io.WriteString(conn, "GET / HTTP/9\r\n\r\n")
	if got := read(t, in, "GET"); got.status != 400 {
		t.Error(got)
	}
	conn.Close()
	if c.unbound.Load() != 0 || c.stale.Load() != 0 {
		t.Errorf("of the reads %d could wait for a write without a limit, and %d had none left", c.unbound.Load(), c.stale.Load())
	}
}

// A client that asks for more while it waits is not taken for one that has left.
func TestAskingMoreIsNotLeaving(t *testing.T) {
	_, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		case <-time.After(50 * time.Millisecond):
		}
		echo(w, r)
	}, nil)
	conn := dial(t, address)
	in := bufio.NewReader(conn)
	for range 4 {
		io.WriteString(conn, "GET /1 HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	for range 4 {
		if got := read(t, in, "GET"); got.status != 200 {
			t.Errorf("got %v", got)
		}
	}
}

func closed(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	var ne net.Error
	if _, err := io.Copy(io.Discard, conn); errors.As(err, &ne) && ne.Timeout() {
		t.Error("the connection is still open")
	}
}

func TestLimits(t *testing.T) {
	const limit = 300 * time.Millisecond
	_, address := serve(t, echo, func(s *Server) { s.HeaderLimit = limit })
	_, idling := serve(t, echo, func(s *Server) { s.IdleLimit = limit })
	// The handshake has the same limit. One that was cut off at it is tried again.
	open := func(t *testing.T) *tls.Conn {
		for {
			at := time.Now()
			conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
			if err == nil {
				t.Cleanup(func() { conn.Close() })
				return conn
			}
			if took := time.Since(at); took < limit {
				t.Fatalf("after %v: %v", took, err)
			}
		}
	}
	t.Run("no handshake", func(t *testing.T) {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		closed(t, conn)
	})
	t.Run("no request", func(t *testing.T) { closed(t, open(t)) })
	t.Run("a header in drops", func(t *testing.T) {
		conn := open(t)
		go func() {
			for {
				if _, err := io.WriteString(conn, "G"); err != nil {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		}()
		closed(t, conn)
	})
	t.Run("no other request", func(t *testing.T) {
		conn := dial(t, idling)
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		read(t, bufio.NewReader(conn), "GET")
		closed(t, conn)
	})
	t.Run("another one in time", func(t *testing.T) {
		// Reports whether all were in time, which is this machine's doing as well.
		round := func() bool {
			conn := dial(t, idling)
			in := bufio.NewReader(conn)
			var last time.Time
			for i := range 4 {
				at := time.Now()
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				_, err := in.Peek(1)
				gap := time.Since(last)
				switch {
				case err != nil && i > 0 && gap >= limit:
					return false
				case err != nil:
					t.Fatalf("request %d, %v after the last: %v", i, gap, err)
				}
				read(t, in, "GET")
				last = at
				time.Sleep(limit / 2)
			}
			return true
		}
		for !round() {
		}
	})
}

// A refusal before the body is read arrives, however much of it the client sends on.
func TestRefusalArrives(t *testing.T) {
	_, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "2")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		io.WriteString(w, "no")
	}, nil)
	for _, size := range []int{1, 100 << 10, 64 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			conn := dial(t, address)
			go func() {
				fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", size)
				conn.Write(make([]byte, size))
			}()
			if got := read(t, bufio.NewReader(conn), "POST"); got.status != 413 || got.body != "no" || !got.closes {
				t.Errorf("got %v", got)
			}
		})
	}
}

// A client need not wait for the end of the connection to know a refusal's.
func TestRefusalEnds(t *testing.T) {
	_, address := serve(t, echo, nil)
	for name, test := range strict {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, address)
			go io.WriteString(conn, test.sent)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(resp.Body); err != nil || resp.ContentLength != int64(len(body)) || len(body) == 0 {
				t.Errorf("%q of %d bytes, %v", body, resp.ContentLength, err)
			}
		})
	}
}

func TestPlainHTTP(t *testing.T) {
	_, address := serve(t, echo, nil)
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if got := read(t, bufio.NewReader(conn), "GET"); got.status != 400 || !strings.Contains(got.body, "HTTPS") {
		t.Errorf("got %v", got)
	}
}

// What panics ends its connection and no more, and is counted but not told.
func TestPanic(t *testing.T) {
	_, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half")
		http.NewResponseController(w).Flush()
		if r.RequestURI == "/abort" {
			panic(http.ErrAbortHandler)
		}
		panic("a bug")
	}, nil)
	for path, counted := range map[string]int64{"/abort": 0, "/bug": 1} {
		before := port.Bugs.Load()
		conn := dial(t, address)
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err == nil || string(body) != "half" {
			t.Errorf("%s: %q, %v", path, body, err)
		}
		if n := port.Bugs.Load() - before; n != counted {
			t.Errorf("%s: %d counted", path, n)
		}
	}
}

// Less or more than Content-Length says is never taken for a whole answer.
func TestWrongLength(t *testing.T) {
	_, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "4")
		if r.RequestURI == "/more" {
			if _, err := io.WriteString(w, "hello"); err != http.ErrContentLength {
				t.Errorf("got %v", err)
			}
		}
		io.WriteString(w, "he")
	}, nil)
	for _, path := range []string{"/less", "/more"} {
		conn := dial(t, address)
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("%s: a whole answer", path)
		}
	}
}

func TestDrainAndShutdown(t *testing.T) {
	begun, release := make(chan struct{}, 1), make(chan struct{})
	s, address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.RequestURI == "/slow" {
			begun <- struct{}{}
			<-release
		}
		echo(w, r)
	}, nil)
	idle := dial(t, address)
	io.WriteString(idle, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	read(t, bufio.NewReader(idle), "GET")
	silent := dial(t, address)
	slow := dial(t, address)
	io.WriteString(slow, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun

	s.Drain()
	closed(t, idle)
	late := dial(t, address)
	io.WriteString(late, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := read(t, bufio.NewReader(late), "GET"); got.status != 200 || !got.closes {
		t.Errorf("while draining: %v", got)
	}
	closed(t, late)

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); err != context.DeadlineExceeded {
		t.Errorf("with a request: %v", err)
	}
	closed(t, silent)
	if conn, err := net.Dial("tcp", address); err == nil {
		conn.Close()
		t.Error("somebody was let in")
	}
	close(release)
	if got := read(t, bufio.NewReader(slow), "GET"); got.status != 200 || !got.closes {
		t.Errorf("the request that was there: %v", got)
	}
	if err := s.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
}

// A listener whose failures pass, as when there are too many open files.
type failing struct {
	net.Listener
	left atomic.Int64
	err  error
}

func (l *failing) Accept() (net.Conn, error) {
	if l.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: l.err}
	}
	return l.Listener.Accept()
}

func TestAcceptFails(t *testing.T) {
	s := &Server{Handler: http.HandlerFunc(echo)}
	l := &failing{err: errors.New("for good")}
	l.left.Store(1)
	if err := s.Serve(l); !errors.Is(err, l.err) {
		t.Errorf("got %v", err)
	}
}

// A connection that idles takes a third of what one of net/http's server does.
func TestIdleMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector takes its own")
	}
	const clients = 300
	measure := func(address string) int64 {
		used := func() int64 {
			var m runtime.MemStats
			for range 4 { // stacks shrink by half each time
				runtime.GC()
			}
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc + m.StackInuse)
		}
		var conns []*tls.Conn
		before := used()
		for range clients {
			conn := dial(t, address)
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			if got := read(t, bufio.NewReaderSize(conn, 512), "GET"); got.status != 200 {
				t.Fatal(got)
			}
			conns = append(conns, conn)
		}
		time.Sleep(50 * time.Millisecond) // the last one becomes idle
		after := used()
		for _, conn := range conns {
			conn.Close()
		}
		return (after - before) / clients
	}
	_, address := serve(t, echo, nil)
	ours := measure(address)

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: http.HandlerFunc(echo), ErrorLog: log.New(io.Discard, "", 0)}
	go other.Serve(tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{agenttest.Certificate()}, SessionTicketsDisabled: true}))
	defer other.Close()
	theirs := measure(ln.Addr().String())
	// Both figures have the client's side in them.
	t.Logf("%d bytes for each connection and its client, %d with net/http", ours, theirs)
	if ours+10<<10 > theirs {
		t.Errorf("%d bytes for each connection and its client, and %d with net/http's server", ours, theirs)
	}
}

// FuzzServer: whatever is sent, the connection ends, and what is served net/http
// serves as well, and sees as the same request.
func FuzzServer(f *testing.F) {
	for _, sent := range cases {
		f.Add([]byte(sent))
	}
	for _, test := range strict {
		f.Add([]byte(test.sent))
	}
	_, address := serve(f, echo, nil)
	other := oracle(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		if len(sent) > 64<<10 || bytes.Contains(sent, []byte("HTTP/1.0")) { // net/http would end the connection after it
			return
		}
		got, want := both(t, address, other, sent)
		for i, a := range got {
			if a.status == http.StatusOK && (i >= len(want) || a.status != want[i].status || a.body != want[i].body) {
				t.Fatalf("answer %d is %v, of %v; net/http gives %v", i, a, got, want)
			}
		}
	})
}
