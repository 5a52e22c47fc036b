package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"chrysalis/bot"
)

// BotCmd answers Telegram chats.
type BotCmd struct {
	workerFlags
	TokenFile       string `required:"" placeholder:"FILE" help:"A file with the token that Telegram's BotFather gave."`
	WorkerTokenFile string `placeholder:"FILE" help:"A file with the token that the workers ask for."`
	Server          string `placeholder:"URL" help:"A Bot API server of your own (default: Telegram's)."`
	Model           string `help:"The model (default: the first that is served)."`
	System          string `placeholder:"TEXT" help:"A system message before every chat."`
	PerHour         int    `default:"60" placeholder:"N" help:"How many questions a user may ask in an hour (default: ${default})."`
	AtOnce          int    `default:"8" placeholder:"N" help:"How many answers are written at a time (default: ${default})."`
}

// Help is what 'chrysalis bot --help' says below the usage.
func (*BotCmd) Help() string {
	return "Telegram's servers see every message to and from a bot; nobody behind the bot does. It answers private chats, and groups where it is mentioned; /verify shows the checks of the worker that answered."
}

// Run answers until it is interrupted.
func (c *BotCmd) Run(ctx context.Context) (err error) {
	token, err := readToken(c.TokenFile)
	if err != nil {
		return err
	}
	p, err := c.open(ctx, c.WorkerTokenFile, true, c.Model)
	if errors.Is(err, errDryRun) {
		fmt.Fprintln(os.Stderr, err)
		return nil
	}
	if err != nil {
		return &exitError{exitNotChecked, err}
	}
	defer func() { err = errors.Join(err, p.end()) }()
	backend := bot.NewProxied(p.Proxy, c.Model)
	defer backend.Close()
	b, err := bot.New(ctx, bot.Options{
		Token: token, Server: c.Server, Backend: backend, System: c.System,
		PerHour: c.PerHour, AtOnce: c.AtOnce, Log: os.Stderr,
	})
	if err != nil {
		return err
	}
	proxying, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ready := make(chan struct{})
	go p.run(proxying, c.Model, func() { close(ready) })
	select {
	case <-ready:
	case <-ctx.Done():
		return nil
	}
	fmt.Printf("https://t.me/%s\n", b.Name())
	fmt.Fprintln(os.Stderr, "note: Telegram's servers see every message to and from this bot")
	b.Run(ctx)
	if ctx.Err() == nil {
		return errors.New("the bot ended by itself")
	}
	return nil
}
