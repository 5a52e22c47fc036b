package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"chrysalis/agent/agenttest"
	"chrysalis/agent/port"
	"chrysalis/attest/receipt"
	"chrysalis/guest"
	"chrysalis/manifest"
)

var testModels = []manifest.Model{
	{Name: "chrysalis/demo", Revision: "1", Disk: manifest.Disk{RootHash: strings.Repeat("ab", 32)}},
	{Name: "other/model", Revision: "r2", Disk: manifest.Disk{RootHash: strings.Repeat("cd", 32)}},
}

const hello = `{"model":"chrysalis/demo","messages":[{"role":"user","content":"hello"}]}`
const helloStream = `{"model":"chrysalis/demo","stream":true,"messages":[{"role":"user","content":"hello"}]}`

// bench is a server between a client and a fake engine.
type bench struct {
	asked atomic.Int64 // the model whose engine was dialled last
	*Server
	counters Counters
	address  string
	socket   string
	client   *http.Client
	ready    atomic.Bool
	firsts   atomic.Int64
	record   recorder
}

// recorder is a listener that remembers the longest write to its connections.
type recorder struct {
	net.Listener
	longest, total atomic.Int64
	buffer         atomic.Int64 // of what they have still to send, in bytes; 0 is the system's
}

type recordedConn struct {
	net.Conn
	r *recorder
}

func (r *recorder) Accept() (net.Conn, error) {
	conn, err := r.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if size := r.buffer.Load(); size > 0 {
		conn.(*net.TCPConn).SetWriteBuffer(int(size))
	}
	return recordedConn{conn, r}, nil
}

func (c recordedConn) SyscallConn() (syscall.RawConn, error) {
	return c.Conn.(syscall.Conn).SyscallConn()
}

func (c recordedConn) Write(p []byte) (int, error) {
	for {
		old := c.r.longest.Load()
		if int64(len(p)) <= old || c.r.longest.CompareAndSwap(old, int64(len(p))) {
			break
		}
	}
	c.r.total.Add(int64(len(p)))
	return c.Conn.Write(p)
}

var testReceiptKey = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))

var comments = regexp.MustCompile(`(?m)^:[^\n]*\n\n?`)

// unpadded returns a stream's events without padding and receipt.
func unpadded(body []byte) string { return comments.ReplaceAllString(string(body), "") }

func clientTLS() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true} // what is verified is the evidence, elsewhere
}

func start(t testing.TB, engine http.HandlerFunc, change func(*Config), tweak func(*Server)) *bench {
	t.Helper()
	before := runtime.NumGoroutine()
	b := &bench{socket: filepath.Join(t.TempDir(), "e")}
	b.ready.Store(true)

	var engineServer *http.Server
	if engine != nil {
		ln, err := net.Listen("unix", b.socket)
		if err != nil {
			t.Fatal(err)
		}
		engineServer = &http.Server{Handler: engine}
		go engineServer.Serve(ln)
	}

	limits := manifest.DefaultLimits
	limits.BodyBytes = 1 << 20
	config := Config{
		Models:      testModels,
		Limits:      limits,
		Certificate: agenttest.Certificate(),
		ReceiptKey:  testReceiptKey,
		Manifest:    [48]byte{1},
		Engine: func(ctx context.Context, model int) (net.Conn, error) {
			b.asked.Store(int64(model))
			return new(net.Dialer).DialContext(ctx, "unix", b.socket)
		},
		Ready:       b.ready.Load,
		FirstClient: func() { b.firsts.Add(1) },
		Counters:    &b.counters,
	}
	if change != nil {
		change(&config)
	}
	b.Server = New(config)
	if tweak != nil {
		tweak(b.Server)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.address = ln.Addr().String()
	b.record.Listener = ln
	served := make(chan error, 1)
	go func() { served <- b.Serve(&b.record) }()
	transport := &http.Transport{TLSClientConfig: clientTLS()}
	b.client = &http.Client{Transport: transport}

	t.Cleanup(func() {
		transport.CloseIdleConnections()
		b.http.Close()
		if err := <-served; err != http.ErrServerClosed {
			t.Errorf("Serve returned %v", err)
		}
		if engineServer != nil {
			engineServer.Close()
		}
		if n := b.Active(); n != 0 {
			agenttest.Eventually(t, "no place is held", func() bool { return b.Active() == 0 })
		}
		if b.record.longest.Load() > guest.MaxChunk {
			t.Errorf("a write of %d bytes, at most %d may be", b.record.longest.Load(), guest.MaxChunk)
		}
		agenttest.Eventually(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
	})
	return b
}

func (b *bench) request(t testing.TB, method, path, body string) *http.Request {
	t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "https://"+b.address+path, r)
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return req
}

func (b *bench) do(t testing.TB, req *http.Request) (*http.Response, string) {
	t.Helper()
	resp, err := b.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("status %d, then %v after %q", resp.StatusCode, err, body)
	}
	return resp, strings.TrimRight(string(body), " ") // padding
}

func (b *bench) post(t testing.TB, path, body string) (*http.Response, string) {
	t.Helper()
	return b.do(t, b.request(t, "POST", path, body))
}

// wantError checks the form of an error and returns its parameter.
func wantError(t testing.TB, resp *http.Response, body string, status int, code string) (param string) {
	t.Helper()
	var e struct {
		Error *struct {
			Message, Type string
			Param         *string
			Code          string
		}
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error == nil {
		t.Fatalf("status %d: not an error: %q", resp.StatusCode, body)
	}
	if resp.StatusCode != status || e.Error.Code != code {
		t.Errorf("got %d %s, want %d %s", resp.StatusCode, e.Error.Code, status, code)
	}
	if e.Error.Message == "" || e.Error.Type == "" || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("incomplete error: %q, %v", body, resp.Header)
	}
	if e.Error.Param != nil {
		return *e.Error.Param
	}
	return ""
}

func sayJSON(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Server", "engine")
	w.WriteHeader(status)
	io.WriteString(w, body)
}

func sayEvents(w http.ResponseWriter, raw string) {
	w.Header().Set("Content-Type", "text/event-stream")
	io.WriteString(w, raw)
	w.(http.Flusher).Flush()
}

// answer is an engine with nothing to say.
func answer(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	sayJSON(w, 200, `{}`)
}

func TestModels(t *testing.T) {
	b := start(t, nil, nil, nil)
	resp, body := b.do(t, b.request(t, "GET", "/v1/models", ""))
	want := `{"object":"list","data":[` +
		`{"id":"chrysalis/demo@1","object":"model","created":0,"owned_by":"chrysalis","revision":"1","root_hash":"` + strings.Repeat("ab", 32) + `"},` +
		`{"id":"other/model@r2","object":"model","created":0,"owned_by":"other","revision":"r2","root_hash":"` + strings.Repeat("cd", 32) + `"}]}`
	if resp.StatusCode != 200 || body != want {
		t.Errorf("got %d %s\nwant %s", resp.StatusCode, body, want)
	}
	if resp.TLS.Version != tls.VersionTLS13 || resp.TLS.NegotiatedProtocol != "" && resp.TLS.NegotiatedProtocol != "http/1.1" {
		t.Errorf("got TLS %x, %q", resp.TLS.Version, resp.TLS.NegotiatedProtocol)
	}
	b.do(t, b.request(t, "GET", "/v1/models", ""))
	if b.firsts.Load() != 1 {
		t.Errorf("FirstClient was called %d times", b.firsts.Load())
	}
}

// What the engine is sent, to the byte, and what of its answer comes back.
func TestForward(t *testing.T) {
	tests := []struct{ name, path, body, sent string }{
		{"chat", "/v1/chat/completions",
			`{ "model":"chrysalis/demo@1", "user":"u", "n":1, "stop":null, "max_completion_tokens":7, "messages" : [ {"role":"user","content":"h\u00e9"} ] }`,
			`{"messages":[ {"role":"user","content":"h\u00e9"} ],"max_tokens":7,"model":"chrysalis/demo","cache_prompt":false}`},
		{"escaped key", "/v1/chat/completions",
			`{"m\u006fdel":"chrysalis/demo","messages":[{"role":"user","content":[{"type":"text","text":"x"}]}]}`,
			`{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"model":"chrysalis/demo","cache_prompt":false}`},
		{"completion", "/v1/completions",
			`{"prompt":"once","model":"other/model@r2:` + strings.Repeat("cd", 32) + `","temperature":0,"seed":-1,"stream":false}`,
			`{"prompt":"once","model":"other/model","stream":false,"temperature":0,"seed":-1,"cache_prompt":false}`},
		{"embeddings", "/v1/embeddings",
			`{"input":["a","b"],"model":"chrysalis/demo","encoding_format":"base64"}`,
			`{"model":"chrysalis/demo","input":["a","b"],"encoding_format":"base64","cache_prompt":false}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			const answer = `{"object":"answer"}`
			got := make(chan string, 1)
			var b *bench
			b = start(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				var header []string
				for name := range r.Header {
					header = append(header, name)
				}
				for _, name := range header {
					switch name {
					case "Accept", "Connection", "Content-Length", "Content-Type":
					default:
						t.Errorf("the engine got the header %s", name)
					}
				}
				if r.URL.Path != test.path || r.Host != "engine" {
					t.Errorf("the engine got %s %s", r.Host, r.URL.Path)
				}
				if want := strings.Contains(test.body, "other/model"); want != (b.asked.Load() == 1) {
					t.Errorf("model %d's engine got %s", b.asked.Load(), body)
				}
				got <- string(body)
				w.Header().Set("X-Engine", "secret")
				http.SetCookie(w, &http.Cookie{Name: "a", Value: "b"})
				sayJSON(w, 200, answer)
			}, nil, nil)
			req := b.request(t, "POST", test.path, test.body)
			req.Header.Set("Authorization", "Bearer key")
			req.Header.Set("Cookie", "a=b")
			req.Header.Set("X-Forwarded-For", "1.2.3.4")
			req.Header.Set("User-Agent", "me")
			resp, body := b.do(t, req)
			if sent := <-got; sent != test.sent {
				t.Errorf("the engine got\n %s\nwant\n %s", sent, test.sent)
			}
			if resp.StatusCode != 200 || body != answer {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
			for name := range resp.Header {
				switch name {
				case "Content-Type", "Cache-Control", "Date", receipt.SaltHeader:
				default:
					t.Errorf("the client got the header %s", name)
				}
			}
			if n := b.counters.Requests.Load(); n != 1 {
				t.Errorf("%d requests counted", n)
			}
		})
	}
}

func TestChunkedRequest(t *testing.T) {
	b := start(t, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 200, `{}`) }, nil, nil)
	req := b.request(t, "POST", "/v1/chat/completions", hello)
	req.ContentLength = -1
	if resp, body := b.do(t, req); resp.StatusCode != 200 {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

func TestStream(t *testing.T) {
	next := make(chan struct{})
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		sayEvents(w, ": a comment\nid: 1\nevent: x\ndata: {\"n\":1}\n\n")
		<-next
		sayEvents(w, "data:{\"n\":\ndata:2}\r\n\r\nretry: 1\n\ndata: [DONE]\n\ndata: {\"after\":1}\n\n")
	}, nil, nil)
	resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", helloStream))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := resp.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("content type is %q", got)
	}
	// The first event is here although the engine has not gone on.
	first := make([]byte, len("data: {\"n\":1}\n\n"))
	if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "data: {\"n\":1}\n\n" {
		t.Fatalf("first event: %q, %v", first, err)
	}
	close(next)
	rest, err := io.ReadAll(resp.Body)
	if want := "data: {\"n\":2}\n\ndata: [DONE]\n\n"; err != nil || unpadded(rest) != want {
		t.Errorf("got %q, %v, want %q", rest, err, want)
	}
}

func TestRefusedRequests(t *testing.T) {
	chat := func(rest string) string {
		return `{"model":"chrysalis/demo","messages":[{"role":"user","content":"x"}]` + rest + `}`
	}
	messages := func(m string) string { return `{"model":"chrysalis/demo","messages":` + m + `}` }
	deep := strings.Repeat("[", 65) + strings.Repeat("]", 65)
	tests := []struct {
		name, path, body string
		status           int
		code, param      string
	}{
		{"empty", "chat/completions", " ", 400, "body_invalid", ""},
		{"not JSON", "chat/completions", "hello", 400, "body_invalid", ""},
		{"array", "chat/completions", "[]", 400, "body_invalid", ""},
		{"two values", "chat/completions", hello + hello, 400, "body_invalid", ""},
		{"bad UTF-8", "chat/completions", messages("[{\"role\":\"user\",\"content\":\"\xff\"}]"), 400, "body_invalid", ""},
		{"half a surrogate pair", "chat/completions", messages(`[{"role":"user","content":"\ud800x"}]`), 400, "body_invalid", ""},
		{"too deep", "chat/completions", chat(`,"tools":` + deep), 400, "body_invalid", ""},
		{"schema too deep", "chat/completions", chat(`,"tools":` + deep[30:len(deep)-30]), 400, "invalid_field", "tools"},
		{"other case", "chat/completions", `{"model":"chrysalis/demo","Messages":[]}`, 400, "unknown_field", "Messages"},
		{"repeated", "chat/completions", chat(`,"stream":true,"str\u0065am":false`), 400, "repeated_field", "stream"},
		{"both limits", "chat/completions", chat(`,"max_tokens":1,"max_completion_tokens":2`), 400, "repeated_field", "max_tokens"},
		{"slot", "chat/completions", chat(`,"id_slot":0`), 400, "unknown_field", "id_slot"},
		{"cache", "chat/completions", chat(`,"cache_prompt":true`), 400, "unknown_field", "cache_prompt"},
		{"n_predict", "chat/completions", chat(`,"n_predict":1`), 400, "unknown_field", "n_predict"},
		{"grammar", "chat/completions", chat(`,"grammar":"root ::= \"x\""`), 400, "unknown_field", "grammar"},
		{"samplers", "chat/completions", chat(`,"samplers":[]`), 400, "unknown_field", "samplers"},
		{"lora", "completions", `{"model":"chrysalis/demo","prompt":"x","lora":[]}`, 400, "unknown_field", "lora"},
		{"long key", "chat/completions", chat(`,"` + strings.Repeat("k", 300) + `":1`), 400, "invalid_field", ""},
		{"no model", "chat/completions", `{"messages":[{"role":"user","content":"x"}]}`, 400, "missing_field", "model"},
		{"null model", "chat/completions", `{"model":null,"messages":[{"role":"user","content":"x"}]}`, 400, "missing_field", "model"},
		{"other model", "chat/completions", strings.Replace(hello, "demo", "nemo", 1), 404, "model_not_found", "model"},
		{"other revision", "chat/completions", strings.Replace(hello, "demo", "demo@2", 1), 404, "model_not_found", "model"},
		{"no messages", "chat/completions", `{"model":"chrysalis/demo"}`, 400, "missing_field", "messages"},
		{"empty messages", "chat/completions", messages(`[]`), 400, "invalid_field", "messages"},
		{"messages string", "chat/completions", messages(`"x"`), 400, "invalid_field", "messages"},
		{"role", "chat/completions", messages(`[{"role":"root","content":"x"}]`), 400, "invalid_field", "messages[0].role"},
		{"no role", "chat/completions", messages(`[{"content":"x"}]`), 400, "invalid_field", "messages[0].role"},
		{"content number", "chat/completions", messages(`[{"role":"user","content":1}]`), 400, "invalid_field", "messages[0].content"},
		{"content twice", "chat/completions", messages(`[{"role":"user","content":"a","content":"b"}]`), 400, "invalid_field", "messages[0].content"},
		{"message field", "chat/completions", messages(`[{"role":"user","content":"a","media":1}]`), 400, "invalid_field", "messages[0].media"},
		{"image", "chat/completions", messages(`[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"http://x"}}]}]`), 400, "invalid_field", "messages[0].content[1].type"},
		{"image first", "chat/completions", messages(`[{"role":"user","content":[{"image_url":{"url":"http://x"},"type":"image_url"}]}]`), 400, "invalid_field", "messages[0].content[0].image_url"},
		{"stream", "chat/completions", chat(`,"stream":1`), 400, "invalid_field", "stream"},
		{"stream options", "chat/completions", chat(`,"stream_options":{"x":1}`), 400, "invalid_field", "stream_options.x"},
		{"n", "chat/completions", chat(`,"n":2`), 400, "invalid_field", "n"},
		{"max_tokens 0", "chat/completions", chat(`,"max_tokens":0`), 400, "invalid_field", "max_tokens"},
		{"max_tokens 1.5", "chat/completions", chat(`,"max_tokens":1.5`), 400, "invalid_field", "max_tokens"},
		{"max_tokens huge", "chat/completions", chat(`,"max_tokens":99999999999999999999999999999999999999`), 400, "invalid_field", "max_tokens"},
		{"temperature", "chat/completions", chat(`,"temperature":"1"`), 400, "invalid_field", "temperature"},
		{"temperature high", "chat/completions", chat(`,"temperature":1e999`), 400, "invalid_field", "temperature"},
		{"stop", "chat/completions", chat(`,"stop":[1]`), 400, "invalid_field", "stop[0]"},
		{"stop many", "chat/completions", chat(`,"stop":[` + strings.Repeat(`"a",`, 16) + `"a"]`), 400, "invalid_field", "stop"},
		{"bias", "chat/completions", chat(`,"logit_bias":{"1":1000}`), 400, "invalid_field", "logit_bias.1"},
		{"bias key", "chat/completions", chat(`,"logit_bias":{"x":1}`), 400, "invalid_field", "logit_bias"},
		{"format", "chat/completions", chat(`,"response_format":{"type":"grammar"}`), 400, "invalid_field", "response_format.type"},
		{"tool", "chat/completions", chat(`,"tools":[{"type":"web"}]`), 400, "invalid_field", "tools[0].type"},
		{"tool choice", "chat/completions", chat(`,"tool_choice":"all"`), 400, "invalid_field", "tool_choice"},
		{"prompts", "completions", `{"model":"chrysalis/demo","prompt":["a","b"]}`, 400, "invalid_field", "prompt"},
		{"tokens", "completions", `{"model":"chrysalis/demo","prompt":[1,2]}`, 400, "invalid_field", "prompt[0]"},
		{"messages elsewhere", "completions", `{"model":"chrysalis/demo","prompt":"a","messages":[]}`, 400, "unknown_field", "messages"},
		{"embedding stream", "embeddings", `{"model":"chrysalis/demo","input":"a","stream":true}`, 400, "unknown_field", "stream"},
		{"embedding format", "embeddings", `{"model":"chrysalis/demo","input":"a","encoding_format":"x"}`, 400, "invalid_field", "encoding_format"},
	}
	b := start(t, func(http.ResponseWriter, *http.Request) { t.Error("the engine was asked") }, nil, nil)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			resp, body := b.post(t, "/v1/"+test.path, test.body)
			if param := wantError(t, resp, body, test.status, test.code); param != test.param {
				t.Errorf("param is %q, want %q: %s", param, test.param, body)
			}
		})
	}
	if got := b.counters.Refused.Load(); got != int64(len(tests)) {
		t.Errorf("%d refusals counted of %d", got, len(tests))
	}
	if got := b.counters.Connections.Load(); got != 1 {
		t.Errorf("%d connections: a refusal after the whole body should keep it", got)
	}
}

func TestRefusedHeads(t *testing.T) {
	tests := []struct {
		name, method, path, contentType, encoding string
		status                                    int
		code                                      string
	}{
		{"root", "GET", "/", "", "", 404, "unknown_path"},
		{"engine path", "GET", "/slots", "", "", 404, "unknown_path"},
		{"engine post", "POST", "/completion", "application/json", "", 404, "unknown_path"},
		{"slash", "GET", "/v1/models/", "", "", 404, "unknown_path"},
		{"double slash", "GET", "//v1/models", "", "", 404, "unknown_path"},
		{"dots", "GET", "/v1/../v1/models", "", "", 404, "unknown_path"},
		{"escaped", "GET", "/v1/%6dodels", "", "", 404, "unknown_path"},
		{"query", "GET", "/v1/models?a=b", "", "", 400, "query_not_allowed"},
		{"empty query", "GET", "/v1/models?", "", "", 400, "query_not_allowed"},
		{"query on post", "POST", "/v1/chat/completions?x", "application/json", "", 400, "query_not_allowed"},
		{"method", "GET", "/v1/chat/completions", "", "", 405, "method_not_allowed"},
		{"options", "OPTIONS", "/v1/chat/completions", "", "", 405, "method_not_allowed"},
		{"post models", "POST", "/v1/models", "application/json", "", 405, "method_not_allowed"},
		{"body on get", "GET", "/v1/models", "application/json", "", 400, "body_not_allowed"},
		{"no type", "POST", "/v1/chat/completions", "", "", 415, "content_type"},
		{"form", "POST", "/v1/chat/completions", "application/x-www-form-urlencoded", "", 415, "content_type"},
		{"charset", "POST", "/v1/chat/completions", "application/json; charset=utf-16", "", 415, "content_type"},
		{"gzip", "POST", "/v1/chat/completions", "application/json", "gzip", 415, "content_type"},
	}
	b := start(t, func(http.ResponseWriter, *http.Request) { t.Error("the engine was asked") }, nil, nil)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			body := ""
			if test.contentType != "" || test.method == "POST" {
				body = hello
			}
			req := b.request(t, test.method, test.path, body)
			req.Header.Del("Content-Type")
			if test.contentType != "" {
				req.Header.Set("Content-Type", test.contentType)
			}
			if test.encoding != "" {
				req.Header.Set("Content-Encoding", test.encoding)
			}
			resp, answer := b.do(t, req)
			wantError(t, resp, answer, test.status, test.code)
			if test.status == 405 && resp.Header.Get("Allow") == "" {
				t.Error("no Allow")
			}
		})
	}
}

// dial opens a TLS connection and sends a request's head.
func (b *bench) dial(t testing.TB, head string) *tls.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", b.address, clientTLS())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	io.WriteString(conn, head)
	return conn
}

const postHead = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

func readResponse(t testing.TB, conn net.Conn) (*http.Response, string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	return resp, string(body)
}

func wantClosed(t testing.TB, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
		t.Errorf("the connection is still open: %v", err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// zeros is a body without an end.
type zeros struct{ read atomic.Int64 }

func (z *zeros) Read(p []byte) (int, error) {
	clear(p)
	z.read.Add(int64(len(p)))
	return len(p), nil
}

func TestHugeBody(t *testing.T) {
	for _, length := range []int64{1 << 30, -1} {
		t.Run(fmt.Sprint(length), func(t *testing.T) {
			b := start(t, nil, nil, nil)
			body := new(zeros)
			req := b.request(t, "POST", "/v1/chat/completions", "x")
			req.Body, req.ContentLength = io.NopCloser(body), length
			resp, answer := b.do(t, req)
			wantError(t, resp, answer, 413, "body_too_large")
			if !resp.Close {
				t.Error("the connection is kept")
			}
			// The limit is 1 MiB; the rest is what sockets hold.
			if read := body.read.Load(); read > 16<<20 {
				t.Errorf("%d bytes were taken", read)
			}
		})
	}
}

func TestSlowBody(t *testing.T) {
	b := start(t, nil, nil, func(s *Server) { s.bodyIdle = 100 * time.Millisecond })
	for _, head := range []string{"Content-Length: 100\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n1\r\n{"} {
		conn := b.dial(t, postHead+head)
		resp, body := readResponse(t, conn)
		wantError(t, resp, body, 408, "body_timeout")
		wantClosed(t, conn)
	}
}

// bodies is how many connections are sending a body.
func (b *bench) bodies() (n int) {
	b.waiting.mu.Lock()
	defer b.waiting.mu.Unlock()
	for _, w := range b.waiting.since {
		if w.active {
			n++
		}
	}
	return n
}

func TestSlowBodiesHoldNoPlace(t *testing.T) {
	b := start(t, answer,
		func(c *Config) { c.Limits.Concurrency = 1 },
		func(s *Server) { s.bodyTotal = 2 * time.Second })
	var conns []*tls.Conn
	for range 8 {
		conns = append(conns, b.dial(t, postHead+"Content-Length: 100\r\n\r\n{"))
	}
	agenttest.Eventually(t, "all bodies are on the way", func() bool { return b.bodies() == len(conns) })
	if b.Active() != 0 {
		t.Errorf("%d places are held", b.Active())
	}
	if resp, body := b.post(t, "/v1/chat/completions", hello); resp.StatusCode != 200 {
		t.Errorf("another client got %d %s", resp.StatusCode, body)
	}
	// A byte now and then keeps bodyIdle away, and not bodyTotal.
	stop := make(chan struct{})
	var wait sync.WaitGroup
	defer wait.Wait()
	defer close(stop)
	wait.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				io.WriteString(conns[0], " ")
			}
		}
	})
	resp, body := readResponse(t, conns[0])
	wantError(t, resp, body, 408, "body_timeout")
}

func TestBodyLimitsAreCapped(t *testing.T) {
	for _, test := range []struct {
		name                        string
		idleSeconds, totalSeconds   int
		wantBodyIdle, wantBodyTotal time.Duration
	}{
		{"long ones of the manifest", 300, 900, bodyIdle, bodyTotal},
		{"short ones of the manifest", 2, 3, 2 * time.Second, 3 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := New(Config{Limits: manifest.Limits{BodyBytes: 1, Concurrency: 1, IdleSeconds: test.idleSeconds, TotalSeconds: test.totalSeconds}})
			if s.bodyIdle != test.wantBodyIdle || s.bodyTotal != test.wantBodyTotal {
				t.Errorf("got %v and %v", s.bodyIdle, s.bodyTotal)
			}
		})
	}
}

// What was so before the body came is asked again after it.
func TestPlaceAfterBody(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*bench)
		status int
		code   string
	}{
		{"nothing changed", func(*bench) {}, 200, ""},
		{"all places taken", func(b *bench) { b.places.take(context.Background(), "other", 0, nil) }, 429, "busy"},
		{"draining", func(b *bench) { b.Drain() }, 503, "draining"},
		{"engine down", func(b *bench) { b.ready.Store(false) }, 503, "engine_not_ready"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := start(t, answer,
				func(c *Config) { c.Limits.Concurrency = 1 }, func(s *Server) { s.queueLimit = 50 * time.Millisecond })
			conn := b.dial(t, postHead+fmt.Sprintf("Content-Length: %d\r\n\r\n", len(hello)))
			agenttest.Eventually(t, "the body is on the way", func() bool { return b.bodies() == 1 })
			test.change(b)
			defer func() {
				if test.status == 429 {
					b.places.give("other")
				}
			}()
			io.WriteString(conn, hello)
			resp, body := readResponse(t, conn)
			if resp.StatusCode != test.status {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, test.status)
			}
			if test.code != "" {
				wantError(t, resp, body, test.status, test.code)
			}
		})
	}
}

func TestBodyCutOff(t *testing.T) {
	b := start(t, nil, nil, nil)
	conn := b.dial(t, postHead+"Content-Length: 100\r\n\r\n{")
	agenttest.Eventually(t, "the body is on the way", func() bool { return b.bodies() == 1 })
	conn.Close()
	agenttest.Eventually(t, "it is counted", func() bool { return b.bodies() == 0 && b.counters.Cancelled.Load() == 1 })

	conn = b.dial(t, postHead+"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n")
	resp, body := readResponse(t, conn)
	wantError(t, resp, body, 400, "body_malformed")
}

func TestBodyMemory(t *testing.T) {
	b := start(t, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 200, `{}`) },
		func(c *Config) { c.BodyMemory = 1 }, nil)
	all := b.memory.Load()
	conn := b.dial(t, postHead+"Content-Length: 1000000\r\n\r\n")
	io.WriteString(conn, strings.Repeat(" ", 999_000))
	agenttest.Eventually(t, "the memory is taken", func() bool { return b.memory.Load() < 100_000 })
	resp, body := b.post(t, "/v1/chat/completions", strings.Repeat(" ", 100_000)+hello)
	wantError(t, resp, body, 429, "busy")
	if resp, body := b.post(t, "/v1/chat/completions", hello); resp.StatusCode != 200 {
		t.Errorf("a short request got %d %s", resp.StatusCode, body)
	}
	conn.Close()
	agenttest.Eventually(t, "the memory is free", func() bool { return b.memory.Load() == all })
	if resp, body := b.post(t, "/v1/chat/completions", hello); resp.StatusCode != 200 {
		t.Errorf("got %d %s", resp.StatusCode, body)
	}
}

// What large bodies took goes back to the system when nothing else happens.
func TestBodyMemoryIsGivenBack(t *testing.T) {
	b := start(t, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 200, `{}`) },
		func(c *Config) { c.Limits.BodyBytes = 16 << 20 }, nil)
	held := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.HeapIdle - m.HeapReleased
	}
	debug.FreeOSMemory()
	before := held()
	const size = 12 << 20
	if resp, body := b.post(t, "/v1/chat/completions", strings.Repeat(" ", size)+hello); resp.StatusCode != 200 {
		t.Fatalf("got %d %s", resp.StatusCode, body)
	}
	if after := held(); after < before+size {
		t.Fatalf("the body of %d bytes took %d", size, int64(after)-int64(before))
	}
	agenttest.Eventually(t, "the memory is given back", func() bool { return held() < before+size/2 })
}

// An answer that is held comes out of the same memory; where there is none left it
// is passed on as it comes.
func TestHeldAnswerMemory(t *testing.T) {
	answer := `{"data":"` + strings.Repeat("x", maxHeld/2) + `"}`
	for _, test := range []struct {
		name string
		left int64 // of the memory
		held bool
	}{
		{"enough", 1 << 20, true},
		{"some", 32 << 10, false},
		{"none", 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			half, die := make(chan struct{}), make(chan struct{})
			b := start(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				sayJSON(w, 200, answer[:len(answer)-10])
				w.(http.Flusher).Flush()
				close(half)
				<-die
				panic(http.ErrAbortHandler)
			}, nil, func(s *Server) { s.memory.Store(test.left) })
			got := make(chan *http.Response, 1)
			go func() {
				resp, err := b.client.Do(b.request(t, "POST", "/v1/embeddings", `{"model":"chrysalis/demo","input":"x"}`))
				if err != nil {
					t.Error(err)
				}
				got <- resp
			}()
			<-half
			if test.held {
				// 16 KiB of it are free, and its buffer doubles.
				agenttest.Eventually(t, "it is counted", func() bool { return test.left-b.memory.Load() == maxHeld-freeBuffer })
			}
			close(die)
			resp := <-got
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if test.held {
				wantError(t, resp, string(body), 502, "engine_failed")
			} else if resp.StatusCode != 200 || err != io.ErrUnexpectedEOF || len(body) < freeBuffer {
				t.Errorf("got %d, %d bytes, %v", resp.StatusCode, len(body), err)
			}
			agenttest.Eventually(t, "the memory is free", func() bool { return b.memory.Load() == test.left })
		})
	}
}

// A large body is held once and copied at most by growing.
func TestLargeBodyAllocation(t *testing.T) {
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		sayJSON(w, 200, fmt.Sprintf(`{"n":%d}`, n))
	}, func(c *Config) { c.Limits.BodyBytes = 16 << 20 }, nil)
	body := messagesOf(16<<20 - 200)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	resp, answer := b.post(t, "/v1/chat/completions", body)
	runtime.ReadMemStats(&after)
	if resp.StatusCode != 200 {
		t.Fatalf("got %d %.200s", resp.StatusCode, answer)
	}
	grown := (after.TotalAlloc - before.TotalAlloc) >> 20
	t.Logf("%d MiB allocated for a body of 16 MiB, by client, agent and engine together", grown)
	if grown > 64 {
		t.Errorf("%d MiB allocated for a body of 16 MiB", grown)
	}
}

func messagesOf(size int) string {
	return `{"model":"chrysalis/demo","messages":[{"role":"user","content":"` + strings.Repeat("x", size) + `"}]}`
}

func TestEngineFailures(t *testing.T) {
	cut := func(w http.ResponseWriter) { panic(http.ErrAbortHandler) }
	tests := []struct {
		name   string
		body   string
		engine http.HandlerFunc
		status int
		code   string
		errs   int64
	}{
		{"dies at once", hello, func(w http.ResponseWriter, r *http.Request) { cut(w) }, 502, "engine_failed", 1},
		{"dies before the stream", helloStream, func(w http.ResponseWriter, r *http.Request) { cut(w) }, 502, "engine_failed", 1},
		{"dies in the answer", hello, func(w http.ResponseWriter, r *http.Request) {
			sayJSON(w, 200, `{"half":`)
			w.(http.Flusher).Flush()
			cut(w)
		}, 502, "engine_failed", 1},
		{"answers no JSON", hello, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 200, `{"half":`) }, 502, "engine_failed", 1},
		{"answers HTML", hello, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("<html>")) }, 502, "engine_failed", 1},
		{"no stream", helloStream, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 200, `{}`) }, 502, "engine_failed", 1},
		{"500", hello, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 500, `{"error":{"message":"secret"}}`) }, 502, "engine_failed", 1},
		{"404", hello, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 404, `{"error":{"message":"secret"}}`) }, 502, "engine_failed", 1},
		{"redirect", hello, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/slots", http.StatusFound) }, 502, "engine_failed", 1},
		{"400", hello, func(w http.ResponseWriter, r *http.Request) {
			sayJSON(w, 400, `{"error":{"message":"too long \u003c`+strings.Repeat("é", 2000)+`","type":"x","secret":1}}`)
		}, 400, "engine_refused", 0},
		{"400 without JSON", hello, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(400); w.Write([]byte("secret")) }, 400, "engine_refused", 0},
		{"501", hello, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 501, `{"error":{"message":"secret"}}`) }, 501, "not_supported", 1},
		{"503", hello, func(w http.ResponseWriter, r *http.Request) { sayJSON(w, 503, `{"error":{"message":"secret"}}`) }, 503, "engine_not_ready", 0},
		{"hangs", hello, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); <-r.Context().Done() }, 504, "engine_timeout", 1},
		{"hangs before the stream", helloStream, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			sayEvents(w, "")
			<-r.Context().Done()
		}, 504, "engine_timeout", 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := start(t, test.engine, nil, func(s *Server) {
				if s.idle = time.Minute; test.code == "engine_timeout" {
					s.idle = 200 * time.Millisecond
				}
			})
			resp, body := b.post(t, "/v1/chat/completions", test.body)
			wantError(t, resp, body, test.status, test.code)
			if strings.Contains(body, "secret") || len(body) > 3000 {
				t.Errorf("the engine's own words got out: %s", body)
			}
			if n := b.counters.EngineErrors.Load(); n != test.errs {
				t.Errorf("%d engine errors counted, want %d", n, test.errs)
			}
			if (resp.Header.Get("Retry-After") != "") != (test.status == 503) {
				t.Errorf("Retry-After is %q", resp.Header.Get("Retry-After"))
			}
		})
	}
}

// What the engine's socket can say that is not HTTP, or more of it than there may be.
func TestEngineBreaksHTTP(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	var answered chan struct{} // closed when the client has its answer
	long := `{"model":"chrysalis/demo","messages":[{"role":"user","content":"` + strings.Repeat("x", 1<<19) + `"}]}`
	tests := []struct {
		name   string
		body   string
		engine func(net.Conn)
		status int
		code   string
	}{
		{"nothing", hello, func(net.Conn) {}, 502, "engine_failed"},
		{"no HTTP", hello, func(conn net.Conn) { io.WriteString(conn, "hello\r\n\r\n") }, 502, "engine_failed"},
		{"half a header", hello, func(conn net.Conn) { io.WriteString(conn, ok) }, 502, "engine_failed"},
		{"an endless header", hello, func(conn net.Conn) {
			for _, err := io.WriteString(conn, ok); err == nil; {
				_, err = io.WriteString(conn, "X: "+strings.Repeat("x", 1000)+"\r\n")
			}
		}, 502, "engine_failed"},
		{"an interim answer", hello, func(conn net.Conn) {
			io.WriteString(conn, "HTTP/1.1 103 Early Hints\r\n\r\n"+ok+"Content-Length: 2\r\n\r\n{}")
		}, 502, "engine_failed"},
		{"two lengths", hello, func(conn net.Conn) {
			io.WriteString(conn, ok+"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}")
		}, 502, "engine_failed"},
		{"less than its length", hello, func(conn net.Conn) { io.WriteString(conn, ok+"Content-Length: 3\r\n\r\n{}") }, 502, "engine_failed"},
		{"a bad chunk", hello, func(conn net.Conn) {
			io.WriteString(conn, ok+"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}")
		}, 502, "engine_failed"},
		{"no length", hello, func(conn net.Conn) { io.WriteString(conn, ok+"\r\n{}") }, 200, ""},
		{"a long body refused unread", long, func(conn net.Conn) {
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")
		}, 400, "engine_refused"},
		{"a long body not read", long, func(net.Conn) { <-answered }, 504, "engine_timeout"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := start(t, nil, nil, func(s *Server) {
				if s.idle = time.Minute; test.code == "engine_timeout" {
					s.idle = 500 * time.Millisecond
				}
			})
			answered = make(chan struct{})
			defer close(answered)
			ln, err := net.Listen("unix", b.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				if test.body == hello {
					http.ReadRequest(bufio.NewReader(conn))
				}
				test.engine(conn)
			}()
			resp, body := b.post(t, "/v1/chat/completions", test.body)
			if test.status == http.StatusOK {
				if resp.StatusCode != http.StatusOK || strings.TrimSpace(body) != "{}" {
					t.Errorf("%s: %s", resp.Status, body)
				}
				return
			}
			wantError(t, resp, body, test.status, test.code)
		})
	}
}

func TestEngineAbsent(t *testing.T) {
	b := start(t, nil, nil, nil)
	resp, body := b.post(t, "/v1/chat/completions", hello)
	wantError(t, resp, body, 503, "engine_not_ready")
	if resp.Header.Get("Retry-After") == "" || b.counters.Unavailable.Load() != 1 {
		t.Errorf("Retry-After %q, %d counted", resp.Header.Get("Retry-After"), b.counters.Unavailable.Load())
	}
}

// What goes wrong in a stream is its last event; no [DONE], and the connection
// breaks off.
func TestStreamFailures(t *testing.T) {
	tests := []struct {
		name   string
		engine http.HandlerFunc
		code   string
		errs   int64
	}{
		{"dies", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, "engine_failed", 1},
		{"ends early", func(w http.ResponseWriter, r *http.Request) {}, "engine_failed", 1},
		{"no JSON", func(w http.ResponseWriter, r *http.Request) { sayEvents(w, "data: {\"a\n\ndata: [DONE]\n\n") }, "engine_failed", 1},
		{"no object", func(w http.ResponseWriter, r *http.Request) { sayEvents(w, "data: 1\n\ndata: [DONE]\n\n") }, "engine_failed", 1},
		{"bad UTF-8", func(w http.ResponseWriter, r *http.Request) {
			sayEvents(w, "data: {\"a\":\"\xff\"}\n\ndata: [DONE]\n\n")
		}, "engine_failed", 1},
		{"error event", func(w http.ResponseWriter, r *http.Request) {
			sayEvents(w, "data: {\"error\":{\"message\":\"secret\"}}\n\ndata: [DONE]\n\n")
		}, "engine_failed", 1},
		{"long line", func(w http.ResponseWriter, r *http.Request) {
			sayEvents(w, ":"+strings.Repeat("x", maxEvent+1)+"\n\n")
		}, "engine_failed", 1},
		{"hangs", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "engine_timeout", 1},
		{"never ends", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				sayEvents(w, ": still here\n\n")
				time.Sleep(10 * time.Millisecond)
			}
		}, "time_limit", 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := start(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				sayEvents(w, "data: {\"n\":1}\n\n")
				test.engine(w, r)
			}, nil, func(s *Server) {
				s.idle, s.total = time.Minute, time.Minute
				switch test.code { // the first event must come before the limit
				case "engine_timeout":
					s.idle = time.Second
				case "time_limit":
					s.total = 2 * time.Second
				}
			})
			resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", helloStream))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != io.ErrUnexpectedEOF {
				t.Errorf("the stream ended with %v", err)
			}
			first, last, _ := strings.Cut(unpadded(body), "\n\n")
			if first != `data: {"n":1}` || strings.Contains(last, "DONE") || strings.Contains(last, "secret") {
				t.Errorf("got %q", body)
			}
			payload, ok := strings.CutPrefix(strings.TrimSuffix(last, "\n\n"), "data: ")
			if !ok {
				t.Fatalf("last event: %q", last)
			}
			resp.StatusCode, resp.Header = 0, http.Header{"Content-Type": {"application/json"}}
			wantError(t, resp, payload, 0, test.code)
			if n := b.counters.EngineErrors.Load(); n != test.errs {
				t.Errorf("%d engine errors counted, want %d", n, test.errs)
			}
		})
	}
}

func TestTotalLimit(t *testing.T) {
	b := start(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); <-r.Context().Done() },
		nil, func(s *Server) { s.total = 200 * time.Millisecond })
	resp, body := b.post(t, "/v1/chat/completions", hello)
	wantError(t, resp, body, 504, "time_limit")
	if n := b.counters.EngineErrors.Load(); n != 1 {
		t.Errorf("%d engine errors counted", n)
	}
}

func TestLongAnswer(t *testing.T) {
	long := `{"data":"` + strings.Repeat("x", 3*maxHeld) + `"}`
	die := atomic.Bool{}
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if die.Load() {
			sayJSON(w, 200, long[:2*maxHeld])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		sayJSON(w, 200, long)
	}, nil, nil)
	if resp, body := b.post(t, "/v1/embeddings", `{"model":"chrysalis/demo","input":"x"}`); resp.StatusCode != 200 || body != long {
		t.Errorf("got %d and %d bytes of %d", resp.StatusCode, len(body), len(long))
	}
	die.Store(true)
	resp, err := b.client.Do(b.request(t, "POST", "/v1/embeddings", `{"model":"chrysalis/demo","input":"x"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != io.ErrUnexpectedEOF {
		t.Errorf("an answer that the engine broke off ends with %v", err)
	}
}

func TestClientHangsUp(t *testing.T) {
	for _, stream := range []bool{false, true} {
		t.Run(fmt.Sprint("stream=", stream), func(t *testing.T) {
			begun, cancelled := make(chan struct{}), make(chan struct{})
			b := start(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if stream {
					sayEvents(w, "data: {}\n\n")
				}
				close(begun)
				<-r.Context().Done() // and not a byte flows
				close(cancelled)
			}, nil, nil)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			body := hello
			if stream {
				body = helloStream
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", body).WithContext(ctx))
				if err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			}()
			<-begun
			at := time.Now()
			cancel()
			select {
			case <-cancelled:
				t.Logf("the engine saw it after %v", time.Since(at))
			case <-time.After(5 * time.Second):
				t.Fatal("the engine goes on")
			}
			<-done
			agenttest.Eventually(t, "it is counted", func() bool { return b.counters.Cancelled.Load() == 1 && b.Active() == 0 })
			if n := b.counters.EngineErrors.Load(); n != 0 {
				t.Errorf("%d engine errors counted", n)
			}
		})
	}
}

func TestBusy(t *testing.T) {
	release := make(chan struct{})
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-release
		sayJSON(w, 200, `{}`)
	}, func(c *Config) { c.Limits.Concurrency = 2 }, func(s *Server) { s.queueLimit = time.Minute })
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() { b.post(t, "/v1/chat/completions", hello) })
	}
	agenttest.Eventually(t, "all places and all turns are taken", func() bool {
		return b.Active() == 2 && b.counters.Active.Load() == 2 && b.queued() == 2
	})
	// Its body never comes, and it is refused all the same.
	conn := b.dial(t, postHead+"Content-Length: 100\r\n\r\n")
	resp, body := readResponse(t, conn)
	wantError(t, resp, body, 429, "busy")
	if resp.Header.Get("Retry-After") != "1" || b.counters.Busy.Load() != 1 {
		t.Errorf("Retry-After %q, %d counted", resp.Header.Get("Retry-After"), b.counters.Busy.Load())
	}
	wantClosed(t, conn)
	close(release)
	wait.Wait()
	if resp, _ := b.post(t, "/v1/chat/completions", hello); resp.StatusCode != 200 {
		t.Errorf("a free place was refused: %d", resp.StatusCode)
	}
}

func TestNotReadyAndDraining(t *testing.T) {
	release := make(chan struct{})
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-release
		sayJSON(w, 200, `{}`)
	}, nil, nil)
	b.ready.Store(false)
	resp, body := b.post(t, "/v1/chat/completions", hello)
	wantError(t, resp, body, 503, "engine_not_ready")
	if resp.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	b.ready.Store(true)
	last := make(chan int, 1)
	go func() {
		resp, _ := b.post(t, "/v1/chat/completions", hello)
		last <- resp.StatusCode
	}()
	agenttest.Eventually(t, "a request is in the engine", func() bool { return b.Active() == 1 })
	b.Drain()
	for _, req := range []*http.Request{
		b.request(t, "POST", "/v1/chat/completions", hello),
		b.request(t, "GET", "/v1/models", ""),
	} {
		resp, body = b.do(t, req)
		wantError(t, resp, body, 503, "draining")
		if !resp.Close {
			t.Error("the connection is kept")
		}
	}
	close(release)
	if err := b.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if got := <-last; got != 200 {
		t.Errorf("the last request got %d", got)
	}
}

func TestPanicIsContained(t *testing.T) {
	for _, test := range []struct {
		name   string
		config func(*Config)
	}{
		{"in a request", func(c *Config) { c.Ready = func() bool { panic("secret") } }},
		// On a goroutine of net/http's, where it would end the process.
		{"while dialling", func(c *Config) { c.Engine = func(context.Context, int) (net.Conn, error) { panic("secret") } }},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := start(t, nil, test.config, nil)
			before := port.Bugs.Load()
			resp, body := b.post(t, "/v1/chat/completions", hello)
			wantError(t, resp, body, 500, "internal")
			if n := port.Bugs.Load() - before; n != 1 || strings.Contains(body, "secret") {
				t.Errorf("%s, %d counted", body, n)
			}
			if n := b.counters.EngineErrors.Load(); n != 0 {
				t.Errorf("%d engine errors counted", n)
			}
		})
	}
}

func TestTransport(t *testing.T) {
	const limit = 300 * time.Millisecond
	b := start(t, nil, nil, nil)
	hasty := start(t, nil, nil, func(s *Server) { s.http.HeaderLimit = limit })

	t.Run("plain HTTP", func(t *testing.T) {
		conn, err := net.Dial("tcp", b.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, body := readResponse(t, conn)
		if resp.StatusCode != 400 || !strings.Contains(body, "HTTPS") {
			t.Errorf("got %d %q", resp.StatusCode, body)
		}
		wantClosed(t, conn)
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		config := clientTLS()
		config.MaxVersion = tls.VersionTLS12
		_, err := tls.Dial("tcp", b.address, config)
		if err == nil || !strings.Contains(err.Error(), "remote error: tls: protocol version not supported") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("HTTP/2 only", func(t *testing.T) {
		config := clientTLS()
		config.NextProtos = []string{"h2"}
		_, err := tls.Dial("tcp", b.address, config)
		if err == nil || !strings.Contains(err.Error(), "remote error: tls: no application protocol") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no ticket", func(t *testing.T) {
		config := clientTLS()
		config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for range 2 {
			conn, err := tls.Dial("tcp", b.address, config)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
			readResponse(t, conn)
			if conn.ConnectionState().DidResume {
				t.Error("the session was resumed")
			}
			conn.Close()
		}
	})
	for name, first := range map[string]string{"silent": "", "half a handshake": "\x16\x03\x01\x01\x00"} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", hasty.address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, first)
			wantClosed(t, conn)
		})
	}
	for name, first := range map[string]string{"silent after the handshake": "", "half a header": "GET /v1/models HTTP/1.1\r\nHo"} {
		t.Run(name, func(t *testing.T) {
			// The handshake has the same limit. One that was cut off at it is tried again.
			for {
				at := time.Now()
				conn, err := tls.Dial("tcp", hasty.address, clientTLS())
				if err == nil {
					defer conn.Close()
					io.WriteString(conn, first)
					wantClosed(t, conn)
					return
				}
				if took := time.Since(at); took < limit {
					t.Fatalf("after %v: %v", took, err)
				}
			}
		})
	}
	t.Run("long header", func(t *testing.T) {
		conn := b.dial(t, "GET /v1/models HTTP/1.1\r\nHost: x\r\nA: "+strings.Repeat("a", maxHeader)+"\r\n\r\n")
		if resp, _ := readResponse(t, conn); resp.StatusCode != 431 {
			t.Errorf("got %d", resp.StatusCode)
		}
	})
}

// Connections that do nothing, and requests that do not arrive, shut nobody out; a
// request in the engine keeps its connection.
func TestConnectionLimit(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		close(begun)
		<-release
		sayJSON(w, 200, `{}`)
	}, func(c *Config) { c.Limits.Concurrency = 1 }, nil)
	inEngine := b.dial(t, postHead+fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(hello), hello))
	<-begun
	idle := b.dial(t, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
	readResponse(t, idle)
	agenttest.Eventually(t, "it idles", func() bool { return b.bodies() == 0 })
	const spare = spareConnections // one has a place, one may queue, one idles
	fill := func() (conns []net.Conn) {
		for range spare {
			conn, err := net.Dial("tcp", b.address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			conns = append(conns, conn)
		}
		return conns
	}
	silent := fill()
	agenttest.Eventually(t, "all are in", func() bool { return b.counters.Connections.Load() == 2+spareConnections })
	another := b.dial(t, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := readResponse(t, another); resp.StatusCode != 200 {
		t.Errorf("one that has something to ask got %d", resp.StatusCode)
	}
	wantClosed(t, idle)
	// A flood of new ones closes the older ones.
	fill()
	wantClosed(t, silent[0])
	wantClosed(t, silent[spare-1])
	close(release)
	if resp, body := readResponse(t, inEngine); resp.StatusCode != 200 {
		t.Errorf("the request in the engine got %d %s", resp.StatusCode, body)
	}
}

type fakeConn struct {
	net.Conn
	closed bool
}

func (c *fakeConn) Close() error { c.closed = true; return nil }

func TestWaiting(t *testing.T) {
	w := waiting{since: map[net.Conn]wait{}}
	w.closeOne() // nobody waits
	conns := make([]*fakeConn, 5)
	for i, state := range []http.ConnState{http.StateActive, http.StateIdle, http.StateNew, http.StateActive, http.StateIdle} {
		conns[i] = new(fakeConn)
		w.state(conns[i], http.StateNew)
		w.state(conns[i], state)
		time.Sleep(time.Millisecond)
	}
	w.done(conns[4])                         // has a place
	w.state(conns[1], http.StateIdle)        // has just asked something
	for _, want := range []int{2, 1, 0, 3} { // those without a request first
		if conns[want].closed {
			t.Errorf("%d was closed before its turn", want)
		}
		w.closeOne()
		if !conns[want].closed {
			t.Errorf("%d was not closed", want)
		}
	}
	w.closeOne()
	if conns[4].closed {
		t.Error("one with a place was closed")
	}
	w.state(conns[4], http.StateIdle)
	w.state(conns[4], http.StateClosed)
	if len(w.since) != 0 {
		t.Errorf("it remembers %d", len(w.since))
	}
}

// Every error is counted once.
func TestCountErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		err  *apiError
		want guest.CounterTable
		bugs int64
	}{
		{"refused", errPath, guest.CounterTable{Refused: 1}, 0},
		{"busy", errBusy, guest.CounterTable{Busy: 1}, 0},
		{"memory", errMemory, guest.CounterTable{Busy: 1}, 0},
		{"draining", errDraining, guest.CounterTable{Unavailable: 1}, 0},
		{"engine failed", errEngineFailed, guest.CounterTable{EngineErrors: 1}, 0},
		{"engine silent", errEngineSilent, guest.CounterTable{EngineErrors: 1}, 0},
		{"engine too slow", errTotal, guest.CounterTable{EngineErrors: 1}, 0},
		{"not supported", errNotSupported, guest.CounterTable{EngineErrors: 1}, 0},
		{"answer too long", errAnswerTooLong, guest.CounterTable{EngineErrors: 1}, 0},
		{"internal", errInternal, guest.CounterTable{}, 1},
		{"the engine's own refusal", &apiError{status: 400, engine: true}, guest.CounterTable{}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := port.Bugs.Load()
			var c Counters
			var got guest.CounterTable
			c.count(test.err)
			c.Fill(&got)
			if bugs := port.Bugs.Load() - before; got != test.want || bugs != test.bugs {
				t.Errorf("got %+v, %d bugs", got, bugs)
			}
		})
	}
}

// A client that does not read cannot hold its place for longer than the idle
// limit, nor past the end of its request.
func TestClientDoesNotRead(t *testing.T) {
	event := "data: {\"x\":\"" + strings.Repeat("y", 100<<10) + "\"}\n\n"
	for _, test := range []struct {
		name        string
		idle, total time.Duration
	}{
		{"idle", time.Second, time.Hour}, // in which the first event must come
		{"total", time.Hour, time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := start(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				for r.Context().Err() == nil {
					sayEvents(w, event)
				}
			}, nil, func(s *Server) { s.idle, s.total = test.idle, test.total })
			b.record.buffer.Store(4 << 10) // with the client's too small for the first event
			conn := b.dial(t, postHead+fmt.Sprintf("Content-Length: %d\r\n\r\n", len(helloStream)))
			conn.NetConn().(*net.TCPConn).SetReadBuffer(4 << 10)
			io.WriteString(conn, helloStream)
			agenttest.Eventually(t, "it lost its place", func() bool { return b.counters.Cancelled.Load() == 1 && b.Active() == 0 })
		})
	}
}

func TestEndlessAnswer(t *testing.T) {
	event := "data: {\"x\":\"" + strings.Repeat("y", 200<<10) + "\"}\n\n"
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		for r.Context().Err() == nil {
			sayEvents(w, event)
		}
	}, nil, func(s *Server) { s.tick = time.Millisecond })
	resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", helloStream))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var tail bytes.Buffer
	n, err := io.Copy(&tail, resp.Body)
	if n > maxAnswer*17/16 || // with padding
		err != io.ErrUnexpectedEOF || !strings.Contains(tail.String()[n-minSlot:], "answer_too_large") {
		t.Errorf("%d bytes, then %v", n, err)
	}
}

// The chunk limit is checked in every test's clean-up; here there is much to
// write.
func TestChunks(t *testing.T) {
	event := "data: {\"x\":\"" + strings.Repeat("y", 100<<10) + "\"}\n\n"
	b := start(t, func(w http.ResponseWriter, r *http.Request) { sayEvents(w, event+"data: [DONE]\n\n") }, nil, nil)
	resp, body := b.post(t, "/v1/chat/completions", helloStream)
	if resp.StatusCode != 200 || unpadded([]byte(body)) != event+"data: [DONE]\n\n" {
		t.Errorf("got %d, %d bytes", resp.StatusCode, len(body))
	}
	if total, longest := b.record.total.Load(), b.record.longest.Load(); total < 100<<10 || longest != guest.MaxChunk {
		t.Errorf("%d bytes written, at most %d at once", total, longest)
	}
}

func TestCountersFill(t *testing.T) {
	c := new(Counters)
	c.Cancelled.Store(3)
	table := guest.CounterTable{EngineRestarts: 2}
	c.Fill(&table)
	if table.Cancelled != 3 || table.EngineRestarts != 2 {
		t.Errorf("got %+v", table)
	}
}

// withBody are the routes that take a body, chat completions first.
var withBody = slices.DeleteFunc(slices.Clone(routes), func(rt route) bool { return rt.fields == nil })

func FuzzParse(f *testing.F) {
	f.Add(0, []byte(hello))
	f.Add(0, []byte(`{"model":"chrysalis/demo","messages":[{"role":"user","content":[{"type":"text","text":"\ud83d\ude00"}]}],"tools":[{"type":"function","function":{"a":[1]}}],"logit_bias":{"1":-1e1},"stop":["a"],"n":1}`))
	f.Add(1, []byte(`{"model":"chrysalis/demo@1","prompt":["x"],"max_tokens":5, "stream" : true}`))
	f.Add(2, []byte(`{"model":"other/model","input":["a","b"]}`))
	f.Add(0, []byte(`{"a\"":1,"b":[[["\\"]]],"c":{"d":{}}}`))
	names := map[string]string{"chrysalis/demo": "chrysalis/demo", "chrysalis/demo@1": "chrysalis/demo", "other/model": "other/model"}
	f.Fuzz(func(t *testing.T, which int, body []byte) {
		rt := &withBody[uint(which)%uint(len(withBody))]
		req, apiErr := parse(rt, names, body)
		if apiErr != nil {
			if !json.Valid(apiErr.body()) || apiErr.status < 400 || apiErr.status > 499 {
				t.Errorf("error %+v", apiErr)
			}
			return
		}
		pieces, length := req.encode()
		var out bytes.Buffer
		pieces.WriteTo(&out)
		if int64(out.Len()) != length {
			t.Errorf("length is %d, said %d", out.Len(), length)
		}
		// Whoever reads the two texts with encoding/json sees the same values, but
		// for what is meant to differ.
		var sent, got map[string]json.RawMessage
		if err := json.Unmarshal(body, &got); err != nil {
			t.Fatalf("accepted %q: %v", body, err)
		}
		if err := json.Unmarshal(out.Bytes(), &sent); err != nil {
			t.Fatalf("sent %q: %v", out.Bytes(), err)
		}
		if string(sent["cache_prompt"]) != "false" {
			t.Errorf("sent %q", out.Bytes())
		}
		delete(sent, "cache_prompt")
		for name, value := range sent {
			if name == "model" || name == "stream_options" && string(value) == string(alwaysUsage) {
				continue
			}
			original, ok := got[name]
			if !ok && name == "max_tokens" {
				original = got["max_completion_tokens"]
			}
			if !bytes.Equal(bytes.TrimSpace(original), value) {
				t.Errorf("%s: sent %q, got %q", name, value, original)
			}
		}
		if again, apiErr := parse(rt, names, bytes.Replace(out.Bytes(), []byte(constants), []byte("}"), 1)); apiErr != nil || again.stream != req.stream {
			t.Errorf("what was sent is not accepted: %v", apiErr)
		}
	})
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte("data: {\"a\":1}\n\n: x\ndata:{\ndata:}\r\n\r\ndata: [DONE]\n\n"))
	f.Add([]byte("event: a\ndata\ndata:\n\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		stream := newEvents(bytes.NewReader(raw))
		for {
			event, err := stream.next()
			if err != nil {
				return
			}
			if bytes.Equal(event, doneEvent) {
				continue
			}
			if !json.Valid(event) || event[0] != '{' || bytes.ContainsAny(event, "\r\n") || len(event) > maxEvent {
				t.Errorf("let through %q", event)
			}
		}
	})
}

// BenchmarkRequest is what the agent adds: the same request to the fake engine
// directly, and through TLS and the agent. The difference is the agent's cost and
// that of the client's TLS.
func BenchmarkRequest(b *testing.B) {
	answer := `{"choices":[{"message":{"content":"` + strings.Repeat("word ", 100) + `"}}]}`
	var events strings.Builder
	for range 100 {
		events.WriteString("data: {\"choices\":[{\"delta\":{\"content\":\"word \"}}]}\n\n")
	}
	events.WriteString("data: [DONE]\n\n")
	engine := func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte(`"stream":true`)) {
			w.Header().Set("Content-Type", "text/event-stream")
			for event := range strings.SplitAfterSeq(events.String(), "\n\n") {
				io.WriteString(w, event)
				w.(http.Flusher).Flush()
			}
			return
		}
		sayJSON(w, 200, answer)
	}
	s := start(b, engine, nil, nil)
	direct := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.socket)
	}}}
	defer direct.CloseIdleConnections()
	for _, body := range []struct{ name, text string }{{"whole", hello}, {"stream100", helloStream}} {
		for _, via := range []struct {
			name   string
			client *http.Client
			url    string
		}{
			{"direct", direct, "http://engine"},
			{"agent", s.client, "https://" + s.address},
		} {
			b.Run(body.name+"/"+via.name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					resp, err := via.client.Post(via.url+"/v1/chat/completions", "application/json", strings.NewReader(body.text))
					if err != nil {
						b.Fatal(err)
					}
					if n, err := io.Copy(io.Discard, resp.Body); err != nil || n == 0 || resp.StatusCode != 200 {
						b.Fatal(resp.StatusCode, n, err)
					}
					resp.Body.Close()
				}
			})
		}
	}
}

func BenchmarkParse16MiB(b *testing.B) {
	body := []byte(messagesOf(16<<20 - 200))
	names := map[string]string{"chrysalis/demo": "chrysalis/demo"}
	b.ReportAllocs()
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if _, err := parse(&withBody[0], names, body); err != nil {
			b.Fatal(err)
		}
	}
}
