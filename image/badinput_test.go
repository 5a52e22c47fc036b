package image

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBuildFromBadInput builds with all that a lock and a mirror can have wrong.
// Each time it is an error that says what it is about, before mkosi runs, and the
// artefact of an earlier build stays as it was, with nothing beside it.
func TestBuildFromBadInput(t *testing.T) {
	if err := checkSandbox(t.Context()); err != nil {
		t.Skip(err)
	}
	locked, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenTools(locked); err != nil {
		t.Skip(err)
	}
	nothing := func(w http.ResponseWriter, r *http.Request) {}
	// None of these is in any cache.
	foreign := func(tree *Tree) { tree.Packages[0].SHA256 = hashA }
	text := func(from, to string) func(string) string {
		return func(s string) string { return strings.Replace(s, from, to, 1) }
	}
	for _, c := range []struct {
		name   string
		change func(tree *Tree)    // of the engine's tree
		text   func(string) string // of the lock
		mirror func(http.ResponseWriter, *http.Request)
		want   []string
	}{
		{name: "a lock with an altered hash", change: foreign, mirror: func(w http.ResponseWriter, r *http.Request) {
			// What the lock named before.
			p := locked.Trees[0].Packages[0]
			http.ServeContent(w, r, p.Name, time.Time{}, bytes.NewReader(make([]byte, p.Size)))
		}, want: []string{hashA, "its SHA-256 is"}},
		{name: "a lock with a malformed hash", text: text(`"sha256":"`, `"sha256":"0`), want: []string{"is not a SHA-256", LockName}},
		{name: "a lock that lacks a package", change: func(tree *Tree) { tree.Packages = tree.Packages[1:] }, want: []string{"lacks package", "chrysalis image lock"}},
		{name: "a lock with an unknown field", text: text(`"version": 1`, `"version": 1, "mirror": "x"`), want: []string{`"mirror"`}},
		{name: "a mirror that has another file", change: foreign, mirror: func(w http.ResponseWriter, r *http.Request) {
			w.Write(make([]byte, locked.Trees[0].Packages[0].Size))
		}, want: []string{locked.Trees[0].Packages[0].Name, hashA, "its SHA-256 is"}},
		{name: "a mirror that has part of a file", change: foreign, mirror: func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 100)) },
			want: []string{"bytes long"}},
		{name: "a mirror that answers with a page", change: foreign, mirror: func(w http.ResponseWriter, r *http.Request) {
			w.Write([]byte("<html>502 Bad Gateway</html>"))
		}, want: []string{"bytes long"}},
		{name: "a mirror that answers with nothing", change: foreign, mirror: nothing, want: []string{"bytes long"}},
		{name: "a mirror that has nothing", change: foreign, mirror: http.NotFound, want: []string{"404", "looked in"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			lock, err := ReadLock("..")
			if err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(&lock.Trees[0])
			}
			encoded := string(lock.Encode())
			if c.text != nil {
				encoded = c.text(encoded)
			}
			source, out := t.TempDir(), t.TempDir()
			earlier := filepath.Join(out, "llama.cpp.disk")
			if err := os.WriteFile(earlier, []byte("good"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(filepath.Join(source, "image/engines"), os.DirFS("engines")); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(source, LockName), []byte(encoded), 0o644); err != nil {
				t.Fatal(err)
			}
			mirror := testMirror(t, nothing)
			if c.mirror != nil {
				mirror = testMirror(t, c.mirror)
			}
			b := &Builder{Source: source, Out: out, Mirrors: []string{mirror}, Progress: func(what string, _, _ int64) {
				if strings.HasPrefix(what, "build ") {
					t.Errorf("it begins to %s", what)
				}
			}}
			_, err = b.Engine(t.Context(), "llama.cpp")
			if err == nil {
				t.Fatal("it builds")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("it says %v, and not %q", err, want)
				}
			}
			if data, err := os.ReadFile(earlier); err != nil || string(data) != "good" {
				t.Errorf("the earlier artefact is %q (%v)", data, err)
			}
			if left, _ := os.ReadDir(out); len(left) != 1 {
				t.Errorf("it leaves %v", left)
			}
		})
	}
}
