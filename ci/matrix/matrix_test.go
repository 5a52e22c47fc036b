package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestMatrix checks that each row of the matrix names a test that there is, and that
// docs/security.md lists the fuzz targets that there are.
func TestMatrix(t *testing.T) {
	top := filepath.Join("..", "..")
	text, err := os.ReadFile(filepath.Join(top, document))
	if err != nil {
		t.Fatal(err)
	}
	list, err := rows(string(text))
	if err != nil {
		t.Fatal(err)
	}
	if len(list) < 80 {
		t.Errorf("%d rows, expected 80 or more", len(list))
	}
	sources := map[string]string{}
	source := func(dir string) string {
		if sources[dir] == "" {
			files, _ := filepath.Glob(filepath.Join(top, dir, "*_test.go"))
			for _, file := range files {
				data, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				sources[dir] += string(data)
			}
		}
		return sources[dir]
	}
	seen := map[string]bool{}
	for _, r := range list {
		name, sub, isSub := strings.Cut(r.test, "/")
		code := source(r.pkg)
		if !strings.Contains(code, "func "+name+"(t *testing.T)") {
			t.Errorf("%q: there is no %s in %s", r.attack, name, r.pkg)
		} else if last := sub[strings.LastIndex(sub, "/")+1:]; isSub && !strings.Contains(code, `"`+last+`"`) {
			t.Errorf("%q: nothing in %s is called %q", r.attack, r.pkg, last)
		}
		if seen[r.attack] {
			t.Errorf("%q is there twice", r.attack)
		}
		seen[r.attack] = true
	}

	declared := regexp.MustCompile(`(?m)^func (Fuzz\w+)\(\w+ \*testing\.F\)`)
	targets := map[string]bool{}
	err = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		data, err := os.ReadFile(path)
		dir, _ := filepath.Rel(top, filepath.Dir(path))
		for _, m := range declared.FindAllSubmatch(data, -1) {
			targets[dir+"."+string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| ([a-z0-9/]+\\.Fuzz\\w+) +\\|").FindAllStringSubmatch(string(text), -1) {
		listed[m[1]] = true
		if !targets[m[1]] {
			t.Errorf("there is no fuzz target %s", m[1])
		}
	}
	for target := range targets {
		if !listed[target] {
			t.Errorf("%s does not list the fuzz target %s", document, target)
		}
	}
}

func TestResults(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	err := os.WriteFile(log, []byte(`=== RUN   TestA
--- PASS: TestA (0.00s)
    --- PASS: TestA/one_thing (0.00s)
    --- SKIP: TestA/other (0.00s)
PASS
ok  	chrysalis/a/b	0.1s
--- FAIL: TestA (1.00s)
FAIL
FAIL	chrysalis/c	0.1s
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{"a/b TestA/other": "PASS"}
	if err := results(log, got); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"a/b TestA": "PASS", "a/b TestA/one_thing": "PASS", "a/b TestA/other": "PASS", "c TestA": "FAIL"} {
		if got[key] != want {
			t.Errorf("%s: %s, expected %s", key, got[key], want)
		}
	}
	list, err := rows("| a | b | test | last result |\n|---|---|---|---|\n| x | y | `a/b TestA/one thing` | |\n\n| z |\n")
	if err != nil || len(list) != 1 || list[0].key() != "a/b TestA/one_thing" {
		t.Errorf("%+v, %v", list, err)
	}
	for _, bad := range []string{"| x | y | TestA | |", "| x | `a TestA` | |"} {
		if _, err := rows("| a | b | test | last result |\n|---|---|---|---|\n" + bad); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
}
