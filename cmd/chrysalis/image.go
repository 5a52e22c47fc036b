package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"chrysalis"
	"chrysalis/image"
	"chrysalis/image/provenance"
	"chrysalis/terminal"
)

type imageCommands struct {
	Build  ImageBuildCmd  `cmd:"" help:"Build the UKI, the disks and their manifest, from the lock."`
	Helper ImageHelperCmd `cmd:"" help:"Build the GPU helper, which an engine disk with NVIDIA's driver carries."`
	Tools  ImageToolsCmd  `cmd:"" help:"Make the tools root, which holds QEMU, firmware and mkosi."`
	Lock   ImageLockCmd   `cmd:"" help:"Resolve every package anew and rewrite the lock."`
	Bundle ImageBundleCmd `cmd:"" help:"Write everything that the lock names into one file, for --mirror."`
	Export ImageExportCmd `cmd:"" help:"Write image, engine, models and manifest onto one disk that boots by itself."`

	Inspect ImageInspectCmd `cmd:"" help:"Show what is inside a UKI or a disk."`
	Diff    ImageDiffCmd    `cmd:"" help:"Tell why two UKIs or two disks are not the same."`

	Release ImageReleaseCmd `cmd:"" help:"Write the hashes that a build must have, release.json, or check a build against it."`

	VerifyProvenance ImageVerifyProvenanceCmd `cmd:"" help:"Check a provenance statement against the files beside it."`
}

// mirrorFlags say where packages come from.
type mirrorFlags struct {
	Mirror []string `sep:"none" placeholder:"MIRROR" help:"A Debian mirror's address, a directory laid out like one, or a file made by 'image bundle'; repeat it for more, tried in turn (default: the host's own mirror)."`
}

// sourceFlags are what every command needs that builds from a source tree.
type sourceFlags struct {
	Source string `default:"." type:"existingdir" placeholder:"DIR" help:"Top of the source tree (default: ${default})."`
	mirrorFlags
}

// mirrors returns where to look. A host whose apt names no mirror has none, which
// is enough where the cache has everything.
func (f mirrorFlags) mirrors(ctx context.Context) []string {
	if len(f.Mirror) > 0 {
		return f.Mirror
	}
	if mirror, err := image.HostMirror(ctx); err == nil {
		return []string{mirror}
	}
	return nil
}

func (f sourceFlags) builder(ctx context.Context, out string, show *steps) *image.Builder {
	return &image.Builder{Source: f.Source, Mirrors: f.mirrors(ctx), Out: out, Progress: show.step}
}

// ImageBuildCmd builds what a VM boots.
type ImageBuildCmd struct {
	sourceFlags
	Out     string   `short:"o" default:"out" placeholder:"DIR" help:"Where the artefacts go (default: ${default})."`
	Profile string   `placeholder:"NAME" help:"Build the image of a profile under mkosi.profiles, such as debug."`
	Engine  []string `default:"llama.cpp" sep:"none" placeholder:"NAME" help:"An engine under image/engines; repeat it for more (default: ${default})."`
	Model   []string `default:"demo" sep:"none" placeholder:"NAME" help:"A model under models that has a model.json; repeat it for more (default: ${default})."`
	JSON    bool     `name:"json" help:"Print one JSON document with the artefacts."`

	ImageOnly  bool `help:"Build the UKI, and no disks or manifest."`
	AllowDirty bool `help:"Write a provenance statement even if the source tree is not as in its commit; it says so."`
}

// Run builds, writes SBOMs and provenance beside the artefacts, and prints where
// these are.
func (c *ImageBuildCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	if c.ImageOnly {
		c.Engine, c.Model = nil, nil
	}
	p, err := provenance.NewParameters(c.Profile, c.Engine, c.Model)
	if err != nil {
		return err
	}
	source, reason := c.provenanceSource(ctx)
	made, err := provenance.Make(ctx, c.builder(ctx, c.Out, show), p)
	if err != nil {
		return err
	}
	statement, refused, err := c.writeProvenance(ctx, made, source, reason)
	if err != nil {
		return err
	}
	show.done()
	if refused != nil {
		fmt.Fprintln(os.Stderr, "no provenance is written:", terminal.Clean(refused.Error()))
	}
	var artefacts []string
	for _, name := range p.Artefacts() {
		artefacts = append(artefacts, filepath.Join(c.Out, name))
	}
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
		list = append(list, artefact{path, size, sum})
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"artefacts": list, "provenance": statement})
	}
	for _, a := range list {
		fmt.Printf("%s  %s  %.1f MB\n", a.SHA256, a.Path, float64(a.Size)/1e6)
	}
	if statement != "" {
		fmt.Println("provenance:", statement)
	}
	return nil
}

// ImageToolsCmd makes the tools root that belongs to this program.
type ImageToolsCmd struct {
	mirrorFlags
	List bool `help:"Print what is in it, a line each, rather than where it is."`
}

// Run makes it, unless it is there and sound, and prints where or what it is.
func (c *ImageToolsCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	lock, err := image.ParseLock(chrysalis.ImageLock)
	if err != nil {
		return err
	}
	root, err := image.MakeTools(ctx, lock, c.mirrors(ctx), show.step)
	if err != nil {
		return err
	}
	if c.List {
		list, err := root.List(ctx)
		if err != nil {
			return err
		}
		show.done()
		_, err = os.Stdout.Write(list)
		return err
	}
	show.done()
	fmt.Println(root.Dir)
	return nil
}

// ImageLockCmd rewrites the lock.
type ImageLockCmd struct {
	sourceFlags
	GoOnly     bool `help:"Take over the Go toolchain and modules, and keep every package."`
	AllowOlder bool `help:"Accept a mirror whose indices are older than the lock."`
	DryRun     bool `help:"Only print what would change."`
	JSON       bool `name:"json" help:"Print one JSON document with the changes."`
}

// Run resolves everything anew, writes the lock if it changes, and prints the
// difference.
func (c *ImageLockCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	changes, err := image.UpdateLock(ctx, c.Source, image.LockUpdate{
		Mirrors: func() []string { return c.mirrors(ctx) },
		GoOnly:  c.GoOnly, AllowOlder: c.AllowOlder, DryRun: c.DryRun, Progress: show.step,
	})
	if err != nil {
		return err
	}
	show.done()
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(struct {
			Changes []image.Change `json:"changes"`
			Written bool           `json:"written"`
		}{append([]image.Change{}, changes...), len(changes) > 0 && !c.DryRun})
	}
	for _, change := range changes {
		fmt.Println(change)
	}
	if len(changes) == 0 {
		fmt.Println("nothing changed")
	}
	return nil
}

// ImageBundleCmd writes a bundle.
type ImageBundleCmd struct {
	sourceFlags
	Out string `short:"o" required:"" placeholder:"FILE" help:"The file to write."`
}

// Run fetches what the cache lacks, writes the bundle and prints its hash.
func (c *ImageBundleCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	if err := c.builder(ctx, "", show).Bundle(ctx, c.Out); err != nil {
		return err
	}
	show.done()
	sum, size, err := image.HashFile(c.Out)
	if err != nil {
		return err
	}
	fmt.Printf("%s  %s  %.1f MB\n", sum, c.Out, float64(size)/1e6)
	return nil
}
