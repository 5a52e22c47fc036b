//go:build bench

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"chrysalis/guest"
)

// The bench image has one more phase than the others: while nobody else can
// reach the engine yet, it asks on the engine's own socket what ci/bench asks
// through relay, vsock, TLS and agent.
func init() {
	at := slices.IndexFunc(phases, func(p phase) bool { return p.name == guest.PhaseIdentity })
	phases = slices.Insert(phases, at, phase{guest.PhaseEngine, guest.ReasonEngineStart, (*agent).measureEngine})
}

// benchBody is the request, as the agent would forward it.
const benchBody = `{"cache_prompt":false,"max_tokens":64,"messages":[{"role":"user","content":"Who can read my prompt?"}],` +
	`"model":"chrysalis/demo","stream":true,"stream_options":{"include_usage":true},"temperature":0}`

const benchRuns, benchWarmUp = 11, 5

// measureEngine prints the medians of time to first event and events a second.
func (a *agent) measureEngine(ctx context.Context) error {
	if a.manifest.Models[0].Name != "chrysalis/demo" {
		return nil // it would take hours, emulated
	}
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return a.children[0].dial(ctx) },
		DisableKeepAlives: true,
	}}
	var firsts, rates []float64
	for i := range benchRuns + benchWarmUp {
		first, rate, err := askOnce(ctx, client)
		if err != nil {
			return fmt.Errorf("measure the engine: %w", err)
		}
		if i >= benchWarmUp {
			firsts, rates = append(firsts, first), append(rates, rate)
		}
	}
	slices.Sort(firsts)
	slices.Sort(rates)
	log.printf("bench first_event_ms=%.2f events_per_s=%.2f", firsts[len(firsts)/2], rates[len(rates)/2])
	return nil
}

func askOnce(ctx context.Context, client *http.Client) (firstMS, rate float64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://engine/v1/chat/completions", strings.NewReader(benchBody))
	if err != nil {
		return 0, 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	begin := time.Now()
	resp, err := client.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, 0, errors.New(resp.Status)
	}
	var first, last time.Time
	events := 0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if !strings.HasPrefix(lines.Text(), "data: {") {
			continue
		}
		last = time.Now()
		if events == 0 {
			first = last
		}
		events++
	}
	if events < 2 {
		return 0, 0, fmt.Errorf("%d events", events)
	}
	return float64(first.Sub(begin).Microseconds()) / 1000, float64(events-1) / last.Sub(first).Seconds(), nil
}
