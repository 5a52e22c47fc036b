package proxy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/receipt"
	"chrysalis/channel/voucher"
	"chrysalis/manifest"
	"chrysalis/pay"
	"chrysalis/pay/purse"
	"chrysalis/terminal"
)

// charge is what one request to a worker is charged, as this side sees it.
type charge struct {
	paying  *paying
	account *purse.Account
	request *purse.Request
	session *attest.Session
	model   string
	step    uint64
	ceiling pay.Price
	digest  string // of the request's body, as its receipt has it
	salt    [receipt.SaltSize]byte
	short   error       // why less is covered than was to be
	asked   purse.Asked // what was known when the request was sent
	meter   *meter
	ended   bool
}

// acceptable says, as an error, why a worker is not paid for a model, before anything
// is sent to it.
func (p *Payment) acceptable(m *manifest.Manifest, ceiling pay.Price) error {
	switch {
	case m.Payment.Network != p.Purse.GlobalID():
		return fmt.Errorf("%w: global id %d, and this client pays on %d", ErrNetwork, m.Payment.Network, p.Purse.GlobalID())
	case max(ceiling.Prompt, ceiling.Completion) > p.MaxPrice:
		return fmt.Errorf("%w: it can charge %s and %s for a million tokens", ErrPrice, ton(uint64(ceiling.Prompt)), ton(uint64(ceiling.Completion)))
	}
	return nil
}

// charge begins to pay for a request, or returns nil where nothing is to be paid. more
// pays up to a step beyond what is due.
func (w *worker) charge(ctx context.Context, r *http.Request, a asked, body []byte, salt string, more bool) (*charge, error) {
	c, err := w.chargeOnce(ctx, r, a, body, salt, more)
	if errors.Is(err, errBooted) {
		// Its new key has been verified meanwhile.
		c, err = w.chargeOnce(ctx, r, a, body, salt, more)
	}
	return c, err
}

func (w *worker) chargeOnce(ctx context.Context, r *http.Request, a asked, body []byte, salt string, more bool) (*charge, error) {
	payment := w.proxy.options.Payment
	if payment == nil || !isPriced(r) {
		return nil, nil
	}
	session, m := w.verifiedSession()
	if session == nil {
		// Its manifest says whether it is to be paid, and how.
		if _, err := w.transport.Attest(ctx, w.endpoint); err != nil {
			return nil, err
		}
		if session, m = w.verifiedSession(); session == nil {
			return nil, errors.New("it is not verified")
		}
	}
	ceilings, paid := pay.Tariff{}, false
	if m != nil {
		ceilings, paid = m.Ceilings()
	}
	model, served := "", false
	if paid {
		model, served = modelOf(m, a.Model)
	}
	if !served || ceilings.Models[model].Free() {
		return nil, nil
	}
	t := w.paying
	fail := func(err error) (*charge, error) { return nil, payError{t.note(err)} }
	if err := payment.acceptable(m, ceilings.Models[model]); err != nil {
		return fail(err)
	}
	t.mu.Lock()
	if t.authority = r.Header.Get("Authorization"); w.proxy.options.Token != "" {
		t.authority = "Bearer " + w.proxy.options.Token
	}
	t.mu.Unlock()
	accept, account, err := t.prepare(ctx, sha256.Sum256(session.TLSKey))
	if err != nil {
		if errors.Is(err, ErrHonour) || errors.Is(err, ErrTerms) {
			w.refuses()
		}
		return fail(err)
	}
	at := slices.IndexFunc(accept.Extra.Models, func(m pay.ModelPrice) bool { return m.ID == model })
	if at < 0 {
		return fail(fmt.Errorf("%w: they have no price of %s", ErrTerms, model))
	}
	price := accept.Extra.Models[at].Price
	if price.Free() {
		return nil, t.note(nil)
	}
	c := &charge{paying: t, account: account, session: session, model: model, step: ceilings.Step, ceiling: ceilings.Models[model]}
	if c.salt, err = receipt.ParseSalt(salt); err != nil {
		rand.Read(c.salt[:]) // the client has none, or one that the VM would refuse
	}
	h := receipt.NewHash(c.salt)
	h.Write(body)
	c.digest = hex.EncodeToString(h.Sum(nil))
	price = t.reckoned(m, model)
	if more && t.blindly() {
		price = ceilings.Models[model]
	}
	begin := purse.Begin{Price: price, Ceiling: ceilings.Models[model], Step: ceilings.Step, Request: int64(len(body)), Asked: max(0, cmp.Or(a.MaxTokens, a.MaxCompletionTokens))}
	if !a.Stream && r.URL.Path != "/v1/embeddings" {
		begin.Reserve = cmp.Or(begin.Asked, pay.DefaultAnswer)
	}
	c.request, err = account.Begin(begin)
	if err != nil {
		if err = t.room(ctx, account, err); err == nil {
			c.request, err = account.Begin(begin)
		}
	}
	if err != nil {
		return fail(err)
	}
	if more || account.Due() {
		err := t.pay(ctx, account, c.step, more)
		if errors.Is(err, purse.ErrBudget) || errors.Is(err, purse.ErrLimit) || errors.Is(err, purse.ErrAhead) {
			c.short, err = err, nil // what was signed may do; the VM decides
		}
		if err != nil {
			c.request.Unanswered()
			if errors.Is(err, ErrHonour) || errors.Is(err, ErrTerms) {
				w.refuses()
			} else {
				w.pause(pausePaying)
			}
			return fail(err)
		}
	}
	if payment.Funds != nil && account.Low(2*c.step) && t.topping.CompareAndSwap(false, true) {
		go func() {
			defer t.topping.Store(false)
			if err := t.topUp(context.Background(), account); err != nil && !errors.Is(err, purse.ErrBudget) {
				t.note(err)
			}
		}()
	}
	c.request.Sent()
	c.asked = account.Asking()
	return c, nil
}

// refused takes an answer 402 over, after which it can be tried once more.
func (w *worker) refused(ctx context.Context, c *charge, answer *http.Response, patience *patience) error {
	if w.proxy.options.Payment == nil {
		return payError{w.paying.note(ErrUnpaid)}
	}
	if c != nil {
		c.request.Unanswered()
	}
	patience.piece()
	terms, err := readTerms(answer)
	if err == nil {
		said := said{Terms: terms}
		if c != nil {
			said.asked = c.asked
		}
		err = w.paying.learn(said)
	} else {
		err = patience.why(err)
		if ctx.Err() == nil { // else it is the client that has left
			w.refuses()
		}
	}
	if err == nil && c != nil && (errors.Is(c.short, purse.ErrBudget) || errors.Is(c.short, purse.ErrLimit)) {
		err = c.short // it cannot be expected to
	}
	if err != nil {
		return payError{w.paying.note(err)}
	}
	return fmt.Errorf("%w: %s", ErrHonour, terminal.Line(cmp.Or(terms.Error, "it does not say why")))
}

// head adds to a request's header who pays, and a salt where the client gives none.
func (c *charge) head(h http.Header, salt bool) {
	c.paying.mu.Lock()
	c.paying.header(h)
	c.paying.mu.Unlock()
	if salt {
		h.Set(receipt.SaltHeader, receipt.FormatSalt(c.salt))
	}
}

// begin is called when the answer begins. Like all that follow it does nothing where
// nothing is paid.
func (c *charge) begin(answer *http.Response) {
	switch {
	case c == nil:
		return
	case answer.StatusCode != http.StatusOK:
		c.ended = true // refused, which costs nothing
		c.request.Unanswered()
	}
	kind, _, _ := strings.Cut(answer.Header.Get("Content-Type"), ";")
	c.meter = newMeter(c.salt, strings.TrimSpace(kind) == "text/event-stream", func(n int64) {
		c.request.Text(n)
		if c.account.Due() {
			c.pump()
		}
	})
}

// listen waits for the next piece; where a stream says nothing for a while it is paid
// ahead. The function that it returns is to be called when the piece has come.
func (c *charge) listen() (heard func()) {
	if c == nil || c.ended || !c.meter.stream {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	timer := time.AfterFunc(silence, func() { c.urge(ctx) })
	return func() {
		timer.Stop()
		cancel()
	}
}

// urge has a stream go on that waits to be paid for more than is due as this side sees
// it: its next piece is large, or its price is higher than what was last said.
func (c *charge) urge(ctx context.Context) {
	t := c.paying
	for tries := 0; ctx.Err() == nil; tries++ {
		if err := t.pay(ctx, c.account, c.step, true); err != nil {
			// Nothing was said that could be learnt from.
			if terms, _, failed := t.exchange(ctx, nil); failed == nil {
				t.learn(terms)
			}
			if !errors.Is(err, purse.ErrAhead) {
				t.note(err)
			}
		}
		if c.reprice(); tries > 0 && t.blindly() {
			c.request.Raise(c.ceiling)
		}
		if c.account.Due() && t.pay(ctx, c.account, c.step, false) == nil {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(silence):
		}
	}
}

// reprice reckons with the price that the worker said last.
func (c *charge) reprice() {
	if _, m := c.paying.worker.verifiedSession(); m != nil {
		c.request.Raise(c.paying.reckoned(m, c.model))
	}
}

// write takes the next piece.
func (c *charge) write(p []byte) {
	if c != nil && !c.ended {
		c.meter.write(p)
	}
}

// end is called once the answer has come to its end.
func (c *charge) end(trailer http.Header) {
	if c == nil || c.ended {
		return
	}
	c.ended = true
	m := c.meter
	m.end()
	signed := m.receipt
	if !m.stream {
		signed = []byte(trailer.Get(receipt.Trailer))
	}
	if len(signed) == 0 {
		if m.stream && !m.done {
			c.request.Left() // it broke off; what it charges shows in the channel
			return
		}
		c.request.Left()
		c.paying.note(c.account.Bar(purse.ErrNoReceipt))
		return
	}
	r, err := c.session.Receipt(signed)
	if err != nil {
		if now, _ := c.paying.worker.verifiedSession(); now == nil || !bytes.Equal(now.TLSKey, c.session.TLSKey) {
			c.request.Left() // it was booted anew meanwhile, and has another key
			return
		}
	}
	if err == nil {
		err = m.check(r, c.digest)
	}
	if err == nil && r.Model != c.model {
		err = fmt.Errorf("it is about the model %s", r.Model)
	}
	if err != nil {
		c.request.Left()
		c.paying.note(c.account.Bar(fmt.Errorf("%w: %w", purse.ErrBadReceipt, err)))
		return
	}
	if r.Payment == nil { // it was free
		c.request.Unanswered()
		return
	}
	s := purse.Receipt{
		Price:  pay.Price{Prompt: r.Payment.PromptPrice, Completion: r.Payment.CompletionPrice},
		Prompt: r.Payment.PromptTokens, Completion: r.Payment.CompletionTokens,
	}
	s.Channel, _ = voucher.ParseChannel(r.Payment.Channel) // the receipt is valid
	s.Charged, _ = pay.ParseAmount(r.Payment.Charged)
	s.Used, _ = pay.ParseAmount(r.Payment.Used)
	s.Cover, _ = pay.ParseAmount(r.Payment.Cover)
	c.paying.note(c.request.Settle(s))
}

// leave is called when nothing more is waited for.
func (c *charge) leave() {
	if c != nil && !c.ended {
		c.ended = true
		c.request.Left()
	}
}
