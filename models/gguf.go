package models

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// ErrNotGGUF is what every refusal of a GGUF header wraps.
var ErrNotGGUF = errors.New("not a usable GGUF file")

// Bounds of a header. The largest models known have some 2,000 tensors, and
// 30 MB of header, most of it the vocabulary.
const (
	maxHeader     = 256 << 20
	maxKeys       = 64 << 10
	maxTensors    = 64 << 10
	maxKeyLength  = 1 << 16 // the specification's limit
	maxTensorName = 64      // GGML_MAX_NAME
	maxDimensions = 4       // GGML_MAX_DIMS
)

// CheckGGUF reads the header of the GGUF file of size bytes that r begins with, and
// nothing behind it: magic, version 2 or 3 (little-endian), every key and every
// tensor's place. It refuses duplicate keys and tensors, tensors that overlap, and
// a file that is too short for one. It does not load weights, and it does not say
// that a model works. Memory stays within the number of keys and tensors.
//
// Format: ggml's docs/gguf.md. Errors wrap ErrNotGGUF, or are r's.
func CheckGGUF(r io.Reader, size int64) error {
	_, err := readGGUF(r, size)
	return err
}

// ggufHeader is what a GGUF header says.
type ggufHeader struct {
	architecture  string
	licence       string
	contextLength int64
	fileType      int64 // llama.cpp's llama_ftype, or -1
	parameters    int64
	types         map[uint32]int64 // elements of each tensor type
	tensors       map[string]bool
	// Of a part of a split model; parts is 0 if it is none.
	part, parts, allTensors int64
}

func readGGUF(r io.Reader, size int64) (*ggufHeader, error) {
	limit := min(size, maxHeader)
	h := &header{r: bufio.NewReaderSize(io.LimitReader(r, limit), 64<<10), limit: limit}
	out := &ggufHeader{fileType: -1, types: map[uint32]int64{}, tensors: map[string]bool{}}
	err := h.check(size, out)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		if size > maxHeader {
			return nil, fmt.Errorf("%w: its header is longer than %d bytes", ErrNotGGUF, maxHeader)
		}
		return nil, fmt.Errorf("%w: it ends after %d bytes, inside its header; is the download complete?", ErrNotGGUF, size)
	}
	return out, err
}

// header reads a header from its start and counts bytes.
type header struct {
	r     *bufio.Reader
	at    int64
	limit int64 // no read can get past this byte
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrNotGGUF}, args...)...)
}

func (h *header) check(size int64, out *ggufHeader) error {
	magic, err := h.bytes(4)
	if err != nil {
		return err
	}
	if string(magic) != "GGUF" {
		return refuse("it does not start with GGUF; convert the model to GGUF first")
	}
	version, err := h.uint32()
	if err != nil {
		return err
	}
	if version != 2 && version != 3 {
		return refuse("version %d; 2 and 3 are known", version)
	}
	tensors, err := h.uint64()
	if err != nil {
		return err
	}
	keys, err := h.uint64()
	if err != nil {
		return err
	}
	// The first part of a split model may have no tensors.
	if tensors > maxTensors || keys == 0 || keys > maxKeys {
		return refuse("%d tensors and %d keys", tensors, keys)
	}

	alignment := uint64(32)
	var contextKey string // follows from the architecture, which comes first
	seen := make(map[string]bool)
	for range keys {
		key, err := h.string(maxKeyLength)
		if err != nil {
			return err
		}
		if key == "" || seen[key] {
			return refuse("key %q is empty or there twice", key)
		}
		seen[key] = true
		typ, err := h.uint32()
		if err != nil {
			return err
		}
		switch {
		case key == "general.alignment" && typ == typeUint32:
			v, err := h.uint32()
			if err != nil {
				return err
			}
			if v == 0 || v&(v-1) != 0 || v > 1<<20 {
				return refuse("alignment of %d bytes", v)
			}
			alignment = uint64(v)
		case key == "general.alignment":
			return refuse("key general.alignment has type %d", typ)
		case key == "general.architecture" && typ == typeString:
			s, err := h.string(maxTensorName)
			if err != nil {
				return err
			}
			out.architecture, contextKey = s, s+".context_length"
		case key == "general.license" && typ == typeString:
			s, err := h.string(4096)
			if err != nil {
				return err
			}
			out.licence = s
		case key == "general.file_type" && typ == typeUint32, key == contextKey && typ == typeUint32:
			v, err := h.uint32()
			if err != nil {
				return err
			}
			if key == contextKey {
				out.contextLength = int64(v)
			} else {
				out.fileType = int64(v)
			}
		case (key == "split.no" || key == "split.count") && typ == typeUint16:
			b, err := h.bytes(2)
			if err != nil {
				return err
			}
			v := int64(binary.LittleEndian.Uint16(b))
			if key == "split.no" {
				out.part = v
			} else {
				out.parts = v
			}
		case key == "split.tensors.count" && typ == typeInt32:
			v, err := h.uint32()
			if err != nil {
				return err
			}
			out.allTensors = int64(v)
		default:
			if err := h.skipValue(key, typ); err != nil {
				return err
			}
		}
	}
	if out.parts == 1 { // whole all the same
		out.parts = 0
	}
	// Only the first part of a split model need have the model's keys.
	if out.architecture == "" && (out.parts == 0 || out.part == 0) {
		return refuse("key general.architecture is missing")
	}

	if tensors == 0 && out.parts == 0 {
		return refuse("it has no tensors")
	}
	type tensor struct {
		name           string
		offset, length uint64 // from the start of the data section; length 0: unknown type
	}
	list := make([]tensor, 0, min(tensors, 4096))
	for range tensors {
		name, err := h.string(maxTensorName)
		if err != nil {
			return err
		}
		if out.tensors[name] {
			return refuse("tensor %q is there twice", name)
		}
		out.tensors[name] = true
		n, err := h.uint32()
		if err != nil {
			return err
		}
		if n > maxDimensions {
			return refuse("tensor %q has %d dimensions", name, n)
		}
		elements, row := uint64(1), uint64(1)
		for i := range n {
			d, err := h.uint64()
			if err != nil {
				return err
			}
			// 2^50 elements are beyond any file, and keep products small.
			if d == 0 || d > 1<<50 || elements > (1<<50)/d {
				return refuse("tensor %q has a dimension of %d", name, d)
			}
			if elements *= d; i == 0 {
				row = d
			}
		}
		typ, err := h.uint32()
		if err != nil {
			return err
		}
		offset, err := h.uint64()
		if err != nil {
			return err
		}
		if offset%alignment != 0 || offset > uint64(size) {
			return refuse("tensor %q begins at byte %d of the data, which has at most %d; is the download complete?", name, offset, size)
		}
		if out.parameters > 1<<60 {
			return refuse("more than 2^60 elements")
		}
		out.parameters += int64(elements)
		out.types[typ] += int64(elements)
		t := tensor{name: name, offset: offset}
		if e, ok := ggmlTypes[typ]; ok {
			if row%e.block != 0 {
				return refuse("tensor %q has rows of %d elements, not a multiple of %d", name, row, e.block)
			}
			t.length = elements / e.block * e.bytes
		}
		list = append(list, t)
	}

	// The data section begins at the next multiple of the alignment.
	data := (uint64(h.at) + alignment - 1) / alignment * alignment
	slices.SortFunc(list, func(a, b tensor) int { return cmp.Compare(a.offset, b.offset) })
	for i, t := range list {
		if i > 0 && t.offset < list[i-1].offset+list[i-1].length {
			return refuse("tensors %q and %q overlap", list[i-1].name, t.name)
		}
		if end := data + t.offset + t.length; end > uint64(size) {
			return refuse("tensor %q ends at byte %d, but the file has %d; is the download complete?", t.name, end, size)
		}
	}
	return nil
}

// Value types, gguf.md "gguf_metadata_value_type".
const (
	typeUint16 = 2
	typeUint32 = 4
	typeInt32  = 5
	typeString = 8
	typeArray  = 9
)

// valueSizes are the sizes in bytes of the types of fixed size.
var valueSizes = map[uint32]int64{
	0: 1, 1: 1, // uint8, int8
	2: 2, 3: 2, // uint16, int16
	4: 4, 5: 4, 6: 4, // uint32, int32, float32
	7:  1,               // bool
	10: 8, 11: 8, 12: 8, // uint64, int64, float64
}

// skipValue passes over a value. The specification allows arrays of arrays;
// no known key has one, and they are refused rather than recursed into.
func (h *header) skipValue(key string, typ uint32) error {
	if n, ok := valueSizes[typ]; ok {
		return h.skip(n)
	}
	switch typ {
	case typeString:
		return h.skipString()
	case typeArray:
		elem, err := h.uint32()
		if err != nil {
			return err
		}
		count, err := h.uint64()
		if err != nil {
			return err
		}
		if count > uint64(h.limit) { // an element takes a byte at least
			return io.ErrUnexpectedEOF
		}
		if n, ok := valueSizes[elem]; ok {
			return h.skip(n * int64(count))
		}
		if elem == typeString {
			for range count {
				if err := h.skipString(); err != nil {
					return err
				}
			}
			return nil
		}
		typ = elem
	}
	return refuse("key %q has a value of type %d", key, typ)
}

func (h *header) skip(n int64) error {
	if n < 0 || n > h.limit-h.at {
		return io.ErrUnexpectedEOF
	}
	h.at += n
	for n > 0 { // Discard takes an int
		step := int(min(n, 1<<30))
		if _, err := h.r.Discard(step); err != nil {
			return err
		}
		n -= int64(step)
	}
	return nil
}

// bytes returns the next n bytes, which the caller has bounded.
func (h *header) bytes(n int64) ([]byte, error) {
	if n > h.limit-h.at {
		return nil, io.ErrUnexpectedEOF
	}
	b := make([]byte, n)
	_, err := io.ReadFull(h.r, b)
	h.at += n
	return b, err
}

func (h *header) uint32() (uint32, error) {
	b, err := h.bytes(4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b), nil
}

func (h *header) uint64() (uint64, error) {
	b, err := h.bytes(8)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// string reads a string of at most bound bytes.
func (h *header) string(bound uint64) (string, error) {
	n, err := h.uint64()
	if err != nil {
		return "", err
	}
	if n > bound {
		return "", refuse("a name of %d bytes at byte %d; at most %d are allowed", n, h.at-8, bound)
	}
	b, err := h.bytes(int64(n))
	return string(b), err
}

func (h *header) skipString() error {
	n, err := h.uint64()
	if err != nil {
		return err
	}
	if n > uint64(h.limit) {
		return io.ErrUnexpectedEOF
	}
	return h.skip(int64(n))
}

// ggmlTypes gives for each tensor type (enum ggml_type) the elements of a
// block and its bytes. A type that is not here is let through with its size
// unchecked: new ones appear often, and the engine is the judge of them.
var ggmlTypes = map[uint32]struct{ block, bytes uint64 }{
	0:  {1, 4},     // F32
	1:  {1, 2},     // F16
	2:  {32, 18},   // Q4_0
	3:  {32, 20},   // Q4_1
	6:  {32, 22},   // Q5_0
	7:  {32, 24},   // Q5_1
	8:  {32, 34},   // Q8_0
	9:  {32, 36},   // Q8_1
	10: {256, 84},  // Q2_K
	11: {256, 110}, // Q3_K
	12: {256, 144}, // Q4_K
	13: {256, 176}, // Q5_K
	14: {256, 210}, // Q6_K
	15: {256, 292}, // Q8_K
	16: {256, 66},  // IQ2_XXS
	17: {256, 74},  // IQ2_XS
	18: {256, 98},  // IQ3_XXS
	19: {256, 50},  // IQ1_S
	20: {32, 18},   // IQ4_NL
	21: {256, 110}, // IQ3_S
	22: {256, 82},  // IQ2_S
	23: {256, 136}, // IQ4_XS
	24: {1, 1},     // I8
	25: {1, 2},     // I16
	26: {1, 4},     // I32
	27: {1, 8},     // I64
	28: {1, 8},     // F64
	29: {256, 56},  // IQ1_M
	30: {1, 2},     // BF16
	34: {256, 54},  // TQ1_0
	35: {256, 66},  // TQ2_0
	39: {32, 17},   // MXFP4
}

// fileTypes names llama.cpp's llama_ftype: what most of the tensors are.
var fileTypes = map[int64]string{
	0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
	11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
	19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S",
	27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}
