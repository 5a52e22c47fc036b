package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"chrysalis"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/terminal"
)

// upOffer is the offer of a VM that is about to be booted.
type upOffer struct {
	offerFlags
	payerFlags
	TON tonFlags `embed:"" prefix:"ton-"`
}

// Validate is kong's hook.
func (c *UpCmd) Validate() error {
	o := &c.Offer
	if err := c.Pay.validate(o, c.Manifest != ""); err != nil {
		return err
	}
	if !c.List {
		if o.Endpoint != "" || len(o.Registry) > 0 {
			return errors.New("flags of an offer are given without --list")
		}
		return nil
	}
	if o.KeyFile == "" {
		return errors.New("missing flags: --key-file=FILE")
	}
	return o.complete()
}

// predict says which records the VM is about to need.
func (c *UpCmd) predict(ctx context.Context, models []string, tools *toolsroot.Root) (*record.File, error) {
	o := plan.Options{
		Platform: record.TPM, Boot: record.BootKernel, Image: c.Image, Engine: c.Engine, Models: models, Manifest: c.Manifest,
		Shapes: []string{c.Shape}, ExitFailures: -1, Lock: chrysalis.ImageLock, Tools: tools,
	}
	if launcher.Accel(c.Accel).TDX() {
		o.Platform, o.Firmware = record.TDX, c.Firmware
	}
	result, err := plan.Run(ctx, o)
	if err != nil {
		return nil, err
	}
	for _, note := range result.Notes {
		fmt.Fprintln(os.Stderr, "note:", terminal.Line(note))
	}
	return result.File, nil
}

// prepare makes the offer, and plans it without sending it: that finds publishers who
// lack a record, bad terms and an empty wallet.
func (f *upOffer) prepare(ctx context.Context, file *record.File) (registry.Operation, error) {
	var models []registry.OfferedModel
	for _, m := range file.Models {
		models = append(models, registry.OfferedModel{ID: m.ID(), RootHash: m.RootHash})
	}
	var also []registry.Need
	for _, s := range file.Shapes {
		also = append(also, registry.Need{What: "shape " + s.Name, Key: s.Key()})
	}
	for _, e := range file.Engines {
		also = append(also, registry.Need{What: "engine " + e.Name, Key: e.Key()})
	}
	wallet := f.wallet(false)
	put, err := f.put(&f.TON, wallet, file.Image.Key(), models, also...)
	if err != nil {
		return put, err
	}
	show := newSteps()
	defer show.done()
	p, err := wallet.publisher(&f.TON, "", show)
	if err != nil {
		return put, err
	}
	defer p.Reader.Client.Close()
	_, err = p.Plan(ctx, put)
	return put, err
}
