package nvidia

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"

	"chrysalis/attest/evidence"
	"chrysalis/canonical"
)

// Version is the version of the documents that this package reads and writes.
const Version = 1

// Bounds of documents.
const (
	MaxGPUs           = 8
	MaxEvidenceSize   = 256 << 10 // bytes
	MaxCollateralSize = 4 << 20   // bytes

	maxRIMs = 32
	maxOCSP = 64
)

// MultiGPU is how GPUs work together.
type MultiGPU string

// The modes.
const (
	MultiGPUNone          MultiGPU = "none"              // each for itself
	MultiGPUProtectedPCIe MultiGPU = "protected-pcie"    // NVLink in clear inside the chassis, NVSwitches are given to the VM
	MultiGPUNVLE          MultiGPU = "nvlink-encryption" // encrypted NVLink
)

// Evidence is the GPUs' part of a VM's evidence: canonical JSON (RFC 8785). The
// agent makes it; its hash is in the platform's quote.
type Evidence struct {
	Version int   `json:"version"`
	GPUs    []GPU `json:"gpus"` // 1 to MaxGPUs, by PCI address
}

// GPU is the proof of one GPU, and what the measured agent saw of it.
type GPU struct {
	Model        string           `json:"model"` // NVML's name, for example NVIDIA H100 PCIe
	State        State            `json:"state"`
	Report       evidence.Bytes   `json:"report"`       // SPDM request and response, as NVML returns them
	Certificates []evidence.Bytes `json:"certificates"` // DER, leaf first, root last
}

// State is what NVML told the agent about a GPU's mode. A GPU's own report does
// not say it all; the agent that does is part of the measured image.
type State struct {
	CC       bool     `json:"cc"`       // the confidential-computing feature is on
	DevTools bool     `json:"devtools"` // debuggers can read the GPU's memory
	MultiGPU MultiGPU `json:"multi_gpu"`
}

var modelRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9 ._()/-]{0,63}$`)

// IsModel reports whether a text can be a GPU's name, as NVML writes it.
func IsModel(s string) bool { return modelRE.MatchString(s) }

// Validate implements canonical.Document.
func (e *Evidence) Validate() error {
	if e.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", e.Version, Version)
	}
	if len(e.GPUs) < 1 || len(e.GPUs) > MaxGPUs {
		return fmt.Errorf("gpus: there are %d, expected 1 to %d", len(e.GPUs), MaxGPUs)
	}
	for i, g := range e.GPUs {
		if !modelRE.MatchString(g.Model) {
			return fmt.Errorf("gpus[%d].model: %.80q is not a GPU's name", i, g.Model)
		}
		switch g.State.MultiGPU {
		case MultiGPUNone, MultiGPUProtectedPCIe, MultiGPUNVLE:
		default:
			return fmt.Errorf("gpus[%d].state.multi_gpu: there is no mode %.40q", i, g.State.MultiGPU)
		}
		if len(g.Report) < 1 || len(g.Report) > MaxReportSize {
			return fmt.Errorf("gpus[%d].report: %d bytes, expected 1 to %d", i, len(g.Report), MaxReportSize)
		}
		if err := checkChainBounds(chainBytes(g.Certificates)); err != nil {
			return fmt.Errorf("gpus[%d].certificates: %w", i, err)
		}
	}
	return nil
}

func chainBytes(in []evidence.Bytes) [][]byte {
	out := make([][]byte, len(in))
	for i, c := range in {
		out[i] = c
	}
	return out
}

// Encode returns the canonical encoding.
func (e *Evidence) Encode() ([]byte, error) {
	return encode("GPU evidence", e, MaxEvidenceSize)
}

// ParseEvidence reads evidence. It refuses anything but the canonical encoding
// of valid evidence, and proves nothing.
func ParseEvidence(data []byte) (*Evidence, error) {
	var e Evidence
	if err := canonical.Decode(data, MaxEvidenceSize, &e); err != nil {
		return nil, fmt.Errorf("GPU evidence: %w", err)
	}
	return &e, nil
}

// Identity is what a VM records of one GPU when it boots and what every later
// evidence must match.
type Identity struct {
	Certificate string   `json:"certificate"` // SHA-256 of the leaf, hexadecimal: this GPU with this firmware
	Device      string   `json:"device"`      // SHA-256 of the certificate above it: this GPU
	Chip        string   `json:"chip"`        // for example GH100
	Model       string   `json:"model"`
	Driver      string   `json:"driver"`
	VBIOS       string   `json:"vbios"`
	CC          bool     `json:"cc"`
	DevTools    bool     `json:"devtools"`
	MultiGPU    MultiGPU `json:"multi_gpu"`
}

// Encode returns the data of the GPU's event in a VM's log (package measure/cel).
func (i Identity) Encode() ([]byte, error) {
	out, err := canonical.Encode(i)
	if err != nil {
		return nil, fmt.Errorf("GPU identity: %w", err)
	}
	return out, nil
}

func identity(g *GPU, r *Report, chip string) Identity {
	fingerprint := func(der []byte) string {
		sum := sha256.Sum256(der)
		return hex.EncodeToString(sum[:])
	}
	return Identity{
		Certificate: fingerprint(g.Certificates[0]), Device: fingerprint(g.Certificates[1]),
		Chip: chip, Model: g.Model, Driver: r.Driver, VBIOS: r.VBIOS,
		CC: g.State.CC, DevTools: g.State.DevTools, MultiGPU: g.State.MultiGPU,
	}
}

// Collateral is what GPUs are judged by and NVIDIA signs: RIMs and OCSP
// responses. Whoever carries it is not trusted. Canonical JSON (RFC 8785).
type Collateral struct {
	Version int              `json:"version"`
	RIMs    []evidence.Bytes `json:"rims"` // XML, as NVIDIA serves it
	OCSP    []evidence.Bytes `json:"ocsp"` // DER (RFC 6960)
}

// Validate implements canonical.Document.
func (c *Collateral) Validate() error {
	if c.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", c.Version, Version)
	}
	if c.RIMs == nil || c.OCSP == nil || len(c.RIMs) > maxRIMs || len(c.OCSP) > maxOCSP {
		return fmt.Errorf("expected at most %d RIMs and %d OCSP responses", maxRIMs, maxOCSP)
	}
	for i, r := range c.RIMs {
		if len(r) > MaxRIMSize {
			return fmt.Errorf("rims[%d]: %d bytes, at most %d are allowed", i, len(r), MaxRIMSize)
		}
	}
	for i, r := range c.OCSP {
		if len(r) > MaxOCSPSize {
			return fmt.Errorf("ocsp[%d]: %d bytes, at most %d are allowed", i, len(r), MaxOCSPSize)
		}
	}
	return nil
}

// Encode returns the canonical encoding.
func (c *Collateral) Encode() ([]byte, error) {
	return encode("GPU collateral", c, MaxCollateralSize)
}

// ParseCollateral reads collateral. It verifies no signature.
func ParseCollateral(data []byte) (*Collateral, error) {
	var c Collateral
	if err := canonical.Decode(data, MaxCollateralSize, &c); err != nil {
		return nil, fmt.Errorf("GPU collateral: %w", err)
	}
	return &c, nil
}

func encode(what string, d canonical.Document, limit int) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	out, err := canonical.Encode(d)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if len(out) > limit {
		return nil, fmt.Errorf("%s: %d bytes, at most %d are allowed", what, len(out), limit)
	}
	return out, nil
}
