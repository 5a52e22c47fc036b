package pay

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"

	"chrysalis/channel/voucher"
)

// PayerHeader is a request's header field that says whose credit it uses, and proves
// that the client may. A voucher does not: it is on the chain for everyone to read
// once it has been claimed.
const PayerHeader = "Chrysalis-Payer"

// payerDomain begins what is signed; the rest are the SHA-256 of the VM's TLS key
// (SubjectPublicKeyInfo, DER) and the channel's account.
const payerDomain = "chrysalis/payer/1"

// payerSize is that of an encoded Payer in bytes.
const payerSize = 32 + ed25519.SignatureSize

// ErrPayer is a proof for another VM, or by another key than the channel's.
var ErrPayer = errors.New("the signature in " + PayerHeader + " is not the channel's payer's for this VM")

// A Payer proves to one VM that a client has a channel's key. It is a secret of the
// two: the VM's TLS key never leaves it, and to another VM it says nothing.
type Payer struct {
	Channel   voucher.Channel
	Signature [ed25519.SignatureSize]byte
}

func payerMessage(channel voucher.Channel, spki [32]byte) []byte {
	return append(append([]byte(payerDomain), spki[:]...), channel[:]...)
}

// SignPayer makes the proof for the VM whose TLS key has this SHA-256.
func SignPayer(key ed25519.PrivateKey, channel voucher.Channel, spki [32]byte) Payer {
	return Payer{channel, [ed25519.SignatureSize]byte(ed25519.Sign(key, payerMessage(channel, spki)))}
}

// Verify reports ErrPayer unless the key signed the proof for the VM.
func (p Payer) Verify(key voucher.Key, spki [32]byte) error {
	if !ed25519.Verify(key[:], payerMessage(p.Channel, spki), p.Signature[:]) {
		return ErrPayer
	}
	return nil
}

// String is the proof as PayerHeader has it: channel and signature in base64url.
func (p Payer) String() string {
	return base64.RawURLEncoding.EncodeToString(append(append([]byte(nil), p.Channel[:]...), p.Signature[:]...))
}

// ParsePayer reads what String returns, and nothing else.
func ParsePayer(s string) (p Payer, err error) {
	if len(s) != base64.RawURLEncoding.EncodedLen(payerSize) {
		return p, fmt.Errorf("%s: not %d bytes in base64url without padding", PayerHeader, payerSize)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != payerSize {
		return p, fmt.Errorf("%s: not %d bytes in base64url without padding", PayerHeader, payerSize)
	}
	return Payer{voucher.Channel(b), [ed25519.SignatureSize]byte(b[32:])}, nil
}
