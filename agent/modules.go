package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"
)

// moduleName takes a module's name out of its file name, NN-NAME.ko.
var moduleName = regexp.MustCompile(`^[0-9]{2}-([A-Za-z0-9_-]+)\.ko$`)

// tdxModules load only inside a TD: elsewhere their hardware is absent and
// tdx-guest refuses.
var tdxModules = map[string]bool{"configfs": true, "tsm_report": true, "tdx-guest": true}

// modulesPath is where the initrd has them.
const modulesPath = "/modules"

// loadModules loads the initrd's modules in the order of their file names,
// which the image build derived from their dependencies, and frees their memory.
func loadModules(dir string, tdx bool) error {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return fmt.Errorf("list the kernel modules: %w", err)
	}
	for _, e := range entries {
		m := moduleName.FindStringSubmatch(e.Name())
		if m == nil {
			return fmt.Errorf("%s is not a kernel module's name", e.Name())
		}
		path := filepath.Join(dir, e.Name())
		if tdx || !tdxModules[m[1]] {
			if err := loadModule(path, ""); err != nil {
				return fmt.Errorf("load kernel module %s: %w", m[1], err)
			}
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("drop kernel module %s: %w", m[1], err)
		}
	}
	return nil
}

// loadModule loads a module with parameters, NAME=VALUE separated by spaces.
func loadModule(path, parameters string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), parameters, 0)
}
