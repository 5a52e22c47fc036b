package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/agent/gpu"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/guest"
	"chrysalis/image/driver"
	"chrysalis/measure/cel"
	"chrysalis/verity/gpt"
)

const (
	// gpuModulesPath is where an image for GPUs has the kernel's own modules that
	// NVIDIA's need. They are loaded for nothing else.
	gpuModulesPath = "/gpu-modules"
	// firmwarePath is where the kernel is told to look for firmware.
	firmwarePath = "/sys/module/firmware_class/parameters/path"
)

// How often the GPUs are asked while they work. None of it is on a request's way.
const (
	gpuHealthEvery = 10 * time.Second
	gpuAttestEvery = 10 * time.Minute
)

// startGPUs makes the GPUs work, if the manifest wants any: it loads their driver
// from the engine disk, attests them, measures what they are, and only then lets
// them take work.
func (a *agent) startGPUs(ctx context.Context) error {
	if a.gpus != a.manifest.GPUs {
		return because(guest.ReasonGPUCount, fmt.Errorf("the VM has %d GPUs, the manifest requires %d", a.gpus, a.manifest.GPUs))
	}
	if a.gpus == 0 {
		return nil
	}
	d, err := readDriver(a.engine)
	if err != nil {
		return a.diskError(err)
	}
	if err := loadDriver(a.engine, d); err != nil {
		return a.diskError(err)
	}
	if err := bindGPUs(sysfs); err != nil {
		return err
	}
	if a.gpuNodes, err = makeGPUNodes("/dev", "/proc/devices", a.gpus); err != nil {
		return err
	}
	// Kept open for as long as the VM lives: a driver whose last user goes lets go of
	// the GPU, and with it of the session that the GPU was attested in.
	if a.gpuFiles, err = openNodes("/dev", a.gpuNodes); err != nil {
		return err
	}
	verifier, err := a.gpuVerifier()
	if err != nil {
		return err
	}
	client, ended, err := startHelper()
	if err != nil {
		return because(guest.ReasonGPUHelper, err)
	}
	a.background(guest.ReasonGPUHelper, func() error {
		return fmt.Errorf("the GPU helper ended: %s", describe(<-ended))
	})
	if a.gpuSet, err = gpu.NewSet(ctx, client, verifier, a.gpus, d.Models); err != nil {
		if r, ok := errors.AsType[*gpu.Refusal](err); ok && r.RIMs != nil {
			a.state.MissRIMs(r.RIMs)
		}
		return ofGPUs(err)
	}
	for _, identity := range a.gpuSet.Identities() {
		if err := a.record(cel.Event{Name: cel.GPU, Data: identity}); err != nil {
			return err
		}
	}
	if err := a.gpuSet.Release(ctx); err != nil {
		return ofGPUs(err)
	}
	a.background(guest.ReasonGPULost, func() error {
		return ofGPUs(a.gpuSet.Watch(ctx, gpuHealthEvery, gpuAttestEvery))
	})
	return nil
}

// ofGPUs gives a refusal's reason to an error.
func ofGPUs(err error) error {
	if r, ok := errors.AsType[*gpu.Refusal](err); ok {
		return because(r.Reason, err)
	}
	return err
}

// prove adds to a document the proof of the GPUs, if there are any, and that of
// the platform, which covers it. GPUs that no longer prove what was measured end
// the VM.
func (a *agent) prove(d *evidence.Document) error {
	if a.gpuSet != nil {
		proof, err := a.gpuSet.Prove(a.alive, evidence.GPUNonce(d.Nonces, d.TLSKey))
		if err != nil {
			if a.alive.Err() == nil {
				go a.end(because(guest.ReasonGPUAttestation, ofGPUs(err)))
			}
			return err
		}
		d.GPU = proof
	}
	return a.platform.Prove(d)
}

// readDriver reads what an engine disk says about its driver.
func readDriver(engine string) (*driver.Driver, error) {
	data, err := readBounded(filepath.Join(engine, driver.Path), driver.MaxSize)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errors.New("the engine disk carries no GPU driver")
	}
	if err != nil {
		return nil, fmt.Errorf("read the GPU driver's description: %w", err)
	}
	return driver.Parse(data)
}

// loadDriver loads the modules that a driver needs and its own, in order. Nothing
// binds them to a device yet.
func loadDriver(engine string, d *driver.Driver) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	if release := unix.ByteSliceToString(name.Release[:]); release != d.Kernel {
		return fmt.Errorf("the GPU driver is for the kernel %s, this is %s", d.Kernel, release)
	}
	if err := loadModules(gpuModulesPath, true); err != nil { // all of them
		return fmt.Errorf("the image has not what a GPU driver needs: %w", err)
	}
	if err := checkSizes(engine, d); err != nil {
		return err
	}
	if err := os.WriteFile(firmwarePath, []byte(filepath.Join(engine, driver.FirmwareDir)), 0); err != nil {
		return fmt.Errorf("tell the kernel where firmware is: %w", err)
	}
	for _, m := range d.Modules {
		path := filepath.Join(engine, driver.ModulesDir, m.Name+".ko")
		if err := loadModule(path, strings.Join(m.Options, " ")); err != nil {
			return fmt.Errorf("load the GPU driver's module %s: %w", m.Name, err)
		}
	}
	return nil
}

// checkSizes compares the driver's files with its description, so that one which
// was packed wrongly is named.
func checkSizes(engine string, d *driver.Driver) error {
	sizes := map[string]int64{}
	for _, m := range d.Modules {
		sizes[filepath.Join(driver.ModulesDir, m.Name+".ko")] = m.Size
	}
	for _, f := range d.Firmware {
		sizes[filepath.Join(driver.FirmwareDir, f.Path)] = f.Size
	}
	for path, size := range sizes {
		info, err := os.Lstat(filepath.Join(engine, path))
		if err != nil {
			return fmt.Errorf("GPU driver: %w", err)
		}
		if !info.Mode().IsRegular() || info.Size() != size {
			return fmt.Errorf("GPU driver: /%s is not a file of %d bytes", path, size)
		}
	}
	return nil
}

// bindGPUs binds each GPU to the driver, by name: to no other, should another one
// want it.
func bindGPUs(sysfs string) error {
	devices, err := gpuDevices(sysfs)
	if err != nil {
		return err
	}
	for _, dir := range devices {
		name := filepath.Base(dir)
		err := os.WriteFile(filepath.Join(dir, "driver_override"), []byte(gpuDriver), 0)
		if err == nil {
			err = os.WriteFile(filepath.Join(sysfs, "bus/pci/drivers", gpuDriver, "bind"), []byte(name), 0)
		}
		if err != nil {
			return fmt.Errorf("bind the GPU %s to %s: %w", name, gpuDriver, err)
		}
	}
	return nil
}

// gpuNode is a device node of the driver, which the kernel does not make.
type gpuNode struct {
	name     string   // with %d, one for each GPU
	majors   []string // what /proc/devices calls its driver; any of them
	minor    uint32   // of the first
	step     uint32   // from one GPU's minor to the next one's
	perGPU   bool
	optional bool // there is none where its driver was not loaded
}

// makeGPUNodes makes the nodes of the table and returns their names. The minor
// numbers are the order in which the driver met the GPUs, which is the order of
// their addresses.
func makeGPUNodes(dev, procDevices string, gpus int) ([]string, error) {
	data, err := os.ReadFile(procDevices)
	if err != nil {
		return nil, fmt.Errorf("list the character devices: %w", err)
	}
	majors := characterDevices(string(data))
	var names []string
	for _, n := range gpuNodes {
		i := slices.IndexFunc(n.majors, func(name string) bool { return majors[name] != 0 })
		if i < 0 {
			if n.optional {
				continue
			}
			return nil, fmt.Errorf("the GPU driver has no device %s", strings.Join(n.majors, " or "))
		}
		count := 1
		if n.perGPU {
			count = gpus
		}
		for k := range count {
			name := n.name
			if n.perGPU {
				name = fmt.Sprintf(n.name, k)
			}
			device := unix.Mkdev(majors[n.majors[i]], n.minor+n.step*uint32(k))
			path := filepath.Join(dev, name)
			if err := unix.Mknod(path, unix.S_IFCHR, int(device)); err != nil {
				return nil, fmt.Errorf("make the device node %s: %w", path, err)
			}
			// The engine is not root. Which nodes it has is for its sandbox to say.
			if err := os.Chmod(path, 0o666); err != nil {
				return nil, err
			}
			names = append(names, name)
		}
	}
	return names, nil
}

// characterDevices reads /proc/devices: names with their major numbers.
func characterDevices(text string) map[string]uint32 {
	out := map[string]uint32{}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "Block devices") {
			break
		}
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		if major, err := strconv.ParseUint(f[0], 10, 12); err == nil {
			out[f[1]] = uint32(major)
		}
	}
	return out
}

// openNodes opens the nodes of the GPUs themselves.
func openNodes(dev string, names []string) ([]*os.File, error) {
	var out []*os.File
	for _, name := range names {
		if strings.Trim(name, "0123456789") != "nvidia" {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dev, name), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("start GPU %s: %w", name, err)
		}
		out = append(out, f)
	}
	return out, nil
}

// gpuVerifier returns a verifier with the driver's RIM, which is on the engine
// disk, and with what the host gives. Both are signed, and both go to the clients.
func (a *agent) gpuVerifier() (*nvidia.Verifier, error) {
	rim, err := readBounded(filepath.Join(a.engine, driver.RIM), nvidia.MaxRIMSize)
	if err != nil {
		return nil, a.diskError(fmt.Errorf("read the driver's RIM: %w", err))
	}
	collateral := &nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{rim}, OCSP: []evidence.Bytes{}}
	disks, err := blockDevices()
	if err != nil {
		return nil, err
	}
	given, err := readCollateral(disks)
	if err == nil && given != nil {
		collateral = gpu.Merge(collateral, given)
	}
	if err != nil {
		return nil, because(guest.ReasonGPUCollateral, err)
	}
	if a.gpuCollateral, err = collateral.Encode(); err != nil {
		return nil, because(guest.ReasonGPUCollateral, err)
	}
	roots, err := gpuRoots(a.engine)
	if err != nil {
		return nil, err
	}
	verifier := nvidia.NewVerifier(roots)
	return verifier, because(guest.ReasonGPUCollateral, verifier.AddCollateral(collateral))
}

// readCollateral takes collateral from the disk that carries some, if one does.
func readCollateral(disks []string) (*nvidia.Collateral, error) {
	var found []byte
	for _, path := range disks {
		data, err := readDisk(path, gpt.ReadCollateral)
		switch {
		case errors.Is(err, gpt.ErrInvalid):
		case err != nil:
			return nil, fmt.Errorf("look for GPU collateral on %s: %w", path, err)
		case found != nil:
			return nil, errors.New("several disks carry GPU collateral")
		default:
			found = data
		}
	}
	if found == nil {
		return nil, nil
	}
	return nvidia.ParseCollateral(found)
}
