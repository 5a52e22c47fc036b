package devnet

import (
	"errors"
	"fmt"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// prove makes a Merkle proof of the cells that look loads.
func prove(root *cell.Cell, look func(*cell.Slice) error) (*cell.Cell, error) {
	b := cell.NewMerkleProofBuilder(root)
	s, err := b.Root().BeginParse()
	if err != nil {
		return nil, err
	}
	if err := look(s); err != nil {
		return nil, err
	}
	return b.CreateProof()
}

// all loads a cell and everything below it.
func all(c *cell.Cell) error {
	s, err := c.BeginParse()
	if err != nil {
		return err
	}
	for range s.RefsNum() {
		ref, err := s.LoadRefCell()
		if err != nil {
			return err
		}
		if err := all(ref); err != nil {
			return err
		}
	}
	return nil
}

// The references of a block.
const (
	blockInfo = iota
	blockFlow
	blockUpdate
	blockExtraRef
)

// header proves a block's header and the hash of the state after it, which is
// what a liteserver sends as the header of a block.
func header(b *block) (*cell.Cell, error) {
	return prove(b.root, func(s *cell.Slice) error {
		for _, i := range []int{blockInfo, blockUpdate} {
			ref, err := s.PeekRefCellAt(i)
			if err != nil {
				return err
			}
			if err := all(ref); err != nil {
				return err
			}
		}
		return nil
	})
}

// keyConfig proves parameters 28 and 34 of a key block's configuration.
func keyConfig(b *block) (*cell.Cell, error) {
	return prove(b.root, func(s *cell.Slice) error {
		info, err := s.PeekRefCellAt(blockInfo)
		if err != nil {
			return err
		}
		if err := all(info); err != nil {
			return err
		}
		extra, err := s.PeekRefCellAt(blockExtraRef)
		if err != nil {
			return err
		}
		e, err := extra.BeginParse()
		if err != nil {
			return err
		}
		custom, err := e.PeekRefCellAt(3)
		if err != nil {
			return err
		}
		m, err := custom.BeginParse()
		if err != nil {
			return err
		}
		// Shard hashes, fees (none, so no reference), details, configuration.
		config, err := m.PeekRefCellAt(m.RefsNum() - 1)
		if err != nil {
			return err
		}
		dict := config.AsDict(32)
		for _, id := range []uint64{28, 34} {
			value, err := dict.LoadValue(cell.BeginCell().MustStoreUInt(id, 32).EndCell())
			if err != nil {
				return fmt.Errorf("parameter %d: %w", id, err)
			}
			param, err := value.LoadRefCell()
			if err != nil {
				return err
			}
			if err := all(param); err != nil {
				return err
			}
		}
		return nil
	})
}

// stateProof proves what look loads of a block's state: two roots.
func stateProof(b *block, look func(*cell.Cell) error) ([]*cell.Cell, error) {
	head, err := header(b)
	if err != nil {
		return nil, err
	}
	builder := cell.NewMerkleProofBuilder(b.state)
	if err := look(builder.Root()); err != nil {
		return nil, err
	}
	state, err := builder.CreateProof()
	if err != nil {
		return nil, err
	}
	return []*cell.Cell{head, state}, nil
}

// shardProof proves which basechain block a masterchain block confirms.
func shardProof(b *block) ([]*cell.Cell, error) {
	return stateProof(b, func(root *cell.Cell) error {
		extra, err := mcExtra(root)
		if err != nil {
			return err
		}
		_, err = ton.LoadShardsFromHashes(extra.ShardHashes, false)
		return err
	})
}

func mcExtra(root *cell.Cell) (*tlb.McStateExtra, error) {
	var state tlb.ShardStateUnsplit
	if err := tlb.Parse(&state, root); err != nil {
		return nil, err
	}
	if state.McStateExtra == nil {
		return nil, errors.New("not a masterchain state")
	}
	var extra tlb.McStateExtra
	return &extra, tlb.Parse(&extra, state.McStateExtra)
}

// accountProof proves an account of a basechain block, or that there is none; the
// account is nil then.
func accountProof(b *block, id []byte) ([]*cell.Cell, *cell.Cell, error) {
	var account *cell.Cell
	proof, err := stateProof(b, func(root *cell.Cell) error {
		var state tlb.ShardStateUnsplit
		if err := tlb.Parse(&state, root); err != nil {
			return err
		}
		if state.Accounts.ShardAccounts == nil {
			return nil
		}
		value, err := state.Accounts.ShardAccounts.LoadValue(cell.BeginCell().MustStoreSlice(id, 256).EndCell())
		if errors.Is(err, cell.ErrNoSuchKeyInDict) {
			return nil
		}
		if err != nil {
			return err
		}
		if account, err = value.WithoutTrace().PeekRefCell(); err != nil {
			return err
		}
		return nil
	})
	return proof, account, err
}

// backward proves that an older block is before this one.
func backward(from, to *block) (ton.BlockLinkBackward, error) {
	link := ton.BlockLinkBackward{ToKeyBlock: to.key, From: from.id, To: to.id}
	dest, err := header(to)
	if err != nil {
		return link, err
	}
	roots, err := stateProof(from, func(root *cell.Cell) error {
		extra, err := mcExtra(root)
		if err != nil {
			return err
		}
		var info tlb.McStateExtraBlockInfo
		if err := tlb.Parse(&info, extra.Info); err != nil {
			return err
		}
		_, _, err = info.PrevBlocks.LoadValueExtra(cell.BeginCell().MustStoreUInt(uint64(to.id.SeqNo), 32).EndCell())
		return err
	})
	if err != nil {
		return link, err
	}
	link.DestProof, link.Proof, link.StateProof = dest.ToBOC(), roots[0].ToBOC(), roots[1].ToBOC()
	return link, nil
}

// forward proves a block by the validators that a key block names.
func forward(from, to *block) (ton.BlockLinkForward, error) {
	link := ton.BlockLinkForward{ToKeyBlock: to.key, From: from.id, To: to.id}
	dest, err := header(to)
	if err != nil {
		return link, err
	}
	config, err := keyConfig(from)
	if err != nil {
		return link, err
	}
	link.DestProof, link.ConfigProof = dest.ToBOC(), config.ToBOC()
	link.SignatureSet, err = to.validators.sign(to.id, to.catchain)
	return link, err
}

// maxLinks is how many links of a chain of proofs one answer has.
const maxLinks = 16

// blockProof proves that target follows known, or a part of the way there.
func (c *Chain) blockProof(known, target *block) (ton.PartialBlockProof, error) {
	proof := ton.PartialBlockProof{Complete: true, From: known.id, To: known.id}
	if target.id.SeqNo == known.id.SeqNo {
		return proof, nil
	}
	if target.id.SeqNo < known.id.SeqNo {
		link, err := backward(known, target)
		proof.To, proof.Steps = target.id, []any{link}
		return proof, err
	}
	at := known
	if !at.key {
		key := c.keyBefore(at)
		link, err := backward(at, key)
		if err != nil {
			return proof, err
		}
		proof.Steps = append(proof.Steps, link)
		at = key
	}
	for at != target {
		// The next key block on the way, or the target.
		next := target
		for _, k := range c.keys {
			if k.id.SeqNo > at.id.SeqNo && k.id.SeqNo < target.id.SeqNo {
				next = k
				break
			}
		}
		if len(proof.Steps) == maxLinks {
			proof.Complete = false
			break
		}
		link, err := forward(at, next)
		if err != nil {
			return proof, err
		}
		proof.Steps = append(proof.Steps, link)
		at = next
	}
	proof.To = at.id
	return proof, nil
}

func (c *Chain) keyBefore(b *block) *block {
	key := c.keys[0]
	for _, k := range c.keys {
		if k.id.SeqNo < b.id.SeqNo {
			key = k
		}
	}
	return key
}
