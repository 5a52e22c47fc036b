package verity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"

	"chrysalis/verity/gpt"
)

// Partition types of the Discoverable Partitions Specification, section
// "Partition Types", for x86-64.
var (
	// TypeData is "root-x86-64": the file system.
	TypeData = gpt.MustGUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
	// TypeHash is "root-x86-64-verity": the hash area.
	TypeHash = gpt.MustGUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5")
)

const (
	// DataOffset is where the data partition begins on the disks that this
	// package writes, in bytes. Readers take it from the GPT.
	DataOffset = 1 << 20

	partitionGrain = 1 << 20
)

// Partitions is where the two partitions of a verity disk begin, in bytes
// from the start of the disk, multiples of BlockSize.
type Partitions struct {
	DataOffset int64
	HashOffset int64 // of the superblock's block; the tree begins one block on
}

// A Description is what a verity disk says about itself.
type Description struct {
	Partitions
	RootHash   RootHash
	Salt       []byte
	DataBlocks uint64
	HashBlocks uint64 // with the superblock's block
	Size       int64  // of the disk, in bytes
}

// WriteDisk writes a whole verity disk over size bytes of data, which it reads
// once, in order. size must be a positive multiple of BlockSize. o.UUID serves
// as the disk's GUID too. The same data, salt and UUID give the same disk.
//
// w should be empty, for the gaps between the partitions are not written.
// Memory and cancellation are as in WriteTree. When WriteDisk fails, what it
// wrote is not a disk: the partition table comes last.
func WriteDisk(ctx context.Context, w io.WriterAt, data io.Reader, size int64, o TreeOptions) (Description, error) {
	in := &inOrder{r: data}
	in.turn.L = &in.mu
	return writeDisk(ctx, w, size, o, func(group uint64, buf []byte) error {
		if err := in.read(group, buf); err != nil {
			return err
		}
		_, err := w.WriteAt(buf, DataOffset+int64(group)*groupSize)
		return err
	})
}

// A DiskLayout says where the parts of a disk are, in bytes from its start.
type DiskLayout struct {
	Partitions
	LeavesOffset int64 // of the leaf hash blocks
	HashBlocks   uint64
	Size         int64 // of the disk
}

// Layout returns the layout of a disk that this package writes over so many data
// blocks, 1 to MaxDataBlocks.
func Layout(dataBlocks uint64) DiskLayout {
	size := int64(dataBlocks) * BlockSize
	l := DiskLayout{
		Partitions: Partitions{
			DataOffset: DataOffset,
			HashOffset: (DataOffset + size + partitionGrain - 1) / partitionGrain * partitionGrain,
		},
		HashBlocks: HashBlocks(dataBlocks),
	}
	if starts := levelStarts(levelSizes(dataBlocks)); len(starts) > 0 {
		l.LeavesOffset = l.HashOffset + int64(starts[0])*BlockSize
	}
	l.Size = gpt.DiskSize(l.HashOffset + int64(l.HashBlocks)*BlockSize)
	return l
}

// FinishDisk makes a disk whose data, size bytes and more than a block of it, lies
// at DataOffset, and whose leaf hash blocks have been made: each the digests of the
// blocks of a GroupSize of data (see BlockHasher), padded with zeros. Either they are
// at Layout's LeavesOffset already and leaves is nil, or they are read from leaves
// and written there. It adds the rest of the hash tree and, last, the
// partition table.
func FinishDisk(disk interface {
	io.ReaderAt
	io.WriterAt
}, size int64, leaves io.ReaderAt, o TreeOptions) (Description, error) {
	blocks, err := checkBlocks(size)
	if err == nil && blocks == 1 {
		err = errors.New("one block has no leaves")
	}
	if err == nil && len(o.Salt) > MaxSalt {
		err = fmt.Errorf("salt of %d bytes; at most %d are allowed", len(o.Salt), MaxSalt)
	}
	if err != nil {
		return Description{}, fmt.Errorf("finish verity disk: %w", err)
	}
	l := Layout(blocks)
	copied := leaves != nil
	if !copied {
		leaves = io.NewSectionReader(disk, l.LeavesOffset, l.Size-l.LeavesOffset)
	}
	n := levelSizes(blocks)[0]
	above := make([]byte, n*digestSize)
	h, buf := newHasher(o.Salt), make([]byte, perHashBlock*BlockSize)
	for at := uint64(0); at < n; at += perHashBlock {
		part := buf[:min(perHashBlock, n-at)*BlockSize]
		if err := readFull(leaves, part, int64(at)*BlockSize); err != nil {
			return Description{}, fmt.Errorf("finish verity disk: read the leaves: %w", err)
		}
		if copied {
			if _, err := disk.WriteAt(part, l.LeavesOffset+int64(at)*BlockSize); err != nil {
				return Description{}, fmt.Errorf("finish verity disk: write the leaves: %w", err)
			}
		}
		h.Sum(above[at*digestSize:], part)
	}
	root, err := finishTree(io.NewOffsetWriter(disk, l.HashOffset), blocks, above, o)
	if err != nil {
		return Description{}, fmt.Errorf("finish verity disk: %w", err)
	}
	return finishDisk(disk, blocks, root, o)
}

func writeDisk(ctx context.Context, w io.WriterAt, size int64, o TreeOptions, fetch func(uint64, []byte) error) (Description, error) {
	blocks, err := checkBlocks(size)
	if err != nil {
		return Description{}, fmt.Errorf("write verity disk: %w", err)
	}
	root, err := writeTree(ctx, io.NewOffsetWriter(w, Layout(blocks).HashOffset), size, o, fetch)
	if err != nil {
		return Description{}, fmt.Errorf("write verity disk: %w", err)
	}
	return finishDisk(w, blocks, root, o)
}

// finishDisk writes the partition table.
func finishDisk(w io.WriterAt, blocks uint64, root RootHash, o TreeOptions) (Description, error) {
	l := Layout(blocks)
	d := Description{
		Partitions: l.Partitions,
		RootHash:   root,
		Salt:       bytes.Clone(o.Salt),
		DataBlocks: blocks,
		HashBlocks: l.HashBlocks,
		Size:       l.Size,
	}
	dataUUID, hashUUID := d.RootHash.PartitionUUIDs()
	err := gpt.Write(w, gpt.Table{
		Disk: gpt.GUID(o.UUID),
		Partitions: []gpt.Partition{
			{Type: TypeData, UUID: dataUUID, Offset: d.DataOffset, Size: int64(blocks) * BlockSize, Name: "root-x86-64", Attributes: gpt.ReadOnly},
			{Type: TypeHash, UUID: hashUUID, Offset: d.HashOffset, Size: int64(d.HashBlocks) * BlockSize, Name: "root-x86-64-verity", Attributes: gpt.ReadOnly},
		},
	}, d.Size)
	if err != nil {
		return Description{}, fmt.Errorf("write verity disk: %w", err)
	}
	return d, nil
}

// inOrder lets goroutines that were handed groups in order read them in order
// from a stream. Each group handed out must be read.
type inOrder struct {
	mu   sync.Mutex
	turn sync.Cond
	next uint64
	r    io.Reader
	err  error
}

func (in *inOrder) read(group uint64, buf []byte) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	for in.next != group {
		in.turn.Wait()
	}
	if in.err == nil {
		_, in.err = io.ReadFull(in.r, buf)
		if in.err == io.EOF {
			in.err = io.ErrUnexpectedEOF
		}
	}
	in.next++
	in.turn.Broadcast()
	return in.err
}

// FindPartitions looks for the partitions of the disk with this root hash on
// a disk of size bytes, by type and UUID, and checks that they can hold
// dataBlocks and the hash tree over them. It reads the partition table and
// nothing else, and is what the VM uses: no superblock is looked at.
//
// The error wraps ErrNotFound if the disk has no valid table or lacks either
// partition, and ErrInvalid if they are too small.
func FindPartitions(r io.ReaderAt, size int64, root RootHash, dataBlocks uint64) (Partitions, error) {
	if dataBlocks == 0 || dataBlocks > MaxDataBlocks {
		return Partitions{}, fmt.Errorf("find verity disk %s: %w: %d data blocks", root, ErrInvalid, dataBlocks)
	}
	t, err := gpt.Read(r, size)
	if err != nil {
		return Partitions{}, fmt.Errorf("find verity disk %s: %w: %w", root, ErrNotFound, err)
	}
	dataUUID, hashUUID := root.PartitionUUIDs()
	var data, hash *gpt.Partition
	for i, p := range t.Partitions { // gpt.Read sees to it that UUIDs are distinct
		switch {
		case p.Type == TypeData && p.UUID == dataUUID:
			data = &t.Partitions[i]
		case p.Type == TypeHash && p.UUID == hashUUID:
			hash = &t.Partitions[i]
		}
	}
	if data == nil || hash == nil {
		return Partitions{}, fmt.Errorf("find verity disk %s: %w", root, ErrNotFound)
	}
	// Both counts are at most about 2^32, so the products fit.
	if data.Size < int64(dataBlocks)*BlockSize || hash.Size < int64(HashBlocks(dataBlocks))*BlockSize {
		return Partitions{}, fmt.Errorf("find verity disk %s: %w: partitions of %d and %d bytes are too small for %d data blocks",
			root, ErrInvalid, data.Size, hash.Size, dataBlocks)
	}
	return Partitions{DataOffset: data.Offset, HashOffset: hash.Offset}, nil
}

// OpenDisk describes the verity disk of size bytes in r, for the host's use.
// The disk must have exactly one partition of each of the two types; the root
// hash is read off their UUIDs, salt and number of blocks off the superblock,
// and the top of the tree must match the root hash. The rest of the tree and
// the data are not checked: VerifyDisk does that.
//
// The error wraps ErrInvalid or, for a top block that does not match,
// ErrCorrupt.
func OpenDisk(r io.ReaderAt, size int64) (Description, error) {
	t, err := gpt.Read(r, size)
	if err != nil {
		return Description{}, fmt.Errorf("open verity disk: %w: %w", ErrInvalid, err)
	}
	var data, hash []gpt.Partition
	for _, p := range t.Partitions {
		switch p.Type {
		case TypeData:
			data = append(data, p)
		case TypeHash:
			hash = append(hash, p)
		}
	}
	if len(data) != 1 || len(hash) != 1 {
		return Description{}, fmt.Errorf("open verity disk: %w: %d data and %d hash partitions, want one each", ErrInvalid, len(data), len(hash))
	}
	d := Description{Size: size}
	copy(d.RootHash[:16], data[0].UUID[:])
	copy(d.RootHash[16:], hash[0].UUID[:])

	raw := make([]byte, superblockSize)
	if err := readFull(r, raw, hash[0].Offset); err != nil {
		return Description{}, fmt.Errorf("open verity disk: read superblock: %w", err)
	}
	sb, err := ParseSuperblock(raw)
	if err != nil {
		return Description{}, fmt.Errorf("open verity disk: %w", err)
	}
	d.Salt, d.DataBlocks, d.HashBlocks = sb.Salt, sb.DataBlocks, HashBlocks(sb.DataBlocks)
	d.Partitions, err = FindPartitions(r, size, d.RootHash, d.DataBlocks)
	if err != nil {
		return Description{}, fmt.Errorf("open verity disk: %w", err)
	}
	// veritysetup and systemd-repart take the whole partition as data, so a
	// superblock that counts otherwise has been changed.
	if n := uint64(data[0].Size) / BlockSize; n != d.DataBlocks {
		return Description{}, fmt.Errorf("open verity disk: %w: %d data blocks in the superblock, %d in the partition", ErrInvalid, d.DataBlocks, n)
	}

	top := make([]byte, BlockSize)
	at, area := d.HashOffset+BlockSize, "hash"
	if d.DataBlocks == 1 {
		at, area = d.DataOffset, "data"
	}
	if err := readFull(r, top, at); err != nil {
		return Description{}, fmt.Errorf("open verity disk: read the top of the tree: %w", err)
	}
	var got RootHash
	newHasher(d.Salt).sum(got[:], top)
	if got != d.RootHash {
		return Description{}, fmt.Errorf("open verity disk: %w", &BlockError{Area: area, Block: uint64(at-d.start(area)) / BlockSize})
	}
	return d, nil
}

func (d Description) start(area string) int64 {
	if area == "data" {
		return d.DataOffset
	}
	return d.HashOffset
}

// A BlockError names the first block of a disk that does not match its root
// hash. It wraps ErrCorrupt.
type BlockError struct {
	Area  string // "data" or "hash"
	Block uint64 // within the partition; block 0 of the hash area is the superblock's
}

func (e *BlockError) Error() string {
	return fmt.Sprintf("%v: %s block %d does not match the root hash; fetch or make the disk again", ErrCorrupt, e.Area, e.Block)
}

func (e *BlockError) Unwrap() error { return ErrCorrupt }

// VerifyDisk checks every block of the hash tree and of the data of a disk of
// size bytes against its root hash, on all processors, and returns its
// description. The error wraps a *BlockError for a block that does not match:
// the first bad one of the tree from the top down or, under a good tree, of
// the data. Otherwise errors are those of OpenDisk.
func VerifyDisk(ctx context.Context, r io.ReaderAt, size int64, progress func(done, total int64)) (Description, error) {
	d, err := OpenDisk(r, size)
	if err != nil {
		return Description{}, err
	}
	sizes := levelSizes(d.DataBlocks)
	starts := levelStarts(sizes)
	h := newHasher(d.Salt)

	// expected holds the digests, verified, of the blocks of the level below.
	expected := bytes.Clone(d.RootHash[:])
	for i := len(sizes) - 1; i > 0; i-- {
		level := make([]byte, sizes[i]*BlockSize)
		if err := readFull(r, level, d.HashOffset+int64(starts[i])*BlockSize); err != nil {
			return Description{}, fmt.Errorf("verify disk: read hash tree: %w", err)
		}
		var got [digestSize]byte
		for j := range sizes[i] {
			if h.sum(got[:], level[j*BlockSize:][:BlockSize]); !bytes.Equal(got[:], expected[j*digestSize:][:digestSize]) {
				return Description{}, fmt.Errorf("verify disk: %w", &BlockError{Area: "hash", Block: starts[i] + j})
			}
		}
		expected = level
	}

	var (
		mu      sync.Mutex
		badHash = uint64(math.MaxUint64)
		badData = uint64(math.MaxUint64)
	)
	err = eachGroup(ctx, int64(d.DataBlocks)*BlockSize, progress, func() func(uint64, []byte) error {
		h := newHasher(d.Salt)
		leaf, want, got := make([]byte, BlockSize), make([]byte, BlockSize), make([]byte, digestSize)
		return func(group uint64, buf []byte) error {
			if err := readFull(r, buf, d.DataOffset+int64(group)*groupSize); err != nil {
				return fmt.Errorf("read data: %w", err)
			}
			if len(sizes) == 0 {
				return nil // OpenDisk has checked the only block
			}
			at := starts[0] + group
			if err := readFull(r, leaf, d.HashOffset+int64(at)*BlockSize); err != nil {
				return fmt.Errorf("read hash tree: %w", err)
			}
			if h.sum(got, leaf); !bytes.Equal(got, expected[group*digestSize:][:digestSize]) {
				mu.Lock()
				badHash = min(badHash, at)
				mu.Unlock()
				return nil
			}
			h.sumBlocks(want, buf)
			for i := range len(buf) / BlockSize {
				if !bytes.Equal(want[i*digestSize:][:digestSize], leaf[i*digestSize:][:digestSize]) {
					mu.Lock()
					badData = min(badData, group*perHashBlock+uint64(i))
					mu.Unlock()
					break
				}
			}
			return nil
		}
	})
	switch {
	case err != nil:
	case badHash != math.MaxUint64:
		err = &BlockError{Area: "hash", Block: badHash}
	case badData != math.MaxUint64:
		err = &BlockError{Area: "data", Block: badData}
	}
	if err != nil {
		return Description{}, fmt.Errorf("verify disk: %w", err)
	}
	return d, nil
}
