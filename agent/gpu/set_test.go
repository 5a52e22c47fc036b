package gpu_test

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"testing"
	"time"

	"chrysalis/agent/gpu"
	"chrysalis/agent/gpu/fakenvml"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/guest"
)

func verifier(t *testing.T, v *nvidiatest.Vendor, rims ...[]byte) *nvidia.Verifier {
	t.Helper()
	c := &nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{}, OCSP: []evidence.Bytes{}}
	for _, r := range rims {
		c.RIMs = append(c.RIMs, r)
	}
	out := nvidia.NewVerifier(v.Roots())
	if err := out.AddCollateral(c); err != nil {
		t.Fatal(err)
	}
	return out
}

func wantReason(t *testing.T, err error, reason guest.Reason) {
	t.Helper()
	r, ok := errors.AsType[*gpu.Refusal](err)
	if !ok || r.Reason != reason {
		t.Errorf("got %v, expected the reason %s", err, reason)
	} else {
		t.Logf("%s: %v", r.Reason, err)
	}
}

var models = []string{nvidiatest.Model}

// The whole of what the phase does, with the real helper.
func TestSet(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	for _, n := range []int{1, 2, 8} {
		var gpus []*nvidiatest.GPU
		for range n {
			gpus = append(gpus, vendor.NewGPU())
		}
		c, dir := fake(t, nil, gpus...)
		s, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, vendor.DriverRIM(), vendor.VBIOSRIM()), n, models)
		if err != nil {
			t.Fatal(err)
		}
		if system, err := c.System(t.Context()); err != nil || system.Ready {
			t.Errorf("the GPUs take work before they are let: %+v, %v", system, err)
		}
		if err := s.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		if system, err := c.System(t.Context()); err != nil || !system.Ready {
			t.Errorf("the GPUs take no work: %+v, %v", system, err)
		}
		if len(s.Identities()) != n {
			t.Fatalf("%d identities of %d GPUs", len(s.Identities()), n)
		}
		data, err := s.Prove(t.Context(), nonce)
		if err != nil {
			t.Fatal(err)
		}
		// A client, with its clock, sees the GPUs that were measured.
		client := nvidia.NewVerifier(vendor.Roots())
		if err := client.AddCollateral(vendor.Collateral(gpus...)); err != nil {
			t.Fatal(err)
		}
		p := nvidia.Policy{Nonce: nonce, GPUs: n, Models: models, Time: nvidiatest.Now, MaxOCSPAge: 24 * time.Hour, Identities: s.Identities()}
		if _, err := client.Verify(data, p); err != nil {
			t.Error(err)
		}

		// Another GPU of the same kind takes the first one's place.
		gpus[0] = vendor.NewGPU()
		if err := fakenvml.Write(dir, nil, gpus...); err != nil {
			t.Fatal(err)
		}
		_, err = s.Prove(t.Context(), nonce)
		wantReason(t, err, guest.ReasonGPUChanged)
	}
}

// What is wrong before the GPUs have worked.
func TestSetRefuses(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	stranger := nvidiatest.NewVendor()
	changed := func(change func(*nvidiatest.GPU)) *nvidiatest.GPU {
		g := vendor.NewGPU()
		change(g)
		return g
	}
	good := vendor.NewGPU()
	both := [][]byte{vendor.DriverRIM(), vendor.VBIOSRIM()}
	for _, test := range []struct {
		name   string
		script fakenvml.Script
		gpus   []*nvidiatest.GPU
		rims   [][]byte
		models []string
		reason guest.Reason
	}{
		{name: "two of one", gpus: []*nvidiatest.GPU{good, vendor.NewGPU()}, reason: guest.ReasonGPUCount},
		{name: "none", script: fakenvml.Script{"count": "0"}, reason: guest.ReasonGPUCount},
		{name: "too many", script: fakenvml.Script{"count": "17"}, reason: guest.ReasonGPUCount},
		{name: "another model", models: []string{"NVIDIA H100 PCIe"}, reason: guest.ReasonGPUModel},
		{name: "no driver", script: fakenvml.Script{"error.nvmlInit_v2": "9"}, reason: guest.ReasonGPUDriver},
		{name: "CC off", script: fakenvml.Script{"cc": "0"}, reason: guest.ReasonGPUMode},
		{name: "not capable", script: fakenvml.Script{"capable": "0"}, reason: guest.ReasonGPUMode},
		{name: "a simulation", script: fakenvml.Script{"environment": "1"}, reason: guest.ReasonGPUMode},
		{name: "protected PCIe", script: fakenvml.Script{"multigpu": "1"}, reason: guest.ReasonGPUMode},
		{name: "devtools", script: fakenvml.Script{"devtools": "1"}, reason: guest.ReasonGPUDevTools},
		{name: "ready before", script: fakenvml.Script{"ready": "1"}, reason: guest.ReasonGPUReady},
		{name: "lost", script: fakenvml.Script{"error.nvmlDeviceGetTotalEccErrors": "15"}, reason: guest.ReasonGPULost},
		{name: "memory errors", script: fakenvml.Script{"ecc": "1"}, reason: guest.ReasonGPULost},
		{name: "no report", script: fakenvml.Script{"error.nvmlDeviceGetConfComputeGpuAttestationReport": "999"}, reason: guest.ReasonGPUDriver},
		{name: "a report of no size", script: fakenvml.Script{"reportsize": "0"}, reason: guest.ReasonGPUAttestation},
		{name: "a report cut off", script: fakenvml.Script{"reportsize": "1000"}, reason: guest.ReasonGPUAttestation},
		{name: "a chain cut off", script: fakenvml.Script{"chainsize": "100"}, reason: guest.ReasonGPUAttestation},
		{name: "a stranger's GPU", gpus: []*nvidiatest.GPU{stranger.NewGPU()}, reason: guest.ReasonGPUAttestation},
		{name: "another measurement", gpus: []*nvidiatest.GPU{changed(func(g *nvidiatest.GPU) { g.Measurements[23] = nvidiatest.Measurement(24) })}, reason: guest.ReasonGPUAttestation},
		{name: "other firmware", gpus: []*nvidiatest.GPU{changed(func(g *nvidiatest.GPU) { g.Set(nvidia.FieldFWID, make([]byte, 48)) })}, reason: guest.ReasonGPUAttestation},
		{name: "no VBIOS RIM", rims: both[:1], reason: guest.ReasonGPUCollateral},
		{name: "no driver RIM", rims: both[1:], reason: guest.ReasonGPUCollateral},
		{name: "a crash", script: fakenvml.Script{"crash.nvmlDeviceGetConfComputeGpuCertificate": "1"}, reason: guest.ReasonGPUHelper},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.gpus == nil {
				test.gpus = []*nvidiatest.GPU{good}
			}
			if test.rims == nil {
				test.rims = both
			}
			if test.models == nil {
				test.models = models
			}
			c, _ := fake(t, test.script, test.gpus...)
			_, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, test.rims...), 1, test.models)
			wantReason(t, err, test.reason)
			// What is missing is named, as NVIDIA does.
			want := map[string][]string{
				"no VBIOS RIM":  {"NV_GPU_VBIOS_1010_0200_882_9600AA0001"},
				"no driver RIM": {"NV_GPU_DRIVER_GH100_999.10.01"},
			}[test.name]
			if r, ok := errors.AsType[*gpu.Refusal](err); ok && !slices.Equal(r.RIMs, want) {
				t.Errorf("RIMs %q, expected %q", r.RIMs, want)
			}
		})
	}
	t.Run("one GPU twice", func(t *testing.T) {
		c, _ := fake(t, nil, good, good)
		_, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, both...), 2, models)
		wantReason(t, err, guest.ReasonGPUAttestation)
	})
	t.Run("seven of eight", func(t *testing.T) {
		c, _ := fake(t, nil, good, vendor.NewGPU(), vendor.NewGPU(), vendor.NewGPU(), vendor.NewGPU(), vendor.NewGPU(), vendor.NewGPU())
		_, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, both...), 8, models)
		wantReason(t, err, guest.ReasonGPUCount)
	})
	for name, script := range map[string]string{"garbage": "echo garbage; exec sleep 60", "a gigabyte": "head -c 1073741824 /dev/zero", "silence": "exec sleep 60", "death": "exit 3"} {
		t.Run(name, func(t *testing.T) {
			c := client(t, exec.Command("sh", "-c", script), time.Second)
			_, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, both...), 1, models)
			wantReason(t, err, guest.ReasonGPUHelper)
		})
	}
}

// What goes wrong while the GPUs work ends the watch.
func TestWatch(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	g := vendor.NewGPU()
	for _, test := range []struct {
		name   string
		script fakenvml.Script
		gpu    *nvidiatest.GPU
		reason guest.Reason
	}{
		{"fallen off the bus", fakenvml.Script{"error.nvmlDeviceGetTotalEccErrors": "15"}, g, guest.ReasonGPULost},
		{"a memory error", fakenvml.Script{"ecc": "1"}, g, guest.ReasonGPULost},
		{"CC off", fakenvml.Script{"cc": "0"}, g, guest.ReasonGPUMode},
		{"devtools", fakenvml.Script{"devtools": "1"}, g, guest.ReasonGPUDevTools},
		{"gone from the list", fakenvml.Script{"count": "0"}, g, guest.ReasonGPUCount},
		{"other firmware", nil, nil, guest.ReasonGPUAttestation},
		{"a crash", fakenvml.Script{"crash.nvmlDeviceGetUUID": "1"}, g, guest.ReasonGPUHelper},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, dir := fake(t, nil, g)
			s, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, vendor.DriverRIM(), vendor.VBIOSRIM()), 1, models)
			if err == nil {
				err = s.Release(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
			defer stop()
			ended := make(chan error, 1)
			go func() { ended <- s.Watch(ctx, 50*time.Millisecond, 120*time.Millisecond) }()
			select {
			case err := <-ended:
				t.Fatalf("ended while nothing was wrong: %v", err)
			case <-time.After(400 * time.Millisecond):
			}
			other := test.gpu
			if other == nil { // the same GPU with a measurement changed
				same := *g
				same.Measurements = append([][]byte{}, g.Measurements...)
				same.Measurements[7] = make([]byte, 48)
				other = &same
			}
			if err := fakenvml.Write(dir, test.script, other); err != nil {
				t.Fatal(err)
			}
			wantReason(t, <-ended, test.reason)
		})
	}
	t.Run("the end", func(t *testing.T) {
		c, _ := fake(t, nil, g)
		s, err := gpu.NewSet(t.Context(), c, verifier(t, vendor, vendor.DriverRIM(), vendor.VBIOSRIM()), 1, models)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		stop()
		if err := s.Watch(ctx, time.Hour, time.Hour); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestMerge(t *testing.T) {
	one := &nvidia.Collateral{Version: 1, RIMs: []evidence.Bytes{[]byte("a"), []byte("b")}, OCSP: []evidence.Bytes{}}
	two := &nvidia.Collateral{Version: 1, RIMs: []evidence.Bytes{[]byte("b"), []byte("c")}, OCSP: []evidence.Bytes{[]byte("d"), []byte("d")}}
	m := gpu.Merge(one, two)
	if len(m.RIMs) != 3 || len(m.OCSP) != 1 || len(one.RIMs) != 2 {
		t.Errorf("%d RIMs, %d answers", len(m.RIMs), len(m.OCSP))
	}
	if _, err := m.Encode(); err != nil {
		t.Error(err)
	}
}
