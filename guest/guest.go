// Package guest is what a Chrysalis VM and its host say to each other: the
// vsock ports, the boot phases, the enumerated reasons for which a VM ends, the
// status document and the control messages (control.go).
//
// Everything here is read by an untrusted host and written by it too, so it
// holds enumerated values, coarse counters and NVIDIA's names for what a GPU is
// judged by only: no free text, nothing that a client sent, nothing that would
// change what a client has verified.
package guest

import "regexp"

// The vsock ports that a VM listens on. There are no others, and there is no
// network device.
const (
	PortInference = 443  // HTTPS, OpenAI-compatible; TLS 1.3 ends in the agent
	PortStatus    = 9000 // HTTP, read-only: see Status
	PortControl   = 9001 // one ControlRequest a connection, host CID only
)

// MaxChunk is the largest single write, in bytes, in either direction of a
// vsock connection. A user-space vhost-vsock device stalls for good on 64 KiB
// writes; a TLS record is up to 16,406 bytes, so whole records are split too.
const MaxChunk = 8 << 10

// Phase is one named step of the boot, in the order of Phases.
type Phase string

// The phases, in boot order.
const (
	PhaseMounts   Phase = "mounts"
	PhaseDevices  Phase = "devices"
	PhaseModules  Phase = "modules"
	PhasePlatform Phase = "platform"
	PhaseManifest Phase = "manifest"
	PhaseDisks    Phase = "disks"
	PhaseGPU      Phase = "gpu"
	PhaseLockdown Phase = "lockdown"
	PhaseEngine   Phase = "engine"
	PhaseIdentity Phase = "identity"
	PhaseServe    Phase = "serve"
)

// Phases lists every phase in boot order.
var Phases = []Phase{
	PhaseMounts, PhaseDevices, PhaseModules, PhasePlatform, PhaseManifest,
	PhaseDisks, PhaseGPU, PhaseLockdown, PhaseEngine, PhaseIdentity, PhaseServe,
}

// Reason says why a VM ended or is about to. The zero value means that it has
// no reason to end.
type Reason string

// The reasons. A VM never gives any other.
const (
	ReasonNone            Reason = ""
	ReasonStopped         Reason = "stopped"          // the control port asked for it
	ReasonMounts          Reason = "mounts-failed"    // a kernel file system could not be mounted
	ReasonInitrd          Reason = "initrd-unknown"   // the initrd holds a file that the image was not built with
	ReasonCommandLine     Reason = "command-line"     // the kernel command line is not the one built in
	ReasonDevice          Reason = "device-refused"   // a device that neither the table nor the manifest allows
	ReasonModules         Reason = "modules-failed"   // a kernel module did not load
	ReasonPlatform        Reason = "platform-failed"  // neither TDX nor a TPM, or one that does not work
	ReasonManifestMissing Reason = "manifest-missing" // no disk carries a manifest, or several do
	ReasonManifestInvalid Reason = "manifest-invalid" // the manifest is not canonical, complete and in bounds
	ReasonManifestOther   Reason = "manifest-other"   // the manifest is not the one that the platform says the VM was started for
	ReasonDiskMissing     Reason = "disk-missing"     // no disk has a root hash that the manifest names
	ReasonDiskCorrupt     Reason = "disk-corrupt"     // a block does not match its root hash
	ReasonDiskFormat      Reason = "disk-format"      // a verified disk does not hold what it should
	ReasonGPUCount        Reason = "gpu-count"        // not as many GPUs as the manifest requires
	ReasonGPUDriver       Reason = "gpu-driver"       // the engine disk's GPU driver is missing, malformed, or does not work
	ReasonGPUHelper       Reason = "gpu-helper"       // the NVML helper died, hung, or said what it must not
	ReasonGPUModel        Reason = "gpu-model"        // a GPU that the driver's list does not name
	ReasonGPUMode         Reason = "gpu-mode"         // confidential computing is off, or in a mode that proves nothing
	ReasonGPUDevTools     Reason = "gpu-devtools"     // confidential computing in its debugging mode
	ReasonGPUReady        Reason = "gpu-ready"        // the GPUs took work before they were attested
	ReasonGPUCollateral   Reason = "gpu-collateral"   // the reference manifest of a driver or VBIOS is missing, or collateral that does not verify
	ReasonGPUAttestation  Reason = "gpu-attestation"  // a GPU's own proof was refused
	ReasonGPULost         Reason = "gpu-lost"         // a GPU fell off the bus, or its memory failed
	ReasonGPUChanged      Reason = "gpu-changed"      // a GPU is no longer the one that was measured
	ReasonLockdown        Reason = "lockdown-failed"  // the kernel refused to be locked down
	ReasonEngineProfile   Reason = "engine-profile"   // the engine's profile refuses the manifest's models, parameters or GPUs
	ReasonEngineStart     Reason = "engine-start"     // the engine could not be started
	ReasonEngineTimeout   Reason = "engine-timeout"   // the engine did not answer in time
	ReasonEngineFailing   Reason = "engine-failing"   // the engine died more often than the allowed rate
	ReasonIdentity        Reason = "identity-failed"  // no TLS key could be made
	ReasonServe           Reason = "serve-failed"     // a port could not be served
	ReasonPanic           Reason = "panic"            // a bug in the agent
)

// Explain says in a sentence what a reason means and what the person who
// started the VM can do. It is for the host's side: the guest sends the bare
// reason.
func (r Reason) Explain() string {
	if s, ok := explanations[r]; ok {
		return s
	}
	return "the VM gave a reason that this version does not know; use the launcher that belongs to the image"
}

// Known reports whether r is one of the enumerated reasons.
func (r Reason) Known() bool {
	_, ok := explanations[r]
	return ok
}

var explanations = map[Reason]string{
	ReasonNone:            "the VM gave no reason",
	ReasonStopped:         "the VM was asked to stop",
	ReasonMounts:          "the guest kernel refused a file system; the image is damaged or was built with another kernel",
	ReasonInitrd:          "something added a file to the initrd; start the VM with the launcher and no other initrd",
	ReasonCommandLine:     "the kernel command line is not the image's own; remove any -append, SMBIOS or ESP addition",
	ReasonDevice:          "the VM has a device that the manifest does not allow; start it with the launcher's own devices only",
	ReasonModules:         "a kernel module did not load; the image is damaged",
	ReasonPlatform:        "the VM has neither TDX nor a working TPM",
	ReasonManifestMissing: "no attached disk, or more than one, carries a manifest",
	ReasonManifestInvalid: "the manifest is not canonical JSON, has an unknown, missing or repeated field, or a value out of bounds",
	ReasonManifestOther:   "the manifest is not the one that the TD was started for (MRCONFIGID); start the VM with the launcher, or with the manifest's SHA-384 as MRCONFIGID",
	ReasonDiskMissing:     "no attached disk has a root hash that the manifest names; attach the engine and model disks that it was made for",
	ReasonDiskCorrupt:     "a disk's content does not match its root hash; fetch or pack it again",
	ReasonDiskFormat:      "a disk is authentic but does not hold an engine or a model; pack it with this version's tools",
	ReasonGPUCount:        "the VM has not as many GPUs as its manifest requires; give as many with --gpu, in a shape that has them",
	ReasonGPUDriver:       "the engine disk has no GPU driver that works in this image; use an engine disk packed with --gpu-driver, and the image chrysalis-gpu",
	ReasonGPUHelper:       "the program that speaks with NVIDIA's library died, hung or talked nonsense; start the VM again, and pack the engine disk again if it stays so",
	ReasonGPUModel:        "a GPU is of a model that the engine disk's driver list does not name; pass through another one, or use another engine disk",
	ReasonGPUMode:         "confidential computing is off on a GPU, or in a mode that proves nothing; turn it on with 'chrysalis gpu prepare ADDRESS --cc on'",
	ReasonGPUDevTools:     "a GPU is in devtools mode, in which its memory can be read; turn it off with 'chrysalis gpu prepare ADDRESS --cc on'",
	ReasonGPUReady:        "the GPUs took work before the VM had attested them; use the engine disk as it was published",
	ReasonGPUCollateral:   "NVIDIA's reference manifest for the driver or the VBIOS is missing, or what was given does not verify; fetch it with 'chrysalis gpu collateral' and give it with --gpu-collateral",
	ReasonGPUAttestation:  "a GPU does not prove that it is an unaltered NVIDIA GPU with known firmware; update its VBIOS, or pass through another one",
	ReasonGPULost:         "a GPU fell off the bus or reported an uncorrectable memory error; reset it, and replace it if that happens again",
	ReasonGPUChanged:      "a GPU is no longer the one that the VM measured when it booted; start the VM again",
	ReasonLockdown:        "the guest kernel refused to be locked down; the image is damaged",
	ReasonEngineProfile:   "the manifest's models, parameters or GPUs are not ones that the engine's profile accepts",
	ReasonEngineStart:     "the engine's program could not be started; the engine disk does not fit its profile",
	ReasonEngineTimeout:   "the engine did not become ready in the time that its profile allows",
	ReasonEngineFailing:   "the engine kept dying; see the engine's output (chrysalis logs)",
	ReasonIdentity:        "the VM could not make its TLS key",
	ReasonServe:           "the VM could not open its vsock ports",
	ReasonPanic:           "the agent met a bug in itself; please report it with the image's name",
}

// Status is the document that the status port serves.
//
//	GET /status      one Status as JSON
//	GET /events      a Status as a line of JSON now, at each change, and at least every 5 s
//	GET /metrics     the same figures as Prometheus text
//	GET /engine-log  the engine's own output, until the first client connects
type Status struct {
	Version  int          `json:"version"` // 1
	Image    string       `json:"image"`   // the image's name: "chrysalis", "chrysalis-debug"
	Phase    Phase        `json:"phase"`
	Ready    bool         `json:"ready"`    // clients are being served and the engine answers
	Draining bool         `json:"draining"` // no new requests are admitted
	Reason   Reason       `json:"reason,omitempty"`
	RIMs     []string     `json:"rims,omitempty"` // with ReasonGPUCollateral: what NVIDIA calls those that are missing
	UptimeMS int64        `json:"uptime_ms"`      // since PID 1's first instruction
	KernelMS int64        `json:"kernel_ms"`      // kernel time at PID 1's first instruction
	Phases   []PhaseTime  `json:"phases"`         // the finished ones, in order
	Counters CounterTable `json:"counters"`
}

// MaxRIMs is how many names of RIMs a status document can have.
const MaxRIMs = 16

var rimRE = regexp.MustCompile(`^NV_GPU_(?:DRIVER|VBIOS)_[A-Z0-9_.]{1,100}$`)

// IsRIM reports whether a text has the form of NVIDIA's name for a reference
// manifest of a GPU's driver or VBIOS. Which ones a VM lacks is nothing that its
// host does not know: it has the GPU.
func IsRIM(name string) bool { return rimRE.MatchString(name) }

// PhaseTime is how long a finished phase took.
type PhaseTime struct {
	Name Phase `json:"name"`
	MS   int64 `json:"ms"`
}

// CounterTable holds coarse counters since boot. None is tied to a client or to
// a request's content.
type CounterTable struct {
	Connections    int64 `json:"connections"`     // accepted on the inference port
	Requests       int64 `json:"requests"`        // admitted to the engine
	Active         int64 `json:"active"`          // being served now
	Paid           int64 `json:"paid"`            // begun with cover by what was paid
	Unpaid         int64 `json:"unpaid"`          // answered 402, or cut off for want of cover
	Refused        int64 `json:"refused"`         // answered 4xx by the agent itself, but for 402 and 429
	Busy           int64 `json:"busy"`            // answered 429
	Unavailable    int64 `json:"unavailable"`     // answered 503
	EngineErrors   int64 `json:"engine_errors"`   // the engine broke off or answered 5xx
	Cancelled      int64 `json:"cancelled"`       // the client went away first
	EngineRestarts int64 `json:"engine_restarts"` // since boot
	AgentRSSKiB    int64 `json:"agent_rss_kib"`   // resident memory of PID 1
	AgentPeakKiB   int64 `json:"agent_peak_kib"`  // its peak
	Goroutines     int64 `json:"agent_goroutines"`
	Descriptors    int64 `json:"agent_descriptors"` // open files and sockets of PID 1
}
