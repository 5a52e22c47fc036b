package plan

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"chrysalis/image"
	"chrysalis/image/toolsroot"
	"chrysalis/measure"
	"chrysalis/measure/record"
)

// ForeignOptions describe a VM that is not ours. Files are paths; what is empty
// is not known, and the registers that depend on it are not predicted.
type ForeignOptions struct {
	Platform      record.Platform
	Boot          record.Boot
	Disk          string
	DiskSlot      int
	Kernel        string
	Initrd        string
	Cmdline       string
	UKI           string
	Firmware      string
	Profile       string
	Memory        uint64 // bytes
	CPUs          int
	Tables        string
	RSDP          string
	Loader        string
	FwCfg         map[string]string
	BootVariables []string // NAME=FILE
	SecureBoot    map[string]string
	QEMU          string
	Lock          []byte // image.lock, for QEMU's version where none is given
}

// Foreign reads the files.
func Foreign(tools *toolsroot.Root, o ForeignOptions) (*measure.System, measure.PageOrder, error) {
	fail := func(err error) (*measure.System, measure.PageOrder, error) { return nil, 0, err }
	if (o.Kernel == "") == (o.UKI == "") {
		return fail(fmt.Errorf("give either a kernel or a UKI"))
	}
	if o.UKI != "" && (o.Initrd != "" || o.Cmdline != "") {
		return fail(fmt.Errorf("a UKI has its own initrd and command line"))
	}
	if o.QEMU == "" {
		lock, err := image.ParseLock(o.Lock)
		if err != nil {
			return fail(err)
		}
		if o.QEMU, err = QEMUVersion(lock); err != nil {
			return fail(err)
		}
	}
	order, err := PageOrder(o.QEMU)
	if err != nil {
		return fail(err)
	}
	s := &measure.System{Platform: o.Platform, Boot: o.Boot, Memory: o.Memory, DiskSlot: o.DiskSlot}
	if s.Firmware, err = OpenFirmware(tools, o.Platform, o.Firmware); err != nil {
		return fail(err)
	}
	if o.Profile != "" {
		if s.Firmware.Profile, err = measure.LookupProfile(o.Profile); err != nil {
			return fail(err)
		}
	}
	if o.UKI != "" {
		s.Image, err = readImage(o.UKI)
	} else {
		s.Image, err = o.kernel()
	}
	if err != nil {
		return fail(err)
	}
	if s.Tables, err = o.tables(); err != nil {
		return fail(err)
	}
	for _, v := range o.BootVariables {
		name, path, ok := strings.Cut(v, "=")
		if !ok {
			return fail(fmt.Errorf("boot variable %q: write it as NAME=FILE", v))
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return fail(err)
		}
		s.Variables = append(s.Variables, measure.Variable{Name: name, Data: data})
	}
	for name, path := range o.SecureBoot {
		data, err := os.ReadFile(path)
		if err != nil {
			return fail(err)
		}
		if s.SecureBoot == nil {
			s.SecureBoot = map[string][]byte{}
		}
		s.SecureBoot[name] = data
	}
	if o.Disk != "" {
		if s.GPT, err = readStart(o.Disk); err != nil {
			return fail(err)
		}
	}
	return s, order, nil
}

func (o ForeignOptions) kernel() (*measure.Image, error) {
	data, err := os.ReadFile(o.Kernel)
	if err != nil {
		return nil, err
	}
	var initrd []byte
	if o.Initrd != "" {
		if initrd, err = os.ReadFile(o.Initrd); err != nil {
			return nil, err
		}
	}
	m, err := measure.ReadKernel(o.Kernel, bytes.NewReader(data), int64(len(data)), initrd, o.Cmdline)
	if err != nil {
		return nil, err
	}
	patches, err := Patches(o.QEMU)
	if err != nil || !patches {
		return m, err
	}
	if o.Memory == 0 {
		return nil, fmt.Errorf("QEMU %s changes the kernel's header, where to depends on --memory", o.QEMU)
	}
	return m.PatchKernel(o.Memory)
}

// tables reads what was taken from a machine's fw_cfg.
func (o ForeignOptions) tables() (*measure.Tables, error) {
	files := map[string]string{"etc/acpi/tables": o.Tables, "etc/acpi/rsdp": o.RSDP, "etc/table-loader": o.Loader}
	for name, path := range o.FwCfg {
		files[name] = path
	}
	t := &measure.Tables{Files: map[string][]byte{}}
	for name, path := range files {
		if path == "" {
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		t.Files[name] = data
	}
	t.Loader = t.Files["etc/table-loader"]
	delete(t.Files, "etc/table-loader")
	if o.CPUs != 0 && t.Files["etc/acpi/tables"] != nil {
		n, err := processors(t.Files["etc/acpi/tables"])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.Tables, err)
		}
		if n != o.CPUs {
			return nil, fmt.Errorf("%s: the ACPI tables are of a VM with %d vCPUs, expected %d", o.Tables, n, o.CPUs)
		}
	}
	if t.Loader == nil && len(t.Files) == 0 {
		return nil, nil
	}
	return t, nil
}

// processors counts the entries of the MADT (ACPI 6.5, section 5.2.12) that are
// of processors.
func processors(tables []byte) (int, error) {
	for at := 0; at+8 <= len(tables); {
		length := int(binary.LittleEndian.Uint32(tables[at+4:]))
		if length == 0 {
			break
		}
		if length < 8 || length > len(tables)-at {
			return 0, fmt.Errorf("byte %#x: an ACPI table of %d bytes, expected 8 to %d", at, length, len(tables)-at)
		}
		if string(tables[at:at+4]) != "APIC" {
			at += length
			continue
		}
		n := 0
		for b := tables[at : at+length][min(44, length):]; len(b) >= 2; {
			size := int(b[1])
			if size < 2 || size > len(b) {
				return 0, fmt.Errorf("byte %#x: an entry of %d bytes in the MADT", at+length-len(b), size)
			}
			if b[0] == 0 || b[0] == 9 { // local APIC, local x2APIC
				n++
			}
			b = b[size:]
		}
		return n, nil
	}
	return 0, fmt.Errorf("there is no MADT, a table with the signature \"APIC\"")
}

// Registers replays a system's events: MRTD and RTMR0 to RTMR2, or the PCRs.
func Registers(s *measure.System, order measure.PageOrder) ([]measure.Register, error) {
	events, err := s.Events()
	if err != nil {
		return nil, err
	}
	if s.Platform != record.TDX {
		return measure.PCRs(measure.SHA256, events), nil
	}
	mrtd := measure.Register{Name: "MRTD"}
	if mrtd.Value, err = s.Firmware.MRTD(order); err != nil {
		mrtd.Missing = err.Error()
	}
	return append([]measure.Register{mrtd}, measure.RTMRs(events)...), nil
}
