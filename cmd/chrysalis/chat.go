package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"chrysalis/launcher"
	"chrysalis/openai"
	"chrysalis/terminal"
)

// ChatCmd asks a VM a question.
type ChatCmd struct {
	Question    string   `arg:"" help:"What to ask."`
	Endpoint    string   `default:"default" placeholder:"URL|NAME" help:"Where to ask: https://HOST:PORT, or the name of a VM on this machine (default: ${default})."`
	Model       string   `help:"The model (default: the first that is served)."`
	System      string   `placeholder:"TEXT" help:"A system message before the question."`
	MaxTokens   *int     `placeholder:"N" help:"The longest answer, in tokens."`
	Temperature *float64 `placeholder:"T" help:"0 always takes the likeliest token."`
	JSON        bool     `name:"json" help:"Print one JSON document with the whole answer."`
}

// Run streams the answer to standard output.
func (c *ChatCmd) Run(ctx context.Context) error {
	endpoint, err := chatEndpoint(ctx, c.Endpoint)
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "note: the evidence of this VM is not verified yet; do not send it anything confidential")
	client := &openai.Client{Endpoint: endpoint, HTTP: &http.Client{
		Transport: &http.Transport{
			// The VM makes its key at boot and no authority vouches for it: what
			// will is the evidence, whose verification is not there yet. Until
			// then this only proves that some TLS 1.3 server answers.
			TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true},
			TLSHandshakeTimeout:   30 * time.Second,
			ResponseHeaderTimeout: 15 * time.Minute,
		},
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
	if err != nil {
		return cleanError(err)
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(struct {
			Model  string `json:"model"`
			Answer string `json:"answer"`
			openai.Result
			Verified bool `json:"verified"`
		}{model, answer.String(), result, false})
	}
	return nil
}

// chatEndpoint returns the URL that a URL or the name of a running VM stands for.
func chatEndpoint(ctx context.Context, where string) (string, error) {
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
