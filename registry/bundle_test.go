package registry

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// TestBundle reads records without a connection, and from no bundle that was
// changed.
func TestBundle(t *testing.T) {
	n := newNet(t, 1)
	p := n.publisher(1, "v4r2")
	n.fund(p)
	n.do(p, Init())
	one, two := publication("one", ""), publication("two", strings.Repeat("x", 500))
	n.do(p, Publish(one))
	n.do(p, Publish(two))
	auditor := ed25519.NewKeyFromSeed(make([]byte, 32))
	n.do(p, Cosign(two.Key, sha256.Sum256(two.Record), auditor))
	for range 17 { // key blocks, more than one answer has links
		if err := n.chain.Rotate(); err != nil {
			t.Fatal(err)
		}
	}
	bundle, err := n.reader.Bundle(t.Context(), n.network.KeyBlock, p.Registry, one.Key, two.Key)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(bundle)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes, %d parts of the chain", len(data), len(bundle.Chain))
	open := func(data []byte, network lite.Network, now time.Time) ([]*Record, error) {
		b, err := ParseBundle(data)
		if err != nil {
			return nil, err
		}
		return b.Open(network, testKey, time.Hour, now)
	}
	records, err := open(data, n.network, time.Now())
	if err != nil || len(records) != 2 || !bytes.Equal(records[1].Bytes, two.Record) ||
		len(records[1].Auditors) != 1 || records[1].Auditors[0] != Key(auditor.Public().(ed25519.PublicKey)) {
		t.Fatalf("%v, %v", records, err)
	}

	other := n.network
	other.GlobalID = -3
	if _, err := open(data, other, time.Now()); err == nil {
		t.Error("another network")
	}
	other = n.network
	other.KeyBlock.RootHash[0] ^= 1
	if _, err := open(data, other, time.Now()); err == nil {
		t.Error("another key block")
	}
	if _, err := open(data, n.network, time.Now().Add(2*time.Hour)); !errors.Is(err, lite.ErrStale) {
		t.Errorf("old: %v", err)
	}
	for name, change := range map[string]func(*Bundle){
		"version":         func(b *Bundle) { b.Version = 2 },
		"no chain":        func(b *Bundle) { b.Chain = nil },
		"chain cut":       func(b *Bundle) { b.Chain = b.Chain[:1] },
		"chain doubled":   func(b *Bundle) { b.Chain = append(b.Chain, b.Chain[1]) },
		"other head":      func(b *Bundle) { b.Head.RootHash[0] ^= 1 },
		"other number":    func(b *Bundle) { b.Head.SeqNo++ },
		"other registry":  func(b *Bundle) { b.Registry.ID[0] ^= 1 },
		"other key":       func(b *Bundle) { b.Records[0].Key[0] ^= 1 },
		"other's proof":   func(b *Bundle) { b.Records[0].Record = b.Records[1].Record },
		"no signatures":   func(b *Bundle) { b.Records[1].Signatures = nil },
		"twice":           func(b *Bundle) { b.Records[1] = b.Records[0] },
		"signatures only": func(b *Bundle) { b.Records[1].Record = b.Records[1].Signatures },
	} {
		var b Bundle
		if err := json.Unmarshal(data, &b); err != nil {
			t.Fatal(err)
		}
		change(&b)
		changed, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := open(changed, n.network, time.Now()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// One bit anywhere in what liteservers answered.
	for part := range bundle.Chain {
		flipBits(t, bundle.Chain[part], func() error {
			_, err := bundle.Open(n.network, testKey, time.Hour, time.Now())
			return err
		})
	}
	flipBits(t, bundle.Records[1].Record, func() error {
		_, err := bundle.Open(n.network, testKey, time.Hour, time.Now())
		return err
	})
	for _, text := range []string{"", "{", "[]", `{"version":1,"x":1}`, string(data) + "{}"} {
		if _, err := ParseBundle([]byte(text)); err == nil {
			t.Errorf("%.20q: no error", text)
		}
	}
}

// flipBits flips bits all over some bytes. Where that goes unnoticed the bits were
// not part of what is proved: flags, the head's own claims.
func flipBits(t *testing.T, b []byte, open func() error) {
	t.Helper()
	unnoticed := 0
	const flips = 60
	for i := range flips {
		at := i * len(b) / flips
		b[at] ^= 1 << (i % 8)
		if open() == nil {
			unnoticed++
		}
		b[at] ^= 1 << (i % 8)
	}
	if unnoticed > flips/10 {
		t.Errorf("%d of %d flipped bits went unnoticed", unnoticed, flips)
	}
}

// TestWatch sees a revocation.
func TestWatch(t *testing.T) {
	n := newNet(t, 2)
	p := n.publisher(1, "v4r2")
	n.fund(p)
	n.do(p, Init())
	one := publication("one", "")
	n.do(p, Publish(one))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stop := errors.New("seen")
	err := n.reader.Watch(ctx, p.Registry, 10*time.Millisecond, func(c Change) error {
		switch {
		case c.Before == nil:
			n.do(p, Mark(one.Key, contract.Revoked))
		case c.After.ContractStatus() == contract.Revoked:
			return stop
		}
		return nil
	}, func(err error) error { return err })
	if !errors.Is(err, stop) {
		t.Error(err)
	}
}
