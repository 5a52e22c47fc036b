// Package fakenvml builds a stand-in for NVIDIA's management library and writes
// the script that it follows, for tests. The library is loaded by the real helper
// through the real dlopen.
package fakenvml

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"chrysalis/attest/nvidia/nvidiatest"
)

// Library is the name under which the helper looks for it.
const Library = "libnvidia-ml.so.1"

// Env names the variable that holds the folder of the script.
const Env = "FAKE_NVML"

//go:embed testdata/nvml.c
var source string

// ErrNoCompiler is returned where there is no C compiler.
var ErrNoCompiler = errors.New("there is no C compiler: install gcc")

// Build compiles the library into a folder and returns its path. Functions in
// omit are left out, as in a library that is too old. It must run below the
// module's root, whose go.mod names the header that it is built with.
func Build(ctx context.Context, dir string, omit ...string) (string, error) {
	if _, err := exec.LookPath("gcc"); err != nil {
		return "", ErrNoCompiler
	}
	module, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/NVIDIA/go-nvml").Output()
	if err != nil {
		return "", fmt.Errorf("find nvml.h: %w", err)
	}
	c, exports, out := filepath.Join(dir, "nvml.c"), filepath.Join(dir, "exports"), filepath.Join(dir, Library)
	list := "{ global: nvml*; local: *; };"
	if len(omit) > 0 {
		list = "{ global: nvml*; local: " + strings.Join(omit, "; ") + "; *; };"
	}
	if err := errors.Join(os.WriteFile(c, []byte(source), 0o644), os.WriteFile(exports, []byte(list), 0o644)); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-DNVML_NO_UNVERSIONED_FUNC_DEFS=1",
		"-I", filepath.Join(strings.TrimSpace(string(module)), "pkg/nvml"), "-Wno-deprecated-declarations",
		"-Wl,-soname,"+Library, "-Wl,--version-script="+exports, "-o", out, c)
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile the library: %w\n%s", err, output)
	}
	return out, nil
}

// BuildHelper compiles the helper with the binding of the library.
func BuildHelper(ctx context.Context, out string) error {
	if _, err := exec.LookPath("gcc"); err != nil {
		return ErrNoCompiler
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-tags=nvml", "-o", out, "chrysalis/agent/gpu/helper")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1", "CGO_CFLAGS=-O2 -Wno-deprecated-declarations")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the helper: %w\n%s", err, output)
	}
	return nil
}

// Script is what the library does; testdata/nvml.c lists the keys.
type Script map[string]string

// Write writes a script and GPUs into a folder. The number of GPUs is count's,
// unless the script has another.
func Write(dir string, s Script, gpus ...*nvidiatest.GPU) error {
	script := Script{"count": fmt.Sprint(len(gpus))}
	maps.Copy(script, s)
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(script)) {
		fmt.Fprintf(&text, "%s %s\n", key, script[key])
	}
	files := map[string][]byte{"script": []byte(text.String())}
	for i, g := range gpus {
		key := make([]byte, 48)
		secret, err := g.Leaf.Key.Bytes()
		if err != nil {
			return err
		}
		copy(key[48-len(secret):], secret)
		files[fmt.Sprintf("gpu%d.key", i)] = key
		files[fmt.Sprintf("gpu%d.pem", i)] = g.Leaf.PEM()
		files[fmt.Sprintf("gpu%d.spdm", i)] = g.Unsigned([32]byte{})[37:]
	}
	for name, data := range files {
		// Whole at once: the library may be reading.
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", data, 0o644); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	return nil
}
