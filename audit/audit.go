// Package audit builds a release again and says whether it is what its
// provenance claims.
//
// Nothing in a release is believed. It names a commit; the auditor checks that
// commit out and reads it, and everything is built from that working tree. What
// the audit shows is that the release is what this source makes on this machine,
// bit for bit. Whether the source does what it should is for the reader.
package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"chrysalis/image"
	"chrysalis/image/inspect"
	"chrysalis/image/provenance"
	"chrysalis/image/release"
	"chrysalis/measure/record"
)

// BundleName is what a release calls its bundle, if it has one.
const BundleName = "chrysalis.bundle"

// Bounds of what is read of a release at once.
const (
	maxFiles = 64
	maxLock  = 4 << 20 // bytes
	maxText  = 8 << 20 // bytes
)

// An Auditor audits releases against a source tree.
type Auditor struct {
	Source string // top of the working tree
	// Build builds what the parameters ask for, from the source tree into a folder,
	// with an SBOM beside each artefact.
	Build func(ctx context.Context, dir string, p provenance.Parameters) (provenance.Build, error)
	// Bundle writes the bundle of the source tree's lock.
	Bundle func(ctx context.Context, path string) error
	// Keep is a folder for what is built, which stays; "" for a temporary one.
	Keep string
}

// A Report is what an audit found. Its JSON form is part of the command line's
// interface.
type Report struct {
	OK     bool               `json:"ok"` // every check that could be made holds, and there is a build
	Commit string             `json:"commit"`
	Checks []provenance.Check `json:"checks"`
}

// A folder is a release: the files of one build, or of several of one commit, of
// which each has a statement.
type folder struct {
	dir        string
	statements []*provenance.Statement
	lock       *image.Lock
	records    []measured
	bundle     bool
}

// parameters are those of the build that made the image of a record.
func (f *folder) parameters(m *record.File) provenance.Parameters {
	var disks provenance.Parameters
	for _, s := range f.statements {
		p := s.Parameters()
		if p.UKI() == m.Image.Name+".efi" {
			disks.Profile = p.Profile
		}
		disks.Engines = append(disks.Engines, p.Engines...)
		disks.Models = append(disks.Models, p.Models...)
	}
	return disks
}

// subjects are the names of the files that statements are about, each once,
// sorted.
func (f *folder) subjects() []string {
	var names []string
	for _, s := range f.statements {
		names = append(names, s.Parameters().Subjects()...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Audit checks the release in a folder. An error means that the folder is no
// release or that nothing could be built; what does not hold is in the report.
func (a *Auditor) Audit(ctx context.Context, dir string) (*Report, error) {
	rel, err := openRelease(dir)
	if err != nil {
		return nil, err
	}
	made, done, err := a.workspace()
	if err != nil {
		return nil, err
	}
	defer done()
	r := &Report{}
	r.Commit, _ = rel.statements[0].Commit()
	for _, s := range rel.statements {
		checks, err := s.CheckFiles(dir)
		if err != nil {
			return nil, err
		}
		r.Checks = append(r.Checks, checks...)
		r.add(s.CheckLock(rel.lock, "the one that the provenance names"))
	}
	r.Checks = once(r.Checks)
	sameSource, err := a.checkSource(ctx, r, rel)
	if err != nil {
		return nil, err
	}
	if sameSource {
		err = a.rebuild(ctx, r, rel, made)
	} else {
		skip(r, rel)
	}
	if err != nil {
		return nil, err
	}
	r.OK = provenance.Passed(r.Checks)
	return r, nil
}

// workspace is the folder for what is built.
func (a *Auditor) workspace() (dir string, done func(), err error) {
	if a.Keep == "" {
		dir, err = os.MkdirTemp("", "chrysalis-audit-")
		return dir, func() { os.RemoveAll(dir) }, err
	}
	source, errSource := filepath.Abs(a.Source)
	dir, errDir := filepath.Abs(a.Keep)
	if err := errors.Join(errSource, errDir); err != nil {
		return "", nil, err
	}
	if rel, err := filepath.Rel(source, dir); err == nil && filepath.IsLocal(rel) {
		return "", nil, fmt.Errorf("%s is in the working tree, and would count as a change of it; keep what is built elsewhere", a.Keep)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, fmt.Errorf("make the folder to keep what is built: %w", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return "", nil, fmt.Errorf("%s is not an empty folder; name one, or one that is not there yet", a.Keep)
	}
	return dir, func() {}, nil
}

// once drops checks that were made twice with one result, because two builds of a
// release share a file.
func once(checks []provenance.Check) []provenance.Check {
	var kept []provenance.Check
	for _, c := range checks {
		if !slices.ContainsFunc(kept, func(k provenance.Check) bool {
			return k.What == c.What && k.Result == c.Result && k.Detail == c.Detail
		}) {
			kept = append(kept, c)
		}
	}
	return kept
}

func (r *Report) add(c provenance.Check) { r.Checks = append(r.Checks, c) }

// check adds a check that passes where there is no detail.
func (r *Report) check(what, detail string) bool {
	c := provenance.Check{What: what, Result: provenance.Pass, Detail: detail}
	if detail != "" {
		c.Result = provenance.Fail
	}
	r.add(c)
	return detail == ""
}

// openRelease reads what a folder says it is. A file too many or too few is an
// error: nobody would look at it, or nothing stand for it.
func openRelease(dir string) (*folder, error) {
	opened, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the release: %w", err)
	}
	defer opened.Close()
	entries, err := opened.ReadDir(maxFiles + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the release: %w; give the folder that holds its files", err)
	}
	if len(entries) > maxFiles {
		return nil, fmt.Errorf("%s has more than %d files and is no release", dir, maxFiles)
	}
	var names, statements []string
	for _, e := range entries {
		if !e.Type().IsRegular() {
			return nil, fmt.Errorf("%s is not a regular file, and a release has no others", filepath.Join(dir, e.Name()))
		}
		names = append(names, e.Name())
		if strings.HasSuffix(e.Name(), provenance.StatementSuffix) {
			statements = append(statements, e.Name())
		}
	}
	slices.Sort(names)
	if len(statements) == 0 {
		return nil, fmt.Errorf("%s has no file *%s, and so is no release; 'chrysalis image build' writes one where the source tree is as in its commit", dir, provenance.StatementSuffix)
	}
	slices.Sort(statements)
	rel := &folder{dir: dir}
	want := []string{image.LockName}
	for _, name := range statements {
		s, err := provenance.ReadStatement(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		rel.statements = append(rel.statements, s)
		commit, _ := s.Commit()
		if first, _ := rel.statements[0].Commit(); commit != first {
			return nil, fmt.Errorf("%s is about commit %s, and %s about %s; a release is of one commit", statements[0], first, name, commit)
		}
		p := s.Parameters()
		want = append(append(want, p.Statement()), p.Subjects()...)
	}
	for _, name := range want {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("the release lacks %s, which its provenance calls for", name)
		}
	}
	for _, name := range names {
		if name == BundleName {
			rel.bundle = true
		} else if strings.HasSuffix(name, RecordSuffix) {
			m, err := readRecord(filepath.Join(dir, name))
			if err != nil {
				return nil, err
			}
			rel.records = append(rel.records, m)
		} else if !slices.Contains(want, name) {
			return nil, fmt.Errorf("the release has %s, which its provenance does not name; take it out, or ask the publisher what it is", filepath.Join(dir, name))
		}
	}
	data, err := readBounded(filepath.Join(dir, image.LockName), maxLock)
	if err != nil {
		return nil, err
	}
	if rel.lock, err = image.ParseLock(data); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, image.LockName), err)
	}
	return rel, nil
}

// checkSource compares the working tree with what the release says it was built
// from.
func (a *Auditor) checkSource(ctx context.Context, r *Report, rel *folder) (bool, error) {
	source, err := provenance.ReadSource(ctx, a.Source)
	if err != nil {
		return false, fmt.Errorf("%w; audit in a clone of the repository", err)
	}
	commit, _ := rel.statements[0].Commit()
	detail := ""
	if slices.ContainsFunc(rel.statements, func(s *provenance.Statement) bool { _, dirty := s.Commit(); return dirty }) {
		detail = "its provenance says that it was built from files that are not those of the commit: nobody can build it again"
	}
	same := r.check("release is built from a commit as it is", detail)
	same = a.checkTree(r, source, commit, "release") && same
	lock, err := image.ReadLock(a.Source)
	if err != nil {
		return false, err
	}
	detail = ""
	if changes := image.Diff(lock, rel.lock); !bytes.Equal(lock.Encode(), rel.lock.Encode()) {
		detail = fmt.Sprintf("%d changes from the working tree's to the release's", len(changes))
		if len(changes) > 0 {
			detail += fmt.Sprintf(", the first: %s", changes[0])
		}
	}
	return r.check(image.LockName+" is the working tree's", detail) && same, nil
}

// checkTree compares the working tree with the commit of what is audited.
func (a *Auditor) checkTree(r *Report, source provenance.Source, commit, what string) bool {
	detail := ""
	if source.Commit != commit {
		detail = fmt.Sprintf("the working tree is at %s; check the %s's commit out with 'git -C %s checkout --detach %s' (after 'git fetch', if git does not know it), read it, and build the audit from it", source.Commit, what, a.Source, commit)
	}
	same := r.check("working tree is at the "+what+"'s commit", detail)
	detail = ""
	if source.Dirty() {
		detail = fmt.Sprintf("not as in the commit: %s; move such files away, or audit in a fresh clone", strings.Join(source.Changed, ", "))
	}
	return r.check("working tree has nothing but the commit", detail) && same
}

// builds is the check of one rebuilt file.
func builds(name string) string { return name + " is what the working tree makes" }

// skip notes what is not built because the source is another.
func skip(r *Report, rel *folder) {
	names := rel.subjects()
	if rel.bundle {
		names = append(names, BundleName)
	}
	for _, name := range names {
		r.add(provenance.Check{What: builds(name), Result: provenance.None, Detail: "not built: the source is another"})
	}
}

// rebuild builds all that the release has into a folder and compares it.
func (a *Auditor) rebuild(ctx context.Context, r *Report, rel *folder, dir string) error {
	detail := ""
	for _, s := range rel.statements {
		made, err := a.Build(ctx, dir, s.Parameters())
		if err != nil {
			return fmt.Errorf("build the release again: %w", err)
		}
		if is := s.Predicate.RunDetails.Builder.Version.Tools; is != made.Tools {
			detail = fmt.Sprintf("the release's is %s, the working tree's %s", is, made.Tools)
		}
	}
	r.check("tools root is the working tree's", detail)
	for _, name := range rel.subjects() {
		c, err := compare(ctx, builds(name), filepath.Join(rel.dir, name), filepath.Join(dir, name))
		if err != nil {
			return err
		}
		r.add(c)
	}
	if rel.bundle {
		path := filepath.Join(dir, BundleName)
		if err := a.Bundle(ctx, path); err != nil {
			return fmt.Errorf("make the bundle again: %w", err)
		}
		c, err := compare(ctx, builds(BundleName), filepath.Join(rel.dir, BundleName), path)
		if err != nil {
			return err
		}
		r.add(c)
	}
	c, err := a.checkExpected(rel)
	if err != nil {
		return err
	}
	r.add(c)
	if len(rel.records) == 0 {
		r.add(provenance.Check{What: "measurement record", Result: provenance.None, Detail: "no record in the release"})
	}
	for _, m := range rel.records {
		c, err := a.checkRecord(ctx, m, dir, rel.parameters(m.file))
		if err != nil {
			return err
		}
		r.add(c)
	}
	commit, _ := rel.statements[0].Commit()
	return a.checkStayed(ctx, r, commit)
}

// checkStayed checks that the working tree is still what was built from.
func (a *Auditor) checkStayed(ctx context.Context, r *Report, commit string) error {
	after, err := provenance.ReadSource(ctx, a.Source)
	if err != nil {
		return err
	}
	detail := ""
	if after.Commit != commit || after.Dirty() {
		detail = "it changed while the release was built again; repeat the audit"
	}
	r.check("working tree stayed as it was", detail)
	return nil
}

// checkExpected compares the release with the hashes that its commit expects.
func (a *Auditor) checkExpected(rel *folder) (provenance.Check, error) {
	c := provenance.Check{What: release.Name + " of the working tree expects these artefacts", Result: provenance.Pass}
	expected, err := release.Read(a.Source)
	if errors.Is(err, fs.ErrNotExist) {
		c.Result, c.Detail = provenance.None, "the commit has no "+release.Name
		return c, nil
	}
	if err != nil {
		return c, err
	}
	named := map[string]string{}
	for _, s := range rel.statements {
		for _, subject := range s.Subject {
			named[subject.Name] = subject.Digest.SHA256
		}
	}
	found := 0
	for _, f := range expected.Artefacts {
		switch sum, ok := named[f.Name]; {
		case ok && sum != f.SHA256:
			c.Result, c.Detail = provenance.Fail, fmt.Sprintf("of %s it expects the SHA-256 %s, the release's is %s", f.Name, f.SHA256, sum)
			return c, nil
		case ok:
			found++
		}
	}
	if found == 0 {
		c.Result, c.Detail = provenance.None, "it is about none of them"
	}
	return c, nil
}

// compare says whether two files are the same and, if not, why.
func compare(ctx context.Context, what, released, made string) (provenance.Check, error) {
	c := provenance.Check{What: what, Result: provenance.Pass}
	a, _, errA := image.HashFile(released)
	b, _, errB := image.HashFile(made)
	if err := errors.Join(errA, errB); err != nil {
		return c, err
	}
	if a == b {
		return c, nil
	}
	c.Result, c.Detail = provenance.Fail, fmt.Sprintf("the release's SHA-256 is %s, the rebuilt one's %s", a, b)
	switch name := filepath.Base(released); {
	case strings.HasSuffix(name, provenance.SBOMSuffix), strings.HasSuffix(name, provenance.ManifestSuffix):
		line, err := textDifference(released, made)
		if err != nil {
			return c, err
		}
		c.Detail += "; " + line
	case name != BundleName:
		// A release that cannot be read as what it should be is no reason to stop.
		found, err := inspect.Diff(ctx, released, made, false)
		if ctx.Err() != nil {
			return c, ctx.Err()
		}
		if err != nil {
			c.Detail += fmt.Sprintf("; no more can be told: %v", err)
		}
		c.Differences = found
	}
	return c, nil
}

// textDifference names the first line in which two texts differ.
func textDifference(a, b string) (string, error) {
	x, errX := readBounded(a, maxText)
	y, errY := readBounded(b, maxText)
	if err := errors.Join(errX, errY); err != nil {
		return err.Error(), nil
	}
	left, right := bufio.NewReader(bytes.NewReader(x)), bufio.NewReader(bytes.NewReader(y))
	for n := 1; ; n++ {
		one, errOne := left.ReadString('\n')
		other, errOther := right.ReadString('\n')
		if one != other {
			// A line may be very long: begin shortly before the difference.
			at := 0
			for at < len(one) && at < len(other) && one[at] == other[at] {
				at++
			}
			at = max(0, at-40)
			return fmt.Sprintf("line %d is %s in the release, %s in the rebuilt one", n, excerpt(one[at:]), excerpt(other[at:])), nil
		}
		if errOne != nil || errOther != nil {
			return "", errors.New("two texts changed while they were compared")
		}
	}
}

func excerpt(line string) string {
	line = strings.TrimSpace(line)
	if len(line) > 120 {
		line = line[:120] + "…"
	}
	return fmt.Sprintf("%q", line)
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}
