package fetch_test

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/fetch"
	"chrysalis/attest/nvidia/nvidiatest"
)

// services stands in for NVIDIA's.
func services(t *testing.T, v *nvidiatest.Vendor, gpus ...*nvidiatest.GPU) (s fetch.Services, fetched *atomic.Int64) {
	fetched = new(atomic.Int64)
	known := []*nvidiatest.Certificate{v.Identity, v.Provisioner, v.RIMAuthority, v.RIML3, v.Signer}
	for _, g := range gpus {
		known = append(known, g.Device)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /rim/{id}", func(w http.ResponseWriter, r *http.Request) {
		fetched.Add(1)
		rims := map[string][]byte{"NV_GPU_DRIVER_GH100_" + nvidiatest.Driver: v.DriverRIM(), "NV_GPU_VBIOS_1010_0200_882_9600AA0001": v.VBIOSRIM()}
		data := rims[r.PathValue("id")]
		if data == nil {
			http.NotFound(w, r)
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"id": r.PathValue("id"), "rim": base64.StdEncoding.EncodeToString(data)})
	})
	mux.HandleFunc("POST /ocsp", func(w http.ResponseWriter, r *http.Request) {
		data, _ := io.ReadAll(r.Body)
		request, err := ocsp.ParseRequest(data)
		if err != nil {
			t.Error(err)
		}
		for _, c := range known {
			if c.SerialNumber.Cmp(request.SerialNumber) == 0 {
				w.Write(nvidiatest.OCSP(c, ocsp.Good, nvidiatest.Now))
				return
			}
		}
		http.NotFound(w, r)
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return fetch.Services{Now: func() time.Time { return nvidiatest.Now }, RIM: server.URL + "/rim/", OCSP: server.URL + "/ocsp", Roots: v.Roots()}, fetched
}

func TestCollateral(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	nonce := [32]byte{1}
	gpus := []*nvidiatest.GPU{vendor.NewGPU(), vendor.NewGPU()}
	e := &nvidia.Evidence{Version: nvidia.Version}
	for _, g := range gpus {
		e.GPUs = append(e.GPUs, g.Evidence(nonce))
	}
	s, fetched := services(t, vendor, gpus...)
	quiet := func(string) {}
	c, err := s.Collateral(t.Context(), e, nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.RIMs) != 2 || len(c.OCSP) != 7 || fetched.Load() != 2 {
		t.Errorf("%d RIMs, %d answers, %d RIMs fetched", len(c.RIMs), len(c.OCSP), fetched.Load())
	}
	// It is all that a client needs.
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	v := nvidia.NewVerifier(vendor.Roots())
	if err := v.AddCollateral(c); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(data, nvidia.Policy{Nonce: nonce, GPUs: 2, Models: []string{nvidiatest.Model}, Time: nvidiatest.Now, MaxOCSPAge: time.Hour}); err != nil {
		t.Error(err)
	}
	// RIMs that are there are not fetched again.
	if _, err := s.Collateral(t.Context(), e, c, quiet); err != nil || fetched.Load() != 2 {
		t.Errorf("%v, %d RIMs fetched", err, fetched.Load())
	}
	// Unless they have expired.
	s.Now = func() time.Time { return nvidiatest.Now.AddDate(2, 0, 0) }
	if _, err := s.Collateral(t.Context(), e, c, nil); err != nil || fetched.Load() != 4 {
		t.Errorf("%v, %d RIMs fetched", err, fetched.Load())
	}
}

// A VM that lacks a RIM says its name, and that is enough to fetch it.
func TestRIMs(t *testing.T) {
	vendor := nvidiatest.NewVendor()
	g := vendor.NewGPU()
	s, fetched := services(t, vendor, g)
	_, vbios, err := nvidia.RIMIDs(new(g.Evidence([32]byte{})))
	if err != nil {
		t.Fatal(err)
	}
	quiet := func(string) {}
	c, err := s.RIMs(t.Context(), []string{vbios}, &nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{vendor.DriverRIM()}}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	// Three signed it, and the other is kept.
	if len(c.RIMs) != 2 || len(c.OCSP) != 3 || fetched.Load() != 1 {
		t.Errorf("%d RIMs, %d answers, %d RIMs fetched", len(c.RIMs), len(c.OCSP), fetched.Load())
	}
	for _, name := range []string{"", "NV_GPU_VBIOS_", "../x", "NV_GPU_VBIOS_x", vbios + "/"} {
		if _, err := s.RIMs(t.Context(), []string{name}, nil, quiet); err == nil {
			t.Errorf("asked for %q", name)
		}
	}
}

func TestCollateralRefused(t *testing.T) {
	vendor, other := nvidiatest.NewVendor(), nvidiatest.NewVendor()
	g := vendor.NewGPU()
	e := &nvidia.Evidence{Version: nvidia.Version, GPUs: []nvidia.GPU{g.Evidence([32]byte{})}}
	for name, test := range map[string]struct {
		s    func() fetch.Services
		text string
	}{
		"of somebody else":                   {func() fetch.Services { s, _ := services(t, vendor, g); s.Roots = other.Roots(); return s }, "not a trusted root"},
		"RIMs of another":                    {func() fetch.Services { s, _ := services(t, other, g); s.Roots = vendor.Roots(); return s }, "not a trusted root"},
		"an unknown GPU":                     {func() fetch.Services { s, _ := services(t, vendor); return s }, "404"},
		"an endless answer":                  {func() fetch.Services { s, _ := services(t, vendor, g); s.RIM = endless(t); return s }, "more than"},
		"not JSON":                           {func() fetch.Services { s, _ := services(t, vendor, g); s.RIM = says(t, "x"); return s }, "not JSON"},
		"no RIM":                             {func() fetch.Services { s, _ := services(t, vendor, g); s.RIM = says(t, "{}"); return s }, "no RIM"},
		"an answer that is no OCSP response": {func() fetch.Services { s, _ := services(t, vendor, g); s.OCSP = says(t, "x"); return s }, "OCSP response 0"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := test.s().Collateral(t.Context(), e, nil, func(string) {})
			if err == nil || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v, expected %q", err, test.text)
			}
		})
	}
}

func says(t *testing.T, text string) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) }))
	t.Cleanup(server.Close)
	return server.URL + "/"
}

func endless(t *testing.T) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat(" ", 1<<16)); err != nil {
				return
			}
		}
	}))
	t.Cleanup(server.Close)
	return server.URL + "/"
}
