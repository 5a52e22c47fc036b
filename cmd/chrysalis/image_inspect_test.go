package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/inspect"
	"chrysalis/image/provenance"
	"chrysalis/verity/gpt"
)

func TestExitCode(t *testing.T) {
	// A program that was run and failed.
	ran := exec.Command("sh", "-c", "exit 7").Run()
	var status interface{ ExitCode() int }
	if !errors.As(ran, &status) || status.ExitCode() != 7 {
		t.Fatalf("%v", ran)
	}
	for _, c := range []struct {
		name string
		err  error
		want int
	}{
		{"none", nil, 0},
		{"plain", errors.New("x"), 1},
		{"a program's", fmt.Errorf("mkosi: %w", ran), 1},
		{"ours", &exitError{code: 2}, 2},
		{"ours, wrapped", fmt.Errorf("x: %w", &exitError{code: 2}), 2},
		{"ours around a program's", &exitError{2, ran}, 2},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%s: %d, expected %d", c.name, got, c.want)
		}
	}
}

// manifestDisk writes a disk whose partition holds data.
func manifestDisk(t *testing.T, data string) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := gpt.WriteManifestDisk(f, []byte(data), nil)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// capture returns what a command prints.
func capture(t *testing.T, run func() error) (string, error) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := os.Stdout
	os.Stdout = f
	failed := run()
	os.Stdout = before
	out, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(out), failed
}

func TestImageDiff(t *testing.T) {
	a, b := manifestDisk(t, "a"), manifestDisk(t, "b")
	for _, c := range []struct {
		name, a, b string
		json       bool
		code       int
		want       string
	}{
		{"equal", a, a, false, 0, "equal\n"},
		{"equal, JSON", a, a, true, 0, `{"differences":[],"equal":true}` + "\n"},
		{"different", a, b, false, 1, "partition 1: byte 16 is 6100000000000000 in A, 6200000000000000 in B\n"},
		{"different, JSON", a, b, true, 1, `{"differences":[{"where":"partition 1","what":"byte 16","a":"6100000000000000","b":"6200000000000000"}],"equal":false}` + "\n"},
		{"missing", a, b + "x", false, 2, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := ImageDiffCmd{A: c.a, B: c.b, JSON: c.json}
			out, err := capture(t, func() error { return cmd.Run(t.Context()) })
			if out != c.want || exitCode(err) != c.code {
				t.Errorf("it prints %q and ends with %v (%d), expected %q and %d", out, err, exitCode(err), c.want, c.code)
			}
			if silent := err == nil || err.Error() == ""; silent != (c.code != 2) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

func TestImageInspect(t *testing.T) {
	// What it carries is no manifest.
	cmd := ImageInspectCmd{File: manifestDisk(t, "a"), JSON: true}
	out, err := capture(t, func() error { return cmd.Run(t.Context()) })
	var report inspect.Report
	if exitCode(err) != 1 || json.Unmarshal([]byte(out), &report) != nil || len(report.Problems) != 1 || report.Disk == nil {
		t.Errorf("%v: %s", err, out)
	}
	cmd = ImageInspectCmd{File: filepath.Join(t.TempDir(), "none")}
	if err := cmd.Run(t.Context()); exitCode(err) != 2 {
		t.Errorf("%v", err)
	}
}

// Nothing that a file holds reaches the terminal as it is.
func TestPrintReportCleans(t *testing.T) {
	const evil = "\x1b[2J\x1b]0;title\x07\nsecond\tline"
	entry := inspect.Entry{Path: evil, Target: evil, Xattrs: map[string]string{evil: "00"}}
	report := &inspect.Report{File: evil, Problems: []string{evil},
		UKI: &inspect.UKIReport{CommandLine: evil, Kernel: evil, Stub: evil, OSRelease: map[string]string{evil: evil},
			Initrd: &inspect.InitrdReport{Entries: []inspect.Entry{entry}}},
		Disk: &inspect.DiskReport{Partitions: []inspect.PartitionReport{{Name: evil, Verity: &inspect.VerityReport{Model: evil}}}},
	}
	list := &provenance.PackageList{From: evil, Detail: evil, Packages: []provenance.Package{{Kind: evil, Name: evil, Version: evil}}}
	var out bytes.Buffer
	if err := printReport(&out, inspection{report, list}); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(out.String(), "\x1b\x07\t") || strings.Contains(out.String(), "\nsecond") || strings.Contains(out.String(), "title") {
		t.Errorf("%q", out.String())
	}
}

// TestImageInspectPackages looks for the packages of what 'make image' has made:
// in the SBOM beside it, in a lock, nowhere, and in the SBOM of something else.
func TestImageInspectPackages(t *testing.T) {
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	lock, err := image.ReadLock(source)
	if err != nil {
		t.Fatal(err)
	}
	for _, artefact := range []struct{ name, tree, kernelOrServer string }{
		{"chrysalis.efi", "image", "linux-binary-" + image.Kernel}, {"llama.cpp.disk", "engine/llama.cpp", "llama.cpp-tools"},
	} {
		built := filepath.Join(source, "out", artefact.name)
		sum, _, err := image.HashFile(built)
		if err != nil {
			imagetest.Missing(t, err)
		}
		sbom := func(sum string) func(*testing.T, string, string) {
			return func(t *testing.T, dir, _ string) {
				data, err := provenance.SBOM(lock, artefact.tree, artefact.name, sum)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, artefact.name+provenance.SBOMSuffix), data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, c := range []struct {
			name  string
			setUp func(t *testing.T, dir, source string)
			code  int
			want  string // "" for no list
		}{
			{"SBOM", sbom(sum), 0, artefact.name + provenance.SBOMSuffix + ": it names the SHA-256 of this file"},
			{"lock beside it", func(t *testing.T, dir, _ string) { writeLock(t, dir, lock) }, 0, "image.lock: its tree"},
			{"lock of the source tree", func(t *testing.T, _, source string) { writeLock(t, source, lock) }, 0, "nothing says that this file was made from this lock"},
			{"none", func(*testing.T, string, string) {}, 0, ""},
			{"SBOM of another file", sbom(strings.Repeat("a", 64)), 1, ""},
			{"SBOM that is none", func(t *testing.T, dir, _ string) { alter(t, filepath.Join(dir, artefact.name+provenance.SBOMSuffix)) }, 2, ""},
		} {
			t.Run(artefact.name+"/"+c.name, func(t *testing.T) {
				dir, empty := t.TempDir(), t.TempDir()
				file := filepath.Join(dir, artefact.name)
				if err := os.Symlink(built, file); err != nil {
					t.Fatal(err)
				}
				c.setUp(t, dir, empty)
				cmd := ImageInspectCmd{File: file, Source: empty}
				out, err := capture(t, func() error { return cmd.Run(t.Context()) })
				if exitCode(err) != c.code || c.want != "" && !strings.Contains(out, c.want) {
					t.Fatalf("it ends with %v, and does not print %q:\n%s", err, c.want, out)
				}
				cmd.JSON = true
				out, err = capture(t, func() error { return cmd.Run(t.Context()) })
				var found struct{ Packages *provenance.PackageList }
				if exitCode(err) != c.code || c.code < 2 && json.Unmarshal([]byte(out), &found) != nil || (found.Packages != nil) != (c.want != "") {
					t.Fatalf("--json: it ends with %v, list %+v", err, found.Packages)
				}
				if found.Packages != nil {
					tree, _ := lock.Tree(artefact.tree)
					p, err := tree.Package(artefact.kernelOrServer)
					if err != nil {
						t.Fatal(err)
					}
					if !slices.Contains(found.Packages.Packages, provenance.Package{Kind: "deb", Name: p.Name, Version: p.Version, SHA256: p.SHA256}) {
						t.Errorf("%s is not among %+v", p.Name, found.Packages.Packages)
					}
				}
			})
		}
	}
}

func writeLock(t *testing.T, dir string, lock *image.Lock) {
	t.Helper()
	if err := image.WriteLock(dir, lock); err != nil {
		t.Fatal(err)
	}
}
