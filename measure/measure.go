// Package measure predicts what a VM's measurement registers hold, from the
// files that it boots and the machine that it boots on, and says in words why
// they hold something else.
//
// A register's value is never taken from anywhere: it is the replay of a list of
// events, each with a name, a digest and a description, so that a difference can
// be pinned to one of them. What an event's digest is computed from is read from
// its file once. Where an input is missing the event has no digest and says why,
// and so has every register that it belongs to.
//
// The package reads and returns values. It opens no file, starts no program and
// asks no machine; package measure/acpi does the one thing that needs QEMU.
//
// Where the algorithms come from is said at each; docs/measure.md has them all.
package measure

import (
	"bytes"
	"crypto"
	_ "crypto/sha1" // logs of old firmware carry it
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
)

// Algorithm is a hash algorithm as a TPM numbers it: TPM_ALG_ID (TPM 2.0
// Library, part 2, section 6.3).
type Algorithm uint16

// The algorithms.
const (
	SHA1   Algorithm = 0x04
	SHA256 Algorithm = 0x0b // of the TPM's bank that clients look at
	SHA384 Algorithm = 0x0c // of TDX
	SHA512 Algorithm = 0x0d
)

var algorithms = map[Algorithm]crypto.Hash{SHA1: crypto.SHA1, SHA256: crypto.SHA256, SHA384: crypto.SHA384, SHA512: crypto.SHA512}

// Size is a digest's size in bytes, 0 for an unknown algorithm.
func (a Algorithm) Size() int {
	if h, ok := algorithms[a]; ok {
		return h.Size()
	}
	return 0
}

func (a Algorithm) String() string {
	if h, ok := algorithms[a]; ok {
		return h.String()
	}
	return fmt.Sprintf("algorithm %#x", uint16(a))
}

// Sum returns the digest of the parts, one after the other.
func (a Algorithm) Sum(parts ...[]byte) []byte {
	h := algorithms[a].New()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// Extend returns what a register holds after a digest is extended into it.
func (a Algorithm) Extend(register, digest []byte) []byte { return a.Sum(register, digest) }

// Types of events (TCG PC Client Platform Firmware Profile, section 10.4.1).
const (
	EvNoAction             = 0x03
	EvSeparator            = 0x04
	EvEventTag             = 0x06
	EvSCRTMVersion         = 0x08
	EvPlatformConfigFlags  = 0x0a
	EvIPL                  = 0x0d
	EvVariableDriverConfig = 0x80000001
	EvVariableBoot         = 0x80000002
	EvBootServicesApp      = 0x80000003
	EvBootServicesDriver   = 0x80000004
	EvGPT                  = 0x80000006
	EvAction               = 0x80000007
	EvFirmwareBlob         = 0x80000008
	EvHandoffTables        = 0x80000009
	EvFirmwareBlob2        = 0x8000000a
	EvHandoffTables2       = 0x8000000b
	EvHCRTM                = 0x80000010
)

// Event is one thing that is measured.
type Event struct {
	PCR     int    // the PCR that it belongs to; on TDX it goes into that PCR's RTMR
	Type    uint32 // as a log has it
	Name    string // "acpi-tables"; the same for every image and machine
	Detail  string // in plain words
	Digest  []byte // nil where it is not predicted
	Missing string // then: why not
}

// Register is a measurement register of a machine.
type Register struct {
	Name   string // "MRTD", "RTMR0" to "RTMR3", "PCR 0" to "PCR 23"
	Events []Event
	// Value is what it holds after the events, nil where it is not predicted.
	Value []byte
	// Missing says then why not.
	Missing string
}

// Given names the registers that firmware decides and an image does not: they
// hold what the firmware's build puts there.
const missingFirmware = "given by the firmware"

// register replays events into a register that begins as zeros.
func register(name string, a Algorithm, events []Event) Register {
	r := Register{Name: name, Events: events}
	value := make([]byte, a.Size())
	for _, e := range events {
		if e.Digest == nil {
			r.Missing = e.Missing
			return r
		}
		value = a.Extend(value, e.Digest)
	}
	r.Value = value
	return r
}

// RTMR returns the number of the RTMR into which a TD extends what a TPM has in
// a PCR, and false for PCR 0, which MRTD stands for: UEFI 2.10, section 38.4.1.
func RTMR(pcr int) (int, bool) {
	switch {
	case pcr == 1 || pcr == 7:
		return 0, true
	case pcr >= 2 && pcr <= 6:
		return 1, true
	case pcr >= 8 && pcr <= 15:
		return 2, true
	}
	return 0, false
}

// RTMRs replays events into a TD's RTMRs 0 to 2.
func RTMRs(events []Event) []Register {
	var list []Register
	for i := range 3 {
		var own []Event
		for _, e := range events {
			if n, ok := RTMR(e.PCR); ok && n == i {
				own = append(own, e)
			}
		}
		list = append(list, register("RTMR"+strconv.Itoa(i), SHA384, own))
	}
	return list
}

// PCRs replays events into a TPM's PCRs 0 to 14.
func PCRs(a Algorithm, events []Event) []Register {
	var list []Register
	for i := range 15 {
		var own []Event
		for _, e := range events {
			if e.PCR == i {
				own = append(own, e)
			}
		}
		r := register("PCR "+strconv.Itoa(i), a, own)
		if i == 10 {
			r.Value, r.Missing = nil, "free: the kernel's integrity measurement, which nothing here uses"
		}
		list = append(list, r)
	}
	return list
}

// An input is a file that is being read.
type input struct {
	name string
	data []byte
}

// slice returns n bytes at an offset, or an error that names file and offset.
func (in input) slice(at, n uint64, what string) ([]byte, error) {
	if at > uint64(len(in.data)) || n > uint64(len(in.data))-at {
		return nil, in.errorf(at, "%s of %d bytes is cut short, the file ends at %#x", what, n, len(in.data))
	}
	return in.data[at : at+n], nil
}

func (in input) errorf(at uint64, format string, args ...any) error {
	return fmt.Errorf("%s: byte %#x: %w", in.name, at, fmt.Errorf(format, args...))
}

var errEmpty = errors.New("the file is empty")

// utf16le encodes text as UEFI does, without a final NUL.
func utf16le(text string) []byte {
	var out []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return out
}

// A GUID in the mixed-endian form that UEFI stores.
type guid [16]byte

// mustGUID reads the usual text form of a constant.
func mustGUID(text string) (g guid) {
	var a, b, c uint64
	var d []byte
	if n, err := fmt.Sscanf(text[:18], "%8x-%4x-%4x", &a, &b, &c); err != nil || n != 3 {
		panic(text)
	}
	if n, err := fmt.Sscanf(text[19:23]+text[24:], "%x", &d); err != nil || n != 1 || len(d) != 8 {
		panic(text)
	}
	binary.LittleEndian.PutUint32(g[:], uint32(a))
	binary.LittleEndian.PutUint16(g[4:], uint16(b))
	binary.LittleEndian.PutUint16(g[6:], uint16(c))
	copy(g[8:], d)
	return g
}

func zeros(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
