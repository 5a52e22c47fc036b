// Package launcher starts and keeps Chrysalis VMs on their host: it decides the
// QEMU command line, picks an accelerator that works, starts QEMU and its helpers
// out of the tools root under a supervisor that outlives the command, and relays
// TCP to the VM's TLS port.
//
// Nothing here is trusted by a client of the VM: the launcher sees ciphertext and
// chooses what to start, and what it starts is measured. In the other direction
// nothing that the VM says is trusted here: it is bounded, enumerated and cleaned
// before it is shown.
package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
	"chrysalis/image/toolsroot"
	"chrysalis/manifest"
)

// Options say what Up starts.
type Options struct {
	Name       string           // 1 to 32 lower-case letters, digits, '-'; "default" when empty
	Image      string           // the UKI
	Firmware   string           // TDVF; needed on a host with TDX only
	Engine     string           // the engine disk
	Models     []string         // the model disks, in the order in which they are served
	Manifest   string           // a manifest file, used as it is; made from the disks when empty
	Parameters map[string]int64 // of the engine, for a manifest that is made here
	Tokens     []string         // hashes of clients' tokens (TokenHashes), for the same
	Shape      string           // "small" when empty
	GPUs       []string         // PCI addresses, as many as the shape has
	// GPUCollateral is a file with what NVIDIA signs about the GPUs (package
	// attest/nvidia, Collateral). When empty it is CollateralPath's, if that is there.
	GPUCollateral string
	Payment       *Payment      // nil: the VM serves for free
	DiskRate      int64         // bytes a second at which all disks together are read at most; 0: no limit
	Accel         Accel         // AccelAuto when empty
	Listen        string        // HOST:PORT; 127.0.0.1:8443 when empty, or the replaced VM's address; port 0 picks one
	Replace       bool          // start beside a running VM of that name, then take its place
	Timeout       time.Duration // until the VM is ready; 2 min when zero
	Drain         time.Duration // for the replaced VM's requests to finish; 1 min when zero

	StateDir string          // the state folder; StateDir() when empty
	Tools    *toolsroot.Root // where QEMU and its helpers are
	// Supervisor is the command that calls Supervise with the run's folder, which
	// is added to it. When empty it is this executable with "supervise".
	Supervisor []string
}

// Defaults of Options.
const (
	DefaultName    = "default"
	DefaultListen  = "127.0.0.1:8443"
	DefaultShape   = "small"
	DefaultTimeout = 2 * time.Minute
	DefaultDrain   = time.Minute
)

// Instance is a VM that is ready.
type Instance struct {
	State
	dir string
}

// Dir returns the run's folder: logs, console and state.
func (i *Instance) Dir() string { return i.dir }

// EndedError is a VM that ended before it was ready.
type EndedError struct {
	Reason  guest.Reason // the VM's own, empty when it gave none
	How     string       // one sentence
	Console []string     // with no reason: the last lines of the console, safe to print
}

func (e *EndedError) Error() string {
	if len(e.Console) == 0 {
		return e.How
	}
	return e.How + "\nthe end of its console:\n  " + strings.Join(e.Console, "\n  ")
}

// Up starts a VM and returns when it serves clients, or with an error when it
// does not; then nothing of it is left but its logs. The VM runs under a
// supervisor, a process of its own, and goes on when the caller ends. When ctx
// ends before the VM is ready, the VM is stopped. progress is called for each
// step and may be nil.
//
// The error is an *EndedError when the VM was started and ended.
func Up(ctx context.Context, o Options, progress func(Event)) (*Instance, error) {
	if progress == nil {
		progress = func(Event) {}
	}
	o.setDefaults()
	cfg, encoded, err := o.plan()
	if err != nil {
		return nil, err
	}
	collateral, err := o.collateral(cfg.Shape)
	if err != nil {
		return nil, err
	}
	st, err := openStore(o.StateDir)
	if err != nil {
		return nil, err
	}
	cfg.StateDir = st.dir
	if err := os.MkdirAll(st.vm(o.Name), 0o700); err != nil {
		return nil, fmt.Errorf("make the state folder: %w", err)
	}
	if info, err := os.Stat(st.dir); err == nil && info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("the state folder %s is open to others; run 'chmod 700 %s'", st.dir, st.dir)
	}
	nameLock, err := lockFile(st.vm(o.Name)+"/lock", unix.LOCK_EX|unix.LOCK_NB)
	if err == errLocked {
		return nil, fmt.Errorf("another 'chrysalis up %s' is at work; wait for it, or stop it with 'chrysalis down %s'", o.Name, o.Name)
	}
	if err != nil {
		return nil, err
	}
	defer nameLock.Close()

	alive, err := st.live(o.Name)
	if err != nil {
		return nil, err
	}
	var old *run
	if len(alive) > 0 {
		if !o.Replace {
			return nil, fmt.Errorf("the VM %q is already running; replace it with --replace, stop it with 'chrysalis down %s', or give the new one another name", o.Name, o.Name)
		}
		old = &alive[len(alive)-1]
		if err := cfg.replace(ctx, *old, o.Listen); err != nil {
			return nil, err
		}
	}
	if cfg.Listen == "" {
		cfg.Listen = DefaultListen
	}
	if err := checkListen(cfg.Listen); err != nil {
		return nil, err
	}
	if err := st.prune(o.Name); err != nil {
		return nil, err
	}

	r, lock, err := st.newRun(o.Name, time.Now())
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	cfg.Run = r.id
	cfg.Disks = append([]string{r.path("manifest.disk")}, cfg.Disks...)
	if err := writeManifestDisk(r.path("manifest.disk"), encoded, collateral); err != nil {
		return nil, err
	}
	if err := writeJSON(r.path("config.json"), cfg); err != nil {
		return nil, fmt.Errorf("write the VM's configuration: %w", err)
	}
	started, err := start(ctx, o, r, lock, progress)
	if err != nil {
		return nil, err
	}
	if old != nil {
		if err := awaitEnd(ctx, *old, o.Drain+30*time.Second, progress); err != nil {
			return started, err
		}
	}
	return started, nil
}

func (o *Options) setDefaults() {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if o.Shape == "" {
		o.Shape = DefaultShape
	}
	if o.Accel == "" {
		o.Accel = AccelAuto
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Drain == 0 {
		o.Drain = DefaultDrain
	}
}

// plan checks the options that need no state, and returns the configuration and
// the encoded manifest.
func (o Options) plan() (config, []byte, error) {
	fail := func(err error) (config, []byte, error) { return config{}, nil, err }
	if err := checkName(o.Name); err != nil {
		return fail(err)
	}
	if o.Tools == nil {
		return fail(errors.New("there is no tools root; make it with 'chrysalis image tools'"))
	}
	shape, err := LookupShape(o.Shape)
	if err != nil {
		return fail(err)
	}
	cfg := config{
		Name: o.Name, Tools: o.Tools.Dir, Shape: shape, Accel: o.Accel,
		GPUs: o.GPUs, DiskRate: o.DiskRate, Listen: o.Listen, DrainTimeout: o.Drain,
	}
	if cfg.Image, err = absolute("image", o.Image); err != nil {
		return fail(err)
	}
	if cfg.ImageSHA256, err = fileSHA256(cfg.Image); err != nil {
		return fail(fmt.Errorf("read the image: %w", err))
	}
	if o.Firmware != "" {
		if cfg.Firmware, err = absolute("firmware", o.Firmware); err != nil {
			return fail(err)
		}
	}
	engine, err := absolute("engine disk", o.Engine)
	if err != nil {
		return fail(err)
	}
	if len(o.Models) == 0 {
		return fail(errors.New("no model disk was given; name one with --model"))
	}
	cfg.Disks = []string{engine}
	for _, model := range o.Models {
		path, err := absolute("model disk", model)
		if err != nil {
			return fail(err)
		}
		cfg.Disks = append(cfg.Disks, path)
	}
	// Which platform it will be is not known yet; what does not depend on it is
	// checked before anything is started.
	art := Artefacts{Platform: PlatformKVM, Transport: TransportKernel, Disks: len(cfg.Disks) + 1, GuestCID: 3, GPUs: o.GPUs, DiskRate: o.DiskRate}
	if err := art.Check(shape); err != nil {
		return fail(err)
	}
	var encoded []byte
	if o.Manifest != "" {
		if len(o.Parameters) > 0 || len(o.Tokens) > 0 {
			return fail(errors.New("a manifest file already holds the engine's parameters and the clients' tokens; give either the file or those"))
		}
		if o.Payment != nil && (len(o.Payment.Ceilings) > 0 || o.Payment.Step > 0) {
			return fail(errors.New("a manifest file already holds the ceilings and the voucher step; give either the file or those"))
		}
		encoded, err = readManifest(o.Manifest)
	} else {
		m, makeErr := makeManifest(engine, cfg.Disks[1:], shape.GPUs+shape.StandIns, o.Parameters)
		if makeErr != nil {
			return fail(makeErr)
		}
		m.Tokens = o.Tokens
		if o.Payment != nil {
			if err := o.Payment.manifest(m); err != nil {
				return fail(err)
			}
		}
		encoded, err = m.Encode()
	}
	if err != nil {
		return fail(err)
	}
	if cfg.Payment, err = o.payment(encoded); err != nil {
		return fail(err)
	}
	cfg.ManifestSHA384 = manifest.SHA384(encoded)
	return cfg, encoded, nil
}

// payment is what the supervisor needs to know of those who pay. A manifest file that
// cannot be read is for the VM to refuse.
func (o Options) payment(encoded []byte) (*paid, error) {
	m, err := manifest.Parse(encoded)
	if o.Payment == nil {
		if err == nil && m.Payment != nil {
			return nil, errors.New("the manifest says that clients pay; say who is paid with --payout")
		}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return o.Payment.plan(m)
}

// replace notes which run the new one replaces, and whether it takes over the
// listening socket: it does when it is to listen at the same address.
func (cfg *config) replace(ctx context.Context, old run, listen string) error {
	state, err := old.current(ctx)
	if err != nil {
		return fmt.Errorf("ask the running VM for its state: %w", err)
	}
	if state.Life != LifeReady {
		return fmt.Errorf("the running VM %q is %s; only one that is ready can be replaced; stop it with 'chrysalis down %s'", state.Name, state.Life, state.Name)
	}
	cfg.Replaces = old.id
	if listen == "" || sameAddress(listen, state.Listen) {
		cfg.Listen = state.Listen
		cfg.Handover = true
	}
	return nil
}

// sameAddress compares an address as the user writes it with a listener's.
func sameAddress(asked, bound string) bool {
	if asked == bound {
		return true
	}
	a, err := net.ResolveTCPAddr("tcp", asked)
	if err != nil || a.Port == 0 {
		return false
	}
	b, err := net.ResolveTCPAddr("tcp", bound)
	return err == nil && a.Port == b.Port && a.IP.Equal(b.IP)
}

func checkListen(address string) error {
	if _, err := net.ResolveTCPAddr("tcp", address); err != nil {
		return fmt.Errorf("%q is not an address to listen on; write it like %s", address, DefaultListen)
	}
	return nil
}

// whoListens says which other VM serves an address, after "is in use".
func (s store) whoListens(address, except string) string {
	names, _ := s.names()
	for _, name := range names {
		runs, _ := s.live(name)
		for _, r := range runs {
			if state, err := r.readState(); err == nil && name != except && sameAddress(address, state.Listen) {
				return fmt.Sprintf(" by the VM %q", name)
			}
		}
	}
	return ""
}

// start runs the supervisor and follows it until the VM is ready.
func start(ctx context.Context, o Options, r run, lock *os.File, progress func(Event)) (*Instance, error) {
	command := o.Supervisor
	if len(command) == 0 {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find this program: %w", err)
		}
		command = []string{self, "supervise"}
	}
	logFile, err := os.OpenFile(r.path("supervisor.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the supervisor's log: %w", err)
	}
	defer logFile.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for the supervisor: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "up")
	ours := os.NewFile(uintptr(pair[0]), "supervisor")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, fmt.Errorf("make a socket for the supervisor: %w", err)
	}
	defer conn.Close()

	args := append(slices.Clone(command[1:]), r.dir)
	cmd := exec.Command(command[0], args...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{fdUp - 3: theirs, fdLock - 3: lock}
	// A session of its own: it is to outlive the terminal, and an interrupt there
	// is for us to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("start the supervisor: %w", err)
	}
	lock.Close() // the supervisor has it
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()

	events := make(chan Event)
	quit := make(chan struct{})
	defer close(quit)
	go func() {
		defer close(events)
		in := bufio.NewScanner(conn)
		in.Buffer(nil, 256<<10)
		for in.Scan() {
			var e Event
			if json.Unmarshal(in.Bytes(), &e) != nil {
				return
			}
			select {
			case events <- e:
			case <-quit:
				return
			}
		}
	}()
	timeout := time.NewTimer(o.Timeout)
	defer timeout.Stop()
	// giveUp tells the supervisor, by hanging up, to end the VM, and waits for it.
	giveUp := func() {
		conn.Close()
		select {
		case <-exited:
		case <-time.After(20 * time.Second):
			// Its children die with it.
			syscall.Kill(cmd.Process.Pid, syscall.SIGKILL)
			<-exited
		}
		r.settle()
	}
	var phase guest.Phase
	for {
		select {
		case e, ok := <-events:
			if !ok {
				giveUp()
				return nil, fmt.Errorf("the VM's supervisor ended unexpectedly; see 'chrysalis logs %s --supervisor'", r.name)
			}
			switch e.Kind {
			case EventPhase:
				phase = e.Phase
			case EventReady:
				if e.State == nil {
					continue
				}
				progress(e)
				return &Instance{State: *e.State, dir: r.dir}, nil
			case EventEnded:
				progress(e)
				giveUp()
				if e.State == nil {
					continue
				}
				ended := &EndedError{Reason: e.State.Reason, How: e.State.Ended}
				if e.State.Reason == guest.ReasonNone && e.State.Failed {
					ended.Console = e.Console
				}
				return nil, ended
			}
			progress(e)
		case <-ctx.Done():
			giveUp()
			return nil, fmt.Errorf("the start was interrupted; the VM is stopped")
		case <-timeout.C:
			giveUp()
			where := "before its agent spoke"
			if phase != "" {
				where = fmt.Sprintf("and was in the phase %q", phase)
			}
			return nil, &EndedError{
				How:     fmt.Sprintf("the VM was not ready in %v, %s; allow more with --timeout, or see 'chrysalis logs %s'", o.Timeout, where, r.name),
				Console: consoleTail(r.path("io", "console.log")),
			}
		}
	}
}

// awaitEnd waits until a replaced run is over.
func awaitEnd(ctx context.Context, old run, limit time.Duration, progress func(Event)) error {
	deadline := time.After(limit)
	told := false
	for {
		alive, err := old.settle()
		if err != nil || !alive {
			old.awaitExit()
			return err
		}
		if state, err := old.readState(); err == nil && state.Life == LifeDraining && !told {
			told = true
			progress(Event{Kind: EventDraining, State: &state})
		}
		select {
		case <-ctx.Done():
			return errors.New("interrupted while the old VM finishes its requests: both run on; the new one serves clients, the old one ends by itself")
		case <-deadline:
			return errors.New("the new VM is ready, but the old one does not end; see 'chrysalis status'")
		case <-time.After(50 * time.Millisecond):
		}
	}
}
