package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"chrysalis/attest/nvidia"
	"chrysalis/image/driver"
	"chrysalis/verity/disk"
)

// helperDev is what the helper's sandbox mounts over in its root.
const helperDev = driver.HelperRoot + "/dev"

// addDriver puts a GPU driver's folder, which is laid out as driver.Dir is on a
// disk, among an engine's files.
func (i *Info) addDriver(ctx context.Context, entries []disk.Entry, o Options) ([]disk.Entry, error) {
	for _, e := range entries {
		if e.Path == driver.Dir || strings.HasPrefix(e.Path, driver.Dir+"/") {
			return nil, refuseRoot("it has a /%s of its own", driver.Dir)
		}
	}
	// Links in the folder may not lead out of it.
	root, err := os.OpenRoot(o.GPUDriver)
	if err != nil {
		return nil, err
	}
	i.closers = append(i.closers, root)
	dir := root.FS()
	description, d, err := driver.Fill(dir, o.Kernel, o.KernelModules)
	if err != nil {
		return nil, err
	}
	if err := checkDriverRIM(dir, d.Driver, o.Note); err != nil {
		return nil, fmt.Errorf("GPU driver: %w", err)
	}
	i.Driver = d
	found, err := disk.Walk(ctx, dir)
	if err != nil {
		return nil, err
	}
	for _, e := range found {
		if e.Path == "." {
			continue
		}
		e.Path = path.Join(driver.Dir, e.Path)
		if e.Path == driver.Path {
			e.Size = int64(len(description))
			e.Open = func() (disk.Content, error) { return noClose{strings.NewReader(string(description))}, nil }
		}
		if e.Path != helperDev && !strings.HasPrefix(e.Path, helperDev+"/") {
			entries = append(entries, e)
		}
	}
	return append(entries, disk.Entry{Path: helperDev, Mode: fs.ModeDir | 0o755}), nil
}

// checkDriverRIM refuses NVIDIA's RIM of another driver, and says when it is not
// NVIDIA's at all.
func checkDriverRIM(dir fs.FS, version string, note func(string)) error {
	f, err := dir.Open(strings.TrimPrefix(driver.RIM, driver.Dir+"/"))
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, nvidia.MaxRIMSize+1))
	if err != nil {
		return err
	}
	if len(data) > nvidia.MaxRIMSize {
		return errors.New("its RIM is too large")
	}
	rim, err := nvidia.ParseRIM(data, nvidia.NVIDIARoots().RIM)
	if err != nil {
		if note != nil {
			note(fmt.Sprintf("this is no driver of NVIDIA's but a stand-in, which only the image chrysalis-gputest takes: its RIM is refused: %v", err))
		}
		return nil
	}
	if rim.Version != version {
		return fmt.Errorf("its RIM is for the driver %s, and it is %s", rim.Version, version)
	}
	return nil
}
