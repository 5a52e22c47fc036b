package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"chrysalis/launcher"
	"chrysalis/registry"
)

// DownCmd ends VMs.
type DownCmd struct {
	Name    string        `arg:"" optional:"" default:"default" help:"Name of the VM."`
	All     bool          `help:"End all VMs."`
	Now     bool          `help:"Do not wait for running requests."`
	Timeout time.Duration `default:"1m" help:"How long running requests may take to finish (default: ${default})."`
}

// Run ends the VM, or all of them.
func (c *DownCmd) Run(ctx context.Context) error {
	options := launcher.DownOptions{Now: c.Now, Timeout: c.Timeout}
	names := []string{c.Name}
	if c.All {
		var err error
		if names, err = launcher.Running(""); err != nil {
			return err
		}
		if len(names) == 0 {
			fmt.Fprintln(os.Stderr, "no VM is running")
		}
	}
	failures := make([]error, len(names))
	var all sync.WaitGroup
	for i, name := range names {
		all.Go(func() {
			failures[i] = launcher.Down(ctx, name, options)
			if failures[i] == nil {
				fmt.Fprintf(os.Stderr, "the VM %q is stopped\n", name)
				sayUnclaimed(ctx, name)
			}
		})
	}
	all.Wait()
	return errors.Join(failures...)
}

// sayUnclaimed says what a VM that has ended could not claim.
func sayUnclaimed(ctx context.Context, name string) {
	states, err := launcher.Status(ctx, "", name)
	if err != nil || len(states) == 0 || states[len(states)-1].Payment == nil {
		return
	}
	if p := states[len(states)-1].Payment; p.Pending > 0 {
		fmt.Fprintf(os.Stderr, "vouchers for %s are not claimed yet; they are kept, and claimed when the VM runs again or with 'chrysalis earnings %s --claim'\n",
			registry.TON(p.Pending), name)
	}
}
