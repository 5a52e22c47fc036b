package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"chrysalis/attest"
	"chrysalis/attest/receipt"
	"chrysalis/launcher"
	"chrysalis/openai"
	"chrysalis/proxy"
	"chrysalis/terminal"
)

// ChatCmd asks a VM a question, having verified it.
type ChatCmd struct {
	trustFlags
	payFlags
	Question    string   `arg:"" help:"What to ask."`
	Endpoint    string   `default:"default" placeholder:"URL|NAME" help:"Where to ask: https://HOST:PORT, or the name of a VM on this machine (default: ${default})."`
	Model       string   `help:"The model (default: the first that is served)."`
	System      string   `placeholder:"TEXT" help:"A system message before the question."`
	MaxTokens   *int     `placeholder:"N" help:"The longest answer, in tokens."`
	Temperature *float64 `placeholder:"T" help:"0 always takes the likeliest token."`
	TokenFile   string   `placeholder:"FILE" help:"A file with the token that the VM asks for."`
	Save        string   `placeholder:"DIR" help:"Keep evidence, question, answer and receipt in this folder, for 'verify receipt'. All but the evidence is confidential."`
	Checks      bool     `help:"Show every check before the answer."`
	JSON        bool     `name:"json" help:"Print one JSON document with the whole answer."`
}

// asking is a VM that has been verified, and the way to ask it.
type asking struct {
	session  *attest.Session
	trust    *trust
	endpoint string
	token    string
	http     http.RoundTripper
	close    func() error
}

// direct asks without anything in between.
func (c *ChatCmd) direct(ctx context.Context) (_ *asking, err error) {
	a := &asking{}
	if a.trust, err = c.load(ctx); err != nil {
		return a, err
	}
	if a.endpoint, err = findEndpoint(ctx, c.Endpoint); err != nil {
		return a, err
	}
	if a.token, err = readToken(c.TokenFile); err != nil {
		return a, err
	}
	transport := a.trust.transport()
	a.http, a.close = transport, func() error { transport.CloseIdleConnections(); return nil }
	a.session, err = transport.Attest(ctx, a.endpoint)
	return a, err
}

// paying asks through a proxy in this process, which pays.
func (c *ChatCmd) paying(ctx context.Context) (*asking, error) {
	a := &asking{endpoint: proxy.LocalEndpoint}
	w := workerFlags{trustFlags: c.trustFlags, payFlags: c.payFlags, Worker: []string{c.Endpoint}}
	p, err := w.open(ctx, c.TokenFile, true, c.Model)
	if err != nil {
		return a, err
	}
	proxying, stop := context.WithCancel(context.WithoutCancel(ctx))
	local := p.Local()
	a.trust, a.http = p.trust, local.Transport()
	a.close = func() error {
		err := local.Close()
		stop()
		return errors.Join(err, p.end())
	}
	ready := make(chan struct{})
	go p.run(proxying, c.Model, func() { close(ready) })
	select {
	case <-ready:
	case <-ctx.Done():
		return a, ctx.Err()
	}
	endpoint, err := findEndpoint(ctx, c.Endpoint)
	if err != nil {
		return a, err
	}
	if a.session = p.Session(endpoint); a.session == nil {
		return a, fmt.Errorf("%s has not answered", endpoint)
	}
	if !a.session.Verdict.OK {
		return a, attest.ErrNotVerified
	}
	return a, nil
}

// Run streams the answer to standard output.
func (c *ChatCmd) Run(ctx context.Context) (err error) {
	pays, err := c.given()
	if err != nil {
		return err
	}
	ask := c.direct
	if pays {
		ask = c.paying
	}
	// The checks first: whoever reads along sees that nothing was sent before.
	a, err := ask(ctx)
	if errors.Is(err, errDryRun) {
		fmt.Fprintln(os.Stderr, err)
		return nil
	}
	if a.close != nil {
		defer func() { err = errors.Join(err, a.close()) }()
	}
	session := a.session
	if session != nil && (c.Checks || !session.Verdict.OK) {
		if err := printVerdict(os.Stderr, session); err != nil {
			return err
		}
	}
	if err != nil {
		if session != nil {
			return verdictError(session.Verdict)
		}
		return &exitError{exitNotChecked, cleanError(err)}
	}
	verdict := session.Verdict
	if !c.Checks && !verdict.Confidential {
		fmt.Fprintln(os.Stderr, "note:", conclusion(session))
	}
	client := &openai.Client{Endpoint: a.endpoint, Token: a.token, HTTP: &http.Client{
		Transport:     a.http,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	model := c.Model
	if model == "" {
		served, err := client.Models(ctx)
		if err != nil {
			return cleanError(err)
		}
		if len(served) == 0 {
			return errors.New("this VM serves no model")
		}
		model = served[0]
	}
	request := openai.ChatRequest{Model: model, MaxTokens: c.MaxTokens, Temperature: c.Temperature}
	if c.System != "" {
		request.Messages = append(request.Messages, openai.Message{Role: "system", Content: c.System})
	}
	request.Messages = append(request.Messages, openai.Message{Role: "user", Content: c.Question})

	if c.Save != "" {
		// First, so that a folder that is not empty is found before the question is sent.
		if err := session.Save(c.Save, a.trust.policy, a.trust.records); err != nil {
			return err
		}
		var salt [receipt.SaltSize]byte
		rand.Read(salt[:])
		client.Transcript = &openai.Transcript{Salt: receipt.FormatSalt(salt)}
	}

	var answer strings.Builder
	began := false
	out := terminal.NewWriter(os.Stdout)
	result, err := client.ChatStream(ctx, request, func(piece string) error {
		if c.JSON {
			answer.WriteString(piece)
			return nil
		}
		began = true
		_, err := out.Write([]byte(piece))
		return err
	})
	if began {
		out.Close()
		fmt.Println()
	}
	if refused, ok := errors.AsType[*openai.Error](err); ok && refused.Status == http.StatusPaymentRequired {
		if pays {
			return cleanError(err)
		}
		return errors.New("this worker wants to be paid; add --max-price=TON --budget=TON --key-file=FILE (docs/market.md)")
	}
	if err != nil {
		return cleanError(err)
	}
	if c.Save != "" {
		if err := saveTranscript(c.Save, client.Transcript); err != nil {
			return err
		}
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(struct {
			Model  string `json:"model"`
			Answer string `json:"answer"`
			openai.Result
			Verified     bool `json:"verified"`
			Confidential bool `json:"confidential"`
		}{model, answer.String(), result, verdict.OK, verdict.Confidential})
	}
	return nil
}

// saveTranscript writes what 'verify receipt' reads, for nobody else to see.
func saveTranscript(dir string, t *openai.Transcript) error {
	_, signed, err := receipt.SplitStream(t.Response)
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{fileReceipt: signed, fileRequest: t.Request, fileResponse: t.Response, fileSalt: []byte(t.Salt + "\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return fmt.Errorf("save the answer: %w", err)
		}
	}
	return nil
}

// findEndpoint returns the URL that a URL or the name of a running VM stands for.
func findEndpoint(ctx context.Context, where string) (string, error) {
	if strings.Contains(where, "://") {
		u, err := url.Parse(where)
		if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return "", fmt.Errorf("%q is not an endpoint; write it like https://127.0.0.1:8443", where)
		}
		return "https://" + u.Host, nil
	}
	states, err := launcher.Status(ctx, "", where)
	if err != nil {
		return "", err
	}
	for _, s := range states {
		if s.Life == launcher.LifeReady {
			return s.Endpoint, nil
		}
	}
	return "", fmt.Errorf("the VM %q is not ready (%s); see 'chrysalis status'", where, states[len(states)-1].Life)
}

// cleanError makes an error that quotes the server safe to print.
func cleanError(err error) error { return errors.New(terminal.Line(err.Error())) }
