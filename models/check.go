package models

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"chrysalis/models/card"
)

// ErrRefused is what the refusal of a file that may not be on a model disk wraps.
var ErrRefused = errors.New("refused")

// ErrIncomplete is what the refusal of a model wraps whose files do not make up a
// whole.
var ErrIncomplete = errors.New("not a complete model")

const (
	maxConfig = 8 << 20 // bytes of a config.json
	maxReadme = 1 << 20 // bytes of README.md that are looked at

	indexName  = "model.safetensors.index.json"
	configName = "config.json"
)

// kinds are the files that are refused unless they are allowed by name: what a
// loader may run, or what holds something to run.
var kinds = []struct {
	what string
	exts []string
}{
	{"a pickle, which can run code when it is loaded; use safetensors or GGUF", []string{".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}},
	{"Python code; nothing in the VM runs a model's own code", []string{".py", ".pyc", ".pyo", ".ipynb"}},
	{"a script", []string{".sh", ".bash", ".zsh", ".pl", ".rb", ".js", ".mjs", ".lua", ".ps1", ".bat", ".cmd"}},
	{"a program or a library", []string{".so", ".dll", ".dylib", ".exe", ".jar", ".wasm"}},
}

// magics tell the same by a file's first bytes.
var magics = []struct{ what, magic string }{
	{"a program or a library", "\x7fELF"},
	{"a program or a library", "MZ"},
	{"a program or a library", "\xcf\xfa\xed\xfe"},
	{"a program or a library", "\xca\xfe\xba\xbe"},
	{"a script", "#!"},
	{"a ZIP archive, as PyTorch keeps pickles in", "PK\x03\x04"},
	{"a pickle, which can run code when it is loaded", "\x80\x02"},
	{"a pickle, which can run code when it is loaded", "\x80\x03"},
	{"a pickle, which can run code when it is loaded", "\x80\x04"},
	{"a pickle, which can run code when it is loaded", "\x80\x05"},
}

// checkKind refuses a file for what it is.
func checkKind(name string, head []byte) error {
	ext := strings.ToLower(path.Ext(name))
	for _, k := range kinds {
		if slices.Contains(k.exts, ext) {
			return fmt.Errorf("%w: %s is %s", ErrRefused, name, k.what)
		}
	}
	if ext == ".safetensors" || ext == ".gguf" {
		return nil // has a parser, and a length can begin with anything
	}
	for _, m := range magics {
		if bytes.HasPrefix(head, []byte(m.magic)) {
			return fmt.Errorf("%w: %s is %s", ErrRefused, name, m.what)
		}
	}
	return nil
}

// matches reports whether a pattern (path.Match) is for a file: its path, its name,
// or a folder that it is in.
func matches(patterns []string, name string) bool {
	for _, p := range patterns {
		if ok, _ := path.Match(p, path.Base(name)); ok {
			return true
		}
		for at := name; at != "."; at = path.Dir(at) {
			if ok, _ := path.Match(p, at); ok {
				return true
			}
		}
	}
	return false
}

// A checker looks at a model's files, one after the other, and then at the whole.
type checker struct {
	allow []string
	files []card.File
	ggufs map[string]*ggufHeader
	parts map[string]*stHeader // safetensors files
	index map[string]string    // of safetensors
	conf  *config
	spdx  string // from README.md
	notes []string
}

func newChecker(allow []string) *checker {
	return &checker{allow: allow, ggufs: map[string]*ggufHeader{}, parts: map[string]*stHeader{}}
}

// look looks at a file of size bytes, of which it reads no more from r than it
// needs.
func (c *checker) look(name string, size int64, r io.Reader) error {
	if err := card.CheckPath(name); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if name == card.Path {
		return fmt.Errorf("%w: %s is in the way of what the disk says about itself; leave it out with --exclude", ErrRefused, name)
	}
	if len(c.files) == card.MaxFiles {
		return fmt.Errorf("%w: more than %d files", ErrRefused, card.MaxFiles)
	}
	c.files = append(c.files, card.File{Path: name, Size: size, SHA256: strings.Repeat("0", 64)})

	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(int(min(size, 8)))
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("read %s: %w", name, err)
	}
	if err := checkKind(name, head); err != nil && !matches(c.allow, name) {
		return fmt.Errorf("%w; leave it out with --exclude, or pack it with --allow %s", err, path.Base(name))
	}
	switch {
	case strings.HasSuffix(name, ".gguf"):
		c.ggufs[name], err = readGGUF(b, size)
	case strings.HasSuffix(name, ".safetensors"):
		c.parts[name], err = readSafetensors(b, size)
	case name == indexName:
		c.index, err = readIndex(b, size)
	case name == configName:
		c.conf, err = readConfig(b, size)
	case name == "README.md":
		c.spdx, err = readLicence(io.LimitReader(b, maxReadme))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// config is what is of interest in a config.json.
type config struct {
	contextLength int64
	quantisation  string
	ownCode       bool
}

// readConfig reads a config.json of Hugging Face's transformers.
func readConfig(r io.Reader, size int64) (*config, error) {
	if size > maxConfig {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are allowed", errJSON, size, maxConfig)
	}
	s := newScanner(r, size)
	s.python = true
	var c config
	// The length is at the top, or with the text part of a model with several.
	length := func() error {
		b, err := s.peek()
		if err != nil {
			return err
		}
		if b < '0' || b > '9' {
			return s.skip()
		}
		w, err := s.word()
		if err != nil {
			return err
		}
		v, err := strconv.ParseInt(w, 10, 64)
		if err != nil && !isNumber(w) {
			return s.bad("%q, expected a number", w)
		}
		if err == nil && v < 1<<40 {
			c.contextLength = max(c.contextLength, v)
		}
		return nil
	}
	seen := map[string]bool{}
	err := s.object(1024, func(key string) error {
		switch key {
		case "max_position_embeddings", "text_config", "quantization_config", "auto_map":
			if seen[key] {
				return s.bad("the field %q is there twice", key)
			}
			seen[key] = true
		}
		switch key {
		case "max_position_embeddings":
			return length()
		case "auto_map":
			c.ownCode = true
		case "text_config", "quantization_config":
			if b, err := s.peek(); err != nil || b != '{' {
				return errors.Join(err, s.skip())
			}
			return s.object(1024, func(inner string) error {
				switch key + "." + inner {
				case "text_config.max_position_embeddings":
					return length()
				case "quantization_config.quant_method":
					if b, err := s.peek(); err != nil || b != '"' {
						return errors.Join(err, s.skip())
					}
					v, err := s.string(256)
					c.quantisation = v
					return err
				}
				return s.skip()
			})
		}
		return s.skip()
	})
	if err == nil {
		err = s.finish()
	}
	return &c, err
}

var licenceRE = regexp.MustCompile(`^license:\s*["']?([^"'#\s]+)["']?\s*(?:#.*)?$`)

// readLicence finds the licence in the header of a model hub's README.md: YAML
// between two lines of dashes.
func readLicence(r io.Reader) (string, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 64<<10)
	for i := 0; lines.Scan(); i++ {
		line := strings.TrimRight(lines.Text(), " \r")
		if i == 0 && line != "---" || i > 0 && line == "---" || i > 1000 {
			return "", nil
		}
		if m := licenceRE.FindStringSubmatch(line); m != nil {
			return m[1], nil
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
		return "", err
	}
	return "", nil
}

func incomplete(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrIncomplete}, args...)...)
}

// finish looks at the files together and returns the card, in which the SHA-256 are
// still missing.
func (c *checker) finish(name, revision string) (*card.Card, error) {
	out := &card.Card{Version: card.Version, Name: name, Revision: revision, Files: c.files}
	var err error
	switch {
	case len(c.ggufs) > 0 && len(c.parts) > 0:
		return nil, incomplete("both GGUF and safetensors files are there; leave one kind out with --exclude")
	case len(c.ggufs) > 0:
		err = c.finishGGUF(out)
	case len(c.parts) > 0:
		err = c.finishSafetensors(out)
	default:
		return nil, incomplete("no *.gguf and no *.safetensors is there")
	}
	if err != nil {
		return nil, err
	}
	if out.Licence == "" {
		out.Licence = c.spdx
	}
	if out.Licence != "" && !card.Word(out.Licence) {
		c.notes = append(c.notes, fmt.Sprintf("the licence %.60q is not an identifier and is left out", out.Licence))
		out.Licence = ""
	}
	if !card.Word(out.Quantisation) {
		out.Quantisation = ""
	}
	if c.conf != nil && c.conf.ownCode {
		c.notes = append(c.notes, "config.json names code of the model's own (auto_map); nothing in the VM runs it, so an engine that does not know this architecture will refuse the model")
	}
	return out, nil
}

var partRE = regexp.MustCompile(`^(.*)-([0-9]{5})-of-([0-9]{5})(\.gguf|\.safetensors)$`)

func (c *checker) finishGGUF(out *card.Card) error {
	out.Format = card.GGUF
	names := sortedKeys(c.ggufs)
	first := c.ggufs[names[0]]
	out.Entry = names[0]
	if len(names) == 1 && first.parts == 0 {
		c.describeGGUF(out, first)
		return nil
	}
	stem, all := "", map[string]string{} // the part that each tensor is in
	for i, name := range names {
		h := c.ggufs[name]
		if h.parts == 0 {
			return incomplete("%d GGUF files, of which %s is a whole model; give that file alone, or leave the others out with --exclude", len(names), name)
		}
		m := partRE.FindStringSubmatch(name)
		if m == nil || m[2] != fmt.Sprintf("%05d", h.part+1) || m[3] != fmt.Sprintf("%05d", h.parts) {
			return incomplete("%s says that it is part %d of %d; its name must end in -%05d-of-%05d.gguf", name, h.part+1, h.parts, h.part+1, h.parts)
		}
		if i == 0 {
			stem = m[1]
		}
		if m[1] != stem || h.parts != first.parts {
			return incomplete("%s and %s are parts of different models", names[0], name)
		}
		if int(h.part) != i {
			return incomplete("part %d of %d of %s is missing; is the download complete?", i+1, h.parts, stem)
		}
		if h.allTensors != 0 && first.allTensors != 0 && h.allTensors != first.allTensors {
			return incomplete("%s counts %d tensors, %s counts %d", names[0], first.allTensors, name, h.allTensors)
		}
		for t := range h.tensors {
			if other, ok := all[t]; ok {
				return incomplete("tensor %q is in both %s and %s", t, other, name)
			}
			all[t] = name
		}
	}
	if int64(len(names)) != first.parts {
		return incomplete("%d of %d parts of %s are there; is the download complete?", len(names), first.parts, stem)
	}
	if first.allTensors != 0 && first.allTensors != int64(len(all)) {
		return incomplete("the parts of %s have %d tensors, the first says %d", stem, len(all), first.allTensors)
	}
	whole := *first
	for _, name := range names[1:] {
		whole.parameters += c.ggufs[name].parameters
		for typ, n := range c.ggufs[name].types {
			whole.types[typ] += n
		}
	}
	c.describeGGUF(out, &whole)
	return nil
}

func (c *checker) describeGGUF(out *card.Card, h *ggufHeader) {
	out.Parameters, out.ContextLength, out.Licence = h.parameters, h.contextLength, h.licence
	if name, ok := fileTypes[h.fileType]; ok {
		out.Quantisation = name
	}
}

func (c *checker) finishSafetensors(out *card.Card) error {
	out.Format = card.Safetensors
	if c.conf == nil {
		return incomplete("config.json is missing")
	}
	var top []string
	for _, name := range sortedKeys(c.parts) {
		if !strings.Contains(name, "/") {
			top = append(top, name)
		}
	}
	switch {
	case len(top) == 0:
		return incomplete("no *.safetensors is beside config.json")
	case c.index == nil && len(top) > 1:
		return incomplete("%d safetensors files and no %s; is the download complete? Files that do not belong to the model can be left out with --exclude", len(top), indexName)
	case c.index == nil:
		if m := partRE.FindStringSubmatch(top[0]); m != nil && m[3] != "00001" {
			return incomplete("%s is one of several parts, and %s is missing; is the download complete?", top[0], indexName)
		}
	}
	for tensor, shard := range c.index {
		h, ok := c.parts[shard]
		if !ok {
			return incomplete("%s names %q, which is missing; is the download complete?", indexName, shard)
		}
		if _, ok := h.tensors[tensor]; !ok {
			return incomplete("%s says that tensor %q is in %s; it is not", indexName, tensor, shard)
		}
	}
	types := map[string]int64{}
	for _, name := range top {
		h := c.parts[name]
		for tensor := range h.tensors {
			if shard, ok := c.index[tensor]; c.index != nil && (!ok || shard != name) {
				return incomplete("%s has tensor %q, for which %s names %q; files that do not belong to the model can be left out with --exclude", name, tensor, indexName, shard)
			}
		}
		out.Parameters += h.parameters
		for t, n := range h.types {
			types[t] += n
		}
	}
	out.ContextLength = c.conf.contextLength
	out.Quantisation = c.conf.quantisation
	if out.Quantisation == "" { // the type that takes most of the space
		for _, t := range sortedKeys(types) {
			if out.Quantisation == "" || types[t] > types[out.Quantisation] {
				out.Quantisation = t
			}
		}
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
