// Package voucher makes and checks what a client pays with: a signature over all
// that it has paid so far through one payment channel. The contract of the channel
// (registry/contract/channel.tolk) pays the payee what it adds to the one before.
//
// The package knows nothing of a chain, so that the agent can check vouchers with
// no client of TON in the VM. That a channel exists, holds enough and names the
// right payee is checked by the launcher, with proofs (package channel).
package voucher

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// Size is that of an encoded voucher in bytes.
const Size = 4 + 32 + 8 + ed25519.SignatureSize

// TextSize is that of a voucher as text in bytes.
const TextSize = Size / 3 * 4

// domain begins what is signed, and keeps the signature from meaning something
// else. All that is signed has 67 bytes, which no hash that a wallet signs has.
const domain = "chrysalis/voucher/1"

// CodeHash is the hash of the code that every channel has: what a voucher means is
// what this code makes of it.
var CodeHash = mustHex("7c4d2da756df3ad8211a6b388338c5e502ce86fb66fe3fd540a9ae3e13977ea2")

// A Channel is a channel's account in the basechain.
type Channel [32]byte

// String is 0:HEX.
func (c Channel) String() string { return "0:" + hex.EncodeToString(c[:]) }

// ParseChannel reads what String writes, in lower case, and nothing else.
func ParseChannel(s string) (c Channel, err error) {
	if len(s) == 2+2*len(c) {
		if _, err := hex.Decode(c[:], []byte(s[2:])); err == nil && c.String() == s {
			return c, nil
		}
	}
	return Channel{}, fmt.Errorf("%.80q is not a channel: write 0: and 64 hexadecimal digits", s)
}

// MarshalText implements encoding.TextMarshaler.
func (c Channel) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Channel) UnmarshalText(text []byte) (err error) {
	*c, err = ParseChannel(string(text))
	return err
}

// A Key is a payer's Ed25519 public key.
type Key [ed25519.PublicKeySize]byte

// A Voucher says what a payer has paid through a channel by now.
type Voucher struct {
	GlobalID  int32 // of the network
	Channel   Channel
	Total     uint64 // nanotons, since the channel was opened
	Signature [ed25519.SignatureSize]byte
}

// Errors of vouchers.
var (
	ErrMalformed = errors.New("voucher: it is malformed")
	ErrSignature = errors.New("voucher: its signature is not of the channel's payer")
	ErrNetwork   = errors.New("voucher: it is for another network")
	ErrChannel   = errors.New("voucher: it is for another channel")
	ErrStale     = errors.New("voucher: it is for no more than the one before")
	ErrKey       = errors.New("the payer's key is not one that every verifier reads alike")
)

// signed is what the payer signs: the domain, the network's global id and the
// workchain 0 (32 bits each), the channel's account and the total (64 bits), all
// big-endian.
func (v *Voucher) signed() []byte {
	b := make([]byte, 0, len(domain)+4+4+32+8)
	b = append(b, domain...)
	b = binary.BigEndian.AppendUint32(b, uint32(v.GlobalID))
	b = binary.BigEndian.AppendUint32(b, 0)
	b = append(b, v.Channel[:]...)
	return binary.BigEndian.AppendUint64(b, v.Total)
}

// Sign makes a voucher for a total in nanotons.
func Sign(key ed25519.PrivateKey, globalID int32, channel Channel, total uint64) Voucher {
	v := Voucher{GlobalID: globalID, Channel: channel, Total: total}
	v.Signature = [ed25519.SignatureSize]byte(ed25519.Sign(key, v.signed()))
	return v
}

// Verify checks the signature; the error is ErrSignature. The key must have passed
// CheckKey.
func (v *Voucher) Verify(key Key) error {
	if !ed25519.Verify(key[:], v.signed(), v.Signature[:]) {
		return ErrSignature
	}
	return nil
}

// Encode returns the voucher's Size bytes: global id, channel, total and signature,
// integers big-endian.
func (v *Voucher) Encode() []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, Size), uint32(v.GlobalID))
	b = append(b, v.Channel[:]...)
	b = binary.BigEndian.AppendUint64(b, v.Total)
	return append(b, v.Signature[:]...)
}

// Decode reads what Encode returns; the error is ErrMalformed. The signature is not
// checked.
func Decode(b []byte) (v Voucher, err error) {
	if len(b) != Size {
		return v, fmt.Errorf("%w: %d bytes, expected %d", ErrMalformed, len(b), Size)
	}
	v.GlobalID = int32(binary.BigEndian.Uint32(b))
	v.Channel = Channel(b[4:])
	v.Total = binary.BigEndian.Uint64(b[36:])
	v.Signature = [ed25519.SignatureSize]byte(b[44:])
	return v, nil
}

// String is the voucher as text: Encode's bytes in base64url.
func (v Voucher) String() string { return base64.RawURLEncoding.EncodeToString(v.Encode()) }

// Parse reads what String returns, and nothing else.
func Parse(s string) (Voucher, error) {
	if len(s) != TextSize {
		return Voucher{}, fmt.Errorf("%w: %d characters, expected %d", ErrMalformed, len(s), TextSize)
	}
	// The length has no room for line breaks, which base64 would pass over, and no
	// bits left over.
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return Voucher{}, fmt.Errorf("%w: it is not base64url", ErrMalformed)
	}
	return Decode(b)
}

// CheckKey refuses public keys of which implementations of Ed25519 disagree, or
// whose signatures anyone can make: one that is not reduced modulo the field's prime
// 2²⁵⁵ − 19 (RFC 8032, section 5.1.3, demands it, not all check it), and those of
// order 1, 2, 4 and 8. A voucher by such a key might pass here and not at the
// contract. By a key that is no point of the curve nothing verifies anyway.
func CheckKey(key Key) error {
	y := key
	y[31] &= 0x7f
	if !below(y, prime) {
		return fmt.Errorf("%w: it is not reduced", ErrKey)
	}
	for _, small := range smallOrder {
		if y == small {
			return fmt.Errorf("%w: it is of small order", ErrKey)
		}
	}
	return nil
}

// below compares little-endian integers.
func below(a, b [32]byte) bool {
	for i := 31; i >= 0; i-- {
		if a[i] != b[i] {
			return a[i] < b[i]
		}
	}
	return false
}

// prime is 2²⁵⁵ − 19, little-endian.
var prime = func() (p [32]byte) {
	for i := range p {
		p[i] = 0xff
	}
	p[0], p[31] = 0xed, 0x7f
	return p
}()

// smallOrder are the y-coordinates of the points whose order divides 8: 1, −1, 0,
// and two of order 8.
var smallOrder = [][32]byte{
	{1}, minusOne, {},
	mustHex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
	mustHex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
}

var minusOne = func() [32]byte {
	p := prime
	p[0]--
	return p
}()

func mustHex(s string) [32]byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err) // a constant
	}
	return [32]byte(b)
}
