// Package provenance says what an image was made of, from which source, and by
// what: a CycloneDX SBOM beside each artefact, and for all of them an in-toto
// statement with a SLSA v1 provenance predicate.
//
// None of these is signed, and none is believed: whoever has them checks them
// against the files and, with package audit, against a build of their own. To
// make that possible they hold no time, no host and no name of whoever built:
// the same commit gives the same bytes.
//
// The statement is written with plain structs and not with the in-toto
// project's Go module, whose types are protocol buffers: their JSON has no fixed
// form, and reading it takes duplicate keys. Here a statement has one form.
package provenance

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"chrysalis/image"
	"chrysalis/models"
	"chrysalis/outfile"
)

// Types and names in a statement.
const (
	statementType = "https://in-toto.io/Statement/v1"    // in-toto attestation framework, Statement v1
	predicateType = "https://slsa.dev/provenance/v1"     // SLSA 1.0, Provenance
	buildType     = "urn:chrysalis:build:image:2"        // 'chrysalis image build'
	builderID     = "urn:chrysalis:builder:unattested:1" // whoever ran it: nobody vouches for them
	sourceName    = "source"
)

// What the files of a release are called.
const (
	SBOMSuffix      = ".cdx.json"
	StatementSuffix = ".provenance.json"
	ManifestSuffix  = ".manifest.json"
	imageTree       = "image"
	imageName       = "chrysalis"
)

// MaxStatement bounds a statement, in bytes.
const MaxStatement = 64 << 10

// A Statement is an in-toto Statement v1 with a SLSA v1 provenance predicate.
type Statement struct {
	Type          string     `json:"_type"`
	Subject       []Resource `json:"subject"` // artefacts and SBOMs, sorted by name
	PredicateType string     `json:"predicateType"`
	Predicate     Predicate  `json:"predicate"`
}

// A Resource is an in-toto ResourceDescriptor.
type Resource struct {
	Name        string       `json:"name"`
	Digest      Digest       `json:"digest"`
	Annotations *Annotations `json:"annotations,omitempty"`
}

// A Digest is an in-toto DigestSet with one of these, in hexadecimal.
type Digest struct {
	SHA256    string `json:"sha256,omitempty"`
	GitCommit string `json:"gitCommit,omitempty"`
}

// Annotations are there only where a build was made from files that are not
// those of the commit.
type Annotations struct {
	Dirty bool `json:"dirty"`
}

// A Predicate is SLSA v1 provenance.
type Predicate struct {
	BuildDefinition BuildDefinition `json:"buildDefinition"`
	RunDetails      RunDetails      `json:"runDetails"`
}

// A BuildDefinition tells all that the outputs depend on.
type BuildDefinition struct {
	BuildType            string     `json:"buildType"`
	ExternalParameters   Parameters `json:"externalParameters"`
	ResolvedDependencies []Resource `json:"resolvedDependencies"` // the source, image.lock
}

// Parameters are what was asked of 'chrysalis image build'.
type Parameters struct {
	Profile string   `json:"profile"` // "" for the image that is published
	Engines []string `json:"engines"` // sorted
	Models  []string `json:"models"`  // folders under models/, sorted
}

// RunDetails tell by what it was built.
type RunDetails struct {
	Builder Builder `json:"builder"`
}

// A Builder is known by what it runs.
type Builder struct {
	ID      string   `json:"id"`
	Version Versions `json:"version"`
}

// Versions are a builder's parts.
type Versions struct {
	Go    string `json:"go"`        // "go1.26.8"
	Tools string `json:"toolsRoot"` // key of the tools root, 16 hexadecimal digits
}

var (
	// parameterRE is a profile, an engine or a model, which are names of files here.
	parameterRE = regexp.MustCompile(`^[a-z0-9][a-z0-9._+-]{0,63}$`)
	sha256RE    = regexp.MustCompile(`^[0-9a-f]{64}$`)
	goRE        = regexp.MustCompile(`^go1\.[0-9a-z.]{1,16}$`)
	toolsRE     = regexp.MustCompile(`^[0-9a-f]{16}$`)
)

const maxDisks = 16 // engines, and models

// NewParameters returns what 'chrysalis image build' was asked for, in the form
// that a statement has.
func NewParameters(profile string, engines, models []string) (Parameters, error) {
	set := func(names []string) []string {
		names = append([]string{}, names...)
		slices.Sort(names)
		return slices.Compact(names)
	}
	p := Parameters{profile, set(engines), set(models)}
	return p, p.check()
}

// check refuses parameters that name no files.
func (p Parameters) check() error {
	if p.Profile != "" && !parameterRE.MatchString(p.Profile) {
		return fmt.Errorf("%q is not a profile's name", p.Profile)
	}
	for _, disks := range []struct {
		kind, article string
		names         []string
	}{{"engine", "an engine", p.Engines}, {"model", "a model", p.Models}} {
		if len(disks.names) > maxDisks {
			return fmt.Errorf("it has %d %ss, at most %d are allowed", len(disks.names), disks.kind, maxDisks)
		}
		for i, name := range disks.names {
			switch {
			case !parameterRE.MatchString(name):
				return fmt.Errorf("%q is not the name of %s", name, disks.article)
			case i > 0 && disks.names[i-1] >= name:
				return fmt.Errorf("%s %s is there twice or out of order", disks.kind, name)
			case disks.kind == "model" && slices.Contains(p.Engines, name):
				return fmt.Errorf("an engine and a model are both called %s, and so would their disks be", name)
			}
		}
	}
	return nil
}

// Image is the name of the image that the parameters make.
func (p Parameters) Image() string {
	if p.Profile == "" {
		return imageName
	}
	return imageName + "-" + p.Profile
}

// UKI is the file name of the image.
func (p Parameters) UKI() string { return p.Image() + ".efi" }

// Statement is the file name of the statement.
func (p Parameters) Statement() string { return p.Image() + StatementSuffix }

// Artefacts are the names of what is built, sorted: the image, the disks and, for
// each engine that has models to serve, a manifest.
func (p Parameters) Artefacts() []string {
	names := p.packaged()
	for _, model := range p.Models {
		names = append(names, modelDisk(model), modelDisk(model)+models.FragmentSuffix)
	}
	names = append(names, p.Manifests()...)
	slices.Sort(names)
	return names
}

// Manifests are the names of the manifests, in the order of the engines.
func (p Parameters) Manifests() []string {
	var names []string
	for _, engine := range p.Engines {
		if len(p.Models) > 0 {
			names = append(names, manifestFile(engine))
		}
	}
	return names
}

// packaged are the artefacts that are made of packages.
func (p Parameters) packaged() []string {
	names := []string{p.UKI()}
	for _, engine := range p.Engines {
		names = append(names, engineDisk(engine))
	}
	return names
}

// Subjects are the names of all that a statement is about, sorted.
func (p Parameters) Subjects() []string {
	names := p.Artefacts()
	for _, name := range p.packaged() {
		names = append(names, name+SBOMSuffix)
	}
	slices.Sort(names)
	return names
}

func engineDisk(engine string) string   { return engine + ".disk" }
func modelDisk(model string) string     { return model + ".disk" }
func manifestFile(engine string) string { return engine + ManifestSuffix }

// A Build is what there is to say about artefacts that were built.
type Build struct {
	Parameters
	Lock   *image.Lock
	Tools  string // key of the tools root
	Source Source
}

// WriteSBOMs writes an SBOM beside each artefact in the folder.
func (b Build) WriteSBOMs(dir string) error {
	if err := b.check(); err != nil {
		return err
	}
	trees := map[string]string{b.UKI(): imageTree}
	for _, engine := range b.Engines {
		trees[engineDisk(engine)] = "engine/" + engine
	}
	for _, name := range b.packaged() {
		sum, _, err := image.HashFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		bom, err := SBOM(b.Lock, trees[name], name, sum)
		if err != nil {
			return err
		}
		if err := outfile.Write(filepath.Join(dir, name+SBOMSuffix), bom, 0o644); err != nil {
			return fmt.Errorf("write the SBOM of %s: %w", name, err)
		}
	}
	return nil
}

// WriteStatement writes the statement about the artefacts and SBOMs in the
// folder, and the lock that it names, and returns its path. With these the folder
// is a release.
func (b Build) WriteStatement(dir string) (string, error) {
	lockSum := sha256.Sum256(b.Lock.Encode())
	source := Resource{Name: sourceName, Digest: Digest{GitCommit: b.Source.Commit}}
	if b.Source.Dirty() {
		source.Annotations = &Annotations{Dirty: true}
	}
	s := Statement{Type: statementType, PredicateType: predicateType, Predicate: Predicate{
		BuildDefinition: BuildDefinition{
			BuildType:          buildType,
			ExternalParameters: Parameters{b.Profile, append([]string{}, b.Engines...), append([]string{}, b.Models...)},
			ResolvedDependencies: []Resource{
				source, {Name: image.LockName, Digest: Digest{SHA256: hex.EncodeToString(lockSum[:])}},
			},
		},
		RunDetails: RunDetails{Builder{builderID, Versions{Go: b.Lock.Go.Toolchain, Tools: b.Tools}}},
	}}
	for _, name := range b.Subjects() {
		sum, _, err := image.HashFile(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		s.Subject = append(s.Subject, Resource{Name: name, Digest: Digest{SHA256: sum}})
	}
	data := s.Encode()
	// What is written can be read.
	if _, err := ParseStatement(data); err != nil {
		return "", err
	}
	if err := image.WriteLock(dir, b.Lock); err != nil {
		return "", err
	}
	path := filepath.Join(dir, b.Statement())
	if err := outfile.Write(path, data, 0o644); err != nil {
		return "", fmt.Errorf("write the provenance: %w", err)
	}
	return path, nil
}

// Encode returns the one form that a statement has.
func (s *Statement) Encode() []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s); err != nil {
		panic(err) // plain structs of strings
	}
	return b.Bytes()
}

// ReadStatement reads and checks the statement at path.
func ReadStatement(path string) (*Statement, error) {
	info, err := os.Lstat(path) // before it is opened: a pipe would block
	if err != nil {
		return nil, fmt.Errorf("read the provenance: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the provenance: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxStatement+1))
	if err != nil {
		return nil, fmt.Errorf("read the provenance: %w", err)
	}
	s, err := ParseStatement(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// ParseStatement reads a statement, strictly: it is the one that Encode writes,
// of the types above, and about exactly the files that its parameters make.
func ParseStatement(data []byte) (*Statement, error) {
	if len(data) > MaxStatement {
		return nil, fmt.Errorf("a statement of more than %d bytes is not one of ours", MaxStatement)
	}
	var s Statement
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return nil, fmt.Errorf("not a provenance statement: %w", readable(err))
	}
	def, builder := &s.Predicate.BuildDefinition, s.Predicate.RunDetails.Builder
	for _, v := range []struct{ what, is, want string }{
		{"_type", s.Type, statementType}, {"predicateType", s.PredicateType, predicateType},
		{"buildType", def.BuildType, buildType}, {"builder", builder.ID, builderID},
	} {
		if v.is != v.want {
			return nil, fmt.Errorf("its %s is %q, this program reads %q", v.what, v.is, v.want)
		}
	}
	if err := def.ExternalParameters.check(); err != nil {
		return nil, err
	}
	var names []string
	for _, r := range s.Subject {
		names = append(names, r.Name)
		if !sha256RE.MatchString(r.Digest.SHA256) || r.Digest.GitCommit != "" || r.Annotations != nil {
			return nil, fmt.Errorf("subject %q must have a SHA-256 and nothing else", r.Name)
		}
	}
	if want := def.ExternalParameters.Subjects(); !slices.Equal(names, want) {
		return nil, fmt.Errorf("its subjects are %q, and its parameters make %q", names, want)
	}
	switch deps := def.ResolvedDependencies; {
	case len(deps) != 2 || deps[0].Name != sourceName || deps[1].Name != image.LockName:
		return nil, fmt.Errorf("its dependencies must be %q and %q", sourceName, image.LockName)
	case !commitRE.MatchString(deps[0].Digest.GitCommit) || deps[0].Digest.SHA256 != "":
		return nil, errors.New("its source must be fixed by a commit and nothing else")
	case deps[0].Annotations != nil && !deps[0].Annotations.Dirty:
		return nil, errors.New("its source says of itself that it is not dirty, which goes without saying")
	case !sha256RE.MatchString(deps[1].Digest.SHA256) || deps[1].Digest.GitCommit != "" || deps[1].Annotations != nil:
		return nil, fmt.Errorf("its %s must be fixed by a SHA-256 and nothing else", image.LockName)
	case !goRE.MatchString(builder.Version.Go):
		return nil, fmt.Errorf("%q is not a Go toolchain", builder.Version.Go)
	case !toolsRE.MatchString(builder.Version.Tools):
		return nil, fmt.Errorf("%q is not the key of a tools root", builder.Version.Tools)
	}
	if want := s.Encode(); !bytes.Equal(want, data) {
		return nil, fmt.Errorf("line %d is not as 'chrysalis image build' writes it", firstLine(want, data))
	}
	return &s, nil
}

// readable takes the names of Go's types out of an error about JSON.
func readable(err error) error {
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%s is a JSON %s", wrong.Field, wrong.Value)
	}
	return errors.New(strings.TrimPrefix(err.Error(), "json: "))
}

// firstLine is the number of the first line in which two texts differ.
func firstLine(a, b []byte) int {
	at := 0
	for at < len(a) && at < len(b) && a[at] == b[at] {
		at++
	}
	return 1 + bytes.Count(b[:at], []byte("\n"))
}

// Commit is what the statement says the source is.
func (s *Statement) Commit() (commit string, dirty bool) {
	source := s.Predicate.BuildDefinition.ResolvedDependencies[0]
	return source.Digest.GitCommit, source.Annotations != nil
}

// LockSHA256 is the hash of the lock that the statement names.
func (s *Statement) LockSHA256() string {
	return s.Predicate.BuildDefinition.ResolvedDependencies[1].Digest.SHA256
}

// Parameters are what was built.
func (s *Statement) Parameters() Parameters {
	return s.Predicate.BuildDefinition.ExternalParameters
}
