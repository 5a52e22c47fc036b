// Package evidence is the document with which a VM proves what it is, and the
// hashes that tie its parts together. The guest makes it (agent), the client
// checks it (attest): nothing here trusts anybody.
//
// The document is canonical JSON (RFC 8785); byte strings are base64url without
// padding (RFC 4648, section 5).
package evidence

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"

	"chrysalis/canonical"
)

// Path is where the inference port serves evidence: GET Path?nonce=N, N being
// NonceSize random bytes in base64url.
const Path = "/.well-known/attestation"

// GPUCollateralPath is where the inference port serves what the GPUs of the VM are
// judged by (package attest/nvidia, Collateral); it is not there without GPUs.
const GPUCollateralPath = "/.well-known/gpu-collateral"

// Bounds and sizes.
const (
	Version   = 1
	NonceSize = 32      // bytes of a client's nonce
	MaxNonces = 256     // clients that one quote answers
	MaxSize   = 2 << 20 // bytes of a document

	maxQuote       = 64 << 10
	maxLog         = 512 << 10
	maxCertificate = 16 << 10
	maxGPU         = 256 << 10
)

// Bytes is a byte string in a document.
type Bytes []byte

// MarshalText implements encoding.TextMarshaler.
func (b Bytes) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, b), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) error {
	// The package's decoder skips line ends, strict or not; canonical JSON has none.
	out, err := base64.RawURLEncoding.Strict().AppendDecode(make([]byte, 0, base64.RawURLEncoding.DecodedLen(len(text))), text)
	if err != nil {
		return errors.New("a byte string is not base64url without padding")
	}
	*b = out
	return nil
}

// Document is the evidence of one VM for the clients whose nonces it lists. It
// has either TDX or TPM.
type Document struct {
	Version    int     `json:"version"`
	Nonces     []Bytes `json:"nonces"`      // 1 to MaxNonces, NonceSize bytes each
	TLSKey     Bytes   `json:"tls_key"`     // SubjectPublicKeyInfo, DER (RFC 5280, section 4.1)
	ReceiptKey Bytes   `json:"receipt_key"` // Ed25519 public key, 32 bytes (RFC 8032)
	Manifest   Bytes   `json:"manifest"`    // as the VM read it
	CEL        Bytes   `json:"cel"`         // package measure/cel
	TDX        *TDX    `json:"tdx,omitempty"`
	TPM        *TPM    `json:"tpm,omitempty"`
	GPU        Bytes   `json:"gpu,omitempty"` // the GPUs' evidence; absent without GPUs
}

// TDX is a TD's proof.
type TDX struct {
	Quote Bytes `json:"quote"` // Intel TDX DCAP quote, version 4 or 5
	CCEL  Bytes `json:"ccel"`  // the firmware's event log (UEFI 2.10, section 38.4.1), without trailing 0xff
}

// TPM is a TPM's proof.
type TPM struct {
	Quote     Bytes `json:"quote"`     // TPMS_ATTEST
	Signature Bytes `json:"signature"` // TPMT_SIGNATURE
	PCRs      []PCR `json:"pcrs"`      // those quoted, of the SHA-256 bank, by index
	AK        Bytes `json:"ak"`        // TPMT_PUBLIC of the attestation key
	// Certificates hold the attestation key's certificate and what the TPM has of
	// its chain, leaf first, DER.
	Certificates []Bytes `json:"certificates"`
	Log          Bytes   `json:"log"` // the firmware's event log (TCG PC Client Platform Firmware Profile)
}

// PCR is a register's value.
type PCR struct {
	Index  int   `json:"index"`
	SHA256 Bytes `json:"sha256"`
}

// QuotedPCRs are the PCRs that a TPM's quote covers. PCR 10 is the kernel's
// integrity measurement's, which nothing here uses, and 16 to 23 can be reset.
var QuotedPCRs = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15}

// Validate reports the first part that is missing or out of bounds. It does not
// look into quotes, logs and keys.
func (d *Document) Validate() error {
	if d.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", d.Version, Version)
	}
	if len(d.Nonces) < 1 || len(d.Nonces) > MaxNonces {
		return fmt.Errorf("nonces: there are %d, expected 1 to %d", len(d.Nonces), MaxNonces)
	}
	for i, n := range d.Nonces {
		if len(n) != NonceSize {
			return fmt.Errorf("nonces[%d]: %d bytes, expected %d", i, len(n), NonceSize)
		}
	}
	if len(d.ReceiptKey) != 32 {
		return fmt.Errorf("receipt_key: %d bytes, expected 32", len(d.ReceiptKey))
	}
	if (d.TDX == nil) == (d.TPM == nil) {
		return errors.New("expected the proof of either a TD or a TPM")
	}
	parts := []part{
		{"tls_key", d.TLSKey, 1, 4 << 10},
		{"manifest", d.Manifest, 1, 64 << 10},
		{"cel", d.CEL, 1, 256 << 10},
		{"gpu", d.GPU, 0, maxGPU},
	}
	if d.GPU != nil && len(d.GPU) == 0 {
		return errors.New("gpu: empty; a VM without GPUs has no such field")
	}
	if t := d.TDX; t != nil {
		parts = append(parts, part{"tdx.quote", t.Quote, 1, maxQuote}, part{"tdx.ccel", t.CCEL, 1, maxLog})
	}
	if t := d.TPM; t != nil {
		parts = append(parts,
			part{"tpm.quote", t.Quote, 1, 4 << 10},
			part{"tpm.signature", t.Signature, 1, 4 << 10},
			part{"tpm.ak", t.AK, 1, 4 << 10},
			part{"tpm.log", t.Log, 1, maxLog})
		if len(t.Certificates) < 1 || len(t.Certificates) > 8 {
			return fmt.Errorf("tpm.certificates: there are %d, expected 1 to 8", len(t.Certificates))
		}
		for i, c := range t.Certificates {
			parts = append(parts, part{fmt.Sprintf("tpm.certificates[%d]", i), c, 1, maxCertificate})
		}
		if len(t.PCRs) != len(QuotedPCRs) {
			return fmt.Errorf("tpm.pcrs: there are %d, expected %d", len(t.PCRs), len(QuotedPCRs))
		}
		for i, pcr := range t.PCRs {
			if pcr.Index != QuotedPCRs[i] {
				return fmt.Errorf("tpm.pcrs[%d]: PCR %d, expected PCR %d", i, pcr.Index, QuotedPCRs[i])
			}
			if len(pcr.SHA256) != sha256.Size {
				return fmt.Errorf("tpm.pcrs[%d]: %d bytes, expected %d", i, len(pcr.SHA256), sha256.Size)
			}
		}
	}
	for _, p := range parts {
		if len(p.data) < p.low || len(p.data) > p.high {
			return fmt.Errorf("%s: %d bytes, expected %d to %d", p.name, len(p.data), p.low, p.high)
		}
	}
	return nil
}

type part struct {
	name      string
	data      []byte
	low, high int
}

// Encode returns the canonical encoding of a valid document.
func (d *Document) Encode() ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	out, err := canonical.Encode(d)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if len(out) > MaxSize {
		return nil, fmt.Errorf("evidence: %d bytes, at most %d are allowed", len(out), MaxSize)
	}
	return out, nil
}

// Parse reads a document. It refuses anything but the canonical encoding of a
// valid one.
func Parse(data []byte) (*Document, error) {
	var d Document
	if err := canonical.Decode(data, MaxSize, &d); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	return &d, nil
}

// Lists reports whether the document answers a nonce.
func (d *Document) Lists(nonce []byte) bool {
	for _, n := range d.Nonces {
		if bytes.Equal(n, nonce) {
			return true
		}
	}
	return false
}

// NonceHash is SHA-256("chrysalis/nonces/v1" ‖ n1 ‖ … ‖ nk).
func (d *Document) NonceHash() [32]byte { return NonceHash(d.Nonces) }

// NonceHash is what a quote covers of its clients' nonces.
func NonceHash(nonces []Bytes) (sum [32]byte) {
	h := sha256.New()
	h.Write([]byte("chrysalis/nonces/v1"))
	for _, n := range nonces {
		h.Write(n)
	}
	h.Sum(sum[:0])
	return sum
}

// ReportData is what a quote signs: SHA-512("chrysalis/report-data/v1" ‖ N ‖
// SHA-256(SPKI) ‖ SHA-256(receipt key) ‖ SHA-256(manifest) ‖ SHA-256(GPU
// evidence or empty)), N being NonceHash.
func (d *Document) ReportData() [64]byte {
	n := d.NonceHash()
	b := append([]byte("chrysalis/report-data/v1"), n[:]...)
	for _, part := range []Bytes{d.TLSKey, d.ReceiptKey, d.Manifest, d.GPU} {
		sum := sha256.Sum256(part)
		b = append(b, sum[:]...)
	}
	return sha512.Sum512(b)
}

// QualifyingData is what a TPM's quote carries in place of the report data, for
// which it has no room: SHA-256(report data).
func (d *Document) QualifyingData() [32]byte {
	data := d.ReportData()
	return sha256.Sum256(data[:])
}

// GPUNonce is the nonce of the GPUs' evidence: SHA-256("chrysalis/gpu-nonce/v1"
// ‖ N ‖ SHA-256(SPKI)).
func GPUNonce(nonces []Bytes, tlsKey []byte) [32]byte {
	n, key := NonceHash(nonces), sha256.Sum256(tlsKey)
	b := append([]byte("chrysalis/gpu-nonce/v1"), n[:]...)
	return sha256.Sum256(append(b, key[:]...))
}
