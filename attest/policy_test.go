package attest_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/measure/record"
)

func TestPolicyRefuses(t *testing.T) {
	root, err := json.Marshal(attesttest.PEM(attesttest.NewTPM(time.Now()).Root))
	if err != nil {
		t.Fatal(err)
	}
	sum := strings.Repeat("00", 32)
	for _, tt := range []struct{ name, data, says string }{
		{"empty", "", "EOF"},
		{"no version", "{}", "version is 0"},
		{"another version", `{"version":2}`, "version is 2"},
		{"an unknown field", `{"version":1,"allow_debug":true}`, "allow_debug"},
		{"a field in other case", `{"version":1,"Platforms":["tdx"]}`, "Platforms"},
		{"a field with a letter that folds", `{"version":1,"engineſ":[]}`, "engine"},
		{"a field twice", `{"version":1,"max_age_seconds":1,"max_age_seconds":9}`, "twice"},
		{"two policies", `{"version":1}{"version":1}`, "follows"},
		{"a platform that is none", `{"version":1,"platforms":["sev"]}`, "platforms"},
		{"a TPM without the relaxation", `{"version":1,"platforms":["tpm"]}`, "allow_not_confidential"},
		{"a TPM root without the relaxation", `{"version":1,"tpm_roots":[` + string(root) + `]}`, "allow_not_confidential"},
		{"a development root without the relaxation", `{"version":1,"development_roots":[` + string(root) + `]}`, "allow_not_confidential"},
		{"a TDX root without the relaxation", `{"version":1,"tdx_roots":[` + string(root) + `]}`, "allow_not_confidential"},
		{"a root that is no certificate", `{"version":1,"allow_not_confidential":true,"tpm_roots":["x"]}`, "tpm_roots[0]"},
		{"an age of more than a day", `{"version":1,"max_age_seconds":86401}`, "max_age_seconds"},
		{"a negative age", `{"version":1,"max_age_seconds":-1}`, "max_age_seconds"},
		{"a waiver of a revoked TCB", `{"version":1,"tcb_waivers":[{"status":"Revoked","until":"2027-01-01","reason":"x"}]}`, "cannot be waived"},
		{"a waiver of no status", `{"version":1,"tcb_waivers":[{"status":"Fine","until":"2027-01-01","reason":"x"}]}`, "status"},
		{"a waiver without an end", `{"version":1,"tcb_waivers":[{"status":"OutOfDate","reason":"x"}]}`, "until"},
		{"a waiver without a reason", `{"version":1,"tcb_waivers":[{"status":"OutOfDate","until":"2027-01-01"}]}`, "reason"},
		{"a mask that is too short", `{"version":1,"xfam":"ff"}`, "xfam"},
		{"a mask with a prefix", `{"version":1,"xfam":"0x00000000000061"}`, "xfam"},
		{"a module that is too short", `{"version":1,"mrseam":["00"]}`, "mrseam[0]"},
		{"a shape without a name", `{"version":1,"shapes":[""]}`, "shapes[0]"},
		{"an engine without a root hash", `{"version":1,"engines":[{"name":"x","root_hash":""}]}`, "engines[0]"},
		{"a GPU root without the relaxation", `{"version":1,"gpu_device_roots":["` + sum + `"]}`, "allow_not_confidential"},
		{"a RIM root without the relaxation", `{"version":1,"gpu_rim_roots":["` + sum + `"]}`, "allow_not_confidential"},
		{"NVSwitches without the relaxation", `{"version":1,"allow_unattested_nvswitch":true}`, "allow_not_confidential"},
		{"a GPU root that is no hash", `{"version":1,"allow_not_confidential":true,"gpu_device_roots":["00"]}`, "gpu_device_roots[0]"},
		{"a GPU's name that is none", `{"version":1,"gpu_models":["\u001b[31m"]}`, "gpu_models[0]"},
		{"a driver version that is none", `{"version":1,"gpu_min_driver":"latest"}`, "gpu_min_driver"},
		{"answers on revocation older than 90 days", `{"version":1,"gpu_max_ocsp_age_seconds":7776001}`, "gpu_max_ocsp_age_seconds"},
		{"a negative age of answers", `{"version":1,"gpu_max_ocsp_age_seconds":-1}`, "gpu_max_ocsp_age_seconds"},
		{"too large", `{"version":1}` + strings.Repeat(" ", attest.MaxPolicy), "at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := attest.ParsePolicy([]byte(tt.data)); err == nil || !strings.HasPrefix(err.Error(), "policy: ") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v does not say %q", err, tt.says)
			}
		})
	}
	p, err := attest.ParsePolicy([]byte(`{
		"version": 1,
		"allow_not_confidential": true,
		"development_roots": [` + string(root) + `],
		"tcb_waivers": [{"status": "OutOfDate", "until": "2999-01-31", "reason": "test"}],
		"max_age_seconds": 60
	}`))
	if err != nil || p.MaxAge() != time.Minute {
		t.Errorf("%+v, %v", p, err)
	}
	if attest.NewPolicy().MaxAge() != attest.DefaultMaxAge {
		t.Error("the default age")
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"tcb_waivers":[{"status":"OutOfDate","until":"2999-01-31","reason":"x"}],"xfam":"0000000000061ae7"}`))
	f.Add([]byte(`{"version":1,"gpu_models":["NVIDIA H200"],"gpu_min_driver":"580.1","allow_no_gpu_ocsp":true,"gpu_max_ocsp_age_seconds":3600}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := attest.ParsePolicy(data)
		if err == nil && !p.AllowNotConfidential && (len(p.TDXRoots) > 0 || len(p.TPMRoots) > 0 || len(p.DevelopmentRoots) > 0 ||
			len(p.GPUDeviceRoots) > 0 || len(p.GPURIMRoots) > 0) {
			t.Error("a root without the relaxation")
		}
	})
}

// TestIntelRoot pins the built-in root: SHA-256 of Intel's published certificate.
func TestIntelRoot(t *testing.T) {
	const published = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
	if got := fmt.Sprintf("%x", sha256.Sum256(attest.IntelRoot().Raw)); got != published {
		t.Errorf("SHA-256 %s, expected %s", got, published)
	}
}

// TestRelaxations has a row for each named relaxation: what it accepts.
func TestRelaxations(t *testing.T) {
	for _, tt := range []struct {
		name     string
		platform record.Platform
		relax    func(s *scene)
	}{
		{"a waiver", record.TDX, func(s *scene) {
			s.vm.Intel.PlatformStatus, s.vm.Intel.Advisories = "SWHardeningNeeded", []string{"INTEL-SA-1"}
			s.recollect()
			s.client.Policy.TCBWaivers = []attest.TCBWaiver{{Status: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}, Until: "2999-01-01", Reason: "test"}}
		}},
		{"MRCONFIGID unset", record.TDX, func(s *scene) {
			s.keep()
			s.vm.TD.MRConfigID = [48]byte{}
			s.client.Policy.AllowUnsetMRConfigID = true
		}},
		{"another XFAM", record.TDX, func(s *scene) { s.vm.TD.XFAM = 0x103; s.client.Policy.XFAM = "0000000000000103" }},
		{"the policy's MRSEAM", record.TDX, func(s *scene) { s.client.Policy.MRSEAM = []record.Hex{s.vm.TD.MRSEAM[:]} }},
		{"engine and model in the policy", record.TPM, func(s *scene) {
			f := s.client.Records[0]
			s.client.Policy.Engines = []attest.Approved{{Name: "llama.cpp", RootHash: f.Engines[0].RootHash}}
			s.client.Policy.Models = []attest.Approved{{Name: f.Models[0].ID(), RootHash: f.Models[0].RootHash}}
			f.Engines, f.Models = nil, nil
		}},
		{"a module of major version 0", record.TDX, func(s *scene) {
			s.vm.TD.TEETCBSVN = [16]byte{5, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5}
			s.vm.Intel.OldModule = true
			s.recollect()
		}},
		{"two records", record.TPM, func(s *scene) {
			other := attesttest.NewVM(record.TPM)
			other.Firmware[1].Data = []byte("another image")
			other.Measure()
			s.client.Records = append([]*record.File{other.Record()}, s.client.Records...)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newScene(t, tt.platform)
			tt.relax(s)
			if err := s.client.Policy.Check(); err != nil {
				t.Fatal(err)
			}
			if err := s.ask(); err != nil {
				t.Error(err)
			}
		})
	}
}
