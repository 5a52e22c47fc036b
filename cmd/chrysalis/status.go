package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"chrysalis/launcher"
	"chrysalis/launcher/till"
	"chrysalis/registry"
	"chrysalis/terminal"
)

// StatusCmd shows VMs.
type StatusCmd struct {
	Name string `arg:"" optional:"" help:"Name of the VM; all when not given."`
	JSON bool   `name:"json" help:"Print a JSON list."`
}

// Run prints the table.
func (c *StatusCmd) Run(ctx context.Context) error {
	states, err := launcher.Status(ctx, "", c.Name)
	if err != nil {
		return err
	}
	if c.JSON {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		return out.Encode(states)
	}
	if len(states) == 0 {
		fmt.Fprintln(os.Stderr, "there are no VMs; start one with 'chrysalis up'")
		return nil
	}
	return printStates(os.Stdout, states, time.Now())
}

func printStates(w io.Writer, states []launcher.State, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "NAME\tSTATE\tPHASE\tREASON\tUPTIME\tENDPOINT\tACCEL\tPID\tREQUESTS\tACTIVE\tCLIENTS")
	for _, s := range states {
		uptime, pid, endpoint := "-", "-", "-"
		if s.Life == launcher.LifeEnded {
			if s.Failed {
				s.Life = "failed"
			}
		} else {
			uptime = now.Sub(s.StartedAt).Round(time.Second).String()
			pid = fmt.Sprint(s.Supervisor)
			endpoint = cmp.Or(s.Endpoint, "-")
		}
		requests, active := "-", "-"
		if s.Guest != nil {
			requests, active = fmt.Sprint(s.Guest.Counters.Requests), fmt.Sprint(s.Guest.Counters.Active)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n",
			s.Name, s.Life, cmp.Or(string(s.Phase), "-"), cmp.Or(string(s.Reason), "-"), uptime, endpoint,
			cmp.Or(string(s.Platform), "-"), pid, requests, active, s.Relay.Active)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, s := range states {
		if s.Payment != nil {
			printPayment(w, s.Name, s.Payment)
		}
		if s.Life == launcher.LifeEnded && s.Failed {
			fmt.Fprintf(w, "\n%s: %s\n", s.Name, s.Ended)
		}
	}
	return nil
}

// printPayment says in a line how a VM is paid, and in others what is wrong with that.
func printPayment(w io.Writer, name string, p *till.State) {
	fmt.Fprintf(w, "\n%s is paid", name)
	for i, m := range p.Models {
		if i > 0 && m.Price == p.Models[i-1].Price {
			continue
		}
		fmt.Fprintf(w, " %s and %s", registry.TON(uint64(m.Prompt)), registry.TON(uint64(m.Completion)))
	}
	fmt.Fprintf(w, " for a million tokens, through %d channels: earned %s, claimed %s, to claim %s",
		p.Channels, registry.TON(p.Earned), registry.TON(p.Claimed), registry.TON(p.Pending))
	if p.Lost > 0 {
		fmt.Fprintf(w, ", lost %s", registry.TON(p.Lost))
	}
	fmt.Fprintln(w)
	for _, text := range p.Trouble {
		fmt.Fprintf(w, "%s: %s\n", name, terminal.Line(text))
	}
}
