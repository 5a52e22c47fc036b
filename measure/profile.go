package measure

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// Profile is what a firmware's build decides about what it measures. It cannot
// be read out of the image, most of which is compressed.
type Profile struct {
	Name string
	// FwCfg lists, in order, what a TD's firmware measures of QEMU's fw_cfg into
	// RTMR0, where it is there: names of files, or "BootMenu" for item 0x0e.
	FwCfg []FwCfgItem
	// BIOS is what the firmware writes into the SMBIOS table that it measures:
	// vendor, version, date. Empty where it measures no SMBIOS.
	BIOS [3]string
	// SecureBoot is the variable of that name where no platform key is enrolled:
	// nil in a build without Secure Boot.
	SecureBoot []byte
	// KernelBoot and DiskBoot are the boot options that are there when the
	// firmware starts what -kernel gives it, and what it finds on a disk.
	KernelBoot, DiskBoot []BootOption
	// OldSeparator says that a TD's separator goes into RTMR0 a second time
	// instead of RTMR1.
	OldSeparator bool
	// Untested says what has not been seen of it on a real machine, "" for nothing.
	Untested string
	// CRTM is the version that a TPM's log begins with, and Volumes are the
	// SHA-256 of the two firmware volumes that follow. Both are for explanations.
	CRTM    string
	Volumes [2]string
}

// FwCfgItem is a file of QEMU's fw_cfg.
type FwCfgItem struct {
	Name string
	Size int // in bytes; a file of another size is not measured; 0 for any
}

// BootOption is a boot option that the firmware makes by itself.
type BootOption struct {
	Number      uint16 // Boot####
	Attributes  uint32 // UEFI 2.10, section 3.1.3
	Description string
	File        guid // of the application, in the firmware's DXE volume
	Disk        bool // instead of File: the disk that is started from
}

var (
	dxeVolume   = mustGUID("7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1")
	guidUiApp   = mustGUID("462caa21-7614-4503-836e-8ab6f4662331")
	guidBootMgr = mustGUID("eec25bdc-67f2-4d95-b1d5-f81b2039d11d")
	guidShell   = mustGUID("7c04a583-9e3e-4f1c-ad65-e05268d0b4d1")
	// guidAutoCreated ends a boot option that the firmware made for a device
	// (edk2, MdeModulePkg/Library/UefiBootManagerLib/BmBoot.c).
	guidAutoCreated = mustGUID("8108ac4e-9f11-4d59-850e-e21a522c59b2")
)

// variable returns the content of Boot####: an EFI_LOAD_OPTION. slot is the PCI
// device number of the disk that is started from.
func (o BootOption) variable(slot int) []byte {
	end := []byte{0x7f, 0xff, 4, 0}
	var path, optional []byte
	if o.Disk {
		path = append([]byte{2, 1, 12, 0, 0xd0, 0x41, 0x03, 0x0a, 0, 0, 0, 0}, 1, 1, 6, 0, 0, byte(slot)) // PciRoot(0)/Pci(slot,0)
		optional = guidAutoCreated[:]
	} else {
		path = append([]byte{4, 7, 20, 0}, dxeVolume[:]...)
		path = append(append(path, 4, 6, 20, 0), o.File[:]...)
	}
	path = append(path, end...)
	out := binary.LittleEndian.AppendUint32(nil, o.Attributes)
	out = binary.LittleEndian.AppendUint16(out, uint16(len(path)))
	out = append(append(out, utf16le(o.Description)...), 0, 0)
	return append(append(out, path...), optional...)
}

// What edk2's Config-A and Config-B of 2025.05 and later measure of fw_cfg
// (OvmfPkg/Library/QemuFwCfgLib/QemuFwCfgCacheInit.c, mCacheFwCfgList; checked
// against the table in Debian's 2026.08 build).
var fwCfg2025 = []FwCfgItem{
	{"etc/extra-pci-roots", 8}, {"BootMenu", 2}, {"etc/boot-menu-wait", 2},
	{"etc/reserved-memory-end", 8}, {"opt/ovmf/X-PciMmio64Mb", 0}, {"bootorder", 0},
}

// Boot options of the builds below.
var (
	optionBootMgr = BootOption{0, 0x109, "BootManagerMenuApp", guidBootMgr, false}
	optionSetup   = BootOption{1, 0x101, "EFI Firmware Setup", guidUiApp, false}
	optionDisk    = BootOption{2, 0x001, "UEFI Misc Device", guid{}, true}
	optionShell   = BootOption{3, 0x101, "EFI Internal Shell", guidShell, false}
	optionUiApp   = BootOption{0, 0x109, "UiApp", guidUiApp, false}
)

var biosDebian202608 = [3]string{"Debian distribution of EDK II", "2026.08+ds-2", "09/26/2026"}

// Profiles lists the firmware builds that are known, by name.
var Profiles = map[string]Profile{
	// Debian's ovmf-generic: with a TPM, or Config-A on TDX.
	"debian-2026.08-generic": {
		FwCfg:      fwCfg2025,
		BIOS:       biosDebian202608,
		KernelBoot: []BootOption{optionBootMgr, optionSetup},
		DiskBoot:   []BootOption{optionDisk, optionBootMgr, optionSetup, optionShell},
		CRTM:       "2026.08+ds-2",
		Volumes:    [2]string{"10e48f005bc9f468", "7aad15bf592e8ebe"},
	},
	// Debian's ovmf-inteltdx with the empty variable store (ConfigB), which has no
	// setup and no shell.
	"debian-2026.08-config-b": {
		FwCfg:      fwCfg2025,
		BIOS:       biosDebian202608,
		SecureBoot: []byte{0},
		KernelBoot: []BootOption{optionBootMgr},
		DiskBoot:   []BootOption{{1, 0x001, "UEFI Misc Device", guid{}, true}, optionBootMgr},
		Untested: "no log of a TD with this firmware has been seen: its variables and SMBIOS are those of a boot without TDX, " +
			"its events and their order those of edk2's source, what a disk adds that of the generic build",
	},
	// edk2 2024.02 to 2025.02 as distributions build it for any VM.
	"edk2-2025.02": {KernelBoot: []BootOption{optionUiApp}},
	// edk2 before that: the second separator is RTMR0's.
	"edk2-2022.11": {KernelBoot: []BootOption{optionUiApp}, OldSeparator: true},
}

// known says which profile a firmware file has.
var known = map[string]string{
	"6a3e8f438ad7269f5dfd884647587b88391fb23965bb3aa7902b519438dba129": "debian-2026.08-generic",  // ovmf-generic 2026.08+ds-2, OVMF.fd
	"424e12dec9d1e175f2e9f56ea73a76dc91dd59e28334ba77310a10dd1702d7e9": "debian-2026.08-config-b", // ovmf-inteltdx 2026.08+ds-2, OVMF.inteltdx.ms.fd, and OVMF_VARS_4M.fd
	"7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773": "edk2-2022.11",            // ovmf 2022.11-6+deb12u2, OVMF.fd
}

func profileOf(sha256 [32]byte) Profile {
	p, _ := LookupProfile(known[hex.EncodeToString(sha256[:])])
	return p
}

// LookupProfile returns the profile of that name, or an error that lists them.
func LookupProfile(name string) (Profile, error) {
	p, ok := Profiles[name]
	if !ok {
		var names []string
		for n := range Profiles {
			names = append(names, n)
		}
		slices.Sort(names)
		return Profile{}, fmt.Errorf("there is no firmware profile %q; the profiles are %s", name, strings.Join(names, ", "))
	}
	p.Name = name
	return p, nil
}
