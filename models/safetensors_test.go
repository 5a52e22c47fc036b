package models

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"testing"
)

func checkST(b []byte) error { return CheckSafetensors(bytes.NewReader(b), int64(len(b))) }

func TestCheckSafetensorsAccepts(t *testing.T) {
	for name, b := range map[string][]byte{
		"one":         shard("a"),
		"several":     shard("a", "b", "c"),
		"any order":   safetensors(`{"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]},"a":{"shape":[4],"data_offsets":[0,4],"dtype":"I8"}}`, 8),
		"padded":      safetensors(`{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}    `, 8),
		"metadata":    safetensors(`{"__metadata__":{"format":"pt"},"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}`, 8),
		"no elements": safetensors(`{"a":{"dtype":"F32","shape":[0,9],"data_offsets":[0,0]},"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"c":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`, 1),
		"half bytes":  safetensors(`{"a":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}`, 3),
	} {
		if err := checkST(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckSafetensorsRefuses(t *testing.T) {
	one := func(dtype, shape, offsets string, data int) []byte {
		return safetensors(`{"a":{"dtype":"`+dtype+`","shape":`+shape+`,"data_offsets":`+offsets+`}}`, data)
	}
	length := func(n uint64, rest string) []byte { return append(binary.LittleEndian.AppendUint64(nil, n), rest...) }
	two := func(a, b string, data int) []byte {
		return safetensors(`{"a":{"dtype":"U8","shape":[4],"data_offsets":`+a+`},"b":{"dtype":"U8","shape":[4],"data_offsets":`+b+`}}`, data)
	}
	for _, tt := range []struct {
		name string
		file []byte
		says string
	}{
		{"empty", nil, "download"},
		{"header of 2^63", length(1<<63, "{}"), "header of 9223372036854775808"},
		{"header of 2^64-1", length(1<<64-1, "{}"), "header of"},
		{"header longer than the file", length(1000, "{}"), "download"},
		{"header of nothing", length(0, ""), "header of 0"},
		{"no tensors", safetensors(`{}`, 0), "no tensors"},
		{"not an object", safetensors(`[]`, 0), "expected '{'"},
		{"data behind the header", safetensors(`{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}x`, 4), "behind the end"},
		{"nested", safetensors(strings.Repeat(`{"a":`, 50000), 0), "unknown or there twice"},
		{"nested arrays", one("U8", strings.Repeat("[", 50000), "[0,1]", 1), "integer"},
		{"unknown type", one("Q4", "[4]", "[0,4]", 4), "unknown type"},
		{"shape against size", one("F32", "[4]", "[0,4]", 4), "4 elements of F32 and 4 bytes"},
		{"a shape that wraps", one("U8", "[4294967296,4294967296,4294967296]", "[0,4]", 4), "dimension"},
		{"a dimension beyond int64", one("U8", "[9223372036854775808]", "[0,4]", 4), "integer"},
		{"a negative dimension", one("U8", "[-4]", "[0,4]", 4), "integer"},
		{"a fraction", one("U8", "[4.0]", "[0,4]", 4), "integer"},
		{"too many dimensions", one("U8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]", 1), "dimensions"},
		{"offsets the wrong way round", one("U8", "[4]", "[4,0]", 4), "bytes 4 to 0"},
		{"offsets behind the end", one("U8", "[4]", "[0,4]", 3), "download"},
		{"three offsets", one("U8", "[4]", "[0,4,8]", 4), "3 data offsets"},
		{"data not named", one("U8", "[4]", "[0,4]", 5), "longer than its header says"},
		{"a hole", two("[0,4]", "[5,9]", 9), "hole"},
		{"overlap", two("[0,4]", "[2,6]", 6), "overlap"},
		{"the same place", two("[0,4]", "[0,4]", 4), "overlaps another"},
		{"half a byte", one("F4", "[3]", "[0,2]", 2), "elements"},
		{"a name twice", safetensors(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}`, 2), "twice"},
		{"an unknown field", safetensors(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}`, 1), `"x"`},
		{"a field twice", safetensors(`{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}`, 1), "twice"},
		{"a field missing", safetensors(`{"a":{"dtype":"U8","shape":[1]}}`, 1), "lacks"},
		{"metadata twice", safetensors(`{"__metadata__":{},"__metadata__":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`, 1), "twice"},
		{"metadata of numbers", safetensors(`{"__metadata__":{"a":1}}`, 0), "expected"},
		{"a long name", safetensors(`{"`+strings.Repeat("x", 1000)+`":{}}`, 0), "more than 512"},
		{"not UTF-8", safetensors("{\"\xff\xfe\":{}}", 0), "UTF-8"},
		{"half a surrogate pair", safetensors(`{"\ud800":{}}`, 0), "surrogate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := checkST(tt.file)
			if !errors.Is(err, ErrNotSafetensors) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want one about %q", err, tt.says)
			}
		})
	}
}

// A header that claims a billion tensors, or a huge shape, is refused without
// memory for them.
func TestHostileHeadersTakeNoMemory(t *testing.T) {
	var long bytes.Buffer
	long.WriteString(`{"weight_map":{"` + strings.Repeat("x", 60<<20))
	for name, check := range map[string]func() error{
		"tensors": func() error { return check(build(shape{count: 1 << 30})) },
		"array": func() error {
			return check(build(shape{keys: func(g *gguf) uint64 { g.str("k").u32(typeArray).u32(typeString).u64(1 << 40); return 1 }}))
		},
		"header": func() error { return checkST(append(binary.LittleEndian.AppendUint64(nil, 99_000_000), "{}"...)) },
		"index": func() error {
			_, err := readIndex(bytes.NewReader(long.Bytes()), int64(long.Len()))
			return err
		},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := check()
		runtime.ReadMemStats(&after)
		if grown := after.TotalAlloc - before.TotalAlloc; err == nil || grown > 1<<20 {
			t.Errorf("%s: %v, after %d bytes", name, err, grown)
		}
	}
}

func FuzzCheckSafetensors(f *testing.F) {
	f.Add(shard("a", "b"))
	f.Add(safetensors(`{"__metadata__":{"a":"\u00e9\ud83d\ude00"},"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}  `, 1))
	f.Add(safetensors(`{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}`, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := checkST(b); err != nil && !errors.Is(err, ErrNotSafetensors) {
			t.Errorf("%v does not wrap ErrNotSafetensors", err)
		}
	})
}

// FuzzScanner compares the scanner's verdict with encoding/json's, which is more
// lenient where it says so.
func FuzzScanner(f *testing.F) {
	for _, s := range []string{`{"a":[1,2.5e-3,null,true,"\u00e9\n"]}`, `[]`, `"x`, `01`, `{"a":1,}`, `[1,]`, `-`, `1e`, `nul`, `"\ud800"`, `{"a" :1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := newScanner(bytes.NewReader(b), int64(len(b)))
		err := s.skip()
		if err == nil {
			err = s.finish()
		}
		if err == nil && !jsonValid(b) {
			t.Errorf("accepted %q", b)
		}
		if err != nil && !errors.Is(err, errJSON) {
			t.Errorf("%v does not wrap errJSON", err)
		}
		c := newScanner(bytes.NewReader(b), int64(len(b)))
		if _, err := c.string(16); err == nil && !jsonValid(bytes.TrimSpace(b[:c.at])) {
			t.Errorf("accepted the string %q", b)
		}
		_, _ = readConfig(bytes.NewReader(b), int64(len(b)))
		_, _ = readIndex(bytes.NewReader(b), int64(len(b)))
	})
}

func jsonValid(b []byte) bool { return json.Valid(b) }
