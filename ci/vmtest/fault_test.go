package vmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"chrysalis/attest/evidence"
	"chrysalis/guest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/verity/gpt"
)

// handVM is a VM with the hostile engine whose QEMU the test itself has started,
// with the launcher's command line, so that it can do to it what no launcher of
// ours does.
type handVM struct {
	*diskVM
	client *client
	disks  []string // manifest, engine, model: copies, which may be changed
}

// bootByHand starts a VM with an image, after a change to QEMU's command line, and
// with folders that QEMU sees beside its own.
func bootByHand(t *testing.T, image string, change func([]string) []string, folders ...toolsroot.Bind) *handVM {
	t.Helper()
	return bootManifest(t, image, nil, change, folders...)
}

// bootManifest is bootByHand with a change to the manifest's text.
func bootManifest(t *testing.T, image string, edit func([]byte) []byte, change func([]string) []string, folders ...toolsroot.Bind) *handVM {
	t.Helper()
	engine := packEngine(t, "hostile", nil)
	manifest, err := os.ReadFile(writeManifest(t, engine, demo, edit))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	vm := &handVM{disks: []string{filepath.Join(dir, "manifest"), engine, filepath.Join(dir, "model")}}
	f, err := os.Create(vm.disks[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := gpt.WriteManifestDisk(f, manifest, nil); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(demo)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(vm.disks[2], data, 0o600); err != nil {
		t.Fatal(err)
	}
	shape, err := launcher.LookupShape("small")
	if err != nil {
		t.Fatal(err)
	}
	argv := change(launcher.Command(shape, launcher.Artefacts{
		Platform: launcher.PlatformTCG, Transport: launcher.TransportUser,
		Firmware: "/usr/share/ovmf/OVMF.fd", Disks: len(vm.disks), GuestCID: 3,
	}))
	binds := append(folders, toolsroot.Bind{Host: image, Inside: "/vm/image.efi"})
	for i, disk := range vm.disks {
		binds = append(binds, toolsroot.Bind{Host: disk, Inside: fmt.Sprintf("/vm/disk%d", i)})
	}
	vm.diskVM = startQEMU(t, argv, binds...)
	vm.await(vm.driverRuns)
	time.Sleep(time.Second) // as the launcher waits, for an emulated VM
	vm.client = newClient(t, "https://vm")
	vm.client.http.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return vm.dialer.Dial(ctx, guest.PortInference)
	}
	return vm
}

// serves waits until the VM serves clients.
func (vm *handVM) serves() {
	vm.t.Helper()
	vm.await(func() bool {
		text, err := ask(vm.dialer, "/status", 20*time.Second)
		return err == nil && strings.Contains(text, `"ready":true`)
	})
}

// ends waits for the reason for the VM's end.
func (vm *handVM) ends(want guest.Reason) {
	vm.t.Helper()
	for range 30 {
		if reason := endReason(vm.t.Context(), vm.dialer); reason != "" {
			if reason != string(want) {
				vm.t.Errorf("the VM ended with %q, expected %q", reason, want)
			}
			select {
			case <-vm.ended:
			case <-time.After(time.Minute):
				vm.t.Error("it gave its reason and did not power off")
			}
			return
		}
	}
	vm.t.Errorf("the VM goes on, expected it to end with %s", want)
}

// as returns the VM's client for a subtest.
func (vm *handVM) as(t *testing.T) *client {
	c := *vm.client
	c.t = t
	return &c
}

// well checks that the VM serves as if nothing were.
func (vm *handVM) well(t *testing.T) {
	t.Helper()
	if status, said := vm.as(t).obeyed("hello"); status != 200 || said != "hello" {
		t.Errorf("the VM answers %d %q", status, said)
	}
	if _, err := ask(vm.dialer, "/status", 30*time.Second); err != nil {
		t.Errorf("the status port: %v", err)
	}
}

// replaceDisk puts another node in the place of a disk's file, while it is in use.
func (vm *handVM) replaceDisk(i int, node map[string]any) {
	vm.t.Helper()
	vm.execute("blockdev-add", node)
	vm.execute("blockdev-reopen", map[string]any{"options": []any{
		map[string]any{"driver": "raw", "node-name": "disk" + strconv.Itoa(i), "read-only": true, "file": node["node-name"]},
	}})
}

// dialPort dials one of the VM's ports.
func (vm *handVM) dialPort(port uint32, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	conn, err := vm.dialer.Dial(ctx, port)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn, nil
}

// TestHostileHost has the host do to a running VM what it can think of. The clock
// it gives the VM is 73 years ahead. It is a VM that is paid, for nothing after the
// first case.
func TestHostileHost(t *testing.T) {
	vm := bootManifest(t, uki, priced(t), func(argv []string) []string {
		return append(argv, "-rtc", "base=2099-12-31T23:59:30", "-device", "pcie-root-port,id=spare,bus=pcie.0,chassis=9,addr=0x1e")
	})
	vm.serves()

	t.Run("payment", vm.isPaid)
	t.Run("a clock far ahead", vm.evidence)
	for _, c := range []struct {
		name    string
		port    uint32
		garbage string
		answer  string // that is allowed; "" is to be hung up on
	}{
		{"status: no HTTP", guest.PortStatus, "\x00\xff\x16\x03\x01\r\n\r\n", "HTTP/1.1 400 "},
		{"status: another method", guest.PortStatus, "POST /status HTTP/1.1\r\nHost: vm\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 405 "},
		{"status: a path that climbs", guest.PortStatus, "GET /../proc/1/mem HTTP/1.1\r\nHost: vm\r\n\r\n", "HTTP/1.1 404 "},
		{"status: a proxy's request", guest.PortStatus, "CONNECT vm:443 HTTP/1.1\r\nHost: vm\r\n\r\n", "HTTP/1.1 404 "},
		{"status: HTTP/2", guest.PortStatus, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1 "},
		{"status: header without end", guest.PortStatus, "GET /status HTTP/1.1\r\n" + strings.Repeat("X: "+strings.Repeat("x", 1000)+"\r\n", 64), "HTTP/1.1 431 "},
		{"control: no JSON", guest.PortControl, "stop\n", `"bad-message"`},
		{"control: another spelling", guest.PortControl, `{"OP":"stop"}` + "\n", `"bad-message"`},
		{"control: two fields", guest.PortControl, `{"op":"drain","op":"stop"}` + "\n", `"bad-message"`},
		{"control: two messages", guest.PortControl, `{"op":"none"}` + "\n" + `{"op":"stop"}` + "\n", `"bad-message"`},
		{"control: what is not known", guest.PortControl, `{"op":"exec"}` + "\n", `"unknown-op"`},
		{"control: another operation's field", guest.PortControl, `{"op":"drain","ack":1}` + "\n", `"bad-message"`},
		{"control: a payer's key of small order", guest.PortControl, `{"op":"admit","admit":{"channel":"0:` + strings.Repeat("0", 64) + `","key":"` + strings.Repeat("0", 64) + `","limit":1,"used":0}}` + "\n", `"refused"`},
		{"control: 1 MiB", guest.PortControl, strings.Repeat("x", 1<<20), `"bad-message"`},
		{"clients: no TLS", guest.PortInference, strings.Repeat("\x16\x03\x01\xff\xff", 4096), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := vm.dialPort(c.port, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go io.WriteString(conn, c.garbage)
			data := make([]byte, 512)
			n, err := io.ReadAtLeast(conn, data, max(1, len(c.answer)))
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("neither an answer nor an end")
			}
			// What had not been read when the VM hung up takes the answer with it.
			if n > 0 && c.answer != "" && !strings.Contains(string(data[:n]), c.answer) {
				t.Errorf("it answers %q, expected %q", data[:n], c.answer)
			}
			vm.well(t)
		})
	}
	t.Run("ports that nobody serves", func(t *testing.T) {
		for _, port := range []uint32{0, 1, 22, 80, 442, 444, 1023, 1024, 8080, 8999, 9002, 9443, 50051, 1 << 31, 1<<32 - 1} {
			if conn, err := vm.dialPort(port, 10*time.Second); err == nil {
				conn.Close()
				t.Errorf("port %d is open", port)
			}
		}
	})
	for name, port := range map[string]uint32{"status": guest.PortStatus, "control": guest.PortControl, "clients": guest.PortInference} {
		t.Run("a thousand connections: "+name, func(t *testing.T) {
			vm.crowd(t, port, 1000)
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Second) {
				if _, err := ask(vm.dialer, "/status", 10*time.Second); err == nil {
					break
				} else if time.Now().After(deadline) {
					t.Fatalf("the status port afterwards: %v", err)
				}
			}
			vm.well(t)
		})
	}
	t.Run("half a request", func(t *testing.T) {
		var open []net.Conn
		for range 32 {
			if conn, err := vm.dialPort(guest.PortStatus, 10*time.Second); err == nil {
				io.WriteString(conn, "GET /status HT")
				open = append(open, conn)
			}
		}
		for _, conn := range open {
			if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a peer that says half of its request is not hung up on")
			}
			conn.Close()
		}
		vm.well(t)
	})
	t.Run("a reader that does not read", func(t *testing.T) {
		for range 8 {
			conn, err := vm.dialPort(guest.PortStatus, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, strings.Repeat("GET /metrics HTTP/1.1\r\nHost: vm\r\n\r\n", 200))
		}
		vm.well(t)
	})
	t.Run("half a TLS handshake", func(t *testing.T) {
		for range 64 {
			conn, err := vm.dialPort(guest.PortInference, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			hello := &firstWrite{Conn: conn}
			tls.Client(hello, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(t.Context())
		}
		vm.well(t)
	})
	t.Run("devices that are plugged in", func(t *testing.T) {
		vm.execute("device_add", map[string]any{"driver": "virtio-net-pci", "id": "plugged", "bus": "spare"})
		time.Sleep(12 * time.Second) // the agent looks every 10 s
		vm.well(t)
		var answer struct{ Status string }
		if err := json.Unmarshal(vm.execute("query-status", nil), &answer); err != nil || answer.Status != "running" {
			t.Errorf("%v: QEMU is %s", err, answer.Status)
		}
		if text := vm.execute("human-monitor-command", map[string]any{"command-line": "info pci"}); !bytes.Contains(text, []byte("plugged")) {
			t.Error("the device is not there")
		}
		// A driver would have set it up.
		if text := vm.execute("qom-get", map[string]any{"path": "/machine/peripheral/plugged", "property": "realized"}); string(text) != "true" {
			t.Errorf("the device is not realized: %s", text)
		}
	})
	t.Run("power button", func(t *testing.T) {
		vm.execute("system_powerdown", nil)
		vm.well(t)
	})
	t.Run("non-maskable interrupt", func(t *testing.T) {
		vm.execute("inject-nmi", nil)
		vm.well(t)
	})
	t.Run("time that stands still", func(t *testing.T) {
		vm.execute("stop", nil)
		time.Sleep(3 * time.Second)
		vm.execute("cont", nil)
		vm.well(t)
	})
	t.Run("the agent is well", func(t *testing.T) { agentWell(t, vm.dialer) })
	t.Run("another disk under the reader", func(t *testing.T) {
		vm.replaceDisk(1, map[string]any{"driver": "null-co", "node-name": "void", "read-zeroes": true, "read-only": true, "size": size(t, vm.disks[1])})
		vm.rereads()
		vm.ends(guest.ReasonDiskCorrupt)
	})
}

// TestFailingDisks has disks be slow, fail and come back, and shrink. The clock
// that the host gives the VM is decades behind.
func TestFailingDisks(t *testing.T) {
	t.Parallel()
	vm := bootByHand(t, uki, func(argv []string) []string {
		slow := 0
		for i, arg := range argv {
			if at := strings.Index(arg, `"file":{"driver":"file"`); at >= 0 {
				argv[i] = arg[:at] + `"file":{"driver":"throttle","throttle-group":"slow","read-only":true,` + arg[at:] + "}"
				slow++
			}
		}
		if slow != 3 {
			t.Errorf("%d disks are slow, expected 3: %q", slow, argv)
		}
		return append(argv, "-rtc", "base=1980-01-01T00:00:00", "-object", "throttle-group,id=slow,x-iops-total=150")
	})
	vm.serves()
	t.Run("a clock far behind", vm.evidence)
	t.Run("errors", func(t *testing.T) {
		vm.replaceDisk(1, map[string]any{
			"driver": "blkdebug", "node-name": "broken", "read-only": true,
			"image":        map[string]any{"driver": "file", "filename": "/vm/disk1", "read-only": true, "locking": "off"},
			"inject-error": []any{map[string]any{"event": "none", "iotype": "read", "errno": 5}},
		})
		vm.rereads()
		// What is in memory is verified and stays. Of the rest the engine may need some
		// at any time, and dies of it.
		c := vm.as(t)
		if status, said := c.obeyed("hello"); (status != 200 || said != "hello") && status != 502 && status != 503 {
			t.Errorf("the VM answers %d %q", status, said)
		}
		if status, said := c.obeyed("exit"); status != 502 && status != 503 {
			t.Errorf("the VM answers %d %q for an engine that ended", status, said)
		}
		vm.await(func() bool { return metric(t, vm.dialer, "engine_restarts_total") > 0 })
	})
	t.Run("no more errors", func(t *testing.T) {
		vm.replaceDisk(1, map[string]any{"driver": "file", "node-name": "mended", "filename": "/vm/disk1", "read-only": true, "locking": "off"})
		vm.await(func() bool {
			status, _ := vm.as(t).obeyed("exhaust reads of its disk")
			return status == 200
		})
		vm.well(t)
	})
	t.Run("truncated under the reader", func(t *testing.T) {
		if err := os.Truncate(vm.disks[1], 1<<20); err != nil {
			t.Fatal(err)
		}
		vm.rereads()
		vm.ends(guest.ReasonDiskCorrupt)
	})
}

// TestReadErrors boots with disks that answer nothing.
func TestReadErrors(t *testing.T) {
	for i, c := range []struct {
		name   string
		reason guest.Reason
	}{
		{"manifest", guest.ReasonManifestMissing},
		{"engine", guest.ReasonDiskMissing},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			vm := bootByHand(t, uki, func(argv []string) []string {
				for j, arg := range argv {
					if at := strings.Index(arg, `"file":{"driver":"file"`); at >= 0 && strings.Contains(arg, fmt.Sprintf(`"/vm/disk%d"`, i)) {
						argv[j] = arg[:at] + `"file":{"driver":"blkdebug","inject-error":[{"event":"none","iotype":"read","errno":5}],"image"` + arg[at+len(`"file"`):] + "}"
						return argv
					}
				}
				t.Errorf("there is no disk %d: %q", i, argv)
				return argv
			})
			vm.ends(c.reason)
		})
	}
}

// TestKilledWhileBooting kills QEMU at several points of the boot, which the debug
// image tells on its console. Each time `up` says so, nothing is left, and the next
// one starts as if nothing had been.
func TestKilledWhileBooting(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	engine := testEngine(t, "serve")
	image := filepath.Join(filepath.Dir(uki), "chrysalis-debug.efi")
	for _, at := range []struct{ name, console string }{
		{"firmware", ""},
		{"devices", "agent: phase devices"},
		{"disks", "agent: phase disks"},
		{"engine", "agent: phase engine"},
	} {
		t.Run(at.name, func(t *testing.T) {
			// Where KVM is there and does not work, the first QEMU is the one that finds out.
			up := make(chan result, 1)
			go func() {
				up <- h.run(4*time.Minute, "up", "--accel", "tcg", "--listen", "127.0.0.1:0", "--timeout", "3m", "--image", image, "--engine", engine, "--model", demo)
			}()
			killed := false
			var r result
			for over := false; !killed && !over; time.Sleep(10 * time.Millisecond) {
				select {
				case r = <-up: // once more, and for the last time
					up <- r
					over = true
				default:
				}
				if h.qemu() == 0 {
					continue
				}
				if at.console == "" {
					time.Sleep(time.Second)
					killed = h.killQEMU()
					continue
				}
				runs, err := filepath.Glob(filepath.Join(h.dir, "chrysalis", "vms", "*", "runs", "*"))
				if err != nil || len(runs) == 0 {
					t.Errorf("there is a QEMU and no run: %v", err)
					break
				}
				// Runs are named by their time, and earlier ones may be kept.
				data, err := os.ReadFile(filepath.Join(slices.Max(runs), "io", "console.log"))
				if err == nil && bytes.Contains(data, []byte(at.console)) {
					killed = h.killQEMU()
				}
			}
			r = <-up
			if !killed {
				t.Fatalf("QEMU was not killed: %s", r)
			}
			// In the firmware it may not have answered the launcher yet.
			if r.code == 0 || !strings.Contains(r.stderr, "QEMU exited without saying why") && (at.console != "" || !strings.Contains(r.stderr, "QEMU")) {
				t.Errorf("up: %s", r)
			}
			h.lost(t)
		})
	}
	t.Run("serving", func(t *testing.T) {
		h.up("--engine", engine, "--model", demo)
		if !h.killQEMU() {
			t.Fatal("there is no QEMU")
		}
		h.lost(t)
	})
}

// lost checks that nothing of a VM is left but word of its failure.
func (h *host) lost(t *testing.T) {
	t.Helper()
	h.noProcesses()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		r := h.run(time.Minute, "status", "default")
		if strings.Contains(r.stdout, "failed") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("status: %s", r)
		}
	}
}

// killQEMU kills this host's QEMU and says whether there was one.
func (h *host) killQEMU() bool {
	pid := h.qemu()
	return pid != 0 && syscall.Kill(pid, syscall.SIGKILL) == nil
}

// qemu returns the process of this host's QEMU, or 0. A process above it names
// the state folder.
func (h *host) qemu() int {
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		h.t.Fatal(err)
	}
	for _, path := range entries {
		data, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(data, []byte("qemu-system-x86_64\x00")) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		for up := pid; up > 1; {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", up))
			if err != nil {
				break
			}
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", up))
			if bytes.Contains(line, []byte(h.dir)) {
				return pid
			}
			_, rest, _ := strings.Cut(string(stat), ") ")
			up, _ = strconv.Atoi(strings.Fields(rest)[1]) // its parent
		}
	}
	return 0
}

// crowd opens so many connections at once, of which the VM keeps as many as it
// likes, and lets go of them.
func (vm *handVM) crowd(t *testing.T, port uint32, n int) {
	var all sync.WaitGroup
	var accepted, refused atomic.Int64
	turns := make(chan struct{}, 50)
	conns := make(chan net.Conn, n)
	begin := time.Now()
	for range n {
		all.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			conn, err := vm.dialPort(port, 30*time.Second)
			if err != nil {
				refused.Add(1)
				return
			}
			accepted.Add(1)
			conns <- conn
		})
	}
	all.Wait()
	close(conns)
	for conn := range conns {
		conn.Close()
	}
	t.Logf("%d connected and %d did not, in %v", accepted.Load(), refused.Load(), time.Since(begin))
	if accepted.Load() == 0 {
		t.Error("none was accepted")
	}
}

// evidence asks for evidence with a fresh nonce.
func (vm *handVM) evidence(t *testing.T) {
	nonce := make([]byte, evidence.NonceSize)
	rand.Read(nonce)
	encoded := base64.RawURLEncoding.EncodeToString(nonce)
	resp, body := vm.as(t).send("GET", evidence.Path+"?nonce="+encoded, nil)
	if resp.StatusCode != 200 || !strings.Contains(body, encoded) {
		t.Errorf("evidence: %s: %.300s", resp.Status, body)
	}
	vm.well(t)
}

// rereads has the engine read its disk again, past what the kernel has of it in
// memory.
func (vm *handVM) rereads() {
	req, err := http.NewRequest("POST", vm.client.endpoint+"/v1/chat/completions", order("exhaust reads of its disk", false))
	if err != nil {
		vm.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if resp, err := vm.client.http.Do(req); err == nil { // the VM may end over it
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

// firstWrite lets one write through and then ends everything.
type firstWrite struct {
	net.Conn
	done bool
}

func (c *firstWrite) Read([]byte) (int, error) { return 0, io.EOF }

func (c *firstWrite) Write(p []byte) (int, error) {
	if c.done {
		return 0, io.ErrClosedPipe
	}
	c.done = true
	return c.Conn.Write(p)
}

func (c *firstWrite) Close() error { return nil }

func size(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}
