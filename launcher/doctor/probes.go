package doctor

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"chrysalis/launcher/gpu"
)

// tdxModels are the processors of family 6 that can have TDX, by model: fifth
// generation Xeon and later, and the fourth generation's models for clouds.
var tdxModels = map[string]string{
	"143": "Sapphire Rapids", "207": "Emerald Rapids", "173": "Granite Rapids", "174": "Granite Rapids D", "175": "Sierra Forest", "221": "Clearwater Forest",
}

func (m *machine) processor() result {
	name := cmp.Or(m.cpu("model name"), "unknown processor")
	if m.cpuHas("hypervisor") {
		return bad("run Chrysalis on the machine itself: a VM cannot start TDs", "%s, inside a VM", name)
	}
	if m.cpu("vendor_id") != "GenuineIntel" {
		return bad("TDX needs an Intel Xeon of the fifth generation or later; here VMs run without confidentiality", "%s", name)
	}
	if m.cpuHas("tdx_host_platform") {
		return good("%s", name)
	}
	if m.cpu("cpu family") == "6" && tdxModels[m.cpu("model")] != "" {
		return good("%s (%s)", name, tdxModels[m.cpu("model")])
	}
	return bad("TDX needs an Intel Xeon of the fifth generation or later; here VMs run without confidentiality", "%s has no TDX", name)
}

const firmwareFix = "in the firmware's processor settings: enable Memory Encryption (TME), Memory Encryption Multi-Tenant (TME-MT), " +
	"Trust Domain Extension (TDX) and TDX SEAM Loader; TME-MT/TDX Key Split 1 or more; disable TME Bypass, Limit CPU PA to 46 Bits, SNC and UMA-Based Clustering"

// firmware looks at what the kernel found the firmware to have enabled
// (arch/x86/virt/vmx/tdx/tdx.c: X86_FEATURE_TDX_HOST_PLATFORM).
func (m *machine) firmware() result {
	if m.cpuHas("tdx_host_platform") {
		return good("TDX is enabled")
	}
	if m.processor().status != OK {
		return none("the processor has no TDX")
	}
	return bad(firmwareFix, "the firmware has not enabled TDX, or the kernel does not know TDX")
}

func (m *machine) sgx() result {
	switch {
	case m.exists("dev/sgx_enclave") && m.exists("dev/sgx_provision"):
		return good("enclaves and provisioning")
	case m.processor().status != OK:
		return none("the processor has no TDX")
	case m.exists("dev/sgx_enclave"):
		return bad("load the provisioning device: 'modprobe intel_sgx', and give the service the group: 'usermod -aG sgx_prv qgsd'", "/dev/sgx_provision is missing")
	}
	return bad("in the firmware's processor settings: enable SW Guard Extensions (SGX), SGX Factory Reset off, SGX Auto MP Registration on", "/dev/sgx_enclave is missing: quotes are signed in an enclave")
}

// kernel wants the release in which KVM learnt TDX.
func (m *machine) kernel() result {
	release := m.read("proc/sys/kernel/osrelease")
	if release == "" {
		return none("the kernel does not say its release")
	}
	var major, minor int
	fmt.Sscanf(release, "%d.%d", &major, &minor)
	if major > 6 || major == 6 && minor >= 16 {
		return good("%s", release)
	}
	return bad("install Linux 6.16 or later, on Debian 'apt-get install -t trixie-backports linux-image-amd64', and reboot", "%s: KVM has TDX from 6.16 on", release)
}

// commandLine: a host with TDX refuses to start KVM with TDX while hibernation is
// possible (arch/x86/virt/vmx/tdx/tdx.c).
func (m *machine) commandLine() result {
	line := m.read("proc/cmdline")
	if m.processor().status != OK {
		return none("the processor has no TDX")
	}
	var missing []string
	fields := strings.Fields(line)
	has := func(options ...string) bool {
		for _, f := range fields {
			for _, o := range options {
				if f == o {
					return true
				}
			}
		}
		return false
	}
	if !has("nohibernate") && !strings.Contains(m.read("sys/power/disk"), "[disabled]") {
		missing = append(missing, "nohibernate")
	}
	if !has("kvm_intel.tdx=1", "kvm_intel.tdx=on", "kvm_intel.tdx=Y") && !m.tdxParameter() {
		missing = append(missing, "kvm_intel.tdx=1")
	}
	if len(missing) > 0 {
		return bad(fmt.Sprintf("add '%s' to GRUB_CMDLINE_LINUX in /etc/default/grub, run 'update-grub' and reboot", strings.Join(missing, " ")), "without %s", strings.Join(missing, " and "))
	}
	return good("as TDX needs it")
}

func (m *machine) tdxParameter() bool {
	v := m.read("sys/module/kvm_intel/parameters/tdx")
	return v == "Y" || v == "1"
}

func (m *machine) kvmTDX() result {
	switch {
	case m.tdxParameter():
		return good("KVM can start TDs")
	case m.processor().status != OK:
		return none("the processor has no TDX")
	case m.exists("sys/module/kvm_intel/parameters/tdx"):
		return bad("mend the lines above, then look at 'dmesg | grep -i tdx'", "the module kvm_intel has TDX off")
	}
	return bad("'modprobe kvm_intel tdx=1'; where the parameter is not known, install Linux 6.16 or later", "the module kvm_intel is not loaded, or has no TDX")
}

func (m *machine) kvm() result {
	if !m.exists("dev/kvm") {
		return bad("enable virtualization (VT-x or SVM) in the firmware, then 'modprobe kvm_intel' or 'modprobe kvm_amd'; until then VMs are emulated, which is much slower", "/dev/kvm is missing")
	}
	if err := m.RunsGuest(); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return bad("'usermod -aG kvm $USER', then log in again", "/dev/kvm may not be used by this user")
		}
		return bad("look at 'dmesg | grep -i kvm'; inside a VM, its host must allow nested virtualization; until then VMs are emulated", "it is there and does not run a guest: %v", err)
	}
	works, fails := m.Images()
	switch {
	case works > 0:
		return good("images were seen to boot")
	case fails > 0:
		return bad("look at 'dmesg | grep -i kvm'; inside a VM, its host must give it whole nested virtualization; until then VMs are emulated", "it runs a guest of a few instructions and failed to boot an image")
	case m.cpuHas("hypervisor"):
		return good("a guest of a few instructions; inside a VM only 'chrysalis up' shows whether an image boots")
	}
	return good("a guest of a few instructions")
}

func (m *machine) vhostVsock() result {
	if m.exists("dev/vhost-vsock") {
		return good("/dev/vhost-vsock")
	}
	return bad("'modprobe vhost_vsock', and for every boot 'echo vhost_vsock > /etc/modules-load.d/chrysalis.conf'", "/dev/vhost-vsock is missing: a TD is reached through it; other VMs do without")
}

func (m *machine) iommu() result {
	if !m.empty("sys/class/iommu") && !m.empty("sys/kernel/iommu_groups") {
		return good("on")
	}
	if len(m.gpus) == 0 {
		return none("off; without a GPU it is not needed")
	}
	return bad("enable VT-d in the firmware, add 'intel_iommu=on' to GRUB_CMDLINE_LINUX in /etc/default/grub, run 'update-grub' and reboot", "off: GPUs cannot be passed through")
}

func (m *machine) vfio() result {
	vfio, iommufd := m.exists("sys/bus/pci/drivers/vfio-pci"), m.exists("dev/iommu")
	switch {
	case vfio && iommufd:
		return good("vfio-pci and /dev/iommu")
	case len(m.gpus) == 0:
		return none("not needed without a GPU")
	case !vfio:
		return bad("'modprobe vfio-pci'; 'chrysalis gpu prepare' does it, too", "vfio-pci is not loaded")
	}
	return bad("'modprobe iommufd'; it needs Linux 6.6 or later with CONFIG_VFIO_DEVICE_CDEV", "/dev/iommu is missing")
}

const gib = 1 << 30

func (m *machine) meminfo(key string) (uint64, bool) {
	for line := range strings.Lines(m.read("proc/meminfo")) {
		name, rest, ok := strings.Cut(line, ":")
		if fields := strings.Fields(rest); ok && name == key && len(fields) > 0 {
			n, err := strconv.ParseUint(fields[0], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// memory compares with the smallest shape, and with that of a GPU where there is
// one.
func (m *machine) memory() result {
	total, ok := m.meminfo("MemTotal")
	available, _ := m.meminfo("MemAvailable")
	if !ok {
		return none("the kernel does not say")
	}
	total, available = total<<10, available<<10
	need, shape := uint64(2*gib), "small"
	if len(m.gpus) > 0 {
		need, shape = 132*gib, "h100x1"
	}
	if total < need {
		return bad(fmt.Sprintf("add memory, or choose a smaller shape than %s with --shape", shape), "%d GiB; shape %s and the host need %d GiB", total/gib, shape, need/gib)
	}
	if available < need {
		return bad("stop what uses it: 'ps aux --sort -rss | head'", "%d of %d GiB available; shape %s needs %d GiB", available/gib, total/gib, shape, need/gib)
	}
	return good("%d of %d GiB available", available/gib, total/gib)
}

// hugepages are never needed: a TD's private memory does not come from them.
func (m *machine) hugepages() result {
	n, _ := m.meminfo("HugePages_Total")
	kib, _ := m.meminfo("Hugepagesize")
	if n > 0 && len(m.gpus) == 0 {
		return none("%d of %d KiB, which VMs do not use", n, kib)
	}
	if n*kib<<10 > 64*gib {
		return bad("'sysctl vm.nr_hugepages=0', and take them off the kernel's command line", "%d of %d KiB are set aside, which VMs do not use", n, kib)
	}
	return none("none set aside, none needed")
}

func (m *machine) disk() result {
	free, err := m.Free(m.Root)
	if err != nil {
		return none("cannot be told: %v", err)
	}
	const need = 10 * gib
	if free < need {
		return bad("make room for the tools, the image and the models: 'du -xh / | sort -h | tail' shows what takes it", "%d GiB free; the tools and an image need %d GiB, and models come on top", free/gib, need/gib)
	}
	return good("%d GiB free", free/gib)
}

func (m *machine) clock() result {
	synchronized, err := m.ClockSync()
	if err != nil {
		return none("the kernel does not say: %v", err)
	}
	if !synchronized {
		return bad("'timedatectl set-ntp true', or install chrony; certificates and prices have dates", "follows no reference")
	}
	return good("follows a reference")
}

// sandbox: QEMU and its helpers run out of the tools root with bubblewrap.
func (m *machine) sandbox() result {
	for _, dir := range []string{"usr/bin", "bin", "usr/local/bin"} {
		if m.exists(dir + "/bwrap") {
			if v := m.read("proc/sys/kernel/apparmor_restrict_unprivileged_userns"); v == "1" && os.Geteuid() != 0 {
				return bad("'sysctl kernel.apparmor_restrict_unprivileged_userns=0', or an AppArmor profile for bwrap", "bubblewrap is there; AppArmor keeps it from users")
			}
			return good("bubblewrap")
		}
	}
	return bad("'apt-get install bubblewrap'", "bubblewrap is missing")
}

// port looks for a listener (proc(5), /proc/net/tcp: state 0A).
func (m *machine) port() result {
	for _, file := range []string{"proc/net/tcp", "proc/net/tcp6"} {
		for line := range strings.Lines(m.read(file)) {
			fields := strings.Fields(line)
			if len(fields) > 3 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", 8443)) && fields[3] == "0A" {
				return bad("'ss -ltnp sport = :8443' shows who has it; choose another with 'chrysalis up --listen'", "somebody listens on it; a running VM does")
			}
		}
	}
	return good("free")
}

// quotes: QEMU asks the host's service at vsock port 4050 for quotes.
func (m *machine) quotes() result {
	if m.processor().status != OK {
		return none("the processor has no TDX")
	}
	running := false
	processes, _ := os.ReadDir(m.path("proc"))
	for _, p := range processes {
		if p.Name()[0] >= '0' && p.Name()[0] <= '9' && m.read("proc/"+p.Name()+"/comm") == "qgs" {
			running = true
		}
	}
	if !running {
		if m.exists("lib/systemd/system/qgsd.service") || m.exists("usr/lib/systemd/system/qgsd.service") {
			return bad("'systemctl enable --now qgsd'", "installed, not running")
		}
		return bad("install Intel's DCAP: 'apt-get install tdx-qgs sgx-dcap-pccs libsgx-dcap-default-qpl', then 'systemctl enable --now qgsd'", "not installed")
	}
	if err := m.Quotes(m.ctx); err != nil {
		return bad("set 'port = 4050' in /etc/qgs.conf, 'modprobe vsock_loopback', then 'systemctl restart qgsd'", "it runs and does not answer at vsock port 4050: %v", err)
	}
	return good("answers at vsock port 4050")
}

// registered reads what the firmware says about the platform's registration with
// Intel (Intel, SGX platform registration, variable SgxRegistrationStatus: version,
// size and status of 2 bytes each and an error code, behind the 4 bytes that
// efivarfs adds; bit 0 of the status is completion).
func (m *machine) registered() result {
	if m.processor().status != OK {
		return none("the processor has no TDX")
	}
	const how = "'apt-get install sgx-ra-service', 'systemctl start mpa_registration_tool', then look at /var/log/mpa_registration.log"
	data, err := os.ReadFile(m.path("sys/firmware/efi/efivars/SgxRegistrationStatus-f236c5dc-a491-4bbe-bcdd-88885770df45"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return bad("in the firmware's processor settings: enable SGX Auto MP Registration; then "+how, "the firmware does not say")
	case err != nil:
		return none("cannot be read: %v", err)
	case len(data) < 11:
		return bad("update the firmware", "the firmware's variable has %d bytes", len(data))
	}
	if code := data[10]; code != 0 {
		return bad("in the firmware's processor settings: SGX Factory Reset; then "+how, "registration failed with error %#x", code)
	}
	if binary.LittleEndian.Uint16(data[8:])&1 == 0 {
		return bad(how, "registration with Intel is not complete")
	}
	return good("with Intel")
}

// pck: the library that fetches the certificates of this platform's key.
func (m *machine) pck() result {
	if m.processor().status != OK {
		return none("the processor has no TDX")
	}
	libraries, _ := filepath.Glob(m.path("usr/lib/x86_64-linux-gnu/libdcap_quoteprov.so*"))
	if len(libraries) == 0 {
		return bad("'apt-get install libsgx-dcap-default-qpl'", "the provider library of DCAP is missing")
	}
	if !m.exists("etc/sgx_default_qcnl.conf") {
		return bad("write /etc/sgx_default_qcnl.conf with the address of your PCCS: {\"pccs_url\": \"https://localhost:8081/sgx/certification/v4/\"}", "where to get certificates is not configured")
	}
	return good("configured in /etc/sgx_default_qcnl.conf")
}

// eachGPU judges the GPUs together: the first bad one is the line's.
func (m *machine) eachGPU(judge func(gpu.GPU) result) result {
	if m.gpusErr != nil {
		return none("cannot be told: %v", m.gpusErr)
	}
	if len(m.gpus) == 0 {
		return none("there is no NVIDIA GPU")
	}
	var found []string
	worst := OK
	for _, g := range m.gpus {
		r := judge(g)
		if r.status == Bad {
			r.found = g.Address + ": " + r.found
			return r
		}
		if r.status == None {
			worst = None
		}
		found = append(found, g.Address+": "+r.found)
	}
	return result{worst, strings.Join(found, "; "), ""}
}

func gpuTitle(g gpu.GPU) string { return cmp.Or(g.Name, "PCI device 10de:"+g.DeviceID) }

func (m *machine) gpuModel() result {
	return m.eachGPU(func(g gpu.GPU) result {
		if !g.Confidential {
			return bad("confidential computing needs an H100 or H200; this GPU can serve in a VM that proves nothing about it", "%s has no confidential-computing mode that Chrysalis knows", gpuTitle(g))
		}
		return good("%s", gpuTitle(g))
	})
}

// gpuVBIOS compares with the first version for confidential computing on Hopper.
func (m *machine) gpuVBIOS() result {
	return m.eachGPU(func(g gpu.GPU) result {
		if !g.Confidential {
			return none("%s", cmp.Or(g.VBIOS, "not told"))
		}
		if g.VBIOS == "" {
			return none("only NVIDIA's driver tells it, and it does not have this GPU")
		}
		if g.VBIOS < "96.00.5" {
			return bad("update it with NVIDIA's nvfwupd, or ask the maker of the server: NVIDIA wants 96.00.5E.00.00 or later", "%s is from before confidential computing", g.VBIOS)
		}
		return good("%s", g.VBIOS)
	})
}

func (m *machine) gpuMode() result {
	return m.eachGPU(func(g gpu.GPU) result {
		set := fmt.Sprintf("'chrysalis gpu prepare %s --cc on --gpu-admin-tools DIR --gpu-admin-tools-sha256 HEX'", g.Address)
		switch {
		case !g.Confidential:
			return none("this model has none")
		case g.Mode == gpu.ModeOn:
			return good("on")
		case g.Mode == gpu.ModeUnknown:
			return none("not known: %s", g.ModeNote)
		case g.Mode == gpu.ModeDevTools:
			return bad(set, "devtools: debuggers can read the GPU's memory, and clients refuse it")
		}
		return bad(set, "%s", g.Mode)
	})
}

func (m *machine) gpuBARs() result {
	return m.eachGPU(func(g gpu.GPU) result {
		largest := uint64(0)
		for _, size := range g.BARs {
			largest = max(largest, size)
		}
		switch {
		case largest == 0:
			return bad("in the firmware's PCI settings: enable Above 4G Decoding and set MMIO High Size to 256 GiB or more for each GPU", "the firmware gave it no memory regions")
		case g.Confidential && largest < 64*gib:
			return bad("in the firmware's PCI settings: enable Above 4G Decoding and Re-Size BAR, and set MMIO High Size to 256 GiB or more for each GPU", "the largest has %d MiB, smaller than the GPU's memory", largest>>20)
		}
		return good("largest %d MiB", largest>>20)
	})
}

func (m *machine) gpuDriver() result {
	return m.eachGPU(func(g gpu.GPU) result {
		if g.Driver == "vfio-pci" {
			return good("vfio-pci: ready for a VM")
		}
		if g.Display != "" {
			return bad("move the display to another GPU or to the server's own controller", "%s", g.Display)
		}
		if len(g.Processes) > 0 {
			return bad("stop these processes, then 'chrysalis gpu prepare "+g.Address+"'", "in use by %s", strings.Join(g.Processes, ", "))
		}
		return bad("'chrysalis gpu prepare "+g.Address+"'", "bound to %s", cmp.Or(g.Driver, "no driver"))
	})
}

// reach makes a probe that connects.
func reach(address string) func(*machine) result {
	return func(m *machine) result {
		if err := m.Reach(m.ctx, address); err != nil {
			return bad(fmt.Sprintf("allow outgoing connections to %s, or fetch the collateral on another machine; serving does not need it", address), "%s cannot be reached", address)
		}
		return good("%s", address)
	}
}
