package api

import (
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
	"time"

	"chrysalis/agent/proof"
	"chrysalis/attest/evidence"
)

// evidenceTotal bounds a request for evidence: the quotes that it waits for, and the
// writing of the document. The manifest's limits are about the engine.
const evidenceTotal = 2 * time.Minute

// evidence answers a request for evidence. It takes no place in the engine, and no
// token: who is to trust the VM with a token must have seen it first.
func (x *exchange) evidence(query string) error {
	nonce, ok := parseNonce(query)
	if !ok {
		return errNonce
	}
	x.end = time.Now().Add(evidenceTotal)
	doc, err := x.s.evidence(x.r.Context(), nonce)
	switch {
	case x.r.Context().Err() != nil:
		return errGone
	case errors.Is(err, proof.ErrBusy):
		return errEvidenceBusy
	case err != nil:
		return errEvidence
	}
	// Clients of one quote share its bytes; of many quotes, each held by a client
	// that reads slowly, there must not be more than there is memory for.
	if !x.reserve(int64(len(doc))) {
		return errMemory
	}
	return x.answer(http.StatusOK, doc)
}

// parseNonce reads the one query that there is, in its one spelling.
func parseNonce(query string) (nonce [evidence.NonceSize]byte, ok bool) {
	text, ok := strings.CutPrefix(query, "nonce=")
	if !ok || len(text) != base64.RawURLEncoding.EncodedLen(len(nonce)) {
		return nonce, false
	}
	n, err := base64.RawURLEncoding.Strict().Decode(nonce[:], []byte(text))
	return nonce, err == nil && n == len(nonce)
}
