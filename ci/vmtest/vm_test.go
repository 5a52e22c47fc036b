// Package vmtest boots real VMs, under whatever accelerator works, and checks
// what their users would see: the command line's output and exit status, and what
// an HTTP client gets. It needs bubblewrap, the tools root and the artefacts of
// 'make image'.
package vmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"chrysalis/guest"
	"chrysalis/image/profile"
	"chrysalis/models"
	"chrysalis/models/card"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// Artefacts, made by 'make image' and by TestMain.
var (
	source  = "../.."
	program string // the CLI
	uki     string
	llama   string
	demo    string // the demo model's disk
	scratch string // what the tests make
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if err := prepare(); err != nil {
			// In CI a missing artefact is a failure; at a desk it is a skip.
			if os.Getenv("CHRYSALIS_REQUIRE_VM") != "" {
				fmt.Fprintln(os.Stderr, "vmtest:", err)
				return 1
			}
			fmt.Println("skipped:", err)
			return 0
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

func prepare() error {
	out, err := filepath.Abs(filepath.Join(source, "out"))
	if err != nil {
		return err
	}
	uki, llama, demo = filepath.Join(out, "chrysalis.efi"), filepath.Join(out, "llama.cpp.disk"), filepath.Join(out, "demo.disk")
	for _, path := range []string{uki, llama, demo} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w; run 'make image' first", err)
		}
	}
	if scratch, err = os.MkdirTemp("", "chrysalis-vmtest-"); err != nil {
		return err
	}
	program = filepath.Join(scratch, "chrysalis")
	return goBuild(program, "./cmd/chrysalis")
}

func goBuild(out, pkg string) error {
	cmd := exec.Command("go", "build", "-o", out, pkg)
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, output)
	}
	return nil
}

// host is a user's machine: a state folder of its own, and nothing left behind
// at the end.
type host struct {
	t       *testing.T
	dir     string
	program string // the CLI
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t, t.TempDir(), program}
	t.Cleanup(func() {
		h.run(time.Minute, "down", "--all", "--now")
		h.noProcesses()
	})
	return h
}

// result is how a run of the CLI ended.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string {
	return fmt.Sprintf("exit status %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
}

// run runs the CLI in the source tree, with the host's state.
func (h *host) run(limit time.Duration, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.program, args...)
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+h.dir)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		h.t.Fatalf("chrysalis %s: %v %v\n%s", strings.Join(args, " "), err, ctx.Err(), stderr.String())
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// up starts a VM that must become ready, and returns its endpoint.
func (h *host) up(args ...string) string {
	h.t.Helper()
	r := h.run(5*time.Minute, append([]string{"up", "--listen", "127.0.0.1:0", "--timeout", "4m", "--image", uki}, args...)...)
	if r.code != 0 {
		h.t.Fatalf("up: %s", r)
	}
	return strings.TrimSpace(r.stdout)
}

// upFails starts a VM that must end with a reason, and returns the steps.
func (h *host) upFails(reason string, args ...string) string {
	h.t.Helper()
	r := h.run(5*time.Minute, append([]string{"up", "--json", "--listen", "127.0.0.1:0", "--timeout", "4m", "--image", uki}, args...)...)
	if r.code == 0 {
		h.t.Fatalf("up succeeded, expected it to fail with %s: %s", reason, r)
	}
	if !strings.Contains(r.stdout, `"reason":"`+reason+`"`) {
		h.t.Fatalf("up failed, but not with the reason %s: %s", reason, r)
	}
	if !strings.Contains(r.stderr, reason) || !strings.Contains(r.stderr, guest.Reason(reason).Explain()) {
		h.t.Fatalf("up did not tell a person the reason and what it means: %s", r)
	}
	h.noProcesses()
	return r.stdout
}

// noProcesses checks that no process of this host's VMs is left. Their command
// lines, or those of the shells around them, name the state folder.
func (h *host) noProcesses() {
	h.t.Helper()
	var left []string
	for range 50 {
		left = nil
		entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			h.t.Fatal(err)
		}
		for _, path := range entries {
			data, err := os.ReadFile(path)
			if err == nil && bytes.Contains(data, []byte(h.dir)) {
				left = append(left, path+": "+string(bytes.ReplaceAll(data, []byte{0}, []byte{' '})))
			}
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	h.t.Errorf("processes are left behind:\n%s", strings.Join(left, "\n"))
}

// testEngine packs the misbehaving engine in a mode and returns its disk.
func testEngine(t *testing.T, mode string) string {
	t.Helper()
	return packEngine(t, "engine", func(p *profile.Profile) {
		p.Argv = []profile.Args{{Args: []string{"/engine", mode, "${socket}"}}}
		if mode == "hang" {
			p.ReadySeconds = 5 // which the test waits for
		}
	})
}

var testPrograms sync.Mutex

// testProgram builds a program of a folder below this one, once, and returns its
// path.
func testProgram(t *testing.T, name string) string {
	t.Helper()
	testPrograms.Lock()
	defer testPrograms.Unlock()
	binary := filepath.Join(scratch, name)
	if _, err := os.Stat(binary); err != nil {
		if err := goBuild(binary, "./ci/vmtest/"+name); err != nil {
			t.Fatal(err)
		}
	}
	return binary
}

// packEngine packs a program of this folder's as an engine disk, with a profile
// that calls it with the socket only, and a change to that.
func packEngine(t *testing.T, name string, change func(*profile.Profile)) string {
	t.Helper()
	data, err := os.ReadFile(testProgram(t, name))
	if err != nil {
		t.Fatal(err)
	}
	described := profile.Profile{
		Version: 1, Name: "test", Health: "/health", ReadySeconds: 60,
		Argv:        []profile.Args{{Args: []string{"/engine", "${socket}"}}},
		Environment: map[string]string{},
		Parameters:  map[string]profile.Parameter{},
		Formats:     []string{card.GGUF, card.Safetensors},
		Cache:       profile.CacheNone,
		Status:      profile.Tested,
		Seccomp:     []string{},
	}
	if change != nil {
		change(&described)
	}
	p, err := json.Marshal(described)
	if err != nil {
		t.Fatal(err)
	}
	tree := fstest.MapFS{
		"engine":     {Data: data, Mode: 0o755},
		profile.Path: {Data: p, Mode: 0o444},
	}
	for _, dir := range []string{"dev", "models", "proc", "run", "tmp"} {
		tree[dir] = &fstest.MapFile{Mode: os.ModeDir | 0o755}
	}
	out := filepath.Join(t.TempDir(), "engine.disk")
	if _, err := disk.PackTree(t.Context(), tree, out, disk.Options{}); err != nil {
		t.Fatal(err)
	}
	return out
}

// describe opens a verity disk.
func describe(t *testing.T, path string) verity.Description {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	d, err := verity.OpenDisk(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// writeManifest writes the manifest of two disks, after a change to its text.
func writeManifest(t *testing.T, engine, model string, change func([]byte) []byte) string {
	t.Helper()
	info, err := models.Inspect(model)
	if err != nil {
		t.Fatal(err)
	}
	m := models.Manifest(describe(t, engine), []models.Info{info}, 0, nil)
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		data = change(data)
	}
	path := filepath.Join(t.TempDir(), "manifest.json")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// damaged copies a disk and changes the copy.
func damaged(t *testing.T, path string, change func([]byte) []byte) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "damaged.disk")
	if err := os.WriteFile(out, change(data), 0o644); err != nil {
		t.Fatal(err)
	}
	return out
}
