package devnet

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/xssnick/tonutils-go/liteclient"
	"github.com/xssnick/tonutils-go/tl"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"
	"github.com/xssnick/tonutils-go/tvm/tuple"
	"github.com/xssnick/tonutils-go/tvm/vm"
)

// Server is a liteserver of a chain: ADNL over TCP.
type Server struct {
	chain  *Chain
	key    ed25519.PrivateKey
	addr   *net.TCPAddr
	server *liteclient.Server
	lie    atomic.Pointer[lies]
}

// Serve starts a liteserver. Its key follows from the chain and its address.
func (c *Chain) Serve(address string) (*Server, error) {
	_, port, _ := net.SplitHostPort(address)
	for tries := 1; ; tries++ {
		s, err := c.serve(address)
		// A port that was chosen here may be taken by another process before it is listened on.
		if port != "0" || tries == 10 || !errors.Is(err, syscall.EADDRINUSE) {
			return s, err
		}
	}
}

func (c *Chain) serve(address string) (*Server, error) {
	// The library listens and never says where, so a port is chosen here.
	probe, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	addr := probe.Addr().(*net.TCPAddr)
	if addr.IP.To4() == nil {
		probe.Close()
		return nil, fmt.Errorf("%s: a global config can only name IPv4 addresses", address)
	}
	probe.Close()
	seed := sha256.Sum256(fmt.Appendf(nil, "chrysalis/devnet/liteserver %x %d", c.seed, addr.Port))
	s := &Server{chain: c, key: ed25519.NewKeyFromSeed(seed[:]), addr: addr}
	s.server = liteclient.NewServer([]ed25519.PrivateKey{s.key})
	s.server.SetQueryHandler(s.handle)
	accepted := make(chan struct{})
	first := sync.OnceFunc(func() { close(accepted) })
	s.server.SetConnectionHook(func(*liteclient.ServerClient) error { first(); return nil })
	failed := make(chan error, 1)
	go func() { failed <- s.server.Listen(addr.String()) }()
	// Until it accepts connections: this one, and not whoever else may have the port.
	for range 2000 {
		if conn, err := net.Dial("tcp", addr.String()); err == nil {
			conn.Close()
		}
		select {
		case err := <-failed:
			return nil, err
		case <-accepted:
			return s, nil
		case <-time.After(5 * time.Millisecond):
		}
	}
	s.server.Close()
	return nil, fmt.Errorf("the liteserver does not answer on %v", addr)
}

// Addr is where the liteserver listens.
func (s *Server) Addr() string { return s.addr.String() }

// Close stops the liteserver.
func (s *Server) Close() error { return s.server.Close() }

// GlobalConfig is the file that clients read: liteservers, and the block that
// everything is proved from.
func (c *Chain) GlobalConfig(servers ...*Server) []byte {
	type key struct {
		Type string `json:"@type"`
		Key  string `json:"key"`
	}
	type liteserver struct {
		IP   int32 `json:"ip"`
		Port int   `json:"port"`
		ID   key   `json:"id"`
	}
	type blockID struct {
		Workchain int32  `json:"workchain"`
		Shard     int64  `json:"shard"`
		SeqNo     uint32 `json:"seqno"`
		RootHash  []byte `json:"root_hash"`
		FileHash  []byte `json:"file_hash"`
	}
	id := func(b *ton.BlockIDExt) blockID {
		return blockID{b.Workchain, b.Shard, b.SeqNo, b.RootHash, b.FileHash}
	}
	list := []liteserver{}
	for _, s := range servers {
		ip := s.addr.IP.To4()
		if ip.IsUnspecified() {
			ip = net.IPv4(127, 0, 0, 1).To4()
		}
		list = append(list, liteserver{int32(binary.BigEndian.Uint32(ip)), s.addr.Port, key{
			"pub.ed25519", base64.StdEncoding.EncodeToString(s.key.Public().(ed25519.PublicKey)),
		}})
	}
	data, err := json.MarshalIndent(map[string]any{
		"@type":       "config.global",
		"liteservers": list,
		"validator": map[string]any{
			"@type": "validator.config.global", "zero_state": id(c.zero), "init_block": id(c.KeyBlock()),
		},
	}, "", "  ")
	if err != nil {
		panic(err)
	}
	return append(data, '\n')
}

func failure(code int32, format string, args ...any) ton.LSError {
	return ton.LSError{Code: code, Text: fmt.Sprintf(format, args...)}
}

var errUnknownBlock = failure(651, "block is not known, or no more")

func (s *Server) handle(ctx context.Context, client *liteclient.ServerClient, queryID []byte, query tl.Serializable) {
	go func() {
		lie := s.lie.Load()
		if lie == nil {
			lie = &lies{}
		}
		if !lie.before(ctx) {
			return
		}
		answer := s.answer(ctx, query, lie)
		if answer = lie.after(query, answer); answer != nil {
			client.Answer(bytes.Clone(queryID), answer)
		}
	}()
}

// answer answers one query, which may come after a request to wait.
func (s *Server) answer(ctx context.Context, query tl.Serializable, lie *lies) (result tl.Serializable) {
	defer func() {
		if r := recover(); r != nil {
			result = failure(-400, "cannot answer %T: %v", query, r)
		}
	}()
	chain := s.chain
	if lie.chain != nil {
		chain = lie.chain
	}
	if list, ok := query.([]tl.Serializable); ok {
		wait, ok := list[0].(ton.WaitMasterchainSeqno)
		if !ok || len(list) != 2 {
			return failure(-400, "unknown query")
		}
		if !chain.wait(ctx, uint32(wait.Seqno), time.Duration(wait.Timeout)*time.Millisecond) {
			return failure(652, "timeout")
		}
		query = list[1]
	}
	answer, err := chain.answer(query, lie)
	if err != nil {
		var failed ton.LSError
		if errors.As(err, &failed) {
			return failed
		}
		return failure(-400, "%v", err)
	}
	return answer
}

// wait waits for a block of the masterchain, and makes one if it is the next.
func (c *Chain) wait(ctx context.Context, seqno uint32, timeout time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, min(max(timeout, 0), 30*time.Second))
	defer cancel()
	for {
		c.mu.Lock()
		head, mined := c.head.id.SeqNo, c.mined
		c.mu.Unlock()
		if head >= seqno {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-mined:
		case <-time.After(idle):
			if _, err := c.fresh(); err != nil {
				return false
			}
		}
	}
}

func (c *Chain) answer(query tl.Serializable, lie *lies) (tl.Serializable, error) {
	switch q := query.(type) {
	case ton.GetMasterchainInf:
		head, err := c.fresh()
		if err != nil {
			return nil, err
		}
		if lie.old {
			c.mu.Lock()
			head = c.keys[0]
			c.mu.Unlock()
		}
		return ton.MasterchainInfo{
			Last: head.id, StateRootHash: head.state.Hash(),
			Init: &ton.ZeroStateIDExt{Workchain: masterchain, RootHash: c.zero.RootHash, FileHash: c.zero.FileHash},
		}, nil
	case ton.GetTime:
		return ton.CurrentTime{Now: uint32(c.options.Now().Unix())}, nil
	case ton.GetVersion:
		return ton.Version{Version: 0x101, Capabilities: 7, Now: uint32(c.options.Now().Unix())}, nil
	case ton.SendMessage:
		message, err := cell.FromBOC(q.Body)
		if err != nil {
			return nil, err
		}
		if lie.drop {
			return ton.SendMessageStatus{Status: 1}, nil
		}
		if err := c.external(message); err != nil {
			return nil, err
		}
		return ton.SendMessageStatus{Status: 1}, nil
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	switch q := query.(type) {
	case ton.GetBlockProof:
		known, err := c.block(q.KnownBlock)
		if err != nil {
			return nil, err
		}
		target := c.head
		if q.Mode&1 != 0 {
			if target, err = c.block(q.TargetBlock); err != nil {
				return nil, err
			}
		}
		return c.blockProof(known, target)
	case ton.GetBlockHeader:
		b, err := c.block(q.ID)
		if err != nil {
			return nil, err
		}
		proof, err := header(b)
		if err != nil {
			return nil, err
		}
		return ton.BlockHeader{ID: b.id, HeaderProof: proof.ToBOC()}, nil
	case ton.LookupBlock:
		b := c.blocks[uint32(q.ID.Seqno)]
		if q.ID.Workchain != masterchain || q.Mode&1 == 0 || b == nil {
			return nil, errUnknownBlock
		}
		proof, err := header(b)
		if err != nil {
			return nil, err
		}
		return ton.BlockHeader{ID: b.id, HeaderProof: proof.ToBOC()}, nil
	case ton.GetBlockData:
		b, err := c.block(q.ID)
		if err != nil {
			return nil, err
		}
		return ton.BlockData{ID: b.id, Payload: b.root.ToBOC()}, nil
	case ton.GetAllShardsInfo:
		b, err := c.block(q.ID)
		if err != nil {
			return nil, err
		}
		proof, err := shardProof(b)
		if err != nil {
			return nil, err
		}
		hashes, err := shardHashes(b.shard)
		if err != nil {
			return nil, err
		}
		return ton.AllShardsInfo{ID: b.id, Proof: proof, Data: cell.BeginCell().MustStoreDict(hashes).EndCell()}, nil
	case ton.GetConfigAll:
		return c.configuration(q.BlockID, int(q.Mode), nil)
	case ton.GetConfigParams:
		return c.configuration(q.BlockID, int(q.Mode), q.Params)
	case ton.GetAccountState:
		return c.accountState(q, lie)
	case ton.RunSmcMethod:
		return c.runMethod(q, lie)
	case ton.GetTransactions:
		return c.transactions(q)
	}
	return nil, failure(-400, "a devnet does not answer %T", query)
}

func (c *Chain) external(message *cell.Cell) error {
	var m tlb.Message
	if err := tlb.Parse(&m, message); err != nil {
		return err
	}
	if m.MsgType != tlb.MsgTypeExternalIn {
		return failure(0, "only external messages can be sent")
	}
	if err := c.Send(message); err != nil {
		return failure(0, "cannot apply external message to current state: %v", err)
	}
	return nil
}

// block finds a block of the masterchain, or the basechain's.
func (c *Chain) block(id *ton.BlockIDExt) (*block, error) {
	if id == nil {
		return nil, errUnknownBlock
	}
	if id.Workchain == 0 {
		for _, b := range c.blocks {
			if sameBlock(b.shard.id, id) {
				return b.shard, nil
			}
		}
		return nil, errUnknownBlock
	}
	b := c.blocks[id.SeqNo]
	if b == nil || !sameBlock(b.id, id) {
		return nil, errUnknownBlock
	}
	return b, nil
}

// configuration proves some parameters, or with nil all.
func (c *Chain) configuration(id *ton.BlockIDExt, mode int, params []int32) (tl.Serializable, error) {
	b, err := c.block(id)
	if err != nil {
		return nil, err
	}
	proof, err := stateProof(b, func(root *cell.Cell) error {
		extra, err := mcExtra(root)
		if err != nil {
			return err
		}
		dict := extra.ConfigParams.Config.Params
		if params == nil {
			return all(dict.AsCell())
		}
		for _, id := range params {
			value, err := dict.LoadValueByIntKey(big.NewInt(int64(id)))
			if errors.Is(err, cell.ErrNoSuchKeyInDict) {
				continue
			}
			if err != nil {
				return err
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
	if err != nil {
		return nil, err
	}
	return ton.ConfigAll{Mode: mode, ID: b.id, StateProof: proof[0].ToBOC(), ConfigProof: proof[1].ToBOC()}, nil
}

// prove returns an account of the basechain at a block of the masterchain, with the
// proofs from there to the shard's block, and from that to the account.
func (c *Chain) prove(at *ton.BlockIDExt, id ton.AccountID, lie *lies) (b *block, links, proof []*cell.Cell, account *cell.Cell, err error) {
	if b, err = c.block(at); err != nil {
		return
	}
	if b.id.Workchain != masterchain || id.Workchain != 0 || b.shard.state == nil {
		err = failure(-400, "only accounts of the basechain at a recent block of the masterchain")
		return
	}
	if links, err = shardProof(b); err != nil {
		return
	}
	address := id.ID
	if lie.absent {
		address = make([]byte, 32)
	}
	proof, account, err = accountProof(b.shard, address)
	return
}

func (c *Chain) accountState(q ton.GetAccountState, lie *lies) (tl.Serializable, error) {
	b, links, proof, account, err := c.prove(q.ID, q.Account, lie)
	if err != nil {
		return nil, err
	}
	return ton.AccountState{ID: b.id, Shard: b.shard.id, ShardProof: links, Proof: proof, State: account}, nil
}

func (c *Chain) runMethod(q ton.RunSmcMethod, lie *lies) (tl.Serializable, error) {
	b, links, proof, account, err := c.prove(q.ID, q.Account, lie)
	if err != nil {
		return nil, err
	}
	result := ton.RunMethodResult{Mode: q.Mode & 7, ID: b.id, ShardBlock: b.shard.id}
	if q.Mode&1 != 0 {
		result.ShardProof, result.Proof = links, proof
	}
	if account == nil {
		result.ExitCode = ton.ErrCodeContractNotInitialized
		result.Mode &= 1
		return result, nil
	}
	params, err := cell.FromBOC(q.Params)
	if err != nil {
		return nil, err
	}
	run, err := c.execute(account, params, q.MethodID)
	if err != nil {
		return nil, err
	}
	result.ExitCode = int32(run.ExitCode)
	if q.Mode&2 != 0 {
		result.StateProof = run.Proof
	}
	if q.Mode&4 != 0 {
		if run.ExitCode > 1 {
			result.Mode &= 3
		} else if result.Result, err = stackCell(run.Stack); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// execute runs a get-method on an account's state.
func (c *Chain) execute(account, params *cell.Cell, method uint64) (*tvm.ExecutionResult, error) {
	var given tlb.Stack
	if err := tlb.Parse(&given, params); err != nil {
		return nil, err
	}
	stack := vm.NewStack()
	// The library pops the deepest first.
	for given.Depth() > 0 {
		v, err := given.Pop()
		if err != nil {
			return nil, err
		}
		if err := stack.PushAny(v); err != nil {
			return nil, err
		}
	}
	if err := stack.PushAny(new(big.Int).SetUint64(method)); err != nil {
		return nil, err
	}
	// Wallets, registries and listings need nothing of the chain for their
	// get-methods, so they get no c7.
	return c.ledger.Machine.ExecuteGetMethod(nil, nil, tuple.Tuple{}, vm.GasWithLimit(1_000_000), stack,
		tvm.ExecutionConfig{AccountRoot: account, Config: c.ledger.Config})
}

// stackCell serializes what a method left on its stack.
func stackCell(s *vm.Stack) (*cell.Cell, error) {
	s = s.Copy()
	var out tlb.Stack
	for s.Len() > 0 {
		v, err := s.PopAny()
		if err != nil {
			return nil, err
		}
		if v, err = plain(v); err != nil {
			return nil, err
		}
		out.Push(v)
	}
	return out.ToCell()
}

// plain turns tuples into slices.
func plain(v any) (any, error) {
	t, ok := v.(tuple.Tuple)
	if !ok {
		return v, nil
	}
	list := make([]any, t.Len())
	for i := range list {
		item, err := t.RawIndex(i)
		if err != nil {
			return nil, err
		}
		if list[i], err = plain(item); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (c *Chain) transactions(q ton.GetTransactions) (tl.Serializable, error) {
	if q.AccID == nil || len(q.AccID.ID) != 32 {
		return nil, failure(-400, "no account")
	}
	list := c.history[[32]byte(q.AccID.ID)]
	var ids []*ton.BlockIDExt
	var cells []*cell.Cell
	for _, e := range slices.Backward(list) {
		if e.lt > uint64(q.LT) {
			continue
		}
		if len(cells) == 0 && !bytes.Equal(e.hash[:], q.TxHash) {
			return nil, failure(0, "transaction is not known")
		}
		ids, cells = append(ids, e.in), append(cells, e.cell)
		if len(cells) == min(int(q.Limit), 16) {
			break
		}
	}
	if len(cells) == 0 {
		return ton.TransactionList{}, nil
	}
	return ton.TransactionList{IDs: ids, Transactions: cell.ToBOCWithOptions(cells, cell.BOCSerializeOptions{})}, nil
}
