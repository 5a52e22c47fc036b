// Package export puts everything that a VM needs on one disk, for providers who
// boot it on hosts of their own: an EFI system partition with the UKI at the
// path that firmware starts by itself, the manifest's partition, and the
// partitions of the engine disk and the model disks, byte for byte and with
// their UUIDs, by which the VM finds them.
//
// The same inputs give the same bytes. Nothing on the disk is ever written to by
// the VM.
package export

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"chrysalis/image/inspect"
	"chrysalis/image/profile"
	"chrysalis/manifest"
	"chrysalis/models"
	"chrysalis/outfile"
	"chrysalis/verity"
	"chrysalis/verity/disk"
	"chrysalis/verity/gpt"
)

// A Format is how the disk is kept in a file.
type Format string

// The formats.
const (
	Raw   Format = "raw"   // the disk's bytes
	QCOW2 Format = "qcow2" // QEMU's, version 3, without clusters of zeros
)

// Options say what goes on a disk.
type Options struct {
	Image      string           // the UKI
	Engine     string           // the engine disk
	Models     []string         // the model disks
	Manifest   string           // a manifest file, used as it is; made from the disks when empty
	Parameters map[string]int64 // of the engine, for a manifest that is made here
	Tokens     []string         // hashes of clients' tokens, for the same
	GPUs       int              // that the VM must have, for a manifest that is made here
	Format     Format
	Out        string // the file to make
	Replace    bool   // it may take the place of what is at Out
	// Progress, if set, is called with the bytes done and their total.
	Progress func(step string, done, total int64)
}

// A Result describes the disk that was written.
type Result struct {
	Size           int64    // of the disk, in bytes
	Manifest       []byte   // as the disk carries it
	ManifestSHA384 [48]byte // MRCONFIGID, which the provider sets on TDX
	Disk           gpt.GUID
}

// typeESP is the "EFI System Partition": UEFI 2.10, table 5-7.
var typeESP = gpt.MustGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

const grain = 1 << 20 // partitions begin at multiples of it, in bytes

// Write checks the inputs, every block of the disks included, and writes the
// disk. It appears at o.Out when it is whole and on stable storage, or not at
// all. The error wraps fs.ErrExist if o.Out exists and may not be replaced,
// verity.ErrCorrupt or verity.ErrInvalid for a disk that is not good, and
// ctx.Err() when ctx ends.
func Write(ctx context.Context, o Options) (Result, error) {
	r, err := write(ctx, o)
	if err != nil {
		return Result{}, fmt.Errorf("export %s: %w", o.Out, err)
	}
	return r, nil
}

func write(ctx context.Context, o Options) (_ Result, err error) {
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	if o.Format != Raw && o.Format != QCOW2 {
		return Result{}, fmt.Errorf("there is no format %q; the formats are %s and %s", o.Format, Raw, QCOW2)
	}
	if _, err := os.Lstat(o.Out); err == nil && !o.Replace {
		return Result{}, exists(o.Out)
	}
	in, err := openInputs(ctx, o)
	if err != nil {
		return Result{}, err
	}
	defer in.close()

	f, err := outfile.Create(o.Out)
	if err != nil {
		return Result{}, err
	}
	defer f.Discard()
	var w io.WriterAt = f
	finish := func(size int64) (int64, error) { return size, nil }
	if o.Format == QCOW2 {
		q := newQCOW2(f.File)
		w, finish = q, q.finish
	}
	r, err := in.write(ctx, w, o.Progress)
	if err != nil {
		return Result{}, err
	}
	end, err := finish(r.Size)
	if err != nil {
		return Result{}, err
	}
	if err := f.Truncate(end); err != nil {
		return Result{}, err
	}
	if err = f.Commit(0o644, o.Replace); errors.Is(err, fs.ErrExist) {
		err = exists(o.Out)
	}
	return r, err
}

// inputs are the open files that go on the disk.
type inputs struct {
	uki      *os.File
	ukiSize  int64
	fat      fat
	manifest []byte
	disks    []source // the engine, then the models
}

// A source is a verity disk.
type source struct {
	*os.File
	verity.Description
}

func (in *inputs) close() {
	if in.uki != nil {
		in.uki.Close()
	}
	for _, d := range in.disks {
		d.Close()
	}
}

func openInputs(ctx context.Context, o Options) (_ *inputs, err error) {
	in := &inputs{}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	u, err := inspect.OpenUKI(ctx, o.Image)
	if err != nil {
		return nil, fmt.Errorf("read the image: %w", err)
	}
	u.Close()
	if u.Initrd == nil || u.Kernel == "" {
		return nil, fmt.Errorf("read the image: %s holds no kernel with an initrd", o.Image)
	}
	if in.uki, in.ukiSize, err = open(o.Image); err != nil {
		return nil, fmt.Errorf("read the image: %w", err)
	}
	if in.fat, err = newFAT(in.ukiSize); err != nil {
		return nil, fmt.Errorf("%s: %w", o.Image, err)
	}
	if len(o.Models) == 0 {
		return nil, errors.New("no model disk was given; name one with --model")
	}
	for _, path := range slices.Concat([]string{o.Engine}, o.Models) {
		if err := in.openDisk(ctx, path, o.Progress); err != nil {
			return nil, err
		}
	}
	if err := in.setManifest(o); err != nil {
		return nil, err
	}
	return in, nil
}

// openDisk opens a verity disk and checks all of it: a VM would only find out
// while it serves.
func (in *inputs) openDisk(ctx context.Context, path string, progress func(string, int64, int64)) error {
	f, size, err := open(path)
	if err != nil {
		return err
	}
	step := "check " + path
	progress(step, 0, 0)
	d, err := verity.VerifyDisk(ctx, f, size, func(done, total int64) { progress(step, done, total) })
	if err != nil {
		f.Close()
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, other := range in.disks {
		if other.RootHash == d.RootHash {
			f.Close()
			return fmt.Errorf("%s has the root hash of %s; give each disk once", path, other.Name())
		}
	}
	in.disks = append(in.disks, source{f, d})
	return nil
}

// setManifest makes or reads the manifest, and checks that a VM would accept it
// with these disks.
func (in *inputs) setManifest(o Options) (err error) {
	var m *manifest.Manifest
	if o.Manifest != "" {
		if len(o.Parameters) > 0 || len(o.Tokens) > 0 || o.GPUs != 0 {
			return errors.New("a manifest file already holds the engine's parameters, the clients' tokens and the number of GPUs; give either the file or those")
		}
		if in.manifest, err = readBounded(o.Manifest, manifest.MaxSize); err != nil {
			return fmt.Errorf("read the manifest: %w", err)
		}
		if m, err = manifest.Parse(in.manifest); err != nil {
			return fmt.Errorf("%s: %w", o.Manifest, err)
		}
	} else {
		if m, err = in.makeManifest(o); err != nil {
			return err
		}
		if in.manifest, err = m.Encode(); err != nil {
			return err
		}
	}

	named := []manifest.Disk{m.Engine}
	for _, model := range m.Models {
		named = append(named, model.Disk)
	}
	if named[0] != models.ManifestDisk(in.disks[0].Description) {
		return fmt.Errorf("the manifest names the engine %s, and %s is %s", m.Engine.RootHash, o.Engine, in.disks[0].RootHash)
	}
	for i, d := range in.disks[1:] {
		if !slices.Contains(named[1:], models.ManifestDisk(d.Description)) {
			return fmt.Errorf("the manifest does not name %s, whose root hash is %s", o.Models[i], d.RootHash)
		}
	}
	for _, want := range named[1:] {
		if !slices.ContainsFunc(in.disks[1:], func(d source) bool { return models.ManifestDisk(d.Description) == want }) {
			return fmt.Errorf("the manifest names a model with the root hash %s; give its disk with --model", want.RootHash)
		}
	}
	p, err := in.profile()
	if err != nil {
		return fmt.Errorf("read the engine's profile from %s: %w", o.Engine, err)
	}
	for i, d := range in.disks[1:] {
		info, err := models.InspectDisk(d, d.Size)
		if err != nil {
			return fmt.Errorf("read the model disk %s: %w", o.Models[i], err)
		}
		if _, _, err := p.Command(m, &info.Card, 1); err != nil {
			return fmt.Errorf("the engine would refuse the manifest: %w", err)
		}
	}
	return nil
}

func (in *inputs) makeManifest(o Options) (*manifest.Manifest, error) {
	var infos []models.Info
	for i, d := range in.disks[1:] {
		info, err := models.InspectDisk(d, d.Size)
		if err != nil {
			return nil, fmt.Errorf("read the model disk %s: %w", o.Models[i], err)
		}
		infos = append(infos, info)
	}
	m := models.Manifest(in.disks[0].Description, infos, o.GPUs, o.Parameters)
	m.Tokens = o.Tokens
	return m, nil
}

func (in *inputs) profile() (*profile.Profile, error) {
	_, fsys, err := disk.OpenTree(in.disks[0], in.disks[0].Size)
	if err != nil {
		return nil, err
	}
	f, err := fsys.Open(profile.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, profile.MaxSize+1))
	if err != nil {
		return nil, err
	}
	return profile.Parse(data)
}

// A piece is a partition and what it holds.
type piece struct {
	gpt.Partition
	data io.Reader
	at   int64 // of the data's first byte, from the partition's
	size int64 // of the data
}

// pieces returns the partitions in order. The EFI system partition's UUID and
// what is before its file are set when the file is written.
func (in *inputs) pieces() ([]piece, error) {
	carrier, entry, err := gpt.ManifestPartition(in.manifest)
	if err != nil {
		return nil, err
	}
	list := []piece{
		{
			gpt.Partition{Type: typeESP, Size: in.fat.size(), Name: "chrysalis-esp", Attributes: gpt.ReadOnly},
			io.NewSectionReader(in.uki, 0, in.ukiSize), in.fat.fileOffset(), in.ukiSize,
		},
		{entry, bytes.NewReader(carrier), 0, entry.Size},
	}
	for i, d := range in.disks {
		name := "chrysalis-engine"
		if i > 0 {
			name = fmt.Sprintf("chrysalis-model-%d", i-1)
		}
		dataUUID, hashUUID := d.RootHash.PartitionUUIDs()
		dataSize, hashSize := int64(d.DataBlocks)*verity.BlockSize, int64(d.HashBlocks)*verity.BlockSize
		list = append(list,
			piece{
				gpt.Partition{Type: verity.TypeData, UUID: dataUUID, Size: dataSize, Name: name, Attributes: gpt.ReadOnly},
				io.NewSectionReader(d, d.DataOffset, dataSize), 0, dataSize,
			},
			piece{
				gpt.Partition{Type: verity.TypeHash, UUID: hashUUID, Size: hashSize, Name: name + "-verity", Attributes: gpt.ReadOnly},
				io.NewSectionReader(d, d.HashOffset, hashSize), 0, hashSize,
			})
	}
	at := int64(grain)
	for i := range list {
		list[i].Offset = at
		at = roundUp(at+list[i].Size, grain)
	}
	return list, nil
}

// write writes the disk. The partition table comes last.
func (in *inputs) write(ctx context.Context, w io.WriterAt, progress func(string, int64, int64)) (Result, error) {
	list, err := in.pieces()
	if err != nil {
		return Result{}, err
	}
	var done, total int64
	for _, p := range list {
		total += p.size
	}
	const step = "write"
	progress(step, 0, total)
	ids := sha256.New()
	ids.Write([]byte("chrysalis/export/v1"))
	buf := make([]byte, 1<<20)
	for i, p := range list {
		var out io.Writer = io.NewOffsetWriter(w, p.Offset+p.at)
		if i == 0 {
			out = io.MultiWriter(out, ids) // of the UKI there is no other name
		}
		for left := p.size; left > 0; {
			if err := ctx.Err(); err != nil {
				return Result{}, err
			}
			part := buf[:min(left, int64(len(buf)))]
			if _, err := io.ReadFull(p.data, part); err != nil {
				return Result{}, fmt.Errorf("read what goes into partition %d: %w", i+1, err)
			}
			if _, err := out.Write(part); err != nil {
				return Result{}, err
			}
			left -= int64(len(part))
			done += int64(len(part))
			progress(step, done, total)
		}
	}

	// What else the disk holds is behind the manifest's hash.
	sum384 := manifest.SHA384(in.manifest)
	ids.Write(sum384[:])
	sum := ids.Sum(nil)
	t := gpt.Table{Disk: version8(sum[:16])}
	list[0].UUID = version8(sum[16:])
	volume := binary.LittleEndian.Uint32(sum)
	if _, err := w.WriteAt(in.fat.head(list[0].Offset, volume), list[0].Offset); err != nil {
		return Result{}, err
	}
	for _, p := range list {
		t.Partitions = append(t.Partitions, p.Partition)
	}
	last := list[len(list)-1]
	size := roundUp(gpt.DiskSize(last.Offset+last.Size), grain)
	if err := gpt.Write(w, t, size); err != nil {
		return Result{}, err
	}
	return Result{Size: size, Manifest: in.manifest, ManifestSHA384: sum384, Disk: t.Disk}, nil
}

// version8 makes a UUID of RFC 9562, section 5.8, out of 16 bytes of a hash.
func version8(sum []byte) gpt.GUID {
	u := gpt.GUID(sum)
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

func open(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, size, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are allowed", path, size, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func exists(path string) error {
	return fmt.Errorf("%s: %w: remove it, choose another name or give --force", path, fs.ErrExist)
}
