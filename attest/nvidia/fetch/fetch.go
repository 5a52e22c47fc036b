// Package fetch gets GPU collateral from NVIDIA: RIMs from its RIM service, and
// OCSP responses. What comes is verified; whoever carries it need not be trusted.
package fetch

import (
	"bytes"
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/guest"
)

// Services are where NVIDIA serves collateral.
type Services struct {
	RIM    string           // address to which a RIM's name is added
	OCSP   string           // address that takes requests (RFC 6960, appendix A)
	Roots  nvidia.Roots     // that what they serve must lead to
	Client *http.Client     // http.DefaultClient when nil
	Now    func() time.Time // time.Now when nil
}

// NVIDIA returns NVIDIA's own services.
func NVIDIA() Services {
	return Services{RIM: "https://rim.attestation.nvidia.com/v1/rim/", OCSP: "https://ocsp.ndis.nvidia.com", Roots: nvidia.NVIDIARoots()}
}

// fetchTimeout bounds one request.
const fetchTimeout = 30 * time.Second

// Collateral fetches what GPUs are judged by: the RIMs for the drivers and VBIOSes
// that their evidence names, and OCSP responses for all certificates involved.
// have holds RIMs that need not be fetched while they are valid. What comes back
// has verified. tell, when not nil, is told each step.
func (s Services) Collateral(ctx context.Context, e *nvidia.Evidence, have *nvidia.Collateral, tell func(string)) (*nvidia.Collateral, error) {
	wanted := map[string]bool{}
	for i := range e.GPUs {
		driver, vbios, err := nvidia.RIMIDs(&e.GPUs[i])
		if err != nil {
			return nil, fmt.Errorf("GPU %d: %w", i, err)
		}
		wanted[driver], wanted[vbios] = true, true
	}
	return s.collect(ctx, e, wanted, have, tell)
}

// RIMs fetches RIMs by their names, and OCSP responses about who signed them, for a
// VM whose GPUs have proven nothing yet because it lacks them. Other RIMs in have
// are kept.
func (s Services) RIMs(ctx context.Context, names []string, have *nvidia.Collateral, tell func(string)) (*nvidia.Collateral, error) {
	wanted := map[string]bool{}
	for _, name := range names {
		if !guest.IsRIM(name) {
			return nil, fmt.Errorf("%.80q is not the name of a RIM; write it as the VM does, like NV_GPU_VBIOS_1010_0200_882_96009F0001", name)
		}
		wanted[name] = true
	}
	out, err := s.collect(ctx, &nvidia.Evidence{}, wanted, have, tell)
	if err != nil || have == nil {
		return out, err
	}
	for _, rim := range have.RIMs {
		if !slices.ContainsFunc(out.RIMs, func(other evidence.Bytes) bool { return bytes.Equal(other, rim) }) {
			out.RIMs = append(out.RIMs, rim)
		}
	}
	return out, nil
}

// collect fetches the RIMs that are wanted and not at hand, and asks about GPUs and
// signers.
func (s Services) collect(ctx context.Context, e *nvidia.Evidence, wanted map[string]bool, have *nvidia.Collateral, tell func(string)) (*nvidia.Collateral, error) {
	if tell == nil {
		tell = func(string) {}
	}
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	out := &nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{}}
	known := map[string]evidence.Bytes{}
	if have != nil {
		for _, data := range have.RIMs {
			rim, err := nvidia.ParseRIM(data, s.Roots.RIM)
			if err != nil {
				continue
			}
			if from, to := rim.Validity(); !now().Before(from) && !now().After(to) {
				known[rim.Version] = data
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(wanted)) {
		if data := known[version(id)]; data != nil {
			out.RIMs = append(out.RIMs, data)
			continue
		}
		tell("fetch " + id)
		data, err := s.rim(ctx, id)
		if err != nil {
			return nil, fmt.Errorf("fetch the RIM %s: %w", id, err)
		}
		out.RIMs = append(out.RIMs, data)
	}
	v := nvidia.NewVerifier(s.Roots)
	rims := make([][]byte, len(out.RIMs))
	for i, r := range out.RIMs {
		rims[i] = r
	}
	links, err := v.Links(e, rims)
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		tell("ask whether " + l.Certificate.Subject.CommonName + " is revoked")
		data, err := s.answer(ctx, l)
		if err != nil {
			return nil, fmt.Errorf("ask whether %.64q is revoked: %w", l.Certificate.Subject.CommonName, err)
		}
		out.OCSP = append(out.OCSP, data)
	}
	if err := v.AddCollateral(out); err != nil {
		return nil, err
	}
	return out, nil
}

// version is how a RIM of that name calls its version.
func version(id string) string {
	last := id[strings.LastIndex(id, "_")+1:]
	if !strings.HasPrefix(id, "NV_GPU_VBIOS_") || len(last) != 10 {
		return last
	}
	return strings.Join([]string{last[:2], last[2:4], last[4:6], last[6:8], last[8:]}, ".")
}

func (s Services) do(ctx context.Context, r *http.Request, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	client := s.Client
	if client == nil {
		client = http.DefaultClient
	}
	response, err := client.Do(r.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", r.URL.Host, response.Status)
	}
	data, err := io.ReadAll(io.LimitReader(response.Body, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s answers with more than %d bytes", r.URL.Host, limit)
	}
	return data, nil
}

func (s Services) rim(ctx context.Context, id string) ([]byte, error) {
	r, err := http.NewRequest(http.MethodGet, s.RIM+url.PathEscape(id), nil)
	if err != nil {
		return nil, err
	}
	data, err := s.do(ctx, r, 2*nvidia.MaxRIMSize)
	if err != nil {
		return nil, err
	}
	var answer struct {
		RIM string `json:"rim"` // base64; the other fields are of no use here
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, errors.New("the answer is not JSON")
	}
	xml, err := base64.StdEncoding.DecodeString(answer.RIM)
	if err != nil || len(xml) == 0 {
		return nil, errors.New("the answer has no RIM in base64")
	}
	return xml, nil
}

func (s Services) answer(ctx context.Context, l nvidia.Link) ([]byte, error) {
	request, err := ocsp.CreateRequest(l.Certificate, l.Issuer, &ocsp.RequestOptions{Hash: crypto.SHA384})
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequest(http.MethodPost, s.OCSP, bytes.NewReader(request))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/ocsp-request")
	return s.do(ctx, r, nvidia.MaxOCSPSize)
}
