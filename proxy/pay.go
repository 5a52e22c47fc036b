package proxy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/evidence"
	"chrysalis/channel/voucher"
	"chrysalis/manifest"
	"chrysalis/market"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/pay/purse"
	"chrysalis/terminal"
)

// PaymentPath is where a VM says on which terms it serves, and takes vouchers.
const PaymentPath = "/.well-known/payment"

const (
	// termsAge is how long terms are taken for the current ones.
	termsAge = time.Minute
	// payLimit bounds one payment, and one question for terms: a VM waits 10 s for its
	// launcher.
	payLimit = 20 * time.Second
	// admitTries is how often a worker is asked whether it has admitted a channel; it waits
	// for its launcher each time.
	admitTries = 3
	// fundLimit bounds opening a channel or topping one up.
	fundLimit = 3 * time.Minute
	// silence is how long a stream that is paid for may say nothing before it is paid
	// ahead: its next piece may be larger than what is covered.
	silence = 3 * time.Second
	// pausePaying is for how long a worker that could not be paid is asked after others.
	pausePaying = time.Minute
)

// Payment is how a proxy pays.
type Payment struct {
	Purse    *purse.Purse
	MaxPrice int64 // nanotons for a million tokens, of either kind; a worker's ceilings must be no higher
	Funds    Funds
	// Listed is what is offered of the model that the proxy was started for, at any price.
	// A worker whose terms name a payee that no offer of its endpoint does is not paid. The
	// page draws it; what a worker of this proxy is verified to be is added there.
	Listed []Listed
	// Offers reads the listing anew, when less than half of the workers are of use or none
	// took a request. Workers that Choose would pick now are added then, and those that are
	// not offered any more, or not as good, end when they have nothing to do. With nil the
	// workers stay as they are.
	Offers func(ctx context.Context) ([]Listed, error)
	// Renew is how often at most the listing is read; 0 is every 5 minutes.
	Renew time.Duration
}

// Listed is an offer at an endpoint, https://HOST:PORT.
type Listed struct {
	Endpoint string
	Root     record.Hex // of the model's disk
	Payee    voucher.Channel
	market.Offer
}

// Funds has channels.
type Funds interface {
	// Channel finds a channel that meets a demand, or opens one.
	Channel(ctx context.Context, d purse.Demand) (purse.Channel, error)
	// TopUp adds to one.
	TopUp(ctx context.Context, id voucher.Channel) (purse.Channel, error)
}

// Errors of workers that want to be paid.
var (
	ErrUnpaid  = errors.New("it wants to be paid: give --max-price, --budget and --key-file (docs/market.md)")
	ErrPrice   = errors.New("its ceilings are above --max-price")
	ErrNetwork = errors.New("it is paid on another network")
	ErrTerms   = errors.New("its terms cannot be accepted")
	ErrHonour  = errors.New("it does not honour what it was paid")
)

// errBooted says that a worker has another key than the one that is reckoned with.
var errBooted = errors.New("it was booted anew")

// payError is a reason not to use a worker that has to do with payment.
type payError struct{ error }

func (e payError) Unwrap() error { return e.error }

// asked is what of a request matters for its price.
type asked struct {
	Model               string
	Stream              bool
	MaxTokens           int64 `json:"max_tokens"`
	MaxCompletionTokens int64 `json:"max_completion_tokens"`
}

func readAsked(body []byte) (a asked) {
	if json.Unmarshal(body, &a) != nil {
		return asked{}
	}
	return a
}

// priced are the paths that cost something.
var priced = []string{"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}

func isPriced(r *http.Request) bool {
	return r.Method == http.MethodPost && slices.Contains(priced, r.URL.Path)
}

// modelOf finds a model of a manifest by what a client calls it.
func modelOf(m *manifest.Manifest, name string) (id string, ok bool) {
	for _, model := range m.Models {
		if name == model.Name || name == model.ID() || name == model.ID()+":"+model.Disk.RootHash {
			return model.ID(), true
		}
	}
	return "", false
}

// manifestOf returns the manifest of evidence that was verified.
func manifestOf(s *attest.Session) *manifest.Manifest {
	if doc, err := evidence.Parse(s.Document); err == nil {
		if m, err := manifest.Parse(doc.Manifest); err == nil {
			return m
		}
	}
	return nil
}

// paying is the payment of one worker.
type paying struct {
	worker  *worker
	pumping atomic.Bool
	topping atomic.Bool

	setup sync.Mutex // held while terms are asked or a channel is found
	send  sync.Mutex // held while a voucher is on its way: one at a time, since none may overtake another

	mu         sync.Mutex
	spki       [32]byte // that accept and the reconciliation are of
	accept     *pay.Accept
	at         time.Time // of accept
	account    *purse.Account
	reconciled bool
	except     map[voucher.Channel]bool // channels that must not be used
	authority  string                   // the client's token
	spans      []span
	blind      uint64 // a total up to which it is not known here at which prices cover was bought
	problem    string
}

// span is cover that was bought at some prices, at which it is used.
type span struct {
	until  uint64 // the voucher's total
	prices []pay.ModelPrice
}

// maxSpans bounds how many are kept of one channel.
const maxSpans = 16

// bought notes at which prices a voucher was taken: those that were said before it was
// sent, or those that were said with the answer, whichever are higher, since they may
// have changed on either side of it. t.mu is held.
func (t *paying) bought(total uint64, before []pay.ModelPrice) {
	prices := slices.Clone(t.accept.Extra.Models)
	for i, now := range prices {
		for _, was := range before {
			if was.ID == now.ID {
				prices[i].Price = higher(now.Price, was.Price)
			}
		}
	}
	if last := len(t.spans) - 1; last >= 0 && slices.Equal(t.spans[last].prices, prices) {
		t.spans[last].until = total
		return
	}
	if t.spans = append(t.spans, span{total, prices}); len(t.spans) > maxSpans {
		t.spans = t.spans[1:]
	}
}

// reckoned is the price that a request is reckoned at: the highest of now and of what
// was bought before and is not used.
func (t *paying) reckoned(m *manifest.Manifest, model string) pay.Price {
	price := t.price(m, model)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.account == nil {
		return price
	}
	used := t.account.State().Used
	t.spans = slices.DeleteFunc(t.spans, func(s span) bool { return s.until <= used })
	for _, s := range t.spans {
		for _, p := range s.prices {
			if p.ID == model {
				price = higher(price, p.Price)
			}
		}
	}
	return price
}

// higher is the higher of two prices, each kind by itself.
func higher(p, q pay.Price) pay.Price {
	return pay.Price{Prompt: max(p.Prompt, q.Prompt), Completion: max(p.Completion, q.Completion)}
}

// blindly reports whether what is used now may have been bought at prices that are not
// known here.
func (t *paying) blindly() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.account != nil && t.account.State().Used < t.blind
}

// price is what a model costs now, as far as it is known: by its ceiling before the
// worker has said anything.
func (t *paying) price(m *manifest.Manifest, model string) pay.Price {
	ceilings, paid := m.Ceilings()
	if !paid {
		return pay.Price{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.accept != nil {
		for _, p := range t.accept.Extra.Models {
			if p.ID == model {
				return p.Price
			}
		}
	}
	return ceilings.Models[model]
}

// verifiedSession is what was verified of the worker last; nil where it is not good.
func (w *worker) verifiedSession() (*attest.Session, *manifest.Manifest) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state != verified {
		return nil, nil
	}
	return w.session, w.manifest
}

func (t *paying) note(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.problem = terminal.Line(err.Error())
	} else {
		t.problem = ""
	}
	return err
}

// terms checks a VM's terms against what was verified of it, what its offers say, if it
// has some, and what this client accepts.
func (p *Payment) terms(t *pay.Terms, m *manifest.Manifest, offered []voucher.Channel) (*pay.Accept, error) {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrTerms, fmt.Sprintf(format, args...))
	}
	ceilings, ok := m.Ceilings()
	if !ok {
		return nil, bad("its manifest has no prices")
	}
	at := slices.IndexFunc(t.Accepts, func(a pay.Accept) bool { id, _ := a.GlobalID(); return id == p.Purse.GlobalID() })
	if at < 0 {
		return nil, fmt.Errorf("%w, by its terms", ErrNetwork)
	}
	a := &t.Accepts[at]
	if a.Extra.CodeHash != hex.EncodeToString(voucher.CodeHash[:]) {
		return nil, bad("its channels have another contract than this program's")
	}
	current := pay.Tariff{Models: map[string]pay.Price{}}
	current.Step, _ = pay.ParseAmount(a.Amount)
	for _, model := range a.Extra.Models {
		current.Models[model.ID] = model.Price
	}
	if err := current.Under(ceilings); err != nil {
		return nil, bad("%v", err)
	}
	payee, err := voucher.ParseChannel(a.PayTo)
	if err != nil {
		return nil, bad("%v", err)
	}
	if len(offered) > 0 && !slices.Contains(offered, payee) {
		return nil, bad("they name another payee than its offers do")
	}
	return a, nil
}

// said is what a VM says, and what was known when it was asked.
type said struct {
	*pay.Terms
	asked purse.Asked
}

// asking is what is known now.
func (t *paying) asking() purse.Asked {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.account == nil {
		return purse.Asked{}
	}
	return t.account.Asking()
}

// exchange asks for terms, or pays with a voucher. ok says that the VM took it.
func (t *paying) exchange(ctx context.Context, v *voucher.Voucher) (terms said, ok bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, payLimit)
	defer cancel()
	terms.asked = t.asking()
	t.mu.Lock()
	spki := t.spki
	t.mu.Unlock()
	// A VM that was booted anew is paid when it has said what it remembers, and not
	// before.
	other := false
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		conn, ok := info.Conn.(*tls.Conn)
		if other = !ok || sha256.Sum256(conn.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo) != spki; other {
			info.Conn.Close()
		}
	}})
	method := http.MethodGet
	if v != nil {
		method = http.MethodPost
	}
	request, err := http.NewRequestWithContext(ctx, method, t.worker.endpoint+PaymentPath, http.NoBody)
	if err != nil {
		return terms, false, err
	}
	t.mu.Lock()
	t.header(request.Header)
	if t.authority != "" {
		request.Header.Set("Authorization", t.authority)
	}
	t.mu.Unlock()
	if v != nil {
		request.Header.Set(pay.VoucherHeader, v.String())
	}
	request.Header.Set("User-Agent", "chrysalis")
	answer, err := t.worker.transport.RoundTrip(request)
	if err != nil && other {
		err = errBooted
	}
	if err != nil {
		return terms, false, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK && answer.StatusCode != http.StatusPaymentRequired {
		return terms, false, fmt.Errorf("%w: it answered %d to the question for them", ErrTerms, answer.StatusCode)
	}
	terms.Terms, err = readTerms(answer)
	return terms, answer.StatusCode == http.StatusOK, err
}

func readTerms(answer *http.Response) (*pay.Terms, error) {
	data, err := io.ReadAll(io.LimitReader(answer.Body, pay.MaxTerms+1))
	if err != nil {
		return nil, err
	}
	terms, err := pay.ParseTerms(data)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTerms, err)
	}
	return terms, nil
}

// header proves who pays. t.mu is held.
func (t *paying) header(h http.Header) {
	if t.account != nil {
		h.Set(pay.PayerHeader, t.worker.proxy.options.Payment.Purse.Payer(t.account.ID(), t.spki).String())
	}
}

// learn takes terms over, and what they say of the channel.
func (t *paying) learn(terms said) error {
	payment := t.worker.proxy.options.Payment
	session, m := t.worker.verifiedSession()
	if session == nil {
		return errors.New("it is not verified any more")
	}
	t.worker.mu.Lock()
	offered := t.worker.payees
	t.worker.mu.Unlock()
	a, err := payment.terms(terms.Terms, m, offered)
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.accept, t.at = a, time.Now()
	account := t.account
	t.mu.Unlock()
	credit := a.Extra.Credit
	if account == nil || credit == nil {
		return nil
	}
	id, err := voucher.ParseChannel(credit.Channel)
	if err != nil || id != account.ID() {
		return fmt.Errorf("%w: they are about another channel", ErrTerms)
	}
	c := pay.Credit{Channel: id}
	c.Used, _ = pay.ParseAmount(credit.Used) // the terms are valid
	c.Cover, _ = pay.ParseAmount(credit.Cover)
	c.Limit, _ = pay.ParseAmount(credit.Limit)
	if err := account.Reconcile(c, terms.asked); err != nil {
		if errors.Is(err, purse.ErrForeign) {
			t.mu.Lock()
			t.except[id], t.account = true, nil
			t.mu.Unlock()
		}
		return err
	}
	t.mu.Lock()
	t.reconciled = true
	t.mu.Unlock()
	return nil
}

// booted takes the worker's key. With another one than it had it was booted anew, and
// must remember what was paid. t.mu is held.
func (t *paying) booted(spki [32]byte) {
	if t.spki == spki {
		return
	}
	t.spki, t.accept, t.reconciled, t.spans = spki, nil, false, nil
	if t.account != nil {
		t.blind = t.account.State().Signed // it has forgotten at which prices
	}
}

// prepare has terms that are recent and a channel whose state both sides agree on.
func (t *paying) prepare(ctx context.Context, spki [32]byte) (*pay.Accept, *purse.Account, error) {
	t.setup.Lock()
	defer t.setup.Unlock()
	payment := t.worker.proxy.options.Payment
	t.mu.Lock()
	t.booted(spki)
	accept, account, ready := t.accept, t.account, t.reconciled
	if accept != nil && time.Since(t.at) > termsAge {
		accept = nil
	}
	t.mu.Unlock()
	var why string
	for try := 0; ; try++ {
		if accept != nil && account != nil && ready && !account.Retired() && account.State().Payee == voucher.Channel(payeeOf(accept)) {
			return accept, account, payment.Purse.Barred(payeeOf(accept))
		}
		if accept == nil || account != nil && !ready {
			terms, _, err := t.exchange(ctx, nil)
			if err == nil {
				err = t.learn(terms)
			}
			if err != nil && !errors.Is(err, purse.ErrForeign) {
				return nil, nil, err
			}
			why = terms.Error
		}
		t.mu.Lock()
		accept, account, ready = t.accept, t.account, t.reconciled
		t.mu.Unlock()
		if accept == nil {
			return nil, nil, fmt.Errorf("%w: there are none", ErrTerms)
		}
		payee := payeeOf(accept)
		if err := payment.Purse.Barred(payee); err != nil {
			return nil, nil, err
		}
		if account != nil && (account.Retired() || account.State().Payee != voucher.Channel(payee)) {
			account = nil // it is being closed, or it is somebody else who is paid now
			t.mu.Lock()
			t.account, t.reconciled = nil, false
			t.mu.Unlock()
		}
		if account == nil {
			if try > 3 {
				return nil, nil, fmt.Errorf("%w: no channel can be used", ErrTerms)
			}
			if err := t.fund(ctx, accept, payee); err != nil {
				return nil, nil, err
			}
			t.mu.Lock()
			account, ready = t.account, t.reconciled
			t.mu.Unlock()
			continue
		}
		if !ready {
			// The launcher admits the channel once it was named, which takes a look at the
			// chain.
			if try > admitTries {
				return nil, nil, fmt.Errorf("%w: it does not say where the channel %v stands: %s", ErrHonour, account.ID(), terminal.Line(why))
			}
			select {
			case <-ctx.Done():
				return nil, nil, ctx.Err()
			case <-time.After(500 * time.Millisecond):
			}
		}
	}
}

func payeeOf(a *pay.Accept) [32]byte {
	payee, _ := voucher.ParseChannel(a.PayTo) // the terms are valid
	return payee
}

// fund finds a channel to the payee, or opens one.
func (t *paying) fund(ctx context.Context, a *pay.Accept, payee [32]byte) error {
	payment := t.worker.proxy.options.Payment
	if payment.Funds == nil {
		return errors.New("there is no channel to its payee")
	}
	deposit, _ := pay.ParseAmount(a.Extra.MinDeposit) // the terms are valid
	// It goes on when the client leaves: the money is on its way.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fundLimit)
	defer cancel()
	t.mu.Lock()
	except := maps.Clone(t.except)
	t.mu.Unlock()
	c, err := payment.Funds.Channel(ctx, purse.Demand{
		Payee: payee, Deposit: deposit, Delay: time.Duration(a.Extra.MinDelay) * time.Second, Except: func(id voucher.Channel) bool { return except[id] || !payment.Purse.For(id, t.worker.endpoint) },
	})
	if err != nil {
		return err
	}
	account, err := payment.Purse.Use(c, t.worker.endpoint)
	if errors.Is(err, purse.ErrForeign) {
		t.mu.Lock()
		t.except[c.ID] = true
		t.mu.Unlock()
	}
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.account, t.reconciled, t.spans, t.blind = account, account.Known() && c.Fresh, nil, account.State().Signed
	t.mu.Unlock()
	return nil
}

// errReplaced is for requests whose channel is used no more.
var errReplaced = errors.New("its channel cannot be used any more")

// pay signs and sends what is due on a channel; more asks for up to a step beyond it.
func (t *paying) pay(ctx context.Context, account *purse.Account, step uint64, more bool) error {
	t.send.Lock()
	defer t.send.Unlock()
	t.mu.Lock()
	now := t.account
	t.mu.Unlock()
	if now != account {
		return errReplaced
	}
	ctx = context.WithoutCancel(ctx) // what is signed is to arrive
	v, err := account.Sign(step, more)
	if err != nil {
		if err = t.room(ctx, account, err); err == nil {
			v, err = account.Sign(step, more)
		}
	}
	if err != nil || v == nil {
		return err
	}
	t.mu.Lock()
	var before []pay.ModelPrice
	if t.accept != nil {
		before = t.accept.Extra.Models
	}
	t.mu.Unlock()
	terms, ok, err := t.exchange(ctx, v)
	if err != nil {
		return err
	}
	if ok {
		account.Took(v.Total)
	}
	if err := t.learn(terms); err != nil {
		return err
	}
	if ok {
		t.mu.Lock()
		t.bought(v.Total, before)
		t.mu.Unlock()
	}
	if !ok {
		return fmt.Errorf("%w: it does not take a voucher: %s", ErrHonour, cmp.Or(terms.Error, "it does not say why"))
	}
	return nil
}

// room makes room in a channel, if that is why something could not be signed; nil says
// to try again.
func (t *paying) room(ctx context.Context, account *purse.Account, why error) error {
	switch {
	case errors.Is(why, purse.ErrLimit) && t.worker.proxy.options.Payment.Funds != nil:
		if err := t.topUp(context.WithoutCancel(ctx), account); err != nil {
			return fmt.Errorf("%w: %w", why, err)
		}
	case !errors.Is(why, purse.ErrUnseen):
		return why
	}
	terms, _, err := t.exchange(ctx, nil)
	if err != nil {
		return err
	}
	return t.learn(terms)
}

func (t *paying) topUp(ctx context.Context, account *purse.Account) error {
	payment := t.worker.proxy.options.Payment
	ctx, cancel := context.WithTimeout(ctx, fundLimit)
	defer cancel()
	c, err := payment.Funds.TopUp(ctx, account.ID())
	if err == nil {
		_, err = payment.Purse.Use(c, t.worker.endpoint)
	}
	return err
}

// pump pays what is due, and what has become due meanwhile, without having anybody
// wait.
func (c *charge) pump() {
	t := c.paying
	if !t.pumping.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer t.pumping.Store(false)
		for {
			err := t.note(t.pay(context.Background(), c.account, c.step, false))
			if c.reprice(); err != nil || !c.account.Due() {
				return
			}
		}
	}()
}
