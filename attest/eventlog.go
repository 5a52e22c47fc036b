package attest

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
)

// The event types and algorithms that replaying a log needs (TCG PC Client
// Platform Firmware Profile 1.06, section 10; TCG Algorithm Registry).
const (
	evNoAction = 3
	algSHA256  = 0x0b
	algSHA384  = 0x0c
	maxEvents  = 4096
)

// replayLog replays a crypto-agile log of the firmware (TCG PC Client Platform
// Firmware Profile 1.06, section 10.2; on TDX the CCEL of UEFI 2.10, section
// 38.4.1) and compares with the registers of a quote, keyed by the log's index.
// Only digests are used: what the events say is for people, and proves nothing
// that the registers do not.
func replayLog(log []byte, alg uint16, want map[uint32][]byte, name string, base uint32) outcome {
	got, n, err := replay(log, alg)
	if err != nil {
		return fail("%s", plain(err))
	}
	for index := uint32(0); index < 32; index++ {
		value, ok := want[index]
		if !ok {
			continue
		}
		have := got[index]
		if have == nil {
			have = make([]byte, len(value))
		}
		if !bytes.Equal(have, value) {
			return outcome{Failed, fmt.Sprintf("the log does not replay to %s%d", name, index-base), fmt.Sprintf("%x", have), fmt.Sprintf("%x", value)}
		}
	}
	return pass("%d events", n)
}

func replay(log []byte, alg uint16) (registers map[uint32][]byte, events int, err error) {
	var newHash func() hash.Hash
	switch alg {
	case algSHA256:
		newHash = sha256.New
	case algSHA384:
		newHash = sha512.New384
	}
	rest := log
	take := func(n uint64) ([]byte, error) {
		if n > uint64(len(rest)) {
			return nil, fmt.Errorf("the firmware's log ends within event %d", events)
		}
		part := rest[:n]
		rest = rest[n:]
		return part, nil
	}
	// The first event has the old format: index, type, a SHA-1 digest, its data.
	header, err := take(32)
	if err != nil {
		return nil, 0, err
	}
	spec, err := take(uint64(binary.LittleEndian.Uint32(header[28:])))
	if err != nil {
		return nil, 0, err
	}
	sizes, err := algorithms(spec)
	if err != nil {
		return nil, 0, err
	}
	size := newHash().Size()
	if sizes[alg] != size {
		return nil, 0, errors.New("the firmware's log has no digests of the quoted algorithm")
	}
	registers = map[uint32][]byte{}
	for len(rest) > 0 {
		if events++; events > maxEvents {
			return nil, 0, fmt.Errorf("the firmware's log has more than %d events", maxEvents)
		}
		header, err := take(12)
		if err != nil {
			return nil, 0, err
		}
		index, kind, count := binary.LittleEndian.Uint32(header), binary.LittleEndian.Uint32(header[4:]), binary.LittleEndian.Uint32(header[8:])
		if index > 31 && index != 0xffffffff || int64(count) != int64(len(sizes)) {
			return nil, 0, fmt.Errorf("event %d of the firmware's log has register %d and %d digests", events, index, count)
		}
		var digest []byte
		for range count {
			id, err := take(2)
			if err != nil {
				return nil, 0, err
			}
			a := binary.LittleEndian.Uint16(id)
			n, ok := sizes[a]
			if !ok {
				return nil, 0, fmt.Errorf("event %d of the firmware's log has a digest of the undeclared algorithm %#x", events, a)
			}
			d, err := take(uint64(n))
			if err != nil {
				return nil, 0, err
			}
			if a == alg {
				if digest != nil {
					return nil, 0, fmt.Errorf("event %d of the firmware's log has two digests of an algorithm", events)
				}
				digest = d
			}
		}
		length, err := take(4)
		if err != nil {
			return nil, 0, err
		}
		data, err := take(uint64(binary.LittleEndian.Uint32(length)))
		if err != nil {
			return nil, 0, err
		}
		if kind == evNoAction {
			// The only one that changes a register: the locality of TPM2_Startup, which
			// is where PCR 0 starts (section 10.4.5.3).
			if index == 0 && len(data) == 17 && string(data[:16]) == "StartupLocality\x00" {
				if registers[0] != nil {
					return nil, 0, errors.New("the firmware's log sets the startup locality after PCR 0 was extended")
				}
				start := make([]byte, size)
				start[size-1] = data[16]
				registers[0] = start
			}
			continue
		}
		if digest == nil {
			return nil, 0, fmt.Errorf("event %d of the firmware's log lacks the quoted algorithm's digest", events)
		}
		old := registers[index]
		if old == nil {
			old = make([]byte, size)
		}
		h := newHash()
		h.Write(old)
		h.Write(digest)
		registers[index] = h.Sum(nil)
	}
	return registers, events, nil
}

// algorithms reads the digest sizes that a log declares (section 10.4.5.1).
func algorithms(spec []byte) (map[uint16]int, error) {
	bad := errors.New("the firmware's log does not begin with a specification event of version 2")
	if len(spec) < 28 || string(spec[:16]) != "Spec ID Event03\x00" {
		return nil, bad
	}
	n := binary.LittleEndian.Uint32(spec[24:])
	if n < 1 || n > 8 || len(spec) < 28+int(n)*4 {
		return nil, bad
	}
	sizes := map[uint16]int{}
	for i := range int(n) {
		at := spec[28+4*i:]
		id, size := binary.LittleEndian.Uint16(at), int(binary.LittleEndian.Uint16(at[2:]))
		if size > 128 || size < 1 || sizes[id] != 0 {
			return nil, bad
		}
		sizes[id] = size
	}
	return sizes, nil
}
