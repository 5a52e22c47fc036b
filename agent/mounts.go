package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"
)

// mount is one entry of the table below.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mounts is everything that the agent itself needs, in order.
var mounts = []mount{
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
	{"proc", "/proc", "proc", safe, "hidepid=invisible"},
	{"sysfs", "/sys", "sysfs", safe, ""},
	{"securityfs", "/sys/kernel/security", "securityfs", safe, ""},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", safe, ""},
	{"tmpfs", "/run", "tmpfs", safe, "mode=0755,size=16m,nr_inodes=1k"},
}

// configfs is where a TD asks for quotes. Its module makes the mount point.
var configfs = mount{"configfs", "/sys/kernel/config", "configfs", safe, ""}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("make mount point %s: %w", m.target, err)
	}
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// initrdFile is what the initrd may hold. Everything in it is measured; this
// is a second line, for the day when a stub or firmware lets a host add a file
// and somebody's policy does not look at that register.
var initrdFile = regexp.MustCompile(`^/(` +
	`init|image\.json|usr/lib/os-release` + // ours
	`|(gpu-)?modules/[0-9]{2}-[A-Za-z0-9_-]+\.ko` +
	`|\.extra/os-release` + // systemd-stub copies the UKI's .osrel section here
	`|dev/console` + // the kernel's own built-in initramfs
	`)$`)

var initrdFolder = regexp.MustCompile(`^/(|dev|proc|run|sys|root|(gpu-)?modules|usr|usr/lib|\.extra)$`)

// checkInitrd refuses any file that the image was not built with. It runs
// before anything is mounted over the initrd.
func checkInitrd() error {
	return filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("read the initrd: %w", err)
		}
		allowed := initrdFile
		if d.IsDir() {
			allowed = initrdFolder
		}
		if !allowed.MatchString(path) {
			return fmt.Errorf("the initrd holds %q, which the image was not built with", path)
		}
		return nil
	})
}
