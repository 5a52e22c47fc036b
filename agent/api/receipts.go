package api

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"hash"
	"net/http"
	"strconv"
	"strings"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/manifest"
)

// pending is a receipt in the making.
type pending struct {
	salt     [receipt.SaltSize]byte
	made     bool   // the salt is the agent's
	time     *int64 // the client's
	request  string
	response hash.Hash
	model    manifest.Model
	counts   tokenCounts
}

// tokenCounts keeps what the engine says about the number of tokens within what is
// possible: a token of a prompt takes at least a byte of the request or of the
// engine's own template, one of an answer at least a byte of text, but for a few
// that have none, such as the one that ends it.
type tokenCounts struct {
	requestBytes int64
	asked        int64 // max_tokens; 0 where the client set none
	textBytes    int64 // of the answer
	prompt       *int64
	completion   *int64
}

// What a template adds to a prompt, in tokens, and tokens without text in an answer.
const (
	templateTokens = 1024
	silentTokens   = 64
)

// spoken is what of an answer, or of an event of one, counts.
type spoken struct {
	Choices []struct {
		Text    string
		Delta   said
		Message said
	}
	Usage *struct {
		Prompt     *int64 `json:"prompt_tokens"`
		Completion *int64 `json:"completion_tokens"`
	}
}

type said struct {
	Content   string
	Reasoning string          `json:"reasoning_content"`
	ToolCalls json.RawMessage `json:"tool_calls"`
}

// read takes an answer, or an event of one, into account. It reports whether it
// has nothing but the usage in it.
func (t *tokenCounts) read(data []byte) (onlyUsage bool) {
	var s spoken
	if json.Unmarshal(data, &s) != nil {
		s.Usage = nil // which may be half read
	}
	for _, c := range s.Choices {
		t.textBytes += int64(len(c.Text))
		for _, m := range []said{c.Delta, c.Message} {
			t.textBytes += int64(len(m.Content) + len(m.Reasoning) + len(m.ToolCalls))
		}
	}
	if s.Usage != nil {
		t.prompt, t.completion = s.Usage.Prompt, s.Usage.Completion
	}
	return s.Usage != nil && len(s.Choices) == 0
}

// bounded returns the counts that go into a receipt.
func (t *tokenCounts) bounded() (prompt, completion *int64) {
	most := t.textBytes + silentTokens
	if t.asked > 0 {
		most = min(most, t.asked)
	}
	return within(t.prompt, t.requestBytes+templateTokens), within(t.completion, most)
}

func within(n *int64, most int64) *int64 {
	if n == nil {
		return nil
	}
	v := min(max(*n, 0), most)
	return &v
}

// openReceipt reads what a client says about its receipt.
func openReceipt(h http.Header) (*pending, *apiError) {
	p := &pending{}
	if values := h[receipt.TimeHeader]; len(values) > 0 {
		ms, err := receipt.ParseTime(values[0])
		if err != nil || len(values) > 1 {
			return nil, badRequest("receipt_header", receipt.TimeHeader, "the header must be milliseconds since 1970 in decimal")
		}
		p.time = &ms
	}
	values := h[receipt.SaltHeader]
	if len(values) == 0 {
		p.made = true
		rand.Read(p.salt[:])
		return p, nil
	}
	var err error
	if p.salt, err = receipt.ParseSalt(values[0]); err != nil || len(values) > 1 {
		return nil, badRequest("receipt_header", receipt.SaltHeader, "the header must be 32 bytes in base64url without padding")
	}
	return p, nil
}

// about notes what a receipt is about.
func (p *pending) about(body []byte, req *request, model manifest.Model) {
	h := receipt.NewHash(p.salt)
	h.Write(body)
	p.request, p.response, p.model = hex.EncodeToString(h.Sum(nil)), receipt.NewHash(p.salt), model
	p.counts = tokenCounts{requestBytes: int64(len(body))}
	if raw := req.value("max_tokens"); raw != nil {
		p.counts.asked, _ = strconv.ParseInt(string(raw), 10, 64) // the route has checked it
	}
}

// sign returns the receipt of an answer whose body is complete.
func (s *Server) sign(p *pending) ([]byte, error) {
	r := &receipt.Receipt{
		Version: receipt.Version, Sequence: s.sequence.Add(1), Manifest: s.manifest,
		Model: p.model.ID(), RootHash: p.model.Disk.RootHash,
		Request: p.request, Response: hex.EncodeToString(p.response.Sum(nil)),
		ClientTime: p.time, UntrustedVM: max(0, time.Now().UnixMilli()),
	}
	r.PromptTokens, r.CompletionTokens = p.counts.bounded()
	return r.Sign(s.receiptKey)
}

// paddingTrailer makes all trailers of one size: a receipt's own depends on how
// many digits its numbers have.
const paddingTrailer = "Chrysalis-Padding"

// startReceipt announces a receipt, before the answer's header goes out.
func (x *exchange) startReceipt() {
	h := x.w.Header()
	if x.receipt.made {
		h.Set(receipt.SaltHeader, receipt.FormatSalt(x.receipt.salt))
	}
	h["Trailer"] = []string{receipt.Trailer, paddingTrailer}
}

// setTrailer puts a receipt where net/http sends it when the exchange ends.
func (x *exchange) setTrailer(signed []byte) {
	x.w.Header().Set(receipt.Trailer, string(signed))
	x.w.Header().Set(paddingTrailer, strings.Repeat("-", 1+max(0, receiptSize-len(signed))))
}
