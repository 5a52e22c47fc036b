package verity

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sync"
)

// TreeOptions are the inputs of a hash tree besides its data.
type TreeOptions struct {
	Salt []byte   // at most MaxSalt bytes; hashed before every block
	UUID [16]byte // of the superblock, in the order of its text form
	// Progress, if set, is called with the bytes of data hashed so far and
	// their total, never from two goroutines at a time.
	Progress func(done, total int64)
}

// WriteTree hashes size bytes of data and writes the hash area to w, from
// offset 0: the superblock in a block of its own, then the levels of the tree
// from the top down, just as `veritysetup format` does. It returns the root
// hash. size must be a positive multiple of BlockSize.
//
// It uses all processors. Memory is 512 KiB for each, and 32 bytes for every
// 512 KiB of data (64 KiB for each GiB). When ctx ends, it stops with
// ctx.Err() and leaves w half written.
func WriteTree(ctx context.Context, w io.WriterAt, data io.ReaderAt, size int64, o TreeOptions) (RootHash, error) {
	return writeTree(ctx, w, size, o, func(group uint64, buf []byte) error {
		return readFull(data, buf, int64(group)*groupSize)
	})
}

// GroupSize is the unit of work in bytes: the data below one leaf hash block.
const GroupSize = perHashBlock * BlockSize

const groupSize = GroupSize

// A BlockHasher computes dm-verity's format 1 digests: SHA-256(salt ‖ block). It is
// for one goroutine at a time.
type BlockHasher interface {
	// Sum puts the digests of data, which is whole blocks of BlockSize bytes, into
	// digests, 32 bytes each, one after the other.
	Sum(digests, data []byte)
}

var newBlockHasher = func(salt []byte) BlockHasher { return &plainHasher{h: sha256.New(), salt: salt} }

// UseHasher has this package make and check trees with another BlockHasher than
// crypto/sha256's; f is called from many goroutines. It is for the init function of
// a package of the host's: the VM, which hashes next to nothing itself, does without.
func UseHasher(f func(salt []byte) BlockHasher) { newBlockHasher = f }

// writeTree is WriteTree with the data given by fetch, which fills buf with
// the data of a group. fetch is called from many goroutines.
func writeTree(ctx context.Context, w io.WriterAt, size int64, o TreeOptions, fetch func(group uint64, buf []byte) error) (RootHash, error) {
	blocks, err := checkBlocks(size)
	if err != nil {
		return RootHash{}, fmt.Errorf("build hash tree: %w", err)
	}
	if len(o.Salt) > MaxSalt {
		return RootHash{}, fmt.Errorf("build hash tree: salt of %d bytes; at most %d are allowed", len(o.Salt), MaxSalt)
	}
	sizes := levelSizes(blocks)
	starts := levelStarts(sizes)

	// above collects the digests of the leaf hash blocks, or that of the one
	// data block when there are none.
	var above []byte
	if len(sizes) == 0 {
		above = make([]byte, digestSize)
	} else {
		above = make([]byte, sizes[0]*digestSize)
	}

	err = eachGroup(ctx, size, o.Progress, func() func(uint64, []byte) error {
		h := newHasher(o.Salt)
		leaf := make([]byte, BlockSize)
		return func(group uint64, buf []byte) error {
			if err := fetch(group, buf); err != nil {
				return fmt.Errorf("read data at byte %d: %w", int64(group)*groupSize, err)
			}
			if len(sizes) == 0 {
				h.sum(above, buf)
				return nil
			}
			h.sumBlocks(leaf, buf)
			h.sum(above[group*digestSize:], leaf)
			if _, err := w.WriteAt(leaf, int64(starts[0]+group)*BlockSize); err != nil {
				return fmt.Errorf("write hash tree: %w", err)
			}
			return nil
		}
	})
	if err != nil {
		return RootHash{}, fmt.Errorf("build hash tree: %w", err)
	}

	root, err := finishTree(w, blocks, above, o)
	if err != nil {
		return RootHash{}, err
	}
	return root, nil
}

// finishTree writes what is above the leaves, given the leaves' digests, and the
// superblock. The upper levels are 1/128 of the leaves' size: one goroutine will
// do.
func finishTree(w io.WriterAt, blocks uint64, above []byte, o TreeOptions) (RootHash, error) {
	sizes := levelSizes(blocks)
	starts := levelStarts(sizes)
	h := newHasher(o.Salt)
	for i := 1; i < len(sizes); i++ {
		level := make([]byte, sizes[i]*BlockSize)
		copy(level, above)
		above = make([]byte, sizes[i]*digestSize)
		h.Sum(above, level)
		if _, err := w.WriteAt(level, int64(starts[i])*BlockSize); err != nil {
			return RootHash{}, fmt.Errorf("write hash tree: %w", err)
		}
	}

	first := make([]byte, BlockSize)
	sb := Superblock{UUID: o.UUID, Salt: o.Salt, DataBlocks: blocks}.encode()
	copy(first, sb[:])
	if _, err := w.WriteAt(first, 0); err != nil {
		return RootHash{}, fmt.Errorf("write verity superblock: %w", err)
	}
	return RootHash(above), nil
}

// eachGroup calls a worker for every group of size bytes of data, with a
// buffer as long as the group's data, on all processors. Groups are handed
// out in order. The first error ends the work and is returned.
func eachGroup(ctx context.Context, size int64, progress func(done, total int64), newWorker func() func(group uint64, buf []byte) error) error {
	var (
		mu      sync.Mutex
		next    int64 // byte offset of the next group to hand out
		done    int64 // bytes finished
		stopped error
		wg      sync.WaitGroup
	)
	for range min(int64(runtime.GOMAXPROCS(0)), (size+groupSize-1)/groupSize) {
		wg.Go(func() {
			work := newWorker()
			buf := make([]byte, groupSize)
			for {
				mu.Lock()
				if stopped == nil {
					stopped = ctx.Err()
				}
				if stopped != nil || next >= size {
					mu.Unlock()
					return
				}
				at, n := next, min(groupSize, size-next)
				next += n
				mu.Unlock()

				err := work(uint64(at/groupSize), buf[:n])

				mu.Lock()
				if err != nil && stopped == nil {
					stopped = err
				}
				done += n
				if err == nil && progress != nil {
					progress(done, size)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return stopped
}

// A plainHasher hashes one block after the other.
type plainHasher struct {
	h    hash.Hash
	salt []byte
	out  [digestSize]byte
}

func (h *plainHasher) Sum(digests, data []byte) {
	for len(data) > 0 {
		h.h.Reset()
		h.h.Write(h.salt)
		h.h.Write(data[:BlockSize])
		copy(digests[:digestSize], h.h.Sum(h.out[:0]))
		digests, data = digests[digestSize:], data[BlockSize:]
	}
}

type hasher struct{ BlockHasher }

func newHasher(salt []byte) *hasher { return &hasher{newBlockHasher(salt)} }

// sum puts the digest of block into dst.
func (h *hasher) sum(dst, block []byte) { h.Sum(dst, block[:BlockSize]) }

// sumBlocks makes the hash block over up to 128 blocks of data: their
// digests, zero-padded.
func (h *hasher) sumBlocks(hashBlock, data []byte) {
	clear(hashBlock)
	h.Sum(hashBlock, data)
}

// readFull reads exactly len(p) bytes at off; too few are an error.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
