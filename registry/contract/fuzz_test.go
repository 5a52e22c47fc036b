package contract

import (
	"testing"

	"github.com/xssnick/tonutils-go/tvm/cell"
)

// FuzzData runs the methods of a registry and of a listing on data that anyone may
// have made: whatever it is, they end, with a value within bounds or an error.
func FuzzData(f *testing.F) {
	f.Add(Data(owner).ToBOC())
	f.Add(cell.BeginCell().EndCell().ToBOC())
	f.Add(cell.BeginCell().MustStoreUInt(7, 64).MustStoreRef(Data(owner)).EndCell().ToBOC())
	f.Fuzz(func(t *testing.T, boc []byte) {
		data, err := cell.FromBOC(boc)
		if err != nil {
			return
		}
		r, l := Registry(data), Listing(data)
		r.Owner()
		r.Record([32]byte{1})
		r.Records(nil, 10)
		if offers, err := l.Offers(nil, 10); err == nil && len(offers) > 10 {
			t.Errorf("%d offers", len(offers))
		}
		l.Offer([32]byte{1})
		Unsnake(data, MaxOffer)
	})
}
