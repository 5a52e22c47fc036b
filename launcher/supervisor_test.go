package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
	"chrysalis/image/toolsroot"
)

// testSupervisor is a supervisor of a run, without a VM.
func testSupervisor(t *testing.T, r run) *supervisor {
	t.Helper()
	s := newSupervisor(log.New(t.Output(), "", 0))
	s.run = r
	s.store = store{filepath.Dir(filepath.Dir(filepath.Dir(filepath.Dir(r.dir))))}
	s.state = State{Name: r.name, Run: r.id, Life: LifeStarting}
	s.cfg = config{Name: r.name, Run: r.id, ImageSHA256: "image", Disks: []string{"a", "b", "c"}}
	fd, err := unix.Open(r.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return s
	}
	s.fd = fd
	t.Cleanup(func() { unix.Close(fd) })
	return s
}

// fakeQEMU is a child without a process: it ends when QMP tells it to quit.
func fakeQEMU(t *testing.T) (*child, *qmpClient) {
	t.Helper()
	qemu := &child{name: "qemu", done: make(chan struct{})}
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		io.WriteString(theirs, `{"QMP":{}}`+"\n")
		in := bufio.NewScanner(theirs)
		for in.Scan() {
			var m struct {
				Execute string
				ID      int64
			}
			json.Unmarshal(in.Bytes(), &m)
			fmt.Fprintf(theirs, `{"return":{},"id":%d}`+"\n", m.ID)
			if m.Execute == "quit" {
				close(qemu.done)
				return
			}
		}
	}()
	qmp, err := newQMP(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { qmp.Close() })
	return qemu, qmp
}

// fakeAgent answers on the control port: one request never finishes, and a stop
// is accepted and not followed.
type fakeAgent struct {
	mu  sync.Mutex
	ops []guest.ControlOp
}

func (a *fakeAgent) dialer() Dialer {
	return pipeDialer(func(_ uint32, vm net.Conn) {
		defer vm.Close()
		var request guest.ControlRequest
		if json.NewDecoder(vm).Decode(&request) != nil {
			return
		}
		a.mu.Lock()
		a.ops = append(a.ops, request.Op)
		a.mu.Unlock()
		json.NewEncoder(vm).Encode(guest.ControlReply{OK: true, Active: 1})
	})
}

func (a *fakeAgent) asked(op guest.ControlOp) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Contains(a.ops, op)
}

// What ends at once, ends at once at any time: while requests finish, and while
// the VM has been asked to stop.
func TestStopNowCutsShort(t *testing.T) {
	for _, tt := range []struct {
		name  string
		life  Life
		until guest.ControlOp // the operation to interrupt
		hurry func(*supervisor)
	}{
		{"a second request while it drains", LifeReady, guest.OpDrain, func(s *supervisor) { s.requestStop(stopRequest{Now: true}) }},
		{"a second signal while it drains", LifeReady, guest.OpDrain, func(s *supervisor) {
			signals := make(chan os.Signal, 2)
			signals <- syscall.SIGTERM
			signals <- syscall.SIGTERM
			close(signals)
			s.obey(signals)
		}},
		{"a second request while it stops", LifeStarting, guest.OpStop, func(s *supervisor) { s.requestStop(stopRequest{Now: true}) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, _ := testRun(t, store{t.TempDir()}, "vm", "")
			s := testSupervisor(t, r)
			s.state.Life, s.state.Guest = tt.life, &guest.Status{Ready: true}
			s.relay = NewRelay(1, nil)
			var agent fakeAgent
			v := &vm{dialer: agent.dialer()}
			v.qemu, v.qmp = fakeQEMU(t)
			done := make(chan struct{})
			go func() { defer close(done); s.end(v, stopRequest{Timeout: time.Minute}) }()
			for range 500 {
				if agent.asked(tt.until) {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
			if !agent.asked(tt.until) {
				t.Fatalf("the VM was not asked to %s", tt.until)
			}
			select {
			case <-done:
				t.Fatal("it does not wait")
			case <-time.After(300 * time.Millisecond):
			}
			tt.hurry(s)
			select {
			case <-done:
			case <-time.After(3 * time.Second):
				t.Fatal("it goes on waiting")
			}
			select {
			case <-v.qemu.done:
			default:
				t.Error("QEMU still runs")
			}
			if tt.until == guest.OpDrain {
				if s.relay.track(new(net.Conn)) {
					t.Error("the relay still carries connections")
				}
				if agent.asked(guest.OpStop) {
					t.Error("the VM was asked to stop and waited for")
				}
			}
		})
	}
}

// One signal drains; the request that it makes is the ordinary one.
func TestObeyOnce(t *testing.T) {
	r, _ := testRun(t, store{t.TempDir()}, "vm", "")
	s := testSupervisor(t, r)
	signals := make(chan os.Signal, 1)
	signals <- syscall.SIGTERM
	close(signals)
	s.obey(signals)
	if req := <-s.stop; req.Now || req.Timeout == 0 || s.now.Err() != nil {
		t.Errorf("%+v, %v", req, s.now.Err())
	}
}

// A helper that fails says nothing about KVM: no other platform is tried, and
// nothing is remembered.
func TestHelperFailureIsNoVerdict(t *testing.T) {
	r, _ := testRun(t, store{t.TempDir()}, "vm", "")
	s := testSupervisor(t, r)
	s.tools = &toolsroot.Root{Dir: t.TempDir()} // no swtpm, nothing
	ended, failed, again := s.runVM(attempt{platform: PlatformKVM, unproven: true})
	if !failed || again || ended == "" {
		t.Errorf("%q, failed %v, again %v", ended, failed, again)
	}
	if v := s.store.verdict("image"); v != verdictNone {
		t.Errorf("it is remembered that KVM %s", v)
	}
}

// What QEMU says about unproven KVM: only that KVM ran the VM and failed is kept.
func TestVerdictOfEndings(t *testing.T) {
	for _, tt := range []struct {
		name     string
		ending   Ending
		unproven bool
		spoken   bool
		again    bool
		verdict  verdict
	}{
		{"KVM's internal error", EndingInternal, true, false, true, verdictFails},
		{"a reset before the agent spoke", EndingReset, true, false, true, verdictFails},
		{"QEMU gone without a word", EndingNone, true, false, true, verdictNone},
		{"powered off", EndingPowerOff, true, false, false, verdictNone},
		{"a reset after the agent spoke", EndingReset, true, true, false, verdictNone},
		{"an internal error where KVM is known to work", EndingInternal, false, false, false, verdictNone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, _ := testRun(t, store{t.TempDir()}, "vm", "")
			s := testSupervisor(t, r)
			if tt.spoken {
				s.state.Guest = &guest.Status{}
			}
			v := &vm{unwatch: func() {}}
			v.qemu, v.qmp = fakeQEMU(t)
			v.qmp.end(tt.ending)
			v.qmp.Close()
			close(v.qemu.done)
			_, failed, again := s.obituary(v, attempt{platform: PlatformKVM, unproven: tt.unproven})
			if !failed || again != tt.again {
				t.Errorf("failed %v, again %v", failed, again)
			}
			if got := s.store.verdict("image"); got != tt.verdict {
				t.Errorf("remembered: %q, expected %q", got, tt.verdict)
			}
		})
	}
}

func TestDevices(t *testing.T) {
	for _, tt := range []struct {
		name string
		art  Artefacts
		want string
	}{
		{"TCG in user space", Artefacts{Platform: PlatformTCG, Transport: TransportUser}, ""},
		{"TCG", Artefacts{Platform: PlatformTCG, Transport: TransportKernel}, "/dev/vhost-vsock"},
		{"KVM in user space", Artefacts{Platform: PlatformKVM, Transport: TransportUser}, "/dev/kvm"},
		{"TDX", Artefacts{Platform: PlatformTDX, Transport: TransportKernel}, "/dev/kvm /dev/vhost-vsock"},
		{"TDX with a GPU", Artefacts{Platform: PlatformTDX, Transport: TransportKernel, GPUs: []string{"0000:b8:00.0"}}, "/dev/kvm /dev/vhost-vsock /dev/iommu /dev/vfio"},
	} {
		if got := strings.Join(devices(tt.art), " "); got != tt.want {
			t.Errorf("%s: %q", tt.name, got)
		}
	}
}

// The engine's log survives a stream that breaks, says nothing twice, and ends
// with the VM's word that there is no more, or when it is full.
func TestSaveEngineLog(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n\r\n"
	for _, tt := range []struct {
		name    string
		answers []string
		want    string
	}{
		{"broken off, then whole", []string{"", ok + "one ", ok + "one two ", ok + "one two three", "HTTP/1.1 410 Gone\r\n\r\n"}, "one two three"},
		{"closed from the start", []string{"HTTP/1.1 410 Gone\r\n\r\n"}, ""},
		{"full", []string{ok + strings.Repeat("x", maxEngineLog+100)}, strings.Repeat("x", maxEngineLog)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, _ := testRun(t, store{t.TempDir()}, "vm", "")
			s := testSupervisor(t, r)
			dials := 0
			d := pipeDialer(func(_ uint32, vm net.Conn) {
				defer vm.Close()
				if dials++; dials > len(tt.answers) {
					t.Errorf("it connects %d times", dials)
					return
				}
				in := bufio.NewReader(vm)
				for line := ""; line != "\r\n"; {
					var err error
					if line, err = in.ReadString('\n'); err != nil {
						return
					}
				}
				io.WriteString(vm, tt.answers[dials-1])
			})
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			s.saveEngineLog(ctx, d)
			if ctx.Err() != nil || dials != len(tt.answers) {
				t.Errorf("%d connects, %v", dials, ctx.Err())
			}
			got, err := os.ReadFile(r.path("engine.log"))
			if err != nil && !(tt.want == "" && errors.Is(err, os.ErrNotExist)) || string(got) != tt.want {
				t.Errorf("%d bytes, expected %d; %v", len(got), len(tt.want), err)
			}
		})
	}
}
