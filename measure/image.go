package measure

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"strings"
	"sync"

	"chrysalis/image/inspect"
)

// MaxImage is the largest UKI, kernel or initrd, in bytes.
const MaxImage = 1 << 30

// Image is what a VM boots: a UKI, or a kernel with an initrd and a command line
// beside it.
type Image struct {
	SHA256 [32]byte

	in  input
	pe  *inspect.PE
	uki bool

	// Of a bare kernel.
	initrd  []byte
	cmdline string

	mu   sync.Mutex // guards done
	done map[Algorithm]imageEvents
}

// imageEvents are what events returned once.
type imageEvents struct {
	first Event
	rest  []Event
	err   error
}

// ReadUKI reads a UKI of size bytes; name is for errors.
func ReadUKI(name string, r io.ReaderAt, size int64) (*Image, error) {
	m, err := readImage(name, r, size)
	if err != nil {
		return nil, err
	}
	for _, section := range []string{".linux", ".initrd", ".cmdline"} {
		if m.pe.Section(section) == nil {
			return nil, fmt.Errorf("%s: no section %s; expected a UKI", name, section)
		}
	}
	m.uki = true
	return m, nil
}

// ReadKernel reads a bare kernel; initrd may be nil. cmdline is what QEMU's
// -append has.
func ReadKernel(name string, r io.ReaderAt, size int64, initrd []byte, cmdline string) (*Image, error) {
	m, err := readImage(name, r, size)
	if err != nil {
		return nil, err
	}
	if len(initrd) > MaxImage {
		return nil, fmt.Errorf("the initrd has %d bytes, at most %d are allowed", len(initrd), MaxImage)
	}
	if head, err := m.in.slice(0x202, 4, "a kernel's setup header"); err != nil {
		return nil, err
	} else if string(head) != "HdrS" {
		return nil, m.in.errorf(0x202, "%q, expected the signature \"HdrS\" of a kernel", head)
	}
	if strings.ContainsRune(cmdline, 0) {
		return nil, fmt.Errorf("the command line has a NUL")
	}
	m.initrd, m.cmdline = initrd, cmdline
	return m, nil
}

func readImage(name string, r io.ReaderAt, size int64) (*Image, error) {
	if size <= 0 || size > MaxImage {
		return nil, fmt.Errorf("%s: %d bytes, an image has 1 to %d", name, size, MaxImage)
	}
	data := make([]byte, size)
	if n, err := r.ReadAt(data, 0); n < len(data) {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	pe, err := inspect.ReadPE(bytes.NewReader(data), size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &Image{SHA256: sha256.Sum256(data), in: input{name, data}, pe: pe}, nil
}

// Authenticode is the digest that firmware measures of an image that it starts.
func (m *Image) Authenticode(a Algorithm) ([]byte, error) {
	return authenticode(a, m.in.name, m.pe, m.in.data)
}

func authenticode(a Algorithm, name string, pe *inspect.PE, data []byte) ([]byte, error) {
	h := algorithms[a].New()
	if err := pe.WriteAuthenticode(h, bytes.NewReader(data)); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return h.Sum(nil), nil
}

// PatchKernel returns a bare kernel as QEMU changes its setup header before the
// firmware reads it (hw/i386/x86-common.c, x86_load_linux): QEMU up to 10.1, and
// later ones for a VM that is not confidential. memory is in bytes.
func (m *Image) PatchKernel(memory uint64) (*Image, error) {
	if m.uki {
		return nil, fmt.Errorf("%s: QEMU does not change a UKI", m.in.name)
	}
	le := binary.LittleEndian
	head, err := m.in.slice(0, 0x250, "a kernel's setup header")
	if err != nil {
		return nil, err
	}
	protocol := le.Uint16(head[0x206:])
	if protocol < 0x203 {
		return nil, m.in.errorf(0x206, "boot protocol %#x, expected 0x203 or later", protocol)
	}
	data := bytes.Clone(m.in.data)
	data[0x210] = 0xb0  // loader: QEMU
	data[0x211] |= 0x80 // there is a heap
	le.PutUint32(data[0x228:], 0x20000)
	le.PutUint16(data[0x224:], 0x20000-0x10000-0x200)
	if m.initrd != nil {
		// The initrd ends below the ACPI tables, which have 128 KiB and 32 KiB more
		// (pc_memory_init), or where the kernel says.
		limit := uint64(le.Uint32(head[0x22c:]))
		if protocol >= 0x20c && le.Uint16(head[0x236:])&2 != 0 { // XLF_CAN_BE_LOADED_ABOVE_4G
			limit = 1<<32 - 1
		}
		low := memory
		if memory >= lowMemoryLimit {
			low = lowMemory
		}
		const acpi = 0x20000 + 0x8000
		if limit >= low-acpi {
			limit = low - acpi - 1
		}
		if uint64(len(m.initrd)) >= limit {
			return nil, fmt.Errorf("an initrd of %d bytes does not fit into %d bytes of memory", len(m.initrd), memory)
		}
		le.PutUint32(data[0x218:], uint32((limit-uint64(len(m.initrd)))&^4095))
		le.PutUint32(data[0x21c:], uint32(len(m.initrd)))
	}
	return &Image{SHA256: m.SHA256, in: input{m.in.name, data}, pe: m.pe, initrd: m.initrd, cmdline: m.cmdline}, nil
}

// stubSections are the sections of a UKI that systemd-stub 257 measures, in its
// order (src/fundamental/uki.h). It leaves out .pcrsig.
var stubSections = []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".profile", ".dtbauto", ".hwids"}

// unpredicted are sections that change what the stub does in ways that are not
// predicted here, because nothing of ours has them.
var unpredicted = []string{".ucode", ".dtb", ".pcrsig", ".pcrpkey", ".profile", ".dtbauto", ".hwids", ".efifw"}

// stubVersion returns the version of systemd that a UKI's stub says it is of.
func (m *Image) stubVersion() (string, error) {
	text, err := m.pe.Text(".sdmagic")
	if err != nil {
		return "", fmt.Errorf("%s: %w", m.in.name, err)
	}
	return strings.TrimSuffix(strings.TrimPrefix(text, "#### LoaderInfo: systemd-stub "), " ####"), nil
}

// content returns what a section is in memory: what VirtualSize is larger by
// than the file's part is zeros.
func content(s *inspect.Section) ([]byte, error) {
	if s.VirtualSize > MaxImage {
		return nil, fmt.Errorf("section %s has %#x bytes in memory, expected at most %#x", s.Name, s.VirtualSize, MaxImage)
	}
	if s.VirtualSize > s.RawSize && s.VirtualSize-s.RawSize > 1<<20 {
		return nil, fmt.Errorf("section %s has %#x bytes in memory and %#x in the file", s.Name, s.VirtualSize, s.RawSize)
	}
	b := make([]byte, s.VirtualSize)
	if n, err := s.Content.ReadAt(b[:s.Content.Size()], 0); int64(n) < s.Content.Size() {
		return nil, fmt.Errorf("section %s: %w", s.Name, err)
	}
	return b, nil
}

// events are the events of an image, in order: those of the firmware that starts
// it, of the stub, and of the kernel's own stub. Between the first and the rest
// come the firmware's own.
func (m *Image) events(a Algorithm) (first Event, rest []Event, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.done[a]
	if !ok {
		e.first, e.rest, e.err = m.measure(a)
		if m.done == nil {
			m.done = map[Algorithm]imageEvents{}
		}
		m.done[a] = e
	}
	return e.first, e.rest, e.err
}

func (m *Image) measure(a Algorithm) (first Event, rest []Event, err error) {
	var group sync.WaitGroup
	var errs [4]error
	var image, kernel, initrd []byte
	group.Go(func() { image, errs[0] = m.Authenticode(a) })
	if !m.uki {
		group.Wait()
		if errs[0] != nil {
			return Event{}, nil, errs[0]
		}
		rest = commandLine(a, m.cmdline+" initrd=initrd")
		if m.initrd == nil {
			rest = commandLine(a, m.cmdline)
		} else {
			rest = append(rest, Event{PCR: 9, Type: EvEventTag, Name: "initrd", Detail: "the initrd", Digest: a.Sum(m.initrd)})
		}
		return Event{PCR: 4, Type: EvBootServicesApp, Name: "image", Detail: "Authenticode digest of the kernel", Digest: image}, rest, nil
	}
	for _, name := range unpredicted {
		if m.pe.Section(name) != nil {
			group.Wait()
			return Event{}, nil, fmt.Errorf("%s: section %s, for which systemd-stub does more than is predicted here", m.in.name, name)
		}
	}
	version, err := m.stubVersion()
	if err == nil && !strings.HasPrefix(version, "257") {
		err = fmt.Errorf("%s: its stub is of systemd %q, expected 257; other versions measure other things", m.in.name, version)
	}
	if err != nil {
		group.Wait()
		return Event{}, nil, err
	}
	var sections []Event
	group.Go(func() {
		for _, name := range stubSections {
			s := m.pe.Section(name)
			if s == nil {
				continue
			}
			var data []byte
			if data, errs[1] = content(s); errs[1] != nil {
				return
			}
			sections = append(sections,
				Event{PCR: 11, Type: EvIPL, Name: "section-name" + name, Detail: "name of the UKI's section " + name, Digest: a.Sum([]byte(name + "\x00"))},
				Event{PCR: 11, Type: EvIPL, Name: "section" + name, Detail: fmt.Sprintf("the UKI's section %s, %d bytes", name, len(data)), Digest: a.Sum(data)})
		}
	})
	group.Go(func() { kernel, errs[2] = m.innerKernel(a) })
	group.Go(func() { initrd, errs[3] = m.combinedInitrd(a) })
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return Event{}, nil, err
		}
	}
	text, err := content(m.pe.Section(".cmdline"))
	if err != nil {
		return Event{}, nil, fmt.Errorf("%s: %w", m.in.name, err)
	}
	rest = append(sections, Event{PCR: 4, Type: EvBootServicesApp, Name: "kernel", Detail: "Authenticode digest of the kernel in the UKI", Digest: kernel})
	rest = append(rest, commandLine(a, stubCommandLine(text))...)
	rest = append(rest, Event{PCR: 9, Type: EvEventTag, Name: "initrd", Detail: "the UKI's initrd and what the stub adds to it", Digest: initrd})
	return Event{PCR: 4, Type: EvBootServicesApp, Name: "image", Detail: "Authenticode digest of the UKI", Digest: image}, rest, nil
}

// commandLine is the kernel's measurement of its command line, from 6.9 on
// (drivers/firmware/efi/libstub/efi-stub-helper.c, efi_convert_cmdline).
func commandLine(a Algorithm, text string) []Event {
	return []Event{{
		PCR: 9, Type: EvEventTag, Name: "command-line", Detail: fmt.Sprintf("kernel command line %q", text),
		Digest: a.Sum(utf16le(text), []byte{0, 0}),
	}}
}

// stubCommandLine is what systemd-stub makes of .cmdline (src/boot/efi/util.c,
// mangle_stub_cmdline): control characters become spaces, and those at the end
// go. A NUL ends it.
func stubCommandLine(section []byte) string {
	text, _, _ := strings.Cut(string(section), "\x00")
	text = strings.Map(func(r rune) rune {
		if r <= 0x1f {
			return ' '
		}
		return r
	}, text)
	return strings.TrimRight(text, " ")
}

// innerKernel is what the firmware measures when the stub starts the kernel.
func (m *Image) innerKernel(a Algorithm) ([]byte, error) {
	data, err := content(m.pe.Section(".linux"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.in.name, err)
	}
	name := m.in.name + ", section .linux"
	pe, err := inspect.ReadPE(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return authenticode(a, name, pe, data)
}

// combinedInitrd is the digest of the initrd that the stub hands to the kernel:
// .initrd, padded to 4 bytes, and a cpio archive with .extra/os-release in it
// (systemd-stub(7); src/boot/efi/cpio.c, pack_cpio_literal).
func (m *Image) combinedInitrd(a Algorithm) ([]byte, error) {
	data, err := content(m.pe.Section(".initrd"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.in.name, err)
	}
	h := algorithms[a].New()
	h.Write(data)
	pad(h, len(data))
	if s := m.pe.Section(".osrel"); s != nil {
		release, err := content(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", m.in.name, err)
		}
		cpio(h, 1, 0o40555, ".extra", nil)
		cpio(h, 2, 0o100444, ".extra/os-release", release)
		cpio(h, 0, 0, "TRAILER!!!", nil)
	}
	return h.Sum(nil), nil
}

// cpio writes one entry in the kernel's newc format.
func cpio(w hash.Hash, inode, mode int, name string, data []byte) {
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0)
	size := fmt.Sprintf("%08x", len(name)+1)
	if name == "TRAILER!!!" {
		size = strings.ToUpper(size) // a constant in the stub
	}
	head += size + "00000000" + name + "\x00"
	io.WriteString(w, head)
	pad(w, len(head))
	w.Write(data)
	pad(w, len(data))
}

func pad(w hash.Hash, written int) { w.Write(make([]byte, -written&3)) }
