package measure

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf16"
)

// Bounds of a log.
const (
	MaxLog       = 4 << 20 // bytes
	maxLogEvents = 8192
)

// LogEvent is a record of a firmware's event log.
type LogEvent struct {
	Offset  int // in the log, in bytes
	Index   int // the PCR; in a TD's log the register as UEFI counts it: 0 is MRTD, n is RTMR n−1
	Type    uint32
	Digests map[Algorithm][]byte
	Data    []byte
}

// Log is a firmware's event log: a TPM's (TCG PC Client Platform Firmware
// Profile, section 10) or a TD's (CCEL: UEFI 2.10, section 38.4.1), which have
// one format.
type Log struct {
	Events []LogEvent
	// Algorithms are those that every event has a digest of.
	Algorithms []Algorithm
}

// ParseLog reads a log; name is for errors. What follows the last event must be
// 0xff or 0, with which firmware fills its log.
func ParseLog(name string, data []byte) (*Log, error) {
	in := input{name, data}
	if len(data) == 0 {
		return nil, fmt.Errorf("%s: %w", name, errEmpty)
	}
	if len(data) > MaxLog {
		return nil, fmt.Errorf("%s: %d bytes, a log has at most %d", name, len(data), MaxLog)
	}
	le := binary.LittleEndian
	// The first event is in the format of TPM 1.2, so that all can read it.
	head, err := in.slice(0, 32, "a log's first event")
	if err != nil {
		return nil, err
	}
	size := uint64(le.Uint32(head[28:]))
	spec, err := in.slice(32, size, "a log's specification")
	if err != nil {
		return nil, err
	}
	if le.Uint32(head[4:]) != EvNoAction || len(spec) < 28 || string(spec[:16]) != "Spec ID Event03\x00" {
		return nil, in.errorf(0, "its first event is not \"Spec ID Event03\"; expected a log of a TPM 2.0 or of a TD")
	}
	log := &Log{}
	n := uint64(le.Uint32(spec[24:]))
	if n < 1 || n > 8 || uint64(len(spec)) < 28+4*n+1 {
		return nil, in.errorf(32+24, "%d algorithms in a specification of %d bytes, expected 1 to 8", n, len(spec))
	}
	for i := range n {
		entry := spec[28+4*i:]
		a := Algorithm(le.Uint16(entry))
		if a.Size() == 0 || int(le.Uint16(entry[2:])) != a.Size() {
			return nil, in.errorf(32+28+4*i, "%v with digests of %d bytes; expected SHA-1, SHA-256, SHA-384 or SHA-512", a, le.Uint16(entry[2:]))
		}
		for _, b := range log.Algorithms {
			if a == b {
				return nil, in.errorf(32+28+4*i, "%v is there twice", a)
			}
		}
		log.Algorithms = append(log.Algorithms, a)
	}
	for at := 32 + size; at < uint64(len(data)); {
		if rest := data[at:]; len(bytes.Trim(rest, "\xff")) == 0 || zeros(rest) && (len(rest) < 16 || log.ended()) {
			break
		}
		if len(log.Events) == maxLogEvents {
			return nil, in.errorf(at, "more than %d events", maxLogEvents)
		}
		e, next, err := in.event(at, log.Algorithms)
		if err != nil {
			return nil, err
		}
		log.Events = append(log.Events, e)
		at = next
	}
	return log, nil
}

// ended reports whether zeros that follow are no event. An event of zeros has
// no digests, which no log has.
func (l *Log) ended() bool { return len(l.Events) > 0 }

func (in input) event(at uint64, algorithms []Algorithm) (e LogEvent, next uint64, err error) {
	head, err := in.slice(at, 12, "an event's header")
	if err != nil {
		return e, 0, err
	}
	le := binary.LittleEndian
	e = LogEvent{Offset: int(at), Index: int(le.Uint32(head)), Type: le.Uint32(head[4:]), Digests: map[Algorithm][]byte{}}
	if e.Index > 23 {
		return e, 0, in.errorf(at, "register %d, expected 0 to 23", uint32(e.Index))
	}
	count := le.Uint32(head[8:])
	if int(count) != len(algorithms) {
		return e, 0, in.errorf(at+8, "%d digests, expected %d", count, len(algorithms))
	}
	at += 12
	for range count {
		id, err := in.slice(at, 2, "a digest's algorithm")
		if err != nil {
			return e, 0, err
		}
		a := Algorithm(le.Uint16(id))
		known := false
		for _, b := range algorithms {
			known = known || a == b
		}
		if !known || e.Digests[a] != nil {
			return e, 0, in.errorf(at, "%v, expected each of %v once", a, algorithms)
		}
		if e.Digests[a], err = in.slice(at+2, uint64(a.Size()), "a digest"); err != nil {
			return e, 0, err
		}
		at += 2 + uint64(a.Size())
	}
	length, err := in.slice(at, 4, "an event's size")
	if err != nil {
		return e, 0, err
	}
	n := uint64(le.Uint32(length))
	if e.Data, err = in.slice(at+4, n, "an event's data"); err != nil {
		return e, 0, err
	}
	return e, at + 4 + n, nil
}

// Replay returns what a register holds after the log's events, by its index. a
// is one of the log's algorithms.
func (l *Log) Replay(a Algorithm, index int) []byte {
	value := make([]byte, a.Size())
	first := true
	for _, e := range l.Events {
		switch {
		case e.Index != index:
		case e.Type == EvNoAction:
			// TCG PC Client Platform Firmware Profile, section 10.4.5.3.
			if index == 0 && len(e.Data) == 17 && string(e.Data[:16]) == "StartupLocality\x00" {
				clear(value)
				value[len(value)-1] = e.Data[16]
			}
		default:
			if first && e.Type == EvHCRTM { // a processor measured the firmware before it ran
				clear(value)
				value[len(value)-1] = 4
			}
			value, first = a.Extend(value, e.Digests[a]), false
		}
	}
	return value
}

// fromUTF16 reads little-endian UTF-16 up to a NUL.
func fromUTF16(b []byte) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

// Text says what an event is, as far as its data tells. Nothing of it is proved
// by the log: a digest is.
func (e LogEvent) Text() string {
	switch e.Type {
	case EvNoAction:
		return "a note"
	case EvSeparator:
		return "separator"
	case EvSCRTMVersion:
		return "firmware version " + quote(fromUTF16(e.Data))
	case EvFirmwareBlob, EvFirmwareBlob2:
		return "firmware volume"
	case EvHandoffTables, EvHandoffTables2:
		return "tables handed over"
	case EvPlatformConfigFlags:
		text, rest, _ := strings.Cut(string(e.Data), "\x00")
		name, _, _ := strings.Cut(rest, "\x00")
		return quote(strings.TrimSpace(text + " " + name))
	case EvVariableDriverConfig, EvVariableBoot:
		if len(e.Data) >= 32 {
			n := binary.LittleEndian.Uint64(e.Data[16:])
			if rest := e.Data[32:]; n <= uint64(len(rest))/2 {
				return "variable " + quote(fromUTF16(rest[:2*n]))
			}
		}
		return "a variable"
	case EvBootServicesApp:
		if path := e.FilePath(); path != "" {
			return "program " + quote(path)
		}
		return "a program"
	case EvBootServicesDriver:
		return "a driver, such as a device's option ROM"
	case EvAction:
		return quote(string(e.Data))
	case EvGPT:
		return "partitions of a disk"
	case EvIPL:
		return quote(fromUTF16(e.Data))
	case EvEventTag:
		if len(e.Data) >= 8 {
			return quote(strings.TrimRight(string(e.Data[8:]), "\x00"))
		}
	}
	return fmt.Sprintf("an event of type %#x", e.Type)
}

// quote shows text that anybody may have written.
func quote(s string) string {
	if len(s) > 200 {
		s = s[:200] + "…"
	}
	return fmt.Sprintf("%q", s)
}

// FilePath returns the path of a program on a disk, from its device path (UEFI
// 2.10, section 10.3.5.4), or "".
func (e LogEvent) FilePath() string {
	const fixed = 32 // UEFI_IMAGE_LOAD_EVENT
	if e.Type != EvBootServicesApp || len(e.Data) < fixed {
		return ""
	}
	for b := e.Data[fixed:]; len(b) >= 4; {
		n := int(binary.LittleEndian.Uint16(b[2:]))
		if n < 4 || n > len(b) {
			return ""
		}
		if b[0] == 4 && b[1] == 4 {
			return fromUTF16(b[4:n])
		}
		b = b[n:]
	}
	return ""
}
