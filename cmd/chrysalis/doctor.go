package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"chrysalis/launcher"
	"chrysalis/launcher/doctor"
	"chrysalis/terminal"
)

// DoctorCmd examines the machine. It only reads.
type DoctorCmd struct {
	JSON bool `name:"json" help:"Print one JSON document."`
}

// Run prints the table. What is missing is no error of the command.
func (c *DoctorCmd) Run(ctx context.Context) error {
	dir, err := launcher.StateDir()
	if err != nil {
		return err
	}
	report := doctor.Examine(ctx, doctor.Host(dir))
	if c.JSON {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		return out.Encode(report)
	}
	return printDoctor(os.Stdout, report)
}

func printDoctor(out io.Writer, r *doctor.Report) error {
	clean := terminal.NewWriter(out)
	table := tabwriter.NewWriter(clean, 0, 8, 2, ' ', 0)
	group := ""
	for _, l := range r.Lines {
		if l.Group != group {
			group = l.Group
			fmt.Fprintf(table, "%s\t\n", group)
		}
		fmt.Fprintf(table, "  %s %s\t%s\n", l.Status.Mark(), l.Name, terminal.Line(l.Found))
		if l.Fix != "" {
			fmt.Fprintf(table, "\t→ %s\n", terminal.Line(l.Fix))
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	say := func(yes bool, what string) {
		mark := doctor.Bad.Mark()
		if yes {
			mark = doctor.OK.Mark()
		}
		fmt.Fprintf(clean, "%s %s\n", mark, what)
	}
	fmt.Fprintln(clean)
	say(r.Serves, "this machine can serve")
	say(r.Confidential, "clients can be sure that it cannot read what they send (TDX)")
	say(r.ConfidentialGPU, "and that its GPUs cannot leak it either")
	return nil
}
