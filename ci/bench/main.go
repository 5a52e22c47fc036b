// Command bench measures what docs/performance.md states, on this machine, and
// prints it as a table. 'make bench' runs it after it has built the artefacts.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// As in agent/bench.go. An emulated processor translates code as it first meets
// it, so the first runs do not count.
const runs, warmUp = 11, 5

// body is what agent/bench.go asks inside the VM, as a client writes it.
const body = `{"model":"chrysalis/demo","stream":true,"temperature":0,"max_tokens":64,` +
	`"messages":[{"role":"user","content":"Who can read my prompt?"}]}`

// accel is the accelerator of the VMs that are measured. Emulation is what every
// machine can do.
var accel = flag.String("accel", "tcg", "the accelerator of the VMs: tcg or kvm")

// part is one thing to measure.
type part struct {
	name    string
	measure func() error
}

// parts are what is measured, in this order.
var parts = []part{
	{"sizes", sizes},
	{"boot", func() error { return withHost(host.boot) }},
	{"overhead", func() error { return withHost(host.overhead) }},
	{"prefetch", func() error { return withHost(host.prefetch) }},
	{"disks", disks},
	{"attest", attestation},
	{"gpu", gpus},
	{"ton", ton},
	{"channels", channels},
	{"measure", prediction},
	{"demo", cleanDemo},
	{"builds", builds},
}

func main() {
	if os.Getenv(predictTen) != "" {
		if err := predict(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var names []string
	for _, part := range parts {
		names = append(names, part.name)
	}
	only := flag.String("only", strings.Join(names, ","), "the parts to measure")
	flag.Parse()
	if err := run(strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures the parts of these names.
func run(wanted []string) error {
	for _, name := range wanted {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return fmt.Errorf("there is no part %q", name)
		}
	}
	fmt.Printf("%s, %d processors, %s\n\n", cpu(), runtime.NumCPU(), time.Now().UTC().Format(time.DateOnly))
	fmt.Println("| what | measured | limit | |")
	fmt.Println("|---|---|---|---|")
	for _, part := range parts {
		if !slices.Contains(wanted, part.name) {
			continue
		}
		if err := part.measure(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

// row prints a figure beside its limit, and says whether it holds.
func row(what, unit string, value, limit float64, atMost bool) {
	verdict := "holds"
	if atMost && value > limit || !atMost && value < limit {
		verdict = "MISSED"
	}
	sign := "≤"
	if !atMost {
		sign = "≥"
	}
	fmt.Printf("| %s | %s %s | %s %s %s | %s |\n", what, number(value), unit, sign, number(limit), unit, verdict)
}

func figure(what, unit string, value float64) {
	fmt.Printf("| %s | %s %s | | |\n", what, number(value), unit)
}

func number(v float64) string {
	if v >= 100 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	if v > 0 && v < 0.1 {
		return strconv.FormatFloat(v, 'f', 5, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

func sizes() error {
	for _, a := range []struct {
		what, path string
		limit      float64
	}{
		{"UKI", "out/chrysalis.efi", 25}, {"engine disk, llama.cpp", "out/llama.cpp.disk", 0}, {"demo model's disk", "out/demo.disk", 0},
	} {
		info, err := os.Stat(a.path)
		if err != nil {
			return fmt.Errorf("%w; run 'make image' first", err)
		}
		if mb := float64(info.Size()) / 1e6; a.limit > 0 {
			row(a.what, "MB", mb, a.limit, true)
		} else {
			figure(a.what, "MB", mb)
		}
	}
	return nil
}

// withHost gives a measurement a host of its own.
func withHost(measure func(host) error) error {
	state, err := os.MkdirTemp("", "chrysalis-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	h := host{state}
	defer h.run("down", "--all", "--now")
	return measure(h)
}

// host runs the CLI with a state of its own.
type host struct{ state string }

func (h host) run(args ...string) (string, error) {
	cmd := exec.Command("bin/chrysalis", args...)
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+h.state)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("chrysalis %s: %w: %s", args[0], err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func (h host) up(name, image string) (string, error) {
	return h.run("up", name, "--accel", *accel, "--listen", "127.0.0.1:0", "--image", image,
		"--engine", "out/llama.cpp.disk", "--model", "out/demo.disk")
}

// boot boots the published image and asks once.
func (h host) boot() error {
	const times = 5
	var kernel, agent, total, rss []float64
	for range times {
		begin := time.Now()
		endpoint, err := h.up("boot", "out/chrysalis.efi")
		if err != nil {
			return err
		}
		first, _, err := ask(newClient(), endpoint)
		if err != nil {
			return err
		}
		total = append(total, first.firstAt.Sub(begin).Seconds())
		status, err := h.status("boot")
		if err != nil {
			return err
		}
		kernel = append(kernel, float64(status.KernelMS)/1000)
		var ms float64
		for _, p := range status.Phases {
			if p.Name == "engine" {
				break
			}
			ms += float64(p.MS)
		}
		agent = append(agent, ms/1000)
		rss = append(rss, float64(status.Counters.RSS)*1024/1e6)
		if _, err := h.run("down", "boot", "--now"); err != nil {
			return err
		}
	}
	row("agent's resident memory when serving", "MB", slices.Max(rss), 30, true)
	figure("kernel time at PID 1's first instruction, "+strings.ToUpper(*accel)+", 2 vCPUs, median of 5", "s", median(kernel))
	row("agent, from there to the engine's start, median of 5", "s", median(agent), 1.5, true)
	row("from `up` to the first token, median of 5", "s", median(total), 40, true)
	return nil
}

// overhead compares the engine's own socket, measured by the bench image's
// agent inside the VM, with what a client outside sees of the same VM.
func (h host) overhead() error {
	endpoint, err := h.up("bench", "out/chrysalis-bench.efi")
	if err != nil {
		return err
	}
	console, err := h.run("logs", "bench", "--console")
	if err != nil {
		return err
	}
	m := regexp.MustCompile(`bench first_event_ms=([0-9.]+) events_per_s=([0-9.]+)`).FindStringSubmatch(console)
	if m == nil {
		return errors.New("the bench image printed no figures")
	}
	insideFirst, _ := strconv.ParseFloat(m[1], 64)
	insideRate, _ := strconv.ParseFloat(m[2], 64)

	client := newClient()
	var firsts, rates, colds []float64
	for i := range runs + warmUp {
		a, rate, err := ask(client, endpoint)
		if err != nil {
			return err
		}
		cold, _, err := ask(newClient(), endpoint)
		if err != nil {
			return err
		}
		if i >= warmUp {
			firsts, rates, colds = append(firsts, a.ms), append(rates, rate), append(colds, cold.ms)
		}
	}
	figure("first event on the engine's own socket, inside the VM, median of 11", "ms", insideFirst)
	figure("the same through relay, vsock, TLS and agent, warm connection", "ms", median(firsts))
	figure("ratio", "", median(firsts)/insideFirst)
	figure("the same with a new connection for each request", "ms", median(colds))
	figure("ratio", "", median(colds)/insideFirst)
	figure("tokens a second on the engine's own socket", "/s", insideRate)
	figure("the same through relay, vsock, TLS and agent", "/s", median(rates))
	figure("ratio", "", median(rates)/insideRate)
	_, err = h.run("down", "bench", "--now")
	return err
}

// cleanDemo times 'make demo' in a clean clone with empty caches, twice.
func cleanDemo() error {
	dir, err := os.MkdirTemp("", "chrysalis-clean-")
	if err != nil {
		return err
	}
	defer exec.Command("rm", "-rf", dir).Run()
	clone := filepath.Join(dir, "chrysalis")
	if out, err := exec.Command("git", "clone", "-q", ".", clone).CombinedOutput(); err != nil {
		return fmt.Errorf("git clone: %w: %s", err, out)
	}
	for _, d := range []struct {
		what  string
		limit float64
	}{{"`make demo`, clean clone and empty cache", 600}, {"`make demo` again", 90}} {
		cmd := exec.Command("make", "demo")
		cmd.Dir = clone
		cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+filepath.Join(dir, "cache"), "XDG_STATE_HOME="+filepath.Join(dir, "state"),
			"GOCACHE="+filepath.Join(dir, "go-build"), "GOMODCACHE="+filepath.Join(dir, "go-mod"), "GOFLAGS=-modcacherw")
		begin := time.Now()
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("make demo: %w\n%s", err, out)
		}
		row(d.what, "s", time.Since(begin).Seconds(), d.limit, true)
	}
	return nil
}

type status struct {
	KernelMS int64 `json:"kernel_ms"`
	Phases   []struct {
		Name string `json:"name"`
		MS   int64  `json:"ms"`
	} `json:"phases"`
	Counters struct {
		RSS int64 `json:"agent_rss_kib"`
	} `json:"counters"`
}

func (h host) status(name string) (status, error) {
	out, err := h.run("status", name, "--json")
	if err != nil {
		return status{}, err
	}
	var vms []struct{ Guest status }
	if err := json.Unmarshal([]byte(out), &vms); err != nil || len(vms) != 1 {
		return status{}, fmt.Errorf("status: %v: %s", err, out)
	}
	return vms[0].Guest, nil
}

func newClient() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// answer is when the first event of a stream came.
type answer struct {
	firstAt time.Time
	ms      float64 // after the request was sent
}

// ask streams one answer and returns when its first event came and how many
// came a second from then on.
func ask(client *http.Client, endpoint string) (answer, float64, error) {
	begin := time.Now()
	resp, err := client.Post(endpoint+"/v1/chat/completions", "application/json", strings.NewReader(body))
	if err != nil {
		return answer{}, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return answer{}, 0, errors.New(resp.Status)
	}
	var first, last time.Time
	events := 0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if !strings.HasPrefix(lines.Text(), "data: {") {
			continue
		}
		last = time.Now()
		if events == 0 {
			first = last
		}
		events++
	}
	if events < 2 {
		return answer{}, 0, fmt.Errorf("%d events", events)
	}
	return answer{first, float64(first.Sub(begin).Microseconds()) / 1000}, float64(events-1) / last.Sub(first).Seconds(), nil
}

func median(v []float64) float64 {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

func cpu() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}
