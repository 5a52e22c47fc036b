// Package card reads and writes /model.json, in which a model disk says what it
// holds. It is covered by the disk's root hash, so whoever approves the root hash
// has approved it too. The VM reads it as well as the host.
package card

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
)

// Path is where a model disk carries its card.
const Path = "model.json"

// Bounds of a card.
const (
	MaxSize  = 2 << 20 // bytes
	MaxFiles = 8192
	maxPath  = 512 // bytes
)

// Version is the version that this package reads and writes.
const Version = 1

// Formats of weights.
const (
	GGUF        = "gguf"
	Safetensors = "safetensors"
)

// A Card describes a model: fields in the order of RFC 8785. What the source does
// not state is "" or 0.
type Card struct {
	ContextLength int64  `json:"context_length"` // tokens
	Entry         string `json:"entry"`          // the file that an engine opens, for GGUF; else ""
	Files         []File `json:"files"`          // all but the card, in order of path
	Format        string `json:"format"`         // GGUF or Safetensors
	Licence       string `json:"licence"`        // as the source writes it, an SPDX identifier mostly
	Name          string `json:"name"`           // ORG/NAME
	Parameters    int64  `json:"parameters"`     // elements of all tensors
	Quantisation  string `json:"quantisation"`   // Q4_K_M, BF16, awq …
	Revision      string `json:"revision"`
	Version       int    `json:"version"`
}

// A File is a file of a model.
type File struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"` // 64 lower-case hexadecimal digits
	Size   int64  `json:"size"`   // bytes
}

// Size is the size of all files, in bytes.
func (c *Card) Size() int64 {
	var n int64
	for _, f := range c.Files {
		n += f.Size
	}
	return n
}

// ID returns NAME@REVISION.
func (c *Card) ID() string { return c.Name + "@" + c.Revision }

var (
	// part is the grammar of an organisation, a name and a revision: what is also
	// a file name and needs no escaping in JSON, URLs and command lines.
	part   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	pathRE = regexp.MustCompile(`^[A-Za-z0-9._+=@,()\[\]~ /-]+$`)
	sumRE  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	wordRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)
)

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

// CheckPath tells what is wrong with a file's path inside a model.
func CheckPath(path string) error {
	if len(path) > maxPath || !fs.ValidPath(path) || path == "." || !pathRE.MatchString(path) {
		return fmt.Errorf("file name %.80q: want up to %d bytes of letters, digits, spaces and any of . _ + = @ , ( ) [ ] ~ -", path, maxPath)
	}
	return nil
}

// Word reports whether s can stand in Licence or Quantisation: up to 64 letters,
// digits, '.', '_', '+' and '-'.
func Word(s string) bool { return wordRE.MatchString(s) }

// Validate reports the first thing that is wrong with a card.
func (c *Card) Validate() error {
	if c.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", c.Version, Version)
	}
	if err := CheckName(c.Name, c.Revision); err != nil {
		return err
	}
	if c.Format != GGUF && c.Format != Safetensors {
		return fmt.Errorf("format %.40q is neither %s nor %s", c.Format, GGUF, Safetensors)
	}
	for _, w := range []struct{ what, s string }{{"licence", c.Licence}, {"quantisation", c.Quantisation}} {
		if w.s != "" && !Word(w.s) {
			return fmt.Errorf("%s %.80q: want up to 64 letters, digits, '.', '_', '+' and '-'", w.what, w.s)
		}
	}
	const maxInteger = 1<<53 - 1 // RFC 8785 can carry it exactly
	if c.ContextLength < 0 || c.ContextLength > maxInteger || c.Parameters < 0 || c.Parameters > maxInteger {
		return errors.New("context_length or parameters is out of bounds")
	}
	if len(c.Files) == 0 || len(c.Files) > MaxFiles {
		return fmt.Errorf("%d files, expected 1 to %d", len(c.Files), MaxFiles)
	}
	entry := c.Format == Safetensors && c.Entry == ""
	for i, f := range c.Files {
		if err := CheckPath(f.Path); err != nil {
			return err
		}
		if f.Path == Path {
			return fmt.Errorf("%s lists itself", Path)
		}
		if i > 0 && f.Path <= c.Files[i-1].Path {
			return fmt.Errorf("files are not in order: %q", f.Path)
		}
		if !sumRE.MatchString(f.SHA256) {
			return fmt.Errorf("%s: its SHA-256 is not 64 lower-case hexadecimal digits", f.Path)
		}
		if f.Size < 0 || f.Size > maxInteger {
			return fmt.Errorf("%s: %d bytes", f.Path, f.Size)
		}
		entry = entry || c.Format == GGUF && f.Path == c.Entry
	}
	if !entry {
		return fmt.Errorf("entry %.80q is not what a %s model has", c.Entry, c.Format)
	}
	return nil
}

// Encode returns the canonical encoding (RFC 8785) of a valid card. The files are
// put in order.
func (c *Card) Encode() ([]byte, error) {
	slices.SortFunc(c.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("/%s: %w", Path, err)
	}
	// Strings hold nothing that JSON escapes, and the fields are in order.
	data, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("/%s: %w", Path, err)
	}
	if len(data) > MaxSize {
		return nil, fmt.Errorf("/%s: %d bytes, at most %d are allowed", Path, len(data), MaxSize)
	}
	return data, nil
}

// Parse reads a card. Only the canonical encoding is accepted, so one comparison
// refuses unknown, missing and repeated fields alike.
func Parse(data []byte) (*Card, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("/%s: %d bytes, at most %d are allowed", Path, len(data), MaxSize)
	}
	var c Card
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("/%s: not valid JSON of a model: %w", Path, err)
	}
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("/%s: %w", Path, err)
	}
	again, err := c.Encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, data) {
		return nil, fmt.Errorf("/%s is not in canonical form", Path)
	}
	return &c, nil
}
