package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"chrysalis/image"
	"chrysalis/image/provenance"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
	"chrysalis/verity"
)

// RecordSuffix ends the name of a measurement record in a release.
const RecordSuffix = ".record.json"

// A measured is a measurement record and where it is from.
type measured struct {
	name string
	data []byte
	file *record.File
}

func readRecord(path string) (measured, error) {
	data, err := readBounded(path, record.MaxFile)
	if err != nil {
		return measured{}, err
	}
	f, err := record.ParseFile(data)
	if err != nil {
		return measured{}, fmt.Errorf("%s: %w", path, err)
	}
	return measured{filepath.Base(path), data, f}, nil
}

// AuditRecord checks a measurement record by itself: it builds the image, the
// engines and the models that the record is about from the working tree, which
// must be at the record's commit, and predicts the record from them.
func (a *Auditor) AuditRecord(ctx context.Context, path string) (*Report, error) {
	m, err := readRecord(path)
	if err != nil {
		return nil, err
	}
	made, done, err := a.workspace()
	if err != nil {
		return nil, err
	}
	defer done()
	r := &Report{Commit: m.file.Image.Commit}
	source, err := provenance.ReadSource(ctx, a.Source)
	if err != nil {
		return nil, fmt.Errorf("%w; audit in a clone of the repository", err)
	}
	if a.checkTree(r, source, r.Commit, "record") {
		p, err := a.parameters(m.file)
		if err != nil {
			return nil, err
		}
		if _, err := a.Build(ctx, made, p); err != nil {
			return nil, fmt.Errorf("build what the record is about: %w", err)
		}
		c, err := a.checkRecord(ctx, m, made, p)
		if err != nil {
			return nil, err
		}
		r.add(c)
		if err := a.checkStayed(ctx, r, r.Commit); err != nil {
			return nil, err
		}
	} else {
		r.add(provenance.Check{What: predicts(m.name), Result: provenance.None, Detail: "not built: the source is another"})
	}
	r.OK = provenance.Passed(r.Checks)
	return r, nil
}

// parameters are what must be built to predict a record.
func (a *Auditor) parameters(f *record.File) (provenance.Parameters, error) {
	profile, ok := strings.CutPrefix(f.Image.Name, "chrysalis-")
	if !ok && f.Image.Name != "chrysalis" {
		return provenance.Parameters{}, fmt.Errorf("the record is of an image %q, which this source does not make", f.Image.Name)
	}
	if !ok {
		profile = ""
	}
	var engines, models []string
	for _, e := range f.Engines {
		engines = append(engines, e.Name)
	}
	if len(f.Models) > 0 {
		// Which of the tree's models they are is known by their root hashes.
		found, err := filepath.Glob(filepath.Join(a.Source, "models", "*", "model.json"))
		if err != nil {
			return provenance.Parameters{}, err
		}
		for _, path := range found {
			models = append(models, filepath.Base(filepath.Dir(path)))
		}
	}
	return provenance.NewParameters(profile, engines, models)
}

// predicts is the check of one record.
func predicts(name string) string { return name + " is what the rebuilt artefacts measure" }

// checkRecord compares a record with what is predicted from the artefacts that
// were rebuilt into a folder.
func (a *Auditor) checkRecord(ctx context.Context, m measured, dir string, p provenance.Parameters) (provenance.Check, error) {
	c := provenance.Check{What: predicts(m.name), Result: provenance.Pass}
	fail := func(format string, args ...any) (provenance.Check, error) {
		c.Result, c.Detail = provenance.Fail, fmt.Sprintf(format, args...)
		return c, nil
	}
	f := m.file
	if f.Image.Boot != record.BootKernel {
		c.Result = provenance.None
		c.Detail = "it is of an exported disk, which a release does not have; export it and compare with 'chrysalis measure --boot disk'"
		return c, nil
	}
	data, err := os.ReadFile(filepath.Join(a.Source, image.LockName))
	if err != nil {
		return c, err
	}
	lock, err := image.ParseLock(data)
	if err != nil {
		return c, err
	}
	tools, err := image.OpenTools(lock)
	if err != nil {
		return c, err
	}
	disks := map[string]string{} // paths by root hash
	for _, name := range p.Artefacts() {
		if filepath.Ext(name) != ".disk" {
			continue
		}
		root, err := rootHash(filepath.Join(dir, name))
		if err != nil {
			return c, err
		}
		disks[root] = filepath.Join(dir, name)
	}
	o := plan.Options{
		Platform: f.Image.Platform, Boot: f.Image.Boot, Image: filepath.Join(dir, p.UKI()), ExitFailures: -1,
		Commit: f.Image.Commit, Lock: data, Tools: tools,
	}
	for _, s := range f.Shapes {
		o.Shapes = append(o.Shapes, s.Name)
	}
	if len(f.Engines) > 1 {
		return fail("it has %d engines, and a record is made with one", len(f.Engines))
	}
	for _, e := range f.Engines {
		if o.Engine = disks[e.RootHash.String()]; o.Engine == "" {
			return fail("no rebuilt disk has the root hash %s of the engine %s", e.RootHash, e.Name)
		}
	}
	for _, model := range f.Models {
		path := disks[model.RootHash.String()]
		if path == "" {
			return fail("no rebuilt disk has the root hash %s of the model %s", model.RootHash, model.ID())
		}
		o.Models = append(o.Models, path)
	}
	result, err := plan.Run(ctx, o)
	if ctx.Err() != nil {
		return c, ctx.Err()
	}
	if err != nil {
		return fail("it cannot be predicted: %v", err)
	}
	want, err := result.File.Encode()
	if err != nil {
		return c, err
	}
	if !bytes.Equal(want, m.data) {
		return fail("%s", difference(m.data, want))
	}
	return c, nil
}

func rootHash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	d, err := verity.OpenDisk(f, info.Size())
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return d.RootHash.String(), nil
}

// difference names the first value in which two records differ.
func difference(is, want []byte) string {
	var a, b any
	if json.Unmarshal(is, &a) != nil || json.Unmarshal(want, &b) != nil {
		return "it differs"
	}
	path, left, right := walk("", a, b)
	return fmt.Sprintf("%s is %s, predicted %s", strings.TrimPrefix(path, "."), left, right)
}

// walk finds the first difference of two values, and shows both.
func walk(path string, a, b any) (string, string, string) {
	switch x := a.(type) {
	case map[string]any:
		if y, ok := b.(map[string]any); ok {
			var keys []string
			for k := range x {
				keys = append(keys, k)
			}
			for k := range y {
				keys = append(keys, k)
			}
			slices.Sort(keys)
			for _, k := range slices.Compact(keys) {
				if !reflect.DeepEqual(x[k], y[k]) {
					return walk(path+"."+k, x[k], y[k])
				}
			}
		}
	case []any:
		if y, ok := b.([]any); ok {
			for i := range min(len(x), len(y)) {
				if !reflect.DeepEqual(x[i], y[i]) {
					return walk(fmt.Sprintf("%s[%d]", path, i), x[i], y[i])
				}
			}
			return path, fmt.Sprintf("%d long", len(x)), fmt.Sprintf("%d", len(y))
		}
	}
	show := func(v any) string {
		if v == nil {
			return "not there"
		}
		text, _ := json.Marshal(v)
		return excerpt(string(text))
	}
	return path, show(a), show(b)
}
