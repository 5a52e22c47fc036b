package nvidia

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"strings"

	"golang.org/x/crypto/ocsp"

	"chrysalis/attest/evidence"
)

// RIMIDs returns the names under which NVIDIA serves the RIMs for a GPU's driver
// and VBIOS, for example NV_GPU_DRIVER_GH100_550.90.07. They come from the GPU's
// report, of which nothing is verified here: they say what to ask for.
func RIMIDs(g *GPU) (driver, vbios string, err error) {
	r, chipName, err := unverified(g)
	if err != nil {
		return "", "", err
	}
	prefix := "NV_GPU_DRIVER_"
	if strings.HasPrefix(chipName, "GB") {
		prefix = "NV_GPU_CC_DRIVER_" // from Blackwell on
	}
	return prefix + cmp.Or(r.Chip, chipName) + "_" + r.Driver,
		"NV_GPU_VBIOS_" + strings.Join([]string{r.Project, r.ProjectSKU, r.ChipSKU, strings.ReplaceAll(r.VBIOS, ".", "")}, "_"), nil
}

// unverified reads a GPU's report and the name of its chip.
func unverified(g *GPU) (*Report, string, error) {
	r, err := ParseReport(g.Report)
	if err != nil {
		return nil, "", fmt.Errorf("report: %w", err)
	}
	if len(g.Certificates) < 2 {
		return nil, "", fmt.Errorf("a chain of %d certificates", len(g.Certificates))
	}
	device, err := x509.ParseCertificate(g.Certificates[1])
	if err != nil {
		return nil, "", fmt.Errorf("device certificate: %w", err)
	}
	name, err := chip([]*x509.Certificate{nil, device})
	return r, name, err
}

// Select returns what a verifier's collateral has for the GPUs of some evidence:
// all that judges them, and nothing else. It refuses evidence whose chains do not
// verify, because only those say which answers of whom count.
func (v *Verifier) Select(e *Evidence) (*Collateral, error) {
	out := &Collateral{Version: Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{}}
	var rims []*RIM
	seen := map[string]bool{}
	for i := range e.GPUs {
		r, chipName, err := unverified(&e.GPUs[i])
		if err != nil {
			return nil, fmt.Errorf("GPU %d: %w", i, err)
		}
		for _, key := range []string{driverKey(chipName, r), vbiosKey(chipName, r)} {
			for _, rim := range v.rims[key] {
				if !seen[string(rim.raw)] {
					seen[string(rim.raw)] = true
					rims = append(rims, rim)
					out.RIMs = append(out.RIMs, rim.raw)
				}
			}
		}
	}
	links, err := v.linksOf(e, rims)
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		// The newest answer counts, and each that says revoked.
		var newest *ocsp.Response
		for _, r := range v.ocsp[l.Certificate.SerialNumber.String()] {
			if v.links.speaksFor(r.Certificate, l.Issuer) != nil {
				continue
			}
			if r.Status == ocsp.Revoked {
				newest = r
				break
			}
			if newest == nil || r.ThisUpdate.After(newest.ThisUpdate) {
				newest = r
			}
		}
		if newest != nil {
			out.OCSP = append(out.OCSP, newest.Raw)
		}
	}
	return out, out.Validate()
}

// Link is a certificate whose issuer answers for it.
type Link struct{ Certificate, Issuer *x509.Certificate }

// Links returns the certificates on whose revocation Verify wants an answer: those
// above a GPU's own, and those that signed a RIM, the roots left out. It verifies
// the chains.
func (v *Verifier) Links(e *Evidence, rims [][]byte) ([]Link, error) {
	parsed := make([]*RIM, len(rims))
	for i, data := range rims {
		var err error
		if parsed[i], err = parseRIM(data, v.rimRoots, &v.links); err != nil {
			return nil, fmt.Errorf("RIM %d: %w", i, err)
		}
	}
	return v.linksOf(e, parsed)
}

func (v *Verifier) linksOf(e *Evidence, rims []*RIM) ([]Link, error) {
	var out []Link
	seen := map[string]bool{}
	add := func(chain []*x509.Certificate) {
		for i, c := range chain[:len(chain)-1] {
			if !seen[string(c.Raw)] {
				seen[string(c.Raw)] = true
				out = append(out, Link{c, chain[i+1]})
			}
		}
	}
	for i, g := range e.GPUs {
		chain, err := v.links.verifyChain(chainBytes(g.Certificates), v.deviceRoots)
		if err != nil {
			return nil, fmt.Errorf("GPU %d: %w", i, err)
		}
		add(chain[1:])
	}
	for _, rim := range rims {
		add(rim.chain)
	}
	return out, nil
}
