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
		for _, test := range r.tests {
			pkg, rest, _ := strings.Cut(test, " ")
			name, sub, isSub := strings.Cut(rest, "/")
			code := source(pkg)
			last := sub[strings.LastIndex(sub, "/")+1:]
			named := regexp.MustCompile(`"` + strings.ReplaceAll(regexp.QuoteMeta(last), "_", "[ _]") + `"`)
			switch {
			case !strings.Contains(code, "func "+name+"(t *testing.T)"):
				t.Errorf("%q: there is no %s in %s", r.attack, name, pkg)
			case pkg == "ci/vmtest": // many of its subtests are named by what runs in the VM
			case isSub && !named.MatchString(code):
				t.Errorf("%q: nothing in %s is called %q", r.attack, pkg, last)
			}
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
	for _, m := range regexp.MustCompile(`(?m)^\| ([a-z0-9/]+\.Fuzz\w+) +\|`).FindAllStringSubmatch(string(text), -1) {
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
	const head = "| a | b | test | last result |\n|---|---|---|---|\n"
	list, err := rows(head + "| x | y | `a/b.TestA/one_thing`, …/other; c.TestA | |\n\n| z |\n")
	if err != nil || len(list) != 1 || strings.Join(list[0].tests, ";") != "a/b TestA/one_thing;a/b TestA/other;c TestA" {
		t.Fatalf("%+v, %v", list, err)
	}
	if word, bad := list[0].result(got); word != "failed" || len(bad) != 1 {
		t.Errorf("%s, %v", word, bad)
	}
	for _, bad := range []string{"| x | y | TestA | |", "| x | a.TestA | |", "| x | y | | |"} {
		if _, err := rows(head + bad); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
}
