// Package secret names what the hostile engine looks for and must not find.
package secret

// Paths are files of the VM that the agent can open.
var Paths = []string{
	"/proc/1/mem", "/proc/1/environ", "/proc/1/root", "/proc/self/mem", "/proc/kcore", "/proc/sysrq-trigger",
	"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modules_disabled", "/proc/cmdline", "/proc/kallsyms",
	"/sys/kernel/config/tsm/report", "/sys/kernel/security/lockdown", "/sys/power/state", "/sys/bus/pci/rescan",
	"/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384", "/sys/class/tpm/tpm0/pcr-sha256/15",
	"/sys/firmware/acpi/tables/DSDT", "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/engine/memory.max",
	"/dev/mem", "/dev/kmsg", "/dev/port", "/dev/tpm0", "/dev/tpmrm0", "/dev/tdx_guest", "/dev/console", "/dev/ttyS0",
	"/dev/vda", "/dev/vda1", "/dev/vdb", "/dev/vdc", "/dev/dm-0", "/dev/mapper/control", "/dev/vsock", "/dev/vhost-vsock",
	"/dev/rtc0", "/dev/userfaultfd", "/dev/fuse", "/dev/cpu_dma_latency", "/dev/dma_heap/system",
	"/init", "/image.json", "/modules", "/run/disks", "/run/door", "/run/disks/model-0/model.json",
}
