package attest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/measure/record"
)

// The files of a saved verification.
const (
	FileEvidence      = "evidence.json"
	FilePolicy        = "policy.json"
	FileCollateral    = "collateral.json"     // Intel's
	FileGPUCollateral = "gpu-collateral.json" // NVIDIA's
	FileSession       = "session.json"
	FileVerdict       = "verdict.json"
	fileRecord        = "record-%d.json" // from 0
)

// maxSaved bounds each file of a saved verification, in bytes.
const maxSaved = 8 << 20

// saved is what FileSession holds.
type saved struct {
	Version int            `json:"version"`
	Host    string         `json:"host"`
	At      time.Time      `json:"at"`
	Nonce   evidence.Bytes `json:"nonce"`
	TLSKey  evidence.Bytes `json:"tls_key"` // SPKI, DER
}

// Save writes all that a verification needs into a folder, which must be empty or
// not there yet. Nothing in it is secret.
func (s *Session) Save(dir string, policy *Policy, records []*record.File) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("save the evidence: %w", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return fmt.Errorf("save the evidence: %s is not empty", dir)
	}
	files := map[string]any{
		FilePolicy:  policy,
		FileSession: saved{1, s.Host, s.Verdict.At, s.Nonce, s.TLSKey},
		FileVerdict: s.Verdict,
	}
	if s.Collateral != nil {
		files[FileCollateral] = s.Collateral
	}
	raw := map[string][]byte{FileEvidence: s.Document}
	if c := selectGPU(s.Document, s.gpu); c != nil {
		data, err := c.Encode()
		if err != nil {
			return fmt.Errorf("save the evidence: %w", err)
		}
		raw[FileGPUCollateral] = data
	}
	for name, v := range files {
		data, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return fmt.Errorf("save the evidence: %w", err)
		}
		raw[name] = append(data, '\n')
	}
	for i, r := range records {
		data, err := r.Encode()
		if err != nil {
			return fmt.Errorf("save the evidence: %w", err)
		}
		raw[fmt.Sprintf(fileRecord, i)] = data
	}
	for name, data := range raw {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return fmt.Errorf("save the evidence: %w", err)
		}
	}
	return nil
}

// Offline repeats a saved verification without a network, as of the time when the
// evidence was fetched. It trusts the folder for that time, for the nonce and for
// the key of the connection, which only whoever fetched the evidence can know. The
// policy and the records are those given, or the saved ones where they are nil.
func Offline(ctx context.Context, dir string, policy *Policy, records []*record.File) (*Session, error) {
	var about saved
	data, err := readSaved(dir, FileSession)
	if err != nil {
		return nil, err
	}
	if err := strict(data, &about); err != nil || about.Version != 1 {
		return nil, fmt.Errorf("%s is not a saved session", filepath.Join(dir, FileSession))
	}
	s := &Session{Host: about.Host, Nonce: about.Nonce, TLSKey: about.TLSKey}
	if s.Document, err = readSaved(dir, FileEvidence); err != nil {
		return nil, err
	}
	if policy == nil {
		if data, err = readSaved(dir, FilePolicy); err != nil {
			return nil, err
		}
		if policy, err = ParsePolicy(data); err != nil {
			return nil, err
		}
	}
	if records == nil {
		for i := 0; ; i++ {
			data, err := readSaved(dir, fmt.Sprintf(fileRecord, i))
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return nil, err
			}
			file, err := record.ParseFile(data)
			if err != nil {
				return nil, err
			}
			records = append(records, file)
		}
	}
	in := Input{Policy: policy, Records: records, Nonce: s.Nonce, TLSKey: s.TLSKey, Time: about.At}
	if data, err = readSaved(dir, FileCollateral); err == nil {
		var c Collateral
		if err := strict(data, &c); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, FileCollateral), err)
		}
		s.Collateral, in.Collateral = &c, &c
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if data, err = readSaved(dir, FileGPUCollateral); err == nil {
		c, err := nvidia.ParseCollateral(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, FileGPUCollateral), err)
		}
		in.GPU = &GPUCollateral{Bundle: c}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	begin := time.Now()
	s.Verdict = verifyAll(ctx, s.Document, &in)
	s.gpu = in.usedGPU
	s.Took = time.Since(begin)
	return s, nil
}

func readSaved(dir, name string) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSaved+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSaved {
		return nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), maxSaved)
	}
	return data, nil
}

func strict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	return dec.Decode(v)
}
