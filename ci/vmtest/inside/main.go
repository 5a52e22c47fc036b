// Command inside is the first process of a VM that runs one package's tests with a
// kernel, devices and privileges of their own. It loads the kernel modules of the
// image, runs /tests with what the kernel's command line says behind "--", writes
// what they print to the second serial port, and powers off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "inside:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for path, kind := range map[string]string{"/dev": "devtmpfs", "/proc": "proc", "/sys": "sysfs", "/tmp": "tmpfs"} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(kind, path, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", path, err)
		}
	}
	modules, err := filepath.Glob("/modules/*.ko") // sorted, as they are to be loaded
	if err != nil {
		return err
	}
	for _, path := range modules {
		// Those for a TD refuse any other machine; a missing one fails its test.
		if err := load(path); err != nil {
			fmt.Fprintf(os.Stderr, "inside: %s: %v\n", path, err)
		}
	}
	port, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer port.Close()
	cmd := exec.Command("/tests", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = port, port
	cmd.Env = []string{"PATH=/", "HOME=/tmp"}
	if disks, _ := filepath.Glob("/dev/vd?"); len(disks) > 0 {
		cmd.Env = append(cmd.Env, "CHRYSALIS_SCRATCH_DISKS="+strings.Join(disks, ":"))
	}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(port, err)
		return err
	}
	fmt.Fprintln(port, "inside: the tests ended well")
	return nil
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}
