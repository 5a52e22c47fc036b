// Package drivertest makes folders with GPU drivers that hold no program, for
// tests of what packs them.
package drivertest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"maps"
	"slices"
	"testing/fstest"

	"chrysalis/image/driver"
)

// Module returns an ELF file with the .modinfo of a kernel module.
func Module(name, kernel, depends string) []byte {
	return ELF(elf.ET_REL, elf.EM_X86_64, map[string]string{
		".modinfo": "license=GPL\x00name=" + name + "\x00depends=" + depends + "\x00vermagic=" + kernel + " SMP preempt mod_unload \x00",
	}, "")
}

// Program returns an ELF file that names a loader, unless that is "".
func Program(loader string) []byte { return ELF(elf.ET_DYN, elf.EM_X86_64, nil, loader) }

// ELF returns an ELF file with some sections.
func ELF(kind elf.Type, machine elf.Machine, sections map[string]string, loader string) []byte {
	const header, segment = 64, 56
	var body, table bytes.Buffer
	at := uint64(header)
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(kind), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT), Ehsize: header, Shentsize: 64,
	}
	if loader != "" {
		h.Phoff, h.Phentsize, h.Phnum = at, segment, 1
		text := loader + "\x00"
		p := elf.Prog64{Type: uint32(elf.PT_INTERP), Off: at + segment, Filesz: uint64(len(text)), Memsz: uint64(len(text)), Align: 1}
		must(binary.Write(&body, binary.LittleEndian, p))
		body.WriteString(text)
	}
	names := "\x00.shstrtab\x00"
	must(binary.Write(&table, binary.LittleEndian, elf.Section64{}))
	add := func(name uint32, kind elf.SectionType, data string) {
		must(binary.Write(&table, binary.LittleEndian, elf.Section64{
			Name: name, Type: uint32(kind), Off: at + uint64(body.Len()), Size: uint64(len(data)), Addralign: 1,
		}))
		body.WriteString(data)
		h.Shnum++
	}
	for _, name := range slices.Sorted(maps.Keys(sections)) {
		offset := uint32(len(names))
		names += name + "\x00"
		add(offset, elf.SHT_PROGBITS, sections[name])
	}
	add(1, elf.SHT_STRTAB, names)
	h.Shstrndx = h.Shnum
	h.Shnum++
	h.Shoff = at + uint64(body.Len())
	var out bytes.Buffer
	must(binary.Write(&out, binary.LittleEndian, h))
	out.Write(body.Bytes())
	out.Write(table.Bytes())
	return out.Bytes()
}

// Loader is the loader of the helper that Folder has.
const Loader = "/lib64/ld-linux-x86-64.so.2"

// Folder returns a driver's folder: two modules, of which the second depends on
// the first and on "gcm", one firmware file, and a helper.
func Folder(version, kernel string, rim []byte) fstest.MapFS {
	description, err := json.Marshal(map[string]any{
		"version": 1, "driver": version, "kernel": kernel, "models": []string{"NVIDIA H100 TEST"},
		"modules":  []any{map[string]any{"name": "nvidia", "options": []string{"NVreg_A=1"}}, map[string]any{"name": "nvidia-uvm"}},
		"firmware": []any{map[string]any{"path": "nvidia/" + version + "/gsp.bin"}},
	})
	must(err)
	file := func(data []byte) *fstest.MapFile { return &fstest.MapFile{Data: data, Mode: 0o755} }
	return fstest.MapFS{
		"driver.json":           file(description),
		"driver.rim":            file(rim),
		"modules/nvidia.ko":     file(Module("nvidia", kernel, "")),
		"modules/nvidia-uvm.ko": file(Module("nvidia_uvm", kernel, "nvidia,gcm")),
		"firmware/nvidia/" + version + "/gsp.bin": file([]byte("firmware")),
		"root" + driver.Helper:                    file(Program(Loader)),
		"root" + Loader:                           file([]byte("loader")),
		"root/usr/lib/libnvidia-ml.so.1":          file([]byte("library")),
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
