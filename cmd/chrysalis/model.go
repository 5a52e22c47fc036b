package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"

	"chrysalis/models"
)

type modelCommands struct {
	Pack    ModelPackCmd    `cmd:"" help:"Pack a GGUF file onto a model disk."`
	Inspect ModelInspectCmd `cmd:"" help:"Show what a model disk holds."`
}

// ModelPackCmd makes a model disk.
type ModelPackCmd struct {
	Source   string `arg:"" type:"existingfile" help:"A GGUF file."`
	Name     string `required:"" placeholder:"ORG/NAME" help:"The model's name."`
	Revision string `required:"" help:"The model's revision."`
	Out      string `short:"o" required:"" placeholder:"FILE" help:"The disk to make."`
	Force    bool   `short:"f" help:"Replace the disk if it is there."`
	JSON     bool   `name:"json" help:"Print one JSON document."`
}

// Run packs and prints the model's reference.
func (c *ModelPackCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	info, err := models.Pack(ctx, c.Source, models.PackOptions{
		Name: c.Name, Revision: c.Revision, Out: c.Out, Replace: c.Force, Progress: show.step,
	})
	if err != nil {
		return err
	}
	show.done()
	return printModel(info, c.JSON)
}

// ModelInspectCmd describes a model disk.
type ModelInspectCmd struct {
	Disk string `arg:"" type:"existingfile" help:"A model disk."`
	JSON bool   `name:"json" help:"Print one JSON document."`
}

// Run prints what the disk says about itself.
func (c *ModelInspectCmd) Run() error {
	info, err := models.Inspect(c.Disk)
	if err != nil {
		return err
	}
	return printModel(info, c.JSON)
}

func printModel(info models.Info, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{
			"name": info.Name, "revision": info.Revision,
			"root_hash": info.Disk.RootHash.String(), "salt": hex.EncodeToString(info.Disk.Salt),
			"data_blocks": info.Disk.DataBlocks, "disk_size": info.Disk.Size,
			"size": info.Size, "sha256": hex.EncodeToString(info.SHA256[:]),
		})
	}
	fmt.Println(info.Ref())
	return nil
}
