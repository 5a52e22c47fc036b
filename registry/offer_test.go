package registry

import (
	"errors"
	"strings"
	"testing"
	"time"

	"chrysalis/measure/record"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

func offer(p *Publisher) OfferDocument {
	image, model := Key{1}, Key{2}
	return OfferDocument{
		Version: OfferVersion, Endpoint: "worker.example:8443", Image: image[:], Payout: p.Wallet.Address.String(), Capacity: 8,
		Models: []OfferedModel{{"acme/model@1", model[:], 1000, 3000}},
	}
}

// TestOffers lists, finds and removes offers, and refuses one of which no publisher
// has the records.
func TestOffers(t *testing.T) {
	n := newNet(t, 2)
	p := n.publisher(1, "v5r1")
	// The keys are what counts here, so any record will do.
	p.Reader.Key = nil
	n.reader.Key = nil
	n.fund(p)
	n.do(p, Init())
	o := offer(p)
	publishers := []lite.Address{p.Registry}
	expiry := time.Now().Add(7 * 24 * time.Hour).Truncate(time.Second)
	if _, err := n.reader.Offers(t.Context(), n.view()); !errors.Is(err, lite.ErrNoAccount) {
		t.Errorf("no listing contract: %v", err)
	}
	for name, list := range map[string][]lite.Address{"no publisher": nil, "a publisher without them": publishers} {
		if _, err := p.Do(t.Context(), PutOffer(o, expiry, list, Policy{})); !errors.Is(err, ErrUnpublished) {
			t.Errorf("%s: %v", name, err)
		}
	}
	one, two := publication("image", ""), publication("model", "")
	one.Key = Key(o.Image)
	two.Key, two.Kind = (&record.Model{RootHash: o.Models[0].RootHash}).Key(), contract.Model
	n.do(p, Publish(one))
	n.do(p, Publish(two))
	if _, err := p.Do(t.Context(), PutOffer(o, expiry, publishers, Policy{Signatures: 1})); !errors.Is(err, ErrSignatures) {
		t.Errorf("a policy of one signature: %v", err)
	}
	engine := Need{"engine llama.cpp", Key{3}}
	if _, err := p.Do(t.Context(), PutOffer(o, expiry, publishers, Policy{}, engine)); !errors.Is(err, ErrUnpublished) || !strings.Contains(err.Error(), "engine llama.cpp") {
		t.Errorf("an engine that nobody has published: %v", err)
	}
	n.do(p, PutOffer(o, expiry, publishers, Policy{}))

	second := n.publisher(2, "v4r2")
	second.Reader.Key = nil
	n.fund(second)
	cheap := offer(second)
	cheap.Models[0].CompletionPrice = 1000
	n.do(second, PutOffer(cheap, expiry, publishers, Policy{}))
	offers, err := n.reader.Offers(t.Context(), n.view())
	if err != nil || len(offers) != 2 {
		t.Fatalf("%v, %v", offers, err)
	}
	for _, tt := range []struct {
		model string
		max   int64
		want  int
	}{
		{"", 0, 2}, {"acme/model", 0, 2}, {"acme/model@1", 0, 2}, {o.Models[0].RootHash.String(), 0, 2},
		{"acme/model@2", 0, 0}, {"acme", 0, 0}, {"", 1000, 1}, {"", 999, 0},
	} {
		got := Find(offers, tt.model, tt.max)
		if len(got) != tt.want || len(got) > 0 && got[0].Offer.Account != second.Wallet.Address {
			t.Errorf("%q, %d: %v", tt.model, tt.max, got)
		}
	}
	n.do(p, RemoveOffer())
	if offers, err := n.reader.Offers(t.Context(), n.view()); err != nil || len(offers) != 1 {
		t.Errorf("%v, %v", offers, err)
	}
}

func TestOfferRefuses(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v4r2")
	good := offer(p)
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*OfferDocument){
		"version":   func(o *OfferDocument) { o.Version = 2 },
		"endpoint":  func(o *OfferDocument) { o.Endpoint = "worker" },
		"port":      func(o *OfferDocument) { o.Endpoint = "worker:0" },
		"image":     func(o *OfferDocument) { o.Image = nil },
		"no models": func(o *OfferDocument) { o.Models = nil },
		"model":     func(o *OfferDocument) { o.Models[0].ID = "model" },
		"root hash": func(o *OfferDocument) { o.Models[0].RootHash = o.Models[0].RootHash[:31] },
		"price":     func(o *OfferDocument) { o.Models[0].PromptPrice = -1 },
		"payout":    func(o *OfferDocument) { o.Payout = "me" },
		"capacity":  func(o *OfferDocument) { o.Capacity = 0 },
		"long":      func(o *OfferDocument) { o.Endpoint = strings.Repeat("x", 300) + ":1" },
	} {
		o := offer(p)
		change(&o)
		if err := o.Validate(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, expiry := range []time.Duration{-time.Minute, 31 * 24 * time.Hour} {
		if _, err := p.Do(t.Context(), PutOffer(good, time.Now().Add(expiry), nil, Policy{})); err == nil || !strings.Contains(err.Error(), "days") {
			t.Errorf("%v: %v", expiry, err)
		}
	}
}
