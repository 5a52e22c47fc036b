package launcher

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"chrysalis/image"
	"chrysalis/image/toolsroot"
)

// The tests below run the real QEMU, swtpm and vhost-device-vsock out of the tools
// root, with a kernel that is none: the VM comes up, and its agent never speaks.
// What a whole VM does is tested where there is an image.
func vmOptions(t *testing.T) Options {
	t.Helper()
	if testing.Short() {
		t.Skip("starts QEMU")
	}
	lock, err := image.ReadLock("..")
	if err != nil {
		t.Skip(err)
	}
	tools, err := image.OpenTools(lock)
	if err != nil {
		t.Skip(err)
	}
	return fakeVM(t, tools)
}

func fakeVM(t *testing.T, tools *toolsroot.Root) Options {
	t.Helper()
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// Longer than a unix socket's address may be.
	state := filepath.Join(dir, strings.Repeat("long", 30))
	return Options{
		Name: "test", Image: file("image.efi", make([]byte, 4096)), Engine: file("engine.disk", make([]byte, 1<<20)),
		Models: []string{file("model.disk", make([]byte, 1<<20))}, Manifest: file("manifest.json", []byte("{}")),
		Listen: "127.0.0.1:0", Accel: AccelTCG, Timeout: 30 * time.Second, StateDir: state, Tools: tools,
	}
}

func expectNothingLeft(t *testing.T, o Options) {
	t.Helper()
	for range 300 {
		if len(naming(o.StateDir)) == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if pids := naming(o.StateDir); len(pids) > 0 {
		t.Errorf("processes %v are left behind", pids)
	}
	filepath.WalkDir(o.StateDir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type()&os.ModeSocket != 0 {
			t.Errorf("the socket %s is left behind", path)
		}
		return nil
	})
	states, err := Status(t.Context(), o.StateDir, o.Name)
	if err != nil || len(states) != 1 || states[0].Life != LifeEnded {
		t.Errorf("the state is %+v, %v", states, err)
	}
}

// waitQEMU waits until QEMU runs.
func waitQEMU(t *testing.T, o Options) {
	t.Helper()
	for range 1500 {
		for _, pid := range naming(o.StateDir) {
			line, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
			if bytes.Contains(line, []byte("-kernel")) {
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("QEMU did not start")
}

func TestUpTimeout(t *testing.T) {
	o := vmOptions(t)
	o.Timeout = 4 * time.Second
	_, err := Up(t.Context(), o, nil)
	var ended *EndedError
	if !errors.As(err, &ended) || !strings.Contains(err.Error(), "not ready in 4s") {
		t.Errorf("%v", err)
	}
	expectNothingLeft(t, o)
}

func TestUpInterrupted(t *testing.T) {
	o := vmOptions(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { waitQEMU(t, o); cancel() }()
	if _, err := Up(ctx, o, nil); err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("%v", err)
	}
	expectNothingLeft(t, o)
}

// A second `up` of the name, another VM at the same address, and `down`, all
// while the first is starting.
func TestUpConflictsAndDown(t *testing.T) {
	o := vmOptions(t)
	first := make(chan error, 1)
	go func() { _, err := Up(t.Context(), o, nil); first <- err }()
	waitQEMU(t, o)
	if _, err := Up(t.Context(), o, nil); err == nil || !strings.Contains(err.Error(), "is at work") {
		t.Errorf("a second up: %v", err)
	}
	states, err := Status(t.Context(), o.StateDir, o.Name)
	if err != nil || len(states) != 1 {
		t.Fatalf("%+v, %v", states, err)
	}
	other := o
	other.Name, other.Listen = "other", states[0].Listen
	if _, err := Up(t.Context(), other, nil); err == nil || !strings.Contains(err.Error(), `in use by the VM "test"`) {
		t.Errorf("the same address: %v", err)
	}
	if err := Down(t.Context(), o.Name, DownOptions{StateDir: o.StateDir}); err != nil {
		t.Errorf("down: %v", err)
	}
	if err := <-first; err == nil || !strings.Contains(err.Error(), "stopped from the host") {
		t.Errorf("the first up: %v", err)
	}
	expectNothingLeft(t, o)
}

// Everything dies with the supervisor, and the next command tidies up.
func TestSupervisorKilled(t *testing.T) {
	o := vmOptions(t)
	first := make(chan error, 1)
	go func() { _, err := Up(t.Context(), o, nil); first <- err }()
	waitQEMU(t, o)
	states, err := Status(t.Context(), o.StateDir, o.Name)
	if err != nil || len(states) != 1 || states[0].Life != LifeStarting {
		t.Fatalf("%+v, %v", states, err)
	}
	if err := syscall.Kill(states[0].Supervisor, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-first; err == nil || !strings.Contains(err.Error(), "supervisor ended unexpectedly") {
		t.Errorf("%v", err)
	}
	expectNothingLeft(t, o)
}

func TestUpRefusals(t *testing.T) {
	tools := &toolsroot.Root{Dir: t.TempDir()}
	for _, tt := range []struct {
		name string
		edit func(*Options)
		want string
	}{
		{"name", func(o *Options) { o.Name = "../x" }, "not a name"},
		{"shape", func(o *Options) { o.Shape = "huge" }, "there is no shape"},
		{"image missing", func(o *Options) { o.Image += "x" }, "find the image"},
		{"image is a folder", func(o *Options) { o.Image = "/" }, "is not a file"},
		{"no model", func(o *Options) { o.Models = nil }, "--model"},
		{"engine is no disk", func(o *Options) { o.Manifest = "" }, "read the engine disk"},
		{"manifest and parameters", func(o *Options) { o.Parameters = map[string]int64{"x": 1} }, "either the file or those"},
		{"GPU too many", func(o *Options) { o.GPUs = []string{"0000:01:00.0"} }, "0 GPUs"},
		{"GPU collateral without a GPU", func(o *Options) { o.GPUCollateral = "/dev/null" }, "has no GPU"},
		{"listen", func(o *Options) { o.Listen = "x" }, "not an address"},
		{"no tools", func(o *Options) { o.Tools = nil }, "image tools"},
		{"accelerator", func(o *Options) { o.Accel = "xen" }, "no accelerator"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := fakeVM(t, tools)
			tt.edit(&o)
			if _, err := Up(t.Context(), o, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if pids := naming(o.StateDir); len(pids) > 0 {
				t.Errorf("processes %v are left behind", pids)
			}
		})
	}
}
