// Package openai is a small client of the OpenAI-compatible API: it lists models
// and streams a chat's answer. It takes nothing for granted of the server: all
// that it reads is bounded.
package openai

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Client talks to one endpoint.
type Client struct {
	Endpoint string       // https://HOST:PORT, without /v1
	HTTP     *http.Client // how to reach it; http.DefaultClient when nil
	Token    string       // sent as a bearer token, if there is one
	// Transcript, if there is one, is sent with its salt and takes down the next chat.
	Transcript *Transcript
}

// Transcript is what a receipt is about (package attest/receipt).
type Transcript struct {
	Salt     string // the value of the header field Chrysalis-Salt
	Request  []byte // the body as sent
	Response []byte // the body as received: the stream up to and with what ends it
}

// Message is one turn of a chat.
type Message struct {
	Role    string `json:"role"` // "system", "user" or "assistant"
	Content string `json:"content"`
}

// ChatRequest is the body of a chat completion. Fields that are nil are left to
// the server.
type ChatRequest struct {
	Model       string    `json:"model"`
	Messages    []Message `json:"messages"`
	MaxTokens   *int      `json:"max_tokens,omitempty"`
	Temperature *float64  `json:"temperature,omitempty"`
}

// Usage counts tokens, as the server says.
type Usage struct {
	PromptTokens     int64 `json:"prompt_tokens"`
	CompletionTokens int64 `json:"completion_tokens"`
}

// Result is what is known when an answer is complete.
type Result struct {
	FinishReason string `json:"finish_reason"` // "stop", "length"
	Usage        *Usage `json:"usage,omitempty"`
}

// Error is the server's refusal.
type Error struct {
	Status  int    // HTTP status; 200 when the stream broke off with an error
	Message string // the server's words, at most 2,000 bytes; clean it before printing
	Type    string
}

func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the server answered %d", e.Status)
	}
	if e.Status == http.StatusOK {
		return "the server broke off: " + e.Message
	}
	return fmt.Sprintf("the server answered %d: %s", e.Status, e.Message)
}

const (
	maxModels     = 1 << 20 // bytes of a list of models
	maxError      = 64 << 10
	maxErrorWords = 2000
	maxAnswer     = 64 << 20 // bytes of a whole stream, padding included
)

// Models lists the ids of the models that are served.
func (c *Client) Models(ctx context.Context) ([]string, error) {
	answer, err := c.do(ctx, http.MethodGet, "/v1/models", nil)
	if err != nil {
		return nil, fmt.Errorf("list the models: %w", err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxModels+1))
	if err != nil {
		return nil, fmt.Errorf("list the models: %w", err)
	}
	var list struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	if len(data) > maxModels || json.Unmarshal(data, &list) != nil {
		return nil, errors.New("list the models: the answer is not a list of models")
	}
	ids := make([]string, len(list.Data))
	for i, m := range list.Data {
		ids[i] = m.ID
	}
	return ids, nil
}

// ChatStream sends a chat and calls each with every piece of the answer as it
// comes. An error of each ends the stream and is returned.
func (c *Client) ChatStream(ctx context.Context, request ChatRequest, each func(piece string) error) (Result, error) {
	body, err := json.Marshal(struct {
		ChatRequest
		Stream  bool            `json:"stream"`
		Options map[string]bool `json:"stream_options"`
	}{request, true, map[string]bool{"include_usage": true}})
	if err != nil {
		return Result{}, fmt.Errorf("send the question: %w", err)
	}
	answer, err := c.do(ctx, http.MethodPost, "/v1/chat/completions", body)
	if err != nil {
		return Result{}, fmt.Errorf("ask: %w", err)
	}
	defer answer.Body.Close()
	var result Result
	var in io.Reader = io.LimitReader(answer.Body, maxAnswer)
	if t := c.Transcript; t != nil {
		t.Request = body
		var response bytes.Buffer
		in = io.TeeReader(in, &response)
		// What comes after the last event counts too: the receipt does.
		defer func() { io.Copy(io.Discard, in); t.Response = response.Bytes() }()
	}
	err = readSSE(in, func(data []byte) error {
		return result.take(data, each)
	})
	if err != nil {
		return result, fmt.Errorf("read the answer: %w", err)
	}
	return result, nil
}

func (r *Result) take(data []byte, each func(string) error) error {
	var chunk struct {
		Choices []struct {
			Delta struct {
				Content string `json:"content"`
			} `json:"delta"`
			FinishReason string `json:"finish_reason"`
		} `json:"choices"`
		Usage *Usage          `json:"usage"`
		Error json.RawMessage `json:"error"`
	}
	if err := json.Unmarshal(data, &chunk); err != nil {
		return errors.New("an event that is not JSON")
	}
	if len(chunk.Error) > 0 && string(chunk.Error) != "null" {
		return errorOf(http.StatusOK, data)
	}
	if chunk.Usage != nil {
		r.Usage = chunk.Usage
	}
	if len(chunk.Choices) == 0 {
		return nil
	}
	if reason := chunk.Choices[0].FinishReason; reason != "" {
		r.FinishReason = reason
	}
	if piece := chunk.Choices[0].Delta.Content; piece != "" {
		return each(piece)
	}
	return nil
}

// do sends a request and returns the answer when its status is 200.
func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.Endpoint, "/")+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if c.Transcript != nil {
		request.Header.Set("Chrysalis-Salt", c.Transcript.Salt)
	}
	if c.Token != "" {
		request.Header.Set("Authorization", "Bearer "+c.Token)
	}
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		defer answer.Body.Close()
		data, _ := io.ReadAll(io.LimitReader(answer.Body, maxError))
		return nil, errorOf(answer.StatusCode, data)
	}
	return answer, nil
}

// errorOf reads an error document, {"error":{"message":…,"type":…}}.
func errorOf(status int, data []byte) *Error {
	e := &Error{Status: status}
	var document struct {
		Error struct {
			Message string `json:"message"`
			Type    string `json:"type"`
		} `json:"error"`
	}
	if json.Unmarshal(data, &document) == nil {
		e.Message, e.Type = document.Error.Message, document.Error.Type
	}
	e.Message = strings.ToValidUTF8(e.Message[:min(len(e.Message), maxErrorWords)], "")
	return e
}
