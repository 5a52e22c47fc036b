package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/agent-capabilities.md anew")

// listed is what 'go list -json' says of a package.
type listed struct {
	ImportPath, Dir  string
	Standard         bool
	Module           *struct{ Path string }
	Imports          []string
	GoFiles          []string
	CgoFiles, SFiles []string
	SysoFiles        []string
}

// agentPackages lists what the published agent is linked from.
func agentPackages(t *testing.T) (list []listed) {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json", "-tags", agentTags, "./agent")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

// TestAgentModules compares the modules that the agent is linked with, and that run
// inside every VM, with those that docs/security.md gives a reason for.
func TestAgentModules(t *testing.T) {
	have := map[string]bool{}
	for _, p := range agentPackages(t) {
		if !p.Standard && p.Module.Path != "chrysalis" {
			have[p.Module.Path] = true
		}
	}
	text, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## What the agent is linked with\n")
	section, _, _ = strings.Cut(section, "\n## ")
	reasons := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.*) \\|$").FindAllStringSubmatch(section, -1) {
		reasons[m[1]] = strings.TrimSpace(m[2])
	}
	for _, module := range slices.Sorted(maps.Keys(have)) {
		if len(reasons[module]) < 20 {
			t.Errorf("the agent is linked with %s, and docs/security.md does not say why", module)
		}
	}
	for _, module := range slices.Sorted(maps.Keys(reasons)) {
		if !have[module] {
			t.Errorf("docs/security.md says why the agent is linked with %s, and it is not", module)
		}
	}
}

var linkname = regexp.MustCompile(`(?m)^//go:linkname `)

// capabilities are what packages of the agent outside of Go's own library can do.
func capabilities(t *testing.T) string {
	t.Helper()
	columns := []struct {
		name string
		has  func(p listed) bool
	}{
		{"unsafe", imports("unsafe")},
		{"C", func(p listed) bool { return len(p.CgoFiles)+len(p.SysoFiles) > 0 }},
		{"assembly", func(p listed) bool { return len(p.SFiles) > 0 }},
		{"linkname", func(p listed) bool {
			for _, name := range p.GoFiles {
				data, err := os.ReadFile(filepath.Join(p.Dir, name))
				if err != nil {
					t.Fatal(err)
				}
				if linkname.Match(data) {
					return true
				}
			}
			return false
		}},
		{"syscall", imports("syscall", "golang.org/x/sys/unix")},
		{"net", imports("net", "net/http", "crypto/tls", "github.com/mdlayher/vsock", "github.com/mdlayher/socket")},
		{"exec", imports("os/exec", "plugin")},
		{"reflect", imports("reflect")},
	}
	var b strings.Builder
	b.WriteString("# What the packages of the agent can do\n\nEvery package outside of Go's own library that the published agent is linked from, and which of these it imports or has: `unsafe`; C or other objects; assembly; `//go:linkname`; system calls (`syscall`, `x/sys/unix`); the network and vsock; starting programs (`os/exec`, `plugin`); `reflect`. The agent is linked without C. `go test ./image -run TestAgentCapabilities -update` writes this file; the test fails where it is not so any more.\n\n| package |")
	for _, c := range columns {
		b.WriteString(" " + c.name + " |")
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	list := agentPackages(t)
	slices.SortFunc(list, func(a, b listed) int { return strings.Compare(a.ImportPath, b.ImportPath) })
	for _, p := range list {
		if p.ImportPath == "runtime/cgo" {
			t.Error("the agent is linked with C")
		}
		if p.Standard {
			continue
		}
		fmt.Fprintf(&b, "| `%s` |", p.ImportPath)
		for _, c := range columns {
			if c.has(p) {
				b.WriteString(" x |")
			} else {
				b.WriteString("  |")
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

func imports(paths ...string) func(listed) bool {
	return func(p listed) bool {
		return slices.ContainsFunc(paths, func(path string) bool { return slices.Contains(p.Imports, path) })
	}
}

// TestAgentCapabilities fails when a package of the agent comes, goes, or can do more
// or less than what was looked at last.
func TestAgentCapabilities(t *testing.T) {
	const path = "../docs/agent-capabilities.md"
	got := capabilities(t)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	was, is := strings.Split(string(want), "\n"), strings.Split(got, "\n")
	for _, line := range is {
		if !slices.Contains(was, line) {
			t.Errorf("new: %s", line)
		}
	}
	for _, line := range was {
		if !slices.Contains(is, line) {
			t.Errorf("gone: %s", line)
		}
	}
	if t.Failed() {
		t.Log("look at what changed and why; then 'go test ./image -run TestAgentCapabilities -update'")
	}
}
