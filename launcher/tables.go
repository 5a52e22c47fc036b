package launcher

import (
	"bytes"
	"context"
	"path/filepath"
	"runtime"

	"chrysalis/image/toolsroot"
	"chrysalis/measure"
	"chrysalis/measure/acpi"
)

// Tables returns what QEMU gives the firmware of a VM of this shape, without
// starting one. Results are cached.
func Tables(ctx context.Context, tools *toolsroot.Root, shape Shape, a Artefacts) (*measure.Tables, error) {
	if err := a.Check(shape); err != nil {
		return nil, err
	}
	return TablesOf(ctx, tools, Command(shape, a), acpi.Machine{Bits: shape.Bits(a.Platform), GPU: shape.GPUBARs})
}

// TablesOf is Tables for a command line that Command did not make.
func TablesOf(ctx context.Context, tools *toolsroot.Root, argv []string, m acpi.Machine) (*measure.Tables, error) {
	// The tools root's folder is named by the hash of every package in it.
	cache := acpi.Cache{QEMU: filepath.Base(tools.Dir)}
	if dir, err := toolsroot.CacheDir(); err == nil {
		cache.Dir = filepath.Join(dir, "acpi")
	}
	start := func(ctx context.Context, argv []string, folder string) (func() string, error) {
		runtime.LockOSThread() // see toolsroot.Root.Cmd
		cmd := tools.Cmd(ctx, toolsroot.Command{
			Args: argv, Offline: true,
			Bind: []toolsroot.Bind{{Host: folder, Inside: acpi.Dir, Writable: true}},
		})
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			runtime.UnlockOSThread()
			return nil, err
		}
		return func() string {
			defer runtime.UnlockOSThread()
			cmd.Cancel()
			cmd.Wait()
			return stderr.String()
		}, nil
	}
	return cache.Read(ctx, start, argv, m)
}

// Bits are the guest's physical address bits on a platform.
func (s Shape) Bits(platform Platform) int {
	if platform == PlatformTDX {
		return s.TDXBits
	}
	return s.PhysBits
}
