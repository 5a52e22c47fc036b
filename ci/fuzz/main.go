// Command fuzz runs every fuzz target of this module for some seconds and says what
// that came to.
//
//	fuzz [-state FILE] [-only REGEXP] [-jobs N] SECONDS
//
// Each package's test binary is compiled once, with the coverage counters that
// fuzzing wants; its targets then run one by one, each with one worker, and several
// packages' beside each other. With -state what was done is kept in a file, and an
// interrupted run goes on where it was: a target that has had its seconds is left
// out. What is found to be interesting then stays in Go's own cache, and the next run
// begins with it. Without -state each target begins with its seeds alone: what earlier
// runs have found takes some 20 ms of the seconds each, and after enough of them there
// are none left. An input that fails is written to the package's testdata, where
// every later `go test` tries it: commit it together with what mends it. A target that
// fails without such an input is tried once more, and that is said: a machine that is
// out of memory or of time ends a fuzzer, too.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"chrysalis/outfile"
)

// A result is what one target's run came to.
type result struct {
	Seconds    int       `json:"seconds"`    // asked for
	Executions int       `json:"executions"` // inputs tried, those of the corpus left out
	New        int       `json:"new"`        // inputs that reached something new
	Corpus     int       `json:"corpus"`     // inputs known at the end
	At         time.Time `json:"at"`
}

// A unit is one package with targets.
type unit struct {
	path, dir string // import path, folder
	targets   []string
}

func main() {
	state := flag.String("state", "", "keep what was done in this `file`, and leave that out")
	only := flag.String("only", "", "only targets whose PACKAGE.NAME this `regexp` matches")
	jobs := flag.Int("jobs", 2, "this many targets at a time")
	flag.Parse()
	seconds, err := strconv.Atoi(flag.Arg(0))
	if flag.NArg() != 1 || err != nil || seconds < 1 || *jobs < 1 {
		fmt.Fprintln(os.Stderr, "usage: fuzz [-state FILE] [-only REGEXP] [-jobs N] SECONDS")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, seconds, *jobs, *state, *only); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

// progress is what is done, and where that is kept.
type progress struct {
	path string // or ""

	mu     sync.Mutex
	done   map[string]result // by PACKAGE.NAME
	failed []failure
}

// A failure is a target that failed, or a package that was not built.
type failure struct {
	name string // PACKAGE.NAME, or the package's path
	err  error  // with the end of what it printed
}

func (f failure) String() string { return f.name + ": " + f.err.Error() }

func run(ctx context.Context, seconds, jobs int, state, only string) error {
	module, err := output(ctx, "go", "list", "-m")
	if err != nil {
		return err
	}
	cache, err := output(ctx, "go", "env", "GOCACHE")
	if err != nil {
		return err
	}
	wanted, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	units, err := list(ctx)
	if err != nil {
		return err
	}
	p := &progress{path: state, done: map[string]result{}}
	if err := p.load(); err != nil {
		return err
	}
	temporary, err := os.MkdirTemp("", "chrysalis-fuzz-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temporary)
	found := filepath.Join(temporary, "found")
	if state != "" {
		found = filepath.Join(cache, "fuzz")
	}

	name := func(u unit, target string) string {
		return strings.TrimPrefix(u.path, module+"/") + "." + target
	}
	var ours []string // all that are wanted, done or not
	begin, work := time.Now(), make(chan unit)
	var workers sync.WaitGroup
	for range jobs {
		workers.Go(func() {
			for u := range work {
				binary := filepath.Join(temporary, strings.ReplaceAll(u.path, "/", "_"))
				if err := compile(ctx, u, binary); err != nil {
					p.fail(u.path, err)
					continue
				}
				corpora := filepath.Join(found, u.path)
				for _, target := range u.targets {
					if ctx.Err() != nil {
						return
					}
					r, err := fuzz(ctx, u, binary, target, seconds, corpora)
					if errors.Is(err, errNoInput) && ctx.Err() == nil {
						fmt.Fprintf(os.Stderr, "%s: once more: %v\n", name(u, target), err)
						r, err = fuzz(ctx, u, binary, target, seconds, corpora)
					}
					if ctx.Err() != nil {
						return
					}
					if err != nil {
						p.fail(name(u, target), err)
						continue
					}
					p.add(name(u, target), r)
				}
				os.Remove(binary)
			}
		})
	}
	for _, u := range units {
		u.targets = slices.DeleteFunc(u.targets, func(target string) bool {
			n := name(u, target)
			if !wanted.MatchString(n) {
				return true
			}
			ours = append(ours, n)
			r, ok := p.result(n)
			return ok && r.Seconds >= seconds
		})
		if len(u.targets) == 0 {
			continue
		}
		select {
		case work <- u:
		case <-ctx.Done():
		}
	}
	close(work)
	workers.Wait()
	p.print(ours, time.Since(begin))
	if ctx.Err() != nil {
		return errors.New("interrupted; the same command goes on if it has -state")
	}
	if len(p.failed) > 0 {
		// Again, where it is looked for.
		var names []string
		for _, f := range p.failed {
			fmt.Fprintln(os.Stderr, f)
			names = append(names, f.name)
		}
		return fmt.Errorf("failed: %s", strings.Join(names, ", "))
	}
	return nil
}

var declaration = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(\w+ \*testing\.F\)`)

// list finds the packages with targets, the one with most of them first, so that the
// jobs end at about the same time.
func list(ctx context.Context) ([]unit, error) {
	const format = `{{.ImportPath}}	{{.Dir}}	{{join .TestGoFiles "\t"}}	{{join .XTestGoFiles "\t"}}`
	out, err := output(ctx, "go", "list", "-f", format, "./...")
	if err != nil {
		return nil, err
	}
	var units []unit
	for line := range strings.Lines(out) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		u := unit{path: fields[0], dir: fields[1]}
		for _, name := range fields[2:] {
			if name == "" {
				continue
			}
			source, err := os.ReadFile(filepath.Join(u.dir, name))
			if err != nil {
				return nil, err
			}
			for _, m := range declaration.FindAllSubmatch(source, -1) {
				u.targets = append(u.targets, string(m[1]))
			}
		}
		if len(u.targets) > 0 {
			units = append(units, u)
		}
	}
	slices.SortStableFunc(units, func(a, b unit) int { return len(b.targets) - len(a.targets) })
	return units, nil
}

// compile builds a package's test binary, and checks that it has the targets that the
// source shows.
func compile(ctx context.Context, u unit, binary string) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-fuzz=.", "-o", binary, u.path)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	cmd = exec.CommandContext(ctx, binary, "-test.list", "^Fuzz")
	cmd.Dir = u.dir
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("list its targets: %w", err)
	}
	for _, target := range u.targets {
		if !slices.Contains(strings.Fields(string(out)), target) {
			return fmt.Errorf("the test binary has no %s", target)
		}
	}
	return nil
}

// last is the line of figures that a target prints every few seconds.
var last = regexp.MustCompile(`execs: (\d+) .*new interesting: (\d+) \(total: (\d+)\)`)

// errNoInput is a failure that no input is known for.
var errNoInput = errors.New("it failed without an input")

// fuzz runs one target.
func fuzz(ctx context.Context, u unit, binary, target string, seconds int, cache string) (result, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return result{}, err
	}
	// A target may hang: the time for its corpus and its start is bounded, too.
	limited, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(limited, binary, "-test.run=^$", "-test.fuzz=^"+target+"$",
		fmt.Sprintf("-test.fuzztime=%ds", seconds),
		// By default an input that reached something new is made smaller for up to a
		// minute, in which nothing else is tried.
		"-test.fuzzminimizetime=500ms", "-test.fuzzcachedir="+cache, "-test.parallel=1")
	cmd.Dir = u.dir
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // its worker must end, too
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if limited.Err() != nil {
		return result{}, fmt.Errorf("it does not end\n%s", tail(out))
	}
	switch {
	case err == nil:
	case bytes.Contains(out, []byte("Failing input")):
		return result{}, fmt.Errorf("%w\n%s", err, tail(out))
	case bytes.Contains(out, []byte("context deadline exceeded")):
		// The end of the time may be taken for a failure by the fuzzer itself when the
		// last input was slow (golang.org/issue/56238).
	default:
		return result{}, fmt.Errorf("%w: %w\n%s", errNoInput, err, tail(out))
	}
	r := result{Seconds: seconds, At: time.Now().UTC().Truncate(time.Second)}
	if all := last.FindAllSubmatch(out, -1); len(all) > 0 {
		for i, to := range []*int{&r.Executions, &r.New, &r.Corpus} {
			*to, _ = strconv.Atoi(string(all[len(all)-1][i+1]))
		}
	}
	if r.Executions == 0 {
		return result{}, fmt.Errorf("%w: it has tried nothing\n%s", errNoInput, tail(out))
	}
	return r, nil
}

func tail(out []byte) []byte { return out[max(0, len(out)-4000):] }

func (p *progress) result(name string) (result, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.done[name]
	return r, ok
}

// add notes a target that is done, in the state file as well.
func (p *progress) add(name string, r result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done[name] = r
	fmt.Fprintf(os.Stderr, "%s: %d executions in %d s, %d new\n", name, r.Executions, r.Seconds, r.New)
	if p.path == "" {
		return
	}
	data, err := json.MarshalIndent(p.done, "", "  ")
	if err == nil {
		err = outfile.Write(p.path, append(data, '\n'), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz: keep the state:", err)
	}
}

func (p *progress) fail(name string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed = append(p.failed, failure{name, err})
	fmt.Fprintln(os.Stderr, p.failed[len(p.failed)-1])
}

func (p *progress) load() error {
	if p.path == "" {
		return nil
	}
	data, err := os.ReadFile(p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(data, &p.done)
	}
	if err != nil {
		return fmt.Errorf("read what was done: %w", err)
	}
	return nil
}

// print writes the table of all that was done, now or before.
func (p *progress) print(names []string, took time.Duration) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| target\t| seconds\t| executions\t| new\t| corpus\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|")
	slices.Sort(names)
	executions, seconds, done := 0, 0, 0
	for _, name := range names {
		r, ok := p.done[name]
		if !ok {
			continue
		}
		fmt.Fprintf(w, "| %s\t| %d\t| %d\t| %d\t| %d\t|\n", name, r.Seconds, r.Executions, r.New, r.Corpus)
		executions, seconds, done = executions+r.Executions, seconds+r.Seconds, done+1
	}
	w.Flush()
	fmt.Printf("%d of %d targets, %d executions in %d s of fuzzing; this run took %d s\n",
		done, len(names), executions, seconds, int(took.Seconds()))
}

func output(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
