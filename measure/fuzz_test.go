package measure

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// Seeds beside those here are in testdata/fuzz: a firmware, a UKI, logs and
// tables of real VMs, cut to what the parsers read of them.

func FuzzTDVF(f *testing.F) {
	f.Add(tinyTDVF(tinySections))
	f.Add(tinyTDVF(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		fw, err := ReadFirmware("firmware", bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		mrtd, err := fw.MRTD(Interleaved)
		if (err == nil) != (len(fw.Sections) > 0) || (err == nil) != (len(mrtd) == 48) {
			t.Fatalf("MRTD %x, %v of %d sections", mrtd, err, len(fw.Sections))
		}
		if hob, err := fw.TDHOB(1 << 30); err == nil && (len(hob)-56)%48 != 0 {
			t.Fatalf("a TD HOB of %d bytes", len(hob))
		}
	})
}

func FuzzImage(f *testing.F) {
	f.Add(tinyPE())
	f.Add(tinyUKI())
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, read := range []func() (*Image, error){
			func() (*Image, error) { return ReadUKI("uki", bytes.NewReader(data), int64(len(data))) },
			func() (*Image, error) {
				return ReadKernel("kernel", bytes.NewReader(data), int64(len(data)), []byte("initrd"), "cmdline")
			},
		} {
			m, err := read()
			if err != nil {
				continue
			}
			first, rest, err := m.events(SHA256)
			if err != nil {
				continue
			}
			for _, e := range append(rest, first) {
				if len(e.Digest) != 32 {
					t.Fatalf("event %s has a digest of %d bytes", e.Name, len(e.Digest))
				}
			}
			if !m.uki {
				m.PatchKernel(1 << 30)
			}
		}
	})
}

func FuzzLog(f *testing.F) {
	f.Add(tinyLog())
	f.Add(append(tinyLog(), 0xff, 0xff))
	f.Fuzz(func(t *testing.T, data []byte) {
		log, err := ParseLog("log", data)
		if err != nil {
			return
		}
		for _, e := range log.Events {
			e.Text()
			e.FilePath()
		}
		for _, a := range log.Algorithms {
			for i := range 24 {
				if len(log.Replay(a, i)) != a.Size() {
					t.Fatalf("%v: register %d", a, i)
				}
			}
		}
	})
}

func FuzzLoader(f *testing.F) {
	entry := make([]byte, 128)
	entry[0] = 1
	copy(entry[4:], "etc/acpi/rsdp")
	f.Add(append(entry, make([]byte, 128)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		files, err := LoaderFiles(data)
		if err == nil && len(files) > len(data)/128 {
			t.Fatalf("%d files of %d bytes", len(files), len(data))
		}
	})
}

func FuzzSMBIOS(f *testing.F) {
	f.Add([]byte("\x01\x1b\x00\x01\x01\x02\x03\x04UUIDUUIDUUIDUUID\x06\x00\x00maker\x00model\x00v\x00serial\x00\x00\x7f\x04\x00\x7f\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := SMBIOS("smbios", data, [3]string{"a", "b", "c"})
		if err == nil && !bytes.HasSuffix(out, []byte{127, 4, 0xff, 0xfe, 0, 0}) {
			t.Fatalf("%x", out)
		}
	})
}

func FuzzQuote(f *testing.F) {
	f.Add(tinyQuote(4))
	f.Add(tinyQuote(5))
	f.Add(tinyTPMQuote(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		if values, err := ParseTDXQuote("quote", data); err == nil && len(values["mrtd"]) != 48 {
			t.Fatal("no MRTD")
		}
		CheckTPMQuote("quote", data, func(int) []byte { return make([]byte, 32) })
	})
}

func FuzzGPT(f *testing.F) {
	f.Add(tinyGPT())
	f.Fuzz(func(t *testing.T, data []byte) {
		if out, err := gptData(data); err == nil && (len(out)-100)%128 != 0 {
			t.Fatalf("%d bytes", len(out))
		}
	})
}

// tinyUKI is a UKI of stub 257 with the sections that ours have.
func tinyUKI() []byte {
	type section struct {
		name string
		data []byte
	}
	list := []section{
		{".sdmagic", []byte("#### LoaderInfo: systemd-stub 257.13 ####")}, {".osrel", []byte("ID=x\n")},
		{".cmdline", []byte("console=ttyS0\x00")}, {".uname", []byte("7")}, {".linux", tinyPE()}, {".initrd", []byte("initrd")},
	}
	le := binary.LittleEndian
	b := make([]byte, 0x400)
	copy(b, tinyPE()[:0x200])
	le.PutUint16(b[64+4+2:], uint16(len(list)))
	le.PutUint32(b[64+4+20+60:], 0x400)
	for i, s := range list {
		h := b[64+24+112+128+40*i:][:40]
		clear(h)
		copy(h, s.name)
		le.PutUint32(h[8:], uint32(len(s.data)))
		le.PutUint32(h[12:], uint32(0x1000*(i+1)))
		le.PutUint32(h[16:], uint32((len(s.data)+511)&^511))
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, s.data...)
		b = append(b, make([]byte, -len(b)&511)...)
	}
	return b
}

func tinyQuote(version byte) []byte {
	b := make([]byte, 48)
	b[0], b[4] = version, 0x81
	if version == 5 {
		b = append(b, 2, 0, 0x48, 2, 0, 0)
	}
	body := make([]byte, 584)
	for i := range body {
		body[i] = byte(i)
	}
	return append(b, body...)
}

// tinyTPMQuote covers PCRs 4 and 15 of these values.
func tinyTPMQuote(values []byte) []byte {
	b := []byte{0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 0, 0, 0}
	b = append(b, make([]byte, 25)...)
	b = append(b, 0, 0, 0, 1, 0, 0x0b, 3, 0x10, 0x80, 0, 0, 32)
	return append(b, SHA256.Sum(values)...)
}

func tinyGPT() []byte {
	b := make([]byte, 4096)
	copy(b[512:], "EFI PART")
	b[512+72], b[512+80], b[512+84] = 2, 4, 128
	b[1024] = 1
	b[1024+128*2] = 1
	return b
}

func TestUKIEvents(t *testing.T) {
	data := tinyUKI()
	m, err := ReadUKI("uki", bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, err := m.events(SHA384)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range rest {
		names = append(names, e.Name)
	}
	want := []string{
		"section-name.linux", "section.linux", "section-name.osrel", "section.osrel", "section-name.cmdline", "section.cmdline",
		"section-name.initrd", "section.initrd", "section-name.uname", "section.uname", "kernel", "command-line", "initrd",
	}
	if len(names) != len(want) {
		t.Fatalf("%v, expected %v", names, want)
	}
	for i := range want {
		if names[i] != want[i] {
			t.Errorf("event %d is %s, expected %s", i, names[i], want[i])
		}
	}
	// Another stub measures other things, and a section may make it do more.
	for name, change := range map[string]func([]byte) []byte{
		"stub 262": func(b []byte) []byte { return bytes.Replace(b, []byte("257.13"), []byte("262.1\x00"), 1) },
		".pcrsig":  func(b []byte) []byte { return bytes.Replace(b, []byte(".uname\x00"), []byte(".pcrsig"), 1) },
		".linux":   func(b []byte) []byte { return bytes.Replace(b, []byte(".linux"), []byte(".other"), 1) },
	} {
		bad := change(bytes.Clone(data))
		m, err := ReadUKI("uki", bytes.NewReader(bad), int64(len(bad)))
		if err == nil {
			_, _, err = m.events(SHA384)
		}
		if err == nil {
			t.Errorf("%s: predicted all the same", name)
		}
	}
}

func TestTDXQuote(t *testing.T) {
	for _, version := range []byte{4, 5} {
		values, err := ParseTDXQuote("quote", tinyQuote(version))
		if err != nil {
			t.Fatal(err)
		}
		if values["mrtd"][0] != 136 || values["rtmr0"][0] != 328%256 || values["rtmr3"][0] != (328+144)%256 || values["mrconfigid"][0] != 184 {
			t.Errorf("version %d: %x", version, values)
		}
	}
	for name, bad := range map[string][]byte{
		"version 3": append([]byte{3}, tinyQuote(4)[1:]...), "SGX": func() []byte { q := tinyQuote(4); q[4] = 0; return q }(),
		"cut short": tinyQuote(4)[:600], "empty": nil, "SGX body": func() []byte { q := tinyQuote(5); q[48] = 1; return q }(),
	} {
		if _, err := ParseTDXQuote("quote", bad); err == nil {
			t.Error(name)
		}
	}
}

func TestTPMQuote(t *testing.T) {
	a, b := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	value := func(i int) []byte { return map[int][]byte{4: a, 15: b}[i] }
	quote := tinyTPMQuote(append(bytes.Clone(a), b...))
	if wrong, err := CheckTPMQuote("quote", quote, value); wrong != "" || err != nil {
		t.Error(wrong, err)
	}
	if wrong, err := CheckTPMQuote("quote", tinyTPMQuote(a), value); wrong == "" || err != nil {
		t.Error(wrong, err)
	}
	if wrong, err := CheckTPMQuote("quote", quote, func(int) []byte { return nil }); wrong == "" || err != nil {
		t.Error(wrong, err)
	}
	for i := range quote {
		CheckTPMQuote("quote", quote[:i], value)
	}
	if _, err := CheckTPMQuote("quote", append(quote, 0), value); err == nil {
		t.Error("something follows it")
	}
}
