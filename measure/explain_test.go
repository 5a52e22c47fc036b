package measure

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// smallSystem is a VM whose every event is predicted.
func smallSystem(t *testing.T, platform record.Platform) System {
	t.Helper()
	uki := tinyUKI()
	m, err := ReadUKI("uki", bytes.NewReader(uki), int64(len(uki)))
	if err != nil {
		t.Fatal(err)
	}
	fw := parseFirmware(t, tinyTDVF(tinySections))
	if fw.Profile, err = LookupProfile("debian-2026.08-generic"); err != nil {
		t.Fatal(err)
	}
	loader := make([]byte, 256)
	loader[0], loader[128] = 1, 1
	copy(loader[4:], "etc/acpi/rsdp")
	copy(loader[132:], "etc/acpi/tables")
	return System{
		Platform: platform, Boot: record.BootKernel, Firmware: fw, Image: m, Memory: 1 << 30,
		Tables: &Tables{Loader: loader, Files: map[string][]byte{
			"etc/acpi/rsdp": []byte("rsdp"), "etc/acpi/tables": []byte("tables"), "BootMenu": {0, 0},
			"etc/smbios/smbios-tables": []byte("\x7f\x04\x00\x7f\x00\x00"),
		}},
	}
}

func smallFile(t *testing.T, s System) *record.File {
	t.Helper()
	base := record.Image{Name: "chrysalis", Commit: strings.Repeat("a", 40), Lock: make([]byte, 32), QEMU: "11.1.3"}
	shape := record.Shape{Name: "small", VCPUs: 2, Memory: 1 << 30, PhysBits: 40, Disks: 3}
	// Of the other machine nothing is known: it is left out.
	unknown := shape
	unknown.Name = "another"
	f, notes, err := File(base, s, []Machine{{Shape: unknown}, {Shape: shape, Tables: s.Tables}}, Interleaved)
	if err != nil || len(f.Shapes) != 1 || len(notes) == 0 || !strings.Contains(notes[len(notes)-1], "shape another is left out") {
		t.Fatal(err, notes)
	}
	encoded, err := f.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if f, err = record.ParseFile(encoded); err != nil {
		t.Fatal(err)
	}
	return f
}

// logOf is a log of events, as a TPM's or a TD's firmware writes it.
func logOf(t *testing.T, a Algorithm, events []Event) *Log {
	t.Helper()
	data := func(e Event) []byte {
		switch {
		case e.Type == EvIPL:
			name := e.Name[strings.LastIndexByte(e.Name, '.'):]
			return append(utf16le(name), 0, 0)
		case e.Type == EvEventTag && e.Name == "initrd":
			return []byte("12345678Linux initrd\x00")
		case e.Type == EvEventTag:
			return []byte("12345678LOADED_IMAGE::LoadOptions\x00")
		case e.Type == EvVariableBoot:
			return variableData(guidGlobal, strings.TrimPrefix(e.Name, "boot-"), nil)
		}
		return []byte(e.Detail)
	}
	le := binary.LittleEndian
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, byte(a), 0, byte(a.Size()), 0, 0)
	b := append(make([]byte, 4), 3, 0, 0, 0)
	b = append(b, make([]byte, 20)...)
	b = le.AppendUint32(b, uint32(len(spec)))
	b = append(b, spec...)
	for _, e := range events {
		index := e.PCR
		if a == SHA384 {
			n, ok := RTMR(e.PCR)
			if !ok {
				continue
			}
			index = n + 1
		}
		digest := e.Digest
		if digest == nil {
			digest = make([]byte, a.Size())
		}
		b = le.AppendUint32(b, uint32(index))
		b = le.AppendUint32(b, e.Type)
		b = append(b, 1, 0, 0, 0, byte(a), 0)
		b = append(b, digest...)
		b = le.AppendUint32(b, uint32(len(data(e))))
		b = append(b, data(e)...)
	}
	log, err := ParseLog("log", b)
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// What is as predicted is equal; one thing that is not is named.
func TestExplain(t *testing.T) {
	for platform, a := range map[record.Platform]Algorithm{record.TPM: SHA256, record.TDX: SHA384} {
		s := smallSystem(t, platform)
		f := smallFile(t, s)
		other := func(change func(*System)) []Event {
			one := smallSystem(t, platform)
			change(&one)
			events, err := one.Events()
			if err != nil {
				t.Fatal(err)
			}
			return events
		}
		changed := func(at, by string) func(*System) {
			return func(s *System) {
				data := bytes.Replace(tinyUKI(), []byte(at), []byte(by), 1)
				m, err := ReadUKI("uki", bytes.NewReader(data), int64(len(data)))
				if err != nil {
					t.Fatal(err)
				}
				s.Image = m
			}
		}
		for _, tt := range []struct {
			name   string
			events []Event
			values map[string][]byte
			cause  string
		}{
			{"equal", other(func(*System) {}), nil, ""},
			{"ACPI", other(func(s *System) { s.Tables.Files["etc/acpi/tables"] = []byte("others") }), nil, "ACPI tables: the VM was started with 4 vCPUs"},
			{"ACPI, unknown", other(func(s *System) { s.Tables.Files["etc/acpi/tables"] = []byte("unknown") }), nil, "ACPI tables: the VM was started with other devices or vCPUs than the record's (2 vCPUs"},
			{"SMBIOS", other(func(s *System) {
				s.Tables.Files["etc/smbios/smbios-tables"] = []byte("\x20\x04\x00\x01\x00\x00\x7f\x04\x00\x7f\x00\x00")
			}), nil, "memory: the VM was started with another amount"},
			{"os-release", other(changed("ID=x", "ID=y")), nil, "another image: its section .osrel differs"},
			{"header", other(changed("MZ\x00", "MZ\x01")), nil, "another image: its headers differ"},
			{"Secure Boot", other(func(s *System) { s.SecureBoot = map[string][]byte{"PK": {1}} }), nil, "Secure Boot: variable PK differs"},
			{"log of another", other(func(*System) {}), map[string][]byte{map[record.Platform]string{record.TPM: "pcr4", record.TDX: "rtmr1"}[platform]: make([]byte, a.Size())}, "the quote and the log do not belong together"},
		} {
			t.Run(string(platform)+"/"+tt.name, func(t *testing.T) {
				guesses := func(_ record.Shape, yield func(Guess) bool) {
					_ = yield(Guess{"8 vCPUs", other(func(s *System) { s.Tables.Files["etc/acpi/tables"] = []byte("more") })}) &&
						yield(Guess{"4 vCPUs", other(func(s *System) { s.Tables.Files["etc/acpi/tables"] = []byte("others") })})
				}
				x, err := Explain(f, Observed{Log: logOf(t, a, tt.events), Values: tt.values}, "", guesses)
				if err != nil {
					t.Fatal(err)
				}
				if x.Equal != (tt.cause == "") || x.Shape != "small" {
					t.Errorf("equal %v, shape %q: %+v", x.Equal, x.Shape, x.Findings)
				}
				if tt.cause != "" && (len(x.Causes) == 0 || !strings.Contains(x.Causes[0].What, tt.cause)) {
					t.Errorf("causes %+v, expected %q", x.Causes, tt.cause)
				}
				for _, v := range x.Values {
					if tt.cause == "" && !v.Equal {
						t.Errorf("%+v", v)
					}
				}
				if want := map[record.Platform]int{record.TPM: 5, record.TDX: 3}[platform]; len(x.Values) != want {
					t.Errorf("%d values, expected %d", len(x.Values), want)
				}
			})
		}
		// A machine that no shape fits is compared with the smallest.
		tie := *f
		large := f.Shapes[0]
		large.Name, large.VCPUs = "a-large-one", 16
		tie.Shapes = append([]record.Shape{large}, f.Shapes...)
		for _, e := range f.Events {
			if e.Shape == "small" {
				e.Shape = large.Name
				tie.Events = append(tie.Events, e)
			}
		}
		log := logOf(t, a, other(func(s *System) { s.Tables.Files["etc/acpi/tables"] = []byte("others") }))
		if x, err := Explain(&tie, Observed{Log: log}, "", nil); err != nil || x.Shape != "small" {
			t.Errorf("%v, %+v", err, x)
		}
		if _, err := Explain(f, Observed{Log: logOf(t, a, nil)}, "large", nil); err == nil {
			t.Error("a shape that the record does not have")
		}
		if _, err := Explain(f, Observed{Log: &Log{Algorithms: []Algorithm{SHA1}}}, "", nil); err == nil {
			t.Error("a log without the record's digests")
		}
		without := *f
		without.Events = nil
		if _, err := Explain(&without, Observed{Log: logOf(t, a, nil)}, "", nil); err == nil {
			t.Error("a record without events")
		}
	}
}

// Another manifest, engine or model than the record's is named.
func TestExplainManifest(t *testing.T) {
	s := smallSystem(t, record.TPM)
	f := smallFile(t, s)
	disk := func(c string) manifest.Disk {
		return manifest.Disk{RootHash: strings.Repeat(c, 32), Salt: "", DataBlocks: 1}
	}
	make := func(engine, context string) []byte {
		m := manifest.Manifest{
			Version: manifest.Version, Engine: disk(engine), Parameters: map[string]int64{context: 1}, Limits: manifest.DefaultLimits,
			Models: []manifest.Model{{Name: "a/b", Revision: "1", Disk: disk("cc")}},
		}
		out, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	f.Engines = []record.Engine{{RootHash: bytes.Repeat([]byte{0xaa}, 32)}}
	f.Models = []record.Model{{RootHash: bytes.Repeat([]byte{0xcc}, 32)}}
	events, err := s.Events()
	if err != nil {
		t.Fatal(err)
	}
	observe := func(given []byte) Observed {
		m, err := manifest.Parse(given)
		if err != nil {
			t.Fatal(err)
		}
		list, err := cel.Boot(given, m, nil)
		if err != nil {
			t.Fatal(err)
		}
		log, err := cel.Encode(cel.PCR15, list)
		if err != nil {
			t.Fatal(err)
		}
		value, _ := cel.Replay(list)
		return Observed{Log: logOf(t, SHA256, events), Manifest: given, CEL: log, Want: make("aa", "x"), Values: map[string][]byte{"pcr15": value[:]}}
	}
	for name, tt := range map[string]struct {
		o     Observed
		cause string
	}{
		"equal":     {observe(make("aa", "x")), ""},
		"parameter": {observe(make("aa", "y")), `parameters is {"y":1}, expected {"x":1}`},
		"engine":    {func() Observed { o := observe(make("bb", "x")); o.Want = nil; return o }(), "an engine that the record does not have"},
		"quote": {func() Observed {
			o := observe(make("aa", "x"))
			o.Values["pcr15"] = bytes.Repeat([]byte{1}, 32)
			return o
		}(), "do not belong together"},
		"cel": {func() Observed { o := observe(make("aa", "x")); o.CEL = o.CEL[:50]; return o }(), "CEL"},
	} {
		t.Run(name, func(t *testing.T) {
			x, err := Explain(f, tt.o, "", nil)
			if err != nil {
				t.Fatal(err)
			}
			if x.Equal != (tt.cause == "") || tt.cause != "" && (len(x.Causes) == 0 || !strings.Contains(x.Causes[0].What, tt.cause)) {
				t.Errorf("%+v", x)
			}
		})
	}
}
