package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/ci/leak"
	"chrysalis/ci/load"
	"chrysalis/guest"
	"chrysalis/launcher"
	"chrysalis/manifest"
)

// TestCrowd boots one VM, whose engine says all that it is asked on its outputs, and
// first looks for that in everything that leaves the VM, then puts clients on it by
// the hundred, then attacks it.
func TestCrowd(t *testing.T) {
	h := newHost(t)
	var tokens, hashes []string
	for range 5 {
		tokens = append(tokens, "sk-"+random(t))
	}
	for _, token := range tokens {
		hashes = append(hashes, manifest.TokenHash(token))
	}
	slices.Sort(hashes)
	c := load.Config{
		Model: "chrysalis/demo", Tokens: tokens, Sample: h.sample,
		Idle: 100, Active: 20, Greedy: 40, Events: 10, Pause: 500 * time.Millisecond, For: time.Minute,
	}
	places, idle := 24, 5
	if text := os.Getenv("CHRYSALIS_SOAK"); text != "" { // make soak
		var err error
		if c.For, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
		// As many events as an emulated processor has the time for.
		c.Idle, c.Active, c.Greedy, c.Pause, places, idle = 1000, 200, 50, 2*time.Second, 200, 20
	}
	engine := testEngine(t, "crowd")
	file := writeManifest(t, engine, demo, func(data []byte) []byte {
		m, err := manifest.Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		m.Limits.Concurrency, m.Limits.IdleSeconds = places, idle
		m.Tokens = hashes
		if data, err = m.Encode(); err != nil {
			t.Fatal(err)
		}
		return data
	})
	disks := sums(t, engine, demo, uki)
	endpoint := h.up("--engine", engine, "--model", demo, "--manifest", file)
	c.Address = strings.TrimPrefix(endpoint, "https://")

	t.Run("leaks", func(t *testing.T) { leaks(t, h, endpoint, engine, tokens) })
	if after := sums(t, engine, demo, uki); !slices.Equal(after, disks) {
		t.Error("a disk or the image has changed")
	}

	t.Run("load", func(t *testing.T) {
		r, err := load.Run(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d idle clients, %d active and %d greedy streams for %s\n%s", c.Idle, c.Active, c.Greedy, c.For, r)
		for _, leak := range r.Leaks() {
			t.Error(leak)
		}
		if u := r.Unfair(); u != "" {
			t.Error(u)
		}
		if r.Failed > 0 || r.Without > 0 || r.Streams == 0 || r.Refused == 0 {
			t.Errorf("%d failed (%s), %d were refused without Retry-After, %d with, %d answered", r.Failed, r.Why, r.Without, r.Refused, r.Streams)
		}
		if r.IdleAlive < c.Idle*9/10 {
			t.Errorf("%d of %d idle clients are connected", r.IdleAlive, c.Idle)
		}
		if peak := r.Samples[len(r.Samples)-1].Agent.Peak; peak*1024 > 64e6 {
			t.Errorf("the agent took %d KiB, more than 64 MB", peak)
		}
	})
	c.Idle, c.Active, c.For = 60, 8, 4*time.Second
	for _, a := range load.Attacks {
		t.Run(a.Name, func(t *testing.T) {
			served, slowest, err := load.Defend(t.Context(), c, a)
			if err != nil {
				t.Error(err)
			}
			t.Logf("%d others were served meanwhile, within %s", served, slowest)
		})
	}
	if s, err := c.Sample(); err != nil || s.Agent.Peak*1024 > 64e6 {
		t.Errorf("the agent took %d KiB at most, attacks included: %v", s.Agent.Peak, err)
	}
}

func random(t *testing.T) string {
	t.Helper()
	b := make([]byte, 24)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func sums(t *testing.T, paths ...string) (sums []string) {
	t.Helper()
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, fmt.Sprintf("%x", sha256.Sum256(data)))
	}
	return sums
}

// sample is what the VM and its launcher say and take.
func (h *host) sample() (s load.Sample, err error) {
	r := h.run(time.Minute, "status", "--json")
	var vms []struct {
		PID   int          `json:"pid"`
		Guest guest.Status `json:"guest"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &vms); err != nil || len(vms) != 1 {
		return s, fmt.Errorf("status: %v: %s", err, r)
	}
	// The launcher's own copy can be some seconds old.
	var t guest.CounterTable
	for range 5 { // a VM that is asked by a thousand may be too late for one
		if t, err = h.guestCounters(); err == nil {
			break
		}
	}
	if err != nil {
		return s, err
	}
	s.Agent = load.Process{RSS: t.AgentRSSKiB, Peak: t.AgentPeakKiB, Goroutines: t.Goroutines, Descriptors: t.Descriptors}
	s.Active, s.Busy = t.Active, t.Busy
	s.Relay, err = load.ReadProcess(vms[0].PID)
	return s, err
}

func (h *host) guestCounters() (t guest.CounterTable, err error) {
	text, err := h.statusPort("/status")
	if err != nil {
		return t, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(text)), nil)
	if err != nil {
		return t, err
	}
	var status guest.Status
	err = json.NewDecoder(resp.Body).Decode(&status)
	return status.Counters, err
}

// statusPort asks the VM's status port itself, and returns all that it answers.
func (h *host) statusPort(path string) (string, error) {
	found, err := filepath.Glob(filepath.Join(h.dir, "chrysalis", "vms", "*", "runs", "*", "io", "vsock.sock"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("the VM's vsock socket: %d found, %v", len(found), err)
	}
	// A socket's name may be no longer than 107 bytes.
	short := filepath.Join(scratch, "vsock.sock")
	os.Remove(short)
	if err := os.Symlink(found[0], short); err != nil {
		return "", err
	}
	dialer := launcher.NewUserDialer(short)
	defer dialer.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := dialer.Dial(ctx, guest.PortStatus)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n", path)
	data, err := io.ReadAll(io.LimitReader(conn, 1<<20))
	return string(data), err
}

// wiretap carries connections to an address, and keeps all that it carries.
type wiretap struct {
	address string
	mu      sync.Mutex
	seen    bytes.Buffer
}

func newWiretap(t *testing.T, to string) *wiretap {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	w := &wiretap{address: l.Addr().String()}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer client.Close()
				vm, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer vm.Close()
				go func() {
					io.Copy(io.MultiWriter(vm, w), client)
					vm.(*net.TCPConn).CloseWrite()
				}()
				io.Copy(io.MultiWriter(client, w), vm)
			}()
		}
	}()
	return w
}

func (w *wiretap) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen.Write(p)
}

func (w *wiretap) bytes() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Clone(w.seen.Bytes())
}

// leaks sends a secret in each way in which a client can, and looks for it, and for
// the client's token, everywhere else than where it belongs.
func leaks(t *testing.T, h *host, endpoint, engine string, tokens []string) {
	secret, token := "m"+random(t), tokens[0]
	secrets := map[string][]byte{"the prompt": []byte(secret), "the token": []byte(token)}
	wire := newWiretap(t, strings.TrimPrefix(endpoint, "https://"))

	// Until the first client connects, the engine's output is there to read: the
	// control of its absence later.
	if r := h.run(time.Minute, "logs", "--engine"); !strings.Contains(r.stdout, "engine: serves") {
		t.Errorf("the engine's first words are not in its log: %s", r)
	}

	body := func(text string, stream bool) string {
		data, _ := json.Marshal(map[string]any{"model": "chrysalis/demo", "stream": stream,
			"messages": []map[string]string{{"role": "user", "content": text}}})
		return string(data)
	}
	var answers, headers, errorBodies bytes.Buffer
	send := func(base, text, header string) (int, string) {
		by := &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
		req, err := http.NewRequest("POST", base+"/v1/chat/completions", strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", header)
		resp, err := by.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		data, _ := io.ReadAll(resp.Body)
		answers.Write(data)
		fmt.Fprintln(&headers, resp.Status, resp.Header, resp.Trailer)
		return resp.StatusCode, string(data)
	}
	bearer := "Bearer " + token
	proxied, said := startProxyLog(t, h, "--record", recordOf(t, h, uki, engine, demo), "--allow-not-confidential", "--worker", endpoint)
	saved := filepath.Join(t.TempDir(), "saved")
	h.run(time.Minute, "verify", "--record", recordOf(t, h, uki, engine, demo), "--allow-not-confidential", "--save", saved, endpoint)

	for _, base := range []string{"https://" + wire.address, strings.TrimSuffix(proxied, "/v1")} {
		for _, stream := range []bool{false, true} {
			// To the client that asked it comes back, or nothing here would mean anything.
			if status, got := send(base, body("say "+secret, stream), bearer); status != 200 || !strings.Contains(got, secret) {
				t.Errorf("stream %t: %d %s", stream, status, got)
			}
			if status, got := send(base, body("say refuse "+secret, stream), bearer); status != 400 || !strings.Contains(got, "engine_refused") {
				t.Errorf("refused by the engine: %d %s", status, got)
			}
			for _, bad := range []struct{ what, body, header string }{
				{"the engine failed", body("say fail "+secret, stream), bearer},
				{"the engine broke off", body("say crash "+secret, stream), bearer},
				{"a field of the engine", strings.Replace(body(secret, stream), "{", `{"id_slot":"`+secret+`",`, 1), bearer},
				{"not JSON", "{" + secret, bearer},
				{"a wrong type", fmt.Sprintf(`{"model":"chrysalis/demo","messages":%q}`, secret), bearer},
				{"a model by that name", fmt.Sprintf(`{"model":%q,"messages":[{"role":"user","content":"x"}]}`, secret), bearer},
				{"no such token", body("say "+secret, stream), "Bearer " + token + "0"},
				{"another scheme", body("say "+secret, stream), "Basic " + token},
			} {
				status, got := send(base, bad.body, bad.header)
				if status == 200 && !strings.Contains(got, `"error"`) && !(bad.what == "the engine broke off") {
					t.Errorf("%s: %d %s", bad.what, status, got)
				}
				if bad.what != "the engine broke off" {
					errorBodies.WriteString(got)
				}
			}
		}
	}
	// Taken back in the middle, and cut off with the request half sent.
	for _, text := range []string{body("say "+secret, true), body("say "+secret, true)[:40+len(secret)]} {
		conn := tls.Client(dial(t, wire.address), &tls.Config{InsecureSkipVerify: true})
		fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", bearer, len(body("say "+secret, true)), text)
		time.Sleep(100 * time.Millisecond)
		conn.NetConn().Close()
	}
	// In the places of a request that are not its body.
	conn := tls.Client(dial(t, wire.address), &tls.Config{InsecureSkipVerify: true})
	fmt.Fprintf(conn, "GET /%s?%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: %s\r\nX-%s: 1\r\nConnection: close\r\n\r\n", secret, secret, secret, secret, secret)
	data, _ := io.ReadAll(conn)
	errorBodies.Write(data)

	clear := func(what string, data []byte) {
		t.Helper()
		for name, secret := range secrets {
			if found := leak.Find(data, secret); len(found) > 0 {
				t.Errorf("%s has %s: %v", what, name, found)
			}
		}
		// The control: what is looked for would be found there.
		if len(leak.Find(append(data[:len(data):len(data)], secret...), []byte(secret))) == 0 {
			t.Errorf("%s: a planted secret was not found", what)
		}
	}
	t.Run("what the relay carries", func(t *testing.T) {
		if seen := wire.bytes(); len(seen) < 16<<10 {
			t.Errorf("only %d bytes were carried", len(seen))
		}
		clear("the relay's traffic", wire.bytes())
		// The control: in clear it would be there.
		raw := dial(t, wire.address)
		fmt.Fprintf(raw, "GET /%s HTTP/1.1\r\nHost: x\r\n\r\n", "c"+secret)
		io.ReadAll(raw)
		if len(leak.Find(wire.bytes(), []byte("c"+secret))) == 0 {
			t.Error("what was sent in clear is not in the relay's traffic")
		}
	})
	t.Run("errors and receipts", func(t *testing.T) {
		clear("an error", errorBodies.Bytes())
		clear("a header or a trailer, receipts included,", headers.Bytes())
		if !strings.Contains(headers.String(), "Chrysalis-Receipt") {
			t.Error("there was no receipt to look through")
		}
		if len(leak.Find(answers.Bytes(), []byte(token))) > 0 {
			t.Error("an answer has the token")
		}
	})
	t.Run("the status port", func(t *testing.T) {
		for _, path := range []string{"/status", "/metrics", "/engine-log", "/" + secret} {
			text, err := h.statusPort(path)
			if err != nil || !strings.HasPrefix(text, "HTTP/1.1 ") {
				t.Errorf("%s: %v %q", path, err, text)
			}
			if path == "/engine-log" && !strings.HasPrefix(text, "HTTP/1.1 410 ") {
				t.Errorf("the engine's output can be read: %q", text)
			}
			clear(path, []byte(text))
		}
	})
	t.Run("what the launcher prints", func(t *testing.T) {
		for _, args := range [][]string{{"status"}, {"status", "--json"}, {"logs"}, {"logs", "--console"}, {"logs", "--engine"}} {
			clear(strings.Join(args, " "), []byte(h.run(time.Minute, args...).String()))
		}
	})
	t.Run("the proxy and what verify saves", func(t *testing.T) {
		for _, path := range []string{"/", "/metrics"} {
			resp, err := http.Get(strings.TrimSuffix(proxied, "/v1") + path)
			if err != nil {
				t.Fatal(err)
			}
			data, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			clear("the proxy's "+path, data)
		}
		data, err := os.ReadFile(said)
		if err != nil || len(data) == 0 {
			t.Errorf("the proxy said nothing: %v", err)
		}
		clear("the proxy's log", data)
		inFiles(t, saved, secrets)
	})
	t.Run("every file", func(t *testing.T) {
		inFiles(t, h.dir, secrets)
		for _, dir := range []string{".", source, h.dir} {
			if cores, _ := filepath.Glob(filepath.Join(dir, "core*")); len(cores) > 0 {
				t.Errorf("there are core files: %v", cores)
			}
		}
	})
}

// inFiles looks through all files below a folder, in which there must be some, and
// then for a planted one, which must be found.
func inFiles(t *testing.T, dir string, secrets map[string][]byte) {
	t.Helper()
	for name, secret := range secrets {
		found, size, err := leak.FindInFiles(dir, secret)
		if len(found) > 0 || size == 0 || err != nil {
			t.Errorf("%s in %d bytes of files: %v, %v", name, size, found, err)
		}
		planted := filepath.Join(dir, "planted")
		if err := os.WriteFile(planted, []byte("x"+hex.EncodeToString(secret)), 0o600); err != nil {
			t.Fatal(err)
		}
		found, _, err = leak.FindInFiles(dir, secret)
		os.Remove(planted)
		if len(found) == 0 || err != nil {
			t.Errorf("%s planted in %s was not found: %v", name, dir, err)
		}
	}
}
