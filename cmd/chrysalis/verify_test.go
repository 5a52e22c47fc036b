package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/measure/record"
)

// files writes the policy and the record that accept a VM.
func files(t *testing.T, vm *attesttest.VM) trustFlags {
	t.Helper()
	dir := t.TempDir()
	policy, err := json.Marshal(vm.Policy())
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := vm.Record().Encode()
	if err != nil {
		t.Fatal(err)
	}
	f := trustFlags{Policy: filepath.Join(dir, "policy.json"), Record: []string{filepath.Join(dir, "record.json")}}
	for path, data := range map[string][]byte{f.Policy: policy, f.Record[0]: encoded} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// TestVerify has a row for each exit status, and what a person reads then.
func TestVerify(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	for _, tt := range []struct {
		name string
		lie  func(vm *attesttest.VM, f *trustFlags)
		code int
		says []string
	}{
		{"good", nil, 0, []string{"✔ pcr4", "✔ model         the model is approved: test/model@1", "NOT CONFIDENTIAL"}},
		{"refused", func(vm *attesttest.VM, _ *trustFlags) { vm.Firmware[1].Data = []byte("x"); vm.Measure() }, 1,
			[]string{"✘ pcr4", "expected  ", "found     ", "✔ pcr15", "is refused: pcr4 does not hold; nothing was sent"}},
		{"GPUs", func(vm *attesttest.VM, f *trustFlags) { vm.AddGPUs(2); *f = files(t, vm) }, 0,
			[]string{"✔ gpu              the VM has the GPUs that the manifest asks for (2)", "✔ gpu-measurements firmware and driver measure as NVIDIA says (8 compared, of each)",
				"✔ gpu-identity", "✔ pcr4             the image", "with 2 × " + nvidiatest.Model + ", driver " + nvidiatest.Driver, "NOT CONFIDENTIAL"}},
		{"GPUs with a file of collateral", func(vm *attesttest.VM, f *trustFlags) {
			vm.AddGPUs(1)
			*f = files(t, vm)
			f.GPUCollateral = filepath.Join(t.TempDir(), "gpu.json")
			data, err := vm.Carried.Encode()
			if err == nil {
				err = os.WriteFile(f.GPUCollateral, data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			vm.Carried = nil
		}, 0, []string{"✔ gpu-driver-rim"}},
		{"GPUs without collateral", func(vm *attesttest.VM, f *trustFlags) { vm.AddGPUs(1); *f = files(t, vm); vm.Carried = nil }, 2,
			[]string{"✔ gpu-signature", "? gpu-revocation", "chrysalis gpu collateral", "carries no GPU collateral", "· gpu-driver-rim", "could not be checked (gpu-revocation)"}},
		{"a GPU that differs", func(vm *attesttest.VM, f *trustFlags) {
			vm.AddGPUs(1)
			*f = files(t, vm)
			vm.GPUs[0].Measurements[7] = make([]byte, 48)
		}, 1, []string{"✔ gpu-driver-rim", "✘ gpu-measurements", "index 7", "is refused: gpu-measurements does not hold; nothing was sent"}},
		{"the strictest policy", func(_ *attesttest.VM, f *trustFlags) { f.Policy = "" }, 1,
			[]string{"✘ platform", "allow_not_confidential", "· quote", "(not run)"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			vm := attesttest.NewVM(record.TPM)
			f := files(t, vm)
			if tt.lie != nil {
				tt.lie(vm, &f)
			}
			s := attesttest.Serve(vm)
			defer s.Close()
			c := VerifyCmd{trustFlags: f, Endpoint: s.URL, Save: filepath.Join(t.TempDir(), "saved")}
			session, _ := c.check(t.Context())
			if session == nil {
				t.Fatal("no session")
			}
			var out strings.Builder
			if err := printVerdict(&out, session); err != nil {
				t.Fatal(err)
			}
			for _, want := range tt.says {
				if !strings.Contains(out.String(), want) {
					t.Errorf("%q is not in\n%s", want, out.String())
				}
			}
			if code := exitCode(verdictError(session.Verdict)); code != tt.code {
				t.Errorf("exit status %d, expected %d", code, tt.code)
			}
			offline := VerifyCmd{Offline: c.Save}
			again, err := offline.check(t.Context())
			if err != nil || exitCode(verdictError(again.Verdict)) != tt.code {
				t.Errorf("offline: %v", err)
			}
		})
	}
	bad := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(bad, []byte(`{"ocsp":[],"rims":["AA"],"version":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*VerifyCmd{
		"GPU collateral that is none":         {Endpoint: "https://127.0.0.1:1", trustFlags: trustFlags{GPUCollateral: "verify_test.go"}},
		"GPU collateral that is not NVIDIA's": {Endpoint: "https://127.0.0.1:1", trustFlags: trustFlags{GPUCollateral: bad}},
		"GPU collateral for what was saved":   {Offline: t.TempDir(), trustFlags: trustFlags{GPUCollateral: bad}},
		"nobody there":                        {Endpoint: "https://127.0.0.1:1"},
		"no endpoint":                         {},
		"both":                                {Endpoint: "https://127.0.0.1:1", Offline: "x"},
		"nothing saved":                       {Offline: t.TempDir()},
		"a policy that is none":               {Endpoint: "https://127.0.0.1:1", trustFlags: trustFlags{Policy: "verify_test.go"}},
	} {
		if err := c.Run(t.Context()); exitCode(err) != exitNotChecked {
			t.Errorf("%s: %v", name, err)
		}
	}
	unchecked := &attest.Verdict{Checks: []attest.Check{{Name: attest.CheckTCB, Status: attest.Unchecked}}}
	if exitCode(verdictError(unchecked)) != exitNotChecked {
		t.Error("what could not be checked is not told from what is refused")
	}
}

// The proxy judges GPUs by the file that it is given.
func TestProxyGPUs(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	vm := attesttest.NewVM(record.TPM)
	vm.AddGPUs(1)
	f := workerFlags{trustFlags: files(t, vm)}
	data, err := vm.Carried.Encode()
	if err != nil {
		t.Fatal(err)
	}
	vm.Carried = nil
	f.GPUCollateral = filepath.Join(t.TempDir(), "gpu.json")
	if err := os.WriteFile(f.GPUCollateral, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s := attesttest.Serve(vm)
	defer s.Close()
	f.Worker = []string{s.URL}
	p, err := f.open(t.Context(), "", false, "")
	if err != nil {
		t.Fatal(err)
	}
	out := httptest.NewRecorder()
	p.ServeHTTP(out, httptest.NewRequest(http.MethodGet, "/v1/models", nil))
	if out.Code != http.StatusOK {
		t.Errorf("%d %s", out.Code, out.Body)
	}
}

// What 'gpu collateral' reads: a VM's evidence, or the GPUs' alone.
func TestGPUEvidence(t *testing.T) {
	vm := attesttest.NewVM(record.TPM)
	without := vm.Evidence(make([]byte, evidence.NonceSize))
	vm.AddGPUs(2)
	whole := vm.Document(make([]byte, evidence.NonceSize))
	encoded, err := whole.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"a VM's": encoded, "alone": whole.GPU} {
		if e, err := gpuEvidence(data); err != nil || len(e.GPUs) != 2 {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, data := range map[string][]byte{"without GPUs": without, "none": []byte("{}")} {
		if _, err := gpuEvidence(data); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// The verdict as one JSON document, which scripts read.
func TestVerifyGPUsJSON(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	vm := attesttest.NewVM(record.TPM)
	vm.AddGPUs(1)
	s := attesttest.Serve(vm)
	defer s.Close()
	c := VerifyCmd{trustFlags: files(t, vm), Endpoint: s.URL}
	session, err := c.check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(session.Verdict)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"gpus":[{"model":"` + nvidiatest.Model + `","chip":"GH100","driver":"` + nvidiatest.Driver + `"`, `"name":"gpu-nonce"`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("%s is not in %s", want, data)
		}
	}
}

func TestVerifyFlags(t *testing.T) {
	c, err := parse(t, "verify", "https://a:1", "--record", "a,b", "--record", "c", "--policy", "p", "--allow-not-confidential", "--save", "d", "--json")
	v := c.Verify.Endpoint
	if err != nil || v.Endpoint != "https://a:1" || len(v.Record) != 2 || v.Policy != "p" || !v.AllowNotConfidential || v.Save != "d" || !v.JSON {
		t.Errorf("%+v, %v", v, err)
	}
	if c, err = parse(t, "proxy", "--worker", "a", "--worker", "https://b", "--listen", "127.0.0.1:0"); err != nil || len(c.Proxy.Worker) != 2 {
		t.Errorf("%+v, %v", c.Proxy, err)
	}
	if c, err = parse(t, "verify", "receipt", "."); err != nil || c.Verify.Receipt.Evidence == "" {
		t.Errorf("%+v, %v", c.Verify.Receipt, err)
	}
}

func TestReadToken(t *testing.T) {
	for text, want := range map[string]string{"abc\n": "abc", "": "", "a b": "", "a\nb": "", "ä": ""} {
		path := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readToken(path); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if got, err := readToken(""); got != "" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}
