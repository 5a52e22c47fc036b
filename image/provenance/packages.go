package provenance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"chrysalis/image"
)

// A PackageList is what an artefact is said to be made of. An artefact carries no
// list itself, so nothing in it shows that the list is right: a build does.
type PackageList struct {
	From     string    `json:"from"`   // the file
	Detail   string    `json:"detail"` // how the file says that it is about the artefact
	Packages []Package `json:"packages"`
}

// A Package is one Debian package or Go module.
type Package struct {
	Kind    string `json:"kind"` // "deb" or "go"
	Name    string `json:"name"`
	Version string `json:"version"`
	SHA256  string `json:"sha256,omitempty"` // of the package; of a Go module, its h1 sum
}

// ErrOtherFile is an SBOM that stands beside a file and is about another.
var ErrOtherFile = errors.New("is about another file")

const maxSBOM = 8 << 20 // bytes

// Packages finds the list of the artefact at path, which has that SHA-256: in the
// SBOM beside it, or else in a tree of the lock beside it or in the source tree.
// The error wraps fs.ErrNotExist where there is neither.
func Packages(path, sha256, tree, source string) (*PackageList, error) {
	list, err := fromSBOM(path+SBOMSuffix, sha256)
	if !errors.Is(err, os.ErrNotExist) {
		return list, err
	}
	for _, dir := range []string{filepath.Dir(path), source} {
		lock, err := image.ReadLock(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return fromLock(filepath.Join(dir, image.LockName), lock, tree)
	}
	return nil, fmt.Errorf("there is neither %s nor an %s: %w", path+SBOMSuffix, image.LockName, os.ErrNotExist)
}

func fromSBOM(path, sha256 string) (*PackageList, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSBOM+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSBOM {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxSBOM)
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(data), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		return nil, fmt.Errorf("%s is no CycloneDX document: %w", path, readable(err))
	}
	if bom.Metadata == nil || bom.Metadata.Component == nil || componentSHA256(*bom.Metadata.Component) != sha256 {
		return nil, fmt.Errorf("%s %w: it does not name the SHA-256 %s", path, ErrOtherFile, sha256)
	}
	list := &PackageList{From: path, Detail: "it names the SHA-256 of this file", Packages: []Package{}}
	if bom.Components == nil {
		return list, nil
	}
	for _, c := range *bom.Components {
		kind := "deb"
		if strings.HasPrefix(c.PackageURL, "pkg:golang/") {
			kind = "go"
		}
		list.Packages = append(list.Packages, Package{kind, c.Name, c.Version, componentSHA256(c)})
	}
	return list, nil
}

func componentSHA256(c cdx.Component) string {
	if c.Hashes == nil {
		return ""
	}
	for _, h := range *c.Hashes {
		if h.Algorithm == cdx.HashAlgoSHA256 {
			return h.Value
		}
	}
	return ""
}

func fromLock(path string, lock *image.Lock, name string) (*PackageList, error) {
	tree, err := lock.Tree(name)
	if err != nil {
		return nil, err
	}
	list := &PackageList{
		From: path, Detail: fmt.Sprintf("its tree %q; nothing says that this file was made from this lock", name),
		Packages: []Package{},
	}
	for _, p := range tree.Packages {
		list.Packages = append(list.Packages, Package{"deb", p.Name, p.Version, p.SHA256})
	}
	if name == imageTree {
		list.Packages = append(list.Packages, Package{Kind: "go", Name: "std", Version: lock.Go.Toolchain})
		for _, m := range lock.Go.Modules {
			c, err := goModule(m)
			if err != nil {
				return nil, err
			}
			list.Packages = append(list.Packages, Package{"go", m.Path, m.Version, componentSHA256(c)})
		}
	}
	return list, nil
}
