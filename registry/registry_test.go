package registry

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/devnet"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

var tenTON = big.NewInt(10e9)

// testNet is a chain with liteservers, and a client that asks them.
type testNet struct {
	testing.TB
	chain   *devnet.Chain
	servers []*devnet.Server
	network lite.Network
	reader  Reader
	ahead   atomic.Int64 // how far the chain's and the client's clocks are ahead, nanoseconds
	stopped atomic.Int64 // when both clocks stand still, Unix nanoseconds; 0 when they run
}

func (n *testNet) now() time.Time {
	if at := n.stopped.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Now().Add(time.Duration(n.ahead.Load()))
}

func newNet(t testing.TB, servers int) *testNet {
	t.Helper()
	n := &testNet{TB: t}
	c, err := devnet.Open(devnet.Options{Now: n.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	n.chain, n.network = c, lite.Network{GlobalID: c.GlobalID()}
	for range servers {
		s, err := c.Serve("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		n.servers = append(n.servers, s)
	}
	if err := n.network.ReadGlobalConfig(c.GlobalConfig(n.servers...)); err != nil {
		t.Fatal(err)
	}
	n.reader = n.newReader()
	return n
}

func (n *testNet) newReader() Reader {
	client, err := lite.New(n.network, lite.Options{Timeout: 2 * time.Second, Now: n.now})
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(client.Close)
	return Reader{Client: client, Key: testKey}
}

// testKey stands for the derivation of keys: the hash of the record's bytes up to
// the first comma.
func testKey(kind contract.Kind, record []byte) ([32]byte, error) {
	head, _, ok := bytes.Cut(record, []byte(","))
	if !ok {
		return [32]byte{}, errors.New("not a record")
	}
	return sha256.Sum256(append([]byte{byte(kind)}, head...)), nil
}

func publication(name, rest string) Publication {
	record := fmt.Appendf(nil, `{"a":"%s","b":"%s"}`, name, rest)
	key, _ := testKey(contract.Image, record)
	return Publication{Kind: contract.Image, Key: key, Record: record, NotBefore: time.Unix(1, 0), NotAfter: time.Now().Add(time.Hour)}
}

func (n *testNet) publisher(seed byte, version string) *Publisher {
	n.Helper()
	w, err := NewWallet(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, 32)), version, n.chain.GlobalID())
	if err != nil {
		n.Fatal(err)
	}
	return &Publisher{Reader: n.reader, Wallet: w, Registry: AddressOfWallet(w), Wait: 10 * time.Second}
}

func (n *testNet) fund(p *Publisher) {
	n.Helper()
	if err := n.chain.Fund(p.Wallet.Address.Std(), tenTON); err != nil {
		n.Fatal(err)
	}
}

// do does an operation, and again, when nothing must be left to do.
func (n *testNet) do(p *Publisher, op Operation) {
	n.Helper()
	plan, err := p.Do(n.Context(), op)
	if err != nil || plan.Nothing != "" {
		n.Fatalf("%s: %v, %+v", op.Name, err, plan)
	}
	height := n.chain.Height()
	plan, err = p.Do(n.Context(), op)
	if err != nil || plan.Nothing == "" {
		n.Errorf("%s again: %v, %+v", op.Name, err, plan)
	}
	if n.chain.Height() > height+1 {
		n.Errorf("%s again sent something", op.Name)
	}
}

func (n *testNet) view() *lite.View {
	n.Helper()
	view, err := n.reader.Client.Sync(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	return view
}

func (n *testNet) record(registry lite.Address, key Key) *Record {
	n.Helper()
	r, err := n.reader.Record(n.Context(), n.view(), registry, key)
	if err != nil {
		n.Fatal(err)
	}
	return r
}

// TestStory publishes, co-signs, deprecates, revokes and hands over, with wallets
// of both versions; each step is done once, however often it is asked for.
func TestStory(t *testing.T) {
	for _, version := range WalletVersions {
		t.Run(version, func(t *testing.T) {
			n := newNet(t, 2)
			p := n.publisher(1, version)
			n.fund(p)
			n.do(p, Init())
			one, two := publication("one", "x"), publication("two", strings.Repeat("y", 3000))
			n.do(p, Publish(one))
			n.do(p, Publish(two))

			r := n.record(p.Registry, two.Key)
			if !bytes.Equal(r.Bytes, two.Record) || r.ContractStatus() != contract.Active || r.Kind != "image" {
				t.Errorf("%+v", r)
			}
			auditors := []ed25519.PrivateKey{ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, 32)), ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32))}
			policy := Policy{Signatures: 2}
			for _, a := range auditors {
				policy.Auditors = append(policy.Auditors, Key(a.Public().(ed25519.PublicKey)), Key(a.Public().(ed25519.PublicKey)))
			}
			other := n.publisher(2, version)
			other.Registry = p.Registry
			n.fund(other)
			for i, a := range auditors {
				if err := policy.Check(n.record(p.Registry, two.Key), time.Now()); !errors.Is(err, ErrSignatures) {
					t.Errorf("%d signatures: %v", i, err)
				}
				n.do(other, Cosign(two.Key, sha256.Sum256(two.Record), a))
			}
			if err := policy.Check(n.record(p.Registry, two.Key), time.Now()); err != nil {
				t.Errorf("two signatures: %v", err)
			}
			n.do(p, DropSignature(two.Key, policy.Auditors[0]))
			if err := policy.Check(n.record(p.Registry, two.Key), time.Now()); !errors.Is(err, ErrSignatures) {
				t.Errorf("one signature: %v", err)
			}

			none := Policy{}
			n.do(p, Mark(two.Key, contract.Deprecated))
			if err := none.Check(n.record(p.Registry, two.Key), time.Now()); !errors.Is(err, ErrDeprecated) {
				t.Errorf("%v", err)
			}
			n.do(p, Mark(two.Key, contract.Revoked))
			if err := (Policy{AllowDeprecated: true}).Check(n.record(p.Registry, two.Key), time.Now()); !errors.Is(err, ErrRevoked) {
				t.Errorf("%v", err)
			}
			entries, err := n.reader.List(t.Context(), n.view(), p.Registry)
			if err != nil || len(entries) != 2 {
				t.Errorf("%v, %v", entries, err)
			}

			n.do(p, Transfer(&other.Wallet.Address))
			n.do(other, Accept())
			info, err := n.reader.Info(t.Context(), n.view(), p.Registry)
			if err != nil || info.Owner != other.Wallet.Address || info.Records != 2 || info.Pending != "" {
				t.Errorf("%+v, %v", info, err)
			}
			if !info.PaysForAYear() || info.YearlyFee == 0 {
				t.Errorf("%+v", info)
			}
			if _, err := p.Do(t.Context(), Mark(one.Key, contract.Revoked)); !errors.Is(err, ErrNotOwner) {
				t.Errorf("the old owner revokes: %v", err)
			}
		})
	}
}

// TestRefusedBeforeSending is what bad input gets: an error, and nothing sent.
func TestRefusedBeforeSending(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v4r2")
	n.fund(p)
	n.do(p, Init())
	good := publication("good", "")
	revoked := publication("revoked", "")
	n.do(p, Publish(good))
	n.do(p, Publish(revoked))
	n.do(p, Mark(revoked.Key, contract.Revoked))

	poor := n.publisher(3, "v4r2")
	poor.Registry = p.Registry
	stranger := n.publisher(4, "v4r2")
	stranger.Registry = p.Registry
	n.fund(stranger)
	nowhere := *p
	nowhere.Registry = lite.Address{ID: [32]byte{1}}
	wallet := *p
	wallet.Registry = p.Wallet.Address
	change := func(f func(*Publication)) Operation {
		c := publication("changed", "")
		f(&c)
		return Publish(c)
	}
	auditor := ed25519.NewKeyFromSeed(make([]byte, 32))
	for _, tt := range []struct {
		name string
		by   *Publisher
		op   Operation
		want error
		text string
	}{
		{"no funds", poor, Cosign(good.Key, sha256.Sum256(good.Record), auditor), ErrNoFunds, poor.walletAddress()},
		{"stranger", stranger, Publish(good), ErrNotOwner, ""},
		{"no registry", &nowhere, Publish(good), lite.ErrNoAccount, "registry init"},
		{"not a registry", &wallet, Publish(good), ErrNotRegistry, ""},
		{"too large", p, change(func(c *Publication) {
			c.Record = append(c.Record, bytes.Repeat([]byte{'z'}, contract.MaxRecord)...)
		}), nil, "bytes"},
		{"expired", p, change(func(c *Publication) { c.NotAfter = time.Now().Add(-time.Minute) }), ErrExpired, ""},
		{"ends before it begins", p, change(func(c *Publication) { c.NotBefore = c.NotAfter }), nil, "validity"},
		{"revoked", p, Publish(revoked), ErrRevoked, ""},
		{"another key", p, change(func(c *Publication) { c.Key[0] ^= 1 }), ErrMismatch, ""},
		{"not a record", p, change(func(c *Publication) { c.Record = []byte("{}") }), nil, "not a record"},
		{"deprecate what is revoked", p, Mark(revoked.Key, contract.Deprecated), ErrRevoked, ""},
		{"revoke what is not there", p, Mark(Key{9}, contract.Revoked), ErrNoRecord, ""},
		{"cosign what is revoked", p, Cosign(revoked.Key, sha256.Sum256(revoked.Record), auditor), ErrRevoked, ""},
		{"cosign other bytes", p, Cosign(good.Key, [32]byte{}, auditor), ErrMismatch, ""},
		{"accept unasked", stranger, Accept(), ErrNotOwner, ""},
	} {
		height := n.chain.Height()
		plan, err := tt.by.Do(t.Context(), tt.op)
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, %+v", tt.name, err, plan)
		}
		t.Logf("%s: %v", tt.name, err)
		if n.chain.Height() > height+1 {
			t.Errorf("%s: something was sent", tt.name)
		}
	}
}

// TestNoFunds says how much is missing, and where to send it.
func TestNoFunds(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v5r1")
	_, err := p.Do(t.Context(), Init())
	if !errors.Is(err, ErrNoFunds) || !strings.Contains(err.Error(), p.walletAddress()) {
		t.Errorf("%v", err)
	}
	if err := n.chain.Fund(p.Wallet.Address.Std(), big.NewInt(50_000_000)); err != nil {
		t.Fatal(err)
	}
	_, err = p.Do(t.Context(), Init())
	if !errors.Is(err, ErrNoFunds) || !strings.Contains(err.Error(), "0.053 TON more") {
		t.Errorf("%v", err)
	}
}

// TestUnknown sends through a liteserver that keeps messages to itself: whether it
// was executed is not known, and once it is, sending again does it once.
func TestUnknown(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v4r2")
	n.fund(p)
	n.do(p, Init())
	if err := n.servers[0].Lie(devnet.Dropped); err != nil {
		t.Fatal(err)
	}
	p.Wait = time.Second
	one := publication("one", "")
	if _, err := p.Do(t.Context(), Publish(one)); !errors.Is(err, ErrUnknown) {
		t.Fatalf("%v", err)
	}
	if err := n.servers[0].Lie(devnet.Stalled); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Do(t.Context(), Publish(one)); err == nil {
		t.Fatal("a liteserver that does not answer")
	}
	if err := n.servers[0].Lie(devnet.Truth); err != nil {
		t.Fatal(err)
	}
	n.do(p, Publish(one))
}

// TestExpired loses a message, and says so once it is proved that it cannot be executed
// any more.
func TestExpired(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v5r1")
	n.fund(p)
	n.do(p, Init())
	if err := n.servers[0].Lie(devnet.Dropped); err != nil {
		t.Fatal(err)
	}
	p.Wait = 20 * time.Second
	plan, err := p.Plan(t.Context(), Publish(publication("one", "")))
	if err != nil {
		t.Fatal(err)
	}
	n.ahead.Store(int64(messageLife + time.Minute))
	if err := p.Send(t.Context(), plan); !errors.Is(err, ErrExpiry) {
		t.Fatalf("%v", err)
	}
	// It is so: the wallet does not take it any more.
	if err := n.chain.Send(plan.message); err == nil {
		t.Error("an expired message was executed")
	}
}

// TestTwice executes one plan's message twice: the second has no effect.
func TestTwice(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v5r1")
	n.fund(p)
	n.do(p, Init())
	// Rent for another second would be another nanoton.
	n.stopped.Store(n.now().UnixNano())
	if err := n.chain.Mine(); err != nil { // the plan is made for the last block's time
		t.Fatal(err)
	}
	plan, err := p.Plan(t.Context(), Publish(publication("one", "")))
	if err != nil || plan.Cost == 0 || plan.Cost > 20_000_000 {
		t.Fatalf("%+v, %v", plan, err)
	}
	if err := p.Send(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	account := n.chain.Account(p.Wallet.Address.Std())
	// What it cost is what it was said to cost.
	if paid := plan.Balance - account.Balance.Nano().Uint64(); paid != plan.Cost {
		t.Errorf("it cost %d, and was said to cost %d", paid, plan.Cost)
	}
	if err := n.chain.Send(plan.message); err == nil {
		t.Error("a message was executed twice")
	}
	if err := p.Send(t.Context(), plan); err != nil {
		t.Errorf("what is done is done: %v", err)
	}
}

// TestRefusedMessage sends what every liteserver refuses: a message of the wallet's past.
func TestRefusedMessage(t *testing.T) {
	n := newNet(t, 2)
	p := n.publisher(1, "v4r2")
	n.fund(p)
	n.do(p, Init())
	old, err := p.Plan(t.Context(), Publish(publication("one", "")))
	if err != nil {
		t.Fatal(err)
	}
	n.do(p, Publish(publication("two", "")))
	// The wallet has gone on meanwhile, so this one is never executed.
	p.Wait = time.Second
	if err := p.Send(t.Context(), old); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
	// A wallet whose message is of another key.
	other := n.publisher(2, "v4r2")
	other.Registry = p.Registry
	n.fund(other)
	plan, err := other.Plan(t.Context(), Cosign(publication("two", "").Key, sha256.Sum256(publication("two", "").Record), ed25519.NewKeyFromSeed(make([]byte, 32))))
	if err != nil {
		t.Fatal(err)
	}
	forged, err := p.Wallet.message(t.Context(), plan.seqno+7, false, []*tlb.InternalMessage{{IHRDisabled: true, DstAddr: p.Registry.Std(), Body: cell.BeginCell().EndCell()}})
	if err != nil {
		t.Fatal(err)
	}
	plan.message = forged
	if err := other.Send(t.Context(), plan); err == nil || errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "can be executed until") {
		t.Errorf("%v", err)
	}
}

func TestLoadKey(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	made, err := NewKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewKey(path); err == nil {
		t.Error("a key was replaced")
	}
	got, err := LoadKey(path)
	if err != nil || !got.Equal(made) {
		t.Errorf("%v", err)
	}
	for _, mode := range []os.FileMode{0o644, 0o640, 0o604, 0o660} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	for name, text := range map[string]string{
		"empty":        "",
		"short":        "abcd",
		"wrong words":  strings.Repeat("abandon ", 24),
		"few words":    "abandon ability",
		"unknown word": strings.Repeat("zzzz ", 24),
		"large":        strings.Repeat("a", maxKeyFile+1),
	} {
		bad := filepath.Join(dir, "bad")
		if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := LoadKey(dir); err == nil {
		t.Error("a folder is a key")
	}
	if _, err := NewWallet(made, "v3r2", -3); err == nil {
		t.Error("a wallet of version 3")
	}
}

func TestPolicy(t *testing.T) {
	now := time.Unix(1000, 0)
	base := func() *Record {
		r := &Record{Entry: entry(contract.Entry{Status: contract.Active, Kind: contract.Image, NotBefore: 500, NotAfter: 1500})}
		r.Auditors = []Key{{1}, {2}}
		return r
	}
	for _, tt := range []struct {
		name   string
		policy Policy
		change func(*Record)
		want   error
	}{
		{"good", Policy{}, func(*Record) {}, nil},
		{"not yet", Policy{}, func(r *Record) { r.NotBefore = now.Add(1) }, ErrNotYet},
		{"expired", Policy{}, func(r *Record) { r.NotAfter = now.Add(-1) }, ErrExpired},
		{"status 0", Policy{}, func(r *Record) { r.status = 0 }, ErrMismatch},
		{"status 4", Policy{}, func(r *Record) { r.status = 4 }, ErrMismatch},
		{"two of three", Policy{Auditors: []Key{{1}, {2}, {3}}, Signatures: 2}, func(*Record) {}, nil},
		{"one twice", Policy{Auditors: []Key{{1}, {1}, {3}}, Signatures: 2}, func(*Record) {}, ErrSignatures},
		{"strangers", Policy{Auditors: []Key{{7}}, Signatures: 1}, func(*Record) {}, ErrSignatures},
		{"nobody listed", Policy{Signatures: 1}, func(*Record) {}, ErrSignatures},
		{"deprecated, allowed", Policy{AllowDeprecated: true}, func(r *Record) { r.status = contract.Deprecated }, nil},
	} {
		r := base()
		tt.change(r)
		if err := tt.policy.Check(r, now); !errors.Is(err, tt.want) || tt.want == nil && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
