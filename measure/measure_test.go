package measure

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
)

// tinyPE is the smallest PE32+ image with a section that has content.
func tinyPE() []byte {
	const peAt, sections = 64, 1
	b := make([]byte, 0x400)
	copy(b, "MZ")
	le := binary.LittleEndian
	le.PutUint32(b[0x3c:], peAt)
	copy(b[peAt:], "PE\x00\x00")
	coff := b[peAt+4:]
	le.PutUint16(coff, 0x8664)
	le.PutUint16(coff[2:], sections)
	le.PutUint16(coff[16:], 112+8*16)
	optional := coff[20:]
	le.PutUint16(optional, 0x20b)
	le.PutUint32(optional[60:], 0x200) // size of headers
	le.PutUint32(optional[64:], 0xdead)
	le.PutUint32(optional[108:], 16)
	table := optional[112+8*16:]
	copy(table, ".text")
	le.PutUint32(table[8:], 0x180)
	le.PutUint32(table[12:], 0x1000)
	le.PutUint32(table[16:], 0x200)
	le.PutUint32(table[20:], 0x200)
	for i := 0x200; i < 0x400; i++ {
		b[i] = byte(i)
	}
	return b
}

// tinySections are those of tinyTDVF.
var tinySections = []Section{
	{Offset: 0x1000, RawSize: 0x1000, Address: 0xfffff000, Size: 0x1000, Type: SectionBFV, Attr: attrExtend},
	{Offset: 0, RawSize: 0x1000, Address: 0xffffe000, Size: 0x1000, Type: SectionCFV},
	{Address: 0x809000, Size: 0x2000, Type: SectionTDHOB},
	{Address: 0x80b000, Size: 0x1000, Type: SectionTempMem},
}

// tinyTDVF is a firmware of two pages.
func tinyTDVF(sections []Section) []byte {
	b := make([]byte, 0x2000)
	le := binary.LittleEndian
	at := 0x1800
	copy(b[at:], "TDVF")
	le.PutUint32(b[at+4:], uint32(16+32*len(sections)))
	le.PutUint32(b[at+8:], 1)
	le.PutUint32(b[at+12:], uint32(len(sections)))
	for i, s := range sections {
		e := b[at+16+32*i:]
		le.PutUint32(e, s.Offset)
		le.PutUint32(e[4:], s.RawSize)
		le.PutUint64(e[8:], s.Address)
		le.PutUint64(e[16:], s.Size)
		le.PutUint32(e[24:], s.Type)
		le.PutUint32(e[28:], s.Attr)
	}
	// The table of GUIDs, backwards from 32 bytes before the end.
	end := len(b) - 32
	copy(b[end-16:], guidFooter[:])
	le.PutUint16(b[end-18:], 18+22)
	copy(b[end-18-16:], guidMetadata[:])
	le.PutUint16(b[end-18-18:], 22)
	le.PutUint32(b[end-18-22:], uint32(len(b)-at))
	return b
}

func TestTDVF(t *testing.T) {
	f := parseFirmware(t, tinyTDVF(tinySections))
	if fmt.Sprint(f.Sections) != fmt.Sprint(tinySections) {
		t.Errorf("sections %v, expected %v", f.Sections, tinySections)
	}
	one, err := f.MRTD(Interleaved)
	if err != nil {
		t.Fatal(err)
	}
	two, _ := f.MRTD(TwoPass)
	if !bytes.Equal(one, two) {
		t.Error("sections of one page are the same in both orders")
	}
}

// Metadata that is wrong is refused with file, offset and what was expected.
func TestTDVFRefuses(t *testing.T) {
	change := func(i int, f func(*Section)) []byte {
		list := append([]Section{}, tinySections...)
		f(&list[i])
		return tinyTDVF(list)
	}
	raw := func(at int, b ...byte) []byte {
		data := tinyTDVF(tinySections)
		copy(data[at:], b)
		return data
	}
	for name, tt := range map[string]struct {
		data []byte
		want []string
	}{
		"overlap":         {change(3, func(s *Section) { s.Address = 0x80a000 }), []string{"firmware: byte 0x1870", "overlaps section 2"}},
		"beyond the file": {change(0, func(s *Section) { s.Offset = 0x1001 }), []string{"0x1810", "ends at byte 0x2001, the file at 0x2000"}},
		"unaligned":       {change(0, func(s *Section) { s.Address++ }), []string{"whole pages"}},
		"wraps":           {change(2, func(s *Section) { s.Address = ^uint64(0) &^ 4095; s.Size = 0x2000 }), []string{"memory 0xfffffffffffff000"}},
		"huge":            {change(2, func(s *Section) { s.Size = 1 << 40 }), []string{"at most"}},
		"empty":           {change(2, func(s *Section) { s.Size = 0 }), []string{"whole pages"}},
		"unknown type":    {change(3, func(s *Section) { s.Type = 9 }), []string{"type of 0 to 3"}},
		"unknown flag":    {change(3, func(s *Section) { s.Attr = 4 }), []string{"attributes 0x4"}},
		"content in TEMP": {change(3, func(s *Section) { s.RawSize = 16 }), []string{"expected none"}},
		"two TD_HOBs":     {change(3, func(s *Section) { s.Type = SectionTDHOB }), []string{"2 sections of type TD_HOB"}},
		"no CFV":          {change(1, func(s *Section) { s.Type, s.RawSize, s.Offset = SectionTempMem, 0, 0 }), []string{"0 sections of type CFV"}},
		"version":         {raw(0x1808, 2), []string{"byte 0x1808", "version 2, expected 1"}},
		"signature":       {raw(0x1800, 'X'), []string{"byte 0x1800", "\"TDVF\""}},
		"count":           {raw(0x180c, 0xff, 0xff, 0xff), []string{"byte 0x1804"}},
		"metadata at end": {raw(0x2000-32-18-22, 4, 0, 0, 0), []string{"cut short"}},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := ReadFirmware("firmware", bytes.NewReader(tt.data), int64(len(tt.data)))
			if err == nil {
				t.Fatalf("accepted, with sections %v", f.Sections)
			}
			for _, w := range append(tt.want, "firmware:") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%v; expected it to say %q", err, w)
				}
			}
		})
	}
}

// A firmware without TDX metadata is one; what needs the metadata says so.
func TestNoTDX(t *testing.T) {
	for name, data := range map[string][]byte{
		"other":     make([]byte, 4096),
		"tiny":      {1},
		"no entry":  func() []byte { b := tinyTDVF(tinySections); b[len(b)-32-18-1] ^= 1; return b }(),
		"bad table": func() []byte { b := tinyTDVF(tinySections); b[len(b)-32-18] = 17; return b }(),
		"bad entry": func() []byte { b := tinyTDVF(tinySections); b[len(b)-32-36] = 1; return b }(),
	} {
		t.Run(name, func(t *testing.T) {
			f := parseFirmware(t, data)
			if got, err := f.MRTD(Interleaved); err == nil {
				t.Errorf("MRTD %x of a firmware without TDX", got)
			} else if !strings.Contains(err.Error(), "firmware: byte 0x") {
				t.Error(err)
			}
			if got, err := f.TDHOB(1 << 30); err == nil {
				t.Errorf("TD HOB %x of a firmware without TDX", got)
			}
			s := System{Platform: "tdx", Boot: "kernel", Firmware: f, Memory: 1 << 30}
			events, err := s.Events()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range RTMRs(events) {
				if r.Value != nil || r.Missing == "" {
					t.Errorf("%s is %x (%q)", r.Name, r.Value, r.Missing)
				}
			}
		})
	}
}

func TestTDHOB(t *testing.T) {
	f := parseFirmware(t, tinyTDVF(tinySections))
	type entry struct {
		kind        uint32
		start, size uint64
	}
	for memory, want := range map[uint64][]entry{
		1 << 30:    {{7, 0, 0x809000}, {0, 0x809000, 0x2000}, {0, 0x80b000, 0x1000}, {7, 0x80c000, 1<<30 - 0x80c000}},
		4 << 30:    {{7, 0, 0x809000}, {0, 0x809000, 0x2000}, {0, 0x80b000, 0x1000}, {7, 0x80c000, 2<<30 - 0x80c000}, {7, 4 << 30, 2 << 30}},
		0xaffff000: {{7, 0, 0x809000}, {0, 0x809000, 0x2000}, {0, 0x80b000, 0x1000}, {7, 0x80c000, 0xaffff000 - 0x80c000}},
	} {
		hob, err := f.TDHOB(memory)
		if err != nil {
			t.Fatal(err)
		}
		le := binary.LittleEndian
		if end := le.Uint64(hob[48:]); end != 0x809000+uint64(len(hob))+8 {
			t.Errorf("%#x: the list ends at %#x", memory, end)
		}
		var got []entry
		for b := hob[56:]; len(b) > 0; b = b[48:] {
			got = append(got, entry{le.Uint32(b[24:]), le.Uint64(b[32:]), le.Uint64(b[40:])})
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%#x: %v, expected %v", memory, got, want)
		}
	}
	for _, memory := range []uint64{0, 1, 1<<30 + 1, 1 << 60} {
		if _, err := f.TDHOB(memory); err == nil {
			t.Errorf("a TD HOB for %d bytes", memory)
		}
	}
}

func TestConfigB(t *testing.T) {
	f := parseFirmware(t, tinyTDVF(tinySections))
	vars := make([]byte, 0x1000)
	if _, err := ConfigB(f, vars); err == nil || !strings.Contains(err.Error(), "_FVH") {
		t.Error(err)
	}
	copy(vars[40:], "_FVH")
	out, err := ConfigB(f, vars)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out[:0x1000], vars) || !bytes.Equal(out[0x1000:], tinyTDVF(tinySections)[0x1000:]) {
		t.Error("it is not the empty store and the code")
	}
	if _, err := ConfigB(f, vars[1:]); err == nil {
		t.Error("a store of another size")
	}
}

// What edk2 measures of an SMBIOS table. The whole against a real boot is in
// ci/vmtest.
func TestSMBIOS(t *testing.T) {
	bios := [3]string{"maker", "1", "today"}
	table := []byte("\x01\x1b\x00\x01\x01\x02\x03\x04UUIDUUIDUUIDUUID\x06\x00\x00maker\x00model\x00v\x00serial\x00\x00" +
		"\x0b\x05\x00\x0b\x01secret\x00\x00" + "\x7f\x04\x00\x7f\x00\x00")
	got, err := SMBIOS("smbios", table, bios)
	if err != nil {
		t.Fatal(err)
	}
	want := "\x01\x1b\x00\x01\x01\x02\x03\x00" + strings.Repeat("\x00", 16) + "\x00\x00\x00maker\x00model\x00v\x00      \x00\x00" +
		"\x0b\x05\x00\x0b" + strings.Repeat("\x00", 9) +
		"\x00\x1a\x00\x00\x01\x02\x00\xe8\x03\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x1c\x00\x00\xff\xff\x00\x00maker\x001\x00today\x00\x00" +
		"\x7f\x04\xff\xfe\x00\x00"
	if string(got) != want {
		t.Errorf("%q\nexpected %q", got, want)
	}
	for name, bad := range map[string]string{
		"no end":     "\x01\x04\x00\x01\x00\x00",
		"cut short":  "\x01\x1b\x00\x01\x01",
		"too short":  "\x01\x03\x00\x01\x00\x00\x00",
		"no strings": "\x01\x04\x00\x01abc",
		"empty":      "",
	} {
		if _, err := SMBIOS("smbios", []byte(bad), bios); err == nil || !strings.HasPrefix(err.Error(), "smbios: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoaderFiles(t *testing.T) {
	entry := func(command byte, name string) []byte {
		b := make([]byte, 128)
		b[0] = command
		copy(b[4:60], name)
		return b
	}
	script := bytes.Join([][]byte{entry(1, "etc/acpi/rsdp"), entry(1, "etc/acpi/tables"), entry(2, "x"), entry(3, "y"), make([]byte, 256)}, nil)
	got, err := LoaderFiles(script)
	if err != nil || fmt.Sprint(got) != "[etc/acpi/rsdp etc/acpi/tables]" {
		t.Errorf("%v, %v", got, err)
	}
	for name, bad := range map[string][]byte{
		"length":  script[1:],
		"command": entry(9, "x"),
		"name":    entry(1, ""),
		"long":    entry(1, strings.Repeat("x", 56)),
		"control": entry(1, "a\nb"),
		"padding": append(entry(0, ""), entry(1, "x")...),
	} {
		if _, err := LoaderFiles(bad); err == nil || !strings.HasPrefix(err.Error(), "etc/table-loader: byte ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// tinyLog has one event.
func tinyLog() []byte {
	le := binary.LittleEndian
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0)
	b := append(make([]byte, 4), 3, 0, 0, 0)
	b = append(b, make([]byte, 20)...)
	b = le.AppendUint32(b, uint32(len(spec)))
	b = append(b, spec...)
	b = append(b, 4, 0, 0, 0, 7, 0, 0, 0x80, 1, 0, 0, 0, 0x0b, 0)
	b = append(b, SHA256.Sum([]byte("hello"))...)
	return append(le.AppendUint32(b, 5), "hello"...)
}

func TestLog(t *testing.T) {
	for _, padding := range []string{"", "\xff\xff\xff", strings.Repeat("\xff", 100), "\x00", strings.Repeat("\x00", 100)} {
		log, err := ParseLog("log", append(tinyLog(), padding...))
		if err != nil || len(log.Events) != 1 {
			t.Fatalf("%q: %v", padding, err)
		}
		want := SHA256.Extend(make([]byte, 32), SHA256.Sum([]byte("hello")))
		if got := log.Replay(SHA256, 4); !bytes.Equal(got, want) {
			t.Errorf("PCR 4 is %x, expected %x", got, want)
		}
	}
	body := len(tinyLog()) - 5 - 4 - 32 - 2 - 12
	change := func(at int, b ...byte) []byte {
		data := tinyLog()
		copy(data[at:], b)
		return data
	}
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"empty":             {nil, "empty"},
		"cut short":         {tinyLog()[:len(tinyLog())-1], "cut short"},
		"other format":      {change(32, 'X'), "Spec ID Event03"},
		"unknown algorithm": {change(32+28, 0x12), "SHA-1, SHA-256"},
		"digest size":       {change(32+30, 20), "digests of 20 bytes"},
		"many algorithms":   {change(32+24, 9), "9 algorithms"},
		"register":          {change(body, 24), "register 24"},
		"digests":           {change(body+8, 2), "2 digests, expected 1"},
		"other digest":      {change(body+12, 0x0c), "SHA-384, expected each of"},
		"long":              {change(len(tinyLog())-9, 0xff, 0xff, 0xff, 0xff), "cut short"},
		"rubbish":           {append(tinyLog(), 1, 2, 3), "cut short"},
	} {
		if _, err := ParseLog("log", tt.data); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "log: ") {
			t.Errorf("%s: %v, expected %q", name, err, tt.want)
		}
	}
}

func TestStubCommandLine(t *testing.T) {
	for in, want := range map[string]string{
		"a=b\x00": "a=b", "a\nb \n": "a b", " a": " a", "": "", "a\x00b": "a", "  ": "",
	} {
		if got := stubCommandLine([]byte(in)); got != want {
			t.Errorf("%q gives %q, expected %q", in, got, want)
		}
	}
}
