package image

import (
	"archive/zip"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// moduleZip makes a module's zip of files whose content follows from their names.
func moduleZip(t *testing.T, files ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "m.zip")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := zip.NewWriter(f)
	for _, name := range files {
		out, err := w.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		out.Write([]byte("content of " + name))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeepModule(t *testing.T) {
	m := Module{Path: "example.com/Mod", Version: "v1.0.0"}
	top := "example.com/Mod@v1.0.0/"
	from := moduleZip(t, top+"b.go", top+"a/a.go", top+"go.mod")
	var err error
	m.Sum, err = walkModule(from, m, func(_ string, content io.Reader) error {
		_, err := io.Copy(io.Discard, content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	one, two := filepath.Join(dir, "1"), filepath.Join(dir, "2")
	// However the zip was made, it is kept in one form.
	other := moduleZip(t, top+"go.mod", top+"b.go", top+"a/a.go")
	if err := keepModule(one, from, m); err != nil {
		t.Fatal(err)
	}
	if err := keepModule(two, other, m); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(one)
	if b, _ := os.ReadFile(two); !bytes.Equal(a, b) || len(a) == 0 {
		t.Error("the same module is kept in two forms")
	}
	if !moduleCached(one, m) {
		t.Error("what is kept is not cached")
	}
	a[bytes.Index(a, []byte("content"))] ^= 1
	if err := os.WriteFile(one, a, 0o644); err != nil {
		t.Fatal(err)
	}
	if moduleCached(one, m) {
		t.Error("a damaged module is cached")
	}
	for name, files := range map[string][]string{
		"a file less":             {top + "go.mod", top + "b.go"},
		"another file":            {top + "go.mod", top + "b.go", top + "a/c.go"},
		"a file twice":            {top + "go.mod", top + "b.go", top + "b.go", top + "a/a.go"},
		"a file upwards":          {top + "go.mod", top + "../b.go"},
		"another module's":        {"example.com/other@v1.0.0/b.go"},
		"a name with a line feed": {top + "b\n.go"},
	} {
		if err := keepModule(one+"x", moduleZip(t, files...), m); err == nil {
			t.Errorf("%s: it is kept", name)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("it leaves %v", left)
	}
	if mod, err := moduleFile(two, m); err != nil || string(mod) != "content of "+top+"go.mod" {
		t.Errorf("%q, %v", mod, err)
	}
	if got := escapeModule("example.com/Mod"); got != "example.com/!mod" {
		t.Error(got)
	}
}

// agentSource is a source tree with an agent of its own: quick to build.
func agentSource(t *testing.T, main string) string {
	t.Helper()
	if _, err := exec.LookPath("bwrap"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum"} {
		if err := copyFile(filepath.Join("..", name), filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "agent"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "agent", "main.go"), []byte(main), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

const agentMain = `package main

import "golang.org/x/sync/errgroup"

var imageName string

func main() { println(imageName); var g errgroup.Group; g.Wait() }
`

// keepGoCache lets a test with a cache of its own use Go's.
func keepGoCache(t *testing.T) {
	t.Helper()
	out, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOCACHE", strings.TrimSpace(string(out)))
}

// TestAgent builds from verified modules alone, whatever the caller's Go
// configuration says, and gets the same bytes from a bundle.
func TestAgent(t *testing.T) {
	keepGoCache(t)
	source := agentSource(t, agentMain)
	g, err := ResolveGo(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	if g.Toolchain != runtime.Version() || len(g.Modules) != 1 || g.Modules[0].Path != "golang.org/x/sync" {
		t.Fatalf("%+v", g)
	}
	cacheDir(t)
	zips, err := fetchModules(t.Context(), source, g, nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	sumBefore, _ := os.ReadFile("../go.sum")
	build := func(zips []string) []byte {
		t.Helper()
		out := filepath.Join(t.TempDir(), "init")
		if err := BuildAgent(t.Context(), source, g, zips, out, "sample", ""); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	one := build(zips)

	bundle := filepath.Join(t.TempDir(), "bundle")
	if err := writeBundle(t.Context(), bundle, map[string]string{moduleEntry(g.Modules[0]): zips[0]}, quiet); err != nil {
		t.Fatal(err)
	}
	cacheDir(t)
	t.Setenv("GOMODCACHE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("GOPROXY", "off")
	t.Setenv("GOFLAGS", "-tags=surprise -race")
	t.Setenv("GOAMD64", "v3")
	t.Setenv("GOEXPERIMENT", "nosuchexperiment")
	if _, err := fetchModules(t.Context(), source, g, []string{t.TempDir()}, quiet); err == nil || !strings.Contains(err.Error(), "Go module golang.org/x/sync ") || !strings.Contains(err.Error(), g.Modules[0].Sum) || !strings.Contains(err.Error(), "GOPROXY") {
		t.Errorf("no module anywhere: %v", err)
	}
	zips, err = fetchModules(t.Context(), source, g, []string{bundle}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	// Neither is where it is built of any interest, whatever the place is called.
	odd := filepath.Join(t.TempDir(), "a place, with | and %20")
	if err := os.Mkdir(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", odd)
	if two := build(zips); !bytes.Equal(one, two) {
		t.Error("from a bundle and elsewhere it is another agent")
	}
	if sumAfter, _ := os.ReadFile(filepath.Join(source, "go.sum")); !bytes.Equal(sumBefore, sumAfter) {
		t.Error("go.sum changed")
	}

	// A damaged cache entry is fetched again.
	if err := os.Truncate(zips[0], 100); err != nil {
		t.Fatal(err)
	}
	if _, err := fetchModules(t.Context(), source, g, []string{bundle}, quiet); err != nil || !moduleCached(zips[0], g.Modules[0]) {
		t.Errorf("%v", err)
	}
}

func TestBuildAgentRefuses(t *testing.T) {
	keepGoCache(t)
	source := agentSource(t, agentMain)
	good, err := ResolveGo(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	cacheDir(t)
	zips, err := fetchModules(t.Context(), source, good, nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func(*Go)) Go {
		g := Go{good.Toolchain, append([]Module{}, good.Modules...)}
		f(&g)
		return g
	}
	unused := Module{"golang.org/x/term", "v0.47.0", ""}
	sums, _ := os.ReadFile("../go.sum")
	for line := range strings.Lines(string(sums)) {
		if rest, ok := strings.CutPrefix(line, "golang.org/x/term v0.47.0 "); ok {
			unused.Sum = strings.TrimSpace(rest)
		}
	}
	for _, tt := range []struct {
		name string
		lock Go
		says []string
	}{
		{"another toolchain", edit(func(g *Go) { g.Toolchain = "go1.26.1" }), []string{"go1.26.1", runtime.Version(), "install go1.26.1", "--go-only"}},
		{"another sum", edit(func(g *Go) { g.Modules[0].Sum = sumA }), []string{"golang.org/x/sync", sumA, good.Modules[0].Sum}},
		{"another version", edit(func(g *Go) { g.Modules[0].Version = "v0.0.1" }), []string{"golang.org/x/sync v0.0.1", "--go-only"}},
		{"a module that the lock lacks", edit(func(g *Go) { g.Modules = nil }), []string{"golang.org/x/sync", "--go-only"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "init")
			err := BuildAgent(t.Context(), source, tt.lock, zips[:len(tt.lock.Modules)], out, "x", "")
			for _, says := range tt.says {
				if err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("%v does not say %q", err, says)
				}
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("it is built")
			}
		})
	}
	t.Run("a module too many", func(t *testing.T) {
		lock := edit(func(g *Go) { g.Modules = append(g.Modules, unused) })
		zips, err := fetchModules(t.Context(), source, lock, nil, quiet)
		if err != nil {
			t.Skip(err)
		}
		out := filepath.Join(t.TempDir(), "init")
		if err := BuildAgent(t.Context(), source, lock, zips, out, "x", ""); err == nil || !strings.Contains(err.Error(), "- golang.org/x/term") {
			t.Errorf("%v", err)
		}
		// A profile's agent may do with less.
		if err := BuildAgent(t.Context(), source, lock, zips, out, "x", "debug"); err != nil {
			t.Error(err)
		}
	})
	t.Run("go.work and a replaced module", func(t *testing.T) {
		mod, _ := os.ReadFile(filepath.Join(source, "go.mod"))
		if err := os.WriteFile(filepath.Join(source, "go.mod"), append(mod, "replace golang.org/x/sync => ./sync\n"...), 0o644); err != nil {
			t.Fatal(err)
		}
		os.MkdirAll(filepath.Join(source, "sync", "errgroup"), 0o755)
		os.WriteFile(filepath.Join(source, "sync", "go.mod"), []byte("module golang.org/x/sync\n"), 0o644)
		os.WriteFile(filepath.Join(source, "sync", "errgroup", "e.go"), []byte("package errgroup\ntype Group struct{}\nfunc (*Group) Wait() {}\n"), 0o644)
		if err := BuildAgent(t.Context(), source, good, zips, filepath.Join(t.TempDir(), "init"), "x", ""); err == nil || !strings.Contains(err.Error(), "no sum fixes") {
			t.Errorf("%v", err)
		}
	})
}

// The committed lock names exactly what the committed agent is made from.
func TestLockNamesTheAgent(t *testing.T) {
	lock, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	g, err := ResolveGo(t.Context(), "..")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range diffGo(lock.Go, g) {
		if c.What != "toolchain" { // a test may run with a newer one; a build may not
			t.Errorf("%s; %s", c, refreshGo)
		}
	}
}

// What every image is linked with is named with its licence.
func TestNoticeNamesTheModules(t *testing.T) {
	lock, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	notice, err := os.ReadFile("../NOTICE")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range lock.Go.Modules {
		if !strings.Contains(string(notice), "\n  "+m.Path+" ") {
			t.Errorf("NOTICE does not name %s", m.Path)
		}
	}
}

// The lock keeps its bytes and its time when nothing changes in it.
func TestUpdateLock(t *testing.T) {
	source := agentSource(t, agentMain)
	update := LockUpdate{GoOnly: true, Progress: quiet}
	if _, err := UpdateLock(t.Context(), source, update); err == nil {
		t.Error("--go-only makes a lock from nothing")
	}
	lock := sampleLock()
	if err := WriteLock(source, lock); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(source, LockName)
	before, _ := os.ReadFile(path)
	update.DryRun = true
	changes, err := UpdateLock(t.Context(), source, update)
	if err != nil || len(changes) == 0 {
		t.Fatalf("%v, %v", changes, err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("a dry run writes")
	}
	update.DryRun = false
	if _, err := UpdateLock(t.Context(), source, update); err != nil {
		t.Fatal(err)
	}
	info, _ := os.Stat(path)
	changes, err = UpdateLock(t.Context(), source, update)
	if err != nil || len(changes) != 0 {
		t.Errorf("once more: %v, %v", changes, err)
	}
	if again, _ := os.Stat(path); !os.SameFile(info, again) || again.ModTime() != info.ModTime() {
		t.Error("it is written though nothing changed")
	}
	read, err := ReadLock(source)
	if err != nil || len(read.Go.Modules) != 1 || len(read.Trees) != len(lock.Trees) {
		t.Errorf("%+v, %v", read, err)
	}
	// Every mirror that does not do is named, and the lock stays.
	before, _ = os.ReadFile(path)
	bundle := samplePool(1).bundle(t)
	update = LockUpdate{Progress: quiet, Mirrors: func() []string { return []string{bundle} }}
	if _, err := UpdateLock(t.Context(), source, update); err == nil || !strings.Contains(err.Error(), bundle+": a bundle has packages and no signed indices") {
		t.Errorf("%v", err)
	}
	update.Mirrors = func() []string { return nil }
	if _, err := UpdateLock(t.Context(), source, update); err == nil || !strings.Contains(err.Error(), "--mirror") {
		t.Errorf("%v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("a failed update changes the lock")
	}
	if err := os.WriteFile(path, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := UpdateLock(t.Context(), source, update); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("%v", err)
	}
}

// A bundle holds every package of every tree and every module, each once, and is
// enough where there is nothing else.
func TestBuilderBundle(t *testing.T) {
	keepGoCache(t)
	source := agentSource(t, agentMain)
	g, err := ResolveGo(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	p := samplePool(4)
	suites := []Suite{{"sid", time.Unix(1700000000, 0).UTC()}}
	lock := &Lock{Version: 1, Go: g, Trees: []Tree{
		{Name: "a", Suites: suites, Packages: p.tree.Packages[:3]},
		{Name: "b", Suites: suites, Packages: p.tree.Packages[2:]},
	}}
	if err := WriteLock(source, lock); err != nil {
		t.Fatal(err)
	}
	cacheDir(t)
	one, two := filepath.Join(t.TempDir(), "1"), filepath.Join(t.TempDir(), "2")
	b := &Builder{Source: source, Mirrors: []string{p.dir(t)}, Progress: quiet}
	if err := b.Bundle(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	cacheDir(t)
	t.Setenv("GOMODCACHE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("GOPROXY", "off")
	b.Mirrors = []string{one}
	if err := b.Bundle(t.Context(), two); err != nil {
		t.Fatal(err)
	}
	first, _ := os.ReadFile(one)
	if second, err := os.ReadFile(two); err != nil || !bytes.Equal(first, second) {
		t.Errorf("a bundle made from a bundle differs: %v", err)
	}
	index, err := openBundle(two)
	if err != nil {
		t.Fatal(err)
	}
	defer index.file.Close()
	if len(index.entries) != 5 {
		t.Errorf("%v", index.entries)
	}
	lock.Trees[0].Name, lock.Trees[1].Name = "image", "mine"
	if err := WriteLock(source, lock); err != nil {
		t.Fatal(err)
	}
	if err := b.Bundle(t.Context(), two); err == nil || !strings.Contains(err.Error(), "image") {
		t.Errorf("a lock that is not its recipe's: %v", err)
	}
}
