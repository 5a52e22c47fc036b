//go:build !amd64 || purego

package sha256x2

const fast = false

func blocks2(stateA, stateB *state, a, b *byte, n int) { panic("sha256x2: no blocks2 here") }
