package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"chrysalis"
	"chrysalis/image"
)

type imageCommands struct {
	Build ImageBuildCmd `cmd:"" help:"Build the UKI and the engine disks from the lock."`
	Tools ImageToolsCmd `cmd:"" help:"Make the tools root, which holds QEMU, firmware and mkosi."`
	Lock  ImageLockCmd  `cmd:"" help:"Resolve every package anew and rewrite the lock."`
}

// mirrorFlags say where packages come from.
type mirrorFlags struct {
	Mirror []string `sep:"none" placeholder:"MIRROR" help:"A Debian mirror, or a directory laid out like one; repeat it for more, tried in turn (default: the host's own)."`
}

// sourceFlags are what every command needs that builds from a source tree.
type sourceFlags struct {
	Source string `default:"." type:"existingdir" placeholder:"DIR" help:"Top of the source tree (default: ${default})."`
	mirrorFlags
}

func (f mirrorFlags) mirrors(ctx context.Context) ([]string, error) {
	if len(f.Mirror) > 0 {
		return f.Mirror, nil
	}
	mirror, err := image.HostMirror(ctx)
	if err != nil {
		return nil, err
	}
	return []string{mirror}, nil
}

func (f sourceFlags) builder(ctx context.Context, out string, show *steps) (*image.Builder, error) {
	mirrors, err := f.mirrors(ctx)
	if err != nil {
		return nil, err
	}
	return &image.Builder{Source: f.Source, Mirrors: mirrors, Out: out, Progress: show.step}, nil
}

// ImageBuildCmd builds what a VM boots.
type ImageBuildCmd struct {
	sourceFlags
	Out     string   `short:"o" default:"out" placeholder:"DIR" help:"Where the artefacts go (default: ${default})."`
	Profile string   `placeholder:"NAME" help:"Build the image of a profile under mkosi.profiles, such as debug."`
	Engine  []string `default:"llama.cpp" sep:"none" placeholder:"NAME" help:"An engine under image/engines; repeat it for more (default: ${default})."`
	JSON    bool     `name:"json" help:"Print one JSON document with the artefacts."`
}

// Run builds and prints where the artefacts are.
func (c *ImageBuildCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	b, err := c.builder(ctx, c.Out, show)
	if err != nil {
		return err
	}
	uki, err := b.UKI(ctx, c.Profile)
	if err != nil {
		return err
	}
	artefacts := []string{uki}
	for _, name := range c.Engine {
		disk, err := b.Engine(ctx, name)
		if err != nil {
			return err
		}
		artefacts = append(artefacts, disk)
	}
	show.done()
	type artefact struct {
		Path   string `json:"path"`
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256"`
	}
	var list []artefact
	for _, path := range artefacts {
		sum, size, err := image.HashFile(path)
		if err != nil {
			return err
		}
		if here, err := os.Getwd(); err == nil {
			if rel, err := filepath.Rel(here, path); err == nil && filepath.IsLocal(rel) {
				path = rel
			}
		}
		list = append(list, artefact{path, size, sum})
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"artefacts": list})
	}
	for _, a := range list {
		fmt.Printf("%s  %s  %.1f MB\n", a.SHA256, a.Path, float64(a.Size)/1e6)
	}
	return nil
}

// ImageToolsCmd makes the tools root that belongs to this program.
type ImageToolsCmd struct {
	mirrorFlags
}

// Run makes it, unless it is there, and prints where it is.
func (c *ImageToolsCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	mirrors, err := c.mirrors(ctx)
	if err != nil {
		return err
	}
	lock, err := image.ParseLock(chrysalis.ImageLock)
	if err != nil {
		return err
	}
	root, err := image.MakeTools(ctx, lock, mirrors, show.step)
	if err != nil {
		return err
	}
	show.done()
	fmt.Println(root.Dir)
	return nil
}

// ImageLockCmd rewrites the lock.
type ImageLockCmd struct {
	sourceFlags
	DryRun bool `help:"Only print what would change."`
}

// Run resolves every package from the first mirror and prints the difference.
func (c *ImageLockCmd) Run(ctx context.Context) error {
	mirrors, err := c.mirrors(ctx)
	if err != nil {
		return err
	}
	after, err := image.Resolve(ctx, mirrors[0])
	if err != nil {
		return err
	}
	path := filepath.Join(c.Source, image.LockName)
	before := &image.Lock{}
	if _, err := os.Stat(path); err == nil {
		if before, err = image.ReadLock(c.Source); err != nil {
			return err
		}
	}
	changes := image.Diff(before, after)
	for _, line := range changes {
		fmt.Println(line)
	}
	if len(changes) == 0 {
		fmt.Println("nothing changed")
	}
	if c.DryRun {
		return nil
	}
	return image.WriteLock(c.Source, after)
}
