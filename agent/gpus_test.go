package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"chrysalis/agent/gpu"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/guest"
	"chrysalis/image/driver"
	"chrysalis/manifest"
	"chrysalis/verity/gpt"
)

// As many GPUs as the manifest says, before anything else is looked at.
func TestGPUCount(t *testing.T) {
	for _, tt := range []struct{ there, wanted int }{{0, 1}, {1, 0}, {7, 8}, {2, 1}} {
		a := &agent{gpus: tt.there, manifest: &manifest.Manifest{GPUs: tt.wanted}}
		if err := a.startGPUs(t.Context()); reason(err) != guest.ReasonGPUCount {
			t.Errorf("%d of %d: %v", tt.there, tt.wanted, err)
		}
	}
	a := &agent{manifest: &manifest.Manifest{}, engine: "/nowhere"}
	if err := a.startGPUs(t.Context()); err != nil {
		t.Errorf("without GPUs: %v", err)
	}
	a = &agent{gpus: 1, manifest: &manifest.Manifest{GPUs: 1}, engine: t.TempDir()}
	if err := a.startGPUs(t.Context()); err == nil || !strings.Contains(err.Error(), "carries no GPU driver") {
		t.Errorf("without a driver: %v", err)
	}
}

func TestReadDriver(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, driver.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	const good = `{"version":1,"driver":"550.90.07","kernel":"1.2.3","models":["NVIDIA H100 PCIe"],
		"modules":[{"name":"nvidia","size":5,"options":["NVreg_X=1"]}],"firmware":[{"path":"nvidia/a.bin","size":3}]}`
	for name, text := range map[string]string{
		"": good, "not JSON": "x", "a field more": strings.Replace(good, `"version"`, `"x":1,"version"`, 1), "too large": good + strings.Repeat(" ", driver.MaxSize),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := readDriver(dir); (err == nil) != (name == "") {
			t.Errorf("%s: %v", name, err)
		}
	}
	d, err := driver.Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	// It is for another kernel than the one that runs these tests.
	if err := loadDriver(dir, d); err == nil || !strings.Contains(err.Error(), "1.2.3") {
		t.Errorf("another kernel: %v", err)
	}
	module, firmware := filepath.Join(dir, driver.ModulesDir, "nvidia.ko"), filepath.Join(dir, driver.FirmwareDir, "nvidia/a.bin")
	for _, p := range []string{module, firmware} {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkSizes(dir, d); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without files: %v", err)
	}
	for _, tt := range []struct {
		module, firmware string
		says             string
	}{{"12345", "123", ""}, {"1234", "123", "nvidia.ko is not a file of 5 bytes"}, {"12345", "1234", "a.bin is not a file of 3 bytes"}} {
		if err := errors.Join(os.WriteFile(module, []byte(tt.module), 0o644), os.WriteFile(firmware, []byte(tt.firmware), 0o644)); err != nil {
			t.Fatal(err)
		}
		if err := checkSizes(dir, d); (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%q, %q: %v", tt.module, tt.firmware, err)
		}
	}
	if err := errors.Join(os.Remove(firmware), os.Symlink(module, firmware)); err != nil {
		t.Fatal(err)
	}
	if err := checkSizes(dir, d); err == nil {
		t.Error("took a link for firmware")
	}
}

const procDevices = `Character devices:
  1 mem
 10 misc
195 nvidia
195 nvidiactl
508 nvidia-uvm

Block devices:
  7 loop
195 nvidia-block
`

func TestCharacterDevices(t *testing.T) {
	got := characterDevices(procDevices)
	if want := map[string]uint32{"mem": 1, "misc": 10, "nvidia": 195, "nvidiactl": 195, "nvidia-uvm": 508}; !maps.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestGPUNodes(t *testing.T) {
	dev, list := t.TempDir(), filepath.Join(t.TempDir(), "devices")
	if err := os.WriteFile(list, []byte("Character devices:\n  1 mem\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := makeGPUNodes(dev, list, 1); err == nil || !strings.Contains(err.Error(), "nvidia") {
		t.Errorf("without a driver: %v", err)
	}
	if err := os.WriteFile(list, []byte(procDevices), 0o644); err != nil {
		t.Fatal(err)
	}
	names, err := makeGPUNodes(dev, list, 2)
	if errors.Is(err, unix.EPERM) {
		t.Skip("it takes root to make device nodes")
	}
	if want := []string{"nvidiactl", "nvidia0", "nvidia1", "nvidia-uvm"}; err != nil || !slices.Equal(names, want) {
		t.Fatalf("%v, %v", names, err)
	}
	for name, want := range map[string]uint64{
		"nvidiactl": unix.Mkdev(195, 255), "nvidia0": unix.Mkdev(195, 0), "nvidia1": unix.Mkdev(195, 1), "nvidia-uvm": unix.Mkdev(508, 0),
	} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dev, name), &st); err != nil || st.Rdev != want || st.Mode != unix.S_IFCHR|0o666 {
			t.Errorf("%s: device %x of mode %o, %v", name, st.Rdev, st.Mode, err)
		}
	}
	// Only the GPUs themselves are opened; there are none here.
	if _, err := openNodes(dev, names); err == nil || !strings.Contains(err.Error(), "nvidia0") {
		t.Errorf("opened a GPU that is not there: %v", err)
	}
}

// A GPU may be bound to its driver once that is loaded, and to no other.
func TestBoundGPU(t *testing.T) {
	for _, tt := range []struct {
		driver, allowed string
		good            bool
	}{{"", "", true}, {"", gpuDriver, true}, {gpuDriver, gpuDriver, true}, {gpuDriver, "", false}, {"vfio-pci", gpuDriver, false}} {
		root := fakeSysfs(t, append([]fakeDevice{{"pci", "0000:05:00.0", "0x10de", "0x2331", "0x030200", tt.driver}}, machine...))
		gpus, err := checkDevices(root, tt.allowed)
		if (err == nil) != tt.good || tt.good && gpus != 1 {
			t.Errorf("bound to %q, allowed %q: %d, %v", tt.driver, tt.allowed, gpus, err)
		}
		found, err := gpuDevices(root)
		if err != nil || len(found) != 1 || filepath.Base(found[0]) != "0000:05:00.0" {
			t.Errorf("found %v, %v", found, err)
		}
	}
}

func TestBindGPUs(t *testing.T) {
	root := fakeSysfs(t, append([]fakeDevice{{"pci", "0000:05:00.0", "0x10de", "0x2331", "0x030200", ""}}, machine...))
	if err := bindGPUs(root); err == nil || !strings.Contains(err.Error(), "0000:05:00.0") {
		t.Errorf("without a driver: %v", err)
	}
	bind := filepath.Join(root, "bus/pci/drivers", gpuDriver, "bind")
	if err := errors.Join(os.MkdirAll(filepath.Dir(bind), 0o755), os.WriteFile(bind, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := bindGPUs(root); err != nil {
		t.Fatal(err)
	}
	override, _ := os.ReadFile(filepath.Join(root, "bus/pci/devices/0000:05:00.0/driver_override"))
	bound, _ := os.ReadFile(bind)
	if string(override) != gpuDriver || string(bound) != "0000:05:00.0" {
		t.Errorf("wrote %q and %q", override, bound)
	}
	if _, err := os.Stat(filepath.Join(root, "bus/pci/devices/0000:01:00.0/driver_override")); err == nil {
		t.Error("another device is bound as well")
	}
}

func TestReadCollateral(t *testing.T) {
	dir := t.TempDir()
	c := &nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{[]byte("rim")}, OCSP: []evidence.Bytes{}}
	encoded, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	disk := func(name string, collateral []byte) string {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		size, err := gpt.WriteManifestDisk(f, []byte("{}"), collateral)
		if err == nil {
			err = f.Truncate(size)
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	none, one, other, bad := disk("none", nil), disk("one", encoded), disk("other", encoded), disk("bad", []byte(`{"version":1}`))
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		disks []string
		rims  int // -1 for none at all
		says  string
	}{
		{"none", []string{none, empty}, -1, ""},
		{"one", []string{empty, none, one}, 1, ""},
		{"two", []string{one, other}, 0, "several disks"},
		{"not collateral", []string{bad}, 0, "collateral"},
		{"a disk that is gone", []string{filepath.Join(dir, "gone")}, 0, "gone"},
	} {
		got, err := readCollateral(tt.disks)
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err == nil && (got == nil) != (tt.rims < 0) || got != nil && len(got.RIMs) != tt.rims {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
}

// A refusal reaches the host with its own reason.
func TestGPURefusal(t *testing.T) {
	plain := errors.New("plain")
	if err := because(guest.ReasonGPUDriver, ofGPUs(plain)); reason(err) != guest.ReasonGPUDriver {
		t.Error(err)
	}
	refusal := &gpu.Refusal{Reason: guest.ReasonGPUDevTools, Err: plain}
	if err := because(guest.ReasonGPUDriver, ofGPUs(fmt.Errorf("boot: %w", refusal))); reason(err) != guest.ReasonGPUDevTools || !errors.Is(err, plain) {
		t.Error(err)
	}
	if err := ofGPUs(context.Canceled); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// What the tests' image believes and the others must not is not in their agent:
// no stand-in and no vendor but NVIDIA.
func TestNoStandIn(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the agent")
	}
	contains := func(tags string) (found []string) {
		program := t.TempDir() + "/agent"
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-tags="+tags, "-o", program, ".").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		data, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{"fake-nvml", "pci-pf-stub", "stand-in for a GPU", "nvidiatest"} {
			if strings.Contains(string(data), s) {
				found = append(found, s)
			}
		}
		return found
	}
	if found := contains("nethttpomithttp2"); found != nil {
		t.Errorf("the published agent holds %q", found)
	}
	if found := contains("nethttpomithttp2,debug,gputest"); !slices.Equal(found, []string{"fake-nvml", "pci-pf-stub", "stand-in for a GPU"}) {
		t.Errorf("the tests' agent holds only %q: this test would not notice", found)
	}
}
