// Package manifest reads and writes the only configuration that a Chrysalis VM
// takes: one canonical JSON document (RFC 8785) that names the engine disk, the
// model disks, typed engine parameters, the service limits and what clients can be
// charged.
//
// The host writes it, so it is hostile input to the guest. What a client trusts
// is its hash, which is part of the evidence; therefore one meaning has exactly
// one encoding, and everything else is refused.
package manifest

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"

	"chrysalis/canonical"
	"chrysalis/pay"
)

// MaxSize is the largest manifest, in bytes.
const MaxSize = 64 << 10

// Version is the version that this package reads and writes.
const Version = 1

// Manifest is the configuration of one VM. Every field but Tokens and Payment is
// required.
type Manifest struct {
	Version    int              `json:"version"`
	Engine     Disk             `json:"engine"`
	Models     []Model          `json:"models"`     // 1 to 16, in the order in which they are served; names are unique
	GPUs       int              `json:"gpus"`       // GPUs that must be bound, 0 to 8
	Parameters map[string]int64 `json:"parameters"` // of the engine; names, bounds and defaults come from its profile
	Limits     Limits           `json:"limits"`
	// Tokens are the SHA-256 of each bearer token that is let in, 64 lower-case
	// hexadecimal digits, in ascending order. Without the field everybody is.
	Tokens []string `json:"tokens,omitempty"`
	// Payment is what clients can be charged at most. Without it the VM serves for free.
	Payment *Payment `json:"payment,omitempty"`
}

// Payment is what of charging is fixed, and seen by who verifies the VM. The prices
// that are asked for are the host's to set, at or below the ceilings (package guest).
type Payment struct {
	Network  int32       `json:"network"`  // global id of the TON network on which vouchers are
	Step     int64       `json:"step"`     // nanotons that a voucher adds at least, 1 to pay.MaxStep
	Ceilings []pay.Price `json:"ceilings"` // as many as models, in their order; at least one is not free
}

// Disk identifies a dm-verity disk (sha256, 4 KiB data and hash blocks, hash
// format 1). It fixes everything that decides what the guest reads; where the
// partitions lie is read from the disk itself.
type Disk struct {
	RootHash   string `json:"root_hash"`   // 64 lower-case hexadecimal digits
	Salt       string `json:"salt"`        // lower-case hexadecimal, 0 to 256 bytes
	DataBlocks int64  `json:"data_blocks"` // 4 KiB blocks of file system, 1 to 2^31
}

// Model is a model disk and the name that clients use for it.
type Model struct {
	Name     string `json:"name"`     // ORG/NAME
	Revision string `json:"revision"` // as the publisher names it
	Disk     Disk   `json:"disk"`
}

// ID returns NAME@REVISION.
func (m Model) ID() string { return m.Name + "@" + m.Revision }

// MaxTokens is how many clients' tokens a manifest can name.
const MaxTokens = 512

// TokenHash is what a manifest holds of a token: its SHA-256, in lower-case
// hexadecimal.
func TokenHash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// Limits bound what clients can ask of the VM.
type Limits struct {
	BodyBytes    int64 `json:"body_bytes"`    // a request's body, 1 KiB to 16 MiB
	Concurrency  int   `json:"concurrency"`   // requests at a time, 1 to 1024
	IdleSeconds  int   `json:"idle_seconds"`  // without a byte in either direction, 1 to 3600
	TotalSeconds int   `json:"total_seconds"` // for one request, 1 to 86400
}

// DefaultLimits are what the launcher writes unless told otherwise.
var DefaultLimits = Limits{BodyBytes: 16 << 20, Concurrency: 8, IdleSeconds: 300, TotalSeconds: 900}

var (
	nameRE      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	revisionRE  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	parameterRE = regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}$`)
	rootHashRE  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	saltRE      = regexp.MustCompile(`^(?:[0-9a-f]{2}){0,256}$`)
)

// maxInteger is the largest integer that RFC 8785 carries exactly.
const maxInteger = 1<<53 - 1

// Validate reports the first value that is out of bounds.
func (m *Manifest) Validate() error {
	if m.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", m.Version, Version)
	}
	if err := m.Engine.validate("engine"); err != nil {
		return err
	}
	if len(m.Models) < 1 || len(m.Models) > 16 {
		return fmt.Errorf("models: there are %d, expected 1 to 16", len(m.Models))
	}
	for i, model := range m.Models {
		where := fmt.Sprintf("models[%d]", i)
		if !nameRE.MatchString(model.Name) {
			return fmt.Errorf("%s.name: %q is not ORG/NAME of letters, digits, '.', '_' and '-'", where, model.Name)
		}
		if !revisionRE.MatchString(model.Revision) {
			return fmt.Errorf("%s.revision: %q is not 1 to 64 letters, digits, '.', '_' and '-'", where, model.Revision)
		}
		for _, earlier := range m.Models[:i] {
			if earlier.Name == model.Name {
				return fmt.Errorf("%s.name: %q is there twice", where, model.Name)
			}
		}
		if err := model.Disk.validate(where + ".disk"); err != nil {
			return err
		}
	}
	if err := inRange("gpus", int64(m.GPUs), 0, 8); err != nil {
		return err
	}
	if m.Parameters == nil {
		return errors.New("parameters: missing; an engine without parameters has {}")
	}
	if len(m.Parameters) > 64 {
		return fmt.Errorf("parameters: there are %d, at most 64 are allowed", len(m.Parameters))
	}
	for name, value := range m.Parameters {
		if !parameterRE.MatchString(name) {
			return fmt.Errorf("parameters: %q is not a parameter's name", name)
		}
		if err := inRange("parameters."+name, value, -maxInteger, maxInteger); err != nil {
			return err
		}
	}
	if len(m.Tokens) > MaxTokens {
		return fmt.Errorf("tokens: there are %d, at most %d are allowed", len(m.Tokens), MaxTokens)
	}
	for i, hash := range m.Tokens {
		if !rootHashRE.MatchString(hash) {
			return fmt.Errorf("tokens[%d]: %.80q is not 64 lower-case hexadecimal digits", i, hash)
		}
		if i > 0 && m.Tokens[i-1] >= hash {
			return fmt.Errorf("tokens[%d]: not in ascending order, or there twice", i)
		}
	}
	if m.Payment != nil {
		if err := m.Payment.validate(len(m.Models)); err != nil {
			return err
		}
	}
	return errors.Join(
		inRange("limits.body_bytes", m.Limits.BodyBytes, 1<<10, 16<<20),
		inRange("limits.concurrency", int64(m.Limits.Concurrency), 1, 1024),
		inRange("limits.idle_seconds", int64(m.Limits.IdleSeconds), 1, 3600),
		inRange("limits.total_seconds", int64(m.Limits.TotalSeconds), 1, 86400),
	)
}

func (p *Payment) validate(models int) error {
	if err := inRange("payment.step", p.Step, 1, pay.MaxStep); err != nil {
		return err
	}
	if len(p.Ceilings) != models {
		return fmt.Errorf("payment.ceilings: there are %d, expected one for each of the %d models", len(p.Ceilings), models)
	}
	free := true
	for i, ceiling := range p.Ceilings {
		if err := ceiling.Validate(); err != nil {
			return fmt.Errorf("payment.ceilings[%d]: %w", i, err)
		}
		free = free && ceiling.Free()
	}
	if free {
		return errors.New("payment.ceilings: all are 0; a VM that serves for free has no payment")
	}
	return nil
}

// Ceilings returns the most that clients can be charged, and false for a VM that
// serves for free. The manifest must be valid.
func (m *Manifest) Ceilings() (pay.Tariff, bool) {
	if m.Payment == nil {
		return pay.Tariff{}, false
	}
	t, err := m.Tariff(m.Payment.Ceilings)
	return t, err == nil
}

// Tariff puts prices in the order of the models into the form that package pay
// reckons with. The error says that they are too many, too few or above the ceilings,
// or that the VM serves for free.
func (m *Manifest) Tariff(prices []pay.Price) (pay.Tariff, error) {
	if m.Payment == nil {
		return pay.Tariff{}, errors.New("the manifest has no payment: the VM serves for free")
	}
	if len(prices) != len(m.Models) {
		return pay.Tariff{}, fmt.Errorf("%d prices for %d models", len(prices), len(m.Models))
	}
	t := pay.Tariff{Step: uint64(m.Payment.Step), Models: map[string]pay.Price{}}
	for i, model := range m.Models {
		if err := prices[i].Under(m.Payment.Ceilings[i]); err != nil {
			return pay.Tariff{}, fmt.Errorf("%s: %w", model.ID(), err)
		}
		t.Models[model.ID()] = prices[i]
	}
	return t, nil
}

func (d Disk) validate(where string) error {
	if !rootHashRE.MatchString(d.RootHash) {
		return fmt.Errorf("%s.root_hash: %.80q is not 64 lower-case hexadecimal digits", where, d.RootHash)
	}
	if !saltRE.MatchString(d.Salt) {
		return fmt.Errorf("%s.salt: not 0 to 256 bytes in lower-case hexadecimal", where)
	}
	return inRange(where+".data_blocks", d.DataBlocks, 1, 1<<31)
}

func inRange(where string, value, low, high int64) error {
	if value < low || value > high {
		return fmt.Errorf("%s: %d is out of bounds, expected %d to %d", where, value, low, high)
	}
	return nil
}

// Encode returns the canonical encoding of a valid manifest: RFC 8785, that is
// no white space, keys in order, no final newline.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	out, err := canonical.Encode(m)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if len(out) > MaxSize {
		return nil, fmt.Errorf("manifest: %d bytes, at most %d are allowed", len(out), MaxSize)
	}
	return out, nil
}

// Parse reads a manifest. It refuses anything but the canonical encoding of a
// valid manifest, and names what is wrong: unknown, missing or repeated fields,
// white space, another number format, a value out of bounds.
func Parse(data []byte) (*Manifest, error) {
	var m Manifest
	if err := canonical.Decode(data, MaxSize, &m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return &m, nil
}

// SHA384 is the digest of an encoded manifest: what the agent extends into RTMR3
// or PCR 15, and MRCONFIGID on TDX (48 bytes).
func SHA384(encoded []byte) [48]byte { return sha512.Sum384(encoded) }
