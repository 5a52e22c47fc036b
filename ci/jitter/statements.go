package main

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"hash/fnv"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"chrysalis/ci/overlay"
)

// statements gives texts in which this tree's own code may pause before each of its
// statements. Lines stay where they are.
func statements(ctx context.Context, texts overlay.Files) error {
	var format string
	for _, kind := range []string{"GoFiles", "CgoFiles", "TestGoFiles", "XTestGoFiles"} {
		format += "{{range ." + kind + "}}{{$.Dir}}/{{.}}\n{{end}}"
	}
	list := exec.CommandContext(ctx, "go", "list", "-f", format, "./...")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("list this tree's files: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		path := strings.TrimSpace(line)
		if path == "" {
			continue // go list ends each package's with a line
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text, err := instrument(path, data)
		if err != nil {
			return err
		}
		if text != "" {
			texts[path] = text
		}
	}
	return nil
}

// instrument returns the text of a Go file with a call before each statement, or
// nothing where there is none.
func instrument(path string, data []byte) (string, error) {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, path, data, parser.SkipObjectResolution)
	if err != nil {
		return "", err
	}
	var at []int
	ast.Inspect(file, func(n ast.Node) bool {
		var body []ast.Stmt
		switch n := n.(type) {
		case *ast.BlockStmt:
			body = n.List
		case *ast.CaseClause:
			body = n.Body
		case *ast.CommClause:
			body = n.Body
		}
		for _, s := range body {
			switch s.(type) {
			case *ast.CaseClause, *ast.CommClause, *ast.EmptyStmt:
			default:
				at = append(at, files.Position(s.Pos()).Offset)
			}
		}
		return true
	})
	if len(at) == 0 {
		return "", nil
	}
	slices.Sort(at)
	sum := fnv.New64a()
	io.WriteString(sum, filepath.Base(path))
	counts := fmt.Sprintf("jitter%x", sum.Sum64())
	var b strings.Builder
	last := files.Position(file.Name.End()).Offset
	b.Write(data[:last])
	b.WriteString(`; import jitter "runtime"`)
	for i, o := range at {
		b.Write(data[last:o])
		fmt.Fprintf(&b, "jitter.Jitter(&%s[%d]);", counts, i)
		last = o
	}
	b.Write(data[last:])
	fmt.Fprintf(&b, "\nvar %s [%d]uint32\n", counts, len(at))
	return b.String(), nil
}
