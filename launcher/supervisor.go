package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher/softtpm"
	"chrysalis/launcher/till"
	"chrysalis/terminal"
)

// config is config.json: all that a supervisor needs to know.
type config struct {
	Name           string        `json:"name"`
	Run            string        `json:"run"`
	StateDir       string        `json:"state_dir"`
	Tools          string        `json:"tools"`
	Shape          Shape         `json:"shape"`
	Accel          Accel         `json:"accel"`
	Image          string        `json:"image"`
	ImageSHA256    string        `json:"image_sha256"`
	Firmware       string        `json:"firmware,omitempty"` // the host's path; needed for TDX only
	Disks          []string      `json:"disks"`              // manifest, engine, models
	ManifestSHA384 [48]byte      `json:"manifest_sha384"`
	GPUs           []string      `json:"gpus,omitempty"`
	DiskRate       int64         `json:"disk_rate,omitempty"` // bytes a second
	Listen         string        `json:"listen"`
	Replaces       string        `json:"replaces,omitempty"` // the run that this one takes over from
	Handover       bool          `json:"handover,omitempty"` // and whose listening socket it takes
	DrainTimeout   time.Duration `json:"drain_timeout_ns"`   // for the replaced run
	Payment        *paid         `json:"payment,omitempty"`  // nil: it serves for free
}

// Descriptors that `up` gives the supervisor (exec.Cmd.ExtraFiles).
const (
	fdUp   = 3 // events to `up`; its end, before the VM is ready, stops the VM
	fdLock = 4 // the run's lock, already held
)

// EventKind says what an Event is about.
type EventKind string

// The kinds of event.
const (
	EventNote     EventKind = "note"     // a line for the user
	EventPhase    EventKind = "phase"    // the boot moved on
	EventReady    EventKind = "ready"    // clients are served
	EventDraining EventKind = "draining" // the replaced VM still has requests
	EventEnded    EventKind = "ended"    // it will not become ready
)

// Event is a step of a VM's start.
type Event struct {
	Kind    EventKind   `json:"event"`
	Note    string      `json:"note,omitempty"`
	Phase   guest.Phase `json:"phase,omitempty"`   // empty while firmware and kernel start
	State   *State      `json:"state,omitempty"`   // with ready and ended
	Console []string    `json:"console,omitempty"` // with ended: the last lines, safe to print
}

// supervisor owns one VM and everything that belongs to it.
type supervisor struct {
	cfg   config
	run   run
	store store
	tools *toolsroot.Root
	log   *log.Logger
	spawn *spawner
	fd    int // the run's folder: sockets are reached as /proc/self/fd/N/..., whatever its path's length

	listening sync.Mutex // guards the next four
	listener  *net.TCPListener
	served    chan struct{}      // closed when the relay no longer accepts; nil before it does
	unserve   context.CancelFunc // ends the relay's accepting
	handed    bool               // the listening socket is closed here, and may be another's

	mu      sync.Mutex // guards the next six
	till    *till.Till // nil where nobody pays, and before the VM is ready
	chain   *till.TON
	relay   *Relay // nil until the VM is ready
	dialer  Dialer // nil when there is no VM
	state   State
	changed chan struct{} // has a token when state changed

	upMu sync.Mutex
	up   io.Writer // nil once `up` is gone

	stop  chan stopRequest   // has the first request to stop
	now   context.Context    // ends when the VM is to end without waiting for anything
	hurry context.CancelFunc // ends now
}

// stopRequest asks a supervisor to end its VM.
type stopRequest struct {
	Now     bool          `json:"now"` // without draining
	Timeout time.Duration `json:"timeout_ns"`
	Keep    bool          `json:"keep,omitempty"` // claim nothing: what takes its place goes on with the money
	why     string
}

func newSupervisor(log *log.Logger) *supervisor {
	s := &supervisor{
		log:     log,
		spawn:   newSpawner(),
		changed: make(chan struct{}, 1),
		stop:    make(chan stopRequest, 1),
	}
	s.now, s.hurry = context.WithCancel(context.Background())
	return s
}

// Supervise runs one VM until it ends. It is the body of the hidden command
// `chrysalis supervise`, which Up starts with the run's folder as its argument;
// nobody else calls it.
func Supervise(runDir string) error {
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	for _, fd := range []int{fdUp, fdLock} {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			return errors.New("this command is for 'chrysalis up' to call")
		}
		unix.CloseOnExec(fd) // QEMU must not hold our lock
	}
	lock := os.NewFile(fdLock, "lock")
	defer lock.Close() // the very last: it says that everything is gone
	upFile := os.NewFile(fdUp, "up")
	conn, err := net.FileConn(upFile)
	upFile.Close()
	if err != nil {
		return fmt.Errorf("talk to 'chrysalis up': %w", err)
	}
	s := newSupervisor(log.New(os.Stderr, "", log.LstdFlags|log.Lmicroseconds))
	s.up = conn
	if err := readJSON(filepath.Join(runDir, "config.json"), &s.cfg); err != nil {
		return fmt.Errorf("read the run's configuration: %w", err)
	}
	s.run = run{dir: runDir, name: s.cfg.Name, id: s.cfg.Run}
	s.store = store{s.cfg.StateDir}
	s.tools = &toolsroot.Root{Dir: s.cfg.Tools}
	if s.fd, err = unix.Open(runDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open the run's folder: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the parent of the VM's orphans: %w", err)
	}
	s.state = State{
		Name: s.cfg.Name, Run: s.cfg.Run, Life: LifeStarting, Shape: s.cfg.Shape.Name,
		Listen: s.cfg.Listen, Supervisor: os.Getpid(), StartedAt: time.Now(),
	}
	s.save()
	go s.watchUp(conn)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go s.obey(signals)

	ended, failed := s.supervise()
	s.update(func(st *State) {
		st.Life, st.Ended, st.Failed, st.EndedAt = LifeEnded, ended, failed, time.Now()
	})
	s.save()
	s.log.Printf("ended: %s", ended)
	console := consoleTail(s.run.path("io", "console.log"))
	s.run.tidy()
	state := s.snapshot()
	s.tell(Event{Kind: EventEnded, State: &state, Console: console})
	return nil
}

// supervise is a VM's life from top to bottom. It says in one sentence how it
// ended, and whether that is a failure.
func (s *supervisor) supervise() (ended string, failed bool) {
	if err := s.listen(); err != nil {
		return err.Error(), true
	}
	defer func() {
		s.listening.Lock()
		defer s.listening.Unlock()
		if s.listener != nil {
			s.listener.Close()
		}
	}()
	api, err := s.serveAPI()
	if err != nil {
		return err.Error(), true
	}
	defer api.Close()

	tries, err := attempts(s.cfg.Accel, thisHost, s.cfg.Shape.GPUs, s.store.verdict(s.cfg.ImageSHA256))
	if err != nil {
		return err.Error(), true
	}
	for _, try := range tries {
		if try.note != "" {
			s.log.Print(try.note)
			s.tell(Event{Kind: EventNote, Note: try.note})
		}
		s.update(func(st *State) { st.Platform, st.Note = try.platform, try.note })
		s.save()
		again := false
		ended, failed, again = s.runVM(try)
		if !again {
			break
		}
		s.log.Printf("with KVM: %s", ended)
	}
	return ended, failed
}

// vm is one started VM and its helpers.
type vm struct {
	qemu   *child
	qmp    *qmpClient
	tpm    *child
	device *child
	dialer Dialer

	watching sync.WaitGroup
	unwatch  context.CancelFunc
}

// driverSettle is how long after its start the VM's vsock driver is first spoken
// to.
const driverSettle = 200 * time.Millisecond

// driverPatience is how long an answer about the VM's vsock driver is waited for.
const driverPatience = 2 * time.Minute

// awaitDriver waits until the VM's vsock driver runs. A connect from before that
// is answered in the very moment in which the device's rings are being enabled,
// and vhost-device-vsock 0.3.0 loses the VM's first kick if it comes before the
// ring that it is for: nothing that the VM sends arrives until it kicks again.
// While the firmware still places the device, QEMU may have no answer: that is
// no reason to connect early.
func (s *supervisor) awaitDriver(ctx context.Context, v *vm) {
	ctx, cancel := context.WithTimeout(ctx, driverPatience)
	defer cancel()
	var said string
	for {
		runs, err := v.qmp.driverRuns(ctx, userVsock)
		if err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			s.log.Printf("whether the VM's vsock driver runs is not known yet: %v", err)
		}
		pause := 50 * time.Millisecond
		if runs {
			pause = driverSettle
		}
		select {
		case <-ctx.Done():
			return
		case <-v.qmp.gone:
			return
		case <-time.After(pause):
		}
		if runs {
			return
		}
	}
}

// runVM starts a VM and stays with it until nothing of it is left. again says
// that another platform should be tried: QEMU did not get KVM to run the VM, or
// did not get far enough to tell. That KVM fails is remembered only when the VM
// ran and showed it: a full disk or a helper that died says nothing about KVM.
func (s *supervisor) runVM(try attempt) (ended string, failed, again bool) {
	v := &vm{}
	defer s.discard(v)
	if err := s.boot(v, try.platform); err != nil {
		if req, ok := s.stopRequested(); ok {
			return req.why, false, false
		}
		return err.Error(), true, try.unproven && v.qemu != nil
	}
	s.setDialer(v.dialer)

	watch, unwatch := context.WithCancel(context.Background())
	v.unwatch = unwatch
	v.watching.Go(func() {
		if v.device != nil {
			s.awaitDriver(watch, v)
		}
		v.watching.Go(func() { s.saveEngineLog(watch, v.dialer) })
		watchGuest(watch, v.dialer, s.onStatus)
	})
	v.watching.Go(func() { s.boundConsole(watch) })

	proven := func() { // the agent has spoken: KVM ran the kernel
		if try.platform == PlatformKVM && try.unproven {
			try.unproven = false
			s.store.remember(s.cfg.ImageSHA256, verdictWorks)
		}
	}
	patience := make(<-chan time.Time)
	if try.unproven {
		patience = time.After(unprovenPatience)
	}
	for {
		select {
		case <-s.changed:
			st := s.snapshot()
			if st.Guest == nil {
				continue
			}
			proven()
			if st.Guest.Ready && st.Life == LifeStarting {
				if err := s.becomeReady(); err != nil {
					s.end(v, stopRequest{Now: true})
					return err.Error(), true, false
				}
			}
		case <-patience:
			if try.unproven {
				s.end(v, stopRequest{Now: true})
				s.store.remember(s.cfg.ImageSHA256, verdictFails)
				return fmt.Sprintf("the agent did not speak within %v", unprovenPatience), true, true
			}
		case req := <-s.stop:
			s.end(v, req)
			return req.why, false, false
		case <-v.qmp.stopped:
			// A VM that ended by itself is followed by QEMU's own end. One whose
			// accelerator failed stays there, stopped.
			if v.qmp.Ending() != EndingInternal {
				select {
				case <-v.qemu.done:
				case <-time.After(2 * time.Second):
				}
			}
			return s.obituary(v, try)
		case <-v.qemu.done:
			return s.obituary(v, try)
		}
	}
}

// obituary says how a VM ended that nobody stopped.
func (s *supervisor) obituary(v *vm, try attempt) (ended string, failed, again bool) {
	v.qemu.kill()
	select { // its last event may still be in the pipe
	case <-v.qmp.gone:
	case <-time.After(time.Second):
	}
	// The reason may be on its way: what the device has passed on stays readable
	// when the device is gone, and the watcher reads until the end of it.
	v.device.kill()
	read := make(chan struct{})
	go func() { v.watching.Wait(); close(read) }()
	time.AfterFunc(300*time.Millisecond, v.unwatch)
	select {
	case <-read:
	case <-time.After(2 * time.Second):
	}
	ending := v.qmp.Ending()
	if ending == EndingNone {
		ending = EndingGone
	}
	st := s.snapshot()
	s.log.Printf("QEMU: ending %q, exit %v; reason %q", ending, v.qemu.err, st.Reason)
	if st.Reason != guest.ReasonNone {
		why := fmt.Sprintf("%s: %s", st.Reason, st.Reason.Explain())
		if st.Guest != nil && st.Reason == guest.ReasonGPUCollateral && len(st.Guest.RIMs) > 0 {
			why += ": chrysalis gpu collateral --rim " + strings.Join(st.Guest.RIMs, " --rim ")
		}
		return why, st.Reason != guest.ReasonStopped, false
	}
	if try.unproven && st.Guest == nil {
		switch ending {
		case EndingInternal, EndingReset:
			s.store.remember(s.cfg.ImageSHA256, verdictFails)
			again = true
		case EndingGone: // KVM may be the cause, or want of memory, or somebody's kill
			again = true
		}
	}
	if ending == EndingInternal && try.platform == PlatformKVM && !again {
		return "KVM cannot run this VM on this machine (KVM internal error); use --accel tcg", true, false
	}
	return "the VM " + ending.explain() + " and gave no reason", true, again
}

// boot starts the helpers and QEMU, and lets the VM run.
func (s *supervisor) boot(v *vm, platform Platform) error {
	transport := TransportKernel
	if err := thisHost.vhostVsock(); err != nil {
		transport = TransportUser
	}
	cid, err := freeCID(transport)
	if err != nil {
		return err
	}
	art := Artefacts{
		Platform:       platform,
		Transport:      transport,
		Firmware:       tpmFirmware,
		Disks:          len(s.cfg.Disks),
		ManifestSHA384: s.cfg.ManifestSHA384,
		GuestCID:       cid,
		GPUs:           s.cfg.GPUs,
		DiskRate:       s.cfg.DiskRate,
	}
	if platform == PlatformTDX {
		if s.cfg.Firmware == "" {
			return errors.New("a TD needs the TDX firmware that was built with the image; give it with --firmware")
		}
		art.Firmware = insideFirmware
	}
	if err := art.Check(s.cfg.Shape); err != nil {
		return err
	}
	s.update(func(st *State) { st.Transport = transport })
	entries, _ := os.ReadDir(s.run.path("io"))
	for _, e := range entries {
		if e.Type()&fs.ModeSocket != 0 {
			os.Remove(s.run.path("io", e.Name()))
		}
	}
	shared := toolsroot.Bind{Host: s.run.path("io"), Inside: insideIO, Writable: true}

	if platform != PlatformTDX {
		if v.tpm, err = s.startTPM(shared); err != nil {
			return err
		}
	}
	if transport == TransportUser {
		// It has a descriptor for each connection. Go raises its own limit, but gives
		// children the old one unless it was set by hand.
		var files syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil {
			files.Cur = files.Max
			_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files)
		}
		v.device, err = s.start("vhost-device-vsock", toolsroot.Command{
			Args: []string{"vhost-device-vsock", "--vm",
				fmt.Sprintf("guest-cid=%d,uds-path=%s/vsock.sock,socket=%s", cid, insideIO, insideVsock)},
			Bind: []toolsroot.Bind{shared}, Offline: true,
		})
		if err != nil {
			return err
		}
		if err := s.waitSocket(v.device, "io/vhost.sock"); err != nil {
			return err
		}
		v.dialer = NewUserDialer(s.short("io/vsock.sock"))
	} else {
		v.dialer = KernelDialer{CID: cid}
	}

	listener, err := net.Listen("unix", s.short("io/qmp.sock"))
	if err != nil {
		return fmt.Errorf("listen for QEMU: %w", err)
	}
	defer listener.Close()
	command := toolsroot.Command{
		Args:    Command(s.cfg.Shape, art),
		Bind:    []toolsroot.Bind{shared, {Host: s.cfg.Image, Inside: insideImage}},
		Devices: devices(art),
		Offline: transport != TransportKernel,
	}
	for i, disk := range s.cfg.Disks {
		command.Bind = append(command.Bind, toolsroot.Bind{Host: disk, Inside: fmt.Sprintf(insideDisk, i)})
	}
	if platform == PlatformTDX {
		command.Bind = append(command.Bind, toolsroot.Bind{Host: s.cfg.Firmware, Inside: insideFirmware})
	}
	if len(art.GPUs) > 0 {
		// A GPU's DMA pins the VM's memory, and QEMU has no capability to pin more
		// than its limit. Where this user may not raise it, QEMU says so.
		unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unlimited); err != nil {
			s.log.Printf("raise the limit of pinned memory: %v", err)
		}
	}
	if v.qemu, err = s.start("qemu", command); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	go func() { // unblock Accept
		select {
		case <-v.qemu.done:
		case <-ctx.Done():
		}
		listener.Close()
	}()
	conn, err := listener.Accept()
	if err != nil {
		return errors.New("QEMU did not start; see 'chrysalis logs --supervisor'")
	}
	if v.qmp, err = newQMP(ctx, conn); err != nil {
		conn.Close()
		return fmt.Errorf("talk to QEMU: %w", err)
	}
	if _, err := v.qmp.execute(ctx, "cont", nil); err != nil {
		return fmt.Errorf("let the VM run: %w", err)
	}
	return nil
}

// devices lists what QEMU opens in /dev for a VM, and so all that it is shown.
func devices(art Artefacts) []string {
	var list []string
	if art.Platform != PlatformTCG {
		list = append(list, "/dev/kvm")
	}
	if art.Transport == TransportKernel {
		list = append(list, "/dev/vhost-vsock")
	}
	if len(art.GPUs) > 0 {
		list = append(list, "/dev/iommu", "/dev/vfio")
	}
	return list
}

// tpmFirmware is the firmware of VMs with a software TPM, in the tools root.
const tpmFirmware = "/usr/share/ovmf/OVMF.fd"

// insideFirmware is where the tools root shows a firmware from outside of it.
const insideFirmware = "/vm/firmware.fd"

// startTPM makes a fresh TPM, with keys and a certificate, and serves it.
func (s *supervisor) startTPM(shared toolsroot.Bind) (*child, error) {
	dir := s.run.path("tpm")
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	ca, err := softtpm.OpenCA(s.store.dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.now, time.Minute)
	defer cancel()
	err = softtpm.Make(ctx, s.tools, dir, ca)
	s.reap() // nothing else runs yet
	if err != nil {
		s.log.Print(err)
		return nil, errors.New("the software TPM could not be made; see 'chrysalis logs --supervisor'")
	}
	const inside = "/vm/tpm"
	tpm, err := s.start("swtpm", toolsroot.Command{
		Args: []string{"swtpm", "socket", "--tpm2", "--tpmstate", "dir=" + inside, "--ctrl", "type=unixio,path=" + insideTPM, "--seccomp", "action=kill"},
		Bind: []toolsroot.Bind{{Host: dir, Inside: inside, Writable: true}, shared}, Offline: true,
	})
	if err != nil {
		return nil, err
	}
	return tpm, s.waitSocket(tpm, "io/tpm.sock")
}

func (s *supervisor) start(name string, c toolsroot.Command) (*child, error) {
	return s.spawn.start(name, s.tools.Cmd(context.Background(), c), s.log)
}

// waitSocket waits until a helper has made its socket.
func (s *supervisor) waitSocket(c *child, name string) error {
	deadline := time.After(10 * time.Second)
	for {
		if info, err := os.Stat(s.run.path(name)); err == nil && info.Mode()&fs.ModeSocket != 0 {
			return nil
		}
		select {
		case <-c.done:
			return fmt.Errorf("%s ended at once; see 'chrysalis logs --supervisor'", c.name)
		case <-deadline:
			return fmt.Errorf("%s did not start in 10 s; see 'chrysalis logs --supervisor'", c.name)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// short names a file in the run's folder in fewer bytes than the 108 that a unix
// socket's address has, however long the folder's path is.
func (s *supervisor) short(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", s.fd, name) }

// freeCID picks a vsock address. In the kernel all VMs of the host share one
// space; in user space each has its own.
func freeCID(t Transport) (uint32, error) {
	if t == TransportUser {
		return 3, nil
	}
	f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("use vhost-vsock: %w", err)
	}
	defer f.Close()
	for range 64 {
		cid := 3 + rand.Uint32N(1<<30)
		err := setGuestCID(int(f.Fd()), uint64(cid))
		if err == nil {
			return cid, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("use vhost-vsock: %w", err)
		}
	}
	return 0, errors.New("no vsock address is free")
}

// end stops the VM as asked: drain, ask it to stop, make it. A later request to
// do so at once cuts the first two short.
func (s *supervisor) end(v *vm, req stopRequest) {
	st := s.snapshot()
	if !req.Now && st.Life == LifeReady {
		s.drain(v, req.Timeout)
	}
	s.settle(req)
	s.update(func(st *State) { st.Life = LifeStopping })
	s.save()
	if !req.Now && s.now.Err() == nil && st.Guest != nil {
		ctx, cancel := context.WithTimeout(s.now, 10*time.Second)
		_, err := control(ctx, v.dialer, guest.OpStop)
		if err == nil {
			select {
			case <-v.qemu.done:
			case <-v.qmp.stopped:
				// It powered off; QEMU follows.
				select {
				case <-v.qemu.done:
				case <-ctx.Done():
				}
			case <-ctx.Done():
				s.log.Printf("the VM did not stop (%v); ending it", ctx.Err())
			}
		} else {
			s.log.Print(err)
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	select {
	case <-v.qemu.done:
		return
	default:
	}
	if _, err := v.qmp.execute(ctx, "quit", nil); err == nil {
		select {
		case <-v.qemu.done:
		case <-ctx.Done():
		}
	}
}

// drain lets running requests finish, for at most limit and until s.now ends.
func (s *supervisor) drain(v *vm, limit time.Duration) {
	s.update(func(st *State) { st.Life = LifeDraining })
	s.save()
	s.stopAccepting(nil)
	relay := s.theRelay()
	ctx, cancel := context.WithTimeout(s.now, limit)
	defer cancel()
	reply, err := control(ctx, v.dialer, guest.OpDrain)
	if err != nil {
		s.log.Print(err)
	}
	active := reply.Active
	for active > 0 || err != nil {
		select {
		case <-ctx.Done():
			s.log.Printf("%d requests were not finished (%v)", active, ctx.Err())
			relay.Close()
			return
		case <-v.qemu.done:
			return
		case <-time.After(200 * time.Millisecond):
		}
		if err != nil && relay.Counters().Active == 0 {
			break
		}
		// Asking again is how to learn the present number: the status may be 5 s old.
		if again, e := control(ctx, v.dialer, guest.OpDrain); e == nil {
			active, err = again.Active, nil
		}
	}
	// Answers may still be on their way to their clients; idle connections are
	// not worth waiting for.
	rest, cancelRest := context.WithTimeout(ctx, 2*time.Second)
	defer cancelRest()
	relay.Drain(rest)
}

// discard ends whatever is left of a VM.
func (s *supervisor) discard(v *vm) {
	if v.unwatch != nil {
		v.unwatch()
	}
	if relay := s.theRelay(); relay != nil {
		relay.Close()
	}
	v.qemu.kill()
	v.device.kill()
	v.tpm.kill()
	if v.qmp != nil {
		v.qmp.Close()
	}
	if v.dialer != nil {
		v.dialer.Close()
	}
	v.watching.Wait()
	s.closeTill()
	s.setDialer(nil)
	s.reap()
}

// reap waits for what bwrap leaves to its parent when it is killed, so that
// nothing of the VM is there any more, not even as a zombie. No child that
// somebody else waits for is left by now.
func (s *supervisor) reap() {
	for range 200 {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if err == unix.ECHILD {
			return
		}
		if pid <= 0 && err != unix.EINTR {
			time.Sleep(10 * time.Millisecond)
		}
	}
	s.log.Print("a process of the VM does not end")
}

// listen takes the TCP address, unless a run that is to be replaced has it.
func (s *supervisor) listen() error {
	if s.cfg.Handover {
		return nil
	}
	l, err := net.Listen("tcp", s.cfg.Listen)
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%s is in use%s; choose another with --listen", s.cfg.Listen, s.store.whoListens(s.cfg.Listen, s.cfg.Name))
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w; choose another address with --listen", s.cfg.Listen, err)
	}
	s.setListener(l.(*net.TCPListener))
	return nil
}

func (s *supervisor) setListener(l *net.TCPListener) {
	s.listening.Lock()
	s.listener = l
	s.listening.Unlock()
	s.update(func(st *State) {
		st.Endpoint = "https://" + l.Addr().String()
		st.Listen = l.Addr().String()
	})
}

// becomeReady starts to serve clients. Connections made since listen have been
// waiting in the listening socket's queue.
func (s *supervisor) becomeReady() error {
	if s.cfg.Handover {
		l, err := s.takeOver()
		if err != nil {
			return err
		}
		s.setListener(l)
	}
	s.mu.Lock()
	dialer := s.dialer
	s.mu.Unlock()
	if err := s.startTill(dialer); err != nil {
		return err
	}
	relay := NewRelay(maxConnections, func(ctx context.Context) (Conn, error) {
		s.mu.Lock()
		d := s.dialer
		s.mu.Unlock()
		if d == nil {
			return nil, net.ErrClosed
		}
		return d.Dial(ctx, guest.PortInference)
	})
	s.mu.Lock()
	s.relay = relay
	s.mu.Unlock()
	s.listening.Lock()
	s.serve(relay)
	s.listening.Unlock()
	s.update(func(st *State) { st.Life, st.ReadyAt = LifeReady, time.Now() })
	s.save()
	state := s.snapshot()
	s.log.Printf("ready at %s", state.Endpoint)
	s.tell(Event{Kind: EventReady, State: &state})
	if s.cfg.Replaces != "" {
		// The old VM ends by itself; up waits for it.
		old := s.store.run(s.cfg.Name, s.cfg.Replaces)
		if err := old.askToStop(context.Background(), stopRequest{Timeout: s.cfg.DrainTimeout, Keep: true}); err != nil {
			s.log.Printf("stop the replaced VM: %v", err)
		}
	}
	return nil
}

// maxConnections is how many clients a relay carries at a time: more than a VM
// holds with the largest limits (package agent/api). A VM that has too many hangs up
// on one that does nothing; in the relay's queue all would wait alike.
const maxConnections = 4096

// serve starts to accept clients. The caller holds s.listening.
func (s *supervisor) serve(relay *Relay) {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	s.unserve, s.served = cancel, served
	l := s.listener
	go func() {
		defer close(served)
		relay.Serve(ctx, l)
	}()
}

// stopAccepting ends the relay's accepting. pass may then give the listening
// socket to another process; when that fails, accepting goes on.
func (s *supervisor) stopAccepting(pass func(*net.TCPListener) error) error {
	s.listening.Lock()
	defer s.listening.Unlock()
	if s.served == nil || s.handed {
		return errors.New("this VM does not serve clients")
	}
	s.unserve()
	<-s.served
	if pass != nil {
		if err := pass(s.listener); err != nil {
			s.serve(s.theRelay())
			return err
		}
	}
	s.handed = true
	return s.listener.Close()
}

func (s *supervisor) theRelay() *Relay {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.relay
}

// onStatus takes what the VM says about itself.
func (s *supervisor) onStatus(status guest.Status) {
	s.mu.Lock()
	phase, reason := s.state.Phase, s.state.Reason
	s.state.Guest = &status
	s.state.Phase = status.Phase
	if status.Reason != guest.ReasonNone {
		s.state.Reason = status.Reason
	}
	moved := phase != s.state.Phase || reason != s.state.Reason
	starting := s.state.Life == LifeStarting
	s.mu.Unlock()
	s.signal()
	if moved {
		s.save()
		if starting && phase != status.Phase {
			s.tell(Event{Kind: EventPhase, Phase: status.Phase})
		}
	}
}

func (s *supervisor) update(f func(*State)) {
	s.mu.Lock()
	f(&s.state)
	s.mu.Unlock()
	s.signal()
}

func (s *supervisor) signal() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// snapshot returns the state with the counters of now.
func (s *supervisor) snapshot() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.state
	if s.relay != nil {
		state.Relay = s.relay.Counters()
	}
	if s.till != nil {
		state.Payment = new(s.till.State())
	}
	return state
}

func (s *supervisor) save() {
	if err := s.run.writeState(s.snapshot()); err != nil {
		s.log.Printf("write the state: %v", err)
	}
}

func (s *supervisor) setDialer(d Dialer) {
	s.mu.Lock()
	s.dialer = d
	s.mu.Unlock()
}

// tell sends an event to `up`, as long as it listens.
func (s *supervisor) tell(e Event) {
	s.upMu.Lock()
	defer s.upMu.Unlock()
	if s.up == nil {
		return
	}
	line, err := json.Marshal(e)
	if err != nil {
		return
	}
	if _, err := s.up.Write(append(line, '\n')); err != nil {
		s.up = nil
	}
}

// watchUp stops the VM when `up` goes away before the VM is ready.
func (s *supervisor) watchUp(conn net.Conn) {
	io.Copy(io.Discard, conn)
	s.upMu.Lock()
	s.up = nil
	s.upMu.Unlock()
	conn.Close()
	if st := s.snapshot(); st.Life == LifeStarting {
		s.requestStop(stopRequest{Now: true, why: "'chrysalis up' was interrupted"})
	}
}

// requestStop asks for the end. Of several requests the first counts; one that
// is not to wait takes the patience out of it.
func (s *supervisor) requestStop(req stopRequest) {
	select {
	case s.stop <- req:
	default: // it is being stopped already
	}
	if req.Now {
		s.hurry()
	}
}

// obey stops the VM when the supervisor is told to end, and at once when it is
// told again.
func (s *supervisor) obey(signals <-chan os.Signal) {
	again := false
	for range signals {
		s.requestStop(stopRequest{Now: again, Timeout: 10 * time.Second, why: "the VM's supervisor was told to end"})
		again = true
	}
}

// stopRequested returns a request that came while the VM was being started.
func (s *supervisor) stopRequested() (stopRequest, bool) {
	select {
	case req := <-s.stop:
		return req, true
	default:
		return stopRequest{}, false
	}
}

// maxEngineLog bounds the engine's log on the host, in bytes.
const maxEngineLog = 4 << 20

// saveEngineLog keeps the engine's output for `chrysalis logs`, for as long as
// the VM gives it away. When the stream breaks it connects again; the agent then
// sends what it has from the start.
func (s *supervisor) saveEngineLog(ctx context.Context, dialer Dialer) {
	client := guestHTTP(dialer)
	for ctx.Err() == nil {
		body, err := openGuest(ctx, client, "/engine-log")
		var status errStatus
		if errors.As(err, &status) {
			return // closed for good
		}
		if err == nil {
			n, err := writeEngineLog(s.run.path("engine.log"), body)
			body.Close()
			if n == maxEngineLog {
				return
			}
			if local := (*fs.PathError)(nil); errors.As(err, &local) {
				s.log.Printf("keep the engine's log: %v", err)
				return
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// writeEngineLog writes a new log, of at most maxEngineLog bytes. An error is an
// *fs.PathError when it is the file's and not the VM's.
func writeEngineLog(path string, body io.Reader) (int64, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.Copy(f, io.LimitReader(body, maxEngineLog))
}

// maxConsole is how long the console's log may grow before it is cut, in bytes.
const maxConsole = 4 << 20

// boundConsole cuts a console that floods: what is there goes to console.old.log.
// QEMU appends, so its next byte goes to the start of the emptied file.
func (s *supervisor) boundConsole(ctx context.Context) {
	path := s.run.path("io", "console.log")
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		info, err := os.Stat(path)
		if err != nil || info.Size() <= maxConsole {
			continue
		}
		if tail, err := readTail(path, maxConsole/4); err == nil {
			os.WriteFile(s.run.path("console.old.log"), tail, 0o600)
		}
		os.Truncate(path, 0)
	}
}

func readTail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-n), n))
}

// consoleTail returns the last lines of a console, safe to print.
func consoleTail(path string) []string {
	tail, err := readTail(path, 16<<10)
	if err != nil {
		return nil
	}
	var lines []string
	scanner := bufio.NewScanner(strings.NewReader(terminal.Clean(string(tail))))
	for scanner.Scan() {
		if line := strings.TrimRight(scanner.Text(), " "); line != "" {
			lines = append(lines, line[:min(len(line), 300)])
		}
	}
	return lines[max(0, len(lines)-12):]
}

// setGuestCID tries an address on an open /dev/vhost-vsock. The address is free
// again when the file is closed.
func setGuestCID(fd int, cid uint64) error {
	return ioctlPointer(fd, vhostVsockSetGuestCID, &cid)
}
