package openai

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func collect(in string) (events []string, err error) {
	err = readSSE(strings.NewReader(in), func(data []byte) error {
		events = append(events, string(data))
		return nil
	})
	return events, err
}

func TestReadSSE(t *testing.T) {
	for _, tt := range []struct {
		name, in, want string
		fails          bool
	}{
		{"two events", "data: a\n\ndata: b\n\ndata: [DONE]\n\n", "a|b", false},
		{"CRLF", "data: a\r\n\r\ndata: [DONE]\r\n\r\n", "a", false},
		{"no space", "data:a\n\ndata:[DONE]\n\n", "a", false},
		{"two lines", "data: a\ndata: b\n\ndata: [DONE]\n\n", "a\nb", false},
		{"comments and other fields", ": padding\nevent: x\nid: 7\ndata: a\n: more\n\n\n\ndata: [DONE]\n\n", "a", false},
		{"nothing after DONE counts", "data: [DONE]\n\ndata: a\n\n", "", false},
		{"an empty event", "data:\n\ndata: [DONE]\n\n", "", false},
		{"ends too early", "data: a\n\n", "a", true},
		{"ends in an event", "data: a\n\ndata: [DONE]", "a", true},
		{"empty", "", "", true},
		{"a long line", "data: " + strings.Repeat("x", maxEvent) + "\n\ndata: [DONE]\n\n", "", true},
		{"many lines", strings.Repeat("data: "+strings.Repeat("x", 1000)+"\n", maxEvent/1000) + "\ndata: [DONE]\n\n", "", true},
		{"endless comments in an event", strings.Repeat(": x\n", maxEvent), "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			events, err := collect(tt.in)
			if got := strings.Join(events, "|"); got != tt.want || (err != nil) != tt.fails {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func FuzzReadSSE(f *testing.F) {
	f.Add("data: a\n\ndata: [DONE]\n\n")
	f.Add(": c\r\ndata: {\"x\":1}\r\n\r\n")
	f.Fuzz(func(t *testing.T, in string) {
		total := 0
		readSSE(strings.NewReader(in), func(data []byte) error { total += len(data); return nil })
		if total > len(in) {
			t.Errorf("%d bytes of data out of %d", total, len(in))
		}
		// Whatever the server sends, taking it must not fail badly.
		var r Result
		readSSE(strings.NewReader(in), func(data []byte) error { return r.take(data, func(string) error { return nil }) })
	})
}

func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return &Client{Endpoint: s.URL + "/"}
}

func TestChatStream(t *testing.T) {
	seven, zero := 7, 0.0
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		want := `{"model":"m","messages":[{"role":"user","content":"q"}],"max_tokens":7,"temperature":0,"stream":true,"stream_options":{"include_usage":true}}`
		if r.URL.Path != "/v1/chat/completions" || string(body) != want {
			t.Errorf("%s %s", r.URL.Path, body)
		}
		for _, piece := range []string{"Hel", "lo"} {
			data, _ := json.Marshal(map[string]any{"choices": []any{map[string]any{"delta": map[string]string{"content": piece}}}})
			fmt.Fprintf(w, ": pad\ndata: %s\n\n", data)
		}
		io.WriteString(w, `data: {"choices":[{"delta":{},"finish_reason":"stop"}]}`+"\n\n")
		io.WriteString(w, `data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}`+"\n\ndata: [DONE]\n\n")
	})
	var got strings.Builder
	result, err := c.ChatStream(t.Context(), ChatRequest{Model: "m", Messages: []Message{{"user", "q"}}, MaxTokens: &seven, Temperature: &zero},
		func(piece string) error { got.WriteString(piece); return nil })
	if err != nil || got.String() != "Hello" || result.FinishReason != "stop" || result.Usage == nil || result.Usage.CompletionTokens != 2 {
		t.Errorf("%q, %+v, %v", got.String(), result, err)
	}
}

func TestErrors(t *testing.T) {
	ask := func(c *Client) error {
		_, err := c.ChatStream(context.Background(), ChatRequest{Model: "m"}, func(string) error { return nil })
		return err
	}
	for _, tt := range []struct {
		name    string
		h       http.HandlerFunc
		status  int
		message string
	}{
		{"a refusal", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(429)
			io.WriteString(w, `{"error":{"message":"busy","type":"rate_limit"}}`)
		}, 429, "busy"},
		{"a refusal without words", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, 503, ""},
		{"a refusal that goes on and on", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(400)
			io.WriteString(w, `{"error":{"message":"`+strings.Repeat("x", 1<<20)+`"}}`)
		}, 400, ""},
		{"breaks off", func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `data: {"error":{"message":"engine died"}}`+"\n\n")
		}, 200, "engine died"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var e *Error
			if err := ask(serve(t, tt.h)); !errors.As(err, &e) || e.Status != tt.status || e.Message != tt.message {
				t.Errorf("%v", err)
			}
		})
	}
	if err := ask(serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "data: {\n\n") })); err == nil {
		t.Error("an event that is not JSON")
	}
}

func TestModels(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"object":"list","data":[{"id":"a/b"},{"id":"c/d"}]}`)
	})
	if ids, err := c.Models(t.Context()); err != nil || strings.Join(ids, " ") != "a/b c/d" {
		t.Errorf("%v, %v", ids, err)
	}
	c = serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, strings.Repeat(" ", maxModels+1)) })
	if _, err := c.Models(t.Context()); err == nil {
		t.Error("a list without an end")
	}
}
