package lite

import (
	"fmt"

	"github.com/xssnick/tonutils-go/address"
)

// An Address is an account's address in the basechain.
type Address struct{ ID [32]byte }

// ParseAddress reads an address, as 0:HEX or in base64.
func ParseAddress(s string) (Address, error) {
	a, err := address.ParseAddr(s)
	if err != nil {
		if a, err = address.ParseRawAddr(s); err != nil {
			return Address{}, fmt.Errorf("%q is not a TON address", s)
		}
	}
	return AddressOf(a)
}

// AddressOf converts an address of the basechain.
func AddressOf(a *address.Address) (Address, error) {
	if a == nil || a.Type() != address.StdAddress || len(a.Data()) != 32 {
		return Address{}, fmt.Errorf("%v is not an account's address", a)
	}
	if a.Workchain() != 0 {
		return Address{}, fmt.Errorf("%v is not in the basechain", a)
	}
	return Address{[32]byte(a.Data())}, nil
}

// Std is the address as tonutils-go has it, for messages that bounce.
func (a Address) Std() *address.Address { return a.std() }

func (a Address) std() *address.Address { return address.NewAddress(0, 0, a.ID[:]) }

// String is the address in base64, as wallets show those of contracts.
func (a Address) String() string { return a.std().Bounce(true).String() }

// Raw is 0:HEX.
func (a Address) Raw() string { return fmt.Sprintf("0:%x", a.ID) }

// MarshalText implements encoding.TextMarshaler.
func (a Address) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Address) UnmarshalText(text []byte) (err error) {
	*a, err = ParseAddress(string(text))
	return err
}
