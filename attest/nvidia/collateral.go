package nvidia

import (
	"crypto/x509"
	"fmt"
	"strings"
)

// RIMIDs returns the names under which NVIDIA serves the RIMs for a GPU's driver
// and VBIOS, for example NV_GPU_DRIVER_GH100_550.90.07. They come from the GPU's
// report, of which nothing is verified here: they say what to ask for.
func RIMIDs(g *GPU) (driver, vbios string, err error) {
	r, err := ParseReport(g.Report)
	if err != nil {
		return "", "", fmt.Errorf("report: %w", err)
	}
	if len(g.Certificates) < 2 {
		return "", "", fmt.Errorf("a chain of %d certificates", len(g.Certificates))
	}
	device, err := x509.ParseCertificate(g.Certificates[1])
	if err != nil {
		return "", "", fmt.Errorf("device certificate: %w", err)
	}
	name, err := chip([]*x509.Certificate{nil, device})
	if err != nil {
		return "", "", err
	}
	return "NV_GPU_DRIVER_" + name + "_" + r.Driver,
		"NV_GPU_VBIOS_" + strings.Join([]string{r.Project, r.ProjectSKU, r.ChipSKU, strings.ReplaceAll(r.VBIOS, ".", "")}, "_"), nil
}

// Link is a certificate whose issuer answers for it.
type Link struct{ Certificate, Issuer *x509.Certificate }

// Links returns the certificates on whose revocation Verify wants an answer: those
// above a GPU's own, and those that signed a RIM, the roots left out. It verifies
// the chains.
func (v *Verifier) Links(e *Evidence, rims [][]byte) ([]Link, error) {
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
	for i, data := range rims {
		rim, err := parseRIM(data, v.rimRoots, &v.links)
		if err != nil {
			return nil, fmt.Errorf("RIM %d: %w", i, err)
		}
		add(rim.chain)
	}
	return out, nil
}
