package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"chrysalis/devnet"
	"chrysalis/devnet/devnettest"
	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/profile"
	"chrysalis/measure/record"
	"chrysalis/models/card"
	"chrysalis/registry"
)

// The tests run the real programs, and let each go wrong at points that are spread
// over the whole of its run: killed there, or without room on its disk from there on.
// Whatever the point is, nothing half-written may have a final name, no process may be
// left, and the same command must work when it is run again, and leave what it leaves
// when nothing goes wrong.

var scratch, program, fault string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if scratch, err = os.MkdirTemp("", "chrysalis-fault-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(scratch)
		program, fault = filepath.Join(scratch, "chrysalis"), filepath.Join(scratch, "fault")
		for out, pkg := range map[string]string{program: "./cmd/chrysalis", fault: "./ci/fault"} {
			cmd := exec.Command("go", "build", "-o", out, pkg)
			cmd.Dir, cmd.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
			if output, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "%v\n%s", err, output)
				return 1
			}
		}
		return m.Run()
	}())
}

// points are the places of a run of n calls at which something goes wrong: all where
// there are no more than limit, else as many that are spread evenly. With
// CHRYSALIS_FAULT_POINTS there are as many as that says.
func points(n, limit int) (list []int) {
	if more, err := strconv.Atoi(os.Getenv("CHRYSALIS_FAULT_POINTS")); err == nil && more > 0 {
		limit = more
	}
	if n <= limit {
		limit = n
	}
	for i := range limit {
		list = append(list, 1+i*n/limit)
	}
	return list
}

// command is one run of the program.
type command struct {
	args, env []string
	dir       string
}

type outcome struct {
	status int
	text   string // stdout and stderr
	calls  int    // that were counted
}

// run runs it. With at > 0 something goes wrong.
func (c command) run(t *testing.T, at int, do, class string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	count := filepath.Join(t.TempDir(), "count")
	args := append([]string{"-at", strconv.Itoa(at), "-do", do, "-class", class, "-count", count, program}, c.args...)
	cmd := exec.CommandContext(ctx, fault, args...)
	cmd.Dir, cmd.Env = c.dir, append(os.Environ(), c.env...)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("%v at %d: it does not end: %s", do, at, out)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	o := outcome{status: cmd.ProcessState.ExitCode(), text: string(out)}
	data, err := os.ReadFile(count)
	if err == nil {
		o.calls, err = strconv.Atoi(string(data))
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return o
}

// plain runs it without anything that goes wrong, and untraced.
func (c command) plain(t *testing.T) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, c.args...)
	cmd.Dir, cmd.Env = c.dir, append(os.Environ(), c.env...)
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%v, %v: %s", err, ctx.Err(), out)
	}
	return outcome{status: cmd.ProcessState.ExitCode(), text: string(out)}
}

// sums are the files in a folder, with their hashes.
func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[d.Name()] = fmt.Sprintf("%x", sha256.Sum256(data))[:16]
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// left are the processes that have a folder in their command line, other than ours.
func left(dir string) (list []string) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		line, _ := os.ReadFile(path)
		if bytes.Contains(line, []byte(dir)) {
			list = append(list, path+": "+string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
		}
	}
	return list
}

func nothingLeft(t *testing.T, dir, when string) {
	t.Helper()
	var list []string
	for range 400 {
		if list = left(dir); len(list) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%s: processes are left: %s", when, strings.Join(list, "\n"))
}

// sweep lets a command that makes files in dir/out go wrong in each way and at each
// point. start makes the folder ready for a run; what the command leaves there must
// be the same every time.
func sweep(t *testing.T, limit int, start func(dir string) command) {
	fresh := func() (command, string) {
		dir := t.TempDir()
		out := filepath.Join(dir, "out")
		if err := os.Mkdir(out, 0o755); err != nil {
			t.Fatal(err)
		}
		return start(dir), out
	}
	c, out := fresh()
	whole := c.run(t, 0, "kill", "")
	if whole.status != 0 {
		t.Fatalf("without a fault: %s", whole.text)
	}
	want := sums(t, out)
	if len(want) == 0 {
		t.Fatal("it makes nothing")
	}
	for _, fault := range []struct {
		do, class string
		limit     int
	}{{"kill", "", limit}, {"ENOSPC", "write", limit / 2}, {"EROFS", "open", 2}, {"EIO", "sync", 3}} {
		t.Run(fault.do, func(t *testing.T) {
			c, _ := fresh()
			n := whole.calls
			if fault.class != "" {
				n = c.run(t, 0, fault.do, fault.class).calls
			}
			list := points(n, fault.limit)
			t.Logf("%d calls, it goes wrong at %v", n, list)
			for _, at := range list {
				c, out := fresh()
				when := fmt.Sprintf("%s at %d of %d", fault.do, at, n)
				o := c.run(t, at, fault.do, fault.class)
				reached := o.calls >= at // the order of calls is not always the same
				if reached && o.status == 0 {
					t.Errorf("%s: it says that it succeeded: %s", when, o.text)
				}
				if reached && fault.do != "kill" && o.status != 1 {
					t.Errorf("%s: exit status %d: %s", when, o.status, o.text)
				}
				complete := true
				there := sums(t, out)
				for name, sum := range want {
					got, ok := there[name]
					if complete = complete && ok; ok && got != sum {
						t.Errorf("%s: %s is half-written", when, name)
					}
				}
				for name := range there {
					if want[name] == "" && !strings.HasPrefix(name, ".") {
						t.Errorf("%s: %s is there", when, name)
					}
					if want[name] == "" && fault.do != "kill" && !strings.Contains(name, ".partial") {
						t.Errorf("%s: %s is left", when, name)
					}
				}
				nothingLeft(t, filepath.Dir(out), when)
				again := c.plain(t)
				if again.status != 0 && !(complete && strings.Contains(again.text, "exists")) {
					t.Errorf("%s: the next run: exit status %d: %s", when, again.status, again.text)
				}
				if got := sums(t, out); !maps.Equal(got, want) {
					t.Errorf("%s: the next run leaves %v, expected %v", when, got, want)
				}
			}
		})
	}
	t.Run("two at once", func(t *testing.T) {
		c, out := fresh()
		both := make(chan outcome, 2)
		for range 2 {
			go func() { both <- c.plain(t) }()
		}
		one, two := <-both, <-both
		if one.status != 0 && two.status != 0 {
			t.Errorf("none succeeds: %s\n%s", one.text, two.text)
		}
		for _, o := range []outcome{one, two} {
			if o.status != 0 && !strings.Contains(o.text, "another program") && !strings.Contains(o.text, "exists") {
				t.Errorf("one says: %s", o.text)
			}
		}
		if got := sums(t, out); !maps.Equal(got, want) {
			t.Errorf("they leave %v, expected %v", got, want)
		}
	})
}

func engineFolder(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "engine")
	p, err := json.Marshal(profile.Profile{
		Version: 1, Name: "test", Health: "/health", ReadySeconds: 5,
		Argv:        []profile.Args{{Args: []string{"/engine", "${socket}"}}},
		Environment: map[string]string{}, Parameters: map[string]profile.Parameter{},
		Formats: []string{card.GGUF}, Cache: profile.CacheNone, Status: profile.Tested, Seccomp: []string{},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"engine": bytes.Repeat([]byte("engine"), 1<<17), profile.Path: p} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func source(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../..", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		imagetest.Missing(t, err)
	}
	return path
}

func TestModelPack(t *testing.T) {
	gguf := source(t, "models/demo/demo.gguf")
	sweep(t, 16, func(dir string) command {
		return command{args: []string{"model", "pack", "--name", "a/b", "--revision", "1", "-o", filepath.Join(dir, "out", "model.disk"), gguf}}
	})
}

func TestEnginePack(t *testing.T) {
	folder := engineFolder(t)
	sweep(t, 16, func(dir string) command {
		return command{args: []string{"engine", "pack", "-o", filepath.Join(dir, "out", "engine.disk"), folder}}
	})
}

// With --force there is a disk before, and there is one at all times.
func TestEnginePackForce(t *testing.T) {
	folder := engineFolder(t)
	old := []byte("the one before")
	dir := t.TempDir()
	disk := filepath.Join(dir, "engine.disk")
	c := command{args: []string{"engine", "pack", "--force", "-o", disk, folder}}
	if o := c.plain(t); o.status != 0 {
		t.Fatal(o.text)
	}
	want := sums(t, dir)
	n := c.run(t, 0, "kill", "").calls
	for _, at := range points(n, 12) {
		if err := os.WriteFile(disk, old, 0o644); err != nil {
			t.Fatal(err)
		}
		c.run(t, at, "kill", "")
		if got := sums(t, dir)["engine.disk"]; got != want["engine.disk"] && got != fmt.Sprintf("%x", sha256.Sum256(old))[:16] {
			t.Errorf("killed at %d: the disk is neither the old nor the new one", at)
		}
		if o := c.plain(t); o.status != 0 || !maps.Equal(sums(t, dir), want) {
			t.Errorf("killed at %d: the next run leaves %v, expected %v: %s", at, sums(t, dir), want, o.text)
		}
	}
}

func TestImageExport(t *testing.T) {
	uki, model := source(t, "out/chrysalis.efi"), source(t, "out/demo.disk")
	engine := filepath.Join(t.TempDir(), "engine.disk")
	if o := (command{args: []string{"engine", "pack", "-o", engine, engineFolder(t)}}).plain(t); o.status != 0 {
		t.Fatal(o.text)
	}
	sweep(t, 6, func(dir string) command {
		return command{args: []string{"image", "export", "--image", uki, "--engine", engine, "--model", model, "-o", filepath.Join(dir, "out", "disk.raw")}}
	})
}

// TestImageBuild kills the build of the image, which takes long, at a few points, and
// looks at the folder of artefacts and at the cache.
func TestImageBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the image")
	}
	imagetest.Tools(t)
	top := source(t, "image.lock")
	want := source(t, "out/chrysalis.efi")
	if sum(t, want) == "" {
		t.Fatal("no image")
	}
	out := t.TempDir()
	c := command{dir: filepath.Dir(top), args: []string{"image", "build", "--image-only", "--allow-dirty", "--out", out}}
	whole := c.run(t, 0, "kill", "")
	if whole.status != 0 {
		t.Fatal(whole.text)
	}
	efi := filepath.Join(out, "chrysalis.efi")
	built := sum(t, efi)
	stages := func() int {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		list, _ := filepath.Glob(filepath.Join(cache, "chrysalis", "build-*"))
		return len(list)
	}
	before := stages()
	for _, at := range points(whole.calls-1, 3)[1:] {
		if err := os.Remove(efi); err != nil {
			t.Fatal(err)
		}
		o := c.run(t, at, "kill", "")
		if got := sum(t, efi); got != "" && got != built {
			t.Errorf("killed at %d of %d: the image is half-written", at, whole.calls)
		}
		nothingLeft(t, out, "killed at "+strconv.Itoa(at))
		if again := c.plain(t); again.status != 0 || sum(t, efi) != built {
			t.Errorf("killed at %d (exit status %d): the next run: %s", at, o.status, again.text)
		}
	}
	if hidden, _ := filepath.Glob(filepath.Join(out, ".*")); len(hidden) > 0 {
		t.Errorf("%v are left", hidden)
	}
	if now := stages(); now > before {
		t.Errorf("%d build folders are left in the cache, before there were %d", now, before)
	}
}

func sum(t *testing.T, path string) string {
	t.Helper()
	s, _, err := image.HashFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return s
}

// TestRegistryPublish kills the publisher; each record is then published by the next
// run, once, and the wallet pays for one message.
func TestRegistryPublish(t *testing.T) {
	dir := t.TempDir()
	chain, server := devnettest.Serve(t, devnet.Options{})
	config, key := filepath.Join(dir, "global.json"), filepath.Join(dir, "publisher.key")
	if err := os.WriteFile(config, chain.GlobalConfig(server), 0o644); err != nil {
		t.Fatal(err)
	}
	env := []string{"XDG_STATE_HOME=" + dir, "CHRYSALIS_TON_NETWORK=devnet", "CHRYSALIS_TON_CONFIG=" + config, "CHRYSALIS_TON_KEY=" + key}
	must := func(args ...string) string {
		t.Helper()
		o := command{args: args, env: env}.plain(t)
		if o.status != 0 {
			t.Fatalf("%v: %s", args, o.text)
		}
		return o.text
	}
	must("registry", "new-key", key)
	private, err := registry.LoadKey(key)
	if err != nil {
		t.Fatal(err)
	}
	wallet, err := registry.NewWallet(private, "v5r1", chain.GlobalID())
	if err != nil {
		t.Fatal(err)
	}
	if err := chain.Fund(wallet.Address.Std(), big.NewInt(100_000_000_000)); err != nil {
		t.Fatal(err)
	}
	must("registry", "init")
	address := registry.AddressOfWallet(wallet).String()
	publish := func(i int) command {
		m := &record.Model{Version: record.Version, Kind: record.KindModel, Name: "acme/model", Revision: strconv.Itoa(i), RootHash: bytes.Repeat([]byte{byte(i >> 8), byte(i)}, 16)}
		data, err := record.Encode(m)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, fmt.Sprintf("model-%d.json", i))
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return command{args: []string{"registry", "publish", file}, env: env}
	}
	whole := publish(0).run(t, 0, "kill", "")
	if whole.status != 0 || whole.calls == 0 {
		t.Fatalf("%+v", whole)
	}
	list := points(whole.calls, 10)
	t.Logf("%d calls, it is killed at %v", whole.calls, list)
	for i, at := range list {
		c := publish(i + 1)
		c.run(t, at, "kill", "")
		nothingLeft(t, dir, fmt.Sprintf("killed at %d", at))
		if o := c.plain(t); o.status != 0 {
			t.Errorf("killed at %d of %d: the next run: %s", at, whole.calls, o.text)
		}
		if o := c.plain(t); o.status != 0 || !strings.Contains(o.text, "nothing to do") {
			t.Errorf("killed at %d of %d: the run after that: %s", at, whole.calls, o.text)
		}
	}
	if got := strings.Count(must("registry", "list", address), "model  active"); got != 1+len(list) {
		t.Errorf("%d records are published, expected %d", got, 1+len(list))
	}
	// What a full disk keeps it from remembering, it says, at once.
	c := publish(1000)
	if o := c.run(t, 1, "ENOSPC", "write"); o.calls > 0 && (o.status != 3 || !strings.Contains(o.text, "no space left")) {
		t.Errorf("on a full disk: exit status %d: %s", o.status, o.text)
	}
	if o := c.plain(t); o.status != 0 {
		t.Errorf("after a full disk: %s", o.text)
	}
}

// TestUp kills `up`, or its supervisor, or both, while a VM starts whose kernel is
// none: QEMU, its TPM and its helpers run, and nothing of them may be left. The next
// `up` gets as far as one does that was never disturbed.
func TestUp(t *testing.T) {
	if testing.Short() {
		t.Skip("starts QEMU")
	}
	imagetest.Tools(t)
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{"up", "vm", "--image", file("image.efi", make([]byte, 4096)), "--engine", file("engine.disk", make([]byte, 1<<20)),
		"--model", file("model.disk", make([]byte, 1<<20)), "--manifest", file("manifest.json", []byte("{}")),
		"--accel", "tcg", "--listen", "127.0.0.1:0", "--timeout", "2s"}
	const undisturbed = "was not ready in 2s"
	state := filepath.Join(dir, "state")
	c := command{args: args, env: []string{"XDG_STATE_HOME=" + state}}
	whole := c.run(t, 0, "kill", "")
	if whole.status != 1 || !strings.Contains(whole.text, undisturbed) {
		t.Fatalf("undisturbed: exit status %d: %s", whole.status, whole.text)
	}
	nothingLeft(t, state, "undisturbed")
	next := func(when string, cut bool) {
		t.Helper()
		look := command{args: []string{"status", "vm"}, env: c.env}
		if cut {
			look.plain(t) // which ends what of a sandbox outlives its supervisor
		}
		nothingLeft(t, state, when)
		filepath.WalkDir(state, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == "development-root.pem" && sum(t, path) == "" {
				t.Errorf("%s: %s is empty", when, path)
			}
			return nil
		})
		if o := look.plain(t); strings.Contains(o.text, "ready ") {
			t.Errorf("%s: status: %s", when, o.text)
		}
	}
	for _, fault := range []struct {
		do, class string
		limit     int
	}{{"kill", "", 9}, {"cut", "", 3}, {"ENOSPC", "write", 3}, {"EROFS", "open", 2}} {
		t.Run(fault.do, func(t *testing.T) {
			n := whole.calls
			if fault.class != "" {
				n = c.run(t, 0, fault.do, fault.class).calls
			}
			list := points(n, fault.limit)
			t.Logf("%d calls, it goes wrong at %v", n, list)
			for _, at := range list {
				o := c.run(t, at, fault.do, fault.class)
				if o.status == 0 {
					t.Errorf("%s at %d: it says that it succeeded", fault.do, at)
				}
				next(fmt.Sprintf("%s at %d of %d", fault.do, at, n), fault.do == "cut")
			}
			// Once for all: each of these began where the one before it had been killed.
			if o := c.plain(t); o.status != 1 || !strings.Contains(o.text, undisturbed) {
				t.Errorf("the next up: exit status %d: %s", o.status, o.text)
			}
			nothingLeft(t, state, "the next up")
		})
	}
	runs, err := filepath.Glob(filepath.Join(state, "chrysalis/vms/vm/runs/*"))
	if err != nil || len(runs) > 2 {
		t.Errorf("%d runs are kept: %v, %v", len(runs), runs, err)
	}
	for _, r := range runs {
		if sockets, _ := filepath.Glob(filepath.Join(r, "io", "*.sock")); len(sockets) > 0 {
			t.Errorf("%v are left", sockets)
		}
	}
}

// TestFault tries this package's own program.
func TestFault(t *testing.T) {
	dir := t.TempDir()
	c := command{args: []string{"registry", "new-key", filepath.Join(dir, "key")}}
	n := c.run(t, 0, "kill", "").calls
	if n < 2 {
		t.Fatalf("%d calls", n)
	}
	os.Remove(filepath.Join(dir, "key"))
	if o := c.run(t, 1, "kill", ""); o.status != 137 || o.calls != 1 {
		t.Errorf("killed: %+v", o)
	}
	if _, err := os.Stat(filepath.Join(dir, "key")); err == nil {
		t.Error("the call at which it was killed was made")
	}
	if o := c.run(t, 1, "EROFS", "open"); o.status != 1 || !strings.Contains(o.text, "read-only file system") {
		t.Errorf("a read-only file system: %+v", o)
	}
	for _, args := range [][]string{{"-do", "melt", program}, {"-class", "x", program}, {}, {"/nowhere"}} {
		if err := exec.Command(fault, args...).Run(); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
	if got := points(100, 4); !slices.Equal(got, []int{1, 26, 51, 76}) && os.Getenv("CHRYSALIS_FAULT_POINTS") == "" {
		t.Error(got)
	}
}
