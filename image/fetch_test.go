package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// pool is a tree of packages and their content.
type pool struct {
	tree    Tree
	content map[string][]byte // by path below a mirror
}

func samplePool(n int) pool {
	p := pool{tree: Tree{Name: "sample"}, content: map[string][]byte{}}
	for i := range n {
		data := bytes.Repeat([]byte{byte(i), 1, 2}, 1000+i)
		sum := sha256.Sum256(data)
		path := fmt.Sprintf("pool/main/p/p%d/p%d_1~x+1_amd64.deb", i, i)
		p.content[path] = data
		p.tree.Packages = append(p.tree.Packages, Package{
			Name: fmt.Sprintf("p%d", i), Version: "1~x+1", Arch: "amd64", Path: path,
			Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]),
		})
	}
	return p
}

func (p pool) serve(w http.ResponseWriter, r *http.Request) {
	if data, ok := p.content[strings.TrimPrefix(r.URL.Path, "/debian/")]; ok {
		w.Write(data)
		return
	}
	http.NotFound(w, r)
}

// dir lays the pool out as a folder.
func (p pool) dir(t *testing.T) string {
	t.Helper()
	top := t.TempDir()
	for path, data := range p.content {
		path = filepath.Join(top, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return top
}

func testMirror(t *testing.T, f http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return s.URL + "/debian"
}

// cacheDir gives the test a cache of its own and returns its packages' folder.
func cacheDir(t *testing.T) string {
	t.Helper()
	top := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", top)
	return filepath.Join(top, "chrysalis", "packages")
}

// checkCache fails on anything in the cache but these packages, whole.
func checkCache(t *testing.T, dir string, p pool, paths []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(paths) {
		t.Errorf("the cache holds %v, expected %d packages", entries, len(paths))
	}
	for i, path := range paths {
		want := p.tree.Packages[i]
		if filepath.Dir(path) != dir || filepath.Base(path) != want.SHA256+".deb" {
			t.Errorf("%s is at %s", want.Name, path)
		}
		if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, p.content[want.Path]) {
			t.Errorf("%s: %d bytes, %v", want.Name, len(data), err)
		}
		if info, err := os.Stat(path); err == nil && info.Mode().Perm() != 0o644 {
			t.Errorf("%s has mode %v", want.Name, info.Mode())
		}
	}
}

func quiet(string, int64, int64) {}

func TestFetch(t *testing.T) {
	p := samplePool(20)
	for _, tt := range []struct {
		name    string
		mirrors []string
	}{
		{"an address", []string{testMirror(t, p.serve)}},
		{"an address with a slash", []string{testMirror(t, p.serve) + "/"}},
		{"a folder", []string{p.dir(t)}},
		{"the second of two", []string{testMirror(t, http.NotFound), testMirror(t, p.serve)}},
		{"a folder after an address", []string{testMirror(t, http.NotFound), p.dir(t)}},
		{"an address after a folder", []string{t.TempDir(), testMirror(t, p.serve)}},
		{"one that is not there first", []string{"http://127.0.0.1:1/debian", p.dir(t)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := cacheDir(t)
			var mu sync.Mutex
			var last, total int64
			paths, err := Fetch(t.Context(), &p.tree, tt.mirrors, func(what string, done, all int64) {
				mu.Lock()
				defer mu.Unlock()
				last, total = max(last, done), all
				if what != "fetch sample" {
					t.Errorf("progress of %q", what)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			checkCache(t, dir, p, paths)
			if last != total || total == 0 {
				t.Errorf("progress ended at %d of %d", last, total)
			}
			// From now on no mirror is needed.
			again, err := Fetch(t.Context(), &p.tree, nil, quiet)
			if err != nil {
				t.Fatal(err)
			}
			checkCache(t, dir, p, again)
		})
	}
}

// TestFetchRefuses has a mirror for each way in which one can be wrong. The
// error names package, hash and mirror; nothing of it stays; and a good mirror
// behind the bad one makes up for it.
func TestFetchRefuses(t *testing.T) {
	p := samplePool(1)
	data := p.content[p.tree.Packages[0].Path]
	for _, tt := range []struct {
		name, says string
		mirror     http.HandlerFunc
	}{
		{"other content", "its SHA-256 is", func(w http.ResponseWriter, r *http.Request) {
			other := bytes.Clone(data)
			other[100] ^= 1
			w.Write(other)
		}},
		{"truncated, and says so", "bytes long", func(w http.ResponseWriter, r *http.Request) { w.Write(data[:100]) }},
		{"broken off", "unexpected EOF", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.Write(data[:100])
		}},
		{"nothing", "bytes long", func(w http.ResponseWriter, r *http.Request) {}},
		{"a byte more", "bytes long", func(w http.ResponseWriter, r *http.Request) { w.Write(append(bytes.Clone(data), 0)) }},
		{"without end", "bytes long", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}},
		{"a page about an error, with 200", "bytes long", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "<html>Please log in to this network</html>")
		}},
		{"404", "404 Not Found", http.NotFound},
		{"500", "500 Internal", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }},
		{"206", "206 Partial", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(206); w.Write(data) }},
		{"a redirect to nowhere", "404 Not Found", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/gone" {
				http.NotFound(w, r)
				return
			}
			http.Redirect(w, r, "/gone", http.StatusFound)
		}},
		{"hangs up", "EOF", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := cacheDir(t)
			bad, empty := testMirror(t, tt.mirror), t.TempDir()
			_, err := Fetch(t.Context(), &p.tree, []string{bad, empty}, quiet)
			if err == nil {
				t.Fatal("it is accepted")
			}
			for _, says := range []string{"package p0 1~x+1", p.tree.Packages[0].SHA256, bad + ": ", empty + ": ", tt.says} {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("error %q does not say %q", err, says)
				}
			}
			checkCache(t, dir, p, nil)
			paths, err := Fetch(t.Context(), &p.tree, []string{bad, testMirror(t, p.serve)}, quiet)
			if err != nil {
				t.Fatal(err)
			}
			checkCache(t, dir, p, paths)
		})
	}
}

func TestFetchWithoutMirror(t *testing.T) {
	cacheDir(t)
	p := samplePool(1)
	_, err := Fetch(t.Context(), &p.tree, nil, quiet)
	if err == nil || !strings.Contains(err.Error(), "package p0") || !strings.Contains(err.Error(), "--mirror") {
		t.Errorf("%v", err)
	}
}

// A package that no mirror has does not hide another, nor stop the rest.
func TestFetchNamesEveryPackage(t *testing.T) {
	dir := cacheDir(t)
	p := samplePool(6)
	for _, i := range []int{1, 4} {
		delete(p.content, p.tree.Packages[i].Path)
	}
	paths, err := Fetch(t.Context(), &p.tree, []string{p.dir(t)}, quiet)
	if err == nil || paths != nil || !strings.Contains(err.Error(), "package p1 ") || !strings.Contains(err.Error(), "package p4 ") || strings.Contains(err.Error(), "package p2 ") {
		t.Errorf("%v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 4 {
		t.Errorf("%d packages are kept, expected 4", len(entries))
	}
}

func TestFetchMendsTheCache(t *testing.T) {
	p := samplePool(3)
	for name, damage := range map[string]func(path string) error{
		"a flipped byte": func(path string) error {
			data, err := os.ReadFile(path)
			if err == nil {
				data[10] ^= 1
				err = os.WriteFile(path, data, 0o644)
			}
			return err
		},
		"truncated": func(path string) error { return os.Truncate(path, 10) },
		"empty":     func(path string) error { return os.Truncate(path, 0) },
		"longer":    func(path string) error { return os.Truncate(path, 1<<20) },
		"gone":      os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			dir := cacheDir(t)
			var asked atomic.Int64
			m := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				p.serve(w, r)
			})
			paths, err := Fetch(t.Context(), &p.tree, []string{m}, quiet)
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(paths[1]); err != nil {
				t.Fatal(err)
			}
			if paths, err = Fetch(t.Context(), &p.tree, []string{m}, quiet); err != nil {
				t.Fatal(err)
			}
			checkCache(t, dir, p, paths)
			if n := asked.Load(); n != 4 {
				t.Errorf("the mirror was asked %d times, expected 4", n)
			}
		})
	}
}

// A mirror that stalls does not keep somebody who interrupts.
func TestFetchCancelled(t *testing.T) {
	dir := cacheDir(t)
	p := samplePool(30)
	ctx, cancel := context.WithCancel(t.Context())
	var once sync.Once
	stalls := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte("half"))
		w.(http.Flusher).Flush()
		once.Do(cancel)
		<-r.Context().Done()
	})
	begin := time.Now()
	_, err := Fetch(ctx, &p.tree, []string{stalls, stalls}, quiet)
	if !errors.Is(err, context.Canceled) || strings.Count(err.Error(), "\n") > 0 {
		t.Errorf("%v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	checkCache(t, dir, p, nil)
}

func TestHashFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	// FIPS 180-4's example.
	const want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	if sum, n, err := HashFile(path); sum != want || n != 3 || err != nil {
		t.Errorf("%s, %d, %v", sum, n, err)
	}
	if _, _, err := HashFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
