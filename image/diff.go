package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Change is one difference between two locks.
type Change struct {
	Tree   string `json:"tree"`             // the tree's name, or "go"
	What   string `json:"what"`             // "tree", "suite", "package", "toolchain" or "module"
	Name   string `json:"name"`             // of the package, suite or module
	Before string `json:"before,omitempty"` // version or date; empty for what is new
	After  string `json:"after,omitempty"`  // version or date; empty for what is gone
	Note   string `json:"note,omitempty"`   // what else differs
}

// String says the change in a line.
func (c Change) String() string {
	var text string
	switch {
	case c.What == "tree" && c.Before == "":
		return fmt.Sprintf("%s: new, %s", c.Tree, c.After)
	case c.What == "tree":
		return fmt.Sprintf("%s: gone", c.Tree)
	case c.Before == "":
		text = fmt.Sprintf("%s: + %s %s", c.Tree, c.Name, c.After)
	case c.After == "":
		text = fmt.Sprintf("%s: - %s %s", c.Tree, c.Name, c.Before)
	case c.Before == c.After:
		text = fmt.Sprintf("%s: %s %s", c.Tree, c.Name, c.Before)
	default:
		text = fmt.Sprintf("%s: %s %s → %s", c.Tree, c.Name, c.Before, c.After)
	}
	if c.Note != "" {
		text += ": " + c.Note
	}
	return text
}

// Diff says what changed from one lock to another; nothing when they are the
// same.
func Diff(before, after *Lock) []Change {
	changes := diffGo(before.Go, after.Go)
	var names []string
	for _, l := range []*Lock{before, after} {
		for _, t := range l.Trees {
			names = append(names, t.Name)
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		old, _ := before.Tree(name)
		new, _ := after.Tree(name)
		switch {
		case old == nil:
			changes = append(changes, Change{Tree: name, What: "tree", Name: name, After: packageCount(new)})
		case new == nil:
			changes = append(changes, Change{Tree: name, What: "tree", Name: name, Before: packageCount(old)})
		default:
			changes = append(changes, diffTree(old, new)...)
		}
	}
	return changes
}

func packageCount(t *Tree) string { return fmt.Sprintf("%d packages", len(t.Packages)) }

func diffGo(before, after Go) []Change {
	var changes []Change
	if before.Toolchain != after.Toolchain {
		changes = append(changes, Change{Tree: "go", What: "toolchain", Name: "toolchain", Before: before.Toolchain, After: after.Toolchain})
	}
	old := map[string]Module{}
	for _, m := range before.Modules {
		old[m.Path] = m
	}
	for _, m := range after.Modules {
		c := Change{Tree: "go", What: "module", Name: m.Path, Before: old[m.Path].Version, After: m.Version}
		if c.Before == c.After && old[m.Path].Sum != m.Sum {
			c.Note = fmt.Sprintf("same version, other content: %s → %s", old[m.Path].Sum, m.Sum)
		}
		if old[m.Path] != m {
			changes = append(changes, c)
		}
		delete(old, m.Path)
	}
	for _, m := range before.Modules {
		if _, ok := old[m.Path]; ok {
			changes = append(changes, Change{Tree: "go", What: "module", Name: m.Path, Before: m.Version})
		}
	}
	return changes
}

func diffTree(before, after *Tree) []Change {
	var changes []Change
	dates := map[string]string{}
	for _, s := range before.Suites {
		dates[s.Name] = s.Date.UTC().Format(time.RFC3339)
	}
	for _, s := range after.Suites {
		date := s.Date.UTC().Format(time.RFC3339)
		if dates[s.Name] != date {
			changes = append(changes, Change{Tree: after.Name, What: "suite", Name: s.Name, Before: dates[s.Name], After: date})
		}
		delete(dates, s.Name)
	}
	for _, s := range before.Suites {
		if date, ok := dates[s.Name]; ok {
			changes = append(changes, Change{Tree: after.Name, What: "suite", Name: s.Name, Before: date})
		}
	}
	for _, p := range after.Packages {
		q, err := before.Package(p.Name)
		c := Change{Tree: after.Name, What: "package", Name: p.Name, Before: q.Version, After: p.Version}
		switch {
		case err != nil || q.Version != p.Version:
		case q.SHA256 != p.SHA256:
			c.Note = fmt.Sprintf("same version, other content: %s → %s", q.SHA256, p.SHA256)
		case q != p:
			c.Note = fmt.Sprintf("same content, described otherwise: %s %s %d → %s %s %d", q.Arch, q.Path, q.Size, p.Arch, p.Path, p.Size)
		default:
			continue
		}
		changes = append(changes, c)
	}
	for _, p := range before.Packages {
		if _, err := after.Package(p.Name); err != nil {
			changes = append(changes, Change{Tree: after.Name, What: "package", Name: p.Name, Before: p.Version})
		}
	}
	return changes
}

// Refresh returns what a lock becomes when its packages were resolved anew. A
// tree with the same packages stays as it is, its dates too, because every
// artefact depends on them. A suite older than the lock's is an error unless
// allowOlder is set: a mirror that lags, or somebody who replays old indices,
// would take security fixes back.
func Refresh(before, resolved *Lock, allowOlder bool) (*Lock, error) {
	after := &Lock{Version: resolved.Version, Go: resolved.Go}
	var older []error
	for _, tree := range resolved.Trees {
		old, err := before.Tree(tree.Name)
		if err != nil {
			after.Trees = append(after.Trees, tree)
			continue
		}
		for _, s := range tree.Suites {
			for _, was := range old.Suites {
				if was.Name == s.Name && s.Date.Before(was.Date) && !allowOlder {
					older = append(older, fmt.Errorf("tree %s: the mirror's %s is of %s, the lock's is of %s",
						tree.Name, s.Name, s.Date.UTC().Format(time.RFC3339), was.Date.UTC().Format(time.RFC3339)))
				}
			}
		}
		sameSuites := slices.EqualFunc(old.Suites, tree.Suites, func(a, b Suite) bool { return a.Name == b.Name })
		if sameSuites && slices.Equal(old.Packages, tree.Packages) {
			tree = *old
		}
		after.Trees = append(after.Trees, tree)
	}
	if len(older) > 0 {
		return nil, fmt.Errorf("the mirror is behind the lock: %w; use another mirror, or --allow-older if that is what you want", errors.Join(older...))
	}
	return after, nil
}

// LockUpdate says how UpdateLock goes about it.
type LockUpdate struct {
	Mirrors    func() []string // where to resolve packages from
	GoOnly     bool            // keep every package
	AllowOlder bool            // accept suites older than the lock's
	DryRun     bool            // change nothing
	Progress   Progress
}

// UpdateLock brings the lock of the source tree at dir up to date, or makes one
// where there is none, and returns what changed. A lock in which nothing changes
// is not written.
func UpdateLock(ctx context.Context, dir string, u LockUpdate) ([]Change, error) {
	before := &Lock{Version: 1}
	switch data, err := os.ReadFile(filepath.Join(dir, LockName)); {
	case err == nil:
		if before, err = ParseLock(data); err != nil {
			return nil, fmt.Errorf("%s: %w; take it back from the repository, or remove it to make a new one", filepath.Join(dir, LockName), err)
		}
	case !errors.Is(err, fs.ErrNotExist) || u.GoOnly:
		return nil, fmt.Errorf("read the lock: %w", err)
	}
	after := &Lock{Version: 1, Trees: before.Trees}
	var err error
	if u.GoOnly {
		after.Go, err = ResolveGo(ctx, dir)
	} else if after, err = Resolve(ctx, dir, u.Mirrors(), u.Progress); err == nil {
		after, err = Refresh(before, after, u.AllowOlder)
	}
	if err != nil {
		return nil, err
	}
	// What is written can be read.
	if _, err := ParseLock(after.Encode()); err != nil {
		return nil, fmt.Errorf("what was resolved makes no lock: %w", err)
	}
	changes := Diff(before, after)
	if len(changes) == 0 || u.DryRun {
		return changes, nil
	}
	return changes, WriteLock(dir, after)
}
