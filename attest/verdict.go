package attest

import (
	"bytes"
	"fmt"
	"time"

	"chrysalis/attest/nvidia"
	"chrysalis/measure/record"
)

// Status is how a check ended.
type Status string

// The ways in which a check ends.
const (
	Passed    Status = "passed"
	Failed    Status = "failed"    // the evidence is refused
	Unchecked Status = "unchecked" // something that the check needs could not be had
	NotRun    Status = "not-run"   // a check before it makes it meaningless
)

// Mark is one character for people.
func (s Status) Mark() string {
	switch s {
	case Passed:
		return "✔"
	case Failed:
		return "✘"
	case Unchecked:
		return "?"
	}
	return "·"
}

// Name is the name of a check. Names are stable.
type Name string

// The checks, in the order in which they are made. A TD's evidence and a TPM's
// differ in the middle.
const (
	CheckEvidence Name = "evidence"
	CheckPlatform Name = "platform"
	CheckTLSKey   Name = "tls-key"
	CheckNonce    Name = "nonce"
	CheckQuote    Name = "quote"

	CheckTCB        Name = "tcb-status"
	CheckAttributes Name = "td-attributes"
	CheckXFAM       Name = "xfam"
	CheckModule     Name = "tdx-module"
	CheckOwner      Name = "td-owner"

	CheckReportData Name = "report-data"

	CheckMRTD  Name = "mrtd"
	CheckRTMR0 Name = "rtmr0"
	CheckRTMR1 Name = "rtmr1"
	CheckRTMR2 Name = "rtmr2"

	CheckPCR4   Name = "pcr4"
	CheckPCR7   Name = "pcr7"
	CheckPCR9   Name = "pcr9"
	CheckPCR11  Name = "pcr11"
	CheckPCR1   Name = "pcr1"
	CheckUnused Name = "pcr-unused"

	CheckFirmwareLog Name = "firmware-log"
	CheckRTMR3       Name = "rtmr3"
	CheckPCR15       Name = "pcr15"

	CheckManifest Name = "manifest"
	CheckDisks    Name = "disks"
	CheckEngine   Name = "engine"
	CheckModel    Name = "model"
	// CheckGPU is followed by those of package attest/nvidia, under their names, where
	// there are GPUs.
	CheckGPU Name = "gpu"
)

// titles say what holds when a check passes.
var titles = map[Name]string{
	CheckEvidence:    "the evidence is well formed",
	CheckPlatform:    "the policy allows this kind of evidence",
	CheckTLSKey:      "the evidence is of the TLS key of this connection",
	CheckNonce:       "the evidence answers this client's nonce",
	CheckQuote:       "the quote is signed, with a chain to a trusted root",
	CheckTCB:         "the platform's TCB is up to date",
	CheckAttributes:  "the TD is neither debuggable nor migratable",
	CheckXFAM:        "the TD's extended features are allowed ones",
	CheckModule:      "the TDX module is Intel's",
	CheckOwner:       "no service TD and no owner is bound to the TD",
	CheckReportData:  "the quote covers nonce, keys and manifest",
	CheckMRTD:        "the firmware is the recorded one",
	CheckRTMR0:       "the machine is a recorded shape",
	CheckRTMR1:       "the image is the recorded one",
	CheckRTMR2:       "kernel, initrd and command line are the recorded ones",
	CheckPCR4:        "the image is the recorded one",
	CheckPCR7:        "the firmware's boot policy is the recorded one",
	CheckPCR9:        "initrd and command line are the recorded ones",
	CheckPCR11:       "the image's parts are the recorded ones",
	CheckPCR1:        "the machine is one that the policy allows",
	CheckUnused:      "nothing was added to the image",
	CheckFirmwareLog: "the firmware's log is what was measured",
	CheckRTMR3:       "the event log is what was measured",
	CheckPCR15:       "the event log is what was measured",
	CheckManifest:    "the manifest is the one that was measured",
	CheckDisks:       "the disks are those of the manifest",
	CheckEngine:      "the engine is approved",
	CheckModel:       "the model is approved",
	CheckGPU:         "the VM has the GPUs that the manifest asks for",
}

var (
	checksTDX = []Name{CheckEvidence, CheckPlatform, CheckTLSKey, CheckNonce, CheckQuote, CheckTCB, CheckAttributes,
		CheckXFAM, CheckModule, CheckOwner, CheckReportData, CheckMRTD, CheckRTMR0, CheckRTMR1, CheckRTMR2,
		CheckFirmwareLog, CheckRTMR3, CheckManifest, CheckDisks, CheckEngine, CheckModel, CheckGPU}
	checksTPM = []Name{CheckEvidence, CheckPlatform, CheckTLSKey, CheckNonce, CheckQuote, CheckReportData,
		CheckPCR4, CheckPCR7, CheckPCR9, CheckPCR11, CheckPCR1, CheckUnused,
		CheckFirmwareLog, CheckPCR15, CheckManifest, CheckDisks, CheckEngine, CheckModel, CheckGPU}
)

// Check is the result of one check.
type Check struct {
	Name     Name   `json:"name"`
	Title    string `json:"title"` // what holds when it passes
	Subject  string `json:"subject,omitempty"`
	Status   Status `json:"status"`
	Detail   string `json:"detail,omitempty"` // what was seen, or what is wrong
	Expected string `json:"expected,omitempty"`
	Found    string `json:"found,omitempty"`

	// Took is how long the check took; CheckGPU's is that of all checks of GPUs.
	Took time.Duration `json:"-"`
}

// String is one line, without expected and found.
func (c Check) String() string {
	s := string(c.Name)
	if c.Subject != "" {
		s += " " + c.Subject
	}
	if c.Detail == "" {
		return s + ": " + c.Title
	}
	return s + ": " + c.Detail
}

// Verdict is what one document of evidence was found to prove.
type Verdict struct {
	OK bool `json:"ok"` // every check passed
	// Confidential says that the owner of the machine cannot read what the VM is
	// asked. Evidence of a TPM, or under another root than Intel's and NVIDIA's, never
	// proves it, and neither do GPUs in protected PCIe.
	Confidential bool            `json:"confidential"`
	Platform     record.Platform `json:"platform,omitempty"`
	At           time.Time       `json:"at"`
	// Failed is the first check that failed or could not be made.
	Failed Name    `json:"failed,omitempty"`
	Checks []Check `json:"checks"`

	// What the evidence is of, once OK.
	Image      string       `json:"image,omitempty"` // the record's name
	Shape      string       `json:"shape,omitempty"`
	Engine     string       `json:"engine,omitempty"`
	Models     []string     `json:"models,omitempty"` // NAME@REVISION, in the order in which they are served
	Manifest   record.Hex   `json:"manifest,omitempty"`
	TLSKey     record.Hex   `json:"tls_key,omitempty"`     // SHA-256 of the SPKI
	ReceiptKey record.Hex   `json:"receipt_key,omitempty"` // Ed25519
	ModelRoots []record.Hex `json:"model_roots,omitempty"` // root hashes, in Models' order
	GPUs       []GPU        `json:"gpus,omitempty"`        // by PCI address
}

// Refused reports whether a check failed, rather than could not be made.
func (v *Verdict) Refused() bool {
	for _, c := range v.Checks {
		if c.Status == Failed {
			return true
		}
	}
	return false
}

// First returns the first check that failed or could not be made, or nil.
func (v *Verdict) First() *Check {
	for i := range v.Checks {
		if s := v.Checks[i].Status; s == Failed || s == Unchecked {
			return &v.Checks[i]
		}
	}
	return nil
}

// Err is nil for a verdict that is OK, and otherwise a *RefusedError.
func (v *Verdict) Err() error {
	if v.OK {
		return nil
	}
	return &RefusedError{v}
}

// RefusedError says that evidence does not prove what the policy asks for, or
// that this could not be checked. Nothing was sent.
type RefusedError struct{ Verdict *Verdict }

func (e *RefusedError) Error() string {
	c := e.Verdict.First()
	if c == nil {
		return "the evidence is refused"
	}
	if c.Status == Unchecked {
		return "the evidence could not be checked: " + c.String()
	}
	return "the evidence is refused: " + c.String()
}

// outcome is what a check's function returns.
type outcome struct {
	status          Status
	detail          string
	expected, found string
}

func pass(format string, args ...any) outcome {
	return outcome{status: Passed, detail: fmt.Sprintf(format, args...)}
}

func fail(format string, args ...any) outcome {
	return outcome{status: Failed, detail: fmt.Sprintf(format, args...)}
}

func unchecked(format string, args ...any) outcome {
	return outcome{status: Unchecked, detail: fmt.Sprintf(format, args...)}
}

// same compares a measured value with the expected one.
func same(what string, found, expected []byte) outcome {
	if bytes.Equal(found, expected) {
		return pass("")
	}
	return outcome{Failed, what, fmt.Sprintf("%x", expected), fmt.Sprintf("%x", found)}
}

// run makes the checks of a verdict, in order.
type run struct {
	verdict *Verdict
	over    bool // what follows would be about unproven values
}

// check makes a check unless an earlier one makes it meaningless. A panic in it,
// which hostile input may cause in a parser that is not ours, is a failure.
func (r *run) check(name Name, subject string, f func() outcome) bool {
	c := Check{Name: name, Title: titles[name], Subject: subject, Status: NotRun}
	if !r.over {
		begin := time.Now()
		o := contained(f)
		c.Took = time.Since(begin)
		c.Status, c.Detail, c.Expected, c.Found = o.status, o.detail, o.expected, o.found
	}
	r.verdict.Checks = append(r.verdict.Checks, c)
	return c.Status == Passed
}

// must makes a check without which nothing after it says anything.
func (r *run) must(name Name, f func() outcome) {
	if !r.check(name, "", f) {
		r.over = true
	}
}

func contained(f func() outcome) (o outcome) {
	defer func() {
		if p := recover(); p != nil {
			o = fail("it is malformed in a way that the parser does not expect")
		}
	}()
	return f()
}

// finish lists the checks that were not reached, in their place, and sums up.
func (r *run) finish(all []Name) *Verdict {
	v := r.verdict
	var checks []Check
	for _, name := range all {
		found := false
		for _, c := range v.Checks {
			if c.Name == name {
				checks, found = append(checks, c), true
			}
		}
		if !found {
			checks = append(checks, Check{Name: name, Title: titles[name], Status: NotRun})
		}
	}
	for _, c := range v.Checks {
		if gpuTitles[nvidia.Check(c.Name)] != "" { // in their order already, and last
			checks = append(checks, c)
		}
	}
	v.Checks = checks
	v.OK = true
	for _, c := range v.Checks {
		v.OK = v.OK && c.Status == Passed
	}
	if c := v.First(); c != nil {
		v.Failed = c.Name
	}
	if !v.OK {
		v.Confidential = false
	}
	return v
}
