package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"chrysalis/attest"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/fetch"
	"chrysalis/launcher"
	"chrysalis/measure/record"
	"chrysalis/registry"
)

// trustFlags say what a client accepts.
type trustFlags struct {
	Record               []string `placeholder:"FILE" sep:"none" help:"A measurement record of what may answer, as 'chrysalis measure' makes it; repeat it for more."`
	Policy               string   `placeholder:"FILE" help:"A policy (default: the strictest)."`
	Registry             []string `placeholder:"ADDRESS" sep:"," help:"A publisher's registry on TON, whose records may answer too; repeat it for more."`
	GPUCollateral        string   `name:"gpu-collateral" placeholder:"FILE" help:"What NVIDIA signs about the GPUs of a VM, as 'chrysalis gpu collateral' makes it; without one, or where it is not enough, it comes from the VM or from NVIDIA."`
	AllowNotConfidential bool     `help:"Accept a VM whose owner can read it: the evidence of a software TPM, this machine's included. For development."`

	Auditor    []registry.Key `placeholder:"KEY" sep:"none" help:"An auditor whose signature over a registry's records counts; repeat it for more."`
	Signatures int            `help:"How many of these auditors must have signed a registry's record."`
	TON        tonFlags       `embed:"" prefix:"ton-"`
}

// trust is what trustFlags stand for.
type trust struct {
	policy     *attest.Policy
	records    []*record.File
	collateral attest.Source
	gpu        *attest.GPUCollateral
	published  *published // what registries say, or nil
}

func (f *trustFlags) load(ctx context.Context) (*trust, error) {
	t := &trust{policy: attest.NewPolicy()}
	if f.Policy != "" {
		data, err := readFile(f.Policy, attest.MaxPolicy)
		if err != nil {
			return nil, err
		}
		if t.policy, err = attest.ParsePolicy(data); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Policy, err)
		}
	}
	if f.AllowNotConfidential {
		path, err := launcher.DevelopmentRoot("")
		if err != nil {
			return nil, err
		}
		pem, err := readFile(path, 64<<10)
		if err != nil {
			return nil, err
		}
		t.policy.AllowNotConfidential = true
		t.policy.DevelopmentRoots = append(t.policy.DevelopmentRoots, string(pem))
		if err := t.policy.Check(); err != nil {
			return nil, err
		}
	}
	for _, path := range f.Record {
		data, err := readFile(path, record.MaxFile)
		if err != nil {
			return nil, err
		}
		file, err := record.ParseFile(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		t.records = append(t.records, file)
	}
	if len(f.Registry) > 0 {
		var err error
		if t.published, err = newPublished(f); err != nil {
			return nil, err
		}
		t.published.local = t.records
		if t.records, err = t.published.read(ctx); err != nil {
			return nil, err
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	t.collateral = &attest.Cache{Dir: filepath.Join(cache, "chrysalis", "collateral"), From: &attest.PCS{}}
	t.gpu = &attest.GPUCollateral{Dir: filepath.Join(cache, "chrysalis", "gpu-collateral")}
	if len(t.policy.GPURIMRoots) == 0 { // NVIDIA has nothing that leads to other roots
		t.gpu.Fetch = fetch.NVIDIA()
	}
	if f.GPUCollateral != "" {
		data, err := readFile(f.GPUCollateral, nvidia.MaxCollateralSize)
		if err != nil {
			return nil, err
		}
		if t.gpu.Bundle, err = nvidia.ParseCollateral(data); err == nil {
			err = t.gpu.Check(t.policy)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.GPUCollateral, err)
		}
	}
	return t, nil
}

// transport returns a verifying client.
func (t *trust) transport() *attest.Transport {
	return &attest.Transport{Policy: t.policy, Records: t.records, Collateral: t.collateral, GPU: t.gpu}
}

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}
