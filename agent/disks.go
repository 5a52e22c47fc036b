package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
	"chrysalis/image/profile"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/models/card"
	"chrysalis/verity"
	"chrysalis/verity/gpt"
)

// Disks are mounted below disksPath, the engine's at enginePoint.
const (
	disksPath   = "/run/disks"
	enginePoint = disksPath + "/engine"
)

// readManifest takes the manifest from the one disk that carries one, and measures
// it.
func (a *agent) readManifest(context.Context) error {
	disks, err := blockDevices()
	if err != nil {
		return err
	}
	var found []byte
	for _, path := range disks {
		data, err := readDisk(path, gpt.ReadManifestDisk)
		switch {
		case err != nil:
			log.printf("%s carries no manifest: %v", path, err)
		case found != nil:
			return errors.New("several disks carry a manifest")
		default:
			found = data
		}
	}
	if found == nil {
		return fmt.Errorf("none of %d disks carries a manifest", len(disks))
	}
	return a.takeManifest(found)
}

// takeManifest checks a manifest and measures it.
func (a *agent) takeManifest(found []byte) (err error) {
	if a.manifest, err = manifest.Parse(found); err != nil {
		return because(guest.ReasonManifestInvalid, err)
	}
	if err := a.platform.CheckManifest(found); err != nil {
		return because(guest.ReasonManifestOther, err)
	}
	a.encoded = found
	return a.record(cel.ManifestEvent(found))
}

// readDisk reads a document that has a partition to itself.
func readDisk(path string, read func(io.ReaderAt, int64) ([]byte, error)) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return read(f, size)
}

// openDisks measures, activates and mounts the engine disk and the model disks,
// and watches them from then on.
func (a *agent) openDisks(ctx context.Context) error {
	event, err := cel.EngineEvent(a.manifest.Engine)
	if err != nil {
		return err
	}
	if a.engine, err = a.openDisk("engine", a.manifest.Engine, event); err != nil {
		return fmt.Errorf("engine disk: %w", err)
	}
	for i, m := range a.manifest.Models {
		if event, err = cel.ModelEvent(m); err != nil {
			return err
		}
		path, err := a.openDisk(fmt.Sprintf("model-%d", i), m.Disk, event)
		if err != nil {
			return fmt.Errorf("model disk %s: %w", m.ID(), err)
		}
		c, err := readCard(path, m)
		if err != nil {
			return a.diskError(fmt.Errorf("model disk %s: %w", m.ID(), err))
		}
		a.models = append(a.models, model{path, c})
	}
	a.background(guest.ReasonDiskCorrupt, func() error {
		device, err := verity.Watch(ctx, a.devices)
		if err != nil {
			return err
		}
		return fmt.Errorf("%s: %w", device.Path, verity.ErrCorrupt)
	})
	data, err := readBounded(filepath.Join(a.engine, profile.Path), profile.MaxSize)
	if err != nil {
		return a.diskError(fmt.Errorf("read the engine's profile: %w", err))
	}
	if a.profile, err = profile.Parse(data); err != nil {
		return err
	}
	for _, m := range a.models {
		if err := a.profile.CheckModel(m.card); err != nil {
			return because(guest.ReasonEngineProfile, err)
		}
	}
	return nil
}

// A model is a model disk that is mounted.
type model struct {
	path string // of the mount point
	card *card.Card
}

// readCard reads what a model disk says about itself. The disk is the one that the
// manifest names, so the card is its publisher's word; the manifest's is the
// host's.
func readCard(path string, m manifest.Model) (*card.Card, error) {
	data, err := readBounded(filepath.Join(path, card.Path), card.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("read its card: %w", err)
	}
	c, err := card.Parse(data)
	if err != nil {
		return nil, err
	}
	if c.Name != m.Name || c.Revision != m.Revision {
		return nil, fmt.Errorf("it is %s, the manifest calls it %s", c.ID(), m.ID())
	}
	return c, nil
}

// openDisk records an event, then finds a disk by its root hash and mounts it; it
// returns where.
func (a *agent) openDisk(name string, d manifest.Disk, event cel.Event) (string, error) {
	if err := a.record(event); err != nil {
		return "", err
	}
	root, err := verity.ParseRootHash(d.RootHash)
	if err != nil {
		return "", err
	}
	salt, err := hex.DecodeString(d.Salt)
	if err != nil {
		return "", err
	}
	candidates, err := blockDevices()
	if err != nil {
		return "", err
	}
	device, err := verity.Params{RootHash: root, Salt: salt, DataBlocks: uint64(d.DataBlocks)}.Find(name, candidates)
	switch {
	case errors.Is(err, verity.ErrCorrupt):
		return "", because(guest.ReasonDiskCorrupt, err)
	case errors.Is(err, verity.ErrNotFound), errors.Is(err, verity.ErrInvalid):
		return "", because(guest.ReasonDiskMissing, err)
	case err != nil:
		return "", err
	}
	a.devices = append(a.devices, device)
	path := filepath.Join(disksPath, name)
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	flags := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV)
	if name != "engine" {
		flags |= unix.MS_NOEXEC
	}
	if err := unix.Mount(device.Path, path, "erofs", flags, ""); err != nil {
		return "", a.diskError(fmt.Errorf("mount: %w", err))
	}
	return path, nil
}

// diskError says that a disk is corrupt if the kernel has met a bad block on
// one, whatever the error looks like from here.
func (a *agent) diskError(err error) error {
	if a.diskCorrupt() {
		return because(guest.ReasonDiskCorrupt, err)
	}
	return err
}

// diskCorrupt reports whether the kernel has met a bad block on any disk.
func (a *agent) diskCorrupt() bool {
	for _, d := range a.devices {
		if corrupt, err := d.Corrupted(); corrupt || err != nil {
			return true
		}
	}
	return false
}

// readBounded reads a file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
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
