package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"chrysalis/audit"
	"chrysalis/image/provenance"
)

// AuditCmd builds a release again and compares.
type AuditCmd struct {
	sourceFlags
	Dir  string `arg:"" type:"existingdir" help:"The release: UKI, disks, manifest, SBOMs, provenance and image.lock, and nothing else but the bundle."`
	Keep string `placeholder:"DIR" help:"Build into this folder, which must be empty or not there, and leave it (default: a temporary one)."`
	JSON bool   `name:"json" help:"Print one JSON document."`
}

// Run audits the release and prints every check; it fails unless all hold.
func (c *AuditCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	a := &audit.Auditor{
		Source: c.Source, Keep: c.Keep,
		Build: func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
			return provenance.Make(ctx, c.builder(ctx, dir, show), p)
		},
		Bundle: func(ctx context.Context, path string) error {
			return c.builder(ctx, "", show).Bundle(ctx, path)
		},
	}
	report, err := a.Audit(ctx, c.Dir)
	show.done()
	return c.print(report, err)
}

// print prints what an audit came to, and turns it into the program's status.
func (c *AuditCmd) print(report *audit.Report, err error) error {
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	if c.JSON {
		err = json.NewEncoder(os.Stdout).Encode(report)
	} else {
		err = printChecks(os.Stdout, report.Checks)
		if err == nil && report.OK {
			_, err = fmt.Printf("the release is what commit %s makes\n", report.Commit)
		}
	}
	if err != nil {
		return err
	}
	if !report.OK {
		return &exitError{exitDifferent, fmt.Errorf("%s: the release does not hold", c.Dir)}
	}
	return nil
}
