package main

import (
	"bytes"
	"context"
	"crypto/sha512"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"chrysalis"
	"chrysalis/image"
	"chrysalis/image/inspect"
	"chrysalis/image/toolsroot"
	"chrysalis/measure"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
)

// prediction measures how long it takes to predict an image and ten shapes, and
// what that is of the speed at which SHA-384 can be computed at all.
func prediction() error {
	const times = 7
	args := []string{"measure", "--platform", "tdx", "--commit", strings.Repeat("0", 40), "--json"}
	for range 3 {
		args = append(args, "--shape", "small", "--shape", "medium", "--shape", "large")
	}
	args = append(args, "--shape", "small")
	var walls, memories []float64
	for i := range times + 1 {
		cmd := exec.Command("bin/chrysalis", args...)
		begin := time.Now()
		if out, err := cmd.Output(); err != nil {
			return fmt.Errorf("chrysalis measure: %w: %s", err, out)
		}
		if i > 0 { // the first fills the cache of tables
			walls = append(walls, float64(time.Since(begin).Microseconds())/1000)
			memories = append(memories, float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)*1024/1e6)
		}
	}
	row("record of one image and ten shapes, tables cached, median of 7", "ms", median(walls), 300, true)
	row("its resident memory at most", "MB", slices.Max(memories), 100, true)

	lock, err := image.ParseLock(chrysalis.ImageLock)
	if err != nil {
		return err
	}
	tools, err := image.OpenTools(lock)
	if err != nil {
		return err
	}
	uki, err := os.ReadFile("out/chrysalis.efi")
	if err != nil {
		return err
	}
	firmware, err := plan.OpenFirmware(tools, record.TDX, "")
	if err != nil {
		return err
	}
	var ours, limit []float64
	hashed := 0
	for range times {
		m, err := measure.ReadUKI("image", bytes.NewReader(uki), int64(len(uki)))
		if err != nil {
			return err
		}
		begin := time.Now()
		if _, err := firmware.MRTD(measure.Interleaved); err != nil {
			return err
		}
		s := measure.System{Platform: record.TDX, Boot: record.BootKernel, Firmware: firmware, Image: m}
		events, err := s.Events()
		if err != nil {
			return err
		}
		measure.RTMRs(events)
		ours = append(ours, float64(time.Since(begin).Microseconds())/1000)
		// What has to be hashed: the firmware with its records, the UKI, its sections
		// twice over (as they are, and the kernel and the initrd on their own).
		hashed = 5*(len(uki)/2) + len(uki)/2 + 3653632*3/2
		data := make([]byte, hashed)
		begin = time.Now()
		sha512.Sum384(data)
		limit = append(limit, float64(time.Since(begin).Microseconds())/1000)
	}
	figure("MRTD, RTMR1 and RTMR2, in process, median of 7", "ms", median(ours))
	figure(fmt.Sprintf("SHA-384 alone of as many bytes (%d MB), on one processor", hashed/1e6), "ms", median(limit))
	figure("ratio", "", median(ours)/median(limit))
	return systemdMeasure(tools, uki, times)
}

// systemdMeasure compares with systemd's own tool, which calculates PCR 11.
func systemdMeasure(tools *toolsroot.Root, uki []byte, times int) error {
	dir, err := os.MkdirTemp("", "chrysalis-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	pe, err := inspect.ReadPE(bytes.NewReader(uki), int64(len(uki)))
	if err != nil {
		return err
	}
	args := []string{"/usr/lib/systemd/systemd-measure", "calculate", "--bank=sha384", "--phase=:"}
	for _, name := range []string{"linux", "osrel", "cmdline", "initrd", "uname", "sbat"} {
		s := pe.Section("." + name)
		if s == nil {
			continue
		}
		data := make([]byte, s.Content.Size())
		if _, err := s.Content.ReadAt(data, 0); err != nil {
			return err
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			return err
		}
		args = append(args, "--"+name+"="+path)
	}
	var theirs, ours []float64
	for range times {
		cmd := tools.Cmd(context.Background(), toolsroot.Command{Args: args, ReadOnly: []string{dir}, Offline: true})
		begin := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("systemd-measure: %w: %s", err, out)
		}
		theirs = append(theirs, float64(time.Since(begin).Microseconds())/1000)
		begin = time.Now()
		if out, err := exec.Command("bin/chrysalis", "measure", "--uki", "out/chrysalis.efi", "--json").CombinedOutput(); err != nil {
			return fmt.Errorf("chrysalis measure: %w: %s", err, out)
		}
		ours = append(ours, float64(time.Since(begin).Microseconds())/1000)
	}
	figure("PCR 11 of the same image with systemd-measure, a process in the tools root", "ms", median(theirs))
	figure("all registers of it with `chrysalis measure`, a process", "ms", median(ours))
	figure("ratio", "", median(ours)/median(theirs))
	return nil
}
