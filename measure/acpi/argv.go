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
	"slices"
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
//
// gpu has the sizes of the memory regions of what is passed through.
func Argv(argv []string, gpu []uint64) ([]string, error) {
	out, _, err := translate(argv, gpu)
	return out, err
}

// translate is Argv. It also returns the slots of the ports that have a stand-in
// for a GPU behind them.
func translate(argv []string, gpu []uint64) (out []string, gpus []int, err error) {
	fail := func(err error) ([]string, []int, error) { return nil, nil, err }
	if len(argv) == 0 {
		return fail(errors.New("an empty command line"))
	}
	out = []string{argv[0]}
	ports := map[string]int{}
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
			return fail(fmt.Errorf("option %s has no value", option))
		}
		value := argv[i]
		i++
		keep := true
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
			if strings.HasPrefix(value, "pcie-root-port,") {
				err = port(value, ports)
			} else if strings.HasPrefix(value, "vfio-pci,") {
				var slot int
				if value, slot, err = standIn(value, gpu, ports); err == nil {
					gpus = append(gpus, slot)
				}
			} else {
				value, err = device(value)
			}
		default:
			err = errors.New("it is not known whether the tables depend on it")
		}
		if err != nil {
			return fail(fmt.Errorf("option %s %s: %w", option, value, err))
		}
		if keep {
			out = append(out, option, value)
		}
	}
	return append(out, "-qtest", "unix:"+qtestPath, "-qtest-log", "none"), gpus, nil
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
	case "virtio-blk-pci", "virtio-net-pci", "virtio-rng-pci", "virtio-scsi-pci", "virtio-serial-pci", "tpm-crb", "pci-testdev":
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
	}
	return value, errors.New("it is not known whether the tables depend on it")
}

// port notes the slot of a root port. Options that change how much room the
// firmware keeps behind it, or whether it does, are refused.
func port(value string, ports map[string]int) error {
	options, err := split(value, "id", "bus", "chassis", "addr")
	if err != nil {
		return err
	}
	var slot int
	if _, err := fmt.Sscanf(options["addr"], "0x%x", &slot); err != nil || slot < 1 || slot > 30 || options["bus"] != "pcie.0" {
		return errors.New("expected bus=pcie.0 and an address from 0x1 to 0x1e")
	}
	if _, ok := ports[options["id"]]; ok || options["id"] == "" {
		return errors.New("expected an id of its own")
	}
	ports[options["id"]] = slot
	return nil
}

// standIn replaces a device that is passed through. The DSDT has a node for each
// slot behind a port, with nothing of the device in it: neither vfio-pci nor
// pci-testdev implements ACPI_DEV_AML_IF, and both can be unplugged (QEMU,
// hw/acpi/pcihp.c, build_append_pci_bus_devices; hw/vfio/pci.c,
// vfio_pci_class_init; hw/misc/pci-testdev.c). What is left is where the port's
// window is. vfio-pci hides a GPU's SR-IOV capability, whose regions the firmware
// would place, too (vfio_add_ext_cap).
func standIn(value string, gpu []uint64, ports map[string]int) (string, int, error) {
	if len(gpu) == 0 {
		return value, 0, errors.New("the tables depend on the sizes of the device's memory regions, which are not given")
	}
	for i, size := range gpu {
		if size < 1<<12 || size > 1<<46 || size&(size-1) != 0 {
			return value, 0, fmt.Errorf("memory region %d of the device has %d bytes, expected a power of two from 4 KiB on", i, size)
		}
	}
	options, err := split(value, "id", "host", "bus", "iommufd", "rombar")
	if err != nil {
		return value, 0, err
	}
	if options["rombar"] != "0" {
		return value, 0, errors.New("expected rombar=0: where the firmware puts the regions of a device with a ROM is not known")
	}
	slot, ok := ports[options["bus"]]
	if !ok {
		return value, 0, errors.New("expected it behind a root port that comes before it")
	}
	delete(ports, options["bus"]) // one device behind each
	return fmt.Sprintf("pci-testdev,id=%s,bus=%s,membar=%d", options["id"], options["bus"], slices.Max(gpu)), slot, nil
}

// split takes a device's options apart, of which it knows only those named.
func split(value string, names ...string) (map[string]string, error) {
	options := map[string]string{}
	_, rest, _ := strings.Cut(value, ",")
	for _, p := range strings.Split(rest, ",") {
		name, v, _ := strings.Cut(p, "=")
		if _, twice := options[name]; twice || !slices.Contains(names, name) {
			return nil, fmt.Errorf("it is not known whether the tables depend on %s", p)
		}
		options[name] = v
	}
	return options, nil
}
