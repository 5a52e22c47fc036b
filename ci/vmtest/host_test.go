package vmtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"chrysalis/guest"
	"chrysalis/image/imagetest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
)

// TestAddedByTheHost starts QEMU as no launcher of ours would, with something
// that the image was not built for. The VM ends and the host reads why, although
// its status port was not open yet when it found out.
func TestAddedByTheHost(t *testing.T) {
	for _, c := range []struct {
		name   string
		args   []string
		reason guest.Reason
	}{
		{"command line", []string{"-append", "console=ttyS0 init=/bin/sh"}, guest.ReasonCommandLine},
		{"command line by SMBIOS", []string{"-smbios", "type=11,value=io.systemd.stub.kernel-cmdline-extra=debug"}, guest.ReasonCommandLine},
		{"no TPM", nil, guest.ReasonPlatform},
		{"a TPM without an attestation key", []string{
			"-chardev", "socket,id=tpm,path=/vm/tpm.sock", "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		}, guest.ReasonPlatform},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if got, _ := startByHand(t, c.args...); got != string(c.reason) {
				t.Errorf("the VM gave the reason %q, expected %q", got, c.reason)
			}
		})
	}
}

// TestUnexpectedDevices gives a VM one of each kind of device that it has no use
// for, all at once. It ends, names every one of them, and no driver but virtio's
// own, which asks a device for its type, was bound to any.
func TestUnexpectedDevices(t *testing.T) {
	devices := []struct {
		name, id string // as sysfs writes them; of a virtio device its type
		args     []string
	}{
		{"virtio network card", "type 0x0001", []string{"virtio-net-pci,disable-legacy=on"}},
		{"virtio entropy device", "type 0x0004", []string{"virtio-rng-pci,disable-legacy=on"}},
		{"virtio console", "type 0x0003", []string{"virtio-serial-pci,disable-legacy=on,id=ports", "virtconsole,bus=ports.0,chardev=nobody"}},
		{"virtio balloon", "type 0x0005", []string{"virtio-balloon-pci,disable-legacy=on"}},
		{"virtio SCSI", "type 0x0008", []string{"virtio-scsi-pci,disable-legacy=on"}},
		{"9p folder", "type 0x0009", []string{"virtio-9p-pci,disable-legacy=on,fsdev=folder,mount_tag=folder"}},
		{"virtio display", "type 0x0010", []string{"virtio-gpu-pci,disable-legacy=on"}},
		{"virtio keyboard", "type 0x0012", []string{"virtio-keyboard-pci,disable-legacy=on"}},
		{"virtio disk of the old kind", "0x1af4:0x1001", []string{"virtio-blk-pci,disable-legacy=off,drive=old"}},
		{"NVMe disk", "0x1b36:0x0010", []string{"nvme,serial=1,drive=nvme"}},
		{"SATA", "0x8086:0x2922", []string{"ich9-ahci"}},
		{"SD card reader", "0x1b36:0x0007", []string{"sdhci-pci"}},
		{"network card", "0x8086:0x10d3", []string{"e1000e"}},
		{"USB", "0x1b36:0x000d", []string{"qemu-xhci,id=usb", "usb-kbd,bus=usb.0"}},
		{"serial ports", "0x1b36:0x0002", []string{"pci-serial,chardev=nobody"}},
		{"display", "0x1234:0x1111", []string{"VGA"}},
		{"memory shared with others", "0x1af4:0x1110", []string{"ivshmem-plain,memdev=shared"}},
		{"panic device", "0x1b36:0x0011", []string{"pvpanic-pci"}},
		{"watchdog", "0x8086:0x25ab", []string{"i6300esb"}},
		{"sound", "0x8086:0x2668", []string{"intel-hda"}},
		{"device that does DMA", "0x1234:0x11e8", []string{"edu"}},
	}
	args := []string{
		"-chardev", "null,id=nobody,mux=on",
		"-fsdev", "local,id=folder,path=/vm,security_model=none",
		"-object", "memory-backend-ram,id=shared,size=1M,share=on",
		"-blockdev", "null-co,node-name=old,size=1048576",
		"-blockdev", "null-co,node-name=nvme,size=1048576",
	}
	for _, d := range devices {
		for _, arg := range d.args {
			args = append(args, "-device", arg)
		}
	}
	reason, console := startByHand(t, args...)
	if reason != string(guest.ReasonDevice) {
		t.Errorf("the VM gave the reason %q, expected %q", reason, guest.ReasonDevice)
	}
	// The kernel may write its lines in the midst of the agent's.
	agents := regexp.MustCompile(`\[ *\d+\.\d{6}\] [^\n]*\n`).ReplaceAllString(console, "")
	for _, d := range devices {
		t.Run(d.name, func(t *testing.T) {
			for line := range strings.Lines(agents) {
				if !strings.Contains(line, d.id) || !strings.Contains(line, "is not one that a VM may have") {
					continue
				}
				if !strings.Contains(line, "no driver is bound to it") && d.id != "0x1af4:0x1001" {
					t.Errorf("a driver took it: %s", line)
				}
				return
			}
			t.Error("the agent has not seen it")
		})
	}
	t.Run("what the kernel says of itself", func(t *testing.T) {
		for _, want := range []string{"heap alloc:on, heap free:on"} {
			if !strings.Contains(console, want) {
				t.Errorf("it does not say %q", want)
			}
		}
	})
	if t.Failed() {
		_, end, _ := strings.Cut(console, "the VM ends:")
		t.Logf("console: %s", end)
	}
}

// startByHand boots the debug image without disks, and without a TPM unless args
// connect the one at /vm/tpm.sock, which nobody has prepared. It waits until
// its agent says on the console that it ends, and returns the reason that the
// status port gives, and the console.
func startByHand(t *testing.T, args ...string) (reason, console string) {
	t.Helper()
	tools := imagetest.Tools(t)
	dir := t.TempDir()
	image := filepath.Join(filepath.Dir(uki), "chrysalis-debug.efi")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	run := func(argv ...string) {
		cmd := tools.Cmd(ctx, toolsroot.Command{
			Args: argv, Offline: true,
			Bind: []toolsroot.Bind{{Host: dir, Inside: "/vm", Writable: true}, {Host: image, Inside: "/image.efi"}},
		})
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cancel(); cmd.Wait() })
	}
	run("vhost-device-vsock", "--vm", "guest-cid=3,uds-path=/vm/vsock.sock,socket=/vm/vhost.sock")
	// For whoever wants it: a TPM that nobody has prepared.
	if err := os.Mkdir(filepath.Join(dir, "tpm"), 0o700); err != nil {
		t.Fatal(err)
	}
	run("swtpm", "socket", "--tpm2", "--tpmstate", "dir=/vm/tpm", "--ctrl", "type=unixio,path=/vm/tpm.sock")
	waitFor(t, ctx, "the vsock device and the TPM", func() bool {
		_, vsock := os.Stat(filepath.Join(dir, "vhost.sock"))
		_, tpm := os.Stat(filepath.Join(dir, "tpm.sock"))
		return vsock == nil && tpm == nil
	})
	run(append([]string{
		"qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024M",
		"-object", "memory-backend-memfd,id=ram,size=1024M,share=on",
		"-machine", "q35,memory-backend=ram,sata=off,smbus=off",
		"-bios", "/usr/share/ovmf/OVMF.fd", "-kernel", "/image.efi",
		"-chardev", "file,id=console,path=/vm/console.log", "-serial", "chardev:console",
		"-chardev", "socket,id=vsock,path=/vm/vhost.sock",
		"-device", "vhost-user-vsock-pci,chardev=vsock,disable-legacy=on",
	}, args...)...)

	waitFor(t, ctx, "the agent's end", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, "console.log"))
		console = string(data)
		return strings.Contains(console, "the VM ends:")
	})
	dialer := launcher.NewUserDialer(filepath.Join(dir, "vsock.sock"))
	defer dialer.Close()
	waitFor(t, ctx, "the status port", func() bool {
		time.Sleep(500 * time.Millisecond) // its driver may only just have been loaded
		reason = endReason(ctx, dialer)
		return reason != ""
	})
	data, err := os.ReadFile(filepath.Join(dir, "console.log"))
	if err != nil {
		t.Fatal(err)
	}
	return reason, string(data)
}

// endReason follows a VM's events to the reason for its end, or returns "" when
// there was none for a while.
func endReason(ctx context.Context, dialer launcher.Dialer) string {
	ctx, stop := context.WithTimeout(ctx, 5*time.Second)
	defer stop()
	conn, err := dialer.Dial(ctx, guest.PortStatus)
	if err != nil {
		return ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(7 * time.Second))
	fmt.Fprint(conn, "GET /events HTTP/1.1\r\nHost: vm\r\n\r\n")
	in := bufio.NewReader(io.LimitReader(conn, 1<<16))
	for {
		line, err := in.ReadString('\n')
		if _, rest, ok := strings.Cut(line, `"reason":"`); ok {
			reason, _, _ := strings.Cut(rest, `"`)
			return reason
		}
		if err != nil {
			return ""
		}
	}
}

func waitFor(t *testing.T, ctx context.Context, what string, done func() bool) {
	t.Helper()
	for !done() {
		if ctx.Err() != nil {
			t.Fatalf("%s did not come in time", what)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
