package api

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/pay"
)

func TestPadding(t *testing.T) {
	var p padding
	for _, c := range []struct {
		name string
		data int // bytes
		want int // of the padded event
	}{
		{"the smallest", 2, 512},
		{"the largest of the smallest slot", 512 - 8 - 3, 512},
		{"one byte more", 512 - 8 - 3 + 1, 768},
		{"a small one after it", 2, 768},
		{"the largest slot", 4096 - 8 - 3, 4096},
		{"a small one after that", 2, 4096},
		{"larger than every slot", 4096, 8192},
		{"a small one at the end", 2, 4096},
	} {
		data := []byte("{" + strings.Repeat(" ", c.data-2) + "}")
		out := p.event([]byte("before"), data)
		event, rest, _ := strings.Cut(strings.TrimPrefix(string(out), "before"), "\n\n")
		if len(out)-6 != c.want || event != "data: "+string(data) || unpadded([]byte(rest)) != "" {
			t.Errorf("%s: %d bytes, expected %d: %.40q … %.40q", c.name, len(out)-6, c.want, event, rest)
		}
	}
	for _, n := range []int{600, 700, 900} {
		out := p.receipt(nil, bytes.Repeat([]byte{'x'}, n), receiptSize)
		if len(out) != receiptSize || unpadded(out) != "" {
			t.Errorf("a receipt of %d bytes takes %d", n, len(out))
		}
	}
	for n, want := range map[int64]int{0: 0, 1: 1023, 1023: 1, 1024: 0, 1025: 1023} {
		if got := spaces(n); len(got) != want {
			t.Errorf("%d bytes get %d spaces, expected %d", n, len(got), want)
		}
	}
}

// An engine whose tokens have all sorts of lengths, in bursts.
func TestStreamTellsNoTokenLength(t *testing.T) {
	say := func(tokens []string) ([]int, string) {
		b := start(t, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			for i, token := range tokens {
				sayEvents(w, fmt.Sprintf("data: {\"choices\":[{\"delta\":{\"content\":%q}}]}\n\n", token))
				if i%3 == 2 {
					time.Sleep(30 * time.Millisecond)
				}
			}
			sayEvents(w, "data: [DONE]\n\n")
		}, nil, func(s *Server) { s.tick = 10 * time.Millisecond })
		resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", helloStream))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var sizes []int
		var all []byte
		for buf := make([]byte, 64<<10); ; {
			n, err := resp.Body.Read(buf)
			all = append(all, buf[:n]...)
			if n > 0 {
				sizes = append(sizes, n)
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		return sizes, unpadded(all)
	}
	short, text := say([]string{"a", "b", "c", "d", "e", "f"})
	if !strings.Contains(text, `"content":"f"`) {
		t.Errorf("got %q", text)
	}
	long, _ := say([]string{"antidisestablishmentarianism", strings.Repeat("w", 100), "c", "\n\n\n", "é", strings.Repeat("\"", 60)})
	total := func(list []int) (n int) {
		for _, v := range list {
			if v%block != 0 {
				t.Errorf("a piece of %d bytes", v)
			}
			n += v
		}
		return n
	}
	if total(short) != total(long) || total(short) != 7*minSlot+receiptSize {
		t.Errorf("short tokens came in %v, long ones in %v", short, long)
	}
}

// However fast an engine is, nothing goes out before the tick, and neither does
// the end.
func TestTick(t *testing.T) {
	const tick = 300 * time.Millisecond
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		sayEvents(w, "data: {}\n\n")
		time.Sleep(tick + tick/2) // the first event has gone with the first tick
		sayEvents(w, "data: {}\n\ndata: [DONE]\n\n")
	}, nil, func(s *Server) { s.tick = tick })
	begin := time.Now()
	resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", helloStream))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if took := time.Since(begin); took < tick {
		t.Errorf("the first event came after %v", took)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < 2*tick {
		t.Errorf("the stream ended after %v", took)
	}
}

func verified(t *testing.T, data string) *receipt.Receipt {
	t.Helper()
	r, err := receipt.Verify([]byte(data), testReceiptKey.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatalf("%v: %s", err, data)
	}
	return r
}

const usage = `"usage":{"prompt_tokens":12,"completion_tokens":2,"total_tokens":14}`

func TestReceipt(t *testing.T) {
	const said = `{"choices":[{"message":{"content":"Hello there"}}],` + usage + `}`
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if !strings.Contains(string(body), `"stream":true`) {
			sayJSON(w, 200, said)
			return
		}
		if !strings.Contains(string(body), `"stream_options":{"include_usage":true}`) {
			t.Errorf("the engine is not asked for the usage: %s", body)
		}
		sayEvents(w, `data: {"choices":[{"delta":{"content":"Hello"}}]}`+"\n\n"+
			`data: {"choices":[{"delta":{"content":" there"}}]}`+"\n\n"+
			`data: {"choices":[],`+usage+`}`+"\n\ndata: [DONE]\n\n")
	}, nil, nil)
	salt := [receipt.SaltSize]byte{1, 2, 3}
	for i, c := range []struct {
		name, body    string
		salted, usage bool
	}{
		{"an answer", hello, true, false},
		{"an answer without a salt", hello, false, false},
		{"a stream", helloStream, true, false},
		{"a stream with its usage", strings.Replace(helloStream, "{", `{"stream_options":{"include_usage":true},`, 1), true, true},
		{"a stream that does not want it", strings.Replace(helloStream, "{", `{"stream_options":{"include_usage":false},`, 1), false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			req := b.request(t, "POST", "/v1/chat/completions", c.body)
			if c.salted {
				req.Header.Set(receipt.SaltHeader, receipt.FormatSalt(salt))
				req.Header.Set(receipt.TimeHeader, "1700000000000")
			}
			resp, err := b.client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != 200 {
				t.Fatal(resp.Status, err)
			}
			salt := salt
			if made := resp.Header.Get(receipt.SaltHeader); (made == "") != c.salted {
				t.Errorf("the answer has the salt %q", made)
			} else if !c.salted {
				if salt, err = receipt.ParseSalt(made); err != nil {
					t.Fatal(err)
				}
			}
			signed, covered := resp.Trailer.Get(receipt.Trailer), body
			if stream := strings.Contains(c.body, `"stream":true`); stream {
				var comment []byte
				if covered, comment, err = receipt.SplitStream(body); err != nil {
					t.Fatal(err)
				}
				if string(comment) != signed {
					t.Errorf("the trailer has %s, the stream %s", signed, comment)
				}
				if strings.Contains(string(body), "usage") != c.usage {
					t.Errorf("the usage is not as asked for: %s", unpadded(body))
				}
				if len(body)%block != 0 {
					t.Errorf("%d bytes", len(body))
				}
			} else if len(body)%answerBlock != 0 || strings.TrimRight(string(body), " ") != said {
				t.Errorf("%d bytes", len(body))
			}
			if n := len(signed) + len(resp.Trailer.Get(paddingTrailer)); n != receiptSize+1 {
				t.Errorf("the trailers have %d bytes", n)
			}
			r := verified(t, signed)
			if err := r.CheckBodies(salt, []byte(c.body), covered); err != nil {
				t.Error(err)
			}
			manifest := [48]byte{1}
			if r.Sequence != int64(i+1) || r.Manifest != hex.EncodeToString(manifest[:]) || r.Model != "chrysalis/demo@1" ||
				r.RootHash != strings.Repeat("ab", 32) || *r.PromptTokens != 12 || *r.CompletionTokens != 2 ||
				time.Since(time.UnixMilli(r.UntrustedVM)).Abs() > time.Minute {
				t.Errorf("got %s", signed)
			}
			if c.salted != (r.ClientTime != nil) || c.salted && *r.ClientTime != 1700000000000 {
				t.Errorf("the client's time is %v", r.ClientTime)
			}
			if strings.Contains(signed, "ello") {
				t.Errorf("the receipt has content: %s", signed)
			}
		})
	}
}

// An engine's counts are believed as far as the sizes of request and answer allow.
func TestReceiptBounds(t *testing.T) {
	for _, c := range []struct {
		name, ask, say     string
		prompt, completion int64 // -1: absent
	}{
		{"too many", "", `{"choices":[{"message":{"content":"Hello"}}],"usage":{"prompt_tokens":1000000,"completion_tokens":1000000}}`,
			int64(len(hello)) + pay.TemplateTokens, 5 + pay.SilentTokens},
		{"more than asked for", `"max_tokens":3,`, `{"choices":[{"message":{"content":"Hello"}}],"usage":{"prompt_tokens":7,"completion_tokens":20}}`, 7, 3},
		{"negative", "", `{"choices":[],"usage":{"prompt_tokens":-1,"completion_tokens":-9}}`, 0, 0},
		{"all that has text", "", `{"choices":[{"text":"ab","message":{"reasoning_content":"cde","tool_calls":[{}]}}],"usage":{"completion_tokens":999}}`,
			-1, 2 + 3 + 4 + pay.SilentTokens},
		{"no usage", "", `{"choices":[]}`, -1, -1},
		{"no numbers", "", `{"usage":{"prompt_tokens":"7","completion_tokens":1e99}}`, -1, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				sayJSON(w, 200, c.say)
			}, nil, nil)
			resp, _ := b.post(t, "/v1/chat/completions", strings.Replace(hello, "{", "{"+c.ask, 1))
			r := verified(t, resp.Trailer.Get(receipt.Trailer))
			for _, n := range []struct {
				name string
				got  *int64
				want int64
			}{{"prompt", r.PromptTokens, c.prompt}, {"completion", r.CompletionTokens, c.completion}} {
				if (n.got == nil) != (n.want == -1) || n.got != nil && *n.got != n.want {
					t.Errorf("%s: got %v, expected %d: %s", n.name, n.got, n.want, resp.Trailer.Get(receipt.Trailer))
				}
			}
		})
	}
}

// There is no receipt for what did not end well, nor for what is not an answer.
func TestNoReceipt(t *testing.T) {
	b := start(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if strings.Contains(string(body), `"stream":true`) {
			sayEvents(w, "data: {}\n\n")
			panic(http.ErrAbortHandler)
		}
		sayJSON(w, 400, `{"error":{"message":"no"}}`)
	}, nil, nil)
	resp, err := b.client.Do(b.request(t, "POST", "/v1/chat/completions", helloStream))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil || strings.Contains(string(body), "receipt") || resp.Trailer.Get(receipt.Trailer) != "" {
		t.Errorf("%q, %v, %v", body, resp.Trailer, err)
	}
	resp, _ = b.post(t, "/v1/chat/completions", hello)
	if resp.ContentLength%answerBlock != 0 {
		t.Errorf("an error of %d bytes", resp.ContentLength)
	}
	if resp.StatusCode != 400 || len(resp.Trailer) > 0 || resp.Header.Get(receipt.SaltHeader) != "" {
		t.Errorf("%s %v %v", resp.Status, resp.Header, resp.Trailer)
	}
	if b.sequence.Load() != 0 {
		t.Error("a number is used up")
	}
}

func TestReceiptHeaders(t *testing.T) {
	b := start(t, answer, nil, nil)
	good := receipt.FormatSalt([receipt.SaltSize]byte{})
	for name, header := range map[string]http.Header{
		receipt.SaltHeader: {receipt.SaltHeader: {"abc"}},
		"two salts":        {receipt.SaltHeader: {good, good}},
		receipt.TimeHeader: {receipt.TimeHeader: {"now"}},
		"two times":        {receipt.TimeHeader: {"1", "2"}},
	} {
		req := b.request(t, "POST", "/v1/chat/completions", hello)
		for key, values := range header {
			req.Header[key] = slices.Clone(values)
		}
		resp, body := b.do(t, req)
		if param := wantError(t, resp, body, 400, "receipt_header"); param != receipt.SaltHeader && param != receipt.TimeHeader {
			t.Errorf("%s: the parameter %q", name, param)
		}
	}
}
