// Command chrysalis builds, boots and uses confidential-inference VMs.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"

	"chrysalis/terminal"
)

type cli struct {
	Up       UpCmd          `cmd:"" help:"Boot a VM and wait until it serves."`
	Down     DownCmd        `cmd:"" help:"Drain a VM and stop it."`
	Status   StatusCmd      `cmd:"" help:"Show the VMs on this machine."`
	Logs     LogsCmd        `cmd:"" help:"Show what a VM and its programs wrote."`
	Price    PriceCmd       `cmd:"" help:"Change what a running VM charges."`
	Earnings EarningsCmd    `cmd:"" help:"Show what VMs have earned, or claim it."`
	Verify   verifyCommands `cmd:"" help:"Check that a VM is a published one, before anything is sent."`
	Chat     ChatCmd        `cmd:"" help:"Ask a verified VM a question."`
	Proxy    ProxyCmd       `cmd:"" help:"Serve a local OpenAI-compatible API that forwards to verified VMs only."`
	Bot      BotCmd         `cmd:"" help:"Answer Telegram chats through verified VMs."`

	Doctor DoctorCmd   `cmd:"" help:"Tell what this machine lacks, and how to mend it."`
	GPU    gpuCommands `cmd:"" name:"gpu" help:"Hand GPUs to VMs and back."`

	Image  imageCommands  `cmd:"" help:"Build what a VM boots."`
	Model  modelCommands  `cmd:"" help:"Make and look at model disks."`
	Engine engineCommands `cmd:"" help:"Make engine disks."`
	Audit  AuditCmd       `cmd:"" help:"Build a release again and tell whether it is the same."`

	Measure measureCommands `cmd:"" help:"Predict what a VM measures, and say why one differs."`

	Publish  PublishCmd       `cmd:"" help:"Predict what VMs measure and publish that to the wallet's registry."`
	Registry registryCommands `cmd:"" help:"Publish on TON what may be measured, and read it without trusting anyone."`
	Listing  listingCommands  `cmd:"" help:"Offer workers, and find them."`
	Market   MarketCmd        `cmd:"" help:"Show what workers cost, and whether they are what they say."`
	Wallet   walletCommands   `cmd:"" help:"Hold the money to pay with."`
	Channel  channelCommands  `cmd:"" help:"Deposit money to pay owners from, and take back what is left."`
	Devnet   DevnetCmd        `cmd:"" help:"Run a local TON chain."`

	Supervise SuperviseCmd `cmd:"" hidden:""`
}

func main() {
	// What is built does not depend on the caller's umask; what is private says so.
	syscall.Umask(0o022)
	var c cli
	parser := kong.Must(&c,
		kong.Name("chrysalis"),
		kong.Description("Confidential inference: a measured VM serves a model, and its owner cannot read the prompts."),
		kong.UsageOnError(),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	k, err := parser.Parse(os.Args[1:])
	parser.FatalIfErrorf(err)
	k.BindTo(ctx, (*context.Context)(nil))
	if err := k.Run(); err != nil {
		if text := err.Error(); text != "" {
			fmt.Fprintln(os.Stderr, "chrysalis:", terminal.Clean(text))
		}
		os.Exit(exitCode(err))
	}
}
