package image

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"chrysalis/image/toolsroot"
)

// Builder makes artefacts from a source tree. Nothing but the source tree, the
// packages that its lock names and the Go toolchain has a say in them.
type Builder struct {
	Source   string   // top of the source tree
	Mirrors  []string // tried in turn: addresses, directories laid out like a mirror, or bundles
	Out      string   // folder for the artefacts
	Progress Progress
	lock     *Lock
	tools    *toolsroot.Root
}

// prepare reads the lock and opens or makes the tools root.
func (b *Builder) prepare(ctx context.Context) (err error) {
	if b.tools != nil {
		return nil
	}
	if b.Source, err = filepath.Abs(b.Source); err != nil {
		return err
	}
	if b.Out, err = filepath.Abs(b.Out); err != nil {
		return err
	}
	if b.lock, err = ReadLock(b.Source); err != nil {
		return err
	}
	// All of it first, so that nothing is built in vain.
	for i := range b.lock.Trees {
		if err := checkRecipe(&b.lock.Trees[i]); err != nil {
			return err
		}
	}
	if err := checkSandbox(ctx); err != nil {
		return err
	}
	if b.tools, err = MakeTools(ctx, b.lock, b.Mirrors, b.Progress); err != nil {
		return err
	}
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return fmt.Errorf("make the output folder: %w", err)
	}
	return nil
}

//go:embed gpu-modules.list
var gpuModules string

// GPUModules names the kernel's own modules that the images for GPUs load for a
// driver, without what those depend on.
func GPUModules() []string {
	var names []string
	for line := range strings.Lines(gpuModules) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			names = append(names, line)
		}
	}
	return names
}

// imageFiles are what mkosi reads for the guest image, below the source tree.
var imageFiles = []string{
	"mkosi.conf", "mkosi.conf.d", "mkosi.profiles", "mkosi.skeleton",
	"mkosi.postinst", "mkosi.finalize", "image/modules.list", "image/gpu-modules.list",
}

// profiles says how images other than the first are built. What is not here has the
// mkosi profile of its name and an agent that talks and has a build tag of its name.
var profiles = map[string]struct {
	mkosi []string // in the order in which they change each other
	tags  string   // of the agent
}{
	// Published, too: an agent like the first one's, a command line of its own.
	"gpu": {[]string{"gpu"}, ""},
	// The same with a stand-in for a GPU.
	"gputest": {[]string{"gpu", "debug", "gputest"}, "debug,gputest"},
}

// UKI builds the guest image. Profile is "" for the first image that is published,
// or the name of one under mkosi.profiles; each has a name and so measurements of
// its own. It returns the artefact's path.
func (b *Builder) UKI(ctx context.Context, profile string) (string, error) {
	if err := b.prepare(ctx); err != nil {
		return "", err
	}
	name, args, tags := "chrysalis", []string{}, ""
	if profile != "" {
		if _, err := os.Stat(filepath.Join(b.Source, "mkosi.profiles", profile)); err != nil {
			return "", fmt.Errorf("there is no profile %q under mkosi.profiles", profile)
		}
		p, ok := profiles[profile]
		if !ok {
			p.mkosi, p.tags = []string{profile}, "debug,"+profile
		}
		name, tags = "chrysalis-"+profile, p.tags
		for _, each := range p.mkosi {
			args = append(args, "--profile="+each)
		}
	}
	stage, remove, err := b.stage(ctx, "image", b.Source, imageFiles)
	if err != nil {
		return "", err
	}
	defer remove()
	if err := b.agent(ctx, filepath.Join(stage, "agent", "init"), name, tags); err != nil {
		return "", err
	}
	b.Progress("build "+name+".efi", 0, 0)
	return b.mkosi(ctx, "image", stage, name+".efi", args)
}

// Engine builds the disk of the engine whose mkosi configuration is in
// image/engines/NAME.
func (b *Builder) Engine(ctx context.Context, name string) (string, error) {
	if err := b.prepare(ctx); err != nil {
		return "", err
	}
	dir := filepath.Join(b.Source, "image", "engines", name)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("there is no engine %q under image/engines", name)
	}
	var files []string
	for _, e := range entries {
		files = append(files, e.Name())
	}
	tree := "engine/" + name
	stage, remove, err := b.stage(ctx, tree, dir, files)
	if err != nil {
		return "", err
	}
	defer remove()
	b.Progress("build "+name+".disk", 0, 0)
	return b.mkosi(ctx, tree, stage, name+".disk", nil)
}

// stage lays out a folder that holds all that one mkosi run may read: copies of
// files below a folder and, under packages/, a locked tree's packages. The caller
// removes it.
func (b *Builder) stage(ctx context.Context, treeName, from string, files []string) (_ string, _ func(), err error) {
	tree, err := b.lock.Tree(treeName)
	if err != nil {
		return "", nil, err
	}
	packages, err := Fetch(ctx, tree, b.Mirrors, b.Progress)
	if err != nil {
		return "", nil, err
	}
	cache, err := toolsroot.CacheDir()
	if err != nil {
		return "", nil, err
	}
	stage, remove, err := stageDir(cache, "build-")
	if err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			remove()
		}
	}()
	for _, name := range files {
		if err := copyTree(filepath.Join(from, name), filepath.Join(stage, name)); err != nil {
			return "", nil, fmt.Errorf("copy %s: %w", name, err)
		}
	}
	for i, p := range tree.Packages {
		if err := copyTree(packages[i], filepath.Join(stage, "packages", p.Name+".deb")); err != nil {
			return "", nil, fmt.Errorf("copy package %s: %w", p.Name, err)
		}
	}
	return stage, remove, nil
}

// mkosi runs mkosi on a staged folder, without a network, and moves the one
// artefact that it makes to the output folder, where it appears when it is whole.
func (b *Builder) mkosi(ctx context.Context, treeName, stage, artefact string, args []string) (string, error) {
	tree, err := b.lock.Tree(treeName)
	if err != nil {
		return "", err
	}
	cmd := b.tools.Cmd(ctx, mkosiCommand(stage, tree.Epoch(), args))
	if err := os.MkdirAll(filepath.Join(stage, "out"), 0o755); err != nil {
		return "", err
	}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("mkosi: %w\n%s", err, lastLines(output.String(), 30))
	}
	built, err := filepath.Glob(filepath.Join(stage, "out", "*"))
	if err != nil {
		return "", err
	}
	var made string
	for _, path := range built {
		if ext := filepath.Ext(path); ext == ".efi" || ext == ".raw" {
			made = path
		}
	}
	if made == "" {
		return "", fmt.Errorf("mkosi made no artefact:\n%s", lastLines(output.String(), 30))
	}
	path := filepath.Join(b.Out, artefact)
	if err := replaceFile(made, path); err != nil {
		return "", fmt.Errorf("put %s in place: %w", artefact, err)
	}
	return path, nil
}

// mkosiCommand is one run of mkosi on a staged folder. It has no network, and sees
// of the host that folder only.
func mkosiCommand(stage string, epoch time.Time, args []string) toolsroot.Command {
	const inside = "/build"
	return toolsroot.Command{
		Args: append(append([]string{"mkosi"}, args...),
			"--force",
			fmt.Sprintf("--source-date-epoch=%d", epoch.Unix()),
			"--output-directory="+inside+"/out",
			"--workspace-directory=/var/tmp", "--package-cache-dir=/var/tmp/packages",
			"build"),
		Dir:     inside,
		Bind:    []toolsroot.Bind{{Host: stage, Inside: inside, Writable: true}},
		Offline: true, Privileged: true,
	}
}

// agent fetches the agent's Go modules and compiles it.
func (b *Builder) agent(ctx context.Context, out, name, tags string) error {
	zips, err := fetchModules(ctx, b.Source, b.lock.Go, b.Mirrors, b.Progress)
	if err != nil {
		return err
	}
	b.Progress("build the agent", 0, 0)
	return BuildAgent(ctx, b.Source, b.lock.Go, zips, out, name, tags)
}

// BuildAgent compiles PID 1 of the named image, static and without a trace of
// where it was built, from the source tree and the zips of the lock's modules, in
// the lock's order. It has no network. Another toolchain than the lock's, or
// another set of modules, is an error.
func BuildAgent(ctx context.Context, source string, lock Go, zips []string, out, name, tags string) error {
	if err := checkToolchain(ctx, source, lock); err != nil {
		return err
	}
	if err := checkSums(source, lock); err != nil {
		return err
	}
	// A module cache of its own: the go command does not check again what it has
	// unpacked into the user's.
	dir, err := os.MkdirTemp("", "chrysalis-agent-")
	if err != nil {
		return err
	}
	defer removeTree(dir)
	proxy := filepath.Join(dir, "proxy")
	if err := stageModules(proxy, lock, zips); err != nil {
		return fmt.Errorf("lay out the agent's modules: %w", err)
	}
	env := goEnv("GOMODCACHE="+filepath.Join(dir, "cache"), "GOPROXY="+fileURL(proxy), "GOSUMDB=off",
		// An index of a module cache that is used once.
		"GODEBUG=goindex=0")
	listed, err := agentModules(offline(ctx, append([]string{"go"}, listAgent(agentTags+","+tags)...)...), source, env)
	if err != nil {
		return fmt.Errorf("%w\nif go.mod has changed since the lock was made, %s", err, refreshGo)
	}
	if err := checkModules(listed, lock, tags == ""); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	cmd := offline(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags="+agentTags+","+tags,
		"-ldflags=-s -w -buildid= -X main.imageName="+name, "-o", out, "./agent")
	cmd.Dir, cmd.Env = source, env
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the agent: %w\n%s", err, lastLines(string(output), 20))
	}
	return nil
}

// fileURL is a folder's address in GOPROXY, in which commas and bars separate
// proxies.
func fileURL(path string) string {
	return strings.ReplaceAll((&url.URL{Scheme: "file", Path: path}).String(), ",", "%2C")
}

// copyTree copies a file or a folder with modes that do not depend on who
// checked it out: 0755 for folders and programs, 0644 for the rest.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o755)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		return copyFile(path, target, mode)
	})
}
