package models

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// ErrNotSafetensors is what every refusal of a safetensors header or index wraps.
var ErrNotSafetensors = errors.New("not a usable safetensors file")

// Bounds of a safetensors header. The largest models known have some 100,000
// tensors over all their files.
const (
	maxSafetensorsHeader = 100_000_000 // bytes; the format's own limit
	maxSafetensors       = 256 << 10   // tensors, in a file or an index
	maxSafetensorsName   = 512         // bytes
	maxShape             = 16          // dimensions
	maxIndex             = 64 << 20    // bytes of an index
)

// dtypes gives the bits of each element type (the safetensors library's Dtype).
var dtypes = map[string]int64{
	"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
	"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
	"I16": 16, "U16": 16, "F16": 16, "BF16": 16,
	"I32": 32, "U32": 32, "F32": 32,
	"I64": 64, "U64": 64, "F64": 64, "C64": 64,
}

// stHeader is what a safetensors header says.
type stHeader struct {
	tensors    map[string]struct{}
	parameters int64
	types      map[string]int64 // bytes of each type
}

// CheckSafetensors reads the header of the safetensors file of size bytes that r
// begins with, and nothing behind it: eight bytes of length, then one JSON object
// of tensors. It refuses what the safetensors library refuses and a little more:
// an unknown type, a shape that does not make up the data's size, a name that is
// there twice, and data that overlaps, has holes, or does not end where the file
// ends. It does not look at values.
//
// Memory is bounded by the number of tensors, at most 256 Ki, and their names.
// Errors wrap ErrNotSafetensors, or are r's.
func CheckSafetensors(r io.Reader, size int64) error {
	_, err := readSafetensors(r, size)
	return err
}

func refuseST(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrNotSafetensors}, args...)...)
}

func readSafetensors(r io.Reader, size int64) (*stHeader, error) {
	var length [8]byte
	if size < int64(len(length)) {
		return nil, refuseST("it has %d bytes; is the download complete?", size)
	}
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, cut(err)
	}
	n := binary.LittleEndian.Uint64(length[:])
	switch {
	case n < 2 || n > maxSafetensorsHeader:
		return nil, refuseST("a header of %d bytes; 2 to %d are allowed", n, maxSafetensorsHeader)
	case int64(n) > size-int64(len(length)):
		return nil, refuseST("a header of %d bytes in a file of %d; is the download complete?", n, size)
	}
	data := size - int64(len(length)) - int64(n)
	h, err := scanSafetensors(newScanner(r, int64(n)), data)
	if errors.Is(err, errJSON) {
		return nil, fmt.Errorf("%w: its header: %w", ErrNotSafetensors, err)
	}
	return h, err
}

// cut turns the end of a file into a refusal.
func cut(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return refuseST("it ends inside its header; is the download complete?")
	}
	return err
}

// extent is where a tensor's data lies, from the start of the data.
type extent struct{ begin, end int64 }

// scanSafetensors reads the object of a header for data bytes of data.
func scanSafetensors(s *scanner, data int64) (*stHeader, error) {
	h := &stHeader{tensors: map[string]struct{}{}, types: map[string]int64{}}
	// Where data begins and where it ends: in a file without holes and overlaps, both
	// are the same places but for the first and the last. Tensors without elements
	// take no place.
	begins := map[int64]int64{} // end, by begin
	metadata := false
	err := s.object(maxSafetensorsName, func(name string) error {
		if name == "__metadata__" {
			if metadata {
				return refuseST("__metadata__ is there twice")
			}
			metadata = true
			return s.object(1<<16, func(string) error {
				_, err := s.string(-1)
				return err
			})
		}
		if _, ok := h.tensors[name]; ok || name == "" {
			return refuseST("tensor %q is there twice, or has no name", name)
		}
		if len(h.tensors) == maxSafetensors {
			return refuseST("more than %d tensors", maxSafetensors)
		}
		h.tensors[name] = struct{}{}
		e, err := h.tensor(s, name, data)
		if err != nil || e.begin == e.end {
			return err
		}
		if _, ok := begins[e.begin]; ok {
			return refuseST("tensor %q overlaps another", name)
		}
		begins[e.begin] = e.end
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := s.finish(); err != nil {
		return nil, err
	}
	if len(h.tensors) == 0 {
		return nil, refuseST("it has no tensors")
	}
	at, seen := int64(0), 0
	for at < data {
		end, ok := begins[at]
		if !ok {
			return nil, refuseST("no tensor begins at byte %d of the data, which has %d: data overlaps, has a hole, or is longer than its header says", at, data)
		}
		at = end
		seen++
	}
	if seen != len(begins) {
		return nil, refuseST("tensors overlap")
	}
	return h, nil
}

// tensor reads one tensor's object.
func (h *stHeader) tensor(s *scanner, name string, data int64) (extent, error) {
	var (
		e        extent
		dtype    string
		elements = int64(-1)
		offsets  bool
	)
	err := s.object(32, func(key string) error {
		switch {
		case key == "dtype" && dtype == "":
			v, err := s.string(32)
			if err != nil {
				return err
			}
			if dtypes[v] == 0 {
				return refuseST("tensor %q has the unknown type %q", name, v)
			}
			dtype = v
			return nil
		case key == "shape" && elements < 0:
			elements = 1
			dimensions := 0
			return s.array(func() error {
				d, err := s.integer()
				if err != nil {
					return err
				}
				if dimensions++; dimensions > maxShape {
					return refuseST("tensor %q has more than %d dimensions", name, maxShape)
				}
				// 2^50 elements are beyond any file.
				if d > 1<<50 || d > 0 && elements > (1<<50)/d {
					return refuseST("tensor %q has a dimension of %d", name, d)
				}
				elements *= d
				return nil
			})
		case key == "data_offsets" && !offsets:
			offsets = true
			i := 0
			err := s.array(func() error {
				v, err := s.integer()
				if err != nil {
					return err
				}
				switch i++; i {
				case 1:
					e.begin = v
				case 2:
					e.end = v
				}
				return nil
			})
			if err == nil && i != 2 {
				err = refuseST("tensor %q has %d data offsets, expected 2", name, i)
			}
			return err
		}
		return refuseST("tensor %q has the field %q, which is unknown or there twice", name, key)
	})
	if err != nil {
		return e, err
	}
	if dtype == "" || elements < 0 || !offsets {
		return e, refuseST("tensor %q lacks dtype, shape or data_offsets", name)
	}
	if e.begin > e.end || e.end > data {
		return e, refuseST("tensor %q has bytes %d to %d of the data, which has %d; is the download complete?", name, e.begin, e.end, data)
	}
	bits := elements * dtypes[dtype] // below 2^56
	if bits%8 != 0 || e.end-e.begin != bits/8 {
		return e, refuseST("tensor %q has %d elements of %s and %d bytes of data", name, elements, dtype, e.end-e.begin)
	}
	if h.parameters > math.MaxInt64-elements {
		return e, refuseST("more than 2^63 elements")
	}
	h.parameters += elements
	h.types[dtype] += e.end - e.begin
	return e, nil
}

// readIndex reads a model.safetensors.index.json: the file that each tensor is in.
func readIndex(r io.Reader, size int64) (map[string]string, error) {
	if size > maxIndex {
		return nil, refuseST("an index of %d bytes; at most %d are allowed", size, maxIndex)
	}
	s := newScanner(r, size)
	shards := map[string]string{} // so that each name is held once
	var index map[string]string
	err := s.object(256, func(key string) error {
		if key != "weight_map" {
			return s.skip()
		}
		if index != nil {
			return refuseST("weight_map is there twice")
		}
		index = map[string]string{}
		return s.object(maxSafetensorsName, func(name string) error {
			if _, ok := index[name]; ok {
				return refuseST("tensor %q is there twice", name)
			}
			if len(index) == maxSafetensors {
				return refuseST("more than %d tensors", maxSafetensors)
			}
			shard, err := s.string(maxSafetensorsName)
			if err != nil {
				return err
			}
			if _, ok := shards[shard]; !ok {
				shards[shard] = shard
			}
			index[name] = shards[shard]
			return nil
		})
	})
	if err == nil {
		err = s.finish()
	}
	if errors.Is(err, errJSON) {
		err = fmt.Errorf("%w: %w", ErrNotSafetensors, err)
	}
	if err != nil {
		return nil, err
	}
	if len(index) == 0 {
		return nil, refuseST("it names no tensors in weight_map")
	}
	return index, nil
}
