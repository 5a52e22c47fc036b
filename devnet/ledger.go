package devnet

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// ErrNotAccepted is what becomes of an external message whose contract does not
// pay for it.
var ErrNotAccepted = errors.New("the contract does not accept this external message")

// maxCascade is how many transactions one message may cause.
const maxCascade = 1000

// ledger holds the accounts of the basechain and runs messages on them.
type ledger struct {
	config   *tvm.PreparedBlockchainConfig
	machine  *tvm.TVM
	accounts map[[32]byte]*tvm.PreparedAccount
}

// transaction is one that was run, and where.
type transaction struct {
	account [32]byte
	lt      uint64
	cell    *cell.Cell
	fees    *big.Int
	before  []byte // the account's hash
	after   []byte
}

func newLedger(config *cell.Cell) (*ledger, error) {
	prepared, err := tvm.PrepareBlockchainConfig(config)
	if err != nil {
		return nil, fmt.Errorf("the configuration: %w", err)
	}
	return &ledger{prepared, tvm.NewTVM(), map[[32]byte]*tvm.PreparedAccount{}}, nil
}

func (l *ledger) account(id [32]byte, changed map[[32]byte]*tvm.PreparedAccount) (*tvm.PreparedAccount, error) {
	if a := changed[id]; a != nil {
		return a, nil
	}
	if a := l.accounts[id]; a != nil {
		return a, nil
	}
	none := &tlb.ShardAccount{
		Account:       cell.BeginCell().MustStoreBoolBit(false).EndCell(),
		LastTransHash: make([]byte, 32),
	}
	return tvm.PrepareAccount(none, address.NewAddress(0, 0, id[:]))
}

// run runs a message and all that follow from it, at most maxCascade, and
// returns the accounts that they changed.
func (l *ledger) run(message *cell.Cell, now uint32, lt uint64) ([]transaction, map[[32]byte]*tvm.PreparedAccount, error) {
	changed := map[[32]byte]*tvm.PreparedAccount{}
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], lt)
	seed = sha256.Sum256(seed[:])
	block, err := l.config.NewBlockContext(tvm.BlockOptions{Now: now, BlockLT: int64(lt), RandSeed: seed[:]})
	if err != nil {
		return nil, nil, err
	}
	var done []transaction
	queue := []*cell.Cell{message}
	for len(queue) > 0 && len(done) < maxCascade {
		prepared, err := tvm.PrepareMessage(queue[0])
		if err != nil {
			return nil, nil, err
		}
		queue = queue[1:]
		to := prepared.Message().Msg.DestAddr()
		if to == nil || to.Type() != address.StdAddress || to.Workchain() != 0 {
			if len(done) == 0 {
				return nil, nil, fmt.Errorf("there are accounts in the basechain only, not at %v", to)
			}
			continue
		}
		id := [32]byte(to.Data())
		account, err := l.account(id, changed)
		if err != nil {
			return nil, nil, err
		}
		result, err := l.machine.EmulateTransaction(block, account, prepared, tvm.TransactionOptions{LogicalTime: int64(lt)})
		if err != nil {
			return nil, nil, err
		}
		if prepared.Message().MsgType == tlb.MsgTypeExternalIn && !result.Accepted || result.TransactionCell == nil {
			return nil, nil, ErrNotAccepted
		}
		parsed, err := result.ParseTransaction()
		if err != nil {
			return nil, nil, err
		}
		changed[id] = result.NextAccount
		done = append(done, transaction{
			account: id, lt: parsed.LT, cell: result.TransactionCell, fees: parsed.TotalFees.Coins.Nano(),
			before: account.ShardAccount().Account.Hash(), after: result.NextAccount.ShardAccount().Account.Hash(),
		})
		for _, out := range result.OutMessages {
			if out.Msg.MsgType == tlb.MsgTypeInternal {
				queue = append(queue, out.Cell)
			}
		}
		lt = max(lt, result.EndLT)
	}
	return done, changed, nil
}

// mint is a message that brings new money to an address.
func mint(to *address.Address, nano *big.Int, lt uint64, now uint32) (*cell.Cell, error) {
	amount, err := tlb.FromNano(nano, 9)
	if err != nil {
		return nil, err
	}
	return tlb.ToCell(&tlb.InternalMessage{
		IHRDisabled: true,
		SrcAddr:     address.NewAddress(0, 0xff, make([]byte, 32)),
		DstAddr:     to,
		Amount:      amount,
		CreatedLT:   lt, CreatedAt: now,
		Body: cell.BeginCell().EndCell(),
	})
}
