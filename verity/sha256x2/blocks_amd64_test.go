//go:build amd64 && !purego

package sha256x2

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// TestBlocks2 compares each lane with crypto/sha256's state after the same chunks,
// from states that are not the initial one, at every alignment, also with the lanes
// exchanged and on the same bytes.
func TestBlocks2(t *testing.T) {
	if !fast {
		t.Skip("the processor has no SHA extensions")
	}
	random := rand.NewChaCha8([32]byte{9})
	data := make([]byte, 64+2*20*chunk)
	random.Read(data)
	var a, b state
	for i := range a {
		a[i], b[i] = uint32(random.Uint64()), uint32(random.Uint64())
	}
	for n := range 20 {
		for off := range 32 {
			pa, pb := data[off:], data[20*chunk+(off*7)%32:]
			if off%5 == 0 {
				pb = pa
			}
			a0, b0 := a, b
			blocks2(&a, &b, &pa[0], &pb[0], n)
			if want := after(t, a0, pa[:n*chunk]); a != want {
				t.Fatalf("%d chunks, lane A: %x, want %x", n, a, want)
			}
			if want := after(t, b0, pb[:n*chunk]); b != want {
				t.Fatalf("%d chunks, lane B: %x, want %x", n, b, want)
			}
			blocks2(&b0, &a0, &pb[0], &pa[0], n)
			if a0 != a || b0 != b {
				t.Fatalf("%d chunks: other states with the lanes exchanged", n)
			}
		}
	}
}

// after returns what crypto/sha256 makes of a state.
func after(t *testing.T, h state, p []byte) state {
	t.Helper()
	buf := []byte(stateMagic)
	for _, v := range h {
		buf = binary.BigEndian.AppendUint32(buf, v)
	}
	buf = append(buf, make([]byte, chunk+8)...)
	d := sha256.New()
	if err := d.(encoding.BinaryUnmarshaler).UnmarshalBinary(buf); err != nil {
		t.Fatal(err)
	}
	d.Write(p)
	buf, err := d.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	for i := range h {
		h[i] = binary.BigEndian.Uint32(buf[len(stateMagic)+4*i:])
	}
	return h
}

// TestState sees to it that crypto/sha256's state is still encoded as load and store
// expect: without that the fast way is not taken, and nothing else would tell.
func TestState(t *testing.T) {
	f := NewStream()
	f.Write(make([]byte, 100))
	if length, ok := f.encoded(); !ok || length != 100 {
		t.Errorf("encoded says %d, %t", length, ok)
	}
	if n := f.missing(); n != 28 {
		t.Errorf("missing says %d", n)
	}
}
