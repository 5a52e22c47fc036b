package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"chrysalis/models"
	"chrysalis/terminal"
)

type modelCommands struct {
	Pack    ModelPackCmd    `cmd:"" help:"Pack a model's files onto a model disk."`
	Verify  ModelVerifyCmd  `cmd:"" help:"Check a model disk."`
	Inspect ModelInspectCmd `cmd:"" help:"Show what a model disk holds."`
	Diff    ModelDiffCmd    `cmd:"" help:"Say how two model disks differ."`
	List    ModelListCmd    `cmd:"" help:"List the model disks in a folder."`
}

// ModelPackCmd makes a model disk.
type ModelPackCmd struct {
	Source      string   `arg:"" help:"A folder as a model hub lays it out, a GGUF file, or - for a tar stream on standard input."`
	Name        string   `required:"" placeholder:"ORG/NAME" help:"The model's name."`
	Revision    string   `required:"" help:"The model's revision."`
	Out         string   `short:"o" required:"" placeholder:"FILE" help:"The disk to make; FILE.json says what it is."`
	Force       bool     `short:"f" help:"Replace the disk if it is there."`
	Allow       []string `placeholder:"PATTERN" sep:"none" help:"Pack files that would be refused for what they are, pickles and scripts, by name; repeat it for more."`
	Exclude     []string `placeholder:"PATTERN" sep:"none" help:"Leave files or folders out, by name; repeat it for more."`
	KeepPartial bool     `help:"Keep the unfinished disk after an error, beside the disk to make."`
	JSON        bool     `name:"json" help:"Print one JSON document."`
}

// Help is what 'chrysalis model pack --help' says below the usage.
func (*ModelPackCmd) Help() string {
	return "Files whose names begin with a dot are left out. An interrupted run is taken up by the next."
}

// Run packs and prints the model's reference.
func (c *ModelPackCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	info, err := models.Pack(ctx, c.Source, models.PackOptions{
		Name: c.Name, Revision: c.Revision, Out: c.Out, Replace: c.Force,
		Allow: c.Allow, Exclude: c.Exclude, KeepPartial: c.KeepPartial,
		Progress: show.step, Note: note, Stream: os.Stdin,
	})
	show.done()
	if err != nil {
		if ctx.Err() != nil && c.Source != "-" {
			return errors.New("interrupted; run it again to go on from here")
		}
		return err
	}
	return printModel(info, c.JSON)
}

// note prints what the user should know.
func note(text string) { fmt.Fprintln(os.Stderr, "note:", terminal.Clean(text)) }

// ModelVerifyCmd checks a model disk.
type ModelVerifyCmd struct {
	Disk     string `arg:"" type:"existingfile" help:"A model disk."`
	Full     bool   `help:"Read the whole disk: every block, every file's SHA-256, the weights' headers."`
	RootHash string `placeholder:"HEX" help:"The root hash that the disk must have."`
	JSON     bool   `name:"json" help:"Print one JSON document."`
}

// Run verifies and prints the model's reference.
func (c *ModelVerifyCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	info, err := models.Verify(ctx, c.Disk, models.VerifyOptions{Full: c.Full, RootHash: c.RootHash, Progress: show.step})
	show.done()
	if err != nil {
		return err
	}
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
	if c.JSON {
		return printModel(info, true)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"model", info.ID()}, {"root hash", info.Disk.RootHash.String()}, {"format", info.Format},
		{"parameters", count(info.Parameters)}, {"context length", count(info.ContextLength)},
		{"quantisation", stated(info.Quantisation)}, {"licence", stated(info.Licence)},
		{"disk", fmt.Sprintf("%d bytes", info.Disk.Size)}, {"files", fmt.Sprintf("%d bytes", info.Size())},
	} {
		fmt.Fprintf(w, "%s\t%s\n", line[0], line[1])
	}
	for _, f := range info.Files {
		fmt.Fprintf(w, "  %s\t%d\t%s\n", f.Path, f.Size, f.SHA256)
	}
	return w.Flush()
}

func count(n int64) string {
	if n == 0 {
		return "not stated"
	}
	return fmt.Sprint(n)
}

func stated(s string) string {
	if s == "" {
		return "not stated"
	}
	return s
}

// ModelDiffCmd compares two model disks.
type ModelDiffCmd struct {
	A string `arg:"" type:"existingfile" help:"A model disk."`
	B string `arg:"" type:"existingfile" help:"Another."`
}

// Run prints the differences. It ends with 1 if there are any.
func (c *ModelDiffCmd) Run() error {
	a, err := models.Inspect(c.A)
	if err != nil {
		return err
	}
	b, err := models.Inspect(c.B)
	if err != nil {
		return err
	}
	lines := models.Diff(a, b)
	for _, line := range lines {
		fmt.Println(terminal.Clean(line))
	}
	if len(lines) > 0 {
		return &exitError{code: 1}
	}
	fmt.Println("the same disk:", a.Ref())
	return nil
}

// ModelListCmd lists model disks.
type ModelListCmd struct {
	Dir  string `arg:"" optional:"" default:"." type:"existingdir" help:"The folder (default: this one)."`
	JSON bool   `name:"json" help:"Print one JSON document a line."`
}

// Run prints a line for each model disk, *.disk.
func (c *ModelListCmd) Run() error {
	list, err := models.List(c.Dir)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, l := range list {
		if c.JSON {
			if err := json.NewEncoder(os.Stdout).Encode(struct {
				Path string `json:"path"`
				models.Fragment
			}{l.Path, l.Info.Fragment()}); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintln(w, strings.Join([]string{
			l.Info.ID(), l.Info.Format, stated(l.Info.Quantisation), fmt.Sprintf("%d bytes", l.Info.Size()),
			l.Info.Disk.RootHash.String(), terminal.Clean(l.Path),
		}, "\t"))
	}
	return w.Flush()
}

func printModel(info models.Info, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(os.Stdout).Encode(info.Fragment())
	}
	fmt.Println(info.Ref())
	return nil
}
