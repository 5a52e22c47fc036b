// Package models makes model disks: verity disks that carry a model's files as its
// publisher laid them out, and /model.json, which says what they are (package
// card).
//
// A disk is a function of the files' names and bytes, the model's name and its
// revision, so anyone who has the files can recompute the root hash that a
// publisher signed.
package models

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"chrysalis/models/card"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// Info describes a model disk.
type Info struct {
	card.Card
	// Disk holds the root hash, salt and number of blocks that a manifest
	// names, and the disk's own size.
	Disk verity.Description
}

// Ref returns name@revision:roothash, which is how a model is named wherever
// it is to be verified.
func (i Info) Ref() string { return i.ID() + ":" + i.Disk.RootHash.String() }

// ParseName splits ORG/NAME@REVISION into ORG/NAME and REVISION and checks
// both with card.CheckName.
func ParseName(s string) (name, revision string, err error) {
	name, revision, ok := strings.Cut(s, "@")
	if !ok {
		return "", "", fmt.Errorf("model %q: want ORG/NAME@REVISION", s)
	}
	if err := card.CheckName(name, revision); err != nil {
		return "", "", err
	}
	return name, revision, nil
}

// FragmentSuffix follows a model disk's path in that of its fragment, which says
// what it is.
const FragmentSuffix = ".json"

// PackOptions say what a model disk is called and where it goes.
type PackOptions struct {
	Name     string // ORG/NAME
	Revision string
	Out      string   // path of the disk; the fragment is at Out + ".json"
	Replace  bool     // take the place of what is at Out; otherwise nothing may be there
	Allow    []string // patterns (path.Match) of files that would be refused for what they are
	Exclude  []string // patterns of files to leave out
	// KeepPartial keeps the unfinished disk after an error.
	KeepPartial bool
	// Progress, if set, is called with the bytes done of a step and its total, which
	// is 0 where it is not known: "resume" once, with what an interrupted run has left,
	// then "pack".
	Progress func(step string, done, total int64)
	// Note, if set, is called with what the user should know.
	Note func(string)
	// Stream is read instead of a source whose name is "-": a tar stream.
	Stream io.Reader
}

func (o *PackOptions) note(format string, args ...any) {
	if o.Note != nil {
		o.Note(fmt.Sprintf(format, args...))
	}
}

// Pack makes a model disk from the folder or the GGUF file at src, or from a tar
// stream if src is "-", and writes what it is to Out + ".json". Everything is
// checked before anything is written, but in a stream, where a file is checked
// when it comes. All files are read once. An interrupted run is taken up by the
// next if no file has changed in the meantime; see disk.Options.Resume.
//
// The error wraps ErrRefused, ErrIncomplete, ErrNotGGUF, ErrNotSafetensors,
// fs.ErrExist if Out exists, or says what is wrong with the name.
func Pack(ctx context.Context, src string, o PackOptions) (Info, error) {
	if err := card.CheckName(o.Name, o.Revision); err != nil {
		return Info{}, err
	}
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	info, err := pack(ctx, src, o)
	if err != nil {
		return Info{}, fmt.Errorf("pack model %s: %w", src, err)
	}
	return info, nil
}

func pack(ctx context.Context, src string, o PackOptions) (info Info, err error) {
	c := newChecker(o.Allow)
	var left []string
	late := &disk.Late{
		Path: card.Path, Mode: 0o444,
		Size: func() (int64, error) {
			// The SHA-256 that are still missing have the length of all others.
			made, err := c.finish(o.Name, o.Revision)
			if err != nil {
				return 0, err
			}
			info.Card = *made
			data, err := made.Encode()
			return int64(len(data)), err
		},
		Content: func(sums map[string][32]byte) ([]byte, error) {
			for i, f := range info.Files {
				sum := sums[f.Path]
				info.Files[i].SHA256 = hex.EncodeToString(sum[:])
			}
			return info.Encode()
		},
	}
	options := disk.Options{
		Replace: o.Replace, Salt: salt(o.Name, o.Revision), Progress: o.Progress,
		Late: late, KeepPartial: o.KeepPartial,
		Fragment: func(d verity.Description) any {
			info.Disk = d
			return info.Fragment()
		},
	}
	if src == "-" {
		if info.Disk, err = disk.PackStream(ctx, tarEntries(o.Stream, c, o.Exclude, &left), o.Out, options); err != nil {
			return Info{}, err
		}
	} else {
		s, openErr := openSource(ctx, src, o.Exclude)
		if openErr != nil {
			return Info{}, openErr
		}
		defer func() { err = errors.Join(err, s.close()) }()
		left = s.left
		if err := s.check(ctx, c); err != nil {
			return Info{}, err
		}
		content := late.Content
		late.Content = func(sums map[string][32]byte) ([]byte, error) {
			if err := s.unchanged(); err != nil {
				return nil, err
			}
			return content(sums)
		}
		options.Resume = s.fingerprint()
		if info.Disk, err = disk.Pack(ctx, s.entries(), o.Out, options); err != nil {
			return Info{}, err
		}
	}
	for _, n := range c.notes {
		o.note("%s", n)
	}
	if len(left) > 0 {
		o.note("left out: %s", strings.Join(left, ", "))
	}
	return info, nil
}

// salt is what the hash tree of a model is salted with.
//
// It is public and can be computed, which costs nothing: the tree protects
// integrity, and its root hash is published and compared as a whole. Forging
// a block takes a second preimage of SHA-256 with or without a secret salt.
// A salt only keeps one search from serving against many disks, for which
// being different is enough, and a random one would make the disk differ each
// time it is packed.
func salt(name, revision string) []byte {
	// Neither name nor revision can contain a newline.
	sum := sha256.Sum256([]byte("chrysalis/model-salt/v1\n" + name + "\n" + revision))
	return sum[:]
}

// A Fragment is what is written beside a disk: the card, and the disk as a manifest
// names it, with its layout.
type Fragment struct {
	card.Card
	Disk struct {
		RootHash   string `json:"root_hash"`
		Salt       string `json:"salt"`
		DataBlocks uint64 `json:"data_blocks"`
		DataOffset int64  `json:"data_offset"` // bytes
		HashOffset int64  `json:"hash_offset"` // bytes
		Size       int64  `json:"size"`        // bytes
	} `json:"disk"`
}

// Fragment describes the disk for a program.
func (i Info) Fragment() Fragment {
	f := Fragment{Card: i.Card}
	f.Disk.RootHash, f.Disk.Salt, f.Disk.DataBlocks = i.Disk.RootHash.String(), hex.EncodeToString(i.Disk.Salt), i.Disk.DataBlocks
	f.Disk.DataOffset, f.Disk.HashOffset, f.Disk.Size = i.Disk.DataOffset, i.Disk.HashOffset, i.Disk.Size
	return f
}

// Inspect describes the model disk at path, a file or a block device, without
// mounting it. It checks the disk's form (verity.OpenDisk) and that the files are
// those of its card, but not their content: Verify does that.
func Inspect(path string) (Info, error) {
	f, size, err := openDisk(path)
	if err != nil {
		return Info{}, fmt.Errorf("inspect model disk: %w", err)
	}
	defer f.Close()
	info, err := InspectDisk(f, size)
	if err != nil {
		return Info{}, fmt.Errorf("inspect model disk %s: %w", path, err)
	}
	return info, nil
}

func openDisk(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, size, nil
}

// InspectDisk is Inspect for the disk of size bytes in r.
func InspectDisk(r io.ReaderAt, size int64) (Info, error) {
	d, fsys, err := disk.OpenTree(r, size)
	if err != nil {
		return Info{}, err
	}
	made, err := readCard(fsys)
	if err != nil {
		return Info{}, err
	}
	return Info{Card: *made, Disk: d}, nil
}

// readCard reads a disk's card and compares it with the files that are there.
func readCard(fsys fs.FS) (*card.Card, error) {
	f, err := fsys.Open(card.Path)
	if err != nil {
		return nil, fmt.Errorf("not a model disk: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, card.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read /%s: %w", card.Path, err)
	}
	c, err := card.Parse(raw)
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, f := range c.Files {
		sizes[f.Path] = f.Size
	}
	entries := 0
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entries++; entries > 4*card.MaxFiles {
			return fmt.Errorf("more than %d entries", 4*card.MaxFiles)
		}
		if d.IsDir() || name == card.Path {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		size, ok := sizes[name]
		if !ok || !info.Mode().IsRegular() {
			return fmt.Errorf("/%s is on the disk, but /%s does not list it as a file", name, card.Path)
		}
		if info.Size() != size {
			return fmt.Errorf("/%s has %d bytes, /%s says %d", name, info.Size(), card.Path, size)
		}
		delete(sizes, name)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for name := range sizes {
		return nil, fmt.Errorf("/%s lists /%s, which is not on the disk", card.Path, name)
	}
	return c, nil
}
