package provenance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// A Source is the state of a source tree.
type Source struct {
	Commit string // of its HEAD, in hexadecimal
	// Changed are files that are not as in the commit, at most maxChanged of them;
	// files that git ignores count, because a build reads them all the same.
	Changed []string
}

// Dirty says whether a build from the tree is not one from the commit.
func (s Source) Dirty() bool { return len(s.Changed) > 0 }

// maxChanged is how many changed files are worth telling.
const maxChanged = 5

// commitRE is a commit's name, in a SHA-1 or a SHA-256 repository.
var commitRE = regexp.MustCompile(`^([0-9a-f]{40}|[0-9a-f]{64})$`)

// ignorable are the folders of results; no build reads them.
var ignorable = map[string]bool{"out/": true, "bin/": true}

// ReadSource returns the state of the source tree at dir, which must be the top
// of a git checkout. Every file is read: the checkout's own index is not asked,
// because flags in it (assume-unchanged, skip-worktree) hide changes.
func ReadSource(ctx context.Context, dir string) (Source, error) {
	top, err := git(ctx, dir, "", "rev-parse", "--show-toplevel")
	if err != nil {
		return Source{}, fmt.Errorf("ask git about the source tree: %w", err)
	}
	same, err := sameFolder(strings.TrimSuffix(string(top), "\n"), dir)
	if err != nil {
		return Source{}, fmt.Errorf("look at the source tree: %w", err)
	}
	if !same {
		return Source{}, fmt.Errorf("%s is not the top of a git checkout, but in the one at %s", dir, bytes.TrimSpace(top))
	}
	head, err := git(ctx, dir, "", "rev-parse", "--verify", "HEAD^{commit}")
	if err != nil {
		return Source{}, fmt.Errorf("ask git for the commit: %w", err)
	}
	s := Source{Commit: strings.TrimSpace(string(head))}
	if !commitRE.MatchString(s.Commit) {
		return Source{}, fmt.Errorf("git says that the commit is %q, which is not a commit's name", s.Commit)
	}
	tmp, err := os.MkdirTemp("", "chrysalis-index-")
	if err != nil {
		return Source{}, err
	}
	defer os.RemoveAll(tmp)
	index := filepath.Join(tmp, "index")
	if _, err := git(ctx, dir, index, "read-tree", s.Commit); err != nil {
		return Source{}, fmt.Errorf("read the commit: %w", err)
	}
	status, err := git(ctx, dir, index, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all", "--ignored=matching")
	if err != nil {
		return Source{}, fmt.Errorf("compare the source tree with its commit: %w", err)
	}
	for line := range strings.SplitSeq(strings.TrimSuffix(string(status), "\x00"), "\x00") {
		if len(line) < 4 || line[:2] == "!!" && ignorable[line[3:]] {
			continue
		}
		if len(s.Changed) < maxChanged {
			s.Changed = append(s.Changed, line[3:])
		}
	}
	return s, nil
}

func sameFolder(a, b string) (bool, error) {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	if err := errors.Join(errX, errY); err != nil {
		return false, err
	}
	return os.SameFile(x, y), nil
}

// git runs git on a source tree. No environment or setting of the user's that
// changes what counts as the tree or as a change has a say.
func git(ctx context.Context, dir, index string, args ...string) ([]byte, error) {
	args = append([]string{"-C", dir,
		"-c", "core.fsmonitor=false", "-c", "core.untrackedCache=false", "-c", "core.sparseCheckout=false",
		"-c", "core.autocrlf=false", "-c", "core.fileMode=true", "-c", "core.excludesFile=/dev/null",
		"-c", "core.attributesFile=/dev/null", "-c", "status.showUntrackedFiles=all",
	}, args...)
	cmd := exec.CommandContext(ctx, "git", args...)
	for _, entry := range os.Environ() {
		if !strings.HasPrefix(entry, "GIT_") {
			cmd.Env = append(cmd.Env, entry)
		}
	}
	cmd.Env = append(cmd.Env, "GIT_NO_REPLACE_OBJECTS=1", "GIT_OPTIONAL_LOCKS=0", "LC_ALL=C.UTF-8")
	if index != "" {
		cmd.Env = append(cmd.Env, "GIT_INDEX_FILE="+index)
	}
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && len(exit.Stderr) > 0 {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}
