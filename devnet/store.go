package devnet

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/outfile"
	"chrysalis/registry/ledger"
)

// store keeps a chain in a folder: 'log' holds every key block and every block
// with transactions, each as a length and a bag of cells; 'head' holds the last
// states, and is replaced as a whole.
type store struct {
	dir  string
	log  *os.File
	lock *os.File
}

// maxEntry bounds one entry of the log in bytes.
const maxEntry = 64 << 20

func openStore(dir string) (*store, error) {
	lock, err := outfile.Lock(filepath.Join(dir, "lock"))
	if errors.Is(err, outfile.ErrLocked) {
		return nil, fmt.Errorf("another devnet runs in %s", dir)
	}
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &store{dir, log, lock}, nil
}

func (s *store) close() error {
	return errors.Join(s.log.Close(), s.lock.Close())
}

// stored is what of a block is not in its cells.
type stored struct {
	Genesis  uint32          `json:"genesis,omitempty"`
	GlobalID int32           `json:"global_id,omitempty"`
	Zero     *ton.BlockIDExt `json:"zero,omitempty"`
	ID       *ton.BlockIDExt `json:"id"`
	Shard    *ton.BlockIDExt `json:"shard"`
	Key      bool            `json:"key,omitempty"`
	Time     uint32          `json:"time"`
	EndLT    uint64          `json:"end_lt"`
	ShardLT  uint64          `json:"shard_lt"`
	Round    uint32          `json:"round"`
	Next     uint32          `json:"next_round"`
	LogSize  int64           `json:"log_size,omitempty"`
}

func (c *Chain) describe(b *block) stored {
	return stored{
		ID: b.id, Shard: b.shard.id, Key: b.key, Time: b.time, EndLT: b.endLT, ShardLT: b.shard.endLT,
		Round: b.catchain, Next: c.round,
	}
}

func encode(meta stored, cells ...*cell.Cell) ([]byte, error) {
	head, err := json.Marshal(meta)
	if err != nil {
		return nil, err
	}
	out := binary.BigEndian.AppendUint32(nil, uint32(len(head)))
	return append(append(out, head...), cell.ToBOCWithOptions(cells, cell.BOCSerializeOptions{WithCRC32C: true})...), nil
}

func decode(data []byte) (meta stored, cells []*cell.Cell, err error) {
	if len(data) < 4 || uint64(len(data)) < 4+uint64(binary.BigEndian.Uint32(data)) {
		return meta, nil, io.ErrUnexpectedEOF
	}
	n := 4 + binary.BigEndian.Uint32(data)
	if err = json.Unmarshal(data[4:n], &meta); err != nil {
		return meta, nil, err
	}
	cells, err = cell.FromBOCMultiRootWithOptions(data[n:], cell.BOCParseOptions{MaxCells: maxEntry / 2})
	return meta, cells, err
}

// save writes the states after a block, and the block itself unless it is empty.
func (c *Chain) save(b *block) error {
	if c.store == nil {
		return nil
	}
	size, err := c.store.log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if b.key || len(b.shard.txs) > 0 {
		// The state of a key block is what proofs from it need.
		data, err := encode(c.describe(b), b.root, b.state, b.shard.root)
		if err != nil {
			return err
		}
		if _, err := c.store.log.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)); err != nil {
			return err
		}
		size += 4 + int64(len(data))
	}
	meta := c.describe(b)
	meta.Genesis, meta.GlobalID, meta.Zero, meta.LogSize = c.genesis, c.options.GlobalID, c.zero, size
	data, err := encode(meta, b.root, b.state, b.shard.root, b.shard.state)
	if err != nil {
		return err
	}
	next := filepath.Join(c.store.dir, "head.next")
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(c.store.dir, "head"))
}

// load reads what save wrote, and reports whether there was anything.
func (c *Chain) load() (bool, error) {
	data, err := os.ReadFile(filepath.Join(c.store.dir, "head"))
	if errors.Is(err, os.ErrNotExist) {
		return false, c.store.log.Truncate(0)
	}
	if err != nil {
		return false, err
	}
	meta, cells, err := decode(data)
	if err != nil {
		return false, err
	}
	if len(cells) != 4 {
		return false, errors.New("its head is not whole")
	}
	if meta.GlobalID != c.options.GlobalID {
		return false, fmt.Errorf("its global id is %d, not %d", meta.GlobalID, c.options.GlobalID)
	}
	c.genesis, c.zero, c.round = meta.Genesis, meta.Zero, meta.Next
	// What was written after the head is of a block that was not finished.
	if err := c.store.log.Truncate(meta.LogSize); err != nil {
		return false, err
	}
	if err := c.replay(); err != nil {
		return false, err
	}
	c.set = newValidators(c.seed, c.round, c.options.Validators)
	c.signers, c.signerRound = c.set, c.round
	if err := c.configure(); err != nil {
		return false, err
	}
	head := c.blocks[meta.ID.SeqNo]
	if head == nil {
		head = c.restore(meta, cells[0], cells[1], cells[2])
		c.blocks[head.id.SeqNo] = head
	}
	head.shard.state = cells[3]
	c.head = head
	return true, c.restoreState()
}

func (c *Chain) restore(meta stored, root, state, shardRoot *cell.Cell) *block {
	return &block{
		id: meta.ID, root: root, state: state, time: meta.Time, endLT: meta.EndLT, key: meta.Key,
		catchain: meta.Round, validators: newValidators(c.seed, meta.Round, c.options.Validators),
		shard: &block{id: meta.Shard, root: shardRoot, endLT: meta.ShardLT, time: meta.Time},
	}
}

// replay reads the log: key blocks, and the transactions of all.
func (c *Chain) replay() error {
	if _, err := c.store.log.Seek(0, io.SeekStart); err != nil {
		return err
	}
	in := bufio.NewReader(c.store.log)
	for {
		var size uint32
		if err := binary.Read(in, binary.BigEndian, &size); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if size > maxEntry {
			return errors.New("its log is damaged")
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(in, data); err != nil {
			return err
		}
		meta, cells, err := decode(data)
		if err != nil {
			return err
		}
		if len(cells) != 3 {
			return errors.New("its log is damaged")
		}
		b := c.restore(meta, cells[0], cells[1], cells[2])
		c.blocks[b.id.SeqNo] = b
		if b.key {
			c.keys = append(c.keys, b)
		}
		var parsed tlb.Block
		if err := tlb.Parse(&parsed, b.shard.root); err != nil {
			return err
		}
		list, err := parsed.ListTransactions()
		if err != nil {
			return err
		}
		for _, tx := range list {
			root, err := tlb.ToCell(tx)
			if err != nil {
				return err
			}
			id := [32]byte(tx.AccountAddr)
			if h := c.history[id]; len(h) == 0 || h[len(h)-1].lt < tx.LT {
				c.history[id] = append(h, entry{[32]byte(tx.Hash), tx.LT, root, b.shard.id})
			}
			b.shard.txs = append(b.shard.txs, ledger.Transaction{Account: id, LT: tx.LT, Cell: root})
		}
	}
}

// restoreState takes the accounts and the old blocks from the states of the head.
func (c *Chain) restoreState() error {
	var state tlb.ShardStateUnsplit
	if err := tlb.Parse(&state, c.head.shard.state); err != nil {
		return err
	}
	c.accounts = state.Accounts.ShardAccounts
	if c.accounts == nil {
		return errors.New("its accounts are missing")
	}
	var items []cell.DictKV
	if !c.accounts.IsEmpty() {
		root, err := c.accounts.AugmentedDictionary.AsCell().PeekRef(0)
		if err != nil {
			return err
		}
		if items, err = root.AsDict(256).LoadAll(); err != nil {
			return err
		}
	}
	for _, item := range items {
		id, err := item.Key.LoadSlice(256)
		if err != nil {
			return err
		}
		key := cell.BeginCell().MustStoreSlice(id, 256).EndCell()
		value, err := c.accounts.LoadValue(key)
		if err != nil {
			return err
		}
		var account tlb.ShardAccount
		if err := tlb.LoadFromCell(&account, value); err != nil {
			return err
		}
		prepared, err := tvm.PrepareAccount(&account, address.NewAddress(0, 0, id))
		if err != nil {
			return err
		}
		c.ledger.Accounts[[32]byte(id)] = prepared
	}

	var master tlb.ShardStateUnsplit
	if err := tlb.Parse(&master, c.head.state); err != nil {
		return err
	}
	var extra tlb.McStateExtra
	if err := tlb.Parse(&extra, master.McStateExtra); err != nil {
		return err
	}
	var info tlb.McStateExtraBlockInfo
	if err := tlb.Parse(&info, extra.Info); err != nil {
		return err
	}
	old, err := info.PrevBlocks.AugmentedDictionary.AsCell().BeginParse()
	if err != nil {
		return err
	}
	if c.old, err = old.LoadAugDict(32, keyMaxLT{}, false); err != nil {
		return err
	}
	// The state knows the blocks before the head; the next one needs the head too.
	ref, err := tlb.ToCell(tlb.KeyExtBlkRef{IsKey: c.head.key, BlkRef: reference(c.head)})
	if err != nil {
		return err
	}
	return c.old.Set(cell.BeginCell().MustStoreUInt(uint64(c.head.id.SeqNo), 32).EndCell(), ref)
}
