package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"

	"chrysalis/channel/store"
	"chrysalis/launcher"
	"chrysalis/launcher/till"
	"chrysalis/registry"
	"chrysalis/terminal"
)

// EarningsCmd shows earnings.
type EarningsCmd struct {
	Name  string `arg:"" optional:"" help:"Name of the VM; all together when not given."`
	CSV   bool   `name:"csv" xor:"form" help:"Print CSV, with amounts in nanotons."`
	JSON  bool   `name:"json" xor:"form" help:"Print JSON, with amounts in nanotons."`
	Claim bool   `help:"Claim what a VM has earned that does not run."`

	TON      tonFlags `embed:"" prefix:"ton-"`
	ClaimKey string   `placeholder:"FILE" help:"With --claim: the key of a wallet that pays for it (default: the fees are taken out of each claim)."`
	Wallet   string   `enum:"v4r2,v5r1" default:"v5r1" help:"That wallet's version, v4r2 or v5r1 (default: ${default})."`
}

// Run shows what was earned by day and model.
func (c *EarningsCmd) Run(ctx context.Context) error {
	if c.Claim {
		if err := c.claim(ctx); err != nil {
			return err
		}
	}
	network, err := c.TON.named()
	if err != nil {
		return err
	}
	all, err := launcher.Earnings(ctx, "", c.Name)
	if err != nil {
		return err
	}
	var rows []store.Row
	var pending uint64
	elsewhere := map[int32]bool{}
	for _, e := range all {
		if e.GlobalID != network.GlobalID {
			elsewhere[e.GlobalID] = true
			continue
		}
		for _, note := range e.Notes {
			fmt.Fprintf(os.Stderr, "note: %s: %s\n", e.Name, terminal.Line(note))
		}
		rows = append(rows, e.Rows...)
		pending += e.Pending
	}
	for id := range elsewhere {
		fmt.Fprintf(os.Stderr, "note: there are earnings on the network %d, too; see them with --ton-network=%d\n", id, id)
	}
	rows = sumRows(rows)
	switch {
	case c.CSV:
		return store.WriteCSV(os.Stdout, rows)
	case c.JSON:
		return store.WriteJSON(os.Stdout, rows)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "DAY\tMODEL\tREQUESTS\tPROMPT\tCOMPLETION\tEARNED\tCLAIMED\tPENDING\tLOST\tFEES")
	total := store.Total(rows)
	total.Day, total.Model = "total", "-"
	for _, r := range append(rows, total) {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\t%s\t%s\n", r.Day, r.Model, r.Requests, r.PromptTokens, r.CompletionTokens,
			registry.TON(r.Earned), registry.TON(r.Claimed), registry.TON(r.Pending()), registry.TON(r.Lost), registry.TON(r.Fees))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if pending > 0 {
		fmt.Fprintf(os.Stderr, "vouchers for %s can be claimed; what of it is not earned yet is paid ahead\n", registry.TON(pending))
	}
	return nil
}

func (c *EarningsCmd) claim(ctx context.Context) error {
	if c.Name == "" {
		return errors.New("--claim: name the VM")
	}
	network, err := c.TON.lasting()
	if err != nil {
		return err
	}
	return launcher.Settle(ctx, "", c.Name, launcher.Payment{
		Terms: till.Terms{GlobalID: network.Network.GlobalID}, Network: network, ClaimKey: c.ClaimKey, ClaimWallet: c.Wallet,
	}, func(format string, args ...any) { fmt.Fprintln(os.Stderr, terminal.Line(fmt.Sprintf(format, args...))) })
}

// sumRows adds up what several VMs have earned on a day by a model.
func sumRows(rows []store.Row) (sums []store.Row) {
	slices.SortStableFunc(rows, func(a, b store.Row) int { return cmp.Or(cmp.Compare(a.Day, b.Day), cmp.Compare(a.Model, b.Model)) })
	for begin := 0; begin < len(rows); {
		end := begin + 1
		for end < len(rows) && rows[end].Day == rows[begin].Day && rows[end].Model == rows[begin].Model {
			end++
		}
		sum := store.Total(rows[begin:end])
		sum.Day, sum.Model = rows[begin].Day, rows[begin].Model
		sums = append(sums, sum)
		begin = end
	}
	return sums
}
