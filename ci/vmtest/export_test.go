package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"chrysalis/guest"
	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/launcher/softtpm"
)

// TestExport boots an exported disk as a provider would: firmware finds it by
// itself, and it is the VM's only disk and may be written to. It serves, and
// afterwards no bit has changed.
func TestExport(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	disk := filepath.Join(t.TempDir(), "export.raw")
	if r := h.run(2*time.Minute, "image", "export", "-o", disk, "--image", uki, "--engine", llama, "--model", demo); r.code != 0 {
		t.Fatalf("export: %s", r)
	}
	before, _, err := image.HashFile(disk)
	if err != nil {
		t.Fatal(err)
	}

	vm := bootDisk(t, "small", disk)
	c := vm.serving()
	if resp, body := c.send("POST", "/v1/chat/completions", question("Who can read my prompt?", false)); resp.StatusCode != 200 || !strings.Contains(body, "prompt") {
		t.Errorf("%s: %s", resp.Status, body)
	} else {
		t.Logf("it answers: %s", body)
	}
	vm.powerOff()

	after, _, err := image.HashFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if after != before {
		t.Errorf("the disk has changed: SHA-256 %s before, %s after", before, after)
	}
	t.Logf("SHA-256 %s before and %s after", before, after)
}

// diskVM is a VM whose QEMU the test itself has started.
type diskVM struct {
	t      *testing.T
	dir    string
	dialer launcher.Dialer
	qemu   *exec.Cmd
	ended  chan struct{}
	qmp    net.Conn
	in     *bufio.Reader
	root   *x509.Certificate // of its TPM
}

// bootDisk starts QEMU with the launcher's command line for a VM that starts from
// a disk, and waits until its vsock driver runs. It is emulated, which works on
// every machine.
func bootDisk(t *testing.T, shape, disk string) *diskVM {
	t.Helper()
	vm := startQEMU(t, diskCommand(t, shape), toolsroot.Bind{Host: disk, Inside: "/vm/disk0", Writable: true})
	vm.await(vm.driverRuns)
	time.Sleep(time.Second) // as the launcher waits, for an emulated VM
	return vm
}

// serving waits until the VM serves, and returns a client of it.
func (vm *diskVM) serving() *client {
	vm.t.Helper()
	c := newClient(vm.t, "https://vm")
	c.http.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return vm.dialer.Dial(ctx, guest.PortInference)
	}
	vm.await(func() bool {
		ctx, cancel := context.WithTimeout(vm.t.Context(), 20*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://vm/v1/models", nil)
		if err != nil {
			vm.t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return c
}

// startQEMU starts QEMU and what belongs to it, and lets the VM run.
func startQEMU(t *testing.T, argv []string, binds ...toolsroot.Bind) *diskVM {
	t.Helper()
	tools := imagetest.Tools(t)
	runtime.LockOSThread() // for as long as the test; see toolsroot.Root.Cmd
	vm := &diskVM{t: t, dir: t.TempDir(), ended: make(chan struct{})}
	state := t.TempDir()
	shared := toolsroot.Bind{Host: vm.dir, Inside: "/vm/io", Writable: true}
	tpm := toolsroot.Bind{Host: state, Inside: "/vm/tpm", Writable: true}

	ca, err := softtpm.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	vm.root = ca.Certificate
	if err := softtpm.Make(t.Context(), tools, state, ca); err != nil {
		t.Fatal(err)
	}
	start := func(c toolsroot.Command) *exec.Cmd {
		cmd := tools.Cmd(context.Background(), c)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			if cmd != vm.qemu {
				cmd.Wait()
			}
		})
		return cmd
	}
	start(toolsroot.Command{
		Args: []string{"swtpm", "socket", "--tpm2", "--tpmstate", "dir=/vm/tpm", "--ctrl", "type=unixio,path=/vm/io/tpm.sock", "--log", "file=/vm/io/swtpm.log"},
		Bind: []toolsroot.Bind{tpm, shared}, Offline: true,
	})
	start(toolsroot.Command{
		Args: []string{"vhost-device-vsock", "--vm", "guest-cid=3,uds-path=/vm/io/vsock.sock,socket=/vm/io/vhost.sock"},
		Bind: []toolsroot.Bind{shared}, Offline: true,
	})
	for _, name := range []string{"tpm.sock", "vhost.sock"} {
		vm.waitFor(10*time.Second, name, func() bool {
			_, err := os.Stat(filepath.Join(vm.dir, name))
			return err == nil
		})
	}
	vm.dialer = launcher.NewUserDialer(filepath.Join(vm.dir, "vsock.sock"))
	t.Cleanup(func() { vm.dialer.Close() })

	listener, err := net.Listen("unix", filepath.Join(vm.dir, "qmp.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	vm.qemu = start(toolsroot.Command{
		Args: argv, Offline: true, Bind: append(binds, shared),
	})
	go func() {
		vm.qemu.Wait()
		listener.Close()
		close(vm.ended)
	}()
	if vm.qmp, err = listener.Accept(); err != nil {
		t.Fatalf("QEMU did not start: %v", err)
	}
	t.Cleanup(func() { vm.qmp.Close() })
	vm.in = bufio.NewReader(vm.qmp)
	vm.execute("qmp_capabilities", nil)
	vm.execute("cont", nil)
	return vm
}

// diskCommand is the launcher's command line for a VM that starts from its only
// disk, which can be written to.
func diskCommand(t *testing.T, name string) []string {
	t.Helper()
	shape, err := launcher.LookupShape(name)
	if err != nil {
		t.Fatal(err)
	}
	argv := launcher.Command(shape, launcher.Artefacts{
		Platform: launcher.PlatformTCG, Transport: launcher.TransportUser,
		Firmware: "/usr/share/ovmf/OVMF.fd", Disks: 1, FromDisk: true, GuestCID: 3,
	})
	writable := false
	for i, arg := range argv {
		if strings.Contains(arg, `"read-only":true`) {
			argv[i] = strings.ReplaceAll(arg, `"read-only":true`, `"read-only":false`)
			writable = true
		}
	}
	if !writable {
		t.Fatalf("the launcher's command line has no disk: %q", argv)
	}
	return argv
}

// await waits for something that the VM comes to.
func (vm *diskVM) await(done func() bool) {
	vm.t.Helper()
	vm.waitFor(4*time.Minute, "the VM", done)
}

func (vm *diskVM) waitFor(limit time.Duration, what string, done func() bool) {
	vm.t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		select {
		case <-vm.ended:
			vm.t.Fatalf("the VM has ended; its console:\n%s", vm.console())
		default:
		}
		if done() {
			return
		}
	}
	vm.t.Fatalf("%s: not in %v; the VM's console:\n%s", what, limit, vm.console())
}

func (vm *diskVM) console() []byte {
	data, err := os.ReadFile(filepath.Join(vm.dir, "console.log"))
	if err != nil {
		return []byte(err.Error())
	}
	return data[max(0, len(data)-4000):]
}

// driverRuns does what the launcher does before it dials, for the same reason;
// see driverRuns and awaitDriver there.
func (vm *diskVM) driverRuns() bool {
	var buses []struct {
		Devices []struct {
			ID      string `json:"qdev_id"`
			Regions []struct {
				BAR     int   `json:"bar"`
				Address int64 `json:"address"`
			} `json:"regions"`
		} `json:"devices"`
	}
	if err := json.Unmarshal(vm.execute("query-pci", nil), &buses); err != nil {
		vm.t.Fatal(err)
	}
	for _, bus := range buses {
		for _, device := range bus.Devices {
			for _, region := range device.Regions {
				if device.ID != "vsock0" || region.BAR != 4 || region.Address <= 0 {
					continue
				}
				var line string
				raw := vm.execute("human-monitor-command", map[string]string{"command-line": fmt.Sprintf("xp /1bx %#x", region.Address+0x14)})
				if err := json.Unmarshal(raw, &line); err != nil {
					vm.t.Fatal(err)
				}
				_, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
				status, err := strconv.ParseUint(value, 0, 8)
				return err == nil && status != 0xff && status&4 != 0
			}
		}
	}
	return false
}

// execute runs a QMP command.
func (vm *diskVM) execute(command string, arguments any) json.RawMessage {
	vm.t.Helper()
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		vm.t.Fatal(err)
	}
	if _, err := vm.qmp.Write(append(request, '\n')); err != nil {
		vm.t.Fatalf("QMP %s: %v; the VM's console:\n%s", command, err, vm.console())
	}
	for {
		line, err := vm.in.ReadBytes('\n')
		if err != nil {
			vm.t.Fatalf("QMP %s: %v; the VM's console:\n%s", command, err, vm.console())
		}
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			vm.t.Fatalf("QMP %s: %v: %s", command, err, line)
		}
		if answer.Error != nil {
			vm.t.Fatalf("QMP %s: %s", command, answer.Error)
		}
		if answer.Return != nil {
			return answer.Return
		}
	}
}

// powerOff asks the VM to stop and waits until QEMU has ended.
func (vm *diskVM) powerOff() {
	vm.t.Helper()
	ctx, cancel := context.WithTimeout(vm.t.Context(), 30*time.Second)
	defer cancel()
	conn, err := vm.dialer.Dial(ctx, guest.PortControl)
	if err != nil {
		vm.t.Fatal(err)
	}
	defer conn.Close()
	request, err := json.Marshal(guest.ControlRequest{Op: guest.OpStop})
	if err != nil {
		vm.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Write(append(request, '\n')); err != nil {
		vm.t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadBytes('\n'); err != nil || !bytes.Contains(line, []byte(`"ok":true`)) {
		vm.t.Fatalf("ask the VM to stop: %v: %s", err, line)
	}
	select {
	case <-vm.ended:
	case <-time.After(time.Minute):
		vm.t.Fatalf("the VM does not end; its console:\n%s", vm.console())
	}
}
