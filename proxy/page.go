package proxy

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"time"

	"chrysalis/attest"
	"chrysalis/market"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/pay/purse"
)

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// row is a worker on the page.
type row struct {
	Endpoint string
	State    string
	Problem  string
	Ago      time.Duration
	InFlight int64
	Verdict  *attest.Verdict
	Payment  *paymentRow
}

// paymentRow is what a worker is paid.
type paymentRow struct {
	Prices  []string // of each model
	Channel string
	Payee   string
	Paid    string // vouchers' total
	Used    string // of that
	Limit   string // what vouchers can come to
	Barred  string // why its payee is paid no more
	Problem string
}

// view is the whole page.
type view struct {
	Rows  []row
	Spent string // "" where nobody is paid
	Left  string
	Bars  []purse.Bar
	// Supply is a picture of what is offered; "" where nothing is known of that.
	Supply template.HTML
}

// supply draws what is offered. An offer is verified if this proxy has verified a
// worker at its endpoint that serves the model. market.Supply escapes what strangers
// wrote.
func (p *Proxy) supply(payment *Payment) template.HTML {
	p.mu.Lock()
	listed, workers := p.listed, p.workers
	p.mu.Unlock()
	if len(listed) == 0 {
		return ""
	}
	var offers []market.Offer
	for _, l := range listed {
		o := l.Offer
		o.Worker = [32]byte{}
		for _, w := range workers {
			if session, _ := w.verifiedSession(); session != nil && w.endpoint == l.Endpoint &&
				slices.ContainsFunc(session.Verdict.ModelRoots, func(root record.Hex) bool { return bytes.Equal(root, l.Root) }) {
				copy(o.Worker[:], session.Verdict.TLSKey)
			}
		}
		offers = append(offers, o)
	}
	return template.HTML(market.Supply("What is offered of the model", offers, 2*min(payment.MaxPrice, pay.MaxPrice)))
}

// paymentRow says what the worker is paid; nil of one that is free.
func (w *worker) paymentRow() *paymentRow {
	w.mu.Lock()
	m := w.manifest
	w.mu.Unlock()
	if m == nil || m.Payment == nil {
		return nil
	}
	payment, t := w.proxy.options.Payment, w.paying
	out := &paymentRow{}
	for i, model := range m.Models {
		now, most := t.price(m, model.ID()), m.Payment.Ceilings[i]
		out.Prices = append(out.Prices, fmt.Sprintf("%s: %s for a million tokens of prompts, %s of answers; at most %s and %s", model.ID(),
			ton(uint64(now.Prompt)), ton(uint64(now.Completion)), ton(uint64(most.Prompt)), ton(uint64(most.Completion))))
	}
	t.mu.Lock()
	account, accept := t.account, t.accept
	out.Problem = t.problem
	t.mu.Unlock()
	if payment == nil {
		out.Problem = ErrUnpaid.Error()
		return out
	}
	if accept != nil {
		out.Payee = accept.PayTo
		if err := payment.Purse.Barred(payeeOf(accept)); err != nil {
			out.Barred = err.Error()
		}
	}
	if account != nil {
		s := account.State()
		out.Channel, out.Payee = s.Channel.String(), s.Payee.String()
		out.Paid, out.Used, out.Limit = ton(s.Signed), ton(s.Used), ton(s.Limit)
	}
	return out
}

// page shows each worker with its checks. It takes nothing from elsewhere.
func (p *Proxy) page(w http.ResponseWriter, _ *http.Request) {
	var v view
	for _, worker := range p.list() {
		payment := worker.paymentRow()
		worker.mu.Lock()
		r := row{worker.endpoint, worker.state.String(), worker.problem, 0, worker.inFlight.Load(), nil, payment}
		if !worker.at.IsZero() {
			r.Ago = time.Since(worker.at).Round(time.Second)
		}
		if worker.session != nil {
			r.Verdict = worker.session.Verdict
		}
		worker.mu.Unlock()
		v.Rows = append(v.Rows, r)
	}
	if payment := p.options.Payment; payment != nil {
		v.Supply = p.supply(payment)
		left, spent := payment.Purse.Budget()
		v.Spent, v.Left, v.Bars = ton(spent), ton(left), payment.Purse.Bars()
	}
	var out bytes.Buffer
	if err := pageTemplate.Execute(&out, v); err != nil {
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	w.Write(out.Bytes())
}
