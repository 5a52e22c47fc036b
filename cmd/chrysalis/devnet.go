package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"chrysalis/devnet"
	"chrysalis/devnet/explorer"
	"chrysalis/registry/lite"
)

// DevnetCmd runs a local TON chain.
type DevnetCmd struct {
	Dir        string   `placeholder:"DIR" help:"Where the chain is kept (default: devnet in the state folder)."`
	Listen     string   `default:"127.0.0.1:0" placeholder:"HOST:PORT" help:"Where its liteserver listens; port 0 picks a free one (default: ${default})."`
	Explorer   string   `default:"127.0.0.1:0" placeholder:"HOST:PORT" help:"Where its pages are (default: ${default})."`
	Fund       []string `placeholder:"ADDRESS" help:"Give this address 100 TON; repeat it for more."`
	Validators int      `default:"1" help:"How many validators sign its blocks (default: ${default})."`
	Lie        string   `placeholder:"LIE" help:"Have the liteserver deceive its clients, in one of the ways below."`
}

// Help is what 'chrysalis devnet --help' says below the usage.
func (*DevnetCmd) Help() string {
	text := "It runs until it is interrupted, and goes on where it was when it is started again. The lies are"
	for _, l := range devnet.Lies {
		text += " " + string(l)
	}
	return text + "."
}

// fundAmount is what --fund gives, in TON.
const fundAmount = 100

// Run runs the chain until it is interrupted. Its global config is there when the
// line about it is printed.
func (c *DevnetCmd) Run(ctx context.Context) (err error) {
	dir := c.Dir
	if dir == "" {
		if dir, err = devnetDir(); err != nil {
			return err
		}
	}
	if c.Validators < 1 || c.Validators > 1000 {
		return errors.New("--validators: from 1 to 1000 are possible")
	}
	chain, err := devnet.Open(devnet.Options{Dir: dir, Validators: c.Validators})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, chain.Close()) }()
	for _, text := range c.Fund {
		to, err := lite.ParseAddress(text)
		if err != nil {
			return err
		}
		if err := chain.Fund(to.Std(), tonAmount(fundAmount)); err != nil {
			return err
		}
	}
	server, err := chain.Serve(c.Listen)
	if err != nil {
		return err
	}
	defer server.Close()
	if err := server.Lie(devnet.Lie(c.Lie)); err != nil {
		return err
	}
	config := chain.GlobalConfig(server)
	path := filepath.Join(dir, globalConfigName)
	if err := os.WriteFile(path, config, 0o644); err != nil {
		return err
	}
	pages, err := net.Listen("tcp", c.Explorer)
	if err != nil {
		return err
	}
	web := &http.Server{Handler: explorer.Handler(chain, config), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- web.Serve(pages) }()
	defer web.Close()

	fmt.Printf("global config  %s\n", path)
	fmt.Printf("liteserver     %s\n", server.Addr())
	fmt.Printf("explorer       http://%s/\n", pages.Addr())
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}
