package receipt

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"chrysalis/pay"
)

var testKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

func public() ed25519.PublicKey { return testKey.Public().(ed25519.PublicKey) }

func count(n int64) *int64 { return &n }

func sample() *Receipt {
	return &Receipt{
		Version: Version, Sequence: 3, Manifest: strings.Repeat("ab", 48), Model: "acme/model@1", RootHash: strings.Repeat("cd", 32),
		Request: strings.Repeat("01", 32), Response: strings.Repeat("02", 32),
		PromptTokens: count(10), CompletionTokens: count(0), ClientTime: count(1700000000000), UntrustedVM: 5,
	}
}

// The encoding and the signature by hand: RFC 8785 and RFC 8032. Both are
// deterministic.
func TestEncoding(t *testing.T) {
	const fields = `"client_time":1700000000000,"completion_tokens":0,"manifest":"MANIFEST","model":"acme/model@1","prompt_tokens":10,` +
		`"request":"REQUEST","response":"RESPONSE","root_hash":"ROOT","sequence":3`
	fill := strings.NewReplacer("MANIFEST", strings.Repeat("ab", 48), "REQUEST", strings.Repeat("01", 32),
		"RESPONSE", strings.Repeat("02", 32), "ROOT", strings.Repeat("cd", 32))
	signed := fill.Replace(`{` + fields + `,"version":1,"vm_time_untrusted":5}`)
	signature := ed25519.Sign(testKey, []byte("chrysalis/receipt/v1"+signed))
	text := hexToURL(t, hex.EncodeToString(signature))
	want := fill.Replace(`{` + fields + `,"signature":"` + text + `","version":1,"vm_time_untrusted":5}`)
	got, err := sample().Sign(testKey)
	if err != nil || string(got) != want {
		t.Errorf("got\n%s\nexpected\n%s\n%v", got, want, err)
	}
	if len(got) > MaxSize {
		t.Errorf("%d bytes", len(got))
	}
}

func hexToURL(t *testing.T, text string) string {
	t.Helper()
	raw, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	var out strings.Builder
	for i := 0; i < len(raw)*8; i += 6 {
		v := 0
		for bit := i; bit < i+6; bit++ {
			v <<= 1
			if bit < len(raw)*8 {
				v |= int(raw[bit/8]>>(7-bit%8)) & 1
			}
		}
		out.WriteByte(alphabet[v])
	}
	return out.String()
}

func TestVerify(t *testing.T) {
	good, err := sample().Sign(testKey)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Verify(good, public())
	if err != nil {
		t.Fatal(err)
	}
	again, err := r.Sign(testKey)
	if err != nil || !bytes.Equal(again, good) {
		t.Errorf("it comes back as %s, %v", again, err)
	}
	// No change of a single bit passes.
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			if _, err := Verify(bad, public()); err == nil {
				t.Fatalf("bit %d of byte %d changed, and it passes: %s", bit, i, bad)
			}
		}
	}
	other := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	if _, err := Verify(good, other); !errors.Is(err, ErrSignature) {
		t.Errorf("another key: %v", err)
	}
	if _, err := Verify(good, nil); err == nil {
		t.Error("no key")
	}
	for name, bad := range map[string]string{
		"nothing":       "",
		"too long":      strings.Repeat(" ", MaxSize+1),
		"space":         " " + string(good),
		"a line's end":  string(good) + "\n",
		"unknown field": strings.Replace(string(good), `"manifest"`, `"answer":"42","manifest"`, 1),
		"a field twice": strings.Replace(string(good), `"sequence":3`, `"sequence":3,"sequence":3`, 1),
		"no signature":  string(good[:bytes.Index(good, []byte(`,"signature"`))]) + `,"version":1,"vm_time_untrusted":5}`,
	} {
		if _, err := Verify([]byte(bad), public()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// A signature over the same text for another purpose is not one over a receipt.
	message, err := sample().message()
	if err != nil || !bytes.HasPrefix(message, []byte("chrysalis/receipt/v1{")) {
		t.Errorf("what is signed begins with %.30q, %v", message, err)
	}
}

func TestValidate(t *testing.T) {
	for name, change := range map[string]func(*Receipt){
		"version":              func(r *Receipt) { r.Version = 2 },
		"sequence 0":           func(r *Receipt) { r.Sequence = 0 },
		"a manifest's SHA-256": func(r *Receipt) { r.Manifest = strings.Repeat("ab", 32) },
		"no model":             func(r *Receipt) { r.Model = "" },
		"a model with text":    func(r *Receipt) { r.Model = "what did you@ask" },
		"upper case":           func(r *Receipt) { r.Request = strings.Repeat("AB", 32) },
		"no response":          func(r *Receipt) { r.Response = "" },
		"a negative count":     func(r *Receipt) { r.PromptTokens = count(-1) },
		"a count beyond JSON":  func(r *Receipt) { r.CompletionTokens = count(1 << 53) },
		"a negative time":      func(r *Receipt) { r.ClientTime = count(-1) },
	} {
		r := sample()
		change(r)
		if _, err := r.Sign(testKey); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	r := sample()
	r.PromptTokens, r.CompletionTokens, r.ClientTime = nil, nil, nil
	data, err := r.Sign(testKey)
	if err != nil || strings.Contains(string(data), "tokens") {
		t.Errorf("without counts: %s, %v", data, err)
	}
	if _, err := Verify(data, public()); err != nil {
		t.Error(err)
	}
}

// paid is sample with a price.
func paid() *Receipt {
	r := sample()
	r.Payment = &Payment{
		Channel: "0:" + strings.Repeat("ef", 32), PromptPrice: 1_000_000, CompletionPrice: 3_000_000,
		PromptTokens: 10, CompletionTokens: 4, Charged: "22", Used: "100", Cover: "1000000",
	}
	return r
}

func TestPayment(t *testing.T) {
	data, err := paid().Sign(testKey)
	want := `"payment":{"channel":"0:` + strings.Repeat("ef", 32) + `","charged":"22","completion_price":3000000,"completion_tokens":4,` +
		`"cover":"1000000","prompt_price":1000000,"prompt_tokens":10,"used":"100"},`
	if err != nil || !strings.Contains(string(data), want) {
		t.Errorf("%s, %v", data, err)
	}
	r, err := Verify(data, public())
	if err != nil || *r.Payment != *paid().Payment {
		t.Errorf("%+v, %v", r, err)
	}
	// No change of a figure passes, even one that fits the others.
	for old, new := range map[string]string{`"charged":"22"`: `"charged":"23"`, `"used":"100"`: `"used":"101"`, `"completion_tokens":4,"cover"`: `"completion_tokens":5,"cover"`} {
		if _, err := Verify([]byte(strings.Replace(string(data), old, new, 1)), public()); err == nil {
			t.Errorf("%s passes", new)
		}
	}
	for name, change := range map[string]func(*Payment){
		"no channel":               func(p *Payment) { p.Channel = "" },
		"another workchain":        func(p *Payment) { p.Channel = "-1" + p.Channel[1:] },
		"a price below 0":          func(p *Payment) { p.PromptPrice = -1 },
		"a price beyond all":       func(p *Payment) { p.CompletionPrice = pay.MaxPrice + 1 },
		"tokens below 0":           func(p *Payment) { p.PromptTokens = -1 },
		"tokens beyond JSON":       func(p *Payment) { p.CompletionTokens, p.CompletionPrice = 1<<53, 0 },
		"less than the price":      func(p *Payment) { p.Charged = "21" },
		"more than the price":      func(p *Payment) { p.Charged = "23" },
		"an amount with a sign":    func(p *Payment) { p.Charged = "+22" },
		"an amount with a zero":    func(p *Payment) { p.Used = "0100" },
		"no amount":                func(p *Payment) { p.Cover = "" },
		"used less than charged":   func(p *Payment) { p.Used = "21" },
		"an amount that overflows": func(p *Payment) { p.Cover = "18446744073709551616" },
	} {
		r := paid()
		change(r.Payment)
		if _, err := r.Sign(testKey); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	// The largest there can be.
	long := strings.Repeat("x", 64)
	r = paid()
	r.Model, r.Sequence, r.UntrustedVM = long+"/"+long+"@"+long, maxInteger, maxInteger
	r.PromptTokens, r.CompletionTokens, r.ClientTime = count(maxInteger), count(maxInteger), count(maxInteger)
	r.Payment = &Payment{r.Payment.Channel, pay.MaxPrice, pay.MaxPrice, 9_000_000_000, 9_000_000_000, "18000000000000000000", "18446744073709551615", "18446744073709551615"}
	if data, err = r.Sign(testKey); err != nil || len(data) > 1300 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	t.Logf("%d bytes", len(data))
}

func TestBodies(t *testing.T) {
	salt := [SaltSize]byte{1, 2, 3}
	request, response := []byte(`{"a":1}`), []byte("data: {}\n\ndata: [DONE]\n\n")
	r := sample()
	for into, body := range map[*string][]byte{&r.Request: request, &r.Response: response} {
		h := NewHash(salt)
		h.Write(body)
		*into = hex.EncodeToString(h.Sum(nil))
	}
	if err := r.CheckBodies(salt, request, response); err != nil {
		t.Error(err)
	}
	if err := r.CheckBodies(salt, response, request); err == nil || !strings.Contains(err.Error(), "request") {
		t.Errorf("swapped: %v", err)
	}
	if err := r.CheckBodies(salt, request, request); err == nil || !strings.Contains(err.Error(), "response") {
		t.Errorf("another response: %v", err)
	}
	if err := r.CheckBodies([SaltSize]byte{}, request, response); err == nil {
		t.Error("another salt passes")
	}
	manifest := []byte("{}")
	sum := sha512.Sum384(manifest)
	r.Manifest = hex.EncodeToString(sum[:])
	if r.CheckManifest(manifest) != nil || r.CheckManifest([]byte("{ }")) == nil {
		t.Error("the manifest is compared wrongly")
	}
}

func TestSplitStream(t *testing.T) {
	const events = ": pad\ndata: {\"a\":\"\\n: chrysalis-receipt x\"}\n\ndata: [DONE]\n\n"
	for _, c := range []struct {
		name, body, receipt string // no receipt is an error
	}{
		{"a receipt", events + CommentPrefix + "{}\n\n", "{}"},
		{"with padding", events + CommentPrefix + "{}\n:   \n\n", "{}"},
		{"at the end", events + CommentPrefix + "{}", "{}"},
		{"none", events, ""},
		{"two", events + CommentPrefix + "{}\n" + CommentPrefix + "{}\n\n", ""},
		{"events after it", events + CommentPrefix + "{}\n\n" + events, ""},
		{"nothing", "", ""},
	} {
		covered, receipt, err := SplitStream([]byte(c.body))
		if (err == nil) != (c.receipt != "") || string(receipt) != c.receipt || err == nil && string(covered) != events {
			t.Errorf("%s: %q, %q, %v", c.name, covered, receipt, err)
		}
	}
}

func TestHeaders(t *testing.T) {
	salt := [SaltSize]byte{0xff, 31: 0xfe}
	if got, err := ParseSalt(FormatSalt(salt)); err != nil || got != salt {
		t.Errorf("%x, %v", got, err)
	}
	for _, bad := range []string{"", "A", strings.Repeat("A", 42), strings.Repeat("A", 44), strings.Repeat("A", 42) + "B", strings.Repeat("A", 42) + "+"} {
		if _, err := ParseSalt(bad); err == nil {
			t.Errorf("the salt %q passes", bad)
		}
	}
	for text, ok := range map[string]bool{"0": true, "1700000000000": true, "": false, "-1": false, "+1": false, "01": false, "1.5": false, "9007199254740992": false, "now": false} {
		if _, err := ParseTime(text); (err == nil) != ok {
			t.Errorf("the time %q: %v", text, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	good, err := sample().Sign(testKey)
	if err != nil {
		f.Fatal(err)
	}
	too, err := paid().Sign(testKey)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(too)
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := Verify(data, public()); err == nil && !bytes.Equal(data, good) && !bytes.Equal(data, too) {
			t.Errorf("another receipt passes: %+v", r)
		}
	})
}
