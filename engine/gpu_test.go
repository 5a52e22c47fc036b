package engine

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/image/driver"
	"chrysalis/image/driver/drivertest"
)

const kernel = "7.3.4+deb13-cloud-amd64"

// onDisk writes a tree into a folder.
func onDisk(t *testing.T, tree fstest.MapFS) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, tree); err != nil {
		t.Fatal(err)
	}
	return dir
}

func engineFolder(t *testing.T) string {
	return onDisk(t, fstest.MapFS{"usr/bin/serve": {Data: []byte("#!"), Mode: 0o755}})
}

func TestGPUDriver(t *testing.T) {
	folder := drivertest.Folder(nvidiatest.Driver, kernel, nvidiatest.NewVendor().DriverRIM())
	folder["root/dev/null"] = &fstest.MapFile{Data: []byte("no device")}
	var notes []string
	out := filepath.Join(t.TempDir(), "engine.disk")
	src, dir := engineFolder(t), onDisk(t, folder)
	o := Options{Out: out, GPUDriver: dir, Kernel: kernel, KernelModules: []string{"gcm"}, Note: func(n string) { notes = append(notes, n) }}
	info, got := packed(t, src, o)
	if info.Driver == nil || info.Driver.Driver != nvidiatest.Driver || info.Fragment().GPUDriver != nvidiatest.Driver {
		t.Errorf("%+v", info.Driver)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "stand-in") {
		t.Errorf("notes %q", notes)
	}
	for path, want := range map[string]string{
		driver.FirmwareDir + "/nvidia/" + nvidiatest.Driver + "/gsp.bin": "firmware",
		driver.HelperRoot + "/usr/lib/libnvidia-ml.so.1":                 "library",
		driver.HelperRoot + "/dev/null":                                  "",
		"usr/bin/serve":                                                  "#!",
	} {
		if got[path] != want {
			t.Errorf("%s is %q, expected %q", path, got[path], want)
		}
	}
	if _, ok := got[driver.HelperRoot+"/dev/"]; !ok {
		t.Error("the helper has no /dev")
	}
	d, err := driver.Parse([]byte(got[driver.Path]))
	if err != nil || len(d.Modules) != 2 || d.Modules[0].Size == 0 {
		t.Errorf("%+v, %v", d, err)
	}
	// The same folders make the same disk.
	o.Out = filepath.Join(t.TempDir(), "engine.disk")
	if again, _ := packed(t, src, o); again.Disk.RootHash != info.Disk.RootHash {
		t.Error("two disks of the same files differ")
	}
}

func TestGPUDriverRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		engine fstest.MapFS
		change func(fstest.MapFS)
		says   string
	}{
		{"it does not check", nil, func(f fstest.MapFS) { delete(f, "modules/nvidia.ko") }, "nvidia.ko"},
		{"the engine has one of its own", fstest.MapFS{driver.Path: {Data: []byte("{}")}}, nil, "of its own"},
		{"its RIM is too large", nil, func(f fstest.MapFS) { f["driver.rim"].Data = make([]byte, 300<<10) }, "too large"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			folder := drivertest.Folder(nvidiatest.Driver, kernel, []byte("rim"))
			if tt.change != nil {
				tt.change(folder)
			}
			tree := fstest.MapFS{"usr/bin/serve": {Data: []byte("#!"), Mode: 0o755}}
			for path, f := range tt.engine {
				tree[path] = f
			}
			_, err := Pack(context.Background(), onDisk(t, tree), Options{
				Out: filepath.Join(t.TempDir(), "engine.disk"), Profile: []byte(testProfile), GPUDriver: onDisk(t, folder), Kernel: kernel, KernelModules: []string{"gcm"},
			})
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, expected it to say %q", err, tt.says)
			}
		})
	}
	t.Run("a link out of the folder", func(t *testing.T) {
		folder := drivertest.Folder(nvidiatest.Driver, kernel, []byte("rim"))
		delete(folder, "driver.rim")
		dir := onDisk(t, folder)
		outside := filepath.Join(t.TempDir(), "rim")
		if err := os.WriteFile(outside, []byte("rim"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outside, filepath.Join(dir, "driver.rim")); err != nil {
			t.Fatal(err)
		}
		_, err := Pack(context.Background(), engineFolder(t), Options{
			Out: filepath.Join(t.TempDir(), "engine.disk"), Profile: []byte(testProfile), GPUDriver: dir, Kernel: kernel, KernelModules: []string{"gcm"},
		})
		if err == nil || !strings.Contains(err.Error(), "RIM") {
			t.Errorf("got %v", err)
		}
	})
	// NVIDIA's own RIM, where it is at hand.
	rims, err := filepath.Glob("../../shared/golden/nvidia/*DRIVER*")
	if err != nil || len(rims) == 0 {
		t.Log("skipped: NVIDIA's RIM is not here")
		return
	}
	rim, err := os.ReadFile(rims[0])
	if err != nil {
		t.Fatal(err)
	}
	for version, good := range map[string]bool{"550.90.07": true, "550.90.08": false} {
		_, err := Pack(context.Background(), engineFolder(t), Options{
			Out: filepath.Join(t.TempDir(), "engine.disk"), Profile: []byte(testProfile),
			GPUDriver: onDisk(t, drivertest.Folder(version, kernel, rim)), Kernel: kernel, KernelModules: []string{"gcm"},
			Note: func(n string) { t.Errorf("%s: %s", version, n) },
		})
		if (err == nil) != good {
			t.Errorf("driver %s with NVIDIA's RIM for 550.90.07: %v", version, err)
		}
	}
}
