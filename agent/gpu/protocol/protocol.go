// Package protocol is what the agent and the NVML helper say to each other: JSON
// objects, one a line, requests over the helper's standard input and answers over
// its standard output.
package protocol

import (
	"fmt"
	"regexp"

	"chrysalis/attest/evidence"
)

// Version is the protocol's.
const Version = 1

// Bounds of the protocol.
const (
	MaxRequest = 4 << 10  // bytes of a line
	MaxAnswer  = 64 << 10 // bytes of a line
	MaxGPUs    = 16       // more are an error

	NonceSize     = 32     // bytes
	MaxReportSize = 0x2000 // bytes; NVML_CC_GPU_ATTESTATION_REPORT_SIZE
	MaxChainSize  = 0x1400 // bytes; NVML_GPU_ATTESTATION_CERT_CHAIN_SIZE
	maxLinks      = 18     // NVML_NVLINK_MAX_LINKS
)

// Op is what the helper is asked for.
type Op string

// The operations. Only OpSetReady changes anything.
const (
	OpInventory Op = "inventory" // which GPUs there are
	OpSystem    Op = "system"    // the confidential-computing state of all
	OpAttest    Op = "attest"    // a report over a nonce, with its certificates
	OpHealth    Op = "health"    // whether a GPU is still there and sound
	OpSetReady  Op = "set-ready" // let the GPUs take work, or not
)

// Request is one question.
type Request struct {
	Version int            `json:"version"`
	ID      uint64         `json:"id"` // comes back with the answer
	Op      Op             `json:"op"`
	GPU     int            `json:"gpu,omitempty"`   // of OpAttest and OpHealth, NVML's index
	Nonce   evidence.Bytes `json:"nonce,omitempty"` // of OpAttest, NonceSize bytes
	Ready   bool           `json:"ready,omitempty"` // of OpSetReady
}

// Code says how a request went.
type Code string

// The codes. The last ones are the client's own, for a helper that does not do
// its work.
const (
	CodeOK           Code = "ok"
	CodeNoLibrary    Code = "no-library"    // libnvidia-ml.so.1 cannot be loaded
	CodeNoSymbol     Code = "no-symbol"     // it lacks a function: it is too old
	CodeNoDriver     Code = "no-driver"     // the kernel modules are not there or do not match
	CodeNotSupported Code = "not-supported" // the GPU or its mode cannot do it
	CodeNoPermission Code = "no-permission"
	CodeLost         Code = "gpu-lost"     // it fell off the bus
	CodeNoGPU        Code = "no-gpu"       // there is none with that index
	CodeFailed       Code = "nvml-failed"  // any other error of NVML, with its number
	CodeTooMany      Code = "too-many"     // more GPUs than MaxGPUs
	CodeBadAnswer    Code = "nvml-invalid" // NVML said something out of bounds
	CodeBadRequest   Code = "bad-request"

	CodeDied    Code = "helper-died"
	CodeHung    Code = "helper-hung"
	CodeGarbage Code = "helper-garbage"
	CodeFlood   Code = "helper-flood"
)

var codes = map[Code]bool{
	CodeOK: true, CodeNoLibrary: true, CodeNoSymbol: true, CodeNoDriver: true, CodeNotSupported: true, CodeNoPermission: true,
	CodeLost: true, CodeNoGPU: true, CodeFailed: true, CodeTooMany: true, CodeBadAnswer: true, CodeBadRequest: true,
}

// Answer is what the helper says. Which part is there follows from the operation.
type Answer struct {
	ID     uint64 `json:"id"`
	Code   Code   `json:"code"`
	Detail string `json:"detail,omitempty"` // a symbol or a number; never shown to clients

	GPUs   []GPU   `json:"gpus,omitempty"`
	System *System `json:"system,omitempty"`
	Proof  *Proof  `json:"proof,omitempty"`
	Health *Health `json:"health,omitempty"`
}

// GPU is one of the inventory.
type GPU struct {
	Index  int    `json:"index"`
	UUID   string `json:"uuid"`
	PCI    string `json:"pci"` // DDDDDDDD:BB:DD.F, as NVML writes it
	Name   string `json:"name"`
	Driver string `json:"driver"`
	VBIOS  string `json:"vbios"`
	// Protected and Unprotected are KiB of its memory; both are 0 where NVML does
	// not tell, as with confidential computing off.
	Protected   uint64 `json:"protected_kib"`
	Unprotected uint64 `json:"unprotected_kib"`
	// Links counts the active NVLinks, and Fabric says whether an NVSwitch fabric
	// has taken the GPU in.
	Links  int    `json:"nvlinks"`
	Fabric Fabric `json:"fabric"`
}

// Fabric is a GPU's state in an NVSwitch fabric.
type Fabric string

// The states, as NVML_GPU_FABRIC_STATE_*.
const (
	FabricNone       Fabric = "none" // not supported, or not told
	FabricNotStarted Fabric = "not-started"
	FabricInProgress Fabric = "in-progress"
	FabricCompleted  Fabric = "completed"
)

// MultiGPU is how GPUs work together; package attest/nvidia has the same names.
type MultiGPU string

// The modes, as NVML_CC_SYSTEM_MULTIGPU_*.
const (
	MultiGPUNone          MultiGPU = "none"
	MultiGPUProtectedPCIe MultiGPU = "protected-pcie"
	MultiGPUNVLE          MultiGPU = "nvlink-encryption"
)

// System is the confidential-computing state of the driver and all its GPUs.
type System struct {
	Capable     bool     `json:"capable"`     // the GPUs can
	CC          bool     `json:"cc"`          // and it is on
	DevTools    bool     `json:"devtools"`    // in its debugging mode
	Environment string   `json:"environment"` // production, simulation or unavailable
	MultiGPU    MultiGPU `json:"multi_gpu"`   // none where an old driver does not tell
	Ready       bool     `json:"ready"`       // the GPUs take work
}

// Proof is a report over the request's nonce.
type Proof struct {
	Report evidence.Bytes `json:"report"` // SPDM request and response
	Chain  evidence.Bytes `json:"chain"`  // PEM, the GPU's own certificate first
}

// Health is what a GPU that is still there says of itself.
type Health struct {
	Uncorrectable uint64 `json:"uncorrectable"` // memory errors since the driver was loaded
}

var (
	uuidRE = regexp.MustCompile(`^GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	pciRE  = regexp.MustCompile(`^[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]$`)
	textRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9 ._()/-]{0,79}$`)
)

// Check reports what in an answer to a request is out of bounds.
func (a *Answer) Check(r *Request) error {
	if a.ID != r.ID {
		return fmt.Errorf("answer %d to request %d", a.ID, r.ID)
	}
	if !codes[a.Code] {
		return fmt.Errorf("there is no code %.40q", a.Code)
	}
	if len(a.Detail) > 200 {
		return fmt.Errorf("a detail of %d bytes", len(a.Detail))
	}
	want := map[Op]bool{}
	if a.Code == CodeOK {
		want[r.Op] = true
	}
	if (a.GPUs != nil) != want[OpInventory] || (a.System != nil) != want[OpSystem] || (a.Proof != nil) != want[OpAttest] || (a.Health != nil) != want[OpHealth] {
		return fmt.Errorf("not the answer to %s", r.Op)
	}
	if len(a.GPUs) > MaxGPUs {
		return fmt.Errorf("%d GPUs", len(a.GPUs))
	}
	for i, g := range a.GPUs {
		if g.Index != i || !uuidRE.MatchString(g.UUID) || !pciRE.MatchString(g.PCI) || !textRE.MatchString(g.Name) ||
			!textRE.MatchString(g.Driver) || !textRE.MatchString(g.VBIOS) || g.Links < 0 || g.Links > maxLinks {
			return fmt.Errorf("GPU %d is out of bounds", i)
		}
		switch g.Fabric {
		case FabricNone, FabricNotStarted, FabricInProgress, FabricCompleted:
		default:
			return fmt.Errorf("GPU %d has a fabric state %.40q", i, g.Fabric)
		}
	}
	if s := a.System; s != nil {
		switch s.MultiGPU {
		case MultiGPUNone, MultiGPUProtectedPCIe, MultiGPUNVLE:
		default:
			return fmt.Errorf("there is no multi-GPU mode %.40q", s.MultiGPU)
		}
		switch s.Environment {
		case "production", "simulation", "unavailable":
		default:
			return fmt.Errorf("there is no environment %.40q", s.Environment)
		}
	}
	if p := a.Proof; p != nil && (len(p.Report) < 1 || len(p.Report) > MaxReportSize || len(p.Chain) < 1 || len(p.Chain) > MaxChainSize) {
		return fmt.Errorf("a report of %d bytes with a chain of %d", len(p.Report), len(p.Chain))
	}
	return nil
}
