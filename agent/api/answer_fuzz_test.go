package api

import (
	"testing"

	"chrysalis/pay"
)

// FuzzUsage reads what an engine says that it used, and FuzzNonce what a client asks
// evidence for.
func FuzzUsage(f *testing.F) {
	f.Add([]byte(`{"choices":[{"delta":{"content":"x","tool_calls":[1]}}],"usage":{"prompt_tokens":3,"completion_tokens":-4}}`), int64(0))
	f.Fuzz(func(t *testing.T, data []byte, asked int64) {
		c := tokenCounts{Bounds: pay.Bounds{Asked: asked, RequestBytes: 100}}
		c.read(data)
		prompt, completion := c.bounded()
		for _, n := range []*int64{prompt, completion} {
			if n != nil && *n < 0 {
				t.Errorf("%d tokens", *n)
			}
		}
		if prompt != nil && *prompt > 100+pay.TemplateTokens {
			t.Errorf("%d tokens of a prompt of 100 bytes", *prompt)
		}
	})
}

func FuzzNonce(f *testing.F) {
	f.Add("nonce=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	f.Fuzz(func(t *testing.T, query string) { parseNonce(query) })
}
