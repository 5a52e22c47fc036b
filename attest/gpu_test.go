package attest_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// newGPUScene is a VM with two GPUs, before anything is wrong.
func newGPUScene(t *testing.T, platform record.Platform, gpus int) *scene {
	t.Helper()
	vm := attesttest.NewVM(platform)
	vm.AddGPUs(gpus)
	s := &scene{vm: vm, client: vm.Transport(), server: attesttest.Serve(vm)}
	s.client.Timeout = 10 * time.Second
	s.client.GPU = &attest.GPUCollateral{}
	t.Cleanup(func() { s.client.CloseIdleConnections(); s.server.Close() })
	return s
}

// checkOf returns a check of a verdict.
func checkOf(t *testing.T, v *attest.Verdict, name attest.Name) attest.Check {
	t.Helper()
	for _, c := range v.Checks {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("there is no check %s", name)
	return attest.Check{}
}

func TestGPUs(t *testing.T) {
	for _, n := range []int{1, 2, 4, 8} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			platform := record.TDX
			if n == 2 {
				platform = record.TPM
			}
			s := newGPUScene(t, platform, n)
			var v *attest.Verdict
			s.client.Verified = func(got *attest.Session) { v = got.Verdict }
			if err := s.ask(); err != nil {
				t.Fatal(err)
			}
			if len(v.GPUs) != n || v.GPUs[0].Model != nvidiatest.Model || v.GPUs[n-1].Driver != nvidiatest.Driver || v.GPUs[0].Chip != "GH100" ||
				v.GPUs[0].VBIOS != nvidiatest.VBIOS || v.GPUs[0].Mode != "confidential" || len(v.GPUs[0].Device) != 32 || v.GPUs[0].Measurements != 8 {
				t.Errorf("%+v", v.GPUs)
			}
			for _, name := range nvidia.Checks {
				if c := checkOf(t, v, attest.Name(name)); c.Status != attest.Passed || c.Title == "" {
					t.Errorf("%+v", c)
				}
			}
			if last := v.Checks[len(v.Checks)-1].Name; last != "gpu-identity" {
				t.Errorf("the last check is %s", last)
			}
			if c := checkOf(t, v, "gpu-driver-rim"); c.Detail != nvidiatest.Driver {
				t.Errorf("%+v", c)
			}
		})
	}
}

// gpuAttacks are lies about GPUs. Each is in evidence that is well formed and, where
// it can be, signed by the roots that the client trusts.
var gpuAttacks = []struct {
	name  string
	check attest.Name
	says  string
	lie   func(s *scene)
}{
	// What the VM and its host say.
	{"GPUs that were not measured", attest.CheckDisks, "0 GPUs were measured", func(s *scene) { s.vm.Identities = nil; s.vm.Boot() }},
	{"a GPU less measured", attest.CheckDisks, "1 GPUs were measured", func(s *scene) { s.vm.Identities = s.vm.Identities[1:]; s.vm.Boot() }},
	{"a GPU more measured", attest.CheckDisks, "3 GPUs were measured", func(s *scene) {
		s.vm.Identities = append(s.vm.Identities, s.vm.Identities[0])
		s.vm.Boot()
	}},
	{"no evidence of GPUs", attest.CheckGPU, "has none", func(s *scene) { s.vm.Sign = func(d *evidence.Document) { d.GPU = nil } }},
	{"GPUs that the manifest does not have", attest.CheckGPU, "asks for none", func(s *scene) {
		s.vm.Manifest.GPUs, s.vm.Identities = 0, nil
		s.vm.Boot()
	}},
	{"the GPUs' evidence swapped after the quote", attest.CheckReportData, "", func(s *scene) {
		other := attesttest.NewVM(record.TDX)
		other.AddGPUs(2)
		s.vm.Send = func(d *evidence.Document) {
			other.SPKI = d.TLSKey
			nonces := make([][]byte, len(d.Nonces))
			for i, n := range d.Nonces {
				nonces[i] = n
			}
			d.GPU = other.Document(nonces...).GPU
		}
	}},
	{"the GPUs' evidence left out after the quote", attest.CheckReportData, "", func(s *scene) { s.vm.Send = func(d *evidence.Document) { d.GPU = nil } }},
	{"a byte of the GPUs' evidence changed after the quote", attest.CheckReportData, "", func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.GPU[len(d.GPU)/2] ^= 1 }
	}},
	{"evidence that is none", "gpu-evidence", "", func(s *scene) { s.vm.Sign = func(d *evidence.Document) { d.GPU = []byte("{}") } }},
	{"evidence that is not canonical", "gpu-evidence", "", func(s *scene) { s.vm.Sign = func(d *evidence.Document) { d.GPU = append(d.GPU, '\n') } }},
	{"one of two GPUs", "gpu-count", "1 GPUs, expected 2", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs = e.GPUs[:1] }
	}},
	{"a third GPU", "gpu-count", "3 GPUs, expected 2", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, n [32]byte) { e.GPUs = append(e.GPUs, s.vm.Vendor.NewGPU().Evidence(n)) }
	}},
	{"a model that the policy does not name", "gpu-model", "not an allowed model", func(s *scene) { s.client.Policy.GPUModels = []string{"NVIDIA H200"} }},
	{"a model that is not Hopper's, and none named", "gpu-model", "not an allowed model", func(s *scene) { s.client.Policy.GPUModels = nil }},
	{"confidential computing off", "gpu-mode", "off", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[0].State.CC, e.GPUs[1].State.CC = false, false }
	}},
	{"confidential computing off on one", "gpu-mode", "another mode", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[1].State.CC = false }
	}},
	{"protected PCIe", "gpu-mode", "NVSwitches", func(s *scene) { s.protectedPCIe() }},
	{"protected PCIe that only the report tells", "gpu-mode", "contradict", func(s *scene) { s.vm.GPUs[1].Set(nvidia.FieldProtectedPCIe, []byte{0xaa}) }},
	{"devtools", "gpu-devtools", "devtools", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[1].State.DevTools = true }
	}},

	// The reports.
	{"a truncated report", "gpu-report", "truncated", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[1].Report = e.GPUs[1].Report[:2000] }
	}},
	{"a report for another nonce", "gpu-nonce", "nonce", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[1] = s.vm.GPUs[1].Evidence([32]byte{1}) }
	}},
	{"reports for another TLS key", "gpu-nonce", "nonce", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) {
			for i, g := range s.vm.GPUs {
				e.GPUs[i] = g.Evidence(evidence.GPUNonce([]evidence.Bytes{nonce()}, []byte("another key")))
			}
		}
	}},
	{"GPUs of a foreign root", "gpu-chain", "not a trusted root", func(s *scene) {
		v := nvidiatest.NewVendorOf(nvidiatest.Chip, time.Now())
		s.vm.GPUs = []*nvidiatest.GPU{v.NewGPU(), v.NewGPU()}
	}},
	{"GPUs of a test root under NVIDIA's", "gpu-chain", "not a trusted root", func(s *scene) {
		s.client.Policy.GPUDeviceRoots, s.client.Policy.GPURIMRoots = nil, nil
	}},
	{"a GPU whose certificate has expired", "gpu-chain", "valid from", func(s *scene) {
		g := s.vm.GPUs[1]
		g.Leaf = nvidiatest.Issue("x", g.Device, false, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
	}},
	{"a changed byte of a report", "gpu-signature", "signature", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[0].Report[60] ^= 1 }
	}},
	{"another GPU's report", "gpu-signature", "signature", func(s *scene) {
		s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) { e.GPUs[1].Report = e.GPUs[0].Report }
	}},
	{"another firmware", "gpu-firmware", "firmware", func(s *scene) { s.vm.GPUs[0].Set(nvidia.FieldFWID, make([]byte, 48)) }},
	{"one GPU twice", "gpu-duplicate", "same device", func(s *scene) { s.vm.GPUs[1] = s.vm.GPUs[0] }},
	{"a measurement that differs", "gpu-measurements", "index 23", func(s *scene) { s.vm.GPUs[1].Measurements[23] = make([]byte, 48) }},
	{"an old driver", "gpu-driver-rim", "older than", func(s *scene) { s.client.Policy.GPUMinDriver = "999.11" }},
	{"another VM's GPUs", "gpu-identity", "recorded", func(s *scene) {
		s.vm.GPUs = []*nvidiatest.GPU{s.vm.Vendor.NewGPU(), s.vm.Vendor.NewGPU()}
		s.vm.Carried = s.vm.Vendor.Collateral(s.vm.GPUs...)
	}},
	{"the GPUs in another order", "gpu-identity", "recorded", func(s *scene) { slices.Reverse(s.vm.GPUs) }},
	{"a GPU with other firmware than at boot", "gpu-identity", "recorded", func(s *scene) {
		s.vm.GPUs[1].Set(nvidia.FieldDriverVersion, []byte("999.10.02\x00"))
		s.vm.Carried.RIMs = append(s.vm.Carried.RIMs, s.vm.Vendor.RIM(s.vm.Vendor.Signer, "999.10.02", nvidiatest.DriverIndices))
	}},

	// The collateral.
	{"no collateral", "gpu-revocation", "carries no GPU collateral", func(s *scene) { s.vm.Carried = nil }},
	{"collateral that is none", "gpu-revocation", "the VM: ", func(s *scene) {
		s.server.GPUCollateral = func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "trust me") }
	}},
	{"an error for collateral", "gpu-revocation", "answered 503", func(s *scene) {
		s.server.GPUCollateral = func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "x", http.StatusServiceUnavailable) }
	}},
	{"collateral of a foreign root", "gpu-revocation", "not a trusted root", func(s *scene) {
		v := nvidiatest.NewVendorOf(nvidiatest.Chip, time.Now())
		s.vm.Carried = v.Collateral(v.NewGPU(), v.NewGPU())
	}},
	{"a GPU without an answer on revocation", "gpu-revocation", "no OCSP response", func(s *scene) {
		s.vm.Carried.OCSP = s.vm.Carried.OCSP[:len(s.vm.Carried.OCSP)-1]
	}},
	{"a stale answer on revocation", "gpu-revocation", "older than", func(s *scene) { s.answer(1, ocsp.Good, time.Now().Add(-25*time.Hour)) }},
	{"an answer from the future", "gpu-revocation", "and it is", func(s *scene) { s.answer(1, ocsp.Good, time.Now().Add(time.Hour)) }},
	{"a revoked GPU", "gpu-revocation", "revoked", func(s *scene) { s.answer(1, ocsp.Revoked, time.Now().Add(-100*time.Hour)) }},
	{"a GPU that NVIDIA does not know", "gpu-revocation", "does not know", func(s *scene) { s.answer(1, ocsp.Unknown, time.Now()) }},
	{"no RIM for the driver", "gpu-driver-rim", "there is no RIM", func(s *scene) { s.vm.Carried.RIMs = s.vm.Carried.RIMs[1:] }},
	{"the RIM for another driver", "gpu-driver-rim", "there is no RIM", func(s *scene) {
		s.vm.Carried.RIMs[0] = s.vm.Vendor.RIM(s.vm.Vendor.Signer, "999.10.02", nvidiatest.DriverIndices)
	}},
	{"the RIM for another VBIOS", "gpu-vbios-rim", "there is no RIM", func(s *scene) {
		s.vm.Carried.RIMs[1] = s.vm.Vendor.RIM(s.vm.Vendor.Signer, "96.00.AA.00.02", nvidiatest.VBIOSIndices)
	}},
	{"an expired RIM", "gpu-driver-rim", "valid from", func(s *scene) {
		signer := nvidiatest.Issue("Test RIM L4 Signer", s.vm.Vendor.RIML3, false, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
		s.vm.Carried.RIMs[0] = s.vm.Vendor.RIM(signer, nvidiatest.Driver, nvidiatest.DriverIndices)
	}},
	{"a RIM with a changed byte", "gpu-revocation", "the VM: ", func(s *scene) {
		s.vm.Carried.RIMs[0] = bytes.Replace(s.vm.Carried.RIMs[0], []byte(`active="False"`), []byte(`active="True"`), 1)
	}},
	{"a revoked signer of RIMs", "gpu-vbios-rim", "revoked", func(s *scene) {
		signer := nvidiatest.Issue("Test RIM L4 Signer", s.vm.Vendor.RIML3, false, nil)
		s.vm.Carried.RIMs[1] = s.vm.Vendor.RIM(signer, nvidiatest.VBIOS, nvidiatest.VBIOSIndices)
		s.vm.Carried.OCSP = append(s.vm.Carried.OCSP, nvidiatest.OCSP(signer, ocsp.Revoked, time.Now()))
	}},
	{"a GPU that the client knows as revoked, and the VM does not", "gpu-revocation", "revoked", func(s *scene) {
		s.client.GPU.Bundle = &nvidia.Collateral{Version: 1, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{
			nvidiatest.OCSP(s.vm.GPUs[0].Device, ocsp.Revoked, time.Now().AddDate(0, -6, 0)),
		}}
	}},
}

// answer replaces what NVIDIA says of a GPU.
func (s *scene) answer(gpu, status int, at time.Time) {
	n := len(s.vm.Carried.OCSP) - len(s.vm.GPUs) + gpu
	s.vm.Carried.OCSP[n] = nvidiatest.OCSP(s.vm.GPUs[gpu].Device, status, at)
}

// protectedPCIe puts the GPUs into that mode, as they were at boot.
func (s *scene) protectedPCIe() {
	for i, g := range s.vm.GPUs {
		g.Set(nvidia.FieldProtectedPCIe, []byte{0xaa})
		s.vm.Identities[i] = bytes.Replace(s.vm.Identities[i], []byte(`"multi_gpu":"none"`), []byte(`"multi_gpu":"protected-pcie"`), 1)
	}
	s.vm.Boot()
	s.vm.Report = func(e *nvidia.Evidence, _ [32]byte) {
		for i := range e.GPUs {
			e.GPUs[i].State.MultiGPU = nvidia.MultiGPUProtectedPCIe
		}
	}
}

// onlyAsked proves at the socket that nothing was sent but the questions for
// evidence and, at most, for GPU collateral.
func (s *scene) onlyAsked(t *testing.T) {
	t.Helper()
	got := s.server.Received()
	requests := strings.Split(strings.TrimSuffix(got, "\r\n\r\n"), "\r\n\r\n")
	bad := !strings.HasSuffix(got, "\r\n\r\n") || len(requests) > 2 || !strings.HasPrefix(got, "GET "+evidence.Path+"?nonce=")
	if len(requests) == 2 && !strings.HasPrefix(requests[1], "GET "+evidence.GPUCollateralPath+" HTTP/1.1\r\n") {
		bad = true
	}
	if bad || strings.Contains(got, prompt) || strings.Contains(got, "/v1/") {
		t.Errorf("sent: %q", got)
	}
}

func TestGPUAttacks(t *testing.T) {
	named := map[attest.Name]bool{}
	for _, tt := range gpuAttacks {
		named[tt.check] = true
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newGPUScene(t, record.TDX, 2)
			tt.lie(s)
			err := s.ask()
			refused, ok := errors.AsType[*attest.RefusedError](err)
			if !ok {
				t.Fatalf("not refused: %v", err)
			}
			v := refused.Verdict
			if v.Failed != tt.check || v.OK || v.Confidential || len(v.GPUs) > 0 || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("refused by %q, expected %q with %q: %v", v.Failed, tt.check, tt.says, err)
			}
			s.onlyAsked(t)
		})
	}
	for _, name := range nvidia.Checks {
		if !named[attest.Name(name)] {
			t.Errorf("no attack is refused by %s", name)
		}
	}
}

// A VM that is refused anyway is not asked for collateral, and nobody else is.
func TestGPURefusedAnyway(t *testing.T) {
	s := newGPUScene(t, record.TDX, 2)
	s.client.GPU.Fetch = &fetcher{s: s, t: t}
	s.client.Policy.Manifests = nil
	s.vm.Manifest.Engine.RootHash = hash("evil engine")
	s.vm.Boot()
	refused, ok := errors.AsType[*attest.RefusedError](s.ask())
	if !ok || refused.Verdict.Failed != attest.CheckEngine || checkOf(t, refused.Verdict, "gpu-evidence").Status != attest.NotRun {
		t.Errorf("%v", refused)
	}
	s.nothingSent(t)
}

// TestGPUHostileAnswers has answers to the question for collateral that are as good
// as none: the VM is refused, or judged by what comes from elsewhere.
func TestGPUHostileAnswers(t *testing.T) {
	endless := func(w http.ResponseWriter) {
		for {
			if _, err := w.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	}
	for name, tt := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request)
		says   string
	}{
		"1 GB": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1073741824")
			endless(w)
		}, "more than"},
		"endless":        {func(w http.ResponseWriter, _ *http.Request) { endless(w) }, "more than"},
		"a long refusal": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot); endless(w) }, "answered 418"},
		"nothing":        {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "in time"},
		"a connection that closes": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusNotFound)
		}, "carries no GPU collateral"},
		"an end in between": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.Write(make([]byte, 10))
			panic(http.ErrAbortHandler)
		}, "the VM: "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newGPUScene(t, record.TDX, 1)
			s.server.GPUCollateral = tt.answer
			refused, ok := errors.AsType[*attest.RefusedError](s.ask())
			if !ok || refused.Verdict.Failed != "gpu-revocation" || !strings.Contains(refused.Error(), tt.says) {
				t.Fatalf("error %v does not say %q", refused, tt.says)
			}
			s.onlyAsked(t)
			if tt.says == "in time" {
				return
			}
			s.client.GPU = &attest.GPUCollateral{Fetch: &fetcher{s: s, t: t}}
			if err := s.ask(); err != nil {
				t.Error(err)
			}
		})
	}
}

// fetcher stands in for NVIDIA's services.
type fetcher struct {
	s     *scene
	t     *testing.T
	calls atomic.Int64
	fails bool
	have  *nvidia.Collateral
}

func (f *fetcher) Collateral(_ context.Context, e *nvidia.Evidence, have *nvidia.Collateral, _ func(string)) (*nvidia.Collateral, error) {
	f.calls.Add(1)
	f.have = have
	if f.fails {
		return nil, errors.New("no network")
	}
	if len(e.GPUs) != len(f.s.vm.GPUs) {
		f.t.Errorf("asked about %d GPUs", len(e.GPUs))
	}
	return f.s.vm.Vendor.Collateral(f.s.vm.GPUs...), nil
}

// TestGPUSources has each source in turn, and what is asked when.
func TestGPUSources(t *testing.T) {
	s := newGPUScene(t, record.TDX, 2)
	good := s.vm.Carried
	asked := 0
	serve := s.vm.Carried
	s.server.GPUCollateral = func(w http.ResponseWriter, r *http.Request) {
		asked++
		if serve == nil {
			http.NotFound(w, r)
			return
		}
		data, err := serve.Encode()
		if err != nil {
			t.Error(err)
		}
		w.Write(data)
	}
	dir := filepath.Join(t.TempDir(), "gpu")
	var client *attest.Transport
	fresh := func(g *attest.GPUCollateral) {
		client = s.vm.Transport()
		client.GPU = g
		t.Cleanup(client.CloseIdleConnections)
	}
	verify := func(want int) {
		t.Helper()
		session, err := client.Attest(t.Context(), s.server.URL)
		if err != nil {
			t.Fatal(err)
		}
		if !session.Verdict.OK || asked != want {
			t.Fatalf("%+v; the VM was asked %d times, expected %d", session.Verdict.First(), asked, want)
		}
	}
	fresh(&attest.GPUCollateral{Bundle: good})
	verify(0) // a file that is enough
	fresh(&attest.GPUCollateral{Dir: dir})
	verify(1) // the VM's
	verify(1) // remembered
	fresh(&attest.GPUCollateral{Dir: dir})
	verify(1) // cached
	serve = nil
	verify(1)
	// A cache that somebody wrote into is as good as none.
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v", entries, err)
	}
	path := filepath.Join(dir, entries[0].Name())
	kept, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := &fetcher{s: s, t: t, fails: true}
	fresh(&attest.GPUCollateral{Dir: dir, Fetch: f})
	session, err := client.Attest(t.Context(), s.server.URL)
	if err == nil || session.Verdict.Failed != "gpu-revocation" || session.Verdict.Refused() ||
		!strings.Contains(err.Error(), "carries no GPU collateral") || !strings.Contains(err.Error(), "NVIDIA: no network") {
		t.Fatalf("%v", err)
	}
	if f.calls.Load() != 1 || asked != 2 {
		t.Errorf("NVIDIA was asked %d times, the VM %d", f.calls.Load(), asked)
	}
	// RIMs from the VM, answers from NVIDIA.
	f.fails = false
	serve = &nvidia.Collateral{Version: 1, RIMs: good.RIMs, OCSP: []evidence.Bytes{}}
	verify(3)
	if f.calls.Load() != 2 || f.have == nil || len(f.have.RIMs) != 2 {
		t.Errorf("NVIDIA was asked %d times, with %+v at hand", f.calls.Load(), f.have)
	}
	if now, err := os.ReadFile(path); err != nil || len(now) < len(kept)/2 {
		t.Errorf("the cache was not written again: %d bytes, %v", len(now), err)
	}
	verify(3)
	// The answers grow old: they are asked for again, RIMs and all.
	client.SetClock(func() time.Time { return time.Now().Add(30 * time.Hour) })
	client.Collateral = s.vm.Intel.Collateral()
	if session, err = client.Attest(t.Context(), s.server.URL); err == nil || session.Verdict.Failed != "gpu-revocation" || f.calls.Load() != 3 {
		t.Errorf("%v", err)
	}
	// A file that is not signed is said to be so.
	bad := &nvidia.Collateral{Version: 1, RIMs: []evidence.Bytes{[]byte("x")}, OCSP: []evidence.Bytes{}}
	if err := (&attest.GPUCollateral{Bundle: bad}).Check(s.client.Policy); err == nil {
		t.Error("a bad file is accepted")
	}
	if err := (&attest.GPUCollateral{Bundle: good}).Check(s.client.Policy); err != nil {
		t.Error(err)
	}
	serve = good
	fresh(&attest.GPUCollateral{Bundle: bad})
	verify(5) // the VM's does
}

// TestGPURelaxations has what each relaxation accepts, and what it costs.
func TestGPURelaxations(t *testing.T) {
	for _, tt := range []struct {
		name         string
		relax        func(s *scene)
		confidential bool // under NVIDIA's roots, which are those of the test here
	}{
		{"none", func(*scene) {}, true},
		{"an older answer", func(s *scene) {
			s.answer(1, ocsp.Good, time.Now().Add(-47*time.Hour))
			s.client.Policy.GPUMaxOCSPAgeSeconds = 48 * 3600
		}, true},
		{"no answer", func(s *scene) {
			s.vm.Carried.OCSP = []evidence.Bytes{}
			s.client.Policy.AllowNoGPUOCSP = true
		}, true},
		{"a minimum driver", func(s *scene) { s.client.Policy.GPUMinDriver = "999.9" }, true},
		{"protected PCIe", func(s *scene) {
			s.protectedPCIe()
			s.client.Policy.AllowUnattestedNVSwitch = true
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newGPUScene(t, record.TDX, 2)
			defer attest.SetIntelRoot(s.vm.Intel.Root)()
			defer attest.SetNVIDIARoots(s.vm.Vendor.Roots())()
			s.client.Policy = attest.NewPolicy()
			s.client.Policy.GPUModels = []string{nvidiatest.Model}
			tt.relax(s)
			s.client.Policy.AllowNotConfidential = !tt.confidential
			if err := s.client.Policy.Check(); err != nil {
				t.Fatal(err)
			}
			var v *attest.Verdict
			s.client.Verified = func(got *attest.Session) { v = got.Verdict }
			if err := s.ask(); err != nil {
				t.Fatal(err)
			}
			if v.Confidential != tt.confidential {
				t.Errorf("confidential: %v", v.Confidential)
			}
		})
	}
	// Intel's root does not make a test's GPU confidential.
	s := newGPUScene(t, record.TDX, 1)
	defer attest.SetIntelRoot(s.vm.Intel.Root)()
	s.client.Policy.TDXRoots = nil
	if err := s.client.Policy.Check(); err != nil {
		t.Fatal(err)
	}
	if session, err := s.client.Attest(t.Context(), s.server.URL); err != nil || session.Verdict.Confidential {
		t.Errorf("%v", err)
	}
}

func TestGPUSaveOffline(t *testing.T) {
	for _, lie := range []struct {
		name   string
		check  attest.Name
		change func(s *scene)
	}{
		{"good", "", func(*scene) {}},
		{"a revoked GPU", "gpu-revocation", func(s *scene) { s.answer(1, ocsp.Revoked, time.Now()) }},
		{"a measurement that differs", "gpu-measurements", func(s *scene) { s.vm.GPUs[1].Measurements[23] = make([]byte, 48) }},
		{"a foreign root", "gpu-chain", func(s *scene) { s.client.Policy.GPUDeviceRoots = s.client.Policy.GPURIMRoots }},
	} {
		t.Run(lie.name, func(t *testing.T) {
			s := newGPUScene(t, record.TPM, 2)
			lie.change(s)
			session, err := s.client.Attest(t.Context(), s.server.URL)
			if session == nil || session.Verdict.Failed != lie.check {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "saved")
			if err := session.Save(dir, s.client.Policy, s.client.Records); err != nil {
				t.Fatal(err)
			}
			s.server.Close()
			again, err := attest.Offline(t.Context(), dir, nil, nil)
			if err != nil || again.Verdict.Failed != lie.check || len(again.Verdict.GPUs) != len(session.Verdict.GPUs) {
				t.Fatalf("%+v, %v", again.Verdict.First(), err)
			}
			// What was read can be saved again.
			if err := again.Save(filepath.Join(t.TempDir(), "again"), s.client.Policy, s.client.Records); err != nil {
				t.Error(err)
			}
			if lie.check != "" {
				return
			}
			path := filepath.Join(dir, attest.FileGPUCollateral)
			if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := attest.Offline(t.Context(), dir, nil, nil); err == nil || !strings.Contains(err.Error(), attest.FileGPUCollateral) {
				t.Error(err)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if again, err = attest.Offline(t.Context(), dir, nil, nil); err != nil || again.Verdict.Failed != "gpu-revocation" || again.Verdict.Refused() {
				t.Errorf("%+v, %v", again.Verdict.First(), err)
			}
		})
	}
}

// A GPU event that nobody made sense of is still compared byte by byte.
func TestGPUIdentityBytes(t *testing.T) {
	s := newGPUScene(t, record.TPM, 1)
	for i, e := range s.vm.Events {
		if e.Name == cel.GPU {
			s.vm.Events[i].Data = append(bytes.Clone(e.Data), ' ')
		}
	}
	refused, ok := errors.AsType[*attest.RefusedError](s.ask())
	if !ok || refused.Verdict.Failed != "gpu-identity" {
		t.Errorf("%v", refused)
	}
	s.onlyAsked(t)
}
