package gpu_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/agent/gpu"
	"chrysalis/agent/gpu/fakenvml"
	"chrysalis/agent/gpu/protocol"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
)

var nonce = [32]byte{1, 2, 3}

var built struct {
	once            sync.Once
	dir             string
	helper, library string
	err             error
}

func TestMain(m *testing.M) {
	code := m.Run()
	os.RemoveAll(built.dir)
	os.Exit(code)
}

// artefacts builds the real helper and the stand-in for NVIDIA's library.
func artefacts(t *testing.T) (helper, library string) {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "chrysalis-gpu-"); built.err != nil {
			return
		}
		built.helper = filepath.Join(built.dir, "helper")
		if built.library, built.err = fakenvml.Build(t.Context(), built.dir); built.err == nil {
			built.err = fakenvml.BuildHelper(t.Context(), built.helper)
		}
	})
	if errors.Is(built.err, fakenvml.ErrNoCompiler) {
		t.Skip(built.err)
	}
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.helper, built.library
}

// start runs the helper with a library and a folder for its script.
func start(t *testing.T, library, dir string, timeout time.Duration) (*gpu.Client, *exec.Cmd) {
	t.Helper()
	helper, _ := artefacts(t)
	cmd := exec.Command(helper, "-library", library)
	cmd.Env = []string{fakenvml.Env + "=" + dir}
	return client(t, cmd, timeout), cmd
}

func client(t *testing.T, cmd *exec.Cmd, timeout time.Duration) *gpu.Client {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := gpu.NewClient(in, out, func() { cmd.Process.Kill() }, timeout)
	t.Cleanup(func() {
		c.Close()
		cmd.Wait()
	})
	return c
}

func fake(t *testing.T, s fakenvml.Script, gpus ...*nvidiatest.GPU) (*gpu.Client, string) {
	t.Helper()
	_, library := artefacts(t)
	dir := t.TempDir()
	if err := fakenvml.Write(dir, s, gpus...); err != nil {
		t.Fatal(err)
	}
	c, _ := start(t, library, dir, 20*time.Second)
	return c, dir
}

func wantCode(t *testing.T, err error, code protocol.Code) {
	t.Helper()
	e, ok := errors.AsType[*gpu.Error](err)
	if !ok || e.Code != code {
		t.Errorf("got %v, expected %s", err, code)
	}
}

// The real helper, the real dlopen, a library that signs, and the verification
// that a client makes.
func TestAttest(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	for _, n := range []int{1, 2, 4, 8} {
		t.Run(fmt.Sprintf("%d GPUs", n), func(t *testing.T) {
			var gpus []*nvidiatest.GPU
			for range n {
				gpus = append(gpus, vendor.NewGPU())
			}
			c, _ := fake(t, fakenvml.Script{"links": "18", "fabric": "3"}, gpus...)
			inventory, err := c.Inventory(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			g := inventory[n-1]
			if len(inventory) != n || g.Name != nvidiatest.Model || g.Driver != nvidiatest.Driver || g.VBIOS != nvidiatest.VBIOS || g.Links != 18 ||
				g.Fabric != protocol.FabricCompleted || g.PCI != fmt.Sprintf("00000000:%02X:00.0", 0x10+n-1) || g.Protected != 80<<20 {
				t.Errorf("%+v", g)
			}
			e, err := c.Attest(t.Context(), nonce)
			if err != nil {
				t.Fatal(err)
			}
			data, err := e.Encode()
			if err != nil {
				t.Fatal(err)
			}
			v := nvidia.NewVerifier(vendor.Roots())
			if err := v.AddCollateral(vendor.Collateral(gpus...)); err != nil {
				t.Fatal(err)
			}
			p := nvidia.Policy{Nonce: nonce, GPUs: n, Models: []string{nvidiatest.Model}, Time: nvidiatest.Now, MaxOCSPAge: 24 * time.Hour}
			if _, err := v.Verify(data, p); err != nil {
				t.Error(err)
			}
			// And under NVIDIA's own roots it is nothing.
			_, err = nvidia.NewVerifier(nvidia.NVIDIARoots()).Verify(data, p)
			if r, ok := errors.AsType[*nvidia.Refusal](err); !ok || r.Check != nvidia.CheckChain {
				t.Errorf("under NVIDIA's roots: %v", err)
			}
		})
	}
}

func TestReadyState(t *testing.T) {
	c, _ := fake(t, nil, nvidiatest.NewVendor().NewGPU())
	for _, ready := range []bool{false, true, false} {
		if err := c.SetReady(t.Context(), ready); err != nil {
			t.Fatal(err)
		}
		s, err := c.System(t.Context())
		if err != nil || s.Ready != ready || !s.CC || !s.Capable || s.DevTools || s.Environment != "production" || s.MultiGPU != protocol.MultiGPUNone {
			t.Errorf("%+v, %v", s, err)
		}
	}
}

// What the library says of its state arrives.
func TestStates(t *testing.T) {
	g := nvidiatest.NewVendor().NewGPU()
	for _, test := range []struct {
		name   string
		script fakenvml.Script
		want   protocol.System
	}{
		{"off", fakenvml.Script{"cc": "0"}, protocol.System{Capable: true, Environment: "production", MultiGPU: "none"}},
		{"devtools", fakenvml.Script{"devtools": "1"}, protocol.System{Capable: true, CC: true, DevTools: true, Environment: "production", MultiGPU: "none"}},
		{"ready before us", fakenvml.Script{"ready": "1"}, protocol.System{Capable: true, CC: true, Environment: "production", MultiGPU: "none", Ready: true}},
		{"protected PCIe", fakenvml.Script{"cc": "0", "multigpu": "1"}, protocol.System{Capable: true, Environment: "production", MultiGPU: "protected-pcie"}},
		{"encrypted NVLink", fakenvml.Script{"multigpu": "2"}, protocol.System{Capable: true, CC: true, Environment: "production", MultiGPU: "nvlink-encryption"}},
		{"a simulation", fakenvml.Script{"environment": "1"}, protocol.System{Capable: true, CC: true, Environment: "simulation", MultiGPU: "none"}},
		{"not capable", fakenvml.Script{"capable": "0", "cc": "0", "environment": "0"}, protocol.System{Environment: "unavailable", MultiGPU: "none"}},
		{"not supported", fakenvml.Script{"error.nvmlSystemGetConfComputeCapabilities": "3"}, protocol.System{Environment: "unavailable", MultiGPU: "none"}},
		{"settings not supported", fakenvml.Script{"error.nvmlSystemGetConfComputeSettings": "3"}, protocol.System{Capable: true, CC: true, Environment: "production", MultiGPU: "none"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, _ := fake(t, test.script, g)
			s, err := c.System(t.Context())
			if err != nil || *s != test.want {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

// Whatever NVML returns is a code, and the helper goes on.
func TestErrors(t *testing.T) {
	g := nvidiatest.NewVendor().NewGPU()
	for _, test := range []struct {
		name   string
		script fakenvml.Script
		code   protocol.Code
		call   func(*gpu.Client, *testing.T) error
	}{
		{"no driver", fakenvml.Script{"error.nvmlInit_v2": "9"}, protocol.CodeNoDriver, inventory},
		{"another driver", fakenvml.Script{"error.nvmlInit_v2": "18"}, protocol.CodeNoDriver, inventory},
		{"no permission", fakenvml.Script{"error.nvmlInit_v2": "4"}, protocol.CodeNoPermission, inventory},
		{"no GPU", fakenvml.Script{"count": "0"}, protocol.CodeNoGPU, inventory},
		{"too many", fakenvml.Script{"count": "17"}, protocol.CodeTooMany, inventory},
		{"an error without a name", fakenvml.Script{"error.nvmlDeviceGetCount_v2": "999"}, protocol.CodeFailed, inventory},
		{"fallen off the bus", fakenvml.Script{"error.nvmlDeviceGetUUID": "15"}, protocol.CodeLost, health},
		{"needs a reset", fakenvml.Script{"error.nvmlDeviceGetUUID": "16"}, protocol.CodeLost, health},
		{"lost when it is looked up", fakenvml.Script{"error.nvmlDeviceGetHandleByIndex_v2": "15"}, protocol.CodeLost, health},
		{"no report", fakenvml.Script{"error.nvmlDeviceGetConfComputeGpuAttestationReport": "3"}, protocol.CodeNotSupported, attest},
		{"no certificates", fakenvml.Script{"error.nvmlDeviceGetConfComputeGpuCertificate": "999"}, protocol.CodeFailed, attest},
		{"a report that is too large", fakenvml.Script{"reportsize": "100000"}, protocol.CodeBadAnswer, attest},
		{"an empty report", fakenvml.Script{"reportsize": "0"}, protocol.CodeBadAnswer, attest},
		{"a chain that is too large", fakenvml.Script{"chainsize": "0xffffffff"}, protocol.CodeBadAnswer, attest},
		{"a mode that is none", fakenvml.Script{"multigpu": "7"}, protocol.CodeBadAnswer, func(c *gpu.Client, t *testing.T) error { _, err := c.System(t.Context()); return err }},
		{"the ready state refused", fakenvml.Script{"error.nvmlSystemSetConfComputeGpusReadyState": "4"}, protocol.CodeNoPermission, func(c *gpu.Client, t *testing.T) error { return c.SetReady(t.Context(), true) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, dir := fake(t, test.script, g)
			err := test.call(c, t)
			wantCode(t, err, test.code)
			// The same helper, once the fault is gone.
			if err := fakenvml.Write(dir, nil, g); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Inventory(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func inventory(c *gpu.Client, t *testing.T) error { _, err := c.Inventory(t.Context()); return err }
func health(c *gpu.Client, t *testing.T) error    { _, err := c.Health(t.Context(), 0); return err }
func attest(c *gpu.Client, t *testing.T) error    { _, err := c.Attest(t.Context(), nonce); return err }

func TestHealth(t *testing.T) {
	c, dir := fake(t, nil, nvidiatest.NewVendor().NewGPU())
	if h, err := c.Health(t.Context(), 0); err != nil || h.Uncorrectable != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if err := fakenvml.Write(dir, fakenvml.Script{"count": "1", "ecc": "3"}); err != nil {
		t.Fatal(err)
	}
	if h, err := c.Health(t.Context(), 0); err != nil || h.Uncorrectable != 3 {
		t.Errorf("%+v, %v", h, err)
	}
	_, err := c.Health(t.Context(), 1)
	wantCode(t, err, protocol.CodeNoGPU)
}

// A library that lacks a function, or all, is an answer and never a crash.
func TestMissingSymbols(t *testing.T) {
	artefacts(t)
	g := nvidiatest.NewVendor().NewGPU()
	for symbol, call := range map[string]func(*gpu.Client, *testing.T) error{
		"nvmlInit_v2": inventory, "nvmlErrorString": inventory, "nvmlDeviceGetCount_v2": inventory, "nvmlDeviceGetPciInfo_v3": inventory,
		"nvmlDeviceGetHandleByIndex_v2": health, "nvmlDeviceGetTotalEccErrors": health,
		"nvmlDeviceGetConfComputeGpuAttestationReport": attest, "nvmlDeviceGetConfComputeGpuCertificate": attest,
		"nvmlSystemGetConfComputeState": attest, "nvmlSystemGetConfComputeGpusReadyState": attest,
		"nvmlSystemSetConfComputeGpusReadyState": func(c *gpu.Client, t *testing.T) error { return c.SetReady(t.Context(), true) },
	} {
		t.Run(symbol, func(t *testing.T) {
			dir := t.TempDir()
			library, err := fakenvml.Build(t.Context(), dir, symbol)
			if err == nil {
				err = fakenvml.Write(dir, nil, g)
			}
			if err != nil {
				t.Fatal(err)
			}
			c, _ := start(t, library, dir, 20*time.Second)
			err = call(c, t)
			wantCode(t, err, protocol.CodeNoSymbol)
			if err == nil || !strings.Contains(err.Error(), symbol) {
				t.Errorf("%v does not name %s", err, symbol)
			}
		})
	}
	t.Run("what can be missing", func(t *testing.T) {
		dir := t.TempDir()
		library, err := fakenvml.Build(t.Context(), dir, "nvmlDeviceGetNvLinkState", "nvmlDeviceGetGpuFabricInfo", "nvmlDeviceGetConfComputeMemSizeInfo", "nvmlSystemGetConfComputeSettings")
		if err == nil {
			err = fakenvml.Write(dir, nil, g)
		}
		if err != nil {
			t.Fatal(err)
		}
		c, _ := start(t, library, dir, 20*time.Second)
		if _, err := c.Attest(t.Context(), nonce); err != nil {
			t.Error(err)
		}
	})
	t.Run("no library", func(t *testing.T) {
		c, _ := start(t, "/nowhere/"+fakenvml.Library, t.TempDir(), 20*time.Second)
		wantCode(t, inventory(c, t), protocol.CodeNoLibrary)
	})
	t.Run("not a library", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), fakenvml.Library)
		if err := os.WriteFile(path, []byte("not one"), 0o644); err != nil {
			t.Fatal(err)
		}
		c, _ := start(t, path, t.TempDir(), 20*time.Second)
		wantCode(t, inventory(c, t), protocol.CodeNoLibrary)
	})
}

// A library that hangs, crashes or prints hurts nobody but the helper.
func TestLibraryMisbehaves(t *testing.T) {
	g := nvidiatest.NewVendor().NewGPU()
	_, library := artefacts(t)
	run := func(t *testing.T, s fakenvml.Script, timeout time.Duration) error {
		dir := t.TempDir()
		if err := fakenvml.Write(dir, s, g); err != nil {
			t.Fatal(err)
		}
		c, _ := start(t, library, dir, timeout)
		_, err := c.Attest(t.Context(), nonce)
		if err != nil {
			// After that the client says the same without asking.
			begin := time.Now()
			if again := inventory(c, t); again == nil || time.Since(begin) > time.Second {
				t.Errorf("afterwards: %v after %v", again, time.Since(begin))
			}
		}
		return err
	}
	t.Run("hangs", func(t *testing.T) {
		wantCode(t, run(t, fakenvml.Script{"hang.nvmlDeviceGetConfComputeGpuAttestationReport": "1"}, time.Second), protocol.CodeHung)
	})
	t.Run("crashes", func(t *testing.T) {
		wantCode(t, run(t, fakenvml.Script{"crash.nvmlDeviceGetConfComputeGpuAttestationReport": "1"}, 20*time.Second), protocol.CodeDied)
	})
	t.Run("prints", func(t *testing.T) {
		if err := run(t, fakenvml.Script{"print.nvmlDeviceGetName": "1"}, 20*time.Second); err != nil {
			t.Error(err)
		}
	})
}

// A helper that is not one.
func TestHelperMisbehaves(t *testing.T) {
	for _, test := range []struct {
		name, script string
		code         protocol.Code
	}{
		{"garbage", "echo garbage; exec sleep 60", protocol.CodeGarbage},
		{"another answer", `echo '{"id":7,"code":"ok","gpus":[]}'; exec sleep 60`, protocol.CodeGarbage},
		{"the answer to something else", `echo '{"id":1,"code":"ok","health":{"uncorrectable":0}}'; exec sleep 60`, protocol.CodeGarbage},
		{"an unknown code", `echo '{"id":1,"code":"fine"}'; exec sleep 60`, protocol.CodeGarbage},
		{"the client's own code", `echo '{"id":1,"code":"helper-died"}'; exec sleep 60`, protocol.CodeGarbage},
		{"an unknown field", `echo '{"id":1,"code":"no-gpu","x":1}'; exec sleep 60`, protocol.CodeGarbage},
		{"two answers on a line", `echo '{"id":1,"code":"no-gpu"}{}'; exec sleep 60`, protocol.CodeGarbage},
		{"a GPU out of bounds", `echo '{"id":1,"code":"ok","gpus":[{"index":3}]}'; exec sleep 60`, protocol.CodeGarbage},
		{"a gigabyte", "head -c 1073741824 /dev/zero", protocol.CodeFlood},
		{"gigabytes in lines", "yes", protocol.CodeGarbage},
		{"silence", "exec sleep 60", protocol.CodeHung},
		{"death", "exit 3", protocol.CodeDied},
		{"half an answer", `printf '{"id":1'`, protocol.CodeDied},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := client(t, exec.Command("sh", "-c", test.script), 5*time.Second)
			wantCode(t, inventory(c, t), test.code)
		})
	}
	t.Run("a gigabyte before the request", func(t *testing.T) {
		in, flooded := io.Pipe()
		over := make(chan struct{})
		kill := sync.OnceFunc(func() { flooded.Close(); close(over) })
		_, request, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		c := gpu.NewClient(request, in, kill, time.Minute)
		flooded.Write(make([]byte, protocol.MaxAnswer))
		<-over
		request.Close() // as after its death nothing can be written
		wantCode(t, inventory(c, t), protocol.CodeFlood)
	})
	t.Run("does not read", func(t *testing.T) {
		// The pipe takes some; the rest must not wait for ever.
		c := client(t, exec.Command("sh", "-c", "exec sleep 60"), 300*time.Millisecond)
		wantCode(t, inventory(c, t), protocol.CodeHung)
	})
}

// The helper refuses what is not a request.
func TestBadRequests(t *testing.T) {
	helper, library := artefacts(t)
	dir := t.TempDir()
	if err := fakenvml.Write(dir, nil, nvidiatest.NewVendor().NewGPU()); err != nil {
		t.Fatal(err)
	}
	for _, request := range []string{`{}`, `x`, `{"version":1,"id":1,"op":"format"}`, `{"version":2,"id":1,"op":"inventory"}`,
		`{"version":1,"id":1,"op":"inventory","x":1}`, `{"version":1,"id":1,"op":"attest","gpu":0,"nonce":"AAAA"}`} {
		cmd := exec.Command(helper, "-library", library)
		cmd.Env = []string{fakenvml.Env + "=" + dir}
		cmd.Stdin = strings.NewReader(request + "\n")
		out, err := cmd.Output()
		if err != nil || !strings.Contains(string(out), `"code":"bad-request"`) {
			t.Errorf("%s: %s, %v", request, out, err)
		}
	}
	cmd := exec.Command(helper, "-library", library)
	cmd.Stdin = strings.NewReader(strings.Repeat("x", protocol.MaxRequest+1))
	if out, err := cmd.Output(); err == nil || len(out) > 0 {
		t.Errorf("a long line: %s, %v", out, err)
	}
}

// The helper takes at most 30 MB, with eight GPUs attested again and again.
func TestMemory(t *testing.T) {
	_, library := artefacts(t)
	vendor := nvidiatest.NewVendor()
	var gpus []*nvidiatest.GPU
	for range 8 {
		gpus = append(gpus, vendor.NewGPU())
	}
	dir := t.TempDir()
	if err := fakenvml.Write(dir, nil, gpus...); err != nil {
		t.Fatal(err)
	}
	c, cmd := start(t, library, dir, 60*time.Second)
	for range 3 {
		if _, err := c.Attest(t.Context(), nonce); err != nil {
			t.Fatal(err)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Skip(err)
	}
	for line := range strings.Lines(string(status)) {
		var kib int
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			t.Logf("%d KiB at most", kib)
			if kib > 30_000_000/1024 {
				t.Errorf("%d KiB, at most 30 MB are allowed", kib)
			}
		}
	}
}
