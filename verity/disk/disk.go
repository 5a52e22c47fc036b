// Package disk packs files into a verity disk and reads one back on the host:
// package verity's disk format with an EROFS image as its data.
//
// A disk is a function of its entries' paths, types, permission bits, content and
// links, and of the salt. Owners are 0, times the Unix epoch, set-id bits and
// extended attributes are dropped, hard links become copies, other kinds of files
// are refused. Neither the order nor the time in which files are found plays a
// part, nor does the machine.
//
// It is apart from package verity so that the VM, which leaves file systems to
// the kernel, links no EROFS code.
package disk

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/erofs/go-erofs"

	"chrysalis/verity"
)

// An Entry is a file, a folder or a symbolic link of a disk to be.
type Entry struct {
	Path   string      // as fs.ValidPath wants it; "." is the top folder
	Mode   fs.FileMode // type and permission bits; others are dropped
	Size   int64       // of a file, in bytes
	Target string      // of a link, up to 4032 bytes
	// Open opens a file's content, once. It is called when the file's turn comes.
	Open func() (Content, error)
}

// Content is a file's content. ReadAt is called from several goroutines.
type Content interface {
	io.ReaderAt
	io.Closer
}

// Late is a file whose content follows from that of the others. Its place is
// behind them.
type Late struct {
	Path string
	Mode fs.FileMode
	// Size is called once, when all other entries are known.
	Size func() (int64, error)
	// Content is called once, when all else has been read: an error from it is the
	// last chance to refuse. sums has the SHA-256 of every file, by path.
	Content func(sums map[string][32]byte) ([]byte, error)
}

// Options are the inputs of a disk besides the files.
type Options struct {
	// Salt of the hash tree, at most verity.MaxSalt bytes. Give different
	// kinds of disks different salts; it need not be secret.
	Salt []byte
	// Replace lets the disk take the place of what is at out.
	Replace bool
	// Progress, if set, is called with the bytes of files done and their total; the
	// total is 0 for a stream.
	Progress func(step string, done, total int64)
	// Late, if set, adds a file, and has the SHA-256 of all others computed.
	Late *Late
	// Resume, if set, lets an interrupted Pack go on where it was if it is run again
	// with the same string, which must change whenever a file's content may have. The
	// unfinished disk is kept beside out, under a name that begins with a dot and ends
	// in ".partial".
	Resume string
	// KeepPartial keeps the unfinished disk after an error, too.
	KeepPartial bool
	// Fragment, if set, says what a file beside the disk, out with FragmentSuffix, is
	// to hold as JSON. It is written before the disk gets its name: who finds a disk
	// finds its fragment, and a run that is killed between the two can be repeated.
	Fragment func(verity.Description) any
}

// SparseEntry reports whether a tar entry is a sparse file: a few bytes of a stream
// that stand for as many bytes of zeros as its writer likes.
func SparseEntry(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

func (o *Options) sums() bool { return o.Late != nil }

// diskUUID makes the disk's GUID, which nothing relies on: any constant would
// do, and this one differs where the salt does. Version 8 of RFC 9562.
func diskUUID(salt []byte) [16]byte {
	sum := sha256.Sum256(append([]byte("chrysalis/disk-uuid/v1"), salt...))
	u := [16]byte(sum[:16])
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

// OpenTree describes the verity disk of size bytes in r (verity.OpenDisk) and
// opens the EROFS image on it, on the host. Nothing is mounted and no block is
// checked against the root hash: use verity.VerifyDisk first where that
// matters. Reads stay inside the data partition. A malformed image gives
// errors, from here or from the file system.
func OpenTree(r io.ReaderAt, size int64) (verity.Description, fs.FS, error) {
	d, err := verity.OpenDisk(r, size)
	if err != nil {
		return d, nil, err
	}
	fsys, err := erofs.Open(io.NewSectionReader(r, d.DataOffset, int64(d.DataBlocks)*verity.BlockSize))
	if err != nil {
		return d, nil, fmt.Errorf("open EROFS image: %w", err)
	}
	return d, fsys, nil
}

// FileAt returns the path of the file or folder whose content is in a block of the
// image in fsys, as OpenTree returned it, or "" if the block holds no file's: it is
// the superblock's, the inodes', or unused.
func FileAt(fsys fs.FS, block uint64) (string, error) {
	at := int64(block) * verity.BlockSize
	found := ""
	err := fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		ranger, ok := info.(interface{ DataRange() []erofs.DataRange })
		if !ok {
			return nil
		}
		for _, r := range ranger.DataRange() {
			if r.Offset >= 0 && r.Offset < at+verity.BlockSize && at < r.Offset+r.Size {
				found = path
				return fs.SkipAll
			}
		}
		return nil
	})
	return found, err
}
