package disk

import (
	"chrysalis/verity"
	"chrysalis/verity/sha256x2"
)

// Programs that make disks hash two blocks at a time, here and in package verity.
func init() {
	verity.UseHasher(func(salt []byte) verity.BlockHasher { return newHasher(salt) })
}

func newHasher(salt []byte) *sha256x2.Salted { return sha256x2.NewSalted(salt, verity.BlockSize) }
