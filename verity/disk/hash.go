package disk

import (
	"chrysalis/verity"
	"chrysalis/verity/sha256x2"
)

// Programs that make disks hash two blocks at a time, here and in package verity.
func init() {
	verity.UseHasher(func(salt []byte) verity.BlockHasher { return sha256x2.NewSalted(salt, verity.BlockSize) })
}

// A hasher makes leaf hash blocks, for one goroutine.
type hasher struct {
	*sha256x2.Salted
	leaf []byte
}

func newHasher(salt []byte) *hasher {
	return &hasher{sha256x2.NewSalted(salt, verity.BlockSize), make([]byte, verity.BlockSize)}
}

// makeLeaf returns the leaf over whole blocks, up to a group; it holds until the
// next.
func (h *hasher) makeLeaf(data []byte) []byte {
	clear(h.leaf)
	h.Sum(h.leaf, data)
	return h.leaf
}

// makeLeafWith is makeLeaf, while f takes part of the data.
func (h *hasher) makeLeafWith(data []byte, f *sha256x2.Stream, part []byte) []byte {
	clear(h.leaf)
	h.SumWith(h.leaf, data, f, part)
	return h.leaf
}
