// Package ledger runs messages on accounts, as a chain does: wallets, registries and
// whatever they send to each other. The devnet makes its blocks with it, and a
// publisher finds out what a message would do and cost before it sends it.
package ledger

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// ErrNotAccepted is what becomes of an external message whose contract does not
// pay for it.
var ErrNotAccepted = errors.New("the contract does not accept this external message")

// NotAccepted is ErrNotAccepted with what the contract said.
type NotAccepted struct {
	Exit int32 // 0 when the contract ended well and did not accept
}

func (e *NotAccepted) Error() string {
	return fmt.Sprintf("%v (exit code %d)", ErrNotAccepted, e.Exit)
}

// Is makes it an ErrNotAccepted.
func (e *NotAccepted) Is(target error) bool { return target == ErrNotAccepted }

// maxCascade is how many transactions one message may cause.
const maxCascade = 1000

// Ledger holds accounts of the basechain.
type Ledger struct {
	Config   *tvm.PreparedBlockchainConfig
	Machine  *tvm.TVM
	Accounts map[[32]byte]*tvm.PreparedAccount
}

// Transaction is one that was run.
type Transaction struct {
	Account [32]byte
	LT      uint64
	Cell    *cell.Cell
	Before  []byte // the account's hash
	After   []byte
	Exit    int32 // of the contract, or of what it wanted done; 0 is good
}

// New makes a ledger without accounts, with the prices of a configuration.
func New(config *cell.Cell) (*Ledger, error) {
	prepared, err := tvm.PrepareBlockchainConfig(config)
	if err != nil {
		return nil, fmt.Errorf("the configuration: %w", err)
	}
	return &Ledger{prepared, tvm.NewTVM(), map[[32]byte]*tvm.PreparedAccount{}}, nil
}

// Add adds an account.
func (l *Ledger) Add(id [32]byte, account *tlb.ShardAccount) error {
	prepared, err := tvm.PrepareAccount(account, address.NewAddress(0, 0, id[:]))
	if err == nil {
		l.Accounts[id] = prepared
	}
	return err
}

func (l *Ledger) account(id [32]byte, changed map[[32]byte]*tvm.PreparedAccount) (*tvm.PreparedAccount, error) {
	if a := changed[id]; a != nil {
		return a, nil
	}
	if a := l.Accounts[id]; a != nil {
		return a, nil
	}
	none := &tlb.ShardAccount{
		Account:       cell.BeginCell().MustStoreBoolBit(false).EndCell(),
		LastTransHash: make([]byte, 32),
	}
	return tvm.PrepareAccount(none, address.NewAddress(0, 0, id[:]))
}

// Run runs a message and all that follow from it, at most maxCascade, and
// returns the accounts that they changed.
func (l *Ledger) Run(message *cell.Cell, now uint32, lt uint64) ([]Transaction, map[[32]byte]*tvm.PreparedAccount, error) {
	changed := map[[32]byte]*tvm.PreparedAccount{}
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], lt)
	seed = sha256.Sum256(seed[:])
	block, err := l.Config.NewBlockContext(tvm.BlockOptions{Now: now, BlockLT: int64(lt), RandSeed: seed[:]})
	if err != nil {
		return nil, nil, err
	}
	var done []Transaction
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
		result, err := l.Machine.EmulateTransaction(block, account, prepared, tvm.TransactionOptions{LogicalTime: int64(lt)})
		if err != nil {
			return nil, nil, err
		}
		if prepared.Message().MsgType == tlb.MsgTypeExternalIn && !result.Accepted || result.TransactionCell == nil {
			return nil, nil, &NotAccepted{int32(result.ExitCode)}
		}
		parsed, err := result.ParseTransaction()
		if err != nil {
			return nil, nil, err
		}
		changed[id] = result.NextAccount
		done = append(done, Transaction{
			Account: id, LT: parsed.LT, Cell: result.TransactionCell, Exit: exit(parsed),
			Before: account.ShardAccount().Account.Hash(), After: result.NextAccount.ShardAccount().Account.Hash(),
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

// exit is why a transaction failed; a contract that is not there does not.
func exit(tx *tlb.Transaction) int32 {
	d, ok := tx.Description.(tlb.TransactionDescriptionOrdinary)
	if !ok {
		return 0
	}
	if phase, ok := d.ComputePhase.Phase.(tlb.ComputePhaseVM); ok && !phase.Success {
		return phase.Details.ExitCode
	}
	if d.ActionPhase != nil && !d.ActionPhase.Success {
		return d.ActionPhase.ResultCode
	}
	return 0
}
