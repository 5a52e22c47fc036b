package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/sys/unix"

	"chrysalis"
	"chrysalis/guest"
	"chrysalis/image"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/launcher/gpu"
	"chrysalis/measure/record"
)

// UpCmd starts a VM.
type UpCmd struct {
	Name          string           `arg:"" optional:"" default:"default" help:"Name of the VM: lower-case letters, digits and '-'."`
	Image         string           `default:"chrysalis.efi" placeholder:"FILE" help:"The image (default: ${default})."`
	Engine        string           `default:"engine.disk" placeholder:"FILE" help:"The engine disk (default: ${default})."`
	Model         []string         `placeholder:"FILE" sep:"none" help:"A model disk; repeat it for more (default: demo.disk)."`
	Manifest      string           `placeholder:"FILE" help:"Use this manifest as it is rather than one made from the disks."`
	Parameter     map[string]int64 `placeholder:"NAME=VALUE" mapsep:"none" help:"A parameter of the engine, an integer; repeat it for more."`
	Tokens        TokenFlags       `embed:""`
	Shape         string           `default:"small" help:"The VM's shape, one of those below (default: ${default})."`
	GPU           []string         `name:"gpu" placeholder:"PCI-ADDRESS" sep:"none" help:"A GPU to pass through, like 0000:b8:00.0; repeat it for more."`
	GPUs          int              `name:"gpus" placeholder:"N" help:"Pass through as many of the GPUs that 'gpu prepare' made ready, in a shape that has them."`
	GPUCollateral string           `name:"gpu-collateral" placeholder:"FILE" help:"What NVIDIA signs about the GPUs (default: what 'gpu collateral' has kept)."`
	DiskRate      int64            `hidden:"" placeholder:"BYTES" help:"Read all disks together at no more than this a second."`
	Listen        string           `placeholder:"HOST:PORT" help:"Where clients connect; port 0 picks a free one (default: 127.0.0.1:8443, or where the replaced VM listens)."`
	Accel         string           `enum:"auto,tdx,kvm,tcg" default:"auto" help:"Accelerator: auto takes TDX, or else KVM where it really works, or else TCG (default: ${default})."`
	Firmware      string           `placeholder:"FILE" help:"The TDX firmware that belongs to the image; needed on TDX only."`
	Replace       bool             `help:"Start beside the running VM of this name, then take its place without a gap."`
	Timeout       time.Duration    `default:"2m" help:"How long the VM may take to become ready (default: ${default})."`
	Drain         time.Duration    `default:"1m" help:"How long requests of a replaced VM may take to finish (default: ${default})."`
	Tools         string           `hidden:"" env:"CHRYSALIS_TOOLS" placeholder:"DIR" help:"The tools root."`
	JSON          bool             `name:"json" help:"Print one JSON document a line: the steps, then the result."`

	List  bool       `help:"Offer the VM to everyone on TON once it is ready; refused before anything is booted when no publisher has the records of what would be."`
	Offer upOffer    `embed:"" group:"With --list, as 'chrysalis listing put' takes them; prices, payout and network also without:"`
	Pay   priceFlags `embed:"" group:"With prices, to be paid by clients:"`
}

// TokenFlags say which clients a VM lets in.
type TokenFlags struct {
	TokenHash []string `placeholder:"SHA-256" help:"Let in only clients with a bearer token of this SHA-256, hexadecimal; repeat it for more."`
	TokenFile string   `placeholder:"FILE" help:"Let in only clients with a bearer token out of this file, one a line; only their hashes leave it."`
}

func (f TokenFlags) hashes() ([]string, error) { return launcher.TokenHashes(f.TokenHash, f.TokenFile) }

// Help is what 'chrysalis up --help' says below the usage.
func (*UpCmd) Help() string {
	return "The shapes are " + strings.Join(launcher.ShapeNames(), ", ") + "."
}

// pickGPUs does what --gpus asks for, and checks that the shape is for these GPUs.
func (c *UpCmd) pickGPUs() (err error) {
	if c.GPUs == 0 && len(c.GPU) == 0 {
		return nil
	}
	if c.GPUs != 0 && len(c.GPU) > 0 {
		return errors.New("--gpu names GPUs and --gpus counts them; give one of both")
	}
	all, err := hostGPUs().List()
	if err != nil {
		return err
	}
	if c.GPUs > 0 {
		if c.GPU, err = gpu.Pick(all, c.GPUs); err != nil {
			return err
		}
	}
	for _, g := range all {
		if !slices.Contains(c.GPU, g.Address) {
			continue
		}
		bars := slices.DeleteFunc(slices.Clone(g.BARs), func(size uint64) bool { return size == 0 })
		if c.Shape == "small" { // the default
			if c.Shape, err = launcher.ShapeForGPUs(len(c.GPU), bars); err != nil {
				return err
			}
		}
		shape, err := launcher.LookupShape(c.Shape)
		if err != nil {
			return err
		}
		if err := shape.CheckGPU(g.Address, bars); err != nil {
			return err
		}
	}
	return nil
}

// Run starts the VM and waits until it is ready.
func (c *UpCmd) Run(ctx context.Context) error {
	tools, err := openToolsRoot(c.Tools)
	if err != nil {
		return err
	}
	models := c.Model
	if len(models) == 0 {
		models = []string{"demo.disk"}
	}
	tokens, err := c.Tokens.hashes()
	if err != nil {
		return err
	}
	if err := c.pickGPUs(); err != nil {
		return err
	}
	payment, err := c.payment()
	if err != nil {
		return err
	}
	predict := func() (*record.File, error) { return c.predict(ctx, models, tools) }
	return c.run(ctx, predict, func() (*launcher.Instance, error) {
		return c.boot(ctx, launcher.Options{
			Name: c.Name, Image: c.Image, Firmware: c.Firmware, Engine: c.Engine, Models: models,
			Manifest: c.Manifest, Parameters: c.Parameter, Tokens: tokens, Shape: c.Shape, GPUs: c.GPU, DiskRate: c.DiskRate, GPUCollateral: c.GPUCollateral, Payment: payment,
			Accel: launcher.Accel(c.Accel), Listen: c.Listen, Replace: c.Replace,
			Timeout: c.Timeout, Drain: c.Drain, Tools: tools,
		})
	})
}

// run boots a VM and, if it is to be listed, asks before whether it can be.
func (c *UpCmd) run(ctx context.Context, predict func() (*record.File, error), boot func() (*launcher.Instance, error)) error {
	if !c.List {
		_, err := boot()
		return err
	}
	file, err := predict()
	if err != nil {
		return fmt.Errorf("predict what would be listed: %w", err)
	}
	put, err := c.Offer.prepare(ctx, file)
	if err != nil {
		return fmt.Errorf("nothing was booted, since it could not be listed: %w", err)
	}
	instance, err := boot()
	if err != nil {
		return err
	}
	if (instance.Platform == launcher.PlatformTDX) != (file.Image.Platform == record.TDX) {
		err = fmt.Errorf("it runs on %s, and the records are of %s", instance.Platform, file.Image.Platform)
	} else {
		err = c.Offer.wallet(c.JSON).write(ctx, &c.Offer.TON, "", put)
	}
	if err != nil {
		return fmt.Errorf("the VM %q runs, and is not known to be listed: %w", c.Name, err)
	}
	return nil
}

// boot starts the VM and shows how that goes.
func (c *UpCmd) boot(ctx context.Context, o launcher.Options) (*launcher.Instance, error) {
	show := newProgress(os.Stderr, os.Stdout, c.JSON)
	instance, err := launcher.Up(ctx, o, show.event)
	show.done()
	if err != nil {
		if c.JSON && instance == nil {
			result := map[string]string{"event": "failed", "name": c.Name, "error": err.Error()}
			var ended *launcher.EndedError
			if errors.As(err, &ended) {
				result["error"], result["reason"] = ended.How, string(ended.Reason)
			}
			json.NewEncoder(os.Stdout).Encode(result)
		}
		return instance, err
	}
	if !c.JSON {
		fmt.Println(instance.Endpoint)
	}
	return instance, nil
}

// openToolsRoot opens the tools root at dir, or the one that belongs to this
// program.
func openToolsRoot(dir string) (*toolsroot.Root, error) {
	if dir != "" {
		return toolsroot.Open(dir)
	}
	lock, err := image.ParseLock(chrysalis.ImageLock)
	if err != nil {
		return nil, err
	}
	return image.OpenTools(lock)
}

// progress shows the steps of a start: JSON lines for programs, a bar on a
// terminal, else plain lines.
type progress struct {
	lines io.Writer // for people
	json  *json.Encoder
	bar   *progressbar.ProgressBar
	start time.Time
}

func newProgress(people *os.File, programs io.Writer, asJSON bool) *progress {
	p := &progress{lines: people, start: time.Now()}
	switch {
	case asJSON:
		p.json = json.NewEncoder(programs)
	case isTerminal(people):
		// One step for firmware and kernel, then the phases.
		p.bar = progressbar.NewOptions(len(guest.Phases)+1,
			progressbar.OptionSetWriter(people),
			progressbar.OptionSetDescription(fmt.Sprintf("%-10s", "kernel")),
			progressbar.OptionSetWidth(24),
			progressbar.OptionSetPredictTime(false),
			progressbar.OptionShowElapsedTimeOnFinish(),
			progressbar.OptionClearOnFinish(),
			progressbar.OptionSetRenderBlankState(true),
		)
	}
	return p
}

func (p *progress) event(e launcher.Event) {
	if p.json != nil {
		p.json.Encode(e)
		return
	}
	switch e.Kind {
	case launcher.EventNote:
		p.line("note: %s", e.Note)
	case launcher.EventPhase:
		if p.bar != nil {
			p.bar.Describe(fmt.Sprintf("%-10s", e.Phase))
			p.bar.Set(slices.Index(guest.Phases, e.Phase) + 1)
			return
		}
		p.line("%5.1f s  %s", time.Since(p.start).Seconds(), e.Phase)
	case launcher.EventReady:
		p.done()
		p.line("%5.1f s  ready (%s)", time.Since(p.start).Seconds(), e.State.Platform)
	case launcher.EventDraining:
		p.line("the replaced VM finishes its requests")
	}
}

func (p *progress) line(format string, args ...any) {
	if p.bar != nil {
		p.bar.Clear()
	}
	fmt.Fprintf(p.lines, format+"\n", args...)
}

// done takes the bar off the screen.
func (p *progress) done() {
	if p.bar != nil {
		p.bar.Clear()
		p.bar = nil
	}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
