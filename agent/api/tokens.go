package api

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"strings"
)

func tokenHashes(list []string) (hashes [][sha256.Size]byte) {
	for _, text := range list {
		hash, err := hex.DecodeString(text)
		if err != nil {
			panic(err) // the manifest has been validated
		}
		hashes = append(hashes, [sha256.Size]byte(hash))
	}
	return hashes
}

// admits reports whether a request carries a token that the manifest names: RFC
// 6750, section 2.1. How long it takes says nothing about the hashes: all of them
// are compared, each as a whole. client is whose token it is, nil where the
// manifest names none.
func (s *Server) admits(r *http.Request) (client any, ok bool) {
	if len(s.tokens) == 0 {
		return nil, true
	}
	values := r.Header["Authorization"]
	if len(values) != 1 {
		return nil, false
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return nil, false
	}
	hash, found := sha256.Sum256([]byte(token)), 0
	for _, known := range s.tokens {
		found |= subtle.ConstantTimeCompare(hash[:], known[:])
	}
	return hash, found == 1
}
