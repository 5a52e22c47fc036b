package attest

import (
	"crypto"
	"errors"
	"fmt"

	tpmpb "github.com/google/go-tpm-tools/proto/tpm"
	"github.com/google/go-tpm-tools/quote"

	"chrysalis/attest/evidence"
)

// secondOpinion has go-tpm-tools verify the same quote, in code that has nothing
// in common with this package's: signature, magic, qualifying data, and that the
// PCRs are those quoted. What two readers understand differently is refused.
func secondOpinion(t *evidence.TPM, key crypto.PublicKey, qualifying [32]byte) (err error) {
	defer func() {
		// It was not written for hostile input.
		if r := recover(); r != nil {
			err = errors.New("a second verifier cannot read it")
		}
	}()
	pcrs := map[uint32][]byte{}
	for _, p := range t.PCRs {
		pcrs[uint32(p.Index)] = p.SHA256
	}
	err = quote.Verify(&tpmpb.Quote{
		Quote:  t.Quote,
		RawSig: t.Signature,
		Pcrs:   &tpmpb.PCRs{Hash: tpmpb.HashAlgo_SHA256, Pcrs: pcrs},
	}, key, qualifying[:])
	if err != nil {
		return fmt.Errorf("a second verifier refuses it: %w", err)
	}
	return nil
}
