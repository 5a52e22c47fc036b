// Package receipt is what a VM signs about an answer that it gave: which model
// answered which request with what, and how long both were. The guest makes
// receipts (agent), whoever is shown one checks it with the receipt key out of the
// VM's evidence (package attest).
//
// A receipt holds nothing of a prompt or an answer. Their hashes are salted with
// 32 bytes that only the client and the VM know, so that who sees a receipt cannot
// try out what was asked; who is to check the bodies is given them with the salt.
//
// It proves that a VM with that key, and so with that evidence, sent this answer
// to this request. It proves nothing about time: the client's time is what the
// client said, and the VM's clock is the host's.
package receipt

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"regexp"
	"strconv"

	"chrysalis/attest/evidence"
	"chrysalis/canonical"
	"chrysalis/channel/voucher"
	"chrysalis/pay"
)

// The header fields of a request and its answer.
const (
	// SaltHeader is a request's: SaltSize random bytes in base64url without padding.
	// Where a client sends none the VM makes one, and it is the answer's.
	SaltHeader = "Chrysalis-Salt"
	// TimeHeader is a request's: the client's time, milliseconds since 1970 UTC, in
	// decimal. It is optional.
	TimeHeader = "Chrysalis-Time"
	// Trailer is the field in an answer's trailer that holds the receipt.
	Trailer = "Chrysalis-Receipt"
)

// CommentPrefix begins the line of a stream of events that holds its receipt. It
// is a comment there, which clients that know nothing of it pass over (WHATWG HTML,
// section 9.2.6). What the receipt covers of the stream is all before this line.
const CommentPrefix = ": chrysalis-receipt "

// Sizes.
const (
	Version  = 1
	SaltSize = 32      // bytes
	MaxSize  = 2 << 10 // bytes of an encoded receipt
)

// context keeps a signature from meaning something else.
const context = "chrysalis/receipt/v1"

// Receipt is what is signed.
type Receipt struct {
	Version  int    `json:"version"`
	Sequence int64  `json:"sequence"`  // of the VM's receipts, from 1
	Manifest string `json:"manifest"`  // SHA-384 of the VM's manifest, hexadecimal
	Model    string `json:"model"`     // NAME@REVISION
	RootHash string `json:"root_hash"` // of the model's disk, hexadecimal
	Request  string `json:"request"`   // SHA-256(salt ‖ the request's body), hexadecimal
	Response string `json:"response"`  // SHA-256(salt ‖ the answer's body), hexadecimal
	// The engine's counts, but never more than the sizes of what was asked and
	// answered allow. Absent where the engine gave none.
	PromptTokens     *int64 `json:"prompt_tokens,omitempty"`
	CompletionTokens *int64 `json:"completion_tokens,omitempty"`
	// Times are milliseconds since 1970 UTC.
	ClientTime  *int64 `json:"client_time,omitempty"` // TimeHeader's, as the client said it
	UntrustedVM int64  `json:"vm_time_untrusted"`     // the VM's clock, which its host can set
	// Payment is what the answer was charged. Absent where it was free.
	Payment *Payment `json:"payment,omitempty"`
}

// Payment says what an answer was charged: ⌊(PromptTokens · PromptPrice +
// CompletionTokens · CompletionPrice) / 1,000,000⌋ nanotons. Amounts are nanotons in
// decimal.
type Payment struct {
	Channel          string `json:"channel"`           // 0:HEX
	PromptPrice      int64  `json:"prompt_price"`      // nanotons a million tokens
	CompletionPrice  int64  `json:"completion_price"`  // nanotons a million tokens
	PromptTokens     int64  `json:"prompt_tokens"`     // charged for; 0 where the engine's figures were none or cannot be
	CompletionTokens int64  `json:"completion_tokens"` // charged for
	Charged          string `json:"charged"`
	Used             string `json:"used"`  // of the channel, with this answer
	Cover            string `json:"cover"` // the total of the channel's best voucher
}

// document is a receipt as it is sent.
type document struct {
	Receipt
	Signature evidence.Bytes `json:"signature"` // Ed25519 over context ‖ the canonical encoding of Receipt
}

const maxInteger = 1<<53 - 1

var (
	hash256RE = regexp.MustCompile(`^[0-9a-f]{64}$`)
	hash384RE = regexp.MustCompile(`^[0-9a-f]{96}$`)
	modelRE   = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,129}@[A-Za-z0-9._-]{1,64}$`)
)

// Validate reports the first value that is missing or out of bounds.
func (r *Receipt) Validate() error {
	if r.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", r.Version, Version)
	}
	if !modelRE.MatchString(r.Model) {
		return errors.New("model: not NAME@REVISION")
	}
	for _, h := range []struct {
		name, value string
		is          *regexp.Regexp
	}{
		{"manifest", r.Manifest, hash384RE}, {"root_hash", r.RootHash, hash256RE},
		{"request", r.Request, hash256RE}, {"response", r.Response, hash256RE},
	} {
		if !h.is.MatchString(h.value) {
			return fmt.Errorf("%s: not a hash in lower-case hexadecimal", h.name)
		}
	}
	for _, n := range []struct {
		name  string
		value *int64
		low   int64
	}{
		{"sequence", &r.Sequence, 1}, {"vm_time_untrusted", &r.UntrustedVM, 0}, {"client_time", r.ClientTime, 0},
		{"prompt_tokens", r.PromptTokens, 0}, {"completion_tokens", r.CompletionTokens, 0},
	} {
		if n.value != nil && (*n.value < n.low || *n.value > maxInteger) {
			return fmt.Errorf("%s: %d is out of bounds", n.name, *n.value)
		}
	}
	if r.Payment != nil {
		return r.Payment.validate()
	}
	return nil
}

func (p *Payment) validate() error {
	if _, err := voucher.ParseChannel(p.Channel); err != nil {
		return errors.New("payment.channel: not a channel")
	}
	price := pay.Price{Prompt: p.PromptPrice, Completion: p.CompletionPrice}
	if err := price.Validate(); err != nil {
		return fmt.Errorf("payment: %w", err)
	}
	if min(p.PromptTokens, p.CompletionTokens) < 0 || max(p.PromptTokens, p.CompletionTokens) > maxInteger {
		return errors.New("payment: a number of tokens is out of bounds")
	}
	var amounts [3]uint64
	for i, text := range []string{p.Charged, p.Used, p.Cover} {
		n, err := pay.ParseAmount(text)
		if err != nil {
			return fmt.Errorf("payment: %w", err)
		}
		amounts[i] = n
	}
	if amounts[0] != price.Cost(p.PromptTokens, p.CompletionTokens) {
		return errors.New("payment.charged: not what the tokens cost at the price")
	}
	if amounts[1] < amounts[0] {
		return errors.New("payment.used: less than was charged")
	}
	return nil
}

// Validate implements canonical.Document.
func (d *document) Validate() error {
	if len(d.Signature) != ed25519.SignatureSize {
		return fmt.Errorf("signature: %d bytes, expected %d", len(d.Signature), ed25519.SignatureSize)
	}
	return d.Receipt.Validate()
}

func (r *Receipt) message() ([]byte, error) {
	encoded, err := canonical.Encode(r)
	if err != nil {
		return nil, err
	}
	return append([]byte(context), encoded...), nil
}

// Sign returns the encoding of a signed receipt: canonical JSON (RFC 8785) in one
// line of printable ASCII, at most MaxSize bytes.
func (r *Receipt) Sign(key ed25519.PrivateKey) ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	message, err := r.message()
	if err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	out, err := canonical.Encode(document{*r, ed25519.Sign(key, message)})
	if err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	return out, nil
}

// ErrSignature is a receipt that another key signed, or that was changed.
var ErrSignature = errors.New("receipt: its signature is not of this receipt key")

// Verify reads a signed receipt. It refuses anything but the canonical encoding of
// one that the key signed.
func Verify(data []byte, key ed25519.PublicKey) (*Receipt, error) {
	if len(key) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("receipt: a key of %d bytes, expected %d", len(key), ed25519.PublicKeySize)
	}
	var d document
	if err := canonical.Decode(data, MaxSize, &d); err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	message, err := d.message()
	if err != nil {
		return nil, fmt.Errorf("receipt: %w", err)
	}
	if !ed25519.Verify(key, message, d.Signature) {
		return nil, ErrSignature
	}
	return &d.Receipt, nil
}

// NewHash returns a hash to write a body to; Sum gives what a receipt holds of it.
func NewHash(salt [SaltSize]byte) hash.Hash {
	h := sha256.New()
	h.Write(salt[:])
	return h
}

// CheckBodies reports which of the bodies the receipt is not about. Of a stream of
// events the response is what SplitStream returns.
func (r *Receipt) CheckBodies(salt [SaltSize]byte, request, response []byte) error {
	for _, body := range []struct {
		name, want string
		data       []byte
	}{{"request", r.Request, request}, {"response", r.Response, response}} {
		h := NewHash(salt)
		h.Write(body.data)
		got := hex.EncodeToString(h.Sum(nil))
		if subtle.ConstantTimeCompare([]byte(got), []byte(body.want)) != 1 {
			return fmt.Errorf("receipt: it is for another %s, or for another salt", body.name)
		}
	}
	return nil
}

// CheckManifest reports an error unless the receipt names this manifest, as the
// evidence holds it.
func (r *Receipt) CheckManifest(encoded []byte) error {
	if sum := sha512.Sum384(encoded); hex.EncodeToString(sum[:]) != r.Manifest {
		return errors.New("receipt: it is of a VM with another manifest")
	}
	return nil
}

// SplitStream takes a whole stream of events apart: what its receipt covers, and
// the receipt.
func SplitStream(body []byte) (covered, receipt []byte, err error) {
	at := bytes.Index(body, []byte("\n"+CommentPrefix))
	if at < 0 {
		return nil, nil, errors.New("receipt: the stream has none; it did not end well")
	}
	covered = body[:at+1]
	receipt, rest, _ := bytes.Cut(body[at+1+len(CommentPrefix):], []byte("\n"))
	// Only padding may follow.
	for line := range bytes.Lines(rest) {
		if line[0] != ':' && line[0] != '\n' || bytes.HasPrefix(line, []byte(CommentPrefix)) {
			return nil, nil, errors.New("receipt: the stream goes on after it")
		}
	}
	return covered, receipt, nil
}

// ParseSalt reads a SaltHeader.
func ParseSalt(text string) (salt [SaltSize]byte, err error) {
	if len(text) == base64.RawURLEncoding.EncodedLen(SaltSize) {
		if n, err := base64.RawURLEncoding.Strict().Decode(salt[:], []byte(text)); err == nil && n == SaltSize {
			return salt, nil
		}
	}
	return salt, fmt.Errorf("%s: not %d bytes in base64url without padding", SaltHeader, SaltSize)
}

// FormatSalt writes a SaltHeader.
func FormatSalt(salt [SaltSize]byte) string { return base64.RawURLEncoding.EncodeToString(salt[:]) }

// ParseTime reads a TimeHeader.
func ParseTime(text string) (int64, error) {
	ms, err := strconv.ParseInt(text, 10, 64)
	if err != nil || ms < 0 || ms > maxInteger || strconv.FormatInt(ms, 10) != text {
		return 0, fmt.Errorf("%s: not milliseconds since 1970 in decimal", TimeHeader)
	}
	return ms, nil
}
