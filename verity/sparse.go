package verity

import (
	"fmt"
	"io"
	"maps"
	"slices"
)

// FinishSparse is FinishDisk for a disk of which only some groups of data are
// there, given by the leaf hash blocks over them, by group. Whatever else is read
// of the data does not match. It lets a test have a disk far larger than the room
// for it, in time and memory that grow with leaves alone.
func FinishSparse(disk io.WriterAt, size int64, leaves map[uint64][]byte, o TreeOptions) (Description, error) {
	blocks, err := checkBlocks(size)
	if err != nil || blocks == 1 {
		return Description{}, fmt.Errorf("finish sparse disk: %d bytes of data: %w", size, err)
	}
	l := Layout(blocks)
	sizes := levelSizes(blocks)
	starts := levelStarts(sizes)
	h := newHasher(o.Salt)
	level := leaves
	for i := range sizes {
		above := map[uint64][]byte{}
		for _, at := range slices.Sorted(maps.Keys(level)) {
			if _, err := disk.WriteAt(level[at], l.HashOffset+int64(starts[i]+at)*BlockSize); err != nil {
				return Description{}, fmt.Errorf("finish sparse disk: %w", err)
			}
			up := at / perHashBlock
			if above[up] == nil {
				above[up] = make([]byte, BlockSize)
			}
			h.sum(above[up][at%perHashBlock*digestSize:], level[at])
		}
		level = above
	}
	sb := Superblock{UUID: o.UUID, Salt: o.Salt, DataBlocks: blocks}.encode()
	if _, err := disk.WriteAt(sb[:], l.HashOffset); err != nil {
		return Description{}, fmt.Errorf("finish sparse disk: %w", err)
	}
	return finishDisk(disk, blocks, RootHash(level[0][:digestSize]), o)
}
