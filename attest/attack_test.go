package attest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

const prompt = "the-prompt-that-nobody-may-see"

// scene is one client and one VM, before anything is wrong.
type scene struct {
	vm     *attesttest.VM
	client *attest.Transport
	server *attesttest.Server
}

func newScene(t *testing.T, platform record.Platform) *scene {
	t.Helper()
	vm := attesttest.NewVM(platform)
	s := &scene{vm: vm, client: vm.Transport(), server: attesttest.Serve(vm)}
	s.client.Timeout = 10 * time.Second
	t.Cleanup(func() { s.client.CloseIdleConnections(); s.server.Close() })
	return s
}

// ask sends a prompt.
func (s *scene) ask() error {
	request, err := http.NewRequest(http.MethodPost, s.server.URL+"/v1/chat/completions", strings.NewReader(prompt))
	if err != nil {
		return err
	}
	answer, err := (&http.Client{Transport: s.client}).Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(io.Discard, answer.Body)
	return err
}

func nonce() []byte { b := make([]byte, evidence.NonceSize); rand.Read(b); return b }

func TestGood(t *testing.T) {
	for _, platform := range []record.Platform{record.TDX, record.TPM} {
		t.Run(string(platform), func(t *testing.T) {
			s := newScene(t, platform)
			var session *attest.Session
			s.client.Verified = func(got *attest.Session) { session = got }
			if err := s.ask(); err != nil {
				t.Fatal(err)
			}
			v := session.Verdict
			if !v.OK || v.Failed != "" || v.Confidential || v.Platform != platform || v.Image != "chrysalis" || v.Engine != "llama.cpp" || strings.Join(v.Models, " ") != "test/model@1" {
				t.Errorf("%+v", v)
			}
			for _, c := range v.Checks {
				if c.Status != attest.Passed || c.Title == "" {
					t.Errorf("%+v", c)
				}
			}
			if !strings.Contains(s.server.Received(), prompt) {
				t.Error("the prompt was not sent")
			}
		})
	}
	t.Run("the policy's shape", func(t *testing.T) {
		for _, platform := range []record.Platform{record.TDX, record.TPM} {
			s := newScene(t, platform)
			s.client.Policy.Shapes = []string{"large", "small"}
			var v *attest.Verdict
			s.client.Verified = func(got *attest.Session) { v = got.Verdict }
			if err := s.ask(); err != nil || v.Shape != "small" {
				t.Errorf("%s: %v, %+v", platform, err, v)
			}
		}
	})
	t.Run("another machine with a TPM, where the policy names no shape", func(t *testing.T) {
		s := newScene(t, record.TPM)
		s.vm.Firmware = append(s.vm.Firmware, attesttest.Measured{Register: 1, Data: []byte("more vCPUs")})
		s.vm.Measure()
		var v *attest.Verdict
		s.client.Verified = func(got *attest.Session) { v = got.Verdict }
		if err := s.ask(); err != nil || v.Shape != "" {
			t.Errorf("%v, %+v", err, v)
		}
	})
	t.Run("quote of version 4", func(t *testing.T) {
		s := newScene(t, record.TDX)
		s.vm.TD.Version = 4
		if err := s.ask(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("Intel's root", func(t *testing.T) {
		s := newScene(t, record.TDX)
		defer attest.SetIntelRoot(s.vm.Intel.Root)()
		s.client.Policy = attest.NewPolicy()
		var v *attest.Verdict
		s.client.Verified = func(got *attest.Session) { v = got.Verdict }
		if err := s.ask(); err != nil || !v.Confidential {
			t.Fatal(err)
		}
	})
}

// swap exchanges two events.
func swap(events []cel.Event, i, j int) { events[i], events[j] = events[j], events[i] }

func flip48(b *[48]byte) { b[17] ^= 1 }

// attacks are the lies of a host. Each is told by well-formed evidence, signed by
// the root that the client trusts, and must be refused by the check named, before
// a byte of the prompt is sent.
var attacks = []struct {
	name     string
	platform record.Platform
	check    attest.Name
	lie      func(s *scene)
}{
	{"replayed evidence", record.TDX, attest.CheckNonce, func(s *scene) {
		old := s.vm.Evidence(nonce())
		s.server.Evidence = func(w http.ResponseWriter, _ *http.Request) { w.Write(old) }
	}},
	{"replayed evidence with the new nonce written in", record.TDX, attest.CheckReportData, func(s *scene) {
		s.vm.Sign = func(d *evidence.Document) { d.Nonces = []evidence.Bytes{nonce()} }
		var asked []evidence.Bytes
		sign := s.vm.Sign
		s.vm.Sign = func(d *evidence.Document) { asked = d.Nonces; sign(d) }
		s.vm.Send = func(d *evidence.Document) { d.Nonces = asked }
	}},
	{"another VM's evidence over this VM's TLS", record.TDX, attest.CheckTLSKey, func(s *scene) {
		other := *s.vm
		other.NewKey()
		s.server.Evidence = func(w http.ResponseWriter, r *http.Request) { w.Write(other.Evidence(asked(r))) }
	}},
	{"this VM's evidence with another TLS key written in", record.TDX, attest.CheckReportData, func(s *scene) {
		mine := s.vm.SPKI
		other := *s.vm
		other.NewKey()
		other.Send = func(d *evidence.Document) { d.TLSKey = mine }
		s.server.Evidence = func(w http.ResponseWriter, r *http.Request) { w.Write(other.Evidence(asked(r))) }
	}},
	{"another receipt key", record.TDX, attest.CheckReportData, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.ReceiptKey = make([]byte, 32) }
	}},
	{"DEBUG set", record.TDX, attest.CheckAttributes, func(s *scene) { s.vm.TD.Attributes |= 1 }},
	{"MIGRATABLE set", record.TDX, attest.CheckAttributes, func(s *scene) { s.vm.TD.Attributes |= 1 << 29 }},
	{"SEPT_VE_DISABLE clear", record.TDX, attest.CheckAttributes, func(s *scene) { s.vm.TD.Attributes = 0 }},
	{"PERFMON set", record.TDX, attest.CheckAttributes, func(s *scene) { s.vm.TD.Attributes |= 1 << 63 }},
	{"XFAM with processor trace", record.TDX, attest.CheckXFAM, func(s *scene) { s.vm.TD.XFAM |= 1 << 8 }},
	{"XFAM with last branch records", record.TDX, attest.CheckXFAM, func(s *scene) { s.vm.TD.XFAM |= 1 << 15 }},
	{"XFAM without SSE", record.TDX, attest.CheckXFAM, func(s *scene) { s.vm.TD.XFAM = 1 }},
	{"another MRSEAM than the policy's", record.TDX, attest.CheckModule, func(s *scene) {
		s.client.Policy.MRSEAM = []record.Hex{bytes.Repeat([]byte{1}, 48)}
	}},
	{"a module that is not Intel's", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.TD.MRSignerSEAM[0] = 1 }},
	{"a debug module", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.TD.SEAMAttributes[0] = 1 }},
	{"a module that Intel does not list", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.TD.TEETCBSVN[1] = 9 }},
	{"an old module", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.TD.TEETCBSVN[0] = 3 }},
	{"an old TCB", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.PlatformStatus = "OutOfDate"; s.recollect() }},
	{"a revoked TCB", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.PlatformStatus = "Revoked"; s.recollect() }},
	{"a module that is out of date, a platform that is not", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.ModuleStatus = "OutOfDate"; s.recollect() }},
	{"a quoting enclave that is out of date", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.QEStatus = "OutOfDate"; s.recollect() }},
	{"a status with an advisory that the waiver does not name", record.TDX, attest.CheckTCB, func(s *scene) {
		s.vm.Intel.PlatformStatus, s.vm.Intel.Advisories = "SWHardeningNeeded", []string{"INTEL-SA-1", "INTEL-SA-2"}
		s.recollect()
		s.client.Policy.TCBWaivers = []attest.TCBWaiver{{Status: "SWHardeningNeeded", Advisories: []string{"INTEL-SA-1"}, Until: "2999-01-01", Reason: "test"}}
		if err := s.client.Policy.Check(); err != nil {
			panic(err)
		}
	}},
	{"a waiver that has run out", record.TDX, attest.CheckTCB, func(s *scene) {
		s.vm.Intel.PlatformStatus = "SWHardeningNeeded"
		s.recollect()
		s.client.Policy.TCBWaivers = []attest.TCBWaiver{{Status: "SWHardeningNeeded", Until: "2020-01-01", Reason: "test"}}
		if err := s.client.Policy.Check(); err != nil {
			panic(err)
		}
	}},
	{"collateral that is out of date", record.TDX, attest.CheckTCB, func(s *scene) {
		s.vm.Intel.NextUpdate = time.Now().Add(-time.Minute)
		s.recollect()
	}},
	{"collateral older than the policy's minimum", record.TDX, attest.CheckTCB, func(s *scene) { s.client.Policy.MinTCBEvaluation = 18 }},
	{"collateral of another root", record.TDX, attest.CheckTCB, func(s *scene) {
		s.client.Collateral = attesttest.NewIntel(time.Now()).Collateral()
	}},
	{"collateral with a changed byte", record.TDX, attest.CheckTCB, func(s *scene) {
		c := s.vm.Intel.Collateral()
		c.TCBInfo = strings.Replace(c.TCBInfo, `"svn":4`, `"svn":1`, 1)
		s.client.Collateral = c
	}},
	{"collateral with a forged part beside the signed one", record.TDX, attest.CheckTCB, func(s *scene) {
		s.vm.Intel.PlatformStatus = "OutOfDate"
		bad := s.vm.Intel.Collateral()
		s.vm.Intel.PlatformStatus = "UpToDate"
		var good map[string]json.RawMessage
		if err := json.Unmarshal([]byte(s.vm.Intel.Collateral().TCBInfo), &good); err != nil {
			panic(err)
		}
		bad.TCBInfo = strings.TrimSuffix(bad.TCBInfo, "}") + `,"TcbInfo":` + string(good["tcbInfo"]) + "}"
		s.client.Collateral = bad
	}},
	{"a revoked platform", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.Revoke = append(s.vm.Intel.Revoke, s.vm.Intel.PCK); s.recollect() }},
	{"a revoked platform CA", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.Revoke = append(s.vm.Intel.Revoke, s.vm.Intel.CA); s.recollect() }},
	{"a revoked TCB signing key", record.TDX, attest.CheckTCB, func(s *scene) { s.vm.Intel.Revoke = append(s.vm.Intel.Revoke, s.vm.Intel.Signer); s.recollect() }},
	{"no collateral", record.TDX, attest.CheckTCB, func(s *scene) { s.client.Collateral = nil }},
	{"an expired chain", record.TDX, attest.CheckQuote, func(s *scene) {
		s.vm.Intel.Reissue(time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour))
	}},
	{"a chain that is not valid yet", record.TDX, attest.CheckQuote, func(s *scene) {
		s.vm.Intel.Reissue(time.Now().Add(time.Hour), time.Now().Add(2*time.Hour))
	}},
	{"a foreign chain", record.TDX, attest.CheckQuote, func(s *scene) { s.vm.Intel = attesttest.NewIntel(time.Now()) }},
	{"a test root under the production policy", record.TDX, attest.CheckQuote, func(s *scene) { s.client.Policy = attest.NewPolicy() }},
	{"a changed byte of the quote's body", record.TDX, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.TDX.Quote[300] ^= 1 }
	}},
	{"a changed byte of the quoting enclave's report", record.TDX, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.TDX.Quote[900] ^= 1 }
	}},
	{"a quote that is cut short", record.TDX, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.TDX.Quote = d.TDX.Quote[:700] }
	}},
	{"a quote that states other sizes", record.TDX, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { copy(d.TDX.Quote[48+6+648:], []byte{0xff, 0xff, 0xff, 0x7f}) }
	}},
	{"the wrong report data", record.TDX, attest.CheckReportData, func(s *scene) { s.vm.TD.ReportData[5] = 1 }},
	{"MRSERVICETD not zero", record.TDX, attest.CheckOwner, func(s *scene) { s.vm.TD.MRServiceTD[47] = 1 }},
	{"MROWNER not zero", record.TDX, attest.CheckOwner, func(s *scene) { s.vm.TD.MROwner[0] = 1 }},
	{"MROWNERCONFIG not zero", record.TDX, attest.CheckOwner, func(s *scene) { s.vm.TD.MROwnerConfig[0] = 1 }},
	{"a changed byte of MRTD", record.TDX, attest.CheckMRTD, func(s *scene) { flip48(&s.vm.TD.MRTD) }},
	{"a changed byte of RTMR0: a shape not in the record", record.TDX, attest.CheckRTMR0, func(s *scene) {
		s.vm.Firmware[0].Data = []byte("another machine")
		s.vm.Measure()
	}},
	{"a changed byte of RTMR1: another image", record.TDX, attest.CheckRTMR1, func(s *scene) {
		s.vm.Firmware[1].Data = []byte("imagf")
		s.vm.Measure()
	}},
	{"a changed byte of RTMR2: another command line", record.TDX, attest.CheckRTMR2, func(s *scene) {
		s.vm.Firmware[2].Data = []byte("command line init=/bin/sh")
		s.vm.Measure()
	}},
	{"something measured after the image", record.TDX, attest.CheckRTMR2, func(s *scene) {
		s.vm.Firmware = append(s.vm.Firmware, attesttest.Measured{Register: 3, Data: []byte("more")})
		s.vm.Measure()
	}},
	{"a changed byte of RTMR3", record.TDX, attest.CheckRTMR3, func(s *scene) {
		s.keep()
		flip48(&s.vm.TD.RTMR[3])
	}},
	{"a changed byte of MRCONFIGID", record.TDX, attest.CheckManifest, func(s *scene) {
		s.keep()
		flip48(&s.vm.TD.MRConfigID)
	}},
	{"MRCONFIGID unset", record.TDX, attest.CheckManifest, func(s *scene) {
		s.keep()
		s.vm.TD.MRConfigID = [48]byte{}
	}},
	{"the image of one record with the shape of another", record.TDX, attest.CheckRTMR0, func(s *scene) {
		other := attesttest.NewVM(record.TDX)
		flip48(&other.TD.MRTD)
		other.Firmware[0].Data = []byte("another machine")
		other.Measure()
		s.client.Records = append(s.client.Records, other.Record())
		s.vm.Firmware[0].Data = []byte("another machine")
		s.vm.Measure()
	}},
	{"a firmware log that does not replay", record.TDX, attest.CheckFirmwareLog, func(s *scene) {
		s.vm.Firmware[3].Data = []byte("another initrd") // without Measure
	}},
	{"a firmware log that is cut short", record.TDX, attest.CheckFirmwareLog, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.TDX.CCEL = d.TDX.CCEL[:len(d.TDX.CCEL)-3] }
	}},
	{"an event log that does not replay", record.TDX, attest.CheckRTMR3, func(s *scene) {
		s.keep()
		s.vm.Events[1].Data = []byte("{}")
	}},
	{"an event log with an event too many", record.TDX, attest.CheckRTMR3, func(s *scene) {
		s.keep()
		s.vm.Events = append(s.vm.Events, cel.SeparatorEvent())
	}},
	{"an event log with one missing", record.TDX, attest.CheckRTMR3, func(s *scene) {
		s.keep()
		s.vm.Events = s.vm.Events[:len(s.vm.Events)-1]
	}},
	{"an event log with two swapped", record.TDX, attest.CheckRTMR3, func(s *scene) {
		s.keep()
		swap(s.vm.Events, 1, 2)
	}},
	{"an event too many, measured", record.TDX, attest.CheckDisks, func(s *scene) {
		s.vm.Events = append(s.vm.Events, cel.SeparatorEvent())
	}},
	{"no separator, measured", record.TDX, attest.CheckDisks, func(s *scene) { s.vm.Events = s.vm.Events[:len(s.vm.Events)-1] }},
	{"two swapped, measured", record.TDX, attest.CheckDisks, func(s *scene) { swap(s.vm.Events, 1, 2) }},
	{"something before the manifest, measured", record.TDX, attest.CheckManifest, func(s *scene) { swap(s.vm.Events, 0, 1) }},
	{"an event log of a TPM", record.TDX, attest.CheckRTMR3, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.CEL, _ = cel.Encode(cel.PCR15, s.vm.Events) }
	}},
	{"a manifest with other disks than the log", record.TDX, attest.CheckManifest, func(s *scene) {
		s.vm.Manifest.Models[0].Disk.DataBlocks++ // the events are of the old one
	}},
	{"a manifest measured, other disks opened", record.TDX, attest.CheckDisks, func(s *scene) {
		events := s.vm.Events
		s.vm.Manifest.Models[0].Disk.DataBlocks++
		s.vm.Boot()
		s.vm.Events[2] = events[2]
	}},
	{"another manifest shown than measured", record.TDX, attest.CheckManifest, func(s *scene) {
		shown, err := s.vm.Manifest.Encode()
		if err != nil {
			panic(err)
		}
		s.vm.Manifest.Limits.Concurrency++
		s.vm.Boot()
		s.vm.Sign = func(d *evidence.Document) { d.Manifest = shown }
	}},
	{"another manifest than the policy's", record.TDX, attest.CheckManifest, func(s *scene) {
		s.client.Policy.Manifests = []record.Hex{bytes.Repeat([]byte{1}, 32)}
	}},
	{"an engine that no record approves", record.TDX, attest.CheckEngine, func(s *scene) {
		s.vm.Manifest.Engine.RootHash = hash("evil engine")
		s.vm.Boot()
	}},
	{"a model that no record approves", record.TDX, attest.CheckModel, func(s *scene) {
		s.vm.Manifest.Models[0].Name = "evil/model"
		s.vm.Boot()
	}},
	{"an approved model's name on another disk", record.TDX, attest.CheckModel, func(s *scene) {
		s.vm.Manifest.Models[0].Disk.RootHash = hash("evil model")
		s.vm.Boot()
	}},
	{"a second model that no record approves", record.TDX, attest.CheckModel, func(s *scene) {
		m := s.vm.Manifest.Models[0]
		m.Name = "evil/model"
		s.vm.Manifest.Models = append(s.vm.Manifest.Models, m)
		s.vm.Boot()
	}},
	{"no record at all", record.TDX, attest.CheckMRTD, func(s *scene) { s.client.Records = nil }},

	{"a TPM's evidence where TDX is required", record.TPM, attest.CheckPlatform, func(s *scene) { s.client.Policy = attest.NewPolicy() }},
	{"a TD that shows its host's TPM", record.TPM, attest.CheckPlatform, func(s *scene) {
		p := s.vm.Policy()
		p.Platforms = []record.Platform{record.TDX}
		s.client.Policy = p
	}},
	{"a development root that the policy does not name", record.TPM, attest.CheckQuote, func(s *scene) {
		s.client.Policy = &attest.Policy{Version: 1, AllowNotConfidential: true}
		if err := s.client.Policy.Check(); err != nil {
			panic(err)
		}
	}},
	{"a TPM of another root", record.TPM, attest.CheckQuote, func(s *scene) { s.vm.TPM = attesttest.NewTPM(time.Now()) }},
	{"an attestation key whose certificate expired", record.TPM, attest.CheckQuote, func(s *scene) {
		s.vm.TPM.Reissue(time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour))
	}},
	{"an attestation key that signs anything", record.TPM, attest.CheckQuote, func(s *scene) { s.vm.TPM.Attributes &^= 1 << 16 }},
	{"another key than the certificate's", record.TPM, attest.CheckQuote, func(s *scene) {
		other := attesttest.NewTPM(time.Now())
		s.vm.Send = func(d *evidence.Document) {
			q := d.QualifyingData()
			d.TPM.AK = other.Quote(nil, q[:], nil).AK
		}
	}},
	{"a changed byte of the quote", record.TPM, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.TPM.Quote[40] ^= 1 }
	}},
	{"another structure than a quote", record.TPM, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) {
			d.TPM.Quote = bytes.Repeat([]byte{1}, 80)
			d.TPM.Signature = s.vm.TPM.Sign(d.TPM.Quote)
		}
	}},
	{"PCRs that were not quoted", record.TPM, attest.CheckQuote, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) { d.TPM.PCRs[4].SHA256 = make([]byte, 32) }
	}},
	{"the wrong qualifying data", record.TPM, attest.CheckReportData, func(s *scene) {
		s.vm.Send = func(d *evidence.Document) {
			pcrs := map[int][32]byte{}
			for _, p := range d.TPM.PCRs {
				pcrs[p.Index] = [32]byte(p.SHA256)
			}
			d.TPM = s.vm.TPM.Quote(pcrs, make([]byte, 32), d.TPM.Log)
		}
	}},
	{"another image", record.TPM, attest.CheckPCR4, func(s *scene) { s.vm.Firmware[1].Data = []byte("imagf"); s.vm.Measure() }},
	{"another boot policy", record.TPM, attest.CheckPCR7, func(s *scene) { s.vm.Firmware[2].Data = []byte("x"); s.vm.Measure() }},
	{"another command line", record.TPM, attest.CheckPCR9, func(s *scene) { s.vm.Firmware[3].Data = []byte("x"); s.vm.Measure() }},
	{"another part of the image", record.TPM, attest.CheckPCR11, func(s *scene) { s.vm.Firmware[5].Data = []byte("x"); s.vm.Measure() }},
	{"a machine of no recorded shape, where the policy names one", record.TPM, attest.CheckPCR1, func(s *scene) {
		s.client.Policy.Shapes = []string{"small"}
		s.vm.Firmware = append(s.vm.Firmware, attesttest.Measured{Register: 1, Data: []byte("ACPI tables with more vCPUs")})
		s.vm.Measure()
	}},
	{"a recorded shape that the policy does not name, on a TPM", record.TPM, attest.CheckPCR1, func(s *scene) { s.client.Policy.Shapes = []string{"medium"} }},
	{"a recorded shape that the policy does not name", record.TDX, attest.CheckRTMR0, func(s *scene) { s.client.Policy.Shapes = []string{"medium"} }},
	{"the named shape of another image's record", record.TPM, attest.CheckPCR1, func(s *scene) {
		s.client.Policy.Shapes = []string{"small"}
		s.vm.Firmware = append(s.vm.Firmware, attesttest.Measured{Register: 1, Data: []byte("another machine")})
		s.vm.Measure()
		other := s.vm.Record()
		flipped := other.Image.PCRs[0].SHA256
		flipped[0] ^= 1
		key := other.Image.Key()
		other.Shapes[0].Image = key[:]
		s.client.Records = append(s.client.Records, other)
	}},
	{"an addon", record.TPM, attest.CheckUnused, func(s *scene) {
		s.vm.Firmware = append(s.vm.Firmware, attesttest.Measured{Register: 12, Data: []byte("addon")})
		s.vm.Measure()
	}},
	{"a credential", record.TPM, attest.CheckUnused, func(s *scene) {
		s.vm.Firmware = append(s.vm.Firmware, attesttest.Measured{Register: 13, Data: []byte("credential")})
		s.vm.Measure()
	}},
	{"a TPM's firmware log that does not replay", record.TPM, attest.CheckFirmwareLog, func(s *scene) { s.vm.Firmware[0].Data = []byte("x") }},
	{"a TPM's event log with two swapped", record.TPM, attest.CheckPCR15, func(s *scene) {
		s.keep()
		swap(s.vm.Events, 1, 2)
	}},
	{"a model that no record approves, on a TPM", record.TPM, attest.CheckModel, func(s *scene) {
		s.vm.Manifest.Models[0].Revision = "2"
		s.vm.Boot()
	}},

	{"evidence that is no JSON", record.TDX, attest.CheckEvidence, func(s *scene) {
		s.server.Evidence = func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "trust me") }
	}},
	{"evidence with a field twice", record.TDX, attest.CheckEvidence, func(s *scene) {
		s.server.Evidence = func(w http.ResponseWriter, r *http.Request) {
			w.Write(bytes.Replace(s.vm.Evidence(asked(r)), []byte(`{"cel"`), []byte(`{"cel":"AA","cel"`), 1))
		}
	}},
	{"evidence of a TD and a TPM", record.TDX, attest.CheckEvidence, func(s *scene) {
		s.server.Evidence = func(w http.ResponseWriter, r *http.Request) {
			w.Write(bytes.Replace(s.vm.Evidence(asked(r)), []byte(`,"version"`), []byte(`,"tpm":{"ak":"","certificates":[],"log":"","pcrs":[],"quote":"","signature":""},"version"`), 1))
		}
	}},
}

// recollect gives the client what Intel says now.
func (s *scene) recollect() { s.client.Collateral = s.vm.Intel.Collateral() }

// keep fixes RTMR3, PCR 15 and MRCONFIGID at what is right, so that a lie about
// what they are made of shows.
func (s *scene) keep() {
	encoded, err := s.vm.Manifest.Encode()
	if err != nil {
		panic(err)
	}
	s.vm.TD.MRConfigID = sha512.Sum384(encoded)
	s.vm.PCRs[15], s.vm.TD.RTMR[3] = cel.Replay(s.vm.Events)
	s.vm.KeepRegisters = true
}

func hash(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }

// asked is the nonce of a request.
func asked(r *http.Request) []byte {
	var b evidence.Bytes
	if err := b.UnmarshalText([]byte(r.URL.Query().Get("nonce"))); err != nil {
		panic(err)
	}
	return b
}

func TestAttacks(t *testing.T) {
	for _, tt := range attacks {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, tt.platform)
			tt.lie(s)
			err := s.ask()
			refused, ok := errors.AsType[*attest.RefusedError](err)
			if !ok {
				t.Fatalf("not refused: %v", err)
			}
			if v := refused.Verdict; v.Failed != tt.check || v.OK || v.Confidential {
				t.Errorf("refused by %q, expected %q: %v", v.Failed, tt.check, err)
			}
			s.nothingSent(t)
		})
	}
}

// nothingSent proves it at the socket: of what was decrypted, all is one request
// for evidence, and nothing follows it.
func (s *scene) nothingSent(t *testing.T) {
	t.Helper()
	got := s.server.Received()
	if strings.Contains(got, prompt) || strings.Contains(got, "/v1/") || !strings.HasPrefix(got, "GET "+evidence.Path+"?nonce=") || strings.Count(got, "\r\n\r\n") != 1 || !strings.HasSuffix(got, "\r\n\r\n") {
		t.Errorf("sent: %q", got)
	}
}

// TestHostileAnswers has a row for each way to answer that is not evidence.
func TestHostileAnswers(t *testing.T) {
	hijack := func(f func(w io.Writer)) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				panic(err)
			}
			defer conn.Close()
			f(conn)
		}
	}
	endless := func(w io.Writer, chunk string) {
		for {
			if _, err := io.WriteString(w, chunk); err != nil {
				return
			}
		}
	}
	for _, tt := range []struct {
		name   string
		answer func(w http.ResponseWriter, r *http.Request)
		says   string
	}{
		{"1 GB", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1073741824")
			endless(w, strings.Repeat("x", 1<<16))
		}, "more than"},
		{"endless", func(w http.ResponseWriter, _ *http.Request) { endless(w, strings.Repeat("x", 1<<16)) }, "more than"},
		{"endless headers", hijack(func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\n")
			endless(w, strings.Repeat("X: y\r\n", 1<<10))
		}), "more than"},
		{"an endless header", hijack(func(w io.Writer) { io.WriteString(w, "HTTP/1.1 200 OK\r\nX: "); endless(w, strings.Repeat("y", 1<<13)) }), "more than"},
		{"one byte a second", hijack(func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
			for range 100 {
				if _, err := io.WriteString(w, "x"); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}), "in time"},
		{"nothing", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "in time"},
		{"an error", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, "answered 503"},
		{"elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/other", http.StatusTemporaryRedirect)
		}, "answered 307"},
		{"a connection that closes", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			io.WriteString(w, "{}")
		}, "keep the connection"},
		{"an answer before the question", hijack(func(w io.Writer) {
			io.WriteString(w, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
		}), "keep the connection"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, record.TDX)
			s.client.Timeout = time.Minute
			if tt.says == "in time" {
				s.client.Timeout = time.Second
			}
			s.server.Evidence = tt.answer
			err := s.ask()
			for err != nil && !strings.Contains(err.Error(), tt.says) && s.client.Timeout < 8*time.Second {
				s.client.Timeout *= 2 // the handshake took all of it
				err = s.ask()
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v does not say %q", err, tt.says)
			}
			s.nothingSent(t)
		})
	}
}

func TestNotHTTPS(t *testing.T) {
	s := newScene(t, record.TDX)
	s.server.URL = strings.Replace(s.server.URL, "https", "http", 1)
	if err := s.ask(); err == nil || !strings.Contains(err.Error(), "https") {
		t.Error(err)
	}
	if s.server.Received() != "" {
		t.Error("something was sent")
	}
}

// TestChangedKey is a worker that passes and then is another.
func TestChangedKey(t *testing.T) {
	s := newScene(t, record.TDX)
	if err := s.ask(); err != nil {
		t.Fatal(err)
	}
	s.client.CloseIdleConnections()
	before := len(s.server.Received())
	other := *s.vm
	other.NewKey()
	s.server.Replace(&other) // the new key on the next connection …
	real := s.vm
	s.server.Evidence = func(w http.ResponseWriter, r *http.Request) { w.Write(real.Evidence(asked(r))) } // … with the old one's evidence
	refused, ok := errors.AsType[*attest.RefusedError](s.ask())
	if !ok || refused.Verdict.Failed != attest.CheckTLSKey {
		t.Errorf("%v", refused)
	}
	if sent := s.server.Received()[before:]; strings.Contains(sent, prompt) || strings.Contains(sent, "/v1/") {
		t.Errorf("sent: %q", sent)
	}
	s.server.Evidence = nil // an honest replacement: its own evidence
	if err := s.ask(); err != nil {
		t.Error(err)
	}
}

// TestAge checks when evidence is asked for, and when not.
func TestAge(t *testing.T) {
	s := newScene(t, record.TDX)
	now := time.Now()
	s.client.SetClock(func() time.Time { return now })
	counts := func(evidence, connections int) {
		t.Helper()
		if err := s.ask(); err != nil {
			t.Fatal(err)
		}
		if e, c := s.server.Counts(); e != evidence || c != connections {
			t.Fatalf("evidence was fetched %d times over %d connections, expected %d and %d", e, c, evidence, connections)
		}
	}
	counts(1, 1)
	counts(1, 1) // warm
	s.client.CloseIdleConnections()
	counts(1, 2) // a new connection to a key that was just verified
	now = now.Add(attest.DefaultMaxAge - time.Second)
	counts(1, 2)
	now = now.Add(2 * time.Second)
	counts(2, 3) // too old: the warm connection is not used
	now = now.Add(attest.DefaultMaxAge - time.Second)
	if _, err := s.client.Attest(context.Background(), s.server.URL); err != nil {
		t.Fatal(err)
	}
	now = now.Add(5 * time.Second)
	counts(3, 4) // verified in the background: the warm connection goes on
	now = now.Add(attest.DefaultMaxAge)
	s.vm.TD.Attributes |= 1
	if _, ok := errors.AsType[*attest.RefusedError](s.ask()); !ok {
		t.Error("a VM that became debuggable is not refused")
	}
}

// TestInFlight checks that a request in flight lives through its VM's refusal.
func TestInFlight(t *testing.T) {
	s := newScene(t, record.TDX)
	begun, end := make(chan bool), make(chan bool)
	s.server.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "first ")
		http.NewResponseController(w).Flush()
		begun <- true
		<-end
		io.WriteString(w, "last")
	})
	done := make(chan string)
	go func() {
		answer, err := (&http.Client{Transport: s.client}).Get(s.server.URL + "/v1/x")
		if err != nil {
			done <- err.Error()
			return
		}
		body, err := io.ReadAll(answer.Body)
		done <- fmt.Sprint(string(body), err)
	}()
	<-begun
	if _, err := s.client.Attest(context.Background(), s.server.URL); err != nil {
		t.Error(err)
	}
	s.vm.TD.Attributes |= 1
	if _, err := s.client.Attest(context.Background(), s.server.URL); err == nil {
		t.Error("not refused")
	}
	close(end)
	if got := <-done; got != "first last<nil>" {
		t.Errorf("%q", got)
	}
	if err := s.ask(); err == nil {
		t.Error("a request after the refusal is sent")
	}
}

// TestNoDelay sends a request while the VM's evidence is being fetched again, and
// does not come.
func TestNoDelay(t *testing.T) {
	s := newScene(t, record.TDX)
	s.client.Timeout = time.Minute
	if err := s.ask(); err != nil {
		t.Fatal(err)
	}
	begun, end := make(chan bool), make(chan bool)
	s.server.Evidence = func(w http.ResponseWriter, r *http.Request) {
		begun <- true
		<-end
		w.Write(s.vm.Evidence(asked(r)))
	}
	done := make(chan error)
	go func() {
		_, err := s.client.Attest(context.Background(), s.server.URL)
		done <- err
	}()
	<-begun
	if err := s.ask(); err != nil { // over the warm connection
		t.Error(err)
	}
	s.client.CloseIdleConnections()
	if err := s.ask(); err != nil { // over a new one, to a key that is verified
		t.Error(err)
	}
	close(end)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
