package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/launcher/gpu/gputest"
)

const address = "0000:b8:00.0"

// checkReport checks what holds of every table: it is whole, and each ✘ says how
// to mend it.
func checkReport(t *testing.T, r *Report) {
	t.Helper()
	if len(r.Lines) != len(probes) {
		t.Fatalf("%d lines of %d", len(r.Lines), len(probes))
	}
	for _, l := range r.Lines {
		if l.Group == "" || l.Name == "" || l.Found == "" || (l.Status == Bad) != (l.Fix != "") {
			t.Errorf("%+v", l)
		}
	}
}

// On whatever machine the tests run, the table is whole.
func TestThisMachine(t *testing.T) {
	s := Host(t.TempDir())
	s.Reach = func(context.Context, string) error { return errors.New("not tried") }
	r := Examine(t.Context(), s)
	checkReport(t, r)
	for _, l := range r.Lines {
		t.Logf("%s %s: %s: %s", l.Status.Mark(), l.Group, l.Name, l.Found)
	}
}

// A machine that has nothing at all.
func TestNothing(t *testing.T) {
	failed := errors.New("no")
	r := Examine(t.Context(), System{
		Root: t.TempDir(), RunsGuest: func() error { return failed }, Images: func() (int, int) { return 0, 0 },
		Quotes: func(context.Context) error { return failed }, Reach: func(context.Context, string) error { return failed },
		Free: func(string) (uint64, error) { return 0, failed }, ClockSync: func() (bool, error) { return false, failed },
	})
	checkReport(t, r)
	if r.Serves || r.Confidential || r.ConfidentialGPU {
		t.Errorf("%+v", r)
	}
	if data, err := json.Marshal(r); err != nil || !strings.Contains(string(data), `"status":"bad"`) {
		t.Errorf("%s, %v", data, err)
	}
}

// fixture is a TDX host with an H100 whose confidential mode is on and which is
// ready for a VM.
type fixture struct {
	*gputest.Tree
	s System
}

const efivar = "sys/firmware/efi/efivars/SgxRegistrationStatus-f236c5dc-a491-4bbe-bcdd-88885770df45"

func newFixture(t *testing.T) *fixture {
	tree := gputest.New(t)
	tree.Add(address, "42")
	tree.Bind(address, "vfio-pci")
	tree.SetMode(address, 1)
	for path, content := range map[string]string{
		"proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R) Platinum 8570\n" +
			"flags\t\t: fpu vmx tdx_host_platform\n\nprocessor\t: 1\n",
		"proc/sys/kernel/osrelease":           "6.18.15+deb13-amd64\n",
		"proc/cmdline":                        "root=/dev/sda1 nohibernate kvm_intel.tdx=1 intel_iommu=on\n",
		"sys/module/kvm_intel/parameters/tdx": "Y\n",
		"proc/meminfo":                        "MemTotal:       1056764000 kB\nMemAvailable:   1000000000 kB\nHugePages_Total:       0\nHugepagesize:       2048 kB\n",
		"proc/net/tcp":                        "  sl  local_address rem_address   st\n   0: 0100007F:0016 00000000:0000 0A\n",
		"proc/812/comm":                       "qgs\n",
		"usr/bin/bwrap":                       "",
		"usr/lib/x86_64-linux-gnu/libdcap_quoteprov.so.1": "",
		"etc/sgx_default_qcnl.conf":                       "{}",
		"sys/class/iommu/dmar0/intel-iommu/version":       "",
		efivar:    "\x07\x00\x00\x00\x01\x00\x03\x00\x03\x00\x00",
		"dev/kvm": "", "dev/vhost-vsock": "", "dev/iommu": "", "dev/sgx_enclave": "", "dev/sgx_provision": "",
	} {
		tree.File(path, content)
	}
	return &fixture{tree, System{
		Root: tree.Root, RunsGuest: func() error { return nil }, Images: func() (int, int) { return 0, 0 },
		Quotes: func(context.Context) error { return nil }, Reach: func(context.Context, string) error { return nil },
		Free: func(string) (uint64, error) { return 1 << 40, nil }, ClockSync: func() (bool, error) { return true, nil },
	}}
}

func (f *fixture) remove(path string) { os.RemoveAll(filepath.Join(f.Root, path)) }

func TestReady(t *testing.T) {
	f := newFixture(t)
	r := Examine(t.Context(), f.s)
	checkReport(t, r)
	for _, l := range r.Lines {
		if l.Status == Bad || l.Status == None && l.Name != "hugepages" {
			t.Errorf("%+v", l)
		}
	}
	if !r.Serves || !r.Confidential || !r.ConfidentialGPU {
		t.Errorf("serves %v, confidential %v, with GPU %v", r.Serves, r.Confidential, r.ConfidentialGPU)
	}
	if len(f.Written)+len(f.Ran) > 0 {
		t.Errorf("it changed %v %v", f.Written, f.Ran)
	}
}

// Each thing that can be wrong is told in its line, with what mends it.
func TestStates(t *testing.T) {
	cpu := func(old, new string) func(*fixture) {
		return func(f *fixture) {
			data, _ := os.ReadFile(filepath.Join(f.Root, "proc/cpuinfo"))
			f.File("proc/cpuinfo", strings.ReplaceAll(string(data), old, new))
		}
	}
	file := func(path, content string) func(*fixture) { return func(f *fixture) { f.File(path, content) } }
	remove := func(path string) func(*fixture) { return func(f *fixture) { f.remove(path) } }
	failed := errors.New("no answer")
	tests := []struct {
		name   string
		line   string
		status Status
		text   string // in what was found or in the fix
		change func(*fixture)
	}{
		{"AMD", "TDX", Bad, "fifth generation", cpu("GenuineIntel", "AuthenticAMD")},
		{"an old Xeon", "TDX", Bad, "has no TDX", func(f *fixture) { cpu("tdx_host_platform", "")(f); cpu(": 207", ": 106")(f) }},
		{"inside a VM", "TDX", Bad, "inside a VM", cpu("fpu", "fpu hypervisor")},
		{"TDX off in the firmware", "firmware settings", Bad, "SEAM Loader", cpu("tdx_host_platform", "")},
		{"no SGX", "SGX", Bad, "Software Guard|SW Guard", remove("dev/sgx_enclave")},
		{"no provisioning", "SGX", Bad, "sgx_prv", remove("dev/sgx_provision")},
		{"an old kernel", "version", Bad, "6.16", file("proc/sys/kernel/osrelease", "6.12.107-amd64\n")},
		{"no kernel release", "version", None, "does not say", remove("proc/sys/kernel/osrelease")},
		{"hibernation", "command line", Bad, "add 'nohibernate'", file("proc/cmdline", "kvm_intel.tdx=1")},
		{"no parameter", "command line", Bad, "nohibernate kvm_intel.tdx=1", func(f *fixture) {
			f.File("proc/cmdline", "quiet")
			f.File("sys/module/kvm_intel/parameters/tdx", "N\n")
		}},
		{"TDX off in KVM", "KVM with TDX", Bad, "dmesg", file("sys/module/kvm_intel/parameters/tdx", "N\n")},
		{"no kvm_intel", "KVM with TDX", Bad, "modprobe kvm_intel tdx=1", remove("sys/module/kvm_intel")},
		{"no KVM", "KVM runs a guest", Bad, "VT-x", remove("dev/kvm")},
		{"KVM that is not ours", "KVM runs a guest", Bad, "usermod -aG kvm", func(f *fixture) { f.s.RunsGuest = func() error { return &fs.PathError{Err: fs.ErrPermission} } }},
		{"KVM that fails", "KVM runs a guest", Bad, "does not run a guest", func(f *fixture) { f.s.RunsGuest = func() error { return failed } }},
		{"KVM that failed an image", "KVM runs a guest", Bad, "failed to boot an image", func(f *fixture) { f.s.Images = func() (int, int) { return 0, 1 } }},
		{"KVM that booted an image", "KVM runs a guest", OK, "seen to boot", func(f *fixture) { f.s.Images = func() (int, int) { return 1, 1 } }},
		{"no vhost-vsock", "vhost-vsock", Bad, "modprobe vhost_vsock", remove("dev/vhost-vsock")},
		{"no IOMMU", "IOMMU", Bad, "intel_iommu=on", remove("sys/class/iommu")},
		{"no vfio", "vfio and iommufd", Bad, "modprobe vfio-pci", remove("sys/bus/pci/drivers/vfio-pci")},
		{"no iommufd", "vfio and iommufd", Bad, "modprobe iommufd", remove("dev/iommu")},
		{"little memory", "memory", Bad, "h100x1", file("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 67108864 kB\n")},
		{"memory in use", "memory", Bad, "stop what uses it", file("proc/meminfo", "MemTotal: 1056764000 kB\nMemAvailable: 67108864 kB\n")},
		{"memory not told", "memory", None, "does not say", file("proc/meminfo", "x")},
		{"hugepages", "hugepages", Bad, "vm.nr_hugepages=0", file("proc/meminfo", "HugePages_Total: 100000\nHugepagesize: 2048 kB\n")},
		{"little room", "disk space", Bad, "du -xh", func(f *fixture) { f.s.Free = func(string) (uint64, error) { return 1 << 30, nil } }},
		{"room not told", "disk space", None, "no answer", func(f *fixture) { f.s.Free = func(string) (uint64, error) { return 0, failed } }},
		{"a loose clock", "clock", Bad, "timedatectl", func(f *fixture) { f.s.ClockSync = func() (bool, error) { return false, nil } }},
		{"clock not told", "clock", None, "no answer", func(f *fixture) { f.s.ClockSync = func() (bool, error) { return false, failed } }},
		{"no bubblewrap", "sandbox", Bad, "apt-get install bubblewrap", remove("usr/bin/bwrap")},
		{"a taken port", "port 8443", Bad, "--listen", file("proc/net/tcp6", "x\n 0: 00000000000000000000000000000000:20FB 0:0 0A\n")},
		{"a connection to the port", "port 8443", OK, "free", file("proc/net/tcp", "x\n 0: 0100007F:9999 0100007F:20FB 01\n")},
		{"no service", "generation service", Bad, "apt-get install tdx-qgs", remove("proc/812")},
		{"a stopped service", "generation service", Bad, "systemctl enable --now qgsd", func(f *fixture) { f.remove("proc/812"); f.File("lib/systemd/system/qgsd.service", "") }},
		{"a service elsewhere", "generation service", Bad, "port = 4050", func(f *fixture) { f.s.Quotes = func(context.Context) error { return failed } }},
		{"not registered", "platform registered", Bad, "mpa_registration_tool", file(efivar, "\x07\x00\x00\x00\x01\x00\x03\x00\x00\x00\x00")},
		{"registration failed", "platform registered", Bad, "error 0x80", file(efivar, "\x07\x00\x00\x00\x01\x00\x03\x00\x00\x00\x80")},
		{"registration not told", "platform registered", Bad, "Auto MP Registration", remove(efivar)},
		{"a short variable", "platform registered", Bad, "4 bytes", file(efivar, "\x07\x00\x00\x00")},
		{"no provider library", "PCK certificates", Bad, "libsgx-dcap-default-qpl", remove("usr/lib/x86_64-linux-gnu")},
		{"no PCCS", "PCK certificates", Bad, "pccs_url", remove("etc/sgx_default_qcnl.conf")},
		{"no GPU", "model", None, "no NVIDIA GPU", remove(gputest.Device(address))},
		{"an A100", "model", Bad, "10de:20b0", file(gputest.Device(address)+"/device", "0x20b0\n")},
		{"an A100's mode", "confidential mode", None, "has none", file(gputest.Device(address)+"/device", "0x20b0\n")},
		{"an old VBIOS", "VBIOS", Bad, "96.00.5E", file("proc/driver/nvidia/gpus/"+address+"/information", "Video BIOS: 96.00.30.00.01\n")},
		{"VBIOS not told", "VBIOS", None, "NVIDIA's driver", remove("proc/driver")},
		{"mode off", "confidential mode", Bad, "--cc on", func(f *fixture) { f.SetMode(address, 0) }},
		{"devtools", "confidential mode", Bad, "clients refuse", func(f *fixture) { f.SetMode(address, 3) }},
		{"mode not known", "confidential mode", None, "answer", func(f *fixture) { f.SetMode(address, 0xffffffff) }},
		{"small BARs", "BAR sizes", Bad, "Re-Size BAR", file(gputest.Device(address)+"/resource", "0x1000000 0x1ffffff 0x0\n0x0 0x0 0x0\n0x10000000 0x1fffffff 0x0\n")},
		{"no BARs", "BAR sizes", Bad, "Above 4G", file(gputest.Device(address)+"/resource", "0x0 0x0 0x0\n")},
		{"NVIDIA's driver", "driver", Bad, "gpu prepare " + address, func(f *fixture) { f.Bind(address, "nvidia") }},
		{"a GPU in use", "driver", Bad, "python3 (17)", func(f *fixture) { f.Bind(address, "nvidia"); f.Process(17, "python3", "/dev/nvidia0") }},
		{"a display", "driver", Bad, "first display", func(f *fixture) { f.Bind(address, "nvidia"); f.File(gputest.Device(address)+"/boot_vga", "1") }},
		{"Intel not reached", "Intel's collateral", Bad, "outgoing connections", func(f *fixture) { f.s.Reach = func(context.Context, string) error { return failed } }},
		{"NVIDIA not reached", "NVIDIA's RIMs", Bad, "rim.attestation.nvidia.com", func(f *fixture) { f.s.Reach = func(context.Context, string) error { return failed } }},
		{"NVIDIA's OCSP not reached", "NVIDIA's OCSP", Bad, "ocsp", func(f *fixture) { f.s.Reach = func(context.Context, string) error { return failed } }},
		{"TON not reached", "TON liteservers", Bad, "ton.org", func(f *fixture) { f.s.Reach = func(context.Context, string) error { return failed } }},
	}
	told := map[string]bool{}
	for _, test := range tests {
		if test.status == Bad {
			told[test.line] = true
		}
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			test.change(f)
			r := Examine(t.Context(), f.s)
			checkReport(t, r)
			i := slices.IndexFunc(r.Lines, func(l Line) bool { return l.Name == test.line })
			if i < 0 {
				t.Fatalf("there is no line %q", test.line)
			}
			l := r.Lines[i]
			matches := slices.ContainsFunc(strings.Split(test.text, "|"), func(text string) bool { return strings.Contains(l.Found+" "+l.Fix, text) })
			if l.Status != test.status || !matches {
				t.Errorf("%s %s; %s; expected %s with %q", l.Status, l.Found, l.Fix, test.status, test.text)
			}
			if test.status == Bad && l.Group == "GPU" && l.Name != "VBIOS" && r.ConfidentialGPU {
				t.Error("and yet it is said to serve confidentially with a GPU")
			}
		})
	}
	for _, p := range probes {
		if !told[p.name] {
			t.Errorf("no test makes the line %q bad", p.name)
		}
	}
}
