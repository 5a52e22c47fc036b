package nvidia

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"strings"
	"sync"
	"time"
)

// NVIDIA's roots, as the SHA-256 of the certificate.
var (
	// DeviceRoot is "NVIDIA Device Identity CA".
	DeviceRoot = mustHash("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48")
	// RIMRoot is "NVIDIA CoRIM signing Root CA".
	RIMRoot = mustHash("12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1")
)

func mustHash(s string) (sum [32]byte) {
	if n, err := hex.Decode(sum[:], []byte(s)); err != nil || n != len(sum) {
		panic("not a SHA-256: " + s)
	}
	return sum
}

// Bounds of a chain.
const (
	MaxCertificates    = 8
	MaxCertificateSize = 4096 // bytes of one, DER
	MaxChainSize       = 8192 // bytes of PEM; NVML_GPU_ATTESTATION_CERT_CHAIN_SIZE is 5120
)

// SplitChain turns a certificate chain as NVML returns it, PEM blocks with the
// GPU's own certificate first, into certificates in DER. It checks only their
// number and size. Trailing white space and NULs are left out.
func SplitChain(data []byte) ([][]byte, error) {
	if len(data) > MaxChainSize {
		return nil, fmt.Errorf("certificate chain: %d bytes, at most %d are allowed", len(data), MaxChainSize)
	}
	var out [][]byte
	rest := bytes.TrimRight(data, "\x00 \t\r\n")
	for len(rest) > 0 {
		// Two blocks may follow each other without a line break, which
		// encoding/pem does not take.
		end := bytes.Index(rest, []byte("-----END CERTIFICATE-----"))
		if end < 0 {
			return nil, errors.New("certificate chain: truncated, or not PEM")
		}
		end += len("-----END CERTIFICATE-----")
		text := append(bytes.Clone(bytes.TrimLeft(rest[:end], "\r\n")), '\n')
		block, after := pem.Decode(text)
		if block == nil || len(after) > 0 || block.Type != "CERTIFICATE" || len(block.Headers) > 0 || !bytes.HasPrefix(text, []byte("-----BEGIN ")) {
			return nil, errors.New("certificate chain: something that is not a certificate")
		}
		out = append(out, block.Bytes)
		rest = rest[end:]
	}
	return out, checkChainBounds(out)
}

func checkChainBounds(der [][]byte) error {
	if len(der) < 3 || len(der) > MaxCertificates {
		return fmt.Errorf("certificate chain: %d certificates, expected 3 to %d", len(der), MaxCertificates)
	}
	for i, c := range der {
		if len(c) < 1 || len(c) > MaxCertificateSize {
			return fmt.Errorf("certificate chain: certificate %d has %d bytes, expected 1 to %d", i, len(c), MaxCertificateSize)
		}
	}
	return nil
}

// links remembers which certificates were found to be issued by which, so that
// NVIDIA's own ones are verified once. It holds at most maxLinks.
type links struct {
	mu   sync.Mutex
	seen map[[32]byte]bool
}

const maxLinks = 256

func (l *links) issued(child, parent *x509.Certificate) error {
	h := sha256.New()
	sum := sha256.Sum256(child.Raw)
	h.Write(sum[:])
	sum = sha256.Sum256(parent.Raw)
	h.Write(sum[:])
	key := [32]byte(h.Sum(nil))
	l.mu.Lock()
	known := l.seen[key]
	l.mu.Unlock()
	if known {
		return nil
	}
	// CheckSignatureFrom also checks that the parent may issue certificates.
	if err := child.CheckSignatureFrom(parent); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.seen) >= maxLinks || l.seen == nil {
		l.seen = map[[32]byte]bool{}
	}
	l.seen[key] = true
	return nil
}

// verifyChain parses a chain, leaf first, root last, and verifies that each
// certificate is issued by the next and that the last one's SHA-256 is among
// roots. It does not look at any clock. There is one order and no path building:
// what NVML and RIMs carry has it.
func (l *links) verifyChain(der [][]byte, roots [][32]byte) ([]*x509.Certificate, error) {
	if err := checkChainBounds(der); err != nil {
		return nil, err
	}
	chain := make([]*x509.Certificate, len(der))
	for i, raw := range der {
		c, err := x509.ParseCertificate(raw)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if err := checkCertificate(c, i); err != nil {
			return nil, fmt.Errorf("certificate %d (%s): %w", i, name(c), err)
		}
		chain[i] = c
	}
	last := chain[len(chain)-1]
	pinned := false
	for _, root := range roots {
		pinned = pinned || sha256.Sum256(last.Raw) == root
	}
	if !pinned {
		return nil, fmt.Errorf("the chain ends in %s, SHA-256 %x, which is not a trusted root", name(last), sha256.Sum256(last.Raw))
	}
	// From the root down, so that nothing is verified with a key that is not trusted.
	for i := len(chain) - 2; i >= 0; i-- {
		child, parent := chain[i], chain[i+1]
		if !bytes.Equal(child.RawIssuer, parent.RawSubject) {
			return nil, fmt.Errorf("certificate %d (%s) names another issuer than certificate %d (%s)", i, name(child), i+1, name(parent))
		}
		if err := l.issued(child, parent); err != nil {
			return nil, fmt.Errorf("certificate %d (%s) is not signed by certificate %d (%s): %w", i, name(child), i+1, name(parent), err)
		}
	}
	return chain, nil
}

// checkCertificate checks what does not depend on other certificates. depth
// counts from the leaf.
func checkCertificate(c *x509.Certificate, depth int) error {
	if c.Version != 3 {
		return fmt.Errorf("version %d, expected 3", c.Version)
	}
	if !isP384(c) || c.SignatureAlgorithm != x509.ECDSAWithSHA384 {
		return errors.New("not a P-384 key under an ECDSA signature with SHA-384")
	}
	if len(c.UnhandledCriticalExtensions) > 0 {
		return fmt.Errorf("unknown critical extension %s", c.UnhandledCriticalExtensions[0])
	}
	if len(c.PermittedDNSDomains)+len(c.ExcludedDNSDomains)+len(c.PermittedIPRanges)+len(c.ExcludedIPRanges)+
		len(c.PermittedEmailAddresses)+len(c.ExcludedEmailAddresses)+len(c.PermittedURIDomains)+len(c.ExcludedURIDomains) > 0 {
		return errors.New("has name constraints")
	}
	if depth == 0 {
		if c.IsCA || c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
			return errors.New("is not a certificate that signs data")
		}
		return nil
	}
	if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("may not issue certificates")
	}
	// Below it are depth certificates, of which the leaf does not count.
	if (c.MaxPathLen > 0 || c.MaxPathLenZero) && depth-1 > c.MaxPathLen {
		return fmt.Errorf("allows %d certificate authorities below it and has %d", c.MaxPathLen, depth-1)
	}
	return nil
}

func isP384(c *x509.Certificate) bool {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	return ok && key.Curve == elliptic.P384()
}

// verifySignature verifies an ECDSA signature r ‖ s over SHA-384.
func verifySignature(c *x509.Certificate, data, signature []byte) error {
	der, err := signatureDER(signature)
	if err != nil {
		return err
	}
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() {
		return errors.New("the key is not one of P-384")
	}
	sum := sha512.Sum384(data)
	if !ecdsa.VerifyASN1(key, sum[:], der) {
		return errors.New("the signature does not match")
	}
	return nil
}

// signatureDER turns r ‖ s into what X.509 and crypto/ecdsa use.
func signatureDER(raw []byte) ([]byte, error) {
	if len(raw) != signatureSize {
		return nil, fmt.Errorf("a signature of %d bytes, expected %d", len(raw), signatureSize)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(raw[:signatureSize/2]), new(big.Int).SetBytes(raw[signatureSize/2:]),
	})
}

// validity is when all certificates of a chain are valid.
func validity(chain []*x509.Certificate) (from, to time.Time) {
	from, to = chain[0].NotBefore, chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotBefore.After(from) {
			from = c.NotBefore
		}
		if c.NotAfter.Before(to) {
			to = c.NotAfter
		}
	}
	return from, to
}

func checkValidity(chain []*x509.Certificate, at time.Time) error {
	from, to := validity(chain)
	if at.Before(from) || at.After(to) {
		return fmt.Errorf("certificates are valid from %s to %s, and it is %s", from.UTC().Format(time.DateOnly), to.UTC().Format(time.DateOnly), at.UTC().Format(time.DateOnly))
	}
	return nil
}

var chipRE = regexp.MustCompile(`^[A-Z]{2}[0-9]{3}$`)

// chip returns the name of the chip in a device's chain, for example GH100. The
// device certificate, whose issuer is NVIDIA's provisioning, begins with it.
func chip(chain []*x509.Certificate) (string, error) {
	word, _, _ := strings.Cut(chain[1].Subject.CommonName, " ")
	if !chipRE.MatchString(word) {
		return "", fmt.Errorf("the device certificate's name %.64q does not begin with a chip", chain[1].Subject.CommonName)
	}
	return word, nil
}

// oidDeviceID is the extension with which a device says which firmware holds the
// leaf's key (2.23.133.5.4.1; CompositeDeviceID of TCG's DICE and of RIoT before
// it).
var oidDeviceID = asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}

var oidSHA384 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}

// firmwareID returns the SHA-384 of the firmware that holds the leaf's key, or
// nil where the certificate does not say.
func firmwareID(leaf, device *x509.Certificate) ([]byte, error) {
	for _, e := range leaf.Extensions {
		if !e.Id.Equal(oidDeviceID) {
			continue
		}
		var id struct {
			Version int
			Device  asn1.RawValue // SubjectPublicKeyInfo of the device's key
			FWID    struct {
				Algorithm asn1.ObjectIdentifier
				Digest    []byte
			}
		}
		rest, err := asn1.Unmarshal(e.Value, &id)
		if err != nil || len(rest) > 0 || !id.FWID.Algorithm.Equal(oidSHA384) || len(id.FWID.Digest) != digestSize {
			return nil, fmt.Errorf("the extension %s is malformed", oidDeviceID)
		}
		if !bytes.Equal(id.Device.FullBytes, device.RawSubjectPublicKeyInfo) {
			return nil, fmt.Errorf("the extension %s is for another device's key", oidDeviceID)
		}
		return id.FWID.Digest, nil
	}
	return nil, nil
}

// name is how errors call a certificate. It is bounded and printable.
func name(c *x509.Certificate) string {
	return fmt.Sprintf("%.64q", c.Subject.CommonName)
}
