package gpu

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"chrysalis/agent/gpu/protocol"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/guest"
)

// Refusal is why the GPUs may not work, or no longer.
type Refusal struct {
	Reason guest.Reason
	Err    error
	RIMs   []string // with ReasonGPUCollateral: the names of those that are missing
}

// Error implements error.
func (r *Refusal) Error() string { return r.Err.Error() }

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Err }

func refuse(reason guest.Reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Err: fmt.Errorf(format, args...)}
}

// Set is the GPUs of a VM: attested once when it boots, and again for every batch
// of clients and now and then in between. It is used by several goroutines.
//
// All errors of its methods are of type *Refusal, and final: the VM that gets one
// must end.
type Set struct {
	helper     *Client
	verifier   *nvidia.Verifier
	policy     nvidia.Policy
	identities [][]byte
}

// NewSet checks that the GPUs are those that the VM must have, that they are
// confidential and take no work yet, and attests them: the first time that
// anything of them is believed. verifier has the collateral that it takes. The
// caller measures the identities, and only then calls Release.
func NewSet(ctx context.Context, helper *Client, verifier *nvidia.Verifier, gpus int, models []string) (*Set, error) {
	s := &Set{helper: helper, verifier: verifier, policy: nvidia.Policy{
		GPUs: gpus, Models: models,
		// The VM has no clock that it trusts: age and revocation are the client's.
		NoClock: true,
	}}
	there, err := helper.Inventory(ctx)
	if err != nil {
		return nil, ofHelper(err)
	}
	if len(there) != gpus {
		return nil, refuse(guest.ReasonGPUCount, "NVIDIA's library sees %d GPUs, the manifest requires %d", len(there), gpus)
	}
	for _, g := range there {
		if !slices.Contains(models, g.Name) {
			return nil, refuse(guest.ReasonGPUModel, "GPU %d is a %q, which the driver's list does not name", g.Index, g.Name)
		}
	}
	system, err := helper.System(ctx)
	if err != nil {
		return nil, ofHelper(err)
	}
	switch {
	case system.DevTools:
		return nil, refuse(guest.ReasonGPUDevTools, "the GPUs are in devtools mode")
	case !system.Capable || !system.CC || system.Environment != "production" || system.MultiGPU != protocol.MultiGPUNone:
		return nil, refuse(guest.ReasonGPUMode, "the GPUs' mode is %+v, expected confidential computing, for each by itself", *system)
	case system.Ready:
		return nil, refuse(guest.ReasonGPUReady, "somebody let the GPUs work before they were attested")
	}
	for i := range gpus {
		if err := s.checkHealth(ctx, i); err != nil {
			return nil, err
		}
	}
	_, result, err := s.attest(ctx, freshNonce())
	if err != nil {
		return nil, err
	}
	for _, g := range result.GPUs {
		identity, err := g.Identity.Encode()
		if err != nil {
			return nil, refuse(guest.ReasonGPUAttestation, "%w", err)
		}
		s.identities = append(s.identities, identity)
	}
	s.policy.Identities = s.identities
	return s, nil
}

// Identities are what is measured of each GPU, in order.
func (s *Set) Identities() [][]byte { return s.identities }

// Release lets the GPUs take work.
func (s *Set) Release(ctx context.Context) error {
	if err := s.helper.SetReady(ctx, true); err != nil {
		return ofHelper(err)
	}
	system, err := s.helper.System(ctx)
	if err != nil {
		return ofHelper(err)
	}
	if !system.Ready {
		return refuse(guest.ReasonGPUDriver, "the GPUs take no work after they were told to")
	}
	return nil
}

// Prove returns the GPUs' evidence for a nonce: that of the GPUs that were
// measured, or an error.
func (s *Set) Prove(ctx context.Context, nonce [nvidia.NonceSize]byte) ([]byte, error) {
	data, _, err := s.attest(ctx, nonce)
	return data, err
}

// Watch asks the GPUs about their health every so often, and attests them again
// now and then. It returns when something is wrong, or when ctx ends.
func (s *Set) Watch(ctx context.Context, health, again time.Duration) error {
	asked := time.NewTicker(health)
	defer asked.Stop()
	attested := time.NewTicker(again)
	defer attested.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-asked.C:
			if err := s.checkWork(ctx); err != nil {
				return err
			}
		case <-attested.C:
			if _, err := s.Prove(ctx, freshNonce()); err != nil {
				return err
			}
		}
	}
}

// checkWork asks whether all GPUs are there, sound, and in the mode in which they
// were let to work.
func (s *Set) checkWork(ctx context.Context) error {
	for i := range s.policy.GPUs {
		if err := s.checkHealth(ctx, i); err != nil {
			return err
		}
	}
	system, err := s.helper.System(ctx)
	switch {
	case err != nil:
		return ofHelper(err)
	case system.DevTools:
		return refuse(guest.ReasonGPUDevTools, "the GPUs went into devtools mode")
	case !system.CC || system.MultiGPU != protocol.MultiGPUNone || !system.Ready:
		return refuse(guest.ReasonGPUMode, "the GPUs left their mode: %+v", *system)
	}
	return nil
}

func (s *Set) checkHealth(ctx context.Context, i int) error {
	h, err := s.helper.Health(ctx, i)
	if err != nil {
		return ofHelper(err)
	}
	if h.Uncorrectable > 0 {
		return refuse(guest.ReasonGPULost, "GPU %d had %d uncorrectable memory errors", i, h.Uncorrectable)
	}
	return nil
}

// attest makes evidence and verifies it as a client does, but for what needs a
// clock.
func (s *Set) attest(ctx context.Context, nonce [nvidia.NonceSize]byte) ([]byte, *nvidia.Result, error) {
	e, err := s.helper.Attest(ctx, nonce)
	if err != nil {
		return nil, nil, ofHelper(err)
	}
	data, err := e.Encode()
	if err != nil {
		return nil, nil, refuse(guest.ReasonGPUAttestation, "%w", err)
	}
	policy := s.policy
	policy.Nonce = nonce
	result, err := s.verifier.Verify(data, policy)
	if err != nil {
		r := ofCheck(err)
		if r.Reason == guest.ReasonGPUCollateral {
			r.RIMs = missing(e, err)
		}
		return nil, nil, r
	}
	return data, result, nil
}

// ofHelper gives an error of the helper's client its reason.
func ofHelper(err error) *Refusal {
	reason := guest.ReasonGPUHelper
	if e, ok := errors.AsType[*Error](err); ok {
		switch e.Code {
		case protocol.CodeNoGPU, protocol.CodeTooMany:
			reason = guest.ReasonGPUCount
		case protocol.CodeLost:
			reason = guest.ReasonGPULost
		case protocol.CodeNoLibrary, protocol.CodeNoSymbol, protocol.CodeNoDriver, protocol.CodeNoPermission, protocol.CodeFailed:
			reason = guest.ReasonGPUDriver
		case protocol.CodeNotSupported:
			reason = guest.ReasonGPUMode
		case protocol.CodeBadAnswer:
			reason = guest.ReasonGPUAttestation
		}
	}
	return &Refusal{Reason: reason, Err: err}
}

// missing names the RIMs of a kind that a check has not found, for all GPUs: there
// may be several kinds of boards.
func missing(e *nvidia.Evidence, err error) []string {
	var out []string
	for i := range e.GPUs {
		driver, vbios, idErr := nvidia.RIMIDs(&e.GPUs[i])
		if r, ok := errors.AsType[*nvidia.Refusal](err); ok && r.Check == nvidia.CheckDriverRIM {
			vbios = driver
		}
		if idErr == nil && guest.IsRIM(vbios) && !slices.Contains(out, vbios) {
			out = append(out, vbios)
		}
	}
	return out
}

// ofCheck gives what a verifier refuses its reason.
func ofCheck(err error) *Refusal {
	reason := guest.ReasonGPUAttestation
	if r, ok := errors.AsType[*nvidia.Refusal](err); ok {
		switch r.Check {
		case nvidia.CheckCount:
			reason = guest.ReasonGPUCount
		case nvidia.CheckModel:
			reason = guest.ReasonGPUModel
		case nvidia.CheckMode:
			reason = guest.ReasonGPUMode
		case nvidia.CheckDevTools:
			reason = guest.ReasonGPUDevTools
		case nvidia.CheckDriverRIM, nvidia.CheckVBIOSRIM:
			reason = guest.ReasonGPUCollateral
		case nvidia.CheckIdentity:
			reason = guest.ReasonGPUChanged
		}
	}
	return &Refusal{Reason: reason, Err: err}
}

func freshNonce() (nonce [nvidia.NonceSize]byte) {
	rand.Read(nonce[:]) // never fails: crypto/rand
	return nonce
}

// Merge adds to collateral what other collateral has and it has not.
func Merge(into, from *nvidia.Collateral) *nvidia.Collateral {
	out := &nvidia.Collateral{Version: nvidia.Version, RIMs: slices.Clone(into.RIMs), OCSP: slices.Clone(into.OCSP)}
	for _, rim := range from.RIMs {
		if !slices.ContainsFunc(out.RIMs, func(have evidence.Bytes) bool { return bytes.Equal(have, rim) }) {
			out.RIMs = append(out.RIMs, rim)
		}
	}
	for _, answer := range from.OCSP {
		if !slices.ContainsFunc(out.OCSP, func(have evidence.Bytes) bool { return bytes.Equal(have, answer) }) {
			out.OCSP = append(out.OCSP, answer)
		}
	}
	return out
}
