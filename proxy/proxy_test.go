package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/measure/record"
	"chrysalis/proxy"
)

// world is VMs that are alike, a proxy before them, and its address.
type world struct {
	vms     []*attesttest.VM
	servers []*attesttest.Server
	proxy   *proxy.Proxy
	url     string
}

// start serves n VMs of one record and a proxy. edit may change VMs and servers
// before anything is verified.
func start(t *testing.T, n int, edit func(w *world, o *proxy.Options)) *world {
	t.Helper()
	w := &world{}
	first := attesttest.NewVM(record.TDX)
	options := proxy.Options{Policy: first.Policy(), Records: []*record.File{first.Record()}, Collateral: first.Intel.Collateral(), Loopback: true}
	for i := range n {
		vm := *first
		vm.NewKey()
		s := attesttest.Serve(&vm)
		t.Cleanup(s.Close)
		s.API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			rw.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(rw, `{"worker":%d,"path":%q,"body":%q,"authorization":%q}`, i, r.URL.RequestURI(), body, r.Header.Get("Authorization"))
		})
		w.vms, w.servers = append(w.vms, &vm), append(w.servers, s)
		options.Workers = append(options.Workers, s.URL)
	}
	if edit != nil {
		edit(w, &options)
	}
	p, err := proxy.New(options)
	if err != nil {
		t.Fatal(err)
	}
	w.proxy = p
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	ready := make(chan struct{})
	go p.Run(ctx, func() { close(ready) })
	<-ready
	front := httptest.NewServer(p)
	t.Cleanup(front.Close)
	w.url = front.URL
	return w
}

func (w *world) post(t *testing.T, body string, header ...string) (*http.Response, string) {
	t.Helper()
	request, err := http.NewRequest(http.MethodPost, w.url+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		request.Header.Set(header[i], header[i+1])
	}
	if host := request.Header.Get("Host"); host != "" {
		request.Host = host
		request.Header.Del("Host")
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer, string(data)
}

func (w *world) get(t *testing.T, path string) string {
	t.Helper()
	answer, err := http.Get(w.url + path)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestForward(t *testing.T) {
	w := start(t, 1, nil)
	answer, body := w.post(t, "prompt", "Authorization", "Bearer mine", "Cookie", "secret=1", "User-Agent", "agent/1")
	want := `{"worker":0,"path":"/v1/chat/completions","body":"prompt","authorization":"Bearer mine"}`
	if answer.StatusCode != 200 || body != want || answer.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s", answer.StatusCode, body)
	}
	if got := w.servers[0].Received(); strings.Contains(got, "secret=1") || strings.Contains(got, "agent/1") {
		t.Error("cookies or the client's name are passed on")
	}
	if answer, _ := w.post(t, strings.Repeat("x", proxy.MaxBody+1)); answer.StatusCode != 413 {
		t.Errorf("a request of more than 16 MiB: %d", answer.StatusCode)
	}
	page, metrics := w.get(t, "/"), w.get(t, "/metrics")
	for _, want := range []string{w.servers[0].URL, "verified", "td-attributes", "Not confidential", "test/model@1"} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not on the page", want)
		}
	}
	if strings.Contains(page, "://") && strings.Contains(strings.ReplaceAll(page, w.servers[0].URL, ""), "://") {
		t.Error("the page has a resource from elsewhere")
	}
	if !strings.Contains(metrics, `chrysalis_proxy_requests_total{status="200",worker="`+w.servers[0].URL+`"} 1`) || !strings.Contains(metrics, "chrysalis_proxy_worker_verified") {
		t.Errorf("%s", metrics)
	}
	for _, text := range []string{page, metrics} {
		if strings.Contains(text, "prompt") || strings.Contains(text, "mine") {
			t.Error("a request's content is shown")
		}
	}
}

func TestToken(t *testing.T) {
	w := start(t, 1, func(_ *world, o *proxy.Options) { o.Token = "theirs" })
	if _, body := w.post(t, "", "Authorization", "Bearer mine"); !strings.Contains(body, "Bearer theirs") {
		t.Error(body)
	}
}

// TestRefused checks that a refused worker gets nothing, alone and beside a good
// one.
func TestRefused(t *testing.T) {
	w := start(t, 2, func(w *world, _ *proxy.Options) { w.vms[0].TD.Attributes |= 1 })
	for range 8 {
		if answer, body := w.post(t, "the-prompt"); answer.StatusCode != 200 || !strings.Contains(body, `"worker":1`) {
			t.Fatalf("%d %s", answer.StatusCode, body)
		}
	}
	if got := w.servers[0].Received(); strings.Contains(got, "the-prompt") || strings.Contains(got, "/v1/") {
		t.Errorf("sent: %q", got)
	}
	page := w.get(t, "/")
	if !strings.Contains(page, "DEBUG") || !strings.Contains(page, "refused") {
		t.Error("the page does not say why")
	}
	alone := start(t, 1, func(w *world, _ *proxy.Options) { w.vms[0].TD.Attributes |= 1 })
	answer, body := alone.post(t, "the-prompt")
	if answer.StatusCode != 503 || !strings.Contains(body, "td-attributes") || strings.Contains(alone.servers[0].Received(), "the-prompt") {
		t.Errorf("%d %s", answer.StatusCode, body)
	}
}

// TestFailover lets workers fail in each way before the first byte of an answer.
func TestFailover(t *testing.T) {
	for name, fail := range map[string]http.HandlerFunc{
		"busy":     func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) },
		"draining": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) },
		"it hangs up": func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			panic(http.ErrAbortHandler)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t, 3, nil)
			good := w.servers[2].API
			w.servers[0].API, w.servers[1].API = fail, fail
			for range 6 {
				if answer, body := w.post(t, "prompt"); answer.StatusCode != 200 || !strings.Contains(body, `"worker":2`) {
					t.Fatalf("%d %s", answer.StatusCode, body)
				}
			}
			w.servers[2].API = fail
			if answer, _ := w.post(t, "prompt"); answer.StatusCode < 429 {
				t.Errorf("%d", answer.StatusCode)
			}
			w.servers[2].API = good
		})
	}
	t.Run("gone", func(t *testing.T) {
		w := start(t, 2, nil)
		w.servers[0].Close()
		for range 4 {
			if answer, body := w.post(t, "prompt"); answer.StatusCode != 200 || !strings.Contains(body, `"worker":1`) {
				t.Fatalf("%d %s", answer.StatusCode, body)
			}
		}
	})
	t.Run("not after the first byte", func(t *testing.T) {
		w := start(t, 2, nil)
		cut := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "half ")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		})
		w.servers[0].API, w.servers[1].API = cut, cut
		answer, err := http.Post(w.url+"/v1/x", "text/plain", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		if data, err := io.ReadAll(answer.Body); err == nil || string(data) != "half " {
			t.Errorf("%q, %v: half an answer looks whole", data, err)
		}
	})
}

// TestLeastLoaded sends requests that do not end.
func TestLeastLoaded(t *testing.T) {
	w := start(t, 3, nil)
	end := make(chan struct{})
	var mu sync.Mutex
	at := map[int]int{}
	arrived := make(chan struct{}, 9)
	for i, s := range w.servers {
		s.API = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			mu.Lock()
			at[i]++
			mu.Unlock()
			arrived <- struct{}{}
			<-end
		})
	}
	var all sync.WaitGroup
	for range 9 {
		all.Go(func() {
			if answer, err := http.Post(w.url+"/v1/x", "text/plain", nil); err == nil {
				answer.Body.Close()
			}
		})
		<-arrived // one after the other, so that each sees the load
	}
	mu.Lock()
	if at[0] != 3 || at[1] != 3 || at[2] != 3 {
		t.Errorf("%v", at)
	}
	mu.Unlock()
	close(end)
	all.Wait()
}

// TestStream checks that events come as they are sent, and the trailer with them.
func TestStream(t *testing.T) {
	w := start(t, 1, nil)
	next := make(chan struct{})
	w.servers[0].API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "text/event-stream")
		rw.Header().Set("Trailer", "Chrysalis-Receipt")
		for i := range 3 {
			fmt.Fprintf(rw, ": padding\ndata: %d\n\n", i)
			http.NewResponseController(rw).Flush()
			<-next
		}
		rw.Header().Set("Chrysalis-Receipt", "signed")
	})
	answer, err := http.Post(w.url+"/v1/chat/completions", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	for i := range 3 {
		for _, want := range []string{": padding", fmt.Sprintf("data: %d", i), ""} {
			if !lines.Scan() || lines.Text() != want {
				t.Fatalf("%q, expected %q", lines.Text(), want)
			}
		}
		next <- struct{}{}
	}
	if lines.Scan() || answer.Trailer.Get("Chrysalis-Receipt") != "signed" {
		t.Errorf("trailer %v", answer.Trailer)
	}
}

// TestLocalOnly has a row for each way in which a web page reaches a local port.
func TestLocalOnly(t *testing.T) {
	w := start(t, 1, nil)
	for name, tt := range map[string]struct {
		header []string
		status int
	}{
		"a name that points here":    {[]string{"Host", "evil.example:8080"}, 403},
		"a page elsewhere":           {[]string{"Origin", "https://evil.example"}, 403},
		"a page without an origin":   {[]string{"Origin", "null"}, 403},
		"a page of this machine":     {[]string{"Origin", "http://localhost:3000"}, 200},
		"localhost":                  {[]string{"Host", "localhost:1"}, 200},
		"the loopback address, IPv6": {[]string{"Host", "[::1]:8080"}, 200},
	} {
		if answer, _ := w.post(t, "x", tt.header...); answer.StatusCode != tt.status {
			t.Errorf("%s: %d, expected %d", name, answer.StatusCode, tt.status)
		}
	}
}

// TestReverify checks that verification goes on in the background, that requests
// do not wait for it, and that a worker which turns bad gets no more.
func TestReverify(t *testing.T) {
	var slow bool
	var mu sync.Mutex
	w := start(t, 1, func(w *world, o *proxy.Options) {
		o.Policy.MaxAgeSeconds = 3
		vm := w.vms[0]
		w.servers[0].Evidence = func(rw http.ResponseWriter, r *http.Request) {
			var n evidence.Bytes
			if n.UnmarshalText([]byte(r.URL.Query().Get("nonce"))) != nil {
				return
			}
			mu.Lock()
			wait := slow
			document := vm.Evidence(n)
			mu.Unlock()
			if wait {
				time.Sleep(300 * time.Millisecond)
			}
			rw.Write(document)
		}
	})
	mu.Lock()
	slow = true
	mu.Unlock()
	deadline := time.Now().Add(20 * time.Second)
	for {
		if answer, body := w.post(t, "x"); answer.StatusCode != 200 {
			t.Fatalf("%d %s", answer.StatusCode, body)
		}
		if fetched, _ := w.servers[0].Counts(); fetched >= 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it is not verified again")
		}
		time.Sleep(20 * time.Millisecond)
	}
	mu.Lock()
	w.vms[0].TD.Attributes |= 1
	slow = false
	mu.Unlock()
	for {
		if answer, _ := w.post(t, "x"); answer.StatusCode == 503 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a VM that turned bad is still used")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestNew(t *testing.T) {
	for _, workers := range [][]string{nil, {"http://127.0.0.1:1"}, {"x"}, {"https://a", "https://a"}} {
		if _, err := proxy.New(proxy.Options{Workers: workers}); err == nil {
			t.Errorf("%v is accepted", workers)
		}
	}
}

// TestTrust revokes what a worker runs, while it serves: requests stop at once, and
// go on when it is published again.
func TestTrust(t *testing.T) {
	w := start(t, 1, nil)
	if answer, body := w.post(t, "prompt"); answer.StatusCode != 200 {
		t.Fatalf("%d %s", answer.StatusCode, body)
	}
	before := w.servers[0].Received()
	w.proxy.Trust(nil)
	if answer, body := w.post(t, "secret"); answer.StatusCode == 200 {
		t.Errorf("a revoked worker answers: %s", body)
	}
	if strings.Contains(strings.TrimPrefix(w.servers[0].Received(), before), "secret") {
		t.Error("a revoked worker got the request")
	}
	w.proxy.Trust([]*record.File{w.vms[0].Record()})
	for range 100 {
		if answer, _ := w.post(t, "prompt"); answer.StatusCode == 200 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("it stays refused")
}

// TestGPUs forwards to a worker with GPUs, shows them, and stops when one is not
// what it was.
func TestGPUs(t *testing.T) {
	var vm *attesttest.VM
	w := start(t, 1, func(w *world, o *proxy.Options) {
		vm = w.vms[0]
		vm.AddGPUs(2)
		o.Policy, o.Records, o.GPU = vm.Policy(), []*record.File{vm.Record()}, &attest.GPUCollateral{}
	})
	get := func(path string) (int, string) {
		answer, err := http.Get(w.url + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, _ := io.ReadAll(answer.Body)
		return answer.StatusCode, string(body)
	}
	if status, body := get("/v1/models"); status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	if _, page := get("/"); !strings.Contains(page, nvidiatest.Model) || !strings.Contains(page, "gpu-measurements") {
		t.Errorf("the page does not show the GPUs: %s", page)
	}
	vm.Report = func(e *nvidia.Evidence, _ [nvidia.NonceSize]byte) { e.GPUs[0].State.DevTools = true }
	w.proxy.Trust([]*record.File{vm.Record()})
	if status, body := get("/v1/models"); status != http.StatusServiceUnavailable || !strings.Contains(body, "gpu-devtools") {
		t.Errorf("%d %s", status, body)
	}
}
