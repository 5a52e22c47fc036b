package devnet

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"hash/crc32"
	"math/big"
	"slices"

	"github.com/xssnick/tonutils-go/adnl/keys"
	"github.com/xssnick/tonutils-go/tl"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/registry/ledger"
)

const (
	masterchain = -1
	wholeShard  = -1 << 63
)

// block is one block of the masterchain or of the basechain, with the state
// after it.
type block struct {
	id    *ton.BlockIDExt
	root  *cell.Cell
	state *cell.Cell
	time  uint32
	endLT uint64
	key   bool
	txs   []ledger.Transaction

	// Of a masterchain block: the basechain's block that it confirms, and what
	// signs it.
	shard      *block
	catchain   uint32
	validators *validators
}

// validators is a set that signs masterchain blocks.
type validators struct {
	keys []ed25519.PrivateKey
	root *cell.Cell // the configuration that names them
}

func newValidators(seed [32]byte, round uint32, n int) *validators {
	v := &validators{}
	for i := range n {
		s := sha256.Sum256(fmt.Appendf(nil, "chrysalis/devnet/validator %x %d %d", seed, round, i))
		v.keys = append(v.keys, ed25519.NewKeyFromSeed(s[:]))
	}
	return v
}

func (v *validators) public() []ed25519.PublicKey {
	var list []ed25519.PublicKey
	for _, k := range v.keys {
		list = append(list, k.Public().(ed25519.PublicKey))
	}
	return list
}

// main are the validators of the masterchain, in the order that counts.
func (v *validators) main(id *ton.BlockIDExt, catchain uint32) ([]*tlb.ValidatorAddr, error) {
	return ton.GetMainValidators(id, tlb.CatchainConfig{Config: tlb.CatchainConfigV2{ShuffleMcValidators: true}},
		tlb.ValidatorSetAny{Validators: validatorSet(v.public())}, catchain)
}

func (v *validators) hashShort(catchain uint32) (uint32, error) {
	set, err := v.main(&ton.BlockIDExt{Workchain: masterchain, Shard: wholeShard}, catchain)
	if err != nil {
		return 0, err
	}
	h := ton.ValidatorSetHashable{CCSeqno: catchain}
	for _, a := range set {
		h.Validators = append(h.Validators, ton.ValidatorItemHashable{Key: a.PublicKey.Key, Weight: a.Weight, Addr: a.ADNLAddr})
	}
	b, err := tl.Serialize(h, true)
	if err != nil {
		return 0, err
	}
	return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)), nil
}

// sign makes the signatures of all main validators over a block.
func (v *validators) sign(id *ton.BlockIDExt, catchain uint32) (ton.SignatureSet, error) {
	hash, err := v.hashShort(catchain)
	if err != nil {
		return ton.SignatureSet{}, err
	}
	set := ton.SignatureSet{ValidatorSetHash: int32(hash), CatchainSeqno: int32(catchain)}
	payload, err := tl.Serialize(ton.BlockID{RootHash: id.RootHash, FileHash: id.FileHash}, true)
	if err != nil {
		return set, err
	}
	main, err := v.main(id, catchain)
	if err != nil {
		return set, err
	}
	private := map[string]ed25519.PrivateKey{}
	for _, k := range v.keys {
		private[string(k.Public().(ed25519.PublicKey))] = k
	}
	for _, a := range main {
		node, err := tl.Hash(keys.PublicKeyED25519{Key: a.PublicKey.Key})
		if err != nil {
			return set, err
		}
		set.Signatures = append(set.Signatures, ton.Signature{
			NodeIDShort: node, Signature: ed25519.Sign(private[string(a.PublicKey.Key)], payload),
		})
	}
	return set, nil
}

// keyMaxLT is the augmentation of the dictionary of old masterchain blocks.
type keyMaxLT struct{}

func (keyMaxLT) SkipExtra(s *cell.Slice) error {
	_, err := s.LoadSlice(65)
	return err
}

func (keyMaxLT) EmptyExtra() (*cell.Cell, error) {
	return tlb.ToCell(tlb.KeyMaxLt{})
}

func (keyMaxLT) LeafExtra(value *cell.Slice) (*cell.Cell, error) {
	var ref tlb.KeyExtBlkRef
	if err := tlb.LoadFromCell(&ref, value); err != nil {
		return nil, err
	}
	return tlb.ToCell(tlb.KeyMaxLt{IsKey: ref.IsKey, MaxEndLT: ref.BlkRef.EndLt})
}

func (keyMaxLT) CombineExtra(left, right *cell.Slice) (*cell.Cell, error) {
	var l, r tlb.KeyMaxLt
	if err := tlb.LoadFromCell(&l, left); err != nil {
		return nil, err
	}
	if err := tlb.LoadFromCell(&r, right); err != nil {
		return nil, err
	}
	return tlb.ToCell(tlb.KeyMaxLt{IsKey: l.IsKey || r.IsKey, MaxEndLT: max(l.MaxEndLT, r.MaxEndLT)})
}

var noCurrency = tlb.CurrencyCollection{Coins: tlb.ZeroCoins}

// outQueue is an empty OutMsgQueueInfo: a message is delivered in the block
// that it is sent in.
func outQueue() (*cell.Cell, error) {
	queue, err := tlb.NewOutMsgQueueAugDict()
	if err != nil {
		return nil, err
	}
	c, err := queue.ToCell()
	if err != nil {
		return nil, err
	}
	return cell.BeginCell().MustStoreBuilder(c.ToBuilder()).MustStoreUInt(0, 2).EndCell(), nil
}

// shardState serializes a ShardStateUnsplit.
func shardState(globalID int32, workchain int32, seqno, now uint32, lt uint64, accounts *tlb.ShardAccountsAugDict, extra *cell.Cell) (*cell.Cell, error) {
	queue, err := outQueue()
	if err != nil {
		return nil, err
	}
	// Histories, total balance and fees, libraries, and the masterchain block
	// referred to: all zero or none.
	stats := cell.BeginCell().MustStoreUInt(0, 64).MustStoreUInt(0, 64).
		MustStoreUInt(0, 5).MustStoreUInt(0, 5).MustStoreUInt(0, 1).MustStoreUInt(0, 1).EndCell()
	s := tlb.ShardStateUnsplit{
		GlobalID: globalID, ShardIdent: tlb.ShardIdent{WorkchainID: workchain},
		Seqno: seqno, GenUTime: now, GenLT: lt, MinRefMCSeqno: 1<<32 - 1,
		OutMsgQueueInfo: queue, Stats: stats, McStateExtra: extra,
	}
	s.Accounts.ShardAccounts = accounts
	return tlb.ToCell(s)
}

// pruned stands for a cell by its hash.
func pruned(c *cell.Cell) (*cell.Cell, error) { return cell.CreatePrunedBranch(c, 1, 3) }

// finish makes a block of a header, a change of state and what it did.
func finish(globalID int32, header tlb.BlockHeader, before, after *cell.Cell, txs []ledger.Transaction, custom *cell.Cell) (*block, error) {
	info, err := tlb.ToCell(header)
	if err != nil {
		return nil, err
	}
	left, err := pruned(before)
	if err != nil {
		return nil, err
	}
	right, err := pruned(after)
	if err != nil {
		return nil, err
	}
	update, err := cell.CreateMerkleUpdate(left, right)
	if err != nil {
		return nil, err
	}
	in, err := tlb.NewInMsgDescrAugDict()
	if err != nil {
		return nil, err
	}
	out, err := tlb.NewOutMsgDescrAugDict()
	if err != nil {
		return nil, err
	}
	accounts, err := accountBlocks(txs)
	if err != nil {
		return nil, err
	}
	inCell, err := in.ToCell()
	if err != nil {
		return nil, err
	}
	outCell, err := out.ToCell()
	if err != nil {
		return nil, err
	}
	extra := cell.BeginCell().MustStoreUInt(0x4a33f6fd, 32).
		MustStoreRef(inCell).MustStoreRef(outCell).MustStoreRef(accounts).
		MustStoreSlice(make([]byte, 32), 256).MustStoreSlice(make([]byte, 32), 256).
		MustStoreMaybeRef(custom).EndCell()
	// value_flow#b8e48dfb: nothing but zeros, twice four and four collections.
	flow := cell.BeginCell().MustStoreUInt(0xb8e48dfb, 32).
		MustStoreRef(cell.BeginCell().MustStoreUInt(0, 20).EndCell()).
		MustStoreUInt(0, 5).
		MustStoreRef(cell.BeginCell().MustStoreUInt(0, 20).EndCell()).
		EndCell()
	root := cell.BeginCell().MustStoreUInt(0x11ef55aa, 32).MustStoreInt(int64(globalID), 32).
		MustStoreRef(info).MustStoreRef(flow).MustStoreRef(update).MustStoreRef(extra).EndCell()
	workchain, shard := tlb.ConvertShardIdentToShard(header.Shard)
	file := sha256.Sum256(root.ToBOC())
	return &block{
		id: &ton.BlockIDExt{
			Workchain: workchain, Shard: int64(shard), SeqNo: header.SeqNo,
			RootHash: root.Hash(), FileHash: file[:],
		},
		root: root, state: after, time: header.GenUtime, endLT: header.EndLt, key: header.KeyBlock, txs: txs,
	}, nil
}

// accountBlocks serializes ShardAccountBlocks.
func accountBlocks(txs []ledger.Transaction) (*cell.Cell, error) {
	blocks, err := tlb.NewShardAccountBlocksAugDict()
	if err != nil {
		return nil, err
	}
	byAccount := map[[32]byte][]ledger.Transaction{}
	for _, tx := range txs {
		byAccount[tx.Account] = append(byAccount[tx.Account], tx)
	}
	for id, list := range byAccount {
		slices.SortFunc(list, func(a, b ledger.Transaction) int { return cmp.Compare(a.LT, b.LT) })
		dict, err := tlb.NewAccountTransactionsAugDict()
		if err != nil {
			return nil, err
		}
		for _, tx := range list {
			if err := dict.Set(cell.BeginCell().MustStoreUInt(tx.LT, 64).EndCell(), cell.BeginCell().MustStoreRef(tx.Cell).EndCell()); err != nil {
				return nil, err
			}
		}
		inline, err := dict.InlineCell()
		if err != nil {
			return nil, err
		}
		update, err := tlb.ToCell(tlb.HashUpdate{OldHash: list[0].Before, NewHash: list[len(list)-1].After})
		if err != nil {
			return nil, err
		}
		value := cell.BeginCell().MustStoreUInt(5, 4).MustStoreSlice(id[:], 256).
			MustStoreBuilder(inline.ToBuilder()).MustStoreRef(update).EndCell()
		if err := blocks.Set(cell.BeginCell().MustStoreSlice(id[:], 256).EndCell(), value); err != nil {
			return nil, err
		}
	}
	return blocks.ToCell()
}

func reference(b *block) tlb.ExtBlkRef {
	return tlb.ExtBlkRef{EndLt: b.endLT, SeqNo: b.id.SeqNo, RootHash: b.id.RootHash, FileHash: b.id.FileHash}
}

// shardHashes says which basechain block a masterchain block confirms.
func shardHashes(b *block) (*cell.Dictionary, error) {
	desc := tlb.ShardDesc{
		SeqNo: b.id.SeqNo, RegMcSeqno: b.id.SeqNo, StartLT: b.endLT - blockLT + 1, EndLT: b.endLT,
		RootHash: b.id.RootHash, FileHash: b.id.FileHash,
		NextValidatorShard: wholeShard, MinRefMcSeqNo: 1<<32 - 1, GenUTime: b.time,
		SplitMergeAt: tlb.FutureSplitMergeNone{},
	}
	desc.Currencies.FeesCollected, desc.Currencies.FundsCreated = noCurrency, noCurrency
	c, err := tlb.ToCell(desc)
	if err != nil {
		return nil, err
	}
	leaf := cell.BeginCell().MustStoreUInt(0, 1).MustStoreBuilder(c.ToBuilder()).EndCell()
	d := cell.NewDict(32)
	return d, d.SetIntKey(big.NewInt(0), cell.BeginCell().MustStoreRef(leaf).EndCell())
}

// sameBlock tells whether two ids are of one block.
func sameBlock(a, b *ton.BlockIDExt) bool {
	return a != nil && b != nil && a.Workchain == b.Workchain && a.SeqNo == b.SeqNo && bytes.Equal(a.RootHash, b.RootHash)
}
