package verity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"chrysalis/verity/gpt"
)

func writeTestDisk(t testing.TB, blocks int) (*memory, Description) {
	data := testData(blocks)
	m := &memory{}
	d, err := WriteDisk(context.Background(), m, bytes.NewReader(data), int64(len(data)), TreeOptions{Salt: salt32, UUID: uuid})
	if err != nil {
		t.Fatal(err)
	}
	return m, d
}

func TestWriteDisk(t *testing.T) {
	for _, tt := range trees {
		t.Run(tt.name, func(t *testing.T) {
			ctx, o := context.Background(), TreeOptions{Salt: tt.salt, UUID: uuid}
			data := testData(tt.blocks)
			// An io.Reader and nothing else, to be sure it is read in order.
			m := &memory{}
			d, err := WriteDisk(ctx, m, io.MultiReader(bytes.NewReader(data)), int64(len(data)), o)
			if err != nil {
				t.Fatal(err)
			}
			if d.Size != int64(len(m.b)) || d.RootHash.String() != tt.root || d.DataBlocks != uint64(tt.blocks) {
				t.Errorf("disk of %d bytes described as %+v", len(m.b), d)
			}
			if !bytes.Equal(m.b[d.DataOffset:][:len(data)], data) {
				t.Error("data is not in its place")
			}

			if tt.blocks > 1 {
				finished, leaves := &memory{}, &memory{}
				finished.WriteAt(data, DataOffset)
				h, leaf := newHasher(tt.salt), make([]byte, BlockSize)
				for at := 0; at < len(data); at += GroupSize {
					h.sumBlocks(leaf, data[at:min(at+GroupSize, len(data))])
					leaves.WriteAt(leaf, int64(at/GroupSize)*BlockSize)
				}
				if _, err := FinishDisk(finished, int64(len(data)), leaves, o); err != nil || !bytes.Equal(finished.b, m.b) {
					t.Errorf("FinishDisk makes another disk than WriteDisk (%v)", err)
				}
			}

			for what, open := range map[string]func() (Description, error){
				"OpenDisk":   func() (Description, error) { return OpenDisk(m, d.Size) },
				"VerifyDisk": func() (Description, error) { return VerifyDisk(ctx, m, d.Size, nil) },
			} {
				if got, err := open(); err != nil || fmt.Sprint(got) != fmt.Sprint(d) {
					t.Errorf("%s: %+v, %v; want %+v", what, got, err, d)
				}
			}
			if got, err := FindPartitions(m, d.Size, d.RootHash, d.DataBlocks); err != nil || got != d.Partitions {
				t.Errorf("FindPartitions: %+v, %v", got, err)
			}
		})
	}
}

func TestWriteDiskRefuses(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context
		w    io.WriterAt
		size int64
		want error
	}{
		{"data ends early", context.Background(), &memory{}, 1001 * BlockSize, io.ErrUnexpectedEOF},
		{"not whole blocks", context.Background(), &memory{}, 1000*BlockSize - 1, nil},
		{"write fails", context.Background(), failingWriter{}, 1000 * BlockSize, errFull},
		{"cancelled", cancelled, &memory{}, 1000 * BlockSize, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := WriteDisk(tt.ctx, tt.w, bytes.NewReader(testData(1000)), tt.size, TreeOptions{})
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if m, ok := tt.w.(*memory); ok && len(m.b) > 0 {
				if _, err := gpt.Read(m, int64(len(m.b))); err == nil {
					t.Error("a failed disk has a partition table")
				}
			}
		})
	}
}

// TestFindPartitionsIgnoresOrder is for disks made by systemd-repart, which
// may number and label the partitions otherwise, and add others.
func TestFindPartitionsIgnoresOrder(t *testing.T) {
	_, d := writeTestDisk(t, 300)
	dataUUID, hashUUID := d.RootHash.PartitionUUIDs()
	const size = 16 << 20
	table := gpt.Table{Partitions: []gpt.Partition{
		{Type: TypeHash, UUID: hashUUID, Offset: 8 << 20, Size: 1 << 20, Name: "verity"},
		{Type: TypeData, UUID: gpt.GUID{1}, Offset: 1 << 20, Size: 1 << 20, Name: "another root"},
		{Type: gpt.GUID{9}, UUID: gpt.GUID{2}, Offset: 2 << 20, Size: 1 << 20, Name: "another type"},
		{Type: TypeData, UUID: dataUUID, Offset: 4 << 20, Size: 2 << 20, Name: "root"},
	}}
	m := &memory{}
	if err := gpt.Write(m, table, size); err != nil {
		t.Fatal(err)
	}
	got, err := FindPartitions(m, size, d.RootHash, d.DataBlocks)
	if want := (Partitions{DataOffset: 4 << 20, HashOffset: 8 << 20}); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
}

func TestFindPartitionsRefuses(t *testing.T) {
	m, d := writeTestDisk(t, 300)
	other := d.RootHash
	other[31]++
	swapped := RootHash(append(append([]byte{}, d.RootHash[16:]...), d.RootHash[:16]...))
	for _, tt := range []struct {
		name   string
		root   RootHash
		blocks uint64
		want   error
	}{
		{"another root hash", other, 300, ErrNotFound},
		{"halves swapped", swapped, 300, ErrNotFound},
		{"one block too many", d.RootHash, 301, ErrInvalid},
		{"hash area too small", d.RootHash, 128*128 + 1, ErrInvalid},
		{"no blocks", d.RootHash, 0, ErrInvalid},
		{"too many blocks", d.RootHash, MaxDataBlocks + 1, ErrInvalid},
		{"products would wrap", d.RootHash, 1<<64 - 1, ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, err := FindPartitions(m, d.Size, tt.root, tt.blocks); !errors.Is(err, tt.want) {
				t.Errorf("got %+v, %v; want %v", got, err, tt.want)
			}
		})
	}
	if _, err := FindPartitions(&memory{}, 1<<20, d.RootHash, 300); !errors.Is(err, ErrNotFound) {
		t.Errorf("empty disk: got %v", err)
	}
}

// noSuperblock fails the test when the superblock is read.
type noSuperblock struct {
	*memory
	t *testing.T
	d Description
}

func (n noSuperblock) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > DataOffset {
		n.t.Errorf("read %d bytes at %d", len(p), off)
	}
	return n.memory.ReadAt(p, off)
}

func TestFindPartitionsReadsOnlyTheTable(t *testing.T) {
	m, d := writeTestDisk(t, 300)
	if _, err := FindPartitions(noSuperblock{m, t, d}, d.Size, d.RootHash, d.DataBlocks); err != nil {
		t.Error(err)
	}
}

func TestVerifyDiskReportsFirstBadBlock(t *testing.T) {
	const blocks = 128*128 + 1 // superblock, top, 2 blocks, 129 leaves
	m, d := writeTestDisk(t, blocks)
	data := func(n int64) int64 { return d.DataOffset + n*BlockSize }
	hash := func(n int64) int64 { return d.HashOffset + n*BlockSize }
	for _, tt := range []struct {
		name string
		flip []int64 // offsets of bytes to flip
		want BlockError
	}{
		{"first data block", []int64{data(0)}, BlockError{"data", 0}},
		{"last data block", []int64{data(blocks-1) + 4095}, BlockError{"data", blocks - 1}},
		{"first of three", []int64{data(9000), data(777), data(12000)}, BlockError{"data", 777}},
		{"top of the tree", []int64{hash(1)}, BlockError{"hash", 1}},
		{"middle of the tree", []int64{hash(3) + 5}, BlockError{"hash", 3}},
		{"a leaf", []int64{hash(4+50) + 5}, BlockError{"hash", 54}},
		{"padding of the last leaf", []int64{hash(4+128) + 4095}, BlockError{"hash", 132}},
		{"a leaf comes before data", []int64{data(0), hash(4 + 50)}, BlockError{"hash", 54}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, at := range tt.flip {
				m.b[at] ^= 1
				defer func() { m.b[at] ^= 1 }()
			}
			_, err := VerifyDisk(context.Background(), m, d.Size, nil)
			var got *BlockError
			if !errors.As(err, &got) || *got != tt.want || !errors.Is(err, ErrCorrupt) {
				t.Errorf("got %v, want %+v", err, tt.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := VerifyDisk(ctx, m, d.Size, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
	single, sd := writeTestDisk(t, 1)
	single.b[sd.DataOffset] ^= 1
	if _, err := VerifyDisk(context.Background(), single, sd.Size, nil); !errors.Is(err, ErrCorrupt) {
		t.Errorf("disk of one block: got %v", err)
	}
}

func TestOpenDiskRefuses(t *testing.T) {
	m, d := writeTestDisk(t, 300)
	for _, tt := range []struct {
		name string
		at   int64
		want error
	}{
		{"partition table", 512, ErrInvalid},
		{"superblock", d.HashOffset, ErrInvalid},
		{"data blocks in the superblock", d.HashOffset + 73, ErrInvalid},
		{"salt in the superblock", d.HashOffset + 88, ErrCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m.b[tt.at] ^= 1
			defer func() { m.b[tt.at] ^= 1 }()
			if got, err := OpenDisk(m, d.Size); !errors.Is(err, tt.want) {
				t.Errorf("got %+v, %v; want %v", got, err, tt.want)
			}
		})
	}
}
