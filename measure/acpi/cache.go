package acpi

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"chrysalis/measure"
)

// Cache keeps tables in a folder, by QEMU and command line. The folder belongs
// to the user who reads it, as QEMU itself does.
type Cache struct {
	Dir  string // "" keeps nothing
	QEMU string // identifies the build of QEMU
}

// cacheFormat changes whenever what is read or how it is kept does.
const cacheFormat = "2"

// maxCached is the largest entry, in bytes when unpacked.
const maxCached = 8 << 20

// Read returns the tables of the machine with this command line, as Read does.
func (c Cache) Read(ctx context.Context, start Start, argv []string, m Machine) (*measure.Tables, error) {
	command, _, err := translate(argv, m.GPU)
	if err != nil {
		return nil, fmt.Errorf("read the machine's tables: %w", err)
	}
	key, err := json.Marshal([]any{cacheFormat, c.QEMU, m, command})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(c.Dir, fmt.Sprintf("%x.json.gz", sha256.Sum256(key)))
	if c.Dir != "" {
		if t, ok := load(path, key); ok {
			return t, nil
		}
	}
	t, err := Read(ctx, start, argv, m)
	if err != nil {
		return nil, err
	}
	if c.Dir != "" {
		// Without it the next one reads them again.
		_ = c.store(path, key, t)
	}
	return t, nil
}

// entry is what a file of the cache holds. Key and Sum find a file that is
// another's or damaged.
type entry struct {
	Key    json.RawMessage
	Tables *measure.Tables
	Sum    []byte
}

func load(path string, key []byte) (*measure.Tables, bool) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, false
	}
	var e entry
	if err := json.NewDecoder(io.LimitReader(z, maxCached)).Decode(&e); err != nil || e.Tables == nil {
		return nil, false
	}
	return e.Tables, bytes.Equal(e.Key, key) && bytes.Equal(e.Sum, sum(e.Tables))
}

func sum(t *measure.Tables) []byte {
	h := sha256.New()
	var names []string
	for name := range t.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	fmt.Fprintf(h, "%d\n%s", len(t.Loader), t.Loader)
	for _, name := range names {
		fmt.Fprintf(h, "%s %d\n%s", name, len(t.Files[name]), t.Files[name])
	}
	return h.Sum(nil)
}

func (c Cache) store(path string, key []byte, t *measure.Tables) error {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return err
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := json.NewEncoder(z).Encode(entry{key, t, sum(t)}); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(c.Dir, ".tables-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b.Bytes())
	if closing := tmp.Close(); err != nil || closing != nil {
		return fmt.Errorf("keep the machine's tables: %w %w", err, closing)
	}
	return os.Rename(tmp.Name(), path)
}
