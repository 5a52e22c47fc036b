package market

import (
	"cmp"
	"fmt"
	"net"
	"regexp"
	"slices"

	"chrysalis/canonical"
)

// Bounds of a history.
const (
	HistoryVersion = 1
	MaxHistory     = 4 << 20 // bytes of an encoded one
	maxEntries     = 1024
	maxProbes      = 16 // of one entry
)

// A History is what a client's probes of offered workers came to.
type History struct {
	Version int     `json:"version"`
	Entries []Entry `json:"entries"` // by endpoint, then root hash; each once
}

// An Entry is a model at an endpoint.
type Entry struct {
	Endpoint string  `json:"endpoint"`  // HOST:PORT
	RootHash string  `json:"root_hash"` // of the model's disk, 32 bytes in hexadecimal
	Probes   []Probe `json:"probes"`    // the oldest first, the last 16 of them
}

// The results of a probe that are no check's name.
const (
	Attested    = "attested"    // every check holds, and it serves the model
	Unreachable = "unreachable" // no evidence came
	OtherModel  = "other-model" // every check holds, but it does not serve the model
)

// A Probe is one.
type Probe struct {
	At           int64  `json:"at"` // Unix time, seconds
	Result       string `json:"result"`
	Confidential bool   `json:"confidential"`
	Latency      int64  `json:"latency_ms"` // until the evidence was there; 0 where none came
}

var (
	rootRE   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	resultRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,47}$`)
)

// Validate implements canonical.Document.
func (h *History) Validate() error {
	if h.Version != HistoryVersion {
		return fmt.Errorf("version is %d, this program reads version %d", h.Version, HistoryVersion)
	}
	if len(h.Entries) > maxEntries {
		return fmt.Errorf("entries: there are %d, up to %d are possible", len(h.Entries), maxEntries)
	}
	for i, e := range h.Entries {
		if err := e.validate(); err != nil {
			return fmt.Errorf("entries[%d].%w", i, err)
		}
		if i > 0 && e.compare(h.Entries[i-1].Endpoint, h.Entries[i-1].RootHash) <= 0 {
			return fmt.Errorf("entries[%d]: there twice, or not in order", i)
		}
	}
	return nil
}

func (e *Entry) validate() error {
	if host, _, err := net.SplitHostPort(e.Endpoint); err != nil || host == "" || len(e.Endpoint) > 260 {
		return fmt.Errorf("endpoint: %.80q is not HOST:PORT", e.Endpoint)
	}
	if !rootRE.MatchString(e.RootHash) {
		return fmt.Errorf("root_hash: %.80q is not one", e.RootHash)
	}
	if len(e.Probes) == 0 || len(e.Probes) > maxProbes {
		return fmt.Errorf("probes: there are %d, expected 1 to %d", len(e.Probes), maxProbes)
	}
	for i, p := range e.Probes {
		if err := p.validate(); err != nil {
			return fmt.Errorf("probes[%d].%w", i, err)
		}
	}
	return nil
}

func (p *Probe) validate() error {
	switch {
	case p.At < 0 || p.At > 1<<40:
		return fmt.Errorf("at: %d is no time", p.At)
	case !resultRE.MatchString(p.Result):
		return fmt.Errorf("result: %.80q is none", p.Result)
	case p.Confidential && p.Result != Attested:
		return fmt.Errorf("confidential: not where the result is %s", p.Result)
	case p.Latency < 0 || p.Latency > 1<<30:
		return fmt.Errorf("latency_ms: %d is out of bounds", p.Latency)
	}
	return nil
}

func (e *Entry) compare(endpoint, root string) int {
	return cmp.Or(cmp.Compare(e.Endpoint, endpoint), cmp.Compare(e.RootHash, root))
}

// ParseHistory reads what Encode returns, and names what is wrong with anything else.
func ParseHistory(data []byte) (*History, error) {
	h := new(History)
	if err := canonical.Decode(data, MaxHistory, h); err != nil {
		return nil, fmt.Errorf("history of probes: %w", err)
	}
	return h, nil
}

// Encode returns canonical JSON (RFC 8785).
func (h *History) Encode() ([]byte, error) {
	h.Version = HistoryVersion
	if h.Entries == nil {
		h.Entries = []Entry{}
	}
	if err := h.Validate(); err != nil {
		return nil, fmt.Errorf("history of probes: %w", err)
	}
	return canonical.Encode(h)
}

func (h *History) find(endpoint, root string) (int, bool) {
	return slices.BinarySearchFunc(h.Entries, Entry{Endpoint: endpoint, RootHash: root}, func(e, at Entry) int { return e.compare(at.Endpoint, at.RootHash) })
}

// Add takes note of a probe of a model, by its root hash in hexadecimal, at an endpoint.
// Where there would be too many, the entry that was probed the longest ago goes.
func (h *History) Add(endpoint, root string, p Probe) error {
	e := Entry{Endpoint: endpoint, RootHash: root, Probes: []Probe{p}}
	if err := e.validate(); err != nil {
		return err
	}
	at, there := h.find(endpoint, root)
	if there {
		known := append(h.Entries[at].Probes, p)
		h.Entries[at].Probes = known[max(0, len(known)-maxProbes):]
		return nil
	}
	h.Entries = slices.Insert(h.Entries, at, e)
	if len(h.Entries) > maxEntries {
		oldest := -1
		for i, e := range h.Entries {
			if i != at && (oldest < 0 || e.last().At < h.Entries[oldest].last().At) {
				oldest = i
			}
		}
		h.Entries = slices.Delete(h.Entries, oldest, oldest+1)
	}
	return nil
}

func (e *Entry) last() Probe { return e.Probes[len(e.Probes)-1] }

// Last is the last probe of a model at an endpoint, and how many of those that are
// remembered found it attested; it is false when none is.
func (h *History) Last(endpoint, root string) (last Probe, good, all int, ok bool) {
	at, ok := h.find(endpoint, root)
	if !ok {
		return Probe{}, 0, 0, false
	}
	for _, p := range h.Entries[at].Probes {
		if p.Result == Attested {
			good++
		}
	}
	return h.Entries[at].last(), good, len(h.Entries[at].Probes), true
}
