package contract

import (
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm"
	"github.com/xssnick/tonutils-go/tvm/cell"
	"github.com/xssnick/tonutils-go/tvm/tuple"
	"github.com/xssnick/tonutils-go/tvm/vm"
)

// MaxPage is how many records one call of the get-method records returns at most.
const MaxPage = 255

// methodGas bounds what a get-method may do, as liteservers do.
const methodGas = 1_000_000

// ErrNoRecord says that the registry has no record under a key.
var ErrNoRecord = errors.New("the registry has no such record")

// Entry is what the registry says of a record.
type Entry struct {
	Key        [32]byte
	Kind       Kind
	Status     Status
	NotBefore  uint64 // Unix time, seconds
	NotAfter   uint64
	Seqno      uint64   // of the registry's change that made the entry what it is
	Hash       [32]byte // SHA-256 of the record
	Signatures int      // how many there are
}

// Methods runs the get-methods of a contract in this process: this package's code
// on data that the caller has. No liteserver's result is believed.
type Methods struct {
	code *cell.Cell
	data *cell.Cell
}

// Registry runs the methods of a registry on its data, whole or as a proof.
func Registry(data *cell.Cell) Methods { return Methods{Code(), data} }

// machine is a TVM of the version that the contracts were compiled for. The
// methods read data only, so no more of a configuration is needed.
var machine = sync.OnceValues(func() (*tvm.PreparedBlockchainConfig, error) {
	params := cell.NewDict(32)
	version := cell.BeginCell().MustStoreUInt(0xc4, 8).MustStoreUInt(14, 32).MustStoreUInt(0, 64).EndCell()
	if err := params.SetIntKey(big.NewInt(8), cell.BeginCell().MustStoreRef(version).EndCell()); err != nil {
		return nil, err
	}
	return tvm.PrepareBlockchainConfig(params.AsCell())
})

// call runs a method and returns its results, the first one first.
func (m Methods) call(method string, args ...*big.Int) (results []any, err error) {
	defer func() {
		if r := recover(); r != nil {
			results, err = nil, fmt.Errorf("%s: the state is malformed: %v", method, r)
		}
	}()
	config, err := machine()
	if err != nil {
		return nil, err
	}
	stack := vm.NewStack()
	for _, arg := range append(slices.Clone(args), new(big.Int).SetUint64(tlb.MethodNameHash(method))) {
		if err := stack.PushAny(arg); err != nil {
			return nil, err
		}
	}
	run, err := tvm.NewTVM().ExecuteGetMethod(m.code, m.data, tuple.Tuple{}, vm.GasWithLimit(methodGas), stack, tvm.ExecutionConfig{Config: config})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	if run.ExitCode != 0 && run.ExitCode != 1 {
		return nil, fmt.Errorf("%s: the state is not a registry's, or the proof leaves out what the method reads (exit code %d)", method, run.ExitCode)
	}
	for run.Stack.Len() > 0 {
		v, err := run.Stack.PopAny()
		if err != nil {
			return nil, err
		}
		results = append(results, v)
	}
	slices.Reverse(results)
	return results, nil
}

// reader takes typed results one after the other and keeps the first error.
type reader struct {
	values []any
	err    error
}

func (r *reader) next() any {
	if r.err != nil {
		return nil
	}
	if len(r.values) == 0 {
		r.err = errors.New("the method returned too little")
		return nil
	}
	v := r.values[0]
	r.values = r.values[1:]
	return v
}

func (r *reader) integer(bits int) *big.Int {
	v, ok := r.next().(*big.Int)
	if !ok || v == nil || v.Sign() < 0 || v.BitLen() > bits {
		if r.err == nil {
			r.err = errors.New("the method returned no number where one belongs")
		}
		return new(big.Int)
	}
	return v
}

func (r *reader) uint(bits int) uint64 { return r.integer(bits).Uint64() }

// signed32 is a result that may be less than 0.
func signed32(value any) (int32, error) {
	v, ok := value.(*big.Int)
	if !ok || v == nil || !v.IsInt64() || v.Int64() != int64(int32(v.Int64())) {
		return 0, errors.New("the method returned no number where one belongs")
	}
	return int32(v.Int64()), nil
}

func (r *reader) hash() (h [32]byte) {
	r.integer(256).FillBytes(h[:])
	return h
}

func (r *reader) cell() *cell.Cell {
	c, _ := r.next().(*cell.Cell)
	return c
}

func (r *reader) address() *address.Address {
	s, ok := r.next().(*cell.Slice)
	if !ok || s == nil {
		return nil
	}
	a, err := s.LoadAddr()
	if err != nil && r.err == nil {
		r.err = err
	}
	return a
}

func (r *reader) entry() (e Entry) {
	e.Status, e.Kind = Status(r.uint(8)), Kind(r.uint(8))
	e.NotBefore, e.NotAfter, e.Seqno = r.uint(40), r.uint(40), r.uint(64)
	e.Hash = r.hash()
	e.Signatures = int(r.uint(8))
	return e
}

func (r *reader) end(method string) error {
	if r.err == nil && len(r.values) > 0 {
		r.err = errors.New("the method returned too much")
	}
	if r.err != nil {
		return fmt.Errorf("%s: %w", method, r.err)
	}
	return nil
}

func number(b [32]byte) *big.Int { return new(big.Int).SetBytes(b[:]) }

// Version is the version of the contract.
func (m Methods) Version() (uint64, error) {
	values, err := m.call("version")
	if err != nil {
		return 0, err
	}
	r := reader{values: values}
	v := r.uint(32)
	return v, r.end("version")
}

// Owner returns the owner, and who was named to become it, nil for nobody.
func (m Methods) Owner() (owner, pending *address.Address, err error) {
	values, err := m.call("owner")
	if err != nil {
		return nil, nil, err
	}
	r := reader{values: values}
	owner, pending = r.address(), r.address()
	if err = r.end("owner"); err == nil && owner == nil {
		err = errors.New("owner: the registry has no owner")
	}
	return owner, pending, err
}

// State returns the number of the last change and the number of records.
func (m Methods) State() (seqno, count uint64, err error) {
	values, err := m.call("state")
	if err != nil {
		return 0, 0, err
	}
	r := reader{values: values}
	seqno, count = r.uint(64), r.uint(32)
	return seqno, count, r.end("state")
}

// Record returns an entry and the record's bytes, which are not compared with
// the entry's hash here. The error is ErrNoRecord if there is none.
func (m Methods) Record(key [32]byte) (Entry, []byte, error) {
	values, err := m.call("record", number(key))
	if err != nil {
		return Entry{}, nil, err
	}
	r := reader{values: values}
	e, record := r.entry(), r.cell()
	if err := r.end("record"); err != nil {
		return Entry{}, nil, err
	}
	if e.Status == 0 {
		return Entry{}, nil, ErrNoRecord
	}
	e.Key = key
	data, err := Unsnake(record, MaxRecord)
	if err != nil {
		return e, nil, fmt.Errorf("record: %w", err)
	}
	return e, data, nil
}

// Records returns at most limit entries in the order of their keys: the first
// ones, or with after those that follow it.
func (m Methods) Records(after *[32]byte, limit int) ([]Entry, error) {
	var entries []Entry
	err := m.page("records", after, limit, func(r *reader) error {
		key := r.hash()
		e := r.entry()
		e.Key = key
		entries = append(entries, e)
		return r.end("records")
	})
	if err != nil {
		return nil, err
	}
	return entries, nil
}

// page calls a method that lists what a contract holds, in the order of its keys,
// after one or from the first, and reads each item with each.
func (m Methods) page(method string, after *[32]byte, limit int, each func(*reader) error) error {
	from := big.NewInt(-1)
	if after != nil {
		from = number(*after)
	}
	values, err := m.call(method, from, big.NewInt(int64(min(limit, MaxPage))))
	if err != nil {
		return err
	}
	if len(values) != 1 {
		return fmt.Errorf("%s: the method returned no list", method)
	}
	list, ok := values[0].(tuple.Tuple)
	if !ok {
		return fmt.Errorf("%s: the method returned no list", method)
	}
	for i := range list.Len() {
		item, err := list.RawIndex(i)
		if err != nil {
			return err
		}
		t, ok := item.(tuple.Tuple)
		if !ok {
			return fmt.Errorf("%s: the method returned no list of %[1]s", method)
		}
		var r reader
		for j := range t.Len() {
			v, err := t.RawIndex(j)
			if err != nil {
				return err
			}
			r.values = append(r.values, v)
		}
		if err := each(&r); err != nil {
			return err
		}
	}
	return nil
}

// Signature is an auditor's, over SignedHash. The contract verified it when it
// took it; whoever counts on it verifies it again.
type Signature struct {
	PublicKey [32]byte
	Signature [64]byte
}

// Signatures returns the auditors' signatures over a record, by public key.
func (m Methods) Signatures(key [32]byte) ([]Signature, error) {
	values, err := m.call("signatures", number(key))
	if err != nil {
		return nil, err
	}
	if len(values) != 1 {
		return nil, errors.New("signatures: the method returned no dictionary")
	}
	root, _ := values[0].(*cell.Cell)
	return signatures(root)
}

func signatures(root *cell.Cell) (list []Signature, err error) {
	if root == nil {
		return nil, nil
	}
	defer func() {
		if r := recover(); r != nil {
			list, err = nil, fmt.Errorf("signatures: the state is malformed: %v", r)
		}
	}()
	items, err := root.AsDict(256).LoadAll()
	if err != nil {
		return nil, fmt.Errorf("signatures: %w", err)
	}
	if len(items) > MaxSignatures {
		return nil, errors.New("signatures: there are more than the contract takes")
	}
	for _, item := range items {
		key, err := item.Key.LoadSlice(256)
		if err != nil {
			return nil, fmt.Errorf("signatures: %w", err)
		}
		sig, err := item.Value.LoadSlice(512)
		if err != nil {
			return nil, fmt.Errorf("signatures: %w", err)
		}
		list = append(list, Signature{[32]byte(key), [64]byte(sig)})
	}
	return list, nil
}
