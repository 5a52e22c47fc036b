package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"chrysalis/measure/record"
	"chrysalis/registry"
	"chrysalis/registry/lite"
	"chrysalis/terminal"
)

type listingCommands struct {
	Put    ListingPutCmd    `cmd:"" help:"Offer a worker's models to everyone."`
	Remove ListingRemoveCmd `cmd:"" help:"Take the wallet's offer away."`
	Find   ListingFindCmd   `cmd:"" help:"Find offers of a model."`
}

// ListingPutCmd offers.
type ListingPutCmd struct {
	tonFlags
	walletFlags
	Endpoint        string         `required:"" placeholder:"HOST:PORT" help:"Where the worker is reached."`
	Image           registry.Key   `required:"" placeholder:"KEY" help:"The key of the image's record."`
	Model           []string       `required:"" placeholder:"NAME@REVISION:ROOTHASH" sep:"none" help:"A model that it serves; repeat it for more."`
	PromptPrice     int64          `required:"" placeholder:"NANOTONS" help:"For a million tokens of prompts."`
	CompletionPrice int64          `required:"" placeholder:"NANOTONS" help:"For a million tokens of completions."`
	Capacity        int            `default:"1" help:"How many requests it serves at a time (default: ${default})."`
	Payout          string         `placeholder:"ADDRESS" help:"Who is paid (default: the wallet)."`
	Expires         time.Duration  `default:"168h" help:"How long the offer is there, at most 720h (default: ${default})."`
	Registry        []string       `required:"" placeholder:"ADDRESS" sep:"none" help:"A publisher's registry that must have the records; repeat it for more."`
	Auditor         []registry.Key `placeholder:"KEY" sep:"none" help:"An auditor whose signature counts; repeat it for more."`
	Signatures      int            `help:"How many of these auditors must have signed each record."`
}

// Run puts the offer, unless no publisher has what is offered.
func (c *ListingPutCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	p, err := c.publisher(&c.tonFlags, "", show)
	if err != nil {
		return err
	}
	p.Reader.Client.Close()
	o := registry.OfferDocument{
		Version: registry.OfferVersion, Endpoint: c.Endpoint, Image: record.Hex(c.Image[:]), Payout: c.Payout, Capacity: c.Capacity,
	}
	if o.Payout == "" {
		o.Payout = p.Wallet.Address.String()
	}
	for _, text := range c.Model {
		id, root, _ := strings.Cut(text, ":")
		hash, err := hex.DecodeString(root)
		if err != nil || len(hash) != 32 {
			return fmt.Errorf("--model: %q is not NAME@REVISION:ROOTHASH", text)
		}
		o.Models = append(o.Models, registry.OfferedModel{
			ID: id, RootHash: hash, PromptPrice: c.PromptPrice, CompletionPrice: c.CompletionPrice,
		})
	}
	var publishers []lite.Address
	for _, text := range c.Registry {
		a, err := lite.ParseAddress(text)
		if err != nil {
			return err
		}
		publishers = append(publishers, a)
	}
	policy := registry.Policy{Auditors: c.Auditor, Signatures: c.Signatures}
	expiry := time.Now().Add(c.Expires).Truncate(time.Second)
	return c.write(ctx, &c.tonFlags, "", registry.PutOffer(o, expiry, publishers, policy))
}

// ListingRemoveCmd removes.
type ListingRemoveCmd struct {
	tonFlags
	walletFlags
}

// Run removes the wallet's offer.
func (c *ListingRemoveCmd) Run(ctx context.Context) error {
	return c.write(ctx, &c.tonFlags, "", registry.RemoveOffer())
}

// ListingFindCmd finds.
type ListingFindCmd struct {
	tonFlags
	Model    string `placeholder:"MODEL" help:"A model, by NAME@REVISION, NAME or root hash (default: any)."`
	MaxPrice int64  `placeholder:"NANOTONS" help:"The most for a million tokens, of prompts and of completions (default: no limit)."`
	JSON     bool   `name:"json" help:"Print a JSON list."`
}

// Run prints offers, the cheapest first.
func (c *ListingFindCmd) Run(ctx context.Context) error {
	reader, err := c.reader()
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	view, err := reader.Client.Sync(ctx)
	if err != nil {
		return err
	}
	offers, err := reader.Offers(ctx, view)
	if err != nil {
		return err
	}
	warn(view)
	found := registry.Find(offers, c.Model, c.MaxPrice)
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(found)
	}
	if len(found) == 0 {
		fmt.Fprintln(os.Stderr, "nobody offers that")
		return nil
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "MODEL\tPROMPT\tCOMPLETION\tCAPACITY\tENDPOINT\tUNTIL\tOWNER")
	for _, f := range found {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%s\t%s\t%s\n", f.Model.ID, f.Model.PromptPrice, f.Model.CompletionPrice, f.Offer.Capacity,
			terminal.Line(f.Offer.Endpoint), f.Offer.Expiry.Format(time.DateOnly), f.Offer.Account)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "prices are nanotons for a million tokens; an offer proves nothing, verify the worker before you send it anything")
	return nil
}
