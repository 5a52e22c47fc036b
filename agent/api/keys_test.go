package api

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"chrysalis/agent/agenttest"
	"chrysalis/agent/port"
	"chrysalis/attest/evidence"
	"chrysalis/ci/leak"
	"chrysalis/guest"
	"chrysalis/manifest"
)

// spool keeps what is written to it.
type spool struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (s *spool) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.data.Write(p)
}

func (s *spool) bytes() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.data.Bytes())
}

// spooledListener keeps what both sides of its connections send.
type spooledListener struct {
	net.Listener
	*spool
}

func (l spooledListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return spooledConn{conn, l.spool}, err
}

type spooledConn struct {
	net.Conn
	spool *spool
}

func (c spooledConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.spool.Write(p[:n])
	return n, err
}

func (c spooledConn) SyscallConn() (syscall.RawConn, error) {
	return c.Conn.(syscall.Conn).SyscallConn()
}

func (c spooledConn) Write(p []byte) (int, error) {
	c.spool.Write(p)
	return c.Conn.Write(p)
}

// TestKeysStayInside holds the private keys that the host of a VM cannot know, and
// looks for them in all that the server gives out: below and within TLS, to the
// engine, on the status port, and on the process's own outputs.
func TestKeysStayInside(t *testing.T) {
	_, receiptKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certificate := agenttest.Certificate()
	tlsKey := certificate.PrivateKey.(*ecdsa.PrivateKey)
	scalar, err := tlsKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(tlsKey)
	if err != nil {
		t.Fatal(err)
	}
	secrets := map[string][]byte{
		"the TLS key": scalar, "the TLS key in DER": sec1[:7+len(scalar)], // its public half, which follows, is no secret
		"the receipt key": receiptKey.Seed(),
	}

	// The process's own outputs, whoever writes to them.
	outputs := filepath.Join(t.TempDir(), "outputs")
	file, err := os.Create(outputs)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	restore := func() {}
	for _, fd := range []int{1, 2} {
		saved, err := syscall.Dup(fd)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Dup3(int(file.Fd()), fd, 0); err != nil {
			t.Fatal(err)
		}
		before := restore
		restore = func() { syscall.Dup3(saved, fd, 0); syscall.Close(saved); before() }
	}
	defer func() { restore() }()

	var engineGot, wire, clients spool
	socket := filepath.Join(t.TempDir(), "e")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	engine := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch {
		case strings.Contains(string(body), "panic"):
			panic("the engine")
		case strings.Contains(string(body), `"stream":true`):
			sayEvents(w, "data: {\"choices\":[]}\n\ndata: [DONE]\n\n")
		case strings.Contains(string(body), "refuse"):
			sayJSON(w, 400, `{"error":{"message":"no"}}`)
		default:
			sayJSON(w, 200, `{}`)
		}
	})}
	go engine.Serve(spooledListener{ln, &engineGot})
	defer engine.Close()
	counters := new(Counters)
	s := New(Config{
		Models: testModels, Limits: manifest.DefaultLimits, Certificate: certificate, ReceiptKey: receiptKey, Counters: counters,
		Engine: func(ctx context.Context, _ int) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		Ready: func() bool { return true },
		Evidence: func(context.Context, [evidence.NonceSize]byte) ([]byte, error) {
			panic(fmt.Sprintf("a bug that speaks of %v", certificate)) // a panic's text goes nowhere
		},
	})
	if s.http.TLS.KeyLogWriter != nil {
		t.Error("the secrets of TLS connections are logged")
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(spooledListener{inner, &wire})
	defer s.http.Close()

	by := &http.Client{Transport: &http.Transport{TLSClientConfig: clientTLS()}}
	defer by.CloseIdleConnections()
	receipts := 0
	for _, ask := range []struct{ method, path, body string }{
		{"POST", "/v1/chat/completions", hello},
		{"POST", "/v1/chat/completions", helloStream},
		{"POST", "/v1/chat/completions", strings.Replace(hello, "hello", "refuse", 1)},
		{"POST", "/v1/chat/completions", strings.Replace(hello, "hello", "panic", 1)},
		{"POST", "/v1/chat/completions", "{"},
		{"POST", "/v1/embeddings", `{"model":"nobody/knows","input":"x"}`},
		{"GET", evidence.Path + "?nonce=" + strings.Repeat("A", 43), ""},
		{"GET", "/v1/models", ""},
		{"GET", "/debug/pprof/heap", ""},
		{"TRACE", "/v1/models", ""},
	} {
		req, err := http.NewRequest(ask.method, "https://"+inner.Addr().String()+ask.path, strings.NewReader(ask.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := by.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", ask.path, err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		receipts += len(resp.Trailer["Chrysalis-Receipt"])
		fmt.Fprintln(&clients, resp.Status, resp.Header, resp.Trailer, string(body))
	}
	if receipts == 0 {
		t.Error("the receipt key has signed nothing")
	}

	var host spool
	state := port.NewState("test", time.Now(), 0, func() (c guest.CounterTable) { counters.Fill(&c); return c })
	status := port.NewStatus(state, new(port.Log))
	for _, path := range []string{"/status", "/metrics", "/keys"} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", path, nil)
		status.ServeHTTP(w, r)
		fmt.Fprintln(&host, w.Code, w.Header(), w.Body)
	}
	restore()
	restore = func() {}
	printed, err := os.ReadFile(outputs)
	if err != nil {
		t.Fatal(err)
	}
	for _, out := range []struct {
		name string
		data []byte
		some bool
	}{
		{"below TLS", wire.bytes(), true},
		{"to clients", clients.bytes(), true},
		{"to the engine", engineGot.bytes(), true},
		{"to the host", host.bytes(), true},
		// The engine's panic is this test's own, printed by its server in this process.
		{"on the process's outputs", printed, true},
	} {
		if out.some && len(out.data) == 0 {
			t.Errorf("%s: nothing came to look through", out.name)
		}
		for name, secret := range secrets {
			if found := leak.Find(out.data, secret); len(found) > 0 {
				t.Errorf("%s: %s, %v", out.name, name, found)
			}
			if len(leak.Find(append(out.data[:len(out.data):len(out.data)], secret...), secret)) == 0 {
				t.Errorf("%s: %s was planted and not found", out.name, name)
			}
		}
	}
}
