// Package models makes model disks: verity disks that carry one GGUF file.
//
// A model disk's root file system holds /model.gguf and /model.json (name,
// revision, SHA-256 and size of the GGUF file). The disk is a function of the
// file's bytes, the name and the revision, so anyone who has the file can
// recompute the root hash that a publisher signed.
package models

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// The files of a model disk.
const (
	GGUFName = "model.gguf"
	InfoName = "model.json"
)

// maxInfo bounds /model.json in bytes; the names' grammar keeps it below.
const maxInfo = 4096

// Info describes a model disk.
type Info struct {
	Name     string // ORG/NAME
	Revision string
	SHA256   [32]byte // of the GGUF file
	Size     int64    // of the GGUF file, in bytes
	// Disk holds the root hash, salt and number of blocks that a manifest
	// names, and the disk's own size.
	Disk verity.Description
}

// Ref returns name@revision:roothash, which is how a model is named wherever
// it is to be verified.
func (i Info) Ref() string { return i.Name + "@" + i.Revision + ":" + i.Disk.RootHash.String() }

// part is the grammar of an organisation, a name and a revision: what is also
// a file name and needs no escaping in JSON, URLs and command lines.
var part = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckName tells what is wrong with a model's name, ORG/NAME, or its
// revision. Each part is 1 to 64 letters, digits, '.', '_' or '-', and begins
// with a letter or digit.
func CheckName(name, revision string) error {
	org, base, ok := strings.Cut(name, "/")
	if !ok || strings.Contains(base, "/") {
		return fmt.Errorf("model name %q: want ORG/NAME", name)
	}
	for _, p := range []struct{ what, s string }{{"organisation", org}, {"name", base}, {"revision", revision}} {
		if !part.MatchString(p.s) {
			return fmt.Errorf("model %s %q: want 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit", p.what, p.s)
		}
	}
	return nil
}

// ParseName splits ORG/NAME@REVISION into ORG/NAME and REVISION and checks
// both with CheckName.
func ParseName(s string) (name, revision string, err error) {
	name, revision, ok := strings.Cut(s, "@")
	if !ok {
		return "", "", fmt.Errorf("model %q: want ORG/NAME@REVISION", s)
	}
	if err := CheckName(name, revision); err != nil {
		return "", "", err
	}
	return name, revision, nil
}

// PackOptions say what a model disk is called and where it goes.
type PackOptions struct {
	Name     string // ORG/NAME
	Revision string
	Out      string // path of the disk
	Replace  bool   // take the place of what is at Out; otherwise nothing may be there
	// Progress, if set, is called with the bytes done of a step and its total:
	// "pack" reads the model, "hash" builds the tree.
	Progress func(step string, done, total int64)
}

// Pack makes a model disk from the GGUF file at src. The file is checked with
// CheckGGUF and read once. The same bytes, name and revision give the same
// disk. Memory, cancellation and how the disk appears at Out are as in
// disk.PackTree.
//
// The error wraps ErrNotGGUF, or fs.ErrExist if Out exists, or says what is
// wrong with the name.
func Pack(ctx context.Context, src string, o PackOptions) (Info, error) {
	if err := CheckName(o.Name, o.Revision); err != nil {
		return Info{}, err
	}
	info, err := pack(ctx, src, o)
	if err != nil {
		return Info{}, fmt.Errorf("pack model %s: %w", src, err)
	}
	return info, nil
}

func pack(ctx context.Context, src string, o PackOptions) (Info, error) {
	f, err := os.Open(src)
	if err != nil {
		return Info{}, err
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil {
		return Info{}, err
	}
	if !stat.Mode().IsRegular() {
		return Info{}, errors.New("not a regular file")
	}
	if err := CheckGGUF(f, stat.Size()); err != nil {
		return Info{}, err
	}

	tree, err := newTree(f, stat, o.Name, o.Revision)
	if err != nil {
		return Info{}, err
	}
	d, err := disk.PackTree(ctx, tree, o.Out, disk.Options{Replace: o.Replace, Salt: salt(o.Name, o.Revision), Progress: o.Progress})
	if err != nil {
		return Info{}, err
	}
	info := tree.info
	info.Disk = d
	return info, nil
}

// salt is what the hash tree of a model is salted with.
//
// It is public and can be computed, which costs nothing: the tree protects
// integrity, and its root hash is published and compared as a whole. Forging
// a block takes a second preimage of SHA-256 with or without a secret salt.
// A salt only keeps one search from serving against many disks, for which
// being different is enough, and a random one would make the disk differ each
// time it is made.
func salt(name, revision string) []byte {
	// Neither name nor revision can contain a newline.
	sum := sha256.Sum256([]byte("chrysalis/model-salt/v1\n" + name + "\n" + revision))
	return sum[:]
}

// Inspect describes the model disk at path, a file or a block device, without
// mounting it. It checks the disk's form (verity.OpenDisk) but not its
// content: verity.VerifyDisk does that.
func Inspect(path string) (Info, error) {
	f, err := os.Open(path)
	if err != nil {
		return Info{}, fmt.Errorf("inspect model disk: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return Info{}, fmt.Errorf("inspect model disk %s: %w", path, err)
	}
	info, err := InspectDisk(f, size)
	if err != nil {
		return Info{}, fmt.Errorf("inspect model disk %s: %w", path, err)
	}
	return info, nil
}

// InspectDisk is Inspect for the disk of size bytes in r.
func InspectDisk(r io.ReaderAt, size int64) (Info, error) {
	d, fsys, err := disk.OpenTree(r, size)
	if err != nil {
		return Info{}, err
	}
	f, err := fsys.Open(InfoName)
	if err != nil {
		return Info{}, fmt.Errorf("not a model disk: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxInfo+1))
	if err != nil {
		return Info{}, fmt.Errorf("read /%s: %w", InfoName, err)
	}
	info, err := parseInfo(raw)
	if err != nil {
		return Info{}, err
	}
	st, err := fs.Stat(fsys, GGUFName)
	if err != nil {
		return Info{}, fmt.Errorf("not a model disk: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() != info.Size {
		return Info{}, fmt.Errorf("/%s has %d bytes, /%s says %d", GGUFName, st.Size(), InfoName, info.Size)
	}
	info.Disk = d
	return info, nil
}

// infoJSON is /model.json: its fields in the order of RFC 8785.
type infoJSON struct {
	Name     string `json:"name"`
	Revision string `json:"revision"`
	SHA256   string `json:"sha256"`
	Size     int64  `json:"size"`
}

func (i Info) json() []byte {
	b, err := json.Marshal(infoJSON{i.Name, i.Revision, hex.EncodeToString(i.SHA256[:]), i.Size})
	if err != nil {
		panic(err) // strings and an integer always marshal
	}
	return b
}

// parseInfo reads /model.json. Only the canonical form is accepted, so one
// comparison refuses unknown, missing and duplicate fields alike.
func parseInfo(raw []byte) (Info, error) {
	var j infoJSON
	if len(raw) > maxInfo || json.Unmarshal(raw, &j) != nil {
		return Info{}, fmt.Errorf("/%s is not valid", InfoName)
	}
	if err := CheckName(j.Name, j.Revision); err != nil {
		return Info{}, fmt.Errorf("/%s: %w", InfoName, err)
	}
	info := Info{Name: j.Name, Revision: j.Revision, Size: j.Size}
	sum, err := hex.DecodeString(j.SHA256)
	if err != nil || len(sum) != len(info.SHA256) || j.Size <= 0 {
		return Info{}, fmt.Errorf("/%s is not valid", InfoName)
	}
	copy(info.SHA256[:], sum)
	if !bytes.Equal(raw, info.json()) {
		return Info{}, fmt.Errorf("/%s is not in canonical form", InfoName)
	}
	return info, nil
}
