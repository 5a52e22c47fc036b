package main

import (
	"context"

	"chrysalis/launcher"
)

// SuperviseCmd is what `up` starts in the background. It is hidden from the help.
type SuperviseCmd struct {
	Dir string `arg:"" name:"run" help:"The run's folder."`
}

// Run stays with one VM until it ends.
func (c *SuperviseCmd) Run(context.Context) error { return launcher.Supervise(c.Dir) }
