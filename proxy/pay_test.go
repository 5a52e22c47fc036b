package proxy_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"chrysalis/attest/attesttest"
	"chrysalis/attest/receipt"
	"chrysalis/channel/voucher"
	"chrysalis/manifest"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/pay/purse"
	"chrysalis/proxy"
)

const (
	payModel   = "test/model"
	payModelID = "test/model@1"
	payNetwork = -7
	payStep    = 1_000_000
	perToken   = 1000 // nanotons, of the ceilings
)

var (
	payerKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))
	ceiling  = pay.Price{Prompt: perToken * 1_000_000, Completion: perToken * 1_000_000}
)

// till is a VM that is paid, by the rules of package pay, and lies where a test has it
// lie.
type till struct {
	vm     *attesttest.VM
	server *attesttest.Server
	book   *pay.Book
	payee  [32]byte

	words    atomic.Int64 // of an answer
	patient  atomic.Int64 // for how many hundredths of a second it waits for a voucher
	requests atomic.Int64
	paid     atomic.Int64 // requests that were served
	posts    atomic.Int64 // vouchers that came
	last     atomic.Uint64
	limit    atomic.Uint64 // of channels that it admits
	ack      uint64

	mu       sync.Mutex
	receipt  func(*receipt.Receipt) bool // changes it, or says that there is none
	terms    func(*pay.Terms)
	taken    func()                   // after a voucher, before the answer to it
	event    func(w io.Writer, i int) // before each event
	refuse   bool                     // every request, whatever was paid
	sequence int64
}

// newTill puts a VM on a server that asks for payment. It admits any channel.
func newTill(vm *attesttest.VM, server *attesttest.Server, payee byte) *till {
	t := &till{vm: vm, server: server, payee: [32]byte{payee}}
	t.words.Store(20)
	t.patient.Store(1000)
	t.limit.Store(1 << 40)
	t.boot()
	server.API = http.HandlerFunc(t.serve)
	return t
}

func (t *till) boot() {
	c, _ := t.vm.Manifest.Ceilings()
	book, err := pay.NewBook(payNetwork, sha256.Sum256(t.vm.SPKI), c, 100)
	if err != nil {
		panic(err)
	}
	t.book, t.ack = book, 0
}

// durable has the vouchers that came cover, as a launcher does.
func (t *till) durable() {
	for {
		t.mu.Lock()
		batch, list, err := t.book.Collect(t.ack, func(pay.Balance) bool { return true })
		if err != nil {
			panic(err)
		}
		t.ack = max(t.ack, batch)
		t.mu.Unlock()
		if len(list) == 0 {
			return
		}
	}
}

func (t *till) admit(a pay.Admission) {
	if err := t.book.Admit(a); err != nil {
		panic(err)
	}
}

func (t *till) answerTerms(w http.ResponseWriter, status int, path, why string, s *pay.Session) {
	var credit *pay.Credit
	if s != nil {
		c, _ := t.book.Credit(*s)
		credit = &c
	}
	terms := t.book.Terms(pay.Owner{Account: t.payee, MinDeposit: 1, MinDelay: 60}, path, why, credit)
	t.mu.Lock()
	if t.terms != nil {
		t.terms(&terms)
	}
	t.mu.Unlock()
	data, err := terms.Encode()
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(data)
}

func (t *till) serve(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	payer, v, err := pay.FromHeader(r.Header)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	refuse := func(why error, s *pay.Session) { t.answerTerms(w, 402, r.URL.Path, strings.Trim(why.Error(), "\""), s) }
	var session *pay.Session
	if payer != nil {
		s, err := t.book.Session(*payer)
		if errors.Is(err, pay.ErrNoChannel) {
			t.book.Admit(pay.Admission{Channel: payer.Channel, Key: voucher.Key(payerKey.Public().(ed25519.PublicKey)), Limit: t.limit.Load()})
			s, err = t.book.Session(*payer)
		}
		if err != nil {
			refuse(err, nil)
			return
		}
		session = &s
	}
	if v != nil {
		t.posts.Add(1)
		t.last.Store(v.Total)
		if err := t.book.Pay(*v); err != nil {
			refuse(err, session)
			return
		}
		t.durable()
		t.mu.Lock()
		taken := t.taken
		t.mu.Unlock()
		if taken != nil {
			taken()
		}
	}
	if r.URL.Path == proxy.PaymentPath {
		t.answerTerms(w, 200, r.URL.Path, "", session)
		return
	}
	t.requests.Add(1)
	if session == nil {
		refuse(errors.New("who pays"), nil)
		return
	}
	t.mu.Lock()
	no := t.refuse
	t.mu.Unlock()
	if no {
		refuse(errors.New("not today"), session)
		return
	}
	var ask struct {
		Stream    bool
		MaxTokens int64 `json:"max_tokens"`
	}
	json.Unmarshal(body, &ask)
	var request *pay.Request
	most := int64(pay.MaxAsked)
	if ask.Stream {
		request, err = t.book.Start(*session, payModelID, int64(len(body)), ask.MaxTokens)
	} else {
		request, most, err = t.book.StartWhole(*session, payModelID, int64(len(body)), ask.MaxTokens)
	}
	if err != nil {
		refuse(err, session)
		return
	}
	defer t.durable()
	t.paid.Add(1)
	salt, err := receipt.ParseSalt(r.Header.Get(receipt.SaltHeader))
	if err != nil {
		panic(err)
	}
	covered, asked := receipt.NewHash(salt), receipt.NewHash(salt)
	asked.Write(body)
	sign := func(words int64, whole bool) []byte {
		charge := request.End(&pay.Usage{Prompt: 10, Completion: words}, whole)
		m := t.vm.Manifest
		encoded, _ := m.Encode()
		sum := manifest.SHA384(encoded)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.sequence++
		signed := &receipt.Receipt{
			Version: 1, Sequence: t.sequence, Manifest: hex.EncodeToString(sum[:]), Model: payModelID, RootHash: m.Models[0].Disk.RootHash,
			Request: hex.EncodeToString(asked.Sum(nil)), Response: hex.EncodeToString(covered.Sum(nil)),
			Payment: &receipt.Payment{
				Channel: charge.Credit.Channel.String(), PromptPrice: charge.Price.Prompt, CompletionPrice: charge.Price.Completion,
				PromptTokens: charge.Prompt, CompletionTokens: charge.Completion,
				Charged: strconv.FormatUint(charge.Amount, 10), Used: strconv.FormatUint(charge.Credit.Used, 10), Cover: strconv.FormatUint(charge.Credit.Cover, 10),
			},
		}
		if t.receipt != nil && !t.receipt(signed) {
			return nil
		}
		data, err := signed.Sign(t.vm.ReceiptKey)
		if err != nil {
			panic(err)
		}
		return data
	}
	words := min(t.words.Load(), most)
	if ask.MaxTokens > 0 {
		words = min(words, ask.MaxTokens)
	}
	if !ask.Stream {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Trailer", receipt.Trailer)
		text := fmt.Sprintf(`{"choices":[{"message":{"content":%q}}]}`, strings.Repeat("word ", int(words)))
		request.Send(int64(5 * words))
		io.WriteString(io.MultiWriter(w, covered), text)
		request.Sent()
		if data := sign(words, true); data != nil {
			w.Header().Set(receipt.Trailer, string(data))
		}
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	out := io.MultiWriter(w, covered)
	flush := http.NewResponseController(w).Flush
	for i := range words {
		for wait := 0; !request.Send(5); wait++ {
			if wait >= int(t.patient.Load()) || r.Context().Err() != nil {
				fmt.Fprintf(out, "data: {\"error\":{\"type\":\"payment_required\",\"code\":\"payment_required\",\"message\":\"more\"}}\n\n")
				if data := sign(i, false); data != nil {
					fmt.Fprintf(w, "%s%s\n\n", receipt.CommentPrefix, data)
				}
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.mu.Lock()
		event := t.event
		t.mu.Unlock()
		if event != nil {
			event(w, int(i))
		}
		if _, err := fmt.Fprintf(out, "data: {\"choices\":[{\"delta\":{\"content\":\"word \"}}]}\n\n"); err != nil || r.Context().Err() != nil {
			request.End(nil, false)
			return
		}
		flush()
		request.Sent()
	}
	fmt.Fprint(out, "data: [DONE]\n\n")
	if data := sign(words, true); data != nil {
		fmt.Fprintf(w, "%s%s\n\n", receipt.CommentPrefix, data)
	}
}

// vault stands in for channels on a chain.
type vault struct {
	mu     sync.Mutex
	limit  uint64 // of a new channel
	top    uint64 // that a top-up adds; 0 refuses
	opened []purse.Channel
	err    error
}

func (v *vault) Channel(_ context.Context, d purse.Demand) (purse.Channel, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return purse.Channel{}, v.err
	}
	for _, c := range v.opened {
		if c.Payee == d.Payee && !d.Except(c.ID) {
			c.Fresh = false
			return c, nil
		}
	}
	c := purse.Channel{ID: voucher.Channel{1, byte(len(v.opened))}, Payee: d.Payee, Limit: v.limit, Fresh: true}
	v.opened = append(v.opened, c)
	return c, nil
}

func (v *vault) TopUp(_ context.Context, id voucher.Channel) (purse.Channel, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, c := range v.opened {
		if c.ID == id && v.top > 0 {
			v.opened[i].Limit += v.top
			return v.opened[i], nil
		}
	}
	return purse.Channel{}, fmt.Errorf("%w, by the vault", purse.ErrBudget)
}

// paidWorld is a world whose workers want to be paid.
type paidWorld struct {
	*world
	tills []*till
	purse *purse.Purse
	vault *vault
	dir   string
}

func startPaid(t *testing.T, n int, budget uint64, edit func(*paidWorld, *proxy.Options)) *paidWorld {
	t.Helper()
	return startPaidIn(t, t.TempDir(), &vault{limit: 1 << 40}, n, budget, edit)
}

func startPaidIn(t *testing.T, dir string, funds *vault, n int, budget uint64, edit func(*paidWorld, *proxy.Options)) *paidWorld {
	t.Helper()
	w := &paidWorld{vault: funds, dir: dir}
	var err error
	if w.purse, err = purse.Open(dir, payNetwork, payerKey, budget); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.purse.Close() })
	w.world = start(t, n, func(inner *world, o *proxy.Options) {
		w.world = inner
		o.Payment = &proxy.Payment{Purse: w.purse, MaxPrice: ceiling.Prompt, Funds: w.vault}
		for i, vm := range inner.vms {
			m := *vm.Manifest
			m.Payment = &manifest.Payment{Network: payNetwork, Step: payStep, Ceilings: []pay.Price{ceiling}}
			vm.Manifest = &m
			vm.Boot()
			w.tills = append(w.tills, newTill(vm, inner.servers[i], byte(10+i)))
		}
		if edit != nil {
			edit(w, o)
		}
	})
	return w
}

func body(stream bool, more string) string {
	return fmt.Sprintf(`{"model":%q,"stream":%v,"messages":[{"role":"user","content":"hello"}]%s}`, payModel, stream, more)
}

// served asks and fails the test unless an answer comes.
func (w *paidWorld) served(t *testing.T, ask string, header ...string) string {
	t.Helper()
	answer, text := w.post(t, ask, header...)
	if answer.StatusCode != 200 || strings.Contains(text, `"error"`) {
		t.Fatalf("%d %s", answer.StatusCode, text)
	}
	return answer.Header.Get(proxy.WorkerHeader)
}

func (w *paidWorld) refused(t *testing.T, want string) {
	t.Helper()
	answer, text := w.post(t, body(true, ""))
	if answer.StatusCode != http.StatusPaymentRequired || !strings.Contains(text, want) {
		t.Fatalf("%d %s, want %q", answer.StatusCode, text, want)
	}
}

func (w *paidWorld) state(t *testing.T, i int) purse.State {
	t.Helper()
	for _, s := range w.purse.States() {
		if s.Payee == voucher.Channel(w.tills[i].payee) {
			return s
		}
	}
	t.Fatal("no channel")
	return purse.State{}
}

// quiet is where a channel stands when nothing is on its way any more, such as the
// voucher that the last text of an answer called for.
func (w *paidWorld) quiet(t *testing.T, i int) purse.State {
	t.Helper()
	before := purse.State{}
	for same := 0; same < 10; time.Sleep(10 * time.Millisecond) {
		now := w.purse.States()[i]
		if same++; now != before || now.Taken != now.Signed || now.Running > 0 {
			before, same = now, 0
		}
	}
	return before
}

// TestPaid pays for streams and answers that are none, and both sides come to the same.
func TestPaid(t *testing.T) {
	w := startPaid(t, 1, 1<<40, nil)
	till := w.tills[0]
	till.words.Store(3000)
	want := uint64(0)
	for i, ask := range []string{body(true, ""), body(false, ""), body(true, `,"max_tokens":7`), body(false, `,"max_tokens":50`), body(true, "")} {
		w.served(t, ask)
		want += perToken * (10 + []uint64{3000, 3000, 7, 50, 3000}[i])
		if s := w.state(t, 0); s.Used != want || s.Running != 0 {
			t.Fatalf("%d: %+v, want %d used", i, s, want)
		}
	}
	s := w.state(t, 0)
	// What is held at the most is a stream's text, of five bytes a token, and a prompt's
	// bounds.
	if most := want + (4*3000+64+1024+200)*perToken + payStep; s.Signed > most {
		t.Errorf("%d is signed, and %d used", s.Signed, s.Used)
	}
	if len(w.vault.opened) != 1 {
		t.Errorf("%d channels", len(w.vault.opened))
	}
	page := w.get(t, "/")
	for _, want := range []string{s.Channel.String(), s.Payee.String(), "0.009107 TON of it used"} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not on the page", want)
		}
	}
	if strings.Contains(page, "hello") {
		t.Error("a prompt is on the page")
	}
}

// TestAtOnce has many requests on one channel.
func TestAtOnce(t *testing.T) {
	w := startPaid(t, 1, 1<<40, nil)
	w.tills[0].words.Store(500)
	var all sync.WaitGroup
	for i := range 12 {
		all.Go(func() {
			for range 3 {
				w.served(t, body(i%2 == 0, `,"max_tokens":500`))
			}
		})
	}
	all.Wait()
	if s := w.state(t, 0); s.Used != 36*510*perToken || len(w.purse.Bars()) != 0 {
		t.Errorf("%+v, %v", s, w.purse.Bars())
	}
}

// TestCheats has a row for each way to be paid more than is due. Each is found, the
// payee is paid no more, and the page says why.
func TestCheats(t *testing.T) {
	more := func(p *receipt.Payment, prompt, completion int64, price pay.Price) {
		p.PromptTokens, p.CompletionTokens, p.PromptPrice, p.CompletionPrice = prompt, completion, price.Prompt, price.Completion
		used, _ := pay.ParseAmount(p.Used)
		charged, _ := pay.ParseAmount(p.Charged)
		now := price.Cost(prompt, completion)
		p.Charged, p.Used = strconv.FormatUint(now, 10), strconv.FormatUint(used-charged+now, 10)
	}
	for name, tt := range map[string]struct {
		cheat func(*receipt.Receipt) bool
		want  error
	}{
		"an answer of more tokens than bytes": {func(r *receipt.Receipt) bool { more(r.Payment, 10, 165, ceiling); return true }, purse.ErrOvercharged},
		"a prompt of more tokens than bytes":  {func(r *receipt.Receipt) bool { more(r.Payment, 2000, 20, ceiling); return true }, purse.ErrOvercharged},
		"a price above the ceiling": {func(r *receipt.Receipt) bool {
			more(r.Payment, 10, 20, pay.Price{Prompt: ceiling.Prompt, Completion: ceiling.Completion + 1_000_000})
			return true
		}, purse.ErrOvercharged},
		"more used than charged": {func(r *receipt.Receipt) bool { r.Payment.Used = "40000000"; return true }, purse.ErrOvercharged},
		"a voucher forged":       {func(r *receipt.Receipt) bool { r.Payment.Cover = "999999999"; return true }, purse.ErrBadReceipt},
		"a voucher lost":         {func(r *receipt.Receipt) bool { r.Payment.Cover = "1"; return true }, purse.ErrLostCredit},
		"another channel":        {func(r *receipt.Receipt) bool { r.Payment.Channel = voucher.Channel{9}.String(); return true }, purse.ErrBadReceipt},
		"another answer":         {func(r *receipt.Receipt) bool { r.Response = strings.Repeat("0", 64); return true }, purse.ErrBadReceipt},
		"another request":        {func(r *receipt.Receipt) bool { r.Request = strings.Repeat("0", 64); return true }, purse.ErrBadReceipt},
		"no receipt":             {func(*receipt.Receipt) bool { return false }, purse.ErrNoReceipt},
	} {
		for _, stream := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, stream %v", name, stream), func(t *testing.T) {
				t.Parallel()
				w := startPaid(t, 1, 1<<40, nil)
				w.tills[0].receipt = tt.cheat
				w.served(t, body(stream, ""))
				paid, signed := w.tills[0].paid.Load(), w.state(t, 0).Signed
				w.refused(t, tt.want.Error())
				if bars := w.purse.Bars(); len(bars) != 1 || !strings.Contains(bars[0].Reason, tt.want.Error()) {
					t.Errorf("%+v", bars)
				}
				if w.tills[0].paid.Load() != paid || w.state(t, 0).Signed != signed {
					t.Error("it is asked or paid again")
				}
				if page := w.get(t, "/"); !strings.Contains(page, tt.want.Error()) || !strings.Contains(page, voucher.Channel(w.tills[0].payee).String()) {
					t.Error("the page does not say why")
				}
				// Nor after the proxy was started anew.
				w.purse.Close()
				again := startPaidIn(t, w.dir, w.vault, 1, 1<<40, nil)
				again.refused(t, tt.want.Error())
			})
		}
	}
}

// TestTermsRefused has a row for each worker that is paid nothing, before anything is
// sent to it.
func TestTermsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		edit func(*paidWorld, *proxy.Options)
		want string
	}{
		"no payment":               {func(_ *paidWorld, o *proxy.Options) { o.Payment = nil }, "--max-price"},
		"a ceiling above the most": {func(_ *paidWorld, o *proxy.Options) { o.Payment.MaxPrice = ceiling.Prompt - 1 }, "above --max-price"},
		"another network": {func(w *paidWorld, _ *proxy.Options) {
			w.vms[0].Manifest.Payment.Network = -239
			w.vms[0].Boot()
		}, "another network"},
		"terms of another network": {func(w *paidWorld, _ *proxy.Options) {
			w.tills[0].terms = func(t *pay.Terms) { t.Accepts[0].Network = "ton:-239" }
		}, "another network"},
		"another contract": {func(w *paidWorld, _ *proxy.Options) {
			w.tills[0].terms = func(t *pay.Terms) { t.Accepts[0].Extra.CodeHash = strings.Repeat("0", 64) }
		}, "another contract"},
		"a price above its ceiling": {func(w *paidWorld, _ *proxy.Options) {
			w.tills[0].terms = func(t *pay.Terms) { t.Accepts[0].Extra.Models[0].Prompt++ }
		}, "above its ceiling"},
		"another step": {func(w *paidWorld, _ *proxy.Options) {
			w.tills[0].terms = func(t *pay.Terms) { t.Accepts[0].Amount = "2000000" }
		}, "another step"},
		"another payee than the offer": {func(w *paidWorld, o *proxy.Options) {
			o.Payment.Listed = []proxy.Listed{{Endpoint: w.servers[0].URL, Payee: voucher.Channel{1}}}
		}, "another payee"},
		"no channel": {func(w *paidWorld, _ *proxy.Options) { w.vault.err = errors.New("the wallet is empty") }, "the wallet is empty"},
		"credit of another channel": {func(w *paidWorld, _ *proxy.Options) {
			w.tills[0].terms = func(t *pay.Terms) {
				if c := t.Accepts[0].Extra.Credit; c != nil {
					c.Channel = voucher.Channel{9}.String()
				}
			}
		}, "another channel"},
		"no budget": {func(w *paidWorld, o *proxy.Options) {
			w.purse.Close()
			w.purse, _ = purse.Open(w.dir, payNetwork, payerKey, payStep-1)
			o.Payment.Purse = w.purse
		}, purse.ErrBudget.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := startPaid(t, 1, 1<<40, tt.edit)
			w.refused(t, tt.want)
			if w.tills[0].paid.Load() != 0 {
				t.Error("it was served")
			}
			for _, s := range w.purse.States() {
				if s.Signed > 2*payStep { // a channel of which it then says something wrong
					t.Errorf("signed: %+v", s)
				}
			}
			if page := w.get(t, "/"); !strings.Contains(page, strings.ReplaceAll(tt.want, "'", "&#39;")) {
				t.Errorf("the page does not say why")
			}
		})
	}
}

// TestPriceChange changes prices while a client uses what it has paid.
func TestPriceChange(t *testing.T) {
	low := pay.Tariff{Step: payStep, Models: map[string]pay.Price{payModelID: {Prompt: 1_000_000, Completion: 100_000_000}}}
	high := pay.Tariff{Step: payStep, Models: map[string]pay.Price{payModelID: ceiling}}
	w := startPaid(t, 1, 1<<40, func(w *paidWorld, _ *proxy.Options) { w.tills[0].book.SetPrices(low) })
	w.tills[0].words.Store(5000)
	w.served(t, body(true, ""))
	if s := w.state(t, 0); s.Used != 5000*100+10 {
		t.Fatalf("%+v", s)
	}
	first := true
	w.tills[0].event = func(io.Writer, int) {
		if first {
			first = false
			w.tills[0].book.SetPrices(high)
		}
	}
	w.served(t, body(true, "")) // at the low price, in whose midst it rises
	// What was paid before buys at the low price, and then they cost the high one.
	for range 6 {
		w.served(t, body(true, ""))
		w.quiet(t, 0)
	}
	s := w.state(t, 0)
	if s.Used < 2*5010*perToken || s.Used > 7*5010*perToken || len(w.purse.Bars()) > 0 {
		t.Errorf("%+v %v", s, w.purse.Bars())
	}
	w.tills[0].book.SetPrices(low)
	for range 3 {
		w.served(t, body(true, ""))
	}
	if len(w.purse.Bars()) > 0 {
		t.Error(w.purse.Bars())
	}
}

// TestPriceFalls lowers the price between taking a voucher and saying so: what it bought
// costs what it cost, and no stream may have to wait for it.
func TestPriceFalls(t *testing.T) {
	w := startPaid(t, 1, 1<<40, nil)
	till := w.tills[0]
	till.patient.Store(200)
	till.words.Store(500)
	w.served(t, body(true, ""))
	var once sync.Once
	till.mu.Lock()
	till.taken = func() {
		once.Do(func() {
			till.book.SetPrices(pay.Tariff{Step: payStep, Models: map[string]pay.Price{payModelID: {Prompt: 1_000_000, Completion: 1_000_000}}})
		})
	}
	till.mu.Unlock()
	for range 14 {
		w.served(t, body(true, ""))
	}
	if s := w.quiet(t, 0); s.Used <= 510*perToken || len(w.purse.Bars()) > 0 || till.book.Prices().Models[payModelID] == ceiling {
		t.Errorf("%+v %v", s, w.purse.Bars())
	}
}

// TestRestart boots a worker anew: one that remembers goes on, one that does not is
// never paid again, under its name.
func TestRestart(t *testing.T) {
	for name, lose := range map[string]bool{"it remembers": false, "it does not": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := startPaid(t, 1, 1<<40, func(_ *paidWorld, o *proxy.Options) { o.Policy.MaxAgeSeconds = 600 })
			till := w.tills[0]
			w.served(t, body(true, ""))
			before := w.quiet(t, 0)
			vm := *w.vms[0]
			vm.NewKey()
			best := voucher.Sign(payerKey, payNetwork, before.Channel, before.Signed)
			till.mu.Lock()
			till.vm = &vm
			till.boot()
			admission := pay.Admission{Channel: before.Channel, Key: voucher.Key(payerKey.Public().(ed25519.PublicKey)), Limit: 1 << 40, Used: before.Used, Best: &best}
			if lose {
				admission.Used, admission.Best = 0, nil
			}
			till.admit(admission)
			till.mu.Unlock()
			w.servers[0].Replace(&vm)
			w.proxy.Trust([]*record.File{vm.Record()}) // which drops its connections
			if lose {
				w.refused(t, purse.ErrLostCredit.Error())
				if till.paid.Load() != 1 || till.last.Load() != before.Signed || len(w.purse.Bars()) != 1 {
					t.Errorf("%+v", w.state(t, 0))
				}
				return
			}
			w.served(t, body(true, ""))
			if s := w.state(t, 0); s.Used != 2*before.Used || len(w.purse.Bars()) != 0 {
				t.Errorf("%+v, before %+v: %v", s, before, w.purse.Bars())
			}
		})
	}
}

// TestBudget uses up a budget and a channel, to the nanoton.
func TestBudget(t *testing.T) {
	w := startPaid(t, 1, 10*payStep+payStep/2, nil)
	w.tills[0].words.Store(900)
	w.tills[0].patient.Store(10)
	ended := false
	for range 80 {
		answer, text := w.post(t, body(true, ""))
		if answer.StatusCode == 402 {
			ended = strings.Contains(text, purse.ErrBudget.Error())
			break
		}
	}
	if s := w.state(t, 0); !ended || s.Signed != 10*payStep+payStep/2 && s.Signed+payStep <= 10*payStep+payStep/2 || s.Signed > 10*payStep+payStep/2 {
		t.Errorf("%v, %+v", ended, s)
	}
	if left, spent := w.purse.Budget(); left+spent != 10*payStep+payStep/2 || spent != w.state(t, 0).Signed {
		t.Errorf("%d and %d", left, spent)
	}
	// A channel is used to its last nanoton, and topped up where that can be.
	w = startPaidIn(t, t.TempDir(), &vault{limit: 3*payStep + 7}, 1, 1<<40, func(w *paidWorld, _ *proxy.Options) { w.tills[0].limit.Store(3*payStep + 7) })
	w.tills[0].words.Store(900)
	w.tills[0].patient.Store(10)
	for range 30 {
		if answer, _ := w.post(t, body(true, "")); answer.StatusCode == 402 {
			break
		}
	}
	if s := w.state(t, 0); s.Signed != 3*payStep+7 {
		t.Errorf("%+v", s)
	}
	w.vault.mu.Lock()
	w.vault.top = 4 * payStep
	w.vault.mu.Unlock()
	w.tills[0].patient.Store(1000)
	w.tills[0].words.Store(300)
	w.tills[0].admit(pay.Admission{Channel: w.state(t, 0).Channel, Key: voucher.Key(payerKey.Public().(ed25519.PublicKey)), Limit: 7*payStep + 7})
	w.served(t, body(true, ""))
	if s := w.state(t, 0); s.Limit != 7*payStep+7 {
		t.Errorf("%+v", s)
	}
}

// TestStopsHonouring goes on with another worker when one takes vouchers and gives
// nothing; what that costs is bounded.
func TestStopsHonouring(t *testing.T) {
	w := startPaid(t, 2, 1<<40, nil)
	w.served(t, body(true, ""))
	for _, till := range w.tills {
		till.mu.Lock()
		till.refuse = till.paid.Load() > 0
		till.mu.Unlock()
	}
	bad := 0
	if w.tills[1].paid.Load() > 0 {
		bad = 1
	}
	before := w.state(t, bad)
	for range 20 { // each asks either one first
		if got := w.served(t, body(true, "")); got != w.servers[1-bad].URL {
			t.Errorf("answered by %s", got)
		}
	}
	if s := w.state(t, bad); s.Signed > before.Signed+3*payStep {
		t.Errorf("%+v, before %+v", s, before)
	}
	if page := w.get(t, "/"); !strings.Contains(page, "does not honour") {
		t.Error("the page does not say so")
	}
}

// TestFreeBesidePaid asks the free worker first, and the paid one when that is gone.
func TestFreeBesidePaid(t *testing.T) {
	w := startPaid(t, 2, 1<<40, func(w *paidWorld, _ *proxy.Options) {
		w.vms[0].Manifest.Payment = nil
		w.vms[0].Boot()
		w.servers[0].API = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Header.Get(pay.PayerHeader) != "" {
				t.Error("a free worker is told who pays")
			}
			io.WriteString(rw, "free")
		})
	})
	for range 5 {
		if got := w.served(t, body(true, "")); got != w.servers[0].URL {
			t.Errorf("answered by %s", got)
		}
	}
	if len(w.purse.States()) != 0 {
		t.Error("a channel was opened for nothing")
	}
	w.servers[0].Close()
	if got := w.served(t, body(true, "")); got != w.servers[1].URL {
		t.Errorf("answered by %s", got)
	}
}

// TestCheapest goes to the cheapest worker until that is full.
func TestCheapest(t *testing.T) {
	w := startPaid(t, 3, 1<<40, func(w *paidWorld, _ *proxy.Options) {
		for i, till := range w.tills {
			till.book.SetPrices(pay.Tariff{Step: payStep, Models: map[string]pay.Price{payModelID: {Prompt: int64(30-10*i) * 1_000_000, Completion: int64(30-10*i) * 1_000_000}}})
			w.vms[i].Manifest.Limits.Concurrency = 2
			w.vms[i].Boot()
		}
	})
	quotes := w.proxy.Plan(t.Context(), payModel)
	if len(quotes) != 3 || quotes[0].Endpoint != w.servers[2].URL || quotes[0].Price.Prompt != 10_000_000 || quotes[0].Ceiling != ceiling || quotes[0].Payee != voucher.Channel(w.tills[2].payee) || quotes[0].Delay != time.Minute {
		t.Fatalf("%+v", quotes)
	}
	if len(w.vault.opened) != 0 {
		t.Error("a plan opens channels")
	}
	if err := w.proxy.Prepare(t.Context(), payModel); err != nil || len(w.vault.opened) != 1 || w.vault.opened[0].Payee != w.tills[2].payee {
		t.Errorf("%v: %+v", err, w.vault.opened)
	}
	hold := make(chan struct{})
	arrived := make(chan struct{}, 8)
	for _, till := range w.tills {
		till.event = func(_ io.Writer, i int) {
			if i == 0 {
				arrived <- struct{}{}
				<-hold
			}
		}
	}
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() { w.post(t, body(true, "")) })
		<-arrived
	}
	if got := []int64{w.tills[0].paid.Load(), w.tills[1].paid.Load(), w.tills[2].paid.Load()}; got[0] != 1 || got[1] != 2 || got[2] != 2 {
		t.Errorf("%v", got)
	}
	close(hold)
	all.Wait()
}

// TestLeave leaves in the middle of answers: what that is charged is no reason to find
// fault, and the channel goes on.
func TestLeave(t *testing.T) {
	w := startPaid(t, 1, 1<<40, nil)
	w.tills[0].words.Store(100_000)
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		request, _ := http.NewRequestWithContext(ctx, http.MethodPost, w.url+"/v1/chat/completions", strings.NewReader(body(true, "")))
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(answer.Body, make([]byte, 20_000))
		cancel()
		answer.Body.Close()
	}
	w.tills[0].words.Store(20)
	for range 3 {
		w.served(t, body(true, ""))
	}
	if len(w.purse.Bars()) != 0 {
		t.Errorf("%v", w.purse.Bars())
	}
	s := w.state(t, 0)
	if s.Signed > s.Used+30*payStep {
		t.Errorf("%+v", s)
	}
}
