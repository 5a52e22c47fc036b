package measure

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

// Types of SMBIOS structures (DMTF DSP0134) that are handled.
const (
	smbiosBIOS = 0
	smbiosEnd  = 127
	smbiosOEM  = 128 // and up
)

// A field that edk2 leaves out of what it measures of an SMBIOS structure.
type smbiosField struct {
	offset, size int
	text         bool // it is the number of a string, which is blanked, too
}

// smbiosFilter is edk2's list of fields that are not measured
// (MdeModulePkg/Universal/SmbiosMeasurementDxe, mSmbiosFilter…BlackList). A type
// with an empty list is not measured but for its header.
var smbiosFilter = map[byte][]smbiosField{
	1:    {{0x07, 1, true}, {0x08, 16, false}, {0x18, 1, false}},
	2:    {{0x07, 1, true}, {0x0a, 1, true}},
	3:    {{0x07, 1, true}, {0x08, 1, true}},
	4:    {{0x20, 1, true}, {0x21, 1, true}, {0x22, 1, true}, {0x23, 1, false}, {0x24, 1, false}, {0x25, 1, false}, {0x2a, 2, false}, {0x2c, 2, false}, {0x2e, 2, false}, {0x11, 1, false}, {0x16, 2, false}},
	0x0b: {}, 0x0f: {}, 0x12: {}, 0x1f: {}, 0x21: {},
	0x11: {{0x18, 1, true}, {0x19, 1, true}, {0x1a, 1, true}},
	0x16: {{0x07, 1, true}, {0x10, 2, false}, {0x12, 2, false}},
	0x17: {{0x05, 2, false}},
	0x27: {{0x08, 1, true}, {0x09, 1, true}, {0x0a, 1, true}},
}

const maxSMBIOS = 64 << 10

// smbiosNext returns the length of the structure that begins the table.
func smbiosNext(name string, at int, table []byte) (int, error) {
	in := input{name, table}
	head, err := in.slice(uint64(at), 4, "an SMBIOS structure's header")
	if err != nil {
		return 0, err
	}
	if head[1] < 4 {
		return 0, in.errorf(uint64(at)+1, "an SMBIOS structure of %d bytes, expected 4 or more", head[1])
	}
	if _, err := in.slice(uint64(at), uint64(head[1])+2, "an SMBIOS structure"); err != nil {
		return 0, err
	}
	end := bytes.Index(table[at+int(head[1]):], []byte{0, 0})
	if end < 0 {
		return 0, in.errorf(uint64(at), "the strings of an SMBIOS structure have no end")
	}
	return int(head[1]) + end + 2, nil
}

// SMBIOS returns what edk2 measures of the SMBIOS table that QEMU provides
// (fw_cfg's etc/smbios/smbios-tables): QEMU's structures without its end, the
// firmware's own type 0, and an end; all of them without what varies between
// machines of one kind (SmbiosMeasurementDxe, FilterSmbiosTable).
func SMBIOS(name string, qemu []byte, bios [3]string) ([]byte, error) {
	if len(qemu) > maxSMBIOS {
		return nil, fmt.Errorf("%s: %d bytes, an SMBIOS table has at most %d", name, len(qemu), maxSMBIOS)
	}
	var out []byte
	handles := map[uint16]bool{}
	haveBIOS, ended := false, false
	for at := 0; at < len(qemu); {
		n, err := smbiosNext(name, at, qemu)
		if err != nil {
			return nil, err
		}
		one := qemu[at : at+n]
		at += n
		if one[0] == smbiosEnd {
			ended = true
			break
		}
		haveBIOS = haveBIOS || one[0] == smbiosBIOS
		handles[binary.LittleEndian.Uint16(one[2:])] = true
		out = append(out, filterSMBIOS(one)...)
	}
	if !ended {
		return nil, fmt.Errorf("%s: the SMBIOS table has no end, a structure of type 127", name)
	}
	if !haveBIOS {
		handle := uint16(0)
		for handles[handle] {
			handle++
		}
		out = append(out, biosStructure(handle, bios)...)
	}
	return append(out, smbiosEnd, 4, 0xff, 0xfe, 0, 0), nil
}

// biosStructure is the type 0 that OVMF makes (OvmfPkg/SmbiosPlatformDxe,
// mOvmfDefaultType0).
func biosStructure(handle uint16, bios [3]string) []byte {
	out := []byte{
		smbiosBIOS, 26, byte(handle), byte(handle >> 8),
		1, 2, 0x00, 0xe8, 3, 0,
		0x08, 0, 0, 0, 0, 0, 0, 0, // characteristics are not supported
		0, 0x1c, // virtual machine, UEFI, targeted content distribution
		0, 0, 0xff, 0xff, 0, 0,
	}
	for _, s := range bios {
		out = append(append(out, s...), 0)
	}
	return append(out, 0)
}

func filterSMBIOS(structure []byte) []byte {
	out := slices.Clone(structure)
	size := int(out[1])
	fields, filtered := smbiosFilter[out[0]]
	if out[0] >= smbiosOEM || filtered && len(fields) == 0 {
		clear(out[4:]) // the header alone is measured
		return out
	}
	for _, f := range fields {
		if f.offset+f.size > size {
			continue
		}
		if f.text {
			blank(out[size:], int(out[f.offset]))
		}
		clear(out[f.offset:][:f.size])
	}
	return out
}

// blank overwrites the nth string, counted from 1.
func blank(strings []byte, n int) {
	at := 0
	for i := 1; at < len(strings) && strings[at] != 0; i++ {
		end := at + bytes.IndexByte(strings[at:], 0)
		if i == n {
			for j := at; j < end; j++ {
				strings[j] = ' '
			}
			return
		}
		at = end + 1
	}
}
