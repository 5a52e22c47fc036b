package verity

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// A Superblock is what `veritysetup format` writes at the start of a hash
// area. Only the host parses it, and only to describe a disk: nothing covers
// it, so the VM skips it and takes these values from the manifest.
type Superblock struct {
	UUID       [16]byte // in the order of its text form
	Salt       []byte   // at most MaxSalt bytes
	DataBlocks uint64   // 1 to MaxDataBlocks
}

// superblockSize is the length in bytes of struct verity_sb; the rest of its
// block is zero.
const superblockSize = 512

var superblockMagic = []byte("verity\x00\x00")

// encode returns struct verity_sb (cryptsetup, lib/verity/verity.c):
//
//	0   8   "verity\0\0"
//	8   4   version, 1
//	12  4   hash type, 1: the salt is hashed before the block
//	16  16  UUID
//	32  32  "sha256", zero-padded
//	64  4   data block size
//	68  4   hash block size
//	72  8   data blocks
//	80  2   length of the salt
//	82  6   zero
//	88  256 salt, zero-padded
//	344 168 zero
//
// Integers are little-endian.
func (s Superblock) encode() [superblockSize]byte {
	var b [superblockSize]byte
	copy(b[0:], superblockMagic)
	binary.LittleEndian.PutUint32(b[8:], 1)
	binary.LittleEndian.PutUint32(b[12:], 1)
	copy(b[16:], s.UUID[:])
	copy(b[32:], "sha256")
	binary.LittleEndian.PutUint32(b[64:], BlockSize)
	binary.LittleEndian.PutUint32(b[68:], BlockSize)
	binary.LittleEndian.PutUint64(b[72:], s.DataBlocks)
	binary.LittleEndian.PutUint16(b[80:], uint16(len(s.Salt)))
	copy(b[88:], s.Salt)
	return b
}

// ParseSuperblock reads the 512 bytes of a superblock. It accepts only what
// this package and `veritysetup format` with its default algorithm and block
// sizes write: every other byte must be zero. Errors wrap ErrInvalid.
func ParseSuperblock(b []byte) (Superblock, error) {
	if len(b) != superblockSize {
		return Superblock{}, fmt.Errorf("%w: superblock of %d bytes", ErrInvalid, len(b))
	}
	s := Superblock{
		UUID:       [16]byte(b[16:32]),
		DataBlocks: binary.LittleEndian.Uint64(b[72:]),
	}
	n := int(binary.LittleEndian.Uint16(b[80:]))
	if n > MaxSalt {
		return Superblock{}, fmt.Errorf("%w: salt of %d bytes in the superblock", ErrInvalid, n)
	}
	if s.DataBlocks == 0 || s.DataBlocks > MaxDataBlocks {
		return Superblock{}, fmt.Errorf("%w: %d data blocks in the superblock", ErrInvalid, s.DataBlocks)
	}
	s.Salt = bytes.Clone(b[88:][:n])
	// One comparison stands for a check of each remaining field.
	if want := s.encode(); !bytes.Equal(b, want[:]) {
		return Superblock{}, fmt.Errorf("%w: superblock is not version 1, format 1, sha256, %d-byte blocks", ErrInvalid, BlockSize)
	}
	return s, nil
}
