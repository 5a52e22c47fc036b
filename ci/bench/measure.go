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
	"chrysalis/launcher"
	"chrysalis/measure"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
)

// predictTen is set for the process that prediction times.
const predictTen = "CHRYSALIS_BENCH_PREDICT"

// predict makes the record of the image and ten shapes, as 'chrysalis measure'
// does: the published ones, and more where those are fewer.
func predict() error {
	lock, err := image.ParseLock(chrysalis.ImageLock)
	if err != nil {
		return err
	}
	tools, err := image.OpenTools(lock)
	if err != nil {
		return err
	}
	firmware, err := plan.OpenFirmware(tools, record.TDX, "")
	if err != nil {
		return err
	}
	f, err := os.Open("out/chrysalis.efi")
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	uki, err := measure.ReadUKI("out/chrysalis.efi", f, info.Size())
	if err != nil {
		return err
	}
	var machines []measure.Machine
	names := launcher.ShapeNames()
	for i := range 10 {
		shape := launcher.Shape{Name: fmt.Sprintf("shape%d", i), VCPUs: i + 1, Memory: uint64(i+1) << 30, PhysBits: 40, TDXBits: 52}
		if i < len(names) {
			if shape, err = launcher.LookupShape(names[i]); err != nil {
				return err
			}
		}
		tables, err := launcher.Tables(context.Background(), tools, shape, plan.Artefacts(record.TDX, record.BootKernel, 1, shape))
		if err != nil {
			return err
		}
		machines = append(machines, measure.Machine{Shape: plan.Shape(shape, record.TDX, 3), Tables: tables})
	}
	base := record.Image{Name: "chrysalis", Lock: make([]byte, 32), Commit: strings.Repeat("0", 40), QEMU: "11.1.3"}
	s := measure.System{Platform: record.TDX, Boot: record.BootKernel, Firmware: firmware, Image: uki}
	file, _, err := measure.File(base, s, machines, measure.Interleaved)
	if err != nil {
		return err
	}
	if len(file.Shapes) != 10 {
		return fmt.Errorf("%d shapes", len(file.Shapes))
	}
	_, err = file.Encode()
	return err
}

// processTime is what a process has used of processors, in milliseconds.
func processTime(cmd *exec.Cmd) float64 {
	return float64((cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Microseconds()) / 1000
}

// ownTime is what this one has.
func ownTime() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return float64(u.Utime.Sec+u.Stime.Sec)*1000 + float64(u.Utime.Usec+u.Stime.Usec)/1000
}

// prediction measures how long it takes to predict an image and ten shapes, and
// what that is of the speed at which SHA-384 can be computed at all.
func prediction() error {
	const times = 7
	var walls, used, memories []float64
	for i := range times + 1 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), predictTen+"=1")
		begin := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("predict: %w: %s", err, out)
		}
		if i > 0 { // the first fills the cache of tables
			walls = append(walls, float64(time.Since(begin).Microseconds())/1000)
			used = append(used, processTime(cmd))
			memories = append(memories, float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)*1024/1e6)
		}
	}
	row("record of one image and ten shapes, tables cached: processor time, median of 7", "ms", median(used), 300, true)
	figure("the same: time that passed, with whatever else the machine did", "ms", median(walls))
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
		begin := ownTime()
		if _, err := firmware.MRTD(measure.Interleaved); err != nil {
			return err
		}
		s := measure.System{Platform: record.TDX, Boot: record.BootKernel, Firmware: firmware, Image: m}
		events, err := s.Events()
		if err != nil {
			return err
		}
		measure.RTMRs(events)
		ours = append(ours, ownTime()-begin)
		// What has to be hashed: the firmware with its records, the UKI, its sections
		// twice over (as they are, and the kernel and the initrd on their own).
		hashed = 5*(len(uki)/2) + len(uki)/2 + 3653632*3/2
		data := make([]byte, hashed)
		begin = ownTime()
		sha512.Sum384(data)
		limit = append(limit, ownTime()-begin)
	}
	figure("MRTD, RTMR1 and RTMR2: processor time, median of 7", "ms", median(ours))
	figure(fmt.Sprintf("SHA-384 alone of as many bytes (%d MB)", hashed/1e6), "ms", median(limit))
	figure("ratio", "", median(ours)/median(limit))
	return systemdMeasure(tools, uki, times, median(ours)/(float64(hashed)/1e6))
}

// childTime reads the second line of a shell's times: what its children used, as
// "0m0.123000s 0m0.045000s".
func childTime(out string) (float64, error) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var um, sm int
	var us, ss float64
	if n, err := fmt.Sscanf(lines[len(lines)-1], "%dm%fs %dm%fs", &um, &us, &sm, &ss); err != nil || n != 4 {
		return 0, fmt.Errorf("times: %q", out)
	}
	return (float64(um+sm)*60 + us + ss) * 1000, nil
}

// systemdMeasure compares with systemd's own tool, which calculates PCR 11 only: a
// third of the bytes, so it is the time for each of them that is compared.
func systemdMeasure(tools *toolsroot.Root, uki []byte, times int, oursPerMB float64) error {
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
	hashed := 0
	for _, name := range []string{"linux", "osrel", "cmdline", "initrd", "uname", "sbat"} {
		s := pe.Section("." + name)
		if s == nil {
			continue
		}
		data := make([]byte, s.Content.Size())
		if _, err := s.Content.ReadAt(data, 0); err != nil {
			return err
		}
		hashed += len(data)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			return err
		}
		args = append(args, "--"+name+"="+path)
	}
	var theirs []float64
	for range times {
		// bubblewrap's children are not its own: the shell inside says what they used.
		timed := append([]string{"sh", "-c", `"$@" >/dev/null && times`, "sh"}, args...)
		out, err := tools.Cmd(context.Background(), toolsroot.Command{Args: timed, ReadOnly: []string{dir}, Offline: true}).CombinedOutput()
		if err != nil {
			return fmt.Errorf("systemd-measure: %w: %s", err, out)
		}
		ms, err := childTime(string(out))
		if err != nil {
			return err
		}
		theirs = append(theirs, ms)
	}
	perMB := median(theirs) / (float64(hashed) / 1e6)
	figure(fmt.Sprintf("PCR 11 of the same image with systemd-measure (%d MB): processor time", hashed/1e6), "ms", median(theirs))
	figure("a megabyte with systemd-measure", "ms", perMB)
	figure("a megabyte of ours", "ms", oursPerMB)
	figure("ratio", "", oursPerMB/perMB)
	return nil
}
