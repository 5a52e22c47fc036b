package launcher

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Accel is the user's choice of accelerator.
type Accel string

// The choices.
const (
	AccelAuto Accel = "auto" // TDX where the host has it; else KVM if it works; else TCG
	AccelTDX  Accel = "tdx"
	AccelKVM  Accel = "kvm"
	AccelTCG  Accel = "tcg"
)

// TDX tells whether what Up starts on this machine with this choice is a TD.
func (a Accel) TDX() bool { return a == AccelTDX || a == AccelAuto && thisHost.tdx() }

// attempt is one platform to try.
type attempt struct {
	platform Platform
	note     string // why not a better one; one line, may be empty
	// unproven: KVM was never seen to run this image on this boot of the host, so
	// when it fails before the agent has spoken, the next attempt is made.
	unproven bool
}

// host is what the launcher asks of the machine; a test sets its own.
type host struct {
	tdx        func() bool
	kvm        func() error
	vhostVsock func() error
}

var thisHost = host{
	tdx: func() bool {
		// Linux, arch/x86/kvm/vmx/tdx.c: the module parameter says whether KVM
		// can run TDs, after firmware and module were found to allow it.
		value, err := os.ReadFile("/sys/module/kvm_intel/parameters/tdx")
		if err != nil {
			return false
		}
		v := strings.TrimSpace(string(value))
		return v == "Y" || v == "1"
	},
	kvm: func() error {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		const kvmGetAPIVersion = 0xae00 // linux/kvm.h; has been 12 since 2.6.22
		version, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), kvmGetAPIVersion, 0)
		if errno != 0 {
			return errno
		}
		if version != 12 {
			return fmt.Errorf("/dev/kvm speaks version %d", version)
		}
		return nil
	},
	vhostVsock: func() error {
		f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return f.Close()
	},
}

// attempts turns a choice into the platforms to try, in order.
//
// /dev/kvm proves little: nested inside some clouds it opens, runs a firmware,
// and fails with an internal error in the guest kernel's decompressor. Only the
// image itself shows whether KVM can run it, so the first start is the probe, and
// its verdict is remembered for this boot of the host, its kernel and this image.
func attempts(choice Accel, h host, gpus int, known verdict) ([]attempt, error) {
	switch choice {
	case AccelTCG:
		return []attempt{{platform: PlatformTCG}}, nil
	case AccelKVM:
		if err := h.kvm(); err != nil {
			return nil, fmt.Errorf("KVM cannot be used: %w; check /dev/kvm, or use --accel tcg", err)
		}
		return []attempt{{platform: PlatformKVM}}, nil
	case AccelTDX:
		if !h.tdx() {
			return nil, fmt.Errorf("this host cannot run TDs: /sys/module/kvm_intel/parameters/tdx does not say Y; enable TDX in the firmware and the kernel, or use --accel auto")
		}
		return []attempt{{platform: PlatformTDX}}, nil
	case AccelAuto:
	default:
		return nil, fmt.Errorf("there is no accelerator %q; choose auto, tdx, kvm or tcg", choice)
	}
	// A host with TDX never falls back: a VM that is not confidential must not
	// come up where a confidential one was to be had.
	if h.tdx() {
		return []attempt{{platform: PlatformTDX}}, nil
	}
	kvm := h.kvm()
	if gpus > 0 {
		if kvm != nil {
			return nil, fmt.Errorf("a VM with GPUs needs KVM, which cannot be used: %w", kvm)
		}
		return []attempt{{platform: PlatformKVM}}, nil
	}
	slow := "using TCG (emulation), which is much slower"
	switch {
	case kvm != nil:
		return []attempt{{platform: PlatformTCG, note: "KVM cannot be used here; " + slow}}, nil
	case known == verdictFails:
		return []attempt{{platform: PlatformTCG, note: "KVM failed to run this image here before; " + slow}}, nil
	case known == verdictWorks:
		return []attempt{{platform: PlatformKVM}}, nil
	}
	return []attempt{
		{platform: PlatformKVM, unproven: true},
		{platform: PlatformTCG, note: "KVM is there but cannot run this image; " + slow},
	}, nil
}

// unprovenPatience is how long unproven KVM may take until the agent's first
// word. It boots in 2 or 3 s where it works.
const unprovenPatience = 45 * time.Second

type verdict string

const (
	verdictNone  verdict = ""
	verdictWorks verdict = "works"
	verdictFails verdict = "fails"
)

// verdictFile is accel.json. It holds verdicts of one boot of the host only.
type verdictFile struct {
	Boot   string             `json:"boot"`   // kernel.random.boot_id
	Kernel string             `json:"kernel"` // release
	KVM    map[string]verdict `json:"kvm"`    // by the image's SHA-256
}

// maxVerdicts bounds the images that are remembered.
const maxVerdicts = 64

func hostBoot() (boot, kernel string) {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(id)), strings.TrimSpace(string(release))
}

func (s store) verdicts() verdictFile {
	boot, kernel := hostBoot()
	var v verdictFile
	if readJSON(filepath.Join(s.dir, "accel.json"), &v) != nil || v.Boot != boot || v.Kernel != kernel || v.KVM == nil || boot == "" {
		return verdictFile{Boot: boot, Kernel: kernel, KVM: map[string]verdict{}}
	}
	return v
}

// verdict returns what is known of KVM with this image.
func (s store) verdict(image string) verdict {
	switch v := s.verdicts().KVM[image]; v {
	case verdictWorks, verdictFails:
		return v
	}
	return verdictNone
}

// remember notes a verdict. Not being able to is no reason to fail: the next
// start finds out again.
func (s store) remember(image string, v verdict) {
	file := s.verdicts()
	if len(file.KVM) >= maxVerdicts {
		clear(file.KVM)
	}
	file.KVM[image] = v
	_ = writeJSON(filepath.Join(s.dir, "accel.json"), file)
}

// fileSHA256 returns a file's SHA-256 in hexadecimal.
func fileSHA256(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
