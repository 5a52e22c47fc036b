// Package nvidia verifies what NVIDIA GPUs in confidential-computing mode prove of
// themselves: that a report was signed, over the verifier's own nonce, by a GPU
// whose certificates lead to NVIDIA's root, and that its firmware and driver
// measure as NVIDIA says that they must.
//
// A client does this itself, from the report and from collateral that anybody may
// carry: reference integrity manifests (RIMs) and OCSP responses, which NVIDIA
// signs. No service is asked. The guest does the same before it lets a GPU work,
// without the parts that need a clock, because it has none that it trusts.
//
// Hopper (H100, H200) is supported. Blackwell's evidence has the same form; what
// differs in public (the driver RIM's name, and two more fields of the report) is
// read, and has been tested on evidence of the tests' own only. Reports of NVSwitches are not verified: a set
// of GPUs that needs them is refused unless the policy says otherwise.
package nvidia

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ocsp"
)

// Check is the name of one thing that Verify checks.
type Check string

// The checks, in the order in which Verify makes them.
const (
	CheckEvidence     Check = "gpu-evidence"     // the document is well-formed
	CheckCount        Check = "gpu-count"        // as many GPUs as expected
	CheckModel        Check = "gpu-model"        // each of an allowed model
	CheckMode         Check = "gpu-mode"         // confidential computing is on, for the whole set
	CheckDevTools     Check = "gpu-devtools"     // and not in its debugging mode
	CheckReport       Check = "gpu-report"       // the report is well-formed
	CheckNonce        Check = "gpu-nonce"        // and answers this verifier
	CheckChain        Check = "gpu-chain"        // certificates from the GPU to NVIDIA's root
	CheckSignature    Check = "gpu-signature"    // the report's
	CheckFirmware     Check = "gpu-firmware"     // the key belongs to the firmware that reports
	CheckRevocation   Check = "gpu-revocation"   // NVIDIA has not revoked the GPU
	CheckDuplicate    Check = "gpu-duplicate"    // each GPU is there once
	CheckDriverRIM    Check = "gpu-driver-rim"   // a valid RIM for this driver
	CheckVBIOSRIM     Check = "gpu-vbios-rim"    // a valid RIM for this VBIOS
	CheckMeasurements Check = "gpu-measurements" // as the RIMs say
	CheckIdentity     Check = "gpu-identity"     // the GPUs that the VM recorded when it booted
)

// Checks lists all checks in their order.
var Checks = []Check{
	CheckEvidence, CheckCount, CheckModel, CheckMode, CheckDevTools, CheckReport, CheckNonce, CheckChain,
	CheckSignature, CheckFirmware, CheckRevocation, CheckDuplicate, CheckDriverRIM, CheckVBIOSRIM,
	CheckMeasurements, CheckIdentity,
}

// Refusal is why evidence was not accepted.
type Refusal struct {
	Check Check
	GPU   int // which one, from 0; -1 when it is about the set
	Err   error
}

// Error implements error.
func (r *Refusal) Error() string {
	if r.GPU < 0 {
		return fmt.Sprintf("%s: %v", r.Check, r.Err)
	}
	return fmt.Sprintf("%s: GPU %d: %v", r.Check, r.GPU, r.Err)
}

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Err }

// MissingError is why evidence could not be judged with the collateral at hand:
// there is none for a driver, a VBIOS or a certificate, or it is too old. With
// other collateral the same evidence may be accepted.
type MissingError struct{ Err error }

// Error implements error.
func (m *MissingError) Error() string { return m.Err.Error() }

// Unwrap returns the cause.
func (m *MissingError) Unwrap() error { return m.Err }

// Hopper are the GPUs that this package was written for, as NVML names them.
var Hopper = []string{
	"NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA H200 NVL",
}

// Policy says what Verify accepts. What is not set is as strict as it can be.
type Policy struct {
	Nonce  [NonceSize]byte // that the reports must answer
	GPUs   int             // exactly how many, 1 to MaxGPUs
	Models []string        // the allowed ones, as NVML names them; none allows none

	MinDriver string // the oldest driver allowed, like 550.90.07; empty allows all

	// Time is now. A verifier without a trusted clock, which is the guest, sets
	// NoClock instead: then neither validity nor revocation is checked.
	Time    time.Time
	NoClock bool

	// MaxOCSPAge is how old an OCSP response may be. NVIDIA's name a day until the
	// next, which a verifier that is offline cannot keep.
	MaxOCSPAge time.Duration

	// Identities are the recorded ones, in order, as Identity.Encode writes them.
	// With nil they are not compared: the guest makes them from this result.
	Identities [][]byte

	// Relaxations. Each takes something away.
	AllowNoOCSP           bool // GPUs and RIMs without an answer on revocation
	AllowUnattestedSwitch bool // protected PCIe, whose NVSwitches nobody verifies
}

// Result is what Verify found.
type Result struct {
	GPUs []Verified
}

// Verified is one accepted GPU.
type Verified struct {
	Identity Identity
	// Compared counts the measurements that were compared, and Skipped lists the
	// indices that a RIM has and that do not apply to this GPU.
	Compared int
	Skipped  []int
}

// Verifier holds roots and collateral and remembers what it has verified. It may
// be used by several goroutines, but not while AddCollateral runs.
type Verifier struct {
	deviceRoots, rimRoots [][32]byte

	links links
	rims  map[string][]*RIM           // by product and version
	ocsp  map[string][]*ocsp.Response // by the certificate's serial number
}

// Roots are the SHA-256 of the root certificates that a verifier trusts.
type Roots struct {
	Device [][32]byte
	RIM    [][32]byte
}

// NVIDIARoots are NVIDIA's own, the only ones that mean anything outside tests.
func NVIDIARoots() Roots { return Roots{Device: [][32]byte{DeviceRoot}, RIM: [][32]byte{RIMRoot}} }

// NewVerifier returns a verifier without collateral.
func NewVerifier(roots Roots) *Verifier {
	return &Verifier{deviceRoots: roots.Device, rimRoots: roots.RIM, rims: map[string][]*RIM{}, ocsp: map[string][]*ocsp.Response{}}
}

// AddCollateral verifies the signatures of collateral and keeps it. It refuses
// all of it when one part does not verify, and says which.
func (v *Verifier) AddCollateral(c *Collateral) error {
	if err := c.Validate(); err != nil {
		return fmt.Errorf("GPU collateral: %w", err)
	}
	rims := make([]*RIM, len(c.RIMs))
	answers := make([]*ocsp.Response, len(c.OCSP))
	err := parallel(len(c.RIMs)+len(c.OCSP), func(i int) (err error) {
		if i < len(rims) {
			if rims[i], err = parseRIM(c.RIMs[i], v.rimRoots, &v.links); err != nil {
				return fmt.Errorf("GPU collateral: RIM %d: %w", i, err)
			}
			return nil
		}
		i -= len(rims)
		if answers[i], err = parseOCSP(c.OCSP[i]); err != nil {
			return fmt.Errorf("GPU collateral: OCSP response %d: %w", i, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range rims {
		v.rims[r.Product+" "+r.Version] = append(v.rims[r.Product+" "+r.Version], r)
	}
	for _, r := range answers {
		v.ocsp[r.SerialNumber.String()] = append(v.ocsp[r.SerialNumber.String()], r)
	}
	return nil
}

// Verify checks GPU evidence under a policy. Its error is a *Refusal that names
// the first check, in the order of Checks, that any GPU fails: those before it hold
// for all of them.
func (v *Verifier) Verify(data []byte, p Policy) (*Result, error) {
	set := func(c Check, err error) (*Result, error) { return nil, &Refusal{Check: c, GPU: -1, Err: err} }
	if p.NoClock != p.Time.IsZero() {
		return set(CheckEvidence, errors.New("the policy must have either a time or none"))
	}
	e, err := ParseEvidence(data)
	if err != nil {
		return set(CheckEvidence, err)
	}
	if len(e.GPUs) != p.GPUs {
		return set(CheckCount, fmt.Errorf("evidence of %d GPUs, expected %d", len(e.GPUs), p.GPUs))
	}
	if r := checkStates(e, &p); r != nil {
		return nil, r
	}
	out := &Result{GPUs: make([]Verified, len(e.GPUs))}
	refusals := make([]*Refusal, len(e.GPUs))
	err = parallel(len(e.GPUs), func(i int) error {
		if check, err := v.verifyGPU(&e.GPUs[i], &p, &out.GPUs[i]); err != nil {
			refusals[i] = &Refusal{Check: check, GPU: i, Err: err}
		}
		return nil
	})
	if err != nil {
		return set(CheckEvidence, err)
	}
	if r := first(append(refusals, duplicate(e))); r != nil {
		return nil, r
	}
	if p.Identities != nil {
		if err := checkIdentities(out, p.Identities); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// first returns the refusal whose check comes first, of the lowest GPU.
func first(refusals []*Refusal) (out *Refusal) {
	for _, r := range refusals {
		if r != nil && (out == nil || slices.Index(Checks, r.Check) < slices.Index(Checks, out.Check)) {
			out = r
		}
	}
	return out
}

// duplicate refuses a GPU that stands in for two: the certificate above the leaf is
// the device's own.
func duplicate(e *Evidence) *Refusal {
	for i, g := range e.GPUs {
		for j, other := range e.GPUs[:i] {
			if bytes.Equal(other.Certificates[1], g.Certificates[1]) {
				return &Refusal{Check: CheckDuplicate, GPU: i, Err: fmt.Errorf("is the same device as GPU %d", j)}
			}
		}
	}
	return nil
}

// checkStates checks what the agent says, over all GPUs, before any report.
func checkStates(e *Evidence, p *Policy) *Refusal {
	for i, g := range e.GPUs {
		if !slices.Contains(p.Models, g.Model) {
			return &Refusal{CheckModel, i, fmt.Errorf("%q is not an allowed model: %s", g.Model, cmp.Or(strings.Join(p.Models, ", "), "the policy allows none"))}
		}
	}
	for i, g := range e.GPUs {
		protected := g.State.MultiGPU == MultiGPUProtectedPCIe
		switch {
		case g.State.MultiGPU != e.GPUs[0].State.MultiGPU || g.State.CC != e.GPUs[0].State.CC:
			return &Refusal{CheckMode, i, errors.New("is in another mode than GPU 0")}
		case protected && !p.AllowUnattestedSwitch:
			return &Refusal{CheckMode, i, errors.New("protected PCIe depends on NVSwitches, which are not verified; the policy does not allow that")}
		case !g.State.CC && !protected:
			return &Refusal{CheckMode, i, errors.New("confidential computing is off")}
		}
	}
	for i, g := range e.GPUs {
		if g.State.DevTools {
			return &Refusal{CheckDevTools, i, errors.New("is in devtools mode, in which its memory can be read")}
		}
	}
	return nil
}

func (v *Verifier) verifyGPU(g *GPU, p *Policy, out *Verified) (Check, error) {
	r, err := ParseReport(g.Report)
	if err != nil {
		return CheckReport, err
	}
	if mode := r.MultiGPU(); mode != g.State.MultiGPU {
		return CheckMode, fmt.Errorf("the GPU's report says %q and its state %q: they contradict each other", mode, g.State.MultiGPU)
	}
	if r.Nonce != p.Nonce {
		return CheckNonce, fmt.Errorf("the report answers the nonce %x, not %x", r.Nonce, p.Nonce)
	}
	chain, err := v.links.verifyChain(chainBytes(g.Certificates), v.deviceRoots)
	if err == nil && !p.NoClock {
		err = checkValidity(chain, p.Time)
	}
	var chipName string
	if err == nil {
		chipName, err = chip(chain)
	}
	if err != nil {
		return CheckChain, err
	}
	if err := verifySignature(chain[0], r.signed, r.signature); err != nil {
		return CheckSignature, err
	}
	if err := checkFirmware(chain, r); err != nil {
		return CheckFirmware, err
	}
	if !p.NoClock {
		// The leaf was made by the device: NVIDIA answers for those above it.
		if err := v.checkRevocation(chain[1:], p.Time, p); err != nil {
			return CheckRevocation, err
		}
	}
	if err := v.measure(chipName, r, p, out); err != nil {
		return err.Check, err.Err
	}
	out.Identity = identity(g, r, chipName)
	return "", nil
}

// checkFirmware compares the firmware that the certificate names with the one
// that the report names.
func checkFirmware(chain []*x509.Certificate, r *Report) error {
	id, err := firmwareID(chain[0], chain[1])
	if err != nil {
		return err
	}
	if reported := r.Opaque[FieldFWID]; !bytes.Equal(id, reported) {
		return fmt.Errorf("the key's certificate is for the firmware %x and the report is of %x", id, reported)
	}
	return nil
}

// measure compares a report with the RIMs for its driver and its VBIOS.
func (v *Verifier) measure(chipName string, r *Report, p *Policy, out *Verified) *Refusal {
	if !atLeast(r.Driver, p.MinDriver) {
		return &Refusal{Check: CheckDriverRIM, Err: fmt.Errorf("the driver %s is older than the policy's minimum, %s", r.Driver, p.MinDriver)}
	}
	driver, err := v.usable(driverKey(chipName, r), "driver", p)
	if err != nil {
		return &Refusal{Check: CheckDriverRIM, Err: err}
	}
	vbios, err := v.usable(vbiosKey(chipName, r), "VBIOS", p)
	if err != nil {
		return &Refusal{Check: CheckVBIOSRIM, Err: err}
	}
	// There can be several, of boards that share a version: one must fit whole.
	for _, d := range driver {
		for _, b := range vbios {
			if err = compare(r, d, b, out); err == nil {
				return nil
			}
		}
	}
	return &Refusal{Check: CheckMeasurements, Err: err}
}

// driverKey and vbiosKey are what RIMs are found by: product and version. A
// driver's RIM is for the chip that the report names, where it does.
func driverKey(chipName string, r *Report) string { return cmp.Or(r.Chip, chipName) + " " + r.Driver }
func vbiosKey(chipName string, r *Report) string  { return chipName + " " + r.VBIOS }

// usable returns the RIMs for a version that are valid now.
func (v *Verifier) usable(key, what string, p *Policy) ([]*RIM, error) {
	var out []*RIM
	var problem error
	for _, rim := range v.rims[key] {
		if !p.NoClock {
			if err := checkValidity(rim.chain, p.Time); err != nil {
				problem = &MissingError{err}
				continue
			}
			if err := v.checkRevocation(rim.chain, p.Time, p); err != nil {
				problem = err
				continue
			}
		}
		out = append(out, rim)
	}
	if len(out) > 0 {
		return out, nil
	}
	chipName, version, _ := strings.Cut(key, " ")
	if problem != nil {
		return nil, fmt.Errorf("the RIM for %s %s of %s cannot be used: %w", what, version, chipName, problem)
	}
	return nil, &MissingError{fmt.Errorf("there is no RIM for %s %s of %s; there are those for %s; fetch it with 'chrysalis gpu collateral'",
		what, version, chipName, cmp.Or(strings.Join(slices.Sorted(maps.Keys(v.rims)), ", "), "none"))}
}

// atLeast compares two driver versions number by number.
func atLeast(version, minimum string) bool {
	if minimum == "" {
		return true
	}
	number := func(parts []string, i int) int {
		if i >= len(parts) {
			return 0
		}
		n, _ := strconv.Atoi(parts[i]) // driverRE: digits
		return n
	}
	a, b := strings.Split(version, "."), strings.Split(minimum, ".")
	for i := range max(len(a), len(b)) {
		if d := cmp.Compare(number(a, i), number(b, i)); d != 0 {
			return d > 0
		}
	}
	return true
}

// IsDriverVersion reports whether a text is a driver's version, like 550.90.07.
func IsDriverVersion(s string) bool { return driverRE.MatchString(s) }

// nvdec0Index is measured only while the first video decoder is on.
const nvdec0Index = 35

// compare compares every measurement that either RIM knows, and lists all that
// differ. An index that both know is an error: they would have to agree on it,
// and NVIDIA's never share one.
func compare(r *Report, driver, vbios *RIM, out *Verified) error {
	golden := map[int][][]byte{}
	for index, values := range vbios.Golden {
		golden[index] = values
	}
	for index, values := range driver.Golden {
		if _, twice := golden[index]; twice {
			return fmt.Errorf("the RIMs of driver and VBIOS both have a measurement %d", index)
		}
		golden[index] = values
	}
	*out = Verified{}
	var wrong []string
	for _, index := range slices.Sorted(maps.Keys(golden)) {
		switch {
		case index == nvdec0Index && r.nvdec0Disabled():
			out.Skipped = append(out.Skipped, index)
		case index >= len(r.Measurements):
			wrong = append(wrong, fmt.Sprintf("%d (missing)", index))
		case !slices.ContainsFunc(golden[index], func(v []byte) bool { return bytes.Equal(v, r.Measurements[index]) }):
			wrong = append(wrong, fmt.Sprintf("%d (%s…)", index, hex.EncodeToString(r.Measurements[index][:8])))
		default:
			out.Compared++
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%d of %d measurements differ from NVIDIA's for driver %s and VBIOS %s: index %s",
			len(wrong), len(golden), r.Driver, r.VBIOS, strings.Join(wrong, ", "))
	}
	return nil
}

func checkIdentities(out *Result, recorded [][]byte) error {
	if len(recorded) != len(out.GPUs) {
		return &Refusal{CheckIdentity, -1, fmt.Errorf("the VM recorded %d GPUs when it booted, the evidence is of %d", len(recorded), len(out.GPUs))}
	}
	for i, g := range out.GPUs {
		data, err := g.Identity.Encode()
		if err != nil {
			return &Refusal{CheckIdentity, i, err}
		}
		if !bytes.Equal(data, recorded[i]) {
			return &Refusal{CheckIdentity, i, fmt.Errorf("is not the one that the VM recorded when it booted: %s and not %.512q", data, recorded[i])}
		}
	}
	return nil
}

// parallel calls f for 0 to n-1 on all processors and returns the error of the
// lowest index. A panic, which hostile input may cause in a parser that is not ours,
// is an error: nobody above could catch it.
func parallel(n int, f func(int) error) error {
	errs := make([]error, n)
	contained := func(i int) {
		defer func() {
			if p := recover(); p != nil {
				errs[i] = fmt.Errorf("part %d is malformed in a way that the parser does not expect", i)
			}
		}()
		errs[i] = f(i)
	}
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	var group sync.WaitGroup
	for i := range n {
		if n == 1 {
			contained(i)
			break
		}
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			contained(i)
		})
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
