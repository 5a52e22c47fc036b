package image

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	hashA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	hashB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func sampleLock() *Lock {
	return &Lock{Version: 1, Trees: []Tree{
		{
			Name:   "image",
			Suites: []Suite{{"trixie", time.Unix(1700000000, 0).UTC()}, {"trixie-backports", time.Unix(1700000100, 0).UTC()}},
			Packages: []Package{
				{"g++", "4:15.2-1", "amd64", "pool/main/g/gcc-defaults/g++_15.2-1_amd64.deb", 1, hashA},
				{"libc6", "2.43-7~deb13u1", "all", "pool/main/g/glibc/libc6_2.43-7~deb13u1_all.deb", 1 << 30, hashB},
			},
		},
		{Name: "tools", Suites: []Suite{{"sid", time.Unix(1700000000, 0).UTC()}}},
	}}
}

func TestCommittedLock(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("..", LockName))
	if err != nil {
		t.Fatal(err)
	}
	lock, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(lock.Encode(), data) {
		t.Error("it is not as Encode writes it")
	}
	// It names what trees.go asks for, and where.
	if len(lock.Trees) != len(sources) {
		t.Errorf("%d trees, expected %d", len(lock.Trees), len(sources))
	}
	for _, src := range sources {
		tree, err := lock.Tree(src.tree)
		if err != nil {
			t.Fatal(err)
		}
		var suites []string
		for _, s := range tree.Suites {
			suites = append(suites, s.Name)
		}
		if !slices.Equal(suites, src.suites) {
			t.Errorf("tree %s: suites %v, expected %v", src.tree, suites, src.suites)
		}
		for _, name := range src.packages {
			if strings.HasPrefix(name, "?") {
				continue // a pattern of apt
			}
			if _, err := tree.Package(name); err != nil {
				t.Error(err)
			}
		}
		if !src.closure && len(tree.Packages) != len(src.packages) {
			t.Errorf("tree %s: %d packages, expected %d", src.tree, len(tree.Packages), len(src.packages))
		}
	}
	tree, _ := lock.Tree("image")
	if stub, err := tree.Package("systemd-boot-efi"); err != nil || !strings.HasPrefix(stub.Version, "257.") {
		t.Errorf("systemd-stub %s, expected 257 (%v)", stub.Version, err)
	}
}

func TestEncode(t *testing.T) {
	const want = `{
 "version": 1,
 "trees": [
  {
   "name": "image",
   "suites": [
    {"suite":"trixie","date":"2023-11-14T22:13:20Z"},
    {"suite":"trixie-backports","date":"2023-11-14T22:15:00Z"}
   ],
   "packages": [
    {"name":"g++","version":"4:15.2-1","arch":"amd64","path":"pool/main/g/gcc-defaults/g++_15.2-1_amd64.deb","size":1,"sha256":"` + hashA + `"},
    {"name":"libc6","version":"2.43-7~deb13u1","arch":"all","path":"pool/main/g/glibc/libc6_2.43-7~deb13u1_all.deb","size":1073741824,"sha256":"` + hashB + `"}
   ]
  },
  {
   "name": "tools",
   "suites": [
    {"suite":"sid","date":"2023-11-14T22:13:20Z"}
   ],
   "packages": [
   ]
  }
 ]
}
`
	lock := sampleLock()
	slices.Reverse(lock.Trees[0].Packages)
	got := string(lock.Encode())
	if got != want {
		t.Errorf("%s\nexpected\n%s", got, want)
	}
	if lock.Trees[0].Packages[0].Name != "libc6" {
		t.Error("Encode changed the lock")
	}
	read, err := ParseLock([]byte(got))
	if err != nil || string(read.Encode()) != want {
		t.Errorf("read and written: %v\n%s", err, read.Encode())
	}
	dir := t.TempDir()
	if err := WriteLock(dir, lock); err != nil {
		t.Fatal(err)
	}
	if read, err := ReadLock(dir); err != nil || string(read.Encode()) != want {
		t.Errorf("in a file: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("WriteLock left %v", entries)
	}
}

func TestReadLockSaysWhatToDo(t *testing.T) {
	if _, err := ReadLock(t.TempDir()); err == nil || !strings.Contains(err.Error(), "checkout") {
		t.Errorf("no lock: %v", err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, LockName), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadLock(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a bad lock: %v", err)
	}
}

func TestParseLockRefuses(t *testing.T) {
	good := string(sampleLock().Encode())
	swap := func(old, new string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("the lock has no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	var lines []string
	for line := range strings.Lines(good) {
		lines = append(lines, line)
	}
	gcc, libc := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "g++") }), 0
	libc = gcc + 1
	swapped := slices.Clone(lines)
	swapped[gcc], swapped[libc] = strings.TrimSuffix(lines[libc], "\n")+",\n", strings.TrimSuffix(lines[gcc], ",\n")+"\n"
	for _, tt := range []struct{ name, data, says string }{
		{"empty", "", "not a lock"},
		{"not JSON", "[", "not a lock"},
		{"cut short", good[:len(good)-3], "not a lock"},
		{"unknown field", swap(`"version": 1`, `"version": 1, "mirror": "x"`), `"mirror"`},
		{"unknown field of a package", swap(`"size":1,`, `"size":1,"md5":"x",`), `"md5"`},
		{"version 2", swap(`"version": 1`, `"version": 2`), "version is 2"},
		{"no version", swap(`"version": 1,`, ``), "version is 0"},
		{"a tree without a name", swap(`"name": "image"`, `"name": ""`), "tree 0 has no name"},
		{"a tree twice", swap(`"name": "tools"`, `"name": "image"`), "tree image is there twice"},
		{"trees out of order", swap(`"name": "tools"`, `"name": "engine"`), "tree engine"},
		{"a tree from nowhere", swap(`    {"suite":"sid","date":"2023-11-14T22:13:20Z"}`+"\n", ``), "tree tools comes from no suite"},
		{"a date that is none", swap(`2023-11-14T22:13:20Z`, `yesterday`), "yesterday"},
		{"a package's name like an option", swap(`"name":"g++"`, `"name":"--x"`), `tree image: "--x" is not`},
		{"a package's name with a slash", swap(`"name":"g++"`, `"name":"g/x"`), `tree image: "g/x" is not`},
		{"a package twice", swap(`"name":"libc6"`, `"name":"g++"`), "tree image: package g++ is there twice"},
		{"another architecture", swap(`"arch":"all"`, `"arch":"i386"`), "tree image: package libc6: architecture \"i386\""},
		{"a path out of the pool", swap(`pool/main/g/glibc`, `dists/main/g/glibc`), "tree image: package libc6: \"dists/"},
		{"an absolute path", swap(`pool/main/g/glibc`, `/pool/main/g/glibc`), "package libc6"},
		{"a path upwards", swap(`pool/main/g/glibc`, `pool/../../etc`), "package libc6"},
		{"an escaped path upwards", swap(`pool/main/g/glibc`, `pool/%2e%2e/etc`), "package libc6"},
		{"a path that is no package", swap(`u1_all.deb`, `u1_all.tar`), "package libc6"},
		{"an address", swap(`pool/main/g/glibc`, `http://host/pool`), "package libc6"},
		{"a path with a query", swap(`pool/main/g/glibc`, `pool/x?y`), "package libc6"},
		{"a hash of 63 digits", swap(hashB, hashB[1:]), "tree image: package libc6: \"bbb"},
		{"a hash of 65 digits", swap(hashB, hashB+"b"), "package libc6"},
		{"a hash in capitals", swap(hashB, strings.ToUpper(hashB)), "package libc6"},
		{"no hash", swap(`,"sha256":"`+hashB+`"`, ``), "package libc6: \"\" is not a SHA-256"},
		{"no size", swap(`"size":1073741824,`, ``), "package libc6: a size of 0 bytes"},
		{"a negative size", swap(`"size":1073741824`, `"size":-1`), "package libc6: a size of -1 bytes"},
		{"a size of more than 1 GiB", swap(`"size":1073741824`, `"size":1073741825`), "package libc6: a size of 1073741825 bytes"},
		{"a size that is no integer", swap(`"size":1073741824`, `"size":1.5`), "1.5"},

		{"another lock behind it", good + good, "line 25"},
		{"a bracket behind it", good + "]", "line 25"},
		{"a brace behind it", good + "}", "line 25"},
		{"a field twice", swap(`"size":1,`, `"size":7,"size":1,`), "line 11"},
		{"a field in two cases", swap(`"size":1,`, `"Size":7,"size":1,`), "line 11"},
		{"packages out of order", strings.Join(swapped, ""), "line 11"},
		{"other white space", swap(`"version": 1`, `"version":1`), "line 2"},
		{"no final newline", strings.TrimSuffix(good, "\n"), "line 24"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseLock([]byte(tt.data))
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v does not say %q", err, tt.says)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	edit := func(f func(*Lock)) *Lock {
		l := sampleLock()
		f(l)
		return l
	}
	for _, tt := range []struct {
		name  string
		after *Lock
		want  []string
	}{
		{"nothing", sampleLock(), nil},
		{"a newer date", edit(func(l *Lock) { l.Trees[0].Suites[0].Date = time.Now() }), nil},
		{"a new version", edit(func(l *Lock) {
			p := &l.Trees[0].Packages[1]
			p.Version, p.SHA256 = "2.44-1", hashA
		}), []string{"image: libc6 2.43-7~deb13u1 → 2.44-1"}},
		{"other content", edit(func(l *Lock) { l.Trees[0].Packages[1].SHA256 = hashA }),
			[]string{"image: libc6 2.43-7~deb13u1: same version, other content: " + hashB + " → " + hashA}},
		{"one for another", edit(func(l *Lock) { l.Trees[0].Packages[0].Name = "gcc" }),
			[]string{"image: + gcc 4:15.2-1", "image: - g++ 4:15.2-1"}},
		{"a tree gone", edit(func(l *Lock) { l.Trees = l.Trees[:1] }), []string{"tools: gone"}},
		{"a new tree", edit(func(l *Lock) { l.Trees = append(l.Trees, Tree{Name: "extra"}) }), []string{"extra: new, 0 packages"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Diff(sampleLock(), tt.after); !slices.Equal(got, tt.want) {
				t.Errorf("%q, expected %q", got, tt.want)
			}
		})
	}
}

func TestKey(t *testing.T) {
	base := sampleLock().Trees[0]
	if key := base.Key("recipe/1"); len(key) != 16 || key != base.Key("recipe/1") {
		t.Errorf("key %q", key)
	}
	for name, edit := range map[string]func(*Tree){
		"a hash":      func(t *Tree) { t.Packages[0].SHA256 = hashB },
		"a package":   func(t *Tree) { t.Packages = t.Packages[:1] },
		"a name":      func(t *Tree) { t.Packages[0].Name = "gcc" },
		"the date":    func(t *Tree) { t.Suites[1].Date = t.Suites[1].Date.Add(time.Second) },
		"the newest":  func(t *Tree) { t.Suites = t.Suites[:1] },
		"another way": func(t *Tree) { t.Packages[0].SHA256, t.Packages[1].SHA256 = hashB, hashA },
	} {
		other := sampleLock().Trees[0]
		edit(&other)
		if other.Key("recipe/1") == base.Key("recipe/1") {
			t.Errorf("%s changes and the key does not", name)
		}
	}
	if base.Key("recipe/2") == base.Key("recipe/1") {
		t.Error("the recipe changes and the key does not")
	}
	if got := base.Epoch().Unix(); got != 1700000100 {
		t.Errorf("epoch %d", got)
	}
}

func TestMissingTreeAndPackage(t *testing.T) {
	lock := sampleLock()
	if _, err := lock.Tree("engine/x"); err == nil || !strings.Contains(err.Error(), `"engine/x"`) || !strings.Contains(err.Error(), "chrysalis image lock") {
		t.Error(err)
	}
	if _, err := lock.Trees[0].Package("vim"); err == nil || !strings.Contains(err.Error(), "tree image") || !strings.Contains(err.Error(), "vim") {
		t.Error(err)
	}
	if _, err := OpenTools(&Lock{Version: 1}); err == nil || !strings.Contains(err.Error(), `"tools"`) {
		t.Error(err)
	}
}

func FuzzParseLock(f *testing.F) {
	f.Add(sampleLock().Encode())
	f.Add([]byte(`{"version":1,"trees":[]}`))
	f.Add((&Lock{Version: 1}).Encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		lock, err := ParseLock(data)
		if err != nil {
			return
		}
		if !bytes.Equal(lock.Encode(), data) || !json.Valid(data) {
			t.Errorf("read:\n%s\nwritten:\n%s", data, lock.Encode())
		}
	})
}
