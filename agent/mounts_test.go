package main

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestInitrdNames(t *testing.T) {
	for _, tt := range []struct {
		path         string
		file, folder bool
	}{
		{path: "/init", file: true},
		{path: "/image.json", file: true},
		{path: "/usr/lib/os-release", file: true},
		{path: "/modules/00-dm-mod.ko", file: true},
		{path: "/modules/13-tsm_report.ko", file: true},
		{path: "/gpu-modules/00-gcm.ko", file: true},
		{path: "/.extra/os-release", file: true},
		{path: "/dev/console", file: true},
		{path: "/", folder: true},
		{path: "/usr/lib", folder: true},
		{path: "/gpu-modules", folder: true},
		{path: "/.extra", folder: true},
		{path: "/root", folder: true},

		{path: "/sbin/init"},
		{path: "/bin"},
		{path: "/bin/sh"},
		{path: "/init2"},
		{path: "/init\n"},
		{path: "/init/x"},
		{path: "/etc/os-release"},
		{path: "/usr/lib/libc.so.6"},
		{path: "/usr/lib/modules"},
		{path: "/modules/0-x.ko"},
		{path: "/modules/00-.ko"},
		{path: "/modules/00-x.ko.xz"},
		{path: "/modules/00-x/y.ko"},
		{path: "/modules/00-../../x.ko"},
		{path: "/modules/x/00-x.ko"},
		{path: "/.extra/credentials"},
		{path: "/.extra/credentials/a.cred"},
		{path: "/.extra/sysext/a.raw"},
		{path: "/.extra/global_credentials"},
		{path: "/.extra/tpm2-pcr-signature.json"},
		{path: "/dev/null"},
		{path: ""},
		{path: "init"},
	} {
		if got := initrdFile.MatchString(tt.path); got != tt.file {
			t.Errorf("file %q allowed: %v", tt.path, got)
		}
		if got := initrdFolder.MatchString(tt.path); got != tt.folder {
			t.Errorf("folder %q allowed: %v", tt.path, got)
		}
	}
}

// Nothing that the agent mounts can hold a program or a device that does
// anything, /dev apart.
func TestMountTable(t *testing.T) {
	if mounts[0].target != "/dev" {
		t.Errorf("%s is mounted first; the agent needs /dev to be quiet", mounts[0].target)
	}
	for i, m := range mounts {
		want := uintptr(safe)
		if m.fstype == "devtmpfs" {
			want = unix.MS_NOSUID | unix.MS_NOEXEC
		}
		if m.flags != want {
			t.Errorf("%s: flags %#x, expected %#x", m.target, m.flags, want)
		}
		for _, later := range mounts[i+1:] {
			if strings.HasPrefix(m.target, later.target) {
				t.Errorf("%s is mounted over %s", later.target, m.target)
			}
		}
	}
}
