package audit_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"chrysalis/audit"
	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/provenance"
	"chrysalis/image/release"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
)

const tools = "0123456789abcdef"

func lock() *image.Lock {
	suites := []image.Suite{{Name: "sid", Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}}
	pkg := image.Package{Name: "libc6", Version: "1", Arch: "amd64", Path: "pool/main/g/libc6.deb", Size: 1, SHA256: strings.Repeat("a", 64)}
	return &image.Lock{
		Version: 1, Go: image.Go{Toolchain: "go1.26.8"},
		Trees: []image.Tree{
			{Name: "engine/llama.cpp", Suites: suites, Packages: []image.Package{pkg}},
			{Name: "image", Suites: suites, Packages: []image.Package{pkg}},
		},
	}
}

// fake builds artefacts that are only their names.
func fake(_ context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
	for _, name := range p.Artefacts() {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("MZ "+name), 0o644); err != nil {
			return provenance.Build{}, err
		}
	}
	b := provenance.Build{Parameters: p, Lock: lock(), Tools: tools}
	return b, b.WriteSBOMs(dir)
}

func fakeBundle(_ context.Context, path string) error {
	return os.WriteFile(path, []byte("bundle"), 0o644)
}

func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgSign=false"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// commit makes the folder a checkout of one commit of all that is in it.
func commit(t *testing.T, dir string) provenance.Source {
	t.Helper()
	git(t, dir, "init", "-q")
	git(t, dir, "add", "-A", "-f")
	git(t, dir, "commit", "-qm", "all")
	source, err := provenance.ReadSource(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return source
}

// publish makes a release with a build from a source tree in that state.
func publish(t *testing.T, dir string, source provenance.Source, b func(context.Context, string, provenance.Parameters) (provenance.Build, error)) {
	t.Helper()
	p, err := provenance.NewParameters("", []string{"llama.cpp"}, []string{"demo"})
	if err != nil {
		t.Fatal(err)
	}
	publishBuild(t, dir, source, p, b)
}

// publishProfile adds the image of a profile to a release.
func publishProfile(t *testing.T, dir string, source provenance.Source, profile string) {
	t.Helper()
	p, err := provenance.NewParameters(profile, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	publishBuild(t, dir, source, p, fake)
}

func publishBuild(t *testing.T, dir string, source provenance.Source, p provenance.Parameters, b func(context.Context, string, provenance.Parameters) (provenance.Build, error)) {
	t.Helper()
	made, err := b(t.Context(), dir, p)
	if err != nil {
		t.Fatal(err)
	}
	made.Source = source
	if _, err := made.WriteStatement(dir); err != nil {
		t.Fatal(err)
	}
}

// world is a release, and the source tree that it is from.
type world struct {
	release, source string
	auditor         audit.Auditor
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip(err)
	}
	w := &world{release: t.TempDir(), source: t.TempDir()}
	w.auditor = audit.Auditor{Source: w.source, Build: fake, Bundle: fakeBundle}
	write(t, filepath.Join(w.source, image.LockName), string(lock().Encode()))
	publish(t, w.release, commit(t, w.source), fake)
	return w
}

func (w *world) file(name string) string { return filepath.Join(w.release, name) }

// failures are the checks that fail, with what is said about them.
func failures(r *audit.Report) (text []string) {
	for _, c := range r.Checks {
		if c.Result == provenance.Fail {
			line := c.What + ": " + c.Detail
			for _, d := range c.Differences {
				line += "; " + d.String()
			}
			text = append(text, line)
		}
	}
	return text
}

func TestAudit(t *testing.T) {
	w := newWorld(t)
	write(t, w.file(audit.BundleName), "bundle")
	r, err := w.auditor.Audit(t.Context(), w.release)
	if err != nil {
		t.Fatal(err)
	}
	if !r.OK || len(failures(r)) != 0 || len(r.Commit) != 40 {
		t.Errorf("%+v", r)
	}
	for _, want := range []string{"no record in the release", "the commit has no release.json"} {
		if !slices.ContainsFunc(r.Checks, func(c provenance.Check) bool { return c.Result == provenance.None && c.Detail == want }) {
			t.Errorf("it does not say %q: %+v", want, r.Checks)
		}
	}
	for _, name := range []string{"chrysalis.efi", "llama.cpp.disk", "demo.disk", "llama.cpp.manifest.json", "llama.cpp.disk.cdx.json"} {
		if !slices.ContainsFunc(r.Checks, func(c provenance.Check) bool {
			return c.Result == provenance.Pass && c.What == name+" is what the working tree makes"
		}) {
			t.Errorf("%s is not compared with a rebuilt one", name)
		}
	}
}

// What 'make image' leaves is the published image's build and another profile's.
func TestAuditProfiles(t *testing.T) {
	w := newWorld(t)
	source, err := provenance.ReadSource(t.Context(), w.source)
	if err != nil {
		t.Fatal(err)
	}
	publishProfile(t, w.release, source, "debug")
	r, err := w.auditor.Audit(t.Context(), w.release)
	if err != nil {
		t.Fatal(err)
	}
	if !r.OK {
		t.Errorf("these fail: %q", failures(r))
	}
	seen := map[string]bool{}
	for _, c := range r.Checks {
		if seen[c.What] {
			t.Errorf("%q is there twice", c.What)
		}
		seen[c.What] = true
	}
	if !seen["chrysalis-debug.efi is what the working tree makes"] {
		t.Error("the other profile's image is not compared")
	}
	write(t, w.file("chrysalis-debug.efi"), "MZ other")
	if r, err = w.auditor.Audit(t.Context(), w.release); err != nil || r.OK {
		t.Errorf("an altered one passes (%v)", err)
	}
}

func TestKeep(t *testing.T) {
	w := newWorld(t)
	w.auditor.Keep = filepath.Join(t.TempDir(), "kept")
	for range 2 {
		r, err := w.auditor.Audit(t.Context(), w.release)
		if err == nil && !r.OK {
			t.Fatalf("these fail: %q", failures(r))
		}
		if data, _ := os.ReadFile(filepath.Join(w.auditor.Keep, "chrysalis.efi")); string(data) != "MZ chrysalis.efi" {
			t.Fatalf("it keeps %q (%v)", data, err)
		}
		if err != nil {
			if !strings.Contains(err.Error(), "is not an empty folder") {
				t.Errorf("the second time it says %v", err)
			}
			break
		}
	}
	for _, dir := range []string{w.source, filepath.Join(w.source, "kept")} {
		w.auditor.Keep = dir
		if _, err := w.auditor.Audit(t.Context(), w.release); err == nil || !strings.Contains(err.Error(), "is in the working tree") {
			t.Errorf("%s: it says %v", dir, err)
		}
	}
}

// What a release or a source tree can say that is not so, each with the first
// check that must fail.
func TestAuditFails(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, w *world)
		want   string
	}{
		{"artefact altered after the build", func(t *testing.T, w *world) {
			write(t, w.file("chrysalis.efi"), "MZ other")
		}, "chrysalis.efi is what the provenance names: its SHA-256"},
		{"artefact altered before", func(t *testing.T, w *world) {
			source, _ := provenance.ReadSource(t.Context(), w.source)
			publish(t, w.release, source, func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
				b, err := fake(ctx, dir, p)
				write(t, filepath.Join(dir, "llama.cpp.disk"), "MZ other")
				return b, errors.Join(err, b.WriteSBOMs(dir))
			})
		}, "llama.cpp.disk is what the working tree makes: the release's SHA-256"},
		{"SBOM that keeps something back", func(t *testing.T, w *world) {
			source, _ := provenance.ReadSource(t.Context(), w.source)
			publish(t, w.release, source, func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
				b, err := fake(ctx, dir, p)
				name := filepath.Join(dir, "chrysalis.efi.cdx.json")
				sbom, _ := os.ReadFile(name)
				write(t, name, strings.ReplaceAll(string(sbom), "libc6", "libc7"))
				return b, err
			})
		}, "chrysalis.efi.cdx.json is what the working tree makes: "},
		{"other tools root", func(t *testing.T, w *world) {
			w.auditor.Build = func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
				b, err := fake(ctx, dir, p)
				b.Tools = "fedcba9876543210"
				return b, err
			}
		}, "tools root is the working tree's: the release's is 0123456789abcdef"},
		{"manifest of other disks", func(t *testing.T, w *world) {
			source, _ := provenance.ReadSource(t.Context(), w.source)
			publish(t, w.release, source, func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
				b, err := fake(ctx, dir, p)
				write(t, filepath.Join(dir, "llama.cpp.manifest.json"), "MZ llama.cpp.manifest.jsom")
				return b, err
			})
		}, `llama.cpp.manifest.json is what the working tree makes: the release's SHA-256`},
		{"other hashes than the commit expects", func(t *testing.T, w *world) {
			expected := &release.Release{Version: 1, Artefacts: []release.File{{Name: "demo.disk", SHA256: strings.Repeat("0", 64)}}}
			if err := expected.Write(w.source); err != nil {
				t.Fatal(err)
			}
			publish(t, w.release, commit(t, w.source), fake)
		}, "release.json of the working tree expects these artefacts: of demo.disk it expects the SHA-256 000"},
		{"other bundle", func(t *testing.T, w *world) { write(t, w.file(audit.BundleName), "bungle") },
			audit.BundleName + " is what the working tree makes: "},
		{"working tree at another commit", func(t *testing.T, w *world) {
			git(t, w.source, "commit", "-q", "--allow-empty", "-m", "more")
			w.auditor.Build = nil // must not be asked
		}, "working tree is at the release's commit: the working tree is at "},
		{"working tree with changes", func(t *testing.T, w *world) {
			write(t, filepath.Join(w.source, "agent.go"), "")
			w.auditor.Build = nil
		}, "working tree has nothing but the commit: not as in the commit: agent.go"},
		{"working tree that changes meanwhile", func(t *testing.T, w *world) {
			w.auditor.Build = func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
				write(t, filepath.Join(w.source, "agent.go"), "")
				return fake(ctx, dir, p)
			}
		}, "working tree stayed as it was: it changed"},
		{"release from files that no commit has", func(t *testing.T, w *world) {
			source, _ := provenance.ReadSource(t.Context(), w.source)
			source.Changed = []string{"agent.go"}
			publish(t, w.release, source, fake)
			w.auditor.Build = nil
		}, "release is built from a commit as it is: "},
		{"lock of another commit", func(t *testing.T, w *world) {
			other := lock()
			other.Trees[0].Packages[0].Version = "2"
			write(t, w.file(image.LockName), string(other.Encode()))
			w.auditor.Build = nil
		}, "image.lock is the one that the provenance names: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			c.change(t, w)
			r, err := w.auditor.Audit(t.Context(), w.release)
			if err != nil {
				t.Fatal(err)
			}
			if got := failures(r); r.OK || len(got) == 0 || !strings.HasPrefix(got[0], c.want) {
				t.Errorf("OK is %v, and these fail: %q; want %q", r.OK, got, c.want)
			}
		})
	}
}

// What is no release at all.
func TestAuditRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, w *world)
		want   string
	}{
		{"no folder", func(t *testing.T, w *world) { os.RemoveAll(w.release) }, "open the release"},
		{"artefact missing", func(t *testing.T, w *world) { os.Remove(w.file("llama.cpp.disk")) }, "lacks llama.cpp.disk"},
		{"SBOM missing", func(t *testing.T, w *world) { os.Remove(w.file("llama.cpp.disk.cdx.json")) }, "lacks llama.cpp.disk.cdx.json"},
		{"lock missing", func(t *testing.T, w *world) { os.Remove(w.file(image.LockName)) }, "lacks image.lock"},
		{"provenance missing", func(t *testing.T, w *world) { os.Remove(w.file("chrysalis.provenance.json")) }, "and so is no release"},
		{"another provenance that is none", func(t *testing.T, w *world) { write(t, w.file("x.provenance.json"), "") }, "not a provenance statement"},
		{"provenance of another commit", func(t *testing.T, w *world) {
			publishProfile(t, w.release, provenance.Source{Commit: strings.Repeat("c", 40)}, "debug")
		}, "a release is of one commit"},
		{"provenance of another name", func(t *testing.T, w *world) {
			os.Rename(w.file("chrysalis.provenance.json"), w.file("x.provenance.json"))
		}, "lacks chrysalis.provenance.json"},
		{"file too many", func(t *testing.T, w *world) { write(t, w.file("README"), "trust me") }, "which its provenance does not name"},
		{"hidden file", func(t *testing.T, w *world) { write(t, w.file(".x"), "") }, "which its provenance does not name"},
		{"very many files", func(t *testing.T, w *world) {
			for i := range 70 {
				write(t, w.file(strings.Repeat("x", i+1)), "")
			}
		}, "more than 64 files"},
		{"folder in it", func(t *testing.T, w *world) { os.Mkdir(w.file("more"), 0o755) }, "not a regular file"},
		{"link in it", func(t *testing.T, w *world) {
			os.Remove(w.file("llama.cpp.disk"))
			os.Symlink("/dev/zero", w.file("llama.cpp.disk"))
		}, "not a regular file"},
		{"provenance malformed", func(t *testing.T, w *world) { write(t, w.file("chrysalis.provenance.json"), "{}") }, "its _type is"},
		{"lock malformed", func(t *testing.T, w *world) { write(t, w.file(image.LockName), "{}") }, "image.lock: lock version is 0"},
		{"lock too large", func(t *testing.T, w *world) {
			os.Truncate(w.file(image.LockName), 1<<30)
		}, "larger than"},
		{"source tree that is no checkout", func(t *testing.T, w *world) { os.RemoveAll(filepath.Join(w.source, ".git")) }, "clone of the repository"},
		{"nothing can be built", func(t *testing.T, w *world) {
			w.auditor.Build = func(context.Context, string, provenance.Parameters) (provenance.Build, error) {
				return provenance.Build{}, errors.New("no mirror has it")
			}
		}, "build the release again: no mirror has it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			c.change(t, w)
			if _, err := w.auditor.Audit(t.Context(), w.release); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("it says %v, want %q", err, c.want)
			}
		})
	}
}

// copyCheckout copies the files of the checkout that the test runs in, as they
// are now, into a new folder.
func copyCheckout(t *testing.T) string {
	t.Helper()
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command("git", "-C", source, "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		imagetest.Missing(t, err)
	}
	dir := t.TempDir()
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		info, err := os.Lstat(filepath.Join(source, name))
		if err != nil || !info.Mode().IsRegular() {
			continue // removed, and not yet committed
		}
		data, err := os.ReadFile(filepath.Join(source, name))
		if err == nil {
			err = errors.Join(
				os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755),
				os.WriteFile(filepath.Join(dir, name), data, info.Mode().Perm()))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestAuditImage builds this source tree's image and audits it, which builds it
// once more, from another path. Then it alters the kernel's command line.
func TestAuditImage(t *testing.T) {
	if testing.Short() {
		t.Skip("builds an image twice")
	}
	imagetest.Tools(t)
	quiet := func(string, int64, int64) {}
	built := ""
	maker := func(source string) func(context.Context, string, provenance.Parameters) (provenance.Build, error) {
		return func(ctx context.Context, out string, p provenance.Parameters) (provenance.Build, error) {
			built = out
			return provenance.Make(ctx, &image.Builder{Source: source, Out: out, Progress: quiet}, p)
		}
	}
	dir, source, clone := t.TempDir(), copyCheckout(t), filepath.Join(t.TempDir(), "elsewhere")
	// Whether the hashes are those that the source expects is ci/repro's to say.
	os.Remove(filepath.Join(source, release.Name))
	publish(t, dir, commit(t, source), maker(source))
	if built != dir {
		t.Fatal("the release was not built")
	}
	if out, err := exec.Command("git", "clone", "-q", source, clone).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
	kept := t.TempDir()
	a := &audit.Auditor{Source: clone, Build: func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
		made, err := maker(clone)(ctx, dir, p)
		return made, errors.Join(err, os.CopyFS(kept, os.DirFS(dir)))
	}}
	r, err := a.Audit(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if !r.OK || built == dir {
		t.Fatalf("it is not the same: %q", failures(r))
	}

	// From here on nothing is built again.
	a.Build = func(_ context.Context, dir string, p provenance.Parameters) (provenance.Build, error) {
		lock, err := image.ReadLock(clone)
		return provenance.Build{Parameters: p, Lock: lock, Tools: filepath.Base(imagetest.Tools(t).Dir)},
			errors.Join(err, os.CopyFS(dir, os.DirFS(kept)))
	}
	auditRecord(t, a, dir)
	auditRecords(t, a, dir)

	uki := filepath.Join(dir, "chrysalis.efi")
	data, err := os.ReadFile(uki)
	if err != nil {
		t.Fatal(err)
	}
	altered := bytes.Replace(data, []byte("panic=-1"), []byte("panic=-2"), 1)
	if bytes.Equal(altered, data) {
		t.Fatal("the command line does not say panic=-1")
	}
	write(t, uki, string(altered))
	if r, err = a.Audit(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	got := failures(r)
	if r.OK || len(got) != 2 || !strings.Contains(got[1], "section .cmdline") {
		t.Errorf("these fail: %q, want the command line to be named", got)
	}
}

// auditRecord audits records of a release: within it, and by themselves.
func auditRecord(t *testing.T, a *audit.Auditor, dir string) {
	t.Helper()
	lock, err := os.ReadFile(filepath.Join(a.Source, image.LockName))
	if err != nil {
		t.Fatal(err)
	}
	result, err := plan.Run(t.Context(), plan.Options{
		Platform: record.TPM, Boot: record.BootKernel, ExitFailures: -1, Lock: lock, Tools: imagetest.Tools(t), Shapes: []string{"small"},
		Image: filepath.Join(dir, "chrysalis.efi"), Engine: filepath.Join(dir, "llama.cpp.disk"), Models: []string{filepath.Join(dir, "demo.disk")},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "tpm"+audit.RecordSuffix)
	defer os.Remove(path)
	alone := filepath.Join(t.TempDir(), "alone.json")
	for _, c := range []struct {
		name, want string
		change     func(*record.File)
	}{
		{"as it is", "", func(*record.File) {}},
		{"another firmware", "image.firmware is ", func(f *record.File) { f.Image.Firmware[0] ^= 1 }},
		{"another UKI", "image.uki is ", func(f *record.File) { f.Image.UKI[0] ^= 1 }},
		{"another engine", "of the engine llama.cpp", func(f *record.File) { f.Engines[0].RootHash[0] ^= 1 }},
		{"another profile", "engines[0].profile is ", func(f *record.File) { f.Engines[0].Profile[0] ^= 1 }},
		{"another model", "of the model chrysalis/demo@1", func(f *record.File) { f.Models[0].RootHash[0] ^= 1 }},
		{"another shape", "shapes[0].memory is ", func(f *record.File) { f.Shapes[0].Memory++ }},
	} {
		data, err := result.File.Encode()
		if err != nil {
			t.Fatal(err)
		}
		f, err := record.ParseFile(data)
		if err != nil {
			t.Fatal(err)
		}
		c.change(f)
		key := f.Image.Key()
		for i := range f.Shapes {
			f.Shapes[i].Image = key[:]
		}
		if data, err = f.Encode(); err != nil {
			t.Fatal(err)
		}
		write(t, path, string(data))
		write(t, alone, string(data))
		for where, check := range map[string]func() (*audit.Report, error){
			"in a release": func() (*audit.Report, error) { return a.Audit(t.Context(), dir) },
			"alone":        func() (*audit.Report, error) { return a.AuditRecord(t.Context(), alone) },
		} {
			r, err := check()
			if err != nil {
				t.Fatalf("%s, %s: %v", c.name, where, err)
			}
			got := failures(r)
			if c.want == "" && !r.OK || c.want != "" && (r.OK || len(got) != 1 || !strings.Contains(got[0], c.want)) {
				t.Errorf("%s, %s: these fail: %q, want %q", c.name, where, got, c.want)
			}
		}
	}

	other, err := record.ParseFile(must(result.File.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	other.Image.Commit = strings.Repeat("0", 40)
	write(t, alone, string(must(other.Encode())))
	r, err := a.AuditRecord(t.Context(), alone)
	if err != nil || r.OK || len(failures(r)) != 1 || !strings.Contains(failures(r)[0], "check the record's commit out") {
		t.Errorf("a record of another commit: %v, %+v", err, r)
	}
	write(t, alone, "{}")
	if _, err := a.AuditRecord(t.Context(), alone); err == nil || !strings.Contains(err.Error(), "alone.json") {
		t.Errorf("no record: %v", err)
	}
	write(t, path, "{}")
	if _, err := a.Audit(t.Context(), dir); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("no record in a release: %v", err)
	}
}

// auditRecords audits single records, as a registry has them.
func auditRecords(t *testing.T, a *audit.Auditor, dir string) {
	t.Helper()
	lock, err := os.ReadFile(filepath.Join(a.Source, image.LockName))
	if err != nil {
		t.Fatal(err)
	}
	source, err := provenance.ReadSource(t.Context(), a.Source)
	if err != nil {
		t.Fatal(err)
	}
	predict := func() *record.File {
		result, err := plan.Run(t.Context(), plan.Options{
			Platform: record.TPM, Boot: record.BootKernel, ExitFailures: -1, Commit: source.Commit, Lock: lock, Tools: imagetest.Tools(t), Shapes: []string{"small"},
			Image: filepath.Join(dir, "chrysalis.efi"), Engine: filepath.Join(dir, "llama.cpp.disk"), Models: []string{filepath.Join(dir, "demo.disk")},
		})
		if err != nil {
			t.Fatal(err)
		}
		return result.File
	}
	for _, c := range []struct {
		name, want string
		records    func(f *record.File) []record.Record
	}{
		{"all", "", func(f *record.File) []record.Record {
			return []record.Record{&f.Image, &f.Shapes[0], &f.Engines[0], &f.Models[0]}
		}},
		{"an image", "", func(f *record.File) []record.Record { return []record.Record{&f.Image} }},
		{"a shape", "", func(f *record.File) []record.Record { return []record.Record{&f.Shapes[0]} }},
		{"an engine", "", func(f *record.File) []record.Record { return []record.Record{&f.Engines[0]} }},
		{"a model", "", func(f *record.File) []record.Record { return []record.Record{&f.Models[0]} }},
		{"another UKI", "uki is ", func(f *record.File) []record.Record {
			f.Image.UKI[0] ^= 1
			return []record.Record{&f.Image}
		}},
		{"another shape", "memory is ", func(f *record.File) []record.Record {
			f.Shapes[0].Memory++
			return []record.Record{&f.Shapes[0]}
		}},
		{"a shape with more disks", "4 disks", func(f *record.File) []record.Record {
			f.Shapes[0].Disks++
			return []record.Record{&f.Shapes[0]}
		}},
		{"another profile", "profile is ", func(f *record.File) []record.Record {
			f.Engines[0].Profile[0] ^= 1
			return []record.Record{&f.Engines[0]}
		}},
		{"another model", "of the model chrysalis/demo@1", func(f *record.File) []record.Record {
			f.Models[0].RootHash[0] ^= 1
			return []record.Record{&f.Models[0]}
		}},
		{"another model's name", "name is ", func(f *record.File) []record.Record {
			f.Models[0].Name = "acme/model"
			return []record.Record{&f.Models[0]}
		}},
	} {
		f := predict()
		records := c.records(f)
		var of *record.Image
		if records[0].RecordKind() == record.KindShape {
			of = &f.Image
		}
		r, err := a.AuditRecords(t.Context(), records, of)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		got := failures(r)
		if c.want == "" && (!r.OK || len(r.Checks) != 3+len(records)) || c.want != "" && (r.OK || len(got) != 1 || !strings.Contains(got[0], c.want)) {
			t.Errorf("%s: of %d checks these fail: %q, want %q", c.name, len(r.Checks), got, c.want)
		}
	}
	f := predict()
	if _, err := a.AuditRecords(t.Context(), []record.Record{&f.Shapes[0]}, nil); err == nil || !strings.Contains(err.Error(), "image of the shapes is missing") {
		t.Errorf("a shape without its image: %v", err)
	}
	other := f.Image
	other.PCRs = slices.Clone(other.PCRs)
	other.PCRs[0].SHA256 = make([]byte, 32)
	if _, err := a.AuditRecords(t.Context(), []record.Record{&f.Shapes[0]}, &other); err == nil || !strings.Contains(err.Error(), "is of the image") {
		t.Errorf("a shape of another image: %v", err)
	}
	if _, err := a.AuditRecords(t.Context(), []record.Record{&f.Image, &other}, nil); err == nil || !strings.Contains(err.Error(), "more than one image") {
		t.Errorf("two images: %v", err)
	}
}

func must(data []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return data
}
