package plan

import (
	"context"
	"fmt"
	"slices"

	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/measure"
	"chrysalis/measure/acpi"
	"chrysalis/measure/record"
)

// Machines that are tried where a VM's tables differ: what people choose, and
// what a machine has that somebody else set up.
var (
	guessVCPUs   = []int{1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}
	guessMiB     = []int64{512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536, 131072, 262144}
	guessDevices = []string{"virtio-net-pci", "virtio-rng-pci", "virtio-scsi-pci", "virtio-serial-pci", "pci-testdev"}
)

// Guesses returns a function that yields machines near a record's shape: with
// another number of vCPUs, amount of memory, number of disks, or one more device.
// A machine that QEMU cannot make is passed over.
func Guesses(ctx context.Context, tools *toolsroot.Root, f *record.File) func(record.Shape, func(measure.Guess) bool) {
	return func(s record.Shape, yield func(measure.Guess) bool) {
		firmware, err := OpenFirmware(tools, f.Image.Platform, "")
		if err != nil || !slices.Equal(firmware.SHA256[:], f.Image.Firmware) {
			firmware = nil // then only the ACPI tables are known
		}
		try := func(what string, change func(*launcher.Shape, *launcher.Artefacts), extra ...string) bool {
			shape := launcher.Shape{Name: s.Name, VCPUs: s.VCPUs, Memory: uint64(s.Memory), PhysBits: s.PhysBits, TDXBits: s.PhysBits, GPUs: s.GPUs}
			shape.GPUBARs = bars(s)
			a := Artefacts(f.Image.Platform, f.Image.Boot, s.Disks-2, shape)
			if change != nil {
				change(&shape, &a)
			}
			setGPUs(&a, shape.GPUs)
			if a.Check(shape) != nil {
				return true
			}
			tables, err := launcher.TablesOf(ctx, tools, append(launcher.Command(shape, a), extra...), acpi.Machine{Bits: s.PhysBits, GPU: shape.GPUBARs})
			if err != nil {
				return ctx.Err() == nil
			}
			system := measure.System{
				Platform: f.Image.Platform, Boot: f.Image.Boot, Firmware: firmware, Memory: shape.Memory, Tables: tables, DiskSlot: launcher.DiskSlot,
			}
			events, err := system.Events()
			if err != nil {
				return true
			}
			return yield(measure.Guess{What: what, Events: events})
		}
		for _, n := range guessVCPUs {
			if n != s.VCPUs && !try(fmt.Sprintf("%d vCPUs, the record has %d", n, s.VCPUs), func(shape *launcher.Shape, _ *launcher.Artefacts) { shape.VCPUs = n }) {
				return
			}
		}
		for _, mib := range guessMiB {
			if bytes := mib << 20; bytes != s.Memory && !try(fmt.Sprintf("%d MiB of memory, the record has %d MiB", mib, s.Memory>>20),
				func(shape *launcher.Shape, _ *launcher.Artefacts) { shape.Memory = uint64(bytes) }) {
				return
			}
		}
		for _, other := range launcher.OtherGPUs(s.GPUs, bars(s)) {
			if !try(fmt.Sprintf("%s, the record has %s", gpus(other.GPUs, other.GPUBARs), gpus(s.GPUs, bars(s))),
				func(shape *launcher.Shape, _ *launcher.Artefacts) {
					shape.GPUs, shape.GPUBARs = other.GPUs, other.GPUBARs
				}) {
				return
			}
		}
		for _, device := range guessDevices {
			if !try(fmt.Sprintf("one more device on the PCI bus, such as %s", device), nil, "-device", device) {
				return
			}
		}
		for n := 3; n <= 6 && f.Image.Boot == record.BootKernel; n++ {
			if n != s.Disks && !try(fmt.Sprintf("%d disks, the record has %d", n, s.Disks), func(_ *launcher.Shape, a *launcher.Artefacts) { a.Disks = n }) {
				return
			}
		}
	}
}

func bars(s record.Shape) (sizes []uint64) {
	for _, size := range s.GPUBARs {
		sizes = append(sizes, uint64(size))
	}
	return sizes
}

// gpus says how many, and which, by the size of the largest memory region.
func gpus(n int, sizes []uint64) string {
	if n == 0 {
		return "no GPUs"
	}
	return fmt.Sprintf("%d GPUs with %d GiB of memory regions", n, slices.Max(sizes)>>30)
}
