package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/voucher"
	"chrysalis/launcher"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

type channelCommands struct {
	Open  ChannelOpenCmd  `cmd:"" help:"Deposit money to pay one owner from."`
	TopUp ChannelTopUpCmd `cmd:"" help:"Add to a channel's deposit."`
	Close ChannelCloseCmd `cmd:"" help:"Begin to close a channel, or take the rest once its delay is over."`
	List  ChannelListCmd  `cmd:"" help:"List the channels that were opened on this machine, with proofs."`

	Forgive ChannelForgiveCmd `cmd:"" help:"List the payees that are paid no more, or have one paid again."`
}

// own is the list of channels of this machine's user.
func own() (channel.Own, error) {
	state, err := launcher.StateDir()
	return channel.Own{Path: filepath.Join(state, "ton", "channels.json")}, err
}

// parseTON reads an amount in TON, in nanotons.
func parseTON(text string) (uint64, error) {
	amount, ok := new(big.Rat).SetString(text)
	if ok {
		amount.Mul(amount, big.NewRat(1e9, 1))
	}
	if !ok || !amount.IsInt() || amount.Sign() <= 0 || !amount.Num().IsInt64() {
		return 0, fmt.Errorf("%q is no amount in TON", text)
	}
	return amount.Num().Uint64(), nil
}

// listHint is the command that tells what became of a message.
const listHint = "chrysalis channel list"

// ChannelOpenCmd opens.
type ChannelOpenCmd struct {
	tonFlags
	walletFlags
	Payee      string        `arg:"" help:"Who is paid: the payout address of an offer."`
	Amount     string        `arg:"" help:"How much, in TON. What is not spent comes back when the channel is closed."`
	Delay      time.Duration `default:"24h" help:"How long the payee has to claim when the channel is closed, at most 720h (default: ${default})."`
	VoucherKey string        `placeholder:"FILE" help:"The key that signs vouchers (default: the wallet's)."`
}

// Run opens a new channel, or shows what that would cost.
func (c *ChannelOpenCmd) Run(ctx context.Context) error {
	deposit, err := parseTON(c.Amount)
	if err != nil {
		return err
	}
	payee, err := lite.ParseAddress(c.Payee)
	if err != nil {
		return err
	}
	if c.Delay < 0 || c.Delay > channel.MaxDelay || c.Delay%time.Second != 0 {
		return fmt.Errorf("--delay: whole seconds, at most %v", channel.MaxDelay)
	}
	network, err := c.named()
	if err != nil {
		return err
	}
	key, wallet, err := c.wallet(c.KeyFile, c.Wallet)
	if err != nil {
		return err
	}
	if c.VoucherKey != "" {
		if key, err = registry.LoadKey(c.VoucherKey); err != nil {
			return err
		}
	}
	terms := channel.Terms{
		PayerKey: voucher.Key(key.Public().(ed25519.PublicKey)), Payer: wallet.Address.ID, Payee: payee.ID,
		Salt: channel.NewSalt(), Delay: uint32(c.Delay / time.Second), GlobalID: network.GlobalID,
	}
	if !c.DryRun {
		// First of all, so that an open channel is never forgotten.
		list, err := own()
		if err != nil {
			return err
		}
		if _, err := list.Add(terms, time.Now()); err != nil {
			return err
		}
	}
	return c.send(ctx, &c.tonFlags, "", listHint, channel.Open(terms, deposit))
}

// ChannelTopUpCmd tops up.
type ChannelTopUpCmd struct {
	tonFlags
	walletFlags
	Channel string `arg:"" help:"The channel's address."`
	Amount  string `arg:"" help:"How much, in TON."`
}

// Run tops up, whoever the payer is.
func (c *ChannelTopUpCmd) Run(ctx context.Context) error {
	amount, err := parseTON(c.Amount)
	if err != nil {
		return err
	}
	a, err := lite.ParseAddress(c.Channel)
	if err != nil {
		return err
	}
	return c.send(ctx, &c.tonFlags, "", listHint, channel.TopUp(a, amount))
}

// ChannelCloseCmd closes.
type ChannelCloseCmd struct {
	tonFlags
	walletFlags
	Channel string `arg:"" help:"The channel's address."`
}

// Run does the step that comes next.
func (c *ChannelCloseCmd) Run(ctx context.Context) error {
	a, err := lite.ParseAddress(c.Channel)
	if err != nil {
		return err
	}
	reader, view, err := c.view(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	s, err := channel.Read(ctx, view, a)
	if err != nil {
		return err
	}
	op := channel.BeginClose(a)
	if s.Status != contract.ChannelOpen {
		op = channel.Finish(a)
	}
	if err := c.send(ctx, &c.tonFlags, "", listHint, op); err != nil {
		return err
	}
	if s.Status == contract.ChannelOpen && !c.DryRun && !c.JSON {
		fmt.Printf("the payee can claim for %v; then take the rest with the same command\n", time.Duration(s.Delay)*time.Second)
	}
	return nil
}

// ChannelListCmd lists.
type ChannelListCmd struct {
	tonFlags
	Forget bool `help:"Forget those that are closed."`
	JSON   bool `name:"json" help:"Print a JSON list."`
}

// channelLine is what is said of a channel.
type channelLine struct {
	channel.OwnChannel
	Status   string     `json:"status"`
	Balance  uint64     `json:"balance"` // nanotons
	Claimed  uint64     `json:"claimed"`
	Cover    uint64     `json:"cover"`
	FinishAt *time.Time `json:"finish_at,omitempty"`
}

// Run reads each channel with proofs.
func (c *ChannelListCmd) Run(ctx context.Context) error {
	file, err := own()
	if err != nil {
		return err
	}
	list, err := file.List()
	if err != nil {
		return err
	}
	reader, view, err := c.view(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	lines := []channelLine{}
	var gone []lite.Address
	for _, known := range list {
		if known.GlobalID != reader.Client.Network().GlobalID {
			continue
		}
		line := channelLine{OwnChannel: known}
		s, err := channel.Read(ctx, view, known.Address)
		switch {
		case errors.Is(err, channel.ErrNoChannel):
			line.Status = "closed, or never opened"
			gone = append(gone, known.Address)
		case err != nil:
			return fmt.Errorf("%s: %w", known.Address, err)
		default:
			line.Status, line.Balance, line.Claimed, line.Cover = s.Status.String(), s.Balance, s.Claimed, s.Cover()
			if at := s.FinishAt(); !at.IsZero() {
				line.FinishAt = &at
			}
		}
		lines = append(lines, line)
	}
	if c.Forget {
		if err := file.Remove(gone...); err != nil {
			return err
		}
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(lines)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "CHANNEL\tPAYEE\tSTATUS\tBALANCE\tCLAIMED\n")
	for _, l := range lines {
		status := l.Status
		if l.FinishAt != nil {
			status += " until " + l.FinishAt.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", l.Address, l.Payee, status, registry.TON(l.Balance), registry.TON(l.Claimed))
	}
	return w.Flush()
}
