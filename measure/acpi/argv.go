// Package acpi reads the tables that QEMU makes for a machine, without running
// any guest: the same QEMU is started with the machine's own command line under
// its qtest accelerator, the registers that the firmware would set are set, and
// what the firmware would fetch through fw_cfg is fetched.
package acpi

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Places in the sandbox that QEMU is started in. Dir is a folder of the
// caller's.
const (
	Dir       = "/vm/io"
	qtestPath = Dir + "/qtest.sock"
	tpmPath   = Dir + "/tpm.sock"
	kernel    = Dir + "/kernel"
	firmware  = "/usr/share/ovmf/OVMF.fd"
)

// Argv turns the command line of a machine into one that makes the same tables
// under qtest. Each option that it knows is kept, or replaced by one that makes
// no difference to the tables and needs no accelerator, host device or file; any
// other is an error, so that none is left out unseen. docs/measure.md says for
// each why it makes no difference.
func Argv(argv []string) ([]string, error) {
	if len(argv) == 0 {
		return nil, errors.New("an empty command line")
	}
	out := []string{argv[0]}
	tdx := false
	for i := 1; i < len(argv); i++ {
		if strings.Contains(argv[i], "confidential-guest-support=") {
			tdx = true
		}
	}
	for i := 1; i < len(argv); {
		option := argv[i]
		i++
		switch option {
		case "-nodefaults", "-no-user-config", "-no-reboot", "-no-shutdown", "-S":
			out = append(out, option)
			continue
		}
		if i == len(argv) {
			return nil, fmt.Errorf("option %s has no value", option)
		}
		value := argv[i]
		i++
		keep := true
		var err error
		switch option {
		case "-display", "-sandbox", "-smp", "-m", "-smbios", "-tpmdev":
		case "-append", "-initrd", "-fw_cfg": // no table depends on them
			keep = false
		case "-accel":
			value = "qtest"
		case "-machine":
			value = machine(value, tdx)
		case "-cpu":
			value, err = cpu(value, tdx)
		case "-object":
			value, keep, err = object(value)
		case "-bios":
			value = firmware
		case "-kernel":
			value = kernel
		case "-chardev":
			if keep = strings.HasPrefix(value, "socket,id=tpm,"); keep {
				value = "socket,id=tpm,path=" + tpmPath
			}
		case "-serial":
			value = "null"
		case "-blockdev":
			value, err = blockdev(value)
		case "-device":
			value, err = device(value)
		default:
			err = errors.New("it is not known whether the tables depend on it")
		}
		if err != nil {
			return nil, fmt.Errorf("option %s %s: %w", option, value, err)
		}
		if keep {
			out = append(out, option, value)
		}
	}
	return append(out, "-qtest", "unix:"+qtestPath, "-qtest-log", "none"), nil
}

// machine takes away what only KVM knows. A TD has no PIC, which QEMU decides
// when it makes one (target/i386/kvm/tdx.c, tdx_kvm_init: x86ms->pic) and writes
// into the MADT (hw/i386/acpi-common.c, acpi_build_madt: PCAT_COMPAT).
func machine(value string, tdx bool) string {
	var parts []string
	for _, p := range strings.Split(value, ",") {
		name, _, _ := strings.Cut(p, "=")
		switch name {
		case "confidential-guest-support", "kernel-irqchip":
		default:
			parts = append(parts, p)
		}
	}
	if tdx {
		parts = append(parts, "pic=off")
	}
	return strings.Join(parts, ",")
}

var bitsRE = regexp.MustCompile(`(?:phys-bits|host-phys-bits-limit)=([0-9]{2})$`)

// cpu keeps the number of address bits: no table has anything else of the
// processor but how many there are. Its maker decides QEMU's memory map; that of
// a TD is known.
func cpu(value string, tdx bool) (string, error) {
	m := bitsRE.FindStringSubmatch(value)
	if m == nil {
		return value, errors.New("expected it to end with phys-bits=N or host-phys-bits-limit=N")
	}
	out := "max,phys-bits=" + m[1]
	if tdx {
		out += ",vendor=GenuineIntel"
	}
	return out, nil
}

var sizeRE = regexp.MustCompile(`^memory-backend-[a-z]+,id=ram,size=([0-9]+[MG])(,|$)`)

func object(value string) (string, bool, error) {
	switch {
	case sizeRE.MatchString(value):
		// Nothing of it is used.
		return "memory-backend-ram,id=ram,size=" + sizeRE.FindStringSubmatch(value)[1] + ",reserve=off", true, nil
	case strings.HasPrefix(value, "monitor-qmp,"), strings.HasPrefix(value, "iommufd,"):
		return value, false, nil
	case strings.HasPrefix(value, `{"qom-type":"tdx-guest",`):
		return value, false, nil
	}
	return value, false, errors.New("it is not known whether the tables depend on it")
}

// blockdev gives a disk no content.
func blockdev(value string) (string, error) {
	var node struct {
		Name string `json:"node-name"`
	}
	if err := json.Unmarshal([]byte(value), &node); err != nil || node.Name == "" {
		return value, errors.New("expected JSON with a node-name")
	}
	out, err := json.Marshal(map[string]any{"driver": "null-co", "node-name": node.Name, "size": 1 << 20, "read-only": true})
	return string(out), err
}

// device replaces devices that need the host's by others with BARs of the same
// kind and size. A table shows a PCI device by its slot only.
func device(value string) (string, error) {
	kind, rest, _ := strings.Cut(value, ",")
	switch kind {
	case "virtio-blk-pci", "virtio-net-pci", "virtio-rng-pci", "virtio-scsi-pci", "virtio-serial-pci", "pcie-root-port", "tpm-crb", "pci-testdev":
		return value, nil
	case "vhost-vsock-pci", "vhost-user-vsock-pci":
		out := "virtio-rng-pci"
		for _, p := range strings.Split(rest, ",") {
			switch name, _, _ := strings.Cut(p, "="); name {
			case "id", "bus", "addr", "disable-legacy", "iommu_platform":
				out += "," + p
			case "chardev", "guest-cid", "event_idx":
			default:
				return value, fmt.Errorf("it is not known whether the tables depend on %s", p)
			}
		}
		return out, nil
	case "vfio-pci":
		return value, errors.New("the tables depend on the sizes of a GPU's BARs and on where the firmware puts them, which is not predicted")
	}
	return value, errors.New("it is not known whether the tables depend on it")
}
