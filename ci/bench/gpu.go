package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"chrysalis/agent/gpu"
	"chrysalis/agent/gpu/fakenvml"
	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/measure/record"
)

// gpus measures what a client pays for GPUs, with evidence and collateral of the
// form and size that NVIDIA's have, and what the helper takes in the VM. No GPU is
// needed.
func gpus() error {
	for _, n := range []int{1, 8} {
		limit := map[int]float64{1: 5, 8: 25}[n]
		wall, cpu, err := verifyGPUs(n)
		if err != nil {
			return err
		}
		row(fmt.Sprintf("verify evidence of %d GPUs not seen before, cached collateral, best of %d", n, gpuRuns), "ms", wall, limit, true)
		figure("processor time of it, over all processors, median", "ms", cpu)
		if wall, cpu, err = checkGPUs(n); err != nil {
			return err
		}
		row(fmt.Sprintf("the same as a check of a client, with the VM's other evidence verified: its part, %d GPUs", n), "ms", wall, limit, true)
		figure("processor time of all of that evidence, median", "ms", cpu)
	}
	rss, err := helperMemory()
	if errors.Is(err, fakenvml.ErrNoCompiler) {
		return nil
	}
	if err != nil {
		return err
	}
	row("GPU helper's resident memory, 8 GPUs", "MB", rss, 30, true)
	return nil
}

const gpuRuns = 31

// verifyGPUs returns milliseconds: the least by the clock, because what else the
// machine does only ever adds, and the median of processor time, over all
// processors.
func verifyGPUs(n int) (wall, cpu float64, err error) {
	vendor := nvidiatest.NewVendor()
	nonce := [nvidia.NonceSize]byte{1}
	var known, fresh []*nvidiatest.GPU
	for range n {
		known, fresh = append(known, vendor.NewGPU()), append(fresh, vendor.NewGPU())
	}
	collateral := vendor.Collateral(append(known, fresh...)...)
	document := func(gpus []*nvidiatest.GPU) ([]byte, error) {
		e := &nvidia.Evidence{Version: nvidia.Version}
		for _, g := range gpus {
			e.GPUs = append(e.GPUs, g.Evidence(nonce))
		}
		return e.Encode()
	}
	first, err := document(known)
	if err != nil {
		return 0, 0, err
	}
	second, err := document(fresh)
	if err != nil {
		return 0, 0, err
	}
	p := nvidia.Policy{Nonce: nonce, GPUs: n, Models: []string{nvidiatest.Model}, Time: nvidiatest.Now, MaxOCSPAge: 24 * time.Hour}
	var walls, cpus []float64
	for range gpuRuns {
		v := nvidia.NewVerifier(vendor.Roots())
		if err := v.AddCollateral(collateral); err != nil {
			return 0, 0, err
		}
		// NVIDIA's own certificates are known once a GPU was verified.
		if _, err := v.Verify(first, p); err != nil {
			return 0, 0, err
		}
		used, begin := processorTime(syscall.RUSAGE_SELF), time.Now()
		if _, err := v.Verify(second, p); err != nil {
			return 0, 0, err
		}
		walls = append(walls, float64(time.Since(begin).Microseconds())/1000)
		cpus = append(cpus, float64((processorTime(syscall.RUSAGE_SELF)-used).Microseconds())/1000)
	}
	return slices.Min(walls), median(cpus), nil
}

// checkGPUs returns what verifyGPUs does, of the checks of GPUs in a verdict; the
// processor time is that of the whole verdict.
func checkGPUs(n int) (wall, cpu float64, err error) {
	known := attesttest.NewVM(record.TDX)
	known.AddGPUs(n)
	fresh := *known
	fresh.GPUs = nil
	for range n {
		fresh.GPUs = append(fresh.GPUs, fresh.Vendor.NewGPU())
	}
	fresh.Identify()
	fresh.Boot()
	bundle := known.Vendor.Collateral(append(slices.Clone(known.GPUs), fresh.GPUs...)...)
	nonce := make([]byte, evidence.NonceSize)
	first, second := known.Evidence(nonce), fresh.Evidence(nonce)
	in := attest.Input{Policy: known.Policy(), Records: []*record.File{known.Record()}, Collateral: known.Intel.Collateral(), Nonce: nonce, TLSKey: known.SPKI}
	var walls, cpus []float64
	for range gpuRuns {
		in.GPU = &attest.GPUCollateral{Bundle: bundle}
		if err := attest.Verify(context.Background(), first, in).Err(); err != nil {
			return 0, 0, err
		}
		used := processorTime(syscall.RUSAGE_SELF)
		v := attest.Verify(context.Background(), second, in)
		if err := v.Err(); err != nil {
			return 0, 0, err
		}
		cpus = append(cpus, float64((processorTime(syscall.RUSAGE_SELF)-used).Microseconds())/1000)
		for _, c := range v.Checks {
			if c.Name == attest.CheckGPU {
				walls = append(walls, float64(c.Took.Microseconds())/1000)
			}
		}
	}
	return slices.Min(walls), median(cpus), nil
}

// helperMemory returns the most that the helper ever held, in MB, with a stand-in
// for NVIDIA's library.
func helperMemory() (float64, error) {
	dir, err := os.MkdirTemp("", "chrysalis-bench-gpu-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	library, err := fakenvml.Build(ctx, dir)
	if err != nil {
		return 0, err
	}
	helper := filepath.Join(dir, "helper")
	if err := fakenvml.BuildHelper(ctx, helper); err != nil {
		return 0, err
	}
	vendor := nvidiatest.NewVendor()
	var all []*nvidiatest.GPU
	for range 8 {
		all = append(all, vendor.NewGPU())
	}
	if err := fakenvml.Write(dir, nil, all...); err != nil {
		return 0, err
	}
	cmd := exec.Command(helper, "-library", library)
	cmd.Env = []string{fakenvml.Env + "=" + dir}
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	c := gpu.NewClient(in, out, func() { cmd.Process.Kill() }, gpu.Timeout)
	defer cmd.Wait()
	defer c.Close()
	for range 3 {
		if _, err := c.Attest(ctx, [nvidia.NonceSize]byte{1}); err != nil {
			return 0, err
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		var kib float64
		if _, err := fmt.Sscanf(line, "VmHWM: %f kB", &kib); err == nil {
			return kib * 1024 / 1e6, nil
		}
	}
	return 0, errors.New("the kernel does not tell the helper's memory")
}
