package devnet

import (
	"context"
	"crypto/rand"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/xssnick/tonutils-go/tl"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// Lie is a way in which a liteserver deceives its clients.
type Lie string

// The lies.
const (
	Truth         Lie = ""
	ForgedResult  Lie = "forged-result"   // another result of a get-method, with the proofs of the true one
	ForgedProof   Lie = "forged-proof"    // a proof of a state in which one bit is another
	ForgedState   Lie = "forged-state"    // another state of the account, with the proofs of the true one
	OldBlock      Lie = "old-block"       // the first block as the last one
	AbsentAccount Lie = "absent-account"  // the account is not there: another is proved in its place
	NoProof       Lie = "no-proof"        // no proofs at all
	OtherKeys     Lie = "other-validator" // blocks signed by others than the validators
	OtherChain    Lie = "other-chain"     // a chain of its own
	Stalled       Lie = "stalled"         // never answers
	Slow          Lie = "slow"            // answers after ten seconds
	Garbage       Lie = "garbage"         // answers with noise
	Dropped       Lie = "dropped"         // takes messages and never passes them on
)

// Lies are all of them.
var Lies = []Lie{
	ForgedResult, ForgedProof, ForgedState, OldBlock, AbsentAccount, NoProof, OtherKeys, OtherChain, Stalled, Slow, Garbage, Dropped,
}

// lies is what a liteserver does about it.
type lies struct {
	kind              Lie
	chain             *Chain
	old, absent, drop bool
}

// Lie makes the liteserver lie from now on, in the one way.
func (s *Server) Lie(kind Lie) error {
	if kind != Truth && !slices.Contains(Lies, kind) {
		return fmt.Errorf("there is no lie %q", kind)
	}
	l := &lies{kind: kind, old: kind == OldBlock, absent: kind == AbsentAccount, drop: kind == Dropped}
	if kind == OtherChain {
		other, err := Open(Options{GlobalID: s.chain.options.GlobalID, Now: s.chain.options.Now})
		if err != nil {
			return err
		}
		// Ahead of the true one, so that it cannot be told by its length.
		for range s.chain.Height() + 8 {
			if err := other.Mine(); err != nil {
				return err
			}
		}
		l.chain = other
	}
	s.lie.Store(l)
	return nil
}

// Height is the number of the last block.
func (c *Chain) Height() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.head.id.SeqNo
}

// before reports whether the query is answered at all.
func (l *lies) before(ctx context.Context) bool {
	switch l.kind {
	case Stalled:
		return false
	case Slow:
		select {
		case <-ctx.Done():
			return false
		case <-time.After(10 * time.Second):
		}
	}
	return true
}

// after changes an answer.
func (l *lies) after(_, answer tl.Serializable) tl.Serializable {
	switch l.kind {
	case Garbage:
		noise := make([]byte, 512)
		rand.Read(noise)
		return tl.Raw(noise)
	case ForgedResult:
		if a, ok := answer.(ton.RunMethodResult); ok {
			var stack tlb.Stack
			stack.Push(big.NewInt(1))
			if forged, err := stack.ToCell(); err == nil {
				a.Mode, a.ExitCode, a.Result = a.Mode|4, 0, forged
			}
			return a
		}
	case ForgedProof:
		switch a := answer.(type) {
		case ton.RunMethodResult:
			a.StateProof = forge(a.StateProof)
			return a
		case ton.AccountState:
			if len(a.Proof) == 2 {
				a.Proof = []*cell.Cell{a.Proof[0], forge(a.Proof[1])}
			}
			return a
		}
	case ForgedState:
		switch a := answer.(type) {
		case ton.AccountState:
			a.State = cell.BeginCell().MustStoreUInt(1, 8).EndCell()
			return a
		case ton.RunMethodResult:
			a.StateProof = cell.BeginCell().MustStoreUInt(1, 8).EndCell()
			return a
		}
	case NoProof:
		switch a := answer.(type) {
		case ton.AccountState:
			a.Proof, a.ShardProof = nil, nil
			return a
		case ton.RunMethodResult:
			a.Mode, a.Proof, a.ShardProof, a.StateProof = 4, nil, nil, nil
			return a
		}
	case OtherKeys:
		if a, ok := answer.(ton.PartialBlockProof); ok {
			for i, step := range a.Steps {
				if f, ok := step.(ton.BlockLinkForward); ok {
					set, _ := f.SignatureSet.(ton.SignatureSet)
					forged, err := newValidators([32]byte{1}, 1, 1).sign(f.To, uint32(set.CatchainSeqno))
					if err != nil {
						continue
					}
					forged.ValidatorSetHash = set.ValidatorSetHash
					f.SignatureSet = forged
					a.Steps[i] = f
				}
			}
			return a
		}
	}
	return answer
}

// forge changes one bit of what a proof proves, and makes a proof of that.
func forge(proof *cell.Cell) *cell.Cell {
	if proof == nil {
		return nil
	}
	body, err := proof.PeekRef(0)
	if err != nil {
		return proof
	}
	forged, _ := flip(body)
	made, err := cell.CreateMerkleProof(forged)
	if err != nil {
		return proof
	}
	return made
}

// flip inverts the last bit of the first leaf that has any.
func flip(c *cell.Cell) (*cell.Cell, bool) {
	s, err := c.BeginParse()
	if err != nil || c.IsSpecial() {
		return c, false
	}
	bits := s.BitsLeft()
	data, err := s.LoadSlice(bits)
	if err != nil {
		return c, false
	}
	done := false
	var refs []*cell.Cell
	for range s.RefsNum() {
		ref, err := s.LoadRefCell()
		if err != nil {
			return c, false
		}
		if !done {
			ref, done = flip(ref)
		}
		refs = append(refs, ref)
	}
	if !done && bits > 0 {
		data[(bits-1)/8] ^= 1 << (7 - (bits-1)%8)
		done = true
	}
	b := cell.BeginCell().MustStoreSlice(data, bits)
	for _, ref := range refs {
		b.MustStoreRef(ref)
	}
	return b.EndCell(), done
}
