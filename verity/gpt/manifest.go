package gpt

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// ManifestType is the partition type "Chrysalis manifest". It is a random
// GUID chosen for this project; no other specification uses it.
var ManifestType = MustGUID("48b1871a-8e85-47c4-827e-9127495b8f23")

// MaxManifest is the largest manifest a manifest disk carries, in bytes.
const MaxManifest = 64 << 10

// A manifest partition begins with 16 bytes, then the manifest, then zeros up
// to the next multiple of Alignment, where the partition ends:
//
//	0  8  "CHRYSMAN"
//	8  4  version, little-endian, 1
//	12 4  length of the manifest in bytes, little-endian
const (
	manifestMagic   = "CHRYSMAN"
	manifestVersion = 1
	manifestHeader  = 16
	manifestOffset  = 1 << 20
)

// ManifestPartition returns the content of the partition that carries a
// manifest, 1 to MaxManifest bytes, and its entry in a table, in which the
// caller sets the offset. The UUID is taken from the manifest's SHA-256.
func ManifestPartition(manifest []byte) ([]byte, Partition, error) {
	if len(manifest) == 0 || len(manifest) > MaxManifest {
		return nil, Partition{}, fmt.Errorf("a manifest of %d bytes; 1 to %d are allowed", len(manifest), MaxManifest)
	}
	part := make([]byte, manifestPartition(len(manifest)))
	copy(part, manifestMagic)
	binary.LittleEndian.PutUint32(part[8:], manifestVersion)
	binary.LittleEndian.PutUint32(part[12:], uint32(len(manifest)))
	copy(part[manifestHeader:], manifest)
	sum := sha256.Sum256(manifest)
	return part, Partition{
		Type:       ManifestType,
		UUID:       GUID(sum[:16]),
		Size:       int64(len(part)),
		Name:       "chrysalis-manifest",
		Attributes: ReadOnly,
	}, nil
}

// WriteManifestDisk writes a whole disk image whose only partition carries
// the manifest, 1 to MaxManifest bytes, and returns the image's size in
// bytes. The same manifest gives the same image: both GUIDs are taken from
// the manifest's SHA-256. w should be empty, for the gaps are not written.
func WriteManifestDisk(w io.WriterAt, manifest []byte) (int64, error) {
	part, entry, err := ManifestPartition(manifest)
	if err != nil {
		return 0, fmt.Errorf("write manifest disk: %w", err)
	}
	entry.Offset = manifestOffset
	if _, err := w.WriteAt(part, entry.Offset); err != nil {
		return 0, fmt.Errorf("write manifest disk: %w", err)
	}
	sum := sha256.Sum256(manifest)
	size := DiskSize(entry.Offset + entry.Size)
	return size, Write(w, Table{Disk: GUID(sum[16:]), Partitions: []Partition{entry}}, size)
}

// ReadManifestDisk returns the manifest that a disk of size bytes carries.
// The disk has exactly one partition of ManifestType, and any others beside
// it; the header, length and zero padding must be just as WriteManifestDisk
// writes them. Anything else wraps ErrInvalid, so that a caller can look at the
// next disk; a failing read of the disk does not. The manifest itself is not
// looked at.
func ReadManifestDisk(r io.ReaderAt, size int64) ([]byte, error) {
	t, err := Read(r, size)
	if err != nil {
		return nil, fmt.Errorf("read manifest disk: %w", err)
	}
	manifests := slices.DeleteFunc(t.Partitions, func(p Partition) bool { return p.Type != ManifestType })
	if len(manifests) != 1 {
		return nil, fmt.Errorf("read manifest disk: %w: %d manifest partitions, expected one", ErrInvalid, len(manifests))
	}
	p := manifests[0]
	if p.Size > manifestPartition(MaxManifest) {
		return nil, fmt.Errorf("read manifest disk: %w: partition of %d bytes", ErrInvalid, p.Size)
	}
	part := make([]byte, p.Size)
	if err := readFull(r, part, p.Offset); err != nil {
		return nil, fmt.Errorf("read manifest disk: %w", err)
	}
	n := int64(binary.LittleEndian.Uint32(part[12:]))
	if !bytes.HasPrefix(part, []byte(manifestMagic)) || binary.LittleEndian.Uint32(part[8:]) != manifestVersion ||
		n == 0 || n > MaxManifest || manifestPartition(int(n)) != p.Size || !allZero(part[manifestHeader+n:]) {
		return nil, fmt.Errorf("read manifest disk: %w: manifest partition is malformed", ErrInvalid)
	}
	return part[manifestHeader:][:n:n], nil
}

// manifestPartition is the size of the partition for a manifest of n bytes.
func manifestPartition(n int) int64 {
	return (int64(n) + manifestHeader + Alignment - 1) / Alignment * Alignment
}
