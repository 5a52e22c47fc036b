package nvidia

import (
	"bytes"
	"encoding/json"
	"testing"
)

// FuzzParseEvidence reads the part of a VM's evidence that is about GPUs, and the
// collateral that travels with it.
func FuzzParseEvidence(f *testing.F) {
	f.Add([]byte(`{"version":1,"gpus":[{"model":"m","state":{"cc":true,"devtools":false,"multi_gpu":"none"},"report":"AAAA","certificates":["AAAA"]}]}`))
	f.Add([]byte(`{"version":1,"rims":["AAAA"],"ocsp":["AAAA"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if e, err := ParseEvidence(data); err == nil {
			if again, err := e.Encode(); err != nil || !bytes.Equal(again, data) {
				t.Errorf("%q is read, and written as %q, %v", data, again, err)
			}
		}
		if c, err := ParseCollateral(data); err == nil {
			if encoded, err := c.Encode(); err != nil || !json.Valid(encoded) {
				t.Errorf("%q: %v", encoded, err)
			}
		}
	})
}

// FuzzOCSP reads an answer about a certificate.
func FuzzOCSP(f *testing.F) {
	f.Add([]byte{0x30, 3, 0x0a, 1, 6})
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := parseOCSP(data); err == nil && (r.Certificate == nil || len(data) > MaxOCSPSize) {
			t.Error("accepted")
		}
	})
}
