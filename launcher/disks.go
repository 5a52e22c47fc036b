package launcher

import (
	"fmt"
	"os"
	"path/filepath"

	"chrysalis/manifest"
	"chrysalis/models"
	"chrysalis/verity"
	"chrysalis/verity/gpt"
)

// describeDisk opens a verity disk and returns what it says about itself.
func describeDisk(path string) (verity.Description, error) {
	f, err := os.Open(path)
	if err != nil {
		return verity.Description{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return verity.Description{}, err
	}
	d, err := verity.OpenDisk(f, info.Size())
	if err != nil {
		return verity.Description{}, fmt.Errorf("%s: %w; make it again or fetch it again", path, err)
	}
	return d, nil
}

// makeManifest describes an engine disk and model disks.
func makeManifest(engine string, modelDisks []string, gpus int, parameters map[string]int64) (*manifest.Manifest, error) {
	description, err := describeDisk(engine)
	if err != nil {
		return nil, fmt.Errorf("read the engine disk: %w", err)
	}
	var infos []models.Info
	for _, path := range modelDisks {
		info, err := models.Inspect(path)
		if err != nil {
			return nil, fmt.Errorf("read the model disk %s: %w", path, err)
		}
		infos = append(infos, info)
	}
	return models.Manifest(description, infos, gpus, parameters), nil
}

// readManifest returns the bytes of a manifest file as they are. They are not
// judged: the VM does that, and says what it thinks of them.
func readManifest(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read the manifest: %w", err)
	}
	if info.Size() > manifest.MaxSize {
		return nil, fmt.Errorf("%s has %d bytes; a manifest has at most %d", path, info.Size(), manifest.MaxSize)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the manifest: %w", err)
	}
	return data, nil
}

// writeManifestDisk writes the disk that carries a manifest into the VM, and GPU
// collateral beside it unless that is nil.
func writeManifestDisk(path string, encoded, collateral []byte) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write the manifest disk: %w", err)
	}
	defer f.Close()
	size, err := gpt.WriteManifestDisk(f, encoded, collateral)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return fmt.Errorf("write the manifest disk: %w", err)
	}
	return nil
}

// absolute returns the path of a regular file that can be read.
func absolute(what, path string) (string, error) {
	if path == "" {
		return "", fmt.Errorf("no %s was given", what)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	// bwrap binds what a link points at, under the link's own name.
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return "", fmt.Errorf("find the %s: %w", what, err)
	}
	f, err := os.Open(abs)
	if err != nil {
		return "", fmt.Errorf("open the %s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("open the %s: %w", what, err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("the %s %s is not a file", what, path)
	}
	return abs, nil
}
