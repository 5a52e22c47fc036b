package sha256x2_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"testing"

	"chrysalis/verity/sha256x2"
)

func random(seed byte, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// oracle is what crypto/sha256 makes of the same blocks.
func oracle(salt, data []byte, length int) []byte {
	var out []byte
	for ; len(data) > 0; data = data[length:] {
		sum := sha256.Sum256(append(salt[:len(salt):len(salt)], data[:length]...))
		out = append(out, sum[:]...)
	}
	return out
}

// TestSum goes through every length of salt, which decides where a block's chunks
// begin, with even and odd numbers of blocks at every alignment.
func TestSum(t *testing.T) {
	for _, length := range []int{64, 128, 4096} {
		salts := 256
		if length == 4096 && testing.Short() {
			salts = 70
		}
		for n := range salts + 1 {
			salt := random(1, n)
			s := sha256x2.NewSalted(salt, length)
			for blocks := range 6 {
				off := (n + blocks) % 17
				data := random(byte(n), off+blocks*length)[off:]
				// A byte more on either side must stay what it is.
				got := bytes.Repeat([]byte{0x5a}, 1+32*blocks+1)
				s.Sum(got[1:1+32*blocks], data)
				want := append(append([]byte{0x5a}, oracle(salt, data, length)...), 0x5a)
				if !bytes.Equal(got, want) {
					t.Fatalf("salt of %d bytes, %d blocks of %d bytes: %x, want %x", n, blocks, length, got, want)
				}
			}
		}
	}
}

// TestSumWith has the stream at every place in a chunk, and longer, shorter and as
// long as the blocks.
func TestSumWith(t *testing.T) {
	const length = 4096
	data := random(2, 9*length)
	for _, saltLen := range []int{0, 1, 32, 55, 56, 64, 100, 256} {
		salt := random(3, saltLen)
		s := sha256x2.NewSalted(salt, length)
		for before := range 130 {
			for _, part := range []int{0, 1, 63, 64, 65, 4095, 4096, 4160, 4161, 4224, 8*4096 + 17, 9 * 4096} {
				blocks := (before + part) % 10
				f, want := sha256x2.NewStream(), sha256.New()
				f.Write(data[:before])
				want.Write(data[:before])
				digests := make([]byte, 32*blocks)
				s.SumWith(digests, data[:blocks*length], f, data[:part])
				want.Write(data[:part])
				if got := f.Sum(nil); !bytes.Equal(got, want.Sum(nil)) {
					t.Fatalf("salt %d, %d bytes before, %d blocks, %d bytes: stream %x, want %x", saltLen, before, blocks, part, got, want.Sum(nil))
				}
				if !bytes.Equal(digests, oracle(salt, data[:blocks*length], length)) {
					t.Fatalf("salt %d, %d bytes before, %d blocks, %d bytes: other digests", saltLen, before, blocks, part)
				}
				// It goes on from there, and its state is crypto/sha256's.
				state, err := f.MarshalBinary()
				if err != nil {
					t.Fatal(err)
				}
				g := sha256x2.NewStream()
				if err := g.UnmarshalBinary(state); err != nil {
					t.Fatal(err)
				}
				g.Write(data[:777])
				want.Write(data[:777])
				if !bytes.Equal(g.Sum(nil), want.Sum(nil)) {
					t.Fatal("a stream taken up again has another digest")
				}
			}
		}
	}
}

// TestVectors has the messages of one and two chunks in the examples to FIPS 180-4,
// as a salt and a stream of any length can make them.
func TestVectors(t *testing.T) {
	f := sha256x2.NewStream()
	sha256x2.NewSalted(nil, 64).SumWith(nil, nil, f, []byte("abc"))
	if got := hex.EncodeToString(f.Sum(nil)); got != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" {
		t.Errorf("abc: %s", got)
	}
	// A million times "a": the last example.
	data := bytes.Repeat([]byte("a"), 1_000_000)
	f.Reset()
	s := sha256x2.NewSalted(nil, len(data))
	digest := make([]byte, 32)
	s.SumWith(digest, data, f, data)
	const want = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
	if a, b := hex.EncodeToString(digest), hex.EncodeToString(f.Sum(nil)); a != want || b != want {
		t.Errorf("a million: %s and %s", a, b)
	}
	two := make([]byte, 64)
	if s.Sum(two, append(data, data...)); hex.EncodeToString(two) != want+want {
		t.Errorf("twice a million: %x", two)
	}
}

func TestPanics(t *testing.T) {
	s := sha256x2.NewSalted(nil, 128)
	for name, f := range map[string]func(){
		"length of no chunk": func() { sha256x2.NewSalted(nil, 100) },
		"length 0":           func() { sha256x2.NewSalted(nil, 0) },
		"half a block":       func() { s.Sum(make([]byte, 32), make([]byte, 64)) },
		"digests too short":  func() { s.Sum(make([]byte, 31), make([]byte, 128)) },
		"half a block with":  func() { s.SumWith(make([]byte, 32), make([]byte, 64), sha256x2.NewStream(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f()
		})
	}
}

func FuzzSumWith(f *testing.F) {
	f.Add([]byte("salt"), bytes.Repeat([]byte("x"), 1000), uint8(3), uint16(500))
	f.Add([]byte{}, bytes.Repeat([]byte("y"), 300), uint8(0), uint16(300))
	f.Fuzz(func(t *testing.T, salt, data []byte, before uint8, part uint16) {
		const length = 128
		start := min(int(before), len(data))
		head, data := data[:start], data[start:]
		p := data[:min(int(part), len(data))]
		whole := data[:len(data)/length*length]
		s := sha256x2.NewSalted(salt, length)
		stream := sha256x2.NewStream()
		stream.Write(head)
		digests := make([]byte, len(whole)/length*32)
		s.SumWith(digests, whole, stream, p)
		if want := sha256.Sum256(append(head[:len(head):len(head)], p...)); !bytes.Equal(stream.Sum(nil), want[:]) {
			t.Errorf("stream %x, want %x", stream.Sum(nil), want)
		}
		if !bytes.Equal(digests, oracle(salt, whole, length)) {
			t.Error("other digests")
		}
	})
}

// BenchmarkSum compares one hash at a time with two: the time for a verity group's
// block digests; for a file's hash alone; and for both.
func BenchmarkSum(b *testing.B) {
	const length, group = 4096, 128 * 4096
	data, salt := random(4, group), random(5, 32)
	digests := make([]byte, 32*group/length)
	one := func() {
		h := sha256.New()
		for i := 0; i < group; i += length {
			h.Reset()
			h.Write(salt)
			h.Write(data[i : i+length])
			h.Sum(digests[i/length*32 : i/length*32])
		}
	}
	s, file, stream := sha256x2.NewSalted(salt, length), sha256.New(), sha256x2.NewStream()
	for _, c := range []struct {
		name string
		do   func()
	}{
		{"stream/one", func() { file.Write(data) }},
		{"blocks/one", one},
		{"blocks/two", func() { s.Sum(digests, data) }},
		{"both/one", func() { one(); file.Write(data) }},
		{"both/two", func() { s.SumWith(digests, data, stream, data) }},
	} {
		b.Run(fmt.Sprintf("%s,fast=%t", c.name, sha256x2.Fast()), func(b *testing.B) {
			b.SetBytes(group)
			for b.Loop() {
				c.do()
			}
		})
	}
}
