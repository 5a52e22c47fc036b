package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"chrysalis/measure/record"
	"chrysalis/registry/contract"
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
