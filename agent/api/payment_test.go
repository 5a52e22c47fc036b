package api_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/agent/agenttest"
	"chrysalis/agent/api"
	"chrysalis/agent/api/apitest"
	"chrysalis/attest/receipt"
	"chrysalis/channel/voucher"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/pay"
)

const (
	step = apitest.Step
	chat = "/v1/chat/completions"
	path = "/.well-known/payment"
	ask  = `{"model":"test/model","messages":[{"role":"user","content":"a secret question"}]}`
)

// Limits of what a request waits for: for what comes, and for what does not.
const (
	patient = 5 * time.Second
	hasty   = 300 * time.Millisecond
)

var payee = "0:" + strings.Repeat("77", 32)

func streamed(body string) string { return strings.Replace(body, "{", `{"stream":true,`, 1) }

// payer is a client with a channel.
type payer struct {
	key     ed25519.PrivateKey
	channel voucher.Channel
}

func newPayer(n byte) payer {
	return payer{ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32)), voucher.Channel{0: n}}
}

func (p payer) voucher(total uint64) string {
	return voucher.Sign(p.key, apitest.Network, p.channel, total).String()
}

func (p payer) admission(limit uint64) guest.Admission {
	return guest.Admission{Channel: p.channel.String(), Key: hex.EncodeToString(p.key.Public().(ed25519.PublicKey)), Limit: limit}
}

// worker is one with prices and a launcher that acknowledges and admits nothing by
// itself.
type worker struct {
	*apitest.Worker
	testing.TB
	engine atomic.Int64 // requests that reached it
}

func (w *worker) prices(prices ...pay.Price) {
	w.Helper()
	w.control(guest.ControlRequest{Op: guest.OpPrices, Payment: &guest.ControlPayment{Payee: payee, MinDeposit: 5, MinDelay: 6, Prices: prices}})
}

func (w *worker) control(r guest.ControlRequest) guest.ControlReply {
	w.Helper()
	reply, err := w.Ask(r)
	if err != nil || !reply.OK {
		w.Fatalf("%s: %+v, %v", r.Op, reply, err)
	}
	return reply
}

func (w *worker) admit(a guest.Admission) {
	w.Helper()
	w.control(guest.ControlRequest{Op: guest.OpAdmit, Admit: &a})
}

// start runs a worker at the prices of its ceilings. m and engine may be nil.
func start(t testing.TB, m *manifest.Manifest, engine http.HandlerFunc, change func(*api.Config)) *worker {
	t.Helper()
	if m == nil {
		m = apitest.Manifest()
	}
	if engine == nil {
		engine = apitest.Engine
	}
	w := &worker{TB: t}
	inner, err := apitest.Start(m, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.engine.Add(1)
		engine(rw, r)
	}), change)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(inner.Close)
	w.Worker = inner
	if m.Payment != nil {
		w.SetPaymentLimits(patient, patient, patient)
		w.prices(m.Payment.Ceilings...)
	}
	return w
}

// open runs a launcher that acknowledges, and admits what it is told to.
func (w *worker) open(admissions ...guest.Admission) *apitest.Till {
	till := &apitest.Till{Admit: func(channel string) (guest.Admission, bool) {
		at := slices.IndexFunc(admissions, func(a guest.Admission) bool { return a.Channel == channel })
		if at < 0 {
			return guest.Admission{}, false
		}
		return admissions[at], true
	}}
	till.Open(w.Worker)
	w.Cleanup(till.Close)
	return till
}

func (w *worker) request(method, path, body string, header ...string) *http.Request {
	w.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, w.URL+path, r)
	if err != nil {
		w.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		if header[i+1] != "" {
			req.Header.Set(header[i], header[i+1])
		}
	}
	return req
}

func (w *worker) do(req *http.Request) (*http.Response, []byte) {
	w.Helper()
	resp, err := w.Client.Do(req)
	if err != nil {
		w.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.Fatalf("status %d, then %v", resp.StatusCode, err)
	}
	return resp, body
}

// proof is who pays, and a voucher unless total is 0.
func (w *worker) proof(p payer, total uint64) []string {
	h := []string{pay.PayerHeader, pay.SignPayer(p.key, p.channel, w.SPKI).String()}
	if total > 0 {
		h = append(h, pay.VoucherHeader, p.voucher(total))
	}
	return h
}

func (w *worker) pays(p payer, total uint64) {
	w.Helper()
	if resp, body := w.do(w.request("POST", path, "", w.proof(p, total)...)); resp.StatusCode != 200 {
		w.Fatalf("pay %d: %d %s", total, resp.StatusCode, body)
	}
}

func (w *worker) credit(p payer) (used, cover string) {
	w.Helper()
	resp, body := w.do(w.request("GET", path, "", w.proof(p, 0)...))
	terms, err := pay.ParseTerms(body)
	if err != nil || resp.StatusCode != 200 || terms.Accepts[0].Extra.Credit == nil {
		w.Fatalf("%d %s: %v", resp.StatusCode, body, err)
	}
	return terms.Accepts[0].Extra.Credit.Used, terms.Accepts[0].Extra.Credit.Cover
}

// receipt checks an answer's receipt and returns what it says of payment.
func (w *worker) receipt(resp *http.Response) *receipt.Payment {
	w.Helper()
	r, err := receipt.Verify([]byte(resp.Trailer.Get(receipt.Trailer)), w.Receipts)
	if err != nil {
		w.Fatalf("%v: %v", err, resp.Trailer)
	}
	return r.Payment
}

// TestPaid follows a client from its first request, on a channel that nobody knew,
// through kinds of answers. Each is charged by the engine's figures, its receipt says
// so, and the launcher is told.
func TestPaid(t *testing.T) {
	w := start(t, nil, nil, nil)
	p := newPayer(1)
	till := w.open(p.admission(100 * step))
	used, sent := uint64(0), uint64(0)
	for i, tt := range []struct {
		name, path, body   string
		stream             bool
		prompt, completion int64
		price              pay.Price
	}{
		{"an answer", chat, ask, false, 0, 8, pay.Price{Prompt: 1_000_000, Completion: 3_000_000}},
		{"a stream", chat, streamed(ask), true, 0, 8, pay.Price{Prompt: 1_000_000, Completion: 3_000_000}},
		{"another model", chat, strings.Replace(ask, "test/model", "test/other@1", 1), false, 0, 8, pay.Price{Prompt: 2_000_000, Completion: 2_000_000}},
		{"a completion", "/v1/completions", `{"model":"test/model","prompt":"x","max_tokens":3}`, false, 0, 3, pay.Price{Prompt: 1_000_000, Completion: 3_000_000}},
		{"embeddings", "/v1/embeddings", `{"model":"test/model","input":"some text to embed"}`, false, 0, 0, pay.Price{Prompt: 1_000_000, Completion: 3_000_000}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.TB = t
			total := uint64(0)
			if i == 0 {
				total = 10 * step
			}
			resp, body := w.do(w.request("POST", tt.path, tt.body, w.proof(p, total)...))
			if resp.StatusCode != 200 {
				t.Fatalf("%d %s", resp.StatusCode, body)
			}
			got := w.receipt(resp)
			if got == nil || got.PromptPrice != tt.price.Prompt || got.CompletionPrice != tt.price.Completion ||
				got.PromptTokens <= 0 || got.PromptTokens > int64(len(tt.body))+pay.TemplateTokens || got.CompletionTokens != tt.completion {
				t.Fatalf("%+v", got)
			}
			charged := tt.price.Cost(got.PromptTokens, got.CompletionTokens)
			used += charged
			sent += uint64(got.PromptTokens)
			if got.Channel != p.channel.String() || got.Charged != pay.FormatAmount(charged) || got.Used != pay.FormatAmount(used) || got.Cover != pay.FormatAmount(10*step) {
				t.Errorf("%+v, %d used", got, used)
			}
			if u, c := w.credit(p); u != pay.FormatAmount(used) || c != pay.FormatAmount(10*step) {
				t.Errorf("the credit is %s of %s", u, c)
			}
			if tt.stream {
				covered, signed, err := receipt.SplitStream(body)
				if err != nil || string(signed) != resp.Trailer.Get(receipt.Trailer) || !bytes.Contains(covered, []byte("[DONE]")) {
					t.Errorf("%v: %s", err, body)
				}
			}
			if n := len(resp.Trailer.Get(receipt.Trailer)) + len(resp.Trailer.Get("Chrysalis-Padding")); n != 1536+1 {
				t.Errorf("the trailers have %d bytes", n)
			}
		})
	}
	w.TB = t
	agenttest.Eventually(t, "all is told", func() bool {
		var earned, prompt, requests uint64
		var vouchers []string
		for _, b := range till.Balances() {
			if b.Channel != p.channel.String() {
				t.Fatalf("%+v", b)
			}
			if b.Voucher != "" {
				vouchers = append(vouchers, b.Voucher)
			}
			for _, u := range b.Uses {
				earned += u.Earned
				prompt += u.PromptTokens
				requests += u.Requests
			}
		}
		return earned == used && prompt == sent && requests == 5 && slices.Equal(vouchers, []string{p.voucher(10 * step)})
	})
	if !slices.Equal(till.Wanted(), []string{p.channel.String()}) {
		t.Errorf("wanted: %v", till.Wanted())
	}
	if paid, unpaid := w.Counters.Paid.Load(), w.Counters.Unpaid.Load(); paid != 5 || unpaid != 0 {
		t.Errorf("%d paid, %d not", paid, unpaid)
	}
}

// TestUnpaid is every way not to be served: 402 with the terms and a reason, and the
// engine hears nothing of it.
func TestUnpaid(t *testing.T) {
	w := start(t, nil, nil, nil)
	p, closing, stranger := newPayer(1), newPayer(2), newPayer(3)
	w.open()
	w.admit(p.admission(10 * step))
	w.admit(closing.admission(10 * step))
	w.pays(p, 2*step)
	w.pays(closing, 2*step)
	gone := closing.admission(10 * step)
	gone.Closing = true
	w.admit(gone)
	w.SetPaymentLimits(hasty, patient, patient)
	who := func(q payer) string { return pay.SignPayer(q.key, q.channel, w.SPKI).String() }
	good := who(p)
	otherVM := pay.SignPayer(p.key, p.channel, [32]byte{9}).String()
	otherKey := pay.SignPayer(stranger.key, p.channel, w.SPKI).String()
	forged := voucher.Sign(stranger.key, apitest.Network, p.channel, 4*step).String()
	elsewhere := voucher.Sign(p.key, apitest.Network+1, p.channel, 4*step).String()
	huge := `{"model":"test/model","messages":[{"role":"user","content":"` + strings.Repeat("x", 4*step) + `"}]}`
	for _, tt := range []struct {
		name, body, payer, voucher, says string
		credit                           bool
	}{
		{"nothing", ask, "", "", "open a channel", false},
		{"a voucher and nobody", ask, "", p.voucher(4 * step), "open a channel", false},
		{"a broken proof", ask, "x", "", "base64url", false},
		{"a broken voucher", ask, good, "x", "malformed", false},
		{"another VM's proof", ask, otherVM, "", "for this VM", false},
		{"another key's proof", ask, otherKey, "", "for this VM", false},
		{"another key's proof with a good voucher", ask, otherKey, p.voucher(4 * step), "for this VM", false},
		{"a channel that is not admitted", ask, who(stranger), stranger.voucher(4 * step), "admits it", false},
		{"a channel that is closing", ask, who(closing), "", "closing", true},
		{"a voucher on a channel that is closing", ask, who(closing), closing.voucher(4 * step), "closing", true},
		{"another channel's voucher", ask, good, stranger.voucher(4 * step), "another channel", false},
		{"another key's voucher", ask, good, forged, "payer", true},
		{"another network's voucher", ask, good, elsewhere, "another network", true},
		{"a voucher for less", ask, good, p.voucher(step), "no more than", true},
		{"a voucher for less than a step more", ask, good, p.voucher(3*step - 1), "less than a step", true},
		{"a voucher for more than there is", ask, good, p.voucher(10*step + 1), "top it up", true},
		{"a prompt that is not covered", huge, good, "", "used up", true},
		{"a stream that is not covered", streamed(huge), good, "", "used up", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.TB = t
			for _, request := range []*http.Request{
				w.request("POST", chat, tt.body, pay.PayerHeader, tt.payer, pay.VoucherHeader, tt.voucher),
				w.request("POST", path, "", pay.PayerHeader, tt.payer, pay.VoucherHeader, tt.voucher),
			} {
				if request.URL.Path == path && tt.voucher == "" {
					continue
				}
				resp, body := w.do(request)
				terms, err := pay.ParseTerms(body)
				if err != nil || resp.StatusCode != 402 || resp.Header.Get("Content-Type") != "application/json" {
					t.Fatalf("%d %v: %v: %s", resp.StatusCode, resp.Header, err, body)
				}
				a := terms.Accepts[0]
				if !strings.Contains(terms.Error, tt.says) || a.PayTo != payee || a.Extra.MinDelay != 6 || a.Extra.MinDeposit != "5" || a.Resource != request.URL.Path {
					t.Errorf("%s", body)
				}
				if (a.Extra.Credit != nil) != tt.credit || tt.credit && tt.payer == good && a.Extra.Credit.Cover != pay.FormatAmount(2*step) {
					t.Errorf("the credit is %+v", a.Extra.Credit)
				}
				for _, secret := range []string{"secret", tt.payer, tt.voucher} {
					if len(secret) > 5 && bytes.Contains(body, []byte(secret)) {
						t.Errorf("it tells %q: %s", secret, body)
					}
				}
			}
		})
	}
	w.TB = t
	if n := w.engine.Load(); n != 0 {
		t.Errorf("%d requests reached the engine", n)
	}
	if w.Counters.Refused.Load() != 0 || w.Counters.Unpaid.Load() < 18 || w.Counters.Paid.Load() != 0 || w.Active() != 0 {
		t.Errorf("%d unpaid, %d refused", w.Counters.Unpaid.Load(), w.Counters.Refused.Load())
	}
	if used, _ := w.credit(p); used != "0" {
		t.Errorf("%s used", used)
	}
}

// TestUnpaidBeforeBody refuses who says nothing of payment before it has sent its
// body; but where a model is free the body says which one it is.
func TestUnpaidBeforeBody(t *testing.T) {
	m := apitest.Manifest()
	m.Models, m.Payment.Ceilings = m.Models[:2], m.Payment.Ceilings[:2]
	w := start(t, m, nil, nil)
	r, hold := io.Pipe()
	defer hold.Close()
	req, err := http.NewRequest("POST", w.URL+chat, r)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.ContentLength = 1 << 20
	if resp, body := w.do(req); resp.StatusCode != 402 || !bytes.Contains(body, []byte("open a channel")) {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	// Nor do bodies wait for channels that nobody knows, even where a model is free.
	w = start(t, nil, nil, nil)
	r, hold = io.Pipe()
	defer hold.Close()
	if req, err = http.NewRequest("POST", w.URL+chat, r); err != nil {
		t.Fatal(err)
	}
	p := newPayer(1)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(pay.PayerHeader, w.proof(p, 0)[1])
	req.ContentLength = 16 << 20
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := w.Client.Do(req); err == nil {
			resp.Body.Close()
		}
	}()
	go hold.Write(make([]byte, 1<<20))
	agenttest.Eventually(t, "the channel is wanted", func() bool {
		return len(w.control(guest.ControlRequest{Op: guest.OpCollect}).Wanted) == 1
	})
	if n := w.HeldMemory(); n != 0 {
		t.Errorf("%d bytes are held", n)
	}
	hold.Close()
	<-done
}

// TestFree serves for nothing what costs nothing, to anybody.
func TestFree(t *testing.T) {
	w := start(t, nil, nil, nil)
	for _, header := range [][]string{nil, {pay.PayerHeader, "nonsense", pay.VoucherHeader, "nonsense"}} {
		resp, body := w.do(w.request("POST", chat, strings.Replace(ask, "test/model", "test/free", 1), header...))
		if resp.StatusCode != 200 || w.receipt(resp) != nil {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	}
	w.prices(pay.Price{}, pay.Price{}, pay.Price{})
	if resp, body := w.do(w.request("POST", chat, ask)); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	if w.Counters.Paid.Load() != 0 {
		t.Error("counted as paid")
	}

	// A VM whose manifest has no payment.
	m := apitest.Manifest()
	m.Payment = nil
	w = start(t, m, nil, nil)
	for _, method := range []string{"GET", "POST"} {
		if resp, body := w.do(w.request(method, path, "")); resp.StatusCode != 404 {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	}
	if resp, body := w.do(w.request("POST", chat, ask, pay.PayerHeader, "nonsense")); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	p := newPayer(1).admission(5)
	for _, r := range []guest.ControlRequest{
		{Op: guest.OpPrices, Payment: &guest.ControlPayment{Payee: payee, Prices: []pay.Price{}}}, {Op: guest.OpAdmit, Admit: &p},
		{Op: guest.OpDrop, Channel: p.Channel}, {Op: guest.OpCollect},
	} {
		if reply, err := w.Ask(r); err != nil || reply.OK || reply.Error != guest.ErrorPayment {
			t.Errorf("%s: %+v, %v", r.Op, reply, err)
		}
	}
}

// TestNoPrices is a worker whose launcher has not said who is paid: there are no
// terms that a client could take, so it is not 402.
func TestNoPrices(t *testing.T) {
	inner, err := apitest.Start(nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(inner.Close)
	w := &worker{TB: t, Worker: inner}
	p := newPayer(1)
	w.admit(p.admission(10 * step))
	for _, req := range []*http.Request{
		w.request("GET", path, ""), w.request("GET", path, "", w.proof(p, 0)...), w.request("POST", path, "", w.proof(p, step)...),
		w.request("POST", chat, ask), w.request("POST", chat, ask, w.proof(p, step)...),
	} {
		resp, body := w.do(req)
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !bytes.Contains(body, []byte("payment_not_ready")) {
			t.Errorf("%s %s: %d %s", req.Method, req.URL.Path, resp.StatusCode, body)
		}
	}
	if resp, body := w.do(w.request("POST", chat, strings.Replace(ask, "test/model", "test/free", 1))); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

// TestPaymentPath is what the path refuses beside what is not paid.
func TestPaymentPath(t *testing.T) {
	token := "a token"
	m := apitest.Manifest()
	m.Tokens = []string{manifest.TokenHash(token)}
	w := start(t, m, nil, nil)
	p := newPayer(1)
	w.open(p.admission(10 * step))
	bearer := []string{"Authorization", "Bearer " + token}
	for _, tt := range []struct {
		name   string
		req    *http.Request
		status int
	}{
		{"no token", w.request("GET", path, ""), 401},
		{"no token, and a payer", w.request("POST", path, "", w.proof(p, step)...), 401},
		{"the terms", w.request("GET", path, "", bearer...), 200},
		{"a query", w.request("GET", path+"?x", "", bearer...), 400},
		{"a body", w.request("POST", path, "{}", append(w.proof(p, step), bearer...)...), 400},
		{"another method", w.request("PUT", path, "", bearer...), 405},
		{"a voucher with GET", w.request("GET", path, "", append(w.proof(p, step), bearer...)...), 400},
		{"no voucher with POST", w.request("POST", path, "", append(w.proof(p, 0), bearer...)...), 400},
		{"a payment", w.request("POST", path, "", append(w.proof(p, step), bearer...)...), 200},
		{"the same again", w.request("POST", path, "", append(w.proof(p, step), bearer...)...), 200},
		{"a request without a token", w.request("POST", chat, ask, w.proof(p, 0)...), 401},
		{"a request", w.request("POST", chat, ask, append(w.proof(p, 0), bearer...)...), 200},
	} {
		if resp, body := w.do(tt.req); resp.StatusCode != tt.status {
			t.Errorf("%s: %d %s", tt.name, resp.StatusCode, body)
		} else if tt.status == 405 && resp.Header.Get("Allow") != "GET, POST" {
			t.Errorf("%v", resp.Header)
		}
	}
	_, body := w.do(w.request("GET", path, "", bearer...))
	terms, err := pay.ParseTerms(body)
	if err != nil {
		t.Fatal(err)
	}
	a := terms.Accepts[0]
	if terms.Error != "" || a.Extra.Credit != nil || a.Amount != strconv.Itoa(step) || len(a.Extra.Models) != 3 || a.Extra.CodeHash != hex.EncodeToString(voucher.CodeHash[:]) {
		t.Errorf("%s", body)
	}
}

// TestDurableFirst serves nothing on a voucher that the launcher has not
// acknowledged, and tells it again until it has.
func TestDurableFirst(t *testing.T) {
	w := start(t, nil, nil, nil)
	w.SetPaymentLimits(patient, hasty, patient)
	p := newPayer(1)
	w.admit(p.admission(10 * step))
	for range 2 {
		resp, body := w.do(w.request("POST", chat, ask, w.proof(p, 2*step)...))
		if resp.StatusCode != 402 || !bytes.Contains(body, []byte("put on disk")) || !bytes.Contains(body, []byte(`"cover":"0"`)) {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	}
	if w.engine.Load() != 0 {
		t.Error("it was served")
	}
	told := w.control(guest.ControlRequest{Op: guest.OpCollect})
	if told.Batch != 1 || len(told.Balances) != 1 || told.Balances[0].Voucher != p.voucher(2*step) {
		t.Fatalf("%+v", told)
	}
	// A better one meanwhile.
	if resp, _ := w.do(w.request("POST", path, "", w.proof(p, 3*step)...)); resp.StatusCode != 402 {
		t.Error(resp.Status)
	}
	if again := w.control(guest.ControlRequest{Op: guest.OpCollect}); again.Batch != 1 || again.Balances[0].Voucher != p.voucher(2*step) {
		t.Errorf("not told again: %+v", again)
	}
	if reply, err := w.Ask(guest.ControlRequest{Op: guest.OpCollect, Ack: 2}); err != nil || reply.OK || reply.Error != guest.ErrorRefused {
		t.Errorf("an acknowledgement of what was not told: %+v, %v", reply, err)
	}
	if resp, _ := w.do(w.request("POST", chat, ask, w.proof(p, 0)...)); resp.StatusCode != 402 {
		t.Error(resp.Status)
	}
	// A request waits for it.
	w.SetPaymentLimits(patient, patient, patient)
	answered := make(chan int)
	go func() {
		resp, _ := w.do(w.request("POST", chat, ask, w.proof(p, 3*step)...))
		answered <- resp.StatusCode
	}()
	next := w.control(guest.ControlRequest{Op: guest.OpCollect, Ack: 1})
	if next.Batch != 2 || next.Balances[0].Voucher != p.voucher(3*step) {
		t.Errorf("%+v", next)
	}
	if _, cover := w.credit(p); cover != pay.FormatAmount(2*step) {
		t.Errorf("%s covered", cover)
	}
	select {
	case status := <-answered:
		t.Fatalf("%d before it is durable", status)
	case <-time.After(50 * time.Millisecond):
	}
	w.control(guest.ControlRequest{Op: guest.OpCollect, Ack: 2})
	if status := <-answered; status != 200 {
		t.Error(status)
	}
	// What was used comes with a long poll.
	at := time.Now()
	last := w.control(guest.ControlRequest{Op: guest.OpCollect, Ack: 2, WaitMS: 3000})
	if last.Batch != 3 || last.Balances[0].Voucher != "" || len(last.Balances[0].Uses) != 1 || last.Balances[0].Uses[0].Model != 0 || time.Since(at) > 2*time.Second {
		t.Errorf("%+v after %v", last, time.Since(at))
	}
	at = time.Now()
	if nothing := w.control(guest.ControlRequest{Op: guest.OpCollect, Ack: 3, WaitMS: 200}); nothing.Batch != 0 || time.Since(at) < 150*time.Millisecond {
		t.Errorf("%+v after %v", nothing, time.Since(at))
	}
}

// events is an engine whose stream has so many events of so many bytes of text, and
// then says what usage is.
func events(n, bytes int, usage string, pause func(i int)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, `data: {"choices":[{"delta":{"role":"assistant","content":""}}]}`+"\n\n")
		for i := range n {
			if pause != nil {
				pause(i)
			}
			if _, err := fmt.Fprintf(w, `data: {"choices":[{"delta":{"content":%q}}]}`+"\n\n", strings.Repeat("x", bytes)); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
		fmt.Fprintf(w, "data: {\"choices\":[],\"usage\":%s}\n\ndata: [DONE]\n\n", usage)
	}
}

const small = 5000 // a step in nanotons

func smallSteps() *manifest.Manifest {
	m := apitest.Manifest()
	m.Payment.Step = small
	return m
}

// covered is how many events of so many bytes a stream gets.
func covered(cover uint64, body string, bytes int64) (n int64) {
	price := pay.Price{Prompt: 1_000_000, Completion: 3_000_000}
	for price.Cost(int64(len(body))+1024, (n+1)*bytes+64) <= cover+small {
		n++
	}
	return n
}

// TestCutOff ends a stream before the first event that is not covered, to the
// nanoton, and charges for what was sent.
func TestCutOff(t *testing.T) {
	w := start(t, smallSteps(), events(100, 97, `{"prompt_tokens":20,"completion_tokens":9}`, nil), nil)
	w.SetPaymentLimits(patient, patient, hasty)
	p := newPayer(1)
	w.open(p.admission(100 * small))
	body := streamed(ask)
	resp, got := w.do(w.request("POST", chat, body, w.proof(p, small)...))
	want := covered(small, body, 97)
	if want < 10 || want > 90 {
		t.Fatalf("%d events are no test", want)
	}
	if n := int64(bytes.Count(got, []byte("xxx\""))); n != want || resp.StatusCode != 200 {
		t.Errorf("%d events, not %d", n, want)
	}
	stream, _, err := receipt.SplitStream(got)
	if err != nil || bytes.Contains(got, []byte("[DONE]")) ||
		!bytes.Contains(stream, []byte(`data: {"error":{"message":"what was paid is used up, and no voucher for more came in time; what was sent until here is charged","type":"payment_required","param":null,"code":"payment_required"}}`)) {
		t.Errorf("%v: %s", err, got)
	}
	r := w.receipt(resp)
	if r.CompletionTokens != want || r.PromptTokens != int64(len(body))/8 || r.Charged != strconv.FormatInt(r.PromptTokens+3*want, 10) || r.Used != r.Charged {
		t.Errorf("%+v", r)
	}
	if w.Counters.Unpaid.Load() != 1 || w.Counters.EngineErrors.Load() != 0 || w.Counters.Cancelled.Load() != 0 {
		t.Errorf("%d unpaid", w.Counters.Unpaid.Load())
	}
	agenttest.Eventually(t, "no place is held", func() bool { return w.Active() == 0 })

	if t.Failed() {
		return // what follows would go on until the VM's time limit
	}
	// Nothing has gone out before the first one: that is an answer 402.
	w2 := start(t, smallSteps(), func(rw http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		rw.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(rw, `data: {"choices":[{"delta":{"content":%q}}]}`+"\n\n", strings.Repeat("x", 4*small))
		rw.(http.Flusher).Flush()
		<-r.Context().Done()
	}, nil)
	w2.SetPaymentLimits(patient, patient, hasty)
	w2.open(p.admission(100 * small))
	resp, got = w2.do(w2.request("POST", chat, body, w2.proof(p, small)...))
	if terms, err := pay.ParseTerms(got); err != nil || resp.StatusCode != 402 || terms.Accepts[0].Extra.Credit.Used != "0" {
		t.Errorf("%d %s", resp.StatusCode, got)
	}
}

// TestGoOn pays on another connection whenever a stream stops, until it is whole. It
// is then charged by the engine's figures.
func TestGoOn(t *testing.T) {
	w := start(t, smallSteps(), events(100, 97, `{"prompt_tokens":20,"completion_tokens":900}`, nil), nil)
	p := newPayer(1)
	till := w.open(p.admission(100 * small))
	body := streamed(ask)
	resp, err := w.Client.Do(w.request("POST", chat, body, w.proof(p, small)...))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	total, seen := uint64(small), int64(0)
	lines := bufio.NewReader(resp.Body)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, `xxx"`) {
			seen++
		}
		// The next one is not covered: the stream has stopped here.
		if seen < 100 && seen == covered(total, body, 97) {
			total += small
			w.pays(p, total)
		}
		if strings.Contains(line, "error") {
			t.Fatal(line)
		}
	}
	if seen != 100 || total < 3*small {
		t.Errorf("%d events for %d", seen, total)
	}
	r := w.receipt(resp)
	if r == nil || r.PromptTokens != 20 || r.CompletionTokens != 900 || r.Charged != "2720" || r.Cover != pay.FormatAmount(total) {
		t.Errorf("%+v", r)
	}
	if n := len(till.Balances()); n == 0 {
		t.Error("nothing told")
	}
}

// TestLeftEarly charges a client that hangs up for what has been sent to it.
func TestLeftEarly(t *testing.T) {
	for _, stream := range []bool{true, false} {
		t.Run(fmt.Sprint("stream=", stream), func(t *testing.T) {
			const sent = 7
			begun := make(chan struct{})
			w := start(t, smallSteps(), func(rw http.ResponseWriter, r *http.Request) {
				if stream {
					events(sent+1, 10, `{}`, func(i int) {
						if i == sent {
							close(begun)
							<-r.Context().Done()
						}
					})(rw, r)
					return
				}
				io.Copy(io.Discard, r.Body)
				close(begun)
				<-r.Context().Done()
			}, nil)
			p := newPayer(1)
			till := w.open(p.admission(100 * small))
			w.pays(p, 2*small)
			body := ask
			if stream {
				body = streamed(ask)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			got := make(chan struct{}, 100)
			go func() {
				defer close(done)
				resp, err := w.Client.Do(w.request("POST", chat, body, w.proof(p, 0)...).WithContext(ctx))
				if err != nil {
					return
				}
				defer resp.Body.Close()
				for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
					if strings.Contains(lines.Text(), `xxx"`) {
						got <- struct{}{}
					}
				}
			}()
			<-begun
			want := pay.Use{}
			if stream {
				for range sent {
					<-got
				}
				want = pay.Use{Requests: 1, PromptTokens: uint64(len(body)) / 8, CompletionTokens: sent, Earned: uint64(len(body))/8 + 3*sent}
			}
			cancel()
			<-done
			agenttest.Eventually(t, "no place is held", func() bool { return w.Active() == 0 && w.Counters.Cancelled.Load() == 1 })
			if used, _ := w.credit(p); used != pay.FormatAmount(want.Earned) {
				t.Errorf("%s used, not %d", used, want.Earned)
			}
			if !stream {
				return
			}
			agenttest.Eventually(t, "it is told", func() bool {
				return slices.ContainsFunc(till.Balances(), func(b guest.Balance) bool {
					return len(b.Uses) == 1 && b.Uses[0] == guest.Use{Model: 0, Requests: 1, PromptTokens: want.PromptTokens, CompletionTokens: sent, Earned: want.Earned}
				})
			})
		})
	}
}

// TestTimeLimit charges for what was sent until the VM's own limit, which a client can
// have any request run into.
func TestTimeLimit(t *testing.T) {
	m := smallSteps()
	m.Limits.TotalSeconds = 1
	w := start(t, m, func(rw http.ResponseWriter, r *http.Request) {
		events(6, 10, `{}`, func(i int) {
			if i == 5 {
				<-r.Context().Done()
			}
		})(rw, r)
	}, nil)
	p := newPayer(1)
	w.open(p.admission(100 * small))
	w.pays(p, 2*small)
	body := streamed(ask)
	resp, err := w.Client.Do(w.request("POST", chat, body, w.proof(p, 0)...))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err == nil || !bytes.Contains(got, []byte("time_limit")) {
		t.Errorf("%v: %s", err, got)
	}
	agenttest.Eventually(t, "no place is held", func() bool { return w.Active() == 0 })
	if used, _ := w.credit(p); used != strconv.Itoa(len(body)/8+3*5) {
		t.Errorf("%s used", used)
	}
}

// TestEngineLies charges nothing where the engine's figures cannot be, where it gives
// none, and where it does not end well.
func TestEngineLies(t *testing.T) {
	const content = `"choices":[{"message":{"content":"Hello"}}]`
	for _, tt := range []struct{ name, body, say string }{
		{"too many", ask, `{` + content + `,"usage":{"prompt_tokens":7,"completion_tokens":70}}`},
		{"too long a prompt", ask, `{` + content + `,"usage":{"prompt_tokens":2000,"completion_tokens":5}}`},
		{"more than were asked for", strings.Replace(ask, "{", `{"max_tokens":3,`, 1), `{` + content + `,"usage":{"prompt_tokens":7,"completion_tokens":4}}`},
		{"below zero", ask, `{` + content + `,"usage":{"prompt_tokens":7,"completion_tokens":-4}}`},
		{"none", ask, `{` + content + `}`},
		{"half of them", ask, `{` + content + `,"usage":{"prompt_tokens":7}}`},
		{"no numbers", ask, `{` + content + `,"usage":{"prompt_tokens":"7","completion_tokens":1}}`},
		{"a stream with too many", streamed(ask), `data: {"choices":[{"delta":{"content":"Hello"}}],"usage":{"prompt_tokens":7,"completion_tokens":70}}` + "\n\ndata: [DONE]\n\n"},
		{"a stream with none", streamed(ask), `data: {"choices":[{"delta":{"content":"Hello"}}]}` + "\n\ndata: [DONE]\n\n"},
		{"a stream that breaks off", streamed(ask), `data: {"choices":[{"delta":{"content":"Hello"}}]}` + "\n\n"},
		{"a stream that fails", streamed(ask), `data: {"choices":[{"delta":{"content":"Hello"}}]}` + "\n\n" + `data: {"error":{"message":"no"}}` + "\n\n"},
		{"an error", ask, ""},
		{"nonsense", ask, "nonsense"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := start(t, nil, func(rw http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				rw.Header().Set("Content-Type", "application/json")
				switch {
				case tt.body != ask && strings.Contains(tt.body, "stream"):
					rw.Header().Set("Content-Type", "text/event-stream")
				case tt.say == "":
					rw.WriteHeader(500)
				}
				io.WriteString(rw, tt.say)
			}, nil)
			p := newPayer(1)
			w.open(p.admission(10 * step))
			w.pays(p, step)
			resp, err := w.Client.Do(w.request("POST", chat, tt.body, w.proof(p, 0)...))
			if err != nil {
				t.Fatal(err)
			}
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			if err == nil && resp.StatusCode == 200 {
				if r := w.receipt(resp); r == nil || r.Charged != "0" || r.PromptTokens != 0 || r.CompletionTokens != 0 {
					t.Errorf("%+v", r)
				}
			}
			if used, _ := w.credit(p); used != "0" {
				t.Errorf("%s used", used)
			}
			// Nor is anything held any more.
			if resp, body := w.do(w.request("GET", path, "", w.proof(p, 0)...)); resp.StatusCode != 200 {
				t.Errorf("%d %s", resp.StatusCode, body)
			}
			reply := w.control(guest.ControlRequest{Op: guest.OpDrop, Channel: p.channel.String()})
			if !reply.OK {
				t.Errorf("%+v", reply)
			}
		})
	}
}

// TestLowered has the engine make no more than what was paid covers.
func TestLowered(t *testing.T) {
	told := make(chan string, 1)
	w := start(t, smallSteps(), func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		told <- string(body)
		rw.Header().Set("Content-Type", "application/json")
		io.WriteString(rw, `{"choices":[{"message":{"content":"Hello"}}],"usage":{"prompt_tokens":9,"completion_tokens":2}}`)
	}, nil)
	p := newPayer(1)
	w.open(p.admission(1000 * small))
	w.pays(p, small)
	var used int64
	for _, tt := range []struct{ field, want string }{
		{"", "?"}, {`"max_tokens":4000,`, "?"}, {`"max_completion_tokens":4000,`, "?"}, {`"max_tokens":17,`, "17"}, {`"max_completion_tokens":17,`, "17"},
	} {
		body := strings.Replace(ask, "{", "{"+tt.field, 1)
		if tt.want == "?" { // 1 nanoton a token of the prompt, 3 of the answer
			tt.want = strconv.FormatInt((2*small-used-int64(len(body))-1024)/3, 10)
		}
		if resp, got := w.do(w.request("POST", chat, body, w.proof(p, 0)...)); resp.StatusCode != 200 {
			t.Fatalf("%d %s", resp.StatusCode, got)
		}
		used += 9 + 3*2
		if got := <-told; !strings.Contains(got, `"max_tokens":`+tt.want+`,`) || strings.Count(got, "max_tokens") != 1 {
			t.Errorf("%s: the engine is told %s, not %s", tt.field, got, tt.want)
		}
	}
	// With cover for everything the engine's own limit is left alone.
	m := smallSteps()
	m.Payment.Ceilings = []pay.Price{{Prompt: 1_000_000}, {Prompt: 1}, {}}
	w = start(t, m, func(rw http.ResponseWriter, r *http.Request) {
		apitest.Engine(rw, func() *http.Request {
			body, _ := io.ReadAll(r.Body)
			told <- string(body)
			r.Body = io.NopCloser(bytes.NewReader(body))
			return r
		}())
	}, nil)
	w.open(p.admission(1000 * small))
	w.pays(p, small)
	if resp, got := w.do(w.request("POST", chat, ask, w.proof(p, 0)...)); resp.StatusCode != 200 {
		t.Fatalf("%d %s", resp.StatusCode, got)
	}
	if got := <-told; strings.Contains(got, "max_tokens") {
		t.Errorf("the engine is told %s", got)
	}
}

// TestLongPaidAnswer holds what is paid for until its price is known: an answer longer
// than others hold is charged, and one that is too long to hold is not sent.
func TestLongPaidAnswer(t *testing.T) {
	size := 1 << 20
	w := start(t, nil, func(rw http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		rw.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(rw, `{"logprobs":%q,"choices":[{"message":{"content":"Hello"}}],"usage":{"prompt_tokens":9,"completion_tokens":2}}`, strings.Repeat("x", size))
	}, nil)
	p := newPayer(1)
	w.open(p.admission(10 * step))
	w.pays(p, step)
	resp, _ := w.do(w.request("POST", chat, ask, w.proof(p, 0)...))
	if r := w.receipt(resp); r == nil || r.Charged != "15" {
		t.Errorf("%d, %+v", resp.StatusCode, r)
	}
	size = 9 << 20
	resp, body := w.do(w.request("POST", chat, ask, w.proof(p, 0)...))
	if resp.StatusCode != 502 || !bytes.Contains(body, []byte("answer_too_large")) {
		t.Errorf("%d %.200s", resp.StatusCode, body)
	}
	if used, _ := w.credit(p); used != "15" {
		t.Errorf("%s used", used)
	}
}

// TestPriceRaised serves what was paid for at the price of then.
func TestPriceRaised(t *testing.T) {
	w := start(t, nil, nil, nil)
	p := newPayer(1)
	w.open(p.admission(100 * step))
	w.prices(pay.Price{Prompt: 100, Completion: 200}, pay.Price{}, pay.Price{})
	w.pays(p, 2*step)
	w.prices(pay.Price{Prompt: 1_000_000, Completion: 3_000_000}, pay.Price{}, pay.Price{})
	resp, body := w.do(w.request("POST", chat, ask, w.proof(p, 0)...))
	if resp.StatusCode != 200 {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	if r := w.receipt(resp); r.PromptPrice != 100 || r.CompletionPrice != 200 {
		t.Errorf("%+v", r)
	}
	// A client that comes now pays the new one.
	q := newPayer(2)
	w.admit(q.admission(100 * step))
	resp, _ = w.do(w.request("POST", chat, ask, w.proof(q, step)...))
	if r := w.receipt(resp); r.PromptPrice != 1_000_000 || r.CompletionPrice != 3_000_000 {
		t.Errorf("%+v", r)
	}
}

// TestRestart goes on on a channel where another VM left it.
func TestRestart(t *testing.T) {
	p := newPayer(1)
	w := start(t, nil, nil, nil)
	w.open(p.admission(100 * step))
	w.pays(p, 2*step)
	resp, _ := w.do(w.request("POST", chat, ask, w.proof(p, 0)...))
	before := w.receipt(resp)
	used, err := pay.ParseAmount(before.Used)
	if err != nil || used == 0 {
		t.Fatalf("%+v", before)
	}

	w = start(t, nil, nil, nil)
	a := p.admission(100 * step)
	a.Used, a.Best = used, p.voucher(2*step)
	till := w.open(a)
	if u, c := w.credit(p); u != before.Used || c != before.Cover {
		t.Errorf("%s of %s, and before %s of %s", u, c, before.Used, before.Cover)
	}
	resp, _ = w.do(w.request("POST", chat, ask, w.proof(p, 0)...))
	if after := w.receipt(resp); after.Used != pay.FormatAmount(2*used) || after.Charged != before.Charged {
		t.Errorf("%+v, before %+v", after, before)
	}
	if resp, _ := w.do(w.request("POST", path, "", w.proof(p, 2*step)...)); resp.StatusCode != 200 {
		t.Error("the best voucher again is refused")
	}
	if resp, _ := w.do(w.request("POST", path, "", w.proof(p, step)...)); resp.StatusCode != 402 {
		t.Error("an older voucher is taken")
	}
	agenttest.Eventually(t, "what is new is told, and nothing else", func() bool {
		list := till.Balances()
		return len(list) == 1 && list[0].Voucher == "" && len(list[0].Uses) == 1 && list[0].Uses[0].Earned == used
	})
}

// TestDrain lets streams be paid for, and what was paid be collected, to the end.
func TestDrain(t *testing.T) {
	resume := make(chan struct{})
	w := start(t, smallSteps(), events(2, 10, `{"prompt_tokens":9,"completion_tokens":2}`, func(i int) {
		if i == 1 {
			<-resume
		}
	}), nil)
	p := newPayer(1)
	till := w.open(p.admission(100 * small))
	resp, err := w.Client.Do(w.request("POST", chat, streamed(ask), w.proof(p, small)...))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if reply := w.control(guest.ControlRequest{Op: guest.OpDrain}); reply.Active != 1 {
		t.Errorf("%+v", reply)
	}
	w.pays(p, 3*small)
	if resp, body := w.do(w.request("POST", chat, ask, w.proof(p, 0)...)); resp.StatusCode != 503 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	close(resume)
	if _, err := io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	if r := w.receipt(resp); r.Charged != "15" || r.Cover != pay.FormatAmount(3*small) {
		t.Errorf("%+v", r)
	}
	agenttest.Eventually(t, "it is told", func() bool {
		last := till.Balances()
		return len(last) > 0 && len(last[len(last)-1].Uses) == 1 && last[len(last)-1].Uses[0].Earned == 15
	})
}

// TestControlRefuses is what the host may not say.
func TestControlRefuses(t *testing.T) {
	w := start(t, nil, nil, nil)
	p := newPayer(1)
	good := p.admission(10 * step)
	payment := func(change func(*guest.ControlPayment)) guest.ControlRequest {
		c := &guest.ControlPayment{Payee: payee, Prices: []pay.Price{{}, {}, {}}}
		change(c)
		return guest.ControlRequest{Op: guest.OpPrices, Payment: c}
	}
	admission := func(change func(*guest.Admission)) guest.ControlRequest {
		a := good
		change(&a)
		return guest.ControlRequest{Op: guest.OpAdmit, Admit: &a}
	}
	for name, r := range map[string]guest.ControlRequest{
		"no payee":                payment(func(c *guest.ControlPayment) { c.Payee = "" }),
		"a masterchain payee":     payment(func(c *guest.ControlPayment) { c.Payee = "-1:" + payee[2:] }),
		"a delay below 0":         payment(func(c *guest.ControlPayment) { c.MinDelay = -1 }),
		"a huge delay":            payment(func(c *guest.ControlPayment) { c.MinDelay = 1 << 32 }),
		"no prices":               payment(func(c *guest.ControlPayment) { c.Prices = []pay.Price{} }),
		"a price too many":        payment(func(c *guest.ControlPayment) { c.Prices = make([]pay.Price, 4) }),
		"a price above":           payment(func(c *guest.ControlPayment) { c.Prices[0].Prompt = 1_000_001 }),
		"a price above for free":  payment(func(c *guest.ControlPayment) { c.Prices[2].Completion = 1 }),
		"a price below 0":         payment(func(c *guest.ControlPayment) { c.Prices[0].Prompt = -1 }),
		"no channel":              admission(func(a *guest.Admission) { a.Channel = "" }),
		"a channel in upper case": admission(func(a *guest.Admission) { a.Channel = "0:" + strings.Repeat("AB", 32) }),
		"no key":                  admission(func(a *guest.Admission) { a.Key = "" }),
		"half a key":              admission(func(a *guest.Admission) { a.Key = a.Key[:32] }),
		"a long key":              admission(func(a *guest.Admission) { a.Key += "00" }),
		"a key in upper case":     admission(func(a *guest.Admission) { a.Key = strings.ToUpper(a.Key) }),
		"a key of small order":    admission(func(a *guest.Admission) { a.Key = "01" + strings.Repeat("00", 31) }),
		"more used than is":       admission(func(a *guest.Admission) { a.Used = 11 * step }),
		"a broken voucher":        admission(func(a *guest.Admission) { a.Best = "x" }),
		"another's voucher":       admission(func(a *guest.Admission) { a.Best = newPayer(2).voucher(step) }),
		"a voucher for too much":  admission(func(a *guest.Admission) { a.Best = p.voucher(11 * step) }),
		"drop no channel":         {Op: guest.OpDrop, Channel: "x"},
		"acknowledge what is not": {Op: guest.OpCollect, Ack: 1},
	} {
		reply, err := w.Ask(r)
		if err != nil || reply.OK || reply.Error != guest.ErrorRefused {
			t.Errorf("%s: %+v, %v", name, reply, err)
		}
	}
	if _, body := w.do(w.request("GET", path, "")); !bytes.Contains(body, []byte(`"prompt_price":1000000`)) || !bytes.Contains(body, []byte(payee)) {
		t.Errorf("the terms have changed: %s", body)
	}
	w.admit(good)
	another := newPayer(2).admission(10 * step)
	another.Channel = good.Channel
	if reply, err := w.Ask(guest.ControlRequest{Op: guest.OpAdmit, Admit: &another}); err != nil || reply.OK {
		t.Errorf("another key for a channel: %+v, %v", reply, err)
	}
	w.control(guest.ControlRequest{Op: guest.OpDrop, Channel: good.Channel})
	w.control(guest.ControlRequest{Op: guest.OpDrop, Channel: good.Channel})
}

// TestPayersTakeTurns has a payer with many connections wait behind itself.
func TestPayersTakeTurns(t *testing.T) {
	m := apitest.Manifest()
	m.Limits.Concurrency = 2
	order, next := make(chan string, 10), make(chan struct{})
	w := start(t, m, func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		order <- string(body[bytes.Index(body, []byte("from "))+5])
		<-next
		rw.Header().Set("Content-Type", "application/json")
		io.WriteString(rw, `{"choices":[{"message":{"content":"Hello"}}],"usage":{"prompt_tokens":9,"completion_tokens":2}}`)
	}, nil)
	a, b := newPayer(1), newPayer(2)
	w.open(a.admission(100*step), b.admission(100*step))
	w.pays(a, 50*step)
	w.pays(b, 50*step)
	var wait sync.WaitGroup
	send := func(p payer, name string, waiting int) {
		wait.Add(1)
		go func() {
			defer wait.Done()
			body := strings.Replace(ask, "a secret", "from "+name, 1)
			if resp, got := w.do(w.request("POST", chat, body, w.proof(p, 0)...)); resp.StatusCode != 200 {
				t.Errorf("%d %s", resp.StatusCode, got)
			}
		}()
		agenttest.Eventually(t, name+" waits", func() bool { return w.Active() == 2 && w.Queued() == waiting || waiting < 0 })
	}
	send(a, "a", -1)
	send(a, "a", 0)
	send(a, "a", 1)
	send(b, "b", 2)
	got := <-order + <-order
	next <- struct{}{}
	got += <-order
	next <- struct{}{}
	got += <-order
	if got != "aaba" {
		t.Errorf("served %s", got)
	}
	next <- struct{}{}
	next <- struct{}{}
	wait.Wait()
}

// TestBatches tells of many channels in messages of at most 4 KiB, each once.
func TestBatches(t *testing.T) {
	w := start(t, nil, nil, nil)
	const channels = 60
	w.SetPaymentLimits(patient, time.Millisecond, patient)
	for i := range byte(channels) {
		p := newPayer(i + 1)
		w.admit(p.admission(10 * step))
		w.do(w.request("POST", path, "", w.proof(p, step)...)) // which waits for nobody
	}
	seen := map[string]bool{}
	var ack uint64
	for {
		reply := w.control(guest.ControlRequest{Op: guest.OpCollect, Ack: ack}) // Ask refuses a long one
		if reply.Batch == 0 {
			break
		}
		if reply.Batch != ack+1 || len(reply.Balances) == 0 {
			t.Fatalf("%+v", reply)
		}
		ack = reply.Batch
		for _, b := range reply.Balances {
			if seen[b.Channel] {
				t.Errorf("%s is told twice", b.Channel)
			}
			seen[b.Channel] = true
		}
	}
	if len(seen) != channels || ack > channels/5 {
		t.Errorf("%d channels in %d batches", len(seen), ack)
	}
	if _, cover := w.credit(newPayer(1)); cover != pay.FormatAmount(step) {
		t.Errorf("%s covered", cover)
	}
}

// TestWantedNoise names many channels that nobody admits: few are told at a time,
// each now and then, and a real one gets through.
func TestWantedNoise(t *testing.T) {
	w := start(t, nil, nil, nil)
	real := newPayer(200)
	const noise = 40
	var wait sync.WaitGroup
	for i := range byte(noise) {
		wait.Add(1)
		go func() {
			defer wait.Done()
			p := newPayer(i + 1)
			if resp, _ := w.do(w.request("POST", chat, ask, w.proof(p, step)...)); resp.StatusCode != 402 {
				t.Errorf("%d", resp.StatusCode)
			}
		}()
	}
	agenttest.Eventually(t, "all are wanted", func() bool { return w.Wanted() == noise })
	if reply := w.control(guest.ControlRequest{Op: guest.OpCollect}); len(reply.Wanted) != guest.MaxWanted {
		t.Errorf("%d are told at once", len(reply.Wanted))
	}
	w.open(real.admission(10 * step))
	at := time.Now()
	if resp, body := w.do(w.request("POST", chat, ask, w.proof(real, step)...)); resp.StatusCode != 200 {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
	t.Logf("served after %v", time.Since(at))
	wait.Wait()
	if reply := w.control(guest.ControlRequest{Op: guest.OpCollect}); len(reply.Wanted) != 0 {
		t.Errorf("%d are still wanted", len(reply.Wanted))
	}
}

// TestChannelMemory admits as many channels as there may be.
func TestChannelMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	w := start(t, nil, nil, nil)
	a := newPayer(1).admission(10 * step)
	most := 16 << 10
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	for i := range most + 1 {
		channel := voucher.Channel{0: 1, 1: byte(i >> 16), 2: byte(i >> 8), 3: byte(i)}
		a.Channel = channel.String()
		reply := w.Payment(guest.ControlRequest{Op: guest.OpAdmit, Admit: &a})
		if reply.OK != (i < most) {
			t.Fatalf("%d: %+v", i, reply)
		}
	}
	if took := heap() - before; took > 12<<20 {
		t.Errorf("%d bytes for %d channels", took, most)
	} else {
		t.Logf("%d bytes for each channel", took/int64(most))
	}
}

// TestPaymentSecrets looks for what clients send in all that the host is given.
func TestPaymentSecrets(t *testing.T) {
	w := start(t, nil, nil, nil)
	p := newPayer(1)
	till := w.open(p.admission(10 * step))
	w.do(w.request("POST", chat, ask, w.proof(p, step)...))
	agenttest.Eventually(t, "it is told", func() bool { return len(till.Balances()) > 1 })
	told, err := json.Marshal(till.Balances())
	if err != nil {
		t.Fatal(err)
	}
	proof := pay.SignPayer(p.key, p.channel, w.SPKI)
	for _, secret := range []string{"secret", "tick", proof.String(), hex.EncodeToString(proof.Signature[:])} {
		if bytes.Contains(told, []byte(secret)) {
			t.Errorf("the host is told %q", secret)
		}
	}
}
