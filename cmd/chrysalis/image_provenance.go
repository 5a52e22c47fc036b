package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"chrysalis/image/provenance"
	"chrysalis/terminal"
)

// ImageVerifyProvenanceCmd compares a provenance statement with files.
type ImageVerifyProvenanceCmd struct {
	File   string `arg:"" help:"A statement that 'image build' wrote; the files that it names are looked for beside it."`
	Source string `default:"." type:"existingdir" placeholder:"DIR" help:"Top of the source tree, whose lock must be the statement's (default: ${default})."`
	JSON   bool   `name:"json" help:"Print one JSON document."`
}

// Run prints every check; it fails unless all hold.
func (c *ImageVerifyProvenanceCmd) Run() error {
	checks, err := provenance.Verify(c.File, c.Source)
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	ok := provenance.Passed(checks)
	if c.JSON {
		err = json.NewEncoder(os.Stdout).Encode(map[string]any{"ok": ok, "checks": checks})
	} else {
		err = printChecks(os.Stdout, checks)
	}
	if err != nil {
		return err
	}
	if !ok {
		return &exitError{exitDifferent, fmt.Errorf("%s: what it says does not hold", c.File)}
	}
	return nil
}

// printChecks prints a check a line, and below what is to be said about it.
// Nothing in it is trusted.
func printChecks(out io.Writer, checks []provenance.Check) error {
	marks := map[provenance.Result]string{provenance.Pass: "✔", provenance.Fail: "✘", provenance.None: "-"}
	for _, c := range checks {
		if _, err := fmt.Fprintf(out, "%s  %s\n", marks[c.Result], terminal.Line(c.What)); err != nil {
			return err
		}
		if c.Detail != "" {
			fmt.Fprintf(out, "   %s\n", terminal.Line(c.Detail))
		}
		for _, d := range c.Differences {
			fmt.Fprintf(out, "   %s\n", terminal.Line(d.String()))
		}
	}
	return nil
}

// provenanceSource returns the state of the source tree, or why there will be no
// provenance of what is built from it.
func (c *ImageBuildCmd) provenanceSource(ctx context.Context) (provenance.Source, error) {
	s, err := provenance.ReadSource(ctx, c.Source)
	if err == nil && s.Dirty() && !c.AllowDirty {
		return s, fmt.Errorf("no commit stands for this build: not as in %s: %s; commit or remove such files, or have it recorded with --allow-dirty",
			s.Commit, strings.Join(s.Changed, ", "))
	}
	return s, err
}

// writeProvenance writes the statement about a build that began from a source
// tree in the state before, or began with the reason not to write one. It returns
// the statement's path, or why there is none; an earlier one does not stay.
func (c *ImageBuildCmd) writeProvenance(ctx context.Context, made provenance.Build, before provenance.Source, reason error) (path string, refused, err error) {
	if err := os.Remove(filepath.Join(c.Out, made.Statement())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", nil, err
	}
	if reason == nil {
		made.Source, reason = c.provenanceSource(ctx)
	}
	if err := ctx.Err(); err != nil {
		return "", nil, err
	}
	if reason == nil && (made.Source.Commit != before.Commit || made.Source.Dirty() != before.Dirty()) {
		reason = errors.New("the source tree changed during the build; build again")
	}
	if reason != nil {
		return "", reason, nil
	}
	path, err = made.WriteStatement(c.Out)
	return path, nil, err
}
