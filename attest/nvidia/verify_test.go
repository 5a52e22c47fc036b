package nvidia_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
)

var nonce = [32]byte{1, 2, 3}

func policy(gpus int) nvidia.Policy {
	return nvidia.Policy{Nonce: nonce, GPUs: gpus, Models: []string{nvidiatest.Model}, Time: nvidiatest.Now, MaxOCSPAge: 24 * time.Hour}
}

func encode(t testing.TB, e *nvidia.Evidence) []byte {
	t.Helper()
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func verifier(t testing.TB, v *nvidiatest.Vendor, c *nvidia.Collateral) *nvidia.Verifier {
	t.Helper()
	out := nvidia.NewVerifier(v.Roots())
	if err := out.AddCollateral(c); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSets(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	for _, n := range []int{1, 2, 4, 8} {
		e, c := vendor.Set(n, nonce)
		data := encode(t, e)
		if len(data) > nvidia.MaxEvidenceSize/2 {
			t.Errorf("%d GPUs: evidence has %d bytes", n, len(data))
		}
		v := verifier(t, vendor, c)
		result, err := v.Verify(data, policy(n))
		if err != nil {
			t.Fatalf("%d GPUs: %v", n, err)
		}
		// What was recorded at boot is what a later verification finds.
		p := policy(n)
		for _, g := range result.GPUs {
			id, err := g.Identity.Encode()
			if err != nil {
				t.Fatal(err)
			}
			p.Identities = append(p.Identities, id)
			if want := len(nvidiatest.DriverIndices) + len(nvidiatest.VBIOSIndices); g.Compared != want {
				t.Errorf("%d of %d measurements compared", g.Compared, want)
			}
		}
		if _, err := v.Verify(data, p); err != nil {
			t.Errorf("%d GPUs with their identities: %v", n, err)
		}
	}
}

// Each fault is refused by the check that is there for it.
func TestRefusals(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	other := nvidiatest.NewVendor()
	gpus := []*nvidiatest.GPU{vendor.NewGPU(), vendor.NewGPU()}
	collateral := vendor.Collateral(gpus...)
	type fixture struct {
		e *nvidia.Evidence
		c *nvidia.Collateral
		p nvidia.Policy
		g *nvidiatest.GPU // signs e.GPUs[1] again after it was changed
	}
	signer := func(change func(*x509.Certificate)) *nvidiatest.Certificate {
		return nvidiatest.Issue("Test RIM L4 Signer", vendor.RIML3, false, change)
	}
	rims := func(driver, vbios []byte) []evidence.Bytes { return []evidence.Bytes{driver, vbios} }
	answer := func(f *fixture, c *nvidiatest.Certificate, status int, at time.Time) {
		f.c.OCSP = append(f.c.OCSP, nvidiatest.OCSP(c, status, at))
	}
	tests := []struct {
		name   string
		check  nvidia.Check
		gpu    int
		text   string
		change func(*fixture)
	}{
		{"seven of eight", nvidia.CheckCount, -1, "2 GPUs, expected 8", func(f *fixture) { f.p.GPUs = 8 }},
		{"one missing", nvidia.CheckCount, -1, "1 GPUs, expected 2", func(f *fixture) { f.e.GPUs = f.e.GPUs[:1] }},
		{"no model allowed", nvidia.CheckModel, 0, "not an allowed model", func(f *fixture) { f.p.Models = nil }},
		{"confidential computing off", nvidia.CheckMode, 0, "off", func(f *fixture) { f.e.GPUs[0].State.CC, f.e.GPUs[1].State.CC = false, false }},
		{"one of them off", nvidia.CheckMode, 1, "another mode", func(f *fixture) { f.e.GPUs[1].State.CC = false }},
		{"devtools", nvidia.CheckDevTools, 1, "devtools", func(f *fixture) { f.e.GPUs[1].State.DevTools = true }},
		{"protected PCIe", nvidia.CheckMode, 0, "NVSwitches", func(f *fixture) {
			for i := range f.e.GPUs {
				f.e.GPUs[i].State.MultiGPU = nvidia.MultiGPUProtectedPCIe
			}
		}},
		{"protected PCIe that the report denies", nvidia.CheckMode, 0, "contradict", func(f *fixture) {
			f.p.AllowUnattestedSwitch = true
			for i := range f.e.GPUs {
				f.e.GPUs[i].State.MultiGPU = nvidia.MultiGPUProtectedPCIe
			}
		}},
		{"the report says protected PCIe", nvidia.CheckMode, 1, "contradict", func(f *fixture) { f.g.Set(nvidia.FieldProtectedPCIe, []byte{0xaa}) }},
		{"an unknown status", nvidia.CheckReport, 1, "neither", func(f *fixture) { f.g.Set(nvidia.FieldProtectedPCIe, []byte{1}) }},
		{"another nonce", nvidia.CheckNonce, 0, "nonce", func(f *fixture) { f.p.Nonce[0] ^= 1 }},
		{"a truncated report", nvidia.CheckReport, 1, "truncated", func(f *fixture) { f.g = nil; f.e.GPUs[1].Report = f.e.GPUs[1].Report[:2000] }},
		{"a repeated field", nvidia.CheckReport, 1, "twice", func(f *fixture) { f.g.Opaque = append(f.g.Opaque, f.g.Opaque[0]) }},
		{"a driver version that is none", nvidia.CheckReport, 1, "driver version", func(f *fixture) { f.g.Set(nvidia.FieldDriverVersion, []byte("$(reboot)\x00")) }},
		{"a foreign root", nvidia.CheckChain, 0, "not a trusted root", func(f *fixture) { f.p = policy(1); f.g = nil; f.e.GPUs = []nvidia.GPU{other.NewGPU().Evidence(nonce)} }},
		{"a foreign chain under the root's name", nvidia.CheckChain, 1, "not signed by", func(f *fixture) {
			f.g = nil
			f.e.GPUs[1] = other.NewGPU().Evidence(nonce)
			f.e.GPUs[1].Certificates[4] = vendor.DeviceRoot.Raw
		}},
		{"a link left out", nvidia.CheckChain, 1, "another issuer", func(f *fixture) {
			f.g = nil
			c := f.e.GPUs[1].Certificates
			f.e.GPUs[1].Certificates = append(append([]evidence.Bytes{}, c[:2]...), c[3:]...)
		}},
		{"a leaf as authority", nvidia.CheckChain, 1, "may not issue", func(f *fixture) {
			f.g.Device = nvidiatest.Issue(nvidiatest.Chip+" A01 GSP BROM", vendor.Provisioner, false, nil)
			f.g.Leaf = nvidiatest.Issue("x", f.g.Device, false, nil)
		}},
		{"an expired device", nvidia.CheckChain, 1, "valid from", func(f *fixture) {
			f.g.Leaf = nvidiatest.Issue("x", f.g.Device, false, func(c *x509.Certificate) { c.NotAfter = nvidiatest.Now.AddDate(0, 0, -1) })
		}},
		{"a mode that is not known", nvidia.CheckReport, 1, "no mode that is known", func(f *fixture) {
			f.g.Opaque = append(f.g.Opaque, nvidiatest.Opaque{Field: nvidia.FieldFeatureFlag, Value: []byte{3}})
		}},
		{"encrypted NVLink that the state denies", nvidia.CheckMode, 1, "contradict", func(f *fixture) {
			f.g.Opaque = append(f.g.Opaque, nvidiatest.Opaque{Field: nvidia.FieldFeatureFlag, Value: []byte{1, 0}})
		}},
		{"encrypted NVLink that the report denies", nvidia.CheckMode, 0, "contradict", func(f *fixture) {
			for i := range f.e.GPUs {
				f.e.GPUs[i].State.MultiGPU = nvidia.MultiGPUNVLE
			}
		}},
		{"a chip's name that is none", nvidia.CheckReport, 1, "chip", func(f *fixture) {
			f.g.Opaque = append(f.g.Opaque, nvidiatest.Opaque{Field: nvidia.FieldChip, Value: []byte("../x")})
		}},
		{"an old driver", nvidia.CheckDriverRIM, 0, "older than the policy's minimum", func(f *fixture) { f.p.MinDriver = "999.10.2" }},
		{"two faults: the earlier check, of the later GPU", nvidia.CheckNonce, 1, "nonce", func(f *fixture) {
			f.g = nil
			f.e.GPUs[0].Report[400] ^= 1
			f.e.GPUs[1].Report = gpus[1].Report([32]byte{9})
		}},
		{"a chip without a name", nvidia.CheckChain, 1, "begin with a chip", func(f *fixture) {
			f.g.Device = nvidiatest.Issue("BROM", vendor.Provisioner, true, nil)
			f.g.Leaf = nvidiatest.Issue("x", f.g.Device, false, nil)
		}},
		{"another GPU's signature", nvidia.CheckSignature, 1, "does not match", func(f *fixture) { f.g = nil; f.e.GPUs[1].Report = gpus[0].Report(nonce) }},
		{"another firmware", nvidia.CheckFirmware, 1, "the firmware", func(f *fixture) { f.g.Set(nvidia.FieldFWID, make([]byte, 48)) }},
		{"a revoked GPU", nvidia.CheckRevocation, 1, "revoked", func(f *fixture) { answer(f, gpus[1].Device, ocsp.Revoked, nvidiatest.Now.AddDate(0, -3, 0)) }},
		{"a revoked authority", nvidia.CheckRevocation, 0, "revoked", func(f *fixture) { answer(f, vendor.Identity, ocsp.Revoked, nvidiatest.Now) }},
		{"no answer for a GPU", nvidia.CheckRevocation, 1, "no OCSP response", func(f *fixture) { f.c.OCSP = f.c.OCSP[:len(f.c.OCSP)-1] }},
		{"an old answer", nvidia.CheckRevocation, 1, "older than", func(f *fixture) {
			f.c.OCSP = f.c.OCSP[:len(f.c.OCSP)-1]
			answer(f, gpus[1].Device, ocsp.Good, nvidiatest.Now.AddDate(0, 0, -2))
		}},
		{"an unknown GPU", nvidia.CheckRevocation, 1, "does not know", func(f *fixture) {
			f.c.OCSP = f.c.OCSP[:len(f.c.OCSP)-1]
			answer(f, gpus[1].Device, ocsp.Unknown, nvidiatest.Now)
		}},
		{"an answer by somebody else", nvidia.CheckRevocation, 1, "does not speak for", func(f *fixture) {
			foreign := nvidiatest.Issue("Test GH100 Provisioner ICA 1", nil, true, nil)
			responder := nvidiatest.Issue("x", foreign, false, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning} })
			f.c.OCSP[len(f.c.OCSP)-1] = nvidiatest.OCSPFrom(responder, gpus[1].Device, ocsp.Good, nvidiatest.Now)
		}},
		{"an answer by a GPU", nvidia.CheckRevocation, 1, "does not speak for", func(f *fixture) {
			responder := nvidiatest.Issue("x", vendor.Provisioner, false, nil)
			f.c.OCSP[len(f.c.OCSP)-1] = nvidiatest.OCSPFrom(responder, gpus[1].Device, ocsp.Good, nvidiatest.Now)
		}},
		{"a GPU twice", nvidia.CheckDuplicate, 1, "same device", func(f *fixture) { f.g = nil; f.e.GPUs[1] = f.e.GPUs[0] }},
		{"no driver RIM", nvidia.CheckDriverRIM, 0, "there is no RIM", func(f *fixture) { f.c.RIMs = f.c.RIMs[1:] }},
		{"another driver's RIM", nvidia.CheckDriverRIM, 0, "999.10.02", func(f *fixture) {
			f.c.RIMs = rims(vendor.RIM(vendor.Signer, "999.10.02", nvidiatest.DriverIndices), vendor.VBIOSRIM())
		}},
		{"another VBIOS's RIM", nvidia.CheckVBIOSRIM, 0, "96.00.AA.00.02", func(f *fixture) {
			f.c.RIMs = rims(vendor.DriverRIM(), vendor.RIM(vendor.Signer, "96.00.AA.00.02", nvidiatest.VBIOSIndices))
		}},
		{"an expired RIM", nvidia.CheckDriverRIM, 0, "valid from", func(f *fixture) {
			s := signer(func(c *x509.Certificate) { c.NotAfter = nvidiatest.Now.AddDate(0, 0, -1) })
			f.c.RIMs = rims(vendor.RIM(s, nvidiatest.Driver, nvidiatest.DriverIndices), vendor.VBIOSRIM())
		}},
		{"a revoked RIM signer", nvidia.CheckVBIOSRIM, 0, "revoked", func(f *fixture) {
			s := signer(nil)
			f.c.RIMs = rims(vendor.DriverRIM(), vendor.RIM(s, nvidiatest.VBIOS, nvidiatest.VBIOSIndices))
			answer(f, s, ocsp.Revoked, nvidiatest.Now)
		}},
		{"RIMs that share an index", nvidia.CheckMeasurements, 0, "both", func(f *fixture) {
			f.c.RIMs = rims(vendor.DriverRIM(), vendor.RIM(vendor.Signer, nvidiatest.VBIOS, []int{1, 7}))
		}},
		{"too few measurements", nvidia.CheckMeasurements, 1, "32 (missing), 35 (missing)", func(f *fixture) { f.g.Measurements = f.g.Measurements[:30] }},
		{"another identity", nvidia.CheckIdentity, 0, "recorded", func(f *fixture) { f.p.Identities = [][]byte{{}, {}} }},
		{"fewer identities", nvidia.CheckIdentity, -1, "recorded 1", func(f *fixture) { f.p.Identities = [][]byte{{}} }},
	}
	// What other collateral could mend.
	missing := map[string]bool{
		"no answer for a GPU": true, "an old answer": true, "an answer by somebody else": true, "an answer by a GPU": true,
		"no driver RIM": true, "another driver's RIM": true, "another VBIOS's RIM": true, "an expired RIM": true,
	}
	for _, index := range append(append([]int{}, nvidiatest.DriverIndices...), nvidiatest.VBIOSIndices...) {
		i := index
		tests = append(tests, struct {
			name   string
			check  nvidia.Check
			gpu    int
			text   string
			change func(*fixture)
		}{fmt.Sprintf("measurement %d", i), nvidia.CheckMeasurements, 1, fmt.Sprintf("index %d (", i), func(f *fixture) {
			f.g.Measurements = append([][]byte{}, f.g.Measurements...)
			f.g.Measurements[i] = make([]byte, 48)
		}})
	}
	named := map[nvidia.Check]bool{nvidia.CheckEvidence: true}
	for _, test := range tests {
		named[test.check] = true
		t.Run(test.name, func(t *testing.T) {
			g := *gpus[1]
			g.Opaque = append([]nvidiatest.Opaque{}, g.Opaque...)
			f := &fixture{
				e: &nvidia.Evidence{Version: nvidia.Version, GPUs: []nvidia.GPU{gpus[0].Evidence(nonce), gpus[1].Evidence(nonce)}},
				c: &nvidia.Collateral{Version: nvidia.Version, RIMs: collateral.RIMs, OCSP: append([]evidence.Bytes{}, collateral.OCSP...)},
				p: policy(2),
				g: &g,
			}
			test.change(f)
			if f.g != nil && len(f.e.GPUs) == 2 {
				state := f.e.GPUs[1].State
				f.e.GPUs[1] = f.g.Evidence(nonce)
				f.e.GPUs[1].State = state
			}
			_, err := verifier(t, vendor, f.c).Verify(encode(t, f.e), f.p)
			r, ok := errors.AsType[*nvidia.Refusal](err)
			if !ok || r.Check != test.check || r.GPU != test.gpu || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("got %v, expected %s of GPU %d with %q", err, test.check, test.gpu, test.text)
			}
			if _, got := errors.AsType[*nvidia.MissingError](err); got != missing[test.name] {
				t.Errorf("that other collateral could mend it is %v, expected %v", got, missing[test.name])
			}
			t.Log(err)
		})
	}
	for _, check := range nvidia.Checks {
		if !named[check] {
			t.Errorf("%s: no test makes it fail", check)
		}
	}
}

func TestNVDEC0Off(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	g := vendor.NewGPU()
	g.Set(nvidia.FieldNVDEC0, []byte{0x55})
	g.Measurements[35] = make([]byte, 48)
	e := &nvidia.Evidence{Version: nvidia.Version, GPUs: []nvidia.GPU{g.Evidence(nonce)}}
	result, err := verifier(t, vendor, vendor.Collateral(g)).Verify(encode(t, e), policy(1))
	if err != nil {
		t.Fatal(err)
	}
	if got := result.GPUs[0].Skipped; len(got) != 1 || got[0] != 35 {
		t.Errorf("skipped %v", got)
	}
}

// Blackwell's evidence, as far as its form is public.
func TestBlackwell(t *testing.T) {
	vendor := nvidiatest.NewVendorOf("GB100", nvidiatest.Now)
	for flag, mode := range map[byte]nvidia.MultiGPU{0: nvidia.MultiGPUNone, 1: nvidia.MultiGPUNVLE} {
		e := &nvidia.Evidence{Version: nvidia.Version}
		var gpus []*nvidiatest.GPU
		for range 2 {
			g := vendor.NewGPU()
			g.Set(nvidia.FieldFeatureFlag, []byte{flag})
			gpus = append(gpus, g)
			entry := g.Evidence(nonce)
			entry.State.MultiGPU = mode
			e.GPUs = append(e.GPUs, entry)
		}
		result, err := verifier(t, vendor, vendor.Collateral(gpus...)).Verify(encode(t, e), policy(2))
		if err != nil {
			t.Fatalf("%s: %v", mode, err)
		}
		if id := result.GPUs[0].Identity; id.Chip != "GB100" || id.MultiGPU != mode {
			t.Errorf("identity %+v", id)
		}
		driver, vbios, err := nvidia.RIMIDs(&e.GPUs[0])
		if err != nil || driver != "NV_GPU_CC_DRIVER_GB100_"+nvidiatest.Driver || vbios != "NV_GPU_VBIOS_1010_0200_882_9600AA0001" {
			t.Errorf("RIMs %s, %s, %v", driver, vbios, err)
		}
		// A RIM of Hopper for the same version is validly signed, and not the one.
		hopper := *vendor
		hopper.Chip = nvidiatest.Chip
		c := vendor.Collateral(gpus...)
		c.RIMs[0] = hopper.DriverRIM()
		_, err = verifier(t, vendor, c).Verify(encode(t, e), policy(2))
		if r, ok := errors.AsType[*nvidia.Refusal](err); !ok || r.Check != nvidia.CheckDriverRIM {
			t.Errorf("with Hopper's RIM: %v", err)
		}
	}
}

// Select takes what judges some GPUs out of more, and it is enough.
func TestSelect(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	e, mine := vendor.Set(2, nonce)
	_, others := vendor.Set(6, nonce)
	v := verifier(t, vendor, mine)
	others.RIMs = append(others.RIMs, vendor.RIM(vendor.Signer, "999.10.02", nvidiatest.DriverIndices))
	stranger := nvidiatest.NewVendor()
	strange := stranger.Collateral(stranger.NewGPU())
	strange.RIMs = []evidence.Bytes{}
	for _, c := range []*nvidia.Collateral{others, strange, {Version: nvidia.Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{
		nvidiatest.OCSP(vendor.Identity, ocsp.Good, nvidiatest.Now), nvidiatest.OCSP(vendor.Identity, ocsp.Good, nvidiatest.Now.Add(-2*time.Hour)),
	}}} {
		if err := v.AddCollateral(c); err != nil {
			t.Fatal(err)
		}
	}
	got, err := v.Select(e)
	if err != nil {
		t.Fatal(err)
	}
	// Two RIMs, twice each; five authorities and two GPUs.
	if len(got.RIMs) != 4 || len(got.OCSP) != 7 {
		t.Errorf("%d RIMs, %d answers", len(got.RIMs), len(got.OCSP))
	}
	p := policy(2)
	p.MaxOCSPAge = time.Hour
	if _, err := verifier(t, vendor, got).Verify(encode(t, e), p); err != nil {
		t.Error(err)
	}
	// What is revoked stays so.
	if err := v.AddCollateral(&nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{
		nvidiatest.OCSP(vendor.Identity, ocsp.Revoked, nvidiatest.Now.AddDate(0, -1, 0)),
	}}); err != nil {
		t.Fatal(err)
	}
	if got, err = v.Select(e); err != nil {
		t.Fatal(err)
	}
	if _, err := verifier(t, vendor, got).Verify(encode(t, e), p); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Error(err)
	}
	e.GPUs[0].Certificates = e.GPUs[0].Certificates[:3]
	if _, err := v.Select(e); err == nil {
		t.Error("a chain that does not verify selects")
	}
}

// What collateral is refused for.
func TestCollateralRefused(t *testing.T) {
	vendor, other := nvidiatest.NewVendor(), nvidiatest.NewVendor()
	good := string(vendor.DriverRIM())
	edit := func(old, new string) []byte {
		if !strings.Contains(good, old) {
			t.Fatalf("there is no %s", old)
		}
		return []byte(strings.Replace(good, old, new, 1))
	}
	for _, test := range []struct {
		name, text string
		rim        []byte
	}{
		{"empty", "not a SoftwareIdentity", []byte{}},
		{"not XML", "read XML", []byte("<a")},
		{"another document", "not a SoftwareIdentity", []byte("<a/>")},
		{"too large", "at most", []byte("<a>" + strings.Repeat(" ", nvidia.MaxRIMSize) + "</a>")},
		{"too deep", "levels", []byte(strings.Repeat("<a>", 100))},
		{"a document type", "document type", append([]byte(`<!DOCTYPE a [<!ENTITY x "y">]>`), good...)},
		{"an entity", "read XML", edit(`edition="GPU"`, `edition="&x;"`)},
		{"a comment", "comment", edit("<ns0:Payload>", "<!-- x --><ns0:Payload>")},
		{"a processing instruction", "processing instruction", edit("<ns0:Payload>", "<?x y?><ns0:Payload>")},
		{"an attribute twice", "twice", edit(`edition="GPU"`, `edition="GPU" edition="GPU"`)},
		{"no signature", "exactly one XML signature", []byte(good[:strings.Index(good, "<ds:Signature ")] + "</SoftwareIdentity>")},
		{"two signatures", "exactly one XML signature", edit("<ns0:Payload>", `<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"/><ns0:Payload>`)},
		{"another method", "signature method", edit("ecdsa-sha384", "ecdsa-sha256")},
		{"another transform", "transforms", edit(`<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"></ds:Transform>`, "")},
		{"a reference elsewhere", "reference", edit(`URI=""`, `URI="#x"`)},
		{"a changed digest", "signed", edit(`active="False"`, `active="True"`)},
		{"a changed version", "signature", edit(`colloquialVersion="`+nvidiatest.Driver, `colloquialVersion="999.10.09`)},
		{"a foreign root", "not a trusted root", other.DriverRIM()},
		{"a foreign signer in our chain", "signature", bytes.Replace(other.DriverRIM(), between(other.DriverRIM()), between([]byte(good)), 1)},
		{"no measurement", "no active measurement", vendor.RIM(vendor.Signer, nvidiatest.Driver, nil)},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := nvidia.NewVerifier(vendor.Roots()).AddCollateral(&nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{test.rim}, OCSP: []evidence.Bytes{}})
			if err == nil || (!strings.Contains(err.Error(), test.text) && test.text != "signed") {
				t.Fatalf("got %v, expected %q", err, test.text)
			}
			t.Log(err)
		})
	}
	for name, data := range map[string][]byte{"empty": {}, "garbage": []byte("garbage"), "too large": make([]byte, nvidia.MaxOCSPSize+1)} {
		if err := nvidia.NewVerifier(vendor.Roots()).AddCollateral(&nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{data}}); err == nil {
			t.Errorf("OCSP response %s: accepted", name)
		}
	}
}

// between returns the certificates of a RIM.
func between(rim []byte) []byte {
	return rim[bytes.Index(rim, []byte("<ds:X509Data>")):bytes.Index(rim, []byte("</ds:X509Data>"))]
}

func TestDocuments(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	e, c := vendor.Set(1, nonce)
	data := encode(t, e)
	for name, bad := range map[string][]byte{
		"nothing":        {},
		"another field":  bytes.Replace(data, []byte(`{"gpus"`), []byte(`{"a":1,"gpus"`), 1),
		"white space":    append([]byte(" "), data...),
		"no GPU":         []byte(`{"gpus":[],"version":1}`),
		"an odd version": bytes.Replace(data, []byte(`"version":1`), []byte(`"version":2`), 1),
		"an odd mode":    bytes.Replace(data, []byte(`"none"`), []byte(`"some"`), 1),
		"an odd model":   bytes.Replace(data, []byte(nvidiatest.Model), []byte(`$x`), 1),
	} {
		if _, err := nvidia.ParseEvidence(bad); err == nil {
			t.Errorf("evidence with %s: accepted", name)
		}
		_, err := verifier(t, vendor, c).Verify(bad, policy(1))
		if r, ok := errors.AsType[*nvidia.Refusal](err); !ok || r.Check != nvidia.CheckEvidence {
			t.Errorf("evidence with %s: %v", name, err)
		}
	}
	encoded, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := nvidia.ParseCollateral(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if len(back.RIMs) != 2 || !bytes.Equal(back.RIMs[0], c.RIMs[0]) || len(back.OCSP) != len(c.OCSP) {
		t.Error("collateral does not survive its encoding")
	}
}

func TestSplitChain(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	g := vendor.NewGPU()
	want := g.Leaf.Chain()
	pem := g.Leaf.PEM()
	for name, data := range map[string][]byte{
		"as it is":            pem,
		"padded":              append(append([]byte{}, pem...), 0, 0, 0),
		"without line breaks": bytes.ReplaceAll(pem, []byte("-----\n-----"), []byte("----------")),
	} {
		got, err := nvidia.SplitChain(data)
		if err != nil || len(got) != len(want) || !bytes.Equal(got[0], want[0]) || !bytes.Equal(got[4], want[4]) {
			t.Errorf("%s: %d certificates, %v", name, len(got), err)
		}
	}
	for name, data := range map[string][]byte{
		"nothing": {}, "garbage": []byte("x"), "truncated": pem[:len(pem)-30], "something between": bytes.Replace(pem, []byte("-----\n-----"), []byte("-----\nx\n-----"), 1),
		"too large": bytes.Repeat(pem, 3), "a key": bytes.ReplaceAll(pem, []byte("CERTIFICATE"), []byte("PRIVATE KEY")), "one only": pem[:bytes.Index(pem, []byte("-----\n-----"))+6],
	} {
		if got, err := nvidia.SplitChain(data); err == nil {
			t.Errorf("%s: %d certificates", name, len(got))
		}
	}
}

// Nothing that a stranger sends makes a parser panic, and what parses is within
// bounds.
func FuzzParseReport(f *testing.F) {
	g := nvidiatest.NewVendor().NewGPU()
	f.Add(g.Report(nonce))
	g.Measurements = g.Measurements[:1]
	f.Add(g.Report(nonce))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := nvidia.ParseReport(data)
		if err == nil && (len(r.Measurements) > 255 || r.Driver == "" || r.VBIOS == "") {
			t.Errorf("%+v", r)
		}
	})
}

func FuzzSplitChain(f *testing.F) {
	f.Add(nvidiatest.NewVendor().NewGPU().Leaf.PEM())
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if out, err := nvidia.SplitChain(data); err == nil && len(out) > nvidia.MaxCertificates {
			t.Error(len(out))
		}
	})
}

func FuzzParseRIM(f *testing.F) {
	vendor := nvidiatest.NewVendor()
	f.Add(vendor.DriverRIM())
	f.Add([]byte("<SoftwareIdentity/>"))
	roots := vendor.Roots().RIM
	f.Fuzz(func(t *testing.T, data []byte) {
		if rim, err := nvidia.ParseRIM(data, roots); err == nil && len(rim.Golden) == 0 {
			t.Error("no measurement")
		}
	})
}

func FuzzVerify(f *testing.F) {
	vendor := nvidiatest.NewVendor()
	e, c := vendor.Set(1, nonce)
	data, _ := e.Encode()
	f.Add(data, []byte(c.OCSP[0]))
	good := bytes.Clone(data)
	f.Fuzz(func(t *testing.T, data, answer []byte) {
		v := nvidia.NewVerifier(vendor.Roots())
		if err := v.AddCollateral(c); err != nil {
			t.Fatal(err)
		}
		_ = v.AddCollateral(&nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{answer}})
		if _, err := v.Verify(data, policy(1)); err == nil && !bytes.Equal(data, good) {
			t.Error("accepted")
		}
	})
}

// The figures of docs/performance.md: GPUs that were never seen before, with
// collateral verified before, and GPUs that are asked again.
func BenchmarkVerify(b *testing.B) {
	vendor := nvidiatest.NewVendor()
	for _, n := range []int{1, 8} {
		// The collateral is for all; NVIDIA's own certificates are known from the
		// first GPU on.
		var gpus []*nvidiatest.GPU
		for range 2 * n {
			gpus = append(gpus, vendor.NewGPU())
		}
		c := vendor.Collateral(gpus...)
		set := func(gpus []*nvidiatest.GPU) []byte {
			e := &nvidia.Evidence{Version: nvidia.Version}
			for _, g := range gpus {
				e.GPUs = append(e.GPUs, g.Evidence(nonce))
			}
			return encode(b, e)
		}
		first, second := set(gpus[:n]), set(gpus[n:])
		// On a machine that does other work, processor time says more than a clock.
		used := func(b *testing.B, begin time.Duration) {
			b.ReportMetric(float64(cpuTime()-begin)/float64(b.N)/1e6, "cpu-ms/op")
		}
		run := func(v *nvidia.Verifier, data []byte) {
			if _, err := v.Verify(data, policy(n)); err != nil {
				b.Fatal(err)
			}
		}
		b.Run(fmt.Sprintf("new/gpus=%d", n), func(b *testing.B) {
			var cpu time.Duration
			for b.Loop() {
				b.StopTimer()
				v := verifier(b, vendor, c)
				run(v, first)
				begin := cpuTime()
				b.StartTimer()
				run(v, second)
				cpu += cpuTime() - begin
			}
			used(b, cpuTime()-cpu)
		})
		b.Run(fmt.Sprintf("again/gpus=%d", n), func(b *testing.B) {
			v := verifier(b, vendor, c)
			run(v, first)
			begin := cpuTime()
			for b.Loop() {
				run(v, first)
			}
			used(b, begin)
		})
	}
	b.Run("collateral", func(b *testing.B) {
		c := vendor.Collateral(vendor.NewGPU())
		for b.Loop() {
			verifier(b, vendor, c)
		}
	})
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
