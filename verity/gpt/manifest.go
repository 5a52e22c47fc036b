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

// CollateralType is the partition type "Chrysalis GPU collateral", a random GUID
// like ManifestType.
var CollateralType = MustGUID("fee789c9-ac57-4428-8f82-6514df64166e")

// MaxCollateral is the largest GPU collateral a partition carries, in bytes.
const MaxCollateral = 4 << 20

// A payload is a document that has a partition to itself, which begins with 16
// bytes, then the document, then zeros up to the next multiple of Alignment, where
// the partition ends:
//
//	0  8  magic
//	8  4  version, little-endian, 1
//	12 4  length of the document in bytes, little-endian
type payload struct {
	what  string // in errors
	kind  GUID
	name  string // of the partition
	magic string
	limit int // bytes of the document
}

var (
	manifestPayload   = payload{"manifest", ManifestType, "chrysalis-manifest", "CHRYSMAN", MaxManifest}
	collateralPayload = payload{"GPU collateral", CollateralType, "chrysalis-gpu", "CHRYSGPU", MaxCollateral}
)

const (
	manifestVersion = 1
	manifestHeader  = 16
	manifestOffset  = 1 << 20
)

// ManifestPartition returns the content of the partition that carries a
// manifest, 1 to MaxManifest bytes, and its entry in a table, in which the
// caller sets the offset. The UUID is taken from the manifest's SHA-256.
func ManifestPartition(manifest []byte) ([]byte, Partition, error) {
	return manifestPayload.partition(manifest)
}

func (p payload) partition(document []byte) ([]byte, Partition, error) {
	if len(document) == 0 || len(document) > p.limit {
		return nil, Partition{}, fmt.Errorf("%s of %d bytes; 1 to %d are allowed", p.what, len(document), p.limit)
	}
	part := make([]byte, payloadPartition(len(document)))
	copy(part, p.magic)
	binary.LittleEndian.PutUint32(part[8:], manifestVersion)
	binary.LittleEndian.PutUint32(part[12:], uint32(len(document)))
	copy(part[manifestHeader:], document)
	sum := sha256.Sum256(document)
	return part, Partition{
		Type:       p.kind,
		UUID:       GUID(sum[:16]),
		Size:       int64(len(part)),
		Name:       p.name,
		Attributes: ReadOnly,
	}, nil
}

// WriteManifestDisk writes a whole disk image that carries the manifest, 1 to
// MaxManifest bytes, and, unless it is nil, GPU collateral of at most
// MaxCollateral bytes in a partition behind it. It returns the image's size in
// bytes. The same input gives the same image: the GUIDs are taken from SHA-256
// sums. w should be empty, for the gaps are not written.
func WriteManifestDisk(w io.WriterAt, manifest, collateral []byte) (int64, error) {
	part, entry, err := ManifestPartition(manifest)
	if err != nil {
		return 0, fmt.Errorf("write manifest disk: %w", err)
	}
	entry.Offset = manifestOffset
	parts, entries := [][]byte{part}, []Partition{entry}
	if collateral != nil {
		if part, entry, err = collateralPayload.partition(collateral); err != nil {
			return 0, fmt.Errorf("write manifest disk: %w", err)
		}
		entry.Offset = entries[0].Offset + entries[0].Size
		parts, entries = append(parts, part), append(entries, entry)
	}
	for i, part := range parts {
		if _, err := w.WriteAt(part, entries[i].Offset); err != nil {
			return 0, fmt.Errorf("write manifest disk: %w", err)
		}
	}
	sum := sha256.Sum256(manifest)
	last := entries[len(entries)-1]
	size := DiskSize(last.Offset + last.Size)
	return size, Write(w, Table{Disk: GUID(sum[16:]), Partitions: entries}, size)
}

// ReadManifestDisk returns the manifest that a disk of size bytes carries.
// The disk has exactly one partition of ManifestType, and any others beside
// it; the header, length and zero padding must be just as WriteManifestDisk
// writes them. Anything else wraps ErrInvalid, so that a caller can look at the
// next disk; a failing read of the disk does not. The manifest itself is not
// looked at.
func ReadManifestDisk(r io.ReaderAt, size int64) ([]byte, error) {
	return manifestPayload.read(r, size)
}

// ReadCollateral returns the GPU collateral that a disk of size bytes carries, by
// the same rules as ReadManifestDisk. Nothing vouches for it.
func ReadCollateral(r io.ReaderAt, size int64) ([]byte, error) {
	return collateralPayload.read(r, size)
}

func (p payload) read(r io.ReaderAt, size int64) ([]byte, error) {
	t, err := Read(r, size)
	if err != nil {
		return nil, fmt.Errorf("read %s disk: %w", p.what, err)
	}
	found := slices.DeleteFunc(t.Partitions, func(e Partition) bool { return e.Type != p.kind })
	if len(found) != 1 {
		return nil, fmt.Errorf("read %s disk: %w: %d %s partitions, expected one", p.what, ErrInvalid, len(found), p.what)
	}
	e := found[0]
	if e.Size > payloadPartition(p.limit) {
		return nil, fmt.Errorf("read %s disk: %w: partition of %d bytes", p.what, ErrInvalid, e.Size)
	}
	part := make([]byte, e.Size)
	if err := readFull(r, part, e.Offset); err != nil {
		return nil, fmt.Errorf("read %s disk: %w", p.what, err)
	}
	n := int64(binary.LittleEndian.Uint32(part[12:]))
	if !bytes.HasPrefix(part, []byte(p.magic)) || binary.LittleEndian.Uint32(part[8:]) != manifestVersion ||
		n == 0 || n > int64(p.limit) || payloadPartition(int(n)) != e.Size || !allZero(part[manifestHeader+n:]) {
		return nil, fmt.Errorf("read %s disk: %w: %s partition is malformed", p.what, ErrInvalid, p.what)
	}
	return part[manifestHeader:][:n:n], nil
}

// payloadPartition is the size of the partition for a document of n bytes.
func payloadPartition(n int) int64 {
	return (int64(n) + manifestHeader + Alignment - 1) / Alignment * Alignment
}
