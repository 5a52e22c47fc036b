package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// ranges notes the Range header of each request that a server gets.
type ranges struct {
	mu   sync.Mutex
	list []string
}

func (r *ranges) note(req *http.Request) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, req.Header.Get("Range"))
	return len(r.list)
}

// breakOff sends part of an answer that promises more.
func breakOff(w http.ResponseWriter, promised int, data []byte) {
	w.Header().Set("Content-Length", fmt.Sprint(promised))
	w.Write(data)
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

// TestFetchResumes has servers that break off, and says what each is asked for
// afterwards. Whatever a server makes of ranges, the package arrives whole.
func TestFetchResumes(t *testing.T) {
	p := samplePool(1)
	data := p.content[p.tree.Packages[0].Path] // 3000 bytes
	whole := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}
	partial := func(w http.ResponseWriter, contentRange string, body []byte) {
		w.Header().Set("Content-Range", contentRange)
		w.WriteHeader(http.StatusPartialContent)
		w.Write(body)
	}
	for _, tt := range []struct {
		name  string
		then  http.HandlerFunc // after one that breaks off at 1000
		asked []string
	}{
		{"it knows ranges", whole, []string{"", "bytes=1000-"}},
		{"it breaks off again", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "bytes=1000-" {
				w.Header().Set("Content-Range", "bytes 1000-2999/3000")
				w.Header().Set("Content-Length", "2000")
				w.WriteHeader(http.StatusPartialContent)
				w.Write(data[1000:2000])
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
			whole(w, r)
		}, []string{"", "bytes=1000-", "bytes=2000-"}},
		{"it does not know ranges", func(w http.ResponseWriter, r *http.Request) { w.Write(data) }, []string{"", "bytes=1000-"}},
		{"it answers 416", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			w.Write(data)
		}, []string{"", "bytes=1000-", ""}},
		{"it sends another range", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				partial(w, "bytes 0-2999/3000", data)
				return
			}
			w.Write(data)
		}, []string{"", "bytes=1000-", ""}},
		{"its file has another length", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				partial(w, "bytes 1000-2999/4000", data[1000:])
				return
			}
			w.Write(data)
		}, []string{"", "bytes=1000-", ""}},
		{"the range has other content", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				partial(w, "bytes 1000-2999/3000", make([]byte, 2000))
				return
			}
			w.Write(data)
		}, []string{"", "bytes=1000-", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := cacheDir(t)
			var asked ranges
			m := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
				if asked.note(r) == 1 {
					breakOff(w, len(data), data[:1000])
				}
				tt.then(w, r)
			})
			var mu sync.Mutex
			var last, total int64
			paths, err := Fetch(t.Context(), &p.tree, []string{m}, func(_ string, done, all int64) {
				mu.Lock()
				defer mu.Unlock()
				last, total = done, all
			})
			if err != nil {
				t.Fatal(err)
			}
			checkCache(t, dir, p, paths)
			if !slices.Equal(asked.list, tt.asked) {
				t.Errorf("asked for %q, expected %q", asked.list, tt.asked)
			}
			if last != 3000 || total != 3000 {
				t.Errorf("progress ended at %d of %d", last, total)
			}
			if left, _ := os.ReadDir(filepath.Join(filepath.Dir(dir), "partial")); len(left) != 0 {
				t.Errorf("it leaves %v", left)
			}
		})
	}
}

// An interrupted run leaves what it has, and the next one goes on there, from
// another mirror too. A wrong beginning costs no more than starting again.
func TestFetchResumesLater(t *testing.T) {
	p := samplePool(1)
	data := p.content[p.tree.Packages[0].Path]
	for _, tt := range []struct {
		name  string
		begin []byte
		asked []string
	}{
		{"a good beginning", data[:1000], []string{"bytes=1000-"}},
		{"a wrong one", bytes.Repeat([]byte{9}, 1000), []string{"bytes=1000-", ""}},
		{"all of it", data, nil},
		{"all of it, wrong", bytes.Repeat([]byte{9}, 3000), []string{""}},
		{"too much", bytes.Repeat([]byte{9}, 4000), []string{""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := cacheDir(t)
			partial := filepath.Join(filepath.Dir(dir), "partial")
			if err := os.MkdirAll(partial, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(partial, p.tree.Packages[0].SHA256), tt.begin, 0o600); err != nil {
				t.Fatal(err)
			}
			var asked ranges
			m := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
				asked.note(r)
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
			})
			paths, err := Fetch(t.Context(), &p.tree, []string{m}, quiet)
			if err != nil {
				t.Fatal(err)
			}
			checkCache(t, dir, p, paths)
			if !slices.Equal(asked.list, tt.asked) {
				t.Errorf("asked for %q, expected %q", asked.list, tt.asked)
			}
		})
	}

	dir := cacheDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	stalls := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3000")
		w.Write(data[:500])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	_, err := Fetch(ctx, &p.tree, []string{stalls}, func(_ string, done, _ int64) {
		if done == 500 {
			cancel()
		}
	})
	if err == nil {
		t.Fatal("it is whole")
	}
	var asked ranges
	m := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
		asked.note(r)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	})
	paths, err := Fetch(t.Context(), &p.tree, []string{m}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	checkCache(t, dir, p, paths)
	if !slices.Equal(asked.list, []string{"bytes=500-"}) {
		t.Errorf("asked for %q", asked.list)
	}
}

// A mirror that sends nothing does not hold anybody up for ever.
func TestFetchStalls(t *testing.T) {
	defer func(d time.Duration) { stallAfter = d }(stallAfter)
	stallAfter = 50 * time.Millisecond
	p := samplePool(1)
	dir := cacheDir(t)
	stalls := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3000")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	if _, err := Fetch(t.Context(), &p.tree, []string{stalls}, quiet); err == nil || !strings.Contains(err.Error(), "sent nothing for") {
		t.Errorf("%v", err)
	}
	paths, err := Fetch(t.Context(), &p.tree, []string{stalls, p.dir(t)}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	checkCache(t, dir, p, paths)
}

// Two processes that want the same package do not get in each other's way.
func TestFetchTwice(t *testing.T) {
	p := samplePool(5)
	dir := cacheDir(t)
	m := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(10 * time.Millisecond)
		p.serve(w, r)
	})
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			if _, err := Fetch(t.Context(), &p.tree, []string{m}, quiet); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	paths, err := Fetch(t.Context(), &p.tree, nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	checkCache(t, dir, p, paths)
}

// Progress is told while bytes arrive, not when a package is there.
func TestFetchTellsBytes(t *testing.T) {
	cacheDir(t)
	p := samplePool(1)
	data := p.content[p.tree.Packages[0].Path]
	seen := make(chan struct{})
	m := testMirror(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3000")
		w.Write(data[:100])
		w.(http.Flusher).Flush()
		<-seen
		w.Write(data[100:])
	})
	var steps []int64
	if _, err := Fetch(t.Context(), &p.tree, []string{m}, func(_ string, done, _ int64) {
		if steps = append(steps, done); done == 100 {
			close(seen)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if steps[0] != 100 || steps[len(steps)-1] != 3000 {
		t.Errorf("%v", steps)
	}
}

func TestMirrorNames(t *testing.T) {
	cacheDir(t)
	p := samplePool(1)
	notOne := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notOne, []byte("<html>"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, says := range map[string]string{
		"ftp://host/debian": "http or https",
		"file:///debian":    "http or https",
		"http://":           "http or https",
		notOne:              "chrysalis image bundle",
	} {
		if _, err := Fetch(t.Context(), &p.tree, []string{name}, quiet); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// One that is not there is named, and others are asked.
	if _, err := Fetch(t.Context(), &p.tree, []string{notOne + "x"}, quiet); err == nil || !strings.Contains(err.Error(), notOne+"x: ") {
		t.Errorf("%v", err)
	}
	if _, err := Fetch(t.Context(), &p.tree, []string{notOne + "x", p.dir(t)}, quiet); err != nil {
		t.Error(err)
	}
}

// A hundred missing packages are not a hundred times three lines.
func TestFetchSaysHowManyMore(t *testing.T) {
	cacheDir(t)
	p := samplePool(30)
	_, err := Fetch(t.Context(), &p.tree, []string{t.TempDir()}, quiet)
	if err == nil || !strings.HasSuffix(err.Error(), "and 20 more") || strings.Count(err.Error(), "\n") > 40 {
		t.Errorf("%v", err)
	}
}

// bundle writes the pool's packages into a bundle.
func (p pool) bundle(t *testing.T) string {
	t.Helper()
	dir := p.dir(t)
	files := map[string]string{}
	for _, q := range p.tree.Packages {
		files[packageEntry(q)] = filepath.Join(dir, q.Path)
	}
	out := filepath.Join(t.TempDir(), "bundle")
	if err := writeBundle(t.Context(), out, files, quiet); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestBundle(t *testing.T) {
	p := samplePool(7)
	one, two := p.bundle(t), p.bundle(t)
	a, err := os.ReadFile(one)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(two); err != nil || !bytes.Equal(a, b) {
		t.Errorf("made twice, it differs (%v)", err)
	}
	if info, _ := os.Stat(one); info.Mode() != 0o644 {
		t.Errorf("mode %v", info.Mode())
	}
	dir := cacheDir(t)
	paths, err := Fetch(t.Context(), &p.tree, []string{one}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	checkCache(t, dir, p, paths)

	// What it lacks is named, and looked for elsewhere.
	more := samplePool(8)
	dir = cacheDir(t)
	if _, err := Fetch(t.Context(), &more.tree, []string{one}, quiet); err == nil || !strings.Contains(err.Error(), "package p7 ") || !strings.Contains(err.Error(), one+": the bundle does not hold it") {
		t.Errorf("%v", err)
	}
	paths, err = Fetch(t.Context(), &more.tree, []string{one, testMirror(t, more.serve)}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	checkCache(t, dir, more, paths)

	// Content that is not what its name says is not taken.
	bad := bytes.Clone(a)
	at := bytes.Index(bad, p.content[p.tree.Packages[3].Path])
	bad[at] ^= 1
	if err := os.WriteFile(two, bad, 0o644); err != nil {
		t.Fatal(err)
	}
	cacheDir(t)
	if _, err := Fetch(t.Context(), &p.tree, []string{two}, quiet); err == nil || !strings.Contains(err.Error(), two+": its SHA-256 is") || !strings.Contains(err.Error(), "package p3 ") {
		t.Errorf("%v", err)
	}
	// Neither is that of another size.
	p.tree.Packages[2].Size++
	if _, err := Fetch(t.Context(), &p.tree, []string{one}, quiet); err == nil || !strings.Contains(err.Error(), "bytes long as the lock says") {
		t.Errorf("%v", err)
	}
}

func TestBundleKeepsTheEarlierOne(t *testing.T) {
	p := samplePool(2)
	out := p.bundle(t)
	before, _ := os.ReadFile(out)
	// A cache entry that changed since it was checked.
	dir := p.dir(t)
	path := filepath.Join(dir, p.tree.Packages[0].Path)
	if err := os.WriteFile(path, []byte("rot"), 0o644); err != nil {
		t.Fatal(err)
	}
	err := writeBundle(t.Context(), out, map[string]string{packageEntry(p.tree.Packages[0]): path}, quiet)
	if err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
	if after, _ := os.ReadFile(out); !bytes.Equal(after, before) {
		t.Error("the earlier bundle is gone")
	}
	if left, _ := os.ReadDir(filepath.Dir(out)); len(left) != 1 {
		t.Errorf("it leaves %v", left)
	}
	if err := writeBundle(t.Context(), dir, nil, quiet); err == nil {
		t.Error("a bundle in place of a folder")
	}
}

func TestBundleRefuses(t *testing.T) {
	name := func(c string) string { return "packages/" + strings.Repeat(c, 64) + ".deb" }
	type entry struct {
		tar.Header
		data string
	}
	file := func(name string) entry { return entry{tar.Header{Name: name}, "abc"} }
	make := func(edit func([]byte) []byte, entries ...entry) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range entries {
			if e.Typeflag == 0 {
				e.Typeflag, e.Size = tar.TypeReg, int64(len(e.data))
			}
			if e.Format == 0 {
				e.Format = tar.FormatUSTAR
			}
			if err := w.WriteHeader(&e.Header); err != nil {
				t.Fatal(err)
			}
			if e.Typeflag == tar.TypeReg {
				io.WriteString(w, e.data)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if edit != nil {
			return edit(b.Bytes())
		}
		return b.Bytes()
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:len(b)-n] } }
	for _, tt := range []struct {
		name, says string
		data       []byte
	}{
		{"a page about an error", "not a bundle", []byte("<html>not here</html>")},
		{"nothing", "bytes long", nil},
		{"a path upwards", "has no place", make(nil, file("packages/../../etc/passwd"))},
		{"an absolute path", "has no place", make(nil, file("/packages/x.deb"))},
		{"another name", "has no place", make(nil, file("README"))},
		{"a name with more behind it", "has no place", make(nil, file(name("a")+"/x"))},
		{"a module by its path", "has no place", make(nil, file("modules/golang.org/x/sys.zip"))},
		{"a link", "is not a file", make(nil, entry{tar.Header{Name: name("a"), Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, ""})},
		{"a hard link", "is not a file", make(nil, entry{tar.Header{Name: name("a"), Typeflag: tar.TypeLink, Linkname: name("b")}, ""})},
		{"a device", "is not a file", make(nil, entry{tar.Header{Name: name("a"), Typeflag: tar.TypeBlock}, ""})},
		{"twice the same", "there twice", make(nil, file(name("a")), file(name("a")))},
		{"out of order", "out of order", make(nil, file(name("b")), file(name("a")))},
		{"an empty one", "0 bytes is out of bounds", make(nil, entry{tar.Header{Name: name("a")}, ""})},
		{"extended headers", "header", make(nil, entry{tar.Header{Name: name("a"), Format: tar.FormatPAX, PAXRecords: map[string]string{"X.y": "z"}}, "abc"})},
		{"cut within an entry", "within entry", make(cut(1024+512), file(name("a")))},
		{"cut before its end", "its entries make", make(cut(1024), file(name("a")))},
		{"more behind it", "its entries make", make(func(b []byte) []byte { return append(b, "more"...) }, file(name("a")))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "bundle")
			if err := os.WriteFile(path, tt.data, 0o644); err != nil {
				t.Fatal(err)
			}
			if _, err := openBundle(path); err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "chrysalis image bundle") {
				t.Errorf("%v, expected %q", err, tt.says)
			}
		})
	}
	good := filepath.Join(t.TempDir(), "bundle")
	if err := os.WriteFile(good, make(nil, file(name("a")), file(name("b"))), 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := openBundle(good); err != nil || len(b.entries) != 2 {
		t.Errorf("a good one: %v", err)
	}
}
