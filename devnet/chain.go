// Package devnet is a TON chain for one machine: real contracts run by a TVM, real
// blocks with validators' signatures, and a liteserver that answers with the
// proofs that a light client demands. An unmodified client cannot tell it from
// another network but by its global id.
//
// Every block is final as soon as it is made, a message is delivered in the block
// that it is sent in, and there are accounts in the basechain only. The
// descriptions of messages in blocks, value flows and the accounts of the
// masterchain are left empty; no light client looks at them.
package devnet

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/registry/ledger"
)

// blockLT is the logical time that a block takes.
const blockLT = 1_000_000

// keptBlocks is how many blocks can be asked for, besides key blocks.
const keptBlocks = 4096

// idle is how old the last block may be when somebody asks for it before
// another is made, so that a reader which demands fresh state gets it.
const idle = time.Second

// Options say what a chain is like.
type Options struct {
	Dir        string           // where it is kept; "" is nowhere
	GlobalID   int32            // 0 is DefaultGlobalID
	Validators int              // how many sign blocks; 0 is one
	Config     *cell.Cell       // the configuration instead of Config's, with its fees
	Now        func() time.Time // nil is the clock
}

// Chain is a chain. Its methods may be called from any goroutine.
type Chain struct {
	options Options
	seed    [32]byte
	zero    *ton.BlockIDExt
	genesis uint32

	mu       sync.Mutex
	ledger   *ledger.Ledger
	accounts *tlb.ShardAccountsAugDict
	old      *cell.AugmentedDictionary // of masterchain blocks

	// The validators that the next key block names, and those that sign it: a key
	// block is signed by those of the one before.
	set         *validators
	round       uint32
	signers     *validators
	signerRound uint32

	keys    []*block
	blocks  map[uint32]*block // of the masterchain
	head    *block
	mined   chan struct{} // closed and made anew with every block
	history map[[32]byte][]entry
	store   *store
}

// entry is a transaction in an account's history.
type entry struct {
	hash [32]byte
	lt   uint64
	cell *cell.Cell
	in   *ton.BlockIDExt
}

// Open makes a chain, or goes on with the one in the folder.
func Open(o Options) (*Chain, error) {
	if o.GlobalID == 0 {
		o.GlobalID = DefaultGlobalID
	}
	if o.Validators == 0 {
		o.Validators = 1
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	c := &Chain{
		options: o, blocks: map[uint32]*block{}, history: map[[32]byte][]entry{}, mined: make(chan struct{}),
	}
	if o.Dir != "" {
		if err := os.MkdirAll(o.Dir, 0o700); err != nil {
			return nil, err
		}
		seed, err := loadSeed(filepath.Join(o.Dir, "seed"))
		if err != nil {
			return nil, err
		}
		c.seed = seed
		if c.store, err = openStore(o.Dir); err != nil {
			return nil, err
		}
		found, err := c.load()
		if err != nil {
			c.store.close()
			return nil, fmt.Errorf("the chain in %s: %w; remove the folder to begin another", o.Dir, err)
		}
		if found {
			return c, nil
		}
	} else if _, err := io.ReadFull(rand.Reader, c.seed[:]); err != nil {
		return nil, err
	}
	if err := c.begin(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// loadSeed reads the seed of every key of a chain, or makes one.
func loadSeed(path string) (seed [32]byte, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		rand.Read(seed[:])
		return seed, os.WriteFile(path, seed[:], 0o600)
	}
	if err == nil && len(data) != len(seed) {
		err = fmt.Errorf("%s is not a seed of %d bytes", path, len(seed))
	}
	if err != nil {
		return seed, err
	}
	return [32]byte(data), nil
}

// begin makes the zero state and the first block, which is a key block.
func (c *Chain) begin() error {
	c.genesis = uint32(c.options.Now().Unix())
	accounts, err := tlb.NewShardAccountsAugDict()
	if err != nil {
		return err
	}
	c.accounts = accounts
	old, err := cell.NewAugDict(32, keyMaxLT{})
	if err != nil {
		return err
	}
	c.old = old
	if err := c.elect(); err != nil {
		return err
	}
	c.signers, c.signerRound = c.set, c.round
	zero, err := shardState(c.options.GlobalID, masterchain, 0, c.genesis, 0, accounts, nil)
	if err != nil {
		return err
	}
	file := sha256.Sum256(zero.ToBOC())
	c.zero = &ton.BlockIDExt{Workchain: masterchain, Shard: wholeShard, RootHash: zero.Hash(), FileHash: file[:]}
	shardZero, err := shardState(c.options.GlobalID, 0, 0, c.genesis, 0, accounts, nil)
	if err != nil {
		return err
	}
	file = sha256.Sum256(shardZero.ToBOC())
	c.head = &block{
		id: c.zero, state: zero, time: c.genesis,
		shard: &block{
			id:    &ton.BlockIDExt{Workchain: 0, Shard: wholeShard, RootHash: shardZero.Hash(), FileHash: file[:]},
			state: shardZero, time: c.genesis,
		},
	}
	// A basechain block first, so that every account has one to be proved from.
	return c.extend(nil, true, true)
}

// elect names the validators of the next blocks. The block that follows must be
// a key block.
func (c *Chain) elect() error {
	c.round++
	c.set = newValidators(c.seed, c.round, c.options.Validators)
	return c.configure()
}

func (c *Chain) configure() error {
	config, err := Config(c.options.GlobalID, c.set.public())
	if err != nil {
		return err
	}
	if c.options.Config != nil {
		// Fees as given, with our validators and network.
		given := c.options.Config.AsDict(32)
		for _, id := range []int64{0, 19, 28, 34} {
			value, err := config.AsDict(32).LoadValueByIntKey(big.NewInt(id))
			if err != nil {
				return err
			}
			v, err := value.ToCell()
			if err != nil {
				return err
			}
			if err := given.SetIntKey(big.NewInt(id), v); err != nil {
				return err
			}
		}
		config = given.AsCell()
	}
	c.set.root = config
	next, err := ledger.New(config)
	if err != nil {
		return err
	}
	if c.ledger != nil {
		next.Accounts = c.ledger.Accounts
	}
	c.ledger = next
	return nil
}

// extend makes the next masterchain block, and a basechain block with these
// transactions where there are any or one is asked for.
func (c *Chain) extend(txs []ledger.Transaction, key, shard bool) error {
	prev := c.head
	seqno, lt := prev.id.SeqNo+1, prev.endLT+blockLT
	now := max(uint32(c.options.Now().Unix()), prev.time)

	confirmed := prev.shard
	if shard || len(txs) > 0 {
		for _, tx := range txs {
			lt = max(lt, tx.LT+1)
			key := cell.BeginCell().MustStoreSlice(tx.Account[:], 256).EndCell()
			var err error
			switch account := c.ledger.Accounts[tx.Account]; {
			case account != nil && account.State().IsValid:
				err = c.accounts.Set(key, account.ShardAccountCell())
			default: // a contract that has destroyed itself is in no state any more
				delete(c.ledger.Accounts, tx.Account)
				err = c.accounts.Delete(key)
				if errors.Is(err, cell.ErrNoSuchKeyInDict) {
					err = nil
				}
			}
			if err != nil {
				return err
			}
		}
		number := confirmed.id.SeqNo + 1
		state, err := shardState(c.options.GlobalID, 0, number, now, lt, c.accounts, nil)
		if err != nil {
			return err
		}
		header := c.header(number, now, confirmed.endLT+1, lt, tlb.ShardIdent{WorkchainID: 0})
		header.NotMaster = true
		master := reference(prev)
		header.MasterRef = &master
		header.PrevRef.Prev1 = reference(confirmed)
		next, err := finish(c.options.GlobalID, header, confirmed.state, state, txs, nil)
		if err != nil {
			return err
		}
		confirmed = next
	}

	hashes, err := shardHashes(confirmed)
	if err != nil {
		return err
	}
	short, err := c.set.hashShort(c.round)
	if err != nil {
		return err
	}
	info := tlb.McStateExtraBlockInfo{
		ValidatorInfo: tlb.ValidatorInfo{ValidatorListHashShort: short, CatchainSeqno: c.round},
		PrevBlocks:    &tlb.OldMcBlocksInfoAugDict{AugmentedDictionary: c.old},
		AfterKeyBlock: key,
	}
	if n := len(c.keys); n > 0 {
		last := reference(c.keys[n-1])
		info.LastKeyBlock = &last
	}
	infoCell, err := tlb.ToCell(info)
	if err != nil {
		return err
	}
	params := cell.BeginCell().MustStoreSlice(configAddress[:], 256).MustStoreRef(c.set.root).EndCell()
	stateExtra := cell.BeginCell().MustStoreUInt(0xcc26, 16).MustStoreDict(hashes).
		MustStoreBuilder(params.ToBuilder()).MustStoreRef(infoCell).MustStoreUInt(0, 5).EndCell()
	empty, err := tlb.NewShardAccountsAugDict()
	if err != nil {
		return err
	}
	state, err := shardState(c.options.GlobalID, masterchain, seqno, now, lt, empty, stateExtra)
	if err != nil {
		return err
	}
	header := c.header(seqno, now, prev.endLT+1, lt, tlb.ShardIdent{WorkchainID: masterchain})
	header.KeyBlock = key
	header.PrevRef.Prev1 = reference(prev)
	header.GenCatchainSeqno = c.signerRound
	if header.GenValidatorListHashShort, err = c.signers.hashShort(c.signerRound); err != nil {
		return err
	}
	custom, err := blockExtra(hashes, key, params)
	if err != nil {
		return err
	}
	next, err := finish(c.options.GlobalID, header, prev.state, state, nil, custom)
	if err != nil {
		return err
	}
	next.shard, next.validators, next.catchain = confirmed, c.signers, c.signerRound
	if err := c.adopt(next); err != nil {
		return err
	}
	// Empty ones too: a client that saw one refuses a chain that went back.
	return c.save(next)
}

func (c *Chain) header(seqno, now uint32, start, end uint64, shard tlb.ShardIdent) (h tlb.BlockHeader) {
	h.SeqNo, h.GenUtime, h.StartLt, h.EndLt, h.Shard, h.MinRefMcSeqno = seqno, now, start, end, shard, 1<<32-1
	if n := len(c.keys); n > 0 {
		h.PrevKeyBlockSeqno = c.keys[n-1].id.SeqNo
	}
	return h
}

// blockExtra serializes a McBlockExtra.
func blockExtra(hashes *cell.Dictionary, key bool, params *cell.Cell) (*cell.Cell, error) {
	fees, err := tlb.NewShardFeesAugDict()
	if err != nil {
		return nil, err
	}
	feesCell, err := fees.ToCell()
	if err != nil {
		return nil, err
	}
	b := cell.BeginCell().MustStoreUInt(0xcca5, 16).MustStoreBoolBit(key).MustStoreDict(hashes).
		MustStoreBuilder(feesCell.ToBuilder()).
		MustStoreRef(cell.BeginCell().MustStoreUInt(0, 3).EndCell())
	if key {
		b.MustStoreBuilder(params.ToBuilder())
	}
	return b.EndCell(), nil
}

// adopt makes a block the head.
func (c *Chain) adopt(b *block) error {
	ref, err := tlb.ToCell(tlb.KeyExtBlkRef{IsKey: b.key, BlkRef: reference(b)})
	if err != nil {
		return err
	}
	// The state after a block knows the blocks before it.
	if err := c.old.Set(cell.BeginCell().MustStoreUInt(uint64(b.id.SeqNo), 32).EndCell(), ref); err != nil {
		return err
	}
	for _, tx := range b.shard.txs {
		if list := c.history[tx.Account]; len(list) > 0 && list[len(list)-1].lt >= tx.LT {
			continue // of an older basechain block that is confirmed again
		}
		c.history[tx.Account] = append(c.history[tx.Account], entry{[32]byte(tx.Cell.Hash()), tx.LT, tx.Cell, b.shard.id})
	}
	c.head = b
	c.blocks[b.id.SeqNo] = b
	if b.key {
		c.keys = append(c.keys, b)
		c.signers, c.signerRound = c.set, c.round
	}
	if b.id.SeqNo > keptBlocks {
		if gone := c.blocks[b.id.SeqNo-keptBlocks]; gone != nil && !gone.key {
			delete(c.blocks, gone.id.SeqNo)
		}
	}
	close(c.mined)
	c.mined = make(chan struct{})
	return nil
}

// Close writes what is not on disk yet.
func (c *Chain) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.store == nil {
		return nil
	}
	err := c.save(c.head)
	return errors.Join(err, c.store.close())
}

// Mine makes an empty block.
func (c *Chain) Mine() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.extend(nil, false, false)
}

// Rotate makes a key block that names new validators.
func (c *Chain) Rotate() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.elect(); err != nil {
		return err
	}
	return c.extend(nil, true, false)
}

// Send runs a message, external or internal, and all that follow from it, and
// makes a block of them.
func (c *Chain) Send(message *cell.Cell) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.send(message)
}

func (c *Chain) send(message *cell.Cell) error {
	now := max(uint32(c.options.Now().Unix()), c.head.time)
	txs, changed, err := c.ledger.Run(message, now, c.head.endLT+1)
	if err != nil {
		return err
	}
	maps.Copy(c.ledger.Accounts, changed)
	return c.extend(txs, false, false)
}

// Fund gives an address this much new money, in nanotons.
func (c *Chain) Fund(to *address.Address, nano *big.Int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	message, err := mint(to.Bounce(false), nano, c.head.endLT, c.head.time)
	if err != nil {
		return err
	}
	return c.send(message)
}

// Account is an account's state now; nil if there is none.
func (c *Chain) Account(a *address.Address) *tlb.AccountState {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.prepared(a); p != nil {
		return p.State()
	}
	return nil
}

func (c *Chain) prepared(a *address.Address) *tvm.PreparedAccount {
	if a.Workchain() != 0 || len(a.Data()) != 32 {
		return nil
	}
	return c.ledger.Accounts[[32]byte(a.Data())]
}

// KeyBlock is the first block, which clients trust.
func (c *Chain) KeyBlock() *ton.BlockIDExt {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.keys[0].id.Copy()
}

// GlobalID is the network's id.
func (c *Chain) GlobalID() int32 { return c.options.GlobalID }

// fresh is the head, not older than idle.
func (c *Chain) fresh() (*block, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.options.Now().Unix()-int64(c.head.time) > int64(idle/time.Second) {
		if err := c.extend(nil, false, false); err != nil {
			return nil, err
		}
	}
	return c.head, nil
}

// Transactions are an account's, the oldest first.
func (c *Chain) Transactions(a *address.Address) ([]*tlb.Transaction, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(a.Data()) != 32 {
		return nil, nil
	}
	var list []*tlb.Transaction
	for _, e := range c.history[[32]byte(a.Data())] {
		tx := &tlb.Transaction{Hash: e.hash[:]}
		if err := tlb.Parse(tx, e.cell); err != nil {
			return nil, err
		}
		list = append(list, tx)
	}
	return list, nil
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

// A Summary is what an explorer shows of a block.
type Summary struct {
	ID           *ton.BlockIDExt
	Shard        *ton.BlockIDExt
	Time         time.Time
	Key          bool
	Transactions []Ran
}

// Ran is a transaction of a block.
type Ran struct {
	Account *address.Address
	LT      uint64
	Hash    []byte
}

// Blocks are the last blocks, at most n, the newest first.
func (c *Chain) Blocks(n int) []Summary {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []Summary
	for seqno := c.head.id.SeqNo; seqno > 0 && len(list) < n; seqno-- {
		b := c.blocks[seqno]
		if b == nil {
			continue // forgotten
		}
		s := Summary{ID: b.id, Shard: b.shard.id, Time: time.Unix(int64(b.time), 0).UTC(), Key: b.key}
		if before := c.blocks[seqno-1]; before == nil || !sameBlock(before.shard.id, b.shard.id) {
			for _, tx := range b.shard.txs {
				s.Transactions = append(s.Transactions, Ran{address.NewAddress(0, 0, tx.Account[:]), tx.LT, tx.Cell.Hash()})
			}
		}
		list = append(list, s)
	}
	return list
}

// Accounts are the addresses of all accounts.
func (c *Chain) Accounts() []*address.Address {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []*address.Address
	for _, id := range slices.SortedFunc(maps.Keys(c.ledger.Accounts), func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) }) {
		list = append(list, address.NewAddress(0, 0, id[:]))
	}
	return list
}
