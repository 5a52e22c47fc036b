package inspect

import (
	"context"
	"fmt"
)

// A UKI is a unified kernel image, open for reading: systemd-stub with a kernel
// and more as PE sections (UAPI group, "UKI" specification).
type UKI struct {
	*PE
	CommandLine string            // of .cmdline
	Kernel      string            // of .uname: the kernel's version
	Stub        string            // of .sdmagic: the stub's name and version
	OSRelease   map[string]string // of .osrel
	Initrd      *Initrd           // nil without .initrd

	file *file
}

// OpenUKI opens the UKI at path and unpacks its initrd.
func OpenUKI(ctx context.Context, path string) (*UKI, error) {
	f, err := openFile(path)
	if err != nil {
		return nil, err
	}
	u, err := newUKI(ctx, f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return u, nil
}

// newUKI takes over the file if it succeeds.
func newUKI(ctx context.Context, f *file) (*UKI, error) {
	p, err := ReadPE(f, f.size)
	if err != nil {
		return nil, err
	}
	u := &UKI{PE: p, file: f}
	if p.Section(".linux") == nil {
		return nil, fmt.Errorf("a PE image without a .linux section, expected a UKI")
	}
	for name, value := range map[string]*string{".cmdline": &u.CommandLine, ".uname": &u.Kernel, ".sdmagic": &u.Stub} {
		if *value, err = p.Text(name); err != nil {
			return nil, err
		}
	}
	release, err := p.Text(".osrel")
	if err != nil {
		return nil, err
	}
	u.OSRelease = parseOSRelease(release)
	if s := p.Section(".initrd"); s != nil {
		if u.Initrd, err = OpenInitrd(ctx, s.Content, s.Content.Size()); err != nil {
			return nil, fmt.Errorf("section .initrd, from byte %#x: %w", s.Offset, err)
		}
	}
	return u, nil
}

// Close closes the file and frees the unpacked initrd.
func (u *UKI) Close() error {
	if u.Initrd != nil {
		u.Initrd.Close()
	}
	return u.file.Close()
}
