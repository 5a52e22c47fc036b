package contract

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/devnet"
)

const listingCodeHash = "86dddf3916232e9cab44a0da8418c66e93185342d82bf7c71839aabb45beac57"

func newMarket(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, registry: ListingAddress(), now: time.Unix(1_780_000_000, 0)}
	c, err := devnet.Open(devnet.Options{Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	w.chain = c
	return w
}

func (w *world) listing() Methods {
	w.Helper()
	state := w.chain.Account(w.registry)
	if state == nil || state.Status != tlb.AccountStatusActive {
		w.Fatal("the listing contract is not there")
	}
	return Listing(state.StateInit.Data)
}

func (w *world) offer(days int, text []byte) *cell.Cell {
	w.Helper()
	body, err := PutOffer(7, uint64(w.now.Unix())+uint64(days)*86400, text)
	if err != nil {
		w.Fatal(err)
	}
	return body
}

const dear = 500_000_000 // nanotons: for the largest offer

func TestListing(t *testing.T) {
	if got := hex.EncodeToString(ListingCode().Hash()); got != listingCodeHash {
		t.Errorf("the code's hash is %s", got)
	}
	w := newMarket(t)
	// The first offer brings the contract along.
	first := []byte(`{"endpoint":"one"}`)
	if r := w.send(owner, dear, w.offer(7, first), ListingStateInit()); r.exit != 0 || r.back <= 0 {
		t.Fatalf("%+v: %s", r, ExplainListing(r.exit))
	}
	o, err := w.listing().Offer([32]byte(owner.Data()))
	if err != nil || !bytes.Equal(o.Bytes, first) || o.Seqno != 1 {
		t.Fatalf("%+v, %v", o, err)
	}
	if _, err := w.listing().Offer([32]byte(stranger.Data())); !errors.Is(err, ErrNoRecord) {
		t.Errorf("%v", err)
	}
	large := large(MaxOffer)
	r := w.send(stranger, dear, w.offer(30, large), ListingStateInit())
	if r.exit != 0 {
		t.Fatalf("%+v: %s", r, ExplainListing(r.exit))
	}
	t.Logf("the largest offer for 30 days costs %d nanotons, %d gas", r.cost(), r.gas)
	r = w.send(owner, dear, w.offer(30, bytes.Repeat([]byte("x"), 500)), nil)
	t.Logf("one of 500 bytes for 30 days costs %d nanotons, %d gas", r.cost(), r.gas)
	list, err := w.listing().Offers(nil, 10)
	if err != nil || len(list) != 2 || !bytes.Equal(list[1].Bytes, large) {
		t.Fatalf("%d, %v", len(list), err)
	}
	list, err = w.listing().Offers(&list[0].Account, 10)
	if err != nil || len(list) != 1 || list[0].Account != [32]byte(stranger.Data()) {
		t.Fatalf("%d, %v", len(list), err)
	}

	library := cell.BeginCell().MustStoreUInt(2, 8).MustStoreSlice(make([]byte, 32), 256)
	exotic, err := library.EndCellSpecial(true)
	if err != nil {
		t.Fatal(err)
	}
	raw := func(expiry uint64, c *cell.Cell) *cell.Cell {
		return begin(opPutOffer, 7).MustStoreUInt(expiry, 40).MustStoreUInt(0, 256).MustStoreRef(c).EndCell()
	}
	soon := uint64(w.now.Unix()) + 3600
	fork := cell.BeginCell().MustStoreRef(Snake(nil)).MustStoreRef(Snake(nil)).EndCell()
	for _, tt := range []struct {
		name  string
		from  *address.Address
		value int64
		body  *cell.Cell
		exit  int32
	}{
		{"remove what is not there", next, plenty, RemoveOffer(7, [32]byte(next.Data())), 200},
		{"remove another's", next, plenty, RemoveOffer(7, [32]byte(owner.Data())), 201},
		{"expired", next, dear, raw(uint64(w.now.Unix()), Snake(first)), 202},
		{"expires in the past", next, dear, raw(0, Snake(first)), 202},
		{"lives too long", next, dear, raw(uint64(w.now.Unix())+31*86400, Snake(first)), 202},
		{"too large", next, dear, raw(soon, Snake(append(large, 1))), 203},
		{"a library", next, dear, raw(soon, exotic), 205},
		{"a library at the end", next, dear, raw(soon, cell.BeginCell().MustStoreSlice(make([]byte, 127), 1016).MustStoreRef(exotic).EndCell()), 205},
		{"a fork", next, dear, raw(soon, fork), 205},
		{"too little", next, 3_000_000, w.offer(30, first), 211},
		{"unknown", next, plenty, begin(0x434c0003, 7).EndCell(), 0xffff},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.T = t
			before := w.listing().data.Hash()
			r := w.send(tt.from, tt.value, tt.body, nil)
			if r.exit != tt.exit || !r.bounce || r.back <= 0 {
				t.Errorf("%+v: %s", r, ExplainListing(r.exit))
			}
			if !bytes.Equal(before, w.listing().data.Hash()) {
				t.Error("the data changed")
			}
		})
	}

	// An offer that lies about its hash is one without bytes, and spoils no page.
	if r := w.send(next, dear, raw(soon, Snake(first)), nil); r.exit != 0 {
		t.Fatal(r)
	}
	list, err = w.listing().Offers(nil, 10)
	if err != nil || len(list) != 3 {
		t.Fatalf("%d, %v", len(list), err)
	}
	for _, o := range list {
		if o.Account == [32]byte(next.Data()) && o.Bytes != nil {
			t.Error("a forged offer has bytes")
		}
	}
	// Anyone may clear away what has expired, and everyone their own.
	w.now = w.now.Add(2 * time.Hour)
	for _, tt := range []struct{ by, whose *address.Address }{{stranger, next}, {owner, owner}} {
		if r := w.send(tt.by, plenty, RemoveOffer(7, [32]byte(tt.whose.Data())), nil); r.exit != 0 {
			t.Errorf("%+v: %s", r, ExplainListing(r.exit))
		}
	}
	if list, err := w.listing().Offers(nil, 10); err != nil || len(list) != 1 || list[0].Hash != sha256.Sum256(large) {
		t.Errorf("%d, %v", len(list), err)
	}
	if _, err := PutOffer(0, soon, nil); err == nil {
		t.Error("an empty offer")
	}
	if _, err := PutOffer(0, 1<<40, first); err == nil {
		t.Error("a time of 41 bits")
	}
}
