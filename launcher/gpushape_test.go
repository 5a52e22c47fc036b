package launcher

import (
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
