package attest_test

import (
	"testing"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// longLog is a VM whose firmware's log is as long as a real one's: some 80 events,
// 40 KB.
func longLog(platform record.Platform) *attesttest.VM {
	vm := attesttest.NewVM(platform)
	for range 80 {
		vm.Firmware = append(vm.Firmware, attesttest.Measured{Register: 1, Data: make([]byte, 500)})
	}
	vm.Measure()
	return vm
}

// BenchmarkVerify is one verification with collateral at hand, on one core.
func BenchmarkVerify(b *testing.B) {
	for _, platform := range []record.Platform{record.TDX, record.TPM} {
		b.Run(string(platform), func(b *testing.B) {
			vm := longLog(platform)
			n := nonce()
			document := vm.Evidence(n)
			in := attest.Input{Policy: vm.Policy(), Records: []*record.File{vm.Record()}, Nonce: n, TLSKey: vm.SPKI}
			if vm.Intel != nil {
				in.Collateral = vm.Intel.Collateral()
			}
			b.SetBytes(int64(len(document)))
			b.ReportAllocs()
			for b.Loop() {
				if v := attest.Verify(b.Context(), document, in); !v.OK {
					b.Fatal(v.First())
				}
			}
		})
	}
}

// BenchmarkSteps is what the steps of a TDX verification take on their own.
func BenchmarkSteps(b *testing.B) {
	vm := longLog(record.TDX)
	n := nonce()
	document := vm.Evidence(n)
	d, err := evidence.Parse(document)
	if err != nil {
		b.Fatal(err)
	}
	collateral, policy := vm.Intel.Collateral(), vm.Policy()
	for name, step := range map[string]func() error{
		"parse":        func() error { _, err := evidence.Parse(document); return err },
		"quote":        func() error { return attest.StepQuote(d.TDX.Quote, policy) },
		"collateral":   func() error { return attest.StepCollateral(d.TDX.Quote, collateral, policy) },
		"firmware-log": func() error { _, _, err := attest.Replay(d.TDX.CCEL, 0x0c); return err },
		"event-log":    func() error { _, events, err := cel.Parse(d.CEL); cel.Replay(events); return err },
		"manifest":     func() error { _, err := manifest.Parse(d.Manifest); return err },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := step(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
