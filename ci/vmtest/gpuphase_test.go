package vmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/agent/gpu/fakenvml"
	"chrysalis/attest"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/image"
	"chrysalis/image/driver"
	"chrysalis/image/imagetest"
	"chrysalis/image/profile"
	"chrysalis/image/toolsroot"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
	"chrysalis/models/card"
)

// The GPU's stand-ins: QEMU's test device for the device, modules of the kernel's
// own packages for the driver's, a library that signs for NVIDIA's, and a vendor
// of the tests. What runs is the whole phase under PID 1, with the real helper.
var gpuParts struct {
	once            sync.Once
	err             error
	uki, program    string
	helper, library string
	modules         map[string][]byte
}

// needGPUParts builds what all tests with GPUs have in common.
func needGPUParts(t *testing.T) {
	t.Helper()
	p := &gpuParts
	p.once.Do(func() {
		p.uki = filepath.Join(filepath.Dir(uki), "chrysalis-gputest.efi")
		if _, p.err = os.Stat(p.uki); p.err != nil {
			return
		}
		p.program, p.helper = filepath.Join(scratch, "chrysalis-gputest"), filepath.Join(scratch, "gpu-helper")
		// The same program with shapes that have stand-ins.
		cmd := exec.Command("go", "build", "-tags=gputest", "-o", p.program, "./cmd/chrysalis")
		cmd.Dir, cmd.Env = source, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			p.err = fmt.Errorf("%w\n%s", err, out)
			return
		}
		ctx := context.Background()
		if p.library, p.err = fakenvml.Build(ctx, scratch); p.err != nil {
			return
		}
		if p.err = fakenvml.BuildHelper(ctx, p.helper); p.err == nil {
			p.modules, p.err = kernelModules(ctx, imagetest.Tools(t), "kernel/drivers/pci/pci-pf-stub", "kernel/drivers/net/dummy")
		}
	})
	if errors.Is(p.err, fakenvml.ErrNoCompiler) && os.Getenv("CHRYSALIS_REQUIRE_VM") == "" {
		t.Skip(p.err)
	}
	if p.err != nil {
		t.Fatal(p.err)
	}
}

// kernelModules takes modules out of the image's kernel package, by name.
func kernelModules(ctx context.Context, tools *toolsroot.Root, paths ...string) (map[string][]byte, error) {
	lock, err := image.ReadLock(source)
	if err != nil {
		return nil, err
	}
	tree, err := lock.Tree("image")
	if err != nil {
		return nil, err
	}
	packages, err := image.Fetch(ctx, tree, nil, func(string, int64, int64) {})
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(tree.Packages, func(p image.Package) bool { return p.Name == "linux-modules-"+image.Kernel })
	if i < 0 {
		return nil, errors.New("the image has no package of kernel modules")
	}
	out := map[string][]byte{}
	for _, path := range paths {
		cmd := tools.Cmd(ctx, toolsroot.Command{
			Args: []string{"sh", "-c", "dpkg-deb --fsys-tarfile /kernel.deb | tar -xO ./usr/lib/modules/" + image.Kernel + "/" + path + ".ko.xz | xz -dc"},
			Bind: []toolsroot.Bind{{Host: packages[i], Inside: "/kernel.deb"}}, Offline: true,
		})
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if out[filepath.Base(path)], err = cmd.Output(); err != nil || len(out[filepath.Base(path)]) == 0 {
			return nil, fmt.Errorf("take %s out of the kernel's package: %v %s", path, err, stderr.String())
		}
	}
	return out, nil
}

// gpuSetup is what one boot with stand-ins has.
type gpuSetup struct {
	vendor *nvidiatest.Vendor
	gpus   []*nvidiatest.GPU
	script fakenvml.Script
	helper string // another program in the helper's place
}

// disk packs an engine disk with the driver and returns it.
func (s gpuSetup) disk(t *testing.T, h *host) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, data []byte, mode os.FileMode) {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, mode)); err != nil {
			t.Fatal(err)
		}
	}
	copyTo := func(name, from string) {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		write(name, data, 0o755)
	}
	encode := func(name string, v any) {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		write(name, data, 0o644)
	}
	encode("gpu/driver.json", driver.Driver{
		Version: 1, Driver: nvidiatest.Driver, Kernel: image.Kernel, Models: []string{nvidiatest.Model},
		Modules:  []driver.Module{{Name: "pci-pf-stub"}, {Name: "dummy", Options: []string{"numdummies=0"}}},
		Firmware: []driver.File{{Path: "nvidia/" + nvidiatest.Driver + "/gsp.bin"}},
	})
	for name, module := range gpuParts.modules {
		write("gpu/modules/"+name+".ko", module, 0o644)
	}
	write("gpu/firmware/nvidia/"+nvidiatest.Driver+"/gsp.bin", []byte("no firmware"), 0o644)
	write("gpu/driver.rim", s.vendor.DriverRIM(), 0o644)
	if s.helper == "" {
		s.helper = gpuParts.helper
	}
	copyTo("gpu/root/gpu-helper", s.helper)
	copyTo("gpu/root/lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2")
	copyTo("gpu/root/usr/lib/x86_64-linux-gnu/libc.so.6", "/lib/x86_64-linux-gnu/libc.so.6")
	copyTo("gpu/root/usr/lib/x86_64-linux-gnu/"+fakenvml.Library, gpuParts.library)
	fake := filepath.Join(dir, "gpu/root/etc/fake-nvml")
	if err := os.MkdirAll(fake, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := fakenvml.Write(fake, s.script, s.gpus...); err != nil {
		t.Fatal(err)
	}
	roots := s.vendor.Roots()
	write("gpu/root/etc/fake-nvml/roots", fmt.Appendf(nil, "%x\n%x\n", roots.Device[0], roots.RIM[0]), 0o644)

	copyTo("engine/engine", testProgram(t, "engine"))
	encode("profile.json", profile.Profile{
		Version: 1, Name: "gpu-test", Health: "/health", ReadySeconds: 30,
		Argv:        []profile.Args{{Args: []string{"/engine", "gpu", "${socket}"}}},
		Environment: map[string]string{}, Parameters: map[string]profile.Parameter{},
		Formats: []string{card.GGUF, card.Safetensors}, Cache: profile.CacheNone, Status: profile.Tested, Seccomp: []string{},
		Needs: profile.Needs{GPUs: profile.Range{Min: 1, Max: 8}},
	})
	out := filepath.Join(dir, "engine.disk")
	r := h.run(time.Minute, "engine", "pack", filepath.Join(dir, "engine"), "--profile", filepath.Join(dir, "profile.json"),
		"--gpu-driver", filepath.Join(dir, "gpu"), "-o", out)
	if r.code != 0 || !strings.Contains(r.stderr, "stand-in") {
		t.Fatalf("pack: %s", r)
	}
	return out
}

// collateral writes what the host gives the VM beside the driver's RIM.
func (s gpuSetup) collateral(t *testing.T) string {
	t.Helper()
	all := s.vendor.Collateral(s.gpus...)
	all.RIMs = []evidence.Bytes{s.vendor.VBIOSRIM()}
	data, err := all.Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "collateral.json")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

var validity sync.Once

func newGPUSetup(n int) gpuSetup {
	// Valid both when the vendor's answers on revocation are given and today.
	if now := time.Now(); now.After(nvidiatest.Now) {
		validity.Do(func() { nvidiatest.NotAfter = now.AddDate(1, 0, 0) })
	}
	s := gpuSetup{vendor: nvidiatest.NewVendor()}
	for range n {
		s.gpus = append(s.gpus, s.vendor.NewGPU())
	}
	return s
}

func newGPUHost(t *testing.T) *host {
	needGPUParts(t)
	h := newHost(t)
	h.program = gpuParts.program
	return h
}

// TestGPU boots a VM with two GPUs, and checks what a client gets with nothing but
// the vendor's roots and what the VM itself carries to it. Then one of the GPUs
// falls off the bus.
func TestGPU(t *testing.T) {
	t.Parallel()
	h := newGPUHost(t)
	s := newGPUSetup(2)
	t.Log("the GPU engine disk is the fixture's: NVIDIA's driver is no part of this tree")
	// Two reports at boot, and two for each of two clients.
	const report = "nvmlDeviceGetConfComputeGpuAttestationReport"
	s.script = fakenvml.Script{"after." + report: "6", "error." + report: "15"}
	engine := s.disk(t, h)
	endpoint := h.up("--image", gpuParts.uki, "--engine", engine, "--model", demo, "--shape", "gputest2", "--gpu-collateral", s.collateral(t))
	c := newClient(t, endpoint)

	var nonce [evidence.NonceSize]byte
	rand.Read(nonce[:])
	resp, body := c.send("GET", evidence.Path+"?nonce="+base64.RawURLEncoding.EncodeToString(nonce[:]), nil)
	if resp.StatusCode != 200 {
		t.Fatalf("%s: %s", resp.Status, body)
	}
	d, err := evidence.Parse([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	checkQuote(t, h, d)
	resp, body = c.send("GET", evidence.GPUCollateralPath, nil)
	if resp.StatusCode != 200 {
		t.Fatalf("collateral: %s: %s", resp.Status, body)
	}
	collateral, err := nvidia.ParseCollateral([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	if len(collateral.RIMs) != 2 {
		t.Errorf("the VM gives %d RIMs, expected the driver's and the VBIOS's", len(collateral.RIMs))
	}

	// The log is that of a boot with this manifest and these GPUs.
	m, err := manifest.Parse(d.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	_, events, err := cel.Parse(d.CEL)
	if err != nil {
		t.Fatal(err)
	}
	var identities [][]byte
	for _, e := range events {
		if e.Name == cel.GPU {
			identities = append(identities, e.Data)
		}
	}
	want, err := cel.Boot(d.Manifest, m, identities)
	if err != nil {
		t.Fatal(err)
	}
	if encoded, err := cel.Encode(cel.PCR15, want); err != nil || !bytes.Equal(encoded, d.CEL) || len(identities) != 2 || m.GPUs != 2 {
		t.Errorf("the log of %d events has %d GPUs, the manifest %d (%v)", len(events), len(identities), m.GPUs, err)
	}
	verifier := nvidia.NewVerifier(s.vendor.Roots())
	if err := verifier.AddCollateral(collateral); err != nil {
		t.Fatal(err)
	}
	policy := nvidia.Policy{
		Nonce: evidence.GPUNonce(d.Nonces, d.TLSKey), GPUs: 2, Models: []string{nvidiatest.Model},
		Time: nvidiatest.Now, MaxOCSPAge: 24 * time.Hour, Identities: identities,
	}
	result, err := verifier.Verify(d.GPU, policy)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("two GPUs verified, %d measurements each; evidence of %d bytes, collateral of %d", result.GPUs[0].Compared, len(d.GPU), len(body))
	for name, change := range map[nvidia.Check]func(*nvidia.Policy){
		nvidia.CheckCount: func(p *nvidia.Policy) { p.GPUs = 1 },
		nvidia.CheckModel: func(p *nvidia.Policy) { p.Models = nil },
		nvidia.CheckNonce: func(p *nvidia.Policy) { p.Nonce[0] ^= 1 },
		nvidia.CheckIdentity: func(p *nvidia.Policy) {
			p.Identities = [][]byte{identities[1], identities[0]}
		},
	} {
		p := policy
		change(&p)
		_, err := verifier.Verify(d.GPU, p)
		if r, ok := errors.AsType[*nvidia.Refusal](err); !ok || r.Check != name {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Under NVIDIA's own roots it is nothing.
	_, err = nvidia.NewVerifier(nvidia.NVIDIARoots()).Verify(d.GPU, policy)
	if r, ok := errors.AsType[*nvidia.Refusal](err); !ok || r.Check != nvidia.CheckChain {
		t.Errorf("under NVIDIA's roots: %v", err)
	}

	// And what a user sees who trusts this vendor in NVIDIA's place.
	trusted := attest.NewPolicy()
	trusted.AllowNotConfidential, trusted.AllowNoGPUOCSP, trusted.GPUModels = true, true, []string{nvidiatest.Model}
	trusted.GPUDeviceRoots, trusted.GPURIMRoots = []record.Hex{s.vendor.Roots().Device[0][:]}, []record.Hex{s.vendor.Roots().RIM[0][:]}
	encoded, err := json.Marshal(trusted)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(file, encoded, 0o644); err != nil {
		t.Fatal(err)
	}
	v := h.verify(0, "", "--policy", file, "--allow-not-confidential", "--record", recordOf(t, h, gpuParts.uki, engine, demo), endpoint)
	if len(v.GPUs) != 2 || v.GPUs[1].Model != nvidiatest.Model || v.GPUs[1].Measurements != result.GPUs[1].Compared {
		t.Errorf("the client's verdict has the GPUs %+v", v.GPUs)
	}

	// The engine has the driver's device nodes, and the agent and the helper are no
	// larger than they may be.
	log := h.run(time.Minute, "logs")
	if !strings.Contains(log.stdout, "engine: opens nvidiactl nvidia0 nvidia1\n") {
		t.Errorf("the engine's log: %s", log)
	}
	if rss := h.guestStatus().Counters["agent_peak_kib"]; rss == 0 || rss > 80<<10 {
		t.Errorf("the agent took %d KiB", rss)
	} else {
		t.Logf("the agent took %d KiB at most", rss)
	}

	// A GPU is lost before it has answered the next client.
	if resp, err := c.http.Get(endpoint + evidence.Path + "?nonce=" + base64.RawURLEncoding.EncodeToString(nonce[:])); err == nil {
		resp.Body.Close()
		if resp.StatusCode == 200 {
			t.Error("there is evidence without a GPU's report")
		}
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		r := h.run(time.Minute, "status", "--json")
		if strings.Contains(r.stdout, `"gpu-lost"`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the VM goes on without its GPU: %s", r)
		}
		time.Sleep(time.Second)
	}
}

// TestGPUFaults boots VMs whose GPUs are not as they should be.
func TestGPUFaults(t *testing.T) {
	changed := newGPUSetup(1)
	changed.gpus[0].Measurements[23] = nvidiatest.Measurement(24)
	scripted := func(script fakenvml.Script) gpuSetup {
		s := newGPUSetup(1)
		s.script = script
		return s
	}
	garbage := newGPUSetup(1)
	for _, c := range []struct {
		name         string
		setup        gpuSetup
		noCollateral bool
		reason       string
	}{
		{"devtools", scripted(fakenvml.Script{"devtools": "1"}), false, "gpu-devtools"},
		{"confidential computing off", scripted(fakenvml.Script{"cc": "0"}), false, "gpu-mode"},
		{"ready before", scripted(fakenvml.Script{"ready": "1"}), false, "gpu-ready"},
		{"the library sees two", scripted(fakenvml.Script{"count": "2"}), false, "gpu-count"},
		{"no RIM for the VBIOS", newGPUSetup(1), true, "gpu-collateral"},
		{"another measurement", changed, false, "gpu-attestation"},
		{"garbage from the helper", garbage, false, "gpu-helper"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newGPUHost(t)
			if c.reason == "gpu-helper" {
				c.setup.helper = testProgram(t, "engine")
			}
			args := []string{"--image", gpuParts.uki, "--engine", c.setup.disk(t, h), "--model", demo, "--shape", "gputest1"}
			if !c.noCollateral {
				args = append(args, "--gpu-collateral", c.setup.collateral(t))
			}
			said := h.upFails(c.reason, args...)
			if c.noCollateral && !strings.Contains(said, "chrysalis gpu collateral --rim NV_GPU_VBIOS_1010_0200_882_9600AA0001") {
				t.Errorf("it does not say what is missing: %s", said)
			}
		})
	}
	t.Run("the published image", func(t *testing.T) {
		t.Parallel()
		h := newGPUHost(t)
		s := newGPUSetup(1)
		h.upFails("device-refused", "--engine", s.disk(t, h), "--model", demo, "--shape", "gputest1", "--gpu-collateral", s.collateral(t))
	})
}
