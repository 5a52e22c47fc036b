package main

import (
	"context"
	"os"

	"chrysalis/launcher"
)

// LogsCmd shows a VM's logs.
type LogsCmd struct {
	Name       string `arg:"" optional:"" default:"default" help:"Name of the VM."`
	Engine     bool   `xor:"kind" help:"The engine's output until the first client connected (the default)."`
	Console    bool   `xor:"kind" help:"The VM's console: firmware and kernel."`
	Supervisor bool   `xor:"kind" help:"The launcher's own log, with QEMU's messages."`
	Follow     bool   `short:"f" help:"Go on until the VM ends."`
}

// Run prints the log.
func (c *LogsCmd) Run(ctx context.Context) error {
	kind := launcher.LogEngine
	switch {
	case c.Console:
		kind = launcher.LogConsole
	case c.Supervisor:
		kind = launcher.LogSupervisor
	}
	return launcher.Log(ctx, "", c.Name, kind, c.Follow, os.Stdout)
}
