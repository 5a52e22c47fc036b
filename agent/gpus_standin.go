//go:build gputest

package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"chrysalis/attest/nvidia"
	"chrysalis/image/driver"
)

// The image that tests boot where there is no NVIDIA GPU. QEMU's test device
// stands in for one, the kernel's null device for the driver's, and the vendor is
// whom the engine disk names. Evidence of such a GPU means nothing to any client
// but a test: it does not lead to NVIDIA's root, and the image has a name, and so
// measurements, of its own.
func init() {
	pciDevices = append(pciDevices, pciDevice{vendor: "0x1b36", device: "0x0005", class: "0x00ff", gpu: true, what: "stand-in for a GPU"})
}

// gpuDriver is a driver of the kernel's that does nothing with what is bound to it.
const gpuDriver = "pci-pf-stub"

var gpuNodes = []gpuNode{
	{name: "nvidiactl", majors: []string{"mem"}, minor: 3},
	{name: "nvidia%d", majors: []string{"mem"}, minor: 3, perGPU: true},
	{name: "nvidia-uvm", majors: []string{"nvidia-uvm"}, optional: true},
}

// rootsPath is where a test's engine disk names its vendor: two lines, the SHA-256
// of the root of devices and that of the root of RIMs.
const rootsPath = driver.HelperRoot + "/etc/fake-nvml/roots"

func gpuRoots(engine string) (nvidia.Roots, error) {
	data, err := readBounded(filepath.Join(engine, rootsPath), 200)
	if err != nil {
		return nvidia.Roots{}, fmt.Errorf("read the test vendor's roots: %w", err)
	}
	var sums [2][32]byte
	lines := strings.Fields(string(data))
	if len(lines) != len(sums) {
		return nvidia.Roots{}, errors.New("the test vendor's roots are not two")
	}
	for i, line := range lines {
		if n, err := hex.Decode(sums[i][:], []byte(line)); err != nil || n != len(sums[i]) {
			return nvidia.Roots{}, errors.New("a test vendor's root is not a SHA-256")
		}
	}
	return nvidia.Roots{Device: sums[:1], RIM: sums[1:]}, nil
}
