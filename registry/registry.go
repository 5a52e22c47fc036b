// Package registry publishes records of what may be measured on TON, and reads
// them without trusting anyone but the publisher: not the liteservers that answer,
// not the network on the way.
//
// What a reader gets is proved: the key block that it trusts, the validators'
// signatures since then, the last block's age, the registry's code and data
// (package lite), and that a record's bytes are those that the publisher and the
// auditors vouch for. Which publishers and auditors count is the reader's policy.
package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/xssnick/tonutils-go/tlb"

	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// Errors of records that must not be relied on.
var (
	ErrNoRecord    = contract.ErrNoRecord
	ErrMismatch    = errors.New("the record is not what the registry says it is")
	ErrRevoked     = errors.New("the record is revoked")
	ErrDeprecated  = errors.New("the record is deprecated")
	ErrNotYet      = errors.New("the record is not valid yet")
	ErrExpired     = errors.New("the record has expired")
	ErrSignatures  = errors.New("too few auditors have signed the record")
	ErrOtherKind   = errors.New("the record is of another kind")
	ErrNotRegistry = errors.New("the contract is not a registry")
)

// KeyFunc derives a record's key from its bytes.
type KeyFunc func(kind contract.Kind, record []byte) ([32]byte, error)

// codeHash is what every registry's code has.
var codeHash = [32]byte(contract.Code().Hash())

// Key is a record's key, in hexadecimal as text.
type Key [32]byte

func (k Key) String() string { return hex.EncodeToString(k[:]) }

// MarshalText implements encoding.TextMarshaler.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *Key) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != 32 {
		return fmt.Errorf("%q is not a key of 64 hexadecimal digits", text)
	}
	*k = Key(b)
	return nil
}

// Entry is what a registry says of a record.
type Entry struct {
	Key        Key       `json:"key"`
	Kind       string    `json:"kind"`
	Status     string    `json:"status"`
	NotBefore  time.Time `json:"not_before"`
	NotAfter   time.Time `json:"not_after"`
	Seqno      uint64    `json:"seqno"`
	SHA256     Key       `json:"sha256"` // of the record
	Signatures int       `json:"signatures"`

	kind   contract.Kind
	status contract.Status
}

func entry(e contract.Entry) Entry {
	return Entry{
		Key: e.Key, Kind: e.Kind.String(), Status: e.Status.String(),
		NotBefore: time.Unix(int64(e.NotBefore), 0).UTC(), NotAfter: time.Unix(int64(e.NotAfter), 0).UTC(),
		Seqno: e.Seqno, SHA256: e.Hash, Signatures: e.Signatures, kind: e.Kind, status: e.Status,
	}
}

// ContractKind is the entry's kind.
func (e Entry) ContractKind() contract.Kind { return e.kind }

// ContractStatus is the entry's status.
func (e Entry) ContractStatus() contract.Status { return e.status }

// A Record is one that was read with proofs.
type Record struct {
	Entry
	Registry lite.Address `json:"registry"`
	Block    lite.BlockID `json:"block"` // that it was read at
	Time     time.Time    `json:"time"`  // of that block
	Bytes    []byte       `json:"-"`

	// Auditors are those whose signatures over this record verify.
	Auditors []Key `json:"auditors"`
}

// A Reader reads registries of one network.
type Reader struct {
	Client *lite.Client
	Key    KeyFunc // checks that a record's key is its own; nil leaves that to the caller
}

// Record proves a record and its signatures as of a view. The error is ErrNoRecord
// if the registry has none, which is proved as well.
func (r *Reader) Record(ctx context.Context, view *lite.View, registry lite.Address, key Key) (*Record, error) {
	account, err := view.Method(ctx, registry, codeHash, "record", number(key))
	if err != nil {
		return nil, notRegistry(err)
	}
	var signed *lite.Account
	if e, _, err := contract.Registry(account.Data).Record(key); err == nil && e.Signatures > 0 {
		if signed, err = view.Method(ctx, registry, codeHash, "signatures", number(key)); err != nil {
			return nil, notRegistry(err)
		}
	}
	return readRecord(account, signed, key, r.Client.Network().GlobalID, r.Key)
}

// readRecord reads what the proofs of the two methods hold; signed is nil if there
// are no signatures.
func readRecord(account, signed *lite.Account, key Key, globalID int32, derive KeyFunc) (*Record, error) {
	e, data, err := contract.Registry(account.Data).Record(key)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(data) != e.Hash {
		return nil, fmt.Errorf("%w: its SHA-256 is another", ErrMismatch)
	}
	if derive != nil {
		derived, err := derive(e.Kind, data)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMismatch, err)
		}
		if Key(derived) != key {
			return nil, fmt.Errorf("%w: its key is %v", ErrMismatch, Key(derived))
		}
	}
	record := &Record{
		Entry: entry(e), Registry: account.Address, Block: account.Head.Block,
		Time: time.Unix(int64(account.Head.Time), 0).UTC(), Bytes: data, Auditors: []Key{},
	}
	if e.Signatures == 0 {
		return record, nil
	}
	if signed == nil {
		return nil, fmt.Errorf("%w: its signatures are missing", ErrMismatch)
	}
	list, err := contract.Registry(signed.Data).Signatures(key)
	if err != nil {
		return nil, err
	}
	hash := contract.SignedHash(globalID, account.Address.Std(), key, e.Hash)
	for _, s := range list {
		if ed25519.Verify(s.PublicKey[:], hash[:], s.Signature[:]) {
			record.Auditors = append(record.Auditors, s.PublicKey)
		}
	}
	return record, nil
}

func number(key Key) *big.Int { return new(big.Int).SetBytes(key[:]) }

// notRegistry says what is wrong with the address, where it is the address.
func notRegistry(err error) error {
	if errors.Is(err, lite.ErrCode) || errors.Is(err, lite.ErrInactive) {
		return fmt.Errorf("%w: %w", ErrNotRegistry, err)
	}
	return err
}

// pageSize is how many entries one proof has.
const pageSize = 100

// maxRecords bounds what List reads.
const maxRecords = 10_000

// List proves every entry of a registry, without the records themselves.
func (r *Reader) List(ctx context.Context, view *lite.View, registry lite.Address) ([]Entry, error) {
	list := []Entry{}
	var after *[32]byte
	from := big.NewInt(-1)
	for len(list) < maxRecords {
		account, err := view.Method(ctx, registry, codeHash, "records", from, big.NewInt(pageSize))
		if err != nil {
			return nil, notRegistry(err)
		}
		page, err := contract.Registry(account.Data).Records(after, pageSize)
		if err != nil {
			return nil, err
		}
		for _, e := range page {
			list = append(list, entry(e))
		}
		if len(page) < pageSize {
			return list, nil
		}
		last := page[len(page)-1].Key
		after, from = &last, number(last)
	}
	return nil, fmt.Errorf("the registry has more than %d records", maxRecords)
}

// Info is what a registry says of itself.
type Info struct {
	Address   lite.Address `json:"address"`
	Owner     lite.Address `json:"owner"`
	Pending   string       `json:"pending_owner,omitempty"`
	Seqno     uint64       `json:"seqno"`
	Records   uint64       `json:"records"`
	Balance   uint64       `json:"balance"` // nanotons
	YearlyFee uint64       `json:"yearly_rent"`
	PaidUntil time.Time    `json:"paid_until"`
	Block     lite.BlockID `json:"block"`
	Time      time.Time    `json:"time"`
}

// ADay short of a year's rent, a registry should be topped up.
const year = 365 * 24 * time.Hour

// PaysForAYear tells whether the balance lasts for a year from the block on.
func (i *Info) PaysForAYear() bool { return i.PaidUntil.Sub(i.Time) >= year-24*time.Hour }

// Info proves a registry's owner, its size, and for how long its rent is paid at
// the network's present prices.
func (r *Reader) Info(ctx context.Context, view *lite.View, registry lite.Address) (*Info, error) {
	account, err := view.Method(ctx, registry, codeHash, "state")
	if err != nil {
		return nil, notRegistry(err)
	}
	// The owner is in the same cells.
	m := contract.Registry(account.Data)
	info := &Info{
		Address: registry, Balance: account.Balance,
		Block: account.Head.Block, Time: time.Unix(int64(account.Head.Time), 0).UTC(),
	}
	if info.Seqno, info.Records, err = m.State(); err != nil {
		return nil, err
	}
	owner, pending, err := m.Owner()
	if err != nil {
		return nil, err
	}
	if info.Owner, err = lite.AddressOf(owner); err != nil {
		return nil, err
	}
	if pending != nil {
		info.Pending = pending.Bounce(true).String()
	}
	prices, err := storagePrices(ctx, view)
	if err != nil {
		return nil, err
	}
	fee := prices.ComputeStorageFee(false, uint64(year/time.Second), account.Bits, account.Cells)
	info.YearlyFee = fee.Uint64()
	paid := time.Duration(1<<62 - 1) // 146 years
	if info.YearlyFee > 0 {
		if years := float64(account.Balance) / float64(info.YearlyFee); years < 100 {
			paid = time.Duration(years * float64(year))
		}
	}
	info.PaidUntil = time.Unix(int64(account.LastPaid), 0).Add(paid).UTC().Truncate(time.Second)
	return info, nil
}

// storagePrices are those that hold at the view.
func storagePrices(ctx context.Context, view *lite.View) (prices tlb.ConfigStoragePrices, err error) {
	config, err := view.Config(ctx, 18)
	if err != nil {
		return prices, err
	}
	if config[18] == nil {
		return prices, errors.New("the network's configuration has no prices of storage")
	}
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the prices of storage are malformed: %v", r)
		}
	}()
	items, err := config[18].AsDict(32).LoadAll()
	if err != nil {
		return prices, err
	}
	for _, item := range items {
		var p tlb.ConfigStoragePrices
		if err := tlb.LoadFromCell(&p, item.Value); err != nil {
			return prices, err
		}
		if p.ValidSince <= view.Head.Time && p.ValidSince >= prices.ValidSince {
			prices = p
		}
	}
	return prices, nil
}

// A Policy is what a reader demands of a record.
type Policy struct {
	Auditors        []Key // whose signatures count
	Signatures      int   // how many of them there must be
	AllowDeprecated bool
}

// Check says why a record must not be relied on at this time, or nil.
func (p Policy) Check(r *Record, now time.Time) error {
	switch {
	case r.status == contract.Revoked:
		return ErrRevoked
	case r.status == contract.Deprecated && !p.AllowDeprecated:
		return ErrDeprecated
	case r.status != contract.Active && r.status != contract.Deprecated:
		return fmt.Errorf("%w: %s", ErrMismatch, r.Status)
	case now.Before(r.NotBefore):
		return fmt.Errorf("%w: it is from %s on", ErrNotYet, r.NotBefore.Format(time.RFC3339))
	case now.After(r.NotAfter):
		return fmt.Errorf("%w: it was valid until %s", ErrExpired, r.NotAfter.Format(time.RFC3339))
	}
	count := 0
	for _, a := range slices.Compact(slices.SortedFunc(slices.Values(p.Auditors), func(a, b Key) int { return slices.Compare(a[:], b[:]) })) {
		if slices.Contains(r.Auditors, a) {
			count++
		}
	}
	if count < p.Signatures {
		return fmt.Errorf("%w: %d of the %d that the policy demands", ErrSignatures, count, p.Signatures)
	}
	return nil
}
