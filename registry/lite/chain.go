package lite

import (
	"errors"
	"fmt"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// A Head is a block of the masterchain that validators signed, proved from the
// pinned key block.
type Head struct {
	Block BlockID
	Time  uint32 // Unix time, from its header
}

// Errors of a liteserver that lies, or is not good enough. What they wrap says
// more.
var (
	ErrProof     = errors.New("a proof does not hold")
	ErrWrongNet  = errors.New("it serves another network")
	ErrStale     = errors.New("its state is too old")
	ErrBackwards = errors.New("it is behind what this client has seen")
	ErrFork      = errors.New("the validators signed two different blocks of the same number")
	ErrNoAccount = errors.New("there is no such account")
	ErrInactive  = errors.New("the account is not active")
	ErrCode      = errors.New("the account's code is not the one expected")
)

// maxCells bounds the cells of one bag, of which an account has at most 65,536.
const maxCells = 1 << 17

func init() {
	// These hold for what package tl parses on its own too. A large bag is hashed in
	// goroutines otherwise, where a panic could not be caught.
	cell.MaxBOCCells = maxCells
	cell.ParallelBOCMinCells = 0
}

// parseBOC reads a bag of cells of so many roots.
func parseBOC(data []byte, roots int) ([]*cell.Cell, error) {
	cells, err := cell.FromBOCMultiRootWithOptions(data, cell.BOCParseOptions{MaxCells: maxCells})
	if err != nil {
		return nil, err
	}
	if len(cells) != roots {
		return nil, fmt.Errorf("a bag of %d cells where %d belong", len(cells), roots)
	}
	return cells, nil
}

// blockHeader checks that a proof is of this block, and that its header says what
// the id says.
func blockHeader(id BlockID, proof *cell.Cell, globalID int32) (*tlb.Block, error) {
	block, err := ton.CheckBlockProof(proof, id.RootHash[:])
	if err != nil {
		return nil, err
	}
	if block.GlobalID != globalID {
		return nil, fmt.Errorf("%w: global id %d, not %d", ErrWrongNet, block.GlobalID, globalID)
	}
	workchain, shard := tlb.ConvertShardIdentToShard(block.BlockInfo.Shard)
	if block.BlockInfo.NotMaster || workchain != masterchain || int64(shard) != wholeShard {
		return nil, errors.New("the header is not of a masterchain block")
	}
	if block.BlockInfo.SeqNo != id.SeqNo {
		return nil, fmt.Errorf("the header is of block %d, not %d", block.BlockInfo.SeqNo, id.SeqNo)
	}
	return block, nil
}

// A link is one verified step of a chain of proofs.
type link struct {
	to   BlockID
	key  bool
	time uint32
}

// forward verifies that validators which a key block names signed a later block.
func forward(from BlockID, step any, globalID int32) (l link, err error) {
	err = checked("block proof", func() error {
		f, ok := step.(ton.BlockLinkForward)
		if !ok {
			return fmt.Errorf("%w: a link of type %T where one forward from a key block belongs", ErrProof, step)
		}
		start, err := blockID(f.From)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		if start != from {
			return fmt.Errorf("%w: a link from block %d where one from block %d belongs", ErrProof, start.SeqNo, from.SeqNo)
		}
		if l.to, err = blockID(f.To); err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		dest, err := parseBOC(f.DestProof, 1)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		config, err := parseBOC(f.ConfigProof, 1)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		if err := ton.CheckForwardBlockProof(from.ext(), l.to.ext(), f.ToKeyBlock, config[0], dest[0], f.SignatureSet); err != nil {
			return fmt.Errorf("%w: from block %d to %d: %w", ErrProof, from.SeqNo, l.to.SeqNo, err)
		}
		block, err := blockHeader(l.to, dest[0], globalID)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		l.key, l.time = block.BlockInfo.KeyBlock, block.BlockInfo.GenUtime
		return nil
	})
	return l, err
}

// walk verifies one answer's links from a key block on, and returns where they
// lead and the last key block on the way.
func walk(from BlockID, answer ton.PartialBlockProof, target BlockID, globalID int32) (key BlockID, last link, err error) {
	key = from
	start, err := blockID(answer.From)
	if err != nil {
		return key, last, fmt.Errorf("%w: %w", ErrProof, err)
	}
	if start != from {
		return key, last, fmt.Errorf("%w: it begins at block %d, not %d", ErrProof, start.SeqNo, from.SeqNo)
	}
	if len(answer.Steps) == 0 {
		return key, last, fmt.Errorf("%w: no links from block %d to %d", ErrProof, from.SeqNo, target.SeqNo)
	}
	for i, step := range answer.Steps {
		if last, err = forward(key, step, globalID); err != nil {
			return key, last, err
		}
		if last.to.SeqNo > target.SeqNo {
			return key, last, fmt.Errorf("%w: it leads past block %d", ErrProof, target.SeqNo)
		}
		if last.key {
			key = last.to
		} else if i < len(answer.Steps)-1 || last.to != target {
			return key, last, fmt.Errorf("%w: block %d on the way is not a key block", ErrProof, last.to.SeqNo)
		}
	}
	return key, last, nil
}

// proveAccount verifies an account of a block, and returns what is proved of it:
// its cell, or a stand-in with the same hash.
func proveAccount(head BlockID, addr Address, shard *ton.BlockIDExt, shardProof, proof []*cell.Cell) (found *tlb.ShardAccount, err error) {
	err = checked("account proof", func() error {
		if shard == nil || len(shard.RootHash) != 32 || len(shard.FileHash) != 32 || len(shardProof) != 2 || len(proof) != 2 {
			return fmt.Errorf("%w: it is not there", ErrProof)
		}
		for _, c := range append(append([]*cell.Cell(nil), shardProof...), proof...) {
			if c == nil {
				return fmt.Errorf("%w: it is not there", ErrProof)
			}
		}
		found, _, err = ton.CheckAccountStateProofForShard(addr.std(), head.ext(), proof, shardProof, shard, false)
		if errors.Is(err, ton.ErrNoAddrInProof) {
			// Said alike of an account that is not there and of one that the proof
			// leaves out.
			return fmt.Errorf("%w: %s, as far as the liteserver shows", ErrNoAccount, addr)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		return nil
	})
	return found, err
}

// An Account is what was proved of an account.
type Account struct {
	Address  Address
	Active   bool       // it has code and data
	Balance  uint64     // nanotons
	Code     [32]byte   // the code's hash
	Data     *cell.Cell // may be a proof that leaves out what was not asked for
	LastPaid uint32     // Unix time to which rent is paid
	Cells    uint64     // that it stores, and the bits in them
	Bits     uint64
	Head     Head

	// Shard is the account as its chain has it, for running messages on it. Only
	// View.Account returns it whole.
	Shard *tlb.ShardAccount
}

// readAccount takes an account out of its cell.
func readAccount(root *cell.Cell, found *tlb.ShardAccount, addr Address, head Head) (a *Account, err error) {
	err = checked("account", func() error {
		var state tlb.AccountState
		if err := tlb.Parse(&state, root); err != nil {
			return err
		}
		if !state.IsValid || state.Address == nil || state.Address.Workchain() != 0 || [32]byte(state.Address.Data()) != addr.ID {
			return errors.New("it is another account")
		}
		balance := state.Balance.Nano()
		if !balance.IsUint64() {
			return errors.New("its balance is more than there is")
		}
		a = &Account{
			Address: addr, Balance: balance.Uint64(), LastPaid: state.StorageInfo.LastPaid, Head: head,
			Cells: state.StorageInfo.StorageUsed.CellsUsed.Uint64(), Bits: state.StorageInfo.StorageUsed.BitsUsed.Uint64(),
			Shard: &tlb.ShardAccount{Account: root, LastTransHash: found.LastTransHash, LastTransLT: found.LastTransLT},
		}
		if state.Status != tlb.AccountStatusActive {
			return nil
		}
		if state.StateInit == nil || state.StateInit.Code == nil || state.StateInit.Data == nil {
			return errors.New("it has no code or no data")
		}
		a.Active, a.Code, a.Data = true, [32]byte(state.StateInit.Code.Hash(0)), state.StateInit.Data
		return nil
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// stack serializes the arguments of a get-method.
func stack(args []any) ([]byte, error) {
	var s tlb.Stack
	for i := len(args) - 1; i >= 0; i-- {
		s.Push(args[i])
	}
	c, err := s.ToCell()
	if err != nil {
		return nil, err
	}
	return c.ToBOC(), nil
}
