package provenance

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"chrysalis/image"
)

// SBOM returns a CycloneDX 1.6 document (JSON, ECMA-424) of what an artefact is
// made of: the packages of a tree of the lock and, for the tree of the image,
// what the agent is compiled from. Like the artefact it is a function of the lock
// and the source: its time is the tree's epoch, and its serial number a hash of
// all the rest.
func SBOM(lock *image.Lock, treeName, artefact, artefactSHA256 string) ([]byte, error) {
	tree, err := lock.Tree(treeName)
	if err != nil {
		return nil, err
	}
	kind := cdx.ComponentTypeApplication
	var components []cdx.Component
	for _, p := range tree.Packages {
		components = append(components, debian(p))
	}
	if treeName == imageTree {
		kind = cdx.ComponentTypeOS
		components = append(components, standardLibrary(lock.Go.Toolchain))
		for _, m := range lock.Go.Modules {
			c, err := goModule(m)
			if err != nil {
				return nil, err
			}
			components = append(components, c)
		}
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return cmp.Compare(a.BOMRef, b.BOMRef) })
	refs := make([]string, len(components))
	for i, c := range components {
		refs[i] = c.BOMRef
	}
	var suites []cdx.Property
	for _, s := range tree.Suites {
		suites = append(suites, cdx.Property{Name: "chrysalis:suite:" + s.Name, Value: s.Date.UTC().Format(time.RFC3339)})
	}
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{
		Timestamp: tree.Epoch().UTC().Format(time.RFC3339),
		Component: &cdx.Component{
			BOMRef: artefact, Type: kind, Name: artefact,
			Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: artefactSHA256}},
		},
		Properties: &suites,
	}
	bom.Components = &components
	bom.Dependencies = &[]cdx.Dependency{{Ref: artefact, Dependencies: &refs}}
	unnamed, err := encodeBOM(bom)
	if err != nil {
		return nil, err
	}
	bom.SerialNumber = serial(sha256.Sum256(unnamed))
	return encodeBOM(bom)
}

func encodeBOM(bom *cdx.BOM) ([]byte, error) {
	var b bytes.Buffer
	err := cdx.NewBOMEncoder(&b, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(bom, cdx.SpecVersion1_6)
	if err != nil {
		return nil, fmt.Errorf("write the SBOM: %w", err)
	}
	return b.Bytes(), nil
}

// serial makes a UUID of a hash: version 8, RFC 9562 section 5.8.
func serial(sum [32]byte) string {
	u := sum[:16]
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func debian(p image.Package) cdx.Component {
	purl := fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", escape(p.Name), escape(p.Version), p.Arch)
	return cdx.Component{
		BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: p.Name, Version: p.Version, PackageURL: purl,
		Hashes:     &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: p.SHA256}},
		Properties: &[]cdx.Property{{Name: "chrysalis:debian:path", Value: p.Path}},
	}
}

// goModule gives as SHA-256 what the h1 sum says in base64, as other makers of
// CycloneDX documents do. It is a hash over the hashes of the module's files, not
// over its zip; so the sum stands there as well.
func goModule(m image.Module) (cdx.Component, error) {
	sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:"))
	if err != nil || len(sum) != sha256.Size {
		return cdx.Component{}, fmt.Errorf("the sum of Go module %s is malformed: %q", m.Path, m.Sum)
	}
	parts := strings.Split(strings.ToLower(m.Path), "/")
	for i := range parts {
		parts[i] = escape(parts[i])
	}
	purl := fmt.Sprintf("pkg:golang/%s@%s", strings.Join(parts, "/"), escape(m.Version))
	return cdx.Component{
		BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: m.Path, Version: m.Version, PackageURL: purl,
		Hashes:     &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum)}},
		Properties: &[]cdx.Property{{Name: "chrysalis:go:sum", Value: m.Sum}},
	}, nil
}

// standardLibrary is part of every Go program. The lock fixes it by version only.
func standardLibrary(toolchain string) cdx.Component {
	purl := "pkg:golang/std@" + escape(strings.TrimPrefix(toolchain, "go"))
	return cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: "std", Version: toolchain, PackageURL: purl}
}

// escape writes a part of a package URL (ECMA-427): all but letters, digits,
// ".-_~" and ":" is percent-encoded.
func escape(part string) string {
	var b strings.Builder
	for i := range len(part) {
		c := part[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte(".-_~:", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
