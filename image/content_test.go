package image_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/inspect"
	"chrysalis/image/profile"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// The tests in this file look into the artefacts that 'make image' has put into
// out/, and fail on anything that nobody has put on a list here.

// artefact returns the path of a built artefact, and the source tree's top.
func artefact(t *testing.T, name string) (path, source string) {
	t.Helper()
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(source, "out", name)
	if _, err := os.Stat(path); err != nil {
		imagetest.Missing(t, fmt.Errorf("%w; make it with 'make image'", err))
	}
	return path, source
}

// epoch is the only time that a build of a tree knows.
func epoch(t *testing.T, source, tree string) int64 {
	t.Helper()
	lock, err := image.ReadLock(source)
	if err != nil {
		t.Fatal(err)
	}
	found, err := lock.Tree(tree)
	if err != nil {
		t.Fatal(err)
	}
	return found.Epoch().Unix()
}

// ukiSections are those of a UKI, in order: the stub's own, then ukify's.
// Nothing of the rest of the UKI specification is there: no microcode, device
// tree, splash, signature of PCRs, or profile.
var ukiSections = []string{
	".text", ".rodata", ".data", ".sbat", ".sdmagic", ".reloc",
	".osrel", ".cmdline", ".uname", ".linux", ".initrd",
}

// maxUKI is what the design allows, in bytes.
const maxUKI = 25_000_000

func TestUKI(t *testing.T) {
	file, source := artefact(t, "chrysalis.efi")
	if info, err := os.Stat(file); err != nil || info.Size() > maxUKI {
		t.Errorf("it takes %d bytes, at most %d are allowed (%v)", info.Size(), maxUKI, err)
	}
	uki, err := inspect.OpenUKI(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	defer uki.Close()
	var names []string
	for _, s := range uki.Sections {
		names = append(names, s.Name)
	}
	if !slices.Equal(names, ukiSections) {
		t.Errorf("sections %v, expected %v", names, ukiSections)
	}
	if !strings.HasPrefix(uki.Stub, "#### LoaderInfo: systemd-stub 257.") {
		t.Errorf("the stub is %q, expected systemd-stub 257", uki.Stub)
	}
	if uki.Kernel != image.Kernel {
		t.Errorf("the kernel is %q, expected %q", uki.Kernel, image.Kernel)
	}

	arguments := strings.Fields(uki.CommandLine)
	for _, want := range []string{"console=ttyS0", "panic=-1", "module.sig_enforce=1", "ia32_emulation=0", "quiet"} {
		if !slices.Contains(arguments, want) {
			t.Errorf("the command line %q has no %s", uki.CommandLine, want)
		}
	}

	entries := map[string]entry{}
	for _, e := range uki.Initrd.Entries {
		found := entry{Entry: e}
		if e.Mode.Type() == "file" {
			if found.data, err = e.Content(64 << 20); err != nil {
				t.Fatal(err)
			}
		}
		entries[e.Path] = found
	}
	checkInitrd(t, entries, source)
	var info map[string]string
	if err := json.Unmarshal(entries["image.json"].data, &info); err != nil {
		t.Fatal(err)
	}
	if want := map[string]string{"name": "chrysalis", "command_line": uki.CommandLine}; !maps.Equal(info, want) {
		t.Errorf("image.json says %q, expected %q", info, want)
	}
	release, err := uki.Text(".osrel")
	if err != nil {
		t.Fatal(err)
	}
	if string(entries["usr/lib/os-release"].data) != release {
		t.Error("os-release is not the section's")
	}
}

// entry is a file of the initrd with its content.
type entry struct {
	inspect.Entry
	data []byte
}

var modulePath = regexp.MustCompile(`^modules/([0-9]{2})-([a-z0-9_-]+)\.ko$`)

// checkInitrd fails on any entry that is not on the list, and on any that is and
// is not there or is not as it should be.
func checkInitrd(t *testing.T, entries map[string]entry, source string) {
	t.Helper()
	const (
		folder  = 0o040755
		program = 0o100755
		file    = 0o100444
	)
	want := map[string]inspect.Mode{
		"init": program, "image.json": file, "usr/lib/os-release": file,
		"usr": folder, "usr/lib": folder, "modules": folder,
		// Mount points of the agent's table.
		"dev": folder, "proc": folder, "run": folder, "sys": folder,
	}
	time, inodes := epoch(t, source, "image"), map[uint64]bool{}
	for name, e := range entries {
		mode, ok := want[name]
		if modulePath.MatchString(name) {
			mode, ok = file, true // which ones is below
		}
		if !ok {
			t.Errorf("the initrd holds %s, which is on no list", name)
		}
		if e.Mode != mode {
			t.Errorf("%s: mode %v, expected %v", name, e.Mode, mode)
		}
		if e.UID != 0 || e.GID != 0 || e.Device != 0 || inodes[e.Inode] {
			t.Errorf("%s: owner %d:%d, device %#x, or a hard link", name, e.UID, e.GID, e.Device)
		}
		inodes[e.Inode] = true
		if e.Time.Unix() != time {
			t.Errorf("%s: time %v, the lock's is %d", name, e.Time, time)
		}
	}
	for name := range want {
		if _, ok := entries[name]; !ok {
			t.Errorf("the initrd has no %s", name)
		}
	}

	agent, err := elf.NewFile(bytes.NewReader(entries["init"].data))
	if err != nil {
		t.Fatalf("init: %v", err)
	}
	for _, p := range agent.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("init is not static: it has a segment of type %v", p.Type)
		}
	}
	if agent.Machine != elf.EM_X86_64 || agent.Type != elf.ET_EXEC {
		t.Errorf("init is a %v for %v", agent.Type, agent.Machine)
	}
	// Neither what was built where, nor the host's own paths.
	for _, trace := range []string{source + "/", "/root/go/", "/home/"} {
		if bytes.Contains(entries["init"].data, []byte(trace)) {
			t.Errorf("init holds the path %s", trace)
		}
	}
	checkModules(t, entries, source)
}

// checkModules compares the modules with image/modules.list and with what they
// themselves say they depend on: exactly those, each after its dependencies.
func checkModules(t *testing.T, entries map[string]entry, source string) {
	t.Helper()
	// The kernel takes - and _ in a module's name for the same.
	plain := func(name string) string { return strings.ReplaceAll(name, "-", "_") }
	list, err := os.ReadFile(filepath.Join(source, "image", "modules.list"))
	if err != nil {
		t.Fatal(err)
	}
	wanted := map[string]bool{}
	for line := range strings.Lines(string(list)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			wanted[plain(line)] = true
		}
	}
	var paths []string
	for name := range entries {
		if modulePath.MatchString(name) {
			paths = append(paths, name)
		}
	}
	slices.Sort(paths) // as the agent loads them
	// Backwards: whatever is wanted by then is on the list or needed by a module
	// that is loaded later.
	loaded := map[string]bool{}
	for i, p := range slices.Backward(paths) {
		m := modulePath.FindStringSubmatch(p)
		if number, _ := strconv.Atoi(m[1]); number != i {
			t.Errorf("%s is number %d in the order", p, i)
		}
		name := plain(m[2])
		if !wanted[name] {
			t.Errorf("module %s is neither on the list nor needed by one that is loaded after it", m[2])
		}
		if loaded[name] {
			t.Errorf("module %s is there twice", m[2])
		}
		loaded[name] = true
		info := modinfo(t, p, entries[p].data)
		if version := strings.Fields(info["vermagic"] + " ")[0]; plain(info["name"]) != name || version != image.Kernel {
			t.Errorf("%s says that it is %s for kernel %s", p, info["name"], version)
		}
		// module.sig_enforce=1 refuses it otherwise.
		if !bytes.HasSuffix(entries[p].data, []byte("~Module signature appended~\n")) {
			t.Errorf("%s is not signed", p)
		}
		for _, needs := range strings.Split(info["depends"], ",") {
			if needs = plain(needs); needs == "" {
				continue
			}
			if loaded[needs] {
				t.Errorf("module %s is loaded before %s, which it needs", m[2], needs)
			}
			wanted[needs] = true
		}
	}
	for name := range wanted {
		if !loaded[name] {
			t.Errorf("module %s is not there", name)
		}
	}
}

// modinfo reads the key=value pairs of a kernel module's .modinfo section.
func modinfo(t *testing.T, name string, data []byte) map[string]string {
	t.Helper()
	module, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	section := module.Section(".modinfo")
	if section == nil {
		t.Fatalf("%s has no .modinfo", name)
	}
	text, err := section.Data()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	info := map[string]string{}
	for pair := range strings.SplitSeq(string(text), "\x00") {
		if key, value, ok := strings.Cut(pair, "="); ok {
			info[key] = value
		}
	}
	return info
}

// Where the engine disk keeps libraries.
const (
	libraries = "usr/lib/x86_64-linux-gnu"
	backends  = libraries + "/ggml/backends0"
	loader    = libraries + "/ld-linux-x86-64.so.2"
	engine    = "usr/bin/llama-server"
)

var backendName = regexp.MustCompile(`^libggml-cpu-[a-z0-9]+\.so$`)

func TestLlamaDisk(t *testing.T) {
	file, source := artefact(t, "llama.cpp.disk")
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verity.VerifyDisk(t.Context(), f, size, nil); err != nil {
		t.Fatal(err)
	}
	_, fsys, err := disk.OpenTree(f, size)
	if err != nil {
		t.Fatal(err)
	}

	links := map[string]string{
		"lib": "usr/lib", "lib64": "usr/lib64",
		"usr/lib64/ld-linux-x86-64.so.2": "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
	}
	files := map[string]inspect.Mode{profile.Path: 0o444}
	for name := range closure(t, fsys) {
		files[name] = 0o755
	}
	// The folders of all that, and the mount points that the agent needs.
	folders := map[string]bool{".": true, "dev": true, "models": true, "proc": true, "run": true, "tmp": true}
	for name := range files {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			folders[dir] = true
		}
	}
	for name := range links {
		folders[path.Dir(name)] = true
	}

	time := epoch(t, source, "engine/llama.cpp")
	opened, err := inspect.OpenDisk(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	tree := opened.Trees[0]
	if tree == nil || len(opened.Table.Partitions) != 2 {
		t.Fatalf("partitions %+v, expected data and a hash tree", opened.Table.Partitions)
	}
	for _, e := range tree.Entries {
		switch e.Mode.Type() {
		case "folder":
			if !folders[e.Path] || e.Mode != unix.S_IFDIR|0o755 {
				t.Errorf("folder %s, mode %v, is not on the list or not with that mode", e.Path, e.Mode)
			}
		case "link":
			if links[e.Path] == "" || e.Target != links[e.Path] {
				t.Errorf("link %s to %s is not on the list", e.Path, e.Target)
			}
			delete(links, e.Path)
		default:
			if want, ok := files[e.Path]; !ok || e.Mode != unix.S_IFREG|want {
				t.Errorf("%s, mode %v, is not on the list or not with that mode", e.Path, e.Mode)
			}
			delete(files, e.Path)
		}
		for name := range e.Xattrs {
			// systemd-repart tells on the top folder where the file system is to be
			// mounted; nothing reads it.
			if e.Path != "." || !strings.HasPrefix(name, "user.validatefs.") {
				t.Errorf("%s has the attribute %s", e.Path, name)
			}
		}
		if e.UID != 0 || e.GID != 0 || e.Device != 0 || e.Time.Unix() != time {
			t.Errorf("%s: %+v, the lock's time is %d", e.Path, e, time)
		}
	}
	for name := range links {
		t.Errorf("the disk has no link %s", name)
	}
	for name := range files {
		t.Errorf("the disk has no file %s", name)
	}

	got, err := fs.ReadFile(fsys, profile.Path)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := os.ReadFile(filepath.Join(source, "image/engines/llama.cpp/profile.json"))
	if err != nil || !bytes.Equal(got, committed) {
		t.Errorf("the disk's profile is not the one in the tree (%v)", err)
	}
	p, err := profile.Parse(got)
	if err != nil {
		t.Fatal(err)
	}
	if program := p.Argv[0].Args[0]; program != "/"+engine {
		t.Errorf("the profile starts %s", program)
	}
}

// closure is what llama-server and every CPU back end load, by DT_NEEDED: the
// programs, their libraries and theirs, and the loader.
func closure(t *testing.T, fsys fs.FS) map[string]bool {
	t.Helper()
	list, err := fs.ReadDir(fsys, backends)
	if err != nil {
		t.Fatal(err)
	}
	todo := []string{engine, loader}
	for _, e := range list {
		if !backendName.MatchString(e.Name()) {
			t.Errorf("%s/%s is not a CPU back end", backends, e.Name())
		}
		todo = append(todo, path.Join(backends, e.Name()))
	}
	if !slices.Contains(todo, backends+"/libggml-cpu-x64.so") || len(list) < 10 {
		t.Errorf("%d CPU back ends, or none for a plain x86-64", len(list))
	}
	found := map[string]bool{}
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		if found[name] {
			continue
		}
		found[name] = true
		data, err := fs.ReadFile(fsys, name)
		if err != nil {
			t.Errorf("%s is missing: %v", name, err)
			continue
		}
		object, err := elf.NewFile(bytes.NewReader(data))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, p := range object.Progs {
			if p.Type != elf.PT_INTERP {
				continue
			}
			interpreter := make([]byte, p.Filesz)
			if _, err := p.ReadAt(interpreter, 0); err != nil || string(interpreter) != "/lib64/ld-linux-x86-64.so.2\x00" {
				t.Errorf("%s asks for the loader %q (%v)", name, interpreter, err)
			}
		}
		folders := []string{libraries}
		runpath, _ := object.DynString(elf.DT_RUNPATH)
		for _, entry := range strings.Split(strings.Join(runpath, ":"), ":") {
			if entry = strings.ReplaceAll(entry, "$ORIGIN", "/"+path.Dir(name)); entry != "" {
				folders = append([]string{strings.TrimPrefix(path.Clean(entry), "/")}, folders...)
			}
		}
		needed, err := object.DynString(elf.DT_NEEDED)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, library := range needed {
			i := slices.IndexFunc(folders, func(dir string) bool {
				_, err := fs.Stat(fsys, path.Join(dir, library))
				return err == nil
			})
			if i < 0 {
				t.Errorf("%s needs %s, which is not in %v", name, library, folders)
				continue
			}
			todo = append(todo, path.Join(folders[i], library))
		}
	}
	return found
}

// TestGPUImage compares the image for VMs with GPUs, as its tests have it, with the
// published one: what its command line leaves out, and what its initrd has more.
func TestGPUImage(t *testing.T) {
	open := func(name string) (*inspect.UKI, map[string][]byte) {
		file, _ := artefact(t, name)
		uki, err := inspect.OpenUKI(t.Context(), file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { uki.Close() })
		files := map[string][]byte{}
		for _, e := range uki.Initrd.Entries {
			files[e.Path] = nil
			if e.Mode.Type() == "file" {
				if files[e.Path], err = e.Content(64 << 20); err != nil {
					t.Fatal(err)
				}
			}
		}
		return uki, files
	}
	published, files := open("chrysalis.efi")
	gpu, more := open("chrysalis-gputest.efi")
	var want []string
	for _, argument := range strings.Fields(published.CommandLine) {
		// NVIDIA's modules are not signed by the kernel's builder.
		if argument != "module.sig_enforce=1" {
			want = append(want, argument)
		}
	}
	// The debug profile's, which the image "gpu" has not.
	want = append(want, "loglevel=7")
	if got := strings.Fields(gpu.CommandLine); !slices.Equal(got, want) {
		t.Errorf("the command line is %q, expected %q", got, want)
	}
	for name, data := range files {
		// These three name the image.
		if name != "init" && name != "image.json" && name != "usr/lib/os-release" && !bytes.Equal(more[name], data) {
			t.Errorf("%s is another file than the published image's", name)
		}
	}
	var modules []string
	for name := range more {
		if _, ok := files[name]; ok || name == "gpu-modules" {
			continue
		}
		m := regexp.MustCompile(`^gpu-modules/[0-9]{2}-([a-z0-9_-]+)\.ko$`).FindStringSubmatch(name)
		if m == nil {
			t.Errorf("the initrd holds %s, which is on no list", name)
			continue
		}
		modules = append(modules, m[1])
	}
	for _, name := range image.GPUModules() {
		if !slices.Contains(modules, name) {
			t.Errorf("the initrd has no module %s", name)
		}
	}
	t.Logf("%d modules for GPUs: %s", len(modules), strings.Join(modules, " "))
}
