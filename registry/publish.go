package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"time"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/registry/contract"
	"chrysalis/registry/ledger"
	"chrysalis/registry/lite"
)

// What is attached to a message, in nanotons; what it does not take comes back in
// the same transaction. It is enough at twice the gas prices of 2025, which were six
// times those of 2026.
const (
	initValue = 100_000_000
	putValue  = 50_000_000
	callValue = 30_000_000
)

// Errors of messages.
var (
	ErrNotOwner = errors.New("the registry belongs to another wallet")
	ErrNoFunds  = errors.New("the wallet has not enough money")
	ErrRefused  = errors.New("the contract would refuse the message")
	ErrExpiry   = errors.New("the message was not executed in time, and cannot be any more; nothing was spent")
	ErrUnknown  = errors.New("whether the message was executed is not known")
)

// A Publisher sends messages to one registry.
type Publisher struct {
	Reader   Reader
	Wallet   *Wallet
	Registry lite.Address

	// Progress is told what goes on; nil is nobody.
	Progress func(what string)
	// Wait is how long a confirmation is waited for; 0 is messageLife and a minute.
	Wait time.Duration
}

// An Operation is something to be done to a contract, once.
type Operation struct {
	Name  string
	Value uint64                            // attached, nanotons
	To    func(p *Publisher) lite.Address   // nil is the publisher's registry
	Init  func(p *Publisher) *tlb.StateInit // nil where the contract is there
	Body  func(p *Publisher, queryID uint64) (*cell.Cell, error)

	// Explain says what an exit code of the contract means; nil is contract.Explain.
	Explain func(exitCode int32) string

	// Done reports, with words, whether nothing is left to do. Its error is a reason
	// not to send anything.
	Done func(ctx context.Context, p *Publisher, view *lite.View) (why string, err error)
}

func (op *Operation) to(p *Publisher) lite.Address {
	if op.To != nil {
		return op.To(p)
	}
	return p.Registry
}

// A Plan is a message that is ready to be sent.
type Plan struct {
	Operation string       `json:"operation"`
	From      lite.Address `json:"from"`
	To        lite.Address `json:"to"`                      // of a batch, the first one's
	Nothing   string       `json:"nothing_to_do,omitempty"` // why nothing is to be sent
	Batch     int          `json:"batch,omitempty"`         // how many operations one message of the wallet does

	Value   uint64 `json:"value"`   // attached, nanotons
	Cost    uint64 `json:"cost"`    // what the wallet is poorer by at the end, as run on this machine
	Balance uint64 `json:"balance"` // of the wallet
	Body    []byte `json:"body"`    // bag of cells; of a batch, the first one's

	operations []Operation // that are to be done
	message    *cell.Cell
	seqno      uint32
	until      time.Time
}

func (p *Publisher) progress(format string, args ...any) {
	if p.Progress != nil {
		p.Progress(fmt.Sprintf(format, args...))
	}
}

// Plan reads what there is, and makes the message and runs it on this machine. It
// sends nothing.
func (p *Publisher) Plan(ctx context.Context, op Operation) (*Plan, error) {
	return p.plan(ctx, &Plan{Operation: op.Name}, []Operation{op})
}

// PlanBatch is Plan for as many operations as the wallet's MaxBatch. Those that have
// been done already are left out.
func (p *Publisher) PlanBatch(ctx context.Context, name string, ops []Operation) (*Plan, error) {
	if len(ops) == 0 || len(ops) > p.Wallet.MaxBatch() {
		return nil, fmt.Errorf("a wallet %s sends from 1 to %d messages at once, not %d", p.Wallet.version, p.Wallet.MaxBatch(), len(ops))
	}
	return p.plan(ctx, &Plan{Operation: name, Batch: len(ops)}, ops)
}

func (p *Publisher) plan(ctx context.Context, plan *Plan, ops []Operation) (*Plan, error) {
	p.progress("reading the contract")
	view, err := p.Reader.Client.Sync(ctx)
	if err != nil {
		return nil, err
	}
	plan.From, plan.To = p.Wallet.Address, ops[0].to(p)
	for _, op := range ops {
		nothing, err := op.Done(ctx, p, view)
		if err != nil {
			return plan, err
		}
		if nothing != "" {
			plan.Nothing = nothing
			continue
		}
		plan.operations = append(plan.operations, op)
		plan.Value += op.Value
	}
	if len(plan.operations) == 0 {
		if len(ops) == 1 {
			plan.Value = ops[0].Value
		}
		return plan, nil
	}
	plan.Nothing = ""
	wallet, err := view.Account(ctx, p.Wallet.Address)
	if errors.Is(err, lite.ErrNoAccount) {
		return nil, fmt.Errorf("%w: %s has nothing; send at least %s to it", ErrNoFunds, p.walletAddress(), TON(plan.Value+callValue))
	}
	if err != nil {
		return nil, err
	}
	plan.Balance = wallet.Balance
	if plan.seqno, err = p.Wallet.readSeqno(wallet); err != nil {
		return nil, err
	}
	var id [8]byte
	rand.Read(id[:])
	var outs []*tlb.InternalMessage
	for i, op := range plan.operations {
		body, err := op.Body(p, binary.BigEndian.Uint64(id[:])+uint64(i))
		if err != nil {
			return nil, err
		}
		if i == 0 {
			plan.To, plan.Body = op.to(p), body.ToBOC()
		}
		out := &tlb.InternalMessage{
			IHRDisabled: true, Bounce: op.Init == nil, DstAddr: op.to(p).Std().Bounce(op.Init == nil),
			Amount: tlb.FromNanoTONU(op.Value), Body: body,
		}
		if op.Init != nil {
			out.StateInit = op.Init(p)
		}
		outs = append(outs, out)
	}
	plan.until = time.Now().Add(messageLife)
	if plan.message, err = p.Wallet.message(ctx, plan.seqno, !wallet.Active, outs); err != nil {
		return nil, err
	}
	if need := plan.Value + callValue/10*uint64(len(outs)); wallet.Balance < need {
		return nil, fmt.Errorf("%w: %s has %s, %s more is needed (most of it comes back); send it there",
			ErrNoFunds, p.walletAddress(), TON(wallet.Balance), TON(need-wallet.Balance))
	}
	p.progress("running the message on this machine")
	return plan, p.rehearse(ctx, view, plan, wallet)
}

// walletAddress is shown for others to send money to.
func (p *Publisher) walletAddress() string { return p.Wallet.Address.Std().Bounce(false).String() }

// feeParams are the parameters of a network's configuration that executing a
// message depends on.
var feeParams = []int32{0, 5, 8, 12, 18, 19, 20, 21, 24, 25, 31, 43, 44, 45}

// Ledger has accounts as they were proved, and the network's prices at the view, to
// run messages on.
func Ledger(ctx context.Context, view *lite.View, accounts ...*lite.Account) (l *ledger.Ledger, err error) {
	config, err := view.Config(ctx, feeParams...)
	if err != nil {
		return nil, err
	}
	defer func() {
		if r := recover(); r != nil {
			l, err = nil, fmt.Errorf("the network's prices or the accounts are malformed: %v", r)
		}
	}()
	params := cell.NewDict(32)
	for id, value := range config {
		if err := params.SetIntKey(big.NewInt(int64(id)), cell.BeginCell().MustStoreRef(value).EndCell()); err != nil {
			return nil, err
		}
	}
	if l, err = ledger.New(params.AsCell()); err != nil {
		return nil, err
	}
	for _, a := range accounts {
		if err := l.Add(a.Address.ID, a.Shard); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// rehearse runs the message on the proved state at the network's prices.
func (p *Publisher) rehearse(ctx context.Context, view *lite.View, plan *Plan, wallet *lite.Account) (err error) {
	accounts := []*lite.Account{wallet}
	missing := map[[32]byte]*Operation{} // that no transaction has reached yet
	for i := range plan.operations {
		to := plan.operations[i].to(p)
		missing[to.ID] = &plan.operations[i]
		account, err := view.Account(ctx, to)
		if err != nil && !errors.Is(err, lite.ErrNoAccount) {
			return err
		}
		if account != nil {
			accounts = append(accounts, account)
		}
	}
	l, err := Ledger(ctx, view, accounts...)
	if err != nil {
		return err
	}
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the message cannot be run on this machine: %v", r)
		}
	}()
	txs, changed, err := l.Run(plan.message, max(view.Head.Time, wallet.LastPaid), wallet.Shard.LastTransLT+1_000_000)
	if errors.Is(err, ledger.ErrNotAccepted) {
		return fmt.Errorf("%w: the wallet %s does not accept it; is the key the right one?", ErrRefused, p.walletAddress())
	}
	if err != nil {
		return err
	}
	for _, tx := range txs {
		op := missing[tx.Account]
		if op == nil {
			continue
		}
		delete(missing, tx.Account)
		if tx.Exit != 0 {
			explain := op.Explain
			if explain == nil {
				explain = contract.Explain
			}
			if plan.Batch > 0 {
				return fmt.Errorf("%w: %s: %s", ErrRefused, op.Name, explain(tx.Exit))
			}
			return fmt.Errorf("%w: %s", ErrRefused, explain(tx.Exit))
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: the wallet %s has %s, which does not cover %s and the fees", ErrNoFunds, p.walletAddress(), TON(wallet.Balance), TON(plan.Value))
	}
	if after := balance(changed, p.Wallet.Address); after < wallet.Balance {
		plan.Cost = wallet.Balance - after
	}
	return nil
}

func balance(accounts map[[32]byte]*tvm.PreparedAccount, a lite.Address) uint64 {
	if found := accounts[a.ID]; found != nil && found.State().Balance.Nano().IsUint64() {
		return found.State().Balance.Nano().Uint64()
	}
	return 0
}

// TON writes nanotons as TON.
func TON(nano uint64) string {
	return fmt.Sprintf("%s TON", tlb.FromNanoTONU(nano).String())
}

// Do plans an operation and sends it, and waits until it is proved to be done. The
// plan says so if there was nothing to do.
func (p *Publisher) Do(ctx context.Context, op Operation) (*Plan, error) {
	plan, err := p.Plan(ctx, op)
	if err != nil || plan.Nothing != "" {
		return plan, err
	}
	return plan, p.Send(ctx, plan)
}

// Send sends a plan's message once, and waits until what it should do is proved to
// be done. The wallet's number in the message keeps it from being executed twice,
// whoever sends it again.
//
// The error is ErrExpiry if it is proved that the message can never be executed, and
// ErrUnknown if nothing is proved: reading the registry tells, and sending again is
// safe once it does.
func (p *Publisher) Send(ctx context.Context, plan *Plan) error {
	p.progress("sending to %d liteservers", len(p.Reader.Client.Network().Liteservers))
	sent := p.Reader.Client.Send(ctx, plan.message)
	if sent != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ErrUnknown, sent)
	}
	// Even of a message that all refuse one may have passed it on.
	wait := p.Wait
	if wait == 0 {
		wait = messageLife + time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	p.progress("waiting for the confirmation")
	pause := 50 * time.Millisecond
	var last error
	left := plan.operations
	for executed := 0; ; {
		view, err := p.Reader.Client.Sync(ctx)
		for err == nil && len(left) > 0 {
			var why string
			if why, err = left[0].Done(ctx, p, view); why == "" {
				break
			}
			left = left[1:]
		}
		if err == nil && len(left) == 0 {
			return nil
		}
		if err == nil {
			var wallet *lite.Account
			if wallet, err = view.Account(ctx, p.Wallet.Address); err == nil {
				var seqno uint32
				if seqno, err = p.Wallet.readSeqno(wallet); err == nil {
					switch {
					case seqno > plan.seqno:
						// The wallet has sent it; the registry runs it some blocks later.
						if executed++; executed == 15 {
							return fmt.Errorf("%w: the wallet sent it, and the registry has not done it; look again later, and if it stays so the money is back in the wallet", ErrUnknown)
						}
					case time.Unix(int64(view.Head.Time), 0).After(plan.until.Add(10 * time.Second)):
						return errors.Join(ErrExpiry, sent)
					case refusedByAll(sent):
						return fmt.Errorf("%w; should one have passed it on all the same, it can be executed until %s",
							sent, plan.until.UTC().Format(time.TimeOnly))
					}
				}
			}
		}
		if local, ok := errors.AsType[*fs.PathError](err); ok {
			// Asking again does not mend this machine's disk.
			return errors.Join(ErrUnknown, local, sent)
		}
		if err != nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ErrUnknown, last, sent)
		case <-time.After(pause):
		}
		pause = min(pause*2, 2*time.Second)
	}
}

// refusedByAll reports whether every liteserver said that it does not take a message.
// One that did not answer may have passed it on.
func refusedByAll(sent error) bool {
	failures, ok := errors.AsType[lite.Failures](sent)
	if !ok {
		return false
	}
	for _, f := range failures {
		if _, ok := errors.AsType[*lite.Error](f.Err); !ok {
			return false
		}
	}
	return true
}

// owner proves who owns the registry.
func (p *Publisher) owner(ctx context.Context, view *lite.View) (owner, pending lite.Address, err error) {
	account, err := view.Method(ctx, p.Registry, codeHash, "owner")
	if errors.Is(err, lite.ErrNoAccount) {
		return owner, pending, fmt.Errorf("%w: there is no registry at %s; the owner makes it with 'chrysalis registry init'", err, p.Registry)
	}
	if err != nil {
		return owner, pending, notRegistry(err)
	}
	o, next, err := contract.Registry(account.Data).Owner()
	if err != nil {
		return owner, pending, err
	}
	if next != nil {
		if pending, err = lite.AddressOf(next); err != nil {
			return owner, pending, err
		}
	}
	owner, err = lite.AddressOf(o)
	return owner, pending, err
}

// mine fails unless the wallet owns the registry.
func (p *Publisher) mine(ctx context.Context, view *lite.View) error {
	owner, _, err := p.owner(ctx, view)
	if err == nil && owner != p.Wallet.Address {
		err = fmt.Errorf("%w: %s, and this is %s", ErrNotOwner, owner, p.Wallet.Address)
	}
	return err
}

// current proves an entry, for operations that change it.
func (p *Publisher) current(ctx context.Context, view *lite.View, key Key) (contract.Entry, error) {
	account, err := view.Method(ctx, p.Registry, codeHash, "record", number(key))
	if err != nil {
		return contract.Entry{}, notRegistry(err)
	}
	e, _, err := contract.Registry(account.Data).Record(key)
	return e, err
}

// AddressOfWallet is where the registry is that a wallet makes.
func AddressOfWallet(w *Wallet) lite.Address {
	a, err := lite.AddressOf(contract.Address(w.Address.Std()))
	if err != nil {
		panic(err) // it is in the basechain
	}
	return a
}

// Init makes the wallet's registry.
func Init() Operation {
	return Operation{
		Name: "init", Value: initValue,
		To:   func(p *Publisher) lite.Address { return AddressOfWallet(p.Wallet) },
		Init: func(p *Publisher) *tlb.StateInit { return contract.StateInit(p.Wallet.Address.Std()) },
		Body: func(*Publisher, uint64) (*cell.Cell, error) { return cell.BeginCell().EndCell(), nil },
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			account, err := view.Account(ctx, AddressOfWallet(p.Wallet))
			if errors.Is(err, lite.ErrNoAccount) || err == nil && !account.Active {
				return "", nil
			}
			if err != nil {
				return "", err
			}
			if account.Code != codeHash {
				return "", fmt.Errorf("%w: %s", ErrNotRegistry, account.Address)
			}
			return fmt.Sprintf("the registry %s is there", account.Address), nil
		},
	}
}

// TopUp pays a registry's rent ahead, from any wallet.
func TopUp(nano uint64) Operation {
	var before uint64
	return Operation{
		Name: "top-up", Value: nano,
		Body: func(*Publisher, uint64) (*cell.Cell, error) { return cell.BeginCell().EndCell(), nil },
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			if _, _, err := p.owner(ctx, view); err != nil {
				return "", err
			}
			account, err := view.Account(ctx, p.Registry)
			if err != nil {
				return "", err
			}
			if before == 0 {
				before = account.Balance
			} else if account.Balance > before {
				return fmt.Sprintf("the registry has %s", TON(account.Balance)), nil
			}
			return "", nil
		},
	}
}

// A Publication is a record to be published.
type Publication struct {
	Kind      contract.Kind
	Key       Key
	Record    []byte // canonical JSON
	NotBefore time.Time
	NotAfter  time.Time

	// Keep leaves the validity of a record that is published already as it is, unless
	// less than keepFor of it is left.
	Keep bool
}

const keepFor = 30 * 24 * time.Hour

// Publish publishes a record, or changes its validity.
func Publish(r Publication) Operation {
	put := contract.Put{
		Key: r.Key, Kind: r.Kind, Record: r.Record,
		NotBefore: uint64(max(r.NotBefore.Unix(), 0)), NotAfter: uint64(max(r.NotAfter.Unix(), 0)),
	}
	return Operation{
		Name: fmt.Sprintf("publish %v %v", r.Kind, r.Key), Value: putValue,
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) { return put.Body(id) },
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			if _, err := put.Body(0); err != nil {
				return "", err
			}
			if now := time.Unix(int64(view.Head.Time), 0); !r.NotAfter.After(now) {
				return "", fmt.Errorf("%w: it would be valid until %s", ErrExpired, r.NotAfter.UTC().Format(time.RFC3339))
			}
			if p.Reader.Key != nil {
				key, err := p.Reader.Key(r.Kind, r.Record)
				if err != nil {
					return "", fmt.Errorf("the record: %w", err)
				}
				if Key(key) != r.Key {
					return "", fmt.Errorf("%w: its key is %v, not %v", ErrMismatch, Key(key), r.Key)
				}
			}
			if err := p.mine(ctx, view); err != nil {
				return "", err
			}
			e, err := p.current(ctx, view, r.Key)
			switch {
			case errors.Is(err, ErrNoRecord):
				return "", nil
			case err != nil:
				return "", err
			case e.Status == contract.Revoked:
				return "", fmt.Errorf("%w, which is final: %v", ErrRevoked, r.Key)
			case e.Kind != r.Kind:
				return "", fmt.Errorf("%w: the registry has it as %v", ErrOtherKind, e.Kind)
			case e.Status != contract.Active || e.Hash != sha256.Sum256(r.Record):
				return "", nil
			}
			keep := r.Keep && e.NotBefore <= uint64(view.Head.Time) && e.NotAfter >= min(put.NotAfter, uint64(view.Head.Time)+uint64(keepFor/time.Second))
			if keep || e.NotBefore == put.NotBefore && e.NotAfter == put.NotAfter {
				return fmt.Sprintf("%v %v is published, valid until %s", e.Kind, r.Key, time.Unix(int64(e.NotAfter), 0).UTC().Format(time.DateOnly)), nil
			}
			return "", nil
		},
	}
}

// Mark deprecates or revokes a record.
func Mark(key Key, status contract.Status) Operation {
	name := "deprecate"
	if status == contract.Revoked {
		name = "revoke"
	}
	return Operation{
		Name: fmt.Sprintf("%s %v", name, key), Value: callValue,
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) { return contract.SetStatus(id, key, status), nil },
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			if err := p.mine(ctx, view); err != nil {
				return "", err
			}
			e, err := p.current(ctx, view, key)
			if err != nil {
				return "", fmt.Errorf("%w: %v", err, key)
			}
			if e.Status == status {
				return fmt.Sprintf("%v %v is %v", e.Kind, key, status), nil
			}
			if e.Status == contract.Revoked {
				return "", fmt.Errorf("%w, which is final: %v", ErrRevoked, key)
			}
			return "", nil
		},
	}
}

// Cosign adds an auditor's signature over a record as it is published now. The hash
// must be that of the record that the auditor has checked.
func Cosign(key Key, record [32]byte, auditor ed25519.PrivateKey) Operation {
	public := [32]byte(auditor.Public().(ed25519.PublicKey))
	return Operation{
		Name: fmt.Sprintf("cosign %v", key), Value: callValue,
		Body: func(p *Publisher, id uint64) (*cell.Cell, error) {
			hash := contract.SignedHash(p.Reader.Client.Network().GlobalID, p.Registry.Std(), key, record)
			return contract.Cosign(id, key, record, public, [64]byte(ed25519.Sign(auditor, hash[:]))), nil
		},
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			if _, _, err := p.owner(ctx, view); err != nil {
				return "", err
			}
			r, err := p.Reader.Record(ctx, view, p.Registry, key)
			if err != nil {
				return "", fmt.Errorf("%w: %v", err, key)
			}
			if r.status == contract.Revoked {
				return "", fmt.Errorf("%w, which is final: %v", ErrRevoked, key)
			}
			if r.SHA256 != Key(record) {
				return "", fmt.Errorf("%w: the registry has one with the SHA-256 %v, and %v was checked", ErrMismatch, r.SHA256, Key(record))
			}
			for _, a := range r.Auditors {
				if a == Key(public) {
					return fmt.Sprintf("auditor %v has signed %v", a, key), nil
				}
			}
			return "", nil
		},
	}
}

// DropSignature takes an auditor's signature off a record.
func DropSignature(key, auditor Key) Operation {
	return Operation{
		Name: "drop-signature", Value: callValue,
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) {
			return contract.DropSignature(id, key, auditor), nil
		},
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			if err := p.mine(ctx, view); err != nil {
				return "", err
			}
			r, err := p.Reader.Record(ctx, view, p.Registry, key)
			if err != nil {
				return "", fmt.Errorf("%w: %v", err, key)
			}
			for _, a := range r.Auditors {
				if a == auditor {
					return "", nil
				}
			}
			return fmt.Sprintf("%v has no signature by %v", key, auditor), nil
		},
	}
}

// Transfer names who may become the registry's owner; nil names nobody.
func Transfer(to *lite.Address) Operation {
	return Operation{
		Name: "transfer", Value: callValue,
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) {
			if to == nil {
				return contract.Transfer(id, nil), nil
			}
			return contract.Transfer(id, to.Std()), nil
		},
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			owner, pending, err := p.owner(ctx, view)
			if err != nil {
				return "", err
			}
			if to != nil && owner == *to {
				return fmt.Sprintf("%s owns the registry", owner), nil
			}
			if owner != p.Wallet.Address {
				return "", fmt.Errorf("%w: %s, and this is %s", ErrNotOwner, owner, p.Wallet.Address)
			}
			switch {
			case to == nil && pending == lite.Address{}:
				return "nobody is named to become the owner", nil
			case to != nil && pending == *to:
				return fmt.Sprintf("%s is named; it becomes the owner with 'chrysalis registry accept'", pending), nil
			}
			return "", nil
		},
	}
}

// Accept makes the wallet the owner, if it was named.
func Accept() Operation {
	return Operation{
		Name: "accept", Value: callValue,
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) { return contract.Accept(id), nil },
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			owner, pending, err := p.owner(ctx, view)
			if err != nil {
				return "", err
			}
			if owner == p.Wallet.Address {
				return fmt.Sprintf("%s owns the registry", owner), nil
			}
			if (pending == lite.Address{}) {
				return "", fmt.Errorf("%w: %s, which has named nobody to become the owner", ErrNotOwner, owner)
			}
			if pending != p.Wallet.Address {
				return "", fmt.Errorf("%w: %s, which has named %s, and this is %s", ErrNotOwner, owner, pending, p.Wallet.Address)
			}
			return "", nil
		},
	}
}
