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

	"chrysalis/attest/receipt"
	"chrysalis/launcher"
	"chrysalis/openai"
	"chrysalis/terminal"
)

// ChatCmd asks a VM a question, having verified it.
type ChatCmd struct {
	trustFlags
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

// Run streams the answer to standard output.
func (c *ChatCmd) Run(ctx context.Context) error {
	t, err := c.load(ctx)
	if err != nil {
		return &exitError{exitNotChecked, err}
	}
	endpoint, err := findEndpoint(ctx, c.Endpoint)
	if err != nil {
		return &exitError{exitNotChecked, err}
	}
	transport := t.transport()
	defer transport.CloseIdleConnections()
	// The checks first: whoever reads along sees that nothing was sent before.
	session, err := transport.Attest(ctx, endpoint)
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
	token, err := readToken(c.TokenFile)
	if err != nil {
		return err
	}
	client := &openai.Client{Endpoint: endpoint, Token: token, HTTP: &http.Client{
		Transport:     transport,
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
		if err := session.Save(c.Save, t.policy, t.records); err != nil {
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
		return fmt.Errorf("this worker wants to be paid; ask it through 'chrysalis proxy --worker %s --max-price=TON --budget=TON --key-file=FILE' (docs/market.md)", endpoint)
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
