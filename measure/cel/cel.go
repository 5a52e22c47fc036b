// Package cel reads and writes the log of what a Chrysalis VM measured after its
// kernel ran: its manifest, each disk, each GPU, and last a separator, after
// which it extends nothing. The log is what makes RTMR3 (on TDX) or PCR 15 (on a
// TPM) explainable.
//
// The format is the TLV encoding of TCG's Canonical Event Log Format 1.0
// (section 5.1), narrowed so that a list of events has exactly one encoding:
// records count from 0, all name one register, and all carry a SHA-256 and a
// SHA-384 digest of the event's data, in this order. Lengths are 4 bytes, big
// endian.
package cel

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"

	"chrysalis/canonical"
	"chrysalis/manifest"
)

// Register is the measurement register that a log belongs to.
type Register string

// The registers.
const (
	RTMR3 Register = "rtmr3" // TDX: CEL register type 108 (CCMR), index 4
	PCR15 Register = "pcr15" // TPM: CEL register type 1 (PCR), index 15
)

// The names of events.
const (
	Manifest  = "chrysalis/manifest/1"  // data: the manifest as it was read
	Disk      = "chrysalis/disk/1"      // data: see DiskEvent
	GPU       = "chrysalis/gpu/1"       // data: canonical JSON of the GPU's identity
	Separator = "chrysalis/separator/1" // data: four zero bytes
)

// Bounds of a log.
const (
	MaxSize   = 256 << 10 // bytes of an encoded log
	MaxEvents = 64
	MaxData   = 64 << 10 // bytes of one event's data; a manifest is the largest
)

// Event is one thing that was measured. What is extended is the digest of Data, so
// that a manifest's event is the manifest's own hash. The name is not covered:
// whoever checks a log compares it with what Boot returns, names included.
type Event struct {
	Name string
	Data []byte
}

// SHA256 is what is extended into a TPM's SHA-256 bank.
func (e Event) SHA256() [32]byte { return sha256.Sum256(e.Data) }

// SHA384 is what is extended into RTMR3 and into a TPM's SHA-384 bank.
func (e Event) SHA384() [48]byte { return sha512.Sum384(e.Data) }

// ManifestEvent is the first event of every log.
func ManifestEvent(encoded []byte) Event { return Event{Manifest, encoded} }

// SeparatorEvent is the last event of every log.
func SeparatorEvent() Event { return Event{Separator, make([]byte, 4)} }

// EngineEvent is the event of the engine disk, measured before it is opened.
func EngineEvent(disk manifest.Disk) (Event, error) { return diskEvent("engine", "", disk) }

// ModelEvent is the event of a model disk, measured before it is opened.
func ModelEvent(m manifest.Model) (Event, error) { return diskEvent("model", m.ID(), m.Disk) }

// diskEvent's data is canonical JSON (RFC 8785).
func diskEvent(role, name string, disk manifest.Disk) (Event, error) {
	data, err := canonical.Encode(struct {
		Role string        `json:"role"`           // "engine" or "model"
		Name string        `json:"name,omitempty"` // a model's NAME@REVISION
		Disk manifest.Disk `json:"disk"`
	}{role, name, disk})
	if err != nil {
		return Event{}, fmt.Errorf("disk event: %w", err)
	}
	return Event{Disk, data}, nil
}

// Boot lists the events of a VM with this manifest, in their order. gpus holds
// the data of one event for each GPU.
func Boot(encoded []byte, m *manifest.Manifest, gpus [][]byte) ([]Event, error) {
	events := []Event{ManifestEvent(encoded)}
	engine, err := EngineEvent(m.Engine)
	if err != nil {
		return nil, err
	}
	events = append(events, engine)
	for _, model := range m.Models {
		event, err := ModelEvent(model)
		if err != nil {
			return nil, err
		}
		events = append(events, event)
	}
	for _, gpu := range gpus {
		events = append(events, Event{GPU, gpu})
	}
	return append(events, SeparatorEvent()), nil
}

// Replay returns what the register holds after the events: in a SHA-256 bank,
// and in a SHA-384 bank or RTMR. Both begin as zeros.
func Replay(events []Event) (bank256 [32]byte, bank384 [48]byte) {
	for _, e := range events {
		d256, d384 := e.SHA256(), e.SHA384()
		bank256 = sha256.Sum256(append(bank256[:], d256[:]...))
		bank384 = sha512.Sum384(append(bank384[:], d384[:]...))
	}
	return bank256, bank384
}

// Types of the encoding's fields. The first four are the specification's; an
// event's content is of a type of our own, with two fields of our own inside.
const (
	typeRecord  = 0
	typePCR     = 1
	typeDigests = 3
	typeCCMR    = 108
	typeContent = 0x43

	typeName = 0
	typeData = 1

	algSHA256 = 0x0b // TPM_ALG_ID
	algSHA384 = 0x0c
)

var registers = map[Register][2]byte{RTMR3: {typeCCMR, 4}, PCR15: {typePCR, 15}}

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9./-]{0,63}$`)

// Encode returns a log's encoding.
func Encode(register Register, events []Event) ([]byte, error) {
	index, ok := registers[register]
	if !ok {
		return nil, fmt.Errorf("CEL: there is no register %q", register)
	}
	if len(events) > MaxEvents {
		return nil, fmt.Errorf("CEL: %d events, at most %d are allowed", len(events), MaxEvents)
	}
	var out []byte
	for i, e := range events {
		if !nameRE.MatchString(e.Name) {
			return nil, fmt.Errorf("CEL: event %d: %.80q is not an event's name", i, e.Name)
		}
		if len(e.Data) > MaxData {
			return nil, fmt.Errorf("CEL: event %d: %d bytes of data, at most %d are allowed", i, len(e.Data), MaxData)
		}
		d256, d384 := e.SHA256(), e.SHA384()
		out = tlv(out, typeRecord, binary.BigEndian.AppendUint64(nil, uint64(i)))
		out = tlv(out, index[0], index[1:])
		out = tlv(out, typeDigests, tlv(tlv(nil, algSHA256, d256[:]), algSHA384, d384[:]))
		out = tlv(out, typeContent, tlv(tlv(nil, typeName, []byte(e.Name)), typeData, e.Data))
	}
	if len(out) > MaxSize {
		return nil, fmt.Errorf("CEL: %d bytes, at most %d are allowed", len(out), MaxSize)
	}
	return out, nil
}

func tlv(out []byte, kind byte, value []byte) []byte {
	out = append(out, kind)
	out = binary.BigEndian.AppendUint32(out, uint32(len(value)))
	return append(out, value...)
}

// Parse reads a log. It refuses whatever Encode would not have written: another
// register within the log, records out of count, a digest that is not its data's.
func Parse(data []byte) (Register, []Event, error) {
	if len(data) > MaxSize {
		return "", nil, fmt.Errorf("CEL: %d bytes, at most %d are allowed", len(data), MaxSize)
	}
	var register Register
	var events []Event
	for rest := data; len(rest) > 0; {
		var r Register
		var e Event
		var err error
		at := len(data) - len(rest)
		if r, e, rest, err = parseRecord(rest); err != nil {
			return "", nil, fmt.Errorf("CEL: record %d, at byte %d: %w", len(events), at, err)
		}
		if register == "" {
			register = r
		}
		if events = append(events, e); len(events) > MaxEvents {
			return "", nil, fmt.Errorf("CEL: more than %d records", MaxEvents)
		}
	}
	if len(events) == 0 {
		return "", nil, errors.New("CEL: the log is empty")
	}
	canonical, err := Encode(register, events)
	if err != nil {
		return "", nil, err
	}
	if !bytes.Equal(canonical, data) {
		at := 0
		for at < len(canonical) && at < len(data) && canonical[at] == data[at] {
			at++
		}
		return "", nil, fmt.Errorf("CEL: at byte %d: a record number, register or digest is not what the events make it", at)
	}
	return register, events, nil
}

// parseRecord reads one record for its register, name and data. That the rest is
// right is for Parse to find.
func parseRecord(in []byte) (register Register, e Event, rest []byte, err error) {
	if _, in, err = field(in, typeRecord, "record number"); err != nil {
		return "", Event{}, nil, err
	}
	kind := byte(typePCR)
	if len(in) > 0 && in[0] == typeCCMR {
		kind = typeCCMR
	}
	index, in, err := field(in, kind, "register")
	if err != nil {
		return "", Event{}, nil, err
	}
	for r, want := range registers {
		if want[0] == kind && bytes.Equal(index, want[1:]) {
			register = r
		}
	}
	if register == "" {
		return "", Event{}, nil, fmt.Errorf("register %x of type %d is neither RTMR3 nor PCR 15", index, kind)
	}
	if _, in, err = field(in, typeDigests, "digests"); err != nil {
		return "", Event{}, nil, err
	}
	content, rest, err := field(in, typeContent, "content")
	if err != nil {
		return "", Event{}, nil, err
	}
	name, content, err := field(content, typeName, "event name")
	if err != nil {
		return "", Event{}, nil, err
	}
	data, content, err := field(content, typeData, "event data")
	if err != nil {
		return "", Event{}, nil, err
	}
	if len(content) > 0 {
		return "", Event{}, nil, fmt.Errorf("%d bytes follow the event's data", len(content))
	}
	return register, Event{string(name), bytes.Clone(data)}, rest, nil
}

// field takes a field of the given type off in.
func field(in []byte, kind byte, what string) (value, rest []byte, err error) {
	if len(in) < 5 {
		return nil, nil, fmt.Errorf("%s: the log ends", what)
	}
	if in[0] != kind {
		return nil, nil, fmt.Errorf("%s: a field of type %d, expected %d", what, in[0], kind)
	}
	n := binary.BigEndian.Uint32(in[1:])
	if uint64(n) > uint64(len(in)-5) {
		return nil, nil, fmt.Errorf("%s: %d bytes, and the log has %d more", what, n, len(in)-5)
	}
	return in[5 : 5+n], in[5+n:], nil
}
