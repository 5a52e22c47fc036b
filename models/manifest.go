package models

import (
	"encoding/hex"
	"fmt"

	"chrysalis/manifest"
	"chrysalis/pay"
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

// Payment returns what a manifest says of payments on a network: ceilings for each of
// so many models, or one that is that of all, and the least that a voucher adds, in
// nanotons; a tenth of the highest ceiling where step is 0.
func Payment(network int32, models int, ceilings []pay.Price, step uint64) (*manifest.Payment, error) {
	switch len(ceilings) {
	case models:
	case 1:
		one := ceilings[0]
		ceilings = make([]pay.Price, models)
		for i := range ceilings {
			ceilings[i] = one
		}
	default:
		return nil, fmt.Errorf("%d ceilings for %d models; give one for each, or one for all", len(ceilings), models)
	}
	if step == 0 {
		for _, c := range ceilings {
			step = max(step, uint64(max(c.Prompt, c.Completion, 0))/10)
		}
		step = min(max(step, 1), pay.MaxStep)
	}
	if step > pay.MaxStep {
		return nil, fmt.Errorf("a voucher step of %d nanotons; at most %d is possible", step, int64(pay.MaxStep))
	}
	return &manifest.Payment{Network: network, Step: int64(step), Ceilings: ceilings}, nil
}
