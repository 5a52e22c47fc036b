package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/alecthomas/kong"

	"chrysalis/audit"
	"chrysalis/image/provenance"
	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// auditRegistry audits records of a registry, and signs them if that is asked for and
// all checks hold.
func (c *AuditCmd) auditRegistry(ctx context.Context, a *audit.Auditor, show *steps) error {
	if c.Cosign {
		// A key that is no good should not be found out after the build.
		for _, path := range []string{c.KeyFile, cmp.Or(c.AuditorKey, c.KeyFile)} {
			if _, err := registry.LoadKey(path); err != nil {
				return &exitError{exitBadInput, err}
			}
		}
	}
	show.step("reading the registry", 0, 0)
	r, err := c.readRegistry(ctx)
	show.done()
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	report := &audit.Report{Checks: r.checks}
	if provenance.Passed(r.checks) {
		if report, err = a.AuditRecords(ctx, r.records, r.image); err == nil {
			report.Checks = append(r.checks, report.Checks...)
		}
	} else {
		report.Checks = append(report.Checks, provenance.Check{
			What: "records are what the rebuilt artefacts measure", Result: provenance.None, Detail: "not built: the registry does not have them so",
		})
	}
	show.done()
	return c.conclude(ctx, report, err, r.found)
}

// fromRegistry are records as a registry has them.
type fromRegistry struct {
	found   []*registry.Record
	records []record.Record // the same, parsed
	image   *record.Image   // that shapes are of
	checks  []provenance.Check
}

// readRegistry proves the records that are to be audited.
func (c *AuditCmd) readRegistry(ctx context.Context) (*fromRegistry, error) {
	address, err := lite.ParseAddress(c.Registry)
	if err != nil {
		return nil, fmt.Errorf("--registry: %w", err)
	}
	var list []registry.Publication
	var key registry.Key
	if key.UnmarshalText([]byte(c.Release)) == nil {
		list = []registry.Publication{{Key: key}}
	} else {
		data, err := readFile(kong.ExpandPath(c.Release), record.MaxFile)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w, and it is no key of 64 hexadecimal digits", err)
		}
		if err != nil {
			return nil, err
		}
		if list, err = registry.Publications(data, time.Time{}, time.Time{}); err != nil {
			return nil, fmt.Errorf("%s: %w", c.Release, err)
		}
	}
	reader, view, err := c.TON.view(ctx)
	if err != nil {
		return nil, err
	}
	defer reader.Client.Close()
	warn(view)
	r := &fromRegistry{}
	// get returns nil, and has a check fail, if the record is not there or not good.
	get := func(p registry.Publication, audited bool) (record.Record, error) {
		check := provenance.Check{What: fmt.Sprintf("registry has %v, active and valid", p.Key), Result: provenance.Pass}
		found, err := reader.Record(ctx, view, address, p.Key)
		if err != nil && !errors.Is(err, registry.ErrNoRecord) && !errors.Is(err, registry.ErrMismatch) {
			return nil, err
		}
		if err == nil {
			err = registry.Policy{}.Check(found, time.Unix(int64(view.Head.Time), 0))
		}
		if err == nil && p.Record != nil && registry.Key(sha256.Sum256(p.Record)) != found.SHA256 {
			err = fmt.Errorf("it is another than the file's: its SHA-256 is %v", found.SHA256)
		}
		if err != nil {
			check.Result, check.Detail = provenance.Fail, err.Error()
		}
		r.checks = append(r.checks, check)
		if err != nil {
			return nil, nil
		}
		parsed, err := record.Parse(record.Kind(found.Kind), found.Bytes)
		if err == nil && audited {
			r.found, r.records = append(r.found, found), append(r.records, parsed)
		}
		return parsed, err
	}
	for _, p := range list {
		parsed, err := get(p, true)
		if err != nil {
			return nil, err
		}
		if s, ok := parsed.(*record.Shape); ok && len(list) == 1 {
			image, err := get(registry.Publication{Key: registry.Key(s.Image)}, false)
			if err != nil {
				return nil, err
			}
			r.image, _ = image.(*record.Image)
		}
	}
	return r, nil
}

// conclude prints what an audit came to, and signs the records if every single check
// was made and holds.
func (c *AuditCmd) conclude(ctx context.Context, report *audit.Report, err error, found []*registry.Record) error {
	if err := c.print(report, err); err != nil || !c.Cosign {
		return err
	}
	if len(found) == 0 || slices.ContainsFunc(report.Checks, func(k provenance.Check) bool { return k.Result != provenance.Pass }) {
		return &exitError{exitDifferent, fmt.Errorf("%s: not signed, since not everything could be checked", c.Release)}
	}
	auditor, err := registry.LoadKey(cmp.Or(c.AuditorKey, c.KeyFile))
	if err != nil {
		return err
	}
	var operations []registry.Operation
	for _, r := range found {
		operations = append(operations, registry.Cosign(r.Key, r.SHA256, auditor))
	}
	return c.wallet(c.JSON).write(ctx, &c.TON, c.Registry, operations...)
}
