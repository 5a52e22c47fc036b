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

	"chrysalis/manifest"
)

// Path is where an engine disk carries its profile.
const Path = "chrysalis/profile.json"

// MaxSize is the largest profile, in bytes.
const MaxSize = 64 << 10

// Paths inside the engine's root that the agent provides.
const (
	SocketPath = "/run/engine/engine.sock" // the engine's only door
	ModelsDir  = "/models"                 // model i is mounted at ModelsDir/i
)

// Profile is how an engine is run.
type Profile struct {
	Version      int                  `json:"version"` // 1
	Name         string               `json:"name"`
	Argv         []Args               `json:"argv"`
	Environment  map[string]string    `json:"environment"` // the whole of it
	Parameters   map[string]Parameter `json:"parameters"`
	Models       Range                `json:"models"`        // how many models it serves at once
	Health       string               `json:"health"`        // path that answers 200 once requests are taken
	ReadySeconds int                  `json:"ready_seconds"` // until then
	Seccomp      []string             `json:"seccomp"`       // system calls beside the agent's own list
}

// Args are consecutive arguments. Each may be one placeholder, or hold several:
// ${socket}, ${model_dir}, ${model_name}, or ${NAME} of a parameter. With If,
// they are left out while that parameter is zero.
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
	// the number of the VM's processors.
	From string `json:"default_from,omitempty"`
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
		if par.From != "" && par.From != fromCPUs {
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
	if p.Models.Min < 0 || p.Models.Max < p.Models.Min {
		return nil, fmt.Errorf("engine profile: models %d to %d is not a range", p.Models.Min, p.Models.Max)
	}
	return &p, nil
}

// fromCPUs is the only thing that a default can be taken from.
const fromCPUs = "cpus"

// builtin are the placeholders that are not parameters.
var builtin = []string{"socket", "model_dir", "model_name"}

// Command renders the engine's arguments and environment for a manifest and a VM
// with so many processors. An unknown parameter, or one out of the profile's
// bounds, is an error.
func (p *Profile) Command(m *manifest.Manifest, cpus int) (argv, env []string, err error) {
	if n := len(m.Models); n < p.Models.Min || n > p.Models.Max {
		return nil, nil, fmt.Errorf("engine %s serves %d to %d models, the manifest names %d", p.Name, p.Models.Min, p.Models.Max, n)
	}
	values := map[string]string{"socket": SocketPath}
	if len(m.Models) > 0 {
		values["model_dir"] = path.Join(ModelsDir, "0")
		values["model_name"] = m.Models[0].Name
	}
	number := map[string]int64{}
	for name, par := range p.Parameters {
		number[name] = par.Default
		if par.From == fromCPUs {
			number[name] = min(max(int64(cpus), par.Min), par.Max)
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
