package gpt

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/image/imagetest"
)

// memory is a disk in memory.
type memory []byte

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if end := int(off) + len(p); end > len(*m) {
		*m = append(*m, make([]byte, end-len(*m))...)
	}
	return copy((*m)[off:], p), nil
}

const diskSize = 8 << 20

func sample() Table {
	return Table{
		Disk: MustGUID("11223344-5566-7788-99aa-bbccddeeff00"),
		Partitions: []Partition{
			{Type: ManifestType, UUID: MustGUID("00112233-4455-6677-8899-aabbccddeeff"), Offset: 1 << 20, Size: 1 << 20, Name: "first"},
			{Type: ManifestType, UUID: MustGUID("ffeeddcc-bbaa-9988-7766-554433221100"), Offset: 2 << 20, Size: Alignment, Name: "zweite ✓", Attributes: ReadOnly},
		},
	}
}

func sampleDisk(t testing.TB) memory {
	var m memory
	if err := Write(&m, sample(), diskSize); err != nil {
		t.Fatal(err)
	}
	if len(m) != diskSize {
		t.Fatalf("disk of %d bytes", len(m))
	}
	return m
}

func TestRoundTrip(t *testing.T) {
	m := sampleDisk(t)
	got, err := Read(bytes.NewReader(m), diskSize)
	if err != nil {
		t.Fatal(err)
	}
	if want := sample(); got.Disk != want.Disk || !slices.Equal(got.Partitions, want.Partitions) {
		t.Errorf("got %+v", got)
	}
	if again := sampleDisk(t); !bytes.Equal(m, again) {
		t.Error("two disks of one table differ")
	}
	// UEFI 2.10, appendix A: the first three fields are little-endian.
	if want := []byte{0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0x88, 0x77, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0}; !bytes.Equal(m[512+56:][:16], want) {
		t.Errorf("disk GUID on disk is % x", m[512+56:][:16])
	}
}

// TestSfdisk has util-linux read the disk, backup table included.
func TestSfdisk(t *testing.T) {
	imagetest.Tools(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, sampleDisk(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := imagetest.Command(t, dir, "sfdisk", "--verify", path).CombinedOutput(); err != nil || !strings.Contains(string(out), "No errors detected") {
		t.Errorf("sfdisk --verify: %v: %s", err, out)
	}
	out, err := imagetest.Command(t, dir, "sfdisk", "--json", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		PartitionTable struct {
			ID         string
			FirstLBA   int64
			LastLBA    int64
			Partitions []struct {
				Start, Size      int64
				Type, UUID, Name string
			}
		}
	}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := sample()
	if !strings.EqualFold(got.PartitionTable.ID, want.Disk.String()) || len(got.PartitionTable.Partitions) != 2 {
		t.Fatalf("sfdisk reads %s", out)
	}
	for i, p := range got.PartitionTable.Partitions {
		w := want.Partitions[i]
		if p.Start*SectorSize != w.Offset || p.Size*SectorSize != w.Size || p.Name != w.Name ||
			!strings.EqualFold(p.UUID, w.UUID.String()) || !strings.EqualFold(p.Type, w.Type.String()) {
			t.Errorf("sfdisk reads partition %d as %+v", i+1, p)
		}
	}
}

// TestSystemdRepart reads a table of systemd-repart 252, made with Verity=data
// and Verity=hash for the root hash c29a0fa5…c2070fa7…6ff4: the first 34
// sectors of a disk of 11554816 bytes.
func TestSystemdRepart(t *testing.T) {
	f, err := os.Open("testdata/systemd-repart-252.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	start, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Read(bytes.NewReader(start), 11554816)
	if err != nil {
		t.Fatal(err)
	}
	want := []Partition{
		{MustGUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"), MustGUID("c29a0fa5-e87b-642f-6aff-2860eeb1c207"), 1 << 20, 8 << 20, "root-x86-64", 1 << 59},
		{MustGUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"), MustGUID("0fa70ff6-72ef-f4df-9dca-3d7f01246ff4"), 9 << 20, 2 << 20, "root-x86-64-verity", ReadOnly},
	}
	if !slices.Equal(got.Partitions, want) {
		t.Errorf("got %+v", got.Partitions)
	}
	// Discoverable Partitions Specification: the UUID's text is the hash's.
	if hex.EncodeToString(got.Partitions[0].UUID[:]) != "c29a0fa5e87b642f6aff2860eeb1c207" {
		t.Errorf("first half of the root hash reads %x", got.Partitions[0].UUID)
	}
}

// fix makes both checksums right again after a change.
func fix(m memory) {
	h := m[SectorSize:][:SectorSize]
	n := binary.LittleEndian.Uint32(h[80:])
	at := binary.LittleEndian.Uint64(h[72:])
	if n <= maxEntries && at < 1000 && at*SectorSize+uint64(n)*entrySize <= uint64(len(m)) {
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(m[at*SectorSize:][:n*entrySize]))
	}
	clear(h[16:20])
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:headerSize]))
}

func TestReadRefuses(t *testing.T) {
	put32 := func(at int, v uint32) func(memory) {
		return func(m memory) { binary.LittleEndian.PutUint32(m[at:], v); fix(m) }
	}
	put64 := func(at int, v uint64) func(memory) {
		return func(m memory) { binary.LittleEndian.PutUint64(m[at:], v); fix(m) }
	}
	const header, entry1, entry2 = SectorSize, 2 * SectorSize, 2*SectorSize + entrySize
	for _, tt := range []struct {
		name   string
		change func(memory)
	}{
		{"no boot signature", func(m memory) { m[510] = 0 }},
		{"no protective record", func(m memory) { m[446+4] = 0x83 }},
		{"hybrid MBR", func(m memory) { m[446+16+4] = 0x83 }},
		{"signature", func(m memory) { m[header] = 'e' }},
		{"revision", put32(header+8, 0x00020000)},
		{"header size", put32(header+12, 96)},
		{"header checksum", func(m memory) { m[header+16] ^= 1 }},
		{"reserved field", put32(header+20, 1)},
		{"bytes after the header", func(m memory) { m[header+headerSize] = 1 }},
		{"header's own sector", put64(header+24, 2)},
		{"backup inside the usable sectors", put64(header+32, 100)},
		{"backup past the end", put64(header+32, diskSize/SectorSize)},
		{"first usable past the last", put64(header+40, diskSize/SectorSize-34)},
		{"last usable past the end", put64(header+48, 1<<63)},
		{"no entries", put32(header+80, 0)},
		{"too many entries", put32(header+80, 129)},
		{"entries of 256 bytes", put32(header+84, 256)},
		{"entries checksum", func(m memory) { m[entry1+100] ^= 1 }},
		{"entries over the header", put64(header+72, 1)},
		{"entries in the usable sectors", put64(header+72, 3)},
		{"entries far away", put64(header+72, 1<<62)},
		{"partition before the usable sectors", put64(entry1+32, 8)},
		{"partition past the end", put64(entry2+40, diskSize/SectorSize-1)},
		{"partition wraps", put64(entry2+40, 1<<64-1)},
		{"partition ends before it begins", put64(entry1+40, 2000)},
		{"start not aligned", put64(entry1+32, 2049)},
		{"size not aligned", put64(entry2+40, 4096)},
		{"overlap", put64(entry2+32, 4088)},
		{"same UUID twice", func(m memory) { copy(m[entry2+16:][:16], m[entry1+16:][:16]); fix(m) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := sampleDisk(t)
			tt.change(m)
			if got, err := Read(bytes.NewReader(m), diskSize); !errors.Is(err, ErrInvalid) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	for name, size := range map[string]int64{"empty": 0, "negative": -512, "half a sector": diskSize + 256, "tiny": 1024, "huge": 1 << 60} {
		if _, err := Read(bytes.NewReader(sampleDisk(t)), size); !errors.Is(err, ErrInvalid) {
			t.Errorf("disk size %s: got %v", name, err)
		}
	}
	if _, err := Read(bytes.NewReader(sampleDisk(t)[:1000]), diskSize); !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrInvalid) {
		t.Errorf("disk cut short: got %v", err)
	}
}

func TestWriteRefuses(t *testing.T) {
	for name, change := range map[string]func(*Table){
		"overlap":    func(t *Table) { t.Partitions[1].Offset = t.Partitions[0].Offset },
		"unaligned":  func(t *Table) { t.Partitions[0].Size = 512 },
		"empty":      func(t *Table) { t.Partitions[0].Size = 0 },
		"past end":   func(t *Table) { t.Partitions[1].Offset = diskSize - Alignment },
		"in the GPT": func(t *Table) { t.Partitions[0].Offset = 0 },
		"long name":  func(t *Table) { t.Partitions[0].Name = strings.Repeat("x", 37) },
	} {
		table := sample()
		change(&table)
		var m memory
		if err := Write(&m, table, diskSize); err == nil || len(m) != 0 {
			t.Errorf("%s: wrote %d bytes, %v", name, len(m), err)
		}
	}
}

func TestManifestDisk(t *testing.T) {
	for _, n := range []int{1, 100, Alignment - manifestHeader, Alignment - manifestHeader + 1, MaxManifest} {
		manifest := bytes.Repeat([]byte{'{'}, n)
		var m, again memory
		size, err := WriteManifestDisk(&m, manifest, nil)
		if err != nil || size != int64(len(m)) {
			t.Fatalf("%d bytes: disk of %d, said %d: %v", n, len(m), size, err)
		}
		if _, err := WriteManifestDisk(&again, manifest, nil); err != nil || !bytes.Equal(m, again) {
			t.Errorf("%d bytes: two disks differ (%v)", n, err)
		}
		got, err := ReadManifestDisk(bytes.NewReader(m), size)
		if err != nil || !bytes.Equal(got, manifest) {
			t.Errorf("%d bytes: read %d, %v", n, len(got), err)
		}
	}
	for _, n := range []int{0, MaxManifest + 1} {
		if _, err := WriteManifestDisk(new(memory), make([]byte, n), nil); err == nil {
			t.Errorf("wrote a manifest of %d bytes", n)
		}
	}
}

// A manifest may share its disk with partitions of other types.
func TestManifestBesideOthers(t *testing.T) {
	part, entry, err := ManifestPartition([]byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	table := sample()
	for i := range table.Partitions {
		table.Partitions[i].Type[0] ^= 1
	}
	last := table.Partitions[len(table.Partitions)-1]
	entry.Offset = (last.Offset + last.Size + Alignment - 1) / Alignment * Alignment
	table.Partitions = append(table.Partitions, entry)
	size := DiskSize(entry.Offset + entry.Size)
	var m memory
	if _, err := m.WriteAt(part, entry.Offset); err != nil {
		t.Fatal(err)
	}
	if err := Write(&m, table, size); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadManifestDisk(bytes.NewReader(m), size); err != nil || string(got) != "{}" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestReadManifestDiskRefuses(t *testing.T) {
	const at = manifestOffset
	for _, tt := range []struct {
		name   string
		change func(memory)
	}{
		{"no table", func(m memory) { m[SectorSize] = 0 }},
		{"another type", func(m memory) { m[2*SectorSize] ^= 1; fix(m) }},
		{"two manifest partitions", func(m memory) {
			e := m[2*SectorSize:]
			copy(e[entrySize:], e[:entrySize])
			e[entrySize+16] ^= 1
			binary.LittleEndian.PutUint64(e[40:], manifestOffset/SectorSize+7)
			binary.LittleEndian.PutUint64(e[entrySize+32:], manifestOffset/SectorSize+8)
			fix(m)
		}},
		{"magic", func(m memory) { m[at] = 'c' }},
		{"version", func(m memory) { m[at+8] = 2 }},
		{"length zero", func(m memory) { clear(m[at+12:][:4]) }},
		{"length too small for the padding", func(m memory) { m[at+12]-- }},
		{"length beyond the partition", func(m memory) { m[at+13] = 0x40 }},
		{"length beyond all", func(m memory) { m[at+15] = 0xFF }},
		{"padding", func(m memory) { m[at+2*Alignment-1] = 1 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var m memory
			size, err := WriteManifestDisk(&m, bytes.Repeat([]byte{'x'}, 5000), nil)
			if err != nil {
				t.Fatal(err)
			}
			tt.change(m)
			if got, err := ReadManifestDisk(bytes.NewReader(m), size); !errors.Is(err, ErrInvalid) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
}

// patched is a disk with other bytes over its start.
type patched struct {
	start []byte
	disk  []byte
}

func (p patched) ReadAt(b []byte, off int64) (int, error) {
	n, err := bytes.NewReader(p.disk).ReadAt(b, off)
	if off < int64(len(p.start)) {
		copy(b[:n], p.start[off:])
	}
	return n, err
}

// FuzzRead changes the MBR, header and table, with the checksums set right so
// that the fuzzer gets past them.
func FuzzRead(f *testing.F) {
	good := sampleDisk(f)
	f.Add([]byte(good[:firstUsable*SectorSize]), true)
	f.Add([]byte(good[:3*SectorSize]), false)
	f.Fuzz(func(t *testing.T, start []byte, checksums bool) {
		if len(start) > firstUsable*SectorSize {
			return
		}
		whole := append(slices.Clone(start), good[len(start):firstUsable*SectorSize]...)
		if checksums {
			fix(whole)
		}
		got, err := Read(patched{whole, good}, diskSize)
		if err != nil {
			return
		}
		var end int64
		for _, p := range slices.SortedFunc(slices.Values(got.Partitions), func(a, b Partition) int { return int(a.Offset - b.Offset) }) {
			if p.Offset < end || p.Size <= 0 || p.Offset+p.Size > diskSize || p.Offset%Alignment != 0 || p.Size%Alignment != 0 {
				t.Fatalf("accepted %+v", got.Partitions)
			}
			end = p.Offset + p.Size
		}
	})
}

func FuzzReadManifestDisk(f *testing.F) {
	var good memory
	size, err := WriteManifestDisk(&good, bytes.Repeat([]byte{'x'}, 5000), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(good[manifestOffset:][:64]), uint8(8))
	f.Add([]byte{}, uint8(1))
	f.Fuzz(func(t *testing.T, part []byte, blocks uint8) {
		m := slices.Clone(good)
		copy(m[manifestOffset:size-backupSize], part)
		// the partition's last sector, so that the size varies as well
		m[2*SectorSize+40] = blocks
		fix(m)
		got, err := ReadManifestDisk(bytes.NewReader(m), size)
		if err != nil {
			return
		}
		var again memory
		if _, err := WriteManifestDisk(&again, got, nil); err != nil {
			t.Fatal(err)
		}
		if end := len(again) - backupSize; !bytes.Equal(again[manifestOffset:end], m[manifestOffset:end]) {
			t.Error("accepted a partition that WriteManifestDisk would not write")
		}
	})
}

// Collateral has a partition of its own behind the manifest's, and changes nothing
// of it.
func TestCollateralDisk(t *testing.T) {
	manifest := []byte("{}")
	for _, n := range []int{1, Alignment - manifestHeader, MaxCollateral} {
		collateral := bytes.Repeat([]byte{'c'}, n)
		var m memory
		size, err := WriteManifestDisk(&m, manifest, collateral)
		if err != nil || size != int64(len(m)) {
			t.Fatalf("%d bytes: disk of %d, said %d: %v", n, len(m), size, err)
		}
		if got, err := ReadCollateral(bytes.NewReader(m), size); err != nil || !bytes.Equal(got, collateral) {
			t.Errorf("%d bytes: read %d, %v", n, len(got), err)
		}
		if got, err := ReadManifestDisk(bytes.NewReader(m), size); err != nil || !bytes.Equal(got, manifest) {
			t.Errorf("%d bytes: the manifest: read %d, %v", n, len(got), err)
		}
	}
	for _, n := range []int{0, MaxCollateral + 1} {
		if _, err := WriteManifestDisk(new(memory), manifest, make([]byte, n)); err == nil {
			t.Errorf("wrote collateral of %d bytes", n)
		}
	}
	var without, with memory
	size, err := WriteManifestDisk(&without, manifest, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadCollateral(bytes.NewReader(without), size); !errors.Is(err, ErrInvalid) {
		t.Errorf("read collateral from a disk without: %v", err)
	}
	if size, err = WriteManifestDisk(&with, manifest, []byte("collateral")); err != nil {
		t.Fatal(err)
	}
	at := int(manifestOffset) + Alignment
	for name, i := range map[string]int{"magic": at, "version": at + 8, "length": at + 15, "padding": at + manifestHeader + 10, "last byte": at + Alignment - 1} {
		with[i] ^= 1
		if _, err := ReadCollateral(bytes.NewReader(with), size); !errors.Is(err, ErrInvalid) {
			t.Errorf("another %s: %v", name, err)
		}
		with[i] ^= 1
	}
}
