package pay

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"

	"chrysalis/canonical"
	"chrysalis/channel/voucher"
)

// VoucherHeader is a request's header field with a voucher as text.
const VoucherHeader = "Chrysalis-Voucher"

// FromHeader reads what a request's header says of its payment: who pays, and a
// voucher. Each is nil where it is not there; one that is there twice is an error.
func FromHeader(header map[string][]string) (p *Payer, v *voucher.Voucher, err error) {
	for _, name := range []string{PayerHeader, VoucherHeader} {
		if len(header[name]) > 1 {
			return nil, nil, fmt.Errorf("%s: give it once", name)
		}
	}
	if values := header[PayerHeader]; len(values) > 0 {
		payer, err := ParsePayer(values[0])
		if err != nil {
			return nil, nil, err
		}
		p = &payer
	}
	if values := header[VoucherHeader]; len(values) > 0 {
		parsed, err := voucher.Parse(values[0])
		if err != nil {
			return nil, nil, err
		}
		v = &parsed
	}
	if p != nil && v != nil && p.Channel != v.Channel {
		return nil, nil, voucher.ErrChannel
	}
	return p, v, nil
}

// Values of terms.
const (
	TermsVersion = 1
	Scheme       = "chrysalis-channel"
	Asset        = "TON"
	MaxTerms     = 16 << 10 // bytes of encoded terms
)

// Terms are the body of an answer 402: what would be accepted. The form is that of
// x402 (version 1): a list of ways to pay, whose amounts are decimal strings in the
// asset's smallest unit.
type Terms struct {
	Version int      `json:"x402Version"`
	Error   string   `json:"error"`
	Accepts []Accept `json:"accepts"`
}

// An Accept is one way to pay: vouchers through a channel of one network.
type Accept struct {
	Scheme   string `json:"scheme"`            // Scheme
	Network  string `json:"network"`           // ton:GLOBALID
	Asset    string `json:"asset"`             // Asset; amounts are nanotons
	PayTo    string `json:"payTo"`             // the owner's account, 0:HEX
	Amount   string `json:"maxAmountRequired"` // what a voucher must add at least
	Resource string `json:"resource"`          // the path that was asked for
	Extra    Extra  `json:"extra"`
}

// Extra is what x402 leaves to the scheme.
type Extra struct {
	CodeHash   string       `json:"channel_code_hash"` // of the channel's contract, hexadecimal
	MinDeposit string       `json:"min_deposit"`       // nanotons
	MinDelay   int64        `json:"min_delay_seconds"` // of a closing by the payer
	Models     []ModelPrice `json:"models"`            // in the order of their ids
	Credit     *CreditTerms `json:"credit,omitempty"`  // of the request's channel
}

// A ModelPrice is a model's current price.
type ModelPrice struct {
	ID string `json:"id"` // NAME@REVISION
	Price
}

// CreditTerms are where the request's channel stands.
type CreditTerms struct {
	Channel string `json:"channel"` // 0:HEX
	Used    string `json:"used"`    // nanotons
	Cover   string `json:"cover"`
	Limit   string `json:"limit"`
}

// An Owner is what terms say of who is paid.
type Owner struct {
	Account    [32]byte // in the basechain
	MinDeposit uint64   // nanotons
	MinDelay   int64    // seconds
}

// Terms returns what a client is told that has no cover. why must be printable ASCII
// without quotes, backslashes, '<', '>' and '&'. credit is nil but for a client that
// has a session: where a channel stands is nobody else's business.
func (b *Book) Terms(o Owner, resource, why string, credit *Credit) Terms {
	tariff := b.Prices()
	a := Accept{
		Scheme: Scheme, Network: "ton:" + strconv.FormatInt(int64(b.globalID), 10), Asset: Asset,
		PayTo: voucher.Channel(o.Account).String(), Amount: FormatAmount(tariff.Step), Resource: resource,
		Extra: Extra{CodeHash: hex.EncodeToString(voucher.CodeHash[:]), MinDeposit: FormatAmount(o.MinDeposit), MinDelay: o.MinDelay},
	}
	for id, p := range tariff.Models {
		a.Extra.Models = append(a.Extra.Models, ModelPrice{id, p})
	}
	slices.SortFunc(a.Extra.Models, func(x, y ModelPrice) int { return cmp.Compare(x.ID, y.ID) })
	if credit != nil {
		a.Extra.Credit = &CreditTerms{credit.Channel.String(), FormatAmount(credit.Used), FormatAmount(credit.Cover), FormatAmount(credit.Limit)}
	}
	return Terms{TermsVersion, why, []Accept{a}}
}

// FormatAmount writes nanotons in decimal, as terms and receipts have them.
func FormatAmount(nano uint64) string { return strconv.FormatUint(nano, 10) }

// ParseAmount reads nanotons in decimal, as terms have them.
func ParseAmount(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != s {
		return 0, fmt.Errorf("%.40q is not an amount", s)
	}
	return n, nil
}

var (
	hashRE     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	resourceRE = regexp.MustCompile(`^/[A-Za-z0-9/._-]{0,127}$`)
)

// GlobalID is that of the network.
func (a *Accept) GlobalID() (int32, error) {
	const prefix = "ton:"
	if len(a.Network) > len(prefix) && a.Network[:len(prefix)] == prefix {
		text := a.Network[len(prefix):]
		if n, err := strconv.ParseInt(text, 10, 32); err == nil && strconv.FormatInt(n, 10) == text {
			return int32(n), nil
		}
	}
	return 0, fmt.Errorf("network: %.40q is not ton:GLOBALID", a.Network)
}

// Validate implements canonical.Document.
func (t *Terms) Validate() error {
	if t.Version != TermsVersion {
		return fmt.Errorf("x402Version is %d, this program reads version %d", t.Version, TermsVersion)
	}
	if len(t.Error) > 1024 {
		return errors.New("error: too long")
	}
	if len(t.Accepts) == 0 || len(t.Accepts) > 4 {
		return fmt.Errorf("accepts: there are %d, expected 1 to 4", len(t.Accepts))
	}
	for i := range t.Accepts {
		if err := t.Accepts[i].validate(); err != nil {
			return fmt.Errorf("accepts[%d].%w", i, err)
		}
	}
	return nil
}

func (a *Accept) validate() error {
	if a.Scheme != Scheme || a.Asset != Asset {
		return fmt.Errorf("scheme: %.40q of %.40q is not known", a.Scheme, a.Asset)
	}
	if _, err := a.GlobalID(); err != nil {
		return err
	}
	if _, err := voucher.ParseChannel(a.PayTo); err != nil {
		return errors.New("payTo: not an account of the basechain")
	}
	if !resourceRE.MatchString(a.Resource) {
		return errors.New("resource: not a path")
	}
	if step, err := ParseAmount(a.Amount); err != nil || step == 0 || step > MaxStep {
		return errors.New("maxAmountRequired: out of bounds")
	}
	e := &a.Extra
	if !hashRE.MatchString(e.CodeHash) {
		return errors.New("extra.channel_code_hash: not a hash in lower-case hexadecimal")
	}
	if _, err := ParseAmount(e.MinDeposit); err != nil {
		return errors.New("extra.min_deposit: not an amount")
	}
	if e.MinDelay < 0 || e.MinDelay > math.MaxUint32 {
		return errors.New("extra.min_delay_seconds: out of bounds")
	}
	if len(e.Models) == 0 || len(e.Models) > maxModels {
		return fmt.Errorf("extra.models: there are %d, expected 1 to %d", len(e.Models), maxModels)
	}
	for i, m := range e.Models {
		if !modelRE.MatchString(m.ID) || i > 0 && e.Models[i-1].ID >= m.ID {
			return fmt.Errorf("extra.models[%d]: not NAME@REVISION, or not in order", i)
		}
		if err := m.Price.Validate(); err != nil {
			return fmt.Errorf("extra.models[%d]: %w", i, err)
		}
	}
	if c := e.Credit; c != nil {
		if _, err := voucher.ParseChannel(c.Channel); err != nil {
			return errors.New("extra.credit.channel: not a channel")
		}
		for _, text := range []string{c.Used, c.Cover, c.Limit} {
			if _, err := ParseAmount(text); err != nil {
				return errors.New("extra.credit: not an amount")
			}
		}
	}
	return nil
}

// Encode returns canonical JSON (RFC 8785).
func (t *Terms) Encode() ([]byte, error) {
	if err := t.Validate(); err != nil {
		return nil, fmt.Errorf("terms: %w", err)
	}
	b, err := canonical.Encode(t)
	if err != nil {
		return nil, fmt.Errorf("terms: %w", err)
	}
	return b, nil
}

// ParseTerms reads what Encode returns, and names what is wrong with anything else.
func ParseTerms(data []byte) (*Terms, error) {
	t := new(Terms)
	if err := canonical.Decode(data, MaxTerms, t); err != nil {
		return nil, fmt.Errorf("terms: %w", err)
	}
	return t, nil
}
