package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"text/tabwriter"
	"time"

	"chrysalis/attest"
	"chrysalis/launcher"
	"chrysalis/market"
	"chrysalis/measure/record"
	"chrysalis/outfile"
	"chrysalis/registry"
	"chrysalis/terminal"
)

// How many workers are probed at a time, and how long it may take together.
const (
	probesTogether = 8
	probesTime     = 2 * time.Minute
)

// MarketCmd shows what is offered, and whether it is what it says.
type MarketCmd struct {
	trustFlags
	Model    string        `placeholder:"MODEL" help:"A model, by NAME@REVISION, NAME or root hash (default: any)."`
	MaxPrice string        `placeholder:"TON" help:"The most for a million tokens, of prompts and of completions (default: no limit)."`
	Probe    bool          `help:"Verify the workers now, as 'chrysalis verify' does, and remember what came of it. Without it, what the last probes on this machine found is shown."`
	Limit    int           `default:"32" help:"How many offers are shown and probed, the cheapest first (default: ${default})."`
	Timeout  time.Duration `default:"15s" help:"How long one worker may take (default: ${default})."`
	JSON     bool          `name:"json" help:"Print one JSON document."`
}

// Help is what 'chrysalis market --help' says below the usage.
func (*MarketCmd) Help() string {
	return "Offers are read from TON, with proofs, and sorted by price. An offer proves nothing: --probe verifies the worker behind it, against --record or --registry, and sends it nothing else. See docs/market.md."
}

// A marketRow is an offer of a model, and what is known of the worker behind it.
type marketRow struct {
	Model           string        `json:"model"`     // NAME@REVISION
	RootHash        record.Hex    `json:"root_hash"` // 32 bytes
	PromptPrice     int64         `json:"prompt_price"`
	CompletionPrice int64         `json:"completion_price"`
	Capacity        int           `json:"capacity"`
	Endpoint        string        `json:"endpoint"`
	Owner           string        `json:"owner"`
	Payout          string        `json:"payout"`
	Expiry          time.Time     `json:"expiry"`
	Probe           *market.Probe `json:"probe,omitempty"` // the last, on this machine
	Good            int           `json:"probes_good"`     // of the last probes
	Probes          int           `json:"probes"`
}

// Run prints the offers.
func (c *MarketCmd) Run(ctx context.Context) error {
	if c.Limit < 1 || c.Limit > 512 {
		return fmt.Errorf("--limit: %d is not from 1 to 512", c.Limit)
	}
	if c.Timeout <= 0 {
		return errors.New("--timeout: not a time")
	}
	limit := int64(0)
	if c.MaxPrice != "" {
		amount, err := parseTON(c.MaxPrice)
		if err != nil {
			return fmt.Errorf("--max-price: %w", err)
		}
		limit = int64(min(amount, math.MaxInt64))
	}
	reader, view, err := c.TON.view(ctx)
	if err != nil {
		return err
	}
	defer reader.Client.Close()
	offers, err := reader.Offers(ctx, view)
	if err != nil {
		return err
	}
	warn(view)
	path, err := historyFile(reader.Client.Network().GlobalID)
	if err != nil {
		return err
	}
	history, err := readHistory(path)
	if err != nil {
		return err
	}
	found := registry.Find(offers, c.Model, limit)
	all := len(found)
	found = found[:min(all, c.Limit)]
	if c.Probe && len(found) > 0 {
		if err := c.probe(ctx, found, history); err != nil {
			return err
		}
		if err := writeHistory(path, history); err != nil {
			return err
		}
	}
	rows := []marketRow{}
	for _, f := range found {
		row := marketRow{
			Model: f.Model.ID, RootHash: f.Model.RootHash, PromptPrice: f.Model.PromptPrice, CompletionPrice: f.Model.CompletionPrice,
			Capacity: f.Offer.Capacity, Endpoint: f.Offer.Endpoint, Owner: f.Offer.Account.String(), Payout: f.Offer.Payout, Expiry: f.Offer.Expiry,
		}
		if last, good, probes, ok := history.Last(row.Endpoint, row.RootHash.String()); ok {
			row.Probe, row.Good, row.Probes = &last, good, probes
		}
		rows = append(rows, row)
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"offers": rows, "all": all, "block": view.Head.Block.SeqNo})
	}
	if all == 0 {
		fmt.Fprintln(os.Stderr, "nobody offers that")
		return nil
	}
	if err := printMarket(os.Stdout, rows, time.Now()); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "prices are TON for a million tokens")
	if all > len(rows) {
		fmt.Fprintf(os.Stderr, "%d more are offered; show them with --limit\n", all-len(rows))
	}
	return nil
}

// probe verifies the workers of offers, each endpoint once, and adds what comes of it to
// the history.
func (c *MarketCmd) probe(ctx context.Context, offers []registry.Match, history *market.History) error {
	t, err := c.load(ctx)
	if err != nil {
		return err
	}
	transport := t.transport()
	transport.Timeout = c.Timeout
	defer transport.CloseIdleConnections()
	limited, cancel := context.WithTimeout(ctx, probesTime)
	defer cancel()
	show := newSteps()
	defer show.done()

	type result struct {
		probe   market.Probe
		session *attest.Session
		done    bool
	}
	results := map[string]*result{}
	var endpoints []string
	for _, o := range offers {
		if results[o.Offer.Endpoint] == nil {
			results[o.Offer.Endpoint] = new(result)
			endpoints = append(endpoints, o.Offer.Endpoint)
		}
	}
	show.step(fmt.Sprintf("verifying %d workers", len(endpoints)), 0, 0)
	work := make(chan string)
	var workers sync.WaitGroup
	for range min(probesTogether, len(endpoints)) {
		workers.Go(func() {
			for endpoint := range work {
				r := results[endpoint]
				r.probe, r.session = probe(limited, transport, endpoint, c.Timeout)
				r.done = limited.Err() == nil // what was cut off says nothing about the worker
			}
		})
	}
	for _, endpoint := range endpoints {
		work <- endpoint
	}
	close(work)
	workers.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	added := map[string]bool{}
	for _, o := range offers {
		r, root := results[o.Offer.Endpoint], o.Model.RootHash.String()
		key := root + o.Offer.Endpoint
		if !r.done || added[key] {
			continue
		}
		added[key] = true
		if err := history.Add(o.Offer.Endpoint, root, ofModel(r.probe, r.session, o.Model.RootHash)); err != nil {
			return err
		}
	}
	return nil
}

// probe verifies one worker. The endpoint is a stranger's text.
func probe(ctx context.Context, transport *attest.Transport, endpoint string, timeout time.Duration) (market.Probe, *attest.Session) {
	p := market.Probe{At: time.Now().Unix(), Result: market.Unreachable}
	u, err := url.Parse("https://" + endpoint)
	if err != nil || u.Host != endpoint {
		return p, nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	session, err := transport.Attest(ctx, u.String())
	if session == nil || session.Verdict == nil {
		return p, nil
	}
	p.Latency = min(max(session.Fetch.Milliseconds(), 1), 1<<30)
	switch {
	case session.Verdict.OK && err == nil:
		p.Result, p.Confidential = market.Attested, session.Verdict.Confidential
	case session.Verdict.Failed != "":
		p.Result = string(session.Verdict.Failed)
	}
	return p, session
}

// ofModel is what a probe says of one model.
func ofModel(p market.Probe, session *attest.Session, root record.Hex) market.Probe {
	if p.Result == market.Attested && !slices.ContainsFunc(session.Verdict.ModelRoots, func(r record.Hex) bool { return r.String() == root.String() }) {
		p.Result, p.Confidential = market.OtherModel, false
	}
	return p
}

// printMarket prints a line an offer.
func printMarket(out io.Writer, rows []marketRow, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "MODEL\tROOT HASH\tPROMPT\tCOMPLETION\tCAPACITY\tATTESTED\tLATENCY\tGOOD\tPROBED\tENDPOINT\tOWNER")
	for _, r := range rows {
		attested, latency, good, ago := "?", "?", "?", "never"
		if p := r.Probe; p != nil {
			switch {
			case p.Result != market.Attested:
				attested = "no: " + p.Result
			case !p.Confidential:
				attested = "yes, NOT CONFIDENTIAL"
			default:
				attested = "yes"
			}
			if p.Latency > 0 {
				latency = fmt.Sprintf("%d ms", p.Latency)
			}
			good = fmt.Sprintf("%d of %d", r.Good, r.Probes)
			ago = max(now.Sub(time.Unix(p.At, 0)), 0).Round(time.Second).String() + " ago"
		}
		fmt.Fprintf(w, "%s\t%.12s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n", terminal.Line(r.Model), r.RootHash.String(), market.TON(r.PromptPrice), market.TON(r.CompletionPrice),
			r.Capacity, attested, latency, good, ago, terminal.Line(r.Endpoint), r.Owner)
	}
	return w.Flush()
}

// historyFile is where the probes on a network are remembered.
func historyFile(network int32) (string, error) {
	state, err := launcher.StateDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(state, "ton", fmt.Sprintf("probes-%d.json", network)), nil
}

func readHistory(path string) (*market.History, error) {
	data, err := readFile(path, market.MaxHistory)
	if errors.Is(err, fs.ErrNotExist) {
		return new(market.History), nil
	}
	if err != nil {
		return nil, err
	}
	h, err := market.ParseHistory(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; remove the file to begin a new one", path, err)
	}
	return h, nil
}

func writeHistory(path string, h *market.History) error {
	data, err := h.Encode()
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = outfile.Write(path, data, 0o600)
	}
	return err
}
