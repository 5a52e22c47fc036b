package gpu_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/launcher/gpu"
	"chrysalis/launcher/gpu/gputest"
)

const address = "0000:b8:00.0"

func TestList(t *testing.T) {
	tree := gputest.New(t)
	if got, err := tree.List(); err != nil || len(got) != 0 {
		t.Fatalf("%v, %v", got, err)
	}
	tree.Add(address, "42")
	tree.Add("0000:c8:00.0", "43")
	tree.File(gputest.Device("0000:00:01.0")+"/vendor", "0x8086\n")
	tree.File(gputest.Device("0000:d8:00.0")+"/vendor", "0x10de\n") // an NVSwitch
	tree.File(gputest.Device("0000:d8:00.0")+"/class", "0x068000\n")
	tree.Process(17, "python3", "/dev/nvidia0")
	gpus, err := tree.List()
	if err != nil || len(gpus) != 2 {
		t.Fatalf("%+v, %v", gpus, err)
	}
	g := gpus[0]
	if g.Address != address || g.Name != "H100 PCIe" || !g.Confidential || g.Mode != gpu.ModeOff || g.Driver != "nvidia" || g.Group != "42" ||
		g.VBIOS != "96.00.9f.00.01" || len(g.BARs) != 3 || g.BARs[0] != 16<<20 || g.BARs[2] != 96<<30 || g.NUMANode != 0 ||
		len(g.Processes) != 1 || g.Processes[0] != "python3 (17)" {
		t.Errorf("%+v", g)
	}
	if found, err := tree.Find("b8:00.0"); err != nil || found.Address != address {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := tree.Find("0000:ff:00.0"); err == nil || !strings.Contains(err.Error(), address) {
		t.Error(err)
	}
}

func TestMode(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*gputest.Tree)
		want   gpu.Mode
		note   string
	}{
		{"off", func(tree *gputest.Tree) { tree.SetMode(address, 0xfffffff8) }, gpu.ModeOff, ""},
		{"on", func(tree *gputest.Tree) { tree.SetMode(address, 1) }, gpu.ModeOn, ""},
		{"on among other bits", func(tree *gputest.Tree) { tree.SetMode(address, 0xf1) }, gpu.ModeOn, ""},
		{"devtools", func(tree *gputest.Tree) { tree.SetMode(address, 3) }, gpu.ModeDevTools, ""},
		{"neither", func(tree *gputest.Tree) { tree.SetMode(address, 2) }, gpu.ModeUnknown, "0x2"},
		{"asleep", func(tree *gputest.Tree) { tree.File(gputest.Device(address)+"/power_state", "D3hot\n") }, gpu.ModeUnknown, "D3hot"},
		{"not answering", func(tree *gputest.Tree) { tree.SetMode(address, 0xffffffff) }, gpu.ModeUnknown, "answer"},
		{"memory off", func(tree *gputest.Tree) {
			tree.File(gputest.Device(address)+"/config", "\xde\x10\x31\x23\x00\x00")
		}, gpu.ModeUnknown, "memory regions"},
		{"short region", func(tree *gputest.Tree) { tree.File(gputest.Device(address)+"/resource0", "x") }, gpu.ModeUnknown, "register is at"},
		{"no region", func(tree *gputest.Tree) { os.Remove(filepath.Join(tree.Root, gputest.Device(address), "resource0")) }, gpu.ModeUnknown, "cannot be read"},
		{"another model", func(tree *gputest.Tree) { tree.File(gputest.Device(address)+"/device", "0x20b0\n") }, gpu.ModeUnknown, "model"},
	} {
		t.Run(test.name, func(t *testing.T) {
			tree := gputest.New(t)
			tree.Add(address, "42")
			test.change(tree)
			g, err := tree.Find(address)
			if err != nil || g.Mode != test.want || !strings.Contains(g.ModeNote, test.note) {
				t.Errorf("%s, %q, %v", g.Mode, g.ModeNote, err)
			}
		})
	}
}

func tools(t *testing.T) (dir, digest string) {
	dir = t.TempDir()
	for name, content := range map[string]string{"nvidia_gpu_tools.py": "print(1)\n", "gpu/__init__.py": "", "README.md": "not hashed"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	digest, err := gpu.Digest(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir, digest
}

func do(t *testing.T, p *gpu.Plan) error {
	t.Helper()
	return p.Do(context.Background(), func(what string) { t.Log(what) })
}

// state is what Prepare changes.
func state(t *testing.T, tree *gputest.Tree) string {
	g, err := tree.Find(address)
	if err != nil {
		t.Fatal(err)
	}
	override, _ := os.ReadFile(filepath.Join(tree.Root, gputest.Device(address), "driver_override"))
	return g.Driver + " " + string(g.Mode) + " " + strings.TrimSpace(string(override))
}

func TestPrepareAndRelease(t *testing.T) {
	for _, mode := range []gpu.Mode{"", gpu.ModeOn} {
		t.Run("mode "+string(mode), func(t *testing.T) {
			tree := gputest.New(t)
			tree.Add(address, "42")
			dir, digest := tools(t)
			o := gpu.Options{StateDir: t.TempDir(), Mode: mode, Tools: dir, ToolsSHA256: strings.ToUpper(digest)}
			before := state(t, tree)

			plan, err := tree.Prepare(address, o)
			if err != nil {
				t.Fatal(err)
			}
			if len(tree.Written)+len(tree.Ran) != 0 || state(t, tree) != before {
				t.Fatal("planning changed something")
			}
			if err := do(t, plan); err != nil {
				t.Fatal(err)
			}
			want := "vfio-pci off vfio-pci"
			if mode == gpu.ModeOn {
				want = "vfio-pci on vfio-pci"
				if len(tree.Ran) != 1 || !strings.Contains(tree.Ran[0], "--set-cc-mode=on --reset-after-cc-mode-switch") {
					t.Error(tree.Ran)
				}
			}
			if got := state(t, tree); got != want {
				t.Errorf("%q, expected %q", got, want)
			}
			// Again: there is nothing to do.
			if plan, err = tree.Prepare(address, o); err != nil || len(plan.Steps) != 0 {
				t.Errorf("%+v, %v", plan, err)
			}
			release, err := tree.Release(address, o.StateDir)
			if err != nil {
				t.Fatal(err)
			}
			if err := do(t, release); err != nil {
				t.Fatal(err)
			}
			if got := state(t, tree); got != before {
				t.Errorf("after release %q, before %q", got, before)
			}
			if _, err := tree.Release(address, o.StateDir); err == nil || !strings.Contains(err.Error(), "not prepared") {
				t.Error(err)
			}
		})
	}
}

// A second call changes the mode of a GPU that is prepared; release undoes both.
func TestPrepareTwice(t *testing.T) {
	tree := gputest.New(t)
	tree.Add(address, "42")
	dir, digest := tools(t)
	before := state(t, tree)
	o := gpu.Options{StateDir: t.TempDir()}
	for _, mode := range []gpu.Mode{"", gpu.ModeOn} {
		o.Mode, o.Tools, o.ToolsSHA256 = mode, dir, digest
		plan, err := tree.Prepare(address, o)
		if err == nil {
			err = do(t, plan)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := state(t, tree); got != "vfio-pci on vfio-pci" {
		t.Error(got)
	}
	plan, err := tree.Release(address, o.StateDir)
	if err == nil {
		err = do(t, plan)
	}
	if err != nil || state(t, tree) != before {
		t.Errorf("%v: %q, before %q", err, state(t, tree), before)
	}
}

// Whichever step fails, everything is as it was.
func TestPrepareUndone(t *testing.T) {
	dir, digest := tools(t)
	for _, refuse := range []string{"/driver/unbind", "/driver_override", "drivers_probe", "tool", "tool lies", "check"} {
		t.Run(refuse, func(t *testing.T) {
			tree := gputest.New(t)
			tree.Add(address, "42")
			before := state(t, tree)
			dirState := t.TempDir()
			plan, err := tree.Prepare(address, gpu.Options{StateDir: dirState, Mode: gpu.ModeOn, Tools: dir, ToolsSHA256: digest})
			if err != nil {
				t.Fatal(err)
			}
			switch refuse {
			case "tool":
				tree.Tool = func([]string) error { return os.ErrInvalid }
			case "tool lies":
				tree.Tool = func([]string) error { return nil }
			case "check":
				tree.Write = func(write func(path, data string) error) func(path, data string) error {
					return func(path, data string) error {
						if strings.HasSuffix(path, "drivers_probe") {
							return nil // as the kernel: it does not say that nobody took the device
						}
						return write(path, data)
					}
				}(tree.Write)
			default:
				tree.Refuse = refuse
			}
			if err := do(t, plan); err == nil {
				t.Fatal("no error")
			} else {
				t.Log(err)
			}
			if refuse == "/driver_override" {
				return // the tree refuses the undoing write, too
			}
			if got := state(t, tree); got != before {
				t.Errorf("%q, before %q", got, before)
			}
			if files, _ := filepath.Glob(filepath.Join(dirState, "gpus", "*.json")); len(files) != 0 {
				t.Errorf("%v is still there", files)
			}
		})
	}
}

// killed carries a plan out until the kernel or the tool is asked for the nth time,
// and then no further: nothing is undone either. It reports whether it got that far.
func killed(t *testing.T, tree *gputest.Tree, n int, plan *gpu.Plan) (reached bool) {
	t.Helper()
	write, run := tree.Write, tree.Run
	defer func() {
		tree.Write, tree.Run = write, run
		if p := recover(); p == "killed" {
			reached = true
		} else if p != nil {
			panic(p)
		}
	}()
	count := func() {
		if n--; n == 0 {
			panic("killed")
		}
	}
	tree.Write = func(path, data string) error { count(); return write(path, data) }
	tree.Run = func(argv ...string) error { count(); return run(argv...) }
	if err := do(t, plan); err != nil {
		t.Fatal(err)
	}
	return false
}

// Wherever prepare or release is killed, either of them can be run next, and what
// the GPU was at first is not forgotten.
func TestKilled(t *testing.T) {
	dir, digest := tools(t)
	for _, first := range []string{"prepare", "release"} {
		for _, next := range []string{"prepare", "release"} {
			t.Run(first+", then "+next, func(t *testing.T) {
				points := 0
				for at, more := 1, true; more; at++ {
					tree := gputest.New(t)
					tree.Add(address, "42")
					before := state(t, tree)
					o := gpu.Options{StateDir: t.TempDir(), Mode: gpu.ModeOn, Tools: dir, ToolsSHA256: digest}
					plans := map[string]func() (*gpu.Plan, error){
						"prepare": func() (*gpu.Plan, error) { return tree.Prepare(address, o) },
						"release": func() (*gpu.Plan, error) { return tree.Release(address, o.StateDir) },
					}
					must := func(what string) {
						t.Helper()
						plan, err := plans[what]()
						if err == nil {
							err = do(t, plan)
						}
						if err != nil {
							t.Fatalf("killed at %d, then %s: %v", at, what, err)
						}
					}
					if first == "release" {
						must("prepare")
					}
					plan, err := plans[first]()
					if err != nil {
						t.Fatal(err)
					}
					if more = killed(t, tree, at, plan); !more {
						break
					}
					points++
					must(next)
					if next == "prepare" {
						if got := state(t, tree); got != "vfio-pci on vfio-pci" {
							t.Errorf("killed at %d: %q", at, got)
						}
						must("release")
					}
					if got := state(t, tree); got != before {
						t.Errorf("killed at %d: %q after release, before %q", at, got, before)
					}
				}
				if points < 4 {
					t.Errorf("only %d points", points)
				}
			})
		}
	}
}

// A second prepare that fails does not forget what the first one found.
func TestSecondPrepareFails(t *testing.T) {
	tree := gputest.New(t)
	tree.Add(address, "42")
	before := state(t, tree)
	dir, digest := tools(t)
	o := gpu.Options{StateDir: t.TempDir()}
	for _, mode := range []gpu.Mode{"", gpu.ModeOn} {
		o.Mode, o.Tools, o.ToolsSHA256 = mode, dir, digest
		plan, err := tree.Prepare(address, o)
		if err != nil {
			t.Fatal(err)
		}
		if mode == gpu.ModeOn {
			tree.Tool = func([]string) error { return os.ErrInvalid }
		}
		if err := do(t, plan); (err == nil) != (mode == "") {
			t.Fatal(err)
		}
	}
	plan, err := tree.Release(address, o.StateDir)
	if err == nil {
		err = do(t, plan)
	}
	if err != nil || state(t, tree) != before {
		t.Errorf("%v: %q, before %q", err, state(t, tree), before)
	}
}

// Of two at once, one does it, and the plan of one that comes late is made anew.
func TestPrepareTogether(t *testing.T) {
	tree := gputest.New(t)
	tree.Add(address, "42")
	before := state(t, tree)
	o := gpu.Options{StateDir: t.TempDir()}
	first, err := tree.Prepare(address, o)
	if err != nil {
		t.Fatal(err)
	}
	second, err := tree.Prepare(address, o)
	if err != nil {
		t.Fatal(err)
	}
	err = first.Do(t.Context(), func(what string) {
		if err := do(t, second); !errors.Is(err, gpu.ErrBusy) {
			t.Errorf("at %q: %v", what, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := do(t, second); err != nil || state(t, tree) != "vfio-pci off vfio-pci" {
		t.Errorf("afterwards: %v, %s", err, state(t, tree))
	}
	plan, err := tree.Release(address, o.StateDir)
	if err == nil {
		err = do(t, plan)
	}
	if err != nil || state(t, tree) != before {
		t.Errorf("%v: %q, before %q", err, state(t, tree), before)
	}
}

// A record that cannot be read is not taken for none.
func TestDamagedRecord(t *testing.T) {
	tree := gputest.New(t)
	tree.Add(address, "42")
	o := gpu.Options{StateDir: t.TempDir()}
	path := filepath.Join(o.StateDir, "gpus", address+".json")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tree.Prepare(address, o); err == nil || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
}

func TestRefused(t *testing.T) {
	dir, digest := tools(t)
	for _, test := range []struct {
		name, text string
		options    gpu.Options
		change     func(*gputest.Tree)
	}{
		{"in use", "in use by python3 (17)", gpu.Options{}, func(tree *gputest.Tree) { tree.Process(17, "python3", "/dev/nvidia0") }},
		{"used by a VM", "in use by qemu (18)", gpu.Options{}, func(tree *gputest.Tree) { tree.Process(18, "qemu", "/dev/vfio/42") }},
		{"used by a VM through iommufd", "in use by qemu (18)", gpu.Options{}, func(tree *gputest.Tree) {
			tree.Dir(gputest.Device(address) + "/vfio-dev/vfio7")
			tree.Process(18, "qemu", "/dev/vfio/devices/vfio7")
		}},
		{"used for drawing", "in use by Xorg (19)", gpu.Options{}, func(tree *gputest.Tree) {
			tree.Dir(gputest.Device(address) + "/drm/card1")
			tree.Process(19, "Xorg", "/dev/dri/card1")
		}},
		{"first display", "first display", gpu.Options{}, func(tree *gputest.Tree) { tree.File(gputest.Device(address)+"/boot_vga", "1\n") }},
		{"a display", "card1-DP-1", gpu.Options{}, func(tree *gputest.Tree) {
			tree.File(gputest.Device(address)+"/drm/card1/card1-DP-1/enabled", "enabled\n")
		}},
		{"no IOMMU", "intel_iommu=on", gpu.Options{}, func(tree *gputest.Tree) { os.Remove(filepath.Join(tree.Root, gputest.Device(address), "iommu_group")) }},
		{"a neighbour", "0000:b8:00.1 (snd_hda_intel)", gpu.Options{}, func(tree *gputest.Tree) {
			tree.File(gputest.Device("0000:b8:00.1")+"/class", "0x040300\n")
			tree.Bind("0000:b8:00.1", "snd_hda_intel")
			tree.Link("sys/kernel/iommu_groups/42/devices/0000:b8:00.1", "../../../../bus/pci/devices/0000:b8:00.1")
		}},
		{"another model", "no confidential-computing mode", gpu.Options{Mode: gpu.ModeOn}, func(tree *gputest.Tree) { tree.File(gputest.Device(address)+"/device", "0x20b0\n") }},
		{"no tools", "--gpu-admin-tools", gpu.Options{Mode: gpu.ModeOn}, func(*gputest.Tree) {}},
		{"devtools", "no mode", gpu.Options{Mode: gpu.ModeDevTools}, func(*gputest.Tree) {}},
		{"other tools", "have the digest " + digest, gpu.Options{Mode: gpu.ModeOn, Tools: dir, ToolsSHA256: strings.Repeat("0", 64)}, func(*gputest.Tree) {}},
		{"tools that are not there", "gpu-admin-tools", gpu.Options{Mode: gpu.ModeOn, Tools: "/nowhere", ToolsSHA256: digest}, func(*gputest.Tree) {}},
	} {
		t.Run(test.name, func(t *testing.T) {
			tree := gputest.New(t)
			tree.Add(address, "42")
			test.change(tree)
			test.options.StateDir = t.TempDir()
			_, err := tree.Prepare(address, test.options)
			if err == nil || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("got %v, expected %q", err, test.text)
			}
			t.Log(err)
			if len(tree.Written)+len(tree.Ran) > 0 {
				t.Errorf("%v %v", tree.Written, tree.Ran)
			}
		})
	}
	// A bridge in the group is nobody's.
	tree := gputest.New(t)
	tree.Add(address, "42")
	tree.File(gputest.Device("0000:b0:00.0")+"/class", "0x060400\n")
	tree.Bind("0000:b0:00.0", "pcieport")
	tree.Link("sys/kernel/iommu_groups/42/devices/0000:b0:00.0", "../../../../bus/pci/devices/0000:b0:00.0")
	if _, err := tree.Prepare(address, gpu.Options{StateDir: t.TempDir()}); err != nil {
		t.Error(err)
	}
}

func TestModprobe(t *testing.T) {
	tree := gputest.New(t)
	tree.Add(address, "42")
	os.Remove(filepath.Join(tree.Root, "sys/bus/pci/drivers/vfio-pci"))
	plan, err := tree.Prepare(address, gpu.Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(plan.Steps, func(s gpu.Step) bool { return s.What == "modprobe vfio-pci" }) {
		t.Errorf("%+v", plan.Steps)
	}
}

// The digest of a folder is what the documented command prints.
func TestDigest(t *testing.T) {
	dir, digest := tools(t)
	if digest != "1a10b7ac32c47093ee24578b6f80419fac3f665dd08ccc77d3b438e57ba80b08" {
		t.Error(digest)
	}
	single, err := gpu.Digest(filepath.Join(dir, "nvidia_gpu_tools.py"))
	if err != nil || len(single) != 64 || single == digest {
		t.Errorf("%s, %v", single, err)
	}
}
