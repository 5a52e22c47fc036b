package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"chrysalis/image/provenance"
	"chrysalis/image/release"
	"chrysalis/terminal"
)

// ImageReleaseCmd writes or checks the hashes that a build must have.
type ImageReleaseCmd struct {
	Source string   `default:"." type:"existingdir" placeholder:"DIR" help:"Top of the source tree, where release.json is (default: ${default})."`
	Dir    string   `arg:"" optional:"" default:"out" help:"Where 'image build' put the artefacts (default: ${default})."`
	Engine []string `default:"llama.cpp" sep:"none" placeholder:"NAME" help:"As for 'image build' (default: ${default})."`
	Model  []string `default:"demo" sep:"none" placeholder:"NAME" help:"As for 'image build' (default: ${default})."`
	Check  bool     `help:"Compare with release.json instead of writing it."`
	JSON   bool     `name:"json" help:"Print what release.json would hold, and write nothing."`
}

// Run describes the artefacts in the folder.
func (c *ImageReleaseCmd) Run(ctx context.Context) error {
	p, err := provenance.NewParameters("", c.Engine, c.Model)
	if err != nil {
		return err
	}
	found, err := release.Describe(ctx, c.Source, c.Dir, p)
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	if c.JSON {
		if _, err := os.Stdout.Write(found.Encode()); err != nil || !c.Check {
			return err
		}
	}
	if !c.Check {
		if err := found.Write(c.Source); err != nil {
			return err
		}
		fmt.Println(filepath.Join(c.Source, release.Name))
		return nil
	}
	expected, err := release.Read(c.Source)
	if err != nil {
		return &exitError{exitBadInput, fmt.Errorf("%w; write them with 'make release' and commit them", err)}
	}
	differences := release.Diff(expected, found)
	if len(differences) == 0 {
		if !c.JSON {
			fmt.Printf("%s: as %s says\n", c.Dir, release.Name)
		}
		return nil
	}
	for _, line := range differences {
		fmt.Fprintln(os.Stderr, terminal.Line(line))
	}
	return &exitError{exitDifferent, fmt.Errorf(`%s holds something else than %s says.
If the source or image.lock was changed on purpose, write %[2]s anew with 'make release' and commit it with the change, so that a review sees what the change alters.
If neither was changed, the build depends on something that it must not depend on: build the last commit that passed, and let 'chrysalis image diff' say what differs`, c.Dir, release.Name)}
}
