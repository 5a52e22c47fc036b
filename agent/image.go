package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// imageName is the name of the image that this agent is part of. The image
// build sets it, and it must agree with the image's own.
var imageName = "unset"

// imageInfo is /image.json, which the image build writes and which is measured
// with the rest of the initrd.
type imageInfo struct {
	Name        string `json:"name"`
	CommandLine string `json:"command_line"`
}

func readImageInfo() (imageInfo, error) {
	var info imageInfo
	data, err := os.ReadFile("/image.json")
	if err != nil {
		return info, fmt.Errorf("read what the image is: %w", err)
	}
	if err := json.Unmarshal(data, &info); err != nil {
		return info, fmt.Errorf("read what the image is: %w", err)
	}
	if info.Name != imageName {
		return info, fmt.Errorf("the image is %q, its agent was built for %q", info.Name, imageName)
	}
	return info, nil
}

// checkCommandLine refuses a command line that is not the image's own. The
// command line is measured as well; this is a second line.
func (i imageInfo) checkCommandLine() error {
	data, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("read the kernel command line: %w", err)
	}
	if got := strings.TrimSpace(string(data)); got != i.CommandLine {
		return fmt.Errorf("the kernel command line is %q, the image was built with %q", got, i.CommandLine)
	}
	return nil
}
