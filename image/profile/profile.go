// Package profile reads an engine's profile: the file on an engine disk that
// says how the engine is started. It is covered by the disk's root hash, so a
// client that approves the disk has approved it too; what the manifest adds are
// integers within the profile's bounds and nothing else.
package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"chrysalis/canonical"
	"chrysalis/manifest"
	"chrysalis/models/card"
)

// Path is where an engine disk carries its profile.
const Path = "chrysalis/profile.json"

// MaxSize is the largest profile, in bytes.
const MaxSize = 64 << 10

// Paths inside the engine's root that the agent provides.
const (
	SocketPath = "/run/engine/engine.sock" // the engine's only door
	ModelsDir  = "/models"                 // a model is mounted at ModelsDir/ORG/NAME
)

// Profile is how an engine is run: one process for each model, which sees that
// model only.
type Profile struct {
	Version      int                  `json:"version"` // 1
	Name         string               `json:"name"`
	Argv         []Args               `json:"argv"`
	Environment  map[string]string    `json:"environment"` // the whole of it
	Parameters   map[string]Parameter `json:"parameters"`
	Formats      []string             `json:"formats"`       // of weights that it reads, as package card names them
	Needs        Needs                `json:"needs"`         // what the VM must have
	Loopback     bool                 `json:"loopback"`      // its own processes talk over 127.0.0.1, which nothing else can reach
	Cache        string               `json:"cache"`         // CacheNone
	Status       string               `json:"status"`        // Tested or Untested
	Health       string               `json:"health"`        // path that answers 200 once requests are taken
	ReadySeconds int                  `json:"ready_seconds"` // until then
	Seccomp      []string             `json:"seccomp"`       // system calls beside the agent's own list
}

// CacheNone says that an engine run as its profile says keeps nothing of a request
// for the next: what one client has asked cannot be told from how fast another is
// answered. There is no other kind yet.
const CacheNone = "none"

// What a profile's status can be: whether this engine has been run in a VM as the
// profile says, or has not.
const (
	Tested   = "tested"
	Untested = "untested"
)

// Args are consecutive arguments. Each may be one placeholder, or hold several:
// ${socket}, ${model_dir}, ${model_file} (the file that an engine opens, of a GGUF
// model), ${model_name}, or ${NAME} of a parameter. With If, they are left out
// while that parameter is zero.
type Args struct {
	If   string   `json:"if,omitempty"`
	Args []string `json:"args"`
}

// Parameter is an integer that a manifest may set.
type Parameter struct {
	Min     int64 `json:"min"`
	Max     int64 `json:"max"`
	Default int64 `json:"default"`
	// From, if set, is what the default is taken from, within the bounds: "cpus" is
	// the number of the VM's processors, "gpus" that of its GPUs.
	From string `json:"default_from,omitempty"`
}

// Needs are what an engine cannot work without.
type Needs struct {
	MemoryMiB int   `json:"memory_mib"` // beside the weights
	GPUs      Range `json:"gpus"`
}

// Range is an inclusive range.
type Range struct {
	Min int `json:"min"`
	Max int `json:"max"`
}

var (
	nameRE        = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	parameterRE   = regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}$`)
	variableRE    = regexp.MustCompile(`^[A-Z_][A-Z0-9_]{0,63}$`)
	placeholderRE = regexp.MustCompile(`\$\{([^}]*)\}`)
	syscallRE     = regexp.MustCompile(`^[a-z0-9_]{2,40}$`)
)

// Parse reads a profile, strictly.
func Parse(data []byte) (*Profile, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("engine profile: %d bytes, at most %d are allowed", len(data), MaxSize)
	}
	var p Profile
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		return nil, fmt.Errorf("engine profile: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("engine profile: data after its end")
	}
	if err := canonical.CheckKeys(data, nil); err != nil {
		return nil, fmt.Errorf("engine profile: %w", err)
	}
	if p.Version != 1 {
		return nil, fmt.Errorf("engine profile: version is %d, this program reads version 1", p.Version)
	}
	if !nameRE.MatchString(p.Name) {
		return nil, fmt.Errorf("engine profile: name %q is not lower-case letters, digits, '.', '_' and '-'", p.Name)
	}
	for name, par := range p.Parameters {
		if !parameterRE.MatchString(name) || slices.Contains(builtin, name) {
			return nil, fmt.Errorf("engine profile: %q cannot be a parameter's name", name)
		}
		if par.From != "" && par.From != fromCPUs && par.From != fromGPUs {
			return nil, fmt.Errorf("engine profile: parameter %s: a default cannot be taken from %q", name, par.From)
		}
		if par.Min > par.Default || par.Default > par.Max {
			return nil, fmt.Errorf("engine profile: parameter %s: its default %d is not within %d to %d", name, par.Default, par.Min, par.Max)
		}
	}
	count := 0
	for _, group := range p.Argv {
		if _, ok := p.Parameters[group.If]; group.If != "" && !ok {
			return nil, fmt.Errorf("engine profile: argv depends on %q, which is no parameter", group.If)
		}
		for _, arg := range group.Args {
			count++
			for _, m := range placeholderRE.FindAllStringSubmatch(arg, -1) {
				if _, ok := p.Parameters[m[1]]; !ok && !slices.Contains(builtin, m[1]) {
					return nil, fmt.Errorf("engine profile: argv names %s, which is no parameter", m[0])
				}
			}
			if strings.ContainsRune(arg, 0) {
				return nil, errors.New("engine profile: an argument holds a NUL")
			}
		}
	}
	if count == 0 || count > 256 {
		return nil, fmt.Errorf("engine profile: argv has %d arguments, expected 1 to 256", count)
	}
	if len(p.Argv[0].Args) == 0 {
		return nil, errors.New("engine profile: argv starts with an empty group, expected the program")
	}
	if program := p.Argv[0].Args[0]; !path.IsAbs(program) || path.Clean(program) != program || placeholderRE.MatchString(program) {
		return nil, fmt.Errorf("engine profile: the program %q is not an absolute path", program)
	}
	if p.Argv[0].If != "" {
		return nil, fmt.Errorf("engine profile: the program depends on %q", p.Argv[0].If)
	}
	for name, value := range p.Environment {
		if !variableRE.MatchString(name) || strings.ContainsRune(value, 0) {
			return nil, fmt.Errorf("engine profile: %q is not an environment variable", name)
		}
	}
	for _, name := range p.Seccomp {
		if !syscallRE.MatchString(name) {
			return nil, fmt.Errorf("engine profile: %q is not a system call's name", name)
		}
	}
	if !path.IsAbs(p.Health) {
		return nil, fmt.Errorf("engine profile: the health path %q is not absolute", p.Health)
	}
	if p.ReadySeconds < 1 || p.ReadySeconds > 3600 {
		return nil, fmt.Errorf("engine profile: ready_seconds is %d, expected 1 to 3600", p.ReadySeconds)
	}
	if len(p.Formats) == 0 {
		return nil, errors.New("engine profile: formats: none is named")
	}
	for i, format := range p.Formats {
		if format != card.GGUF && format != card.Safetensors || slices.Contains(p.Formats[:i], format) {
			return nil, fmt.Errorf("engine profile: formats: %q is unknown or there twice", format)
		}
	}
	if g := p.Needs.GPUs; g.Min < 0 || g.Max < g.Min {
		return nil, fmt.Errorf("engine profile: needs.gpus: %d to %d is not a range", g.Min, g.Max)
	}
	if p.Needs.MemoryMiB < 0 || p.Needs.MemoryMiB > 1<<30 {
		return nil, fmt.Errorf("engine profile: needs.memory_mib is %d", p.Needs.MemoryMiB)
	}
	if p.Cache != CacheNone {
		return nil, fmt.Errorf("engine profile: cache is %q, expected %q: an engine must keep clients apart", p.Cache, CacheNone)
	}
	if p.Status != Tested && p.Status != Untested {
		return nil, fmt.Errorf("engine profile: status is %q, expected %q or %q", p.Status, Tested, Untested)
	}
	return &p, nil
}

// What a default can be taken from.
const (
	fromCPUs = "cpus"
	fromGPUs = "gpus"
)

// builtin are the placeholders that are not parameters.
var builtin = []string{"socket", "model_dir", "model_file", "model_name"}

// CheckModel tells why the engine cannot serve a model.
func (p *Profile) CheckModel(c *card.Card) error {
	if !slices.Contains(p.Formats, c.Format) {
		return fmt.Errorf("engine %s reads %s, the model %s is %s", p.Name, strings.Join(p.Formats, " and "), c.ID(), c.Format)
	}
	return nil
}

// Command renders the arguments and environment of the engine for one model of a
// manifest, in a VM with so many processors. An unknown parameter, or one out of
// the profile's bounds, is an error, and so is a model in another format.
func (p *Profile) Command(m *manifest.Manifest, model *card.Card, cpus int) (argv, env []string, err error) {
	if err := p.CheckModel(model); err != nil {
		return nil, nil, err
	}
	if g := p.Needs.GPUs; m.GPUs < g.Min || m.GPUs > g.Max {
		return nil, nil, fmt.Errorf("engine %s needs %d to %d GPUs, the manifest requires %d", p.Name, g.Min, g.Max, m.GPUs)
	}
	dir := path.Join(ModelsDir, model.Name)
	values := map[string]string{
		"socket": SocketPath, "model_dir": dir, "model_file": path.Join(dir, model.Entry), "model_name": model.Name,
	}
	number := map[string]int64{}
	for name, par := range p.Parameters {
		number[name] = par.Default
		switch par.From {
		case fromCPUs:
			number[name] = min(max(int64(cpus), par.Min), par.Max)
		case fromGPUs:
			number[name] = min(max(int64(m.GPUs), par.Min), par.Max)
		}
	}
	for name, value := range m.Parameters {
		par, ok := p.Parameters[name]
		if !ok {
			return nil, nil, fmt.Errorf("engine %s has no parameter %q", p.Name, name)
		}
		if value < par.Min || value > par.Max {
			return nil, nil, fmt.Errorf("engine %s: parameter %s is %d, expected %d to %d", p.Name, name, value, par.Min, par.Max)
		}
		number[name] = value
	}
	for name, value := range number {
		values[name] = strconv.FormatInt(value, 10)
	}
	for _, group := range p.Argv {
		if group.If != "" && number[group.If] == 0 {
			continue
		}
		for _, arg := range group.Args {
			argv = append(argv, placeholderRE.ReplaceAllStringFunc(arg, func(s string) string {
				return values[s[2:len(s)-1]]
			}))
		}
	}
	for name, value := range p.Environment {
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	return argv, env, nil
}

// ReadyTime is how long the engine may take until it first answers.
func (p *Profile) ReadyTime() time.Duration { return time.Duration(p.ReadySeconds) * time.Second }
