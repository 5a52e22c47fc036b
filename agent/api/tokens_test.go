package api

import (
	"context"
	"strings"
	"testing"

	"chrysalis/attest/evidence"
	"chrysalis/manifest"
)

func TestTokens(t *testing.T) {
	const one, two = "sk-one-0123456789abcdef0123456789abcdef", "sk-two-0123456789abcdef0123456789abcdef"
	b := start(t, answer, func(c *Config) {
		c.Tokens = []string{manifest.TokenHash(one), manifest.TokenHash(two)}
		c.Evidence = func(context.Context, [evidence.NonceSize]byte) ([]byte, error) { return []byte("{}"), nil }
	}, nil)
	for _, c := range []struct {
		name   string
		header []string
		ok     bool
	}{
		{"the first", []string{"Bearer " + one}, true},
		{"the second", []string{"Bearer " + two}, true},
		{"another case of the scheme", []string{"bearer " + two}, true},
		{"none", nil, false},
		{"an empty header", []string{""}, false},
		{"an empty token", []string{"Bearer "}, false},
		{"no scheme", []string{one}, false},
		{"another scheme", []string{"Basic " + one}, false},
		{"two headers", []string{"Bearer " + one, "Bearer " + one}, false},
		{"two spaces", []string{"Bearer  " + one}, false},
		{"cut short", []string{"Bearer " + one[:len(one)-1]}, false},
		{"one more character", []string{"Bearer " + one + "0"}, false},
		{"its hash", []string{"Bearer " + manifest.TokenHash(one)}, false},
	} {
		for _, path := range []string{"/v1/models", "/v1/chat/completions"} {
			method, body := "GET", ""
			if path != "/v1/models" {
				method, body = "POST", hello
			}
			req := b.request(t, method, path, body)
			req.Header["Authorization"] = c.header
			resp, text := b.do(t, req)
			if c.ok {
				if resp.StatusCode != 200 {
					t.Errorf("%s, %s: %s %s", c.name, path, resp.Status, text)
				}
				continue
			}
			wantError(t, resp, text, 401, "invalid_api_key")
			if resp.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s, %s: %v", c.name, path, resp.Header)
			}
		}
	}
	if resp, _ := b.do(t, b.request(t, "GET", evidence.Path+"?nonce="+strings.Repeat("A", 43), "")); resp.StatusCode != 200 {
		t.Errorf("evidence wants a token: %s", resp.Status)
	}
	if n := b.counters.Requests.Load(); n != 3 {
		t.Errorf("%d requests came to the engine, expected 3", n)
	}
}

// A body that nobody may send is not read.
func TestTokenBeforeBody(t *testing.T) {
	b := start(t, answer, func(c *Config) { c.Tokens = []string{manifest.TokenHash("x")} }, nil)
	req := b.request(t, "POST", "/v1/chat/completions", strings.Repeat("x", 1<<20))
	resp, text := b.do(t, req)
	wantError(t, resp, text, 401, "invalid_api_key")
}
