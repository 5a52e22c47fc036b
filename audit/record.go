package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

// anyEngine is the one that models are looked at with whose record names none.
const anyEngine = "llama.cpp"

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
	return a.rebuildFor(ctx, m.file, predicts(m.name), func(dir string, p provenance.Parameters) ([]provenance.Check, error) {
		c, err := a.checkRecord(ctx, m, dir, p)
		return []provenance.Check{c}, err
	})
}

// AuditRecords checks single records, such as registries have: at most one image, and
// shapes of it, engines and models. Shapes alone need their image besides, of; without
// an image or shapes the working tree is taken as it is at its commit, since nothing
// else says where an engine or a model is from. A record passes if what is built is
// predicted to have exactly it.
func (a *Auditor) AuditRecords(ctx context.Context, records []record.Record, of *record.Image) (*Report, error) {
	f := &record.File{Version: record.Version}
	if of != nil {
		f.Image = *of
	}
	for _, r := range records {
		switch r := r.(type) {
		case *record.Image:
			if of != nil && of.Key() != r.Key() || f.Image.Version != 0 && of == nil {
				return nil, errors.New("the records are of more than one image; audit one at a time")
			}
			f.Image = *r
		case *record.Shape:
			f.Shapes = append(f.Shapes, *r)
		case *record.Engine:
			f.Engines = append(f.Engines, *r)
		case *record.Model:
			f.Models = append(f.Models, *r)
		}
	}
	if f.Image.Version == 0 {
		if len(f.Shapes) > 0 {
			return nil, errors.New("the image of the shapes is missing")
		}
		source, err := provenance.ReadSource(ctx, a.Source)
		if err != nil {
			return nil, fmt.Errorf("%w; audit in a clone of the repository", err)
		}
		f.Image = record.Image{Name: "chrysalis", Platform: record.TPM, Boot: record.BootKernel, Commit: source.Commit}
	}
	key := f.Image.Key()
	for _, s := range f.Shapes {
		if !bytes.Equal(s.Image, key[:]) {
			return nil, fmt.Errorf("the shape %s is of the image %s, and not of %x", s.Name, s.Image, key)
		}
	}
	return a.rebuildFor(ctx, f, "records are what the rebuilt artefacts measure", func(dir string, p provenance.Parameters) ([]provenance.Check, error) {
		result, fault, err := a.predict(ctx, f, dir, p)
		if err != nil {
			return nil, err
		}
		var checks []provenance.Check
		for _, r := range records {
			c := provenance.Check{What: predicts(fmt.Sprintf("%s %x", r.RecordKind(), r.Key())), Result: fault.Result, Detail: fault.Detail}
			if fault.Result == provenance.Pass {
				c.Detail = compareRecord(r, f, result)
				if c.Detail != "" {
					c.Result = provenance.Fail
				}
			}
			checks = append(checks, c)
		}
		return checks, nil
	})
}

// compareRecord says in what a record differs from what was predicted, or nothing. What
// was predicted has engines, models and shapes in the order of the file that asked.
func compareRecord(r record.Record, f, predicted *record.File) string {
	var made record.Record
	switch r := r.(type) {
	case *record.Image:
		made = &predicted.Image
	case *record.Shape:
		for i := range predicted.Shapes {
			if predicted.Shapes[i].Name == r.Name {
				made = &predicted.Shapes[i]
			}
		}
		if r.Disks != 2+max(len(f.Models), 1) {
			return fmt.Sprintf("it is of a VM with %d disks; audit it in one file with the engine and the models", r.Disks)
		}
	case *record.Engine:
		for i := range predicted.Engines {
			if bytes.Equal(predicted.Engines[i].RootHash, r.RootHash) {
				made = &predicted.Engines[i]
			}
		}
	case *record.Model:
		for i := range predicted.Models {
			if bytes.Equal(predicted.Models[i].RootHash, r.RootHash) {
				made = &predicted.Models[i]
			}
		}
	}
	if made == nil {
		return "nothing like it is predicted"
	}
	is, err := record.Encode(r)
	if err != nil {
		return err.Error()
	}
	want, err := record.Encode(made)
	if err != nil {
		return err.Error()
	}
	if !bytes.Equal(is, want) {
		return difference(is, want)
	}
	return ""
}

// rebuildFor builds what a record is about and checks it; the checks are named what
// where nothing is built.
func (a *Auditor) rebuildFor(ctx context.Context, f *record.File, what string, check func(dir string, p provenance.Parameters) ([]provenance.Check, error)) (*Report, error) {
	made, done, err := a.workspace()
	if err != nil {
		return nil, err
	}
	defer done()
	r := &Report{Commit: f.Image.Commit}
	source, err := provenance.ReadSource(ctx, a.Source)
	if err != nil {
		return nil, fmt.Errorf("%w; audit in a clone of the repository", err)
	}
	if a.checkTree(r, source, r.Commit, "record") {
		p, err := a.parameters(f)
		if err != nil {
			return nil, err
		}
		if _, err := a.Build(ctx, made, p); err != nil {
			return nil, fmt.Errorf("build what the record is about: %w", err)
		}
		checks, err := check(made, p)
		if err != nil {
			return nil, err
		}
		for _, c := range checks {
			r.add(c)
		}
		if err := a.checkStayed(ctx, r, r.Commit); err != nil {
			return nil, err
		}
	} else {
		r.add(provenance.Check{What: what, Result: provenance.None, Detail: "not built: the source is another"})
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
	if len(f.Models) > 0 && len(engines) == 0 {
		engines = []string{anyEngine}
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
	predicted, c, err := a.predict(ctx, m.file, dir, p)
	c.What = predicts(m.name)
	if err != nil || c.Result != provenance.Pass {
		return c, err
	}
	want, err := predicted.Encode()
	if err != nil {
		return c, err
	}
	if !bytes.Equal(want, m.data) {
		c.Result, c.Detail = provenance.Fail, difference(m.data, want)
	}
	return c, nil
}

// predict predicts a record from the artefacts that were rebuilt into a folder. The
// check passes, or says why there is no prediction.
func (a *Auditor) predict(ctx context.Context, f *record.File, dir string, p provenance.Parameters) (*record.File, provenance.Check, error) {
	c := provenance.Check{Result: provenance.Pass}
	fail := func(format string, args ...any) (*record.File, provenance.Check, error) {
		c.Result, c.Detail = provenance.Fail, fmt.Sprintf(format, args...)
		return nil, c, nil
	}
	if f.Image.Boot != record.BootKernel {
		c.Result = provenance.None
		c.Detail = "it is of an exported disk, which a release does not have; export it and compare with 'chrysalis measure --boot disk'"
		return nil, c, nil
	}
	data, err := os.ReadFile(filepath.Join(a.Source, image.LockName))
	if err != nil {
		return nil, c, err
	}
	lock, err := image.ParseLock(data)
	if err != nil {
		return nil, c, err
	}
	tools, err := image.OpenTools(lock)
	if err != nil {
		return nil, c, err
	}
	disks := map[string]string{} // paths by root hash
	for _, name := range p.Artefacts() {
		if filepath.Ext(name) != ".disk" {
			continue
		}
		root, err := rootHash(filepath.Join(dir, name))
		if err != nil {
			return nil, c, err
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
	if len(f.Models) > 0 && o.Engine == "" {
		o.Engine = filepath.Join(dir, anyEngine+".disk")
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
		return nil, c, ctx.Err()
	}
	if err != nil {
		return fail("it cannot be predicted: %v", err)
	}
	return result.File, c, nil
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
