package vmtest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/tlb"

	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/devnet/devnettest"
	"chrysalis/launcher"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

const ton = 1_000_000_000

// market is a chain, an owner and a client with a wallet each, on a host.
type market struct {
	*host
	chain         *devnet.Chain
	owner, client *registry.Wallet
	key           ed25519.PrivateKey // the client's
	keyFile       string
	known         map[lite.Address]bool // channels
}

func newMarket(t *testing.T) *market {
	t.Helper()
	chain, server := devnettest.Serve(t, devnet.Options{})
	m := &market{host: newHost(t), chain: chain, known: map[lite.Address]bool{}}
	t.Setenv("CHRYSALIS_TON_NETWORK", "devnet")
	dir := filepath.Join(m.dir, "chrysalis", "devnet")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "global.config.json"), chain.GlobalConfig(server), 0o644); err != nil {
		t.Fatal(err)
	}
	wallet := func(seed byte, nano int64) (*registry.Wallet, ed25519.PrivateKey) {
		key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32))
		w, err := registry.NewWallet(key, "v5r1", chain.GlobalID())
		if err != nil {
			t.Fatal(err)
		}
		if err := chain.Fund(w.Address.Std(), big.NewInt(nano)); err != nil {
			t.Fatal(err)
		}
		return w, key
	}
	m.owner, _ = wallet(1, ton)
	m.client, m.key = wallet(2, 5*ton)
	m.keyFile = filepath.Join(t.TempDir(), "client.key")
	if err := os.WriteFile(m.keyFile, []byte(hex.EncodeToString(m.key.Seed())), 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

// do runs a command that must succeed.
func (m *market) do(args ...string) string {
	m.t.Helper()
	r := m.run(2*time.Minute, args...)
	if r.code != 0 {
		m.t.Fatalf("chrysalis %s: %s", strings.Join(args, " "), r)
	}
	return r.stdout
}

// open opens a channel to the owner.
func (m *market) open(amount string) voucher.Channel {
	m.t.Helper()
	m.do("channel", "open", m.owner.Address.String(), amount, "--delay=1s", "--key-file", m.keyFile)
	var list []struct{ Address lite.Address }
	if err := json.Unmarshal([]byte(m.do("channel", "list", "--json")), &list); err != nil {
		m.t.Fatal(err)
	}
	for _, c := range list {
		if !m.known[c.Address] {
			m.known[c.Address] = true
			return voucher.Channel(c.Address.ID)
		}
	}
	m.t.Fatal("the channel that was opened is not listed")
	return voucher.Channel{}
}

func (m *market) balance(a lite.Address) uint64 {
	if s := m.chain.Account(a.Std()); s != nil && s.IsValid {
		return s.Balance.Nano().Uint64()
	}
	return 0
}

// state is what the launcher says of a VM.
func (m *market) state(name string) launcher.State {
	m.t.Helper()
	var list []launcher.State
	if err := json.Unmarshal([]byte(m.do("status", name, "--json")), &list); err != nil || len(list) != 1 {
		m.t.Fatalf("%d VMs of the name %s: %v", len(list), name, err)
	}
	return list[0]
}

// payer is a client of one VM with one channel.
type payer struct {
	*client
	m       *market
	channel voucher.Channel
	proof   string
	paid    uint64 // the last voucher's total
	charged uint64 // by the engine's figures and the price
}

func (m *market) payer(endpoint string, channel voucher.Channel) *payer {
	m.t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(endpoint, "https://"), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		m.t.Fatal(err)
	}
	defer conn.Close()
	spki := sha256.Sum256(conn.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo)
	return &payer{client: newClient(m.t, endpoint), m: m, channel: channel, proof: pay.SignPayer(m.key, channel, spki).String()}
}

// request sends one with the proof, and a voucher for so much in all unless that is 0.
func (p *payer) request(method, path string, body io.Reader, total uint64) (int, string) {
	p.t.Helper()
	req, err := http.NewRequest(method, p.endpoint+path, body)
	if err != nil {
		p.t.Fatal(err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set(pay.PayerHeader, p.proof)
	if total > 0 {
		req.Header.Set(pay.VoucherHeader, voucher.Sign(p.m.key, p.m.chain.GlobalID(), p.channel, total).String())
	}
	resp, err := p.http.Do(req)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, string(data)
}

// terms are what the VM says of its prices and the channel's credit.
func (p *payer) terms(code int, text string) (pay.Accept, pay.Credit) {
	p.t.Helper()
	terms, err := pay.ParseTerms([]byte(text))
	if err != nil {
		p.t.Fatalf("status %d: %v: %s", code, err, text)
	}
	a := terms.Accepts[0]
	credit := pay.Credit{Channel: p.channel}
	if a.Extra.Credit != nil {
		credit.Used, _ = pay.ParseAmount(a.Extra.Credit.Used)
		credit.Cover, _ = pay.ParseAmount(a.Extra.Credit.Cover)
		credit.Limit, _ = pay.ParseAmount(a.Extra.Credit.Limit)
	}
	return a, credit
}

func (p *payer) credit() pay.Credit {
	p.t.Helper()
	code, text := p.request(http.MethodGet, "/.well-known/payment", nil, 0)
	if code != http.StatusOK {
		p.t.Fatalf("terms: %d: %s", code, text)
	}
	_, c := p.terms(code, text)
	return c
}

// pay hands in a voucher for so much in all.
func (p *payer) pay(total uint64) pay.Credit {
	p.t.Helper()
	code, text := p.request(http.MethodPost, "/.well-known/payment", nil, total)
	if code != http.StatusOK {
		p.t.Fatalf("a voucher for %d: %d: %s", total, code, text)
	}
	p.paid = total
	_, c := p.terms(code, text)
	if c.Cover != total {
		p.t.Errorf("a voucher for %d covers %d", total, c.Cover)
	}
	return c
}

// brief is a question with a short answer: an emulated VM takes its time.
func brief(text string, stream bool) io.Reader {
	data, err := json.Marshal(map[string]any{
		"model": "chrysalis/demo", "stream": stream, "temperature": 0, "max_tokens": 32,
		"messages": []map[string]string{{"role": "user", "content": text}},
	})
	if err != nil {
		panic(err)
	}
	return bytes.NewReader(data)
}

// ask asks a question at a price, and reports whether it was answered and not 402.
func (p *payer) ask(price pay.Price) bool {
	p.t.Helper()
	code, text := p.request(http.MethodPost, "/v1/chat/completions", brief("How do I make a model disk?", false), 0)
	if code == http.StatusPaymentRequired {
		return false
	}
	var answer struct {
		Usage struct {
			Prompt     int64 `json:"prompt_tokens"`
			Completion int64 `json:"completion_tokens"`
		}
	}
	if err := json.Unmarshal([]byte(text), &answer); code != http.StatusOK || err != nil || answer.Usage.Completion == 0 {
		p.t.Fatalf("%d: %v: %s", code, err, text)
	}
	p.charged += price.Cost(answer.Usage.Prompt, answer.Usage.Completion)
	return true
}

// fees are what all transactions took from the client and from the owner, in nanotons.
// The client bears what it sends to channels, and their rent; the owner what external
// claims take there, which is said apart.
func (m *market) fees() (client, owner, claims uint64) {
	m.t.Helper()
	addresses := map[lite.Address]bool{m.client.Address: true, m.owner.Address: true}
	for a := range m.known {
		addresses[a] = true
	}
	for a := range addresses {
		txs, err := m.chain.Transactions(a.Std())
		if err != nil {
			m.t.Fatal(err)
		}
		for _, tx := range txs {
			took := tx.TotalFees.Coins.Nano().Uint64()
			if tx.OutMsgCount > 0 {
				out, err := tx.IO.Out.ToSlice()
				if err != nil {
					m.t.Fatal(err)
				}
				for _, msg := range out {
					took += msg.AsInternal().FwdFee.Nano().Uint64()
				}
			}
			switch {
			case a == m.owner.Address:
				owner += took
			case a == m.client.Address:
				client += took
			default:
				rent := uint64(0)
				if d := tx.Description.(tlb.TransactionDescriptionOrdinary); d.StoragePhase != nil {
					rent = d.StoragePhase.StorageFeesCollected.Nano().Uint64()
				}
				client += rent
				if tx.IO.In.MsgType == tlb.MsgTypeInternal {
					client += took - rent
				} else {
					claims += took - rent
				}
			}
		}
	}
	return client, owner, claims
}

// TestPaidEndToEnd has an owner run two VMs at different prices and a client pay them
// through channels, until its money is spent; the owner's launcher is killed in
// between; the owner claims, the client takes back the rest, and every nanoton is
// accounted for.
func TestPaidEndToEnd(t *testing.T) {
	m := newMarket(t)
	begin := time.Now()
	at := func(what string) { t.Logf("%6.1f s  %s", time.Since(begin).Seconds(), what) }
	const step = 40_000_000
	up := func(name, prompt, completion string) string {
		t.Helper()
		return m.up(name, "--engine", llama, "--model", demo, "--prompt-price", prompt, "--completion-price", completion,
			"--payout", m.owner.Address.String(), "--voucher-step", "0.04", "--min-deposit", "0.1", "--min-delay", "1s")
	}
	prices := map[string]pay.Price{
		"cheap": {Prompt: 20 * ton, Completion: 450 * ton},
		"dear":  {Prompt: 30 * ton, Completion: 900 * ton},
	}
	endpoints, channels := map[string]string{}, map[string]voucher.Channel{}
	var both sync.WaitGroup
	both.Go(func() { endpoints["cheap"] = up("cheap", "20", "450") })
	channels["cheap"], channels["dear"] = m.open("0.15"), m.open("0.12")
	both.Wait()
	endpoints["dear"] = up("dear", "30", "900")
	at("booted")
	if t.Failed() {
		t.FailNow()
	}
	deposits := map[string]uint64{"cheap": 150_000_000, "dear": 120_000_000}
	clientBefore, ownerBefore := uint64(5*ton), m.balance(m.owner.Address)

	// Who does not pay gets the terms, and nothing else.
	plain := newClient(t, endpoints["cheap"])
	resp, text := plain.send(http.MethodPost, "/v1/chat/completions", brief("Hello", false))
	if resp.StatusCode != http.StatusPaymentRequired {
		t.Fatalf("for nothing: %d: %s", resp.StatusCode, text)
	}
	cheap, dear := m.payer(endpoints["cheap"], channels["cheap"]), m.payer(endpoints["dear"], channels["dear"])
	for name, p := range map[string]*payer{"cheap": cheap, "dear": dear} {
		a, credit := p.terms(p.request(http.MethodGet, "/.well-known/payment", nil, 0))
		if a.PayTo != voucher.Channel(m.owner.Address.ID).String() || a.Amount != strconv.Itoa(step) || a.Extra.MinDelay != 1 ||
			a.Extra.MinDeposit != "100000000" || len(a.Extra.Models) != 1 || a.Extra.Models[0].Price != prices[name] {
			t.Errorf("%s: the terms are %+v", name, a)
		}
		if credit.Used != 0 || credit.Cover != 0 || credit.Limit > deposits[name] || credit.Limit+20_000_000 < deposits[name] {
			t.Errorf("%s: the credit is %+v", name, credit)
		}
		if p.ask(prices[name]) {
			t.Errorf("%s: answered without cover", name)
		}
	}

	at("refused without cover")
	// Two steps of use, and then the launcher of the cheap one is killed. It is started
	// again with what the store has, which is all of it.
	limit := cheap.credit().Limit
	for total := uint64(step); total <= 2*step; total += step {
		cheap.pay(total)
		for range 2 {
			if !cheap.ask(prices["cheap"]) {
				break
			}
		}
	}
	before := cheap.credit()
	if before.Used != cheap.charged || before.Cover != 2*step {
		t.Errorf("%+v, and %d was charged", before, cheap.charged)
	}
	deadline := time.Now().Add(30 * time.Second)
	for m.state("cheap").Payment.Earned != before.Used {
		if time.Now().After(deadline) {
			t.Fatalf("the launcher knows of %+v, not of %+v", m.state("cheap").Payment, before)
		}
		time.Sleep(200 * time.Millisecond)
	}
	if err := syscall.Kill(m.state("cheap").Supervisor, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for m.state("cheap").Life != launcher.LifeEnded {
		time.Sleep(50 * time.Millisecond)
	}
	killed := cheap
	endpoints["cheap"] = up("cheap", "20", "450")
	cheap = m.payer(endpoints["cheap"], channels["cheap"])
	cheap.charged, cheap.paid = killed.charged, killed.paid
	if after := cheap.credit(); after != before {
		t.Errorf("before the kill %+v, afterwards %+v", before, after)
	}
	// The proof for the VM that is gone is none for this one.
	cheap.proof, killed.proof = killed.proof, cheap.proof
	if code, text := cheap.request(http.MethodGet, "/.well-known/payment", nil, 0); code != http.StatusPaymentRequired {
		t.Errorf("with another VM's proof: %d: %s", code, text)
	}
	cheap.proof = killed.proof

	at("killed and booted again")
	// All that the channel holds, then it is over: at what it holds, and at most a step
	// beyond, in which the last answer came to its end.
	cheap.pay(limit)
	for n := 0; cheap.ask(prices["cheap"]); n++ {
		if n > 100 {
			t.Fatal("it never ends")
		}
	}
	end := cheap.credit()
	if end.Used != cheap.charged || end.Cover != limit || end.Used > limit+step {
		t.Errorf("in the end %+v, and %d was charged", end, cheap.charged)
	}
	for what, total := range map[string]uint64{"more than it holds": limit + step, "less than before": step} {
		if code, text := cheap.request(http.MethodPost, "/.well-known/payment", nil, total); code != http.StatusPaymentRequired {
			t.Errorf("%s: %d: %s", what, code, text)
		}
	}

	at("spent")
	// On the other VM the price falls, below the ceiling that clients have seen; it
	// cannot rise above it.
	dear.pay(step)
	half := pay.Price{Prompt: 15 * ton, Completion: 450 * ton}
	if !dear.ask(prices["dear"]) {
		t.Error("a voucher does not cover")
	}
	if r := m.run(time.Minute, "price", "dear", "--completion-price", "900.000000001"); r.code == 0 || !strings.Contains(r.stderr, "ceiling") {
		t.Errorf("a price above the ceiling: %s", r)
	}
	if out := m.do("price", "dear", "--prompt-price", "15", "--completion-price", "450"); !strings.Contains(out, "15 TON and 450 TON") {
		t.Errorf("price: %s", out)
	}
	if a, _ := dear.terms(dear.request(http.MethodGet, "/.well-known/payment", nil, 0)); a.Extra.Models[0].Price != half {
		t.Errorf("the price is %+v", a.Extra.Models[0])
	}
	// A stream that runs out of cover ends with the reason, and what was sent is charged.
	code, text := dear.request(http.MethodPost, "/v1/chat/completions", brief("Tell me all about model disks.", true), 0)
	for n := 0; code == http.StatusOK && strings.Contains(text, "[DONE]") && n < 20; n++ {
		code, text = dear.request(http.MethodPost, "/v1/chat/completions", brief("Tell me all about model disks.", true), 0)
	}
	if code == http.StatusOK && !strings.Contains(text, `"payment_required"`) || code != http.StatusOK && code != http.StatusPaymentRequired {
		t.Errorf("a stream without cover: %d: %s", code, text)
	}
	credit := dear.credit()
	if credit.Used < dear.charged || credit.Used > credit.Cover+step {
		t.Errorf("%+v", credit)
	}
	dear.charged = credit.Used

	at("cut off")
	// The owner's view, and the end: all that was paid is claimed on the way down.
	if out := m.do("status", "dear"); !strings.Contains(out, "dear is paid 15 TON and 450 TON") {
		t.Errorf("status: %s", out)
	}
	for _, name := range []string{"cheap", "dear"} {
		m.do("down", name)
	}
	at("down")
	claimed := limit + dear.paid
	var earnings struct {
		Total struct{ Earned, Claimed, Pending, Lost, Fees uint64 }
	}
	if err := json.Unmarshal([]byte(m.do("earnings", "--json")), &earnings); err != nil {
		t.Fatal(err)
	}
	sum := earnings.Total
	if want := cheap.charged + dear.charged; sum.Earned != want || sum.Claimed != min(cheap.charged, limit)+min(dear.charged, dear.paid) || sum.Lost != 0 {
		t.Errorf("%+v, and %d was charged", sum, want)
	}
	if out := m.do("earnings", "cheap", "--csv"); !strings.HasPrefix(out, "day,model,requests,") || !strings.Contains(out, ",chrysalis/demo@") {
		t.Errorf("earnings: %s", out)
	}

	// The client closes, and gets the rest.
	for a := range m.known {
		m.do("channel", "close", a.String(), "--key-file", m.keyFile)
	}
	time.Sleep(2 * time.Second) // the delay
	m.chain.Mine()
	for a := range m.known {
		m.do("channel", "close", a.String(), "--key-file", m.keyFile)
		if left := m.balance(a); left != 0 {
			t.Errorf("%d are left in a channel", left)
		}
	}
	at("closed")
	clientFees, ownerFees, claims := m.fees()
	if got, want := m.balance(m.client.Address), clientBefore-claimed-clientFees; got != want {
		t.Errorf("the client has %d, not %d", got, want)
	}
	if got, want := m.balance(m.owner.Address), ownerBefore+claimed-claims-ownerFees; got != want {
		t.Errorf("the owner has %d, not %d", got, want)
	}
	if sum.Fees != claims {
		t.Errorf("the earnings list fees of %d, the chain %d", sum.Fees, claims)
	}
	t.Logf("claimed %d; fees: client %d, claims %d, owner's account %d", claimed, clientFees, claims, ownerFees)
}
