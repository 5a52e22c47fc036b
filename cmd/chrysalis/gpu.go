package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/fetch"
	"chrysalis/launcher"
	"chrysalis/launcher/gpu"
	"chrysalis/outfile"
	"chrysalis/terminal"
)

type gpuCommands struct {
	List    GPUListCmd    `cmd:"" help:"Show the NVIDIA GPUs of this machine."`
	Prepare GPUPrepareCmd `cmd:"" help:"Take a GPU from its driver and make it ready for a VM."`
	Release GPUReleaseCmd `cmd:"" help:"Make a GPU what it was before 'gpu prepare'."`

	Collateral GPUCollateralCmd `cmd:"" help:"Fetch what NVIDIA signs about a GPU's driver, VBIOS and certificates."`
}

// hostGPUs is the machine that the program runs on.
func hostGPUs() *gpu.Host { return &gpu.Host{Root: "/"} }

// GPUListCmd lists GPUs. It changes nothing.
type GPUListCmd struct {
	JSON bool `name:"json" help:"Print a JSON list."`
}

// Run prints the table.
func (c *GPUListCmd) Run() error {
	gpus, err := hostGPUs().List()
	if err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(append([]gpu.GPU{}, gpus...))
	}
	if len(gpus) == 0 {
		fmt.Fprintln(os.Stderr, "there is no NVIDIA GPU on this machine")
		return nil
	}
	return printGPUs(os.Stdout, gpus)
}

func printGPUs(out io.Writer, gpus []gpu.GPU) error {
	table := tabwriter.NewWriter(terminal.NewWriter(out), 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "ADDRESS\tMODEL\tCC MODE\tDRIVER\tGROUP\tNUMA\tLARGEST BAR\tUSED BY")
	for _, g := range gpus {
		largest := uint64(0)
		for _, size := range g.BARs {
			largest = max(largest, size)
		}
		used := g.Processes
		if g.Display != "" {
			used = append([]string{"display"}, used...)
		}
		mode := string(g.Mode)
		if g.ModeNote != "" {
			mode += " (" + g.ModeNote + ")"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d\t%d MiB\t%s\n", g.Address, cmp.Or(g.Name, "10de:"+g.DeviceID), mode,
			cmp.Or(g.Driver, "-"), cmp.Or(g.Group, "-"), g.NUMANode, largest>>20, terminal.Line(cmp.Or(strings.Join(used, ", "), "-")))
	}
	return table.Flush()
}

// GPUPrepareCmd prepares a GPU.
type GPUPrepareCmd struct {
	Address     string `arg:"" help:"The GPU's PCI address, like 0000:b8:00.0."`
	CC          string `name:"cc" enum:"on,off,keep" default:"keep" help:"The confidential-computing mode to set: on, off or keep. Only a GPU whose mode is on proves anything to clients."`
	Tools       string `name:"gpu-admin-tools" placeholder:"PATH" help:"NVIDIA's gpu-admin-tools, to change the mode with."`
	ToolsSHA256 string `name:"gpu-admin-tools-sha256" placeholder:"HEX" help:"The digest that they must have."`
	DryRun      bool   `short:"n" help:"Print each step and do nothing."`
}

// Run prepares the GPU, or undoes what it did.
func (c *GPUPrepareCmd) Run(ctx context.Context) error {
	dir, err := launcher.StateDir()
	if err != nil {
		return err
	}
	o := gpu.Options{StateDir: dir, Tools: c.Tools, ToolsSHA256: c.ToolsSHA256}
	if c.CC != "keep" {
		o.Mode = gpu.Mode(c.CC)
	}
	plan, err := hostGPUs().Prepare(c.Address, o)
	if err != nil {
		return err
	}
	return carryOut(ctx, plan, c.DryRun, c.Address+" is prepared; start a VM with 'chrysalis up --gpu "+c.Address+"'")
}

// GPUReleaseCmd hands a GPU back.
type GPUReleaseCmd struct {
	Address string `arg:"" help:"The GPU's PCI address."`
	DryRun  bool   `short:"n" help:"Print each step and do nothing."`
}

// Run releases the GPU.
func (c *GPUReleaseCmd) Run(ctx context.Context) error {
	dir, err := launcher.StateDir()
	if err != nil {
		return err
	}
	plan, err := hostGPUs().Release(c.Address, dir)
	if err != nil {
		return err
	}
	return carryOut(ctx, plan, c.DryRun, c.Address+" is what it was")
}

// carryOut does a plan, or prints it.
func carryOut(ctx context.Context, plan *gpu.Plan, dry bool, done string) error {
	if dry {
		for i, s := range plan.Steps {
			fmt.Printf("%d. %s\n", i+1, terminal.Line(s.What))
		}
		if len(plan.Steps) == 0 {
			fmt.Println("there is nothing to do")
		}
		return nil
	}
	err := plan.Do(ctx, func(what string) { fmt.Fprintln(os.Stderr, terminal.Line(what)) })
	if err == nil {
		fmt.Println(terminal.Line(done))
	}
	return err
}

// GPUCollateralCmd fetches collateral.
type GPUCollateralCmd struct {
	Evidence string   `arg:"" optional:"" type:"existingfile" help:"Evidence of a VM with GPUs, like evidence.json of 'verify --save', or its field gpu alone: it says what to ask for."`
	RIM      []string `name:"rim" placeholder:"NAME" sep:"none" help:"Fetch this reference manifest, which a VM that ended says it lacks; repeat it for more."`
	Out      string   `short:"o" placeholder:"FILE" help:"Where it goes; RIMs in a file that is there are kept (default: where 'chrysalis up' looks for it)."`
}

// Run fetches, verifies and writes.
func (c *GPUCollateralCmd) Run(ctx context.Context) error {
	if (c.Evidence == "") == (len(c.RIM) == 0) {
		return errors.New("give either evidence or --rim")
	}
	var e *nvidia.Evidence
	if c.Evidence != "" {
		data, err := readFile(c.Evidence, evidence.MaxSize)
		if err != nil {
			return err
		}
		if e, err = gpuEvidence(data); err != nil {
			return fmt.Errorf("%s: %w", c.Evidence, err)
		}
	}
	if c.Out == "" {
		dir, err := launcher.StateDir()
		if err == nil {
			err = os.MkdirAll(dir, 0o700)
		}
		if err != nil {
			return err
		}
		c.Out = launcher.CollateralPath(dir)
	}
	var have *nvidia.Collateral
	if data, err := readFile(c.Out, nvidia.MaxCollateralSize); err == nil {
		if have, err = nvidia.ParseCollateral(data); err != nil {
			return fmt.Errorf("%s: %w; give another file", c.Out, err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tell := func(what string) { fmt.Fprintln(os.Stderr, terminal.Line(what)) }
	var fetched *nvidia.Collateral
	var err error
	if e != nil {
		fetched, err = fetch.NVIDIA().Collateral(ctx, e, have, tell)
	} else {
		fetched, err = fetch.NVIDIA().RIMs(ctx, c.RIM, have, tell)
	}
	if err != nil {
		return err
	}
	encoded, err := fetched.Encode()
	if err != nil {
		return err
	}
	// Whole or not at all: somebody may be reading it.
	return outfile.Write(c.Out, encoded, 0o644)
}

// gpuEvidence reads the GPUs' evidence, alone or within a VM's.
func gpuEvidence(data []byte) (*nvidia.Evidence, error) {
	if d, err := evidence.Parse(data); err == nil {
		if d.GPU == nil {
			return nil, errors.New("it is of a VM without GPUs")
		}
		data = d.GPU
	}
	return nvidia.ParseEvidence(data)
}
