package disk

import (
	"bytes"
	"fmt"
	"os"

	"chrysalis/verity"
)

// WriteSparse makes a disk with two files, of which the first is not there: it has
// a size, and reading it fails. It is for tests of what reads disks that are larger
// than any room for them.
func WriteSparse(out, absent string, size int64, present string, content []byte) (verity.Description, error) {
	t := newTree()
	hole, err := t.add(Entry{Path: absent, Mode: 0o444, Size: size})
	if err != nil {
		return verity.Description{}, err
	}
	file, err := t.add(Entry{Path: present, Mode: 0o444, Size: int64(len(content))})
	if err != nil {
		return verity.Description{}, err
	}
	hole.block = 1
	tail := 1 + hole.blocks()
	file.block = uint32(tail)
	last := append(content[:len(content):len(content)], make([]byte, file.blocks()*verity.BlockSize-uint64(len(content)))...)
	meta, err := t.metadata(tail + file.blocks())
	if err != nil {
		return verity.Description{}, err
	}
	last = append(last, meta...)
	blocks := tail + uint64(len(last))/verity.BlockSize

	f, err := os.Create(out)
	if err != nil {
		return verity.Description{}, err
	}
	defer f.Close()
	layout := verity.Layout(blocks)
	if err := f.Truncate(layout.Size); err != nil {
		return verity.Description{}, err
	}
	for at, data := range map[uint64][]byte{0: t.superblock(tail+file.blocks(), blocks), tail: last} {
		if _, err := f.WriteAt(data, verity.DataOffset+int64(at)*verity.BlockSize); err != nil {
			return verity.Description{}, err
		}
	}
	leaves := map[uint64][]byte{}
	h := newHasher(nil)
	for _, g := range append([]uint64{0}, between(tail/groupBlocks, (blocks-1)/groupBlocks)...) {
		buf := make([]byte, min(groupBlocks, blocks-g*groupBlocks)*verity.BlockSize)
		if _, err := f.ReadAt(buf, verity.DataOffset+int64(g)*groupSize); err != nil {
			return verity.Description{}, fmt.Errorf("read back: %w", err)
		}
		leaves[g] = bytes.Clone(h.makeLeaf(buf))
	}
	return verity.FinishSparse(f, int64(blocks)*verity.BlockSize, leaves, verity.TreeOptions{})
}

func between(first, last uint64) []uint64 {
	var list []uint64
	for ; first <= last; first++ {
		list = append(list, first)
	}
	return list
}
