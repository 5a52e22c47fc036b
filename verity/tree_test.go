package verity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sync"
	"testing"

	"chrysalis/image/imagetest"
)

// memory is a disk in memory.
type memory struct {
	mu sync.Mutex
	b  []byte
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if end := off + int64(len(p)); end > int64(len(m.b)) {
		m.b = append(m.b, make([]byte, end-int64(len(m.b)))...)
	}
	return copy(m.b[off:], p), nil
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.NewReader(m.b).ReadAt(p, off)
}

// testData returns n blocks that are the same on every machine: ChaCha8's
// stream is fixed by the math/rand/v2 documentation.
func testData(n int) []byte {
	b := make([]byte, n*BlockSize)
	rand.NewChaCha8([32]byte{'v', 'e', 'r', 'i', 't', 'y'}).Read(b)
	return b
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

var (
	salt32  = unhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	salt256 = bytes.Repeat(salt32, 8)
	uuid    = [16]byte(unhex("6d9a2b1e4c3f4f5aa1b2c3d4e5f60718"))
)

const uuidText = "6d9a2b1e-4c3f-4f5a-a1b2-c3d4e5f60718"

// trees are sizes at which the tree changes its shape. root and area (SHA-256
// of superblock and tree) were printed by veritysetup 2.6.1 over testData with
// uuid, and stand in for it where it is not installed.
var trees = []struct {
	name       string
	blocks     int
	salt       []byte
	root, area string
}{
	{"one block", 1, salt32,
		"6f23004a0364f9ba33b8a7171234ec8df67c68d0881bb45b286b119b637e2423",
		"e3034d757ab501e326b6da155d006c655057eecbeb9dde649f30dc167ce73a14"},
	{"two blocks", 2, salt32,
		"e83f2bf5895c59b9a8538613669610652d1ab3d7392e0eb94af2db5d2c518427",
		"16f032a8c611a050abb8e2256c0465d16d18ea5f6a1ee9638322f653773ee64a"},
	{"127 blocks", 127, salt32,
		"be4d5ebcc943f04c3e39e0a2ef1642d6ec27faed08be8b7f83da851b131c59ec",
		"f83e7f50625a5313106287f621637b606f22cbe882611f598280d59624ee8e5a"},
	{"128 blocks, one full hash block", 128, salt32,
		"c59466205e299e8db0b409c30a07432fc14676a35f98f341310ef5828c582f09",
		"5447fc774c8fae9c88b6289153fed49e6d9f1557766e10d18f54882b2e97c398"},
	{"129 blocks, a second level", 129, salt32,
		"40fddcc7a953485191b328785e683aa38f5f42cda7b7c23fe86c3c3d39ce486f",
		"774f6ece5efb1f7a60b6418326b1902a1b6f2dbadc2b4368a46de37f2de4d054"},
	{"1000 blocks", 1000, salt32,
		"4ccad6516b5212ad9e35fad624e7d823030940bfd201775a000eaff8d491e516",
		"8c64302095f8250ace97beab05e8d13f70fd26f93d278c525936ed8555b4ea97"},
	{"128*128 blocks, two full levels", 16384, salt32,
		"f36041080ce33f8615b56f6534723442e3c7358901c151cdb1fe3f8294603e6f",
		"58d7cea9b2572f7695134acc8de46cd568906032d239c6dbce5cc22ed221a3e4"},
	{"128*128+1 blocks, a third level", 16385, salt32,
		"2467bda8f28d0b40e85cc1ccf70082f37448dad2f105afb0ea1a509b3917c5a8",
		"1475e3dcea2a2d774176d5761177c976a256908bd3e24f46cd4b4e3cdb6f5963"},
	{"no salt", 129, nil,
		"d1864017b6a52544ddf21db95bf0ee6b84efcdd3a0ca0dad149b567f84ee1d97",
		"42e3258d24b1ac3aab00e8e6692e151f6b48b7b51db5c59fc82b0b13a08dc661"},
	{"short salt", 129, salt32[:3],
		"4522a70157310a26e1053593aee95d250e51d9f979c0f890d3a8260924190728",
		"dd3be770b60b6337894acc9e3c447218042d84b60c5827e89ccfcc5b7119b2b4"},
	{"longest salt", 129, salt256,
		"e0a994229404821f0d361076ff1f16aa8cf25f21ae1802c177952a287216d8f7",
		"0eb4c61bf8904598d6043ca4ba29326cf856831ecf66ab75e2e31e7c13f04697"},
}

func TestWriteTree(t *testing.T) {
	for _, tt := range trees {
		t.Run(tt.name, func(t *testing.T) {
			data := testData(tt.blocks)
			var area memory
			var last int64
			root, err := WriteTree(context.Background(), &area, bytes.NewReader(data), int64(len(data)), TreeOptions{
				Salt: tt.salt, UUID: uuid,
				Progress: func(done, total int64) {
					if done <= last || total != int64(len(data)) {
						t.Errorf("progress %d of %d after %d", done, total, last)
					}
					last = done
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			if last != int64(len(data)) {
				t.Errorf("progress ended at %d of %d", last, len(data))
			}
			if got := uint64(len(area.b)) / BlockSize; got != HashBlocks(uint64(tt.blocks)) {
				t.Errorf("hash area of %d blocks, HashBlocks says %d", got, HashBlocks(uint64(tt.blocks)))
			}
			if root.String() != tt.root {
				t.Errorf("root hash\n got %s\nwant %s", root, tt.root)
			}
			if sum := sha256.Sum256(area.b); hex.EncodeToString(sum[:]) != tt.area {
				t.Errorf("SHA-256 of the hash area\n got %x\nwant %s", sum, tt.area)
			}
		})
	}
}

var rootLine = regexp.MustCompile(`(?m)^Root hash:\s*([0-9a-f]{64})$`)

// TestWriteTreeAgainstVeritysetup compares every byte of superblock and tree
// with those of the tools root's veritysetup. Needs no root: both files are
// ordinary ones.
func TestWriteTreeAgainstVeritysetup(t *testing.T) {
	imagetest.Tools(t)
	for _, tt := range trees {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			dataPath, hashPath := filepath.Join(dir, "data"), filepath.Join(dir, "hash")
			data := testData(tt.blocks)
			if err := os.WriteFile(dataPath, data, 0o600); err != nil {
				t.Fatal(err)
			}
			salt := "-"
			if len(tt.salt) > 0 {
				salt = hex.EncodeToString(tt.salt)
			}
			out, err := imagetest.Command(t, dir, "veritysetup", "format", "--salt", salt, "--uuid", uuidText, dataPath, hashPath).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			m := rootLine.FindSubmatch(out)
			if m == nil {
				t.Fatalf("no root hash in %s", out)
			}
			want, err := os.ReadFile(hashPath)
			if err != nil {
				t.Fatal(err)
			}
			var area memory
			root, err := WriteTree(context.Background(), &area, bytes.NewReader(data), int64(len(data)), TreeOptions{Salt: tt.salt, UUID: uuid})
			if err != nil {
				t.Fatal(err)
			}
			if root.String() != string(m[1]) {
				t.Errorf("root hash %s, veritysetup has %s", root, m[1])
			}
			if !bytes.Equal(area.b, want) {
				t.Errorf("hash area differs (%d bytes, veritysetup has %d)", len(area.b), len(want))
			}
		})
	}
}

func TestWriteTreeRefuses(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tt := range []struct {
		name string
		ctx  context.Context
		size int64
		have int
		salt int
		want error
	}{
		{name: "no data", size: 0},
		{name: "negative size", size: -BlockSize},
		{name: "half a block", size: BlockSize/2 + BlockSize, have: 2 * BlockSize},
		{name: "too many blocks", size: (MaxDataBlocks + 1) * BlockSize},
		{name: "long salt", size: BlockSize, have: BlockSize, salt: MaxSalt + 1},
		{name: "data ends early", size: 300 * BlockSize, have: 200 * BlockSize, want: io.ErrUnexpectedEOF},
		{name: "cancelled", ctx: cancelled, size: BlockSize, have: BlockSize, want: context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.ctx == nil {
				tt.ctx = context.Background()
			}
			_, err := WriteTree(tt.ctx, &memory{}, bytes.NewReader(make([]byte, tt.have)), tt.size, TreeOptions{Salt: make([]byte, tt.salt)})
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

type failingWriter struct{}

var errFull = errors.New("no space left")

func (failingWriter) WriteAt([]byte, int64) (int, error) { return 0, errFull }

func TestWriteTreeReportsWriteErrors(t *testing.T) {
	data := testData(1000)
	if _, err := WriteTree(context.Background(), failingWriter{}, bytes.NewReader(data), int64(len(data)), TreeOptions{}); !errors.Is(err, errFull) {
		t.Errorf("got %v, want %v", err, errFull)
	}
}

func TestWriteTreeStopsWhenCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	data := make([]byte, 64*groupSize)
	var done int64
	_, err := WriteTree(ctx, &memory{}, bytes.NewReader(data), int64(len(data)), TreeOptions{
		Progress: func(n, _ int64) { done = n; cancel() },
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if most := int64(runtime.GOMAXPROCS(0)+1) * groupSize; done > most {
		t.Errorf("hashed %d bytes after the context ended at the first group", done)
	}
}

func TestRootHashText(t *testing.T) {
	good := trees[0].root
	if r, err := ParseRootHash(good); err != nil || r.String() != good {
		t.Errorf("%v %v", r, err)
	}
	for name, s := range map[string]string{
		"empty":      "",
		"short":      good[:62],
		"long":       good + "00",
		"upper case": "ABCDEF" + good[6:],
		"not hex":    "g" + good[1:],
		"prefixed":   "0x" + good[2:],
	} {
		if _, err := ParseRootHash(s); err == nil {
			t.Errorf("%s: accepted %q", name, s)
		}
	}
}

func FuzzParseSuperblock(f *testing.F) {
	good := Superblock{UUID: uuid, Salt: salt32, DataBlocks: 300}.encode()
	f.Add(good[:])
	f.Add(make([]byte, superblockSize))
	f.Add([]byte("verity"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSuperblock(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		if again := s.encode(); !bytes.Equal(again[:], b) {
			t.Errorf("accepted a superblock that encodes differently")
		}
	})
}

func TestParseSuperblockRefuses(t *testing.T) {
	good := Superblock{UUID: uuid, Salt: salt32, DataBlocks: 300}.encode()
	if _, err := ParseSuperblock(good[:]); err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]int{
		"magic": 0, "version": 8, "hash type": 12, "algorithm": 32, "after the algorithm": 40,
		"data block size": 65, "hash block size": 69, "data blocks": 77, "long salt": 81,
		"padding": 84, "after the salt": 88 + 32, "reserved": 511,
	} {
		bad := good
		bad[at] ^= 0x80
		if _, err := ParseSuperblock(bad[:]); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

const benchSize = 256 << 20

// BenchmarkWriteTree and BenchmarkSHA256 hash the same bytes on all
// processors: the difference is what the tree costs over its hashing.
func BenchmarkWriteTree(b *testing.B) {
	data := testData(benchSize / BlockSize)
	area := &memory{b: make([]byte, HashBlocks(benchSize/BlockSize)*BlockSize)}
	b.SetBytes(benchSize)
	for b.Loop() {
		if _, err := WriteTree(context.Background(), area, bytes.NewReader(data), benchSize, TreeOptions{Salt: salt32}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSHA256(b *testing.B) {
	data := testData(benchSize / BlockSize)
	b.SetBytes(benchSize)
	for b.Loop() {
		err := eachGroup(context.Background(), benchSize, nil, func() func(uint64, []byte) error {
			return func(group uint64, buf []byte) error {
				for part := data[group*groupSize:][:len(buf)]; len(part) > 0; part = part[BlockSize:] {
					sha256.Sum256(part[:BlockSize])
				}
				return nil
			}
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}
