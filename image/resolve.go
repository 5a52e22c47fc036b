package image

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// keyring verifies the mirror's InRelease files. Debian installs it with apt.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// HostMirror returns the Debian mirror that the host's own apt uses.
func HostMirror(ctx context.Context) (string, error) {
	list, err := hostMirrors(ctx)
	if err != nil {
		return "", err
	}
	for _, m := range list {
		if m.origin == "Debian" && m.label == "Debian" {
			return m.address, nil
		}
	}
	return "", fmt.Errorf("the host's apt configuration names no Debian mirror, or 'apt-get update' never ran; give a mirror with --mirror")
}

// HostMirrors returns every place of Debian's that the host's own apt uses, those
// for security updates and backports with it: a package that one has dropped is
// often still in another.
func HostMirrors(ctx context.Context) ([]string, error) {
	list, err := hostMirrors(ctx)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range list {
		if !slices.Contains(out, m.address) {
			out = append(out, m.address)
		}
	}
	return out, nil
}

// hostMirror is where apt has an index from, and what that calls itself.
type hostMirror struct{ origin, label, address string }

func hostMirrors(ctx context.Context) (list []hostMirror, err error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets",
		"--format", "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return nil, fmt.Errorf("ask apt for the host's mirror: %w; give one with --mirror", err)
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSpace(line), "\t")
		if len(fields) == 3 && strings.HasPrefix(fields[0], "Debian") {
			list = append(list, hostMirror{fields[0], fields[1], strings.TrimSuffix(fields[2], "/")})
		}
	}
	return list, nil
}

// Resolve makes a lock of what the first mirror that works serves now, and of
// the Go toolchain and modules that the source tree is built with. Only indices
// whose signature Debian's archive keys verify are used; an expired one is
// accepted, because its date becomes the tree's snapshot time.
func Resolve(ctx context.Context, sourceDir string, mirrorNames []string, progress Progress) (*Lock, error) {
	agent, err := ResolveGo(ctx, sourceDir)
	if err != nil {
		return nil, err
	}
	var tried []error
	for _, name := range mirrorNames {
		lock, err := resolveFrom(ctx, name, progress)
		if err == nil {
			lock.Go = agent
			return lock, nil
		}
		tried = append(tried, fmt.Errorf("%s: %w", name, err))
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if len(tried) == 0 {
		return nil, errors.New("there is no mirror to resolve packages from; give one with --mirror")
	}
	return nil, errors.Join(tried...)
}

func resolveFrom(ctx context.Context, name string, progress Progress) (*Lock, error) {
	address, err := aptAddress(name)
	if err != nil {
		return nil, err
	}
	lock := &Lock{Version: 1}
	for _, src := range sources {
		progress("resolve "+src.tree, 0, 0)
		tree, err := src.resolve(ctx, address)
		if err != nil {
			return nil, fmt.Errorf("resolve tree %s: %w", src.tree, err)
		}
		lock.Trees = append(lock.Trees, *tree)
	}
	return lock, nil
}

// aptAddress writes a mirror as a line of apt's sources takes it.
func aptAddress(name string) (string, error) {
	m, err := openMirror(name)
	if err != nil {
		return "", err
	}
	switch m := m.(type) {
	case *bundle:
		m.file.Close()
		return "", errors.New("a bundle has packages and no signed indices; a lock is made from a mirror")
	case dirMirror:
		if name, err = filepath.Abs(name); err != nil {
			return "", err
		}
		name = "file://" + name
	}
	if strings.ContainsAny(name, " \t\r\n[]#\"") {
		return "", fmt.Errorf("apt does not take %q for a mirror", name)
	}
	return name, nil
}

// resolve runs the host's apt on a state of its own, so neither the host's
// packages nor its configuration have a say.
func (src source) resolve(ctx context.Context, mirror string) (*Tree, error) {
	dir, err := os.MkdirTemp("", "chrysalis-lock-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for _, sub := range []string{"state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d", "etc/sources.d"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	var list strings.Builder
	for _, suite := range src.suites {
		fmt.Fprintf(&list, "deb [signed-by=%s] %s %s main\n", keyring, mirror, suite)
	}
	conf := fmt.Sprintf(`Dir %q;
Dir::State "state"; Dir::State::status "%[2]s/state/status"; Dir::Cache "cache";
Dir::Etc "etc"; Dir::Etc::sourcelist "sources.list"; Dir::Etc::sourceparts "sources.d";
Dir::Etc::parts "apt.conf.d"; Dir::Etc::preferencesparts "preferences.d";
APT::Architecture "amd64"; APT::Architectures { "amd64"; };
APT::Install-Recommends "false"; APT::Sandbox::User ""; Acquire::Languages "none";
Acquire::Check-Valid-Until "false"; Acquire::AllowInsecureRepositories "false";
`, dir+"/", dir)
	for name, text := range map[string]string{"etc/sources.list": list.String(), "apt.conf": conf, "state/status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	apt := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(dir, "apt.conf"), "LC_ALL=C.UTF-8")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %s", strings.Join(args[:2], " "), err, strings.TrimSpace(stderr.String()))
		}
		return out, nil
	}
	if _, err := apt("apt-get", "update", "-qq", "--error-on=any"); err != nil {
		return nil, err
	}

	tree := &Tree{Name: src.tree}
	for _, suite := range src.suites {
		date, err := releaseDate(filepath.Join(dir, "state/lists"), suite)
		if err != nil {
			return nil, err
		}
		tree.Suites = append(tree.Suites, Suite{Name: suite, Date: date})
	}

	wanted := src.packages
	if src.closure {
		out, err := apt(append([]string{"apt-get", "install", "--simulate", "-qq"}, src.packages...)...)
		if err != nil {
			return nil, err
		}
		wanted = nil
		for line := range strings.Lines(string(out)) {
			// Inst NAME (VERSION ORIGIN [ARCH])
			fields := strings.Fields(line)
			if len(fields) >= 3 && fields[0] == "Inst" {
				wanted = append(wanted, fields[1]+"="+strings.TrimPrefix(fields[2], "("))
			}
		}
	}
	out, err := apt(append([]string{"apt-cache", "show", "--no-all-versions"}, wanted...)...)
	if err != nil {
		return nil, err
	}
	for stanza := range strings.SplitSeq(string(out), "\n\n") {
		f := fields(stanza)
		if f["Package"] == "" {
			continue
		}
		size, err := strconv.ParseInt(f["Size"], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("package %s: size %q: %w", f["Package"], f["Size"], err)
		}
		tree.Packages = append(tree.Packages, Package{
			Name: f["Package"], Version: f["Version"], Arch: f["Architecture"],
			Path: f["Filename"], Size: size, SHA256: f["SHA256"],
		})
	}
	if len(tree.Packages) < len(wanted) {
		return nil, fmt.Errorf("the mirror described %d of %d packages", len(tree.Packages), len(wanted))
	}
	slices.SortFunc(tree.Packages, func(a, b Package) int { return cmp.Compare(a.Name, b.Name) })
	return tree, nil
}

// fields reads the single-line fields of a control stanza.
func fields(stanza string) map[string]string {
	f := map[string]string{}
	for line := range strings.Lines(stanza) {
		if name, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			f[name] = strings.TrimSpace(value)
		}
	}
	return f
}

// releaseDate reads the Date of a suite's InRelease, which apt has verified.
func releaseDate(lists, suite string) (time.Time, error) {
	matches, err := filepath.Glob(filepath.Join(lists, "*_dists_"+suite+"_InRelease"))
	if err != nil || len(matches) != 1 {
		return time.Time{}, fmt.Errorf("suite %s: apt kept %d InRelease files, expected one", suite, len(matches))
	}
	file, err := os.Open(matches[0])
	if err != nil {
		return time.Time{}, err
	}
	defer file.Close()
	for s := bufio.NewScanner(file); s.Scan(); {
		if value, ok := strings.CutPrefix(s.Text(), "Date: "); ok {
			return time.Parse(time.RFC1123, value)
		}
	}
	return time.Time{}, fmt.Errorf("suite %s: its InRelease has no Date", suite)
}
