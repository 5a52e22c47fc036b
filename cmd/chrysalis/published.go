package main

import (
	"context"
	"fmt"
	"os"
	"reflect"
	"slices"
	"time"

	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/registry/lite"
	"chrysalis/terminal"
)

// A proxy reads registries this often, and goes without what they approve when they
// could not be read for this long.
const (
	followEvery = 15 * time.Second
	followFor   = 2 * time.Minute
)

// published is what some registries approve.
type published struct {
	reader     registry.Reader
	registries []lite.Address
	policy     registry.Policy
	local      []*record.File // from files, whatever registries say
	last       []*record.File // what was read last, with those
}

func newPublished(f *trustFlags) (*published, error) {
	p := &published{policy: registry.Policy{Auditors: f.Auditor, Signatures: f.Signatures}}
	for _, text := range f.Registry {
		a, err := lite.ParseAddress(text)
		if err != nil {
			return nil, fmt.Errorf("--registry: %w", err)
		}
		p.registries = append(p.registries, a)
	}
	if f.Signatures > len(f.Auditor) {
		return nil, fmt.Errorf("--signatures %d: only %d auditors are named", f.Signatures, len(f.Auditor))
	}
	var err error
	p.reader, err = f.TON.reader()
	return p, err
}

// read proves what the registries approve now.
func (p *published) read(ctx context.Context) ([]*record.File, error) {
	view, err := p.reader.Client.Sync(ctx)
	if err != nil {
		return nil, err
	}
	files, refused, err := p.reader.Approved(ctx, view, p.registries, p.policy)
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		for _, r := range refused {
			fmt.Fprintln(os.Stderr, "not approved:", terminal.Line(r.Error()))
		}
	}
	p.last = append(slices.Clone(p.local), files...)
	return p.last, nil
}

// follow reads again and again, and hands on what has changed. When the registries
// cannot be read for too long, what they approved is approved no more.
func (p *published) follow(ctx context.Context, trust func([]*record.File)) {
	last, read := p.last, time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(followEvery):
		}
		files, err := p.read(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "chrysalis: registries:", terminal.Line(err.Error()))
			if time.Since(read) < followFor {
				continue
			}
			files = p.local
		} else {
			read = time.Now()
		}
		if reflect.DeepEqual(files, last) {
			continue
		}
		last = files
		trust(files)
	}
}
