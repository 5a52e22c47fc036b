// Command matrix compares the matrix in docs/security.md with what tests did.
//
//	matrix [-write] LOG...
//
// Each LOG is what `go test -v` printed. Of a test that ran more than once, passing
// counts over being skipped, and failing over both. With -write the column "last
// result" is filled in; without, it is only printed how many rows passed. It exits
// with 1 if a row's test failed, or did not run at all.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

const document = "docs/security.md"

// A row is one of the matrix, with its tests as a log calls them: "FOLDER NAME".
type row struct {
	line   int // in the document, from 0
	attack string
	tests  []string
}

// A test is written FOLDER.TestName/subtest, as `go test -v` writes it. Of several,
// with ", " or "; " between them, those that begin with "…" are subtests beside the
// one before.
var written = regexp.MustCompile(`^([a-z0-9/]+)\.(Test\w+(?:/\S+)?)$`)

func tests(column string) (list []string, err error) {
	last := ""
	for _, word := range strings.FieldsFunc(strings.NewReplacer("`", "", "; ", "\n", ", ", "\n").Replace(column), func(r rune) bool { return r == '\n' }) {
		word = strings.TrimSpace(word)
		if sub, ok := strings.CutPrefix(word, "…/"); ok && strings.Contains(last, "/") {
			test := last[:strings.LastIndex(last, " ")] + " " + path.Dir(last[strings.LastIndex(last, " ")+1:]) + "/" + sub
			list = append(list, test)
			continue
		}
		m := written.FindStringSubmatch(word)
		if m == nil {
			return nil, fmt.Errorf("%q is not FOLDER.TestName or FOLDER.TestName/subtest", word)
		}
		last = m[1] + " " + m[2]
		list = append(list, last)
	}
	if len(list) == 0 {
		return nil, errors.New("it names no test")
	}
	return list, nil
}

// rows reads the tables that have a column "last result".
func rows(text string) (list []row, err error) {
	in := false
	for i, line := range strings.Split(text, "\n") {
		if !strings.HasPrefix(line, "|") {
			in = false
			continue
		}
		columns := strings.Split(strings.Trim(line, "|"), "|")
		switch {
		case strings.Contains(line, "| last result |"):
			in = true
		case in && !strings.HasPrefix(line, "|---"):
			if len(columns) != 4 {
				return nil, fmt.Errorf("%s:%d: %d columns, expected 4", document, i+1, len(columns))
			}
			named, err := tests(columns[2])
			if err != nil {
				return nil, fmt.Errorf("%s:%d: %w", document, i+1, err)
			}
			list = append(list, row{i, strings.TrimSpace(columns[0]), named})
		}
	}
	return list, nil
}

var (
	result  = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (.*) \([0-9.]+s\)$`)
	finally = regexp.MustCompile(`^(?:ok  |FAIL)\tchrysalis/(\S+)\t`)
)

// rank of a result; the highest counts.
var rank = map[string]int{"SKIP": 1, "PASS": 2, "FAIL": 3}

// results reads a log, and returns what each test did, by "FOLDER NAME". A package's
// lines are followed by one with its path.
func results(log string, into map[string]string) error {
	f, err := os.Open(log)
	if err != nil {
		return err
	}
	defer f.Close()
	var names, what []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		if m := result.FindStringSubmatch(lines.Text()); m != nil {
			names, what = append(names, m[2]), append(what, m[1])
		} else if m := finally.FindStringSubmatch(lines.Text()); m != nil {
			for i, name := range names {
				key := m[1] + " " + name
				if rank[what[i]] > rank[into[key]] {
					into[key] = what[i]
				}
			}
			names, what = nil, nil
		}
	}
	return lines.Err()
}

// result is the worst of what a row's tests did.
func (r row) result(got map[string]string) (word string, bad []string) {
	word = "passed"
	for _, test := range r.tests {
		switch got[test] {
		case "FAIL":
			word, bad = "failed", append(bad, "failed: "+test)
		case "":
			if word != "failed" {
				word = "not run"
			}
			bad = append(bad, "not run: "+test)
		case "SKIP":
			if word == "passed" {
				word = "skipped"
			}
		}
	}
	return word, bad
}

func main() {
	write := flag.Bool("write", false, "fill in the column")
	flag.Parse()
	if err := run(*write, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

func run(write bool, logs []string) error {
	text, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	list, err := rows(string(text))
	if err != nil {
		return err
	}
	got := map[string]string{}
	for _, log := range logs {
		if err := results(log, got); err != nil {
			return err
		}
	}
	lines := strings.Split(string(text), "\n")
	count := map[string]int{}
	var bad []string
	for _, r := range list {
		word, problems := r.result(got)
		count[word]++
		bad = append(bad, problems...)
		if word != "not run" {
			columns := strings.Split(strings.Trim(lines[r.line], "|"), "|")
			columns[3] = fmt.Sprintf(" %s %s ", word, time.Now().UTC().Format(time.DateOnly))
			lines[r.line] = "|" + strings.Join(columns, "|") + "|"
		}
	}
	fmt.Printf("%d rows: %d passed, %d failed, %d skipped, %d not run\n", len(list), count["passed"], count["failed"], count["skipped"], count["not run"])
	slices.Sort(bad)
	for _, b := range bad {
		fmt.Println(b)
	}
	if write {
		if err := os.WriteFile(document, []byte(strings.Join(lines, "\n")), 0o644); err != nil {
			return err
		}
	}
	if len(bad) > 0 {
		return fmt.Errorf("%d of their tests did not pass", len(bad))
	}
	return nil
}
