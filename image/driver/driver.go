// Package driver reads what an engine disk says about the GPU driver that it
// carries: which kernel modules the agent loads, in which order and with which
// parameters, what firmware lies beside them, and which GPUs it is for. All of it
// is covered by the disk's root hash, so a client that approves the disk has
// approved it too.
package driver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"
)

// Where an engine disk has the parts of its driver.
const (
	Dir         = "chrysalis/gpu"
	Path        = Dir + "/driver.json"
	ModulesDir  = Dir + "/modules"  // NAME.ko
	FirmwareDir = Dir + "/firmware" // the kernel's firmware search path
	RIM         = Dir + "/driver.rim"
	// HelperRoot is the NVML helper's whole file system: the helper, the C library,
	// NVIDIA's library.
	HelperRoot = Dir + "/root"
)

// Helper is the helper's path in its root.
const Helper = "/gpu-helper"

// MaxSize is the largest description, in bytes.
const MaxSize = 64 << 10

// Bounds of a driver.
const (
	maxModules  = 16
	maxFirmware = 64
	maxModels   = 16
	maxOptions  = 32
	maxFile     = 512 << 20 // bytes
)

// Driver describes a driver.
type Driver struct {
	Version  int      `json:"version"`  // 1
	Driver   string   `json:"driver"`   // NVIDIA's version, for example 550.90.07
	Kernel   string   `json:"kernel"`   // the release that the modules are for
	Models   []string `json:"models"`   // the GPUs that may be there, as NVML names them
	Modules  []Module `json:"modules"`  // in the order in which they are loaded
	Firmware []File   `json:"firmware"` // below FirmwareDir
}

// Module is a kernel module.
type Module struct {
	Name    string   `json:"name"`    // its file is ModulesDir/NAME.ko
	Size    int64    `json:"size"`    // bytes
	Options []string `json:"options"` // NAME=VALUE
}

// File is a file of the driver.
type File struct {
	Path string `json:"path"`
	Size int64  `json:"size"` // bytes
}

var (
	versionRE = regexp.MustCompile(`^[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}$`)
	kernelRE  = regexp.MustCompile(`^[0-9][A-Za-z0-9.+~_-]{0,63}$`)
	modelRE   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9 ._()/-]{0,63}$`)
	moduleRE  = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,40}$`)
	// No quotes, spaces or dashes: the kernel splits parameters at spaces.
	optionRE = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]{0,63}=[A-Za-z0-9_.:,=;/]{0,200}$`)
	fileRE   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,200}$`)
)

// Parse reads a description, strictly.
func Parse(data []byte) (*Driver, error) {
	d, err := decode(data)
	if err != nil {
		return nil, err
	}
	for _, m := range d.Modules {
		if m.Size < 1 || m.Size > maxFile {
			return nil, fmt.Errorf("GPU driver: module %s has %d bytes, expected 1 to %d", m.Name, m.Size, maxFile)
		}
	}
	for _, f := range d.Firmware {
		if f.Size < 1 || f.Size > maxFile {
			return nil, fmt.Errorf("GPU driver: firmware %s has %d bytes, expected 1 to %d", f.Path, f.Size, maxFile)
		}
	}
	return d, nil
}

// decode checks everything but sizes, which whoever packs a driver leaves out.
func decode(data []byte) (*Driver, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("GPU driver: %d bytes, at most %d are allowed", len(data), MaxSize)
	}
	var d Driver
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return nil, fmt.Errorf("GPU driver: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("GPU driver: data after its end")
	}
	if d.Version != 1 {
		return nil, fmt.Errorf("GPU driver: version is %d, this program reads version 1", d.Version)
	}
	if !versionRE.MatchString(d.Driver) {
		return nil, fmt.Errorf("GPU driver: %.80q is not a driver's version", d.Driver)
	}
	if !kernelRE.MatchString(d.Kernel) {
		return nil, fmt.Errorf("GPU driver: %.80q is not a kernel's release", d.Kernel)
	}
	if len(d.Models) < 1 || len(d.Models) > maxModels {
		return nil, fmt.Errorf("GPU driver: %d models, expected 1 to %d", len(d.Models), maxModels)
	}
	for i, m := range d.Models {
		if !modelRE.MatchString(m) || slices.Contains(d.Models[:i], m) {
			return nil, fmt.Errorf("GPU driver: model %.80q is not a GPU's name or there twice", m)
		}
	}
	if len(d.Modules) < 1 || len(d.Modules) > maxModules {
		return nil, fmt.Errorf("GPU driver: %d modules, expected 1 to %d", len(d.Modules), maxModules)
	}
	for i, m := range d.Modules {
		if !moduleRE.MatchString(m.Name) || slices.ContainsFunc(d.Modules[:i], func(o Module) bool { return o.Name == m.Name }) {
			return nil, fmt.Errorf("GPU driver: %.80q is not a module's name or there twice", m.Name)
		}
		if len(m.Options) > maxOptions {
			return nil, fmt.Errorf("GPU driver: module %s has %d options, at most %d are allowed", m.Name, len(m.Options), maxOptions)
		}
		for _, o := range m.Options {
			if !optionRE.MatchString(o) {
				return nil, fmt.Errorf("GPU driver: module %s: %.80q is not NAME=VALUE", m.Name, o)
			}
		}
	}
	if len(d.Firmware) > maxFirmware {
		return nil, fmt.Errorf("GPU driver: %d firmware files, at most %d are allowed", len(d.Firmware), maxFirmware)
	}
	for i, f := range d.Firmware {
		if !fileRE.MatchString(f.Path) || !fs.ValidPath(f.Path) || path.Clean(f.Path) != f.Path ||
			slices.ContainsFunc(d.Firmware[:i], func(o File) bool { return o.Path == f.Path }) {
			return nil, fmt.Errorf("GPU driver: firmware %.80q is not a path or there twice", f.Path)
		}
	}
	return &d, nil
}
