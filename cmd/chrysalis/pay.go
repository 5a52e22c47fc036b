package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"chrysalis/launcher"
	"chrysalis/market"
	"chrysalis/pay"
	"chrysalis/pay/funds"
	"chrysalis/pay/purse"
	"chrysalis/proxy"
	"chrysalis/registry"
	"chrysalis/registry/lite"
	"chrysalis/terminal"
)

// payFlags say how workers are paid.
type payFlags struct {
	payerFlags
	MaxPrice  string         `placeholder:"TON" help:"Pay workers that can never charge more for a million tokens, of prompts or of answers; without it nobody is paid."`
	Budget    string         `placeholder:"TON" help:"The most that is paid in one run, and the most that is deposited in channels."`
	Deposit   string         `placeholder:"TON" help:"What a channel is opened with, and what a top-up adds (default: a quarter of the budget)."`
	MaxDelay  time.Duration  `default:"168h" help:"How long a payee may demand that money stays locked once a channel is being closed (default: ${default})."`
	CloseIdle *time.Duration `placeholder:"DURATION" help:"Begin to close channels through which nothing was paid for so long; 0s closes all at the end (default: they stay open for the next run)."`
	Yes       bool           `help:"Do not ask before anything is paid."`
	DryRun    bool           `help:"Show whom it would pay how much, and pay nothing."`
}

// given reports whether workers are to be paid, or why they cannot be.
func (f *payFlags) given() (bool, error) {
	var missing, extra []string
	for _, flag := range []struct {
		name  string
		given bool
		value string // of one that must be there
	}{
		{"--budget", f.Budget != "", "TON"}, {"--key-file", f.KeyFile != "", "FILE"},
		{"--deposit", f.Deposit != "", ""}, {"--close-idle", f.CloseIdle != nil, ""}, {"--dry-run", f.DryRun, ""}, {"--yes", f.Yes, ""},
	} {
		if flag.value != "" && !flag.given {
			missing = append(missing, flag.name+"="+flag.value)
		}
		if flag.given && flag.name != "--key-file" { // that may come from the environment
			extra = append(extra, flag.name)
		}
	}
	switch {
	case f.MaxPrice == "" && len(extra) > 0:
		return false, fmt.Errorf("%s: only with --max-price=TON", strings.Join(extra, ", "))
	case f.MaxPrice != "" && len(missing) > 0:
		return false, fmt.Errorf("missing flags: %s", strings.Join(missing, ", "))
	case f.CloseIdle != nil && *f.CloseIdle < 0:
		return false, errors.New("--close-idle: not a time that can pass")
	}
	return f.MaxPrice != "", nil
}

// cashier pays workers.
type cashier struct {
	flags    *payFlags
	purse    *purse.Purse
	funds    *funds.Funds
	reader   registry.Reader
	began    time.Time
	maxPrice uint64
	budget   uint64
	deposit  uint64
	closing  sync.Map // voucher.Channel
	once     sync.Once
}

// open opens the purse and the wallet.
func (f *payFlags) open(ton *tonFlags) (c *cashier, err error) {
	c = &cashier{flags: f, began: time.Now()}
	for _, amount := range []struct {
		flag, text string
		to         *uint64
	}{{"--max-price", f.MaxPrice, &c.maxPrice}, {"--budget", f.Budget, &c.budget}, {"--deposit", cmp.Or(f.Deposit, f.Budget), &c.deposit}} {
		if *amount.to, err = parseTON(amount.text); err != nil {
			return nil, fmt.Errorf("%s: %w", amount.flag, err)
		}
	}
	if f.Deposit == "" {
		c.deposit = max(c.deposit/4, 1)
	}
	state, err := launcher.StateDir()
	if err != nil {
		return nil, err
	}
	key, err := registry.LoadKey(f.KeyFile)
	if err != nil {
		return nil, err
	}
	publisher, err := f.wallet(false).publisher(ton, "", nil)
	if err != nil {
		return nil, err
	}
	publisher.Progress = nil // what is done is told once for each channel
	c.reader = publisher.Reader
	own, err := own()
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	globalID := publisher.Reader.Client.Network().GlobalID
	if c.purse, err = purse.Open(purseDir(state, publisher.Wallet, globalID), globalID, key, c.budget); err != nil {
		return nil, errors.Join(err, c.close())
	}
	c.funds = funds.New(funds.Options{
		Publisher: publisher, Own: own, Key: key, Budget: c.budget, Deposit: c.deposit, MaxDelay: f.MaxDelay,
		Progress: func(what string) { fmt.Fprintln(os.Stderr, what) },
	})
	return c, nil
}

// purseDir is where a wallet's purse is.
func purseDir(state string, w *registry.Wallet, globalID int32) string {
	return filepath.Join(state, "ton", fmt.Sprintf("purse-%d-%x", globalID, w.Address.ID[:8]))
}

// ChannelForgiveCmd has a payee paid again.
type ChannelForgiveCmd struct {
	tonFlags
	KeyFile string `required:"" env:"CHRYSALIS_TON_KEY" placeholder:"FILE" help:"The key of the wallet that paid."`
	Wallet  string `enum:"v4r2,v5r1" default:"v5r1" help:"The wallet's version, v4r2 or v5r1 (default: ${default})."`
	Payee   string `arg:"" optional:"" help:"Who is to be paid again; without it those are listed that are paid no more, and why."`
}

// Run forgives, or lists.
func (c *ChannelForgiveCmd) Run() error {
	network, err := c.named()
	if err != nil {
		return err
	}
	state, err := launcher.StateDir()
	if err != nil {
		return err
	}
	key, wallet, err := c.wallet(c.KeyFile, c.Wallet)
	if err != nil {
		return err
	}
	p, err := purse.Open(purseDir(state, wallet, network.GlobalID), network.GlobalID, key, 0)
	if err != nil {
		return err
	}
	if c.Payee == "" {
		for _, b := range p.Bars() {
			fmt.Printf("%s\t%s\t%s\n", lite.Address{ID: b.Payee}, b.Time.Format(time.DateOnly), terminal.Line(b.Reason))
		}
		return p.Close()
	}
	payee, err := lite.ParseAddress(c.Payee)
	var ok bool
	if err == nil {
		ok, err = p.Forgive(payee.ID)
	}
	if err == nil && !ok {
		err = fmt.Errorf("%s is not one that is paid no more; see 'chrysalis channel forgive'", payee)
	}
	return errors.Join(err, p.Close())
}

func (c *cashier) close() error {
	var err error
	c.once.Do(func() {
		if c.purse != nil {
			err = c.purse.Close()
		}
		c.reader.Client.Close()
	})
	return err
}

// payment is how the proxy pays.
func (c *cashier) payment() *proxy.Payment {
	return &proxy.Payment{Purse: c.purse, MaxPrice: c.most(), Funds: c.funds}
}

// most is --max-price as a price.
func (c *cashier) most() int64 { return int64(min(c.maxPrice, 1<<62)) }

// find has the payment's workers found among those who offer a model at such prices, now
// and when they are wanting.
func (c *cashier) find(ctx context.Context, payment *proxy.Payment, model string) (err error) {
	if payment.Listed, err = c.offers(ctx, model); err != nil {
		return err
	}
	if !slices.ContainsFunc(payment.Listed, func(l proxy.Listed) bool { return max(l.Price.Prompt, l.Price.Completion) <= payment.MaxPrice }) {
		return fmt.Errorf("nobody offers %q for at most %s; see 'chrysalis listing find'", model, registry.TON(c.maxPrice))
	}
	payment.Offers = func(ctx context.Context) ([]proxy.Listed, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		listed, err := c.offers(ctx, model)
		if err != nil && ctx.Err() != context.Canceled {
			fmt.Fprintln(os.Stderr, "note: workers are wanting, and the listing could not be read:", terminal.Line(err.Error()))
		}
		return listed, err
	}
	return nil
}

// offers reads who offers a model, at any price.
func (c *cashier) offers(ctx context.Context, model string) ([]proxy.Listed, error) {
	view, err := c.reader.Client.Sync(ctx)
	if err != nil {
		return nil, err
	}
	offers, err := c.reader.Offers(ctx, view)
	if err != nil {
		return nil, err
	}
	warn(view)
	var listed []proxy.Listed
	for _, match := range registry.Find(offers, model, 0) {
		payee, err := lite.ParseAddress(match.Offer.Payout)
		if err != nil {
			payee = lite.Address{} // it is shown, and not used
		}
		listed = append(listed, proxy.Listed{
			Endpoint: "https://" + match.Offer.Endpoint, Root: match.Model.RootHash, Payee: payee.ID,
			Offer: market.Offer{Owner: match.Offer.Account.Raw(), Capacity: match.Offer.Capacity,
				Price: pay.Price{Prompt: match.Model.PromptPrice, Completion: match.Model.CompletionPrice}},
		})
	}
	return listed, nil
}

// errDryRun ends a command that was to show its plan only.
var errDryRun = errors.New("dry run: nothing was paid")

// maxTold is how many workers that are not used are shown: anyone can offer anything.
const maxTold = 16

// plan shows who would be paid how much, asks whether to, and returns the endpoints
// that can be used. pays says that others may be paid later.
func (c *cashier) plan(quotes []proxy.Quote, pays bool) ([]string, error) {
	var usable []string
	unused := 0
	w := tabwriter.NewWriter(os.Stderr, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "WORKER\tMODEL\tPROMPTS\tANSWERS\tAT MOST\tPAYEE")
	for _, q := range quotes {
		switch {
		case q.Problem != "":
			if unused++; unused > maxTold {
				continue
			}
			fmt.Fprintf(w, "%s\tnot used: %s\n", terminal.Line(q.Endpoint), q.Problem)
			continue
		case len(usable) == proxy.MaxKept:
			fmt.Fprintf(w, "%s\tnot used: there are %d others\n", terminal.Line(q.Endpoint), proxy.MaxKept)
			continue
		case q.Free:
			fmt.Fprintf(w, "%s\t%s\tfree\n", terminal.Line(q.Endpoint), q.Model)
		default:
			pays = true
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s, %s\t%s\n", terminal.Line(q.Endpoint), q.Model, registry.TON(uint64(q.Price.Prompt)), registry.TON(uint64(q.Price.Completion)),
				registry.TON(uint64(q.Ceiling.Prompt)), registry.TON(uint64(q.Ceiling.Completion)), lite.Address{ID: q.Payee})
		}
		usable = append(usable, q.Endpoint)
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	if unused > maxTold {
		fmt.Fprintf(os.Stderr, "%d more are not used\n", unused-maxTold)
	}
	if pays {
		fmt.Fprintf(os.Stderr, "prices are for a million tokens; at most %s is paid in this run. Channels are opened as they are needed, with %s each and %s in all at most; each takes up to %s more for rent and gas, most of which comes back\n",
			registry.TON(c.budget), registry.TON(min(c.deposit, c.budget)), registry.TON(c.budget), registry.TON(funds.Overhead))
	}
	switch {
	case c.flags.DryRun:
		return nil, errDryRun
	case len(usable) == 0:
		return nil, errors.New("there is no worker that can be used")
	case !pays || c.flags.Yes:
		return usable, nil
	case !isTerminal(os.Stdin) || !isTerminal(os.Stderr):
		return nil, errors.New("there is no terminal to ask on whether to pay; say so with --yes")
	}
	fmt.Fprint(os.Stderr, "Pay? [y/N] ")
	answer, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return nil, errors.New("nothing was paid")
	}
	return usable, nil
}

// tend closes channels that are idle until ctx ends.
func (c *cashier) tend(ctx context.Context) {
	if c.flags.CloseIdle == nil || *c.flags.CloseIdle == 0 {
		return
	}
	tick := time.NewTicker(min(time.Minute, *c.flags.CloseIdle))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			c.closeIdle(ctx, *c.flags.CloseIdle)
		}
	}
}

// closeIdle begins to close the channels of this run that have been idle for so long.
func (c *cashier) closeIdle(ctx context.Context, idle time.Duration) {
	for _, s := range c.purse.States() {
		last := s.Last
		if last.IsZero() {
			last = c.began
		}
		if s.Limit == 0 || s.Running > 0 || time.Since(last) < idle || !c.purse.Retire(s.Channel) {
			continue
		}
		at, err := c.funds.Close(ctx, s.Channel)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %s; close it with 'chrysalis channel close %s'\n", lite.Address{ID: s.Channel}, terminal.Line(err.Error()), lite.Address{ID: s.Channel})
			continue
		}
		c.closing.Store(s.Channel, true)
		fmt.Fprintf(os.Stderr, "the channel %s is closing; take the rest with 'chrysalis channel close %s' from %s on\n",
			lite.Address{ID: s.Channel}, lite.Address{ID: s.Channel}, at.Format(time.RFC3339))
	}
}

// end closes what is to be closed, and says what stays open.
func (c *cashier) end() error {
	if c.flags.CloseIdle != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		c.closeIdle(ctx, *c.flags.CloseIdle)
		cancel()
	}
	_, spent := c.purse.Budget()
	fmt.Fprintf(os.Stderr, "%s was paid\n", registry.TON(spent))
	for _, s := range c.purse.States() {
		if _, closing := c.closing.Load(s.Channel); s.Limit > 0 && !closing {
			fmt.Fprintf(os.Stderr, "the channel %s to %s stays open with %s that nothing is signed for; the next run uses it, 'chrysalis channel close %s' takes it back\n",
				lite.Address{ID: s.Channel}, lite.Address{ID: s.Payee}, registry.TON(s.Limit-min(s.Limit, s.Signed)), lite.Address{ID: s.Channel})
		}
	}
	return c.close()
}
