package gpu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/outfile"
)

// Plan is what Prepare and Release do, in order.
type Plan struct {
	Steps []Step

	host  *Host
	lock  string                // a file that is locked while a plan for this GPU is carried out
	again func() (*Plan, error) // the plan for how things are now
}

// ErrBusy is Do's answer while another program prepares or releases the GPU.
var ErrBusy = errors.New("another 'chrysalis gpu' is at work on this GPU; wait for it")

// Step is one thing that a plan does.
type Step struct {
	What string // in words, with the exact path or command
	do   func() error
	undo func() error // nil when there is nothing to undo
}

// Options say how GPUs are prepared.
type Options struct {
	StateDir string // where what was found is kept, for Release
	// Mode is the confidential-computing mode to set: ModeOn or ModeOff. Empty
	// leaves it as it is.
	Mode Mode
	// Tools is NVIDIA's gpu-admin-tools, the folder or the one file
	// nvidia_gpu_tools.py, and ToolsSHA256 its Digest. They are needed only to
	// change the mode.
	Tools       string
	ToolsSHA256 string
}

// record is what Prepare found and Release restores.
type record struct {
	Address  string `json:"address"`
	Driver   string `json:"driver"`          // bound before; may be empty
	Override string `json:"driver_override"` // set before; may be empty
	Mode     Mode   `json:"mode"`            // before; empty when it was not changed
	Tools    string `json:"tools,omitempty"`
	SHA256   string `json:"tools_sha256,omitempty"`
}

func recordPath(dir, address string) string {
	return filepath.Join(dir, "gpus", address+".json")
}

func lockPath(dir, address string) string { return filepath.Join(dir, "gpus", address+".lock") }

// Prepare plans how to hand a GPU to VMs: away from its driver, into the mode
// that is asked for, to vfio-pci. It refuses, and does nothing, while the GPU is
// in use, drives a display, has no IOMMU group, or has neighbours in its group
// that belong to somebody.
func (h *Host) Prepare(address string, o Options) (*Plan, error) {
	g, err := h.Find(address)
	if err != nil {
		return nil, err
	}
	if err := h.refuse(g); err != nil {
		return nil, err
	}
	p := &Plan{
		host: h, lock: lockPath(o.StateDir, g.Address),
		again: func() (*Plan, error) { return h.Prepare(address, o) },
	}
	o.ToolsSHA256 = strings.ToLower(o.ToolsSHA256)
	change := o.Mode != "" && o.Mode != g.Mode
	if o.Mode != "" && o.Mode != ModeOn && o.Mode != ModeOff {
		return nil, fmt.Errorf("there is no mode %q to set; choose on or off", o.Mode)
	}
	if o.Mode == ModeOn && !g.Confidential {
		return nil, fmt.Errorf("GPU %s (%s) has no confidential-computing mode that can be used; an H100 or H200 has", g.Address, title(g))
	}
	if change && o.Tools == "" {
		return nil, fmt.Errorf("GPU %s is in mode %s; to set it to %s give NVIDIA's gpu-admin-tools with --gpu-admin-tools and --gpu-admin-tools-sha256", g.Address, g.Mode, o.Mode)
	}
	if change {
		if err := checkTools(o.Tools, o.ToolsSHA256); err != nil {
			return nil, err
		}
	}
	if g.Driver == driverVFIO && !change {
		return p, nil // it is prepared
	}
	r := record{Address: g.Address, Driver: g.Driver, Override: override(h, g.Address)}
	if change {
		r.Mode, r.Tools, r.SHA256 = g.Mode, o.Tools, o.ToolsSHA256
	}
	path := recordPath(o.StateDir, g.Address)
	// What was before the first of several calls is what Release restores.
	forget := func() error { return os.Remove(path) }
	earlier, err := readRecord(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("what the GPU was before cannot be read: %w; remove the file to take what it is now for that", err)
	}
	if err == nil {
		forget = func() error { return writeRecord(path, earlier) }
		if r.Mode == "" || earlier.Mode != "" {
			r.Mode = earlier.Mode
		}
		if r.Tools == "" {
			r.Tools, r.SHA256 = earlier.Tools, earlier.SHA256
		}
		r.Driver, r.Override = earlier.Driver, earlier.Override
	}
	p.step("remember what was, in "+path, func() error { return writeRecord(path, r) }, forget)
	if _, err := os.Stat(h.path("sys/bus/pci/drivers", driverVFIO)); errors.Is(err, fs.ErrNotExist) {
		p.step("modprobe "+driverVFIO, func() error { return h.run("modprobe", driverVFIO) }, nil)
	}
	if g.Driver != "" {
		p.write(h.device(g.Address, "driver", "unbind"), g.Address, func() error { return h.bind(g.Address, g.Driver) })
	}
	if change {
		p.setMode(g.Address, g.Mode, o.Mode, o.Tools, o.ToolsSHA256)
	}
	before := override(h, g.Address)
	p.write(h.device(g.Address, "driver_override"), driverVFIO, func() error {
		return h.write(h.device(g.Address, "driver_override"), before+"\n")
	})
	p.write(h.path("sys/bus/pci/drivers_probe"), g.Address, func() error {
		if link(h.device(g.Address, "driver")) == "" {
			return nil
		}
		return h.write(h.device(g.Address, "driver", "unbind"), g.Address)
	})
	p.step("check that "+driverVFIO+" has it", func() error {
		if got := link(h.device(g.Address, "driver")); got != driverVFIO {
			return fmt.Errorf("GPU %s is bound to %q, not to %s; 'dmesg | grep vfio' says why", g.Address, got, driverVFIO)
		}
		return nil
	}, nil)
	return p, nil
}

// Release plans how to hand a GPU back: everything that Prepare changed becomes
// as it was.
func (h *Host) Release(address, stateDir string) (*Plan, error) {
	g, err := h.Find(address)
	if err != nil {
		return nil, err
	}
	path := recordPath(stateDir, g.Address)
	r, err := readRecord(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("GPU %s was not prepared by 'chrysalis gpu prepare'; what it was before is not known", g.Address)
	}
	if err != nil {
		return nil, err
	}
	if len(g.Processes) > 0 {
		return nil, fmt.Errorf("GPU %s is in use by %s; stop it first, for a VM with 'chrysalis down'", g.Address, strings.Join(g.Processes, ", "))
	}
	p := &Plan{
		host: h, lock: lockPath(stateDir, g.Address),
		again: func() (*Plan, error) { return h.Release(address, stateDir) },
	}
	if g.Driver != "" && g.Driver != r.Driver {
		p.write(h.device(g.Address, "driver", "unbind"), g.Address, nil)
	}
	if r.Mode != "" && r.Mode != g.Mode {
		if err := checkTools(r.Tools, r.SHA256); err != nil {
			return nil, fmt.Errorf("the mode was %s before, and setting it back needs the same tools: %w", r.Mode, err)
		}
		p.setMode(g.Address, g.Mode, r.Mode, r.Tools, r.SHA256)
	}
	p.write(h.device(g.Address, "driver_override"), r.Override+"\n", nil)
	if r.Driver != "" && g.Driver != r.Driver {
		p.step(fmt.Sprintf("write %s to %s", g.Address, h.path("sys/bus/pci/drivers", r.Driver, "bind")),
			func() error { return h.bind(g.Address, r.Driver) }, nil)
	}
	p.step("forget what was, in "+path, func() error { return os.Remove(path) }, nil)
	return p, nil
}

// refuse reports why a GPU must be left alone.
func (h *Host) refuse(g GPU) error {
	if g.Display != "" {
		return fmt.Errorf("GPU %s drives a display of this machine: %s; move the display to another one", g.Address, g.Display)
	}
	if len(g.Processes) > 0 {
		return fmt.Errorf("GPU %s is in use by %s; stop these processes first", g.Address, strings.Join(g.Processes, ", "))
	}
	if g.Group == "" {
		return fmt.Errorf("GPU %s has no IOMMU group; enable VT-d in the firmware and add intel_iommu=on to the kernel's command line", g.Address)
	}
	var taken []string
	for _, n := range g.Neighbours {
		if !strings.HasSuffix(n, "(no driver)") && !strings.HasSuffix(n, "("+driverVFIO+")") {
			taken = append(taken, n)
		}
	}
	if len(taken) > 0 {
		return fmt.Errorf("GPU %s shares its IOMMU group %s with %s, which would have to go with it; put the GPU into another slot, or unbind these", g.Address, g.Group, strings.Join(taken, ", "))
	}
	return nil
}

func title(g GPU) string {
	if g.Name != "" {
		return g.Name
	}
	return "10de:" + g.DeviceID
}

func override(h *Host, address string) string {
	if v := read(h.device(address, "driver_override")); v != "(null)" {
		return v
	}
	return ""
}

func (p *Plan) step(what string, do, undo func() error) {
	p.Steps = append(p.Steps, Step{what, do, undo})
}

func (p *Plan) write(path, data string, undo func() error) {
	p.step(fmt.Sprintf("write %q to %s", strings.TrimSpace(data), path), func() error { return p.host.write(path, data) }, undo)
}

func (p *Plan) setMode(address string, from, to Mode, tools, digest string) {
	set := func(mode Mode) error {
		if err := p.host.setMode(address, mode, tools, digest); err != nil {
			return err
		}
		g, err := p.host.Find(address)
		if err == nil && g.Mode == ModeUnknown {
			// Without a driver its memory regions may be off.
			if err := p.host.write(p.host.device(address, "enable"), "1"); err != nil {
				return err
			}
			g, err = p.host.Find(address)
		}
		if err != nil {
			return err
		}
		if g.Mode != mode {
			return fmt.Errorf("GPU %s is in mode %s after it was set to %s: %s", address, g.Mode, mode, g.ModeNote)
		}
		return nil
	}
	var undo func() error
	if from == ModeOn || from == ModeOff {
		undo = func() error { return set(from) }
	}
	p.step(strings.Join(modeCommand(tools, address, to), " "), func() error { return set(to) }, undo)
}

// Do carries the plan out, telling each step first. When one fails, what was done
// is undone, last first. Nobody else changes the GPU meanwhile, and if somebody has
// since the plan was made, another one is made and carried out.
func (p *Plan) Do(ctx context.Context, tell func(string)) error {
	if len(p.Steps) == 0 {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(p.lock), 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(p.lock, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return ErrBusy
	} else if err != nil {
		return fmt.Errorf("lock %s: %w", p.lock, err)
	}
	if p, err = p.again(); err != nil {
		return err
	}
	for i, s := range p.Steps {
		err := ctx.Err()
		if err == nil {
			tell(s.What)
			err = s.do()
		}
		if err == nil {
			continue
		}
		err = fmt.Errorf("%s: %w", s.What, err)
		for _, done := range slices.Backward(p.Steps[:i]) {
			if done.undo == nil {
				continue
			}
			tell("undo: " + done.What)
			if undoErr := done.undo(); undoErr != nil {
				err = errors.Join(err, fmt.Errorf("undo %s: %w", done.What, undoErr))
			}
		}
		return err
	}
	return nil
}

func (h *Host) write(path, data string) error {
	if h.Write != nil {
		return h.Write(path, data)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(data)
	return errors.Join(err, f.Close())
}

func (h *Host) run(argv ...string) error {
	if h.Run != nil {
		return h.Run(argv...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out[max(0, len(out)-2000):]))
	}
	return nil
}

// bind binds a device to a driver that it had before.
func (h *Host) bind(address, driver string) error {
	return h.write(h.path("sys/bus/pci/drivers", driver, "bind"), address)
}

// toolsMain is the program of gpu-admin-tools.
const toolsMain = "nvidia_gpu_tools.py"

func modeCommand(tools, address string, mode Mode) []string {
	program := tools
	if filepath.Base(program) != toolsMain {
		program = filepath.Join(tools, toolsMain)
	}
	return []string{"python3", program, "--gpu-bdf=" + address, "--set-cc-mode=" + string(mode), "--reset-after-cc-mode-switch"}
}

// setMode runs NVIDIA's tool from a copy that nobody else can write to, whose
// hash is the one that the user named.
func (h *Host) setMode(address string, mode Mode, tools, digest string) error {
	files, err := toolFiles(tools)
	if err != nil {
		return err
	}
	if got := digestOf(files); got != digest {
		return wrongDigest(tools, got, digest)
	}
	dir, err := os.MkdirTemp("", "chrysalis-gpu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
	}
	return h.run(modeCommand(dir, address, mode)...)
}

func checkTools(tools, digest string) error {
	got, err := Digest(tools)
	if err != nil {
		return err
	}
	if got != digest {
		return wrongDigest(tools, got, digest)
	}
	return nil
}

func wrongDigest(tools, got, want string) error {
	return fmt.Errorf("gpu-admin-tools at %s have the digest %s, not %q; look at what changed before you pin it", tools, got, want)
}

// Digest returns the digest that pins gpu-admin-tools: of a file, or a folder with
// one, its SHA-256; of a folder with more the SHA-256 of the lines that
//
//	find . -name '*.py' -printf '%P\n' | LC_ALL=C sort | xargs sha256sum
//
// prints in it. Both are hexadecimal.
func Digest(tools string) (string, error) {
	files, err := toolFiles(tools)
	if err != nil {
		return "", err
	}
	return digestOf(files), nil
}

func digestOf(files map[string][]byte) string {
	sum := func(data []byte) string {
		s := sha256.Sum256(data)
		return hex.EncodeToString(s[:])
	}
	if len(files) == 1 {
		for _, data := range files {
			return sum(data)
		}
	}
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	var list strings.Builder
	for _, name := range names {
		fmt.Fprintf(&list, "%s  %s\n", sum(files[name]), name)
	}
	return sum([]byte(list.String()))
}

// Bounds of gpu-admin-tools.
const (
	maxToolFiles = 2000
	maxToolBytes = 64 << 20
)

// toolFiles reads the Python files of gpu-admin-tools, by their path in it.
func toolFiles(tools string) (map[string][]byte, error) {
	info, err := os.Stat(tools)
	if err != nil {
		return nil, fmt.Errorf("gpu-admin-tools: %w", err)
	}
	if info.Mode().IsRegular() {
		data, err := os.ReadFile(tools)
		if err != nil {
			return nil, fmt.Errorf("gpu-admin-tools: %w", err)
		}
		return map[string][]byte{toolsMain: data}, nil
	}
	files, total := map[string][]byte{}, 0
	err = filepath.WalkDir(tools, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() || filepath.Ext(path) != ".py" {
			return nil
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is not a file", path)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(tools, path)
		files[name] = data
		total += len(data)
		if len(files) > maxToolFiles || total > maxToolBytes {
			return fmt.Errorf("more than %d files or %d bytes", maxToolFiles, maxToolBytes)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("gpu-admin-tools: %w", err)
	}
	if files[toolsMain] == nil {
		return nil, fmt.Errorf("gpu-admin-tools: there is no %s in %s", toolsMain, tools)
	}
	return files, nil
}

func readRecord(path string) (record, error) {
	var r record
	data, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func writeRecord(path string, r record) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return outfile.Write(path, data, 0o600)
}
