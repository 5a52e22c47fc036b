package vmtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
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
		{"network card", []string{"-device", "virtio-net-pci"}, guest.ReasonDevice},
		{"entropy device", []string{"-device", "virtio-rng-pci"}, guest.ReasonDevice},
		{"command line", []string{"-append", "console=ttyS0 init=/bin/sh"}, guest.ReasonCommandLine},
		{"command line by SMBIOS", []string{"-smbios", "type=11,value=io.systemd.stub.kernel-cmdline-extra=debug"}, guest.ReasonCommandLine},
		{"no TPM", nil, guest.ReasonPlatform},
		{"a TPM without an attestation key", []string{
			"-chardev", "socket,id=tpm,path=/vm/tpm.sock", "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		}, guest.ReasonPlatform},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if got := startByHand(t, c.args...); got != string(c.reason) {
				t.Errorf("the VM gave the reason %q, expected %q", got, c.reason)
			}
		})
	}
}

// startByHand boots the debug image without disks, and without a TPM unless args
// connect the one at /vm/tpm.sock, which nobody has prepared. It waits until
// its agent says on the console that it ends, and returns the reason that the
// status port gives.
func startByHand(t *testing.T, args ...string) string {
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
		return strings.Contains(string(data), "the VM ends:")
	})
	dialer := launcher.NewUserDialer(filepath.Join(dir, "vsock.sock"))
	defer dialer.Close()
	var reason string
	waitFor(t, ctx, "the status port", func() bool {
		time.Sleep(500 * time.Millisecond) // its driver may only just have been loaded
		try, stop := context.WithTimeout(ctx, 5*time.Second)
		defer stop()
		conn, err := dialer.Dial(try, guest.PortStatus)
		if err != nil {
			return false
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprint(conn, "GET /events HTTP/1.1\r\nHost: vm\r\n\r\n")
		in := bufio.NewReader(io.LimitReader(conn, 1<<16))
		for {
			line, err := in.ReadString('\n')
			if _, rest, ok := strings.Cut(line, `"reason":"`); ok {
				reason, _, _ = strings.Cut(rest, `"`)
				return true
			}
			if err != nil {
				return false
			}
		}
	})
	return reason
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
