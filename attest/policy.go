package attest

import (
	"bytes"
	"crypto/x509"
	_ "embed"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"time"

	"chrysalis/canonical"
	"chrysalis/measure/record"
)

// PolicyVersion is the version of policies that this package reads.
const PolicyVersion = 1

// MaxPolicy is the largest policy, in bytes.
const MaxPolicy = 256 << 10

// DefaultMaxAge is how long a TLS key counts as verified.
const DefaultMaxAge = 10 * time.Minute

// Policy says what a client accepts beyond the strictest reading of evidence.
// The zero value with Version set is the strictest: a TD on a platform whose TCB
// is up to date, with a chain to Intel's root, that is in the records given.
// Every other field is one relaxation, or one restriction, with a name.
type Policy struct {
	Version int `json:"version"` // PolicyVersion

	// AllowNotConfidential accepts evidence that proves which program runs, but not
	// that the machine's owner cannot read it: a TPM's, or a TD's or a GPU's whose
	// chain ends at another root than Intel's or NVIDIA's. It is for development.
	// Fields that need it are refused without it.
	AllowNotConfidential bool `json:"allow_not_confidential,omitempty"`

	// Platforms restricts what evidence may come from. Empty allows TDX and, with
	// AllowNotConfidential, a TPM.
	Platforms []record.Platform `json:"platforms,omitempty"`

	// Shapes lists the only machines allowed, by their names in the records. A TD must
	// be of a recorded shape anyhow; on a TPM, where this is not set, any machine with
	// a recorded image will do, because what a development machine measures of itself
	// is its own affair.
	Shapes []string `json:"shapes,omitempty"`

	// MaxAgeSeconds is how long a TLS key counts as verified, 1 to 86400; 0 is
	// DefaultMaxAge.
	MaxAgeSeconds int `json:"max_age_seconds,omitempty"`

	// TCBWaivers accept platforms whose TCB is not up to date, each until a day.
	TCBWaivers []TCBWaiver `json:"tcb_waivers,omitempty"`

	// MinTCBEvaluation refuses collateral older than this TCB evaluation data
	// number of Intel's.
	MinTCBEvaluation int `json:"min_tcb_evaluation,omitempty"`

	// XFAM is the mask of extended features that a TD may use, 16 hexadecimal
	// digits; empty is DefaultXFAM.
	XFAM string `json:"xfam,omitempty"`

	// MRSEAM lists the only TDX modules allowed, by their 48-byte measurement.
	// Empty allows those that Intel's collateral names.
	MRSEAM []record.Hex `json:"mrseam,omitempty"`

	// AllowUnsetMRConfigID accepts a TD whose MRCONFIGID is zero, on platforms that
	// cannot set it. The manifest is still in RTMR3.
	AllowUnsetMRConfigID bool `json:"allow_unset_mrconfigid,omitempty"`

	// Manifests lists the only manifests allowed, by their SHA-256: for a client that
	// wants to know the engine's parameters and the limits as well. Empty allows
	// every manifest whose engine and models are approved.
	Manifests []record.Hex `json:"manifests,omitempty"`

	// Engines and Models are approved besides those in records.
	Engines []Approved `json:"engines,omitempty"`
	Models  []Approved `json:"models,omitempty"`

	// TDXRoots, PEM, replace Intel's root. TPMRoots and DevelopmentRoots are the
	// only roots of attestation keys' certificates; none is built in.
	TDXRoots         []string `json:"tdx_roots,omitempty"`
	TPMRoots         []string `json:"tpm_roots,omitempty"`
	DevelopmentRoots []string `json:"development_roots,omitempty"`

	// GPUModels lists the only GPUs allowed, as NVML names them, like "NVIDIA H200".
	// Empty allows those of nvidia.Hopper.
	GPUModels []string `json:"gpu_models,omitempty"`

	// GPUMinDriver refuses GPUs with an older driver, like "550.90.07".
	GPUMinDriver string `json:"gpu_min_driver,omitempty"`

	// GPUMaxOCSPAgeSeconds is how old NVIDIA's answer may be that a GPU, and what its
	// RIMs are signed with, are not revoked: 1 to 7776000, which is 90 days; 0 is
	// DefaultGPUMaxOCSPAge.
	GPUMaxOCSPAgeSeconds int `json:"gpu_max_ocsp_age_seconds,omitempty"`

	// AllowNoGPUOCSP accepts GPUs and RIMs on whose revocation there is no answer that
	// is recent enough. An answer that says "revoked" counts all the same.
	AllowNoGPUOCSP bool `json:"allow_no_gpu_ocsp,omitempty"`

	// AllowUnattestedNVSwitch accepts GPUs in protected PCIe, which leaves NVLink in
	// clear and depends on NVSwitches that nobody verifies. It needs
	// AllowNotConfidential.
	AllowUnattestedNVSwitch bool `json:"allow_unattested_nvswitch,omitempty"`

	// GPUDeviceRoots and GPURIMRoots, the SHA-256 of certificates, replace NVIDIA's
	// roots of GPUs and of RIMs. They are for development, and need
	// AllowNotConfidential.
	GPUDeviceRoots []record.Hex `json:"gpu_device_roots,omitempty"`
	GPURIMRoots    []record.Hex `json:"gpu_rim_roots,omitempty"`

	xfam             uint64
	tdxRoots         []*x509.Certificate
	tpmRoots         []*x509.Certificate
	developmentRoots []*x509.Certificate
}

// TCBWaiver accepts one TCB status, with no other advisories than it names.
type TCBWaiver struct {
	Status     string   `json:"status"`               // "SWHardeningNeeded", … as Intel writes it; never "Revoked"
	Advisories []string `json:"advisories,omitempty"` // "INTEL-SA-…"
	Until      string   `json:"until"`                // YYYY-MM-DD, the last day, UTC
	Reason     string   `json:"reason"`               // for whoever reads the policy

	until time.Time
}

// Approved names a disk by its root hash.
type Approved struct {
	Name     string     `json:"name"`      // an engine's name, or ORG/NAME@REVISION
	RootHash record.Hex `json:"root_hash"` // 32 bytes
}

// The bits of XFAM (Intel SDM volume 1, section 13.1, and the TDX module's ABI).
// DefaultXFAM allows x87, SSE, AVX, AVX-512, PKRU, CET and AMX. What it leaves
// out either lets the host look in (processor trace, last branch records) or is
// not for a guest's user space.
const (
	xfamRequired = 0x3
	DefaultXFAM  = 0x61ae7
)

//go:embed intel-sgx-root-ca.pem
var intelRootPEM []byte

// intelRoot is the only root of TDX quotes unless a policy says otherwise.
var intelRoot = mustCertificate(intelRootPEM)

func mustCertificate(data []byte) *x509.Certificate {
	block, _ := pem.Decode(data)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic(err)
	}
	return cert
}

// NewPolicy returns the strictest policy.
func NewPolicy() *Policy {
	p := &Policy{Version: PolicyVersion}
	if err := p.Check(); err != nil {
		panic(err)
	}
	return p
}

var (
	keyRE   = regexp.MustCompile(`^[a-z0-9_]+$`)
	shapeRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
)

// ParsePolicy reads a policy, one JSON object. It refuses unknown fields, a field
// twice, and relaxations that contradict each other.
func ParsePolicy(data []byte) (*Policy, error) {
	p, err := parsePolicy(data)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return p, nil
}

func parsePolicy(data []byte) (*Policy, error) {
	if len(data) > MaxPolicy {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(data), MaxPolicy)
	}
	if err := canonical.CheckKeys(data, func(key string) error {
		// encoding/json takes a name in another case for a field's.
		if !keyRE.MatchString(key) {
			return fmt.Errorf("unknown field %.40q", key)
		}
		return nil
	}); err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var p Policy
	if err := dec.Decode(&p); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the policy")
	}
	if err := p.Check(); err != nil {
		return nil, err
	}
	return &p, nil
}

// Check reports the first value that is wrong. A policy that was not parsed must
// be checked before it is used.
func (p *Policy) Check() error {
	if p.Version != PolicyVersion {
		return fmt.Errorf("version is %d, this program reads version %d", p.Version, PolicyVersion)
	}
	for _, platform := range p.Platforms {
		if platform != record.TDX && platform != record.TPM {
			return fmt.Errorf("platforms: %.20q is neither %q nor %q", platform, record.TDX, record.TPM)
		}
	}
	if !p.AllowNotConfidential {
		for _, relaxed := range []struct {
			name string
			set  bool
		}{
			{"platforms: \"tpm\"", slices.Contains(p.Platforms, record.TPM)},
			{"tdx_roots", len(p.TDXRoots) > 0},
			{"tpm_roots", len(p.TPMRoots) > 0},
			{"development_roots", len(p.DevelopmentRoots) > 0},
			{"allow_unattested_nvswitch", p.AllowUnattestedNVSwitch},
			{"gpu_device_roots", len(p.GPUDeviceRoots) > 0},
			{"gpu_rim_roots", len(p.GPURIMRoots) > 0},
		} {
			if relaxed.set {
				return fmt.Errorf("%s: needs allow_not_confidential, because such evidence does not prove confidentiality", relaxed.name)
			}
		}
	}
	for i, name := range p.Shapes {
		if !shapeRE.MatchString(name) {
			return fmt.Errorf("shapes[%d]: %.80q is not the name of a shape", i, name)
		}
	}
	if p.MaxAgeSeconds < 0 || p.MaxAgeSeconds > 86400 {
		return fmt.Errorf("max_age_seconds: %d is out of bounds, expected 1 to 86400", p.MaxAgeSeconds)
	}
	if p.MinTCBEvaluation < 0 {
		return errors.New("min_tcb_evaluation: negative")
	}
	for i := range p.TCBWaivers {
		if err := p.TCBWaivers[i].check(); err != nil {
			return fmt.Errorf("tcb_waivers[%d]: %w", i, err)
		}
	}
	if err := p.checkGPU(); err != nil {
		return err
	}
	p.xfam = DefaultXFAM
	if p.XFAM != "" {
		if n, err := fmt.Sscanf(p.XFAM, "%016x", &p.xfam); n != 1 || err != nil || fmt.Sprintf("%016x", p.xfam) != p.XFAM {
			return fmt.Errorf("xfam: %.40q is not 16 lower-case hexadecimal digits", p.XFAM)
		}
	}
	for i, m := range p.MRSEAM {
		if len(m) != 48 {
			return fmt.Errorf("mrseam[%d]: %d bytes, expected 48", i, len(m))
		}
	}
	for i, m := range p.Manifests {
		if len(m) != 32 {
			return fmt.Errorf("manifests[%d]: %d bytes, expected 32", i, len(m))
		}
	}
	for name, list := range map[string][]Approved{"engines": p.Engines, "models": p.Models} {
		for i, a := range list {
			if a.Name == "" || len(a.Name) > 200 || len(a.RootHash) != 32 {
				return fmt.Errorf("%s[%d]: expected a name and a root hash of 32 bytes", name, i)
			}
		}
	}
	for _, roots := range []struct {
		name string
		pem  []string
		out  *[]*x509.Certificate
	}{
		{"tdx_roots", p.TDXRoots, &p.tdxRoots},
		{"tpm_roots", p.TPMRoots, &p.tpmRoots},
		{"development_roots", p.DevelopmentRoots, &p.developmentRoots},
	} {
		*roots.out = nil
		for i, text := range roots.pem {
			cert, err := oneCertificate([]byte(text))
			if err != nil {
				return fmt.Errorf("%s[%d]: %w", roots.name, i, err)
			}
			*roots.out = append(*roots.out, cert)
		}
	}
	if len(p.tdxRoots) == 0 {
		p.tdxRoots = []*x509.Certificate{intelRoot}
	}
	return nil
}

func (w *TCBWaiver) check() error {
	switch w.Status {
	case "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate", "OutOfDateConfigurationNeeded":
	case "Revoked":
		return errors.New("status: a revoked TCB cannot be waived")
	default:
		return fmt.Errorf("status: %.40q is not a TCB status that can be waived", w.Status)
	}
	day, err := time.Parse(time.DateOnly, w.Until)
	if err != nil {
		return fmt.Errorf("until: %.40q is not a day, like 2027-01-31", w.Until)
	}
	w.until = day.AddDate(0, 0, 1)
	if w.Reason == "" {
		return errors.New("reason: missing; say why this is accepted")
	}
	return nil
}

// allows reports whether the waiver accepts a status with these advisories now.
func (w *TCBWaiver) allows(status string, advisories []string, now time.Time) bool {
	if w.Status != status || !now.Before(w.until) {
		return false
	}
	for _, a := range advisories {
		if !slices.Contains(w.Advisories, a) {
			return false
		}
	}
	return true
}

// MaxAge is how long a TLS key counts as verified.
func (p *Policy) MaxAge() time.Duration {
	if p.MaxAgeSeconds == 0 {
		return DefaultMaxAge
	}
	return time.Duration(p.MaxAgeSeconds) * time.Second
}

// allowsPlatform reports why evidence of a platform is refused, or "".
func (p *Policy) allowsPlatform(platform record.Platform) string {
	if platform == record.TPM && !p.AllowNotConfidential {
		return "a TPM's evidence does not prove confidentiality, and the policy does not have allow_not_confidential"
	}
	if len(p.Platforms) > 0 && !slices.Contains(p.Platforms, platform) {
		return fmt.Sprintf("the policy allows evidence of %v only", p.Platforms)
	}
	return ""
}

// allowsShape reports whether the policy allows machines of a record's shape.
func (p *Policy) allowsShape(s *record.Shape) bool {
	return len(p.Shapes) == 0 || slices.Contains(p.Shapes, s.Name)
}

// oneCertificate reads exactly one PEM certificate.
func oneCertificate(data []byte) (*x509.Certificate, error) {
	certs, err := certificates(data)
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("%d certificates, expected one", len(certs))
	}
	return certs[0], nil
}

// certificates reads PEM certificates and nothing else, at most 8.
func certificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) || len(out) == 8 {
			return nil, errors.New("not PEM certificates, or more than 8")
		}
		block, more := pem.Decode(rest)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("not a PEM certificate")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		out, rest = append(out, cert), more
	}
	return out, nil
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}
