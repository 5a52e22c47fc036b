package devnet

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"math/big"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/liteclient"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/ton/wallet"
)

var oneTON = big.NewInt(1e9)

// client is an unmodified one, under the policy that checks everything.
func client(t *testing.T, c *Chain, s *Server) ton.APIClientWrapped {
	t.Helper()
	var config liteclient.GlobalConfig
	if err := json.Unmarshal(c.GlobalConfig(s), &config); err != nil {
		t.Fatal(err)
	}
	pool := liteclient.NewConnectionPool()
	t.Cleanup(pool.Stop)
	if err := pool.AddConnectionsFromConfig(t.Context(), &config); err != nil {
		t.Fatal(err)
	}
	api := ton.NewAPIClient(pool, ton.ProofCheckPolicySecure)
	api.SetTrustedBlockFromConfig(&config)
	return api.WithRetryTimeout(1, 10*time.Second)
}

func serve(t *testing.T, o Options) (*Chain, *Server) {
	t.Helper()
	c, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		c.Close()
	})
	return c, s
}

// TestUnmodifiedClient deploys wallets of both versions and sends money between
// them, with every proof checked.
func TestUnmodifiedClient(t *testing.T) {
	for _, validators := range []int{1, 7} {
		c, s := serve(t, Options{Validators: validators})
		api := client(t, c, s)
		key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32))
		for _, version := range []wallet.VersionConfig{
			wallet.V4R2, wallet.ConfigV5R1Final{NetworkGlobalID: DefaultGlobalID},
		} {
			w, err := wallet.FromPrivateKey(api, key, version)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Fund(w.WalletAddress(), oneTON); err != nil {
				t.Fatal(err)
			}
			to := address.NewAddress(0, 0, bytes.Repeat([]byte{9}, 32))
			tx, _, err := w.TransferWaitTransaction(t.Context(), to.Bounce(false), tlb.MustFromTON("0.1"), "hello")
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Rotate(); err != nil {
				t.Fatal(err)
			}
			head, err := api.GetMasterchainInfo(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			account, err := api.GetAccount(t.Context(), head, to)
			if err != nil {
				t.Fatal(err)
			}
			if account.State.Balance.Nano().Sign() <= 0 {
				t.Errorf("nothing came: %v", account.State.Balance)
			}
			me, err := api.GetAccount(t.Context(), head, w.WalletAddress())
			if err != nil {
				t.Fatal(err)
			}
			list, err := api.ListTransactions(t.Context(), w.WalletAddress(), 5, me.LastTxLT, me.LastTxHash)
			if err != nil || len(list) != 2 || !bytes.Equal(list[1].Hash, tx.Hash) {
				t.Errorf("%d transactions, %v", len(list), err)
			}
			result, err := api.RunGetMethod(t.Context(), head, w.WalletAddress(), "seqno")
			if err != nil || result.MustInt(0).Int64() != 1 {
				t.Errorf("seqno: %v", err)
			}
			if _, err := api.GetBlockchainConfig(t.Context(), head, 18, 34); err != nil {
				t.Error(err)
			}
			if err := c.Mine(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestReopen closes a chain and goes on with it.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	c, err := Open(Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	to := address.NewAddress(0, 0, bytes.Repeat([]byte{9}, 32))
	for range 3 {
		if err := c.Fund(to, oneTON); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Rotate(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Dir: dir}); err == nil {
		t.Error("two chains in one folder")
	}
	height, first := c.Height(), c.KeyBlock()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	c, s := serve(t, Options{Dir: dir})
	if c.Height() != height || !c.KeyBlock().Equals(first) {
		t.Errorf("height %d, then %d", height, c.Height())
	}
	if err := c.Fund(to, oneTON); err != nil {
		t.Fatal(err)
	}
	api := client(t, c, s)
	head, err := api.GetMasterchainInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	account, err := api.GetAccount(t.Context(), head, to)
	if err != nil {
		t.Fatal(err)
	}
	// Less the rent of a second or two.
	if b := account.State.Balance.Nano().Int64(); b > 4e9 || b < 4e9-1000 {
		t.Errorf("balance %v", account.State.Balance)
	}
	list, err := api.ListTransactions(t.Context(), to, 10, account.LastTxLT, account.LastTxHash)
	if err != nil || len(list) != 4 {
		t.Errorf("%d transactions, %v", len(list), err)
	}
}

func TestLie(t *testing.T) {
	c, s := serve(t, Options{})
	if err := s.Lie("nonsense"); err == nil {
		t.Error("a lie that does not exist")
	}
	if err := s.Lie(Stalled); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := client(t, c, s).GetMasterchainInfo(ctx); err == nil {
		t.Error("a stalled liteserver answered")
	}
}
