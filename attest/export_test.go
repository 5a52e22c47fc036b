package attest

import (
	"crypto/x509"
	"time"

	"github.com/google/go-tdx-guest/verify"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
)

// SetIntelRoot makes a test's root Intel's until the function that it returns is
// called.
func SetIntelRoot(root *x509.Certificate) func() {
	old := intelRoot
	intelRoot = root
	return func() { intelRoot = old }
}

// SetNVIDIARoots makes a test's roots NVIDIA's until the function that it returns is
// called.
func SetNVIDIARoots(roots nvidia.Roots) func() {
	old := nvidiaRoots
	nvidiaRoots = func() nvidia.Roots { return roots }
	return func() { nvidiaRoots = old }
}

// SetClock makes a transport take the time from now.
func (t *Transport) SetClock(now func() time.Time) { t.now = now }

// IntelRoot is the built-in root.
func IntelRoot() *x509.Certificate { return intelRoot }

// Replay replays a firmware's log.
var Replay = replay

// StepQuote is what the check of a quote does.
func StepQuote(raw []byte, policy *Policy) error {
	quote, _, _, err := parseQuote(raw)
	if err != nil {
		return err
	}
	return verify.TdxQuote(quote, &verify.Options{TrustedRoots: pool(policy.tdxRoots)})
}

// StepCollateral is what the check of the TCB does.
func StepCollateral(raw []byte, c *Collateral, policy *Policy) error {
	_, _, p, err := parseQuote(raw)
	if err != nil {
		return err
	}
	_, err = c.judge(p, policy.tdxRoots, 0, time.Now())
	return err
}

// ParseQuote reads a quote.
func ParseQuote(raw []byte) error {
	_, _, _, err := parseQuote(raw)
	return err
}

// CheckTPM checks a TPM's key and quote.
func CheckTPM(t *evidence.TPM, policy *Policy) error {
	key, _, err := attestationKey(t, &Input{Policy: policy, Time: time.Now()})
	if err != nil {
		return err
	}
	_, err = verifyTPMQuote(t, key)
	return err
}
