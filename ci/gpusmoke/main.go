// Command gpusmoke runs the GPU helper's calls on this machine's own NVIDIA GPUs,
// for 'make gpu-smoke'. It only reads: the one operation that changes anything,
// set-ready, is not asked for.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"

	"chrysalis/agent/gpu"
	"chrysalis/agent/gpu/protocol"
	"chrysalis/attest/nvidia"
	"chrysalis/terminal"
)

func main() {
	helper := flag.String("helper", "", "the helper")
	library := flag.String("library", "libnvidia-ml.so.1", "NVIDIA's management library")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *helper, *library); err != nil {
		fmt.Fprintln(os.Stderr, "gpu-smoke:", terminal.Clean(err.Error()))
		os.Exit(1)
	}
}

func say(format string, args ...any) { fmt.Println(terminal.Line(fmt.Sprintf(format, args...))) }

func run(ctx context.Context, helper, library string) error {
	cmd := exec.CommandContext(ctx, helper, "-library", library)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	c := gpu.NewClient(in, out, func() { cmd.Process.Kill() }, gpu.Timeout)
	defer func() {
		c.Close()
		cmd.Wait()
	}()

	gpus, err := c.Inventory(ctx)
	if e, ok := errors.AsType[*gpu.Error](err); ok && (e.Code == protocol.CodeNoLibrary || e.Code == protocol.CodeNoDriver || e.Code == protocol.CodeNoGPU) {
		say("skipped: there is no NVIDIA GPU with its driver on this machine (%s)", e.Code)
		return nil
	}
	if err != nil {
		return err
	}
	for _, g := range gpus {
		say("GPU %d: %s, %s, PCI %s, driver %s, VBIOS %s, %d NVLinks, fabric %s", g.Index, g.Name, g.UUID, g.PCI, g.Driver, g.VBIOS, g.Links, g.Fabric)
		health, err := c.Health(ctx, g.Index)
		if err != nil {
			return err
		}
		say("GPU %d: %d uncorrectable memory errors", g.Index, health.Uncorrectable)
	}
	system, err := c.System(ctx)
	if err != nil {
		return err
	}
	say("confidential computing: capable %v, on %v, devtools %v, environment %s, multi-GPU %s, ready %v",
		system.Capable, system.CC, system.DevTools, system.Environment, system.MultiGPU, system.Ready)
	if !system.CC {
		say("confidential computing is off, so there is no report to ask for; nothing was changed")
		return nil
	}
	var nonce [nvidia.NonceSize]byte
	rand.Read(nonce[:])
	e, err := c.Attest(ctx, nonce)
	if err != nil {
		return err
	}
	data, err := e.Encode()
	if err != nil {
		return err
	}
	say("evidence of %d GPUs: %d bytes", len(e.GPUs), len(data))
	// Without RIMs the first check that can fail is theirs: chain and signature
	// were good by then.
	models := map[string]bool{}
	p := nvidia.Policy{Nonce: nonce, GPUs: len(e.GPUs), NoClock: true}
	for _, g := range e.GPUs {
		if !models[g.Model] {
			models[g.Model] = true
			p.Models = append(p.Models, g.Model)
		}
	}
	_, err = nvidia.NewVerifier(nvidia.NVIDIARoots()).Verify(data, p)
	if r, ok := errors.AsType[*nvidia.Refusal](err); ok && r.Check == nvidia.CheckDriverRIM {
		say("nonce, certificate chain to NVIDIA's root, signature and firmware verify; the measurements need RIMs; nothing was changed")
		return nil
	}
	return err
}
