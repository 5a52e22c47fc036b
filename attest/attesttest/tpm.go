package attesttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"time"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/cryptutil"
	"github.com/canonical/go-tpm2/mu"
	"github.com/canonical/go-tpm2/objectutil"

	"chrysalis/attest/evidence"
)

// TPM stands in for a TPM: an attestation key with a certificate of a root of its
// own.
type TPM struct {
	Root    *x509.Certificate
	rootKey *ecdsa.PrivateKey
	Cert    *x509.Certificate
	key     *ecdsa.PrivateKey

	// Attributes of the attestation key; change them for one that is not restricted.
	Attributes tpm2.ObjectAttributes
}

// NewTPM makes a TPM whose certificates are valid around now.
func NewTPM(now time.Time) *TPM {
	t := &TPM{rootKey: newKey(), key: newKey(),
		Attributes: tpm2.AttrFixedTPM | tpm2.AttrFixedParent | tpm2.AttrSensitiveDataOrigin | tpm2.AttrUserWithAuth | tpm2.AttrRestricted | tpm2.AttrSign}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test TPM root"}, NotBefore: now.Add(-time.Hour),
		NotAfter: now.Add(365 * 24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, t.rootKey.Public(), t.rootKey)
	must(err)
	t.Root, err = x509.ParseCertificate(der)
	must(err)
	t.Reissue(now.Add(-time.Hour), now.Add(365*24*time.Hour))
	return t
}

// Reissue makes the attestation key's certificate anew, with other dates.
func (t *TPM) Reissue(from, until time.Time) {
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "AK"}, NotBefore: from, NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}, t.Root, t.key.Public(), t.rootKey)
	must(err)
	t.Cert, err = x509.ParseCertificate(der)
	must(err)
}

// Quote makes a TPM's proof.
func (t *TPM) Quote(pcrs map[int][32]byte, qualifying []byte, log []byte) *evidence.TPM {
	public, err := objectutil.NewECCPublicKey(&t.key.PublicKey)
	must(err)
	public.Attrs = t.Attributes
	ak, err := mu.MarshalToBytes(public)
	must(err)
	out := &evidence.TPM{AK: ak, Certificates: []evidence.Bytes{t.Cert.Raw}, Log: log}
	h := sha256.New()
	for _, index := range evidence.QuotedPCRs {
		value := pcrs[index]
		h.Write(value[:])
		out.PCRs = append(out.PCRs, evidence.PCR{Index: index, SHA256: value[:]})
	}
	out.Quote, err = mu.MarshalToBytes(&tpm2.Attest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TagAttestQuote, ExtraData: qualifying,
		Attested: &tpm2.AttestU{Quote: &tpm2.QuoteInfo{
			PCRSelect: tpm2.PCRSelectionList{{Hash: tpm2.HashAlgorithmSHA256, Select: evidence.QuotedPCRs}},
			PCRDigest: h.Sum(nil),
		}},
	})
	must(err)
	out.Signature = t.Sign(out.Quote)
	return out
}

// Sign signs like the TPM's attestation key.
func (t *TPM) Sign(message []byte) []byte {
	sum := sha256.Sum256(message)
	signature, err := cryptutil.Sign(rand.Reader, t.key, sum[:], crypto.SHA256)
	must(err)
	out, err := mu.MarshalToBytes(signature)
	must(err)
	return out
}
