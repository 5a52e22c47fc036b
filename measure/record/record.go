// Package record is what publishers sign off: the expected measurements of an
// image, of a machine shape that runs it, and the root hashes of engines and
// models. Records are canonical JSON (RFC 8785), so a record has one SHA-256; on
// TON it is found under its Key.
package record

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"chrysalis/canonical"
)

// Version is the version of records that this package reads and writes.
const Version = 1

// MaxSize is the largest record, in bytes; MaxFile the largest file of records.
const (
	MaxSize = 16 << 10
	MaxFile = 1 << 20
)

// Kind says what a record is about.
type Kind string

// The kinds.
const (
	KindImage  Kind = "image"
	KindShape  Kind = "shape"
	KindEngine Kind = "engine"
	KindModel  Kind = "model"
)

// Platform is what a VM's evidence comes from.
type Platform string

// The platforms.
const (
	TDX Platform = "tdx"
	TPM Platform = "tpm"
)

// Boot is how the firmware finds the image; it decides what is measured.
type Boot string

// The ways to boot.
const (
	BootKernel Boot = "kernel" // QEMU -kernel
	BootDisk   Boot = "disk"   // from an ESP, as exported
)

// Hex is a byte string in lower-case hexadecimal.
type Hex []byte

// MarshalText implements encoding.TextMarshaler.
func (h Hex) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex) UnmarshalText(text []byte) (err error) {
	if *h, err = hex.DecodeString(string(text)); err != nil {
		return errors.New("not hexadecimal")
	}
	return nil
}

func (h Hex) String() string { return hex.EncodeToString(h) }

// Image is what one image measures on one platform, booted in one way.
type Image struct {
	Version  int      `json:"version"`
	Kind     Kind     `json:"kind"`
	Name     string   `json:"name"` // the image's name: "chrysalis", "chrysalis-debug"
	Platform Platform `json:"platform"`
	Boot     Boot     `json:"boot"`

	// On TDX: 48 bytes each.
	MRTD  Hex `json:"mrtd,omitempty"`
	RTMR1 Hex `json:"rtmr1,omitempty"`
	RTMR2 Hex `json:"rtmr2,omitempty"`
	// On a TPM: PCRs 4, 7, 9 and 11 of the SHA-256 bank, in this order.
	PCRs []PCR `json:"pcrs,omitempty"`

	Commit   string `json:"commit"`   // of the source: 40 hexadecimal digits
	Lock     Hex    `json:"lock"`     // SHA-256 of image.lock
	UKI      Hex    `json:"uki"`      // SHA-256 of the image file
	Firmware Hex    `json:"firmware"` // SHA-256 of the firmware file
	QEMU     string `json:"qemu"`     // QEMU's version
}

// PCR is the value of a register of a TPM's SHA-256 bank.
type PCR struct {
	Index  int `json:"index"`
	SHA256 Hex `json:"sha256"`
}

// ImagePCRs are the PCRs that identify an image on a TPM.
var ImagePCRs = []int{4, 7, 9, 11}

// Shape is what an image measures of the machine that it runs on: RTMR0 on TDX,
// PCR 1 on a TPM.
type Shape struct {
	Version  int      `json:"version"`
	Kind     Kind     `json:"kind"`
	Name     string   `json:"name"`
	Platform Platform `json:"platform"`
	Image    Hex      `json:"image"`           // the image record's key
	RTMR0    Hex      `json:"rtmr0,omitempty"` // on TDX: 48 bytes
	PCR1     Hex      `json:"pcr1,omitempty"`  // on a TPM: 32 bytes, of the SHA-256 bank
	VCPUs    int      `json:"vcpus"`
	Memory   int64    `json:"memory"`    // bytes
	PhysBits int      `json:"phys_bits"` // guest physical address bits
	GPUs     int      `json:"gpus"`
	// GPUBARs are the sizes of each GPU's memory regions, in bytes, in the order of
	// its registers; absent without GPUs. They decide what is measured, and are no
	// measurement.
	GPUBARs []int64 `json:"gpu_bars,omitempty"`
	Disks   int     `json:"disks"` // manifest, engine and models
}

// Engine is an engine disk.
type Engine struct {
	Version  int    `json:"version"`
	Kind     Kind   `json:"kind"`
	Name     string `json:"name"`      // as its profile says
	RootHash Hex    `json:"root_hash"` // 32 bytes
	Profile  Hex    `json:"profile"`   // SHA-256 of the profile on the disk
}

// Model is a model disk.
type Model struct {
	Version  int    `json:"version"`
	Kind     Kind   `json:"kind"`
	Name     string `json:"name"` // ORG/NAME
	Revision string `json:"revision"`
	RootHash Hex    `json:"root_hash"` // 32 bytes
}

// ID returns NAME@REVISION.
func (m *Model) ID() string { return m.Name + "@" + m.Revision }

// Record is an Image, Shape, Engine or Model.
type Record interface {
	canonical.Document
	// Kind says which.
	RecordKind() Kind
	// Key is where the record is found in a registry.
	Key() [32]byte
}

// RecordKind implements Record.
func (*Image) RecordKind() Kind { return KindImage }

// RecordKind implements Record.
func (*Shape) RecordKind() Kind { return KindShape }

// RecordKind implements Record.
func (*Engine) RecordKind() Kind { return KindEngine }

// RecordKind implements Record.
func (*Model) RecordKind() Kind { return KindModel }

func key(kind Kind, parts ...[]byte) (sum [32]byte) {
	h := sha256.New()
	h.Write([]byte("chrysalis/" + string(kind) + "/1"))
	for _, p := range parts {
		h.Write(p)
	}
	h.Sum(sum[:0])
	return sum
}

// Key is SHA-256("chrysalis/image/1" ‖ platform ‖ MRTD ‖ RTMR1 ‖ RTMR2) on TDX,
// with the PCRs in place of the registers on a TPM. platform is the byte 1 for
// TDX, 2 for a TPM.
func (i *Image) Key() [32]byte {
	if i.Platform == TDX {
		return key(KindImage, []byte{1}, i.MRTD, i.RTMR1, i.RTMR2)
	}
	parts := [][]byte{{2}}
	for _, pcr := range i.PCRs {
		parts = append(parts, pcr.SHA256)
	}
	return key(KindImage, parts...)
}

// Key is SHA-256("chrysalis/shape/1" ‖ image key ‖ RTMR0), with PCR 1 in its place
// on a TPM.
func (s *Shape) Key() [32]byte { return key(KindShape, s.Image, s.RTMR0, s.PCR1) }

// Key is SHA-256("chrysalis/engine/1" ‖ root hash ‖ profile hash).
func (e *Engine) Key() [32]byte { return key(KindEngine, e.RootHash, e.Profile) }

// Key is SHA-256("chrysalis/model/1" ‖ root hash).
func (m *Model) Key() [32]byte { return key(KindModel, m.RootHash) }

var (
	nameRE    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	modelRE   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	commitRE  = regexp.MustCompile(`^[0-9a-f]{40}$`)
	versionRE = regexp.MustCompile(`^[0-9]{1,4}(\.[0-9]{1,4}){1,3}$`)
)

func header(version int, kind, want Kind, name string) error {
	if version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", version, Version)
	}
	if kind != want {
		return fmt.Errorf("kind is %.20q, expected %q", kind, want)
	}
	if !nameRE.MatchString(name) {
		return fmt.Errorf("name: %.80q is not 1 to 64 letters, digits, '.', '_' and '-'", name)
	}
	return nil
}

func size(name string, value Hex, want int) error {
	if len(value) != want {
		return fmt.Errorf("%s: %d bytes, expected %d", name, len(value), want)
	}
	return nil
}

// Validate implements canonical.Document.
func (i *Image) Validate() error {
	if err := header(i.Version, i.Kind, KindImage, i.Name); err != nil {
		return err
	}
	if i.Boot != BootKernel && i.Boot != BootDisk {
		return fmt.Errorf("boot is %.20q, expected %q or %q", i.Boot, BootKernel, BootDisk)
	}
	registers := 0
	switch i.Platform {
	case TDX:
		registers = 48
		if i.PCRs != nil {
			return errors.New("pcrs: a TD has none")
		}
	case TPM:
		var indices []int
		for _, pcr := range i.PCRs {
			indices = append(indices, pcr.Index)
			if err := size(fmt.Sprintf("pcrs: PCR %d", pcr.Index), pcr.SHA256, 32); err != nil {
				return err
			}
		}
		if !slices.Equal(indices, ImagePCRs) {
			return fmt.Errorf("pcrs: %v, expected %v", indices, ImagePCRs)
		}
	default:
		return fmt.Errorf("platform is %.20q, expected %q or %q", i.Platform, TDX, TPM)
	}
	if !commitRE.MatchString(i.Commit) {
		return errors.New("commit: expected 40 hexadecimal digits")
	}
	if !versionRE.MatchString(i.QEMU) {
		return fmt.Errorf("qemu: %.40q is not a version", i.QEMU)
	}
	return errors.Join(
		size("mrtd", i.MRTD, registers), size("rtmr1", i.RTMR1, registers), size("rtmr2", i.RTMR2, registers),
		size("lock", i.Lock, 32), size("uki", i.UKI, 32), size("firmware", i.Firmware, 32))
}

// Validate implements canonical.Document.
func (s *Shape) Validate() error {
	if err := header(s.Version, s.Kind, KindShape, s.Name); err != nil {
		return err
	}
	rtmr0, pcr1 := 0, 0
	switch s.Platform {
	case TDX:
		rtmr0 = 48
	case TPM:
		pcr1 = 32
	default:
		return fmt.Errorf("platform is %.20q, expected %q or %q", s.Platform, TDX, TPM)
	}
	if (s.GPUs > 0) != (len(s.GPUBARs) > 0) || len(s.GPUBARs) > 3 {
		return fmt.Errorf("gpu_bars: %d memory regions of %d GPUs, expected 1 to 3 where there are GPUs", len(s.GPUBARs), s.GPUs)
	}
	for i, n := range s.GPUBARs {
		if n < 1<<12 || n > 1<<46 || n&(n-1) != 0 {
			return fmt.Errorf("gpu_bars[%d]: %d bytes, expected a power of two from 4 KiB to 64 TiB", i, n)
		}
	}
	return errors.Join(
		size("image", s.Image, 32), size("rtmr0", s.RTMR0, rtmr0), size("pcr1", s.PCR1, pcr1),
		inRange("vcpus", int64(s.VCPUs), 1, 4096), inRange("memory", s.Memory, 1<<20, 1<<50),
		inRange("phys_bits", int64(s.PhysBits), 32, 57), inRange("gpus", int64(s.GPUs), 0, 16),
		inRange("disks", int64(s.Disks), 3, 18))
}

func inRange(name string, value, low, high int64) error {
	if value < low || value > high {
		return fmt.Errorf("%s: %d is out of bounds, expected %d to %d", name, value, low, high)
	}
	return nil
}

// Validate implements canonical.Document.
func (e *Engine) Validate() error {
	return errors.Join(header(e.Version, e.Kind, KindEngine, e.Name),
		size("root_hash", e.RootHash, 32), size("profile", e.Profile, 32))
}

// Validate implements canonical.Document.
func (m *Model) Validate() error {
	if !modelRE.MatchString(m.Name) {
		return fmt.Errorf("name: %.80q is not ORG/NAME of letters, digits, '.', '_' and '-'", m.Name)
	}
	return errors.Join(header(m.Version, m.Kind, KindModel, m.Revision), size("root_hash", m.RootHash, 32))
}

// Encode returns a record's canonical encoding. Its SHA-256 names the record.
func Encode(r Record) ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("%s record: %w", r.RecordKind(), err)
	}
	out, err := canonical.Encode(r)
	if err != nil {
		return nil, fmt.Errorf("%s record: %w", r.RecordKind(), err)
	}
	if len(out) > MaxSize {
		return nil, fmt.Errorf("%s record: %d bytes, at most %d are allowed", r.RecordKind(), len(out), MaxSize)
	}
	return out, nil
}

// Parse reads a record of the given kind. It refuses anything but the canonical
// encoding of a valid one.
func Parse(kind Kind, data []byte) (Record, error) {
	var r Record
	switch kind {
	case KindImage:
		r = new(Image)
	case KindShape:
		r = new(Shape)
	case KindEngine:
		r = new(Engine)
	case KindModel:
		r = new(Model)
	default:
		return nil, fmt.Errorf("there is no record of kind %.20q", kind)
	}
	if err := canonical.Decode(data, MaxSize, r); err != nil {
		return nil, fmt.Errorf("%s record: %w", kind, err)
	}
	return r, nil
}

// File is a measurement record: all that is expected of one image on one
// platform, of the shapes that it runs on, and of what runs in it.
type File struct {
	Version int      `json:"version"`
	Image   Image    `json:"image"`
	Shapes  []Shape  `json:"shapes"`
	Engines []Engine `json:"engines"`
	Models  []Model  `json:"models"`
	// Events are what the registers are made of. Nobody who verifies a VM needs
	// them; they are for saying which part of a VM differs.
	Events []Event `json:"events,omitempty"`
}

// Event is one measurement, in the order in which its register is extended.
type Event struct {
	Register string `json:"register"`          // "rtmr0" to "rtmr2", "pcr0" to "pcr23"
	Shape    string `json:"shape,omitempty"`   // the shape that it belongs to; absent where it is the image's
	Name     string `json:"name"`              // as docs/measure.md lists them
	Text     string `json:"text,omitempty"`    // in plain words
	Digest   Hex    `json:"digest,omitempty"`  // SHA-384 on TDX, SHA-256 on a TPM; absent where it is not predicted
	Missing  string `json:"missing,omitempty"` // then: why not
}

// Validate implements canonical.Document.
func (f *File) Validate() error {
	if f.Version != Version {
		return fmt.Errorf("version is %d, this program reads version %d", f.Version, Version)
	}
	if f.Shapes == nil || f.Engines == nil || f.Models == nil {
		return errors.New("shapes, engines and models must be there; write [] for none")
	}
	if len(f.Shapes) > 256 || len(f.Engines) > 64 || len(f.Models) > 256 {
		return errors.New("more than 256 shapes, 64 engines or 256 models")
	}
	if err := f.Image.Validate(); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	image := f.Image.Key()
	names := map[string]bool{}
	for i := range f.Shapes {
		s := &f.Shapes[i]
		if names[s.Name] {
			return fmt.Errorf("shapes[%d]: %.80q is there twice", i, s.Name)
		}
		names[s.Name] = true
		if err := s.Validate(); err != nil {
			return fmt.Errorf("shapes[%d]: %w", i, err)
		}
		if s.Platform != f.Image.Platform || !slices.Equal(s.Image, image[:]) {
			return fmt.Errorf("shapes[%d]: of another image", i)
		}
	}
	for i := range f.Engines {
		if err := f.Engines[i].Validate(); err != nil {
			return fmt.Errorf("engines[%d]: %w", i, err)
		}
	}
	for i := range f.Models {
		if err := f.Models[i].Validate(); err != nil {
			return fmt.Errorf("models[%d]: %w", i, err)
		}
	}
	return f.validateEvents()
}

const maxEvents = 8192

var (
	registerRE  = regexp.MustCompile(`^(rtmr[0-2]|pcr(1?[0-9]|2[0-3]))$`)
	eventNameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$`)
)

// validateEvents checks that the events, where all of a register's are known,
// make the value that the record has.
func (f *File) validateEvents() error {
	if len(f.Events) > maxEvents {
		return fmt.Errorf("%d events, at most %d are allowed", len(f.Events), maxEvents)
	}
	hash := sha256.New
	if f.Image.Platform == TDX {
		hash = sha512.New384
	}
	bytes := hash().Size()
	shapes := map[string]bool{"": true}
	for _, s := range f.Shapes {
		shapes[s.Name] = true
	}
	type key struct{ register, shape string }
	values := map[key][]byte{}
	for i, e := range f.Events {
		switch {
		case !registerRE.MatchString(e.Register):
			return fmt.Errorf("events[%d]: %.20q is not a register", i, e.Register)
		case (e.Register[0] == 'r') != (f.Image.Platform == TDX):
			return fmt.Errorf("events[%d]: platform %s has no %s", i, f.Image.Platform, e.Register)
		case !eventNameRE.MatchString(e.Name):
			return fmt.Errorf("events[%d]: %.80q is not an event's name", i, e.Name)
		case !shapes[e.Shape]:
			return fmt.Errorf("events[%d]: there is no shape %.80q", i, e.Shape)
		case len(e.Text) > 512 || len(e.Missing) > 512:
			return fmt.Errorf("events[%d]: more than 512 characters of text", i)
		case (len(e.Digest) == 0) == (e.Missing == ""):
			return fmt.Errorf("events[%d]: expected either a digest or why there is none", i)
		case len(e.Digest) != 0 && len(e.Digest) != bytes:
			return fmt.Errorf("events[%d]: a digest of %d bytes, expected %d", i, len(e.Digest), bytes)
		}
		k := key{e.Register, e.Shape}
		value, seen := values[k]
		if !seen {
			value = make([]byte, bytes)
		}
		if value != nil && len(e.Digest) != 0 {
			h := hash()
			h.Write(value)
			h.Write(e.Digest)
			values[k] = h.Sum(nil)
		} else {
			values[k] = nil
		}
	}
	check := func(register, shape string, want []byte) error {
		if got := values[key{register, shape}]; got != nil && !slices.Equal(got, want) {
			return fmt.Errorf("events: those of %s make another value than the record has", register)
		}
		return nil
	}
	err := errors.Join(check("rtmr1", "", f.Image.RTMR1), check("rtmr2", "", f.Image.RTMR2))
	for _, pcr := range f.Image.PCRs {
		err = errors.Join(err, check(fmt.Sprintf("pcr%d", pcr.Index), "", pcr.SHA256))
	}
	for _, s := range f.Shapes {
		err = errors.Join(err, check("rtmr0", s.Name, s.RTMR0), check("pcr1", s.Name, s.PCR1))
	}
	return err
}

// Encode returns the file's canonical encoding.
func (f *File) Encode() ([]byte, error) {
	if err := f.Validate(); err != nil {
		return nil, fmt.Errorf("measurement record: %w", err)
	}
	out, err := canonical.Encode(f)
	if err != nil {
		return nil, fmt.Errorf("measurement record: %w", err)
	}
	return out, nil
}

// ParseFile reads a file of records.
func ParseFile(data []byte) (*File, error) {
	var f File
	if err := canonical.Decode(data, MaxFile, &f); err != nil {
		return nil, fmt.Errorf("measurement record: %w", err)
	}
	return &f, nil
}
