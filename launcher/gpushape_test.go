package launcher

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestShapeForGPUs(t *testing.T) {
	for _, tt := range []struct {
		n    int
		bars []uint64
		want string // "" is refused
	}{
		{1, barsH100, "h100x1"}, {2, barsH100, "h100x2"}, {4, barsH100, "h100x4"}, {8, barsH100, "h100x8"},
		{1, barsH200, "h200x1"}, {8, barsH200, "h200x8"},
		{7, barsH100, ""}, {2, barsH200, ""}, {1, nil, ""}, {1, []uint64{16 * mib, 256 * mib, 32 * mib}, ""},
	} {
		name, err := ShapeForGPUs(tt.n, tt.bars)
		if name != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%d GPUs with %s: %q, %v, expected %q", tt.n, Sizes(tt.bars), name, err, tt.want)
		}
	}
}

func TestCheckGPU(t *testing.T) {
	h100, _ := LookupShape("h100x1")
	if err := h100.CheckGPU("0000:01:00.0", barsH100); err != nil {
		t.Error(err)
	}
	for _, bars := range [][]uint64{barsH200, nil, barsH100[:2]} {
		if err := h100.CheckGPU("0000:01:00.0", bars); err == nil || !strings.Contains(err.Error(), "16 MiB + 128 GiB + 32 MiB") {
			t.Errorf("%s: %v", Sizes(bars), err)
		}
	}
}

// A VM with GPUs is given the collateral that is named, or that is kept.
func TestCollateral(t *testing.T) {
	shape := Shape{Name: "gpu", GPUs: 1}
	o := Options{StateDir: t.TempDir()}
	if data, err := o.collateral(shape); err != nil || data != nil {
		t.Errorf("with none kept: %q, %v", data, err)
	}
	const good = `{"ocsp":[],"rims":["cmlt"],"version":1}`
	kept := CollateralPath(o.StateDir)
	if err := os.WriteFile(kept, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := o.collateral(shape); err != nil || string(data) != good {
		t.Errorf("what is kept: %q, %v", data, err)
	}
	if data, err := o.collateral(Shape{Name: "small"}); err != nil || data != nil {
		t.Errorf("without a GPU: %q, %v", data, err)
	}
	for name, text := range map[string][]byte{
		"empty": nil, "not canonical": []byte(" " + good), "another version": []byte(strings.Replace(good, "1}", "2}", 1)), "too large": bytes.Repeat([]byte("x"), 5<<20),
	} {
		o.GPUCollateral = filepath.Join(t.TempDir(), "collateral.json")
		if err := os.WriteFile(o.GPUCollateral, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := o.collateral(shape); err == nil || !strings.Contains(err.Error(), "chrysalis gpu collateral") {
			t.Errorf("%s: %v", name, err)
		}
	}
	o.GPUCollateral = "/nowhere"
	if _, err := o.collateral(shape); err == nil {
		t.Error("a file that is not there is passed over")
	}
}

// Stand-ins for GPUs are where GPUs would be, and in no shape that is published.
func TestStandIns(t *testing.T) {
	for _, name := range ShapeNames() {
		if s, err := LookupShape(name); err != nil || s.StandIns != 0 {
			t.Errorf("shape %s has %d stand-ins (%v)", name, s.StandIns, err)
		}
	}
	shape := Shape{Name: "test", VCPUs: 2, Memory: gib, PhysBits: 40, StandIns: 2}
	art := Artefacts{Platform: PlatformTCG, Transport: TransportUser, Firmware: tpmFirmware, Disks: 3, GuestCID: 3}
	if err := art.Check(shape); err != nil {
		t.Fatal(err)
	}
	line := strings.Join(Command(shape, art), " ")
	for _, want := range []string{"pcie-root-port,id=gpuport1,bus=pcie.0,chassis=2,addr=0x16", "pci-testdev,id=gpu1,bus=gpuport1"} {
		if !strings.Contains(line, want) {
			t.Errorf("%s is not in %s", want, line)
		}
	}
}

func TestOtherGPUs(t *testing.T) {
	for name, tt := range map[string]struct {
		n    int
		bars []uint64
		want int
	}{
		"none": {0, nil, 6}, "one of a shape": {1, barsH100, 6}, "one of no shape": {3, barsH100, 7},
	} {
		list := OtherGPUs(tt.n, tt.bars)
		if len(list) != tt.want {
			t.Errorf("%s: %+v", name, list)
		}
		for _, s := range list {
			if s.GPUs == tt.n && (s.GPUs == 0 || s.GPUBARs[1] == tt.bars[1]) {
				t.Errorf("%s: %+v is no other", name, s)
			}
		}
	}
}
