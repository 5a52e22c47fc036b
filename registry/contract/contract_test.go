package contract

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/devnet"
)

// codeHash is what a reader pins. A change here is a new registry at a new
// address for everyone.
const codeHash = "56469d997e5afa30f3d47969aef4cdfbb16595dd33840c29e63be92f9e5e4e8d"

func TestCodeHash(t *testing.T) {
	if got := hex.EncodeToString(Code().Hash()); got != codeHash {
		t.Errorf("the code's hash is %s", got)
	}
}

var (
	owner    = person(1)
	stranger = person(2)
	next     = person(3)
)

func person(n byte) *address.Address {
	return address.NewAddress(0, 0, bytes.Repeat([]byte{n}, 32)).Bounce(true)
}

// world is a registry on a chain of its own.
type world struct {
	*testing.T
	chain    *devnet.Chain
	registry *address.Address
	now      time.Time
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, registry: Address(owner), now: time.Unix(1_780_000_000, 0)}
	c, err := devnet.Open(devnet.Options{Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	w.chain = c
	w.send(owner, 50_000_000, nil, StateInit(owner))
	return w
}

// result is what became of a message.
type result struct {
	exit   int32
	gas    int64
	fees   int64 // that the registry paid, of which the value is less
	value  int64
	back   int64 // what came back
	bounce bool
}

// cost is what the message cost its sender beyond its own forwarding.
func (r result) cost() int64 { return r.value - r.back }

func (w *world) send(from *address.Address, value int64, body *cell.Cell, init *tlb.StateInit) result {
	w.Helper()
	if body == nil {
		body = cell.BeginCell().EndCell()
	}
	message, err := tlb.ToCell(&tlb.InternalMessage{
		IHRDisabled: true, Bounce: true, SrcAddr: from, DstAddr: w.registry,
		Amount: tlb.FromNanoTON(big.NewInt(value)), StateInit: init, Body: body,
	})
	if err != nil {
		w.Fatal(err)
	}
	before := w.balance(from)
	if err := w.chain.Send(message); err != nil {
		w.Fatal(err)
	}
	list, err := w.chain.Transactions(w.registry)
	if err != nil {
		w.Fatal(err)
	}
	tx := list[len(list)-1]
	r := result{value: value, back: w.balance(from) - before, fees: tx.TotalFees.Coins.Nano().Int64()}
	description := tx.Description.(tlb.TransactionDescriptionOrdinary)
	if phase, ok := description.ComputePhase.Phase.(tlb.ComputePhaseVM); ok {
		r.exit, r.gas = phase.Details.ExitCode, phase.Details.GasUsed.Int64()
	} else {
		r.exit = -1
	}
	if r.exit == 0 && description.ActionPhase != nil && !description.ActionPhase.Success {
		r.exit = description.ActionPhase.ResultCode
	}
	r.bounce = description.BouncePhase != nil
	return r
}

func (w *world) balance(a *address.Address) int64 {
	state := w.chain.Account(a)
	if state == nil || !state.IsValid {
		return 0
	}
	return state.Balance.Nano().Int64()
}

func (w *world) methods() Methods {
	w.Helper()
	state := w.chain.Account(w.registry)
	if state == nil || state.Status != tlb.AccountStatusActive {
		w.Fatal("the registry is not there")
	}
	if !bytes.Equal(state.StateInit.Code.Hash(), Code().Hash()) {
		w.Fatal("the code has changed")
	}
	return Registry(state.StateInit.Data)
}

func (w *world) body(p Put) *cell.Cell {
	w.Helper()
	body, err := p.Body(7)
	if err != nil {
		w.Fatal(err)
	}
	return body
}

const plenty = 20_000_000 // nanotons

var record = bytes.Repeat([]byte("{\"kind\":\"image\"}"), 60)

func key(n byte) (k [32]byte) {
	k[0], k[31] = n, n
	return k
}

func put(n byte) Put {
	return Put{Key: key(n), Kind: Image, NotBefore: 10, NotAfter: 20, Record: record}
}

func auditor(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32))
}

func (w *world) cosign(by ed25519.PrivateKey, key, hash [32]byte) *cell.Cell {
	signed := SignedHash(w.chain.GlobalID(), w.registry, key, hash)
	return Cosign(7, key, hash, [32]byte(by.Public().(ed25519.PublicKey)), [64]byte(ed25519.Sign(by, signed[:])))
}

// TestOperations is what each operation does when it is allowed.
func TestOperations(t *testing.T) {
	w := newWorld(t)
	check := func(what string, r result) {
		t.Helper()
		if r.exit != 0 || r.bounce {
			t.Fatalf("%s: %+v: %s", what, r, Explain(r.exit))
		}
		if r.back <= 0 {
			t.Errorf("%s: nothing came back: %+v", what, r)
		}
	}
	if v, err := w.methods().Version(); v != Version || err != nil {
		t.Errorf("version %d, %v", v, err)
	}
	if _, _, err := w.methods().Record(key(1)); !errors.Is(err, ErrNoRecord) {
		t.Errorf("no record: %v", err)
	}

	check("put", w.send(owner, plenty, w.body(put(1)), nil))
	e, data, err := w.methods().Record(key(1))
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(record)
	if want := (Entry{key(1), Image, Active, 10, 20, 1, hash, 0}); e != want || !bytes.Equal(data, record) {
		t.Errorf("%+v, %d bytes", e, len(data))
	}

	for n := byte(1); n <= 2; n++ {
		check("cosign", w.send(stranger, plenty, w.cosign(auditor(n), key(1), hash), nil))
	}
	check("cosign again", w.send(stranger, plenty, w.cosign(auditor(1), key(1), hash), nil))
	list, err := w.methods().Signatures(key(1))
	if err != nil || len(list) != 2 {
		t.Fatalf("%d signatures, %v", len(list), err)
	}
	signed := SignedHash(w.chain.GlobalID(), w.registry, key(1), hash)
	for _, s := range list {
		if !ed25519.Verify(s.PublicKey[:], signed[:], s.Signature[:]) {
			t.Error("a signature does not verify")
		}
	}
	if e, _, _ := w.methods().Record(key(1)); e.Signatures != 2 {
		t.Errorf("%d signatures", e.Signatures)
	}
	check("drop", w.send(owner, plenty, DropSignature(7, key(1), [32]byte(auditor(1).Public().(ed25519.PublicKey))), nil))
	if list, _ := w.methods().Signatures(key(1)); len(list) != 1 {
		t.Errorf("%d signatures", len(list))
	}

	longer := put(1)
	longer.NotAfter = 30
	check("put the same bytes", w.send(owner, plenty, w.body(longer), nil))
	if e, _, _ := w.methods().Record(key(1)); e.NotAfter != 30 || e.Signatures != 1 {
		t.Errorf("%+v", e)
	}
	other := put(1)
	other.Record = []byte("{}")
	check("put other bytes", w.send(owner, plenty, w.body(other), nil))
	if list, _ := w.methods().Signatures(key(1)); len(list) != 0 {
		t.Error("signatures over other bytes stayed")
	}

	check("deprecate", w.send(owner, plenty, SetStatus(7, key(1), Deprecated), nil))
	check("put again", w.send(owner, plenty, w.body(put(1)), nil))
	check("revoke", w.send(owner, plenty, SetStatus(7, key(1), Revoked), nil))
	if e, _, err := w.methods().Record(key(1)); e.Status != Revoked || err != nil {
		t.Errorf("%+v, %v", e, err)
	}

	check("transfer", w.send(owner, plenty, Transfer(7, next), nil))
	if o, p, err := w.methods().Owner(); err != nil || !o.Equals(owner) || !p.Equals(next) {
		t.Errorf("owner %v, pending %v, %v", o, p, err)
	}
	check("cancel", w.send(owner, plenty, Transfer(7, nil), nil))
	if _, p, err := w.methods().Owner(); err != nil || p != nil {
		t.Errorf("pending %v, %v", p, err)
	}
	check("transfer", w.send(owner, plenty, Transfer(7, next), nil))
	check("accept", w.send(next, plenty, Accept(7), nil))
	if o, p, err := w.methods().Owner(); err != nil || !o.Equals(next) || p != nil {
		t.Errorf("owner %v, pending %v, %v", o, p, err)
	}
	if seqno, count, err := w.methods().State(); err != nil || seqno != 14 || count != 1 {
		t.Errorf("seqno %d, count %d, %v", seqno, count, err)
	}
	if r := w.send(stranger, plenty, nil, nil); r.exit != 0 || r.back != 0 {
		t.Errorf("rent: %+v", r)
	}
}

// TestRefusals is every way in which the contract refuses: each bounces, gives
// back all but fees, and changes nothing.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	revoked := put(2)
	w.send(owner, plenty, w.body(put(1)), nil)
	w.send(owner, plenty, w.body(revoked), nil)
	w.send(owner, plenty, SetStatus(7, revoked.Key, Revoked), nil)
	w.send(owner, plenty, Transfer(7, next), nil)

	hash := sha256.Sum256(record)
	otherKind := put(1)
	otherKind.Kind = Model
	raw := func(kind, before, after uint64, bits *cell.Cell) *cell.Cell {
		return begin(opPut, 7).MustStoreUInt(0, 248).MustStoreUInt(9, 8).MustStoreUInt(kind, 8).
			MustStoreUInt(before, 40).MustStoreUInt(after, 40).MustStoreUInt(0, 256).MustStoreRef(bits).EndCell()
	}
	wrongNetwork := func() *cell.Cell {
		signed := SignedHash(-239, w.registry, key(1), hash)
		return Cosign(7, key(1), hash, [32]byte(auditor(1).Public().(ed25519.PublicKey)), [64]byte(ed25519.Sign(auditor(1), signed[:])))
	}
	wrongAddress := func() *cell.Cell {
		signed := SignedHash(w.chain.GlobalID(), Address(stranger), key(1), hash)
		return Cosign(7, key(1), hash, [32]byte(auditor(1).Public().(ed25519.PublicKey)), [64]byte(ed25519.Sign(auditor(1), signed[:])))
	}
	var zero [32]byte
	tests := []struct {
		name  string
		from  *address.Address
		value int64
		body  *cell.Cell
		exit  int32
	}{
		{"a stranger puts", stranger, plenty, w.body(put(3)), 200},
		{"the named owner puts", next, plenty, w.body(put(3)), 200},
		{"a stranger revokes", stranger, plenty, SetStatus(7, key(1), Revoked), 200},
		{"a stranger drops a signature", stranger, plenty, DropSignature(7, key(1), zero), 200},
		{"a stranger transfers", stranger, plenty, Transfer(7, stranger), 200},
		{"a stranger accepts", stranger, plenty, Accept(7), 201},
		{"the owner accepts", owner, plenty, Accept(7), 201},
		{"revoke what is not there", owner, plenty, SetStatus(7, key(9), Revoked), 202},
		{"cosign what is not there", stranger, plenty, w.cosign(auditor(1), key(9), hash), 202},
		{"drop a signature of what is not there", owner, plenty, DropSignature(7, key(9), zero), 202},
		{"put what is revoked", owner, plenty, w.body(revoked), 203},
		{"deprecate what is revoked", owner, plenty, SetStatus(7, key(2), Deprecated), 203},
		{"revoke twice", owner, plenty, SetStatus(7, key(2), Revoked), 203},
		{"cosign what is revoked", stranger, plenty, w.cosign(auditor(1), key(2), hash), 203},
		{"kind 0", owner, plenty, raw(0, 1, 2, Snake(record)), 204},
		{"kind 5", owner, plenty, raw(5, 1, 2, Snake(record)), 204},
		{"another kind than before", owner, plenty, w.body(otherKind), 204},
		{"make active", owner, plenty, SetStatus(7, key(1), Active), 205},
		{"status 0", owner, plenty, SetStatus(7, key(1), 0), 205},
		{"status 4", owner, plenty, SetStatus(7, key(1), 4), 205},
		{"validity of nothing", owner, plenty, raw(1, 2, 2, Snake(record)), 206},
		{"validity ends first", owner, plenty, raw(1, 3, 2, Snake(record)), 206},
		{"too large", owner, plenty, raw(1, 1, 2, Snake(large(MaxRecord+1))), 207},
		{"cosign another record", stranger, plenty, w.cosign(auditor(1), key(1), zero), 208},
		{"a signature by another", stranger, plenty, Cosign(7, key(1), hash, [32]byte(auditor(2).Public().(ed25519.PublicKey)), [64]byte{}), 209},
		{"a signature for another network", stranger, plenty, wrongNetwork(), 209},
		{"a signature for another registry", stranger, plenty, wrongAddress(), 209},
		{"drop a signature that is not there", owner, plenty, DropSignature(7, key(1), zero), 209},
		{"too little for a record", owner, 1_400_000, w.body(put(3)), 211},
		{"too little for a signature", stranger, 1_400_000, w.cosign(auditor(1), key(1), hash), 211},
		{"too little for a revocation", owner, 1_300_000, SetStatus(7, key(1), Revoked), 211},
		{"an unknown operation", owner, plenty, begin(0x43480007, 7).EndCell(), 0xffff},
		{"a comment", stranger, plenty, begin(0, 7).EndCell(), 0xffff},
		{"half an operation", owner, plenty, cell.BeginCell().MustStoreUInt(0x4348, 16).EndCell(), 0xffff},
		{"a put cut short", owner, plenty, cell.BeginCell().MustStoreUInt(opPut, 32).MustStoreUInt(0, 64).EndCell(), 9},
		{"a cosign without its signature", stranger, plenty, begin(opCosign, 7).MustStoreSlice(zero[:], 256).EndCell(), 9},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.T = t
			before := w.methods().data.Hash()
			balance := w.balance(w.registry)
			r := w.send(tt.from, tt.value, tt.body, nil)
			if r.exit != tt.exit || !r.bounce {
				t.Errorf("exit code %d (%s), bounced %t", r.exit, Explain(r.exit), r.bounce)
			}
			if !bytes.Equal(before, w.methods().data.Hash()) {
				t.Error("the data changed")
			}
			// What does not come back is the gas and the way.
			if r.back <= 0 || r.cost() > 3_000_000 {
				t.Errorf("%d of %d came back", r.back, r.value)
			}
			if now := w.balance(w.registry); now < balance-1000 || now > balance {
				t.Errorf("the registry's balance went from %d to %d", balance, now)
			}
		})
	}
	if e, err := w.methods().Records(nil, 10); err != nil || len(e) != 2 {
		t.Errorf("%v, %v", e, err)
	}
}

// TestExternal shows that the registry pays for nobody's message.
func TestExternal(t *testing.T) {
	w := newWorld(t)
	message, err := tlb.ToCell(&tlb.ExternalMessage{DstAddr: w.registry, Body: w.body(put(1))})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.chain.Send(message); err == nil {
		t.Error("an external message was accepted")
	}
}

// TestSignatureLimits shows that strangers cannot fill the contract up, nor keep
// the owner from adding an auditor's signature.
func TestSignatureLimits(t *testing.T) {
	w := newWorld(t)
	w.send(owner, plenty, w.body(put(1)), nil)
	hash := sha256.Sum256(record)
	n := byte(1)
	for ; n <= MaxStrangersSignatures; n++ {
		if r := w.send(stranger, plenty, w.cosign(auditor(n), key(1), hash), nil); r.exit != 0 {
			t.Fatalf("signature %d: %d", n, r.exit)
		}
	}
	if r := w.send(stranger, plenty, w.cosign(auditor(n), key(1), hash), nil); r.exit != 210 {
		t.Errorf("a stranger's signature too many: %d", r.exit)
	}
	for ; n <= MaxSignatures; n++ {
		if r := w.send(owner, plenty, w.cosign(auditor(n), key(1), hash), nil); r.exit != 0 {
			t.Fatalf("signature %d: %d", n, r.exit)
		}
	}
	if r := w.send(owner, plenty, w.cosign(auditor(n), key(1), hash), nil); r.exit != 210 {
		t.Errorf("the owner's signature too many: %d", r.exit)
	}
	if list, err := w.methods().Signatures(key(1)); err != nil || len(list) != MaxSignatures {
		t.Errorf("%d, %v", len(list), err)
	}
}

// TestPages reads 300 records in pages.
func TestPages(t *testing.T) {
	w := newWorld(t)
	const n = 300
	for i := range n {
		p := put(1)
		p.Key = sha256.Sum256([]byte{byte(i), byte(i >> 8)})
		p.Record = []byte("{}")
		if r := w.send(owner, plenty, w.body(p), nil); r.exit != 0 {
			t.Fatalf("record %d: %d", i, r.exit)
		}
	}
	var after *[32]byte
	count := 0
	for {
		page, err := w.methods().Records(after, 100)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			if after != nil && bytes.Compare(after[:], e.Key[:]) >= 0 {
				t.Fatal("not in order")
			}
			after = &e.Key
		}
		count += len(page)
		if len(page) < 100 {
			break
		}
	}
	if count != n {
		t.Errorf("%d records", count)
	}
}

// TestRent lets two years pass: what was paid ahead for a year covers it, and
// more, and the registry is there still.
func TestRent(t *testing.T) {
	w := newWorld(t)
	for i := range 20 {
		p := put(1)
		p.Key = sha256.Sum256([]byte{byte(i)})
		w.send(owner, plenty, w.body(p), nil)
	}
	before := w.balance(w.registry)
	w.now = w.now.Add(365 * 24 * time.Hour)
	w.send(stranger, plenty, nil, nil)
	rent := before + plenty - w.balance(w.registry)
	if before-rent < 0 {
		t.Errorf("balance %d does not pay a year's rent of %d", before, rent)
	}
	t.Logf("a year's rent of 20 records: %d nanotons; balance %d", rent, before)
}

func large(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
		if i%127 == 0 {
			b[i] = byte(i / 127)
		}
	}
	return b
}

func TestSnake(t *testing.T) {
	for _, n := range []int{0, 1, 126, 127, 128, 254, 255, 1000, MaxRecord} {
		data := large(n)
		c := Snake(data)
		if got, err := Unsnake(c, MaxRecord); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes: %d, %v", n, len(got), err)
		}
		if n > 0 {
			if _, err := Unsnake(c, n-1); err == nil {
				t.Errorf("%d bytes: over the limit", n)
			}
		}
	}
	short := cell.BeginCell().MustStoreUInt(1, 8).MustStoreRef(Snake([]byte{2})).EndCell()
	odd := cell.BeginCell().MustStoreUInt(1, 7).EndCell()
	two := cell.BeginCell().MustStoreSlice(make([]byte, 127), 1016).MustStoreRef(Snake(nil)).MustStoreRef(Snake(nil)).EndCell()
	empty := cell.BeginCell().MustStoreSlice(make([]byte, 127), 1016).MustStoreRef(cell.BeginCell().EndCell()).EndCell()
	for name, c := range map[string]*cell.Cell{"a cell not full": short, "bits": odd, "a fork": two, "an empty end": empty} {
		if _, err := Unsnake(c, MaxRecord); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestPutRefuses(t *testing.T) {
	for name, change := range map[string]func(*Put){
		"no record":       func(p *Put) { p.Record = nil },
		"too large":       func(p *Put) { p.Record = large(MaxRecord + 1) },
		"kind":            func(p *Put) { p.Kind = 9 },
		"validity":        func(p *Put) { p.NotAfter = p.NotBefore },
		"time of 41 bits": func(p *Put) { p.NotAfter = 1 << 40 },
	} {
		p := put(1)
		change(&p)
		if _, err := p.Body(0); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestMalformedData runs the methods on data that is no registry's.
func TestMalformedData(t *testing.T) {
	for name, data := range map[string]*cell.Cell{
		"empty":  cell.BeginCell().EndCell(),
		"noise":  cell.BeginCell().MustStoreSlice(bytes.Repeat([]byte{0xa5}, 100), 800).EndCell(),
		"wallet": cell.BeginCell().MustStoreUInt(0, 64).MustStoreUInt(1, 256).MustStoreUInt(0, 1).EndCell(),
	} {
		m := Registry(data)
		if _, _, err := m.Owner(); err == nil {
			t.Errorf("%s: an owner", name)
		}
		if _, _, err := m.Record(key(1)); err == nil {
			t.Errorf("%s: a record", name)
		}
		if _, err := m.Records(nil, 10); err == nil {
			t.Errorf("%s: records", name)
		}
		if _, err := m.Signatures(key(1)); err == nil {
			t.Errorf("%s: signatures", name)
		}
	}
}

// TestFees prints what the operations take at the mainnet's prices of June
// 2026, which are the devnet's.
func TestFees(t *testing.T) {
	w := newWorld(t)
	hash := sha256.Sum256(record)
	var table []string
	line := func(what string, r result) {
		if r.exit != 0 {
			t.Fatalf("%s: exit code %d", what, r.exit)
		}
		table = append(table, fmt.Sprintf("%-28s %6d gas  %9d nanotons, rent paid ahead included", what, r.gas, r.cost()))
	}
	line(fmt.Sprintf("put, %d bytes", len(record)), w.send(owner, plenty, w.body(put(1)), nil))
	for i := range 99 {
		p := put(1)
		p.Key = sha256.Sum256([]byte{byte(i)})
		w.send(owner, plenty, w.body(p), nil)
	}
	line("put, the 101st", w.send(owner, plenty, w.body(put(7)), nil))
	line("cosign", w.send(stranger, plenty, w.cosign(auditor(1), key(1), hash), nil))
	line("deprecate", w.send(owner, plenty, SetStatus(7, key(1), Deprecated), nil))
	line("revoke", w.send(owner, plenty, SetStatus(7, key(1), Revoked), nil))
	line("transfer", w.send(owner, plenty, Transfer(7, next), nil))
	line("accept", w.send(next, plenty, Accept(7), nil))
	for _, l := range table {
		t.Log(l)
	}
}

// TestProofs runs the methods on a proof of no more than what they load, as the most
// sparing of liteservers would make it.
func TestProofs(t *testing.T) {
	w := newWorld(t)
	p := put(1)
	p.Record = large(2000)
	w.send(owner, plenty, w.body(p), nil)
	w.send(owner, plenty, w.body(put(2)), nil)
	for n := byte(1); n <= 5; n++ {
		w.send(stranger, plenty, w.cosign(auditor(n), key(1), sha256.Sum256(p.Record)), nil)
	}
	whole := w.methods()
	for name, run := range map[string]func(Methods) error{
		"version": func(m Methods) error { _, err := m.Version(); return err },
		"owner":   func(m Methods) error { _, _, err := m.Owner(); return err },
		"state":   func(m Methods) error { _, _, err := m.State(); return err },
		"records": func(m Methods) error { _, err := m.Records(nil, 10); return err },
		"record": func(m Methods) error {
			_, data, err := m.Record(key(1))
			if err == nil && !bytes.Equal(data, p.Record) {
				err = errors.New("other bytes")
			}
			return err
		},
		"signatures": func(m Methods) error {
			list, err := m.Signatures(key(1))
			if err == nil && len(list) != 5 {
				err = fmt.Errorf("%d signatures", len(list))
			}
			return err
		},
	} {
		b := cell.NewMerkleProofBuilder(whole.data)
		if _, err := (Methods{whole.code, b.Root()}).call(name, args(name)...); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		proof, err := b.CreateProof()
		if err != nil {
			t.Fatal(err)
		}
		data, err := cell.UnwrapProofVirtualized(proof, whole.data.Hash())
		if err != nil {
			t.Fatal(err)
		}
		if err := run(Methods{whole.code, data}); err != nil {
			t.Errorf("%s on its proof of %d bytes: %v", name, len(proof.ToBOC()), err)
		}
		// And on a proof that leaves things out: an error, no less.
		if name == "records" || name == "record" || name == "signatures" {
			b := cell.NewMerkleProofBuilder(whole.data)
			if _, err := b.Root().BeginParse(); err != nil {
				t.Fatal(err)
			}
			bare, err := b.CreateProof()
			if err != nil {
				t.Fatal(err)
			}
			data, err := cell.UnwrapProofVirtualized(bare, whole.data.Hash())
			if err != nil {
				t.Fatal(err)
			}
			if err := run(Methods{whole.code, data}); err == nil || errors.Is(err, ErrNoRecord) {
				t.Errorf("%s on a bare proof: %v", name, err)
			}
		}
	}
}

func args(method string) []*big.Int {
	switch method {
	case "records":
		return []*big.Int{big.NewInt(-1), big.NewInt(10)}
	case "record", "signatures":
		return []*big.Int{number(key(1))}
	}
	return nil
}
