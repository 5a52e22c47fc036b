// Package image makes what a VM boots: the tools root, the UKI and the engine
// disks, out of Debian packages that image.lock names by hash.
package image

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"chrysalis/outfile"
)

// LockName is the lock's file name, at the top of the source tree.
const LockName = "image.lock"

// Lock names everything that goes into any artefact, by content.
type Lock struct {
	Version int    `json:"version"` // 1
	Go      Go     `json:"go"`
	Trees   []Tree `json:"trees"` // sorted by name
}

// Go is what the agent is compiled with and from, beside its own source.
type Go struct {
	Toolchain string   `json:"toolchain"` // as 'go env GOVERSION' says, "go1.26.8"
	Modules   []Module `json:"modules"`   // sorted by path
}

// Module is one Go module of the agent's, fixed by its hash.
type Module struct {
	Path    string `json:"path"`
	Version string `json:"version"`
	Sum     string `json:"sum"` // "h1:…", as in go.sum
}

// Tree is the set of packages that one thing is made of.
type Tree struct {
	Name     string    `json:"name"`     // "tools", "image", "engine/llama.cpp"
	Suites   []Suite   `json:"suites"`   // where the packages were found, in order
	Packages []Package `json:"packages"` // sorted by name
}

// Suite is a state of a Debian suite.
type Suite struct {
	Name string    `json:"suite"`
	Date time.Time `json:"date"` // the Date of its signed InRelease
}

// Package is one .deb, fixed by its hash.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch"` // "amd64" or "all"
	Path    string `json:"path"` // below a mirror's top, pool/…
	Size    int64  `json:"size"` // bytes
	SHA256  string `json:"sha256"`
}

// Bounds of what a lock may say. A lock comes from a reviewed commit, but it is
// also what an auditor is handed, so it is read as strictly as anything else.
var (
	packageNameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{1,127}$`)
	poolPathRE    = regexp.MustCompile(`^pool/[A-Za-z0-9+.~_/-]{1,300}\.deb$`)
	sha256RE      = regexp.MustCompile(`^[0-9a-f]{64}$`)

	toolchainRE     = regexp.MustCompile(`^go1\.[0-9]{1,3}(\.[0-9]{1,3}|(rc|beta)[0-9]{1,2})?$`)
	modulePathRE    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_~-]*(\.[A-Za-z0-9_~-]+)*(/[A-Za-z0-9_~-]+(\.[A-Za-z0-9_~-]+)*)*$`)
	moduleVersionRE = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+([.+-][A-Za-z0-9.+-]*)?$`)
	moduleSumRE     = regexp.MustCompile(`^h1:[A-Za-z0-9+/]{43}=$`)
)

const maxPackageSize = 1 << 30

// ReadLock reads and checks the lock of the source tree at dir.
func ReadLock(dir string) (*Lock, error) {
	path := filepath.Join(dir, LockName)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the lock: %w; run in a checkout of Chrysalis, or make one with 'chrysalis image lock'", err)
	}
	lock, err := ParseLock(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return lock, nil
}

// ParseLock reads a lock, strictly: unknown fields, a package twice, a path out
// of the pool or a malformed hash are errors that name the package. So is every
// byte that Encode would write otherwise: a lock has one form, so a reader who
// skims it sees what this program sees.
func ParseLock(data []byte) (*Lock, error) {
	var lock Lock
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&lock); err != nil {
		return nil, fmt.Errorf("not a lock: %w", err)
	}
	if lock.Version != 1 {
		return nil, fmt.Errorf("lock version is %d, this program reads version 1", lock.Version)
	}
	if err := lock.Go.check(); err != nil {
		return nil, err
	}
	for i, tree := range lock.Trees {
		switch {
		case tree.Name == "":
			return nil, fmt.Errorf("tree %d has no name", i)
		case i > 0 && lock.Trees[i-1].Name >= tree.Name:
			return nil, fmt.Errorf("tree %s is there twice or out of order", tree.Name)
		case len(tree.Suites) == 0:
			return nil, fmt.Errorf("tree %s comes from no suite", tree.Name)
		}
		seen := map[string]bool{}
		for _, p := range tree.Packages {
			switch {
			case !packageNameRE.MatchString(p.Name):
				return nil, fmt.Errorf("tree %s: %q is not a package's name", tree.Name, p.Name)
			case seen[p.Name]:
				return nil, fmt.Errorf("tree %s: package %s is there twice", tree.Name, p.Name)
			case p.Arch != "amd64" && p.Arch != "all":
				return nil, fmt.Errorf("tree %s: package %s: architecture %q is neither amd64 nor all", tree.Name, p.Name, p.Arch)
			case !poolPathRE.MatchString(p.Path) || strings.Contains(p.Path, ".."):
				return nil, fmt.Errorf("tree %s: package %s: %q is not a path in a mirror's pool", tree.Name, p.Name, p.Path)
			case !sha256RE.MatchString(p.SHA256):
				return nil, fmt.Errorf("tree %s: package %s: %q is not a SHA-256", tree.Name, p.Name, p.SHA256)
			case p.Size <= 0 || p.Size > maxPackageSize:
				return nil, fmt.Errorf("tree %s: package %s: a size of %d bytes is out of bounds", tree.Name, p.Name, p.Size)
			}
			seen[p.Name] = true
		}
	}
	if want := lock.Encode(); !bytes.Equal(want, data) {
		at := 0
		for at < len(want) && at < len(data) && want[at] == data[at] {
			at++
		}
		return nil, fmt.Errorf("line %d is not as 'chrysalis image lock' writes it", 1+bytes.Count(data[:at], []byte("\n")))
	}
	return &lock, nil
}

func (g *Go) check() error {
	if !toolchainRE.MatchString(g.Toolchain) {
		return fmt.Errorf("%q is not a Go toolchain", g.Toolchain)
	}
	for i, m := range g.Modules {
		switch {
		case !modulePathRE.MatchString(m.Path) || len(m.Path) > 200:
			return fmt.Errorf("%q is not a Go module's path", m.Path)
		case i > 0 && g.Modules[i-1].Path >= m.Path:
			return fmt.Errorf("Go module %s is there twice or out of order", m.Path)
		case !moduleVersionRE.MatchString(m.Version) || len(m.Version) > 100:
			return fmt.Errorf("Go module %s: %q is not a version", m.Path, m.Version)
		case m.key() == "":
			return fmt.Errorf("Go module %s: %q is not a sum", m.Path, m.Sum)
		}
	}
	return nil
}

// key is the module's sum in hexadecimal, or "" when it is none.
func (m Module) key() string {
	if !moduleSumRE.MatchString(m.Sum) {
		return ""
	}
	sum, err := base64.StdEncoding.Strict().DecodeString(m.Sum[len("h1:"):])
	if err != nil {
		return ""
	}
	return hex.EncodeToString(sum)
}

// Encode returns the lock as text: sorted, a package a line, so that a review
// shows what changed.
func (l *Lock) Encode() []byte {
	var b bytes.Buffer
	line := func(v any) string {
		var one bytes.Buffer
		enc := json.NewEncoder(&one)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(v); err != nil {
			panic(err) // plain structs of strings and numbers
		}
		return strings.TrimSuffix(one.String(), "\n")
	}
	fmt.Fprintf(&b, "{\n \"version\": %d,\n \"go\": {\n  \"toolchain\": %s,\n  \"modules\": [", l.Version, line(l.Go.Toolchain))
	modules := slices.Clone(l.Go.Modules)
	slices.SortFunc(modules, func(a, b Module) int { return cmp.Compare(a.Path, b.Path) })
	for i, m := range modules {
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, "\n   %s", line(m))
	}
	b.WriteString("\n  ]\n },\n \"trees\": [")
	for i, t := range l.Trees {
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, "\n  {\n   \"name\": %s,\n   \"suites\": [", line(t.Name))
		for j, s := range t.Suites {
			if j > 0 {
				b.WriteString(",")
			}
			fmt.Fprintf(&b, "\n    %s", line(s))
		}
		b.WriteString("\n   ],\n   \"packages\": [")
		packages := slices.Clone(t.Packages)
		slices.SortFunc(packages, func(a, b Package) int { return cmp.Compare(a.Name, b.Name) })
		for j, p := range packages {
			if j > 0 {
				b.WriteString(",")
			}
			fmt.Fprintf(&b, "\n    %s", line(p))
		}
		b.WriteString("\n   ]\n  }")
	}
	b.WriteString("\n ]\n}\n")
	return b.Bytes()
}

// Tree returns the tree with a name.
func (l *Lock) Tree(name string) (*Tree, error) {
	for i := range l.Trees {
		if l.Trees[i].Name == name {
			return &l.Trees[i], nil
		}
	}
	return nil, fmt.Errorf("%s has no tree %q; refresh it with 'chrysalis image lock'", LockName, name)
}

// Package returns the package with a name.
func (t *Tree) Package(name string) (Package, error) {
	for _, p := range t.Packages {
		if p.Name == name {
			return p, nil
		}
	}
	return Package{}, fmt.Errorf("tree %s of %s has no package %s", t.Name, LockName, name)
}

// Epoch is the newest date of the tree's suites: the only time that a build
// from it knows.
func (t *Tree) Epoch() time.Time {
	var newest time.Time
	for _, s := range t.Suites {
		if s.Date.After(newest) {
			newest = s.Date
		}
	}
	return newest
}

// Key identifies the tree's content: 16 hexadecimal digits of a hash over every
// package, and over salt, which stands for the recipe.
func (t *Tree) Key(salt string) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d\n", salt, t.Epoch().Unix())
	for _, p := range t.Packages {
		fmt.Fprintf(h, "%s %s\n", p.Name, p.SHA256)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// WriteLock writes the lock of the source tree at dir.
func WriteLock(dir string, lock *Lock) error {
	if err := outfile.Write(filepath.Join(dir, LockName), lock.Encode(), 0o644); err != nil {
		return fmt.Errorf("write the lock: %w", err)
	}
	return nil
}
