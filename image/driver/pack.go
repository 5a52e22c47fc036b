package driver

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Fill reads a driver's folder, which is laid out as Dir is on a disk, checks it,
// and returns the description with the sizes of the files. kernel is the release
// that the image has; available names the modules that the image loads before.
//
// Everything in the folder has a place: a file that is neither listed nor in the
// helper's root is an error, and so is a listed one that is missing.
func Fill(dir fs.FS, kernel string, available []string) ([]byte, *Driver, error) {
	data, err := readFile(dir, below(Path), MaxSize)
	if err != nil {
		return nil, nil, fmt.Errorf("GPU driver: %w", err)
	}
	d, err := decode(data)
	if err != nil {
		return nil, nil, err
	}
	if d.Kernel != kernel {
		return nil, nil, fmt.Errorf("GPU driver: it is for the kernel %s, the image has %s; build its modules against that one's headers", d.Kernel, kernel)
	}
	listed := map[string]bool{below(Path): true, below(RIM): true}
	var loaded []string
	for _, name := range available {
		loaded = append(loaded, underscored(name))
	}
	for i := range d.Modules {
		m := &d.Modules[i]
		name := path.Join(below(ModulesDir), m.Name+".ko")
		listed[name] = true
		if m.Size, err = checkModule(dir, name, m, kernel, loaded); err != nil {
			return nil, nil, fmt.Errorf("GPU driver: module %s: %w", m.Name, err)
		}
		loaded = append(loaded, underscored(m.Name))
		if m.Options == nil {
			m.Options = []string{}
		}
	}
	for i := range d.Firmware {
		f := &d.Firmware[i]
		name := path.Join(below(FirmwareDir), f.Path)
		listed[name] = true
		if f.Size, err = sizeOf(dir, name); err != nil {
			return nil, nil, fmt.Errorf("GPU driver: firmware %s: %w", f.Path, err)
		}
	}
	if d.Firmware == nil {
		d.Firmware = []File{}
	}
	if err := checkHelper(dir); err != nil {
		return nil, nil, fmt.Errorf("GPU driver: the helper: %w", err)
	}
	if _, err := sizeOf(dir, below(RIM)); err != nil {
		return nil, nil, fmt.Errorf("GPU driver: the driver's RIM: %w", err)
	}
	err = fs.WalkDir(dir, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || listed[name] || strings.HasPrefix(name, below(HelperRoot)+"/") {
			return err
		}
		return fmt.Errorf("GPU driver: %s is there, and %s does not list it", name, below(Path))
	})
	if err != nil {
		return nil, nil, err
	}
	out, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, nil, err
	}
	out = append(out, '\n')
	_, err = Parse(out)
	return out, d, err
}

// below is a path of the disk in the driver's own folder.
func below(p string) string { return strings.TrimPrefix(p, Dir+"/") }

func underscored(name string) string { return strings.ReplaceAll(name, "-", "_") }

// checkModule compares what a module says about itself with where it is to be
// loaded, and returns its size.
func checkModule(dir fs.FS, name string, m *Module, kernel string, loaded []string) (int64, error) {
	data, err := readFile(dir, name, maxFile)
	if err != nil {
		return 0, err
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return 0, fmt.Errorf("it is no kernel module: %w", err)
	}
	if f.Type != elf.ET_REL || f.Machine != elf.EM_X86_64 {
		return 0, fmt.Errorf("it is an ELF file of type %v for %v, expected a kernel module for x86-64", f.Type, f.Machine)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return 0, errors.New("it is no kernel module: it has no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return 0, fmt.Errorf("read its .modinfo: %w", err)
	}
	// NUL-terminated KEY=VALUE: linux/moduleparam.h, MODULE_INFO.
	values := map[string]string{}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if key, value, ok := strings.Cut(entry, "="); ok && values[key] == "" {
			values[key] = value
		}
	}
	if got := underscored(values["name"]); got != underscored(m.Name) {
		return 0, fmt.Errorf("it calls itself %.80q", values["name"])
	}
	if release, _, _ := strings.Cut(values["vermagic"], " "); release != kernel {
		return 0, fmt.Errorf("it is for the kernel %.80q, the image has %s", release, kernel)
	}
	for need := range strings.SplitSeq(values["depends"], ",") {
		if need != "" && !slices.Contains(loaded, underscored(need)) {
			return 0, fmt.Errorf("it depends on %.80s, which neither the image nor a module before it has", need)
		}
	}
	return int64(len(data)), nil
}

// checkHelper checks that the helper can be started in its root.
func checkHelper(dir fs.FS) error {
	root := below(HelperRoot)
	data, err := readFile(dir, path.Join(root, Helper), maxFile)
	if err != nil {
		return err
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("it is no program: %w", err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("it is an ELF file of type %v for %v, expected a program for x86-64", f.Type, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interpreter, err := io.ReadAll(io.LimitReader(p.Open(), 256))
		if err != nil {
			return err
		}
		name := strings.TrimRight(string(interpreter), "\x00")
		if _, err := sizeOf(dir, path.Join(root, name)); err != nil {
			return fmt.Errorf("its loader %.80s is not in %s: %w", name, root, err)
		}
	}
	return nil
}

func sizeOf(dir fs.FS, name string) (int64, error) {
	info, err := fs.Stat(dir, name)
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() || info.Size() < 1 || info.Size() > maxFile {
		return 0, fmt.Errorf("%s is not a file of 1 to %d bytes", name, maxFile)
	}
	return info.Size(), nil
}

func readFile(dir fs.FS, name string, limit int64) ([]byte, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", name, limit)
	}
	return data, err
}
