package lite_test

import (
	"bytes"
	"context"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/address"

	"chrysalis/devnet"
	"chrysalis/registry/lite"
)

var (
	somebody = address.NewAddress(0, 0, bytes.Repeat([]byte{7}, 32))
	oneTON   = big.NewInt(1e9)
)

type net struct {
	chain   *devnet.Chain
	servers []*devnet.Server
	network lite.Network
}

func newNet(t *testing.T, o devnet.Options, servers int) *net {
	t.Helper()
	c, err := devnet.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	n := &net{chain: c, network: lite.Network{Name: "devnet", GlobalID: c.GlobalID()}}
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
	return n
}

func (n *net) client(t *testing.T, o lite.Options) *lite.Client {
	t.Helper()
	c, err := lite.New(n.network, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// read proves an account's data, as far as a wallet's seqno needs it.
func read(ctx context.Context, c *lite.Client, addr lite.Address) (*lite.Account, *lite.View, error) {
	view, err := c.Sync(ctx)
	if err != nil {
		return nil, nil, err
	}
	a, err := view.Account(ctx, addr)
	return a, view, err
}

func TestTruth(t *testing.T) {
	n := newNet(t, devnet.Options{Validators: 7}, 3)
	c := n.client(t, lite.Options{})
	key, owner := deploy(t, n)
	a, view, err := read(t.Context(), c, owner)
	if err != nil {
		t.Fatal(err)
	}
	if a.Balance == 0 || len(view.Failures) != 0 {
		t.Errorf("%+v, %v", a, view.Failures)
	}
	if _, err := view.Method(t.Context(), owner, a.Code, "seqno"); err != nil {
		t.Error(err)
	}
	if _, err := view.Method(t.Context(), owner, [32]byte{1}, "seqno"); !errors.Is(err, lite.ErrCode) {
		t.Errorf("other code: %v", err)
	}
	config, err := view.Config(t.Context(), 18, 19, 999)
	if err != nil || config[18] == nil || config[19] == nil || config[999] != nil {
		t.Errorf("%v, %v", config, err)
	}
	for range 20 { // more key blocks than one answer has links
		if err := n.chain.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	fresh := n.client(t, lite.Options{})
	for _, c := range []*lite.Client{c, fresh} {
		if _, _, err := read(t.Context(), c, owner); err != nil {
			t.Error(err)
		}
	}
	_ = key
	if _, _, err := read(t.Context(), c, lite.Address{ID: [32]byte{1}}); !errors.Is(err, lite.ErrNoAccount) {
		t.Errorf("no account: %v", err)
	}
	empty := address.NewAddress(0, 0, bytes.Repeat([]byte{3}, 32))
	if err := n.chain.Fund(empty, oneTON); err != nil {
		t.Fatal(err)
	}
	a, view, err = read(t.Context(), c, lite.Address{ID: [32]byte(empty.Data())})
	if err != nil || a.Active || a.Balance != 1e9 {
		t.Errorf("an account without code: %+v, %v", a, err)
	}
	if _, err := view.Method(t.Context(), a.Address, [32]byte{}, "seqno"); err == nil {
		t.Error("a method of an account without code")
	}
}

// TestLies has a liteserver lie in every way that there is. Alone, it is refused by
// name; with an honest one beside it, reading goes on, and what it said is reported.
func TestLies(t *testing.T) {
	want := map[devnet.Lie]error{
		devnet.ForgedResult:  nil, // the result is not asked for: the truth is read all the same
		devnet.ForgedProof:   lite.ErrProof,
		devnet.ForgedState:   lite.ErrProof,
		devnet.OldBlock:      lite.ErrBackwards,
		devnet.AbsentAccount: lite.ErrNoAccount,
		devnet.NoProof:       lite.ErrProof,
		devnet.OtherKeys:     lite.ErrProof,
		devnet.OtherChain:    lite.ErrWrongNet,
		devnet.Stalled:       context.DeadlineExceeded,
		devnet.Slow:          context.DeadlineExceeded,
		devnet.Garbage:       nil, // checked below
		devnet.Dropped:       nil, // lies about messages only
	}
	for _, lie := range devnet.Lies {
		t.Run(string(lie), func(t *testing.T) {
			t.Parallel()
			n := newNet(t, devnet.Options{}, 2)
			_, owner := deploy(t, n)
			alone := *n
			alone.network.Liteservers = n.network.Liteservers[:1]
			options := lite.Options{Memory: lite.NewMemory()}
			victim := alone.client(t, options)
			honest, view, err := read(t.Context(), victim, owner)
			if err != nil {
				t.Fatal(err)
			}
			first := view.Head
			if err := n.chain.Mine(); err != nil {
				t.Fatal(err)
			}
			if err := n.servers[0].Lie(lie); err != nil {
				t.Fatal(err)
			}
			if lie == devnet.Stalled || lie == devnet.Slow {
				impatient := options // and has seen the same
				impatient.Timeout = 300 * time.Millisecond
				victim = alone.client(t, impatient)
			}

			a, view, err := read(t.Context(), victim, owner)
			if err == nil {
				// The same with what the liar says of a method.
				a, err = view.Method(t.Context(), owner, honest.Code, "seqno")
			}
			expected, known := want[lie]
			switch {
			case !known:
				t.Fatalf("nobody says what becomes of this lie: %v", err)
			case lie == devnet.Garbage:
				if err == nil || !strings.Contains(err.Error(), "malformed") {
					t.Errorf("%v", err)
				}
			case expected == nil:
				if err != nil || a.Balance != honest.Balance {
					t.Errorf("%+v, %v", a, err)
				}
			case !errors.Is(err, expected):
				t.Errorf("%v, want %v", err, expected)
			}
			if err != nil {
				if !strings.Contains(err.Error(), n.servers[0].Addr()) {
					t.Errorf("the liar is not named: %v", err)
				}
				t.Log(err)
			}

			both := n.client(t, options)
			a, view, err = read(t.Context(), both, owner)
			if err != nil || a.Balance != honest.Balance || view.Head.Block.SeqNo < first.Block.SeqNo {
				t.Fatalf("with an honest liteserver: %+v, %v", a, err)
			}
			if _, err := view.Method(t.Context(), owner, honest.Code, "seqno"); err != nil {
				t.Errorf("with an honest liteserver: %v", err)
			}
		})
	}
}

// TestBackwards shows that a client which saw a block never goes back, in the same
// process or the next.
func TestBackwards(t *testing.T) {
	n := newNet(t, devnet.Options{}, 1)
	for range 5 {
		if err := n.chain.Mine(); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "state", "seen.json")
	if _, err := n.client(t, lite.Options{Memory: lite.FileMemory(path)}).Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := n.servers[0].Lie(devnet.OldBlock); err != nil {
		t.Fatal(err)
	}
	// To one that has seen nothing, the first block is a fresh one.
	if _, err := n.client(t, lite.Options{}).Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client(t, lite.Options{Memory: lite.FileMemory(path)}).Sync(t.Context()); !errors.Is(err, lite.ErrBackwards) {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.client(t, lite.Options{Memory: lite.FileMemory(path)}).Sync(t.Context()); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("%v", err)
	}
}

// TestClock checks the age of the last block.
func TestClock(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	n := newNet(t, devnet.Options{Now: func() time.Time { return now }}, 1)
	for _, tt := range []struct {
		name  string
		after time.Duration
		err   string
	}{
		{"now", 0, ""},
		{"two minutes", 2 * time.Minute, ""},
		{"three minutes", 3 * time.Minute, "too old"},
		{"behind", -30 * time.Second, ""},
		{"far behind", -5 * time.Minute, "set the clock"},
	} {
		c := n.client(t, lite.Options{Now: func() time.Time { return now.Add(tt.after) }})
		_, err := c.Sync(t.Context())
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestWrongPins refuses a network whose key block or global id is another.
func TestWrongPins(t *testing.T) {
	n := newNet(t, devnet.Options{}, 1)
	for name, change := range map[string]func(*lite.Network){
		"global id": func(n *lite.Network) { n.GlobalID = -239 },
		"root hash": func(n *lite.Network) { n.KeyBlock.RootHash[0] ^= 1 },
		"file hash": func(n *lite.Network) { n.KeyBlock.FileHash[0] ^= 1 },
		"mainnet": func(n *lite.Network) {
			known, _ := lite.Known("mainnet")
			n.KeyBlock = known.KeyBlock
		},
	} {
		other := *n
		change(&other.network)
		if _, err := other.client(t, lite.Options{}).Sync(t.Context()); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
}

func TestBlockID(t *testing.T) {
	n, _ := lite.Known("mainnet")
	got, err := lite.ParseBlockID(n.KeyBlock.String())
	if err != nil || got != n.KeyBlock {
		t.Errorf("%v, %v", got, err)
	}
	for _, s := range []string{"", "1", "1:2:3", "x:" + strings.Repeat("0", 64) + ":" + strings.Repeat("0", 64), n.KeyBlock.String() + ":", "4294967296" + n.KeyBlock.String()[8:]} {
		if _, err := lite.ParseBlockID(s); err == nil {
			t.Errorf("%q: no error", s)
		}
	}
}

func TestGlobalConfig(t *testing.T) {
	key := `{"@type":"pub.ed25519","key":"n4VDnSCUuSpjnCyUk9e3QOOd6o0ItSWYbTnW3Wnn8wk="}`
	for name, file := range map[string]string{
		"not JSON":       "{",
		"no liteservers": `{}`,
		"short key":      `{"liteservers":[{"ip":1,"port":1,"id":{"key":"AA=="}}]}`,
		"port":           `{"liteservers":[{"ip":1,"port":0,"id":` + key + `}]}`,
		"ip":             `{"liteservers":[{"ip":99999999999,"port":1,"id":` + key + `}]}`,
		"no init block":  `{"liteservers":[{"ip":1,"port":1,"id":` + key + `}]}`,
		"shard block":    `{"liteservers":[{"ip":1,"port":1,"id":` + key + `}],"validator":{"init_block":{"workchain":0,"seqno":1,"root_hash":"","file_hash":""}}}`,
	} {
		var n lite.Network
		if err := n.ReadGlobalConfig([]byte(file)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	n, _ := lite.Known("mainnet")
	pin := n.KeyBlock
	if err := n.ReadGlobalConfig([]byte(`{"liteservers":[{"ip":-2018135749,"port":53312,"id":` + key + `}],"validator":{"init_block":{"seqno":5,"root_hash":"F6OpKZKqvqeFp6CQmFomXNMfMj2EnaUSOXN+Mh+wVWk=","file_hash":"F6OpKZKqvqeFp6CQmFomXNMfMj2EnaUSOXN+Mh+wVWk="}}}`)); err != nil {
		t.Fatal(err)
	}
	if n.KeyBlock != pin || n.Liteservers[0].Address != "135.181.177.59:53312" {
		t.Errorf("%+v", n)
	}
}
