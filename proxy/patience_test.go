package proxy_test

import (
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/proxy"
)

// silence listens and accepts, and says nothing.
func silence(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
		}
	}()
	return "https://" + l.Addr().String()
}

// TestSilentWorker has a worker fall silent at each step of a request. It is given
// up on in time, and another one answers where nothing has come yet.
func TestSilentWorker(t *testing.T) {
	impatient := func(o *proxy.Options) { o.Timeout, o.Patience = 5*time.Second, time.Second }
	quiet := func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}

	t.Run("in its handshake", func(t *testing.T) {
		w := start(t, 1, func(_ *world, o *proxy.Options) {
			o.Timeout = 300 * time.Millisecond
			o.Workers = []string{silence(t)}
		})
		begin := time.Now()
		answer, body := w.post(t, "the-prompt")
		if answer.StatusCode != 502 || !strings.Contains(body, "TLS with") || strings.Contains(body, "the-prompt") {
			t.Errorf("%d %s", answer.StatusCode, body)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("it took %s", took)
		}
	})
	t.Run("instead of evidence", func(t *testing.T) {
		w := start(t, 2, func(w *world, o *proxy.Options) {
			o.Timeout = time.Second
			w.servers[0].Evidence = quiet
		})
		if answer, body := w.post(t, "the-prompt"); answer.StatusCode != 200 || !strings.Contains(body, `"worker":1`) {
			t.Errorf("%d %s", answer.StatusCode, body)
		}
		if strings.Contains(w.servers[0].Received(), "the-prompt") {
			t.Error("a worker without evidence got the request")
		}
		if page := w.get(t, "/"); !strings.Contains(page, "does not come in time") {
			t.Error("the page does not say why")
		}
	})
	t.Run("instead of an answer", func(t *testing.T) {
		var asked atomic.Int32
		w := start(t, 2, func(w *world, o *proxy.Options) {
			impatient(o)
			w.servers[0].API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				quiet(rw, r)
			})
		})
		for range 8 {
			if answer, body := w.post(t, `{"stream":true}`); answer.StatusCode != 200 || !strings.Contains(body, `"worker":1`) {
				t.Fatalf("%d %s", answer.StatusCode, body)
			}
		}
		// Its evidence stays good; it is asked last from then on.
		if n := asked.Load(); n > 1 {
			t.Errorf("%d of 8 requests waited for the worker that does not answer", n)
		}
		w.servers[1].API = http.HandlerFunc(quiet)
		answer, body := w.post(t, "the-prompt")
		if answer.StatusCode != 502 || !strings.Contains(body, "it did not begin to answer in 1s") || strings.Contains(body, "the-prompt") {
			t.Errorf("%d %s", answer.StatusCode, body)
		}
	})
	// Whatever the moment, a client gets an answer or is told that there is none.
	t.Run("until the moment at which it is given up on", func(t *testing.T) {
		const patience = 50 * time.Millisecond
		var tries atomic.Int64
		w := start(t, 1, func(w *world, o *proxy.Options) {
			o.Patience = patience
			w.servers[0].API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				n := tries.Add(1)
				io.Copy(io.Discard, r.Body)
				select {
				case <-time.After(patience + time.Duration(n%16-12)*500*time.Microsecond):
				case <-r.Context().Done():
				}
				rw.Header().Set("Content-Length", "0")
			})
		})
		count := map[int]int{}
		for tries.Load() < 200 {
			answer, body := w.post(t, "the-prompt")
			switch count[answer.StatusCode]++; answer.StatusCode {
			case 200:
			case 502, 503:
				if !strings.Contains(body, "it did not begin to answer in 50ms") && !strings.Contains(body, "it did not take the request in 50ms") {
					t.Error(body)
				}
			default:
				t.Errorf("%d %s", answer.StatusCode, body)
			}
		}
		t.Log(count)
	})
	t.Run("instead of taking the request", func(t *testing.T) {
		w := start(t, 1, func(w *world, o *proxy.Options) {
			o.Timeout, o.Patience = 5*time.Second, 300*time.Millisecond
			w.servers[0].API = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		})
		// More than sockets hold.
		answer, body := w.post(t, strings.Repeat("x", proxy.MaxBody))
		if answer.StatusCode != 502 || !strings.Contains(body, "it did not take the request in 300ms") {
			t.Errorf("%d %s", answer.StatusCode, body)
		}
	})
	t.Run("in the middle", func(t *testing.T) {
		w := start(t, 1, func(w *world, o *proxy.Options) {
			impatient(o)
			w.servers[0].API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				io.WriteString(rw, "half ")
				http.NewResponseController(rw).Flush()
				<-r.Context().Done()
			})
		})
		answer, err := http.Post(w.url+"/v1/x", "text/plain", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		if data, err := io.ReadAll(answer.Body); err == nil || string(data) != "half " {
			t.Errorf("%q, %v: half an answer looks whole", data, err)
		}
	})
	// A slow client is not the worker's fault.
	t.Run("a client that reads slowly", func(t *testing.T) {
		const size = 32 << 20
		w := start(t, 1, func(w *world, o *proxy.Options) {
			impatient(o)
			w.servers[0].API = http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				rw.Write(make([]byte, size))
			})
		})
		answer, err := http.Post(w.url+"/v1/x", "text/plain", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		time.Sleep(2500 * time.Millisecond)
		if n, err := io.Copy(io.Discard, answer.Body); err != nil || n != size {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
}
