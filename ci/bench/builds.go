package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"chrysalis/image"
	"chrysalis/image/toolsroot"
)

// buildFolder is where the plain mkosi runs see what they build.
const buildFolder = "/build"

// builds measures how long builds take and what memory our own process needs, and
// compares with mkosi alone on the same packages.
func builds() error {
	const times = 3
	dir, err := os.MkdirTemp("", "chrysalis-bench-")
	if err != nil {
		return err
	}
	defer removeAll(dir)
	ours, plain := []float64{}, []float64{}
	var peak float64
	for i := range times {
		seconds, mb, err := ourBuild(nil, "image", "build", "--allow-dirty", "-o", filepath.Join(dir, "out"))
		if err != nil {
			return err
		}
		alone, err := plainBuild(filepath.Join(dir, fmt.Sprint("plain", i)))
		if err != nil {
			return err
		}
		ours, plain, peak = append(ours, seconds), append(plain, alone), max(peak, mb)
	}
	row("`image build`, warm cache: agent, UKI, engine disk, model disk, checks, median of 3", "s", median(ours), 60, true)
	figure("mkosi alone on the same packages: UKI and engine disk, the agent already compiled, median of 3", "s", median(plain))
	figure("ratio", "", median(ours)/median(plain))
	row("resident memory of `chrysalis`, peak of these builds", "MB", peak, 200, true)

	bundle := filepath.Join(dir, "bundle")
	if _, mb, err := ourBuild(nil, "image", "bundle", "-o", bundle); err != nil {
		return err
	} else {
		peak = mb
	}
	seconds, mb, err := ourBuild([]string{"XDG_CACHE_HOME=" + filepath.Join(dir, "cache")},
		"image", "build", "--allow-dirty", "-o", filepath.Join(dir, "out"), "--mirror", bundle)
	if err != nil {
		return err
	}
	figure("`image build` from a bundle, empty cache: tools root as well", "s", seconds)
	row("resident memory of `chrysalis`, peak of that and of making the bundle", "MB", max(peak, mb), 200, true)

	if seconds, _, err := ourBuild(nil, "image", "lock", "--dry-run"); err != nil {
		fmt.Printf("| `image lock` | not measured: %s | | |\n", strings.SplitN(err.Error(), "\n", 2)[0])
	} else {
		row("`image lock`: every package resolved anew", "s", seconds, 60, true)
	}
	begin := time.Now()
	if out, err := exec.Command("ci/repro").CombinedOutput(); err != nil {
		return fmt.Errorf("ci/repro: %w\n%s", err, out)
	}
	row("`make repro`: two builds from empty caches, tools roots as well, compared", "s", time.Since(begin).Seconds(), 360, true)
	return nil
}

// ourBuild runs chrysalis and returns how long that took and how much memory the
// process itself had resident at most, in MB; what it runs does not count.
func ourBuild(env []string, args ...string) (seconds, mb float64, err error) {
	cmd := exec.Command("bin/chrysalis", args...)
	cmd.Env = append(os.Environ(), env...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	// It only grows, so that the last time it is read is as good as all others.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return 0, 0, fmt.Errorf("chrysalis %s: %w\n%s", strings.Join(args, " "), err, output.String())
			}
			return time.Since(begin).Seconds(), mb, nil
		case <-tick.C:
			if now, ok := highWater(cmd.Process.Pid); ok {
				mb = now
			}
		}
	}
}

// highWater reads VmHWM, see proc_pid_status(5).
func highWater(pid int) (mb float64, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(data)) {
		if value, found := strings.CutPrefix(line, "VmHWM:"); found {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
			return kib * 1024 / 1e6, err == nil
		}
	}
	return 0, false
}

// plainBuild lays out what mkosi reads and returns how long mkosi itself takes
// for the UKI and the engine disk.
func plainBuild(dir string) (float64, error) {
	lock, err := image.ReadLock(".")
	if err != nil {
		return 0, err
	}
	root, err := image.OpenTools(lock)
	if err != nil {
		return 0, err
	}
	var total time.Duration
	for _, b := range []struct {
		tree, from string
		files      []string
		agent      bool
	}{
		{"image", ".", []string{"mkosi.conf", "mkosi.conf.d", "mkosi.profiles", "mkosi.skeleton", "mkosi.postinst", "mkosi.finalize", "image/modules.list"}, true},
		{"engine/llama.cpp", "image/engines/llama.cpp", []string{"."}, false},
	} {
		stage := filepath.Join(dir, filepath.Base(b.tree))
		for _, name := range b.files {
			if err := copyPath(filepath.Join(b.from, name), filepath.Join(stage, name)); err != nil {
				return 0, err
			}
		}
		tree, err := lock.Tree(b.tree)
		if err != nil {
			return 0, err
		}
		packages, err := image.Fetch(context.Background(), tree, nil, func(string, int64, int64) {})
		if err != nil {
			return 0, err
		}
		for i, p := range tree.Packages {
			if err := copyPath(packages[i], filepath.Join(stage, "packages", p.Name+".deb")); err != nil {
				return 0, err
			}
		}
		if b.agent {
			build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(stage, "agent", "init"), "./agent")
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				return 0, fmt.Errorf("go build: %w\n%s", err, out)
			}
		}
		cmd := root.Cmd(context.Background(), toolsroot.Command{
			Args: []string{"mkosi", "--force", fmt.Sprintf("--source-date-epoch=%d", tree.Epoch().Unix()),
				"--output-directory=" + buildFolder + "/out", "--workspace-directory=/var/tmp", "--package-cache-dir=/var/tmp/packages", "build"},
			Dir: buildFolder, Bind: []toolsroot.Bind{{Host: stage, Inside: buildFolder, Writable: true}}, Offline: true, Privileged: true,
		})
		if err := os.Mkdir(filepath.Join(stage, "out"), 0o755); err != nil {
			return 0, err
		}
		begin := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("mkosi: %w\n%s", err, out)
		}
		total += time.Since(begin)
	}
	return total.Seconds(), nil
}

// copyPath copies a file or a folder.
func copyPath(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.CopyFS(to, os.DirFS(from))
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// removeAll removes a folder that may hold a tools root, some of whose folders
// cannot be written to.
func removeAll(dir string) {
	exec.Command("chmod", "-R", "u+w", dir).Run()
	os.RemoveAll(dir)
}
