//go:build amd64 && !purego

package sha256x2

var fast = detect()

// blocks2 takes n chunks of 64 bytes from a into stateA and n from b into stateB:
// FIPS 180-4 section 6.2.2 for two messages at once. n may be 0. The states must
// not overlap; a and b may. It needs SSSE3, SSE4.1 and the SHA extensions (see
// detect).
//
//go:noescape
func blocks2(stateA, stateB *state, a, b *byte, n int)

// cpuid returns what the instruction CPUID does for a leaf and a subleaf.
func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

// detect reports whether the processor can run blocks2. The bits are in Intel's
// Software Developer's Manual, volume 2A, instruction CPUID.
func detect() bool {
	const (
		ssse3 = 1 << 9  // leaf 1, ECX
		sse41 = 1 << 19 // leaf 1, ECX
		sha   = 1 << 29 // leaf 7, EBX
	)
	if leaves, _, _, _ := cpuid(0, 0); leaves < 7 {
		return false
	}
	_, _, c, _ := cpuid(1, 0)
	_, b, _, _ := cpuid(7, 0)
	return c&ssse3 != 0 && c&sse41 != 0 && b&sha != 0
}
