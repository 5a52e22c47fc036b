package measure

import (
	"errors"
	"fmt"

	"chrysalis/measure/record"
)

// Tables is what QEMU gives a firmware through fw_cfg. A nil part was not there
// to be read.
type Tables struct {
	Loader []byte            // etc/table-loader
	Files  map[string][]byte // by name; "BootMenu" is item 0x0e
}

// System is a VM whose measurements are to be predicted. What is nil is not
// known, and what depends on it is not predicted.
type System struct {
	Platform   record.Platform
	Boot       record.Boot
	Firmware   *Firmware
	Image      *Image
	Tables     *Tables
	Memory     uint64            // bytes; 0 where it is not known
	SecureBoot map[string][]byte // variables that are enrolled, by name
	Variables  []Variable        // BootOrder and Boot####, instead of those of the firmware's profile
	GPT        []byte            // the first sectors of the disk that is started from, for the event that measures its partitions
	DiskSlot   int               // and its PCI device number
	// ExitFailures is how often ExitBootServices fails before it succeeds: the
	// kernel then asks for the memory map anew and calls it again. Where firmware
	// has started from a disk it is 0 or 1, and nothing that is known decides which;
	// nil stands for not known.
	ExitFailures *int
}

// Events lists what the VM measures until its kernel runs, in order.
func (s *System) Events() ([]Event, error) {
	a := SHA256
	if s.Platform == record.TDX {
		a = SHA384
	} else if s.Platform != record.TPM {
		return nil, fmt.Errorf("there is no platform %q", s.Platform)
	}
	if s.Boot != record.BootKernel && s.Boot != record.BootDisk {
		return nil, fmt.Errorf("there is no way to boot %q", s.Boot)
	}
	tdx := s.Platform == record.TDX
	var profile Profile
	if s.Firmware != nil {
		profile = s.Firmware.Profile
	}
	unknown := ""
	switch {
	case s.Firmware == nil:
		unknown = "no firmware is given"
	case profile.Name == "":
		unknown = fmt.Sprintf("it is not known what the firmware with SHA-256 %x measures; name its profile", s.Firmware.SHA256)
	}

	var events []Event
	add := func(e ...Event) { events = append(events, e...) }
	if tdx {
		add(s.hobEvent(a), s.cfvEvent(a))
		add(s.fwCfgEvents(a, profile, unknown)...)
	} else {
		for _, name := range []string{"firmware-version", "firmware-volume-1", "firmware-volume-2"} {
			add(Event{PCR: 0, Name: name, Type: EvFirmwareBlob, Detail: "the firmware itself", Missing: missingFirmware})
		}
	}
	if unknown != "" {
		for _, name := range append(append([]string{}, SecureBootNames...), "end") {
			add(Event{PCR: 7, Name: "secure-boot-" + name, Missing: unknown})
		}
	} else {
		boot, err := secureBootEvents(a, profile, s.SecureBoot)
		if err != nil {
			return nil, err
		}
		add(boot...)
	}
	acpi, err := s.acpiEvents(a)
	if err != nil {
		return nil, err
	}
	add(acpi...)

	var image Event
	var rest []Event
	if s.Image != nil {
		if image, rest, err = s.Image.events(a); err != nil {
			return nil, err
		}
	} else {
		image = Event{PCR: 4, Name: "image", Missing: "no image is given"}
		rest = []Event{{PCR: 11, Name: "sections", Missing: image.Missing}, {PCR: 9, Name: "command-line", Missing: image.Missing}}
	}
	// QEMU's kernel is loaded, and so measured, before the firmware is ready to
	// boot; what is on a disk after that.
	if s.Boot == record.BootKernel {
		add(image)
	}
	add(s.smbiosEvents(a, profile)...)
	add(s.bootEvents(a, profile, unknown)...)
	add(action(a, 4, "calling-application", "Calling EFI Application from Boot Option"))
	switch {
	case !tdx:
		for pcr := range 7 {
			add(separator(a, pcr))
		}
	case profile.OldSeparator:
		add(separator(a, 1))
	default:
		add(separator(a, 2)) // any of RTMR1's
	}
	if s.Boot == record.BootDisk {
		add(s.gptEvent(a), image)
	}
	add(rest...)
	invoked := action(a, 5, "exit-boot-services", "Exit Boot Services Invocation")
	failed := action(a, 5, "exit-boot-services-failed", "Exit Boot Services Returned with Failure")
	switch {
	case s.ExitFailures != nil:
		for range *s.ExitFailures {
			add(invoked, failed)
		}
	case s.Boot == record.BootDisk && tdx:
		failed.Digest, failed.Missing = nil, "after a start from a disk the first ExitBootServices fails on some machines; say with --exit-failures 0 or 1 what yours do"
		add(failed)
	}
	add(invoked, action(a, 5, "exit-boot-services-done", "Exit Boot Services Returned with Success"))
	return events, nil
}

func (s *System) hobEvent(a Algorithm) Event {
	e := Event{PCR: 1, Type: EvHandoffTables2, Name: "td-hob", Detail: "list of memory that QEMU hands over"}
	switch {
	case s.Firmware == nil:
		e.Missing = "no firmware is given"
	case s.Memory == 0:
		e.Missing = "the VM's memory is not given"
	default:
		hob, err := s.Firmware.TDHOB(s.Memory)
		if err != nil {
			e.Missing = err.Error()
			break
		}
		e.Detail = fmt.Sprintf("list of %d MiB of memory that QEMU hands over", s.Memory>>20)
		e.Digest = a.Sum(hob)
	}
	return e
}

func (s *System) cfvEvent(a Algorithm) Event {
	e := Event{PCR: 1, Type: EvFirmwareBlob2, Name: "cfv", Detail: "the firmware's variable store"}
	if s.Firmware == nil {
		e.Missing = "no firmware is given"
		return e
	}
	cfv, err := s.Firmware.cfv()
	if err != nil {
		e.Missing = err.Error()
		return e
	}
	e.Digest = a.Sum(cfv)
	return e
}

// fwCfgEvents are what newer firmware measures of fw_cfg before it uses it.
func (s *System) fwCfgEvents(a Algorithm, p Profile, unknown string) []Event {
	if unknown != "" {
		return []Event{{PCR: 1, Name: "fw-cfg", Missing: unknown}}
	}
	if len(p.FwCfg) == 0 {
		return nil
	}
	if s.Tables == nil || s.Tables.Files == nil {
		return []Event{{PCR: 1, Name: "fw-cfg", Missing: missingTables}}
	}
	var events []Event
	for _, item := range p.FwCfg {
		data := s.Tables.Files[item.Name]
		if len(data) == 0 || item.Size != 0 && len(data) != item.Size {
			continue
		}
		events = append(events, Event{
			PCR: 1, Type: EvPlatformConfigFlags, Name: "fw-cfg-" + item.Name,
			Detail: fmt.Sprintf("QEMU's setting %s, %d bytes", item.Name, len(data)), Digest: a.Sum(data),
		})
	}
	return events
}

const missingTables = "the machine's tables are not given: QEMU makes them of its command line"

// acpiNames are the names of events, by file.
var acpiNames = map[string][2]string{
	"etc/acpi/rsdp":   {"acpi-rsdp", "ACPI: where the tables begin"},
	"etc/acpi/tables": {"acpi-tables", "ACPI tables: processors, memory, devices"},
	"etc/tpm/log":     {"acpi-tpm-log", "ACPI: room for the TPM's log"},
}

// acpiEvents are the blobs that the firmware fetches, in the order of the loader
// script's commands (edk2, OvmfPkg/Library/AcpiPlatformLib/QemuFwCfgAcpi.c).
func (s *System) acpiEvents(a Algorithm) ([]Event, error) {
	loader := Event{PCR: 1, Type: EvPlatformConfigFlags, Name: "acpi-loader", Detail: "ACPI: script that links the tables"}
	if s.Tables == nil || s.Tables.Loader == nil {
		loader.Missing = missingTables
		return []Event{loader}, nil
	}
	loader.Digest = a.Sum(s.Tables.Loader)
	files, err := LoaderFiles(s.Tables.Loader)
	if err != nil {
		return nil, err
	}
	events := []Event{loader}
	for _, file := range files {
		e := Event{PCR: 1, Type: EvPlatformConfigFlags, Name: "acpi-" + file, Detail: "ACPI: " + file}
		if known, ok := acpiNames[file]; ok {
			e.Name, e.Detail = known[0], known[1]
		}
		if data, ok := s.Tables.Files[file]; ok {
			e.Digest = a.Sum(data)
		} else {
			e.Missing = "the table loader names " + file + ", which is not given"
		}
		events = append(events, e)
	}
	return events, nil
}

// LoaderFiles lists the files that an ACPI loader script allocates, in order
// (QEMU, hw/acpi/bios-linker-loader.c): entries of 128 bytes, of which the first
// four are the command.
func LoaderFiles(script []byte) ([]string, error) {
	in := input{"etc/table-loader", script}
	if len(script)%128 != 0 || len(script) > 64<<10 {
		return nil, in.errorf(0, "%d bytes, expected at most 64 KiB in entries of 128", len(script))
	}
	var files []string
	for at := 0; at < len(script); at += 128 {
		entry := script[at : at+128]
		command := uint32(entry[0]) | uint32(entry[1])<<8 | uint32(entry[2])<<16 | uint32(entry[3])<<24
		switch command {
		case 0: // the rest is padding
			if !zeros(script[at:]) {
				return nil, in.errorf(uint64(at), "a command of type 0 with content after it")
			}
			return files, nil
		case 1: // BIOS_LINKER_LOADER_COMMAND_ALLOCATE: name, alignment, zone
			name := entry[4:60]
			n := 0
			for n < len(name) && name[n] != 0 {
				n++
			}
			if n == 0 || n == len(name) {
				return nil, in.errorf(uint64(at)+4, "the name %q of a file, expected 1 to 55 characters", name)
			}
			for _, c := range name[:n] {
				if c <= ' ' || c > '~' {
					return nil, in.errorf(uint64(at)+4, "the name %q of a file, expected printable characters", name[:n])
				}
			}
			files = append(files, string(name[:n]))
		case 2, 3, 4: // pointers and checksums
		default:
			return nil, in.errorf(uint64(at), "a command of type %#x, expected 1 to 4", command)
		}
	}
	return files, nil
}

func (s *System) smbiosEvents(a Algorithm, p Profile) []Event {
	if p.BIOS == [3]string{} {
		return nil // an unknown firmware's boot variables say that it is not known
	}
	e := Event{PCR: 1, Type: EvHandoffTables, Name: "smbios", Detail: "SMBIOS: memory, processor, firmware's version"}
	file, ok := []byte(nil), false
	if s.Tables != nil {
		file, ok = s.Tables.Files["etc/smbios/smbios-tables"]
	}
	if !ok {
		e.Missing = missingTables
		return []Event{e}
	}
	table, err := SMBIOS("etc/smbios/smbios-tables", file, p.BIOS)
	if err != nil {
		e.Missing = err.Error()
		return []Event{e}
	}
	e.Digest = a.Sum(table)
	return []Event{e}
}

func (s *System) bootEvents(a Algorithm, p Profile, unknown string) []Event {
	list := s.Variables
	if list == nil {
		options := p.KernelBoot
		if s.Boot == record.BootDisk {
			options = p.DiskBoot
		}
		if unknown == "" && len(options) == 0 {
			unknown = fmt.Sprintf("the boot options of the firmware %s are not known when it starts from a disk", p.Name)
		}
		if unknown != "" {
			return []Event{{PCR: 1, Type: EvVariableBoot, Name: "boot-BootOrder", Missing: unknown}}
		}
		list = bootVariables(options, s.DiskSlot)
	}
	var events []Event
	for _, v := range list {
		events = append(events, Event{
			PCR: 1, Type: EvVariableBoot, Name: "boot-" + v.Name, Detail: "the firmware's variable " + v.Name, Digest: a.Sum(v.Data),
		})
	}
	return events
}

func (s *System) gptEvent(a Algorithm) Event {
	e := Event{PCR: 5, Type: EvGPT, Name: "gpt", Detail: "partitions of the disk that is started from"}
	if s.GPT == nil {
		e.Missing = "the disk is not given"
		return e
	}
	data, err := gptData(s.GPT)
	if err != nil {
		e.Missing = err.Error()
		return e
	}
	e.Digest = a.Sum(data)
	return e
}

// gptData is the UEFI_GPT_DATA of a disk (TCG PC Client Platform Firmware
// Profile, section 10.2.7): the header, the number of partitions, and the entry
// of each. disk begins with the protective MBR and has the whole table.
func gptData(disk []byte) ([]byte, error) {
	in := input{"disk", disk}
	header, err := in.slice(512, 92, "a GPT's header")
	if err != nil {
		return nil, err
	}
	if string(header[:8]) != "EFI PART" {
		return nil, in.errorf(512, "%q, expected the signature of a GPT", header[:8])
	}
	le := func(at, n int) (v uint64) {
		for i := range n {
			v |= uint64(header[at+i]) << (8 * i)
		}
		return v
	}
	at, count, size := le(72, 8), le(80, 4), le(84, 4)
	if size != 128 || count < 1 || count > 1024 || at > 1<<32 {
		return nil, in.errorf(512+72, "%d partitions of %d bytes at sector %d, expected 1 to 1024 of 128", count, size, at)
	}
	table, err := in.slice(at*512, count*size, "a GPT's partitions")
	if err != nil {
		return nil, err
	}
	var entries []byte
	n := uint64(0)
	for i := range count {
		if entry := table[i*size:][:size]; !zeros(entry[:16]) {
			entries = append(entries, entry...)
			n++
		}
	}
	if n == 0 {
		return nil, errors.New("the disk has no partitions")
	}
	out := append([]byte{}, header...)
	for i := range 8 {
		out = append(out, byte(n>>(8*i)))
	}
	return append(out, entries...), nil
}
