package provenance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"

	"chrysalis/image"
	"chrysalis/models"
	"chrysalis/outfile"
	"chrysalis/verity"
)

// Make builds the artefacts and writes an SBOM beside each that has packages.
// What it returns lacks the source.
func Make(ctx context.Context, b *image.Builder, p Parameters) (Build, error) {
	if _, err := b.UKI(ctx, p.Profile); err != nil {
		return Build{}, err
	}
	for _, engine := range p.Engines {
		if _, err := b.Engine(ctx, engine); err != nil {
			return Build{}, err
		}
	}
	var packed []models.Info
	for _, name := range p.Models {
		info, err := packModel(ctx, b, name)
		if err != nil {
			return Build{}, err
		}
		packed = append(packed, info)
	}
	for _, engine := range p.Engines {
		if err := writeManifest(b.Out, engine, packed); err != nil {
			return Build{}, err
		}
	}
	lock, err := image.ReadLock(b.Source)
	if err != nil {
		return Build{}, err
	}
	tools, err := image.OpenTools(lock)
	if err != nil {
		return Build{}, err
	}
	// A cached tools root is named by its key.
	made := Build{Parameters: p, Lock: lock, Tools: filepath.Base(tools.Dir)}
	return made, made.WriteSBOMs(b.Out)
}

// A modelSource is models/NAME/model.json of a source tree, which makes the model
// beside it one that a build packs.
type modelSource struct {
	Name     string `json:"name"` // ORG/NAME
	Revision string `json:"revision"`
	Weights  string `json:"weights"` // the GGUF file, beside this one
}

// weightsRE is a file in the same folder.
var weightsRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

const maxModelSource = 4 << 10 // bytes

// packModel makes the disk of the model models/NAME of the source tree.
func packModel(ctx context.Context, b *image.Builder, name string) (models.Info, error) {
	dir := filepath.Join(b.Source, "models", name)
	path := filepath.Join(dir, "model.json")
	f, err := os.Open(path)
	if err != nil {
		return models.Info{}, fmt.Errorf("there is no model %q under models: %w", name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxModelSource))
	if err != nil {
		return models.Info{}, err
	}
	var m modelSource
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		return models.Info{}, fmt.Errorf("%s: %w", path, readable(err))
	}
	if !weightsRE.MatchString(m.Weights) {
		return models.Info{}, fmt.Errorf("%s: %q is not a file beside it", path, m.Weights)
	}
	step := "pack " + modelDisk(name)
	b.Progress(step, 0, 0)
	return models.Pack(ctx, filepath.Join(dir, m.Weights), models.PackOptions{
		Name: m.Name, Revision: m.Revision, Out: filepath.Join(b.Out, modelDisk(name)), Replace: true,
		Progress: func(_ string, done, total int64) { b.Progress(step, done, total) },
	})
}

// writeManifest writes the manifest of a VM that serves all the models with an
// engine, as the launcher makes it from the same disks unless it is told more.
func writeManifest(dir, engine string, packed []models.Info) error {
	if len(packed) == 0 {
		return nil
	}
	f, err := os.Open(filepath.Join(dir, engineDisk(engine)))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	d, err := verity.OpenDisk(f, info.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	data, err := models.Manifest(d, packed, 0, nil).Encode()
	if err != nil {
		return err
	}
	if err := outfile.Write(filepath.Join(dir, manifestFile(engine)), data, 0o644); err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	return nil
}
