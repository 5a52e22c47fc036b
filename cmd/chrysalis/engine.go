package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"chrysalis/engine"
	"chrysalis/image"
	"chrysalis/image/profile"
)

type engineCommands struct {
	Pack EnginePackCmd `cmd:"" help:"Pack an inference server's files onto an engine disk."`
}

// EnginePackCmd makes an engine disk.
type EnginePackCmd struct {
	Source      string `arg:"" help:"A folder, - for a tar stream on standard input, oci:DIR@sha256:… or docker://NAME@sha256:…"`
	Profile     string `type:"existingfile" placeholder:"FILE" help:"The engine's profile (default: the one that the files have)."`
	GPUDriver   string `name:"gpu-driver" type:"existingdir" placeholder:"DIR" help:"A GPU driver to put beside them: driver.json, driver.rim, modules, firmware, and the helper's root (docs/gpu.md)."`
	Out         string `short:"o" required:"" placeholder:"FILE" help:"The disk to make; FILE.json says what it is."`
	Force       bool   `short:"f" help:"Replace the disk if it is there."`
	KeepPartial bool   `help:"Keep the unfinished disk after an error, beside the disk to make."`
	JSON        bool   `name:"json" help:"Print one JSON document."`
}

// Run packs and prints the engine's name and root hash.
func (c *EnginePackCmd) Run(ctx context.Context) error {
	var own []byte
	if c.Profile != "" {
		data, err := os.ReadFile(c.Profile)
		if err != nil {
			return err
		}
		own = data
	}
	show := newSteps()
	defer show.done()
	info, err := engine.Pack(ctx, c.Source, engine.Options{
		Out: c.Out, Replace: c.Force, Profile: own, KeepPartial: c.KeepPartial,
		GPUDriver: c.GPUDriver, Kernel: image.Kernel, KernelModules: image.GPUModules(),
		Progress: show.step, Note: note, Stream: os.Stdin,
	})
	show.done()
	if err != nil {
		return err
	}
	if info.Profile.Status == profile.Untested {
		note("the profile says that this engine has not been run in a VM yet")
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(info.Fragment())
	}
	fmt.Printf("%s:%s\n", info.Profile.Name, info.Disk.RootHash)
	return nil
}
