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
	"path/filepath"
	"slices"
	"strings"

	"chrysalis/models/card"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// VerifyOptions say how closely Verify looks.
type VerifyOptions struct {
	// Full reads the whole disk: each block is compared with the root hash, each file
	// with the card, and the weights' headers are checked again.
	Full bool
	// RootHash, if set, is the root hash that the disk must have.
	RootHash string
	Progress func(step string, done, total int64)
}

// Verify checks the model disk at path. A block that does not match the root hash
// is named with the file that it belongs to; the error then wraps
// verity.ErrCorrupt.
func Verify(ctx context.Context, path string, o VerifyOptions) (Info, error) {
	info, err := verify(ctx, path, o)
	if err != nil {
		return info, fmt.Errorf("verify model disk %s: %w", path, err)
	}
	return info, nil
}

func verify(ctx context.Context, path string, o VerifyOptions) (Info, error) {
	f, size, err := openDisk(path)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	if o.RootHash != "" {
		if _, err := verity.ParseRootHash(o.RootHash); err != nil {
			return Info{}, err
		}
		d, err := verity.OpenDisk(f, size)
		if err != nil {
			return Info{}, err
		}
		if d.RootHash.String() != o.RootHash {
			return Info{}, fmt.Errorf("its root hash is %s, expected %s: it is another disk", d.RootHash, o.RootHash)
		}
	}
	if !o.Full {
		return InspectDisk(f, size)
	}
	progress := func(step string) func(done, total int64) {
		if o.Progress == nil {
			return nil
		}
		return func(done, total int64) { o.Progress(step, done, total) }
	}
	if _, err := verity.VerifyDisk(ctx, f, size, progress("check the blocks")); err != nil {
		return Info{}, nameBlock(f, size, err)
	}
	info, err := InspectDisk(f, size)
	if err != nil {
		return Info{}, err
	}
	_, fsys, err := disk.OpenTree(f, size)
	if err != nil {
		return Info{}, err
	}
	return info, checkFiles(ctx, fsys, &info.Card, progress("check the files"))
}

// nameBlock adds to the error for a bad block the file that the block belongs to.
func nameBlock(r io.ReaderAt, size int64, err error) error {
	bad, ok := errors.AsType[*verity.BlockError](err)
	if !ok || bad.Area != "data" {
		return err
	}
	_, fsys, openErr := disk.OpenTree(r, size)
	if openErr != nil {
		return fmt.Errorf("%w (it holds the file system's own data)", err)
	}
	name, walkErr := disk.FileAt(fsys, bad.Block)
	switch {
	case walkErr != nil:
		return fmt.Errorf("%w (which file that is cannot be told: %w)", err, walkErr)
	case name == "":
		return fmt.Errorf("%w (it holds the file system's own data)", err)
	}
	return fmt.Errorf("/%s: %w", name, err)
}

// checkFiles compares the files with the card and checks the weights' headers.
func checkFiles(ctx context.Context, fsys fs.FS, c *card.Card, progress func(done, total int64)) error {
	check := newChecker([]string{"*"}) // the publisher has allowed what is there
	done, total := int64(0), c.Size()
	buf := make([]byte, 1<<20)
	for _, file := range c.Files {
		f, err := fsys.Open(file.Path)
		if err != nil {
			return err
		}
		sum := sha256.New()
		r := io.TeeReader(f, sum)
		err = check.look(file.Path, file.Size, r)
		for n := 1; err == nil && n > 0; { // what look has left
			if n, err = r.Read(buf); err == io.EOF {
				n, err = 0, nil
			}
			if e := ctx.Err(); e != nil {
				err = e
			}
			if done += int64(n); progress != nil {
				progress(min(done, total), total)
			}
		}
		if err == nil && hex.EncodeToString(sum.Sum(nil)) != file.SHA256 {
			err = fmt.Errorf("its SHA-256 is not the one in /%s", card.Path)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("/%s: %w", file.Path, err)
		}
	}
	found, err := check.finish(c.Name, c.Revision)
	if err != nil {
		return err
	}
	if found.Format != c.Format || found.Entry != c.Entry || found.Parameters != c.Parameters ||
		found.ContextLength != c.ContextLength || found.Quantisation != c.Quantisation || found.Licence != c.Licence {
		return fmt.Errorf("/%s does not say what the files say", card.Path)
	}
	return nil
}

// Diff says how two models differ, in lines for people, the most telling first. It
// returns none for the same disk.
func Diff(a, b Info) []string {
	if a.Disk.RootHash == b.Disk.RootHash {
		return nil
	}
	var out []string
	field := func(what string, x, y any) {
		if x != y {
			out = append(out, fmt.Sprintf("%s: %v → %v", what, x, y))
		}
	}
	field("name", a.Name, b.Name)
	field("revision", a.Revision, b.Revision)
	field("format", a.Format, b.Format)
	field("parameters", a.Parameters, b.Parameters)
	field("context length", a.ContextLength, b.ContextLength)
	field("quantisation", orNone(a.Quantisation), orNone(b.Quantisation))
	field("licence", orNone(a.Licence), orNone(b.Licence))
	old := map[string]card.File{}
	for _, f := range a.Files {
		old[f.Path] = f
	}
	for _, f := range b.Files {
		was, ok := old[f.Path]
		delete(old, f.Path)
		switch {
		case !ok:
			out = append(out, fmt.Sprintf("%s: added, %d bytes", f.Path, f.Size))
		case was.Size != f.Size:
			out = append(out, fmt.Sprintf("%s: %d bytes → %d bytes", f.Path, was.Size, f.Size))
		case was.SHA256 != f.SHA256:
			out = append(out, fmt.Sprintf("%s: other content of the same size", f.Path))
		}
	}
	for _, f := range a.Files {
		if _, gone := old[f.Path]; gone {
			out = append(out, f.Path+": removed")
		}
	}
	if len(out) == 0 {
		out = append(out, "the same files under the same name, on disks that were not made alike: "+
			hex.EncodeToString(a.Disk.Salt)+" and "+hex.EncodeToString(b.Disk.Salt)+" are their salts")
	}
	return out
}

func orNone(s string) string {
	if s == "" {
		return "(not stated)"
	}
	return s
}

// A Listed is a model disk that List found.
type Listed struct {
	Path string
	Info Info
}

// List returns the model disks in a folder, by name: files that end in .disk and
// are model disks. Nothing but their cards is read.
func List(dir string) ([]Listed, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list model disks: %w", err)
	}
	var out []Listed
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".disk") || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() {
			continue
		}
		info, err := Inspect(path)
		if err != nil {
			continue // an engine's, or another's
		}
		out = append(out, Listed{path, info})
	}
	slices.SortFunc(out, func(a, b Listed) int { return strings.Compare(a.Info.ID(), b.Info.ID()) })
	return out, nil
}
