package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/measure/record"
	"chrysalis/proxy"
)

// attestation measures what verification costs, and what the proxy adds to a
// request. The evidence is forged but has every part, and logs as long as a real
// machine's.
func attestation() error {
	if err := verification(); err != nil {
		return err
	}
	return proxied()
}

func verification() error {
	for _, platform := range []record.Platform{record.TDX, record.TPM} {
		vm := attesttest.NewVM(platform)
		for range 80 {
			vm.Firmware = append(vm.Firmware, attesttest.Measured{Register: 1, Data: make([]byte, 500)})
		}
		vm.Measure()
		nonce := make([]byte, evidence.NonceSize)
		rand.Read(nonce)
		document := vm.Evidence(nonce)
		in := attest.Input{Policy: vm.Policy(), Records: []*record.File{vm.Record()}, Nonce: nonce, TLSKey: vm.SPKI}
		if vm.Intel != nil {
			in.Collateral = vm.Intel.Collateral()
		}
		const times = 300
		steps := map[attest.Name][]time.Duration{}
		var all time.Duration
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		begin := processorTime(syscall.RUSAGE_SELF)
		for range times {
			v := attest.Verify(context.Background(), document, in)
			if !v.OK {
				return v.Err()
			}
			for _, c := range v.Checks {
				steps[c.Name] = append(steps[c.Name], c.Took)
				all += c.Took
			}
		}
		spent := processorTime(syscall.RUSAGE_SELF) - begin
		runtime.ReadMemStats(&after)
		name := strings.ToUpper(string(platform))
		ms := spent.Seconds() * 1000 / times
		mb := float64(after.TotalAlloc-before.TotalAlloc) / times / 1e6
		if platform == record.TDX {
			row(fmt.Sprintf("verification of %s evidence, %d KB, collateral at hand: processor time", name, len(document)/1000), "ms", ms, 5, true)
			row("the same: memory allocated", "MB", mb, 2, true)
			row("the same: verifications a second and core", "/s", 1000/ms, 200, false)
		} else {
			figure(fmt.Sprintf("verification of %s evidence, %d KB: processor time", name, len(document)/1000), "ms", ms)
			figure("the same: memory allocated", "MB", mb)
		}
		// The median of each step, as a share of their sum.
		var sum time.Duration
		share := map[attest.Name]time.Duration{}
		for step, took := range steps {
			slices.Sort(took)
			share[step] = took[len(took)/2]
			sum += share[step]
		}
		order := slices.SortedFunc(maps.Keys(share), func(a, b attest.Name) int { return int(share[b] - share[a]) })
		for _, step := range order[:5] {
			figure(fmt.Sprintf("the same: share of the check `%s`", step), "%", 100*share[step].Seconds()/sum.Seconds())
		}
	}
	return nil
}

// proxied compares the same client with and without the proxy, in turn.
func proxied() error {
	vm := attesttest.NewVM(record.TDX)
	worker := attesttest.Serve(vm)
	defer worker.Close()
	const events, tick = 50, 10 * time.Millisecond
	event := []byte("data: " + strings.Repeat("x", 248) + "\n\n")
	worker.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/v1/models" {
			io.WriteString(w, `{"object":"list","data":[]}`)
			return
		}
		// A stream as a VM pads it.
		w.Header().Set("Content-Type", "text/event-stream")
		next := time.NewTicker(tick)
		defer next.Stop()
		for range events {
			<-next.C
			w.Write(event)
			http.NewResponseController(w).Flush()
		}
	})
	direct := vm.Transport()
	defer direct.CloseIdleConnections()
	p, err := proxy.New(proxy.Options{Workers: []string{worker.URL}, Policy: direct.Policy, Records: direct.Records, Collateral: direct.Collateral, Loopback: true})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready := make(chan struct{})
	go p.Run(ctx, func() { close(ready) })
	<-ready
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: p}
	go server.Serve(listener)
	defer server.Close()
	ways := []struct {
		client *http.Client
		base   string
	}{
		{&http.Client{Transport: direct}, worker.URL},
		{&http.Client{Transport: &http.Transport{}}, "http://" + listener.Addr().String()},
	}
	once := func(way int, method, path string) (time.Duration, error) {
		begin := time.Now()
		request, err := http.NewRequest(method, ways[way].base+path, strings.NewReader(body))
		if err != nil {
			return 0, err
		}
		answer, err := ways[way].client.Do(request)
		if err != nil {
			return 0, err
		}
		defer answer.Body.Close()
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			return 0, err
		}
		if answer.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("%s answered %d", path, answer.StatusCode)
		}
		return time.Since(begin), nil
	}
	compare := func(method, path string, times int) (medians [2]time.Duration, err error) {
		var took [2][]time.Duration
		for i := range times + times/10 {
			for way := range ways {
				d, err := once(way, method, path)
				if err != nil {
					return medians, err
				}
				if i >= times/10 { // warm
					took[way] = append(took[way], d)
				}
			}
		}
		for way := range ways {
			slices.Sort(took[way])
			medians[way] = took[way][len(took[way])/2]
		}
		return medians, nil
	}
	m, err := compare(http.MethodGet, "/v1/models", 2000)
	if err != nil {
		return err
	}
	figure("a short request of a verifying client, warm connection, median of 2000", "ms", m[0].Seconds()*1000)
	row("what `chrysalis proxy` adds to it", "ms", (m[1]-m[0]).Seconds()*1000, 0.3, true)
	if m, err = compare(http.MethodPost, "/v1/chat/completions", 40); err != nil {
		return err
	}
	rate := func(d time.Duration) float64 { return events / d.Seconds() }
	figure(fmt.Sprintf("a stream of an event every %d ms, verifying client", tick.Milliseconds()), "/s", rate(m[0]))
	row("what of it is lost through `chrysalis proxy`", "%", max(0, 100*(1-rate(m[1])/rate(m[0]))), 1, true)
	return nil
}
