package launcher

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
)

// Platform is what a VM runs on: its accelerator and its root of trust.
type Platform string

// The platforms.
const (
	PlatformTDX Platform = "tdx" // a TD; evidence is a TDX quote
	PlatformKVM Platform = "kvm" // KVM with a software TPM; not confidential
	PlatformTCG Platform = "tcg" // emulation with a software TPM; not confidential
)

// Transport is how vsock reaches the VM.
type Transport string

// The transports.
const (
	TransportKernel Transport = "kernel" // the host kernel's vhost-vsock; AF_VSOCK on the host
	TransportUser   Transport = "user"   // vhost-device-vsock; a unix socket on the host
)

// Where QEMU finds things. The tools root binds the user's files to these
// places, so the command line is the same wherever they really are.
const (
	insideImage   = "/vm/image.efi"
	insideDisk    = "/vm/disk%d"
	insideIO      = "/vm/io" // sockets and the console; the only place QEMU can write to
	insideConsole = insideIO + "/console.log"
	insideQMP     = insideIO + "/qmp.sock"
	insideTPM     = insideIO + "/tpm.sock"
	insideVsock   = insideIO + "/vhost.sock"
	insideBinary  = "qemu-system-x86_64"
)

// maxDisks is the manifest, the engine and at most 16 models (package manifest).
const maxDisks = 1 + 1 + 16

// DiskSlot is the PCI device number of the first disk.
const DiskSlot = 0x03

// Slots on the root bus. Every device has a fixed one, because the slots decide
// the ACPI tables. 0 is the host bridge and 0x1f the ICH9 bridge.
const (
	slotVsock = 0x02
	slotDisk  = DiskSlot // and the next 17
	slotGPU   = 0x15     // root ports, and the next 7
)

// Artefacts is what a VM of some shape is started from, as the tools root sees
// it. It holds nothing that depends on the user's paths.
type Artefacts struct {
	Platform       Platform
	Transport      Transport
	Firmware       string   // TDVF or OVMF image
	Disks          int      // manifest, engine, models: in this order, 3 to 18
	FromDisk       bool     // it starts from its only disk, as 'chrysalis image export' makes it
	ManifestSHA384 [48]byte // MRCONFIGID on TDX
	GuestCID       uint32   // vsock address of the VM, above 2; not measured
	GPUs           []string // PCI addresses, DDDD:BB:DD.F, as many as the shape says
	DiskRate       int64    // bytes a second at which all disks together are read at most; 0: no limit
}

var pciRE = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// Check reports why shape and artefacts make no VM.
func (a Artefacts) Check(shape Shape) error {
	switch a.Platform {
	case PlatformTDX, PlatformKVM, PlatformTCG:
	default:
		return fmt.Errorf("there is no platform %q", a.Platform)
	}
	if a.Platform == PlatformTDX && a.Transport != TransportKernel {
		return fmt.Errorf("a TD needs the host kernel's vhost-vsock, because its memory cannot be shared with another process; load it with 'modprobe vhost_vsock'")
	}
	if a.FromDisk && a.Disks != 1 {
		return fmt.Errorf("there are %d disks; a VM that starts from a disk has one", a.Disks)
	}
	if !a.FromDisk && (a.Disks < 3 || a.Disks > maxDisks) {
		return fmt.Errorf("there are %d disks; a VM has a manifest, an engine and 1 to 16 models", a.Disks)
	}
	if a.GuestCID <= 2 {
		return fmt.Errorf("vsock address %d is reserved", a.GuestCID)
	}
	if a.DiskRate < 0 {
		return fmt.Errorf("a disk rate of %d bytes a second", a.DiskRate)
	}
	if len(a.GPUs) != shape.GPUs {
		return fmt.Errorf("shape %s has %d GPUs and %d PCI addresses were given; give one --gpu for each", shape.Name, shape.GPUs, len(a.GPUs))
	}
	if len(a.GPUs) > 0 && a.Platform == PlatformTCG {
		return fmt.Errorf("a GPU cannot be passed through without KVM")
	}
	for i, gpu := range a.GPUs {
		if !pciRE.MatchString(gpu) {
			return fmt.Errorf("%q is not a PCI address; write it like 0000:b8:00.0", gpu)
		}
		for _, earlier := range a.GPUs[:i] {
			if earlier == gpu {
				return fmt.Errorf("GPU %s is given twice", gpu)
			}
		}
	}
	return nil
}

// Command returns the QEMU command line, program first, for artefacts that Check
// accepts. It is a pure function: the same call predicts a VM's measurements and
// starts it. QEMU starts stopped; `cont` on QMP lets the VM run.
//
// Options not explained below are described in qemu(1); the TDX ones in QEMU's
// docs/system/i386/tdx.rst and qapi/qom.json (TdxGuestProperties).
func Command(shape Shape, a Artefacts) []string {
	tdx := a.Platform == PlatformTDX
	argv := []string{
		insideBinary,
		"-nodefaults", "-no-user-config", "-display", "none",
		// The guest is hostile to the host too: what QEMU never needs, it may not do.
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// A guest that resets itself has failed: QEMU ends and QMP says why.
		"-no-reboot",
		"-S",
	}

	// Everything that q35 would add of its own and a TD has no use for is off.
	machine := "q35,memory-backend=ram,hpet=off,smm=off,sata=off,smbus=off,i8042=off,vmport=off"
	switch a.Platform {
	case PlatformTDX:
		argv = append(argv,
			"-accel", "kvm",
			"-machine", machine+",kernel-irqchip=split,confidential-guest-support=tdx0",
			"-object", tdxObject(a.ManifestSHA384),
			// QEMU refuses a TD whose address bits are not the host's, so a host
			// that does not fit the shape is an error and never another measurement.
			"-cpu", fmt.Sprintf("host,host-phys-bits=off,phys-bits=%d", shape.TDXBits))
	case PlatformKVM:
		argv = append(argv,
			"-accel", "kvm",
			"-machine", machine+",kernel-irqchip=split",
			"-cpu", fmt.Sprintf("host,host-phys-bits=on,host-phys-bits-limit=%d", shape.PhysBits))
	case PlatformTCG:
		argv = append(argv,
			"-accel", "tcg,thread=multi",
			"-machine", machine,
			"-cpu", fmt.Sprintf("max,phys-bits=%d", shape.PhysBits))
	}
	argv = append(argv,
		"-smp", fmt.Sprintf("cpus=%d,sockets=1,cores=%d,threads=1", shape.VCPUs, shape.VCPUs),
		"-m", fmt.Sprintf("size=%dM", shape.Memory/mib))
	if tdx {
		// A TD's private memory is guest_memfd, which QEMU adds by itself.
		argv = append(argv, "-object", fmt.Sprintf("memory-backend-ram,id=ram,size=%dM", shape.Memory/mib))
	} else {
		// Shared, because a vhost-user device reads the rings in it.
		argv = append(argv, "-object", fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", shape.Memory/mib))
	}
	argv = append(argv,
		"-bios", a.Firmware,
		// The SMBIOS table is measured, and would have the host's processor in it.
		"-smbios", "type=4,processor-id=1")
	if !a.FromDisk {
		argv = append(argv, "-kernel", insideImage)
	}
	argv = append(argv,
		// append=on: the supervisor may cut a console that floods the disk.
		"-chardev", "file,id=console,path="+insideConsole+",append=on",
		"-serial", "chardev:console",
		// QEMU connects to the supervisor, so no event can come before it listens.
		"-chardev", "socket,id=qmp,path="+insideQMP+",server=off",
		"-object", "monitor-qmp,id=qmp0,chardev=qmp")

	if !tdx {
		argv = append(argv,
			"-chardev", "socket,id=tpm,path="+insideTPM,
			"-tpmdev", "emulator,id=tpm0,chardev=tpm",
			"-device", "tpm-crb,tpmdev=tpm0")
	}

	// VIRTIO_F_ACCESS_PLATFORM makes the guest bounce its buffers through shared
	// memory, without which a device cannot see them in a TD.
	access := ""
	if tdx {
		access = ",iommu_platform=on"
	}
	switch a.Transport {
	case TransportKernel:
		argv = append(argv, "-device", fmt.Sprintf("vhost-vsock-pci,id=vsock,guest-cid=%d,bus=pcie.0,addr=%#x,disable-legacy=on%s", a.GuestCID, slotVsock, access))
	case TransportUser:
		// Without event indices the driver kicks for every packet, so that a kick
		// which vhost-device-vsock loses (see awaitDriver) is made up for by the next.
		argv = append(argv,
			"-chardev", "socket,id=vsock,path="+insideVsock,
			"-device", fmt.Sprintf("vhost-user-vsock-pci,id=%s,chardev=vsock,bus=pcie.0,addr=%#x,disable-legacy=on,event_idx=off", userVsock, slotVsock))
	}

	if a.DiskRate > 0 {
		argv = append(argv, "-object", fmt.Sprintf("throttle-group,id=%s,x-bps-read=%d", throttleGroup, a.DiskRate))
	}
	for i := range a.Disks {
		first := ""
		if a.FromDisk {
			first = ",bootindex=0"
		}
		argv = append(argv,
			"-blockdev", blockdev(i, a.DiskRate > 0),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,bus=pcie.0,addr=%#x,disable-legacy=on%s%s", i, slotDisk+i, access, first))
	}

	if len(a.GPUs) > 0 {
		argv = append(argv, "-object", "iommufd,id=iommufd0")
	}
	for i, gpu := range a.GPUs {
		argv = append(argv,
			"-device", fmt.Sprintf("pcie-root-port,id=gpuport%d,bus=pcie.0,chassis=%d,addr=%#x", i, i+1, slotGPU+i),
			// rombar=0: the firmware must not run an option ROM that the host gives it.
			"-device", fmt.Sprintf("vfio-pci,id=gpu%d,host=%s,bus=gpuport%d,iommufd=iommufd0,rombar=0", i, gpu, i))
	}
	for i := range shape.StandIns {
		argv = append(argv,
			"-device", fmt.Sprintf("pcie-root-port,id=gpuport%d,bus=pcie.0,chassis=%d,addr=%#x", i, i+1, slotGPU+i),
			"-device", fmt.Sprintf("pci-testdev,id=gpu%d,bus=gpuport%d", i, i))
	}
	return argv
}

// userVsock is the id of the vsock device of TransportUser.
const userVsock = "vsock0"

// tdxObject returns the -object argument of a TD, in QEMU's JSON syntax because
// the key=value one cannot carry the socket's address. The quote comes from the
// host's quote generation service, at its usual vsock port. MRCONFIGID is 48
// bytes in base64. TD attributes stay at QEMU's default, SEPT_VE_DISABLE alone.
func tdxObject(manifest [48]byte) string {
	type address struct {
		Type string `json:"type"`
		CID  string `json:"cid"`
		Port string `json:"port"`
	}
	out, err := json.Marshal(struct {
		Type       string  `json:"qom-type"`
		ID         string  `json:"id"`
		MRConfigID string  `json:"mrconfigid"`
		Quotes     address `json:"quote-generation-socket"`
	}{"tdx-guest", "tdx0", base64.StdEncoding.EncodeToString(manifest[:]), address{"vsock", "2", "4050"}})
	if err != nil {
		panic(err) // strings only: cannot fail
	}
	return string(out)
}

// throttleGroup is the id of what limits the rate of the disks.
const throttleGroup = "rate"

// blockdev returns the -blockdev argument of a disk. Locking is off so that two
// VMs can read one disk.
func blockdev(i int, throttled bool) string {
	type node struct {
		Driver   string `json:"driver"`
		Node     string `json:"node-name,omitempty"`
		Group    string `json:"throttle-group,omitempty"`
		ReadOnly bool   `json:"read-only"`
		File     any    `json:"file"`
	}
	top := node{Driver: "raw", ReadOnly: true, File: struct {
		Driver   string `json:"driver"`
		Filename string `json:"filename"`
		Locking  string `json:"locking"`
		ReadOnly bool   `json:"read-only"`
	}{"file", fmt.Sprintf(insideDisk, i), "off", true}}
	if throttled {
		top = node{Driver: "throttle", Group: throttleGroup, ReadOnly: true, File: top}
	}
	top.Node = "disk" + strconv.Itoa(i)
	out, err := json.Marshal(top)
	if err != nil {
		panic(err) // strings only: cannot fail
	}
	return string(out)
}
