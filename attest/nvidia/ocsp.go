package nvidia

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/ocsp"
)

// MaxOCSPSize is the largest OCSP response, in bytes.
const MaxOCSPSize = 8192

// clockSkew is how far a response may lie in the future.
const clockSkew = 5 * time.Minute

// parseOCSP parses a response and verifies its signature with the responder's
// certificate that it carries. Whether that one speaks for an issuer is for
// checkOCSP to see. NVIDIA's responses carry it.
func parseOCSP(data []byte) (*ocsp.Response, error) {
	if len(data) > MaxOCSPSize {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(data), MaxOCSPSize)
	}
	r, err := ocsp.ParseResponse(data, nil)
	if err != nil {
		return nil, err
	}
	if r.Certificate == nil {
		return nil, errors.New("carries no certificate of its responder")
	}
	if !isP384(r.Certificate) || r.SignatureAlgorithm != x509.ECDSAWithSHA384 {
		return nil, errors.New("is not signed by a P-384 key with SHA-384")
	}
	return r, nil
}

// speaksFor verifies that the issuer of a certificate has delegated its answers
// to the responder (RFC 6960, section 4.2.2.2).
func (l *links) speaksFor(responder, issuer *x509.Certificate) error {
	if !bytes.Equal(responder.RawIssuer, issuer.RawSubject) || !slices.Contains(responder.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning) {
		return fmt.Errorf("the responder %s does not speak for %s", name(responder), name(issuer))
	}
	if err := l.issued(responder, issuer); err != nil {
		return fmt.Errorf("the responder %s does not speak for %s: %w", name(responder), name(issuer), err)
	}
	return nil
}

// checkRevocation looks for what OCSP responses say about the certificates of a
// chain other than its root and, of a device, its leaf, which only the device
// itself can revoke. It returns the first that is revoked, or that has no recent
// answer where one is required.
func (v *Verifier) checkRevocation(chain []*x509.Certificate, at time.Time, p *Policy) error {
	for i, c := range chain[:len(chain)-1] {
		issuer := chain[i+1]
		var problem error
		answered := false
		for _, r := range v.ocsp[c.SerialNumber.String()] {
			if err := v.links.speaksFor(r.Certificate, issuer); err != nil {
				problem = &MissingError{err}
				continue
			}
			// Revocation is final: it counts however old the answer is.
			if r.Status == ocsp.Revoked {
				return fmt.Errorf("certificate %s was revoked on %s", name(c), r.RevokedAt.UTC().Format(time.DateOnly))
			}
			if r.Status != ocsp.Good {
				problem = fmt.Errorf("NVIDIA does not know certificate %s", name(c))
				continue
			}
			if err := checkOCSPAge(r, at, p.MaxOCSPAge); err != nil {
				problem = &MissingError{fmt.Errorf("certificate %s: %w", name(c), err)}
				continue
			}
			answered = true
		}
		if answered || p.AllowNoOCSP {
			continue
		}
		if problem == nil {
			problem = &MissingError{fmt.Errorf("there is no OCSP response for certificate %s", name(c))}
		}
		return fmt.Errorf("%w; fetch the collateral again, with 'chrysalis gpu collateral'", problem)
	}
	return nil
}

func checkOCSPAge(r *ocsp.Response, at time.Time, limit time.Duration) error {
	day := func(t time.Time) string { return t.UTC().Format(time.DateTime) }
	if r.ThisUpdate.After(at.Add(clockSkew)) {
		return fmt.Errorf("the OCSP response is of %s and it is %s", day(r.ThisUpdate), day(at))
	}
	if age := at.Sub(r.ThisUpdate); age > limit {
		return fmt.Errorf("the OCSP response is of %s, older than %s", day(r.ThisUpdate), limit)
	}
	if r.ThisUpdate.Before(r.Certificate.NotBefore) || r.ThisUpdate.After(r.Certificate.NotAfter) {
		return fmt.Errorf("the OCSP responder %s was not valid when it answered", name(r.Certificate))
	}
	return nil
}
