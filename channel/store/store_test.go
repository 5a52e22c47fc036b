package store

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/channel/voucher"
)

const (
	network = -7
	model   = "acme/model@1"
	other   = "acme/other@2"
)

var (
	key    = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32))
	public = voucher.Key(key.Public().(ed25519.PublicKey))
	noon   = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
)

func id(n int) (c voucher.Channel) {
	binary.BigEndian.PutUint32(c[:], uint32(n))
	return c
}

func pay(n int, total uint64) *voucher.Voucher {
	return new(voucher.Sign(key, network, id(n), total))
}

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func admit(t testing.TB, s *Store, n int) {
	t.Helper()
	must(t, s.Admit(id(n), network, public, Chain{Cover: 1 << 40}))
}

// state is all that a store holds.
func state(s *Store) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	channels := map[voucher.Channel]channel{}
	for id, c := range s.channels {
		channels[id] = *c
	}
	return struct {
		Channels map[voucher.Channel]channel
		Rows     []Row
	}{channels, s.sortedRows()}
}

// TestEarnings follows what is earned, paid ahead, claimed and lost, and finds it
// again after the store is opened anew, and after its log is written anew.
func TestEarnings(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	admit(t, s, 1)
	admit(t, s, 2)
	next := noon.Add(24 * time.Hour)
	must(t, s.Put(noon, Update{id(1), pay(1, 1000), []Use{{model, 1, 10, 20, 300}, {other, 2, 5, 5, 100}}}))
	must(t, s.Put(noon, Update{Channel: id(1), Uses: []Use{{model, 1, 10, 20, 300}}}))
	must(t, s.Put(next, Update{id(2), pay(2, 500), []Use{{model, 1, 1, 1, 200}}}, Update{id(1), pay(1, 1200), []Use{{model, 3, 7, 8, 450}}}))
	if err := s.Seen(id(1), Chain{Claimed: 650, Cover: 1 << 40}, 13, next); err != nil {
		t.Fatal(err)
	}
	// 600 to the first model of the first day, 50 of 100 to the other.
	want := []Row{
		{"2026-06-01", model, 2, 20, 40, 600, 600, 0, 0},
		{"2026-06-01", other, 2, 5, 5, 100, 50, 0, 0},
		{"2026-06-02", model, 4, 8, 9, 650, 0, 0, 12},
		{"2026-06-02", other, 0, 0, 0, 0, 0, 0, 1},
	}
	if got := s.Earnings(); !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	// 1150 of the channel's total was served for, whatever has been claimed.
	if c, _ := s.Channel(id(1)); c.Used != 1150 || c.Chain.Claimed != 650 {
		t.Errorf("%+v", c)
	}
	// More is claimed than was used: what comes later is paid for already.
	must(t, s.Seen(id(1), Chain{Claimed: 1200, Cover: 1 << 40}, 0, next))
	must(t, s.Put(next, Update{Channel: id(1), Uses: []Use{{model, 1, 1, 1, 30}}}))
	// The other closes with 150 of 200 claimed.
	must(t, s.Gone(id(2), 150, 7, next))
	want[1].Claimed = 100
	want[2] = Row{"2026-06-02", model, 5, 9, 10, 680, 630, 50, 19}
	if got := s.Earnings(); !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	if _, ok := s.Channel(id(2)); ok {
		t.Error("a channel that is gone is there")
	}
	if err := s.Put(next, Update{Channel: id(2), Voucher: pay(2, 600)}); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
	// Nothing was claimed for these fees.
	must(t, s.Seen(id(1), Chain{Claimed: 1200, Cover: 1 << 40}, 9, next))

	before := state(s)
	for range 2 {
		must(t, s.Close())
		s = open(t, dir)
		if len(s.Damage()) > 0 || !reflect.DeepEqual(state(s), before) {
			t.Fatalf("%v\n%+v\n%+v", s.Damage(), state(s), before)
		}
		must(t, s.Compact())
	}

	var csv, text bytes.Buffer
	must(t, WriteCSV(&csv, s.Earnings()))
	if got := csv.String(); got != "day,model,requests,prompt_tokens,completion_tokens,earned,claimed,pending,lost,fees\n"+
		"2026-06-01,acme/model@1,2,20,40,600,600,0,0,0\n"+
		"2026-06-01,acme/other@2,2,5,5,100,100,0,0,0\n"+
		"2026-06-02,-,0,0,0,0,0,0,0,9\n"+
		"2026-06-02,acme/model@1,5,9,10,680,630,0,50,19\n"+
		"2026-06-02,acme/other@2,0,0,0,0,0,0,0,1\n" {
		t.Error(got)
	}
	must(t, WriteJSON(&text, s.Earnings()))
	var doc struct {
		Rows  []map[string]any
		Total map[string]any
	}
	if err := json.Unmarshal(text.Bytes(), &doc); err != nil || len(doc.Rows) != 5 || doc.Total["earned"] != 1380.0 || doc.Total["fees"] != 29.0 || doc.Rows[0]["pending"] != 0.0 {
		t.Errorf("%v %s", err, text.String())
	}
}

// TestRefusals leaves the store as it was, each time.
func TestRefusals(t *testing.T) {
	s := open(t, t.TempDir())
	admit(t, s, 1)
	must(t, s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 1000)}))
	must(t, s.Seen(id(1), Chain{Claimed: 400, Cover: 5000}, 0, noon))
	before := state(s)
	foreign := voucher.Sign(key, network+1, id(1), 2000)
	forged := voucher.Sign(ed25519.NewKeyFromSeed(make([]byte, 32)), network, id(1), 2000)
	for _, tt := range []struct {
		name string
		do   error
		want error
	}{
		{"a channel that nobody admitted", s.Put(noon, Update{Channel: id(2), Voucher: pay(2, 5)}), ErrUnknown},
		{"the same again", s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 1000)}), voucher.ErrStale},
		{"less", s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 999)}), voucher.ErrStale},
		{"nothing", s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 0)}), voucher.ErrStale},
		{"twice at once", s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 2000)}, Update{Channel: id(1), Voucher: pay(1, 2000)}), voucher.ErrStale},
		{"more than there is", s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 5001)}), ErrCover},
		{"another channel's", s.Put(noon, Update{Channel: id(1), Voucher: pay(2, 2000)}), voucher.ErrChannel},
		{"another network's", s.Put(noon, Update{Channel: id(1), Voucher: &foreign}), voucher.ErrNetwork},
		{"another's", s.Put(noon, Update{Channel: id(1), Voucher: &forged}), voucher.ErrSignature},
		{"one good, one bad", s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 2000)}, Update{Channel: id(1), Voucher: &forged}), voucher.ErrSignature},
		{"no model", s.Put(noon, Update{Channel: id(1), Uses: []Use{{Model: "x,y\n"}}}), ErrUse},
		{"a huge use", s.Put(noon, Update{Channel: id(1), Uses: []Use{{Model: model, Earned: 1 << 63}}}), ErrUse},
		{"see what is not known", s.Seen(id(2), Chain{}, 0, noon), ErrUnknown},
		{"close what is not known", s.Gone(id(2), 0, 0, noon), ErrUnknown},
		{"a bad key", s.Admit(id(3), network, voucher.Key{1}, Chain{}), voucher.ErrKey},
	} {
		if !errors.Is(tt.do, tt.want) {
			t.Errorf("%s: %v", tt.name, tt.do)
		}
	}
	if err := s.Admit(id(1), network+1, public, Chain{}); err == nil {
		t.Error("a channel on two networks")
	}
	if !reflect.DeepEqual(state(s), before) {
		t.Errorf("%+v\n%+v", state(s), before)
	}
	// A view of the chain that is behind takes nothing back.
	must(t, s.Seen(id(1), Chain{Claimed: 100, Cover: 5000}, 0, noon))
	if c, _ := s.Channel(id(1)); c.Chain.Claimed != 400 || c.Unclaimed() != 600 {
		t.Errorf("%+v", c)
	}
	if _, err := Open(s.dir); !errors.Is(err, ErrLocked) {
		t.Errorf("a second time: %v", err)
	}
	// Where the disk fails nothing is acknowledged, then or later.
	s.file.Close()
	for range 2 {
		if err := s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 1001)}); !errors.Is(err, ErrBroken) && !errors.Is(err, voucher.ErrStale) {
			t.Errorf("%v", err)
		}
	}
	if err := s.Seen(id(1), Chain{}, 0, noon); !errors.Is(err, ErrBroken) {
		t.Errorf("%v", err)
	}
}

// TestKill kills a process that writes, at any moment, and finds all that it
// acknowledged.
func TestKill(t *testing.T) {
	if dir := os.Getenv("CHRYSALIS_TEST_STORE"); dir != "" {
		writeForever(dir)
	}
	if testing.Short() {
		t.Skip("it writes for a second")
	}
	dir := t.TempDir()
	s := open(t, dir)
	for n := range 4 {
		admit(t, s, n)
	}
	must(t, s.Close())
	acknowledged := make([]uint64, 4)
	for round := range 6 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "CHRYSALIS_TEST_STORE="+dir)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			channel, total, _ := strings.Cut(lines.Text(), " ")
			c, err := strconv.Atoi(channel)
			must(t, err)
			v, err := strconv.ParseUint(total, 10, 64)
			must(t, err)
			acknowledged[c] = max(acknowledged[c], v)
			if n == 20+round*31 {
				must(t, cmd.Process.Kill())
			}
		}
		cmd.Wait()
		s := open(t, dir)
		if len(s.Damage()) > 0 {
			t.Errorf("a kill is no damage: %v", s.Damage())
		}
		sum := uint64(0)
		for n, want := range acknowledged {
			c, _ := s.Channel(id(n))
			if c.Best.Total < want || c.Best.Verify(public) != nil && want > 0 {
				t.Errorf("round %d, channel %d: %d, and %d was acknowledged", round, n, c.Best.Total, want)
			}
			sum += c.Best.Total
		}
		// Each nanoton of a voucher was earned by one request.
		if total := Total(s.Earnings()); total.Requests != sum || total.Earned != sum || len(s.Earnings()) == 0 {
			t.Errorf("round %d: %+v of %d", round, total, sum)
		}
		must(t, s.Close())
	}
	t.Logf("acknowledged %v", acknowledged)
}

func writeForever(dir string) {
	s, err := Open(dir)
	if err != nil {
		panic(err)
	}
	var out sync.Mutex
	for n := range 4 {
		go func() {
			c, _ := s.Channel(id(n))
			for total := c.Best.Total + 1; ; total++ {
				if err := s.Put(time.Now(), Update{id(n), pay(n, total), []Use{{model, 1, 1, 1, 1}}}); err != nil {
					panic(err)
				}
				out.Lock()
				fmt.Println(n, total)
				out.Unlock()
			}
		}()
	}
	for { // now and then the log is written anew
		time.Sleep(3 * time.Millisecond)
		if err := s.Compact(); err != nil {
			panic(err)
		}
	}
}

// TestDamage flips a byte anywhere, or zeroes some, or cuts: what is found is a state
// that once was, with damage that is reported, and vouchers are never lost but those
// of the record that was hit.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for n := range 3 {
		admit(t, s, n)
	}
	for total := uint64(1); total <= 5; total++ {
		for n := range 3 {
			must(t, s.Put(noon, Update{id(n), pay(n, total*100), []Use{{model, 1, 1, 1, 100}}}))
		}
	}
	must(t, s.Close())
	whole, err := os.ReadFile(filepath.Join(dir, logName))
	must(t, err)
	try := func(name string, data []byte, reported bool) {
		t.Helper()
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, logName), data, 0o600))
		s := open(t, dir)
		if (len(s.Damage()) > 0) != reported {
			t.Errorf("%s: %v", name, s.Damage())
		}
		sum := uint64(0)
		for n := range 3 {
			c, _ := s.Channel(id(n))
			sum += c.Best.Total
			if c.Best.Total%100 != 0 || c.Best.Total > 0 && c.Best.Verify(public) != nil {
				t.Errorf("%s: channel %d has %d", name, n, c.Best.Total)
			}
		}
		if reported {
			if sum < 1300 { // two records can be hit
				t.Errorf("%s: %d of 1500 is left", name, sum)
			}
			if kept, _ := filepath.Glob(filepath.Join(dir, "*.damaged-*")); len(kept) != 1 {
				t.Errorf("%s: the damaged file is not kept", name)
			}
		}
		// It goes on, and the next time there is nothing to report.
		for n := range 3 {
			admit(t, s, n)
		}
		must(t, s.Put(noon, Update{Channel: id(1), Voucher: pay(1, 10_000)}))
		must(t, s.Close())
		s = open(t, dir)
		if c, _ := s.Channel(id(1)); len(s.Damage()) > 0 || c.Best.Total != 10_000 {
			t.Errorf("%s, opened again: %v, %d", name, s.Damage(), c.Best.Total)
		}
		must(t, s.Close())
	}
	for at := 0; at < len(whole); at += 149 {
		bad := bytes.Clone(whole)
		bad[at] ^= 0x41
		try(fmt.Sprintf("byte %d", at), bad, true)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 10 {
		at := r.IntN(len(whole) - 40)
		bad := bytes.Clone(whole)
		clear(bad[at : at+40])
		try(fmt.Sprintf("40 bytes at %d", at), bad, true)
	}
	for range 10 {
		cut := len(whole) - r.IntN(len(whole)/20)
		try(fmt.Sprintf("cut at %d", cut), whole[:cut], false)
	}
	try("zeroes at the end", append(bytes.Clone(whole), make([]byte, 5000)...), false)
	try("noise at the end", append(bytes.Clone(whole), bytes.Repeat([]byte("noise"), 50)...), true)

	// The log is gone: the one before it is there.
	s = open(t, dir)
	must(t, s.Compact())
	must(t, s.Close())
	must(t, os.Remove(filepath.Join(dir, logName)))
	s = open(t, dir)
	if c, _ := s.Channel(id(2)); len(s.Damage()) == 0 || c.Best.Total != 500 {
		t.Errorf("%v, %+v", s.Damage(), c)
	}
	// A record that checks but is not one: a voucher that nobody signed.
	must(t, s.Close())
	b, err := frame(&record{Channels: []channelRecord{{ID: id(1), GlobalID: network, Key: fmt.Sprintf("%x", public), Best: voucher.Voucher{GlobalID: network, Channel: id(1), Total: 9999}.String()}}})
	must(t, err)
	f, err := os.OpenFile(filepath.Join(dir, logName), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	f.Write(b)
	must(t, f.Close())
	s = open(t, dir)
	if c, _ := s.Channel(id(1)); len(s.Damage()) == 0 || c.Best.Total != 500 {
		t.Errorf("%v, %+v", s.Damage(), c)
	}
}

// TestMany keeps 10,000 channels, writes the log anew as it grows, and stays small.
func TestMany(t *testing.T) {
	count := 10_000
	if testing.Short() {
		count = 500
	}
	dir := t.TempDir()
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	s := open(t, dir)
	var wait sync.WaitGroup
	each := func(do func(n int)) {
		for w := range 64 {
			wait.Go(func() {
				for n := w; n < count; n += 64 {
					do(n)
				}
			})
		}
		wait.Wait()
	}
	each(func(n int) { must(t, s.Admit(id(n), network, public, Chain{Cover: 1 << 40})) })
	each(func(n int) {
		must(t, s.Put(noon, Update{id(n), pay(n, 1000), []Use{{model, 1, 1, 1, 500}, {other, 1, 1, 1, 500}}}))
	})
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := float64(int64(after.HeapAlloc)-int64(before.HeapAlloc)) / 1e6
	t.Logf("%d channels take %.1f MB of memory and a log of %.1f MB", count, used, float64(s.size)/1e6)
	if used > 200 {
		t.Errorf("%.1f MB", used)
	}
	if s.size > 40<<20 {
		t.Errorf("the log has %d bytes", s.size)
	}
	want := state(s)
	must(t, s.Close())
	s = open(t, dir)
	if !reflect.DeepEqual(state(s), want) || len(s.Channels()) != count {
		t.Error("another state is read")
	}
	runtime.KeepAlive(s)
}

func TestPolicy(t *testing.T) {
	p := Policy{Threshold: 1000, Age: time.Hour, Minimum: 100}
	c := func(total, claimed uint64, since time.Duration, closing int64) Channel {
		c := Channel{Best: voucher.Voucher{Total: total}, Chain: Chain{Claimed: claimed, ClosingAt: closing}}
		if since > 0 {
			c.Since = noon.Add(-since).Unix()
		}
		return c
	}
	for _, tt := range []struct {
		name string
		c    Channel
		down bool
		want Reason
	}{
		{"nothing", c(0, 0, 0, 0), true, NotDue},
		{"all claimed", c(5000, 5000, time.Hour, 1), true, NotDue},
		{"less than what is claimed", c(4000, 5000, time.Hour, 1), true, NotDue},
		{"too little, on down", c(99, 0, 2*time.Hour, 1), true, NotDue},
		{"little", c(999, 0, time.Minute, 0), false, NotDue},
		{"threshold", c(1000, 0, time.Minute, 0), false, ByThreshold},
		{"below the threshold by what is claimed", c(1999, 1000, time.Minute, 0), false, NotDue},
		{"old", c(999, 0, time.Hour, 0), false, ByAge},
		{"almost old", c(999, 0, time.Hour-time.Second, 0), false, NotDue},
		{"old without a time", c(999, 0, 0, 0), false, NotDue},
		{"down", c(100, 0, time.Minute, 0), true, ByDown},
		{"closing", c(100, 0, time.Minute, noon.Unix()+5), false, ByClosing},
		{"closing, late", c(100, 0, time.Minute, noon.Unix()-5), false, ByClosing},
	} {
		if got := p.Due(tt.c, noon, tt.down); got != tt.want {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
	if got := (Policy{}).Due(c(1, 0, 999*time.Hour, 0), noon, false); got != NotDue {
		t.Errorf("no policy: %q", got)
	}
	list := p.Select([]Channel{c(2000, 0, 0, 0), c(3000, 0, 0, 0), c(50, 0, 0, 7), c(200, 0, 0, 9), c(150, 0, 0, 8)}, noon, false)
	var totals []uint64
	for _, c := range list {
		totals = append(totals, c.Channel.Best.Total)
	}
	if !slices.Equal(totals, []uint64{150, 200, 3000, 2000}) {
		t.Errorf("%v", totals)
	}
}

// FuzzLog opens whatever a file can be, and writes it anew.
func FuzzLog(f *testing.F) {
	good, _ := frame(&record{Channels: []channelRecord{{ID: id(1), GlobalID: network, Key: fmt.Sprintf("%x", public), Best: pay(1, 7).String(), Shares: []share{{"2026-06-01", model, 5}}}}, Rows: []Row{{Day: "2026-06-01", Model: model, Earned: 5}}})
	f.Add(append([]byte(header), good...))
	f.Add([]byte(header))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &Store{}
		s.reset()
		end, _ := s.replay(data)
		if end > len(data) {
			t.Errorf("%d of %d bytes are whole", end, len(data))
		}
		var b bytes.Buffer
		b.Reset()
		if _, err := s.dump(&b); err != nil {
			t.Fatal(err)
		}
		again := &Store{}
		again.reset()
		if _, damage := again.replay(b.Bytes()); len(damage) > 0 || !reflect.DeepEqual(state(again), state(s)) {
			t.Errorf("%v", damage)
		}
	})
}
