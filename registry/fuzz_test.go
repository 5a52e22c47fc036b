package registry

import (
	"errors"
	"testing"
	"time"

	"chrysalis/canonical"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// FuzzBundle opens records that somebody hands out: nothing is proved by bytes that
// nobody signed.
func FuzzBundle(f *testing.F) {
	f.Add([]byte(`{"version":1,"global_id":-239,"registry":"EQABAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAJYa","chain":["AAAA"],"records":[]}`))
	network, _ := lite.Known("mainnet")
	derive := func(contract.Kind, []byte) ([32]byte, error) { return [32]byte{}, errors.New("no key") }
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := ParseBundle(data)
		if err != nil {
			return
		}
		if records, err := b.Open(network, derive, time.Hour, time.Now()); err == nil {
			t.Errorf("%d records", len(records))
		}
	})
}

// FuzzOffer reads what a stranger offers.
func FuzzOffer(f *testing.F) {
	f.Add([]byte(`{"version":1,"endpoint":"https://h:1","models":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var o OfferDocument
		if err := canonical.Decode(data, contract.MaxOffer, &o); err == nil {
			if err := o.Validate(); err != nil {
				t.Errorf("%q is accepted and not valid: %v", data, err)
			}
			Find([]Offer{{}}, "a/b", 1)
		}
	})
}
