package gpu_test

import (
	"slices"
	"strings"
	"testing"

	"chrysalis/launcher/gpu"
	"chrysalis/launcher/gpu/gputest"
)

func TestPick(t *testing.T) {
	tree := gputest.New(t)
	addresses := []string{"0000:10:00.0", "0000:20:00.0", "0000:30:00.0", "0000:40:00.0", "0000:50:00.0"}
	for i, a := range addresses {
		tree.Add(a, string(rune('1'+i)))
		tree.Bind(a, "vfio-pci")
		tree.SetMode(a, 1)
	}
	tree.Bind(addresses[0], "nvidia")
	tree.SetMode(addresses[1], 0)
	tree.Process(7, "qemu", "/dev/vfio/3")
	tree.SetMode(addresses[4], 0xffffffff) // asleep: the VM will see
	gpus, err := tree.List()
	if err != nil {
		t.Fatal(err)
	}
	got, err := gpu.Pick(gpus, 2)
	if err != nil || !slices.Equal(got, addresses[3:]) {
		t.Errorf("%v, %v", got, err)
	}
	_, err = gpu.Pick(gpus, 3)
	for _, want := range []string{"3 GPUs are wanted and 2 are ready", addresses[0] + " is bound to nvidia", addresses[1] + " has its confidential mode at off", addresses[2] + " is in use by qemu (7)"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	if _, err := gpu.Pick(nil, 1); err == nil || !strings.Contains(err.Error(), "no NVIDIA GPU") {
		t.Error(err)
	}
}
