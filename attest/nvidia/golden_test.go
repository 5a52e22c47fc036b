package nvidia

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"chrysalis/attest/evidence"
)

// goldenNonce is what the golden report was asked with.
var goldenNonce = mustHash("931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb")

// goldenTime is when the golden OCSP responses for the RIMs were a few minutes
// old; those for the GPU are nine weeks older.
var goldenTime = time.Date(2025, 10, 24, 12, 0, 0, 0, time.UTC)

const goldenAge = 70 * 24 * time.Hour

// golden returns a file that NVIDIA's hardware or services made. Those files are
// not part of the repository.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	dir := os.Getenv("CHRYSALIS_GOLDEN")
	if dir == "" {
		dir = "../../../shared/golden"
	}
	data, err := os.ReadFile(filepath.Join(dir, "nvidia", name))
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("golden data is not here: %v; set CHRYSALIS_GOLDEN to its folder", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func goldenReport(t testing.TB) []byte { return golden(t, "test_raw_gpu_attestation_report.dat") }

func goldenGPU(t testing.TB) GPU {
	chain, err := SplitChain(golden(t, "test_gpu_attestation_certificate_chain.dat"))
	if err != nil {
		t.Fatal(err)
	}
	g := GPU{Model: "NVIDIA H100 PCIe", State: State{CC: true, MultiGPU: MultiGPUNone}, Report: goldenReport(t)}
	for _, c := range chain {
		g.Certificates = append(g.Certificates, c)
	}
	return g
}

const (
	goldenDriver = "NV_GPU_DRIVER_GH100_550.90.07.xml"
	goldenVBIOS  = "NV_GPU_VBIOS_1010_0200_882_96009F0001.xml"
)

func goldenCollateral(t testing.TB) *Collateral {
	c := &Collateral{Version: Version, RIMs: []evidence.Bytes{golden(t, goldenDriver), golden(t, goldenVBIOS)}}
	for _, name := range []string{"gpu_certificate_l2", "gpu_certificate_l3", "gpu_certificate_l4", "gpu_rim_l2", "gpu_driver_rim_l3", "gpu_driver_rim_l4", "gpu_vbios_l4"} {
		der, err := base64.StdEncoding.DecodeString(string(golden(t, "ocsp/test_"+name+"_base64encoded_ocsp_response.dat")))
		if err != nil {
			t.Fatal(err)
		}
		c.OCSP = append(c.OCSP, der)
	}
	return c
}

func goldenPolicy() Policy {
	return Policy{Nonce: goldenNonce, GPUs: 1, Models: []string{"NVIDIA H100 PCIe"}, Time: goldenTime, MaxOCSPAge: goldenAge}
}

func goldenEvidence(t testing.TB) []byte {
	e := &Evidence{Version: Version, GPUs: []GPU{goldenGPU(t)}}
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func goldenVerifier(t testing.TB) *Verifier {
	v := NewVerifier(NVIDIARoots())
	if err := v.AddCollateral(goldenCollateral(t)); err != nil {
		t.Fatal(err)
	}
	return v
}

// A real H100 verifies under NVIDIA's real roots, its measurements compared with
// NVIDIA's real RIMs, and revocation answered by NVIDIA's OCSP service.
func TestGoldenH100(t *testing.T) {
	result, err := goldenVerifier(t).Verify(goldenEvidence(t), goldenPolicy())
	if err != nil {
		t.Fatal(err)
	}
	g := result.GPUs[0]
	t.Logf("%+v", g)
	if g.Identity.Driver != "550.90.07" || g.Identity.VBIOS != "96.00.9F.00.01" || g.Identity.Chip != "GH100" {
		t.Errorf("identity %+v", g.Identity)
	}
	// 21 of the driver and 12 of the VBIOS, of which index 35 does not apply
	// because the first video decoder is off.
	if g.Compared != 32 || len(g.Skipped) != 1 || g.Skipped[0] != 35 {
		t.Errorf("compared %d, skipped %v", g.Compared, g.Skipped)
	}
}

func TestGoldenReport(t *testing.T) {
	r, err := ParseReport(goldenReport(t))
	if err != nil {
		t.Fatal(err)
	}
	if r.Nonce != goldenNonce || len(r.Measurements) != 64 || r.Project != "1010" || r.ProjectSKU != "0200" || r.ChipSKU != "882" || r.MultiGPU() != MultiGPUNone {
		t.Errorf("%+v", r)
	}
}

// A switch's report has the same form, with other opaque fields. It is not taken
// for a GPU's.
func TestGoldenSwitchReport(t *testing.T) {
	data := golden(t, "test_raw_switch_attestation_report.dat")
	r, err := parseSPDM(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Measurements) != 31 {
		t.Errorf("%d measurements", len(r.Measurements))
	}
	if _, err := ParseReport(data); err == nil {
		t.Error("taken for a GPU's")
	}
}

// One byte flipped anywhere in a report, and it is refused; one bit would do.
func TestGoldenReportFlipped(t *testing.T) {
	v, g := goldenVerifier(t), goldenGPU(t)
	p := goldenPolicy()
	report := goldenReport(t)
	seen := map[Check]int{}
	step := 1
	if testing.Short() {
		step = 29 // the nonce has 32 bytes
	}
	for i := 0; i < len(report); i += step {
		g.Report = append([]byte{}, report...)
		g.Report[i] ^= 1
		check, err := v.verifyGPU(&g, &p, &Verified{})
		if err == nil {
			t.Fatalf("byte %d flipped: accepted", i)
		}
		seen[check]++
	}
	t.Log(seen)
	if seen[CheckReport] == 0 || seen[CheckNonce] == 0 || seen[CheckSignature] == 0 {
		t.Errorf("refused by %v", seen)
	}
}

func TestGoldenReportTruncated(t *testing.T) {
	report := goldenReport(t)
	for n := range report {
		if _, err := ParseReport(report[:n]); err == nil {
			t.Fatalf("%d of %d bytes: accepted", n, len(report))
		}
	}
	if _, err := ParseReport(append(append([]byte{}, report...), 0)); err == nil {
		t.Error("a byte more: accepted")
	}
}

// One byte flipped in a RIM either makes it another text of the same meaning, or
// it is refused.
func TestGoldenRIMFlipped(t *testing.T) {
	data := golden(t, goldenVBIOS)
	l := &links{}
	want, err := parseRIM(data, [][32]byte{RIMRoot}, l)
	if err != nil {
		t.Fatal(err)
	}
	step := 7
	if testing.Short() {
		step = 509
	}
	same := 0
	for i := 0; i < len(data); i += step {
		flipped := append([]byte{}, data...)
		flipped[i] ^= 1
		got, err := parseRIM(flipped, [][32]byte{RIMRoot}, l)
		if err != nil {
			continue
		}
		same++
		if !equalRIM(got, want) {
			t.Fatalf("byte %d flipped (%q): accepted with another meaning", i, data[max(i-20, 0):min(i+20, len(data))])
		}
	}
	t.Logf("%d of %d flips changed nothing", same, (len(data)+step-1)/step)
}

func equalRIM(a, b *RIM) bool {
	if a.Product != b.Product || a.Version != b.Version || len(a.Golden) != len(b.Golden) {
		return false
	}
	for i, values := range a.Golden {
		if len(values) != len(b.Golden[i]) {
			return false
		}
		for j := range values {
			if hex.EncodeToString(values[j]) != hex.EncodeToString(b.Golden[i][j]) {
				return false
			}
		}
	}
	return true
}

// What is refused of real data, by the name of the check.
func TestGoldenRefusals(t *testing.T) {
	for _, test := range []struct {
		name   string
		check  Check
		change func(*Policy)
	}{
		{"after the RIM's signer expired", CheckDriverRIM, func(p *Policy) { p.Time = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC); p.AllowNoOCSP = true }},
		{"responses older than allowed", CheckRevocation, func(p *Policy) { p.MaxOCSPAge = 24 * time.Hour }},
		{"responses from the future", CheckRevocation, func(p *Policy) { p.Time = time.Date(2025, 8, 20, 0, 0, 0, 0, time.UTC) }},
		{"another nonce", CheckNonce, func(p *Policy) { p.Nonce[31] ^= 1 }},
		{"another model", CheckModel, func(p *Policy) { p.Models = []string{"NVIDIA H200"} }},
		{"another count", CheckCount, func(p *Policy) { p.GPUs = 8 }},
		{"no clock and a time", CheckEvidence, func(p *Policy) { p.NoClock = true }},
		{"another identity", CheckIdentity, func(p *Policy) { p.Identities = [][]byte{[]byte("{}")} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := goldenPolicy()
			test.change(&p)
			_, err := goldenVerifier(t).Verify(goldenEvidence(t), p)
			wantRefusal(t, err, test.check)
		})
	}
	t.Run("without a clock", func(t *testing.T) {
		p := goldenPolicy()
		p.Time, p.NoClock = time.Time{}, true
		if _, err := goldenVerifier(t).Verify(goldenEvidence(t), p); err != nil {
			t.Error(err)
		}
	})
}

func wantRefusal(t *testing.T, err error, check Check) {
	t.Helper()
	r, ok := errors.AsType[*Refusal](err)
	if !ok || r.Check != check {
		t.Fatalf("got %v, expected %s", err, check)
	}
	t.Log(err)
}

// The names of the golden RIMs are those that the golden report asks for.
func TestGoldenRIMIDs(t *testing.T) {
	g := goldenGPU(t)
	driver, vbios, err := RIMIDs(&g)
	if err != nil || driver+".xml" != goldenDriver || vbios+".xml" != goldenVBIOS {
		t.Errorf("%s, %s, %v", driver, vbios, err)
	}
	v := NewVerifier(NVIDIARoots())
	links, err := v.Links(&Evidence{Version: Version, GPUs: []GPU{g}}, [][]byte{golden(t, goldenDriver), golden(t, goldenVBIOS)})
	if err != nil || len(links) != 7 {
		t.Errorf("%d links, %v", len(links), err)
	}
}
