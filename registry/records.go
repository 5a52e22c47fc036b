package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"chrysalis/measure/record"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// DeriveKey is the KeyFunc of package measure/record: it refuses what is not a valid
// record of the kind in its one canonical encoding.
func DeriveKey(kind contract.Kind, data []byte) ([32]byte, error) {
	r, err := record.Parse(record.Kind(kind.String()), data)
	if err != nil {
		return [32]byte{}, err
	}
	return r.Key(), nil
}

// Publications reads a file of records, or a single record, and returns what is to
// be published of it, images first.
func Publications(data []byte, notBefore, notAfter time.Time) ([]Publication, error) {
	var probe struct {
		Kind *record.Kind `json:"kind"`
	}
	if err := json.Unmarshal(data, &probe); err != nil {
		return nil, fmt.Errorf("not a record: %w", err)
	}
	var records []record.Record
	if probe.Kind != nil {
		r, err := record.Parse(*probe.Kind, data)
		if err != nil {
			return nil, err
		}
		records = append(records, r)
	} else {
		file, err := record.ParseFile(data)
		if err != nil {
			return nil, err
		}
		records = append(records, &file.Image)
		for i := range file.Shapes {
			records = append(records, &file.Shapes[i])
		}
		for i := range file.Engines {
			records = append(records, &file.Engines[i])
		}
		for i := range file.Models {
			records = append(records, &file.Models[i])
		}
	}
	var list []Publication
	for _, r := range records {
		// Shapes that measure the same have one key; one of them stands for all.
		if slices.ContainsFunc(list, func(p Publication) bool { return p.Key == Key(r.Key()) }) {
			continue
		}
		kind, err := contract.ParseKind(string(r.RecordKind()))
		if err != nil {
			return nil, err
		}
		encoded, err := record.Encode(r)
		if err != nil {
			return nil, err
		}
		list = append(list, Publication{Kind: kind, Key: r.Key(), Record: encoded, NotBefore: notBefore, NotAfter: notAfter})
	}
	if len(list) == 0 {
		return nil, errors.New("there are no records")
	}
	return list, nil
}

// A Refusal is a record that a policy does not accept.
type Refusal struct {
	Registry lite.Address
	Key      Key
	Err      error
}

func (r Refusal) Error() string { return fmt.Sprintf("%v in %s: %v", r.Key, r.Registry, r.Err) }

// Approved proves every record of some registries as of a view, and returns those that
// the policy accepts as files of records: one for each image, with its shapes, and
// with every engine and model that any of the registries has. Records that are not
// accepted, revoked ones among them, are returned apart.
func (r *Reader) Approved(ctx context.Context, view *lite.View, registries []lite.Address, policy Policy) (files []*record.File, refused []Refusal, err error) {
	now := time.Unix(int64(view.Head.Time), 0)
	var engines []record.Engine
	var models []record.Model
	var shapes []record.Shape
	images := map[[32]byte]*record.File{}
	for _, address := range registries {
		account, err := view.Account(ctx, address)
		if err != nil {
			return nil, nil, err
		}
		if !account.Active || account.Code != codeHash {
			return nil, nil, fmt.Errorf("%w: %s", ErrNotRegistry, address)
		}
		m := contract.Registry(account.Data)
		var after *[32]byte
		for {
			page, err := m.Records(after, pageSize)
			if err != nil {
				return nil, nil, err
			}
			for _, e := range page {
				found, err := readRecord(account, account, e.Key, r.Client.Network().GlobalID, DeriveKey)
				if err == nil {
					err = policy.Check(found, now)
				}
				if err != nil {
					refused = append(refused, Refusal{address, e.Key, err})
					continue
				}
				parsed, err := record.Parse(record.Kind(found.Kind), found.Bytes)
				if err != nil {
					return nil, nil, err // DeriveKey has parsed it
				}
				switch parsed := parsed.(type) {
				case *record.Image:
					images[e.Key] = &record.File{Version: record.Version, Image: *parsed, Shapes: []record.Shape{}}
				case *record.Shape:
					shapes = append(shapes, *parsed)
				case *record.Engine:
					engines = append(engines, *parsed)
				case *record.Model:
					models = append(models, *parsed)
				}
			}
			if len(page) < pageSize {
				break
			}
			after = &page[len(page)-1].Key
		}
	}
	for _, s := range shapes {
		if f := images[[32]byte(s.Image)]; f != nil {
			f.Shapes = append(f.Shapes, s)
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(images), func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) }) {
		f := images[key]
		f.Engines, f.Models = append([]record.Engine{}, engines...), append([]record.Model{}, models...)
		if err := f.Validate(); err != nil {
			return nil, nil, fmt.Errorf("the records of the image %v: %w", Key(key), err)
		}
		files = append(files, f)
	}
	return files, refused, nil
}
