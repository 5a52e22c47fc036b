package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"

	"chrysalis/image"
	"chrysalis/image/export"
)

// ImageExportCmd makes one disk of everything that a VM needs.
type ImageExportCmd struct {
	Format    string           `enum:"raw,qcow2" default:"raw" help:"How the disk is kept in the file: raw or qcow2 (default: ${default})."`
	Out       string           `short:"o" required:"" placeholder:"FILE" help:"The file to make."`
	Image     string           `default:"out/chrysalis.efi" placeholder:"FILE" help:"The image (default: ${default})."`
	Engine    string           `default:"out/llama.cpp.disk" placeholder:"FILE" help:"The engine disk (default: ${default})."`
	Model     []string         `required:"" placeholder:"FILE" sep:"none" help:"A model disk; repeat it for more."`
	Manifest  string           `placeholder:"FILE" help:"Use this manifest as it is rather than one made from the disks."`
	Parameter map[string]int64 `placeholder:"NAME=VALUE" mapsep:"none" help:"A parameter of the engine, an integer; repeat it for more."`
	Tokens    TokenFlags       `embed:""`
	GPUs      int              `name:"gpus" placeholder:"N" help:"GPUs that the VM must have (default: none)."`
	Force     bool             `short:"f" help:"Replace the file if it is there."`
	JSON      bool             `name:"json" help:"Print one JSON document."`
}

// Run writes the disk and prints its hash and the manifest's.
func (c *ImageExportCmd) Run(ctx context.Context) error {
	tokens, err := c.Tokens.hashes()
	if err != nil {
		return err
	}
	show := newSteps()
	defer show.done()
	result, err := export.Write(ctx, export.Options{
		Image: c.Image, Engine: c.Engine, Models: c.Model,
		Manifest: c.Manifest, Parameters: c.Parameter, Tokens: tokens, GPUs: c.GPUs,
		Format: export.Format(c.Format), Out: c.Out, Replace: c.Force, Progress: show.step,
	})
	if err != nil {
		return err
	}
	show.step("hash "+c.Out, 0, 0)
	sum, size, err := image.HashFile(c.Out)
	if err != nil {
		return err
	}
	show.done()
	digest := hex.EncodeToString(result.ManifestSHA384[:])
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{
			"path": c.Out, "format": c.Format, "size": size, "sha256": sum,
			"disk_size": result.Size, "disk_guid": result.Disk.String(),
			"manifest": json.RawMessage(result.Manifest), "manifest_sha384": digest,
		})
	}
	fmt.Printf("%s  %s  %.1f MB\n", sum, c.Out, float64(size)/1e6)
	fmt.Printf("manifest SHA-384, MRCONFIGID on TDX: %s\n", digest)
	return nil
}
