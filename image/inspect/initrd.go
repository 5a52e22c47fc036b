package inspect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

const (
	// maxWindow is the most memory that a packed initrd may ask for, in bytes:
	// twice what "zstd -19" takes.
	maxWindow = 16 << 20
	// maxUnpacked is the largest unpacked initrd, in bytes. It goes through a
	// temporary file, not through memory.
	maxUnpacked = 256 << 20

	zstdMagic = "\x28\xb5\x2f\xfd" // RFC 8878, section 3.1.1
)

// An Initrd is an unpacked initrd: one newc archive, as it is or in one zstd
// frame. What the kernel would take besides (more archives, other compressions)
// is refused, so that nothing goes unseen.
type Initrd struct {
	Compression string // "zstd" or "none"
	PackedSize  int64
	Size        int64 // unpacked, in bytes
	Entries     []Entry

	archive *io.SectionReader
	close   func() error
}

// OpenInitrd unpacks the initrd of size bytes in r. The unpacked archive stays
// in an unnamed temporary file until Close. Files are not hashed.
func OpenInitrd(ctx context.Context, r io.ReaderAt, size int64) (_ *Initrd, err error) {
	magic := make([]byte, 6)
	if err := readAt(r, magic, 0, size, "an initrd"); err != nil {
		return nil, err
	}
	i := &Initrd{Compression: "none", PackedSize: size, close: func() error { return nil }}
	switch {
	case string(magic) == cpioMagic:
		i.archive = io.NewSectionReader(r, 0, size)
	case string(magic[:4]) == zstdMagic:
		i.Compression = "zstd"
		if err := i.unpack(ctx, r, size); err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
	default:
		return nil, fmt.Errorf("byte 0: %q, expected a zstd frame or a newc archive", magic)
	}
	defer func() {
		if err != nil {
			i.Close()
		}
	}()
	i.Size = i.archive.Size()
	if i.Entries, err = ReadCPIO(i.archive, i.Size); err != nil {
		return nil, err
	}
	return i, nil
}

// Close frees the unpacked archive.
func (i *Initrd) Close() error { return i.close() }

func (i *Initrd) unpack(ctx context.Context, r io.ReaderAt, size int64) error {
	n, err := zstdFrame(r, size)
	if err != nil {
		return err
	}
	if err := zeros(r, n, size); err != nil {
		return fmt.Errorf("behind the frame of %d bytes: %w", n, err)
	}
	d, err := zstd.NewReader(io.NewSectionReader(r, 0, n), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxUnpacked))
	if err != nil {
		return err
	}
	defer d.Close()
	f, err := os.CreateTemp("", "chrysalis-initrd-")
	if err != nil {
		return err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return err
	}
	unpacked, err := io.Copy(f, io.LimitReader(cancelled{ctx, d}, maxUnpacked+1))
	if err == nil && unpacked > maxUnpacked {
		err = fmt.Errorf("it unpacks to more than %d bytes", maxUnpacked)
	}
	if err != nil {
		f.Close()
		return err
	}
	i.archive, i.close = io.NewSectionReader(f, 0, unpacked), f.Close
	return nil
}

// zstdFrame returns the length in bytes of the frame at the start of r (RFC
// 8878, section 3.1.1). No more than its headers are read.
func zstdFrame(r io.ReaderAt, size int64) (int64, error) {
	start := make([]byte, min(size, zstd.HeaderMaxSize))
	if err := readAt(r, start, 0, size, "a frame header"); err != nil {
		return 0, err
	}
	var h zstd.Header
	if err := h.Decode(start); err != nil {
		return 0, fmt.Errorf("frame header: %w", err)
	}
	window := h.WindowSize
	if h.SingleSegment {
		window = h.FrameContentSize
	}
	if h.Skippable || h.DictionaryID != 0 || window > maxWindow {
		return 0, fmt.Errorf("frame with a window of %d bytes, dictionary %d, skippable %v; expected at most %d bytes and no dictionary",
			window, h.DictionaryID, h.Skippable, maxWindow)
	}
	for at := int64(h.HeaderSize); ; {
		var block [4]byte
		if err := readAt(r, block[:3], at, size, "a block header"); err != nil {
			return 0, err
		}
		v := binary.LittleEndian.Uint32(block[:])
		last, kind, length := v&1 != 0, v>>1&3, int64(v>>3)
		switch kind {
		case 1: // one byte, repeated
			length = 1
		case 3:
			return 0, fmt.Errorf("byte %d: a reserved type of block", at)
		}
		if at += 3 + length; at > size {
			return 0, fmt.Errorf("byte %d: %w: the block goes beyond the end %d", at-3-length, io.ErrUnexpectedEOF, size)
		}
		if !last {
			continue
		}
		if h.HasCheckSum {
			at += 4
		}
		if at > size {
			return 0, errors.New("the checksum is cut off")
		}
		return at, nil
	}
}
