// Package plan predicts the measurements of VMs that this launcher starts: it
// opens the artefacts, asks the launcher for the command line of each shape and
// QEMU for its tables, and hands all of it to package measure.
package plan

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"chrysalis/image"
	"chrysalis/image/profile"
	"chrysalis/image/provenance"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/manifest"
	"chrysalis/measure"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
	"chrysalis/models"
	"chrysalis/pay"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// Options say what is to be predicted.
type Options struct {
	Platform record.Platform
	Boot     record.Boot
	Image    string   // the UKI
	Engine   string   // the engine disk; "" leaves engines out of the record
	Models   []string // the model disks
	Manifest string   // a manifest file; made from the disks when empty
	Payment  *Payment // what clients can be charged, in a manifest that is made; nil for nothing
	Shapes   []string // all published ones when empty
	Disk     string   // the disk that is started from, where Boot is BootDisk
	Firmware string   // the firmware; that of the tools root when empty
	Profile  string   // the firmware's profile, where its hash is not known
	// ExitFailures is measure.System's; below 0 it is not known.
	ExitFailures int
	Commit       string // of the source; that of the provenance beside the image when empty
	Lock         []byte // image.lock
	Tools        *toolsroot.Root
}

// Payment is what models.Payment takes.
type Payment struct {
	Network  int32
	Ceilings []pay.Price
	Step     uint64
}

// Result is a prediction.
type Result struct {
	File *record.File
	// Notes say what is left out of the record, and why.
	Notes []string
	// Manifest is what the VM would get, nil where no disks are given; CEL lists
	// the events that it causes, and Last is RTMR3 or PCR 15 after them.
	Manifest []byte
	CEL      []cel.Event
	Last     []byte
}

// Run predicts.
func Run(ctx context.Context, o Options) (*Result, error) {
	lock, err := image.ParseLock(o.Lock)
	if err != nil {
		return nil, err
	}
	qemu, err := QEMUVersion(lock)
	if err != nil {
		return nil, err
	}
	order, err := PageOrder(qemu)
	if err != nil {
		return nil, err
	}
	s := measure.System{Platform: o.Platform, Boot: o.Boot, DiskSlot: launcher.DiskSlot}
	if o.ExitFailures >= 0 {
		s.ExitFailures = &o.ExitFailures
	}
	base := record.Image{Name: strings.TrimSuffix(filepath.Base(o.Image), ".efi"), Lock: sum(o.Lock), QEMU: qemu}
	var result Result
	var group sync.WaitGroup
	var errs [4]error
	group.Go(func() { s.Image, errs[0] = readImage(o.Image) })
	group.Go(func() {
		if s.Firmware, errs[1] = OpenFirmware(o.Tools, o.Platform, o.Firmware); errs[1] == nil && o.Profile != "" {
			s.Firmware.Profile, errs[1] = measure.LookupProfile(o.Profile)
		}
	})
	var engines []record.Engine
	var modelRecords []record.Model
	group.Go(func() { engines, modelRecords, errs[2] = result.disks(ctx, o) })
	group.Go(func() {
		if o.Boot == record.BootDisk && o.Disk != "" {
			s.GPT, errs[3] = readStart(o.Disk)
		}
	})
	group.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	if base.Commit, err = o.commit(&result, s.Image); err != nil {
		return nil, err
	}
	machines, err := o.machines(ctx, max(len(o.Models), 1))
	if err != nil {
		return nil, err
	}
	file, notes, err := measure.File(base, s, machines, order)
	if err != nil {
		return nil, err
	}
	file.Engines, file.Models = append(file.Engines, engines...), append(file.Models, modelRecords...)
	result.File, result.Notes = file, append(result.Notes, notes...)
	if err := file.Validate(); err != nil {
		return nil, fmt.Errorf("the record: %w", err)
	}
	return &result, nil
}

func sum(data []byte) []byte {
	s := sha256.Sum256(data)
	return s[:]
}

// qemuRE takes the version out of a Debian package's.
var qemuRE = regexp.MustCompile(`^(?:[0-9]+:)?([0-9]+\.[0-9]+(?:\.[0-9]+)?)`)

// QEMUVersion is the version of the QEMU in the tools root that a lock names.
func QEMUVersion(lock *image.Lock) (string, error) {
	tree, err := lock.Tree("tools")
	if err != nil {
		return "", err
	}
	p, err := tree.Package("qemu-system-x86")
	if err != nil {
		return "", err
	}
	m := qemuRE.FindStringSubmatch(p.Version)
	if m == nil {
		return "", fmt.Errorf("package %s: %q is not a version of QEMU", p.Name, p.Version)
	}
	return m[1], nil
}

// PageOrder is the order in which a version of QEMU measures pages.
func PageOrder(qemu string) (measure.PageOrder, error) {
	var major, minor int
	if n, err := fmt.Sscanf(qemu, "%d.%d", &major, &minor); err != nil || n != 2 {
		return 0, fmt.Errorf("%q is not a version of QEMU; write it like 10.1", qemu)
	}
	if major < 9 {
		return measure.TwoPass, nil
	}
	return measure.Interleaved, nil
}

// Patches reports whether a version of QEMU changes a kernel's setup header
// before a confidential VM's firmware reads it.
func Patches(qemu string) (bool, error) {
	var major, minor int
	if n, err := fmt.Sscanf(qemu, "%d.%d", &major, &minor); err != nil || n != 2 {
		return false, fmt.Errorf("%q is not a version of QEMU; write it like 10.1", qemu)
	}
	return major < 10 || major == 10 && minor < 2, nil
}

func readImage(path string) (*measure.Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return measure.ReadUKI(path, f, info.Size())
}

// readStart reads as much of a disk as its partition table can take.
func readStart(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return data, nil
}

// Where the tools root has firmware.
const (
	genericFirmware = "usr/share/ovmf/OVMF.fd"
	tdxFirmware     = "usr/share/ovmf/OVMF.inteltdx.ms.fd"
	emptyVariables  = "usr/share/OVMF/OVMF_VARS_4M.fd"
)

// OpenFirmware reads a firmware file or, when path is empty, that of the tools
// root for the platform: the generic one for a TPM, Config-B for TDX.
func OpenFirmware(tools *toolsroot.Root, platform record.Platform, path string) (*measure.Firmware, error) {
	if path == "" && platform == record.TDX {
		data, err := ConfigB(tools)
		if err != nil {
			return nil, err
		}
		return measure.ReadFirmware("Config-B firmware", bytes.NewReader(data), int64(len(data)))
	}
	if path == "" {
		path = filepath.Join(tools.Dir, genericFirmware)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the firmware: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return measure.ReadFirmware(path, f, info.Size())
}

// ConfigB makes the firmware of TDs from what the tools root has.
func ConfigB(tools *toolsroot.Root) ([]byte, error) {
	code, err := OpenFirmware(nil, record.TDX, filepath.Join(tools.Dir, tdxFirmware))
	if err != nil {
		return nil, err
	}
	vars, err := os.ReadFile(filepath.Join(tools.Dir, emptyVariables))
	if err != nil {
		return nil, fmt.Errorf("read the empty variable store: %w", err)
	}
	return measure.ConfigB(code, vars)
}

// commit is the source that the image is said to be built from.
func (o Options) commit(r *Result, m *measure.Image) (string, error) {
	if o.Commit != "" {
		return o.Commit, nil
	}
	path := strings.TrimSuffix(o.Image, ".efi") + provenance.StatementSuffix
	s, err := provenance.ReadStatement(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// An image that was just built from the checkout around it.
		out, err := exec.Command("git", "rev-parse", "HEAD").Output()
		if err != nil {
			return "", fmt.Errorf("which commit the image was built from is not known: there is no %s; give --commit", path)
		}
		r.Notes = append(r.Notes, fmt.Sprintf("there is no %s: the record has the commit of the checkout that this runs in", path))
		return strings.TrimSpace(string(out)), nil
	case err != nil:
		return "", err
	}
	for _, subject := range s.Subject {
		if subject.Name == filepath.Base(o.Image) && subject.Digest.SHA256 == fmt.Sprintf("%x", m.SHA256) {
			commit, dirty := s.Commit()
			if dirty {
				r.Notes = append(r.Notes, "the image was built from files that are not those of its commit")
			}
			return commit, nil
		}
	}
	return "", fmt.Errorf("%s is not about this image, whose SHA-256 is %x; give --commit", path, m.SHA256)
}

// machines are the shapes with the tables that QEMU makes for them.
func (o Options) machines(ctx context.Context, models int) ([]measure.Machine, error) {
	names := o.Shapes
	if len(names) == 0 {
		names = launcher.ShapeNames()
	}
	for i, name := range names {
		if slices.Contains(names[:i], name) {
			return nil, fmt.Errorf("shape %s is named twice", name)
		}
	}
	list := make([]measure.Machine, len(names))
	errs := make([]error, len(names))
	var group sync.WaitGroup
	for i, name := range names {
		shape, err := launcher.LookupShape(name)
		if err != nil {
			return nil, err
		}
		a := Artefacts(o.Platform, o.Boot, models, shape)
		list[i].Shape = Shape(shape, o.Platform, 2+models)
		group.Go(func() {
			tables, err := launcher.Tables(ctx, o.Tools, shape, a)
			if err != nil {
				errs[i] = fmt.Errorf("shape %s: %w", name, err)
				return
			}
			list[i].Tables = tables
		})
	}
	group.Wait()
	return list, errors.Join(errs...)
}

// Shape is what a record says of a shape.
func Shape(s launcher.Shape, p record.Platform, disks int) record.Shape {
	bits := s.PhysBits
	if p == record.TDX {
		bits = s.TDXBits
	}
	out := record.Shape{Name: s.Name, VCPUs: s.VCPUs, Memory: int64(s.Memory), PhysBits: bits, GPUs: s.GPUs, Disks: disks}
	for _, size := range s.GPUBARs {
		out.GPUBARs = append(out.GPUBARs, int64(size))
	}
	return out
}

// Artefacts are those of a VM whose tables are wanted. What they are taken for
// does not depend on where its GPUs sit.
func Artefacts(p record.Platform, boot record.Boot, models int, s launcher.Shape) launcher.Artefacts {
	a := launcher.Artefacts{Platform: launcher.PlatformTCG, Transport: launcher.TransportUser, Firmware: "/firmware", Disks: 2 + models, GuestCID: 3}
	if p == record.TDX {
		a.Platform, a.Transport = launcher.PlatformTDX, launcher.TransportKernel
	}
	if boot == record.BootDisk {
		a.Disks, a.FromDisk = 1, true
	}
	setGPUs(&a, s.GPUs)
	return a
}

// setGPUs gives a VM GPUs, wherever they sit. Emulation has none.
func setGPUs(a *launcher.Artefacts, n int) {
	a.GPUs = nil
	for i := range n {
		a.GPUs = append(a.GPUs, fmt.Sprintf("0000:%02x:00.0", i+1))
	}
	if n > 0 && a.Platform == launcher.PlatformTCG {
		a.Platform = launcher.PlatformKVM
	}
}

// disks reads the engine disk and the model disks, and makes the manifest.
func (r *Result) disks(ctx context.Context, o Options) ([]record.Engine, []record.Model, error) {
	if o.Engine == "" {
		if len(o.Models) > 0 || o.Manifest != "" {
			return nil, nil, errors.New("models need an engine; give its disk with --engine")
		}
		return nil, nil, nil
	}
	description, engine, err := readEngine(ctx, o.Engine)
	if err != nil {
		return nil, nil, err
	}
	var infos []models.Info
	var list []record.Model
	for _, path := range o.Models {
		info, err := models.Inspect(path)
		if err != nil {
			return nil, nil, err
		}
		infos = append(infos, info)
		list = append(list, record.Model{
			Version: record.Version, Kind: record.KindModel, Name: info.Name, Revision: info.Revision, RootHash: info.Disk.RootHash[:],
		})
	}
	if o.Manifest != "" {
		if r.Manifest, err = os.ReadFile(o.Manifest); err != nil {
			return nil, nil, fmt.Errorf("read the manifest: %w", err)
		}
	} else if len(infos) > 0 {
		m := models.Manifest(description, infos, 0, nil)
		if p := o.Payment; p != nil {
			if m.Payment, err = models.Payment(p.Network, len(m.Models), p.Ceilings, p.Step); err != nil {
				return nil, nil, err
			}
		}
		if r.Manifest, err = m.Encode(); err != nil {
			return nil, nil, err
		}
	}
	if r.Manifest != nil {
		if err := r.events(o.Platform); err != nil {
			return nil, nil, err
		}
	}
	return []record.Engine{engine}, list, nil
}

// events are what the agent adds for the manifest. A VM with GPUs adds theirs,
// which cannot be known before.
func (r *Result) events(platform record.Platform) error {
	m, err := manifest.Parse(r.Manifest)
	if err != nil {
		return err
	}
	if m.GPUs > 0 {
		r.Notes = append(r.Notes, "RTMR3 or PCR 15 is left out: it has the identities of the VM's GPUs")
		return nil
	}
	if r.CEL, err = cel.Boot(r.Manifest, m, nil); err != nil {
		return err
	}
	bank256, bank384 := cel.Replay(r.CEL)
	if r.Last = bank256[:]; platform == record.TDX {
		r.Last = bank384[:]
	}
	return nil
}

// readEngine checks every block of an engine disk and returns what its record
// says.
func readEngine(ctx context.Context, path string) (verity.Description, record.Engine, error) {
	fail := func(err error) (verity.Description, record.Engine, error) {
		return verity.Description{}, record.Engine{}, fmt.Errorf("engine disk %s: %w", path, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	d, err := verity.VerifyDisk(ctx, f, info.Size(), func(int64, int64) {})
	if err != nil {
		return fail(err)
	}
	_, tree, err := disk.OpenTree(f, info.Size())
	if err != nil {
		return fail(err)
	}
	file, err := tree.Open(profile.Path)
	if err != nil {
		return fail(err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, profile.MaxSize+1))
	if err != nil {
		return fail(err)
	}
	p, err := profile.Parse(data)
	if err != nil {
		return fail(err)
	}
	return d, record.Engine{
		Version: record.Version, Kind: record.KindEngine, Name: p.Name, RootHash: d.RootHash[:], Profile: sum(data),
	}, nil
}
