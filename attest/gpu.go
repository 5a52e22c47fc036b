package attest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// DefaultGPUMaxOCSPAge is how old NVIDIA's answer on revocation may be: NVIDIA gives
// each of its answers a day.
const DefaultGPUMaxOCSPAge = 24 * time.Hour

// maxGPUOCSPAge bounds what a policy may make of it.
const maxGPUOCSPAge = 90 * 24 * time.Hour

// nvidiaRoots are the roots of GPUs and RIMs unless a policy says otherwise.
var nvidiaRoots = nvidia.NVIDIARoots

// gpuTitles say what holds when a check of package attest/nvidia passes.
var gpuTitles = map[nvidia.Check]string{
	nvidia.CheckEvidence:     "the GPUs' evidence is well formed",
	nvidia.CheckCount:        "there are as many GPUs as the manifest asks for",
	nvidia.CheckModel:        "each GPU is of an allowed model",
	nvidia.CheckMode:         "confidential computing is on, for all of them alike",
	nvidia.CheckDevTools:     "none is in its debugging mode",
	nvidia.CheckReport:       "their reports are well formed",
	nvidia.CheckNonce:        "their reports answer this client's nonce",
	nvidia.CheckChain:        "their certificates lead to a trusted root",
	nvidia.CheckSignature:    "their reports are signed by them",
	nvidia.CheckFirmware:     "the signing key is of the firmware that reports",
	nvidia.CheckRevocation:   "NVIDIA has revoked none of them",
	nvidia.CheckDuplicate:    "none of them stands in for two",
	nvidia.CheckDriverRIM:    "NVIDIA says how their driver measures",
	nvidia.CheckVBIOSRIM:     "NVIDIA says how their VBIOS measures",
	nvidia.CheckMeasurements: "firmware and driver measure as NVIDIA says",
	nvidia.CheckIdentity:     "they are the GPUs that the VM recorded when it booted",
}

// GPU is one GPU of a verdict.
type GPU struct {
	Model        string          `json:"model"` // as NVML names it
	Chip         string          `json:"chip"`  // for example GH100
	Driver       string          `json:"driver"`
	VBIOS        string          `json:"vbios"`
	Mode         string          `json:"mode"` // "confidential"
	MultiGPU     nvidia.MultiGPU `json:"multi_gpu"`
	Device       record.Hex      `json:"device"`       // SHA-256 of the certificate of the device's own key
	Measurements int             `json:"measurements"` // how many were compared with NVIDIA's
}

// String is a few words about it.
func (g GPU) String() string {
	return fmt.Sprintf("%s, driver %s, VBIOS %s, %s", g.Model, g.Driver, g.VBIOS, g.Mode)
}

// GPUFetcher gets collateral for the GPUs of some evidence, RIMs that it has and
// that are still valid left alone; package attest/nvidia/fetch gets it from NVIDIA.
type GPUFetcher interface {
	Collateral(ctx context.Context, e *nvidia.Evidence, have *nvidia.Collateral, tell func(string)) (*nvidia.Collateral, error)
}

// GPUCollateral is where a client has from what GPUs are judged by: RIMs and OCSP
// responses. The sources are asked in this order, each only when all before it
// together are not enough: Bundle, Dir, the VM itself, which may carry it, Fetch.
// NVIDIA signs it, so none of them need be trusted. An answer that says "revoked"
// counts for good, whatever sources after it say.
//
// It remembers what it has verified, and should be shared by all transports of a
// program. Its fields must not change once it is used. It may be used from several
// goroutines; nil has no source but the VM and remembers nothing.
type GPUCollateral struct {
	Bundle *nvidia.Collateral // given by the user
	Dir    string             // a cache of what was enough before, or ""
	Fetch  GPUFetcher

	mu    sync.Mutex
	known map[[32]byte]*nvidia.Verifier // those that were enough, by GPUs and roots
}

// maxKnown bounds how many sets of GPUs are remembered.
const maxKnown = 256

// carrier asks the VM for the collateral that it carries. Nil says that it carries
// none.
type carrier func(context.Context) (*nvidia.Collateral, error)

// verifyGPUs makes the checks of the GPUs, given the measured events.
func (r *run) verifyGPUs(ctx context.Context, d *evidence.Document, m *manifest.Manifest, events []cel.Event, in *Input) {
	passed := r.check(CheckGPU, "", func() outcome {
		switch {
		case m.GPUs == 0 && d.GPU == nil:
			return pass("the manifest asks for none, and none was measured")
		case m.GPUs == 0:
			return fail("the evidence has GPUs, and the manifest asks for none")
		case d.GPU == nil:
			return fail("the manifest asks for %d, and the evidence has none", m.GPUs)
		}
		return pass("%d", m.GPUs)
	})
	if d.GPU == nil {
		return
	}
	if !passed || r.verdict.Refused() {
		// Collateral is not looked for, and nobody asked, on behalf of a VM that is
		// refused anyway.
		r.gpuChecks(0, outcome{status: NotRun}, nil)
		return
	}
	p := in.Policy.gpuPolicy(d, in.Time)
	p.GPUs, p.Identities = m.GPUs, [][]byte{}
	for _, e := range events {
		if e.Name == cel.GPU {
			p.Identities = append(p.Identities, e.Data)
		}
	}
	var result *nvidia.Result
	var failed int
	begin := time.Now()
	o := contained(func() (o outcome) {
		result, failed, o = in.judgeGPUs(ctx, d.GPU, p)
		return o
	})
	if o.status != Passed {
		result = nil
	}
	// The time is that of all of them together.
	r.verdict.Checks[len(r.verdict.Checks)-1].Took += time.Since(begin)
	r.gpuChecks(failed, o, result)
	if result == nil {
		return
	}
	for _, g := range result.GPUs {
		device, _ := hex.DecodeString(g.Identity.Device)
		mode := "confidential"
		switch g.Identity.MultiGPU {
		case nvidia.MultiGPUProtectedPCIe:
			mode = "protected PCIe"
			// NVLink is in clear, and whoever answers as an NVSwitch is not verified.
			r.verdict.Confidential = false
		case nvidia.MultiGPUNVLE:
			mode = "confidential, NVLink encrypted"
		}
		r.verdict.GPUs = append(r.verdict.GPUs, GPU{
			Model: g.Identity.Model, Chip: g.Identity.Chip, Driver: g.Identity.Driver, VBIOS: g.Identity.VBIOS,
			Mode: mode, MultiGPU: g.Identity.MultiGPU, Device: device, Measurements: g.Compared,
		})
	}
	if !in.Policy.onlyNVIDIA() {
		r.verdict.Confidential = false
	}
}

// gpuChecks lists the checks of package attest/nvidia, of which the failed-th ended
// as o says, and none failed when o passed.
func (r *run) gpuChecks(failed int, o outcome, result *nvidia.Result) {
	for i, name := range nvidia.Checks {
		c := Check{Name: Name(name), Title: gpuTitles[name], Status: NotRun}
		switch {
		case o.status == Passed:
			c.Status, c.Detail = Passed, gpuDetail(name, result)
		case i < failed:
			c.Status = Passed
		case i == failed:
			c.Status, c.Detail = o.status, o.detail
		}
		r.verdict.Checks = append(r.verdict.Checks, c)
	}
}

// gpuDetail is what was seen by a check that passed.
func gpuDetail(name nvidia.Check, result *nvidia.Result) string {
	list := func(f func(nvidia.Verified) string) string {
		var out []string
		for _, g := range result.GPUs {
			if text := f(g); !slices.Contains(out, text) {
				out = append(out, text)
			}
		}
		return strings.Join(out, ", ")
	}
	switch name {
	case nvidia.CheckCount:
		return fmt.Sprint(len(result.GPUs))
	case nvidia.CheckModel:
		return list(func(g nvidia.Verified) string { return g.Identity.Model })
	case nvidia.CheckMode:
		return list(func(g nvidia.Verified) string { return "multi-GPU: " + string(g.Identity.MultiGPU) })
	case nvidia.CheckChain:
		return list(func(g nvidia.Verified) string { return g.Identity.Chip })
	case nvidia.CheckDriverRIM:
		return list(func(g nvidia.Verified) string { return g.Identity.Driver })
	case nvidia.CheckVBIOSRIM:
		return list(func(g nvidia.Verified) string { return g.Identity.VBIOS })
	case nvidia.CheckMeasurements:
		return list(func(g nvidia.Verified) string { return fmt.Sprintf("%d compared", g.Compared) }) + ", of each"
	case nvidia.CheckIdentity:
		return list(func(g nvidia.Verified) string { return g.Identity.Device[:16] + "…" })
	}
	return ""
}

// gpuPolicy is what package attest/nvidia is to accept of a document.
func (p *Policy) gpuPolicy(d *evidence.Document, now time.Time) nvidia.Policy {
	models := p.GPUModels
	if len(models) == 0 {
		models = nvidia.Hopper
	}
	return nvidia.Policy{
		Nonce:  evidence.GPUNonce(d.Nonces, d.TLSKey),
		Models: models, MinDriver: p.GPUMinDriver, Time: now,
		MaxOCSPAge:            cmp.Or(time.Duration(p.GPUMaxOCSPAgeSeconds)*time.Second, DefaultGPUMaxOCSPAge),
		AllowNoOCSP:           p.AllowNoGPUOCSP,
		AllowUnattestedSwitch: p.AllowUnattestedNVSwitch,
	}
}

// onlyNVIDIA reports whether the policy trusts NVIDIA's roots and no others.
func (p *Policy) onlyNVIDIA() bool { return len(p.GPUDeviceRoots) == 0 && len(p.GPURIMRoots) == 0 }

// gpuRoots are the roots of GPUs and RIMs that the policy trusts.
func (p *Policy) gpuRoots() nvidia.Roots {
	roots := nvidiaRoots()
	for _, r := range []struct {
		from []record.Hex
		to   *[][32]byte
	}{{p.GPUDeviceRoots, &roots.Device}, {p.GPURIMRoots, &roots.RIM}} {
		if len(r.from) > 0 {
			*r.to = nil
			for _, sum := range r.from {
				*r.to = append(*r.to, [32]byte(sum))
			}
		}
	}
	return roots
}

// checkGPU reports the first field about GPUs that is wrong.
func (p *Policy) checkGPU() error {
	if len(p.GPUModels) > 64 {
		return fmt.Errorf("gpu_models: there are %d, at most 64 are allowed", len(p.GPUModels))
	}
	for i, m := range p.GPUModels {
		if !nvidia.IsModel(m) {
			return fmt.Errorf("gpu_models[%d]: %.80q is not a GPU's name, like %q", i, m, nvidia.Hopper[0])
		}
	}
	if p.GPUMinDriver != "" && !nvidia.IsDriverVersion(p.GPUMinDriver) {
		return fmt.Errorf("gpu_min_driver: %.40q is not a driver's version, like 550.90.07", p.GPUMinDriver)
	}
	if limit := int(maxGPUOCSPAge / time.Second); p.GPUMaxOCSPAgeSeconds < 0 || p.GPUMaxOCSPAgeSeconds > limit {
		return fmt.Errorf("gpu_max_ocsp_age_seconds: %d is out of bounds, expected 1 to %d", p.GPUMaxOCSPAgeSeconds, limit)
	}
	for _, roots := range []struct {
		name string
		list []record.Hex
	}{{"gpu_device_roots", p.GPUDeviceRoots}, {"gpu_rim_roots", p.GPURIMRoots}} {
		for i, sum := range roots.list {
			if len(sum) != sha256.Size {
				return fmt.Errorf("%s[%d]: %d bytes, expected the SHA-256 of a certificate", roots.name, i, len(sum))
			}
		}
	}
	return nil
}

// judgeGPUs verifies evidence of GPUs with what collateral there is. failed is the
// index of the check that the outcome is about.
func (in *Input) judgeGPUs(ctx context.Context, data []byte, p nvidia.Policy) (result *nvidia.Result, failed int, o outcome) {
	g := in.GPU
	if g == nil {
		g = &GPUCollateral{}
	}
	e, err := nvidia.ParseEvidence(data)
	if err != nil {
		return nil, 0, fail("%s", plain(err))
	}
	v, problems, err := g.verify(ctx, e, in.Policy.gpuRoots(), in.carried, func(v *nvidia.Verifier) (err error) {
		result, err = v.Verify(data, p)
		return err
	})
	in.usedGPU = v
	if err == nil {
		return result, 0, pass("")
	}
	text := plain(err)
	if refusal, ok := errors.AsType[*nvidia.Refusal](err); ok {
		failed = slices.Index(nvidia.Checks, refusal.Check)
		text = strings.TrimPrefix(text, string(refusal.Check)+": ")
	}
	if _, missing := errors.AsType[*nvidia.MissingError](err); !missing {
		return nil, failed, fail("%s", text)
	}
	for _, problem := range problems {
		text += "; " + plain(problem)
	}
	return nil, failed, unchecked("%s", text)
}

// Check reports whether the bundle can be used under a policy: that it is signed.
func (g *GPUCollateral) Check(p *Policy) error {
	if g.Bundle == nil {
		return nil
	}
	return nvidia.NewVerifier(p.gpuRoots()).AddCollateral(g.Bundle)
}

// mendable reports whether other collateral could turn a refusal. A measurement that
// differs can be one: boards may share a VBIOS version and differ in their RIMs.
func mendable(err error) bool {
	_, missing := errors.AsType[*nvidia.MissingError](err)
	r, ok := errors.AsType[*nvidia.Refusal](err)
	return missing || ok && r.Check == nvidia.CheckMeasurements
}

// verify calls judge with collateral of one source after the other until it is
// content, or says something that no collateral can change. It returns the verifier
// that judged last, and why sources gave nothing.
func (g *GPUCollateral) verify(ctx context.Context, e *nvidia.Evidence, roots nvidia.Roots, carried carrier, judge func(*nvidia.Verifier) error) (v *nvidia.Verifier, problems []error, err error) {
	set, own := gpuSet(e, roots), gpuSet(nil, roots)
	if v = g.lookup(set); v == nil {
		v = g.lookup(own)
	}
	if v == nil {
		// A file that does not verify is as good as none; that it does not is said below.
		v = nvidia.NewVerifier(roots)
		if g.Bundle != nil {
			_ = v.AddCollateral(g.Bundle)
		}
		g.remember(own, v)
	}
	if err = judge(v); err == nil || !mendable(err) {
		return v, nil, err
	}
	// From here on with a verifier of its own, since others may be using that one.
	v = nvidia.NewVerifier(roots)
	for _, source := range []struct {
		name string
		get  func() (*nvidia.Collateral, error)
	}{
		{"the file", func() (*nvidia.Collateral, error) { return g.Bundle, nil }},
		{"the cache", func() (*nvidia.Collateral, error) { return g.read(set) }},
		{"the VM", func() (*nvidia.Collateral, error) {
			if carried == nil {
				return nil, nil
			}
			c, err := carried(ctx)
			if c == nil && err == nil {
				err = errors.New("it carries no GPU collateral")
			}
			return c, err
		}},
		{"NVIDIA", func() (*nvidia.Collateral, error) {
			if g.Fetch == nil {
				return nil, nil
			}
			have, _ := v.Select(e) // nil is fine
			return g.Fetch.Collateral(ctx, e, have, nil)
		}},
	} {
		c, problem := source.get()
		if problem == nil && c != nil {
			problem = v.AddCollateral(c)
		}
		if problem != nil {
			problems = append(problems, fmt.Errorf("%s: %w", source.name, problem))
		}
		if problem != nil || c == nil {
			continue
		}
		if err = judge(v); err == nil || !mendable(err) {
			break
		}
	}
	if err == nil {
		g.remember(set, v)
		g.write(set, e, v)
	}
	return v, problems, err
}

// gpuSet names GPUs, by their devices' certificates, under roots.
func gpuSet(e *nvidia.Evidence, roots nvidia.Roots) (sum [32]byte) {
	h := sha256.New()
	for _, list := range [][][32]byte{roots.Device, roots.RIM} {
		fmt.Fprintf(h, "%d\n", len(list))
		for _, root := range list {
			h.Write(root[:])
		}
	}
	if e != nil {
		for i := range e.GPUs {
			device := sha256.Sum256(e.GPUs[i].Certificates[1])
			h.Write(device[:])
			// Another driver or VBIOS needs other RIMs.
			driver, vbios, _ := nvidia.RIMIDs(&e.GPUs[i])
			fmt.Fprintf(h, "%q %q\n", driver, vbios)
		}
	}
	h.Sum(sum[:0])
	return sum
}

func (g *GPUCollateral) lookup(set [32]byte) *nvidia.Verifier {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.known[set]
}

func (g *GPUCollateral) remember(set [32]byte, v *nvidia.Verifier) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known == nil || len(g.known) >= maxKnown {
		g.known = map[[32]byte]*nvidia.Verifier{}
	}
	g.known[set] = v
}

func (g *GPUCollateral) path(set [32]byte) string {
	return filepath.Join(g.Dir, hex.EncodeToString(set[:16])+".json")
}

func (g *GPUCollateral) read(set [32]byte) (*nvidia.Collateral, error) {
	if g.Dir == "" {
		return nil, nil
	}
	f, err := os.Open(g.path(set))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, nvidia.MaxCollateralSize+1))
	if err != nil {
		return nil, err
	}
	return nvidia.ParseCollateral(data)
}

// write keeps what was enough. A cache that cannot be written costs time, not trust.
func (g *GPUCollateral) write(set [32]byte, e *nvidia.Evidence, v *nvidia.Verifier) {
	if g.Dir == "" {
		return
	}
	c, err := v.Select(e)
	if err != nil {
		return
	}
	if data, err := c.Encode(); err == nil && os.MkdirAll(g.Dir, 0o755) == nil {
		_ = replaceFile(g.path(set), data)
	}
}

// replaceFile writes a file whole or not at all.
func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// selectGPU returns the collateral that judged the GPUs of a document, or nil.
func selectGPU(document []byte, v *nvidia.Verifier) *nvidia.Collateral {
	d, err := evidence.Parse(document)
	if err != nil || v == nil || d.GPU == nil {
		return nil
	}
	e, err := nvidia.ParseEvidence(d.GPU)
	if err != nil {
		return nil
	}
	c, err := v.Select(e)
	if err != nil {
		return nil // a chain that does not verify: no collateral had a say
	}
	return c
}
