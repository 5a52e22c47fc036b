package contract

import (
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

//go:embed listing.boc
var listingCode []byte

// MaxOffer is the largest offer in bytes.
const MaxOffer = 32 * snakeBytes

// MaxOfferDays is how long an offer may live.
const MaxOfferDays = 30

// ListingCode is the code of the contract that holds offers.
func ListingCode() *cell.Cell { return mustParse(listingCode) }

// ListingStateInit is what the first message to it brings along. There is one on
// every network, which belongs to nobody.
func ListingStateInit() *tlb.StateInit {
	return &tlb.StateInit{
		Code: ListingCode(),
		Data: cell.BeginCell().MustStoreUInt(0, 64).MustStoreUInt(0, 32).MustStoreDict(nil).EndCell(),
	}
}

// ListingAddress is where it is.
func ListingAddress() *address.Address { return addressOf(ListingStateInit()) }

const (
	opPutOffer    = 0x434c0001
	opRemoveOffer = 0x434c0002
)

// PutOffer puts the sender's offer, in place of the one before.
func PutOffer(queryID, expiry uint64, offer []byte) (*cell.Cell, error) {
	if len(offer) == 0 || len(offer) > MaxOffer {
		return nil, fmt.Errorf("the offer has %d bytes; from 1 to %d are possible", len(offer), MaxOffer)
	}
	if expiry >= 1<<40 {
		return nil, errors.New("the offer expires too late")
	}
	hash := sha256.Sum256(offer)
	return begin(opPutOffer, queryID).
		MustStoreUInt(expiry, 40).
		MustStoreSlice(hash[:], 256).
		MustStoreRef(Snake(offer)).
		EndCell(), nil
}

// RemoveOffer takes an account's offer away: the sender's own, or one that has
// expired.
func RemoveOffer(queryID uint64, account [32]byte) *cell.Cell {
	return begin(opRemoveOffer, queryID).MustStoreSlice(account[:], 256).EndCell()
}

var listingExitCodes = map[int32]string{
	200: "the account has no offer",
	201: "the offer is somebody else's, and has not expired",
	202: fmt.Sprintf("the offer has expired, or lives longer than %d days", MaxOfferDays),
	203: "the offer is too large",
	204: "the sender is not in the basechain",
	205: "the offer is not stored as bytes are",
}

// ExplainListing says in words why the listing contract refused a message.
func ExplainListing(exitCode int32) string { return explain(listingExitCodes, exitCode) }

// Listing runs the methods of the listing contract on its data, whole or as a proof.
func Listing(data *cell.Cell) Methods { return Methods{ListingCode(), data} }

// Offer is what the listing contract says of an offer.
type Offer struct {
	Account [32]byte // of the sender
	Expiry  uint64   // Unix time, seconds
	Seqno   uint64
	Hash    [32]byte // SHA-256 of the bytes
	Bytes   []byte
}

// Offer returns an account's offer; its bytes are those of its hash. The error is
// ErrNoRecord if there is none.
func (m Methods) Offer(account [32]byte) (Offer, error) {
	values, err := m.call("offer", number(account))
	if err != nil {
		return Offer{}, err
	}
	o, err := readOffer(&reader{values: values}, account)
	if err == nil && o.Expiry == 0 {
		err = ErrNoRecord
	}
	return o, err
}

func readOffer(r *reader, account [32]byte) (Offer, error) {
	o := Offer{Account: account, Expiry: r.uint(40), Seqno: r.uint(64), Hash: r.hash()}
	c := r.cell()
	if err := r.end("offer"); err != nil || o.Expiry == 0 {
		return o, err
	}
	var err error
	if o.Bytes, err = Unsnake(c, MaxOffer); err != nil {
		return o, fmt.Errorf("offer: %w", err)
	}
	if sha256.Sum256(o.Bytes) != o.Hash {
		// Anyone may put anything, so this one is not one.
		o.Bytes = nil
	}
	return o, nil
}

// Offers returns at most limit offers in the order of their accounts, those after
// one, or with nil the first ones. An offer whose bytes are not those of its hash has
// none.
func (m Methods) Offers(after *[32]byte, limit int) ([]Offer, error) {
	var offers []Offer
	err := m.page("offers", after, limit, func(r *reader) error {
		account := r.hash()
		o, err := readOffer(r, account)
		if err != nil && !errors.Is(err, errSnake) { // somebody put what is no snake
			return err
		}
		offers = append(offers, o)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return offers, nil
}
