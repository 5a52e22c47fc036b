package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/audit"
	"chrysalis/image"
	"chrysalis/image/provenance"
)

// fakeRelease makes a source tree with one commit, and a release from it whose
// artefacts are only their names. It returns the folders and the statement's path.
func fakeRelease(t *testing.T) (source, dir, statement string) {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip(err)
	}
	source, dir = t.TempDir(), t.TempDir()
	tree := func(name string) image.Tree {
		return image.Tree{Name: name, Suites: []image.Suite{{Name: "sid", Date: time.Unix(1, 0).UTC()}}}
	}
	lock := &image.Lock{Version: 1, Go: image.Go{Toolchain: "go1.26.8"}, Trees: []image.Tree{tree("engine/llama.cpp"), tree("image")}}
	if err := image.WriteLock(source, lock); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"commit", "-qm", "all"}} {
		cmd := exec.Command("git", append([]string{"-C", source, "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgSign=false"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	p, err := provenance.NewParameters("", []string{"llama.cpp"}, []string{"demo"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range p.Artefacts() {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b := provenance.Build{Parameters: p, Lock: lock, Tools: "0123456789abcdef"}
	if err := b.WriteSBOMs(dir); err != nil {
		t.Fatal(err)
	}
	if b.Source, err = provenance.ReadSource(t.Context(), source); err != nil {
		t.Fatal(err)
	}
	if statement, err = b.WriteStatement(dir); err != nil {
		t.Fatal(err)
	}
	return source, dir, statement
}

func alter(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("altered"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestVerifyProvenance(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, source, dir string)
		code   int
		want   []string // in what is printed; of the error, where the status is 2
	}{
		{"all holds", func(*testing.T, string, string) {}, 0,
			[]string{"✔  demo.disk is what", "✔  llama.cpp.manifest.json is what", "✔  image.lock is the source tree's"}},
		{"a disk is another", func(t *testing.T, _, dir string) { alter(t, filepath.Join(dir, "demo.disk")) }, 1,
			[]string{"✘  demo.disk is what the provenance names\n   its SHA-256 is ", "✔  chrysalis.efi is what"}},
		{"a disk is missing", func(t *testing.T, _, dir string) { os.Remove(filepath.Join(dir, "demo.disk")) }, 2,
			[]string{"names demo.disk"}},
		{"no lock", func(t *testing.T, source, _ string) { os.Remove(filepath.Join(source, image.LockName)) }, 2,
			[]string{"read the lock"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			source, dir, statement := fakeRelease(t)
			c.change(t, source, dir)
			cmd := ImageVerifyProvenanceCmd{File: statement, Source: source}
			out, err := capture(t, cmd.Run)
			if exitCode(err) != c.code {
				t.Fatalf("it ends with %d (%v), want %d", exitCode(err), err, c.code)
			}
			if c.code == 2 {
				out = err.Error()
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("it prints\n%s\nand not %q", out, want)
				}
			}
			cmd.JSON = true
			out, err = capture(t, cmd.Run)
			var report struct {
				OK     bool
				Checks []provenance.Check
			}
			if exitCode(err) != c.code {
				t.Errorf("--json: it ends with %d, want %d", exitCode(err), c.code)
			}
			if c.code < 2 && (json.Unmarshal([]byte(out), &report) != nil || report.OK != (c.code == 0) || len(report.Checks) != 8) {
				t.Errorf("--json: it prints %s", out)
			}
		})
	}
}

// Every one of these ends before anything is built.
func TestAuditCommand(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, source, dir string)
		code   int
		want   []string
	}{
		{"a disk is another, and so is the source", func(t *testing.T, source, dir string) {
			alter(t, filepath.Join(dir, "demo.disk"))
			alter(t, filepath.Join(source, "more"))
		}, 1, []string{
			"✘  demo.disk is what the provenance names\n   its SHA-256 is ", "✔  chrysalis.efi is what the provenance names",
			"✘  working tree has nothing but the commit\n   not as in the commit: more",
			"-  chrysalis.efi is what the working tree makes\n   not built",
		}},
		{"a file too many", func(t *testing.T, _, dir string) { alter(t, filepath.Join(dir, "README")) }, 2, []string{"README, which its provenance does not name"}},
		{"no provenance", func(t *testing.T, _, dir string) { os.Remove(filepath.Join(dir, "chrysalis.provenance.json")) }, 2, []string{"is no release"}},
		{"no checkout", func(t *testing.T, source, _ string) { os.RemoveAll(filepath.Join(source, ".git")) }, 2, []string{"clone of the repository"}},
		// The lock is too small to build anything.
		{"nothing can be built", func(*testing.T, string, string) {}, 2, []string{"build the release again"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			source, dir, _ := fakeRelease(t)
			c.change(t, source, dir)
			cmd := AuditCmd{Release: dir}
			cmd.Source, cmd.Mirror = source, []string{t.TempDir()}
			run := func() error { return cmd.Run(t.Context()) }
			out, err := capture(t, run)
			if exitCode(err) != c.code {
				t.Fatalf("it ends with %d (%v), want %d", exitCode(err), err, c.code)
			}
			if c.code == 2 {
				out = err.Error()
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("it prints\n%s\nand not %q", out, want)
				}
			}
			cmd.JSON = true
			out, err = capture(t, run)
			var report audit.Report
			if exitCode(err) != c.code || c.code == 1 && (json.Unmarshal([]byte(out), &report) != nil || report.OK || len(report.Commit) != 40 || len(report.Checks) < 10) {
				t.Errorf("--json: it ends with %d and prints %s", exitCode(err), out)
			}
		})
	}
	report := &audit.Report{OK: true, Commit: strings.Repeat("c", 40), Checks: []provenance.Check{{What: "x", Result: provenance.Pass}}}
	cmd := AuditCmd{Release: "release"}
	out, err := capture(t, func() error { return cmd.print(report, nil) })
	if err != nil || !strings.Contains(out, "✔  x\nit is what commit ccc") {
		t.Errorf("%v: %s", err, out)
	}
	cmd.JSON = true
	out, err = capture(t, func() error { return cmd.print(report, nil) })
	if err != nil || !strings.HasPrefix(out, `{"ok":true,"commit":"ccc`) {
		t.Errorf("%v: %s", err, out)
	}
	if err := cmd.print(nil, errors.New("no")); exitCode(err) != 2 {
		t.Errorf("%v", err)
	}
}
