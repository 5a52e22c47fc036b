package purse

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/pay"
)

const (
	network = -7
	step    = 1_000_000
	worker  = "https://worker.example:8443"
)

var (
	key     = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))
	payee   = [32]byte{5}
	id      = voucher.Channel{1}
	ceiling = pay.Price{Prompt: 1_000_000_000, Completion: 1_000_000_000} // a thousand nanotons a token
)

func open(t testing.TB, dir string, budget uint64) *Purse {
	t.Helper()
	p, err := Open(dir, network, key, budget)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func use(t testing.TB, p *Purse, limit uint64, fresh bool) *Account {
	t.Helper()
	a, err := p.Use(Channel{ID: id, Payee: payee, Limit: limit, Fresh: fresh}, worker)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func begin(t testing.TB, a *Account, request int64) *Request {
	t.Helper()
	r, err := a.Begin(Begin{Price: ceiling, Ceiling: ceiling, Step: step, Request: request})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sign(t testing.TB, a *Account) uint64 {
	t.Helper()
	v, err := a.Sign(step, false)
	if err != nil {
		t.Fatal(err)
	}
	if v == nil {
		return 0
	}
	if err := v.Verify(voucher.Key(key.Public().(ed25519.PublicKey))); err != nil || v.Channel != a.ID() || v.GlobalID != network {
		t.Fatalf("%+v: %v", v, err)
	}
	a.Took(v.Total)
	return v.Total
}

func receiptOf(a *Account, prompt, completion int64) Receipt {
	s := a.State()
	charged := ceiling.Cost(prompt, completion)
	return Receipt{Channel: a.ID(), Price: ceiling, Prompt: prompt, Completion: completion, Charged: charged, Used: s.Used + charged, Cover: s.Taken}
}

// TestSign signs what must be held, no more than a step beyond it, and keeps that.
func TestSign(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, 1<<40)
	a := use(t, p, 1<<40, true)
	r := begin(t, a, 1000)
	if got := sign(t, a); got != (1000+1024+64)*1000 {
		t.Fatalf("%d is signed", got)
	}
	if got := sign(t, a); got != 0 {
		t.Fatalf("%d is signed, and nothing is due", got)
	}
	last := uint64(2_088_000)
	for text := int64(1); text <= 5000; text++ {
		r.Text(1)
		owed := uint64(2088+text) * 1000
		if got := sign(t, a); got != 0 {
			if got != last+step || got > owed+step {
				t.Fatalf("%d is signed after %d, and %d owed", got, last, owed)
			}
			last = got
		}
		if owed > last {
			t.Fatalf("%d is owed, and %d signed", owed, last)
		}
	}
	// Where more is asked for, it is up to a step beyond what is owed.
	v, err := a.Sign(step, true)
	if !errors.Is(err, ErrAhead) && (err != nil || v.Total > (2088+5000)*1000+step) {
		t.Fatalf("%v, %v", v, err)
	}
	if err := r.Settle(receiptOf(a, 300, 900)); err != nil {
		t.Fatal(err)
	}
	if s := a.State(); s.Used != 1_200_000 || s.Running != 0 {
		t.Fatalf("%+v", s)
	}
	signed := a.State().Signed
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir, 1<<40)
	if a = use(t, p, 1<<40, false); a.State().Signed != signed || a.State().Used != 1_200_000 {
		t.Fatalf("%+v", a.State())
	}
	if _, err := a.Begin(Begin{Price: ceiling, Ceiling: ceiling, Step: step, Request: 1}); !errors.Is(err, ErrUnknown) {
		t.Fatal(err)
	}
	if err := a.Reconcile(pay.Credit{Channel: id, Used: 1_200_000, Cover: signed, Limit: 1 << 40}, a.Asking()); err != nil {
		t.Fatal(err)
	}
	begin(t, a, 1)
}

// TestReconcile has a row for each thing that a payee can say of a channel.
func TestReconcile(t *testing.T) {
	for name, tt := range map[string]struct {
		killed bool // the process before
		say    func(c *pay.Credit)
		want   error
	}{
		"the same":                 {false, func(*pay.Credit) {}, nil},
		"less used":                {false, func(c *pay.Credit) { c.Used = 0 }, nil},
		"one more used":            {false, func(c *pay.Credit) { c.Used++ }, ErrLostCredit},
		"a voucher lost":           {false, func(c *pay.Credit) { c.Cover-- }, ErrLostCredit},
		"all lost":                 {false, func(c *pay.Credit) { c.Cover, c.Used = 0, 0 }, ErrLostCredit},
		"a voucher unknown":        {false, func(c *pay.Credit) { c.Cover++ }, ErrForeign},
		"another channel":          {false, func(c *pay.Credit) { c.Channel[5]++ }, ErrElsewhere},
		"what ran when killed":     {true, func(c *pay.Credit) { c.Used = c.Cover + step }, nil},
		"more than that":           {true, func(c *pay.Credit) { c.Used = c.Cover + step + 1 }, ErrLostCredit},
		"a voucher lost meanwhile": {true, func(c *pay.Credit) { c.Cover-- }, ErrLostCredit},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			p := open(t, dir, 1<<40)
			a := use(t, p, 1<<40, true)
			r := begin(t, a, 100)
			sign(t, a)
			if err := r.Settle(receiptOf(a, 100, 0)); err != nil {
				t.Fatal(err)
			}
			credit := pay.Credit{Channel: id, Used: a.State().Used, Cover: a.State().Taken, Limit: 1 << 40}
			if tt.killed {
				begin(t, a, 100)
				kill(p)
			} else {
				p.Close()
			}
			p = open(t, dir, 1<<40)
			a = use(t, p, 1<<40, false)
			tt.say(&credit)
			if err := a.Reconcile(credit, a.Asking()); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Fatalf("%v, want %v", err, tt.want)
			}
			barred := tt.want == ErrLostCredit
			if err := p.Barred(payee); (err != nil) != barred {
				t.Fatalf("barred: %v", err)
			}
			if !barred {
				return
			}
			for range 2 { // now, and after it was opened anew
				if _, err := p.Use(Channel{ID: id, Payee: payee, Limit: 1}, worker); !errors.Is(err, ErrBarred) || !strings.Contains(err.Error(), ErrLostCredit.Error()) {
					t.Fatal(err)
				}
				if _, err := p.Use(Channel{ID: voucher.Channel{2}, Payee: payee, Limit: 1}, worker); !errors.Is(err, ErrBarred) {
					t.Fatal(err)
				}
				p.Close()
				p = open(t, dir, 1)
			}
			if ok, err := p.Forgive(payee); !ok || err != nil {
				t.Fatal(ok, err)
			}
			p.Close()
			if p = open(t, dir, 1); p.Barred(payee) != nil || len(p.Bars()) != 0 {
				t.Fatal(p.Bars())
			}
		})
	}
}

// TestReconcileLate has what a payee says arrive after what has become known since: it
// is older, and neither a loss nor less used.
func TestReconcileLate(t *testing.T) {
	p := open(t, t.TempDir(), 1<<40)
	a := use(t, p, 1<<40, true)
	first := begin(t, a, 100)
	sign(t, a)
	asked, then := a.Asking(), a.State()
	if err := first.Settle(receiptOf(a, 100, 0)); err != nil {
		t.Fatal(err)
	}
	second := begin(t, a, 5000)
	sign(t, a)
	if err := second.Settle(receiptOf(a, 100, 0)); err != nil {
		t.Fatal(err)
	}
	now := a.State()
	late := pay.Credit{Channel: id, Used: then.Used, Cover: then.Taken, Limit: 1 << 40}
	if now.Used == then.Used || now.Taken == then.Taken {
		t.Fatalf("%+v, then %+v", now, then)
	}
	if err := a.Reconcile(late, asked); err != nil || a.State() != now {
		t.Errorf("%v: %+v, want %+v", err, a.State(), now)
	}
	if err := a.Reconcile(late, a.Asking()); !errors.Is(err, ErrLostCredit) {
		t.Errorf("what it says now: %v", err)
	}
}

// kill ends a purse as if its process had been killed.
func kill(p *Purse) {
	p.file.Close()
	p.lock.Close()
	p.file, p.broken = nil, os.ErrClosed
}

// TestLimits signs to the last nanoton of a channel and of a budget, and no further.
func TestLimits(t *testing.T) {
	for name, tt := range map[string]struct {
		budget, limit, theirs uint64
		text                  int64  // that comes at a time
		signed                uint64 // 0: within a step of what there is
		want                  error
	}{
		"the channel's last":           {1 << 40, 3*step + 7, 3*step + 7, 900, 3*step + 7, ErrLimit},
		"the payee knows of less":      {1 << 40, 3*step + 7, 3*step + 5, 900, 3*step + 5, ErrLimit},
		"the payee knows of more":      {1 << 40, 3*step + 7, 3*step + 9, 900, 0, ErrLimit},
		"it was topped up":             {1 << 40, 9 * step, 3 * step, 900, 3 * step, ErrUnseen},
		"the budget":                   {3*step + 7, 1 << 40, 1 << 40, 9000, 3*step + 7, ErrBudget},
		"less than a step of a budget": {3*step - 1, 1 << 40, 1 << 40, 900, 0, ErrBudget},
	} {
		t.Run(name, func(t *testing.T) {
			p := open(t, t.TempDir(), tt.budget)
			a := use(t, p, tt.limit, true)
			if err := a.Reconcile(pay.Credit{Channel: id, Limit: tt.theirs}, a.Asking()); err != nil {
				t.Fatal(err)
			}
			r := begin(t, a, 0)
			var err error
			for range 20 {
				r.Text(tt.text)
				var v *voucher.Voucher
				if v, err = a.Sign(step, false); err != nil {
					break
				}
				if v != nil {
					a.Took(v.Total)
				}
			}
			s := a.State()
			if most := min(tt.budget, tt.limit); tt.signed == 0 && (s.Signed > most || most-s.Signed >= step) || tt.signed != 0 && s.Signed != tt.signed {
				t.Fatalf("%+v", s)
			}
			if !errors.Is(err, tt.want) {
				t.Fatal(err)
			}
			if left, spent := p.Budget(); left+spent != tt.budget || spent != s.Signed {
				t.Fatal(left, spent)
			}
		})
	}
}

// TestBeginRefuses has a row for each request that cannot be paid.
func TestBeginRefuses(t *testing.T) {
	good := Begin{Price: ceiling, Ceiling: ceiling, Step: step, Request: 100}
	for name, tt := range map[string]struct {
		change func(*Begin)
		want   error
	}{
		"a price above the ceiling": {func(b *Begin) { b.Price.Prompt++ }, pay.ErrAbove},
		"a price that is none":      {func(b *Begin) { b.Price.Prompt = -1 }, pay.ErrPrice},
		"no step":                   {func(b *Begin) { b.Step = 0 }, nil},
		"a step that is too large":  {func(b *Begin) { b.Step = pay.MaxStep + 1 }, nil},
		"a prompt beyond a channel": {func(b *Begin) { b.Request = 20_000 }, ErrLimit},
		"a prompt beyond all":       {func(b *Begin) { b.Request = math.MaxInt64 }, ErrLimit},
	} {
		t.Run(name, func(t *testing.T) {
			p := open(t, t.TempDir(), 1<<40)
			a := use(t, p, 10*step, true)
			b := good
			tt.change(&b)
			if _, err := a.Begin(b); err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Fatal(err)
			}
			if a.State().Signed != 0 || a.State().Running != 0 {
				t.Fatalf("%+v", a.State())
			}
		})
	}
}

func TestUseRefuses(t *testing.T) {
	p := open(t, t.TempDir(), 1<<40)
	use(t, p, 10*step, true)
	for name, tt := range map[string]struct {
		c      Channel
		worker string
		want   error
	}{
		"another payee":  {Channel{ID: id, Payee: [32]byte{6}}, worker, ErrElsewhere},
		"another worker": {Channel{ID: id, Payee: payee}, "https://other.example:1", ErrElsewhere},
		"claimed beyond": {Channel{ID: id, Payee: payee, Claimed: 1}, worker, ErrForeign},
	} {
		if _, err := p.Use(tt.c, tt.worker); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !p.For(id, worker) || p.For(id, "https://other.example:1") || !p.For(voucher.Channel{9}, "https://other.example:1") {
		t.Error("a channel is for another worker")
	}
	if !p.Retire(id) || p.Retire(id) || p.Retire(voucher.Channel{9}) {
		t.Error("retired twice")
	}
	if err := p.Forget(id); err != nil || len(p.States()) != 0 {
		t.Error(err)
	}
}

func TestLocked(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, 1)
	if _, err := Open(dir, network, key, 1); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	p.Close()
	open(t, dir, 1)
}

// TestDamage changes each byte of a purse's file, and cuts it at each: it is refused,
// or nothing of what was said is less than before.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, 1<<40)
	a := use(t, p, 1<<40, true)
	begin(t, a, 100)
	sign(t, a)
	signed := a.State().Signed
	kill(p)
	path := filepath.Join(dir, fileName)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 1
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := Open(dir, network, key, 1)
		if err == nil {
			if list := p.States(); len(list) != 1 || list[0].Signed != signed {
				t.Errorf("byte %d: %+v", i, list)
			}
			p.Close()
		} else if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "channel close") {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	for _, other := range [][]byte{{}, []byte("x"), []byte(header + " -239 00\n"), bytes.Repeat([]byte{0}, 100)} {
		os.WriteFile(path, other, 0o600)
		if _, err := Open(dir, network, key, 1); !errors.Is(err, ErrDamaged) {
			t.Errorf("%.20q: %v", other, err)
		}
	}
	// What was being written when the process was killed was never given out.
	lines := bytes.SplitAfter(whole, []byte("\n"))
	last := lines[len(lines)-2]
	for cut := 1; cut < len(last); cut++ {
		os.WriteFile(path, whole[:len(whole)-cut], 0o600)
		p, err := Open(dir, network, key, 1)
		if err != nil {
			t.Errorf("cut by %d: %v", cut, err)
			continue
		}
		p.Close()
		if cut == 1 { // it may have been given out
			if list := p.States(); len(list) != 1 || list[0].Signed != signed {
				t.Errorf("%+v", list)
			}
			continue
		}
		if now, _ := os.ReadFile(path); len(now) != len(whole)-len(last) {
			t.Errorf("cut by %d: %d bytes stay", cut, len(now))
		}
	}
}

// TestKilled has a process sign and print until it is killed, many times: what was
// printed is never more than what the purse knows afterwards.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("PURSE_TEST_SIGN"); dir != "" {
		p, err := Open(dir, network, key, 1<<60)
		if err != nil {
			fmt.Println("failed", err)
			os.Exit(1)
		}
		a, err := p.Use(Channel{ID: id, Payee: payee, Limit: 1 << 60, Fresh: true}, worker)
		for err == nil {
			var r *Request
			if r, err = a.Begin(Begin{Price: ceiling, Ceiling: ceiling, Step: step, Request: 1000}); err != nil {
				break
			}
			var v *voucher.Voucher
			if v, err = a.Sign(step, false); v != nil {
				fmt.Println(v.Total)
				a.Took(v.Total)
			}
			r.Settle(receiptOf(a, 1000, 0))
		}
		fmt.Println("failed", err)
		os.Exit(1)
	}
	dir := t.TempDir()
	before := uint64(0)
	for round := range 10 {
		c := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		c.Env = append(os.Environ(), "PURSE_TEST_SIGN="+dir)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		in, first, opening := bufio.NewReader(out), "", 20*time.Millisecond
		if round%5 > 0 { // in the others it may be killed before it signs
			first, _ = in.ReadString('\n')
			opening = 0
		}
		time.AfterFunc(opening+rand.N(80*time.Millisecond), func() { c.Process.Kill() })
		rest, _ := io.ReadAll(in)
		c.Wait()
		printed := first + string(rest)
		if strings.Contains(printed, "failed") {
			t.Fatal(printed)
		}
		lines := strings.Split(printed, "\n")
		highest := before
		for i, line := range lines[:len(lines)-1] {
			n, err := strconv.ParseUint(line, 10, 64)
			if err != nil || n < highest { // the last one before may be given out again
				t.Fatalf("line %d: %q after %d", i, line, highest)
			}
			highest = n
		}
		p := open(t, dir, 1)
		if list := p.States(); len(list) > 0 {
			if list[0].Signed < highest {
				t.Fatalf("%d was given out, and the purse knows of %d", highest, list[0].Signed)
			}
			before = list[0].Signed
		} else if highest > 0 {
			t.Fatal("the purse knows of nothing")
		}
		p.Close()
	}
	if before == 0 {
		t.Error("nothing was ever signed")
	}
}

// TestRewrite has a file grow until it is written anew.
func TestRewrite(t *testing.T) {
	dir := t.TempDir()
	p := open(t, dir, 1<<50)
	a := use(t, p, 1<<50, true)
	begin(t, a, 0)
	sign(t, a)
	p.mu.Lock()
	a.bar(errors.New("reason"))
	for p.base == p.size || p.size > p.base+1000 {
		if err := p.append(false, record{Accounts: []accountRecord{a.record()}}); err != nil {
			t.Fatal(err)
		}
	}
	size := p.size
	p.mu.Unlock()
	if size > 4000 {
		t.Errorf("%d bytes", size)
	}
	signed := a.State().Signed
	p.Close()
	p = open(t, dir, 1)
	if list := p.States(); len(list) != 1 || list[0].Signed != signed || p.Barred(payee) == nil {
		t.Errorf("%+v %v", list, p.Bars())
	}
}

// TestBroken signs nothing more once the purse cannot be written.
func TestBroken(t *testing.T) {
	p := open(t, t.TempDir(), 1<<40)
	a := use(t, p, 1<<40, true)
	r := begin(t, a, 0)
	p.file.Close()
	if v, err := a.Sign(step, false); v != nil || !errors.Is(err, ErrBroken) {
		t.Fatalf("%v, %v", v, err)
	}
	r.Unanswered()
	if _, err := a.Begin(Begin{Price: ceiling, Ceiling: ceiling, Step: step}); !errors.Is(err, ErrBroken) {
		t.Fatal(err)
	}
}

func FuzzPurse(f *testing.F) {
	p := &Purse{globalID: network, key: key}
	title := p.title()
	a := &Account{id: id, payee: payee, worker: worker, signed: 5, taken: 4, used: 3, step: 1, dirty: true}
	one, _ := encode(record{Accounts: []accountRecord{a.record()}})
	two, _ := encode(record{Bars: []Bar{{Payee: voucher.Channel(payee), Reason: "reason", Time: time.Unix(1, 0).UTC()}}, Forgiven: []voucher.Channel{{7}}})
	f.Add([]byte(title + "\n"))
	f.Add([]byte(title + "\n" + string(one) + string(two)))
	f.Add([]byte(title + "\n" + string(one) + string(one[:20])))
	f.Add([]byte("00000000 {}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, end, err := read(data, title)
		if err != nil {
			return
		}
		if end > len(data) || end > 0 && data[end-1] != '\n' {
			t.Fatalf("%d of %d bytes are whole", end, len(data))
		}
		if s.mend { // it is written anew
			return
		}
		// What is whole reads the same again, and so does what follows from it.
		again, n, err := read(data[:end], title)
		if err != nil || n != end || len(again.accounts) != len(s.accounts) || len(again.bars) != len(s.bars) {
			t.Fatalf("%v", err)
		}
		for id, a := range s.accounts {
			if again.accounts[id] != a || a.Taken > a.Signed {
				t.Fatalf("%+v", a)
			}
		}
	})
}
