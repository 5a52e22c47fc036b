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

const (
	sumA = "h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	sumB = "h1:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBA="
)

func sampleGo() Go {
	return Go{Toolchain: "go1.26.8", Modules: []Module{
		{"example.com/a.b/Mod", "v1.2.3", sumA},
		{"golang.org/x/sys", "v0.0.0-20250316020617-2671eefd35d7+incompatible", sumB},
	}}
}

func sampleLock() *Lock {
	return &Lock{Version: 1, Go: sampleGo(), Trees: []Tree{
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
	for i := range lock.Trees {
		if err := checkRecipe(&lock.Trees[i]); err != nil {
			t.Error(err)
		}
	}
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
 "go": {
  "toolchain": "go1.26.8",
  "modules": [
   {"path":"example.com/a.b/Mod","version":"v1.2.3","sum":"` + sumA + `"},
   {"path":"golang.org/x/sys","version":"v0.0.0-20250316020617-2671eefd35d7+incompatible","sum":"` + sumB + `"}
  ]
 },
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
	slices.Reverse(lock.Go.Modules)
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
		{"no toolchain", swap(`"toolchain": "go1.26.8"`, `"toolchain": ""`), `"" is not a Go toolchain`},
		{"a toolchain with an experiment", swap(`"go1.26.8"`, `"go1.26.8 X:rangefunc"`), `is not a Go toolchain`},
		{"a toolchain from elsewhere", swap(`"go1.26.8"`, `"go1.26.8-vendor"`), `is not a Go toolchain`},
		{"a module's path upwards", swap(`example.com/a.b/Mod`, `example.com/../Mod`), `"example.com/../Mod" is not`},
		{"an absolute module's path", swap(`example.com/a.b/Mod`, `/example.com`), `is not a Go module's path`},
		{"a module's path like an option", swap(`example.com/a.b/Mod`, `-x`), `"-x" is not`},
		{"a module's path with white space", swap(`example.com/a.b/Mod`, `example.com/a b`), `is not a Go module's path`},
		{"a module twice", swap(`golang.org/x/sys`, `example.com/a.b/Mod`), "Go module example.com/a.b/Mod is there twice"},
		{"modules out of order", swap(`golang.org/x/sys`, `a.org`), "Go module a.org is there twice or out of order"},
		{"a module's version like a branch", swap(`"v1.2.3"`, `"master"`), `Go module example.com/a.b/Mod: "master" is not a version`},
		{"a module's version with a path", swap(`"v1.2.3"`, `"v1.2.3/../x"`), `is not a version`},
		{"a module's sum of another kind", swap(sumA, "h2"+sumA[2:]), `Go module example.com/a.b/Mod: "h2:`},
		{"a short module's sum", swap(sumA, "h1:AAAA"), `is not a sum`},
		{"a module's sum with loose bits", swap(sumA, sumA[:45]+"B="), `is not a sum`},
		{"no module's sum", swap(`,"sum":"`+sumA+`"`, ``), `"" is not a sum`},
		{"an unknown field of a module", swap(`"version":"v1.2.3"`, `"version":"v1.2.3","replace":"x"`), `"replace"`},
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

		{"another lock behind it", good + good, "line 32"},
		{"a bracket behind it", good + "]", "line 32"},
		{"a brace behind it", good + "}", "line 32"},
		{"a field twice", swap(`"size":1,`, `"size":7,"size":1,`), "line 18"},
		{"a field in two cases", swap(`"size":1,`, `"Size":7,"size":1,`), "line 18"},
		{"packages out of order", strings.Join(swapped, ""), "line 18"},
		{"other white space", swap(`"version": 1`, `"version":1`), "line 2"},
		{"no final newline", strings.TrimSuffix(good, "\n"), "line 31"},
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
		{"a newer date", edit(func(l *Lock) { l.Trees[0].Suites[0].Date = time.Unix(1700003600, 0) }),
			[]string{"image: trixie 2023-11-14T22:13:20Z → 2023-11-14T23:13:20Z"}},
		{"another suite", edit(func(l *Lock) { l.Trees[1].Suites[0].Name = "forky" }),
			[]string{"tools: + forky 2023-11-14T22:13:20Z", "tools: - sid 2023-11-14T22:13:20Z"}},
		{"another toolchain", edit(func(l *Lock) { l.Go.Toolchain = "go1.27.0" }), []string{"go: toolchain go1.26.8 → go1.27.0"}},
		{"a newer module", edit(func(l *Lock) { l.Go.Modules[0].Version = "v1.2.4" }), []string{"go: example.com/a.b/Mod v1.2.3 → v1.2.4"}},
		{"another module", edit(func(l *Lock) { l.Go.Modules[0].Path = "example.com/c" }),
			[]string{"go: + example.com/c v1.2.3", "go: - example.com/a.b/Mod v1.2.3"}},
		{"a module's other content", edit(func(l *Lock) { l.Go.Modules[0].Sum = sumB }),
			[]string{"go: example.com/a.b/Mod v1.2.3: same version, other content: " + sumA + " → " + sumB}},
		{"another path", edit(func(l *Lock) { l.Trees[0].Packages[1].Path = "pool/x.deb" }),
			[]string{"image: libc6 2.43-7~deb13u1: same content, described otherwise: all pool/main/g/glibc/libc6_2.43-7~deb13u1_all.deb 1073741824 → all pool/x.deb 1073741824"}},
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
			var got []string
			for _, c := range Diff(sampleLock(), tt.after) {
				got = append(got, c.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q, expected %q", got, tt.want)
			}
		})
	}
}

// An unchanged tree keeps its dates, because they are in every artefact.
func TestRefresh(t *testing.T) {
	hour := time.Hour
	shift := func(l *Lock, by time.Duration) *Lock {
		for i := range l.Trees {
			for j := range l.Trees[i].Suites {
				l.Trees[i].Suites[j].Date = l.Trees[i].Suites[j].Date.Add(by)
			}
		}
		return l
	}
	before := sampleLock()
	after, err := Refresh(before, shift(sampleLock(), hour), false)
	if err != nil || !bytes.Equal(after.Encode(), before.Encode()) {
		t.Errorf("only newer: %v\n%s", err, after.Encode())
	}

	resolved := shift(sampleLock(), hour)
	resolved.Trees[0].Packages[0].Version = "4:16"
	resolved.Go.Toolchain = "go1.27.0"
	after, err = Refresh(before, resolved, false)
	if err != nil {
		t.Fatal(err)
	}
	if after.Trees[0].Epoch() != resolved.Trees[0].Epoch() || after.Trees[1].Epoch() != before.Trees[1].Epoch() || after.Go.Toolchain != "go1.27.0" {
		t.Errorf("one tree changed:\n%s", after.Encode())
	}

	// Older ones are refused whether anything else changes or not.
	older := shift(sampleLock(), -hour)
	_, err = Refresh(before, older, false)
	for _, says := range []string{"tree image", "tree tools", "trixie-backports", "2023-11-14T21:15:00Z", "2023-11-14T22:15:00Z", "--allow-older"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("older: %v does not say %q", err, says)
		}
	}
	older.Trees[0].Packages[0].Version = "4:14"
	if after, err = Refresh(before, older, true); err != nil || after.Trees[0].Packages[0].Version != "4:14" || after.Trees[0].Epoch() != older.Trees[0].Epoch() {
		t.Errorf("older, and allowed: %v", err)
	}
	if after, err = Refresh(&Lock{Version: 1}, older, false); err != nil || len(after.Trees) != 2 {
		t.Errorf("no lock before: %v", err)
	}
}

func TestCheckRecipe(t *testing.T) {
	committed := func() *Tree {
		lock, err := ReadLock("..")
		if err != nil {
			t.Fatal(err)
		}
		tree, err := lock.Tree("image")
		if err != nil {
			t.Fatal(err)
		}
		return tree
	}
	for _, tt := range []struct {
		name, says string
		edit       func(*Tree)
	}{
		{"as it is", "", func(*Tree) {}},
		{"one less", "lacks package linux-binary-" + Kernel, func(t *Tree) { t.Packages = t.Packages[1:] }},
		{"none", "lacks package", func(t *Tree) { t.Packages = nil }},
		{"one more", "has package vim, which its recipe does not ask for", func(t *Tree) { t.Packages = append(t.Packages, Package{Name: "vim"}) }},
		{"another suite", "comes from [sid trixie-backports]", func(t *Tree) { t.Suites[0].Name = "sid" }},
		{"a tree without a recipe", "", func(t *Tree) { t.Name, t.Packages = "engine/mine", nil }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tree := committed()
			tt.edit(tree)
			err := checkRecipe(tree)
			if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, expected %q", err, tt.says)
			}
			if err != nil && !strings.Contains(err.Error(), "chrysalis image lock") {
				t.Errorf("%v does not say what to do", err)
			}
		})
	}
}

// A build does not begin with a lock that another part of it would refuse.
func TestBuildRefusesAnIncompleteLock(t *testing.T) {
	lock, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	engine := &lock.Trees[0]
	engine.Packages = slices.DeleteFunc(engine.Packages, func(p Package) bool { return p.Name == "libllama0" })
	source := t.TempDir()
	if err := WriteLock(source, lock); err != nil {
		t.Fatal(err)
	}
	b := &Builder{Source: source, Out: t.TempDir(), Progress: quiet}
	if _, err := b.UKI(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "lacks package libllama0") {
		t.Errorf("%v", err)
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
