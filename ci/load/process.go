package load

import (
	"fmt"
	"os"
	"strings"
)

// ReadProcess reads what a process of this machine takes, but for its goroutines.
func ReadProcess(pid int) (p Process, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return p, err
	}
	for line := range strings.Lines(string(data)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &p.RSS)
		fmt.Sscanf(line, "VmHWM: %d kB", &p.Peak)
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	p.Descriptors = int64(len(open))
	return p, err
}
