package attest_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/testing/testdata"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/measure/record"
)

func TestPCS(t *testing.T) {
	want := attesttest.NewIntel(time.Now()).Collateral()
	broken := ""
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		where := r.URL.RequestURI()
		if broken != "" && strings.Contains(where, broken) {
			w.Write(make([]byte, 2<<20))
			return
		}
		switch where {
		case "/tdx/certification/v4/tcb?fmspc=" + attesttest.FMSPC:
			w.Header().Set("TCB-Info-Issuer-Chain", url.QueryEscape(want.TCBInfoChain))
			w.Write([]byte(want.TCBInfo))
		case "/tdx/certification/v4/qe/identity":
			w.Header().Set("SGX-Enclave-Identity-Issuer-Chain", url.QueryEscape(want.QEIdentityChain))
			w.Write([]byte(want.QEIdentity))
		case "/sgx/certification/v4/pckcrl?encoding=der&ca=platform":
			w.Write(want.PCKCRL)
		case "/IntelSGXRootCA.der":
			w.Write(want.RootCRL)
		default:
			http.NotFound(w, r)
		}
	}))
	defer s.Close()
	dir := t.TempDir()
	cache := &attest.Cache{Dir: filepath.Join(dir, "collateral"), From: &attest.PCS{Base: s.URL}}
	for range 2 { // fetched, then kept
		got, err := cache.Collateral(context.Background(), attesttest.FMSPC, "platform")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%v", err)
		}
	}
	for _, name := range []string{"../../../etc/p", "B0C06F000000", ""} {
		if _, err := cache.Collateral(context.Background(), name, "platform"); err == nil {
			t.Errorf("%q is looked up", name)
		}
	}
	for _, part := range []string{"tcb", "qe", "pckcrl", "Root"} {
		broken = part
		if _, err := (&attest.PCS{Base: s.URL}).Collateral(context.Background(), attesttest.FMSPC, "platform"); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s of 2 MiB: %v", part, err)
		}
	}
	// Old collateral is asked for again, and used while no other is to be had.
	broken = "tcb"
	path := filepath.Join(dir, "collateral", attesttest.FMSPC+"-platform.json")
	old := time.Now().Add(-48 * time.Hour)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if got, err := cache.Collateral(context.Background(), attesttest.FMSPC, "platform"); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v", err)
	}
	broken = ""
	if _, err := cache.Collateral(context.Background(), attesttest.FMSPC, "platform"); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(path); err != nil || time.Since(info.ModTime()) > time.Hour {
		t.Error("it was not fetched again")
	}
}

type failing struct{}

func (failing) Collateral(context.Context, string, string) (*attest.Collateral, error) {
	return nil, errors.New("no network")
}

// TestUnchecked tells what could not be checked from what is refused.
func TestUnchecked(t *testing.T) {
	for name, lie := range map[string]func(s *scene){
		"no collateral":      func(s *scene) { s.client.Collateral = failing{} },
		"expired collateral": func(s *scene) { s.vm.Intel.NextUpdate = time.Now().Add(-time.Minute); s.recollect() },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, record.TDX)
			lie(s)
			refused, ok := errors.AsType[*attest.RefusedError](s.ask())
			if !ok || refused.Verdict.Refused() || refused.Verdict.OK || refused.Verdict.Failed != attest.CheckTCB {
				t.Errorf("%v", refused)
			}
			s.nothingSent(t)
		})
	}
}

// TestRealQuotes reads quotes of real machines, which are not ours: the signature
// and the chain hold, and then the first thing that is not Chrysalis is named.
func TestRealQuotes(t *testing.T) {
	for name, tt := range map[string]struct {
		quote []byte
		at    string
	}{
		"version 4": {bytes.TrimSuffix(testdata.RawQuote, []byte("\nextra bytes(only for testing purpose)\n")), "2023-07-01T01:00:00Z"},
		"version 5": {testdata.RawQuoteV5, "2026-03-01T01:00:00Z"},
	} {
		t.Run(name, func(t *testing.T) {
			at, err := time.Parse(time.RFC3339, tt.at)
			if err != nil {
				t.Fatal(err)
			}
			vm := attesttest.NewVM(record.TDX)
			n := nonce()
			d := vm.Document(n)
			d.TDX.Quote = tt.quote
			document, err := d.Encode()
			if err != nil {
				t.Fatal(err)
			}
			v := attest.Verify(t.Context(), document, attest.Input{Policy: attest.NewPolicy(), Nonce: n, TLSKey: vm.SPKI, Time: at, Collateral: failing{}})
			if c := v.First(); c.Name != attest.CheckTCB || c.Status != attest.Unchecked || !strings.Contains(c.Detail, "no network") {
				t.Errorf("%+v", c)
			}
			for i := range len(tt.quote) {
				if i%97 != 0 {
					continue
				}
				d.TDX.Quote = bytes.Clone(tt.quote)
				d.TDX.Quote[i] ^= 0x80
				document, err := d.Encode()
				if err != nil {
					t.Fatal(err)
				}
				v := attest.Verify(t.Context(), document, attest.Input{Policy: attest.NewPolicy(), Nonce: n, TLSKey: vm.SPKI, Time: at, Collateral: failing{}})
				if v.Failed != attest.CheckQuote && i < 0x600 {
					t.Errorf("byte %d changed: %v", i, v.First())
				}
			}
		})
	}
}

// FuzzQuote reads quotes without the net that catches panics: sizes are checked
// before go-tdx-guest gets to see them.
func FuzzQuote(f *testing.F) {
	td := attesttest.NewVM(record.TDX)
	n := bytes.Repeat([]byte{1}, 32)
	f.Add([]byte(td.Document(n).TDX.Quote))
	td.TD.Version = 4
	f.Add([]byte(td.Document(n).TDX.Quote))
	f.Add(testdata.RawQuote)
	f.Add(testdata.RawQuoteV5)
	f.Fuzz(func(t *testing.T, raw []byte) { attest.ParseQuote(raw) })
}

// FuzzTPM reads a TPM's proof without that net.
func FuzzTPM(f *testing.F) {
	vm := attesttest.NewVM(record.TPM)
	d := vm.Document(bytes.Repeat([]byte{1}, 32))
	policy := vm.Policy()
	f.Add([]byte(d.TPM.Quote), []byte(d.TPM.Signature), []byte(d.TPM.AK), []byte(d.TPM.Certificates[0]))
	f.Fuzz(func(t *testing.T, quote, signature, ak, cert []byte) {
		tpm := *d.TPM
		tpm.Quote, tpm.Signature, tpm.AK, tpm.Certificates = quote, signature, ak, []evidence.Bytes{cert}
		attest.CheckTPM(&tpm, policy)
	})
}

// FuzzReplay must not fail badly, and must not take memory for what is not there.
func FuzzReplay(f *testing.F) {
	f.Add(attesttest.NewVM(record.TDX).Log(), uint16(0x0c))
	f.Add(attesttest.NewVM(record.TPM).Log(), uint16(0x0b))
	if data, err := hex.DecodeString("00"); err == nil {
		f.Add(data, uint16(0x0b))
	}
	f.Fuzz(func(t *testing.T, log []byte, alg uint16) {
		if alg != 0x0b {
			alg = 0x0c
		}
		attest.Replay(log, alg)
	})
}
