package api

import (
	"crypto/rand"
	"encoding/hex"
	"hash"
	"net/http"
	"strconv"
	"strings"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/manifest"
	"chrysalis/pay"
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
	payment  *receipt.Payment
}

// tokenCounts keeps what the engine says about the number of tokens within what is
// possible (package pay).
type tokenCounts struct {
	pay.Bounds
	speaks     bool   // the answer has tokens
	prompt     *int64 // the engine's figures
	completion *int64
}

// read takes an answer, or an event of one, into account.
func (t *tokenCounts) read(data []byte) pay.Event {
	e := pay.ReadEvent(data)
	t.add(e)
	return e
}

func (t *tokenCounts) add(e pay.Event) {
	t.Bounds.Add(e)
	if e.Prompt != nil || e.Completion != nil || e.OnlyUsage {
		t.prompt, t.completion = e.Prompt, e.Completion
	}
}

// bounded returns the counts that go into a receipt.
func (t *tokenCounts) bounded() (prompt, completion *int64) {
	return within(t.prompt, t.MaxPrompt()), within(t.completion, t.MaxCompletion())
}

// usage returns the counts that are charged for, nil where the engine gave none.
func (t *tokenCounts) usage() *pay.Usage {
	switch {
	case t.prompt == nil:
		return nil
	case !t.speaks: // embeddings: the engine gives no other figure
		return &pay.Usage{Prompt: *t.prompt}
	case t.completion == nil:
		return nil
	}
	return &pay.Usage{Prompt: *t.prompt, Completion: *t.completion}
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
	p.counts = tokenCounts{Bounds: pay.Bounds{RequestBytes: int64(len(body))}, speaks: req.lengthField() >= 0}
	if raw := req.value("max_tokens"); raw != nil {
		p.counts.Asked, _ = strconv.ParseInt(string(raw), 10, 64) // the route has checked it
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
	r.Payment = p.payment
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

// setTrailer puts a receipt where it is sent when the exchange ends.
func (x *exchange) setTrailer(signed []byte) {
	x.w.Header().Set(receipt.Trailer, string(signed))
	x.w.Header().Set(paddingTrailer, strings.Repeat("-", 1+max(0, x.receiptSize()-len(signed))))
}
