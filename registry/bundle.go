package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// MaxBundle bounds a bundle in bytes. A bundle that is proved from a key block of the
// mainnet that is a year old has about 60 MB.
const MaxBundle = 128 << 20

// A Bundle carries records with everything that proves them, for a reader without a
// connection: the validators' signatures since a key block that the reader trusts,
// and the proofs of the registry's state. Nothing in it is believed.
type Bundle struct {
	Version  int          `json:"version"`
	GlobalID int32        `json:"global_id"`
	KeyBlock lite.BlockID `json:"key_block"`
	Head     lite.BlockID `json:"head"`
	Registry lite.Address `json:"registry"`
	Chain    [][]byte     `json:"chain"` // liteservers' answers, in TL
	Records  []Bundled    `json:"records"`
}

// Bundled is what proves one record.
type Bundled struct {
	Key        Key    `json:"key"`
	Record     []byte `json:"record"` // a liteserver's answer, in TL
	Signatures []byte `json:"signatures,omitempty"`
}

const bundleVersion = 1

// Bundle makes a bundle of records, proved from a key block.
func (r *Reader) Bundle(ctx context.Context, from lite.BlockID, registry lite.Address, keys ...Key) (*Bundle, error) {
	view, err := r.Client.ProveFrom(ctx, from)
	if err != nil {
		return nil, err
	}
	globalID := r.Client.Network().GlobalID
	b := &Bundle{
		Version: bundleVersion, GlobalID: globalID, KeyBlock: from, Head: view.Head.Block, Registry: registry,
		Chain: view.Chain(), Records: []Bundled{},
	}
	for _, key := range keys {
		item := Bundled{Key: key}
		account, answer, err := view.MethodAnswer(ctx, registry, codeHash, "record", number(key))
		if err != nil {
			return nil, notRegistry(err)
		}
		item.Record = answer
		var signed *lite.Account
		if e, _, err := contract.Registry(account.Data).Record(key); err == nil && e.Signatures > 0 {
			if signed, item.Signatures, err = view.MethodAnswer(ctx, registry, codeHash, "signatures", number(key)); err != nil {
				return nil, notRegistry(err)
			}
		}
		if _, err := readRecord(account, signed, key, globalID, r.Key); err != nil {
			return nil, fmt.Errorf("%w: %v", err, key)
		}
		b.Records = append(b.Records, item)
	}
	return b, nil
}

// ParseBundle reads a bundle; it verifies nothing.
func ParseBundle(data []byte) (*Bundle, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("a bundle of %d bytes; at most %d are read", len(data), MaxBundle)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var b Bundle
	if err := d.Decode(&b); err != nil {
		return nil, fmt.Errorf("the bundle: %w", err)
	}
	if d.More() {
		return nil, errors.New("the bundle: something follows it")
	}
	if b.Version != bundleVersion {
		return nil, fmt.Errorf("the bundle is of version %d; this program reads version %d", b.Version, bundleVersion)
	}
	return &b, nil
}

// Open verifies a bundle against the key block that the reader trusts, and returns
// its records. The head must be no older than maxAge: whoever hands out bundles can
// hold back a revocation for that long.
func (b *Bundle) Open(network lite.Network, derive KeyFunc, maxAge time.Duration, now time.Time) ([]*Record, error) {
	if b.GlobalID != network.GlobalID {
		return nil, fmt.Errorf("the bundle is of the network with the global id %d, not %d", b.GlobalID, network.GlobalID)
	}
	if b.KeyBlock != network.KeyBlock {
		return nil, fmt.Errorf("the bundle is proved from key block %v, and this program trusts %v; have it made with --from", b.KeyBlock, network.KeyBlock)
	}
	head, err := lite.VerifyChain(b.KeyBlock, b.Head, b.GlobalID, b.Chain, maxAge, now)
	if err != nil {
		return nil, err
	}
	var records []*Record
	for _, item := range b.Records {
		if slices.ContainsFunc(records, func(r *Record) bool { return r.Key == item.Key }) {
			return nil, fmt.Errorf("the bundle has %v twice", item.Key)
		}
		account, err := lite.VerifyMethod(head, b.Registry, codeHash, item.Record)
		if err != nil {
			return nil, fmt.Errorf("%v: %w", item.Key, notRegistry(err))
		}
		var signed *lite.Account
		if len(item.Signatures) > 0 {
			if signed, err = lite.VerifyMethod(head, b.Registry, codeHash, item.Signatures); err != nil {
				return nil, fmt.Errorf("%v: %w", item.Key, notRegistry(err))
			}
		}
		record, err := readRecord(account, signed, item.Key, b.GlobalID, derive)
		if err != nil {
			return nil, fmt.Errorf("%v: %w", item.Key, err)
		}
		records = append(records, record)
	}
	return records, nil
}
