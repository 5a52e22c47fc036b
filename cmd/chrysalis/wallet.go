package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"chrysalis/registry"
	"chrysalis/registry/lite"
)

type walletCommands struct {
	New     WalletNewCmd     `cmd:"" help:"Make a wallet's key."`
	Address WalletAddressCmd `cmd:"" help:"Show a wallet's address."`
	Balance WalletBalanceCmd `cmd:"" help:"Show what a wallet has, with proofs."`
}

// walletKeyFlags say which wallet.
type walletKeyFlags struct {
	KeyFile string `required:"" env:"CHRYSALIS_TON_KEY" placeholder:"FILE" help:"The wallet's 24 words, or its seed of 64 hexadecimal digits; nobody else may read the file."`
	Wallet  string `enum:"v4r2,v5r1" default:"v5r1" help:"The wallet's version, v4r2 or v5r1 (default: ${default})."`
	JSON    bool   `name:"json" help:"Print one JSON document."`
}

// payTo is the address to send money to, also before the wallet is a contract.
func payTo(w *registry.Wallet) string { return w.Address.Std().Bounce(false).String() }

// WalletNewCmd makes a key.
type WalletNewCmd struct {
	tonFlags
	Wallet string `enum:"v4r2,v5r1" default:"v5r1" help:"The wallet's version, v4r2 or v5r1 (default: ${default})."`
	File   string `arg:"" help:"Where the key goes; the file must not be there. Who has it has the money."`
}

// Run makes it and prints the wallet's address.
func (c *WalletNewCmd) Run() error {
	network, err := c.named()
	if err != nil {
		return err
	}
	key, err := registry.NewKey(c.File)
	if err != nil {
		return err
	}
	wallet, err := registry.NewWallet(key, c.Wallet, network.GlobalID)
	if err != nil {
		return err
	}
	fmt.Println(payTo(wallet))
	return nil
}

// WalletAddressCmd shows an address.
type WalletAddressCmd struct {
	tonFlags
	walletKeyFlags
}

// Run computes it; it asks nobody.
func (c *WalletAddressCmd) Run() error {
	_, wallet, err := c.wallet(c.KeyFile, c.Wallet)
	if err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]string{"wallet": payTo(wallet)})
	}
	fmt.Println(payTo(wallet))
	return nil
}

// WalletBalanceCmd shows a balance.
type WalletBalanceCmd struct {
	tonFlags
	walletKeyFlags
}

// Run proves it.
func (c *WalletBalanceCmd) Run(ctx context.Context) error {
	_, wallet, err := c.wallet(c.KeyFile, c.Wallet)
	if err != nil {
		return err
	}
	reader, view, err := c.view(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	balance := uint64(0)
	account, err := view.Account(ctx, wallet.Address)
	switch {
	case errors.Is(err, lite.ErrNoAccount):
	case err != nil:
		return err
	default:
		balance = account.Balance
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"wallet": payTo(wallet), "balance": balance})
	}
	fmt.Printf("%s\t%s\n", payTo(wallet), registry.TON(balance))
	return nil
}
