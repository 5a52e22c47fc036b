// Package verity makes and opens Chrysalis's verity disks: a GPT whose first
// partition is a read-only file system and whose second is the dm-verity hash
// tree over it (SHA-256, 4096-byte blocks, format 1). The partitions' UUIDs
// are the two halves of the root hash, so that the root hash alone finds a
// disk, on whatever bus it sits.
//
// The two sides trust a disk differently, and the API keeps them apart:
//
//   - The host makes disks (WriteDisk, FinishDisk) and looks at them (OpenDisk,
//     VerifyDisk). It may parse what the disk says about itself.
//   - The VM trusts nothing on a disk. Root hash, salt and number of blocks
//     come from the measured manifest; FindPartitions reads the two byte
//     offsets from the GPT and nothing else; the kernel checks every block
//     that is read (Params.Activate, Params.Find). A block that does not
//     match is an I/O error, never data, and Watch tells of it.
//
// Formats: cryptsetup's "DMVerity" on-disk format page, the kernel's
// Documentation/admin-guide/device-mapper/verity.rst, and the UAPI group's
// Discoverable Partitions Specification.
package verity

import (
	"encoding/hex"
	"errors"
	"fmt"

	"chrysalis/verity/gpt"
)

const (
	// BlockSize is the size in bytes of a data block and of a hash block.
	BlockSize = 4096
	// MaxSalt is the length in bytes of the longest salt.
	MaxSalt = 256
	// MaxDataBlocks is the most data blocks a disk can have (16 TiB): EROFS
	// numbers its blocks in 32 bits.
	MaxDataBlocks = 1 << 32

	digestSize   = 32
	perHashBlock = BlockSize / digestSize // 128
)

var (
	// ErrInvalid says that a disk is not a verity disk as this package
	// writes it.
	ErrInvalid = errors.New("not a valid verity disk")
	// ErrNotFound says that no disk carries the wanted root hash.
	ErrNotFound = errors.New("no disk with this root hash")
	// ErrCorrupt says that a disk carries the right UUIDs, but data or a hash
	// tree that does not match the root hash.
	ErrCorrupt = errors.New("disk is corrupt")
)

// A RootHash is the SHA-256 at the root of a hash tree.
type RootHash [digestSize]byte

// ParseRootHash reads 64 lower-case hexadecimal digits, and nothing else.
func ParseRootHash(s string) (RootHash, error) {
	var r RootHash
	if len(s) != 2*len(r) {
		return r, fmt.Errorf("root hash has %d characters: want 64 lower-case hexadecimal digits", len(s))
	}
	if _, err := hex.Decode(r[:], []byte(s)); err != nil || r.String() != s {
		return RootHash{}, fmt.Errorf("root hash %q: want 64 lower-case hexadecimal digits", s)
	}
	return r, nil
}

// String returns 64 lower-case hexadecimal digits.
func (r RootHash) String() string { return hex.EncodeToString(r[:]) }

// MarshalText returns String's form, for JSON.
func (r RootHash) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText accepts what ParseRootHash accepts.
func (r *RootHash) UnmarshalText(b []byte) error {
	v, err := ParseRootHash(string(b))
	if err == nil {
		*r = v
	}
	return err
}

// PartitionUUIDs returns the UUIDs of the data and of the hash partition: the
// first and the last 128 bits of the root hash (Discoverable Partitions
// Specification, "Verity"). A UUID's text form has the digits of its half in
// order, as in systemd.
func (r RootHash) PartitionUUIDs() (data, hash gpt.GUID) {
	return gpt.GUID(r[:16]), gpt.GUID(r[16:])
}

// levelSizes returns the number of hash blocks of each level of the tree over
// n data blocks, from the leaves (digests of data) up to the single top block.
// One data block has no level: its digest is the root hash.
func levelSizes(n uint64) []uint64 {
	var sizes []uint64
	for n > 1 {
		n = (n + perHashBlock - 1) / perHashBlock
		sizes = append(sizes, n)
	}
	return sizes
}

// HashBlocks returns the size of the hash area over n data blocks, in blocks:
// one for the superblock and the rest for the tree.
func HashBlocks(n uint64) uint64 {
	total := uint64(1)
	for _, s := range levelSizes(n) {
		total += s
	}
	return total
}

// levelStarts returns the block of the hash area at which each level begins.
// cryptsetup puts the top level right after the superblock and the leaves
// last (lib/verity/verity_hash.c, hash_levels).
func levelStarts(sizes []uint64) []uint64 {
	starts := make([]uint64, len(sizes))
	next := uint64(1)
	for i := len(sizes) - 1; i >= 0; i-- {
		starts[i] = next
		next += sizes[i]
	}
	return starts
}

// checkBlocks returns the number of blocks in size bytes.
func checkBlocks(size int64) (uint64, error) {
	if size <= 0 || size%BlockSize != 0 || uint64(size)/BlockSize > MaxDataBlocks {
		return 0, fmt.Errorf("data of %d bytes: want a whole number of %d-byte blocks, at least one and at most 2^32", size, BlockSize)
	}
	return uint64(size) / BlockSize, nil
}
