package attest

import (
	"crypto/x509"
	"time"
)

// SetIntelRoot makes a test's root Intel's until the function that it returns is
// called.
func SetIntelRoot(root *x509.Certificate) func() {
	old := intelRoot
	intelRoot = root
	return func() { intelRoot = old }
}

// SetClock makes a transport take the time from now.
func (t *Transport) SetClock(now func() time.Time) { t.now = now }
