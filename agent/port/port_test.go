package port

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/agent/agenttest"
	"chrysalis/guest"
)

func noGoroutineLeft(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		agenttest.Eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
	})
}

func listen(t testing.TB) (net.Listener, func() net.Conn) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	return ln, func() net.Conn {
		conn, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
}

type statusBench struct {
	*Status
	state  *State
	client *http.Client
	dial   func() net.Conn
}

func startStatus(t *testing.T) *statusBench {
	noGoroutineLeft(t)
	ln, dial := listen(t)
	state := NewState("chrysalis", time.Now(), 4200*time.Millisecond, func() guest.CounterTable {
		return guest.CounterTable{Requests: 7, AgentRSSKiB: 2}
	})
	s := NewStatus(state, new(Log))
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", ln.Addr().String())
	}}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		ln.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve returned %v", err)
		}
	})
	return &statusBench{s, state, &http.Client{Transport: transport}, dial}
}

func (b *statusBench) get(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, err := b.client.Get("http://vm" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestStatus(t *testing.T) {
	b := startStatus(t)
	b.state.Begin(guest.PhaseMounts)
	b.state.Begin(guest.PhaseServe)
	b.state.FinishPhase()
	b.state.SetServing()
	b.state.SetEngine(true)
	code, body := b.get(t, "/status")
	var got guest.Status
	if err := json.Unmarshal([]byte(body), &got); err != nil || code != 200 {
		t.Fatalf("%d %q: %v", code, body, err)
	}
	if got.Version != 1 || got.Image != "chrysalis" || got.Phase != guest.PhaseServe || !got.Ready || got.Draining ||
		got.KernelMS != 4200 || len(got.Phases) != 2 || got.Phases[1].Name != guest.PhaseServe || got.Counters.Requests != 7 {
		t.Errorf("got %+v", got)
	}
	b.state.Drain()
	b.state.End(guest.ReasonDiskCorrupt)
	b.state.End(guest.ReasonPanic)
	if s := b.state.Status(); s.Reason != guest.ReasonDiskCorrupt || s.Ready || !s.Draining {
		t.Errorf("got %+v", s)
	}
}

func TestMetrics(t *testing.T) {
	b := startStatus(t)
	b.state.Begin(guest.PhaseDisks)
	time.Sleep(2 * time.Millisecond)
	b.state.Begin(guest.PhaseServe)
	b.state.End(guest.ReasonStopped)
	disks := float64(b.state.Status().Phases[0].MS) / 1000
	code, body := b.get(t, "/metrics")
	for _, line := range []string{
		`chrysalis_info{image="chrysalis"} 1`, `chrysalis_phase{phase="serve"} 1`, `chrysalis_phase{phase="disks"} 0`,
		fmt.Sprintf(`chrysalis_phase_seconds{phase="disks"} %v`, disks), `chrysalis_ending{reason="stopped"} 1`, `chrysalis_ready 0`,
		`chrysalis_kernel_seconds 4.2`, `chrysalis_requests_total 7`, `chrysalis_agent_resident_bytes 2048`,
		`# TYPE chrysalis_engine_restarts_total counter`,
	} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	if code != 200 || disks == 0 {
		t.Errorf("got %d, %v s", code, disks)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(body) {
		name := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '{' })[0]
		if name != "#" && !strings.HasPrefix(name, "chrysalis_") {
			t.Errorf("line %q", line)
		}
		if strings.HasPrefix(line, "# TYPE") {
			if seen[line] {
				t.Errorf("twice: %q", line)
			}
			seen[line] = true
		}
	}
}

func TestStatusRefuses(t *testing.T) {
	b := startStatus(t)
	for _, test := range []struct {
		name, request string
		want          int
	}{
		{"root", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"slash", "GET /status/ HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"query", "GET /status?a HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"post", "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405},
		{"options", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"body", "GET /status HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nxx", 400},
		{"header", "GET /status HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 4<<10) + "\r\n\r\n", 431},
		{"nonsense", "\x00\x01\x02\r\n\r\n", 400},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := b.dial()
			go io.WriteString(conn, test.request)
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || resp.StatusCode != test.want {
				t.Fatalf("got %v, %v, want %d", resp, err, test.want)
			}
			// The socket resets where the server closed with bytes unread.
			if _, err := io.Copy(io.Discard, resp.Body); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Error(err)
			}
		})
	}
}

func TestStatusConnectionLimit(t *testing.T) {
	b := startStatus(t)
	var conns []net.Conn
	for range statusConnections {
		conn := b.dial()
		conns = append(conns, conn)
		io.WriteString(conn, "GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	extra := b.dial()
	extra.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := extra.Read(make([]byte, 1)); err != io.EOF && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("one too many got %v", err)
	}
	conns[0].Close()
	agenttest.Eventually(t, "there is room again", func() bool {
		resp, err := b.client.Get("http://vm/status")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
}

// events opens /events and returns a function that reads the next line.
func (b *statusBench) events(t *testing.T) (next func() (guest.Status, error), hangUp func()) {
	t.Helper()
	resp, err := b.client.Get("http://vm/events")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	lines := bufio.NewReader(resp.Body)
	return func() (s guest.Status, err error) {
		line, err := lines.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(line, &s)
		}
		return s, err
	}, func() { resp.Body.Close() }
}

func TestEvents(t *testing.T) {
	b := startStatus(t)
	b.state.Begin(guest.PhaseEngine)
	next, hangUp := b.events(t)
	if s, err := next(); err != nil || s.Phase != guest.PhaseEngine {
		t.Fatalf("now: %+v, %v", s, err)
	}
	b.state.Begin(guest.PhaseServe)
	if s, err := next(); err != nil || s.Phase != guest.PhaseServe || len(s.Phases) != 1 {
		t.Fatalf("at a change: %+v, %v", s, err)
	}
	at := time.Now()
	if _, err := next(); err != nil || time.Since(at) > eventInterval+time.Second {
		t.Fatalf("in between: %v after %v", err, time.Since(at))
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if b.state.WaitDelivered(short) {
		t.Error("delivered without a reason")
	}
	b.state.End(guest.ReasonDiskCorrupt)
	if s, err := next(); err != nil || s.Reason != guest.ReasonDiskCorrupt {
		t.Fatalf("the reason: %+v, %v", s, err)
	}
	hangUp()
	if !b.state.WaitDelivered(t.Context()) {
		t.Error("not delivered")
	}
}

// A reader that does not hang up is given a moment, and then the stream ends.
func TestReasonEndsEvents(t *testing.T) {
	b := startStatus(t)
	b.state.End(guest.ReasonMounts)
	next, _ := b.events(t)
	if s, err := next(); err != nil || s.Reason != guest.ReasonMounts {
		t.Fatalf("%+v, %v", s, err)
	}
	if _, err := next(); err != io.EOF {
		t.Errorf("then %v", err)
	}
	if !b.state.WaitDelivered(t.Context()) {
		t.Error("not delivered")
	}
}

func TestNobodyReadsTheReason(t *testing.T) {
	b := startStatus(t)
	conn := b.dial()
	io.WriteString(conn, "GET /events HTTP/1.1\r\nHost: x\r\n\r\n") // and never reads
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 20_000 { // far more than a socket holds
			b.state.SetServing()
			b.state.SetEngine(true)
		}
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("a slow reader holds up the agent")
	}
	<-done

	none := NewState("chrysalis", time.Now(), 0, nil)
	none.End(guest.ReasonMounts)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if none.WaitDelivered(ctx) {
		t.Error("delivered to nobody")
	}
}

func TestEngineLog(t *testing.T) {
	b := startStatus(t)
	b.log.Write([]byte("before "))
	resp, err := b.client.Get("http://vm/engine-log")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got := make([]byte, len("before after"))
	if _, err := io.ReadFull(resp.Body, got[:7]); err != nil {
		t.Fatal(err)
	}
	b.log.Write([]byte("after"))
	if _, err := io.ReadFull(resp.Body, got[7:]); err != nil || string(got) != "before after" {
		t.Fatalf("got %q, %v", got, err)
	}
	b.CloseLog()
	b.CloseLog()
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) != 0 {
		t.Errorf("then %q, %v", rest, err)
	}
	if n, err := b.log.Write([]byte("secret")); n != 6 || err != nil {
		t.Errorf("Write returned %d, %v", n, err)
	}
	if code, body := b.get(t, "/engine-log"); code != 410 || strings.Contains(body, "before") || strings.Contains(body, "secret") {
		t.Errorf("got %d %q", code, body)
	}
}

func TestLogRing(t *testing.T) {
	var all bytes.Buffer
	l := new(Log)
	for _, size := range []int{1, 100, LogSize - 200, 150, LogSize, LogSize + 7, 3, 3*LogSize + 1, 5} {
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(all.Len() + i*i)
		}
		all.Write(p)
		if n, err := l.Write(p); n != size || err != nil {
			t.Fatalf("Write returned %d, %v", n, err)
		}
		want := all.Bytes()[max(0, all.Len()-LogSize):]
		var got []byte
		buf := make([]byte, 1000)
		for at := int64(0); ; {
			n, next, more, _ := l.read(at, buf)
			if n == 0 {
				if more == nil || next != int64(all.Len()) {
					t.Fatalf("at the end: %v, %d", more, next)
				}
				break
			}
			got, at = append(got, buf[:n]...), next
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("after %d bytes: got %d, want the last %d", all.Len(), len(got), len(want))
		}
	}
	l.Close()
	if n, _, _, closed := l.read(0, make([]byte, 1)); n != 0 || !closed || l.ring != nil {
		t.Error("it remembers")
	}
}

type countingConn struct {
	net.Conn
	longest int
	fail    bool
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.longest = max(c.longest, len(p))
	if c.fail {
		return len(p) / 2, io.ErrClosedPipe
	}
	return len(p), nil
}

func TestBoundWrites(t *testing.T) {
	for _, size := range []int{0, 1, guest.MaxChunk, guest.MaxChunk + 1, 64 << 10, 100_000} {
		raw := new(countingConn)
		n, err := (&boundConn{Conn: raw}).Write(make([]byte, size))
		if n != size || err != nil || raw.longest != min(size, guest.MaxChunk) {
			t.Errorf("%d bytes: wrote %d, %v, at most %d at once", size, n, err, raw.longest)
		}
	}
	raw := &countingConn{fail: true}
	conn := &boundConn{Conn: raw}
	if n, err := conn.Write(make([]byte, 10)); n != 5 || err != io.ErrClosedPipe {
		t.Errorf("got %d, %v", n, err)
	}
	raw.fail = false
	if n, err := conn.Write(make([]byte, 10)); n != 0 || err != net.ErrClosed {
		t.Errorf("after a failure: got %d, %v", n, err)
	}
	if _, ok := any(&boundConn{}).(io.ReaderFrom); ok {
		t.Error("it has ReadFrom, which goes past Write")
	}
}

func TestControl(t *testing.T) {
	const ok, bad, unknown = `{"ok":true,"active":3}`, `{"ok":false,"error":"bad-message","active":0}`, `{"ok":false,"error":"unknown-op","active":0}`
	tests := []struct{ name, message, want, op string }{
		{"drain", `{"op":"drain"}` + "\n", ok, "drain"},
		{"collect", `{"op":"collect","ack":18446744073709551615,"wait_ms":3000}` + "\n", ok, "collect"},
		{"collect nothing", `{"op":"collect"}` + "\n", ok, "collect"},
		{"prices", `{"payment":{"payee":"x","min_deposit":1,"min_delay_seconds":2,"prices":[{"prompt_price":1,"completion_price":2}]},"op":"prices"}` + "\n", ok, "prices"},
		{"admit", `{"op":"admit","admit":{"channel":"x","key":"y","limit":1,"used":2,"best":"z","closing":true}}` + "\n", ok, "admit"},
		{"drop", `{"op":"drop","channel":"x"}` + "\n", ok, "drop"},
		{"prices of nothing", `{"op":"prices"}` + "\n", bad, ""},
		{"null for prices", `{"op":"prices","payment":null}` + "\n", bad, ""},
		{"admit nothing", `{"op":"admit"}` + "\n", bad, ""},
		{"drop nothing", `{"op":"drop"}` + "\n", bad, ""},
		{"another operation's field", `{"op":"drain","ack":0}` + "\n", bad, ""},
		{"another operation's field, too", `{"op":"admit","admit":{},"channel":"x"}` + "\n", bad, ""},
		{"an unknown operation's field", `{"op":"dance","ack":1}` + "\n", bad, ""},
		{"unknown field inside", `{"op":"admit","admit":{"channels":"x"}}` + "\n", bad, ""},
		{"twice inside", `{"op":"admit","admit":{"used":1,"used":2}}` + "\n", bad, ""},
		{"other case inside", `{"op":"admit","admit":{"Used":1}}` + "\n", bad, ""},
		{"a long s", `{"op":"admit","admit":{"used":1,"u\u017fed":2}}` + "\n", bad, ""},
		{"null inside", `{"op":"admit","admit":{"best":null}}` + "\n", bad, ""},
		{"an array for an object", `{"op":"admit","admit":[]}` + "\n", bad, ""},
		{"a negative acknowledgement", `{"op":"collect","ack":-1}` + "\n", bad, ""},
		{"a broken number", `{"op":"collect","ack":1.5}` + "\n", bad, ""},
		{"too large a number", `{"op":"collect","ack":18446744073709551616}` + "\n", bad, ""},
		{"a long wait", `{"op":"collect","wait_ms":3001}` + "\n", bad, ""},
		{"a negative wait", `{"op":"collect","wait_ms":-1}` + "\n", bad, ""},
		{"spaces", ` { "op" : "stop" } ` + "\n", ok, "stop"},
		{"CRLF", `{"op":"stop"}` + "\r\n", ok, "stop"},
		{"unknown", `{"op":"dance"}` + "\n", unknown, "dance"},
		{"empty", "\n", bad, ""},
		{"no field", "{}\n", bad, ""},
		{"other case", `{"OP":"stop"}` + "\n", bad, ""},
		{"twice", `{"op":"drain","op":"stop"}` + "\n", bad, ""},
		{"unknown field", `{"op":"stop","now":true}` + "\n", bad, ""},
		{"number", `{"op":1}` + "\n", bad, ""},
		{"object", `{"op":{"op":"stop"}}` + "\n", bad, ""},
		{"null", `{"op":null}` + "\n", bad, ""},
		{"array", `["op","stop"]` + "\n", bad, ""},
		{"two values", `{"op":"stop"}{}` + "\n", bad, ""},
		{"trailing", `{"op":"stop"}` + "\nx", bad, ""},
		{"second", `{"op":"stop"}` + "\n" + `{"op":"stop"}` + "\n", bad, ""},
		{"too long", `{"op":"stop"` + strings.Repeat(" ", guest.MaxControlMessage) + "}\n", bad, ""},
		{"no newline", `{"op":"stop"}`, "", ""},
		{"nothing", "", "", ""},
	}
	noGoroutineLeft(t)
	ln, dial := listen(t)
	var mu sync.Mutex
	var ops []string
	var stopped atomic.Int64
	c := &Control{
		Host: func(net.Addr) bool { return true },
		Handle: func(r guest.ControlRequest) (guest.ControlReply, func()) {
			mu.Lock()
			defer mu.Unlock()
			ops = append(ops, string(r.Op))
			switch r.Op {
			case guest.OpDrain, guest.OpPrices, guest.OpAdmit, guest.OpDrop, guest.OpCollect:
				return guest.ControlReply{OK: true, Active: 3}, nil
			case guest.OpStop:
				return guest.ControlReply{OK: true, Active: 3}, func() { stopped.Add(1) }
			}
			return guest.ControlReply{Error: guest.ErrorUnknownOp}, nil
		},
	}
	done := make(chan error, 1)
	go func() { done <- c.Serve(ln) }()
	t.Cleanup(func() {
		ln.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve returned %v", err)
		}
	})
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			mu.Lock()
			ops = nil
			mu.Unlock()
			conn := dial()
			io.WriteString(conn, test.message)
			if !strings.Contains(test.message, "\n") {
				conn.(*net.UnixConn).CloseWrite()
			}
			conn.SetReadDeadline(time.Now().Add(controlTimeout + time.Second))
			reply, err := io.ReadAll(conn)
			if err != nil && !strings.Contains(err.Error(), "reset") { // it closes with bytes unread
				t.Fatal(err)
			}
			if got := strings.TrimSuffix(string(reply), "\n"); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			mu.Lock()
			defer mu.Unlock()
			if got := strings.Join(ops, " "); got != test.op {
				t.Errorf("handled %q, want %q", got, test.op)
			}
		})
	}
	agenttest.Eventually(t, "stop was carried out after each reply", func() bool { return stopped.Load() == 2 })
}

func TestControlPeers(t *testing.T) {
	noGoroutineLeft(t)
	ln, dial := listen(t)
	c := &Control{
		Host: func(net.Addr) bool { return false },
		Handle: func(guest.ControlRequest) (guest.ControlReply, func()) {
			t.Error("a stranger was heard")
			return guest.ControlReply{}, nil
		},
	}
	go c.Serve(ln)
	t.Cleanup(func() { ln.Close() })
	conn := dial()
	io.WriteString(conn, `{"op":"stop"}`+"\n")
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if reply, err := io.ReadAll(conn); len(reply) != 0 || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %q, %v", reply, err)
	}
}

func TestControlSilence(t *testing.T) {
	noGoroutineLeft(t)
	ln, dial := listen(t)
	c := &Control{Host: func(net.Addr) bool { return true }}
	go c.Serve(ln)
	t.Cleanup(func() { ln.Close() })
	conn, at := dial(), time.Now()
	conn.SetReadDeadline(at.Add(controlTimeout + 2*time.Second))
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("got %v after %v", err, time.Since(at))
	}
}

// A bug that one peer can reach costs that peer its connection, and no other.
func TestControlPanics(t *testing.T) {
	for _, test := range []struct{ name, want string }{
		{"before the reply", ""},
		{"after the reply", `{"ok":true,"active":0}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			noGoroutineLeft(t)
			ln, dial := listen(t)
			c := &Control{
				Host: func(net.Addr) bool { return true },
				Handle: func(guest.ControlRequest) (guest.ControlReply, func()) {
					if test.want == "" {
						panic("secret")
					}
					return guest.ControlReply{OK: true}, func() { panic("secret") }
				},
			}
			go c.Serve(ln)
			t.Cleanup(func() { ln.Close() })
			before := Bugs.Load()
			for range controlConnections + 1 { // each gives its slot back
				conn := dial()
				io.WriteString(conn, `{"op":"stop"}`+"\n")
				conn.SetReadDeadline(time.Now().Add(5 * time.Second))
				if reply, err := io.ReadAll(conn); strings.TrimSpace(string(reply)) != test.want || err != nil {
					t.Fatalf("got %q, %v", reply, err)
				}
			}
			agenttest.Eventually(t, "all are counted", func() bool { return Bugs.Load()-before == controlConnections+1 })
		})
	}
}

func TestStatusPanics(t *testing.T) {
	b := startStatus(t)
	var broken atomic.Bool
	b.state.counters = func() guest.CounterTable {
		if broken.Load() {
			panic("secret")
		}
		return guest.CounterTable{}
	}
	before := Bugs.Load()
	broken.Store(true)
	if resp, err := b.client.Post("http://vm/status", "", nil); err != nil || resp.StatusCode != 405 {
		t.Errorf("got %v, %v", resp, err)
	} else {
		resp.Body.Close()
	}
	conn := b.dial()
	io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if reply, err := io.ReadAll(conn); err != nil || strings.Contains(string(reply), "secret") {
		t.Errorf("got %q, %v", reply, err)
	}
	if n := Bugs.Load() - before; n != 1 {
		t.Errorf("%d counted", n)
	}
	broken.Store(false)
	if _, body := b.get(t, "/metrics"); !strings.Contains(body, fmt.Sprintf("chrysalis_agent_bugs_total %d\n", Bugs.Load())) {
		t.Errorf("not shown: %s", body)
	}
}

func TestBoundMakesRoom(t *testing.T) {
	raw, dial := listen(t)
	t.Cleanup(func() { raw.Close() })
	var oldest net.Conn
	asked := 0
	ln := Bound(raw, 1, nil, func() {
		if asked++; asked == 1 {
			oldest.Close()
		}
	})
	first := dial()
	oldest, _ = ln.Accept()
	second := dial()
	if conn, err := ln.Accept(); err != nil {
		t.Fatal(err)
	} else {
		defer conn.Close()
	}
	if _, err := first.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the first got %v", err)
	}
	third := dial() // for which no room is made
	go ln.Accept()
	third.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := third.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the third got %v", err)
	}
	second.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := second.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the second got %v", err)
	}
}

func FuzzControl(f *testing.F) {
	f.Add([]byte(`{"op":"stop"}` + "\n"))
	f.Add([]byte(`{"op":"stop","op":"x"}` + "\n"))
	f.Add([]byte(` {"o\u0070":"\ud800"}` + "\r\n"))
	f.Add([]byte(`{"op":"collect","ack":7,"wait_ms":5}` + "\n"))
	f.Add([]byte(`{"op":"drop","channel":"0:ab"}` + "\n"))
	f.Add([]byte(`{"op":"admit","admit":{"channel":"x","key":"y","limit":1,"used":2,"best":"z","closing":true}}` + "\n"))
	f.Add([]byte(`{"op":"prices","payment":{"payee":"x","min_deposit":1,"min_delay_seconds":2,"prices":[{"prompt_price":1,"completion_price":2}]}}` + "\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		line, err := readLine(bytes.NewReader(raw))
		if err != nil {
			return
		}
		request, err := parseControl(line)
		if err != nil {
			return
		}
		again, err := json.Marshal(request)
		if err != nil {
			t.Fatal(err)
		}
		if said, taken := tree(t, line), tree(t, again); !reflect.DeepEqual(said, taken) {
			t.Errorf("took %q as %s", line, again)
		}
	})
}

// tree is what a message says, without what says nothing: zeros.
func tree(t *testing.T, line []byte) any {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return withoutZeros(v)
}

func withoutZeros(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if v[key] = withoutZeros(value); v[key] == nil {
				delete(v, key)
			}
		}
		if len(v) > 0 {
			return v
		}
	case []any:
		for i := range v {
			v[i] = withoutZeros(v[i])
		}
		if len(v) > 0 {
			return v
		}
	case json.Number:
		if v != "0" && v != "-0" {
			return v
		}
	case bool:
		if v {
			return v
		}
	case string:
		if v != "" {
			return v
		}
	}
	return nil
}
