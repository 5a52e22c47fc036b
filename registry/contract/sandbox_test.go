package contract

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/registry/ledger"
)

// golden finds recorded data beside the source tree.
func golden(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "golden", path))
	if err != nil {
		t.Skip("the recorded configuration is not here: ", err)
	}
	return data
}

// TestReference runs every operation, allowed and refused, with the reference
// emulator too (npm's @ton/sandbox): the transactions must be the same to the bit,
// gas, fees and the account's new state included.
func TestReference(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes ten seconds")
	}
	if _, err := exec.LookPath("npm"); err != nil {
		if os.Getenv("CHRYSALIS_REQUIRE_VM") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	config, err := devnet.Config(devnet.DefaultGlobalID, []ed25519.PublicKey{make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("devnet", func(t *testing.T) { compare(t, config) })
	t.Run("mainnet of June 2026", func(t *testing.T) {
		config, err := cell.FromBOC(golden(t, "ton/slim-config-2026-06.boc"))
		if err != nil {
			t.Fatal(err)
		}
		compare(t, config)
	})
}

type referenceRun struct {
	Config  string `json:"config"`
	Account string `json:"account"`
	Message string `json:"message"`
	Now     uint32 `json:"now"`
	LT      uint64 `json:"lt"`

	name string
	mine string // the transaction's hash; "" where the message was not accepted
	gas  int
	exit int32 // why it was not
}

func compare(t *testing.T, config *cell.Cell) {
	w := &world{T: t, registry: Address(owner)}
	bc := tlb.BlockchainConfig{Root: config}
	network, err := bc.GetGlobalID()
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(record)
	sign := func(n byte) *cell.Cell {
		signed := SignedHash(network.GlobalID, w.registry, key(1), hash)
		return Cosign(7, key(1), hash, [32]byte(auditor(n).Public().(ed25519.PublicKey)), [64]byte(ed25519.Sign(auditor(n), signed[:])))
	}
	other := put(1)
	other.Record = large(5000)
	offer, err := PutOffer(7, 1_780_000_000+86400, []byte(`{"endpoint":"x"}`))
	if err != nil {
		t.Fatal(err)
	}
	listing := ListingAddress()
	terms := channelTerms()
	terms.GlobalID = network.GlobalID
	channel := ChannelAddress(terms)
	pay := func(total uint64) voucher.Voucher {
		return voucher.Sign(payerKey, network.GlobalID, voucher.Channel(channel.Data()), total)
	}
	last := pay(500_000_000)
	l, err := ledger.New(config)
	if err != nil {
		t.Fatal(err)
	}
	base64Config := base64.StdEncoding.EncodeToString(config.ToBOC())
	var runs []referenceRun
	lt, now := uint64(1_000_000), uint32(1_780_000_000)
	for _, step := range []struct {
		name     string
		to, from *address.Address
		value    int64
		body     *cell.Cell
		init     *tlb.StateInit
	}{
		{"init", w.registry, owner, 100_000_000, nil, StateInit(owner)},
		{"put", w.registry, owner, plenty, w.body(put(1)), nil},
		{"put another", w.registry, owner, plenty, w.body(put(2)), nil},
		{"put by a stranger", w.registry, stranger, plenty, w.body(put(1)), nil},
		{"cosign", w.registry, stranger, plenty, sign(1), nil},
		{"cosign by another", w.registry, stranger, plenty, sign(2), nil},
		{"cosign badly", w.registry, stranger, plenty, Cosign(7, key(1), hash, [32]byte{}, [64]byte{}), nil},
		{"drop", w.registry, owner, plenty, DropSignature(7, key(1), [32]byte(auditor(1).Public().(ed25519.PublicKey))), nil},
		{"put larger bytes", w.registry, owner, 50_000_000, w.body(other), nil},
		{"deprecate", w.registry, owner, plenty, SetStatus(7, key(1), Deprecated), nil},
		{"revoke", w.registry, owner, plenty, SetStatus(7, key(1), Revoked), nil},
		{"revoke again", w.registry, owner, plenty, SetStatus(7, key(1), Revoked), nil},
		{"transfer", w.registry, owner, plenty, Transfer(7, next), nil},
		{"accept", w.registry, next, plenty, Accept(7), nil},
		{"unknown", w.registry, next, plenty, begin(1, 7).EndCell(), nil},
		{"rent", w.registry, stranger, plenty, nil, nil},
		{"too little", w.registry, next, 1_000_000, w.body(put(3)), nil},
		{"put offer", listing, stranger, plenty, offer, ListingStateInit()},
		{"remove another's offer", listing, owner, plenty, RemoveOffer(7, [32]byte(stranger.Data())), nil},
		{"remove offer", listing, stranger, plenty, RemoveOffer(7, [32]byte(stranger.Data())), nil},
		{"open by a stranger", channel, stranger, deposit, OpenChannel(7), ChannelStateInit(terms)},
		{"open", channel, payer, deposit, OpenChannel(7), ChannelStateInit(terms)},
		{"top-up", channel, stranger, deposit, TopUp(), nil},
		{"claim by a stranger", channel, stranger, plenty, Claim(7, pay(100_000_000)), nil},
		{"claim by the payee", channel, payee, plenty, Claim(7, pay(200_000_000)), nil},
		{"claim again", channel, stranger, plenty, Claim(7, pay(200_000_000)), nil},
		{"claim too much", channel, stranger, plenty, Claim(7, pay(1<<60)), nil},
		{"external claim", channel, nil, 0, ExternalClaim(pay(300_000_000)), nil},
		{"external claim again", channel, nil, 0, ExternalClaim(pay(300_000_000)), nil},
		{"external claim of too little", channel, nil, 0, ExternalClaim(pay(300_000_001)), nil},
		{"external claim of too much", channel, nil, 0, ExternalClaim(pay(1 << 60)), nil},
		{"external noise", channel, nil, 0, message(channel, nil, begin(1, 7).EndCell()), nil},
		{"begin to close", channel, payer, plenty, BeginClose(7), nil},
		{"finish early", channel, payer, plenty, FinishClose(7), nil},
		{"close by the payee", channel, payee, plenty, CloseChannel(7, &last), nil},
		{"open anew", channel, payer, deposit, OpenChannel(7), ChannelStateInit(terms)},
		{"begin to close anew", channel, payer, plenty, BeginClose(7), nil},
		{"a while", w.registry, stranger, plenty, nil, nil},
		{"a while", w.registry, stranger, plenty, nil, nil},
		{"a while", w.registry, stranger, plenty, nil, nil},
		{"a while", w.registry, stranger, plenty, nil, nil},
		{"finish", channel, payer, plenty, FinishClose(7), nil},
	} {
		body := step.body
		if body == nil {
			body = cell.BeginCell().EndCell()
		}
		message := body // of a step from nobody, an external message
		if step.from != nil {
			var err error
			if message, err = tlb.ToCell(&tlb.InternalMessage{
				IHRDisabled: true, Bounce: true, SrcAddr: step.from, DstAddr: step.to, CreatedLT: lt - 10, CreatedAt: now,
				Amount: tlb.FromNanoTON(big.NewInt(step.value)), StateInit: step.init, Body: body,
			}); err != nil {
				t.Fatal(err)
			}
		}
		before := cell.BeginCell().MustStoreRef(cell.BeginCell().MustStoreBoolBit(false).EndCell()).
			MustStoreSlice(make([]byte, 32), 256).MustStoreUInt(0, 64).EndCell()
		if a := l.Accounts[[32]byte(step.to.Data())]; a != nil {
			before = a.ShardAccountCell()
		}
		run := referenceRun{
			Config: base64Config, Account: base64.StdEncoding.EncodeToString(before.ToBOC()),
			Message: base64.StdEncoding.EncodeToString(message.ToBOC()), Now: now, LT: lt, name: step.name,
		}
		lt += 1_000_000
		now += 1000
		txs, changed, err := l.Run(message, run.Now, run.LT)
		var refused *ledger.NotAccepted
		if errors.As(err, &refused) {
			run.exit = refused.Exit
			runs = append(runs, run)
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		for id, a := range changed {
			l.Accounts[id] = a
		}
		var tx tlb.Transaction
		if err := tlb.Parse(&tx, txs[0].Cell); err != nil {
			t.Fatal(err)
		}
		if phase, ok := tx.Description.(tlb.TransactionDescriptionOrdinary).ComputePhase.Phase.(tlb.ComputePhaseVM); ok {
			run.gas = int(phase.Details.GasUsed.Int64())
		}
		run.mine = hex.EncodeToString(txs[0].Cell.Hash())
		runs = append(runs, run)
	}

	install := exec.Command("../../ci/ton/install")
	install.Stderr = os.Stderr
	dir, err := install.Output()
	if err != nil {
		t.Fatal(err)
	}
	input, err := json.Marshal(runs)
	if err != nil {
		t.Fatal(err)
	}
	node := exec.Command("node", filepath.Join(strings.TrimSpace(string(dir)), "sandbox.mjs"))
	node.Stdin = bytes.NewReader(input)
	var stderr bytes.Buffer
	node.Stderr = &stderr
	output, err := node.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	var results []struct {
		Error, Transaction, Account string
		Gas                         int
		Exit                        int32
	}
	if err := json.Unmarshal(output, &results); err != nil || len(results) != len(runs) {
		t.Fatalf("%v: %s", err, output)
	}
	for i, run := range runs {
		r := results[i]
		if r.Error != "" {
			t.Errorf("%s: %s", run.name, r.Error)
			continue
		}
		if run.mine != r.Transaction || run.gas != r.Gas {
			t.Errorf("%s: transaction %s and %d gas, the reference has %s and %d", run.name, run.mine, run.gas, r.Transaction, r.Gas)
		}
		if run.mine == "" && (run.exit != r.Exit || r.Exit == 0) {
			t.Errorf("%s: not accepted with exit code %d, the reference has %d", run.name, run.exit, r.Exit)
		}
	}
}
