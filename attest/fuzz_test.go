package attest_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/measure/record"
)

// FuzzCollateral verifies a good quote with collateral that somebody changed: it is
// refused unless nothing was.
func FuzzCollateral(f *testing.F) {
	vm := attesttest.NewVM(record.TDX)
	n := nonce()
	document, err := vm.Document(n).Encode()
	if err != nil {
		f.Fatal(err)
	}
	good := *vm.Intel.Collateral()
	policy := vm.Policy()
	f.Add(good.TCBInfo, good.TCBInfoChain, good.QEIdentity, good.PCKCRL, good.RootCRL)
	f.Fuzz(func(t *testing.T, info, chain, identity string, pck, root []byte) {
		c := good
		c.TCBInfo, c.TCBInfoChain, c.QEIdentity, c.PCKCRL, c.RootCRL = info, chain, identity, pck, root
		v := attest.Verify(context.Background(), document, attest.Input{Policy: policy, Nonce: n, TLSKey: vm.SPKI, Time: time.Now(), Collateral: &c})
		if changed := info != good.TCBInfo || identity != good.QEIdentity; changed && v.OK {
			t.Error("it is believed")
		}
	})
}

// FuzzSaved reads the folder of a saved verification.
func FuzzSaved(f *testing.F) {
	vm := attesttest.NewVM(record.TPM)
	document, err := vm.Document(nonce()).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"version":1,"host":"h","at":"2026-01-01T00:00:00Z","nonce":"AAAA","tls_key":"AAAA"}`), document, []byte(`{"version":1}`), []byte(`{"tcb_info":"{}"}`))
	f.Fuzz(func(t *testing.T, session, evidence, policy, collateral []byte) {
		dir := t.TempDir()
		for name, data := range map[string][]byte{
			attest.FileSession: session, attest.FileEvidence: evidence, attest.FilePolicy: policy, attest.FileCollateral: collateral,
		} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if s, err := attest.Offline(context.Background(), dir, nil, nil); err == nil && s.Verdict.OK {
			t.Error("it is believed without a record")
		}
	})
}
