package image

import (
	"archive/zip"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"chrysalis/image/toolsroot"
)

// agentTags are the build tags of the published agent. HTTP/2 is a megabyte of
// code that nothing in the guest may speak.
const agentTags = "nethttpomithttp2"

// goEnv is an environment for the go command in which nothing of the caller's
// has a say in the result: no GOFLAGS, no go.work, no experiments, no cgo. Extra
// entries come last.
func goEnv(extra ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		switch name {
		case "GOROOT", "GOCACHE", "GOTMPDIR":
			return false
		}
		return strings.HasPrefix(name, "GO") || strings.HasPrefix(name, "CGO_")
	})
	return append(append(env,
		"GOENV=off", "GOWORK=off", "GOFLAGS=-mod=readonly", "GOTOOLCHAIN=local",
		"GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "CGO_ENABLED=0",
	), extra...)
}

// toolchain returns the version of the Go toolchain that is first in PATH.
func toolchain(ctx context.Context, source string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "env", "GOVERSION")
	cmd.Dir, cmd.Env = source, goEnv()
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("ask Go for its version: %w; install Go and put it in PATH", commandError(err))
	}
	return strings.TrimSpace(string(out)), nil
}

// ResolveGo returns what the agent of the source tree is compiled with now: the
// toolchain in PATH, and the modules that go.mod and go.sum give it. It may
// download modules.
func ResolveGo(ctx context.Context, source string) (Go, error) {
	version, err := toolchain(ctx, source)
	if err != nil {
		return Go{}, err
	}
	// Only here does the caller's configuration say where modules come from.
	modules, err := agentModules(exec.CommandContext(ctx, "go", listAgent(agentTags)...), source, userGoEnv())
	if err != nil {
		return Go{}, err
	}
	g := Go{Toolchain: version, Modules: modules}
	return g, g.check()
}

// userGoEnv is goEnv with the caller's module cache and proxies.
func userGoEnv() []string {
	var keep []string
	for _, name := range []string{"GOENV", "GOPATH", "GOMODCACHE", "GOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "GONOPROXY", "GOINSECURE", "GOVCS", "GOAUTH"} {
		value, ok := os.LookupEnv(name)
		if ok || name == "GOENV" {
			keep = append(keep, name+"="+value)
		}
	}
	return goEnv(keep...)
}

// listAgent is how the go command is asked which modules the agent's packages
// come from.
func listAgent(tags string) []string {
	return []string{"list", "-deps", "-tags=" + tags, "-f",
		`{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{or .Sum "none"}}{{if .Replace}} replaced{{end}}{{end}}{{end}}`, "./agent"}
}

// agentModules runs such a command.
func agentModules(cmd *exec.Cmd, source string, env []string) ([]Module, error) {
	cmd.Dir, cmd.Env = source, env
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the agent's modules: %w", commandError(err))
	}
	var modules []Module
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue // a package of the standard library, or our own
		}
		if len(f) != 3 {
			return nil, fmt.Errorf("the agent uses a Go module that no sum fixes: %s", strings.TrimSpace(line))
		}
		modules = append(modules, Module{f[0], f[1], f[2]})
	}
	slices.SortFunc(modules, func(a, b Module) int { return cmp.Compare(a.Path, b.Path) })
	return slices.Compact(modules), nil
}

// commandError adds what a program said to how it ended.
func commandError(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w\n%s", err, lastLines(string(exit.Stderr), 20))
	}
	return err
}

const refreshGo = "'chrysalis image lock --go-only' takes what is there now into the lock"

// checkToolchain compares the toolchain in PATH with the lock's: another one
// makes another agent.
func checkToolchain(ctx context.Context, source string, g Go) error {
	version, err := toolchain(ctx, source)
	if err != nil {
		return err
	}
	if version != g.Toolchain {
		return fmt.Errorf("%s names %s, and the go in PATH is %s, which makes another agent; install %s (https://go.dev/dl/) and put it first in PATH; %s",
			LockName, g.Toolchain, version, g.Toolchain, refreshGo)
	}
	return nil
}

// checkSums compares go.sum with the lock.
func checkSums(source string, g Go) error {
	data, err := os.ReadFile(filepath.Join(source, "go.sum"))
	if err != nil {
		return fmt.Errorf("read the module sums: %w", err)
	}
	sums := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 3 {
			sums[f[0]+" "+f[1]] = f[2]
		}
	}
	for _, m := range g.Modules {
		switch sum, ok := sums[m.Path+" "+m.Version]; {
		case !ok:
			return fmt.Errorf("%s names Go module %s %s, which go.sum does not; %s", LockName, m.Path, m.Version, refreshGo)
		case sum != m.Sum:
			return fmt.Errorf("Go module %s %s: %s says %s and go.sum %s: find out which is right before you build", m.Path, m.Version, LockName, m.Sum, sum)
		}
	}
	return nil
}

// checkModules compares what an agent is about to be built from with the lock.
// Only the published one must use all of it.
func checkModules(modules []Module, g Go, published bool) error {
	for _, c := range diffGo(Go{Modules: g.Modules}, Go{Modules: modules}) {
		if c.After != "" || published {
			return fmt.Errorf("the agent's Go modules are not those of %s: %s; %s", LockName, c, refreshGo)
		}
	}
	return nil
}

// fetchModules brings the lock's Go modules into the cache, as zips in one form,
// and returns their paths in the lock's order. Bundles are asked first, then the
// go command, with its own module cache and proxies.
func fetchModules(ctx context.Context, source string, g Go, mirrorNames []string, progress Progress) ([]string, error) {
	cache, err := toolsroot.CacheDir()
	if err != nil {
		return nil, err
	}
	from, err := openMirrors(mirrorNames)
	if err != nil {
		return nil, err
	}
	defer from.close()
	dir := filepath.Join(cache, "modules")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the module cache: %w", err)
	}
	paths := make([]string, len(g.Modules))
	tried := make([][]string, len(g.Modules))
	var missing []int
	for i, m := range g.Modules {
		paths[i] = filepath.Join(dir, m.key()+".zip")
		if moduleCached(paths[i], m) {
			continue
		}
		had := false
		for _, place := range from {
			b, ok := place.(*bundle)
			if !ok {
				continue
			}
			if err := b.keepModule(paths[i], m); err != nil {
				tried[i] = append(tried[i], fmt.Sprintf("  %s: %v", b, err))
				continue
			}
			had = true
			break
		}
		if !had {
			missing = append(missing, i)
		}
	}
	if len(missing) == 0 {
		return paths, nil
	}
	progress("fetch Go modules", 0, 0)
	var wanted []Module
	for _, i := range missing {
		wanted = append(wanted, g.Modules[i])
	}
	zips, reasons, err := goDownload(ctx, source, wanted)
	if err != nil {
		return nil, err
	}
	var errs []error
	for n, i := range missing {
		m, err := g.Modules[i], reasons[n]
		if err == nil {
			if err = keepModule(paths[i], zips[n], m); err == nil {
				continue
			}
		}
		tried[i] = append(tried[i], fmt.Sprintf("  the go command's module cache and GOPROXY: %v", err))
		errs = append(errs, fmt.Errorf("Go module %s %s (%s) could not be had; looked in\n%s", m.Path, m.Version, m.Sum, strings.Join(tried[i], "\n")))
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("fetch Go modules: %w", err)
	}
	if err := joinFirst(errs, 10); err != nil {
		return nil, fmt.Errorf("%w\ngive a bundle with --mirror, or set GOPROXY", err)
	}
	return paths, nil
}

// goDownload asks the go command for modules: where each one's zip is, or why
// there is none.
func goDownload(ctx context.Context, source string, modules []Module) (zips []string, reasons []error, err error) {
	// In a copy, so that the source tree's go.sum stays as it is.
	dir, err := os.MkdirTemp("", "chrysalis-modules-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"go.mod", "go.sum"} {
		if err := copyFile(filepath.Join(source, name), filepath.Join(dir, name), 0o644); err != nil {
			return nil, nil, err
		}
	}
	args := []string{"mod", "download", "-json"}
	for _, m := range modules {
		args = append(args, m.Path+"@"+m.Version)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = dir, userGoEnv()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// It exits 1 when one of them fails, and says so for each.
	out, runErr := cmd.Output()
	zips, reasons = make([]string, len(modules)), make([]error, len(modules))
	for i := range reasons {
		reasons[i] = fmt.Errorf("%v: %s", runErr, lastLines(stderr.String(), 5))
	}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var answer struct{ Path, Version, Zip, Error string }
		if dec.Decode(&answer) != nil {
			return zips, reasons, nil
		}
		i := slices.IndexFunc(modules, func(m Module) bool { return m.Path == answer.Path && m.Version == answer.Version })
		switch {
		case i < 0:
		case answer.Error != "":
			reasons[i] = errors.New(strings.TrimSpace(answer.Error))
		default:
			zips[i], reasons[i] = answer.Zip, nil
		}
	}
}

// keepModule takes a module out of a bundle into the cache.
func (b *bundle) keepModule(path string, m Module) error {
	content, err := b.module(m)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".bundle-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = io.Copy(tmp, content)
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return keepModule(path, tmp.Name(), m)
}

// maxModuleSize bounds a module's content; it is Go's own bound.
const maxModuleSize = 500 << 20

// keepModule checks a module's zip and writes it to a path in the one form that
// the cache and bundles have: sorted, not compressed, no times. It appears there
// when it is whole.
func keepModule(path, from string, m Module) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".module-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	w := zip.NewWriter(tmp)
	sum, err := walkModule(from, m, func(name string, content io.Reader) error {
		out, err := w.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Store})
		if err != nil {
			return err
		}
		_, err = io.Copy(out, content)
		return err
	})
	if err != nil {
		return err
	}
	if sum != m.Sum {
		return fmt.Errorf("its sum is %s", sum)
	}
	if err := errors.Join(w.Close(), tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// moduleCached says whether a module is at a path, whole and unaltered.
func moduleCached(path string, m Module) bool {
	sum, err := walkModule(path, m, func(_ string, content io.Reader) error {
		_, err := io.Copy(io.Discard, content)
		return err
	})
	return err == nil && sum == m.Sum
}

// walkModule shows a module zip's files, sorted by name, and returns its h1 sum:
// the base64 of the SHA-256 over a line "sha256␣␣name" for each
// (golang.org/x/mod/sumdb/dirhash, Hash1).
func walkModule(path string, m Module, show func(name string, content io.Reader) error) (string, error) {
	r, err := zip.OpenReader(path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	files := slices.Clone(r.File)
	slices.SortFunc(files, func(a, b *zip.File) int { return cmp.Compare(a.Name, b.Name) })
	sum := sha256.New()
	left := uint64(maxModuleSize)
	for i, f := range files {
		switch {
		case !strings.HasPrefix(f.Name, m.Path+"@"+m.Version+"/") || !filepath.IsLocal(f.Name) || strings.ContainsFunc(f.Name, unicode.IsControl):
			return "", fmt.Errorf("file %q does not belong into the module", f.Name)
		case i > 0 && files[i-1].Name == f.Name:
			return "", fmt.Errorf("file %q is there twice", f.Name)
		case f.UncompressedSize64 > left:
			return "", fmt.Errorf("it is larger than %d bytes", maxModuleSize)
		}
		left -= f.UncompressedSize64
		content, err := f.Open() // ends with an error beyond its size
		if err != nil {
			return "", err
		}
		h := sha256.New()
		err = show(f.Name, io.TeeReader(content, h))
		content.Close()
		if err != nil {
			return "", fmt.Errorf("file %q: %w", f.Name, err)
		}
		fmt.Fprintf(sum, "%x  %s\n", h.Sum(nil), f.Name)
	}
	return "h1:" + base64.StdEncoding.EncodeToString(sum.Sum(nil)), nil
}

// stageModules lays modules out as a GOPROXY in a folder
// (https://go.dev/ref/mod#goproxy-protocol). Their go.mod files are checked by
// the go command against go.sum.
func stageModules(dir string, g Go, zips []string) error {
	for i, m := range g.Modules {
		top := filepath.Join(dir, escapeModule(m.Path), "@v")
		if err := os.MkdirAll(top, 0o755); err != nil {
			return err
		}
		base := filepath.Join(top, escapeModule(m.Version))
		if err := os.Symlink(zips[i], base+".zip"); err != nil {
			return err
		}
		info, err := json.Marshal(map[string]string{"Version": m.Version})
		if err != nil {
			return err
		}
		mod, err := moduleFile(zips[i], m)
		if err != nil {
			return fmt.Errorf("Go module %s: %w", m.Path, err)
		}
		if err := errors.Join(os.WriteFile(base+".info", info, 0o644), os.WriteFile(base+".mod", mod, 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// moduleFile returns a module's go.mod, or what the go command takes for it
// where there is none.
func moduleFile(path string, m Module) ([]byte, error) {
	r, err := zip.OpenReader(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	for _, f := range r.File {
		if f.Name == m.Path+"@"+m.Version+"/go.mod" && f.UncompressedSize64 < 16<<20 {
			content, err := f.Open()
			if err != nil {
				return nil, err
			}
			defer content.Close()
			return io.ReadAll(content)
		}
	}
	return []byte("module " + m.Path + "\n"), nil
}

// escapeModule writes capitals as the GOPROXY protocol does.
func escapeModule(path string) string {
	var b strings.Builder
	for _, r := range path {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
