package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"chrysalis"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/terminal"
)

// PublishCmd publishes what VMs measure that are booted from some files.
type PublishCmd struct {
	tonFlags
	walletFlags
	Image    string        `default:"out/chrysalis.efi" placeholder:"FILE" help:"The image (default: ${default})."`
	Engine   string        `placeholder:"FILE" help:"The engine disk."`
	Model    []string      `placeholder:"FILE" sep:"none" help:"A model disk; repeat it for more."`
	Manifest string        `placeholder:"FILE" help:"Use this manifest as it is rather than one made from the disks."`
	Shape    []string      `placeholder:"NAME" sep:"none" help:"A shape; repeat it for more (default: all of them)."`
	Platform string        `enum:"tdx,tpm" default:"tdx" help:"What the evidence comes from: tdx or tpm (default: ${default})."`
	Firmware string        `placeholder:"FILE" help:"The firmware (default: as 'chrysalis measure' takes it)."`
	Valid    time.Duration `default:"8760h" help:"How long the records are valid (default: ${default})."`
	Tools    string        `hidden:"" env:"CHRYSALIS_TOOLS" placeholder:"DIR" help:"The tools root."`
}

// Help is what 'chrysalis publish --help' says below the usage.
func (*PublishCmd) Help() string {
	return "It does what 'chrysalis measure' and 'chrysalis registry publish' do, one after the other. A GPU owner's own word proves nothing: clients go by publishers that they have chosen."
}

// Run predicts the measurements and publishes them to the wallet's own registry.
func (c *PublishCmd) Run(ctx context.Context) error {
	tools, err := openToolsRoot(c.Tools)
	if err != nil {
		return err
	}
	result, err := plan.Run(ctx, plan.Options{
		Platform: record.Platform(c.Platform), Boot: record.BootKernel,
		Image: c.Image, Engine: c.Engine, Models: c.Model, Manifest: c.Manifest, Shapes: c.Shape,
		Firmware: c.Firmware, Lock: chrysalis.ImageLock, Tools: tools,
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
	from := time.Now().UTC().Truncate(24 * time.Hour)
	list, err := registry.Publications(encoded, from, from.Add(c.Valid))
	if err != nil {
		return err
	}
	operations := []registry.Operation{registry.Init()}
	if c.DryRun {
		operations = nil // a registry that is not there yet takes no records
	}
	for _, p := range list {
		p.Keep = true
		operations = append(operations, registry.Publish(p))
	}
	return c.write(ctx, &c.tonFlags, "", operations...)
}
