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
	Release string `arg:"" type:"path" help:"The release: a folder with UKI, disks, manifest, SBOMs, provenance and image.lock, and nothing else but measurement records and the bundle; or a measurement record alone."`
	Keep    string `placeholder:"DIR" help:"Build into this folder, which must be empty or not there, and leave it (default: a temporary one)."`
	JSON    bool   `name:"json" help:"Print one JSON document."`
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
	info, err := os.Stat(c.Release)
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	check := a.Audit
	if !info.IsDir() {
		check = a.AuditRecord
	}
	report, err := check(ctx, c.Release)
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
			_, err = fmt.Printf("it is what commit %s makes\n", report.Commit)
		}
	}
	if err != nil {
		return err
	}
	if !report.OK {
		return &exitError{exitDifferent, fmt.Errorf("%s: it does not hold", c.Release)}
	}
	return nil
}
