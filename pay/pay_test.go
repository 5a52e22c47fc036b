package pay

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"chrysalis/channel/voucher"
)

const (
	network = -7
	model   = "acme/model@1"
	other   = "acme/other@2"
	step    = 1_000_000
)

var (
	key     = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))
	public  = voucher.Key(key.Public().(ed25519.PublicKey))
	channel = voucher.Channel{0: 1}
	spki    = [32]byte{7}
)

func ceilings() Tariff {
	return Tariff{step, map[string]Price{model: {1_000_000, 3_000_000}, other: {2_000_000, 2_000_000}}}
}

func tariff(prompt, completion int64) Tariff {
	return Tariff{step, map[string]Price{model: {prompt, completion}, other: {0, 0}}}
}

func pay(total uint64) voucher.Voucher { return voucher.Sign(key, network, channel, total) }

func newBook(t testing.TB) *Book {
	t.Helper()
	b, err := NewBook(network, spki, ceilings(), 2)
	must(t, err)
	return b
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// all has room for every balance.
func all(Balance) bool { return true }

// settle acknowledges all that is to be told, and returns it.
func settle(t testing.TB, b *Book) (list []Balance) {
	t.Helper()
	for {
		_, part, err := b.Collect(b.batch, all)
		must(t, err)
		if len(part) == 0 {
			return list
		}
		list = append(list, part...)
	}
}

// paid pays, and has it be durable.
func paid(t testing.TB, b *Book, total uint64) {
	t.Helper()
	must(t, b.Pay(pay(total)))
	settle(t, b)
}

func session(t testing.TB, b *Book) Session {
	t.Helper()
	s, err := b.Session(SignPayer(key, channel, spki))
	must(t, err)
	return s
}

func TestCost(t *testing.T) {
	for _, tt := range []struct {
		price              Price
		prompt, completion int64
		want               uint64
	}{
		{Price{1000, 3000}, 1_000_000, 1_000_000, 4000},
		{Price{1000, 3000}, 999, 0, 0}, // 0.999 of a nanoton
		{Price{1000, 3000}, 1000, 0, 1},
		{Price{1000, 3000}, 500, 167, 1}, // 0.5 and 0.501: rounded once
		{Price{1, 1}, 999_999, 0, 0},
		{Price{1, 1}, 999_999, 1, 1},
		{Price{0, 5}, math.MaxInt64, 1_000_000, 5},
		{Price{1000, 1000}, -5, -5, 0},
		{Price{MaxPrice, MaxPrice}, 1_000_000, 1_000_000, 2 * MaxPrice},
		{Price{MaxPrice, MaxPrice}, math.MaxInt64, math.MaxInt64, math.MaxUint64},
		{Price{MaxPrice, MaxPrice}, 18_446_744_073, 0, 18_446_744_073 * 1_000_000_000},
		{Price{MaxPrice, MaxPrice}, 18_446_744_074, 0, math.MaxUint64},
	} {
		if got := tt.price.Cost(tt.prompt, tt.completion); got != tt.want {
			t.Errorf("%+v, %d, %d: %d, not %d", tt.price, tt.prompt, tt.completion, got, tt.want)
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 10_000 {
		p := Price{r.Int64N(MaxPrice), r.Int64N(MaxPrice)}
		prompt, completion := r.Int64N(1<<40), r.Int64N(1<<40)
		exact := new(big.Int).Mul(big.NewInt(p.Prompt), big.NewInt(prompt))
		exact.Add(exact, new(big.Int).Mul(big.NewInt(p.Completion), big.NewInt(completion)))
		exact.Quo(exact, big.NewInt(1_000_000))
		want := uint64(math.MaxUint64)
		if exact.IsUint64() {
			want = exact.Uint64()
		}
		if got := p.Cost(prompt, completion); got != want {
			t.Fatalf("%+v, %d, %d: %d, not %d", p, prompt, completion, got, want)
		}
	}
}

func TestTariff(t *testing.T) {
	must(t, ceilings().Validate())
	must(t, ceilings().Under(ceilings()))
	must(t, tariff(0, 3_000_000).Under(ceilings()))
	for name, bad := range map[string]Tariff{
		"a higher prompt":     tariff(1_000_001, 0),
		"a higher completion": tariff(0, 3_000_001),
		"a negative price":    tariff(-1, 0),
		"another step":        {step + 1, ceilings().Models},
		"no step":             {0, ceilings().Models},
		"a huge step":         {MaxStep + 1, ceilings().Models},
		"a model less":        {step, map[string]Price{model: {}}},
		"another model":       {step, map[string]Price{model: {}, "acme/third@1": {}}},
		"no name":             {step, map[string]Price{model: {}, "third": {}}},
		"nothing":             {},
	} {
		if err := bad.Under(ceilings()); err == nil {
			t.Errorf("%s: no error", name)
		}
		b := newBook(t)
		if b.SetPrices(bad) == nil || b.Prices().Models[model] != ceilings().Models[model] {
			t.Errorf("%s: it is the price now", name)
		}
	}
	if _, err := NewBook(network, spki, Tariff{}, 1); err == nil {
		t.Error("a book without ceilings")
	}
}

func TestTokens(t *testing.T) {
	b := Bounds{RequestBytes: 800, Asked: 100, TextBytes: 60, Events: 20}
	for _, tt := range []struct {
		name               string
		b                  Bounds
		usage              *Usage
		whole              bool
		prompt, completion int64
	}{
		{"as the engine says", b, &Usage{200, 20}, true, 200, 20},
		{"at the bounds", b, &Usage{800 + TemplateTokens, 100}, true, 800 + TemplateTokens, 100},
		{"a prompt out of bounds", b, &Usage{801 + TemplateTokens, 20}, true, 0, 0},
		{"more than was asked for", b, &Usage{200, 101}, true, 0, 0},
		{"more than the text allows", Bounds{RequestBytes: 800, TextBytes: 60}, &Usage{200, 125}, true, 0, 0},
		{"below 0", b, &Usage{-1, 20}, true, 0, 0},
		{"below 0, left early", b, &Usage{20, -1}, false, 0, 0},
		{"no figures", b, nil, true, 0, 0},
		{"left early", b, nil, false, 100, 20},
		{"left early, events without text", Bounds{RequestBytes: 800, TextBytes: 5, Events: 20}, nil, false, 100, 5},
		{"left early, more than was asked for", Bounds{RequestBytes: 800, Asked: 7, TextBytes: 60, Events: 20}, nil, false, 100, 7},
		{"left before anything came", Bounds{RequestBytes: 800, Asked: 100}, nil, false, 0, 0},
		{"left early, with less by the engine", b, &Usage{30, 5}, false, 30, 5},
		{"left early, with more by the engine", b, &Usage{300, 50}, false, 100, 20},
		{"a huge request", Bounds{RequestBytes: math.MaxInt64, TextBytes: math.MaxInt64}, &Usage{math.MaxInt64, math.MaxInt64}, true, math.MaxInt64, math.MaxInt64},
	} {
		if p, c := tt.b.Tokens(tt.usage, tt.whole); p != tt.prompt || c != tt.completion {
			t.Errorf("%s: %d and %d", tt.name, p, c)
		}
	}
}

// TestCredit follows one channel through payment, use, a change of price and a
// restart.
func TestCredit(t *testing.T) {
	b := newBook(t)
	if _, err := b.Session(SignPayer(key, channel, spki)); !errors.Is(err, ErrNoChannel) {
		t.Errorf("a channel that is not admitted: %v", err)
	}
	if err := b.Pay(pay(step)); !errors.Is(err, ErrNoChannel) {
		t.Errorf("pay into it: %v", err)
	}
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10*step + 5}))
	s := session(t, b)
	if _, err := b.Start(s, model, 10, 0); !errors.Is(err, ErrNoCover) {
		t.Errorf("without cover: %v", err)
	}
	must(t, b.Pay(pay(2*step)))
	must(t, b.Pay(pay(2*step))) // the same again
	if _, err := b.Start(s, model, 10, 0); !errors.Is(err, ErrNoCover) || b.Covers(s, 1) {
		t.Errorf("on a voucher that is not durable: %v", err)
	}
	if list := settle(t, b); len(list) != 1 || *list[0].Best != pay(2*step) || list[0].Uses != nil || !b.Covers(s, 2*step) || b.Covers(s, 2*step+1) {
		t.Errorf("%+v", list)
	}
	must(t, b.Pay(pay(2*step))) // once more
	if list := settle(t, b); len(list) != 0 {
		t.Errorf("%+v", list)
	}
	for _, tt := range []struct {
		name string
		v    voucher.Voucher
		want error
	}{
		{"less", pay(step), voucher.ErrStale},
		{"less than a step more", pay(3*step - 1), ErrStep},
		{"more than there is", pay(10*step + 6), ErrLimit},
		{"another network's", voucher.Sign(key, network+1, channel, 4*step), voucher.ErrNetwork},
		{"another key's", voucher.Sign(ed25519.NewKeyFromSeed(make([]byte, 32)), network, channel, 4*step), voucher.ErrSignature},
		{"another channel's", voucher.Sign(key, network, voucher.Channel{9}, 4*step), ErrNoChannel},
	} {
		if err := b.Pay(tt.v); !errors.Is(err, tt.want) {
			t.Errorf("a voucher for %s: %v", tt.name, err)
		}
	}
	if _, err := b.Start(s, "acme/none@1", 10, 0); !errors.Is(err, ErrModel) {
		t.Errorf("%v", err)
	}

	r, err := b.Start(s, model, 1000, 0)
	must(t, err)
	if b.Drop(channel) {
		t.Error("a channel was dropped on which a request runs")
	}
	if !r.Send(100) {
		t.Fatal("covered, and not sent")
	}
	// The price of what runs and of what is paid for stays.
	must(t, b.SetPrices(tariff(10, 20)))
	c := r.End(&Usage{200, 30}, true)
	if c.Amount != 290 || c.Prompt != 200 || c.Completion != 30 || c.Price != ceilings().Models[model] || c.Credit != (Credit{channel, 290, 2 * step, 10*step + 5}) {
		t.Errorf("%+v", c)
	}
	if again := r.End(&Usage{200, 30}, true); again.Amount != 0 || r.Send(1) {
		t.Errorf("ended twice: %+v", again)
	}
	if r, err = b.Start(s, model, 1000, 0); err != nil || r.Price() != ceilings().Models[model] {
		t.Errorf("paid for at another price: %+v, %v", r.Price(), err)
	}
	if b.Drop(channel) {
		t.Error("a channel was dropped of which something is to be told")
	}
	r.End(nil, true)
	// What is left of the channel can be less than a step.
	must(t, b.Pay(pay(10*step)))
	must(t, b.Pay(pay(10*step+5)))

	list := settle(t, b)
	if len(list) != 1 || *list[0].Best != pay(10*step+5) || len(list[0].Uses) != 1 || list[0].Uses[0] != (Use{model, 1, 200, 30, 290}) {
		t.Errorf("%+v", list)
	}
	before, _ := b.Credit(s)
	// Another VM, which the launcher tells what it knows.
	b = newBook(t)
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10*step + 5, Used: 290, Best: list[0].Best}))
	s = session(t, b)
	if c, ok := b.Credit(s); !ok || c != before || c != (Credit{channel, 290, 10*step + 5, 10*step + 5}) {
		t.Errorf("%+v", c)
	}
	if len(settle(t, b)) != 0 {
		t.Error("what the launcher knows is told again")
	}
	r, err = b.Start(s, model, 1000, 0)
	must(t, err)
	r.End(nil, true)
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10*step + 5, Closing: true}))
	if _, err := b.Start(s, model, 10, 0); !errors.Is(err, ErrClosing) {
		t.Errorf("a channel that is closing: %v", err)
	}
	if _, _, err := b.StartWhole(s, model, 10, 0); !errors.Is(err, ErrClosing) {
		t.Errorf("a channel that is closing: %v", err)
	}
	if err := b.Pay(pay(10 * step)); !errors.Is(err, ErrClosing) {
		t.Errorf("pay into it: %v", err)
	}
	for range 2 {
		if !b.Drop(channel) {
			t.Error("not dropped")
		}
	}
	if _, ok := b.Credit(s); ok {
		t.Error("dropped, and known")
	}
}

func TestAdmitRefuses(t *testing.T) {
	b := newBook(t)
	foreign, moved, forged := voucher.Sign(key, network+1, channel, 5), voucher.Sign(key, network, voucher.Channel{2}, 5), pay(5)
	forged.Total++
	large := pay(500)
	for name, a := range map[string]Admission{
		"a bad key":         {Channel: channel, Key: voucher.Key{1}, Limit: 9},
		"more used than is": {Channel: channel, Key: public, Limit: 9, Used: 10},
		"network":           {Channel: channel, Key: public, Limit: 9, Best: &foreign},
		"channel":           {Channel: channel, Key: public, Limit: 9, Best: &moved},
		"forged":            {Channel: channel, Key: public, Limit: 9, Best: &forged},
		"too large":         {Channel: channel, Key: public, Limit: 9, Best: &large},
	} {
		if err := b.Admit(a); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	must(t, b.Admit(Admission{Channel: voucher.Channel{1}, Key: public, Limit: 9}))
	must(t, b.Admit(Admission{Channel: voucher.Channel{2}, Key: public, Limit: 9}))
	if err := b.Admit(Admission{Channel: voucher.Channel{3}, Key: public, Limit: 9}); !errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
	another := voucher.Key(ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey))
	if err := b.Admit(Admission{Channel: voucher.Channel{1}, Key: another, Limit: 9}); err == nil {
		t.Error("another key for a channel that is known")
	}
}

// TestCollect tells batches, some of them twice, and drops nothing that was not
// told.
func TestCollect(t *testing.T) {
	b := newBook(t)
	b.limit = 10
	var keys []ed25519.PrivateKey
	for i := range byte(5) {
		keys = append(keys, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{10 + i}, 32)))
		must(t, b.Admit(Admission{Channel: voucher.Channel{i}, Key: voucher.Key(keys[i].Public().(ed25519.PublicKey)), Limit: 100 * step}))
	}
	send := func(i int, total uint64) voucher.Voucher {
		v := voucher.Sign(keys[i], network, voucher.Channel{byte(i)}, total)
		must(t, b.Pay(v))
		return v
	}
	cover := func(i int) uint64 { return b.accounts[voucher.Channel{byte(i)}].cover }
	room := func(n int) func(Balance) bool { return func(Balance) bool { n--; return n >= 0 } }

	if n, list, err := b.Collect(0, all); n != 0 || list != nil || err != nil {
		t.Errorf("nothing to tell: %d, %v, %v", n, list, err)
	}
	if _, _, err := b.Collect(1, all); !errors.Is(err, ErrBatch) {
		t.Errorf("what was never told is acknowledged: %v", err)
	}
	for i := range 5 {
		send(i, uint64(i+1)*step)
	}
	select {
	case <-b.Tell():
	default:
		t.Error("nobody is told that there is something")
	}
	n, first, err := b.Collect(0, room(2))
	if n != 1 || len(first) != 2 || first[0].Channel != (voucher.Channel{0}) || first[1].Best.Total != 2*step || err != nil {
		t.Fatalf("%d, %+v, %v", n, first, err)
	}
	better := send(0, 7*step)
	if n, again, err := b.Collect(0, all); n != 1 || !slices.EqualFunc(again, first, func(a, b Balance) bool { return a.Channel == b.Channel && *a.Best == *b.Best }) || err != nil {
		t.Errorf("not told again: %d, %+v, %v", n, again, err)
	}
	if cover(0) != 0 || b.Drop(voucher.Channel{1}) {
		t.Error("it counts, or is dropped, before it is durable")
	}
	changed := b.Changed()
	n, second, err := b.Collect(1, room(3))
	if n != 2 || len(second) != 3 || second[2].Channel != (voucher.Channel{4}) || err != nil {
		t.Fatalf("%d, %+v, %v", n, second, err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody is told that something is durable")
	}
	if cover(0) != step || cover(1) != 2*step || cover(2) != 0 {
		t.Errorf("%d, %d, %d", cover(0), cover(1), cover(2))
	}
	// An old acknowledgement once more changes nothing.
	if n, again, err := b.Collect(1, all); n != 2 || len(again) != 3 || cover(2) != 0 || err != nil {
		t.Errorf("%d, %+v, %v", n, again, err)
	}
	n, third, err := b.Collect(2, all)
	if n != 3 || len(third) != 1 || *third[0].Best != better || cover(2) != 3*step || err != nil {
		t.Fatalf("%d, %+v, %v", n, third, err)
	}
	if n, list, err := b.Collect(3, all); n != 0 || list != nil || err != nil || cover(0) != 7*step {
		t.Errorf("%d, %v, %v", n, list, err)
	}
	if n, list, err := b.Collect(3, all); n != 0 || list != nil || err != nil {
		t.Errorf("an acknowledgement twice: %d, %v, %v", n, list, err)
	}
	if !b.Drop(voucher.Channel{1}) {
		t.Error("not dropped")
	}
}

// TestStartWhole lowers what an engine may make to what is covered.
func TestStartWhole(t *testing.T) {
	price := ceilings().Models[model] // 1 and 3 nanotons a token
	b := newBook(t)
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10 * step}))
	s := session(t, b)
	if _, _, err := b.StartWhole(s, model, 10, 0); !errors.Is(err, ErrNoCover) {
		t.Errorf("without cover: %v", err)
	}
	paid(t, b, step)
	const bytes = 1000
	prompt := int64(bytes + TemplateTokens)
	most := (2*step - prompt) / 3
	for _, tt := range []struct{ asked, want int64 }{{0, DefaultAnswer}, {most + 1, most}, {most, most}, {most - 1, most - 1}, {1, 1}, {math.MaxInt64, most}, {-5, DefaultAnswer}} {
		r, got, err := b.StartWhole(s, model, bytes, tt.asked)
		must(t, err)
		if got != tt.want {
			t.Errorf("asked for %d: %d, not %d", tt.asked, got, tt.want)
		}
		if tt.asked == 0 {
			again, _, err := b.StartWhole(s, model, bytes, 0)
			must(t, err) // it leaves something for others
			again.End(nil, true)
		}
		if tt.asked == math.MaxInt64 {
			changed := b.Changed()
			// What the one holds, another cannot have.
			if _, _, err := b.StartWhole(s, model, bytes, 0); !errors.Is(err, ErrNoCover) {
				t.Errorf("held twice: %v", err)
			}
			if !r.Send(1 << 40) {
				t.Error("what is held for is not sent")
			}
			if c := r.End(&Usage{0, most + 1}, true); c.Amount != 0 {
				t.Errorf("more than the engine was told to make: %+v", c)
			}
			select {
			case <-changed:
			default:
				t.Error("nobody is told that there is cover again")
			}
		}
		r.End(nil, true)
	}
	r, got, err := b.StartWhole(s, model, bytes, MaxAsked)
	must(t, err)
	r.Send(1 << 20)
	if c := r.End(&Usage{prompt, got}, true); c.Amount != price.Cost(prompt, most) || c.Credit.Used > 2*step {
		t.Errorf("%+v", c)
	}
	if _, _, err := b.StartWhole(s, model, 10, 1); !errors.Is(err, ErrNoCover) {
		t.Errorf("used up: %v", err)
	}
	must(t, b.SetPrices(tariff(1, 0)))
	paid(t, b, 9*step)
	r, _, err = b.StartWhole(s, model, 10, 5) // still of the first price: used is less than what that paid for
	must(t, err)
	r.End(nil, true)
	if _, _, err := b.StartWhole(s, model, math.MaxInt64, 1); !errors.Is(err, ErrNoCover) {
		t.Errorf("a prompt that cannot be paid for: %v", err)
	}
	fresh := newBook(t)
	must(t, fresh.SetPrices(tariff(1, 0)))
	must(t, fresh.Admit(Admission{Channel: channel, Key: public, Limit: 10 * step}))
	paid(t, fresh, step)
	if _, got, err = fresh.StartWhole(session(t, fresh), model, 10, 0); err != nil || got != MaxAsked {
		t.Errorf("answers that cost nothing: %d, %v", got, err)
	}
}

// TestFreeThen is a model that cost nothing when the client paid for another one.
func TestFreeThen(t *testing.T) {
	b := newBook(t)
	must(t, b.SetPrices(Tariff{step, map[string]Price{model: {}, other: {5, 5}}}))
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10 * step}))
	paid(t, b, step)
	must(t, b.SetPrices(Tariff{step, map[string]Price{model: {7, 7}, other: {6, 6}}}))
	for id, want := range map[string]Price{model: {7, 7}, other: {5, 5}} {
		r, err := b.Start(session(t, b), id, 10, 0)
		must(t, err)
		if r.Price() != want {
			t.Errorf("%s at %+v", id, r.Price())
		}
		r.End(nil, true)
	}
}

// TestSent charges a client that has left for what went out, and not for what was
// about to.
func TestSent(t *testing.T) {
	b := newBook(t)
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10 * step}))
	paid(t, b, step)
	for sent, want := range []int64{0, 1, 2} {
		r, err := b.Start(session(t, b), model, 800, 0)
		must(t, err)
		for i := range 3 {
			if !r.Send(4) {
				t.Fatal("not covered")
			}
			if i < sent {
				r.Sent()
			}
		}
		if c := r.End(nil, false); c.Completion != want || (c.Prompt == 100) != (want > 0) {
			t.Errorf("after %d events: %+v", sent, c)
		}
	}
}

// TestPayer is who may use a channel's credit.
func TestPayer(t *testing.T) {
	b := newBook(t)
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 10 * step}))
	good := SignPayer(key, channel, spki)
	if p, err := ParsePayer(good.String()); err != nil || p != good {
		t.Errorf("%+v, %v", p, err)
	}
	for name, p := range map[string]Payer{
		"another VM's":  SignPayer(key, channel, [32]byte{8}),
		"another key's": SignPayer(ed25519.NewKeyFromSeed(make([]byte, 32)), channel, spki),
		"a voucher's":   {channel, pay(5).Signature},
		"nobody's":      {Channel: channel},
	} {
		if _, err := b.Session(p); !errors.Is(err, ErrPayer) {
			t.Errorf("%s: %v", name, err)
		}
	}
	v := pay(5)
	p, got, err := FromHeader(map[string][]string{PayerHeader: {good.String()}, VoucherHeader: {v.String()}})
	if err != nil || *p != good || *got != v {
		t.Errorf("%v, %v, %v", p, got, err)
	}
	if p, got, err := FromHeader(nil); p != nil || got != nil || err != nil {
		t.Errorf("%v, %v, %v", p, got, err)
	}
	moved := voucher.Sign(key, network, voucher.Channel{2}, 5)
	for name, h := range map[string]map[string][]string{
		"two payers":      {PayerHeader: {good.String(), good.String()}},
		"two vouchers":    {VoucherHeader: {v.String(), v.String()}},
		"no payer":        {PayerHeader: {""}},
		"a broken payer":  {PayerHeader: {good.String()[1:] + "="}},
		"no voucher":      {VoucherHeader: {"x"}},
		"another channel": {PayerHeader: {good.String()}, VoucherHeader: {moved.String()}},
	} {
		if _, _, err := FromHeader(h); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestTerms(t *testing.T) {
	b := newBook(t)
	o := Owner{Account: [32]byte{5}, MinDeposit: 20_000_000, MinDelay: 3600}
	terms := b.Terms(o, "/v1/chat/completions", "what was paid is used up", &Credit{channel, 5, 6, 7})
	data, err := terms.Encode()
	must(t, err)
	want := `{"accepts":[{"asset":"TON","extra":{"channel_code_hash":"` + hex.EncodeToString(voucher.CodeHash[:]) + `","credit":{"channel":"` + channel.String() +
		`","cover":"6","limit":"7","used":"5"},"min_delay_seconds":3600,"min_deposit":"20000000","models":[` +
		`{"completion_price":3000000,"id":"acme/model@1","prompt_price":1000000},{"completion_price":2000000,"id":"acme/other@2","prompt_price":2000000}]},` +
		`"maxAmountRequired":"1000000","network":"ton:-7","payTo":"0:05` + strings.Repeat("00", 31) + `","resource":"/v1/chat/completions","scheme":"chrysalis-channel"}],` +
		`"error":"what was paid is used up","x402Version":1}`
	if string(data) != want {
		t.Errorf("%s\n%s", data, want)
	}
	if _, err := ParseTerms(data); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Terms){
		"version":    func(t *Terms) { t.Version = 2 },
		"error":      func(t *Terms) { t.Error = strings.Repeat("x", 1025) },
		"nothing":    func(t *Terms) { t.Accepts = nil },
		"five ways":  func(t *Terms) { t.Accepts = make([]Accept, 5) },
		"scheme":     func(t *Terms) { t.Accepts[0].Scheme = "exact" },
		"asset":      func(t *Terms) { t.Accepts[0].Asset = "USDT" },
		"network":    func(t *Terms) { t.Accepts[0].Network = "base" },
		"network 2":  func(t *Terms) { t.Accepts[0].Network = "ton:+5" },
		"payee":      func(t *Terms) { t.Accepts[0].PayTo = "me" },
		"resource":   func(t *Terms) { t.Accepts[0].Resource = "https://elsewhere" },
		"no step":    func(t *Terms) { t.Accepts[0].Amount = "0" },
		"step":       func(t *Terms) { t.Accepts[0].Amount = "1.5" },
		"leading 0":  func(t *Terms) { t.Accepts[0].Amount = "05" },
		"code":       func(t *Terms) { t.Accepts[0].Extra.CodeHash = "xy" },
		"deposit":    func(t *Terms) { t.Accepts[0].Extra.MinDeposit = "-1" },
		"delay":      func(t *Terms) { t.Accepts[0].Extra.MinDelay = -1 },
		"no models":  func(t *Terms) { t.Accepts[0].Extra.Models = nil },
		"model":      func(t *Terms) { t.Accepts[0].Extra.Models[0].ID = "x" },
		"order":      func(t *Terms) { m := t.Accepts[0].Extra.Models; m[0], m[1] = m[1], m[0] },
		"price":      func(t *Terms) { t.Accepts[0].Extra.Models[0].Prompt = MaxPrice + 1 },
		"credit":     func(t *Terms) { t.Accepts[0].Extra.Credit.Used = "x" },
		"no channel": func(t *Terms) { t.Accepts[0].Extra.Credit.Channel = "x" },
	} {
		bad := b.Terms(o, "/v1/chat/completions", "used up", &Credit{channel, 5, 6, 7})
		change(&bad)
		if _, err := bad.Encode(); err == nil {
			t.Errorf("%s: it is encoded", name)
		}
		raw, err := json.Marshal(bad)
		must(t, err)
		if _, err := ParseTerms(raw); err == nil {
			t.Errorf("%s: it is read", name)
		}
	}
}

// TestNeverMore runs many random histories. Whatever clients, engine and prices do:
// what is charged, and what running requests can be charged, never exceeds what is
// covered and a step; no charge is above what the ceilings allow for what was sent;
// and the sum of the charges is what was used.
func TestNeverMore(t *testing.T) {
	histories := uint64(60)
	if testing.Short() {
		histories = 10
	}
	for seed := range histories {
		r := rand.New(rand.NewPCG(seed, 9))
		b := newBook(t)
		limit := uint64(r.Int64N(200 * step))
		must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: limit}))
		s := session(t, b)
		var running []*Request
		var charged, cover, pending uint64
		for range 400 {
			switch r.IntN(8) {
			case 0:
				v := pay(min(pending+uint64(r.Int64N(3*step)), limit+2))
				if b.Pay(v) == nil {
					pending = max(pending, v.Total)
				}
				if r.IntN(2) == 0 {
					settle(t, b)
					cover = pending
				}
			case 1:
				if err := b.SetPrices(tariff(r.Int64N(1_200_000), r.Int64N(3_500_000))); err != nil && !errors.Is(err, ErrAbove) {
					t.Fatal(err)
				}
			case 2, 3:
				start := b.Start
				if r.IntN(3) == 0 {
					start = func(s Session, model string, bytes, asked int64) (*Request, error) {
						q, _, err := b.StartWhole(s, model, bytes, asked)
						return q, err
					}
				}
				if q, err := start(s, model, r.Int64N(500_000), r.Int64N(2)*r.Int64N(100_000)); err == nil {
					running = append(running, q)
				} else if !errors.Is(err, ErrNoCover) {
					t.Fatal(err)
				}
			case 4, 5, 6:
				if len(running) > 0 {
					q := running[r.IntN(len(running))]
					if q.Send(r.Int64N(50_000)) && r.IntN(2) == 0 {
						q.Sent()
					}
				}
			case 7:
				if len(running) == 0 {
					break
				}
				i := r.IntN(len(running))
				q := running[i]
				running = append(running[:i], running[i+1:]...)
				var usage *Usage
				if r.IntN(4) > 0 {
					usage = &Usage{r.Int64N(700_000) - 5, r.Int64N(200_000) - 5}
				}
				c := q.End(usage, r.IntN(3) > 0)
				charged += c.Amount
				most := ceilings().Models[model].Cost(q.bounds.MaxPrompt(), q.bounds.MaxCompletion())
				if c.Amount > most || c.Amount > ceilings().Models[model].Cost(c.Prompt, c.Completion) || c.Price.Under(ceilings().Models[model]) != nil {
					t.Fatalf("seed %d: %+v, at most %d", seed, c, most)
				}
				if usage != nil && (c.Prompt > max(usage.Prompt, 0) || c.Completion > max(usage.Completion, 0)) {
					t.Fatalf("seed %d: %+v for %+v", seed, c, usage)
				}
			}
			a := b.accounts[channel]
			held := uint64(0)
			for _, q := range running {
				held += q.hold
			}
			if a.used != charged || a.cover != cover || a.held != held || len(a.spans) > maxSpans {
				t.Fatalf("seed %d: used %d of %d, cover %d of %d, held %d of %d", seed, a.used, charged, a.cover, cover, a.held, held)
			}
			if a.used+a.held > a.cover+step {
				t.Fatalf("seed %d: %d used, %d held, %d covered", seed, a.used, a.held, a.cover)
			}
		}
		for _, q := range running {
			q.End(nil, false)
		}
		if b.accounts[channel].held != 0 {
			t.Fatalf("seed %d: something is held", seed)
		}
	}
}

// TestManyPrices changes the price more often than the book remembers: the client
// never pays more for what it bought at a lower one.
func TestManyPrices(t *testing.T) {
	b := newBook(t)
	must(t, b.Admit(Admission{Channel: channel, Key: public, Limit: 1000 * step}))
	for i := range uint64(3 * maxSpans) {
		must(t, b.SetPrices(tariff(int64(1000-i), int64(1000+i))))
		paid(t, b, (i+1)*step)
	}
	a := b.accounts[channel]
	if len(a.spans) != maxSpans {
		t.Fatalf("%d prices are remembered", len(a.spans))
	}
	last := a.spans[maxSpans-1].tariff.Models[model]
	if last.Prompt != 1000-(3*maxSpans-1) || last.Completion != 1000+maxSpans-1 {
		t.Errorf("%+v", last)
	}
}

func FuzzTerms(f *testing.F) {
	b := newBook(f)
	terms := b.Terms(Owner{}, "/v1/models", "", nil)
	data, err := terms.Encode()
	must(f, err)
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		terms, err := ParseTerms(data)
		if err != nil {
			return
		}
		if again, err := terms.Encode(); err != nil || !bytes.Equal(again, data) {
			t.Errorf("%s is written as %s, %v", data, again, err)
		}
	})
}

func FuzzPayer(f *testing.F) {
	f.Add(SignPayer(key, channel, spki).String())
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := ParsePayer(s); err == nil && p.String() != s {
			t.Errorf("%q is written as %q", s, p)
		}
	})
}
