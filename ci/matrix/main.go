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

// A row is one of the matrix. Its test is a package's folder, a test's name and the
// names of subtests, as they are written in the source.
type row struct {
	line      int // in the document, from 0
	attack    string
	pkg, test string
}

var cell = regexp.MustCompile("^`([a-z0-9/]+) (Test\\w+)((?:/[^`]+)?)`$")

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
			m := cell.FindStringSubmatch(strings.TrimSpace(columns[2]))
			if m == nil {
				return nil, fmt.Errorf("%s:%d: %s is not `FOLDER TestName` or `FOLDER TestName/subtest`", document, i+1, columns[2])
			}
			list = append(list, row{i, strings.TrimSpace(columns[0]), m[1], m[2] + m[3]})
		}
	}
	return list, nil
}

var (
	result  = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (.*) \([0-9.]+s\)$`)
	finally = regexp.MustCompile(`^(?:ok|FAIL|---)?\s+chrysalis/(\S+)\s`)
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

// key is what a log calls a row's test.
func (r row) key() string { return path.Clean(r.pkg) + " " + strings.ReplaceAll(r.test, " ", "_") }

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
		word := map[string]string{"PASS": "passed", "FAIL": "failed", "SKIP": "skipped", "": "not run"}[got[r.key()]]
		count[word]++
		if word == "failed" || word == "not run" {
			bad = append(bad, word+": "+r.key())
		}
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
		return fmt.Errorf("%d rows without a test that passed", len(bad))
	}
	return nil
}
