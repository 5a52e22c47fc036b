package attest

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"

	"chrysalis/attest/evidence"
	"chrysalis/attest/receipt"
)

// ErrNotVerified is a receipt of a VM whose evidence does not hold.
var ErrNotVerified = errors.New("the evidence does not hold, so its receipt key proves nothing")

// Receipt checks a receipt against the session of the VM that gave it: the
// signature is of the evidence's receipt key, and manifest and model are the
// evidence's. The bodies are for the receipt's CheckBodies.
func (s *Session) Receipt(data []byte) (*receipt.Receipt, error) {
	if s.Verdict == nil || !s.Verdict.OK {
		return nil, ErrNotVerified
	}
	d, err := evidence.Parse(s.Document)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(d.ReceiptKey, s.Verdict.ReceiptKey) {
		return nil, ErrNotVerified
	}
	r, err := receipt.Verify(data, ed25519.PublicKey(d.ReceiptKey))
	if err != nil {
		return nil, err
	}
	if err := r.CheckManifest(d.Manifest); err != nil {
		return nil, err
	}
	at := slices.Index(s.Verdict.Models, r.Model)
	if at < 0 || s.Verdict.ModelRoots[at].String() != r.RootHash {
		return nil, fmt.Errorf("receipt: the VM does not serve the model %.200q with this root hash", r.Model)
	}
	return r, nil
}
