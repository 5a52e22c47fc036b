package cel

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"chrysalis/manifest"
)

var testManifest = manifest.Manifest{
	Version: manifest.Version,
	Engine:  manifest.Disk{RootHash: strings.Repeat("aa", 32), Salt: "01", DataBlocks: 1},
	Models: []manifest.Model{
		{Name: "acme/first", Revision: "1", Disk: manifest.Disk{RootHash: strings.Repeat("bb", 32), Salt: "02", DataBlocks: 2}},
		{Name: "acme/second", Revision: "2", Disk: manifest.Disk{RootHash: strings.Repeat("cc", 32), Salt: "03", DataBlocks: 3}},
	},
	Parameters: map[string]int64{},
	Limits:     manifest.DefaultLimits,
}

// The separator alone, by hand from the TLV encoding of TCG's Canonical Event Log
// Format 1.0, section 5.1.
func TestEncoding(t *testing.T) {
	zeros := make([]byte, 4)
	d256, d384 := sha256.Sum256(zeros), sha512.Sum384(zeros)
	for register, index := range map[Register]string{PCR15: "01" + "00000001" + "0f", RTMR3: "6c" + "00000001" + "04"} {
		want := "00" + "00000008" + "0000000000000000" + // record number
			index +
			"03" + "0000005a" + // digests
			"0b" + "00000020" + hex.EncodeToString(d256[:]) +
			"0c" + "00000030" + hex.EncodeToString(d384[:]) +
			"43" + "00000023" + // content
			"00" + "00000015" + hex.EncodeToString([]byte("chrysalis/separator/1")) +
			"01" + "00000004" + "00000000"
		got, err := Encode(register, []Event{SeparatorEvent()})
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(got) != want {
			t.Errorf("%s: got\n%x\nexpected\n%s", register, got, want)
		}
		back, events, err := Parse(got)
		if err != nil || back != register || len(events) != 1 || events[0].Name != Separator || !bytes.Equal(events[0].Data, zeros) {
			t.Errorf("%s: parsed %s %+v, %v", register, back, events, err)
		}
	}
}

// Extending is what a TPM and a TDX module do.
func TestReplay(t *testing.T) {
	if a, b := Replay(nil); a != [32]byte{} || b != [48]byte{} {
		t.Error("a register does not begin as zeros")
	}
	one, two := []byte("one"), []byte("two")
	e1, e2 := sha512.Sum384(one), sha512.Sum384(two)
	after := sha512.Sum384(append(make([]byte, 48), e1[:]...))
	after = sha512.Sum384(append(after[:], e2[:]...))
	if _, got := Replay([]Event{{"a", one}, {"b", two}}); got != after {
		t.Errorf("got %x, expected %x", got, after)
	}
	f1, f2 := sha256.Sum256(one), sha256.Sum256(two)
	bank := sha256.Sum256(append(make([]byte, 32), f1[:]...))
	bank = sha256.Sum256(append(bank[:], f2[:]...))
	if got, _ := Replay([]Event{{"a", one}, {"b", two}}); got != bank {
		t.Errorf("got %x, expected %x", got, bank)
	}
}

func TestBoot(t *testing.T) {
	encoded, err := testManifest.Encode()
	if err != nil {
		t.Fatal(err)
	}
	events, err := Boot(encoded, &testManifest, [][]byte{[]byte("gpu 0"), []byte("gpu 1")})
	if err != nil {
		t.Fatal(err)
	}
	disk := func(role, name, hash, salt, blocks string) string {
		if name != "" {
			name = `"name":"` + name + `",`
		}
		return `{"disk":{"data_blocks":` + blocks + `,"root_hash":"` + strings.Repeat(hash, 32) + `","salt":"` + salt + `"},` + name + `"role":"` + role + `"}`
	}
	want := []Event{
		{Manifest, encoded},
		{Disk, []byte(disk("engine", "", "aa", "01", "1"))},
		{Disk, []byte(disk("model", "acme/first@1", "bb", "02", "2"))},
		{Disk, []byte(disk("model", "acme/second@2", "cc", "03", "3"))},
		{GPU, []byte("gpu 0")},
		{GPU, []byte("gpu 1")},
		{Separator, []byte{0, 0, 0, 0}},
	}
	if len(events) != len(want) {
		t.Fatalf("%d events, expected %d", len(events), len(want))
	}
	for i := range want {
		if events[i].Name != want[i].Name || !bytes.Equal(events[i].Data, want[i].Data) {
			t.Errorf("event %d is %s %s, expected %s %s", i, events[i].Name, events[i].Data, want[i].Name, want[i].Data)
		}
	}
	// Whatever changes in the manifest shows in the register.
	if events[0].SHA384() != manifest.SHA384(encoded) {
		t.Error("the manifest's event is not its SHA-384")
	}
}

func TestBounds(t *testing.T) {
	many := make([]Event, MaxEvents+1)
	for i := range many {
		many[i] = SeparatorEvent()
	}
	big := Event{Disk, make([]byte, MaxData)}
	for _, c := range []struct {
		name   string
		events []Event
		ok     bool
	}{
		{"the most events", many[1:], true},
		{"too many events", many, false},
		{"the most data", []Event{big}, true},
		{"too much data", []Event{{Disk, make([]byte, MaxData+1)}}, false},
		{"too long a log", []Event{big, big, big, big}, false},
		{"no name", []Event{{"", nil}}, false},
		{"a name of other characters", []Event{{"Disk", nil}}, false},
		{"a name that is too long", []Event{{strings.Repeat("a", 65), nil}}, false},
		{"no data", []Event{{"a", nil}}, true},
	} {
		data, err := Encode(RTMR3, c.events)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			if _, back, err := Parse(data); err != nil || len(back) != len(c.events) {
				t.Errorf("%s: does not come back: %v", c.name, err)
			}
		}
	}
	if _, err := Encode("rtmr2", nil); err == nil {
		t.Error("another register has a log")
	}
}

// log is a log of three events.
func log(t testing.TB) []byte {
	t.Helper()
	data, err := Encode(PCR15, []Event{ManifestEvent([]byte("{}")), {Disk, []byte("disk")}, SeparatorEvent()})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// A log has one encoding: nothing can be changed, added or left out without
// Parse or the register showing it. An event's name is the one thing that no
// digest covers; that is why verifiers compare with Boot.
func TestParseRefuses(t *testing.T) {
	good := log(t)
	_, events, err := Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	want256, want384 := Replay(events)
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			register, changed, err := Parse(bad)
			if err != nil {
				continue
			}
			names := 0
			for j, e := range changed {
				if e.Name != events[j].Name {
					names++
				}
			}
			if got256, got384 := Replay(changed); register != PCR15 || names != 1 || got256 != want256 || got384 != want384 {
				t.Fatalf("bit %d of byte %d changed, and it is %s with %d other names", bit, i, register, names)
			}
		}
	}
	second := bytes.Index(good[5:], tlv(nil, typeRecord, binary.BigEndian.AppendUint64(nil, 1))) + 5
	for name, bad := range map[string][]byte{
		"nothing":            nil,
		"cut off":            good[:len(good)-1],
		"cut in a header":    good[:3],
		"a byte more":        append(bytes.Clone(good), 0),
		"the first left out": good[second:],
		"two swapped":        append(bytes.Clone(good[second:]), good[:second]...),
		"one twice":          append(bytes.Clone(good), good[:second]...),
		"too long":           make([]byte, MaxSize+1),
		"a length of 4 GiB":  append([]byte{0, 0xff, 0xff, 0xff, 0xff}, good...),
	} {
		if _, _, err := Parse(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	mixed, err := Encode(RTMR3, []Event{SeparatorEvent(), SeparatorEvent()})
	if err != nil {
		t.Fatal(err)
	}
	other, err := Encode(PCR15, []Event{SeparatorEvent(), SeparatorEvent()})
	if err != nil {
		t.Fatal(err)
	}
	half := len(mixed) / 2
	if _, _, err := Parse(append(bytes.Clone(mixed[:half]), other[half:]...)); err == nil {
		t.Error("a log of two registers is accepted")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(log(f))
	f.Add([]byte{0, 0, 0, 0, 8})
	f.Fuzz(func(t *testing.T, data []byte) {
		register, events, err := Parse(data)
		if err != nil {
			return
		}
		again, err := Encode(register, events)
		if err != nil || !bytes.Equal(again, data) {
			t.Errorf("a log that Parse accepts is not what Encode writes: %v", err)
		}
	})
}
