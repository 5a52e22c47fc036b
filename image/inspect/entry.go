package inspect

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A Mode is a file's type and permissions as stat(2) has them in st_mode.
type Mode uint32

// String returns the octal digits, such as 100644.
func (m Mode) String() string { return strconv.FormatUint(uint64(m), 8) }

// MarshalText returns String's form.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// Type names the type of the file.
func (m Mode) Type() string {
	switch m & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "folder"
	case unix.S_IFLNK:
		return "link"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "pipe"
	case unix.S_IFSOCK:
		return "socket"
	}
	return ""
}

func (m Mode) is(format Mode) bool { return m&unix.S_IFMT == format }

// An Entry is a file, folder, link or device in an initrd or on a disk.
type Entry struct {
	Path   string    `json:"path"` // as fs.ValidPath has it; the top is "."
	Mode   Mode      `json:"mode"`
	UID    uint32    `json:"uid"`
	GID    uint32    `json:"gid"`
	Time   time.Time `json:"time"`
	Size   int64     `json:"size"`             // of a file's content or a link's target, in bytes
	SHA256 string    `json:"sha256,omitempty"` // of a file's content, in a Report
	Target string    `json:"target,omitempty"` // of a link
	// Device is a device's own number, major << 32 | minor.
	Device uint64            `json:"device,omitempty"`
	Links  uint32            `json:"links"`
	Inode  uint64            `json:"inode"`
	Xattrs map[string]string `json:"xattrs,omitempty"` // values in hexadecimal

	on uint64 // cpio: the number of the device that the file was on
	// content is that of a file, else nil. Hard links on a disk share one, so
	// that however many there are, it is read once.
	content *content
}

// content is bytes that can be read again and again.
type content struct {
	size int64
	open func() (io.ReadCloser, error)
}

// sectionContent is a section of a file that stays open.
func sectionContent(r *io.SectionReader) *content {
	return &content{r.Size(), func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(r, 0, r.Size())), nil
	}}
}

// Content returns a file's bytes, of which there may be at most limit.
func (e Entry) Content(limit int64) ([]byte, error) {
	if e.content == nil {
		return nil, fmt.Errorf("%s: a %s has no content", e.Path, e.Mode.Type())
	}
	b, err := e.content.bytes(limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.Path, err)
	}
	return b, nil
}

func (c *content) bytes(limit int64) ([]byte, error) {
	if c.size > limit {
		return nil, fmt.Errorf("%d bytes, at most %d can be looked at", c.size, limit)
	}
	r, err := c.open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b := make([]byte, c.size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return b, nil
}

// sum returns the SHA-256 in hexadecimal. It is an error where there are fewer
// bytes than there should be.
func (c *content) sum(ctx context.Context) (string, error) {
	r, err := c.open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	h := sha256.New()
	n, err := io.CopyBuffer(h, io.LimitReader(cancelled{ctx, r}, c.size), make([]byte, 256<<10))
	if err != nil {
		return "", err
	}
	if n != c.size {
		return "", fmt.Errorf("%d bytes, expected %d: %w", n, c.size, io.ErrUnexpectedEOF)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// hash fills in the SHA-256 of every file.
func hash(ctx context.Context, entries []Entry) error {
	sums := map[*content]string{}
	for i := range entries {
		e := &entries[i]
		if e.content == nil {
			continue
		}
		if sums[e.content] == "" {
			sum, err := e.content.sum(ctx)
			if err != nil {
				return fmt.Errorf("%q: %w", e.Path, err)
			}
			sums[e.content] = sum
		}
		e.SHA256 = sums[e.content]
	}
	return nil
}

// cancelled is a reader that ends with its context.
type cancelled struct {
	ctx context.Context
	r   io.Reader
}

func (c cancelled) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
