package release

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"chrysalis/image"
	"chrysalis/image/inspect"
	"chrysalis/image/provenance"
	"chrysalis/image/toolsroot"
)

// Measurement is everything outside of a machine's shape that decides what its
// registers will hold. What is predicted from it belongs here too.
type Measurement struct {
	Sections  []Section `json:"uki_sections"` // in the order of the file
	Manifests []Section `json:"manifests"`    // as RTMR3 and MRCONFIGID have them
	Firmware  []File    `json:"firmware"`     // of the tools root
	QEMU      string    `json:"qemu"`         // Debian's version; it writes the ACPI tables
}

// A Section is a measured piece, known by the hash that TDX extends.
type Section struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`   // bytes
	SHA384 string `json:"sha384"` // of the content, without padding
}

// firmware is what the launcher starts VMs from, and what it is composed of.
var firmware = []string{
	"usr/share/OVMF/OVMF_VARS_4M.fd",
	"usr/share/ovmf/OVMF.fd",
	"usr/share/ovmf/OVMF.inteltdx.ms.fd",
}

// measurementInputs collects them from built artefacts and the tools root.
func measurementInputs(ctx context.Context, dir string, p provenance.Parameters, lock *image.Lock, root *toolsroot.Root) (Measurement, error) {
	m := Measurement{Sections: []Section{}, Manifests: []Section{}, Firmware: []File{}}
	u, err := inspect.OpenUKI(ctx, filepath.Join(dir, p.UKI()))
	if err != nil {
		return m, err
	}
	defer u.Close()
	for _, s := range u.Sections {
		content := io.NewSectionReader(s.Content, 0, s.Content.Size())
		piece, err := hashSection(s.Name, content)
		if err != nil {
			return m, fmt.Errorf("%s: section %s: %w", p.UKI(), s.Name, err)
		}
		m.Sections = append(m.Sections, piece)
	}
	for _, name := range p.Manifests() {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return m, err
		}
		piece, err := hashSection(name, f)
		f.Close()
		if err != nil {
			return m, fmt.Errorf("%s: %w", name, err)
		}
		m.Manifests = append(m.Manifests, piece)
	}
	for _, name := range firmware {
		f, err := describe(filepath.Join(root.Dir, name), name)
		if err != nil {
			return m, fmt.Errorf("the tools root lacks firmware: %w", err)
		}
		m.Firmware = append(m.Firmware, f)
	}
	tree, err := lock.Tree("tools")
	if err != nil {
		return m, err
	}
	qemu, err := tree.Package("qemu-system-x86")
	m.QEMU = qemu.Version
	return m, err
}

func hashSection(name string, r io.Reader) (Section, error) {
	h := sha512.New384()
	n, err := io.Copy(h, r)
	return Section{name, n, hex.EncodeToString(h.Sum(nil))}, err
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
