package main

import (
	"context"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"chrysalis"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/measure"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
	"chrysalis/pay"
	"chrysalis/terminal"
)

type measureCommands struct {
	Predict  MeasureCmd         `cmd:"" default:"withargs" help:"Predict what a VM measures, from its files."`
	Explain  MeasureExplainCmd  `cmd:"" help:"Say in which event a VM differs from a record, and why."`
	Firmware MeasureFirmwareCmd `cmd:"" help:"Make the firmware that TDs boot."`
}

// MeasureCmd predicts the measurements of VMs.
type MeasureCmd struct {
	Image         string   `default:"out/chrysalis.efi" placeholder:"FILE" help:"The image (default: ${default})."`
	Engine        string   `placeholder:"FILE" help:"The engine disk."`
	Model         []string `placeholder:"FILE" sep:"none" help:"A model disk; repeat it for more."`
	Manifest      string   `placeholder:"FILE" help:"Use this manifest as it is rather than one made from the disks."`
	Shape         []string `placeholder:"NAME" sep:"none" help:"A shape; repeat it for more (default: all of them)."`
	Platform      string   `enum:"tdx,tpm" default:"tdx" help:"What the evidence comes from: tdx or tpm (default: ${default})."`
	Boot          string   `enum:"kernel,disk" default:"kernel" help:"How the firmware gets the image: kernel, as 'up' does, or disk, as exported (default: ${default})."`
	Disk          string   `placeholder:"FILE" help:"The exported disk; its partitions are part of RTMR1."`
	ExitFailures  int      `default:"-1" placeholder:"N" help:"How often ExitBootServices fails before it succeeds: for --boot disk on TDX, 0 or 1."`
	Out           string   `short:"o" placeholder:"FILE" help:"Write the record there."`
	WriteManifest string   `placeholder:"FILE" help:"Write the manifest there that 'up' gives a VM with these disks."`
	Commit        string   `placeholder:"HEX" help:"The commit that the image was built from (default: as the provenance beside it says)."`
	Events        bool     `help:"Show the events that each register is made of."`
	JSON          bool     `name:"json" help:"Print the record, or for --kernel the registers, as JSON."`
	Tools         string   `hidden:"" env:"CHRYSALIS_TOOLS" placeholder:"DIR" help:"The tools root."`

	PromptCeiling     tonPrice `group:"A VM that is paid:" placeholder:"TON" help:"The most that a million tokens of prompts can ever cost."`
	CompletionCeiling tonPrice `group:"A VM that is paid:" placeholder:"TON" help:"The same of completions."`
	VoucherStep       tonPrice `group:"A VM that is paid:" placeholder:"TON" help:"What a client pays at a time (default: a tenth of the highest ceiling)."`
	TONNetwork        string   `name:"ton-network" group:"A VM that is paid:" env:"CHRYSALIS_TON_NETWORK" default:"mainnet" placeholder:"NAME" help:"mainnet, testnet, devnet, or a network's global id (default: ${default})."`

	Foreign foreignFlags `embed:"" group:"A VM that is not ours:"`
}

// payment is what 'up' puts into the manifest of a VM that is paid, or nil.
func (c *MeasureCmd) payment() (*plan.Payment, error) {
	if c.PromptCeiling == 0 && c.CompletionCeiling == 0 {
		if c.VoucherStep != 0 {
			return nil, errors.New("--voucher-step is given without --prompt-ceiling and --completion-ceiling")
		}
		return nil, nil
	}
	if c.Manifest != "" || c.Engine == "" || len(c.Model) == 0 {
		return nil, errors.New("ceilings go into a manifest that is made from --engine and --model")
	}
	network, err := (&tonFlags{Network: c.TONNetwork}).named()
	if err != nil {
		return nil, err
	}
	return &plan.Payment{
		Network: network.GlobalID, Step: uint64(c.VoucherStep),
		Ceilings: []pay.Price{{Prompt: int64(c.PromptCeiling), Completion: int64(c.CompletionCeiling)}},
	}, nil
}

// Help is what 'chrysalis measure --help' says below the usage.
func (*MeasureCmd) Help() string {
	return "The shapes are " + strings.Join(launcher.ShapeNames(), ", ") + ".\n\ndocs/measure.md says what is measured and how; docs/record.schema.json is the record's schema."
}

// Run writes or prints a record.
func (c *MeasureCmd) Run(ctx context.Context) error {
	payment, err := c.payment()
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	tools, err := openToolsRoot(c.Tools)
	if err != nil {
		return err
	}
	if c.Foreign.used() {
		return c.foreign(tools)
	}
	result, err := plan.Run(ctx, plan.Options{
		Platform: record.Platform(c.Platform), Boot: record.Boot(c.Boot),
		Image: c.Image, Engine: c.Engine, Models: c.Model, Manifest: c.Manifest, Payment: payment, Shapes: c.Shape, Disk: c.Disk, ExitFailures: c.ExitFailures,
		Firmware: c.Foreign.Firmware, Profile: c.Foreign.FirmwareProfile, Commit: c.Commit, Lock: chrysalis.ImageLock, Tools: tools,
	})
	if err != nil {
		return err
	}
	for _, note := range result.Notes {
		fmt.Fprintln(os.Stderr, "note:", terminal.Line(note))
	}
	encoded, err := result.File.Encode()
	if err != nil {
		return err
	}
	if c.Out != "" {
		if err := os.WriteFile(c.Out, encoded, 0o644); err != nil {
			return fmt.Errorf("write the record: %w", err)
		}
	}
	if c.WriteManifest != "" {
		if result.Manifest == nil {
			return &exitError{exitBadInput, errors.New("a manifest needs an engine and a model; give --engine and --model")}
		}
		if err := os.WriteFile(c.WriteManifest, result.Manifest, 0o644); err != nil {
			return fmt.Errorf("write the manifest: %w", err)
		}
	}
	if c.JSON || c.Out == "" && !isTerminal(os.Stdout) {
		_, err := os.Stdout.Write(append(encoded, '\n'))
		return err
	}
	return printPrediction(os.Stdout, result, c.Events)
}

// describeGPUs says how many GPUs a shape has, and with which memory regions.
func describeGPUs(s *record.Shape) string {
	if s.GPUs == 0 {
		return ""
	}
	var sizes []uint64
	for _, size := range s.GPUBARs {
		sizes = append(sizes, uint64(size))
	}
	return fmt.Sprintf(", GPUs: %d × (%s)", s.GPUs, launcher.Sizes(sizes))
}

func printPrediction(out io.Writer, r *plan.Result, events bool) error {
	w := tabwriter.NewWriter(terminal.NewWriter(out), 0, 8, 2, ' ', 0)
	i := r.File.Image
	fmt.Fprintf(w, "image\t%s, %s, boot from %s, QEMU %s\n", i.Name, i.Platform, i.Boot, i.QEMU)
	fmt.Fprintf(w, "UKI\t%s\nfirmware\t%s\n", i.UKI, i.Firmware)
	show := func(register, shape, value string) {
		fmt.Fprintf(w, "%s\t%s\n", register, value)
		if !events {
			return
		}
		for _, e := range r.File.Events {
			if e.Register == register && e.Shape == shape {
				fmt.Fprintf(w, "  %s\t%s\t%s\n", e.Name, e.Digest, e.Text+e.Missing)
			}
		}
	}
	if i.Platform == record.TDX {
		fmt.Fprintf(w, "mrtd\t%s\n", i.MRTD)
		show("rtmr1", "", i.RTMR1.String())
		show("rtmr2", "", i.RTMR2.String())
	}
	for _, pcr := range i.PCRs {
		show(fmt.Sprintf("pcr%d", pcr.Index), "", pcr.SHA256.String())
	}
	for _, s := range r.File.Shapes {
		fmt.Fprintf(w, "shape %s\t%d vCPUs, %d MiB, %d disks%s\n", s.Name, s.VCPUs, s.Memory>>20, s.Disks, describeGPUs(&s))
		if i.Platform == record.TDX {
			show("rtmr0", s.Name, s.RTMR0.String())
		} else {
			show("pcr1", s.Name, s.PCR1.String())
		}
	}
	for _, e := range r.File.Engines {
		fmt.Fprintf(w, "engine %s\t%s\n", e.Name, e.RootHash)
	}
	for _, m := range r.File.Models {
		fmt.Fprintf(w, "model %s\t%s\n", m.ID(), m.RootHash)
	}
	if r.Last != nil {
		name := "pcr15"
		if i.Platform == record.TDX {
			name = "rtmr3"
			fmt.Fprintf(w, "mrconfigid\t%x\n", sha512.Sum384(r.Manifest))
		}
		fmt.Fprintf(w, "%s\t%x\twith this manifest\n", name, r.Last)
		for _, e := range r.CEL {
			if events {
				sum := fmt.Sprintf("%x", e.SHA256())
				if i.Platform == record.TDX {
					sum = fmt.Sprintf("%x", e.SHA384())
				}
				fmt.Fprintf(w, "  %s\t%s\n", e.Name, sum)
			}
		}
	}
	return w.Flush()
}

// MeasureFirmwareCmd makes the TDX firmware.
type MeasureFirmwareCmd struct {
	Out   string `short:"o" default:"out/chrysalis-tdx.fd" placeholder:"FILE" help:"The file to make (default: ${default})."`
	Tools string `hidden:"" env:"CHRYSALIS_TOOLS" placeholder:"DIR" help:"The tools root."`
}

// Run writes the firmware and prints its hash.
func (c *MeasureFirmwareCmd) Run() error {
	tools, err := openToolsRoot(c.Tools)
	if err != nil {
		return err
	}
	data, err := plan.ConfigB(tools)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Out, data, 0o644); err != nil {
		return fmt.Errorf("write the firmware: %w", err)
	}
	fmt.Printf("%x  %s\n", measure.SHA256.Sum(data), c.Out)
	return nil
}

// foreignFlags describe a VM of somebody else's: a bare kernel, other firmware,
// tables that were taken from a running machine.
type foreignFlags struct {
	Kernel          string            `placeholder:"FILE" help:"Measure this kernel rather than a UKI."`
	Initrd          string            `placeholder:"FILE" help:"Its initrd."`
	Cmdline         string            `placeholder:"TEXT" help:"Its command line, as QEMU's -append has it."`
	UKI             string            `name:"uki" placeholder:"FILE" help:"Measure this UKI, on a machine that no shape describes."`
	Firmware        string            `placeholder:"FILE" help:"The firmware (default: that of the tools root for the platform)."`
	FirmwareProfile string            `placeholder:"NAME" help:"What the firmware measures, where its hash is not known; see docs/measure.md."`
	Memory          int64             `placeholder:"MIB" help:"The VM's memory."`
	CPUs            int               `name:"cpus" placeholder:"N" help:"The VM's vCPUs, to be compared with the tables'."`
	ACPITables      string            `name:"acpi-tables" placeholder:"FILE" help:"etc/acpi/tables of QEMU's fw_cfg."`
	ACPIRSDP        string            `name:"acpi-rsdp" placeholder:"FILE" help:"etc/acpi/rsdp."`
	ACPILoader      string            `name:"acpi-loader" placeholder:"FILE" help:"etc/table-loader."`
	FwCfg           map[string]string `name:"fw-cfg" mapsep:"none" placeholder:"NAME=FILE" help:"Another file of fw_cfg, such as etc/smbios/smbios-tables; repeat it for more."`
	BootVariable    []string          `sep:"none" placeholder:"NAME=FILE" help:"BootOrder, then each Boot#### in its order, instead of the firmware's own."`
	SecureBoot      map[string]string `mapsep:"none" placeholder:"NAME=FILE" help:"A Secure Boot variable that is enrolled: PK, KEK, db, dbx, SecureBoot."`
	QEMUVersion     string            `name:"qemu-version" placeholder:"X.Y" help:"QEMU's version: it decides the order of pages and whether a kernel is changed (default: that of the tools root)."`
}

func (f *foreignFlags) used() bool { return f.Kernel != "" || f.UKI != "" }

// foreign predicts a VM from the files that are given, and prints its registers.
func (c *MeasureCmd) foreign(tools *toolsroot.Root) error {
	f := &c.Foreign
	system, order, err := plan.Foreign(tools, plan.ForeignOptions{
		Platform: record.Platform(c.Platform), Boot: record.Boot(c.Boot), Disk: c.Disk, DiskSlot: launcher.DiskSlot,
		Kernel: f.Kernel, Initrd: f.Initrd, Cmdline: f.Cmdline, UKI: f.UKI, Firmware: f.Firmware, Profile: f.FirmwareProfile,
		Memory: uint64(f.Memory) << 20, CPUs: f.CPUs, Tables: f.ACPITables, RSDP: f.ACPIRSDP, Loader: f.ACPILoader, FwCfg: f.FwCfg,
		BootVariables: f.BootVariable, SecureBoot: f.SecureBoot, QEMU: f.QEMUVersion, Lock: chrysalis.ImageLock,
	})
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	registers, err := plan.Registers(system, order)
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	if c.Out != "" {
		return &exitError{exitBadInput, errors.New("a record is of an image of ours; print the registers with --json")}
	}
	return printRegisters(os.Stdout, registers, c.Events, c.JSON)
}

type registerJSON struct {
	Name    string      `json:"name"`
	Value   string      `json:"value,omitempty"`
	Missing string      `json:"missing,omitempty"`
	Events  []eventJSON `json:"events"`
}

type eventJSON struct {
	Name    string `json:"name"`
	Detail  string `json:"detail"`
	Digest  string `json:"digest,omitempty"`
	Missing string `json:"missing,omitempty"`
}

func printRegisters(out io.Writer, list []measure.Register, events, asJSON bool) error {
	if asJSON {
		all := []registerJSON{}
		for _, r := range list {
			j := registerJSON{Name: r.Name, Value: fmt.Sprintf("%x", r.Value), Missing: r.Missing, Events: []eventJSON{}}
			for _, e := range r.Events {
				j.Events = append(j.Events, eventJSON{e.Name, e.Detail, fmt.Sprintf("%x", e.Digest), e.Missing})
			}
			all = append(all, j)
		}
		return json.NewEncoder(out).Encode(map[string]any{"registers": all})
	}
	w := tabwriter.NewWriter(terminal.NewWriter(out), 0, 8, 2, ' ', 0)
	for _, r := range list {
		if r.Value != nil {
			fmt.Fprintf(w, "%s\t%x\n", r.Name, r.Value)
		} else {
			fmt.Fprintf(w, "%s\tnot predicted: %s\n", r.Name, terminal.Line(r.Missing))
		}
		for _, e := range r.Events {
			if events {
				fmt.Fprintf(w, "  %s\t%x\t%s\n", e.Name, e.Digest, terminal.Line(e.Detail+" "+e.Missing))
			}
		}
	}
	return w.Flush()
}
