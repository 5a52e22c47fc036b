package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"text/tabwriter"
	"time"

	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
	"chrysalis/terminal"
)

type registryCommands struct {
	Init          RegistryInitCmd      `cmd:"" help:"Make the registry of a wallet."`
	Publish       RegistryPublishCmd   `cmd:"" help:"Publish records."`
	Deprecate     RegistryDeprecateCmd `cmd:"" help:"Advise against a record."`
	Revoke        RegistryRevokeCmd    `cmd:"" help:"Withdraw a record for good."`
	Cosign        RegistryCosignCmd    `cmd:"" help:"Sign a record as an auditor."`
	DropSignature RegistryDropCmd      `cmd:"" help:"Take an auditor's signature off a record."`
	Transfer      RegistryTransferCmd  `cmd:"" help:"Name who may become the owner."`
	Accept        RegistryAcceptCmd    `cmd:"" help:"Become the owner, when named."`
	TopUp         RegistryTopUpCmd     `cmd:"" help:"Pay a registry's rent ahead."`
	List          RegistryListCmd      `cmd:"" help:"List a registry's records, with proofs."`
	Show          RegistryShowCmd      `cmd:"" help:"Show a record, with proofs."`
	Watch         RegistryWatchCmd     `cmd:"" help:"Show a registry's changes as they come."`
	Bundle        RegistryBundleCmd    `cmd:"" help:"Carry records with their proofs in a file, for readers without a connection."`
	Address       RegistryAddressCmd   `cmd:"" help:"Show the addresses of a wallet and its registry."`
	NewKey        RegistryNewKeyCmd    `cmd:"" help:"Make a key for a wallet or an auditor."`
}

// write does operations on a registry, or shows what they would do.
func (f *walletFlags) write(ctx context.Context, ton *tonFlags, address string, operations ...registry.Operation) error {
	return f.send(ctx, ton, address, "", operations...)
}

// send does operations, or shows what they would do. hint is the command that tells
// what became of a message; "" is the one of registries.
func (f *walletFlags) send(ctx context.Context, ton *tonFlags, address, hint string, operations ...registry.Operation) error {
	show := newSteps()
	defer show.done()
	p, err := f.publisher(ton, address, show)
	if err != nil {
		return err
	}
	defer p.Reader.Client.Close()
	for _, op := range operations {
		var plan *registry.Plan
		if f.DryRun {
			plan, err = p.Plan(ctx, op)
		} else {
			plan, err = p.Do(ctx, op)
		}
		show.done()
		if errors.Is(err, registry.ErrUnknown) {
			if hint == "" {
				hint = fmt.Sprintf("chrysalis registry list %s", plan.To)
			}
			return &exitError{exitUnknown, fmt.Errorf("%w\nfind out with: %s --network %s", err, hint, ton.Network)}
		}
		if err != nil {
			return err
		}
		if err := printPlan(os.Stdout, plan, f.DryRun, f.JSON); err != nil {
			return err
		}
	}
	return nil
}

func printPlan(out io.Writer, plan *registry.Plan, dry, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(plan)
	}
	if plan.Nothing != "" {
		_, err := fmt.Fprintf(out, "nothing to do: %s\n", plan.Nothing)
		return err
	}
	if !dry {
		_, err := fmt.Fprintf(out, "%s: done at %s, for %s\n", plan.Operation, plan.To, registry.TON(plan.Cost))
		return err
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "operation\t%s\n", plan.Operation)
	fmt.Fprintf(w, "wallet\t%s, has %s\n", plan.From.Std().Bounce(false), registry.TON(plan.Balance))
	fmt.Fprintf(w, "contract\t%s\n", plan.To)
	fmt.Fprintf(w, "attached\t%s\n", registry.TON(plan.Value))
	fmt.Fprintf(w, "costs\t%s, rent and fees; the rest comes back\n", registry.TON(plan.Cost))
	fmt.Fprintf(w, "body\t%x\n", plan.Body)
	fmt.Fprintf(w, "sent\tno, this is a dry run\n")
	return w.Flush()
}

// RegistryInitCmd makes a registry.
type RegistryInitCmd struct {
	tonFlags
	walletFlags
}

// Run makes it, unless it is there.
func (c *RegistryInitCmd) Run(ctx context.Context) error {
	return c.write(ctx, &c.tonFlags, "", registry.Init())
}

// RegistryPublishCmd publishes records.
type RegistryPublishCmd struct {
	tonFlags
	walletFlags
	Registry  string        `placeholder:"ADDRESS" help:"The registry (default: the wallet's own)."`
	Files     []string      `arg:"" name:"file" type:"existingfile" help:"Records, or a measurement record that holds several."`
	NotBefore time.Time     `placeholder:"TIME" help:"When they become valid, as 2026-01-31T00:00:00Z (default: the start of this day)."`
	Valid     time.Duration `default:"8760h" help:"How long they are valid (default: ${default}). What is published already keeps its validity while a month of it is left."`
}

// Run publishes them one after the other.
func (c *RegistryPublishCmd) Run(ctx context.Context) error {
	from := c.NotBefore
	if from.IsZero() {
		from = time.Now().UTC().Truncate(24 * time.Hour)
	}
	var operations []registry.Operation
	for _, path := range c.Files {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		list, err := registry.Publications(data, from, from.Add(c.Valid))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, p := range list {
			p.Keep = c.NotBefore.IsZero()
			operations = append(operations, registry.Publish(p))
		}
	}
	return c.write(ctx, &c.tonFlags, c.Registry, operations...)
}

type markFlags struct {
	tonFlags
	walletFlags
	Registry string         `placeholder:"ADDRESS" help:"The registry (default: the wallet's own)."`
	Keys     []registry.Key `arg:"" name:"key" help:"Keys of records."`
}

func (c *markFlags) mark(ctx context.Context, status contract.Status) error {
	var operations []registry.Operation
	for _, key := range c.Keys {
		operations = append(operations, registry.Mark(key, status))
	}
	return c.write(ctx, &c.tonFlags, c.Registry, operations...)
}

// RegistryDeprecateCmd deprecates records.
type RegistryDeprecateCmd struct{ markFlags }

// Run deprecates them one after the other.
func (c *RegistryDeprecateCmd) Run(ctx context.Context) error {
	return c.mark(ctx, contract.Deprecated)
}

// RegistryRevokeCmd revokes records.
type RegistryRevokeCmd struct{ markFlags }

// Run revokes them one after the other.
func (c *RegistryRevokeCmd) Run(ctx context.Context) error { return c.mark(ctx, contract.Revoked) }

// RegistryCosignCmd signs a record.
type RegistryCosignCmd struct {
	tonFlags
	walletFlags
	Registry   string `required:"" placeholder:"ADDRESS" help:"The registry."`
	File       string `arg:"" type:"existingfile" help:"The record as the auditor has checked it, or a measurement record that holds several."`
	AuditorKey string `placeholder:"FILE" help:"The auditor's key (default: the wallet's)."`
}

// Run signs each record of the file, as long as the registry has exactly it.
func (c *RegistryCosignCmd) Run(ctx context.Context) error {
	data, err := os.ReadFile(c.File)
	if err != nil {
		return err
	}
	list, err := registry.Publications(data, time.Time{}, time.Time{})
	if err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	auditor, err := registry.LoadKey(cmp.Or(c.AuditorKey, c.KeyFile))
	if err != nil {
		return err
	}
	var operations []registry.Operation
	for _, p := range list {
		operations = append(operations, registry.Cosign(p.Key, sha256.Sum256(p.Record), auditor))
	}
	return c.write(ctx, &c.tonFlags, c.Registry, operations...)
}

// RegistryDropCmd drops a signature.
type RegistryDropCmd struct {
	tonFlags
	walletFlags
	Registry string       `placeholder:"ADDRESS" help:"The registry (default: the wallet's own)."`
	Key      registry.Key `arg:"" help:"The record's key."`
	Auditor  registry.Key `arg:"" help:"The auditor's public key."`
}

// Run drops it.
func (c *RegistryDropCmd) Run(ctx context.Context) error {
	return c.write(ctx, &c.tonFlags, c.Registry, registry.DropSignature(c.Key, c.Auditor))
}

// RegistryTransferCmd names a new owner.
type RegistryTransferCmd struct {
	tonFlags
	walletFlags
	Registry string `placeholder:"ADDRESS" help:"The registry (default: the wallet's own)."`
	To       string `arg:"" name:"address" help:"Who may become the owner, or 'nobody'."`
}

// Run names it.
func (c *RegistryTransferCmd) Run(ctx context.Context) error {
	var to *lite.Address
	if c.To != "nobody" {
		a, err := lite.ParseAddress(c.To)
		if err != nil {
			return err
		}
		to = &a
	}
	return c.write(ctx, &c.tonFlags, c.Registry, registry.Transfer(to))
}

// RegistryAcceptCmd accepts a registry.
type RegistryAcceptCmd struct {
	tonFlags
	walletFlags
	Registry string `arg:"" name:"address" help:"The registry."`
}

// Run accepts it.
func (c *RegistryAcceptCmd) Run(ctx context.Context) error {
	return c.write(ctx, &c.tonFlags, c.Registry, registry.Accept())
}

// RegistryTopUpCmd pays rent.
type RegistryTopUpCmd struct {
	tonFlags
	walletFlags
	Registry string `arg:"" name:"address" help:"The registry."`
	Amount   string `arg:"" help:"How much, in TON. It cannot be taken back."`
}

// Run pays it.
func (c *RegistryTopUpCmd) Run(ctx context.Context) error {
	amount, err := parseTON(c.Amount)
	if err != nil {
		return err
	}
	return c.write(ctx, &c.tonFlags, c.Registry, registry.TopUp(amount))
}

// readFlags are those of commands that only read.
type readFlags struct {
	tonFlags
	Registry string `arg:"" name:"address" help:"The registry."`
	JSON     bool   `name:"json" help:"Print one JSON document."`
}

// read proves the network's last block, and says which liteservers were no good.
func (c *readFlags) read(ctx context.Context) (registry.Reader, *lite.View, lite.Address, error) {
	address, err := lite.ParseAddress(c.Registry)
	if err != nil {
		return registry.Reader{}, nil, address, err
	}
	reader, view, err := c.view(ctx)
	return reader, view, address, err
}

func warn(view *lite.View) {
	for _, f := range view.Failures {
		fmt.Fprintln(os.Stderr, "not used:", terminal.Line(f.Error()))
	}
}

// RegistryListCmd lists records.
type RegistryListCmd struct{ readFlags }

// Run prints the table, and warns of rent that does not last.
func (c *RegistryListCmd) Run(ctx context.Context) error {
	reader, view, address, err := c.read(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	info, err := reader.Info(ctx, view, address)
	if err != nil {
		return err
	}
	list, err := reader.List(ctx, view, address)
	if err != nil {
		return err
	}
	warn(view)
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"registry": info, "records": list})
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "registry\t%s\n", info.Address)
	fmt.Fprintf(w, "owner\t%s\n", info.Owner)
	if info.Pending != "" {
		fmt.Fprintf(w, "named owner\t%s\n", info.Pending)
	}
	fmt.Fprintf(w, "rent\t%s a year, %s there, paid until %s\n", registry.TON(info.YearlyFee), registry.TON(info.Balance), info.PaidUntil.Format(time.DateOnly))
	fmt.Fprintf(w, "as of\tblock %d, %s\n", info.Block.SeqNo, info.Time.Format(time.RFC3339))
	if len(list) > 0 {
		fmt.Fprintln(w, "\nKEY\tKIND\tSTATUS\tFROM\tUNTIL\tSIGNATURES")
	}
	for _, e := range list {
		fmt.Fprintf(w, "%v\t%s\t%s\t%s\t%s\t%d\n", e.Key, e.Kind, e.Status, e.NotBefore.Format(time.DateOnly), e.NotAfter.Format(time.DateOnly), e.Signatures)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if !info.PaysForAYear() {
		fmt.Fprintf(os.Stderr, "the rent is paid for less than a year; pay ahead with: chrysalis registry top-up %s %s\n", info.Address, tons(info.YearlyFee))
	}
	return nil
}

// tons writes nanotons for the command line.
func tons(nano uint64) string { return new(big.Rat).SetFrac64(int64(nano), 1e9).FloatString(9) }

// RegistryShowCmd shows a record.
type RegistryShowCmd struct {
	readFlags
	Key        registry.Key   `arg:"" help:"The record's key."`
	FromBundle string         `name:"bundle" type:"existingfile" placeholder:"FILE" help:"Read it from a bundle, without a connection."`
	BundleAge  time.Duration  `default:"24h" help:"How old a bundle may be (default: ${default})."`
	Auditor    []registry.Key `placeholder:"KEY" sep:"none" help:"An auditor whose signature counts; repeat it for more."`
	Signatures int            `help:"How many of these auditors must have signed."`
	Deprecated bool           `name:"allow-deprecated" help:"A deprecated record is good enough."`
}

// Run prints the record, and fails unless it can be relied on now.
func (c *RegistryShowCmd) Run(ctx context.Context) error {
	record, err := c.find(ctx)
	if err != nil {
		return err
	}
	policy := registry.Policy{Auditors: c.Auditor, Signatures: c.Signatures, AllowDeprecated: c.Deprecated}
	verdict := policy.Check(record, time.Now())
	if c.JSON {
		out := map[string]any{"record": json.RawMessage(record.Bytes), "entry": record, "ok": verdict == nil}
		if verdict != nil {
			out["error"] = verdict.Error()
		}
		if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
			return err
		}
	} else {
		w := tabwriter.NewWriter(terminal.NewWriter(os.Stdout), 0, 8, 2, ' ', 0)
		fmt.Fprintf(w, "key\t%v\n", record.Key)
		fmt.Fprintf(w, "kind\t%s\n", record.Kind)
		fmt.Fprintf(w, "status\t%s\n", record.Status)
		fmt.Fprintf(w, "valid\t%s to %s\n", record.NotBefore.Format(time.RFC3339), record.NotAfter.Format(time.RFC3339))
		fmt.Fprintf(w, "SHA-256\t%v\n", record.SHA256)
		for _, a := range record.Auditors {
			fmt.Fprintf(w, "signed by\t%v\n", a)
		}
		fmt.Fprintf(w, "as of\tblock %d, %s\n", record.Block.SeqNo, record.Time.Format(time.RFC3339))
		fmt.Fprintf(w, "record\t%s\n", terminal.Line(string(record.Bytes)))
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return verdict
}

func (c *RegistryShowCmd) find(ctx context.Context) (*registry.Record, error) {
	if c.FromBundle == "" {
		reader, view, address, err := c.read(ctx)
		if err != nil {
			return nil, err
		}
		defer reader.Client.Close()
		record, err := reader.Record(ctx, view, address, c.Key)
		warn(view)
		return record, err
	}
	address, err := lite.ParseAddress(c.Registry)
	if err != nil {
		return nil, err
	}
	network, err := c.network()
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(c.FromBundle)
	if err != nil {
		return nil, err
	}
	bundle, err := registry.ParseBundle(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.FromBundle, err)
	}
	if bundle.Registry != address {
		return nil, fmt.Errorf("%s is of the registry %s", c.FromBundle, bundle.Registry)
	}
	records, err := bundle.Open(network, registry.DeriveKey, c.BundleAge, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.FromBundle, err)
	}
	for _, r := range records {
		if r.Key == c.Key {
			return r, nil
		}
	}
	return nil, fmt.Errorf("%s does not have %v", c.FromBundle, c.Key)
}

// RegistryWatchCmd shows changes.
type RegistryWatchCmd struct {
	readFlags
	Every time.Duration `default:"10s" help:"How often it is read (default: ${default})."`
}

// Run prints changes until it is interrupted.
func (c *RegistryWatchCmd) Run(ctx context.Context) error {
	address, err := lite.ParseAddress(c.Registry)
	if err != nil {
		return err
	}
	reader, err := c.reader()
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	out := json.NewEncoder(os.Stdout)
	err = reader.Watch(ctx, address, c.Every, func(change registry.Change) error {
		if c.JSON {
			return out.Encode(change)
		}
		before := "new"
		if change.Before != nil {
			before = change.Before.Status
		}
		_, err := fmt.Printf("%s  %v  %s  %s -> %s, %d signatures\n", change.Time.Format(time.RFC3339),
			change.After.Key, change.After.Kind, before, change.After.Status, change.After.Signatures)
		return err
	}, func(err error) error {
		fmt.Fprintln(os.Stderr, "chrysalis:", terminal.Clean(err.Error()))
		return nil
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// RegistryBundleCmd makes a bundle.
type RegistryBundleCmd struct {
	readFlags
	Keys []registry.Key `arg:"" optional:"" name:"key" help:"Keys of records (default: all that are not revoked)."`
	Out  string         `short:"o" required:"" placeholder:"FILE" help:"The bundle to make."`
	From string         `placeholder:"SEQNO:ROOT:FILE" help:"The key block that its readers trust (default: the one that this program trusts)."`
}

// Run makes it.
func (c *RegistryBundleCmd) Run(ctx context.Context) error {
	reader, view, address, err := c.read(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	from := reader.Client.Network().KeyBlock
	if c.From != "" {
		if from, err = lite.ParseBlockID(c.From); err != nil {
			return fmt.Errorf("--from: %w", err)
		}
	}
	keys := c.Keys
	if len(keys) == 0 {
		list, err := reader.List(ctx, view, address)
		if err != nil {
			return err
		}
		for _, e := range list {
			if e.ContractStatus() != contract.Revoked {
				keys = append(keys, e.Key)
			}
		}
	}
	show := newSteps()
	defer show.done()
	show.step("fetching proofs", 0, 0)
	bundle, err := reader.Bundle(ctx, from, address, keys...)
	show.done()
	if err != nil {
		return err
	}
	data, err := json.Marshal(bundle)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Out, data, 0o644); err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"bundle": c.Out, "size": len(data), "records": len(keys), "head": bundle.Head})
	}
	fmt.Printf("%s: %d records as of block %d, %d bytes\n", c.Out, len(keys), bundle.Head.SeqNo, len(data))
	return nil
}

// RegistryNewKeyCmd makes a key.
type RegistryNewKeyCmd struct {
	File string `arg:"" help:"Where the key goes; the file must not be there."`
}

// Run makes it and prints the public half.
func (c *RegistryNewKeyCmd) Run() error {
	key, err := registry.NewKey(c.File)
	if err != nil {
		return err
	}
	fmt.Printf("%x\n", key.Public().(ed25519.PublicKey))
	return nil
}

// RegistryAddressCmd shows addresses.
type RegistryAddressCmd struct {
	tonFlags
	walletKeyFlags
}

// Run computes them; it asks nobody.
func (c *RegistryAddressCmd) Run() error {
	key, wallet, err := c.wallet(c.KeyFile, c.Wallet)
	if err != nil {
		return err
	}
	out := []struct{ name, value string }{
		{"wallet", payTo(wallet)},
		{"registry", registry.AddressOfWallet(wallet).String()},
		{"public_key", hex.EncodeToString(key.Public().(ed25519.PublicKey))},
	}
	if c.JSON {
		document := map[string]string{}
		for _, o := range out {
			document[o.name] = o.value
		}
		return json.NewEncoder(os.Stdout).Encode(document)
	}
	for _, o := range out {
		if _, err := fmt.Printf("%s\t%s\n", o.name, o.value); err != nil {
			return err
		}
	}
	return nil
}
