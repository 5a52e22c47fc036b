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

// offerFlags say on which terms something is offered.
type offerFlags struct {
	Endpoint        string         `placeholder:"HOST:PORT" help:"Where the worker is reached."`
	PromptPrice     *tonPrice      `placeholder:"TON" help:"For a million tokens of prompts."`
	CompletionPrice *tonPrice      `placeholder:"TON" help:"For a million tokens of completions."`
	Capacity        int            `default:"1" help:"How many requests it serves at a time (default: ${default})."`
	Payout          string         `placeholder:"ADDRESS" help:"Who is paid (default: the wallet)."`
	Expires         time.Duration  `default:"168h" help:"How long the offer is there, at most 720h (default: ${default})."`
	Registry        []string       `placeholder:"ADDRESS" sep:"none" help:"A publisher's registry that must have the records; repeat it for more."`
	Auditor         []registry.Key `placeholder:"KEY" sep:"none" help:"An auditor whose signature counts; repeat it for more."`
	Signatures      int            `help:"How many of these auditors must have signed each record."`
}

// complete fails when something is missing that every offer has.
func (f *offerFlags) complete() error {
	var missing []string
	for _, need := range []struct {
		flag  string
		given bool
	}{
		{"--endpoint=HOST:PORT", f.Endpoint != ""}, {"--prompt-price=TON", f.PromptPrice != nil},
		{"--completion-price=TON", f.CompletionPrice != nil}, {"--registry=ADDRESS", len(f.Registry) > 0},
	} {
		if !need.given {
			missing = append(missing, need.flag)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing flags: %s", strings.Join(missing, ", "))
	}
	return nil
}

// put is the wallet's offer of models, prices left to the flags. It is refused unless
// the publishers have the records of all that and of what else is needed.
func (f *offerFlags) put(ton *tonFlags, wallet *walletFlags, image registry.Key, models []registry.OfferedModel, also ...registry.Need) (registry.Operation, error) {
	fail := func(err error) (registry.Operation, error) { return registry.Operation{}, err }
	o := registry.OfferDocument{
		Version: registry.OfferVersion, Endpoint: f.Endpoint, Image: record.Hex(image[:]), Models: models, Payout: f.Payout, Capacity: f.Capacity,
	}
	for i := range models {
		models[i].PromptPrice, models[i].CompletionPrice = int64(*f.PromptPrice), int64(*f.CompletionPrice)
	}
	if o.Payout == "" {
		p, err := wallet.publisher(ton, "", nil)
		if err != nil {
			return fail(err)
		}
		p.Reader.Client.Close()
		o.Payout = p.Wallet.Address.String()
	}
	var publishers []lite.Address
	for _, text := range f.Registry {
		a, err := lite.ParseAddress(text)
		if err != nil {
			return fail(fmt.Errorf("--registry: %w", err))
		}
		publishers = append(publishers, a)
	}
	policy := registry.Policy{Auditors: f.Auditor, Signatures: f.Signatures}
	return registry.PutOffer(o, time.Now().Add(f.Expires).Truncate(time.Second), publishers, policy, also...), nil
}

// ListingPutCmd offers.
type ListingPutCmd struct {
	tonFlags
	walletFlags
	Image registry.Key `required:"" placeholder:"KEY" help:"The key of the image's record."`
	Model []string     `required:"" placeholder:"NAME@REVISION:ROOTHASH" sep:"none" help:"A model that it serves; repeat it for more."`
	offerFlags
}

// Validate is kong's hook.
func (c *ListingPutCmd) Validate() error { return c.complete() }

// Run puts the offer, unless no publisher has what is offered.
func (c *ListingPutCmd) Run(ctx context.Context) error {
	var models []registry.OfferedModel
	for _, text := range c.Model {
		id, root, _ := strings.Cut(text, ":")
		hash, err := hex.DecodeString(root)
		if err != nil || len(hash) != 32 {
			return fmt.Errorf("--model: %q is not NAME@REVISION:ROOTHASH", text)
		}
		models = append(models, registry.OfferedModel{ID: id, RootHash: hash})
	}
	put, err := c.put(&c.tonFlags, &c.walletFlags, c.Image, models)
	if err != nil {
		return err
	}
	return c.write(ctx, &c.tonFlags, "", put)
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
	Model    string   `placeholder:"MODEL" help:"A model, by NAME@REVISION, NAME or root hash (default: any)."`
	MaxPrice tonPrice `placeholder:"TON" help:"The most for a million tokens, of prompts and of completions (default: no limit)."`
	JSON     bool     `name:"json" help:"Print a JSON list."`
}

// Run prints offers, the cheapest first.
func (c *ListingFindCmd) Run(ctx context.Context) error {
	reader, view, err := c.view(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	offers, err := reader.Offers(ctx, view)
	if err != nil {
		return err
	}
	warn(view)
	found := registry.Find(offers, c.Model, int64(c.MaxPrice))
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
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", f.Model.ID, registry.TON(uint64(f.Model.PromptPrice)), registry.TON(uint64(f.Model.CompletionPrice)), f.Offer.Capacity,
			terminal.Line(f.Offer.Endpoint), f.Offer.Expiry.Format(time.DateOnly), f.Offer.Account)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "prices are for a million tokens; an offer proves nothing, verify the worker before you send it anything")
	return nil
}
