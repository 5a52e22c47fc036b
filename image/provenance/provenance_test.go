package provenance_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/image"
	"chrysalis/image/provenance"
)

// lock is a small lock in the one form that it has.
func lock() *image.Lock {
	pkg := image.Package{
		Name: "libstdc++6", Version: "1:16.2.0+b1~x-4", Arch: "amd64",
		Path: "pool/main/g/libstdc++6.deb", Size: 1, SHA256: strings.Repeat("a", 64),
	}
	suites := []image.Suite{{Name: "sid", Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}}
	return &image.Lock{
		Version: 1,
		Go: image.Go{Toolchain: "go1.26.8", Modules: []image.Module{{
			Path: "github.com/Foo/bar", Version: "v1.2.3", Sum: "h1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
		}}},
		Trees: []image.Tree{
			{Name: "engine/llama.cpp", Suites: suites, Packages: []image.Package{pkg}},
			{Name: "image", Suites: suites, Packages: []image.Package{pkg}},
		},
	}
}

// build writes a small build into a new folder, and returns the statement's path.
func build(t *testing.T, changed ...string) string {
	t.Helper()
	dir := t.TempDir()
	p, err := provenance.NewParameters("", []string{"llama.cpp", "llama.cpp"}, []string{"demo"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range p.Artefacts() {
		write(t, filepath.Join(dir, name), "this is "+name)
	}
	b := provenance.Build{
		Parameters: p, Lock: lock(), Tools: "0123456789abcdef",
		Source: provenance.Source{Commit: strings.Repeat("c", 40), Changed: changed},
	}
	if err := b.WriteSBOMs(dir); err != nil {
		t.Fatal(err)
	}
	path, err := b.WriteStatement(dir)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestSBOM(t *testing.T) {
	sum := strings.Repeat("b", 64)
	one, err := provenance.SBOM(lock(), "image", "chrysalis.efi", sum)
	if err != nil {
		t.Fatal(err)
	}
	again, _ := provenance.SBOM(lock(), "image", "chrysalis.efi", sum)
	if !bytes.Equal(one, again) {
		t.Error("the same image has two SBOMs")
	}
	type component struct {
		Name, Version, PURL string
		Hashes              []struct{ Alg, Content string }
	}
	var doc struct {
		BOMFormat, SpecVersion, SerialNumber string
		Metadata                             struct {
			Timestamp string
			Component component
		}
		Components   []component
		Dependencies []struct{ DependsOn []string }
	}
	if err := json.Unmarshal(one, &doc); err != nil {
		t.Fatal(err)
	}
	if doc.BOMFormat != "CycloneDX" || doc.SpecVersion != "1.6" || doc.Metadata.Timestamp != "2026-01-02T03:04:05Z" || doc.Metadata.Component.Hashes[0].Content != sum {
		t.Errorf("it begins with %+v", doc)
	}
	want := []component{
		{Name: "libstdc++6", Version: "1:16.2.0+b1~x-4", PURL: "pkg:deb/debian/libstdc%2B%2B6@1:16.2.0%2Bb1~x-4?arch=amd64"},
		{Name: "github.com/Foo/bar", Version: "v1.2.3", PURL: "pkg:golang/github.com/foo/bar@v1.2.3"},
		{Name: "std", Version: "go1.26.8", PURL: "pkg:golang/std@1.26.8"},
	}
	sums := []string{strings.Repeat("a", 64), "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", ""}
	if len(doc.Components) != len(want) || len(doc.Dependencies) != 1 || len(doc.Dependencies[0].DependsOn) != len(want) {
		t.Fatalf("it has the components %+v", doc.Components)
	}
	for i, c := range doc.Components {
		if c.Name != want[i].Name || c.Version != want[i].Version || c.PURL != want[i].PURL {
			t.Errorf("component %d is %+v, want %+v", i, c, want[i])
		}
		if sums[i] != "" && (len(c.Hashes) != 1 || c.Hashes[0].Alg != "SHA-256" || c.Hashes[0].Content != sums[i]) {
			t.Errorf("component %d has the hashes %+v, want %s", i, c.Hashes, sums[i])
		}
	}
	other, _ := provenance.SBOM(lock(), "image", "chrysalis.efi", strings.Repeat("d", 64))
	if bytes.Contains(other, []byte(doc.SerialNumber)) {
		t.Error("two images have one serial number")
	}
	engine, err := provenance.SBOM(lock(), "engine/llama.cpp", "llama.cpp.disk", sum)
	if err != nil || bytes.Contains(engine, []byte("pkg:golang")) {
		t.Errorf("the engine disk has the agent's modules (%v)", err)
	}
	if _, err := provenance.SBOM(lock(), "engine/none", "none.disk", sum); err == nil {
		t.Error("an engine that the lock does not name has an SBOM")
	}
}

func TestParseStatementRefuses(t *testing.T) {
	good := string(read(t, build(t)))
	if _, err := provenance.ParseStatement([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, from, to, want string }{
		{"nothing", good, "", "not a provenance statement: EOF"},
		{"an HTML page", good, "<html>", "not a provenance statement"},
		{"too large", good, strings.Repeat(" ", provenance.MaxStatement+1), "more than 65536 bytes"},
		{"unknown field", `"_type"`, `"more": 1, "_type"`, "unknown field"},
		{"wrong JSON type", `"subject": [`, `"subject": 5, "x": [`, "subject is a JSON number"},
		{"duplicate key", `"profile": ""`, `"profile": "x", "profile": ""`, "line 52 is not as"},
		{"other spelling", "{\n", "{", "line 1 is not as"},
		{"something after it", "}\n}\n", "}\n}\n{}\n", "is not as"},
		{"type", "in-toto.io/Statement/v1", "in-toto.io/Statement/v0.1", "its _type is"},
		{"predicate", "provenance/v1", "provenance/v0.2", "its predicateType is"},
		{"build type", "build:image:2", "build:image:1", "its buildType is"},
		{"builder", "builder:unattested", "builder:trusted", "its builder is"},
		{"profile leads out", `"profile": ""`, `"profile": "../x"`, "is not a profile's name"},
		{"engine leads out", `"llama.cpp"` + "\n", `"../llama"` + "\n", "is not the name of an engine"},
		{"engine twice", `"llama.cpp"` + "\n", `"llama.cpp", "llama.cpp"` + "\n", "there twice"},
		{"model leads out", `"demo"` + "\n", `"../demo"` + "\n", "is not the name of a model"},
		{"model called as the engine", `"demo"` + "\n", `"llama.cpp"` + "\n", "an engine and a model are both called llama.cpp"},
		{"no models", `"models": [` + "\n          \"demo\"\n        ]", `"models": []`, "its subjects are"},
		{"profile of other files", `"profile": ""`, `"profile": "debug"`, "its subjects are"},
		{"subject leads out", `"chrysalis.efi"`, `"../chrysalis.efi"`, "its subjects are"},
		{"commit is a branch", strings.Repeat("c", 40), "main", "fixed by a commit"},
		{"commit is an option", strings.Repeat("c", 40), "--help", "fixed by a commit"},
		{"lock is not named", `"image.lock"`, `"other.lock"`, "its dependencies must be"},
		{"clean by its own word", `"name": "source",`, `"name": "source", "annotations": {"dirty": false},`, "goes without saying"},
		{"toolchain", "go1.26.8", "gccgo", "not a Go toolchain"},
		{"tools root", "0123456789abcdef", "0123", "not the key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad := strings.Replace(good, c.from, c.to, 1)
			if bad == good {
				t.Fatal("nothing was changed")
			}
			if _, err := provenance.ParseStatement([]byte(bad)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("it says %v, want %q", err, c.want)
			}
		})
	}
}

func TestDirtyIsRecorded(t *testing.T) {
	s, err := provenance.ReadStatement(build(t, "agent/main.go"))
	if err != nil {
		t.Fatal(err)
	}
	if commit, dirty := s.Commit(); commit != strings.Repeat("c", 40) || !dirty {
		t.Errorf("it says commit %s, dirty %v", commit, dirty)
	}
}

func TestVerify(t *testing.T) {
	failed := func(checks []provenance.Check) (names string) {
		for _, c := range checks {
			if c.Result != provenance.Pass {
				names += c.What + "; "
			}
		}
		return names
	}
	for _, c := range []struct {
		name        string
		change      func(t *testing.T, dir, source string)
		fails, errs string
	}{
		{name: "as built", change: func(*testing.T, string, string) {}},
		{name: "artefact altered", fails: "llama.cpp.disk is what", change: func(t *testing.T, dir, _ string) {
			write(t, filepath.Join(dir, "llama.cpp.disk"), "that is llama.cpp.disk")
		}},
		{name: "SBOM altered", fails: "chrysalis.efi.cdx.json is what", change: func(t *testing.T, dir, _ string) {
			write(t, filepath.Join(dir, "chrysalis.efi.cdx.json"), "{}")
		}},
		{name: "lock of another commit", fails: "image.lock is the source tree's", change: func(t *testing.T, _, source string) {
			other := lock()
			other.Trees[0].Packages[0].Version = "2"
			write(t, filepath.Join(source, image.LockName), string(other.Encode()))
		}},
		{name: "artefact missing", errs: "names llama.cpp.disk", change: func(t *testing.T, dir, _ string) {
			os.Remove(filepath.Join(dir, "llama.cpp.disk"))
		}},
		{name: "artefact is a link", errs: "not a regular file", change: func(t *testing.T, dir, _ string) {
			os.Remove(filepath.Join(dir, "llama.cpp.disk"))
			os.Symlink("/dev/zero", filepath.Join(dir, "llama.cpp.disk"))
		}},
		{name: "no source tree", errs: "read the lock", change: func(t *testing.T, _, source string) {
			os.Remove(filepath.Join(source, image.LockName))
		}},
		{name: "no statement", errs: "read the provenance", change: func(t *testing.T, dir, _ string) {
			os.Remove(filepath.Join(dir, "chrysalis.provenance.json"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path, source := build(t), t.TempDir()
			write(t, filepath.Join(source, image.LockName), string(lock().Encode()))
			c.change(t, filepath.Dir(path), source)
			checks, err := provenance.Verify(path, source)
			switch {
			case c.errs != "":
				if err == nil || !strings.Contains(err.Error(), c.errs) {
					t.Errorf("it says %v, want %q", err, c.errs)
				}
			case err != nil:
				t.Error(err)
			case c.fails == "" && !provenance.Passed(checks), c.fails != "" && !strings.HasPrefix(failed(checks), c.fails),
				strings.Count(failed(checks), ";") > 1:
				t.Errorf("these fail: %q, want %q", failed(checks), c.fails)
			}
		})
	}
}

func TestReadSource(t *testing.T) {
	git := func(t *testing.T, dir string, args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@localhost"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip(err)
	}
	for _, c := range []struct {
		name    string
		change  func(t *testing.T, dir string)
		changed string
	}{
		{"clean", func(*testing.T, string) {}, ""},
		{"results", func(t *testing.T, dir string) {
			os.Mkdir(filepath.Join(dir, "out"), 0o755)
			write(t, filepath.Join(dir, "out", "chrysalis.efi"), "x")
		}, ""},
		{"a changed file", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "a.go"), "package b") }, "a.go"},
		{"a changed mode", func(t *testing.T, dir string) { os.Chmod(filepath.Join(dir, "a.go"), 0o755) }, "a.go"},
		{"a removed file", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "a.go")) }, "a.go"},
		{"a new file", func(t *testing.T, dir string) { write(t, filepath.Join(dir, "b.go"), "") }, "b.go"},
		{"a staged file", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "b.go"), "")
			git(t, dir, "add", "b.go")
		}, "b.go"},
		{"a file that only this checkout ignores", func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, ".git", "info", "exclude"), "b.go\n")
			write(t, filepath.Join(dir, "b.go"), "")
		}, "b.go"},
		{"a change that the index hides", func(t *testing.T, dir string) {
			git(t, dir, "update-index", "--assume-unchanged", "a.go")
			write(t, filepath.Join(dir, "a.go"), "package b")
		}, "a.go"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			git(t, dir, "init", "-q")
			write(t, filepath.Join(dir, "a.go"), "package a")
			write(t, filepath.Join(dir, ".gitignore"), "/out/\n")
			git(t, dir, "add", ".")
			git(t, dir, "commit", "-qm", "first")
			c.change(t, dir)
			s, err := provenance.ReadSource(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(s.Changed, " "); got != c.changed || len(s.Commit) != 40 {
				t.Errorf("changed is %q at %q, want %q", got, s.Commit, c.changed)
			}
		})
	}
	t.Run("no checkout", func(t *testing.T) {
		if _, err := provenance.ReadSource(t.Context(), t.TempDir()); err == nil {
			t.Error("it has a commit")
		}
	})
	t.Run("a folder in a checkout", func(t *testing.T) {
		dir := t.TempDir()
		git(t, dir, "init", "-q")
		os.Mkdir(filepath.Join(dir, "sub"), 0o755)
		if _, err := provenance.ReadSource(t.Context(), filepath.Join(dir, "sub")); err == nil || !strings.Contains(err.Error(), "not the top") {
			t.Errorf("it says %v", err)
		}
	})
}
