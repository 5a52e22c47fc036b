//go:build cgo && nvml

package main

import (
	"fmt"
	"strconv"

	"github.com/NVIDIA/go-nvml/pkg/dl"
	nv "github.com/NVIDIA/go-nvml/pkg/nvml"

	"chrysalis/agent/gpu/protocol"
)

// library is NVIDIA's, loaded with the first request. A call of a function that
// it does not have would end the process, so each is looked up first.
type library struct {
	path   string
	opened bool
	api    nv.Interface
}

func newLibrary(path string) nvml { return &library{path: path} }

// need opens the library, when it is not open, and looks up functions.
func (l *library) need(symbols ...string) error {
	if !l.opened {
		if err := l.open(); err != nil {
			return err
		}
	}
	for _, s := range symbols {
		if l.api.Extensions().LookupSymbol(s) != nil {
			return &failure{protocol.CodeNoSymbol, s}
		}
	}
	return nil
}

// open loads the library and starts it. The binding starts it as soon as it has
// loaded it, so what it needs for that is looked up beside it.
func (l *library) open() error {
	probe := dl.New(l.path, dl.RTLD_LAZY|dl.RTLD_GLOBAL)
	if err := probe.Open(); err != nil {
		return &failure{protocol.CodeNoLibrary, ""}
	}
	for _, s := range []string{"nvmlInit_v2", "nvmlShutdown", "nvmlErrorString"} {
		if probe.Lookup(s) != nil {
			return &failure{protocol.CodeNoSymbol, s}
		}
	}
	l.api = nv.New(nv.WithLibraryPath(l.path))
	if err := check(l.api.Init()); err != nil {
		return err
	}
	l.opened = true
	return nil
}

// check turns what NVML returns into an error.
func check(r nv.Return) error {
	code := protocol.CodeFailed
	switch r {
	case nv.SUCCESS:
		return nil
	case nv.ERROR_LIBRARY_NOT_FOUND:
		code = protocol.CodeNoLibrary
	case nv.ERROR_FUNCTION_NOT_FOUND:
		code = protocol.CodeNoSymbol
	case nv.ERROR_DRIVER_NOT_LOADED, nv.ERROR_LIB_RM_VERSION_MISMATCH:
		code = protocol.CodeNoDriver
	case nv.ERROR_NOT_SUPPORTED:
		code = protocol.CodeNotSupported
	case nv.ERROR_NO_PERMISSION:
		code = protocol.CodeNoPermission
	case nv.ERROR_GPU_IS_LOST, nv.ERROR_RESET_REQUIRED:
		code = protocol.CodeLost
	case nv.ERROR_NOT_FOUND:
		code = protocol.CodeNoGPU
	}
	return &failure{code, strconv.Itoa(int(r))}
}

func (l *library) count() (int, error) {
	if err := l.need("nvmlDeviceGetCount_v2"); err != nil {
		return 0, err
	}
	n, r := l.api.DeviceGetCount()
	if err := check(r); err != nil {
		return 0, err
	}
	if n < 0 || n > protocol.MaxGPUs {
		return 0, &failure{protocol.CodeTooMany, strconv.Itoa(n)}
	}
	return n, nil
}

func (l *library) device(index int) (nv.Device, error) {
	n, err := l.count()
	if err != nil {
		return nil, err
	}
	if index < 0 || index >= n {
		return nil, &failure{protocol.CodeNoGPU, strconv.Itoa(index)}
	}
	if err := l.need("nvmlDeviceGetHandleByIndex_v2"); err != nil {
		return nil, err
	}
	d, r := l.api.DeviceGetHandleByIndex(index)
	return d, check(r)
}

func (l *library) inventory() ([]protocol.GPU, error) {
	n, err := l.count()
	if err != nil {
		return nil, err
	}
	if err := l.need("nvmlSystemGetDriverVersion", "nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetName", "nvmlDeviceGetVbiosVersion"); err != nil {
		return nil, err
	}
	driver, r := l.api.SystemGetDriverVersion()
	if err := check(r); err != nil {
		return nil, err
	}
	var out []protocol.GPU
	for i := range n {
		d, err := l.device(i)
		if err != nil {
			return nil, err
		}
		g := protocol.GPU{Index: i, Driver: driver, Fabric: l.fabric(d), Links: l.links(d)}
		var returns [4]nv.Return
		var pci nv.PciInfo
		g.UUID, returns[0] = d.GetUUID()
		g.Name, returns[1] = d.GetName()
		g.VBIOS, returns[2] = d.GetVbiosVersion()
		pci, returns[3] = d.GetPciInfo()
		for _, r := range returns {
			if err := check(r); err != nil {
				return nil, err
			}
		}
		g.PCI = text(pci.BusId[:])
		// Only GPUs that can do confidential computing tell this.
		if l.need("nvmlDeviceGetConfComputeMemSizeInfo") == nil {
			if sizes, r := d.GetConfComputeMemSizeInfo(); r == nv.SUCCESS {
				g.Protected, g.Unprotected = sizes.ProtectedMemSizeKib, sizes.UnprotectedMemSizeKib
			}
		}
		out = append(out, g)
	}
	return out, nil
}

func text(in []int8) string {
	var out []byte
	for _, c := range in {
		if c == 0 {
			break
		}
		out = append(out, byte(c))
	}
	return string(out)
}

func (l *library) links(d nv.Device) int {
	if l.need("nvmlDeviceGetNvLinkState") != nil {
		return 0
	}
	active := 0
	for i := range nv.NVLINK_MAX_LINKS {
		if state, r := d.GetNvLinkState(i); r == nv.SUCCESS && state == nv.FEATURE_ENABLED {
			active++
		}
	}
	return active
}

func (l *library) fabric(d nv.Device) protocol.Fabric {
	if l.need("nvmlDeviceGetGpuFabricInfo") != nil {
		return protocol.FabricNone
	}
	info, r := d.GetGpuFabricInfo()
	if r != nv.SUCCESS {
		return protocol.FabricNone
	}
	switch info.State {
	case nv.GPU_FABRIC_STATE_NOT_STARTED:
		return protocol.FabricNotStarted
	case nv.GPU_FABRIC_STATE_IN_PROGRESS:
		return protocol.FabricInProgress
	case nv.GPU_FABRIC_STATE_COMPLETED:
		return protocol.FabricCompleted
	}
	return protocol.FabricNone
}

// Values of nvml.h, NVML_CC_*.
const (
	ccCapable       = 1
	ccOn            = 1
	devToolsOn      = 1
	environmentSim  = 1
	environmentProd = 2
	accepting       = 1
)

func (l *library) system() (*protocol.System, error) {
	if err := l.need("nvmlSystemGetConfComputeCapabilities", "nvmlSystemGetConfComputeState"); err != nil {
		return nil, err
	}
	capabilities, r := l.api.SystemGetConfComputeCapabilities()
	if r == nv.ERROR_NOT_SUPPORTED {
		// As on a GPU, or with a driver, that has no such mode: that is an answer.
		return &protocol.System{Environment: "unavailable", MultiGPU: protocol.MultiGPUNone}, nil
	}
	if err := check(r); err != nil {
		return nil, err
	}
	state, r := l.api.SystemGetConfComputeState()
	if err := check(r); err != nil {
		return nil, err
	}
	s := &protocol.System{
		Capable: capabilities.GpusCaps == ccCapable, CC: state.CcFeature == ccOn, DevTools: state.DevToolsMode == devToolsOn,
		Environment: "unavailable", MultiGPU: protocol.MultiGPUNone,
	}
	switch state.Environment {
	case environmentSim:
		s.Environment = "simulation"
	case environmentProd:
		s.Environment = "production"
	}
	if l.need("nvmlSystemGetConfComputeSettings") == nil {
		settings, r := l.api.SystemGetConfComputeSettings()
		if r != nv.ERROR_NOT_SUPPORTED {
			if err := check(r); err != nil {
				return nil, err
			}
			switch settings.MultiGpuMode {
			case 0:
			case 1:
				s.MultiGPU = protocol.MultiGPUProtectedPCIe
			case 2:
				s.MultiGPU = protocol.MultiGPUNVLE
			default:
				return nil, &failure{protocol.CodeBadAnswer, fmt.Sprintf("multi-GPU mode %d", settings.MultiGpuMode)}
			}
		}
	}
	if s.CC || s.MultiGPU != protocol.MultiGPUNone {
		if err := l.need("nvmlSystemGetConfComputeGpusReadyState"); err != nil {
			return nil, err
		}
		ready, r := l.api.SystemGetConfComputeGpusReadyState()
		if err := check(r); err != nil {
			return nil, err
		}
		s.Ready = ready == accepting
	}
	return s, nil
}

func (l *library) attest(index int, nonce [protocol.NonceSize]byte) (*protocol.Proof, error) {
	d, err := l.device(index)
	if err != nil {
		return nil, err
	}
	if err := l.need("nvmlDeviceGetConfComputeGpuAttestationReport", "nvmlDeviceGetConfComputeGpuCertificate"); err != nil {
		return nil, err
	}
	report := nv.ConfComputeGpuAttestationReport{Nonce: nonce}
	if err := check(d.GetConfComputeGpuAttestationReport(&report)); err != nil {
		return nil, err
	}
	chain, r := d.GetConfComputeGpuCertificate()
	if err := check(r); err != nil {
		return nil, err
	}
	n, m := int(report.AttestationReportSize), int(chain.AttestationCertChainSize)
	if n < 1 || n > len(report.AttestationReport) || m < 1 || m > len(chain.AttestationCertChain) {
		return nil, &failure{protocol.CodeBadAnswer, fmt.Sprintf("sizes %d and %d", n, m)}
	}
	return &protocol.Proof{Report: report.AttestationReport[:n], Chain: chain.AttestationCertChain[:m]}, nil
}

func (l *library) health(index int) (*protocol.Health, error) {
	d, err := l.device(index)
	if err != nil {
		return nil, err
	}
	if err := l.need("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetUUID"); err != nil {
		return nil, err
	}
	// Any call tells that a GPU is lost; this one needs no memory of it.
	if _, r := d.GetUUID(); r != nv.SUCCESS {
		return nil, check(r)
	}
	errors, r := d.GetTotalEccErrors(nv.MEMORY_ERROR_TYPE_UNCORRECTED, nv.VOLATILE_ECC)
	if r == nv.ERROR_NOT_SUPPORTED {
		return &protocol.Health{}, nil // without ECC there is no count
	}
	if err := check(r); err != nil {
		return nil, err
	}
	return &protocol.Health{Uncorrectable: errors}, nil
}

func (l *library) setReady(ready bool) error {
	if err := l.need("nvmlSystemSetConfComputeGpusReadyState"); err != nil {
		return err
	}
	value := uint32(0)
	if ready {
		value = accepting
	}
	return check(l.api.SystemSetConfComputeGpusReadyState(value))
}
