package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/image/toolsroot"
)

// Whoever checked the tree out, mkosi sees the same modes.
func TestCopyTree(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "a", "b")
	for _, f := range []struct {
		name      string
		mode, got fs.FileMode
	}{
		{"script", 0o700, 0o755},
		{"sub/private", 0o600, 0o644},
		{"sub/open", 0o666, 0o644},
		{"sub/deeper/all", 0o777, 0o755},
	} {
		path := filepath.Join(from, f.name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(f.name), f.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, f.mode); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if info, err := os.Stat(filepath.Join(to, f.name)); err != nil || info.Mode() != f.got {
				t.Errorf("%s: %v, %v; expected mode %v", f.name, info.Mode(), err, f.got)
			}
			if data, err := os.ReadFile(filepath.Join(to, f.name)); string(data) != f.name {
				t.Errorf("%s: %q, %v", f.name, data, err)
			}
		}()
	}
	if err := copyTree(from, to); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(to, "sub/deeper")); err != nil || info.Mode() != fs.ModeDir|0o755 {
		t.Errorf("a folder: %v, %v", info.Mode(), err)
	}
	// One file, too.
	if err := copyTree(filepath.Join(from, "script"), filepath.Join(to, "new", "name")); err != nil {
		t.Error(err)
	}
	if err := copyTree(filepath.Join(from, "missing"), filepath.Join(to, "x")); err == nil {
		t.Error("a file that is not there is copied")
	}
}

func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	for i := range 2 {
		want := fmt.Sprint("content ", i)
		if err := os.WriteFile(from, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := replaceFile(from, to); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(to); string(data) != want {
			t.Errorf("%q, %v", data, err)
		}
	}
	if info, _ := os.Stat(to); info.Mode() != 0o644 {
		t.Errorf("mode %v", info.Mode())
	}
	if err := replaceFile(dir, to); err == nil {
		t.Error("a folder replaces a file")
	}
	if data, _ := os.ReadFile(to); string(data) != "content 1" {
		t.Errorf("a failed replacement leaves %q", data)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("it leaves %v", entries)
	}
}

func TestRemoveTree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.MkdirAll(filepath.Join(dir, "locked", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "locked"), 0o500); err != nil {
		t.Fatal(err)
	}
	if err := removeTree(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it is still there")
	}
	if err := removeTree(dir); err != nil {
		t.Errorf("nothing to remove: %v", err)
	}
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "folder", "lock")
	unlock, err := lockFile(path)
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan func())
	go func() {
		unlock, err := lockFile(path)
		if err != nil {
			t.Error(err)
		}
		second <- unlock
	}()
	select {
	case <-second:
		t.Fatal("two have the lock")
	case <-time.After(100 * time.Millisecond):
	}
	unlock()
	(<-second)()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("somebody still has the lock: %v", err)
	}
}

func TestLastLines(t *testing.T) {
	for _, tt := range []struct {
		text string
		n    int
		want string
	}{
		{"a\nb\nc\n", 2, "b\nc"},
		{"a\nb\n\n\n", 5, "a\nb"},
		{"a", 1, "a"},
		{"", 3, ""},
	} {
		if got := lastLines(tt.text, tt.n); got != tt.want {
			t.Errorf("%d of %q: %q, expected %q", tt.n, tt.text, got, tt.want)
		}
	}
}

func TestFields(t *testing.T) {
	got := fields("Package: llama.cpp-tools\nVersion: 1:0.7.0+dfsg-2\nDescription: one line\n and: another\nSize: 12\n")
	for name, want := range map[string]string{"Package": "llama.cpp-tools", "Version": "1:0.7.0+dfsg-2", "Size": "12", "Description": "one line", " and": ""} {
		if got[name] != want {
			t.Errorf("%s is %q, expected %q", name, got[name], want)
		}
	}
}

func TestReleaseDate(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("mirror_debian_dists_trixie_InRelease", "-----BEGIN PGP SIGNED MESSAGE-----\nSuite: stable\nDate: Sat, 12 Sep 2026 07:55:41 UTC\nValid-Until: x\n")
	put("mirror_debian_dists_trixie-backports_InRelease", "Suite: x\n")
	put("one_dists_sid_InRelease", "Date: Sat, 12 Sep 2026 07:55:41 UTC\n")
	put("two_dists_sid_InRelease", "Date: Sat, 12 Sep 2026 07:55:41 UTC\n")
	for _, tt := range []struct{ suite, want, says string }{
		{"trixie", "2026-09-12T07:55:41Z", ""},
		{"trixie-backports", "", "no Date"},
		{"sid", "", "2 InRelease files"},
		{"bookworm", "", "0 InRelease files"},
	} {
		date, err := releaseDate(dir, tt.suite)
		if (err == nil) != (tt.says == "") || (err != nil && !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("%s: %v, expected %q", tt.suite, err, tt.says)
		}
		if err == nil && date.UTC().Format(time.RFC3339) != tt.want {
			t.Errorf("%s: %v, expected %s", tt.suite, date, tt.want)
		}
	}
}

// A build does not fall back to anything when what it needs is not there.
func TestBuilderRefuses(t *testing.T) {
	b := &Builder{Source: t.TempDir(), Out: t.TempDir(), Progress: quiet}
	if _, err := b.UKI(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "checkout") {
		t.Errorf("no lock: %v", err)
	}
	if _, err := b.Engine(t.Context(), "llama.cpp"); err == nil || !strings.Contains(err.Error(), "checkout") {
		t.Errorf("no lock: %v", err)
	}
	// Without a mirror the tools root cannot be made, and nothing half-made stays.
	cache := filepath.Dir(cacheDir(t))
	lock := &Lock{Version: 1, Trees: []Tree{{Name: "tools", Suites: []Suite{{"sid", time.Unix(1, 0)}}}}}
	if _, err := MakeTools(context.Background(), lock, nil, quiet); err == nil || !strings.Contains(err.Error(), "lacks package apt") {
		t.Errorf("a lock that lacks a package: %v", err)
	}
	for _, name := range sources[2].packages {
		p := samplePool(1).tree.Packages[0]
		p.Name = name
		lock.Trees[0].Packages = append(lock.Trees[0].Packages, p)
	}
	if _, err := MakeTools(context.Background(), lock, nil, quiet); err == nil || !strings.Contains(err.Error(), "--mirror") {
		t.Errorf("no mirror: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "tools", "*")); len(left) != 1 || !strings.HasSuffix(left[0], ".lock") {
		t.Errorf("it leaves %v", left)
	}
}

// A tools root that is not as it was made is not used: it is made anew, which
// without packages fails, and until then it stays where it is.
func TestDamagedToolsRoot(t *testing.T) {
	if err := checkSandbox(t.Context()); err != nil {
		t.Skip(err)
	}
	if err := checkSubIDs(); err != nil {
		t.Skip(err)
	}
	cacheDir(t)
	lock := &Lock{Version: 1, Trees: []Tree{{Name: "tools", Suites: []Suite{{"sid", time.Unix(1, 0)}}}}}
	for _, name := range sources[2].packages {
		p := samplePool(1).tree.Packages[0]
		p.Name = name
		lock.Trees[0].Packages = append(lock.Trees[0].Packages, p)
	}
	dir, err := toolsDir(lock)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "usr", "program")
	if err := errors.Join(
		os.MkdirAll(filepath.Dir(program), 0o755), os.WriteFile(program, []byte("good"), 0o755), toolsroot.Seal(t.Context(), dir),
	); err != nil {
		t.Fatal(err)
	}
	if root, err := MakeTools(t.Context(), lock, nil, quiet); err != nil || root.Dir != dir {
		t.Fatalf("a good one is not used: %v", err)
	}
	if err := os.WriteFile(program, []byte("evil"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := MakeTools(t.Context(), lock, nil, quiet); err == nil || !strings.Contains(err.Error(), "--mirror") {
		t.Errorf("a damaged one is used: %v", err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Error(err)
	}
}

// A build folder that a killed build left goes with the next build; one in use stays.
func TestStageDir(t *testing.T) {
	cache := t.TempDir()
	left := filepath.Join(cache, "build-123")
	if err := os.MkdirAll(filepath.Join(left, "packages"), 0o755); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(cache, "build-notes")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	one, removeOne, err := stageDir(cache, "build-")
	if err != nil {
		t.Fatal(err)
	}
	two, removeTwo, err := stageDir(cache, "build-")
	if err != nil {
		t.Fatal(err)
	}
	for path, there := range map[string]bool{left: false, other: true, one: true, two: true} {
		if _, err := os.Stat(path); (err == nil) != there {
			t.Errorf("%s: %v", path, err)
		}
	}
	removeOne()
	removeTwo()
	if entries, _ := os.ReadDir(cache); len(entries) != 1 {
		t.Errorf("%v are left", entries)
	}
}
