package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"chrysalis/image/toolsroot"
)

// compilerRecipe changes whenever the way in which the compiler's root is made
// does.
const compilerRecipe = "compiler/1"

// HelperName is the file name of the GPU helper.
const HelperName = "gpu-helper"

// helperModules are the Go modules that the helper is made of beside our own
// source. go.sum fixes their content.
var helperModules = []string{"github.com/NVIDIA/go-nvml"}

// MakeCompiler returns the root of the C compiler that the lock names and makes it
// when it is not there. Its packages are only unpacked.
func MakeCompiler(ctx context.Context, lock *Lock, mirrors []string, progress Progress) (*toolsroot.Root, error) {
	tree, err := lock.Tree("gpu-compiler")
	if err != nil {
		return nil, err
	}
	if err := checkRecipe(tree); err != nil {
		return nil, err
	}
	dir, err := toolsroot.Path(tree.Key(compilerRecipe))
	if err != nil {
		return nil, err
	}
	if root, err := toolsroot.Open(dir); err == nil {
		return root, nil
	}
	unlock, err := lockFile(dir + ".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if root, err := toolsroot.Open(dir); err == nil {
		return root, nil // somebody else made it while we waited
	}
	paths, err := Fetch(ctx, tree, mirrors, progress)
	if err != nil {
		return nil, err
	}
	progress("unpack the compiler", 0, 0)
	half := dir + ".new"
	if err := removeTree(half); err != nil {
		return nil, err
	}
	for _, sub := range []string{"usr", "etc", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(half, sub), 0o755); err != nil {
			return nil, err
		}
	}
	for i, p := range tree.Packages {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "--extract", paths[i], half).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("unpack package %s: %w\n%s", p.Name, err, lastLines(string(out), 5))
		}
	}
	if err := toolsroot.Seal(ctx, half); err != nil {
		return nil, err
	}
	if err := os.Rename(half, dir); err != nil {
		return nil, fmt.Errorf("put the compiler in place: %w", err)
	}
	return toolsroot.Open(dir)
}

// Helper builds the GPU helper (agent/gpu/helper) for engine disks with NVIDIA's
// driver and returns its path. It runs Go's tools out of the toolchain in PATH,
// which must be the lock's, and the lock's C compiler, in a root of their own
// without a network, so that the same source gives the same bits anywhere. The
// program needs the C library and nothing else at run time; NVIDIA's library it
// loads by itself.
func (b *Builder) Helper(ctx context.Context) (string, error) {
	if err := b.prepare(ctx); err != nil {
		return "", err
	}
	if err := checkToolchain(ctx, b.Source, b.lock.Go); err != nil {
		return "", err
	}
	g, err := helperGo(b.Source, b.lock)
	if err != nil {
		return "", err
	}
	zips, err := fetchModules(ctx, b.Source, g, b.Mirrors, b.Progress)
	if err != nil {
		return "", err
	}
	compiler, err := MakeCompiler(ctx, b.lock, b.Mirrors, b.Progress)
	if err != nil {
		return "", err
	}
	b.Progress("build the GPU helper", 0, 0)
	cache, err := toolsroot.CacheDir()
	if err != nil {
		return "", err
	}
	stage, remove, err := stageDir(cache, "helper-")
	if err != nil {
		return "", err
	}
	defer remove()
	proxy := filepath.Join(stage, "proxy")
	if err := stageModules(proxy, g, zips); err != nil {
		return "", fmt.Errorf("lay out the helper's modules: %w", err)
	}
	if err := copyLinks(proxy); err != nil {
		return "", err
	}
	goroot, err := hostGo(ctx, b.Source)
	if err != nil {
		return "", err
	}
	command := toolsroot.Command{
		Args: []string{"/goroot/bin/go", "build", "-trimpath", "-buildvcs=false", "-tags=nvml",
			"-ldflags=-s -w -buildid= -linkmode=external -extldflags=-Wl,--build-id=none", "-o", "/build/" + HelperName, "./agent/gpu/helper"},
		Dir:     "/source",
		Bind:    append(goroot, toolsroot.Bind{Host: b.Source, Inside: "/source"}, toolsroot.Bind{Host: stage, Inside: "/build", Writable: true}),
		Offline: true,
		Env: []string{
			"GOROOT=/goroot", "GOCACHE=/build/cache", "GOMODCACHE=/build/modules", "GOPROXY=file:///build/proxy", "GOSUMDB=off", "GOENV=off",
			"GOWORK=off", "GOFLAGS=-mod=readonly", "GOTOOLCHAIN=local", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1",
			"CGO_ENABLED=1", "CC=x86_64-linux-gnu-gcc-14", "CGO_CFLAGS=-O2 -Wno-deprecated-declarations",
		},
	}
	if output, err := compiler.Cmd(ctx, command).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the GPU helper: %w\n%s", err, lastLines(string(output), 20))
	}
	path := filepath.Join(b.Out, HelperName)
	if err := replaceFile(filepath.Join(stage, HelperName), path); err != nil {
		return "", fmt.Errorf("put %s in place: %w", HelperName, err)
	}
	return path, os.Chmod(path, 0o755)
}

// helperGo is what the helper is compiled with.
func helperGo(source string, lock *Lock) (Go, error) {
	modules, err := sumsOf(source, helperModules)
	return Go{Toolchain: lock.Go.Toolchain, Modules: modules}, err
}

// sumsOf returns modules as go.mod and go.sum give them.
func sumsOf(source string, paths []string) ([]Module, error) {
	data, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return nil, err
	}
	sums, err := os.ReadFile(filepath.Join(source, "go.sum"))
	if err != nil {
		return nil, err
	}
	var out []Module
	for _, path := range paths {
		m := Module{Path: path}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require ")); len(f) >= 2 && f[0] == path {
				m.Version = f[1]
			}
		}
		for line := range strings.Lines(string(sums)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == path && f[1] == m.Version {
				m.Sum = f[2]
			}
		}
		if m.Version == "" || m.Sum == "" {
			return nil, fmt.Errorf("go.mod and go.sum do not fix the Go module %s", path)
		}
		out = append(out, m)
	}
	return out, nil
}

// copyLinks replaces the symbolic links below a folder with what they point at,
// which a sandbox does not see.
func copyLinks(dir string) error {
	return filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Type()&os.ModeSymlink == 0 {
			return err
		}
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		return errors.Join(os.Remove(path), copyFile(target, path, 0o644))
	})
}

// hostGo shows the toolchain in PATH at /goroot. Distributions make parts of it
// symbolic links to elsewhere.
func hostGo(ctx context.Context, source string) ([]toolsroot.Bind, error) {
	cmd := exec.CommandContext(ctx, "go", "env", "GOROOT")
	cmd.Dir, cmd.Env = source, goEnv()
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("ask Go where it is: %w", commandError(err))
	}
	root := strings.TrimSpace(string(out))
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("read the Go toolchain: %w", err)
	}
	var binds []toolsroot.Bind
	for _, e := range entries {
		host, err := filepath.EvalSymlinks(filepath.Join(root, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("read the Go toolchain: %w", err)
		}
		binds = append(binds, toolsroot.Bind{Host: host, Inside: "/goroot/" + e.Name()})
	}
	return binds, nil
}
