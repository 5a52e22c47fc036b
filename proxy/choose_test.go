package proxy_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/market"
	"chrysalis/pay"
	"chrysalis/proxy"
)

// bazaar is a listing that changes.
type bazaar struct {
	mu     sync.Mutex
	listed []proxy.Listed
	reads  int
}

func (b *bazaar) offers(context.Context) ([]proxy.Listed, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reads++
	return b.listed, nil
}

func (b *bazaar) set(listed ...proxy.Listed) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.listed = listed
}

// offer is an offer of the i-th worker at its price; the first is the dearest.
func (w *paidWorld) offer(i int) proxy.Listed {
	return proxy.Listed{Endpoint: w.servers[i].URL, Payee: voucher.Channel(w.tills[i].payee), Offer: market.Offer{Owner: fmt.Sprintf("0:%d", i), Price: asks(i)}}
}

// asks is what the i-th worker asks: each is a third cheaper than the one before.
func asks(i int) pay.Price {
	p := int64(900_000_000)
	for range i {
		p -= p / 3
	}
	return pay.Price{Prompt: p, Completion: p}
}

// choosing starts a proxy that is to choose among n workers.
func choosing(t *testing.T, n int, b *bazaar, edit func(*paidWorld, *proxy.Options)) *paidWorld {
	t.Helper()
	return startPaid(t, n, 1<<40, func(w *paidWorld, o *proxy.Options) {
		o.Workers = nil
		for i, till := range w.tills {
			if err := till.book.SetPrices(pay.Tariff{Step: payStep, Models: map[string]pay.Price{payModelID: asks(i)}}); err != nil {
				t.Fatal(err)
			}
		}
		o.Payment.Offers, o.Payment.Renew = b.offers, 300*time.Millisecond
		if edit != nil {
			edit(w, o)
		}
	})
}

func (t *till) refuses(yes bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refuse = yes
}

// uses reports whether the i-th worker is one of the proxy's.
func (w *paidWorld) uses(t *testing.T, i int) bool {
	t.Helper()
	return w.proxy.Session(w.servers[i].URL) != nil
}

// until waits for something.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 1000 {
		if is() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal(what)
}

// TestFlood has offers that cost nothing, of workers that do not verify, before the one
// that is good: it is found beneath them, and they are not tried again.
func TestFlood(t *testing.T) {
	var tried sync.Map
	fake := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := tried.LoadOrStore(r.Host, 0)
		tried.Store(r.Host, n.(int)+1)
		http.NotFound(w, r)
	}))
	t.Cleanup(fake.Close)
	_, port, _ := strings.Cut(strings.TrimPrefix(fake.URL, "https://"), ":")
	b := &bazaar{}
	w := choosing(t, 2, b, func(w *paidWorld, o *proxy.Options) {
		for i := range 70 {
			o.Payment.Listed = append(o.Payment.Listed, proxy.Listed{
				Endpoint: fmt.Sprintf("https://127.0.%d.1:%s", i, port), Payee: voucher.Channel{1}, Offer: market.Offer{Owner: fmt.Sprint("0:fake", i)},
			})
		}
		// One more names a payee that is not the worker's, and one names none.
		other, none := w.offer(1), w.offer(1)
		other.Payee, none.Payee, none.Price = voucher.Channel{9}, voucher.Channel{}, pay.Price{}
		o.Payment.Listed = append(o.Payment.Listed, other, none, w.offer(0))
		b.set(append(o.Payment.Listed, w.offer(0))...)
	})
	quotes := w.proxy.Choose(t.Context(), payModel)
	if len(quotes) != 72 || quotes[0].Endpoint != w.servers[0].URL || quotes[0].Problem != "" || quotes[1].Problem == "" {
		t.Fatalf("%d: %+v", len(quotes), quotes[:2])
	}
	if got := w.served(t, body(true, "")); got != w.servers[0].URL {
		t.Errorf("answered by %s", got)
	}
	w.tills[0].refuses(true)
	w.refused(t, "not today")
	until(t, "the listing is not read anew", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.reads > 1 })
	tried.Range(func(host, n any) bool {
		if n.(int) > 1 {
			t.Errorf("%s was tried %d times", host, n)
		}
		return true
	})
	if strings.Contains(w.get(t, "/metrics"), ":"+port) {
		t.Error("what does not verify is counted for ever")
	}
}

// TestLimits has more good offers than are kept.
func TestLimits(t *testing.T) {
	b := &bazaar{}
	w := choosing(t, proxy.MaxKept+2, b, func(w *paidWorld, o *proxy.Options) {
		for i := range w.tills {
			o.Payment.Listed = append(o.Payment.Listed, w.offer(i))
		}
	})
	quotes := w.proxy.Choose(t.Context(), payModel)
	if len(quotes) != proxy.MaxKept+2 {
		t.Fatalf("%+v", quotes)
	}
	for at, q := range quotes {
		if good := at < proxy.MaxKept; (q.Problem == "") != good || good && q.Endpoint != w.servers[len(quotes)-1-at].URL {
			t.Errorf("%d: %+v", at, q)
		}
	}
	for i := range w.tills {
		if w.uses(t, i) != (i > 1) {
			t.Errorf("%d is used, or is not", i)
		}
	}
	if len(w.vault.opened) != 0 {
		t.Error("a choice opens channels")
	}
}

// TestServedBefore keeps a worker that served in an earlier run, though more than are kept
// are cheaper and have served nothing yet.
func TestServedBefore(t *testing.T) {
	var options proxy.Options
	var all []proxy.Listed
	w := choosing(t, proxy.MaxKept+1, &bazaar{}, func(w *paidWorld, o *proxy.Options) {
		for i := range w.tills {
			all = append(all, w.offer(i))
		}
		o.Payment.Listed = all[:1]
		options = *o
	})
	w.proxy.Choose(t.Context(), payModel)
	w.served(t, body(true, ""))
	payment := *options.Payment
	payment.Listed, options.Payment = all, &payment
	again, err := proxy.New(options)
	if err != nil {
		t.Fatal(err)
	}
	quotes := again.Choose(t.Context(), payModel)
	for at, q := range quotes {
		if kept := q.Problem == ""; kept != (at < proxy.MaxKept) || q.Endpoint == w.servers[0].URL && !kept {
			t.Errorf("%d: %+v", at, q)
		}
	}
}

// TestRefusals has workers that are cheap and verified, take the client's requests and
// refuse them: each is asked once.
func TestRefusals(t *testing.T) {
	for name, refuse := range map[string]func(w http.ResponseWriter, r *http.Request){
		"402 after payment": nil,
		"429":               func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) },
		"503":               func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) },
		"it hangs up":       func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"402 without terms": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(402)
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := startPaid(t, 2, 1<<40, func(w *paidWorld, o *proxy.Options) {
				o.Patience = 2 * time.Second
				for i, till := range w.tills {
					if err := till.book.SetPrices(pay.Tariff{Step: payStep, Models: map[string]pay.Price{payModelID: asks(i)}}); err != nil {
						t.Fatal(err)
					}
				}
			})
			w.proxy.Plan(t.Context(), payModel) // which finds the prices
			count := make(chan struct{}, 100)
			if refuse == nil {
				w.tills[1].refuses(true)
			}
			inner := w.servers[1].API
			w.servers[1].API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				if r.URL.Path != proxy.PaymentPath {
					count <- struct{}{}
					if refuse != nil {
						refuse(rw, r)
						return
					}
				}
				inner.ServeHTTP(rw, r)
			})
			for range 8 {
				if got := w.served(t, body(true, "")); got != w.servers[0].URL {
					t.Errorf("answered by %s", got)
				}
			}
			// What was paid for is tried up to five times for the one request.
			if n := len(count); n == 0 || n > 1 && refuse != nil || n > 5 {
				t.Errorf("it was asked %d times", n)
			}
			// It is asked again when nobody else serves, and then first, since it is the cheapest.
			w.servers[1].API = inner
			w.tills[1].refuses(false)
			w.servers[0].Close()
			w.served(t, body(true, ""))
			if got := w.served(t, body(true, "")); got != w.servers[1].URL {
				t.Errorf("answered by %s", got)
			}
		})
	}
}

// TestRenew has offers come and go while the proxy runs.
func TestRenew(t *testing.T) {
	b := &bazaar{}
	w := choosing(t, 4, b, func(w *paidWorld, o *proxy.Options) {
		o.Payment.Listed = []proxy.Listed{w.offer(0), w.offer(1)}
		b.set(o.Payment.Listed...)
	})
	if quotes := w.proxy.Choose(t.Context(), payModel); len(quotes) != 2 {
		t.Fatalf("%+v", quotes)
	}
	until(t, "the chosen are not verified", func() bool { return w.uses(t, 0) && w.uses(t, 1) })
	if got := w.served(t, body(true, "")); got != w.servers[1].URL {
		t.Errorf("answered by %s", got)
	}
	// While all is well nothing is read.
	dear := w.offer(3)
	dear.Endpoint += "/"
	dear.Price.Prompt = ceiling.Prompt + 1
	b.set(w.offer(0), w.offer(2), dear)
	time.Sleep(time.Second)
	b.mu.Lock()
	if b.reads != 0 {
		t.Errorf("it was read %d times", b.reads)
	}
	b.mu.Unlock()
	// What is in the middle of an answer stays when its offer is gone; what is idle goes.
	arrived, hold, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	w.tills[1].mu.Lock()
	w.tills[1].event = func(_ io.Writer, i int) {
		if i == 0 {
			close(arrived)
			<-hold
		}
	}
	w.tills[1].mu.Unlock()
	go func() {
		defer close(ended)
		if answer, text := w.post(t, body(true, "")); answer.StatusCode != 200 || !strings.Contains(text, "[DONE]") {
			t.Errorf("%d %s", answer.StatusCode, text)
		}
	}()
	<-arrived
	b.set(w.offer(2), dear)
	w.tills[0].refuses(true)
	w.tills[1].refuses(true)
	w.refused(t, "not today")
	until(t, "the new offer is not used", func() bool { return w.uses(t, 2) })
	until(t, "what is not offered any more is used", func() bool { return !w.uses(t, 0) })
	if got := w.served(t, body(true, "")); got != w.servers[2].URL {
		t.Errorf("answered by %s", got)
	}
	if !w.uses(t, 1) {
		t.Error("a worker was dropped while it answers")
	}
	close(hold)
	<-ended
	b.set(w.offer(2), w.offer(3), dear)
	w.tills[2].refuses(true)
	w.refused(t, "not today")
	until(t, "the next offer is not used", func() bool { return w.uses(t, 3) && !w.uses(t, 1) })
	if got := w.served(t, body(true, "")); got != w.servers[3].URL {
		t.Errorf("answered by %s", got)
	}
	if w.proxy.Session(dear.Endpoint) != nil {
		t.Error("an offer above the price that was agreed to is used")
	}
	// A listing that is empty, or cannot be read, takes nobody away.
	b.set()
	w.tills[3].refuses(true)
	w.refused(t, "not today")
	b.mu.Lock()
	reads := b.reads
	b.mu.Unlock()
	until(t, "the listing is not read anew", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.reads > reads })
	w.tills[3].refuses(false)
	if got := w.served(t, body(true, "")); got != w.servers[3].URL {
		t.Errorf("answered by %s", got)
	}
}
