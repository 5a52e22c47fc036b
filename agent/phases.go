package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/agent/api"
	"chrysalis/agent/gpu"
	"chrysalis/agent/platform"
	"chrysalis/agent/port"
	"chrysalis/agent/proof"
	"chrysalis/attest/evidence"
	"chrysalis/guest"
	"chrysalis/image/profile"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/verity"
)

// phases is the boot. They run in this order; the first error ends the VM with
// the phase's reason, or the one that the error carries.
var phases = []phase{
	{guest.PhaseMounts, guest.ReasonMounts, (*agent).mount},
	{guest.PhaseDevices, guest.ReasonDevice, (*agent).checkHardware},
	{guest.PhaseModules, guest.ReasonModules, (*agent).loadModules},
	{guest.PhasePlatform, guest.ReasonPlatform, (*agent).findPlatform},
	{guest.PhaseManifest, guest.ReasonManifestMissing, (*agent).readManifest},
	{guest.PhaseDisks, guest.ReasonDiskFormat, (*agent).openDisks},
	{guest.PhaseGPU, guest.ReasonGPUDriver, (*agent).startGPUs},
	{guest.PhaseLockdown, guest.ReasonLockdown, (*agent).lockDown},
	{guest.PhaseEngine, guest.ReasonEngineStart, (*agent).startEngine},
	{guest.PhaseIdentity, guest.ReasonIdentity, (*agent).makeIdentity},
	{guest.PhaseServe, guest.ReasonServe, (*agent).serve},
}

// phase is one step of the boot.
type phase struct {
	name   guest.Phase
	reason guest.Reason // told to the host when run fails without one of its own
	run    func(*agent, context.Context) error
}

// agent is what the phases hand on to each other.
type agent struct {
	ending   sync.Mutex
	alive    context.Context // ends when the VM is about to
	stop     context.CancelFunc
	restarts atomic.Int64 // of the engine
	state    *port.State
	counters api.Counters

	image         imageInfo          // mounts
	platform      platform.Platform  // platform
	events        []cel.Event        // manifest, disks, lockdown: what has been measured
	encoded       []byte             // manifest: as it was read
	manifest      *manifest.Manifest // manifest
	engine        string             // disks: mount point of the engine disk
	models        []model            // disks
	devices       []*verity.Device   // disks
	profile       *profile.Profile   // disks
	gpus          int                // devices: how many there are
	gpuNodes      []string           // gpu: device nodes in /dev
	gpuFiles      []*os.File         // gpu: of the GPUs, kept open
	gpuSet        *gpu.Set           // gpu
	gpuCollateral []byte             // gpu: what they are judged by, for clients
	children      []*supervisor      // engine: one for each model
	engines       sync.Mutex         // engine: held while the state of all of them is told
	engineLog     port.Log           // engine: its output
	status        *port.Status       // modules: the status port
	identity      tls.Certificate    // identity
	receipts      ed25519.PrivateKey // identity
	prover        *proof.Prover      // identity
	server        *api.Server        // serve
}

func newAgent(start time.Time, kernel time.Duration) *agent {
	a := &agent{}
	a.alive, a.stop = context.WithCancel(context.Background())
	a.state = port.NewState(imageName, start, kernel, a.count)
	return a
}

// boot runs the phases. It returns only when one of them fails.
func (a *agent) boot() error {
	for _, phase := range phases {
		a.state.Begin(phase.name)
		log.printf("phase %s", phase.name)
		if err := because(phase.reason, phase.run(a, a.alive)); err != nil {
			return fmt.Errorf("phase %s: %w", phase.name, err)
		}
	}
	a.state.FinishPhase()
	select {} // whatever ends the VM from here on calls end
}

// background runs something for as long as the VM lives. Its end ends the VM.
func (a *agent) background(reason guest.Reason, run func() error) {
	go a.guard(func() {
		err := run()
		if err == nil {
			err = errors.New("it ended by itself")
		}
		a.end(because(reason, err))
	})
}

// mount checks the initrd, then makes the kernel's file systems available.
func (a *agent) mount(context.Context) error {
	if err := because(guest.ReasonInitrd, checkInitrd()); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := m.do(); err != nil {
			return err
		}
	}
	// Nobody traces this process or looks into its memory, whoever it is.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("close the agent's memory: %w", err)
	}
	if err := quietConsole(); err != nil {
		return err
	}
	go a.guard(reaper.run)
	ignoreSignals()
	var err error
	if a.image, err = readImageInfo(); err != nil {
		return because(guest.ReasonInitrd, err)
	}
	return because(guest.ReasonCommandLine, a.image.checkCommandLine())
}

// checkHardware refuses every device that the table does not have, before any
// driver of ours is loaded.
func (a *agent) checkHardware(context.Context) (err error) {
	if err := stopAutoBinding(); err != nil {
		return err
	}
	a.gpus, err = checkDevices(sysfs, "")
	return err
}

// loadModules loads the drivers, binds the devices, and opens the status port:
// from here on the host can be told what goes wrong.
func (a *agent) loadModules(context.Context) error {
	if err := loadModules(modulesPath, hasTDX()); err != nil {
		return err
	}
	if err := because(guest.ReasonDevice, bindDevices(virtioBlock, virtioVsock)); err != nil {
		return err
	}
	return because(guest.ReasonServe, a.openStatus())
}

// openStatus opens the status port.
func (a *agent) openStatus() error {
	ln, err := listen(guest.PortStatus)
	if err != nil {
		return err
	}
	a.status = port.NewStatus(a.state, &a.engineLog)
	a.background(guest.ReasonServe, func() error { return a.status.Serve(ln) })
	return nil
}

// lockDown closes the kernel and the log of events before anything runs that the
// client's policy has not measured into the image.
func (a *agent) lockDown(context.Context) error {
	if err := lockDown(); err != nil {
		return err
	}
	return a.closeLog()
}

// makeIdentity makes the keys, which never leave the VM, and prepares the
// evidence that they are the VM's.
func (a *agent) makeIdentity(context.Context) (err error) {
	if a.identity, err = newIdentity(); err != nil {
		return err
	}
	var receiptKey ed25519.PublicKey
	if receiptKey, a.receipts, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return fmt.Errorf("make the receipt key: %w", err)
	}
	log, err := cel.Encode(a.platform.Register(), a.events)
	if err != nil {
		return err
	}
	a.prover = proof.New(evidence.Document{
		Version:    evidence.Version,
		TLSKey:     a.identity.Leaf.RawSubjectPublicKeyInfo,
		ReceiptKey: evidence.Bytes(receiptKey),
		Manifest:   a.encoded,
		CEL:        log,
	}, a.prove)
	return nil
}

// serve opens the ports for clients and for the host's requests.
func (a *agent) serve(context.Context) error {
	if err := a.sameDevices(); err != nil {
		return because(guest.ReasonDevice, err)
	}
	a.background(guest.ReasonDevice, func() error {
		for {
			time.Sleep(devicesEvery)
			if err := a.sameDevices(); err != nil {
				return err
			}
		}
	})

	inference, err := listen(guest.PortInference)
	if err != nil {
		return err
	}
	a.server = api.New(api.Config{
		Models:        a.manifest.Models,
		Limits:        a.manifest.Limits,
		Tokens:        a.manifest.Tokens,
		Payment:       a.manifest.Payment,
		Certificate:   a.identity,
		ReceiptKey:    a.receipts,
		Manifest:      manifest.SHA384(a.encoded),
		Engine:        func(ctx context.Context, model int) (net.Conn, error) { return a.children[model].dial(ctx) },
		Ready:         func() bool { return a.alive.Err() == nil && a.anyReady() },
		Evidence:      a.prover.Evidence,
		GPUCollateral: a.gpuCollateral,
		FirstClient:   a.status.CloseLog,
		Counters:      &a.counters,
	})
	debug.SetMemoryLimit(a.server.HeapLimit())
	a.background(guest.ReasonServe, func() error {
		err := a.server.Serve(inference)
		if errors.Is(err, http.ErrServerClosed) {
			select {} // the VM is being stopped, which is not for this to end
		}
		return err
	})

	control, err := listen(guest.PortControl)
	if err != nil {
		return err
	}
	a.background(guest.ReasonServe, func() error {
		return (&port.Control{Host: isHost, Handle: a.control}).Serve(control)
	})
	a.state.SetServing()
	return nil
}

// devicesEvery is how often the devices are looked at while the VM serves. Nothing
// in the kernel looks for new ones (mkosi.conf.d/30-cmdline.conf), so this finds
// what got in by a way that nobody has thought of.
const devicesEvery = 10 * time.Second

// sameDevices refuses devices that were not there when the VM booted.
func (a *agent) sameDevices() error {
	gpus, err := checkDevices(sysfs, gpuDriver)
	if err != nil {
		return err
	}
	if gpus != a.manifest.GPUs {
		return fmt.Errorf("the VM has %d GPUs, the manifest requires %d", gpus, a.manifest.GPUs)
	}
	return nil
}

// stopGrace is how long requests may go on after the host has asked to stop.
const stopGrace = 2 * time.Second

// control carries out what the host asks for.
func (a *agent) control(r guest.ControlRequest) (guest.ControlReply, func()) {
	switch r.Op {
	case guest.OpDrain:
		a.state.Drain()
		a.server.Drain()
		return guest.ControlReply{OK: true, Active: a.server.Active()}, nil
	case guest.OpStop:
		return guest.ControlReply{OK: true, Active: a.server.Active()}, func() {
			// Let what was answered reach its clients; the host drained before if it
			// wanted more than that.
			ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
			defer cancel()
			_ = a.server.Shutdown(ctx)
			a.end(&fault{guest.ReasonStopped, errors.New("the host asked for it")})
		}
	case guest.OpPrices, guest.OpAdmit, guest.OpDrop, guest.OpCollect:
		return a.server.Payment(r), nil
	default:
		return guest.ControlReply{Error: guest.ErrorUnknownOp}, nil
	}
}

// count fills the counters of a status document.
func (a *agent) count() guest.CounterTable {
	var t guest.CounterTable
	a.counters.Fill(&t)
	t.EngineRestarts = a.restarts.Load()
	t.AgentRSSKiB, t.AgentPeakKiB = residentMemory(os.Getpid())
	t.Goroutines, t.Descriptors = int64(runtime.NumGoroutine()), openDescriptors()
	return t
}
