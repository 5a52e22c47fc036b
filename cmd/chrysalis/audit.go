package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"chrysalis/audit"
	"chrysalis/image/provenance"
)

// AuditCmd builds a release again and compares.
type AuditCmd struct {
	sourceFlags
	Release string `arg:"" help:"The release: a folder with UKI, disks, manifest, SBOMs, provenance and image.lock, and nothing else but measurement records and the bundle; or a measurement record alone. With --registry: a record's key, or a file of records."`
	Keep    string `placeholder:"DIR" help:"Build into this folder, which must be empty or not there, and leave it (default: a temporary one)."`
	JSON    bool   `name:"json" help:"Print one JSON document."`

	Registry   string `placeholder:"ADDRESS" group:"Records on TON:" help:"Audit what this registry has, read with proofs, of the key or of the file, which must have the same."`
	Cosign     bool   `group:"Records on TON:" help:"Sign these records in the registry when all checks hold, as 'chrysalis registry cosign' does."`
	AuditorKey string `placeholder:"FILE" group:"Records on TON:" help:"The auditor's key (default: the wallet's)."`
	payerFlags `group:"Records on TON:"`
	TON        tonFlags `embed:"" prefix:"ton-" group:"Records on TON:"`
}

// Validate is kong's hook.
func (c *AuditCmd) Validate() error {
	switch {
	case c.Cosign && c.Registry == "":
		return errors.New("missing flags: --registry=ADDRESS, which has the records to sign")
	case c.Cosign && c.KeyFile == "":
		return errors.New("missing flags: --key-file=FILE")
	case !c.Cosign && c.AuditorKey != "":
		return errors.New("--auditor-key is given without --cosign")
	}
	return nil
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
	if c.Registry != "" {
		return c.auditRegistry(ctx, a, show)
	}
	c.Release = kong.ExpandPath(c.Release)
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
