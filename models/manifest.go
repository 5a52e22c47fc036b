package models

import (
	"encoding/hex"

	"chrysalis/manifest"
	"chrysalis/verity"
)

// ManifestDisk returns what a manifest says of a disk.
func ManifestDisk(d verity.Description) manifest.Disk {
	return manifest.Disk{RootHash: d.RootHash.String(), Salt: hex.EncodeToString(d.Salt), DataBlocks: int64(d.DataBlocks)}
}

// Manifest describes a VM with an engine disk and model disks, in the order in
// which they are served, with the default limits. Parameters may be nil. What is
// launched and what is exported are described by this one function.
func Manifest(engine verity.Description, models []Info, gpus int, parameters map[string]int64) *manifest.Manifest {
	m := &manifest.Manifest{
		Version: manifest.Version, Engine: ManifestDisk(engine),
		GPUs: gpus, Parameters: parameters, Limits: manifest.DefaultLimits,
	}
	if m.Parameters == nil {
		m.Parameters = map[string]int64{}
	}
	for _, info := range models {
		m.Models = append(m.Models, manifest.Model{Name: info.Name, Revision: info.Revision, Disk: ManifestDisk(info.Disk)})
	}
	return m
}
