//go:build !gputest

package main

import "chrysalis/attest/nvidia"

// gpuDriver is the PCI driver that the GPUs are bound to.
const gpuDriver = "nvidia"

// gpuNodes are the device nodes of NVIDIA's driver, whose own tools would make
// them. Those for debuggers (nvidia-uvm-tools), displays and partitions are not
// made.
var gpuNodes = []gpuNode{
	{name: "nvidiactl", majors: []string{"nvidia-frontend", "nvidia"}, minor: 255},
	{name: "nvidia%d", majors: []string{"nvidia-frontend", "nvidia"}, step: 1, perGPU: true},
	{name: "nvidia-uvm", majors: []string{"nvidia-uvm"}, optional: true},
}

// gpuRoots are what GPUs and RIMs are verified under: NVIDIA's, and no others.
func gpuRoots(string) (nvidia.Roots, error) { return nvidia.NVIDIARoots(), nil }
