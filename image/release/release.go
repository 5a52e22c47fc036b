// Package release writes and reads release.json, the hashes that a build of this
// source must have. The file is committed, so a review shows which artefacts a
// change alters, and CI fails where they alter by themselves.
//
// No build reads it: it describes what comes out, and changing it changes nothing
// else.
package release

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"chrysalis/image"
	"chrysalis/image/provenance"
	"chrysalis/image/toolsroot"
	"chrysalis/outfile"
)

// Name is the file's name, at the top of the source tree.
const Name = "release.json"

// MaxSize bounds the file, in bytes.
const MaxSize = 256 << 10

// A Release is what a build of one source gives.
type Release struct {
	Version   int         `json:"version"`   // 1
	Lock      string      `json:"lock"`      // SHA-256 of image.lock
	Artefacts []File      `json:"artefacts"` // sorted by name
	Tools     Tools       `json:"tools"`
	Inputs    Measurement `json:"measurement_inputs"`
}

// A File is known by its content.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// Tools is the content of the tools root.
type Tools struct {
	Key     string `json:"key"`     // 16 hexadecimal digits: what it is made of
	Entries int    `json:"entries"` // files, folders and links
	SHA256  string `json:"sha256"`  // of its list, toolsroot.Root.List
}

// Describe describes the artefacts that parameters name, in the folder that they
// were built into.
func Describe(ctx context.Context, source, dir string, p provenance.Parameters) (*Release, error) {
	lock, err := image.ReadLock(source)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(lock.Encode())
	r := &Release{Version: 1, Lock: hex.EncodeToString(sum[:])}
	for _, name := range p.Artefacts() {
		f, err := describe(filepath.Join(dir, name), name)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w; build it with 'chrysalis image build -o %s'", err, dir)
		}
		if err != nil {
			return nil, err
		}
		r.Artefacts = append(r.Artefacts, f)
	}
	root, err := image.OpenTools(lock)
	if err != nil {
		return nil, err
	}
	if r.Tools, err = describeTools(ctx, root); err != nil {
		return nil, err
	}
	r.Inputs, err = measurementInputs(ctx, dir, p, lock, root)
	return r, err
}

func describe(path, name string) (File, error) {
	sum, size, err := image.HashFile(path)
	return File{name, size, sum}, err
}

func describeTools(ctx context.Context, root *toolsroot.Root) (Tools, error) {
	list, err := root.List(ctx)
	if err != nil {
		return Tools{}, err
	}
	sum := sha256.Sum256(list)
	return Tools{Key: filepath.Base(root.Dir), Entries: bytes.Count(list, []byte("\n")), SHA256: hex.EncodeToString(sum[:])}, nil
}

// Encode returns the one form that the file has.
func (r *Release) Encode() []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(r); err != nil {
		panic(err) // plain structs of strings and numbers
	}
	return b.Bytes()
}

// Read reads the file of the source tree at dir.
func Read(dir string) (*Release, error) {
	path := filepath.Join(dir, Name)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the expected hashes: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read the expected hashes: %w", err)
	}
	r, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// Parse reads the file, strictly: it is as Encode writes it.
func Parse(data []byte) (*Release, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("more than %d bytes", MaxSize)
	}
	var r Release
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return nil, fmt.Errorf("not the hashes of a release: %w", err)
	}
	if r.Version != 1 {
		return nil, fmt.Errorf("its version is %d, this program reads version 1", r.Version)
	}
	if !bytes.Equal(r.Encode(), data) {
		return nil, errors.New("it is not as 'chrysalis image release' writes it")
	}
	return &r, nil
}

// Write writes the file into the source tree at dir.
func (r *Release) Write(dir string) error {
	if err := outfile.Write(filepath.Join(dir, Name), r.Encode(), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", Name, err)
	}
	return nil
}

// Diff says in words what differs from one description to another, a value a
// line: "artefacts.chrysalis.efi.sha256 is A, B expected".
func Diff(expected, found *Release) []string {
	want, is := values(expected), values(found)
	var lines []string
	for _, key := range is.keys {
		if w, ok := want.of[key]; !ok {
			lines = append(lines, fmt.Sprintf("%s is %s and was not expected", key, is.of[key]))
		} else if w != is.of[key] {
			lines = append(lines, fmt.Sprintf("%s is %s, %s expected", key, is.of[key], w))
		}
	}
	for _, key := range want.keys {
		if _, ok := is.of[key]; !ok {
			lines = append(lines, fmt.Sprintf("%s is not there, %s expected", key, want.of[key]))
		}
	}
	return lines
}

// flat is a description as a list of named values.
type flat struct {
	keys []string
	of   map[string]string
}

// values names every value of a description by its place; elements of lists go by
// their names.
func values(r *Release) flat {
	f := flat{of: map[string]string{}}
	dec := json.NewDecoder(bytes.NewReader(r.Encode()))
	dec.UseNumber()
	var tree map[string]any
	if err := dec.Decode(&tree); err != nil {
		panic(err) // what Encode has written
	}
	// In the order of the file.
	for _, key := range []string{"version", "lock", "artefacts", "tools", "measurement_inputs"} {
		f.add(key, tree[key])
	}
	return f
}

func (f *flat) add(at string, v any) {
	switch v := v.(type) {
	case map[string]any:
		for _, key := range sortedKeys(v) {
			if key != "name" {
				f.add(at+"."+key, v[key])
			}
		}
	case []any:
		for i, e := range v {
			name := fmt.Sprint(i)
			if m, ok := e.(map[string]any); ok {
				if s, ok := m["name"].(string); ok {
					name = s
				}
			}
			f.add(at+" "+strings.TrimSpace(name), e)
		}
	default:
		f.keys, f.of[at] = append(f.keys, at), fmt.Sprint(v)
	}
}
