package profile

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"chrysalis/manifest"
	"chrysalis/models/card"
)

// llama is the profile of the llama.cpp disk, as it is committed.
func llama(t testing.TB) []byte {
	t.Helper()
	data, err := os.ReadFile("../engines/llama.cpp/profile.json")
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func parse(t testing.TB, data []byte) *Profile {
	t.Helper()
	p, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// demo is the model of sample.
var demo = &card.Card{Name: "chrysalis/demo", Revision: "rev-7", Format: card.GGUF, Entry: "model.gguf"}

func sample(parameters map[string]int64) *manifest.Manifest {
	disk := manifest.Disk{RootHash: strings.Repeat("ab", 32), Salt: "5a17", DataBlocks: 123456789}
	return &manifest.Manifest{
		Version: 1, Engine: disk,
		Models:     []manifest.Model{{Name: "chrysalis/demo", Revision: "rev-7", Disk: disk}},
		Parameters: parameters, Limits: manifest.DefaultLimits,
	}
}

// What a client approves when it approves the llama.cpp disk: no cache shared
// between requests, nothing fetched, no page of its own.
func TestLlama(t *testing.T) {
	const defaults = "/usr/bin/llama-server --host /run/engine/engine.sock --no-ui --offline --no-slots " +
		"--model /models/chrysalis/demo/model.gguf --alias chrysalis/demo " +
		"--ctx-size 2048 --parallel 2 --threads 2 --batch-size 512 " +
		"--no-cache-prompt --cache-ram 0 --cache-reuse 0 --slot-prompt-similarity 0 --no-cache-idle-slots " +
		"--fit off --log-colors off"
	p := parse(t, llama(t))
	for _, tt := range []struct {
		name       string
		parameters map[string]int64
		want       string
	}{
		{"no parameters", map[string]int64{}, defaults},
		{"defaults said", map[string]int64{"context": 2048, "parallel": 2, "threads": 2, "batch": 512, "embeddings": 0}, defaults},
		{"smallest", map[string]int64{"context": 256, "parallel": 1, "threads": 1, "batch": 32},
			strings.NewReplacer("2048", "256", "--parallel 2", "--parallel 1", "--threads 2", "--threads 1", "512", "32").Replace(defaults)},
		{"largest", map[string]int64{"context": 1 << 20, "parallel": 64, "threads": 256, "batch": 8192},
			strings.NewReplacer("2048", "1048576", "--parallel 2", "--parallel 64", "--threads 2", "--threads 256", "512", "8192").Replace(defaults)},
		{"embeddings", map[string]int64{"embeddings": 1}, defaults + " --embeddings --pooling mean"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			argv, env, err := p.Command(sample(tt.parameters), demo, 2)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(argv, " "); got != tt.want {
				t.Errorf("%s\nexpected\n%s", got, tt.want)
			}
			if got := strings.Join(env, " "); got != "HOME=/tmp LANG=C.UTF-8 TMPDIR=/tmp" {
				t.Errorf("environment %s", got)
			}
		})
	}
	if p.Name != "llama.cpp" || p.Health != "/health" || p.ReadyTime() != 10*time.Minute || len(p.Seccomp) != 0 {
		t.Errorf("%+v", p)
	}
}

func TestCommandRefuses(t *testing.T) {
	p := parse(t, llama(t))
	gpu := sample(map[string]int64{})
	gpu.GPUs = 1
	for _, tt := range []struct {
		name, says string
		manifest   *manifest.Manifest
	}{
		{"below a bound", "parameter context is 255, expected 256 to 1048576", sample(map[string]int64{"context": 255})},
		{"above a bound", "parameter parallel is 65, expected 1 to 64", sample(map[string]int64{"parallel": 65})},
		{"negative", "parameter threads is -1", sample(map[string]int64{"threads": -1})},
		{"a switch of 2", "parameter embeddings is 2", sample(map[string]int64{"embeddings": 2})},
		{"unknown parameter", `llama.cpp has no parameter "port"`, sample(map[string]int64{"port": 80})},
		{"a builtin as a parameter", `has no parameter "socket"`, sample(map[string]int64{"socket": 1})},
		{"a GPU", "needs 0 to 0 GPUs, the manifest requires 1", gpu},
	} {
		t.Run(tt.name, func(t *testing.T) {
			argv, env, err := p.Command(tt.manifest, demo, 2)
			if err == nil || !strings.Contains(err.Error(), tt.says) || argv != nil || env != nil {
				t.Errorf("%q, error %v, expected %q", argv, err, tt.says)
			}
		})
	}
}

// TestOnlyTheNameIsText changes every text of a manifest: but for the model's
// name, which the manifest's rules keep from being an option or a path, none
// reaches the command.
func TestOnlyTheNameIsText(t *testing.T) {
	p := parse(t, llama(t))
	plain, env, err := p.Command(sample(map[string]int64{"embeddings": 1}), demo, 2)
	if err != nil {
		t.Fatal(err)
	}
	m := sample(map[string]int64{"embeddings": 1})
	m.Engine = manifest.Disk{RootHash: strings.Repeat("cd", 32), Salt: "77", DataBlocks: 99}
	m.Models[0] = manifest.Model{Name: "x/${socket}", Revision: "marked", Disk: m.Engine}
	m.Limits = manifest.Limits{BodyBytes: 4242, Concurrency: 42, IdleSeconds: 43, TotalSeconds: 44}
	argv, env2, err := p.Command(m, &card.Card{Name: "x/${socket}", Revision: "marked", Format: card.GGUF, Entry: "model.gguf", Licence: "x"}, 2)
	if err != nil {
		t.Fatal(err)
	}
	// Nor is a name looked at for placeholders.
	for i := range plain {
		plain[i] = strings.Replace(plain[i], "chrysalis/demo", "x/${socket}", 1)
	}
	if !slices.Equal(argv, plain) || !slices.Equal(env, env2) {
		t.Errorf("%q\nexpected\n%q", argv, plain)
	}
	if err := m.Validate(); err == nil {
		t.Error("a manifest may have such a name")
	}
	for _, name := range []string{"-x/y", "--host/y", "/etc/passwd", "a/../b", "a b/c", "a/b\x00c", "a/-b"} {
		m := sample(map[string]int64{})
		m.Models[0].Name = name
		if m.Validate() == nil {
			t.Errorf("a manifest may have the name %q", name)
		}
	}
}

func TestArguments(t *testing.T) {
	p := parse(t, []byte(`{"version":1,"name":"x","argv":[
		{"args":["/x","${model_name}@${model_dir}:${n}${n}","$n","$","${n"]},
		{"if":"n","args":["--n=${n}"]},{"if":"m","args":["--m"]},{"args":[""]}],
		"parameters":{"n":{"min":-5,"max":5,"default":-1},"m":{"min":0,"max":1,"default":0}},
		"formats":["gguf"],"cache":"none","status":"tested","health":"/","ready_seconds":1}`))
	argv, env, err := p.Command(sample(nil), demo, 2)
	want := []string{"/x", "chrysalis/demo@/models/chrysalis/demo:-1-1", "$n", "$", "${n", "--n=-1", ""}
	if err != nil || !slices.Equal(argv, want) || len(env) != 0 {
		t.Errorf("%q, %q, %v; expected %q", argv, env, err, want)
	}
	argv, _, err = p.Command(sample(map[string]int64{"n": 0, "m": 1}), demo, 2)
	want = []string{"/x", "chrysalis/demo@/models/chrysalis/demo:00", "$n", "$", "${n", "--m", ""}
	if err != nil || !slices.Equal(argv, want) {
		t.Errorf("%q, %v; expected %q", argv, err, want)
	}
}

func TestParseRefuses(t *testing.T) {
	good := string(llama(t))
	swap := func(old, new string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("the profile has no %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	many := strings.Repeat(`"x",`, 256) + `"x"`
	for _, tt := range []struct{ name, data, says string }{
		{"empty", "", "EOF"},
		{"not JSON", "x", "invalid character"},
		{"an array", "[]", "array"},
		{"cut short", strings.TrimRight(good, " \n}"), "EOF"},
		{"more behind it", good + "{}", "data after its end"},
		{"a brace behind it", good + "}", "data after its end"},
		{"larger than 64 KiB", good + strings.Repeat(" ", MaxSize), "at most 65536"},
		{"unknown field", swap(`"version"`, `"shell": "sh", "version"`), `"shell"`},
		{"a field twice", swap(`"version"`, `"version": 2, "version"`), `"version" is there twice`},
		{"unknown field of a group", swap(`"if"`, `"unless"`), `"unless"`},
		{"unknown field of a parameter", swap(`"default"`, `"text"`), `"text"`},
		{"version 2", swap(`"version": 1`, `"version": 2`), "version is 2"},
		{"no version", swap(`"version": 1,`, ``), "version is 0"},
		{"no name", swap(`"llama.cpp"`, `""`), `name ""`},
		{"a name with a slash", swap(`"llama.cpp"`, `"../x"`), `name "../x"`},
		{"a parameter in capitals", swap(`"threads": {`, `"Threads": {`), `"Threads" cannot be`},
		{"a parameter like a builtin", swap(`"threads": {`, `"socket": {`), `"socket" cannot be`},
		{"a default below its bounds", swap(`"default": 2048`, `"default": 255`), "parameter context: its default 255"},
		{"a default above its bounds", swap(`"default": 512`, `"default": 8193`), "parameter batch: its default 8193"},
		{"bounds the wrong way round", swap(`{"min": 1, "max": 64, "default": 2}`, `{"min": 3, "max": 1, "default": 2}`), "parameter parallel"},
		{"a fraction", swap(`"default": 2048`, `"default": 2048.5`), "2048.5"},
		{"a condition on no parameter", swap(`"if": "embeddings"`, `"if": "embedding"`), `depends on "embedding"`},
		{"a condition on a builtin", swap(`"if": "embeddings"`, `"if": "socket"`), `depends on "socket"`},
		{"an unknown placeholder", swap(`${batch}`, `${batches}`), "${batches}"},
		{"a placeholder in capitals", swap(`${batch}`, `${BATCH}`), "${BATCH}"},
		{"an empty placeholder", swap(`${batch}`, `${}`), "${}"},
		{"a NUL in an argument", swap(`"--no-ui"`, `"--no-ui\u0000"`), "NUL"},
		{"no arguments", `{"version":1,"name":"x","argv":[]}`, "0 arguments"},
		{"257 arguments", swap(`"--no-ui"`, many), "arguments, expected 1 to 256"},
		{"an empty first group", swap(`"argv": [`, `"argv": [{"args": []},`), "empty group"},
		{"a program by its name", swap(`"/usr/bin/llama-server"`, `"llama-server"`), `program "llama-server"`},
		{"a program by a roundabout way", swap(`"/usr/bin/llama-server"`, `"/usr/../bin/sh"`), `program "/usr/../bin/sh"`},
		{"a program that the manifest names", swap(`"/usr/bin/llama-server"`, `"/usr/bin/${model_name}"`), "program"},
		{"a program that is left out", swap(`{"args": ["/usr`, `{"if": "embeddings", "args": ["/usr`), `the program depends on "embeddings"`},
		{"a variable in small letters", swap(`"LANG"`, `"lang"`), `"lang" is not`},
		{"a variable with '='", swap(`"LANG"`, `"LANG=C"`), `"LANG=C" is not`},
		{"a NUL in a variable", swap(`"C.UTF-8"`, `"C\u0000"`), `"LANG" is not`},
		{"a call's number", swap(`"seccomp": []`, `"seccomp": ["1"]`), `"1" is not`},
		{"a call in capitals", swap(`"seccomp": []`, `"seccomp": ["SYS_ptrace"]`), `"SYS_ptrace" is not`},
		{"a health path by its name", swap(`"/health"`, `"health"`), `"health" is not absolute`},
		{"no time", swap(`600`, `0`), "ready_seconds is 0"},
		{"more than an hour", swap(`600`, `3601`), "ready_seconds is 3601"},
		{"no formats", swap(`["gguf"]`, `[]`), "formats: none"},
		{"an unknown format", swap(`["gguf"]`, `["pickle"]`), `formats: "pickle"`},
		{"a format twice", swap(`["gguf"]`, `["gguf", "gguf"]`), `formats: "gguf"`},
		{"a range the wrong way round", swap(`"gpus": {"min": 0`, `"gpus": {"min": 2`), "2 to 0 is not a range"},
		{"memory below none", swap(`"memory_mib": 128`, `"memory_mib": -1`), "memory_mib is -1"},
		{"a cache between clients", swap(`"cache": "none"`, `"cache": "prefix"`), `cache is "prefix"`},
		{"no status", swap(`"status": "tested"`, `"status": ""`), `status is ""`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(tt.data))
			if err == nil {
				t.Fatal("it is read")
			}
			if !strings.HasPrefix(err.Error(), "engine profile: ") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %q does not say %q", err, tt.says)
			}
		})
	}
}

// Every engine in the tree has a profile that can be read and rendered.
func TestEngines(t *testing.T) {
	profiles, err := filepath.Glob("../engines/*/profile.json")
	if err != nil || len(profiles) == 0 {
		t.Fatal(err)
	}
	for _, path := range profiles {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p := parse(t, data)
		if want := filepath.Base(filepath.Dir(path)); p.Name != want {
			t.Errorf("%s: name %q", path, p.Name)
		}
		m, c := sample(nil), *demo
		m.GPUs, c.Format = p.Needs.GPUs.Min, p.Formats[0]
		if _, _, err := p.Command(m, &c, 2); err != nil {
			t.Error(err)
		}
	}
}

// FuzzParse renders every profile that is read: the program stays the profile's,
// and each argument is whole.
func FuzzParse(f *testing.F) {
	f.Add(llama(f))
	f.Add([]byte(`{"version":1,"name":"x","argv":[{"args":["/x","${n}"]}],"parameters":{"n":{"max":1}},"formats":["gguf"],"cache":"none","status":"tested","health":"/","ready_seconds":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			return
		}
		argv, env, err := p.Command(sample(nil), demo, 2)
		if err != nil {
			return // other models, or GPUs
		}
		if argv[0] != p.Argv[0].Args[0] || strings.ContainsRune(strings.Join(argv, "")+strings.Join(env, ""), 0) {
			t.Errorf("%q, %q", argv, env)
		}
		again, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > MaxSize {
			return
		}
		q := parse(t, again)
		argv2, env2, _ := q.Command(sample(nil), demo, 2)
		if fmt.Sprint(argv, env) != fmt.Sprint(argv2, env2) {
			t.Errorf("%q, %q once more: %q, %q", argv, env, argv2, env2)
		}
	})
}
