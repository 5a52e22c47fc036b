// Package lite is a light client of TON that believes no liteserver.
//
// Everything is proved from a key block that the client trusts: each later key
// block is signed by the validators that the one before names, the last block by
// those of the last key block, the account's state hangs below that block. The
// last block must be fresh by the clock and must never go back. Get-methods are
// the caller's business: it gets proved data and runs its own code on it.
//
// A liteserver can refuse to answer. It can leave an account out of a proof, which
// is an error here and not an absence. It can hold back the newest state for as
// long as MaxAge allows; the more of them are asked, the more must agree to that.
package lite

import (
	"context"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/xssnick/tonutils-go/tl"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// Defaults of Options.
const (
	DefaultMaxAge  = 2 * time.Minute
	DefaultTimeout = 10 * time.Second
	DefaultServers = 3
)

// maxSkew is how far a block may be ahead of this machine's clock.
const maxSkew = time.Minute

// grace is how long the others may take once one liteserver has answered.
const grace = 500 * time.Millisecond

// maxRounds bounds the answers that one chain of proofs takes.
const maxRounds = 4096

// Options say how careful a client is.
type Options struct {
	Memory  Memory           // nil remembers nothing but in this process
	MaxAge  time.Duration    // how old the last block may be; 0 is DefaultMaxAge
	Timeout time.Duration    // for one query; 0 is DefaultTimeout
	Servers int              // how many liteservers are asked for the last block; 0 is DefaultServers
	Now     func() time.Time // nil is the clock
}

// Client reads a network. Its methods may be called from any goroutine.
type Client struct {
	network Network
	options Options
	conns   []*conn
}

// New makes a client; it connects when it is asked something.
func New(n Network, o Options) (*Client, error) {
	if n.KeyBlock.SeqNo == 0 {
		return nil, errors.New("there is no key block to prove from")
	}
	if len(n.Liteservers) == 0 {
		return nil, errors.New("there are no liteservers to ask; give a global config file")
	}
	if o.Memory == nil {
		o.Memory = NewMemory()
	}
	if o.MaxAge == 0 {
		o.MaxAge = DefaultMaxAge
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Servers == 0 {
		o.Servers = DefaultServers
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	c := &Client{network: n, options: o}
	for _, s := range n.Liteservers {
		c.conns = append(c.conns, &conn{server: s})
	}
	return c, nil
}

// Network is the network that the client reads.
func (c *Client) Network() Network { return c.network }

// Close closes the connections.
func (c *Client) Close() {
	for _, conn := range c.conns {
		conn.close()
	}
}

// Received is how many bytes liteservers have sent so far.
func (c *Client) Received() int64 {
	var n int64
	for _, conn := range c.conns {
		n += conn.received.Load()
	}
	return n
}

// A Failure is a liteserver that could not be used, and why.
type Failure struct {
	Server string
	Err    error
}

func (f Failure) Error() string { return f.Server + ": " + f.Err.Error() }

func (f Failure) Unwrap() error { return f.Err }

// Failures is every liteserver's failure, when none could be used.
type Failures []Failure

func (f Failures) Error() string {
	lines := make([]string, len(f))
	for i, failure := range f {
		lines[i] = failure.Error()
	}
	return "no liteserver can be used:\n  " + strings.Join(lines, "\n  ")
}

// Unwrap returns each failure.
func (f Failures) Unwrap() []error {
	list := make([]error, len(f))
	for i, failure := range f {
		list[i] = failure
	}
	return list
}

// A View is the network as of one block that was proved.
type View struct {
	Head     Head
	Failures Failures // of liteservers that were asked and could not be used

	client *Client
	conns  []*conn // those that proved the head first
	chain  [][]byte
}

// query asks one liteserver within the client's time for it.
func (c *Client) query(ctx context.Context, conn *conn, q tl.Serializable) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.options.Timeout)
	defer cancel()
	return conn.ask(ctx, q)
}

// seen is what the client remembers.
func (c *Client) seen() (seen Seen, err error) {
	err = c.options.Memory.Update(func(s *Seen) error {
		if s.Pin != c.network.KeyBlock {
			// Another network, or another block to trust.
			*s = Seen{Pin: c.network.KeyBlock, KeyBlock: c.network.KeyBlock, Last: c.network.KeyBlock}
		}
		seen = *s
		return nil
	})
	return seen, err
}

// proved is what one liteserver proved.
type proved struct {
	conn  *conn
	head  Head
	key   BlockID
	chain [][]byte // the answers that prove it
	err   error
}

// prove has one liteserver prove its last block from a key block.
func (c *Client) prove(ctx context.Context, conn *conn, seen Seen) (p proved, err error) {
	p.conn, p.key = conn, seen.KeyBlock
	answer, err := c.query(ctx, conn, ton.GetMasterchainInf{})
	if err != nil {
		return p, err
	}
	info, err := parse[ton.MasterchainInfo](answer)
	if err != nil {
		return p, err
	}
	target, err := blockID(info.Last)
	if err != nil {
		return p, err
	}
	if target.SeqNo < seen.Last.SeqNo {
		return p, fmt.Errorf("%w: its last block is %d, and block %d has been proved before", ErrBackwards, target.SeqNo, seen.Last.SeqNo)
	}
	p.head.Block = target
	if target == seen.KeyBlock {
		answer, err := c.query(ctx, conn, ton.GetBlockHeader{ID: target.ext()})
		if err != nil {
			return p, err
		}
		p.chain = [][]byte{answer}
		p.head.Time, err = keyHeader(answer, target, c.network.GlobalID)
		return p, c.timely(p.head, err)
	}
	for range maxRounds {
		answer, err := c.query(ctx, conn, ton.GetBlockProof{Mode: 1, KnownBlock: p.key.ext(), TargetBlock: target.ext()})
		if err != nil {
			return p, err
		}
		part, err := parse[ton.PartialBlockProof](answer)
		var refused *Error
		if errors.As(err, &refused) {
			return p, fmt.Errorf("%w, or has forgotten block %d, which this client trusts: %w", ErrWrongNet, p.key.SeqNo, err)
		}
		if err != nil {
			return p, err
		}
		var last link
		if p.key, last, err = walk(p.key, part, target, c.network.GlobalID); err != nil {
			return p, err
		}
		p.chain = append(p.chain, answer)
		if last.to == target {
			p.head.Time = last.time
			return p, c.timely(p.head, nil)
		}
	}
	return p, fmt.Errorf("%w: it does not end", ErrProof)
}

// keyHeader reads the header of the block that is trusted already.
func keyHeader(answer []byte, id BlockID, globalID int32) (time uint32, err error) {
	header, err := parse[ton.BlockHeader](answer)
	if err != nil {
		return 0, err
	}
	err = checked("block header", func() error {
		root, err := parseBOC(header.HeaderProof, 1)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		block, err := blockHeader(id, root[0], globalID)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		time = block.BlockInfo.GenUtime
		return nil
	})
	return time, err
}

// timely checks a head's time against the clock.
func (c *Client) timely(h Head, err error) error {
	if err != nil {
		return err
	}
	age := c.options.Now().Sub(time.Unix(int64(h.Time), 0))
	if age > c.options.MaxAge {
		return fmt.Errorf("%w: its last block %d is %v old, at most %v is allowed", ErrStale, h.Block.SeqNo, age.Round(time.Second), c.options.MaxAge)
	}
	if age < -maxSkew {
		return fmt.Errorf("its last block %d is %v ahead of this machine's clock; set the clock", h.Block.SeqNo, -age.Round(time.Second))
	}
	return nil
}

// Sync proves the network's last block, and remembers it. A few liteservers are
// asked at once and the newest block counts; the others are asked when all of
// these fail.
func (c *Client) Sync(ctx context.Context) (*View, error) {
	seen, err := c.seen()
	if err != nil {
		return nil, err
	}
	order := slices.Clone(c.conns)
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	view := &View{client: c}
	for len(order) > 0 {
		n := min(c.options.Servers, len(order))
		good, err := c.syncSome(ctx, order[:n], seen, view)
		if err != nil {
			return nil, err
		}
		if len(good) > 0 {
			return view, c.adopt(view, good)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		order = order[n:]
	}
	return nil, view.Failures
}

// syncSome asks some liteservers and returns what was proved, the newest first.
func (c *Client) syncSome(ctx context.Context, conns []*conn, seen Seen, view *View) (good []proved, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan proved, len(conns))
	for _, conn := range conns {
		go func() {
			p, err := c.prove(ctx, conn, seen)
			p.err = err
			results <- p
		}()
	}
	var late <-chan time.Time
	waiting := slices.Clone(conns)
	for len(waiting) > 0 {
		select {
		case p := <-results:
			waiting = slices.DeleteFunc(waiting, func(c *conn) bool { return c == p.conn })
			if p.err != nil {
				view.Failures = append(view.Failures, Failure{p.conn.server.Address, p.err})
				continue
			}
			good = append(good, p)
			if late == nil {
				late = time.After(grace)
			}
		case <-late:
			for _, conn := range waiting {
				view.Failures = append(view.Failures, Failure{conn.server.Address, errors.New("it is slower than the others")})
			}
			waiting = nil
		}
	}
	for _, p := range good {
		for _, q := range append(good, proved{head: Head{Block: seen.Last}}) {
			if p.head.Block.SeqNo == q.head.Block.SeqNo && p.head.Block != q.head.Block {
				return nil, fmt.Errorf("%w: block %d", ErrFork, p.head.Block.SeqNo)
			}
		}
	}
	slices.SortStableFunc(good, func(a, b proved) int { return int(int64(b.head.Block.SeqNo) - int64(a.head.Block.SeqNo)) })
	return good, nil
}

// adopt makes the newest of what was proved the view's head, and remembers it.
func (c *Client) adopt(view *View, good []proved) error {
	view.Head, view.chain = good[0].head, good[0].chain
	for _, p := range good {
		view.conns = append(view.conns, p.conn)
	}
	return c.options.Memory.Update(func(s *Seen) error {
		if s.Pin != c.network.KeyBlock {
			return nil // another process trusts another block
		}
		if view.Head.Block.SeqNo >= s.Last.SeqNo {
			if view.Head.Time < s.Time {
				return fmt.Errorf("%w: block %d is older than one before it", ErrBackwards, view.Head.Block.SeqNo)
			}
			s.Last, s.Time = view.Head.Block, view.Head.Time
		}
		if good[0].key.SeqNo > s.KeyBlock.SeqNo {
			s.KeyBlock = good[0].key
		}
		return nil
	})
}

// each asks the liteservers that proved the head, one after the other, until one
// can be used.
func (v *View) each(ctx context.Context, use func(*conn) error) error {
	var failures Failures
	for _, conn := range v.conns {
		err := use(conn)
		if err == nil {
			v.Failures = append(v.Failures, failures...)
			return nil
		}
		failures = append(failures, Failure{conn.server.Address, err})
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return failures
}

// Account proves an account, with all of its data. It may be inactive: have a
// balance and nothing else.
func (v *View) Account(ctx context.Context, addr Address) (a *Account, err error) {
	query := ton.GetAccountState{ID: v.Head.Block.ext(), Account: ton.AccountID{ID: addr.ID[:]}}
	err = v.each(ctx, func(conn *conn) error {
		answer, err := v.client.query(ctx, conn, query)
		if err != nil {
			return err
		}
		a, err = verifyAccount(v.Head, addr, answer)
		return err
	})
	return a, err
}

func verifyAccount(head Head, addr Address, answer []byte) (*Account, error) {
	state, err := parse[ton.AccountState](answer)
	if err != nil {
		return nil, err
	}
	if err := sameHead(head, state.ID); err != nil {
		return nil, err
	}
	found, err := proveAccount(head.Block, addr, state.Shard, state.ShardProof, state.Proof)
	if err != nil {
		return nil, err
	}
	if state.State == nil || [32]byte(state.State.Hash()) != [32]byte(found.Account.Hash(0)) {
		return nil, fmt.Errorf("%w: the state is not the one that is proved", ErrProof)
	}
	return readAccount(state.State, found, addr, head)
}

func sameHead(head Head, id *ton.BlockIDExt) error {
	got, err := blockID(id)
	if err != nil {
		return err
	}
	if got != head.Block {
		return fmt.Errorf("%w: the answer is about block %d, not %d", ErrProof, got.SeqNo, head.Block.SeqNo)
	}
	return nil
}

// ProveFrom proves the last block from a key block of the caller's choice, whatever
// the client remembers, for somebody else who trusts that block. Chain then returns
// the whole proof.
func (c *Client) ProveFrom(ctx context.Context, key BlockID) (*View, error) {
	view := &View{client: c}
	for _, conn := range c.conns {
		p, err := c.prove(ctx, conn, Seen{Pin: key, KeyBlock: key, Last: key})
		if err != nil {
			view.Failures = append(view.Failures, Failure{conn.server.Address, err})
			continue
		}
		// Nothing of it is remembered: the block is the caller's, not the client's.
		view.Head, view.chain, view.conns = p.head, p.chain, append(view.conns, conn)
		return view, nil
	}
	return nil, view.Failures
}

// Chain is what proves the view's head from the key block that the client began at:
// liteservers' answers, for VerifyChain.
func (v *View) Chain() [][]byte { return v.chain }

// VerifyChain verifies what Chain returned, and that the head is no older than
// maxAge.
func VerifyChain(key, head BlockID, globalID int32, chain [][]byte, maxAge time.Duration, now time.Time) (Head, error) {
	h := Head{Block: head}
	c := Client{options: Options{MaxAge: maxAge, Now: func() time.Time { return now }}}
	if len(chain) == 0 || len(chain) > maxRounds {
		return h, fmt.Errorf("%w: it has %d parts", ErrProof, len(chain))
	}
	if head == key {
		if len(chain) != 1 {
			return h, fmt.Errorf("%w: it has %d parts", ErrProof, len(chain))
		}
		var err error
		h.Time, err = keyHeader(chain[0], head, globalID)
		return h, c.timely(h, err)
	}
	for i, answer := range chain {
		part, err := parse[ton.PartialBlockProof](answer)
		if err != nil {
			return h, err
		}
		var last link
		if key, last, err = walk(key, part, head, globalID); err != nil {
			return h, err
		}
		if last.to == head {
			if i != len(chain)-1 {
				return h, fmt.Errorf("%w: something follows it", ErrProof)
			}
			h.Time = last.time
			return h, c.timely(h, nil)
		}
	}
	return h, fmt.Errorf("%w: it does not reach block %d", ErrProof, head.SeqNo)
}

// VerifyMethod verifies an answer that View.MethodAnswer returned.
func VerifyMethod(head Head, addr Address, code [32]byte, answer []byte) (*Account, error) {
	return verifyMethod(head, addr, code, answer)
}

// Method proves of an account what a get-method reads. The liteserver runs it to
// find that out; its result is not even asked for. The account's code must have
// this hash.
func (v *View) Method(ctx context.Context, addr Address, code [32]byte, method string, args ...*big.Int) (*Account, error) {
	a, _, err := v.MethodAnswer(ctx, addr, code, method, args...)
	return a, err
}

// MethodAnswer is Method, and returns the liteserver's answer too, for VerifyMethod.
func (v *View) MethodAnswer(ctx context.Context, addr Address, code [32]byte, method string, args ...*big.Int) (a *Account, answer []byte, err error) {
	query, err := methodQuery(v.Head.Block, addr, method, args)
	if err != nil {
		return nil, nil, err
	}
	err = v.each(ctx, func(conn *conn) error {
		if answer, err = v.client.query(ctx, conn, query); err != nil {
			return err
		}
		a, err = verifyMethod(v.Head, addr, code, answer)
		return err
	})
	return a, answer, err
}

func methodQuery(block BlockID, addr Address, method string, args []*big.Int) (ton.RunSmcMethod, error) {
	var values []any
	for _, arg := range args {
		values = append(values, arg)
	}
	params, err := stack(values)
	return ton.RunSmcMethod{
		Mode: 3, // proofs of the block, and of the state; no result
		ID:   block.ext(), Account: ton.AccountID{ID: addr.ID[:]},
		MethodID: tlb.MethodNameHash(method), Params: params,
	}, err
}

func verifyMethod(head Head, addr Address, code [32]byte, answer []byte) (a *Account, err error) {
	result, err := parse[ton.RunMethodResult](answer)
	if err != nil {
		return nil, err
	}
	if err := sameHead(head, result.ID); err != nil {
		return nil, err
	}
	found, err := proveAccount(head.Block, addr, result.ShardBlock, result.ShardProof, result.Proof)
	if err != nil {
		return nil, err
	}
	err = checked("state proof", func() error {
		if result.StateProof == nil && result.ExitCode == ton.ErrCodeContractNotInitialized {
			return fmt.Errorf("%w: %s, as far as the liteserver says", ErrInactive, addr)
		}
		if result.StateProof == nil {
			return fmt.Errorf("%w: it is not there", ErrProof)
		}
		root, err := cell.UnwrapProofVirtualized(result.StateProof, found.Account.Hash(0))
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		a, err = readAccount(root, found, addr, head)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !a.Active {
		return nil, fmt.Errorf("%w: %s", ErrInactive, addr)
	}
	if a.Code != code {
		return nil, fmt.Errorf("%w: at %s it has the hash %x, not %x", ErrCode, addr, a.Code, code)
	}
	return a, nil
}

// Config proves parameters of the network's configuration; what is not there is
// left out.
func (v *View) Config(ctx context.Context, params ...int32) (config map[int32]*cell.Cell, err error) {
	err = v.each(ctx, func(conn *conn) error {
		answer, err := v.client.query(ctx, conn, ton.GetConfigParams{BlockID: v.Head.Block.ext(), Params: params})
		if err != nil {
			return err
		}
		config, err = verifyConfig(v.Head, answer, params)
		return err
	})
	return config, err
}

func verifyConfig(head Head, answer []byte, params []int32) (config map[int32]*cell.Cell, err error) {
	info, err := parse[ton.ConfigAll](answer)
	if err != nil {
		return nil, err
	}
	if err := sameHead(head, info.ID); err != nil {
		return nil, err
	}
	err = checked("configuration", func() error {
		block, err := parseBOC(info.StateProof, 1)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		state, err := parseBOC(info.ConfigProof, 1)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		extra, err := ton.CheckShardMcStateExtraProof(head.Block.ext(), []*cell.Cell{block[0], state[0]})
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProof, err)
		}
		config = map[int32]*cell.Cell{}
		for _, id := range params {
			value, err := extra.ConfigParams.Config.Params.LoadValueByIntKey(big.NewInt(int64(id)))
			if errors.Is(err, cell.ErrNoSuchKeyInDict) {
				continue
			}
			if err != nil {
				return fmt.Errorf("%w: parameter %d: %w", ErrProof, id, err)
			}
			if config[id], err = value.LoadRefCell(); err != nil {
				return fmt.Errorf("%w: parameter %d: %w", ErrProof, id, err)
			}
			if config[id].IsSpecial() {
				return fmt.Errorf("%w: parameter %d is left out", ErrProof, id)
			}
		}
		return nil
	})
	return config, err
}

// Send hands an external message to every liteserver at once, and returns when
// one has taken it, which promises nothing, or all have refused.
func (c *Client) Send(ctx context.Context, message *cell.Cell) error {
	boc := message.ToBOC()
	results := make(chan Failure, len(c.conns))
	for _, conn := range c.conns {
		go func() {
			results <- Failure{conn.server.Address, func() error {
				answer, err := c.query(ctx, conn, ton.SendMessage{Body: boc})
				if err != nil {
					return err
				}
				status, err := parse[ton.SendMessageStatus](answer)
				if err == nil && status.Status != 1 {
					err = fmt.Errorf("status %d", status.Status)
				}
				return err
			}()}
		}()
	}
	var failures Failures
	for range c.conns {
		f := <-results
		if f.Err == nil {
			return nil
		}
		failures = append(failures, f)
	}
	return failures
}
