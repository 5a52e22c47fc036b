package driver_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"chrysalis/image/driver"
	"chrysalis/image/driver/drivertest"
)

const kernel = "7.3.4+deb13-cloud-amd64"

func TestFill(t *testing.T) {
	folder := drivertest.Folder("550.90.07", kernel, []byte("rim"))
	data, d, err := driver.Fill(folder, kernel, []string{"ecdh_generic", "gcm"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := driver.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(again.Modules) != 2 || again.Modules[1].Name != "nvidia-uvm" || again.Modules[1].Size != int64(len(folder["modules/nvidia-uvm.ko"].Data)) ||
		again.Modules[0].Options[0] != "NVreg_A=1" || again.Firmware[0].Size != 8 || d.Driver != "550.90.07" {
		t.Errorf("%s", data)
	}
	// What is filled in is filled in alike.
	folder["driver.json"].Data = data
	if same, _, err := driver.Fill(folder, kernel, []string{"gcm"}); err != nil || !bytes.Equal(same, data) {
		t.Errorf("%s, %v", same, err)
	}
}

func TestFillRefuses(t *testing.T) {
	file := func(data []byte) *fstest.MapFile { return &fstest.MapFile{Data: data} }
	for _, tt := range []struct {
		name   string
		change func(fstest.MapFS)
		says   string
	}{
		{"no description", func(f fstest.MapFS) { delete(f, "driver.json") }, "driver.json"},
		{"a module missing", func(f fstest.MapFS) { delete(f, "modules/nvidia.ko") }, "nvidia.ko"},
		{"a module more", func(f fstest.MapFS) { f["modules/evil.ko"] = file([]byte("x")) }, "modules/evil.ko is there"},
		{"firmware missing", func(f fstest.MapFS) { delete(f, "firmware/nvidia/550.90.07/gsp.bin") }, "gsp.bin"},
		{"firmware empty", func(f fstest.MapFS) { f["firmware/nvidia/550.90.07/gsp.bin"] = file(nil) }, "gsp.bin"},
		{"firmware more", func(f fstest.MapFS) { f["firmware/x"] = file([]byte("x")) }, "firmware/x is there"},
		{"a folder for a file", func(f fstest.MapFS) { delete(f, "driver.rim"); f["driver.rim/x"] = file([]byte("x")) }, "driver.rim"},
		{"no RIM", func(f fstest.MapFS) { delete(f, "driver.rim") }, "RIM"},
		{"no helper", func(f fstest.MapFS) { delete(f, "root/gpu-helper") }, "helper"},
		{"a script for a helper", func(f fstest.MapFS) { f["root/gpu-helper"] = file([]byte("#!/bin/sh\n")) }, "no program"},
		{"a helper for another machine", func(f fstest.MapFS) {
			f["root/gpu-helper"] = file(drivertest.ELF(elf.ET_DYN, elf.EM_AARCH64, nil, ""))
		}, "EM_AARCH64"},
		{"no loader", func(f fstest.MapFS) { delete(f, "root"+drivertest.Loader) }, "loader"},
		{"not a module", func(f fstest.MapFS) { f["modules/nvidia.ko"] = file([]byte("x")) }, "no kernel module"},
		{"compressed", func(f fstest.MapFS) { f["modules/nvidia.ko"] = file([]byte("\xfd7zXZ\x00")) }, "no kernel module"},
		{"a program for a module", func(f fstest.MapFS) { f["modules/nvidia.ko"] = file(drivertest.Program("")) }, "ET_DYN"},
		{"no modinfo", func(f fstest.MapFS) {
			f["modules/nvidia.ko"] = file(drivertest.ELF(elf.ET_REL, elf.EM_X86_64, nil, ""))
		}, ".modinfo"},
		{"another kernel's", func(f fstest.MapFS) { f["modules/nvidia.ko"] = file(drivertest.Module("nvidia", "6.1.0", "")) }, `"6.1.0"`},
		{"another module", func(f fstest.MapFS) { f["modules/nvidia.ko"] = file(drivertest.Module("nouveau", kernel, "")) }, `"nouveau"`},
		{"an unmet dependency", func(f fstest.MapFS) { f["modules/nvidia.ko"] = file(drivertest.Module("nvidia", kernel, "drm")) }, "drm"},
		{"the wrong order", func(f fstest.MapFS) {
			f["modules/nvidia.ko"] = file(drivertest.Module("nvidia", kernel, "nvidia-uvm"))
		}, "nvidia-uvm"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			folder := drivertest.Folder("550.90.07", kernel, []byte("rim"))
			tt.change(folder)
			_, _, err := driver.Fill(folder, kernel, []string{"gcm"})
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, expected it to say %q", err, tt.says)
			}
		})
	}
	folder := drivertest.Folder("550.90.07", "6.1.0", []byte("rim"))
	if _, _, err := driver.Fill(folder, kernel, []string{"gcm"}); err == nil || !strings.Contains(err.Error(), "headers") {
		t.Errorf("for another kernel: %v", err)
	}
	if _, _, err := driver.Fill(fstest.MapFS{}, kernel, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an empty folder: %v", err)
	}
}

func TestParseRefuses(t *testing.T) {
	const good = `{"version":1,"driver":"550.90.07","kernel":"7.3.4+deb13","models":["NVIDIA H100 PCIe","NVIDIA H200"],` +
		`"modules":[{"name":"nvidia","size":1,"options":["NVreg_A=1"]},{"name":"nvidia-uvm","size":2,"options":[]}],"firmware":[{"path":"nvidia/550/a.bin","size":3}]}`
	if _, err := driver.Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, old, new string }{
		{"version", `"version":1`, `"version":2`},
		{"unknown field", `"version":1`, `"version":1,"x":1`},
		{"driver", "550.90.07", "latest"},
		{"kernel", "7.3.4+deb13", "7.3.4 x"},
		{"no kernel", "7.3.4+deb13", ""},
		{"no models", `["NVIDIA H100 PCIe","NVIDIA H200"]`, `[]`},
		{"a model twice", "NVIDIA H200", "NVIDIA H100 PCIe"},
		{"a model's name", "NVIDIA H200", "\\u0000"},
		{"no modules", `[{"name":"nvidia","size":1,"options":["NVreg_A=1"]},{"name":"nvidia-uvm","size":2,"options":[]}]`, `[]`},
		{"a module twice", "nvidia-uvm", "nvidia"},
		{"a module's path", `"nvidia-uvm"`, `"../nvidia-uvm"`},
		{"two options in one", "NVreg_A=1", "NVreg_A=1 NVreg_B=1"},
		{"a quoted option", "NVreg_A=1", `NVreg_A=\"1\"`},
		{"an option without a value", "NVreg_A=1", "NVreg_A"},
		{"the end of options", "NVreg_A=1", "--"},
		{"a module's size", `"size":1`, `"size":0`},
		{"a module too large", `"size":1`, `"size":536870913`},
		{"a firmware's size", `"size":3`, `"size":-1`},
		{"firmware elsewhere", "nvidia/550/a.bin", "../a.bin"},
		{"firmware at the top", "nvidia/550/a.bin", "/a.bin"},
		{"firmware twice over", "nvidia/550/a.bin", "nvidia//a.bin"},
	} {
		if strings.Count(good, tt.old) < 1 {
			t.Fatalf("%s: %q is not there", tt.name, tt.old)
		}
		if _, err := driver.Parse([]byte(strings.Replace(good, tt.old, tt.new, 1))); err == nil {
			t.Errorf("%s is accepted", tt.name)
		} else if !strings.HasPrefix(err.Error(), "GPU driver: ") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	for name, text := range map[string]string{"empty": "", "two": good + good, "large": good + strings.Repeat(" ", driver.MaxSize)} {
		if _, err := driver.Parse([]byte(text)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Whatever is accepted stays what it is when it is written and read again.
func FuzzParse(f *testing.F) {
	data, _, err := driver.Fill(drivertest.Folder("550.90.07", kernel, []byte("rim")), kernel, []string{"gcm"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := driver.Parse(data)
		if err != nil {
			return
		}
		out, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		if len(out) > driver.MaxSize {
			return
		}
		if _, err := driver.Parse(out); err != nil {
			t.Errorf("%s, and then: %v", out, err)
		}
	})
}
