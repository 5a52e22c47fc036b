// Package doctor tells a GPU owner what a machine has of what Chrysalis needs, and
// how to mend what it has not. It only reads.
//
// Each line is a probe of files below a root that the caller gives, or of one of
// the few functions in System for what is no file, so that every state can be
// tested anywhere.
package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"chrysalis/launcher/gpu"
)

// Status is the verdict of a line.
type Status string

// The verdicts.
const (
	OK   Status = "ok"   // ✔
	Bad  Status = "bad"  // ✘: Fix says what to do
	None Status = "none" // –: does not apply here, or is not needed
)

// Mark is how a table shows it.
func (s Status) Mark() string {
	switch s {
	case OK:
		return "✔"
	case Bad:
		return "✘"
	}
	return "–"
}

// Line is what one probe found.
type Line struct {
	Group  string `json:"group"`
	Name   string `json:"name"`
	Status Status `json:"status"`
	Found  string `json:"found"`
	Fix    string `json:"fix,omitempty"` // the exact command or firmware setting; set when Status is Bad
}

// Report is all lines, in the order of a boot: what a later one needs comes
// before it.
type Report struct {
	Lines []Line `json:"lines"`
	// Serves says whether the machine can serve at all, and Confidential whether
	// clients can be sure of it, with and without GPUs.
	Serves          bool `json:"serves"`
	Confidential    bool `json:"confidential"`
	ConfidentialGPU bool `json:"confidential_gpu"`
}

// System is the machine.
type System struct {
	Root string // "/" on a real one

	RunsGuest func() error                              // KVM runs a guest's instructions
	Images    func() (works, fails int)                 // images that KVM was seen to run or not, since the machine booted
	Quotes    func(ctx context.Context) error           // the quote generation service answers
	Reach     func(ctx context.Context, a string) error // HOST:PORT takes connections
	Free      func(path string) (uint64, error)         // bytes free for the user
	ClockSync func() (bool, error)                      // the kernel's clock follows a reference
}

// result is what a probe returns.
type result struct {
	status Status
	found  string
	fix    string
}

func good(format string, args ...any) result { return result{OK, fmt.Sprintf(format, args...), ""} }
func none(format string, args ...any) result { return result{None, fmt.Sprintf(format, args...), ""} }
func bad(fix, format string, args ...any) result {
	return result{Bad, fmt.Sprintf(format, args...), fix}
}

// need is what a probe's ✔ is needed for.
type need int

const (
	toServe need = iota // at all
	forTDX              // to prove anything to clients
	forGPU              // to prove anything about GPUs
	forEase             // for nothing of these: speed, convenience, collateral
)

// probe is one line.
type probe struct {
	group, name string
	need        need
	run         func(*machine) result
}

// probes is the table, top to bottom.
var probes = []probe{
	{"processor", "TDX", forTDX, (*machine).processor},
	{"processor", "firmware settings", forTDX, (*machine).firmware},
	{"processor", "SGX", forTDX, (*machine).sgx},
	{"kernel", "version", forTDX, (*machine).kernel},
	{"kernel", "command line", forTDX, (*machine).commandLine},
	{"kernel", "KVM with TDX", forTDX, (*machine).kvmTDX},
	{"kernel", "KVM runs a guest", forEase, (*machine).kvm},
	{"kernel", "vhost-vsock", forTDX, (*machine).vhostVsock},
	{"kernel", "IOMMU", forGPU, (*machine).iommu},
	{"kernel", "vfio and iommufd", forGPU, (*machine).vfio},
	{"machine", "memory", toServe, (*machine).memory},
	{"machine", "hugepages", forEase, (*machine).hugepages},
	{"machine", "disk space", toServe, (*machine).disk},
	{"machine", "clock", forEase, (*machine).clock},
	{"machine", "sandbox", toServe, (*machine).sandbox},
	{"machine", "port 8443", forEase, (*machine).port},
	{"quotes", "generation service", forTDX, (*machine).quotes},
	{"quotes", "platform registered", forTDX, (*machine).registered},
	{"quotes", "PCK certificates", forTDX, (*machine).pck},
	{"GPU", "model", forGPU, (*machine).gpuModel},
	{"GPU", "VBIOS", forEase, (*machine).gpuVBIOS},
	{"GPU", "confidential mode", forGPU, (*machine).gpuMode},
	{"GPU", "BAR sizes", forGPU, (*machine).gpuBARs},
	{"GPU", "driver", forGPU, (*machine).gpuDriver},
	{"network", "Intel's collateral", forEase, reach("api.trustedservices.intel.com:443")},
	{"network", "NVIDIA's RIMs", forEase, reach("rim.attestation.nvidia.com:443")},
	{"network", "NVIDIA's OCSP", forEase, reach("ocsp.ndis.nvidia.com:80")},
	{"network", "TON liteservers", forEase, reach("ton.org:443")},
}

// machine is what probes ask.
type machine struct {
	System
	ctx     context.Context
	gpus    []gpu.GPU
	gpusErr error
}

// probeTime bounds what is asked of something that may not answer.
const probeTime = 4 * time.Second

// Examine runs all probes.
func Examine(ctx context.Context, s System) *Report {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	m := &machine{System: s, ctx: ctx}
	m.gpus, m.gpusErr = (&gpu.Host{Root: s.Root}).List()
	report := &Report{Lines: make([]Line, len(probes)), Serves: true, Confidential: true, ConfidentialGPU: true}
	results := make([]result, len(probes))
	var group sync.WaitGroup
	for i, p := range probes {
		group.Go(func() { results[i] = p.run(m) })
	}
	group.Wait()
	for i, p := range probes {
		r := results[i]
		report.Lines[i] = Line{p.group, p.name, r.status, r.found, r.fix}
		switch p.need {
		case toServe:
			report.Serves = report.Serves && r.status != Bad
		case forTDX:
			report.Confidential = report.Confidential && r.status == OK
		case forGPU:
			report.ConfidentialGPU = report.ConfidentialGPU && r.status == OK
		}
	}
	report.Confidential = report.Confidential && report.Serves
	report.ConfidentialGPU = report.ConfidentialGPU && report.Confidential && len(m.gpus) > 0
	return report
}

func (m *machine) path(p string) string { return filepath.Join(m.Root, p) }

// read returns a small file's text, or "".
func (m *machine) read(p string) string {
	f, err := os.Open(m.path(p))
	if err != nil {
		return ""
	}
	defer f.Close()
	data := make([]byte, 256<<10)
	n := 0
	for n < len(data) {
		read, err := f.Read(data[n:])
		n += read
		if err != nil {
			break
		}
	}
	return strings.TrimSpace(string(data[:n]))
}

func (m *machine) exists(p string) bool {
	_, err := os.Stat(m.path(p))
	return err == nil
}

func (m *machine) empty(p string) bool {
	entries, err := os.ReadDir(m.path(p))
	return err != nil || len(entries) == 0
}

// cpu returns a field of the first processor in /proc/cpuinfo.
func (m *machine) cpu(key string) string {
	first, _, _ := strings.Cut(m.read("proc/cpuinfo"), "\n\n")
	for line := range strings.Lines(first) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func (m *machine) cpuHas(flag string) bool {
	for f := range strings.FieldsSeq(m.cpu("flags")) {
		if f == flag {
			return true
		}
	}
	return false
}
