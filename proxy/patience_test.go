package proxy_test

import (
	"io"
	"net"
	"net/http"
	"strings"
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
	impatient := func(o *proxy.Options) { o.Timeout, o.Patience = 2*time.Second, 300*time.Millisecond }
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
		w := start(t, 2, func(w *world, o *proxy.Options) {
			impatient(o)
			w.servers[0].API = http.HandlerFunc(quiet)
		})
		slow := 0
		for range 8 {
			begin := time.Now()
			if answer, body := w.post(t, `{"stream":true}`); answer.StatusCode != 200 || !strings.Contains(body, `"worker":1`) {
				t.Fatalf("%d %s", answer.StatusCode, body)
			}
			if time.Since(begin) >= 300*time.Millisecond {
				slow++
			}
		}
		// Its evidence stays good; it is asked last from then on.
		if slow > 1 {
			t.Errorf("%d of 8 requests waited for the worker that does not answer", slow)
		}
		w.servers[1].API = http.HandlerFunc(quiet)
		answer, body := w.post(t, "the-prompt")
		if answer.StatusCode != 502 || !strings.Contains(body, "it did not begin to answer in 300ms") || strings.Contains(body, "the-prompt") {
			t.Errorf("%d %s", answer.StatusCode, body)
		}
	})
	t.Run("instead of taking the request", func(t *testing.T) {
		w := start(t, 1, func(w *world, o *proxy.Options) {
			impatient(o)
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
		time.Sleep(time.Second)
		if n, err := io.Copy(io.Discard, answer.Body); err != nil || n != size {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
}
