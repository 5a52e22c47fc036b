// Command soak puts load on the parts of a VM, each in a process of its own on this
// machine: relay, the agent's API server with TLS, and an engine that streams. What
// it measures is what the parts take; the VM under load is a test in ci/vmtest.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"chrysalis/agent/api"
	"chrysalis/agent/port"
	"chrysalis/attest/evidence"
	"chrysalis/ci/load"
	"chrysalis/guest"
	"chrysalis/launcher"
	"chrysalis/manifest"
	"chrysalis/outfile"
)

func main() {
	c := load.Config{Model: model, Pause: 500 * time.Millisecond, Events: 20}
	role := flag.String("role", "", "run one of the parts: agent, relay, engine")
	dir := flag.String("dir", "", "where the parts meet")
	attacks := flag.Bool("attacks", true, "attack as well")
	flag.IntVar(&c.Idle, "idle", 1000, "clients that keep a connection and ask little")
	flag.IntVar(&c.Active, "active", 200, "streams at a time")
	flag.DurationVar(&c.For, "for", 10*time.Minute, "how long")
	flag.Parse()
	c.Greedy = c.Active / 4
	var err error
	switch *role {
	case "":
		err = run(c, *attacks)
	case "engine":
		err = engine(*dir)
	case "agent":
		err = agent(*dir, c.Active)
	case "relay":
		err = relay(*dir)
	default:
		err = fmt.Errorf("there is no part %q", *role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

const model = "chrysalis/demo"

// tokens are those of ten modest clients and of a greedy one.
func tokens() (list []string) {
	for i := range 11 {
		list = append(list, fmt.Sprintf("sk-soak-%02d-0123456789abcdef0123456789", i))
	}
	return list
}

// run starts the parts, and puts the load on.
func run(c load.Config, attacks bool) error {
	dir, err := os.MkdirTemp("", "chrysalis-soak-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var pids []int
	for _, role := range []string{"engine", "agent", "relay"} {
		part := exec.Command(self, "-role", role, "-dir", dir, "-active", fmt.Sprint(c.Active))
		part.Stdout, part.Stderr = os.Stdout, os.Stderr
		if err := part.Start(); err != nil {
			return err
		}
		defer func() { part.Process.Kill(); part.Wait() }()
		pids = append(pids, part.Process.Pid)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if _, err := os.Stat(filepath.Join(dir, role)); err == nil {
				break
			} else if time.Now().After(end) {
				return fmt.Errorf("the %s did not start", role)
			}
		}
	}
	address, err := os.ReadFile(filepath.Join(dir, "relay"))
	if err != nil {
		return err
	}
	c.Address, c.Tokens = string(address), tokens()
	c.Sample = func() (load.Sample, error) { return sample(dir, pids[2]) }
	fmt.Printf("%d idle clients, %d active and %d greedy streams for %s, on %d processors\n\n| what | measured |\n|---|---|\n", c.Idle, c.Active, c.Greedy, c.For, runtime.NumCPU())
	r, err := load.Run(context.Background(), c)
	if err != nil {
		return err
	}
	fmt.Println(r)
	failed := r.Leaks()
	if u := r.Unfair(); u != "" {
		failed = append(failed, u)
	}
	if r.Failed > 0 || r.Without > 0 {
		failed = append(failed, "requests failed")
	}
	if peak := r.Samples[len(r.Samples)-1].Agent.Peak; peak*1024 > 64e6 {
		failed = append(failed, fmt.Sprintf("the agent took %d KiB, more than 64 MB", peak))
	}
	if attacks {
		fmt.Print("| attack | others served meanwhile | slowest |\n|---|---|---|\n")
		c.For = min(c.For, 20*time.Second)
		for _, a := range load.Attacks {
			served, slowest, err := load.Defend(context.Background(), c, a)
			fmt.Printf("| %s | %d | %d ms |\n", a.Name, served, slowest.Milliseconds())
			if err != nil {
				failed = append(failed, a.Name+": "+err.Error())
			}
		}
		if s, err := c.Sample(); err == nil {
			fmt.Printf("\nagent's resident memory at most, attacks included: %.1f MB\n", float64(s.Agent.Peak)*1024/1e6)
		}
	}
	if len(failed) > 0 {
		return errors.New(strings.Join(failed, "\n"))
	}
	return nil
}

// sample asks the agent as a host would, and the kernel and the relay about the
// relay.
func sample(dir string, pid int) (s load.Sample, err error) {
	by := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		name, _, _ := net.SplitHostPort(address)
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, name))
	}}}
	get := func(url string, into any) error {
		answer, err := by.Get(url)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		return json.NewDecoder(answer.Body).Decode(into)
	}
	var status guest.Status
	if err := get("http://status/status", &status); err != nil {
		return s, err
	}
	var goroutines int64
	if err := get("http://relayed/", &goroutines); err != nil {
		return s, err
	}
	t := status.Counters
	s.Agent = load.Process{RSS: t.AgentRSSKiB, Peak: t.AgentPeakKiB, Goroutines: t.Goroutines, Descriptors: t.Descriptors}
	s.Active, s.Busy = t.Active, t.Busy
	s.Relay, err = load.ReadProcess(pid)
	s.Relay.Goroutines = goroutines
	return s, err
}

// meet listens on a unix socket that the other parts find.
func meet(dir, name string) (net.Listener, error) {
	return net.Listen("unix", filepath.Join(dir, name))
}

func engine(dir string) error {
	l, err := meet(dir, "engine")
	if err != nil {
		return err
	}
	http.HandleFunc("POST /v1/chat/completions", load.Engine)
	return http.Serve(l, nil)
}

// agent is what PID 1 of a VM does for clients, with the same memory limits.
func agent(dir string, concurrency int) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	_, receipts, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	limits := manifest.DefaultLimits
	limits.Concurrency, limits.IdleSeconds = concurrency, 20
	var hashes []string
	for _, token := range tokens() {
		hashes = append(hashes, manifest.TokenHash(token))
	}
	slices.Sort(hashes)
	counters := new(api.Counters)
	server := api.New(api.Config{
		Models:      []manifest.Model{{Name: model, Revision: "1", Disk: manifest.Disk{RootHash: strings.Repeat("ab", 32)}}},
		Limits:      limits,
		Tokens:      hashes,
		Certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		ReceiptKey:  receipts,
		Engine: func(ctx context.Context, _ int) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "engine"))
		},
		Evidence: func(context.Context, [evidence.NonceSize]byte) ([]byte, error) { return nil, errors.New("none") },
		Ready:    func() bool { return true },
		Counters: counters,
	})
	debug.SetMemoryLimit(server.HeapLimit())
	state := port.NewState("soak", time.Now(), 0, func() (t guest.CounterTable) {
		counters.Fill(&t)
		p, _ := load.ReadProcess(os.Getpid())
		t.AgentRSSKiB, t.AgentPeakKiB, t.Descriptors = p.RSS, p.Peak, p.Descriptors
		t.Goroutines = int64(runtime.NumGoroutine())
		return t
	})
	status, err := meet(dir, "status")
	if err != nil {
		return err
	}
	go port.NewStatus(state, new(port.Log)).Serve(status)
	l, err := meet(dir, "agent")
	if err != nil {
		return err
	}
	return server.Serve(l)
}

// vm is a connection to the agent.
type vm struct{ *net.UnixConn }

func relay(dir string) error {
	r := launcher.NewRelay(4096, func(ctx context.Context) (launcher.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "agent"))
		if err != nil {
			return nil, err
		}
		return vm{conn.(*net.UnixConn)}, nil
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	counts, err := meet(dir, "relayed")
	if err != nil {
		return err
	}
	go http.Serve(counts, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, runtime.NumGoroutine()) }))
	if err := outfile.Write(filepath.Join(dir, "relay"), []byte(l.Addr().String()), 0o600); err != nil {
		return err
	}
	return r.Serve(context.Background(), l.(*net.TCPListener))
}
