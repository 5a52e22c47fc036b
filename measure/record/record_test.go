package record

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"os"
	"reflect"
	"strings"
	"testing"
)

func filled(n int, b byte) Hex { return bytes.Repeat([]byte{b}, n) }

func tdxImage() Image {
	return Image{
		Version: 1, Kind: KindImage, Name: "chrysalis", Platform: TDX, Boot: BootKernel,
		MRTD: filled(48, 1), RTMR1: filled(48, 2), RTMR2: filled(48, 3),
		Commit: strings.Repeat("a", 40), Lock: filled(32, 4), UKI: filled(32, 5), Firmware: filled(32, 6), QEMU: "11.1.3",
	}
}

func tpmImage() Image {
	i := tdxImage()
	i.Platform, i.MRTD, i.RTMR1, i.RTMR2 = TPM, nil, nil, nil
	for n, index := range ImagePCRs {
		i.PCRs = append(i.PCRs, PCR{index, filled(32, byte(n+1))})
	}
	return i
}

func shapeOf(i Image) Shape {
	key := i.Key()
	s := Shape{
		Version: 1, Kind: KindShape, Name: "small", Platform: i.Platform, Image: key[:],
		VCPUs: 2, Memory: 1 << 30, PhysBits: 52, Disks: 3,
	}
	if i.Platform == TDX {
		s.RTMR0 = filled(48, 7)
	} else {
		s.PCR1 = filled(32, 7)
	}
	return s
}

func tdxFile() File {
	i := tdxImage()
	return File{
		Version: 1, Image: i, Shapes: []Shape{shapeOf(i)},
		Engines: []Engine{{1, KindEngine, "llama.cpp", filled(32, 8), filled(32, 9)}},
		Models:  []Model{{1, KindModel, "chrysalis/demo", "1", filled(32, 10)}},
	}
}

// Each record reads back as it was written.
func TestRoundTrip(t *testing.T) {
	tdx, tpm := tdxImage(), tpmImage()
	shape, tpmShape := shapeOf(tdx), shapeOf(tpm)
	gpus := shapeOf(tdx)
	gpus.GPUs, gpus.GPUBARs = 8, []int64{16 << 20, 256 << 30, 32 << 20}
	for _, r := range []Record{
		&tdx, &tpm, &shape, &tpmShape, &gpus,
		&Engine{1, KindEngine, "llama.cpp", filled(32, 1), filled(32, 2)},
		&Model{1, KindModel, "chrysalis/demo", "1", filled(32, 3)},
	} {
		encoded, err := Encode(r)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(r.RecordKind(), encoded)
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("%s: %+v, %v; expected %+v", r.RecordKind(), again, err, r)
		}
		for _, kind := range []Kind{KindImage, KindShape, KindEngine, KindModel} {
			if _, err := Parse(kind, encoded); kind != r.RecordKind() && err == nil {
				t.Errorf("a record of kind %s is taken for one of kind %s", r.RecordKind(), kind)
			}
		}
	}
	if _, err := Parse("other", nil); err == nil {
		t.Error("a kind that is none")
	}
}

// Keys are those of the design: what they hash is written out here.
func TestKeys(t *testing.T) {
	sum := func(parts ...[]byte) string {
		s := sha256.Sum256(bytes.Join(parts, nil))
		return hex.EncodeToString(s[:])
	}
	check := func(what string, got [32]byte, want string) {
		t.Helper()
		if hex.EncodeToString(got[:]) != want {
			t.Errorf("%s: key %x, expected %s", what, got, want)
		}
	}
	tdx, tpm := tdxImage(), tpmImage()
	check("TDX image", tdx.Key(), sum([]byte("chrysalis/image/1\x01"), tdx.MRTD, tdx.RTMR1, tdx.RTMR2))
	check("TPM image", tpm.Key(), sum([]byte("chrysalis/image/1\x02"), tpm.PCRs[0].SHA256, tpm.PCRs[1].SHA256, tpm.PCRs[2].SHA256, tpm.PCRs[3].SHA256))
	shape := shapeOf(tdx)
	check("shape", shape.Key(), sum([]byte("chrysalis/shape/1"), shape.Image, shape.RTMR0))
	shape = shapeOf(tpm)
	check("TPM shape", shape.Key(), sum([]byte("chrysalis/shape/1"), shape.Image, shape.PCR1))
	engine := Engine{RootHash: filled(32, 1), Profile: filled(32, 2)}
	check("engine", engine.Key(), sum([]byte("chrysalis/engine/1"), engine.RootHash, engine.Profile))
	model := Model{RootHash: filled(32, 1), Name: "a/b"}
	check("model", model.Key(), sum([]byte("chrysalis/model/1"), model.RootHash))
}

func TestValidate(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*File)
		want   string
	}{
		"another version":       {func(f *File) { f.Version = 2 }, "version is 2, this program reads version 1"},
		"another image version": {func(f *File) { f.Image.Version = 2 }, "image: version is 2"},
		"another kind":          {func(f *File) { f.Image.Kind = KindShape }, "kind"},
		"no name":               {func(f *File) { f.Image.Name = "" }, "name"},
		"another platform":      {func(f *File) { f.Image.Platform = "sev" }, "platform"},
		"another boot":          {func(f *File) { f.Image.Boot = "pxe" }, "boot"},
		"short MRTD":            {func(f *File) { f.Image.MRTD = f.Image.MRTD[1:] }, "mrtd: 47 bytes, expected 48"},
		"PCRs of a TD":          {func(f *File) { f.Image.PCRs = []PCR{{4, filled(32, 0)}} }, "a TD has none"},
		"PCRs out of order": {func(f *File) {
			*f = File{Version: 1, Image: tpmImage(), Shapes: []Shape{}, Engines: []Engine{}, Models: []Model{}}
			f.Image.PCRs[0].Index = 5
		}, "expected [4 7 9 11]"},
		"a commit":              {func(f *File) { f.Image.Commit = "HEAD" }, "commit"},
		"QEMU":                  {func(f *File) { f.Image.QEMU = "new" }, "qemu"},
		"shapes missing":        {func(f *File) { f.Shapes = nil }, "write [] for none"},
		"a shape of another":    {func(f *File) { f.Shapes[0].Image = filled(32, 0) }, "shapes[0]: of another image"},
		"a shape without RTMR0": {func(f *File) { f.Shapes[0].RTMR0 = nil }, "rtmr0: 0 bytes"},
		"a TPM's shape without PCR 1": {func(f *File) {
			*f = File{Version: 1, Image: tpmImage(), Shapes: []Shape{shapeOf(tpmImage())}, Engines: []Engine{}, Models: []Model{}}
			f.Shapes[0].PCR1 = nil
		}, "pcr1: 0 bytes"},
		"a TD's shape with PCR 1": {func(f *File) { f.Shapes[0].PCR1 = filled(32, 0) }, "pcr1: 32 bytes, expected 0"},
		"GPUs without their size": {func(f *File) { f.Shapes[0].GPUs = 1 }, "gpu_bars: 0 memory regions of 1 GPUs"},
		"the size of no GPUs":     {func(f *File) { f.Shapes[0].GPUBARs = []int64{4096} }, "gpu_bars: 1 memory regions of 0 GPUs"},
		"a region of odd size":    {func(f *File) { f.Shapes[0].GPUs, f.Shapes[0].GPUBARs = 1, []int64{5000} }, "gpu_bars[0]: 5000 bytes"},
		"a region below zero":     {func(f *File) { f.Shapes[0].GPUs, f.Shapes[0].GPUBARs = 1, []int64{-1 << 63} }, "gpu_bars[0]"},
		"a shape twice":           {func(f *File) { f.Shapes = append(f.Shapes, f.Shapes[0]) }, "is there twice"},
		"too much memory":         {func(f *File) { f.Shapes[0].Memory = 1 << 60 }, "memory"},
		"no vCPUs":                {func(f *File) { f.Shapes[0].VCPUs = 0 }, "vcpus"},
		"an engine's hash":        {func(f *File) { f.Engines[0].Profile = nil }, "engines[0]: profile"},
		"a model's name":          {func(f *File) { f.Models[0].Name = "demo" }, "models[0]: name"},
		"a model's revision":      {func(f *File) { f.Models[0].Revision = "a b" }, "models[0]: name"},
		"events of no register":   {func(f *File) { f.Events = []Event{{Register: "rtmr9", Name: "x", Digest: filled(48, 0)}} }, "not a register"},
		"events of a TPM":         {func(f *File) { f.Events = []Event{{Register: "pcr4", Name: "x", Digest: filled(48, 0)}} }, "has no pcr4"},
		"events of no shape":      {func(f *File) { f.Events = []Event{{Register: "rtmr0", Shape: "x", Name: "x", Digest: filled(48, 0)}} }, "no shape"},
		"an event without":        {func(f *File) { f.Events = []Event{{Register: "rtmr1", Name: "x"}} }, "either a digest or why"},
		"an event with both":      {func(f *File) { f.Events = []Event{{Register: "rtmr1", Name: "x", Missing: "y", Digest: filled(48, 0)}} }, "either a digest or why"},
		"an event's short":        {func(f *File) { f.Events = []Event{{Register: "rtmr1", Name: "x", Digest: filled(32, 0)}} }, "32 bytes, expected 48"},
		"events of other values":  {func(f *File) { f.Events = []Event{{Register: "rtmr1", Name: "x", Digest: filled(48, 0)}} }, "rtmr1 make another value"},
	} {
		t.Run(name, func(t *testing.T) {
			f := tdxFile()
			tt.change(&f)
			if err := f.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, expected %q", err, tt.want)
			}
			if _, err := f.Encode(); err == nil {
				t.Error("it is encoded all the same")
			}
		})
	}
}

func TestEvents(t *testing.T) {
	f := tdxFile()
	digest := filled(48, 0xaa)
	value := sha512.Sum384(append(make([]byte, 48), digest...))
	f.Image.RTMR1 = value[:]
	key := f.Image.Key()
	f.Shapes[0].Image = key[:]
	f.Events = []Event{
		{Register: "rtmr1", Name: "image", Text: "the image", Digest: digest},
		{Register: "rtmr0", Shape: "small", Name: "td-hob", Missing: "not known"},
	}
	encoded, err := f.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseFile(encoded)
	if err != nil || !reflect.DeepEqual(*again, f) {
		t.Errorf("%+v, %v", again, err)
	}
}

// A record has the fields that the schema in docs/ says, and the other way
// round.
func TestSchema(t *testing.T) {
	schema, err := os.ReadFile("../../docs/record.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{File{}, Image{}, PCR{}, Shape{}, Engine{}, Model{}, Event{}} {
		kind := reflect.TypeOf(v)
		for i := range kind.NumField() {
			name, _, _ := strings.Cut(kind.Field(i).Tag.Get("json"), ",")
			if !bytes.Contains(schema, []byte(`"`+name+`"`)) {
				t.Errorf("%s.%s: the schema has no %q", kind.Name(), kind.Field(i).Name, name)
			}
		}
	}
}

// What is read as a file of records is what Encode writes.
func FuzzParseFile(f *testing.F) {
	for _, i := range []Image{tdxImage(), tpmImage()} {
		file := File{Version: 1, Image: i, Shapes: []Shape{shapeOf(i)}, Engines: []Engine{}, Models: []Model{}}
		encoded, err := file.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(encoded)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := ParseFile(data)
		if err != nil {
			return
		}
		again, err := file.Encode()
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%s, %v", again, err)
		}
	})
}
