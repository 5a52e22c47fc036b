package registry

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/big"
	"net"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/canonical"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// Errors of offers.
var (
	ErrNoOffer     = errors.New("the account has no offer")
	ErrUnpublished = errors.New("no pinned publisher has the record")
)

// OfferVersion is the version of offers that this package reads and writes.
const OfferVersion = 1

// An OfferDocument is what a GPU owner says of its service. It proves nothing: a
// client verifies the worker that it finds at the endpoint, whatever is said here.
type OfferDocument struct {
	Version  int            `json:"version"`
	Endpoint string         `json:"endpoint"` // HOST:PORT
	Image    record.Hex     `json:"image"`    // key of the image's record, 32 bytes
	Models   []OfferedModel `json:"models"`
	Payout   string         `json:"payout"`   // an address in the basechain
	Capacity int            `json:"capacity"` // requests at a time
}

// An OfferedModel is a model and its price.
type OfferedModel struct {
	ID              string     `json:"id"`               // NAME@REVISION
	RootHash        record.Hex `json:"root_hash"`        // 32 bytes
	PromptPrice     int64      `json:"prompt_price"`     // nanotons for a million tokens
	CompletionPrice int64      `json:"completion_price"` // nanotons for a million tokens
}

var modelIDRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}@[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// maxPrice bounds prices, in nanotons for a million tokens: a million TON.
const maxPrice = 1_000_000_000_000_000

// Validate implements canonical.Document.
func (o *OfferDocument) Validate() error {
	if o.Version != OfferVersion {
		return fmt.Errorf("version is %d, this program reads version %d", o.Version, OfferVersion)
	}
	host, port, err := net.SplitHostPort(o.Endpoint)
	if n, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || n == 0 || host == "" || len(o.Endpoint) > 260 {
		return fmt.Errorf("endpoint: %.80q is not HOST:PORT", o.Endpoint)
	}
	if len(o.Image) != 32 {
		return errors.New("image: not a key of 32 bytes")
	}
	if len(o.Models) == 0 || len(o.Models) > 16 {
		return errors.New("models: from 1 to 16 are possible")
	}
	for i, m := range o.Models {
		if !modelIDRE.MatchString(m.ID) {
			return fmt.Errorf("models[%d]: %.80q is not NAME@REVISION", i, m.ID)
		}
		if len(m.RootHash) != 32 {
			return fmt.Errorf("models[%d]: root_hash does not have 32 bytes", i)
		}
		if m.PromptPrice < 0 || m.PromptPrice > maxPrice || m.CompletionPrice < 0 || m.CompletionPrice > maxPrice {
			return fmt.Errorf("models[%d]: a price is out of bounds", i)
		}
	}
	if _, err := lite.ParseAddress(o.Payout); err != nil {
		return fmt.Errorf("payout: %w", err)
	}
	if o.Capacity < 1 || o.Capacity > 1_000_000 {
		return fmt.Errorf("capacity: %d is out of bounds", o.Capacity)
	}
	return nil
}

// An Offer is an offer that was read with proofs.
type Offer struct {
	OfferDocument
	Account lite.Address `json:"account"`
	Expiry  time.Time    `json:"expiry"`
}

var listingHash = [32]byte(contract.ListingCode().Hash())

// Listing is where offers are, on every network.
func Listing() lite.Address {
	a, err := lite.AddressOf(contract.ListingAddress())
	if err != nil {
		panic(err) // it is in the basechain
	}
	return a
}

// offersPage is how many offers one proof has.
const offersPage = 25

// maxOffers bounds what Offers reads.
const maxOffers = 20_000

// Offers proves all offers as of a view that have not expired. What is no valid offer
// is left out, since anyone may put anything.
func (r *Reader) Offers(ctx context.Context, view *lite.View) ([]Offer, error) {
	list := []Offer{}
	var after *[32]byte
	from := big.NewInt(-1)
	for range maxOffers / offersPage {
		account, err := view.Method(ctx, Listing(), listingHash, "offers", from, big.NewInt(offersPage))
		if errors.Is(err, lite.ErrNoAccount) {
			return nil, fmt.Errorf("%w: nobody has offered anything on this network yet", err)
		}
		if err != nil {
			return nil, err
		}
		page, err := contract.Listing(account.Data).Offers(after, offersPage)
		if err != nil {
			return nil, err
		}
		for _, o := range page {
			offer := Offer{Account: lite.Address{ID: o.Account}, Expiry: time.Unix(int64(o.Expiry), 0).UTC()}
			if o.Bytes == nil || o.Expiry <= uint64(view.Head.Time) || canonical.Decode(o.Bytes, contract.MaxOffer, &offer.OfferDocument) != nil {
				continue
			}
			list = append(list, offer)
		}
		if len(page) < offersPage {
			return list, nil
		}
		last := page[len(page)-1].Account
		after, from = &last, number(last)
	}
	return nil, fmt.Errorf("there are more than %d offers", maxOffers)
}

// A Match is an offer of a model that was asked for.
type Match struct {
	Offer Offer        `json:"offer"`
	Model OfferedModel `json:"model"`
}

// Find picks the offers of a model, by NAME@REVISION, NAME or root hash in
// hexadecimal, that cost no more than maxPrice nanotons for a million tokens of either
// kind; 0 is no limit. The cheapest comes first.
func Find(offers []Offer, model string, maxPrice int64) []Match {
	list := []Match{}
	for _, o := range offers {
		for _, m := range o.Models {
			name, _, _ := bytes.Cut([]byte(m.ID), []byte("@"))
			if model != "" && model != m.ID && model != string(name) && model != m.RootHash.String() {
				continue
			}
			if maxPrice > 0 && max(m.PromptPrice, m.CompletionPrice) > maxPrice {
				continue
			}
			list = append(list, Match{o, m})
		}
	}
	slices.SortStableFunc(list, func(a, b Match) int {
		return cmp.Or(cmp.Compare(a.Model.PromptPrice+a.Model.CompletionPrice, b.Model.PromptPrice+b.Model.CompletionPrice),
			bytes.Compare(a.Offer.Account.ID[:], b.Offer.Account.ID[:]))
	})
	return list
}

// A Need is a record without which no client takes a worker.
type Need struct {
	What string // for people
	Key  Key
}

// Needs are the records of an offer's image and models.
func (o *OfferDocument) Needs() []Need {
	list := []Need{{"image", Key(o.Image)}}
	for _, m := range o.Models {
		list = append(list, Need{"model " + m.ID, (&record.Model{RootHash: m.RootHash}).Key()})
	}
	return list
}

// Published fails unless publishers have the records, each at least one of them, and
// the policy accepts those. A host's own word proves nothing, so an offer without them
// would find no client.
func (r *Reader) Published(ctx context.Context, view *lite.View, needs []Need, publishers []lite.Address, policy Policy) error {
	for _, need := range needs {
		var failures []error
		ok := false
		for _, publisher := range publishers {
			found, err := r.Record(ctx, view, publisher, need.Key)
			if err == nil {
				err = policy.Check(found, time.Unix(int64(view.Head.Time), 0))
			}
			if err == nil {
				ok = true
				break
			}
			failures = append(failures, fmt.Errorf("%s: %w", publisher, err))
		}
		if !ok {
			return fmt.Errorf("%w of the %s, %v: %w", ErrUnpublished, need.What, need.Key, errors.Join(failures...))
		}
	}
	return nil
}

// PutOffer puts the wallet's offer, in place of the one before, until it expires. It
// refuses when the publishers do not have what is offered, or what else is needed.
func PutOffer(o OfferDocument, expiry time.Time, publishers []lite.Address, policy Policy, also ...Need) Operation {
	var encoded []byte
	return Operation{
		Name: "put offer", Value: offerValue(expiry),
		To:   func(*Publisher) lite.Address { return Listing() },
		Init: func(*Publisher) *tlb.StateInit { return contract.ListingStateInit() },
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) {
			return contract.PutOffer(id, uint64(expiry.Unix()), encoded)
		},
		Explain: contract.ExplainListing,
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			if err := o.Validate(); err != nil {
				return "", fmt.Errorf("the offer: %w", err)
			}
			left := expiry.Sub(time.Unix(int64(view.Head.Time), 0))
			if left <= 0 || left > contract.MaxOfferDays*24*time.Hour {
				return "", fmt.Errorf("the offer would live for %v; up to %d days are possible", left.Round(time.Minute), contract.MaxOfferDays)
			}
			var err error
			if encoded, err = canonical.Encode(&o); err != nil {
				return "", fmt.Errorf("the offer: %w", err)
			}
			if len(encoded) > contract.MaxOffer {
				return "", fmt.Errorf("the offer has %d bytes; up to %d are possible", len(encoded), contract.MaxOffer)
			}
			if err := p.Reader.Published(ctx, view, append(o.Needs(), also...), publishers, policy); err != nil {
				return "", err
			}
			found, err := p.offer(ctx, view)
			if errors.Is(err, ErrNoOffer) {
				return "", nil
			}
			if err == nil && bytes.Equal(found.Bytes, encoded) && found.Expiry == uint64(expiry.Unix()) {
				return "the offer is listed", nil
			}
			return "", err
		},
	}
}

// RepriceOffer puts the wallet's offer again as it is, until it expires, but for the
// prices of these models, by NAME@REVISION. Publishers need not be asked: nothing else
// is offered than before.
func RepriceOffer(prices map[string]pay.Price) Operation {
	var encoded []byte
	var expiry uint64
	return Operation{
		Name: "put offer", Value: putValue + (contract.MaxOfferDays+1)*11_000_000,
		To: func(*Publisher) lite.Address { return Listing() },
		Body: func(_ *Publisher, id uint64) (*cell.Cell, error) {
			return contract.PutOffer(id, expiry, encoded)
		},
		Explain: contract.ExplainListing,
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			found, err := p.offer(ctx, view)
			if err != nil {
				return "", err
			}
			var o OfferDocument
			if err := canonical.Decode(found.Bytes, contract.MaxOffer, &o); err != nil {
				return "", fmt.Errorf("the offer: %w", err)
			}
			if found.Expiry <= uint64(view.Head.Time) {
				return "", fmt.Errorf("%w that has not expired", ErrNoOffer)
			}
			some := false
			for i, m := range o.Models {
				if price, ok := prices[m.ID]; ok {
					some, o.Models[i].PromptPrice, o.Models[i].CompletionPrice = true, price.Prompt, price.Completion
				}
			}
			if !some {
				return "", fmt.Errorf("%w of these models", ErrNoOffer)
			}
			if encoded, err = canonical.Encode(&o); err != nil {
				return "", fmt.Errorf("the offer: %w", err)
			}
			if expiry = found.Expiry; bytes.Equal(found.Bytes, encoded) {
				return "the offer is listed", nil
			}
			return "", nil
		},
	}
}

// offerValue is attached to an offer: what the largest one costs for its days, and
// fees.
func offerValue(expiry time.Time) uint64 {
	days := uint64(max(time.Until(expiry), 0)/(24*time.Hour)) + 1
	return putValue + min(days, contract.MaxOfferDays+1)*11_000_000
}

// offer proves the wallet's offer.
func (p *Publisher) offer(ctx context.Context, view *lite.View) (contract.Offer, error) {
	account, err := view.Method(ctx, Listing(), listingHash, "offer", number(p.Wallet.Address.ID))
	if errors.Is(err, lite.ErrNoAccount) {
		return contract.Offer{}, ErrNoOffer
	}
	if err != nil {
		return contract.Offer{}, err
	}
	o, err := contract.Listing(account.Data).Offer(p.Wallet.Address.ID)
	if errors.Is(err, contract.ErrNoRecord) {
		return o, ErrNoOffer
	}
	return o, err
}

// RemoveOffer takes the wallet's offer away.
func RemoveOffer() Operation {
	return Operation{
		Name: "remove offer", Value: callValue,
		To: func(*Publisher) lite.Address { return Listing() },
		Body: func(p *Publisher, id uint64) (*cell.Cell, error) {
			return contract.RemoveOffer(id, p.Wallet.Address.ID), nil
		},
		Explain: contract.ExplainListing,
		Done: func(ctx context.Context, p *Publisher, view *lite.View) (string, error) {
			_, err := p.offer(ctx, view)
			if errors.Is(err, ErrNoOffer) {
				return "the wallet has no offer", nil
			}
			return "", err
		},
	}
}
