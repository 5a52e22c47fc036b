package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// platform is what evidence comes from.
type platform string

const (
	platformTDX platform = "tdx"
	platformTPM platform = "tpm"
)

// hasTDX reports whether the CPU says that this is a TD. The kernel asks CPUID
// leaf 0x21, which the TDX module answers and no host can fake inside a TD.
func hasTDX() bool {
	data, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && tdxFlag(string(data))
}

func tdxFlag(cpuinfo string) bool {
	for line := range strings.Lines(cpuinfo) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "flags" {
			return slices.Contains(strings.Fields(value), "tdx_guest")
		}
	}
	return false
}

// findPlatform chooses the platform. In a TD the host's TPM is never looked at:
// it is the host's.
func findPlatform() (platform, error) {
	if hasTDX() {
		if _, err := os.Stat("/dev/tdx_guest"); err != nil {
			return "", fmt.Errorf("the CPU says TDX, but its device is not there: %w", err)
		}
		return platformTDX, nil
	}
	version := attribute("/sys/class/tpm/tpm0", "tpm_version_major")
	if version != "2" {
		return "", errors.New("there is neither TDX nor a TPM 2.0")
	}
	return platformTPM, nil
}

// residentMemory returns a process's resident memory and its peak, in KiB.
func residentMemory(pid int) (now, peak int64) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(data)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &now)
		fmt.Sscanf(line, "VmHWM: %d kB", &peak)
	}
	return now, peak
}
