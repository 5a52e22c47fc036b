package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/attest/receipt"
)

// client talks to a VM's endpoint. Evidence is another test's matter, so any key
// will do here.
type client struct {
	t        *testing.T
	endpoint string
	http     *http.Client
}

func newClient(t *testing.T, endpoint string) *client {
	return &client{t, endpoint, &http.Client{
		Timeout:   2 * time.Minute,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
	}}
}

// send sends a request and returns the status and up to 1 MiB of the body.
func (c *client) send(method, path string, body io.Reader) (*http.Response, string) {
	c.t.Helper()
	req, err := http.NewRequest(method, c.endpoint+path, body)
	if err != nil {
		c.t.Fatal(err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		c.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp, string(data)
}

func question(text string, stream bool) io.Reader {
	data, err := json.Marshal(map[string]any{
		"model": "chrysalis/demo", "stream": stream, "temperature": 0, "max_tokens": 96,
		"messages": []map[string]string{{"role": "user", "content": text}},
	})
	if err != nil {
		panic(err)
	}
	return bytes.NewReader(data)
}

// guestStatus is what the launcher says of the VM.
func (h *host) guestStatus() (status struct {
	Counters map[string]int64 `json:"counters"`
	Phases   []struct {
		Name string `json:"name"`
		MS   int64  `json:"ms"`
	} `json:"phases"`
	KernelMS int64 `json:"kernel_ms"`
}) {
	h.t.Helper()
	r := h.run(time.Minute, "status", "--json")
	var vms []struct {
		Guest json.RawMessage `json:"guest"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &vms); err != nil || len(vms) != 1 {
		h.t.Fatalf("status: %v: %s", err, r)
	}
	if err := json.Unmarshal(vms[0].Guest, &status); err != nil {
		h.t.Fatalf("status: %v: %s", err, r)
	}
	return status
}

// TestClients boots the real engine with the demo model once and lets all sorts
// of clients at it, good ones and bad ones.
func TestClients(t *testing.T) {
	h := newHost(t)
	endpoint := h.up("--engine", llama, "--model", demo, "--parameter", "embeddings=1")
	address := strings.TrimPrefix(endpoint, "https://")
	c := newClient(t, endpoint)

	console := h.run(time.Minute, "logs", "--console").stdout
	t.Cleanup(func() { // after the parallel subtests
		if r := h.run(time.Minute, "down"); r.code != 0 {
			t.Errorf("down: %s", r)
		}
		if after := h.run(time.Minute, "logs", "--console").stdout; after != console || strings.Contains(after, "agent:") {
			t.Errorf("the VM wrote to the console after the kernel had started PID 1:\n%s", strings.TrimPrefix(after, console))
		}
	})

	t.Run("the engine's log is readable until the first client", func(t *testing.T) {
		r := h.run(time.Minute, "logs", "--engine")
		if !strings.Contains(r.stdout, "model loaded") {
			t.Errorf("the engine's log has no line about the model: %s", r)
		}
	})
	t.Run("answer", func(t *testing.T) {
		resp, body := c.send("POST", "/v1/chat/completions", question("Who can read my prompt?", false))
		if resp.StatusCode != 200 || !strings.Contains(body, "prompt") {
			t.Errorf("%s: %s", resp.Status, body)
		}
	})
	t.Run("the engine's log is closed after it", func(t *testing.T) {
		if r := h.run(time.Minute, "logs", "--engine"); strings.Contains(r.stdout, "POST") || strings.Contains(r.stdout, "prompt") {
			t.Errorf("the engine's log speaks of requests:\n%s", r.stdout)
		}
	})
	t.Run("stream", func(t *testing.T) {
		resp, body := c.send("POST", "/v1/chat/completions", question("What is measured?", true))
		events, _, err := receipt.SplitStream([]byte(body))
		if err != nil || resp.StatusCode != 200 || strings.Count(body, "data: ") < 5 || !strings.Contains(string(events), "data: [DONE]\n\n:") {
			t.Errorf("%s: %v: %s", resp.Status, err, body)
		}
	})
	t.Run("models", func(t *testing.T) {
		resp, body := c.send("GET", "/v1/models", nil)
		if resp.StatusCode != 200 || !strings.Contains(body, describe(t, demo).RootHash.String()) {
			t.Errorf("%s: %s", resp.Status, body)
		}
	})
	t.Run("embeddings", func(t *testing.T) {
		resp, body := c.send("POST", "/v1/embeddings", strings.NewReader(`{"model":"chrysalis/demo","input":"hi"}`))
		if resp.StatusCode != 200 || !strings.Contains(body, `"embedding"`) {
			t.Errorf("%s: %s", resp.Status, body)
		}
	})
	t.Run("what a relay sees", func(t *testing.T) { relaySees(t, address) })
	t.Run("nothing is kept between clients", func(t *testing.T) { nothingKept(t, endpoint) })
	t.Run("a verifying client", func(t *testing.T) { verified(t, h, endpoint) })

	for _, r := range []struct {
		name, method, path string
		body               io.Reader
		status             int
	}{
		{"path not allowed", "GET", "/slots", nil, 404},
		{"engine's own path", "POST", "/completion", strings.NewReader("{}"), 404},
		{"path that climbs", "GET", "/v1/../health", nil, 404},
		{"method not allowed", "DELETE", "/v1/models", nil, 405},
		{"field of the engine", "POST", "/v1/chat/completions", strings.NewReader(
			`{"model":"chrysalis/demo","id_slot":0,"messages":[{"role":"user","content":"hi"}]}`), 400},
		{"unknown model", "POST", "/v1/chat/completions", strings.NewReader(
			`{"model":"gpt-4","messages":[{"role":"user","content":"hi"}]}`), 404},
		{"not JSON", "POST", "/v1/chat/completions", strings.NewReader("hello"), 400},
	} {
		t.Run(r.name, func(t *testing.T) {
			resp, body := c.send(r.method, r.path, r.body)
			if resp.StatusCode != r.status || !strings.Contains(body, `"error"`) {
				t.Errorf("%s, expected %d: %s", resp.Status, r.status, body)
			}
		})
	}

	t.Run("1 GB body", func(t *testing.T) {
		// Endless zeros: what counts is that the answer comes long before them.
		sent := &counter{Reader: io.LimitReader(zeros{}, 1<<30)}
		req, err := http.NewRequest("POST", endpoint+"/v1/chat/completions", sent)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.ContentLength = 1 << 30
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		resp.Body.Close()
		if resp.StatusCode != 413 {
			t.Errorf("%s, expected 413", resp.Status)
		}
		if sent.n > 64<<20 {
			t.Errorf("the VM took %d bytes of it", sent.n)
		}
	})
	t.Run("chunked body without end", func(t *testing.T) {
		sent := &counter{Reader: io.LimitReader(zeros{}, 1<<30)}
		req, err := http.NewRequest("POST", endpoint+"/v1/chat/completions", sent)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.ContentLength = -1
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		resp.Body.Close()
		if resp.StatusCode != 413 && resp.StatusCode != 400 { // zeros are no JSON either
			t.Errorf("%s, expected 413", resp.Status)
		}
		if sent.n > 64<<20 {
			t.Errorf("the VM took %d bytes of it", sent.n)
		}
	})
	t.Run("plain HTTP", func(t *testing.T) {
		conn := dial(t, address)
		fmt.Fprint(conn, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 400 {
			t.Errorf("%v %v, expected a 400", resp, err)
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		conn := tls.Client(dial(t, address), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
		err := conn.Handshake()
		if err == nil || !strings.Contains(err.Error(), "protocol version") {
			t.Errorf("handshake: %v, expected a protocol version alert", err)
		}
	})
	t.Run("silent client", func(t *testing.T) {
		t.Parallel()
		conn := dial(t, address)
		conn.SetReadDeadline(time.Now().Add(2 * time.Minute))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a client that sends nothing was not hung up on: %v", err)
		}
	})
	t.Run("silent after the handshake", func(t *testing.T) {
		t.Parallel()
		conn := tls.Client(dial(t, address), &tls.Config{InsecureSkipVerify: true})
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(4 * time.Minute))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a client that asks nothing was not hung up on: %v", err)
		}
	})
	t.Run("bodies that never come hold up nobody", func(t *testing.T) {
		for range 12 { // more than are served at a time
			conn := tls.Client(dial(t, address), &tls.Config{InsecureSkipVerify: true})
			fmt.Fprint(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
		}
		time.Sleep(time.Second)
		if resp, body := c.send("POST", "/v1/chat/completions", question("What is a TD?", false)); resp.StatusCode != 200 {
			t.Errorf("%s: %s", resp.Status, body)
		}
	})
	t.Run("more at once than are served", func(t *testing.T) {
		busy := 0
		answers := make(chan *http.Response, 24)
		for range cap(answers) {
			go func() {
				req, _ := http.NewRequest("POST", endpoint+"/v1/chat/completions", question("Tell me about Chrysalis.", false))
				req.Header.Set("Content-Type", "application/json")
				resp, err := c.http.Do(req)
				if err != nil {
					t.Error(err)
				} else {
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				answers <- resp
			}()
		}
		for range cap(answers) {
			resp := <-answers
			switch {
			case resp == nil:
			case resp.StatusCode == 429 && resp.Header.Get("Retry-After") != "":
				busy++
			case resp.StatusCode != 200:
				t.Errorf("%s, expected 200 or 429 with Retry-After", resp.Status)
			}
		}
		if busy == 0 {
			t.Error("24 requests at once were all admitted, the limit is 8")
		}
	})
	t.Run("the agent's memory", func(t *testing.T) {
		// Large bodies may take more for a moment; afterwards it is given back.
		var rss int64
		for range 30 {
			if rss = h.guestStatus().Counters["agent_rss_kib"]; rss > 0 && rss <= 30<<10 {
				return
			}
			time.Sleep(time.Second)
		}
		t.Errorf("the agent takes %d KiB of memory, at most 30 MB are allowed", rss)
	})
}

// openaiClient runs npm's openai, unmodified, against a base URL.
func openaiClient(t *testing.T, base string) {
	if _, err := exec.LookPath("npm"); err != nil {
		if os.Getenv("CHRYSALIS_REQUIRE_VM") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.ReadFile("openai/package-lock.json")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "chrysalis", "npm", fmt.Sprintf("%08x", checksum(lock)))
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "openai")); err != nil {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"package.json", "package-lock.json"} {
			data, err := os.ReadFile(filepath.Join("openai", name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("npm ci: %v\n%s", err, out)
		}
	}
	script, err := os.ReadFile("openai/client.mjs")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "client.mjs"), script, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", "client.mjs", base)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openai client: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// TestEngineDies kills the engine from the inside, while it streams.
func TestEngineDies(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	endpoint := h.up("--engine", testEngine(t, "serve"), "--model", demo)
	c := newClient(t, endpoint)

	t.Run("answer", func(t *testing.T) {
		if resp, body := c.send("POST", "/v1/chat/completions", question("hello", true)); resp.StatusCode != 200 || !strings.Contains(body, "[DONE]") {
			t.Fatalf("%s: %s", resp.Status, body)
		}
	})
	t.Run("client disconnects mid-stream", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, "POST", endpoint+"/v1/chat/completions", question("stall", true))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 64)); err != nil {
			t.Fatal(err)
		}
		cancel()
		resp.Body.Close()
		for range 100 {
			if s := h.guestStatus(); s.Counters["active"] == 0 && s.Counters["cancelled"] == 1 {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Errorf("the generation was not cancelled: %v", h.guestStatus().Counters)
	})
	t.Run("the engine dies mid-stream and comes back", func(t *testing.T) {
		resp, body := c.send("POST", "/v1/chat/completions", question("die", true))
		if resp.StatusCode != 200 || !strings.Contains(body, "engine_failed") || strings.Contains(body, "[DONE]") {
			t.Errorf("%s: %s", resp.Status, body)
		}
		unavailable := 0
		for range 300 {
			resp, body := c.send("POST", "/v1/chat/completions", question("hello", false))
			switch {
			case resp.StatusCode == 200:
				if n := metric(t, h.ports(), "engine_restarts_total"); n != 1 {
					t.Errorf("%d restarts, expected 1", n)
				}
				t.Logf("%d requests got 503 meanwhile", unavailable)
				return
			case resp.StatusCode == 503 && resp.Header.Get("Retry-After") != "":
				unavailable++
			default:
				t.Fatalf("%s: %s", resp.Status, body)
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Error("the engine did not come back")
	})
	t.Run("an engine that keeps dying ends the VM", func(t *testing.T) {
		deadline := time.Now().Add(4 * time.Minute)
		for time.Now().Before(deadline) {
			req, err := http.NewRequest("POST", endpoint+"/v1/chat/completions", question("die", true))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			resp, err := c.http.Do(req)
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			if r := h.run(time.Minute, "status", "--json"); strings.Contains(r.stdout, `"engine-failing"`) && strings.Contains(r.stdout, `"ended"`) {
				h.noProcesses()
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
		t.Errorf("the VM goes on: %s", h.run(time.Minute, "status"))
	})
}

// TestSideBySide runs two VMs of different names, one of them with the debug
// image, which talks.
func TestSideBySide(t *testing.T) {
	t.Parallel()
	debug := filepath.Join(filepath.Dir(uki), "chrysalis-debug.efi")
	if _, err := os.Stat(debug); err != nil {
		t.Fatalf("%v; run 'make image' first", err)
	}
	h := newHost(t)
	engine := testEngine(t, "serve")
	one := h.up("one", "--engine", engine, "--model", demo)
	two := h.up("two", "--image", debug, "--engine", engine, "--model", demo)
	for _, endpoint := range []string{one, two} {
		if resp, body := newClient(t, endpoint).send("POST", "/v1/chat/completions", question("hello", false)); resp.StatusCode != 200 {
			t.Errorf("%s: %s: %s", endpoint, resp.Status, body)
		}
	}
	r := h.run(time.Minute, "logs", "two", "--console")
	if !strings.Contains(r.stdout, "agent: phase serve") || !strings.Contains(r.stdout, "Linux version") {
		t.Errorf("the debug image's console lacks the agent's log or the kernel's:\n%s", r.stdout)
	}
	if strings.Contains(r.stdout, "hello") {
		t.Errorf("the debug image's console holds a prompt:\n%s", r.stdout)
	}
	if r := h.run(time.Minute, "down", "two"); r.code != 0 {
		t.Errorf("down: %s", r)
	}
	if resp, body := newClient(t, one).send("GET", "/v1/models", nil); resp.StatusCode != 200 {
		t.Errorf("the other VM: %s: %s", resp.Status, body)
	}
}

// TestLifecycle replaces a running VM, then takes it down, and recovers from a
// supervisor that was killed.
func TestLifecycle(t *testing.T) {
	h := newHost(t)
	engine := testEngine(t, "serve")
	endpoint := h.up("--engine", engine, "--model", demo)
	address := strings.TrimPrefix(endpoint, "https://")

	r := h.run(time.Minute, "up", "--image", uki, "--engine", engine, "--model", demo)
	if r.code == 0 || !strings.Contains(r.stderr, "--replace") {
		t.Errorf("a second VM of the same name: %s", r)
	}
	r = h.run(time.Minute, "up", "other", "--listen", address, "--image", uki, "--engine", engine, "--model", demo)
	if r.code == 0 || !strings.Contains(r.stderr, address) {
		t.Errorf("a second VM on the same address: %s", r)
	}

	// A request that runs across the replacement keeps its connection, and the
	// address never refuses one.
	stalled, err := newClient(t, endpoint).http.Post(endpoint+"/v1/chat/completions", "application/json", question("stall", true))
	if err != nil {
		t.Fatal(err)
	}
	defer stalled.Body.Close()
	refused := make(chan int)
	stop := make(chan struct{})
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				refused <- n
				return
			case <-time.After(50 * time.Millisecond):
				conn, err := net.Dial("tcp", address)
				if err != nil {
					n++
				} else {
					conn.Close()
				}
			}
		}
	}()
	r = h.run(5*time.Minute, "up", "--replace", "--drain", "5s", "--timeout", "4m", "--image", uki, "--engine", engine, "--model", demo)
	close(stop)
	if n := <-refused; n > 0 {
		t.Errorf("%d connections were refused during the replacement", n)
	}
	if r.code != 0 || strings.TrimSpace(r.stdout) != endpoint {
		t.Fatalf("up --replace: %s", r)
	}
	if resp, body := newClient(t, endpoint).send("POST", "/v1/chat/completions", question("hello", false)); resp.StatusCode != 200 {
		t.Errorf("the new VM: %s: %s", resp.Status, body)
	}

	// Everything of a VM dies with its supervisor, and what it left is no obstacle.
	var vms []struct{ PID int }
	r = h.run(time.Minute, "status", "default", "--json")
	if err := json.Unmarshal([]byte(r.stdout), &vms); err != nil || len(vms) != 1 {
		t.Fatalf("status: %v: %s", err, r)
	}
	p, err := os.FindProcess(vms[0].PID)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	h.noProcesses()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		// A process lets go of its locks a moment after it has lost its memory.
		if r = h.run(time.Minute, "status", "default"); strings.Contains(r.stdout, "failed") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("status after a kill: %s", r)
		}
	}
	h.up("--engine", engine, "--model", demo)
	if r := h.run(time.Minute, "down"); r.code != 0 {
		t.Errorf("down: %s", r)
	}
	h.noProcesses()
}

func dial(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

type counter struct {
	io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

func checksum(data []byte) uint32 {
	h := uint32(2166136261)
	for _, b := range data {
		h = (h ^ uint32(b)) * 16777619
	}
	return h
}
