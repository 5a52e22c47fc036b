package export

import (
	"encoding/binary"
	"fmt"
	"io"
)

// qcow2Writer writes a disk as a qcow2 image: QEMU's docs/interop/qcow2.rst,
// version 3. It is written here because QEMU's own programs promise nothing on
// where they put clusters; here the same writes give the same image.
//
// Clusters come in the order in which they are first written to, then the
// tables. Clusters of zeros are left out.
type qcow2Writer struct {
	w        io.WriterAt
	clusters map[int64]int64 // of the disk → of the image
	next     int64           // cluster of the image
}

const (
	qcow2Bits    = 16
	qcow2Cluster = 1 << qcow2Bits
	qcow2Copied  = 1 << 63 // the cluster has one reference
	qcow2Header  = 104     // bytes
)

func newQCOW2(w io.WriterAt) *qcow2Writer {
	return &qcow2Writer{w: w, clusters: map[int64]int64{}, next: 1} // the header has 0
}

// WriteAt implements io.WriterAt.
func (q *qcow2Writer) WriteAt(p []byte, at int64) (int, error) {
	done := 0
	for done < len(p) {
		cluster, within := at/qcow2Cluster, at%qcow2Cluster
		part := p[done:min(len(p), done+int(qcow2Cluster-within))]
		host, ok := q.clusters[cluster]
		if !ok && !zeros(part) {
			host, ok = q.next, true
			q.clusters[cluster] = host
			q.next++
		}
		if ok {
			if n, err := q.w.WriteAt(part, host*qcow2Cluster+within); err != nil {
				return done + n, err
			}
		}
		done += len(part)
		at += int64(len(part))
	}
	return done, nil
}

// finish writes the tables and the header of a disk of size bytes, a multiple
// of 512, and returns the image's size in bytes.
func (q *qcow2Writer) finish(size int64) (int64, error) {
	const perL2, perRefcounts, perTable = qcow2Cluster / 8, qcow2Cluster / 2, qcow2Cluster / 8
	be := binary.BigEndian
	disk := roundUp(size, qcow2Cluster) / qcow2Cluster
	l1 := make([]byte, roundUp(roundUp(disk, perL2)/perL2*8, qcow2Cluster))
	for i := range roundUp(disk, perL2) / perL2 {
		l2 := make([]byte, qcow2Cluster)
		for j := range int64(perL2) {
			if host, ok := q.clusters[i*perL2+j]; ok {
				be.PutUint64(l2[8*j:], uint64(host*qcow2Cluster)|qcow2Copied)
			}
		}
		if zeros(l2) {
			continue
		}
		be.PutUint64(l1[8*i:], uint64(q.next*qcow2Cluster)|qcow2Copied)
		if err := q.append(l2); err != nil {
			return 0, err
		}
	}
	l1At := q.next * qcow2Cluster
	if err := q.append(l1); err != nil {
		return 0, err
	}

	// Every cluster has one reference, those of the reference counts too.
	var blocks, tables, total int64
	for {
		total = q.next + blocks + tables
		b := roundUp(total, perRefcounts) / perRefcounts
		t := roundUp(b, perTable) / perTable
		if b == blocks && t == tables {
			break
		}
		blocks, tables = b, t
	}
	table := make([]byte, tables*qcow2Cluster)
	for i := range blocks {
		block := make([]byte, qcow2Cluster)
		for j := range min(perRefcounts, total-i*perRefcounts) {
			be.PutUint16(block[2*j:], 1)
		}
		be.PutUint64(table[8*i:], uint64(q.next*qcow2Cluster))
		if err := q.append(block); err != nil {
			return 0, err
		}
	}
	tableAt := q.next * qcow2Cluster
	if err := q.append(table); err != nil {
		return 0, err
	}

	h := make([]byte, qcow2Cluster)
	copy(h, "QFI\xfb")
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], qcow2Bits)
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[36:], uint32(roundUp(disk, perL2)/perL2))
	be.PutUint64(h[40:], uint64(l1At))
	be.PutUint64(h[48:], uint64(tableAt))
	be.PutUint32(h[56:], uint32(tables))
	be.PutUint32(h[96:], 4) // reference counts of 1 << 4 bits
	be.PutUint32(h[100:], qcow2Header)
	if _, err := q.w.WriteAt(h, 0); err != nil {
		return 0, fmt.Errorf("write qcow2 header: %w", err)
	}
	return q.next * qcow2Cluster, nil
}

// append writes whole clusters behind everything else.
func (q *qcow2Writer) append(p []byte) error {
	if _, err := q.w.WriteAt(p, q.next*qcow2Cluster); err != nil {
		return fmt.Errorf("write qcow2 tables: %w", err)
	}
	q.next += int64(len(p)) / qcow2Cluster
	return nil
}

func zeros(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
