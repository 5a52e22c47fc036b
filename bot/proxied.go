package bot

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"chrysalis/openai"
	"chrysalis/proxy"
	"chrysalis/terminal"
)

// Proxied is a Backend that asks through a proxy. The two talk within this process:
// no port is open.
type Proxied struct {
	proxy *proxy.Proxy
	local *proxy.Local

	mu    sync.Mutex
	model string
}

// NewProxied serves p within this process until Close. model is what is asked;
// the first one that is served when empty.
func NewProxied(p *proxy.Proxy, model string) *Proxied {
	return &Proxied{proxy: p, model: model, local: p.Local()}
}

// Close ends what is being answered.
func (b *Proxied) Close() error { return b.local.Close() }

// Ask implements Backend.
func (b *Proxied) Ask(ctx context.Context, chat []openai.Message, each func(string) error) (worker string, err error) {
	transport := b.local.Transport()
	defer transport.CloseIdleConnections()
	client := &openai.Client{Endpoint: proxy.LocalEndpoint, HTTP: &http.Client{Transport: tripper(func(r *http.Request) (*http.Response, error) {
		answer, err := transport.RoundTrip(r)
		if err == nil {
			worker = answer.Header.Get(proxy.WorkerHeader)
		}
		return answer, err
	})}}
	model, err := b.choose(ctx, client)
	if err != nil {
		return "", plain(err)
	}
	if _, err = client.ChatStream(ctx, openai.ChatRequest{Model: model, Messages: chat}, each); err != nil {
		return worker, plain(err)
	}
	return worker, nil
}

// choose returns the model to ask.
func (b *Proxied) choose(ctx context.Context, client *openai.Client) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.model == "" {
		served, err := client.Models(ctx)
		if err != nil {
			return "", err
		}
		if len(served) == 0 {
			return "", errors.New("no model is served")
		}
		b.model = served[0]
	}
	return b.model, nil
}

// plain is an error in words of our own: a worker's could quote what it was asked.
func plain(err error) error {
	var refused *openai.Error
	switch {
	case errors.Is(err, errTooLong):
		return errTooLong
	case errors.Is(err, context.DeadlineExceeded):
		return errors.New("it took too long")
	case errors.Is(err, context.Canceled):
		return errors.New("the bot is being stopped")
	case !errors.As(err, &refused):
		return errors.New("the connection to the worker broke")
	}
	switch refused.Status {
	case http.StatusOK:
		return errors.New("the worker broke off")
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return errors.New("the worker cannot take this chat; /new begins another")
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusPaymentRequired:
		return errors.New("the worker does not let this bot in")
	case http.StatusTooManyRequests:
		return errors.New("all workers are busy; try again in a minute")
	case http.StatusServiceUnavailable, http.StatusBadGateway:
		return errors.New("no verified worker answers now; your question was sent to no other")
	}
	return fmt.Errorf("the worker answered %d", refused.Status)
}

// Checks implements Backend.
func (b *Proxied) Checks(worker string) (string, error) {
	session := b.proxy.Session(worker)
	if session == nil {
		return "", errors.New("the worker is not known any more")
	}
	var text strings.Builder
	v := session.Verdict
	switch {
	case !v.OK:
		text.WriteString("✘ the worker that answered last would be refused now\n")
	case v.Confidential:
		text.WriteString("✔ nobody but the worker could read what it was asked, besides Telegram\n")
	default:
		text.WriteString("✘ not confidential: the worker's owner can read along. This is a development set-up\n")
	}
	for _, check := range v.Checks {
		text.WriteString(check.Status.Mark() + " " + terminal.Line(check.String()) + "\n")
	}
	return text.String(), nil
}

// tripper is a function that is an http.RoundTripper.
type tripper func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
