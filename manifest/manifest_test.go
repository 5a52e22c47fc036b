package manifest

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"chrysalis/pay"
)

// canonicalSHA384 is of testdata/canonical.json, which was written with another
// program (Python's json.dumps with sorted keys and no white space), and paymentSHA384
// of testdata/payment.json, which is the same with a payment.
const (
	canonicalSHA384 = "3eda1421e1cf46a63f224c3155d5506a85fb860e9f356d9a198f25c5265b798de25e17851924c1a1bfa5d8dbc6b4cbe7"
	paymentSHA384   = "2ada36b9d46d7de91bd84068915a8c0a4af0003235c20aea4bab5d2a093df294a9bbf8af2538606f3376d7a2cc12a5b6"
)

const (
	hashE = "53b0e0de6e3b4b63b18afcdc8b15b1f9b2c6ce8e8b6a1a6a8cf1c7ba2a1c0f6e"
	hashM = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
)

func sample() *Manifest {
	return &Manifest{
		Version:    1,
		Engine:     Disk{RootHash: hashE, Salt: "00ff", DataBlocks: 10937},
		Models:     []Model{{Name: "chrysalis/demo", Revision: "1", Disk: Disk{RootHash: hashM, Salt: "", DataBlocks: 1}}},
		Parameters: map[string]int64{"context": 2048, "threads": 2},
		Limits:     DefaultLimits,
	}
}

// paid is sample with a price.
func paid() *Manifest {
	m := sample()
	m.Payment = &Payment{Network: -239, Step: 10_000_000, Ceilings: []pay.Price{{Prompt: 100, Completion: 300}}}
	return m
}

func encode(t testing.TB, m *Manifest) []byte {
	t.Helper()
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestCanonical(t *testing.T) {
	read := func(path, want string) *Manifest {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		m, err := Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		if again := encode(t, m); !bytes.Equal(again, data) {
			t.Errorf("encoded:\n%s\nexpected:\n%s", again, data)
		}
		sum := SHA384(data)
		if got := hex.EncodeToString(sum[:]); got != want {
			t.Errorf("%s: SHA-384 %s, expected %s", path, got, want)
		}
		return m
	}
	p := read("testdata/payment.json", paymentSHA384).Payment
	if p.Network != -239 || p.Step != 10_000_000 || p.Ceilings[1] != (pay.Price{Prompt: 100, Completion: pay.MaxPrice}) {
		t.Errorf("read as %+v", p)
	}
	m := read("testdata/canonical.json", canonicalSHA384)
	second := m.Models[1]
	if m.GPUs != 8 || m.Parameters["context"] != 1<<53-1 || m.Parameters["a_1"] != -(1<<53-1) || second.ID() != "Org-2/Model_7B.Q8@2026-11-22" ||
		second.Disk.Salt != "00ff" || second.Disk.DataBlocks != 1<<31 || m.Limits != DefaultLimits {
		t.Errorf("read as %+v", m)
	}
}

func TestRoundTrip(t *testing.T) {
	largest := sample()
	largest.Models = nil
	for i := range 16 {
		long := strings.Repeat("x", 64)
		largest.Models = append(largest.Models, Model{
			Name: fmt.Sprintf("%s/%s%02d", long, long[2:], i), Revision: long,
			Disk: Disk{RootHash: hashM, Salt: strings.Repeat("ab", 256), DataBlocks: 1 << 31},
		})
	}
	for i := range 64 {
		largest.Parameters[fmt.Sprintf("p_%029d", i)] = -(1<<53 - 1)
	}
	delete(largest.Parameters, "context")
	delete(largest.Parameters, "threads")
	none := sample()
	none.Parameters = map[string]int64{}
	tokens := sample()
	for i := range MaxTokens {
		tokens.Tokens = append(tokens.Tokens, fmt.Sprintf("%064x", i))
	}
	largest.Payment = &Payment{Network: -1 << 31, Step: pay.MaxStep}
	for range largest.Models {
		largest.Payment.Ceilings = append(largest.Payment.Ceilings, pay.Price{Prompt: pay.MaxPrice, Completion: pay.MaxPrice})
	}
	for name, m := range map[string]*Manifest{"sample": sample(), "largest": largest, "no parameters": none, "tokens": tokens, "payment": paid()} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(encode(t, m))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, m) {
				t.Errorf("%+v, expected %+v", got, m)
			}
		})
	}
}

// TestParseRefuses has a row for each way in which another reader could see
// another manifest, or none.
func TestParseRefuses(t *testing.T) {
	good := string(encode(t, sample()))
	swap := func(old, new string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q is %d times in %s", old, strings.Count(good, old), good)
		}
		return strings.Replace(good, old, new, 1)
	}
	const disk = `{"data_blocks":1,"root_hash":"` + hashM + `","salt":""}`
	const model = `{"disk":` + disk + `,"name":"chrysalis/demo","revision":"1"}`
	const limits = `,"limits":{"body_bytes":16777216,"concurrency":8,"idle_seconds":300,"total_seconds":900}`
	for _, tt := range []struct{ name, data, says string }{
		{"empty", "", "EOF"},
		{"null", "null", "version is 0"},
		{"an array", "[]", "array"},
		{"a string", `"x"`, "string"},
		{"not JSON", "version: 1", "invalid character"},
		{"cut short", good[:len(good)-1], "unexpected EOF"},
		{"closed wrongly", good[:len(good)-1] + "]", "invalid character ']'"},
		{"NUL bytes behind it", good + "\x00", "invalid character"},
		{"a byte order mark", "\ufeff" + good, "invalid character"},

		{"unknown field", swap(`{"engine"`, `{"args":"--port 80","engine"`), `"args"`},
		{"unknown field of a disk", swap(`"salt":"00ff"`, `"salt":"00ff","size":1`), `"size"`},
		{"unknown field of a model", swap(`"name":"ch`, `"hash":1,"name":"ch`), `"hash"`},
		{"unknown field of the limits", swap(`"concurrency":8`, `"concurrency":8,"cpus":1`), `"cpus"`},
		{"a field in other case", swap(`{"engine"`, `{"Engine"`), `"Engine"`},
		{"a nested field in other case", swap(`"salt":"00ff"`, `"Salt":"00ff"`), `"Salt`},
		{"a field in two cases", swap(`{"engine"`, `{"Engine":null,"engine"`), `Engine`},
		// encoding/json folds U+017F to s.
		{"a field with a letter that folds", swap(`"salt":"00ff"`, `"ſalt":"00ff"`), `salt`},

		{"no version", swap(`,"version":1`, ``), "version is 0"},
		{"no engine", swap(`{"engine":{"data_blocks":10937,"root_hash":"`+hashE+`","salt":"00ff"},`, `{`), "engine.root_hash"},
		{"no models", swap(`"models":[`+model+`],`, ``), "models: there are 0"},
		{"no gpus", swap(`"gpus":0,`, ``), `gpus`},
		{"no parameters", swap(`,"parameters":{"context":2048,"threads":2}`, ``), "parameters: missing"},
		{"no limits", swap(limits, ``), "limits.body_bytes"},
		{"no salt", swap(`,"salt":"00ff"`, ``), `salt`},
		{"no root hash", swap(`"root_hash":"`+hashM+`",`, ``), "models[0].disk.root_hash"},
		{"no data blocks", swap(`"data_blocks":10937,`, ``), "engine.data_blocks"},
		{"no name", swap(`"name":"chrysalis/demo",`, ``), "models[0].name"},
		{"no revision", swap(`,"revision":"1"`, ``), "models[0].revision"},
		{"no disk", swap(`"disk":`+disk+`,`, ``), "models[0].disk.root_hash"},
		{"no concurrency", swap(`"concurrency":8,`, ``), "limits.concurrency"},
		{"null parameters", swap(`{"context":2048,"threads":2}`, `null`), "parameters: missing"},
		{"null for a number", swap(`"gpus":0`, `"gpus":null`), `gpus`},

		{"no tokens in their field", swap(`,"version":1`, `,"tokens":[],"version":1`), "not canonical"},
		{"a token's hash of another length", swap(`,"version":1`, `,"tokens":["`+hashE[1:]+`"],"version":1`), "tokens[0]"},
		{"a token's hash in upper case", swap(`,"version":1`, `,"tokens":["`+strings.ToUpper(hashE)+`"],"version":1`), "tokens[0]"},
		{"a token twice", swap(`,"version":1`, `,"tokens":["`+hashE+`","`+hashE+`"],"version":1`), "tokens[1]"},
		{"tokens in another order", swap(`,"version":1`, `,"tokens":["`+hashM+`","`+hashE+`"],"version":1`), "tokens[1]"},
		{"too many tokens", swap(`,"version":1`, `,"tokens":["`+strings.Repeat(hashE+`","`, MaxTokens)+hashM+`"],"version":1`), "tokens: there are 513"},
		{"no payment in its field", swap(`"version":1`, `"payment":null,"version":1`), "not canonical"},
		{"an empty payment", swap(`"version":1`, `"payment":{},"version":1`), "payment.step"},
		{"a payment without a network", swap(`"version":1`, `"payment":{"ceilings":[{"completion_price":1,"prompt_price":1}],"step":1},"version":1`), "not canonical"},
		{"a payment without a price", swap(`"version":1`, `"payment":{"ceilings":[{"completion_price":1}],"network":1,"step":1},"version":1`), "not canonical"},
		{"an unknown field of a payment", swap(`"version":1`, `"payment":{"ceilings":[{"completion_price":1,"prompt_price":1}],"network":1,"payee":"x","step":1},"version":1`), `"payee"`},
		{"a network of more than 32 bits", swap(`"version":1`, `"payment":{"ceilings":[{"completion_price":1,"prompt_price":1}],"network":2147483648,"step":1},"version":1`), "network"},
		{"a field twice", swap(`"gpus":0`, `"gpus":0,"gpus":0`), `"gpus" is there twice`},
		{"a field of a disk twice", swap(`"salt":"00ff"`, `"salt":"00ff","salt":"00ff"`), `"salt" is there twice`},
		{"a field of a model twice", swap(`"revision":"1"`, `"revision":"1","revision":"1"`), `"revision" is there twice`},
		{"a field of a model's disk twice", swap(`"data_blocks":1,`, `"data_blocks":1,"data_blocks":1,`), `"data_blocks" is there twice`},
		{"a limit twice", swap(`"concurrency":8`, `"concurrency":8,"concurrency":8`), `"concurrency" is there twice`},
		{"a parameter twice", swap(`"context":2048`, `"context":1,"context":2048`), `"context" is there twice`},
		{"a parameter twice, once escaped", swap(`"context":2048`, `"context":1,"\u0063ontext":2048`), `"context" is there twice`},

		{"space", swap(`"gpus":0`, `"gpus": 0`), "not canonical"},
		{"a line's end behind it", good + "\n", "not canonical"},
		{"a space before it", " " + good, "not canonical"},
		{"keys in another order", swap(`"context":2048,"threads":2`, `"threads":2,"context":2048`), "not canonical"},
		{"an escaped letter in a string", swap(`chrysalis/demo`, `\u0063hrysalis/demo`), "not canonical"},
		{"an escaped slash", swap(`chrysalis/demo`, `chrysalis\/demo`), "not canonical"},
		{"an escaped letter in a key", swap(`"gpus"`, `"\u0067pus"`), "not canonical"},
		{"another document behind it", good + good, "not canonical"},
		{"a bracket behind it", good + "]", "invalid character ']'"},
		{"a brace behind it", good + "}", "invalid character '}'"},

		{"a fraction", swap(`"gpus":0`, `"gpus":0.0`), "gpus"},
		{"an exponent", swap(`"context":2048`, `"context":2e3`), "2e3"},
		{"minus zero", swap(`"gpus":0`, `"gpus":-0`), "not canonical"},
		{"a leading zero", swap(`"gpus":0`, `"gpus":00`), "invalid character"},
		{"a number as a string", swap(`"gpus":0`, `"gpus":"0"`), "gpus"},
		{"too large for 64 bits", swap(`"context":2048`, `"context":9223372036854775808`), "9223372036854775808"},
		{"a string as a number", swap(`"revision":"1"`, `"revision":1`), "revision"},
		{"an object for an array", swap(`[`+model+`]`, `{}`), "models"},

		{"nested deeply", strings.Repeat("[", 5000) + strings.Repeat("]", 5000), "nested too deeply"},
		{"nested deeply in a field", swap(`"gpus":0`, `"gpus":`+strings.Repeat(`{"a":`, 9)+`0`+strings.Repeat("}", 9)), "nested too deeply"},
		{"more than 64 KiB", good + strings.Repeat(" ", MaxSize), "at most 65536"},

		{"letters beyond ASCII", swap(`chrysalis/demo`, `chrysalis/dèmo`), "models[0].name"},
		{"bytes that are not UTF-8", swap(`chrysalis/demo`, "chrysalis/dem\xff"), "models[0].name"},
		{"half a surrogate pair", swap(`chrysalis/demo`, `chrysalis/dem\ud800`), "models[0].name"},
		{"a control character", swap(`chrysalis/demo`, "chrysalis/dem\x01"), "invalid character"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(tt.data))
			if err == nil {
				t.Fatal("it is read")
			}
			if !strings.HasPrefix(err.Error(), "manifest: ") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %q does not say %q", err, tt.says)
			}
		})
	}
}

// TestBounds has a row for each bound, just inside and just outside.
func TestBounds(t *testing.T) {
	long := strings.Repeat("x", 64)
	models := func(n int) func(*Manifest) {
		return func(m *Manifest) {
			model := m.Models[0]
			m.Models = nil
			for i := range n {
				model.Name = fmt.Sprintf("chrysalis/demo-%d", i)
				m.Models = append(m.Models, model)
			}
		}
	}
	parameter := func(name string, value int64) func(*Manifest) {
		return func(m *Manifest) { m.Parameters[name] = value }
	}
	name := func(s string) func(*Manifest) { return func(m *Manifest) { m.Models[0].Name = s } }
	payment := func(step int64, ceilings ...pay.Price) func(*Manifest) {
		return func(m *Manifest) { m.Payment = &Payment{Network: 1, Step: step, Ceilings: ceilings} }
	}
	revision := func(s string) func(*Manifest) { return func(m *Manifest) { m.Models[0].Revision = s } }
	for _, tt := range []struct {
		name string
		edit func(*Manifest)
		says string // "" is accepted
	}{
		{"version 0", func(m *Manifest) { m.Version = 0 }, "version is 0"},
		{"version 2", func(m *Manifest) { m.Version = 2 }, "version is 2"},
		{"root hash of 63 digits", func(m *Manifest) { m.Engine.RootHash = hashE[1:] }, "engine.root_hash"},
		{"root hash of 65 digits", func(m *Manifest) { m.Engine.RootHash = hashE + "0" }, "engine.root_hash"},
		{"root hash in capitals", func(m *Manifest) { m.Engine.RootHash = strings.ToUpper(hashE) }, "engine.root_hash"},
		{"root hash and a line's end", func(m *Manifest) { m.Engine.RootHash = hashE + "\n" }, "engine.root_hash"},
		{"a model's root hash", func(m *Manifest) { m.Models[0].Disk.RootHash = "" }, "models[0].disk.root_hash"},
		{"salt of 256 bytes", func(m *Manifest) { m.Engine.Salt = strings.Repeat("ab", 256) }, ""},
		{"salt of 257 bytes", func(m *Manifest) { m.Engine.Salt = strings.Repeat("ab", 257) }, "engine.salt"},
		{"salt of half a byte", func(m *Manifest) { m.Engine.Salt = "abc" }, "engine.salt"},
		{"salt in capitals", func(m *Manifest) { m.Engine.Salt = "AB" }, "engine.salt"},
		{"a model's salt", func(m *Manifest) { m.Models[0].Disk.Salt = "-" }, "models[0].disk.salt"},
		{"0 data blocks", func(m *Manifest) { m.Engine.DataBlocks = 0 }, "engine.data_blocks"},
		{"-1 data blocks", func(m *Manifest) { m.Engine.DataBlocks = -1 }, "engine.data_blocks"},
		{"2^31 data blocks", func(m *Manifest) { m.Engine.DataBlocks = 1 << 31 }, ""},
		{"2^31+1 data blocks", func(m *Manifest) { m.Engine.DataBlocks = 1<<31 + 1 }, "engine.data_blocks"},
		{"a model's data blocks", func(m *Manifest) { m.Models[0].Disk.DataBlocks = 0 }, "models[0].disk.data_blocks"},
		{"no model", models(0), "models: there are 0"},
		{"16 models", models(16), ""},
		{"17 models", models(17), "models: there are 17"},
		{"a model's name twice", func(m *Manifest) { m.Models = append(m.Models, m.Models[0]) }, `models[1].name: "chrysalis/demo" is there twice`},
		{"a name of 64/64", name(long + "/" + long), ""},
		{"a name of 65/1", name(long + "x/x"), "models[0].name"},
		{"a name of 1/65", name("x/" + long + "x"), "models[0].name"},
		{"a name without a slash", name("demo"), "models[0].name"},
		{"a name with two", name("a/b/c"), "models[0].name"},
		{"a name that starts with a dot", name("a/.b"), "models[0].name"},
		{"a name that starts with a hyphen", name("-a/b"), "models[0].name"},
		{"a name with a space", name("a/b c"), "models[0].name"},
		{"a name that JSON escapes", name("a/b<c"), "models[0].name"},
		{"a name and a line's end", name("a/b\n"), "models[0].name"},
		{"a revision of 64", revision(long), ""},
		{"a revision of 65", revision(long + "x"), "models[0].revision"},
		{"an empty revision", revision(""), "models[0].revision"},
		{"a revision with a slash", revision("a/b"), "models[0].revision"},
		{"-1 GPUs", func(m *Manifest) { m.GPUs = -1 }, "gpus: -1"},
		{"8 GPUs", func(m *Manifest) { m.GPUs = 8 }, ""},
		{"9 GPUs", func(m *Manifest) { m.GPUs = 9 }, "gpus: 9"},
		{"no parameters", func(m *Manifest) { m.Parameters = nil }, "parameters: missing"},
		{"65 parameters", func(m *Manifest) {
			for i := range 63 {
				m.Parameters[fmt.Sprintf("p%d", i)] = 0
			}
		}, "parameters: there are 65"},
		{"a parameter of 2^53-1", parameter("context", 1<<53-1), ""},
		{"a parameter of 2^53", parameter("context", 1<<53), "parameters.context: 9007199254740992"},
		{"a parameter of -2^53", parameter("context", -1<<53), "parameters.context"},
		{"a parameter's name of 32", parameter("a"+long[:31], 0), ""},
		{"a parameter's name of 33", parameter("a"+long[:32], 0), "is not a parameter's name"},
		{"a parameter's name in capitals", parameter("Context", 0), `"Context" is not`},
		{"a parameter without a name", parameter("", 0), `"" is not`},
		{"a parameter's name like an option", parameter("--host", 0), `"--host" is not`},
		{"bodies of 1 KiB", func(m *Manifest) { m.Limits.BodyBytes = 1 << 10 }, ""},
		{"bodies of less", func(m *Manifest) { m.Limits.BodyBytes = 1<<10 - 1 }, "limits.body_bytes"},
		{"bodies of more than 16 MiB", func(m *Manifest) { m.Limits.BodyBytes = 16<<20 + 1 }, "limits.body_bytes"},
		{"no requests", func(m *Manifest) { m.Limits.Concurrency = 0 }, "limits.concurrency"},
		{"1024 requests", func(m *Manifest) { m.Limits.Concurrency = 1024 }, ""},
		{"1025 requests", func(m *Manifest) { m.Limits.Concurrency = 1025 }, "limits.concurrency"},
		{"no idle time", func(m *Manifest) { m.Limits.IdleSeconds = 0 }, "limits.idle_seconds"},
		{"an hour of idle time", func(m *Manifest) { m.Limits.IdleSeconds = 3600 }, ""},
		{"more idle time", func(m *Manifest) { m.Limits.IdleSeconds = 3601 }, "limits.idle_seconds"},
		{"no time", func(m *Manifest) { m.Limits.TotalSeconds = 0 }, "limits.total_seconds"},
		{"a payment", payment(1, pay.Price{Completion: 1}), ""},
		{"a payment of all that can be", payment(pay.MaxStep, pay.Price{Prompt: pay.MaxPrice, Completion: pay.MaxPrice}), ""},
		{"a step of 0", payment(0, pay.Price{Prompt: 1}), "payment.step"},
		{"a step of more than can be", payment(pay.MaxStep+1, pay.Price{Prompt: 1}), "payment.step"},
		{"no ceilings", payment(1), "payment.ceilings: there are 0"},
		{"a ceiling too many", payment(1, pay.Price{Prompt: 1}, pay.Price{Prompt: 1}), "payment.ceilings: there are 2"},
		{"a ceiling below 0", payment(1, pay.Price{Prompt: -1, Completion: 1}), "payment.ceilings[0]"},
		{"a ceiling of more than can be", payment(1, pay.Price{Prompt: 1, Completion: pay.MaxPrice + 1}), "payment.ceilings[0]"},
		{"ceilings of nothing", payment(1, pay.Price{}), "payment.ceilings: all are 0"},
		{"a day", func(m *Manifest) { m.Limits.TotalSeconds = 86400 }, ""},
		{"more than a day", func(m *Manifest) { m.Limits.TotalSeconds = 86401 }, "limits.total_seconds"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := sample()
			tt.edit(m)
			data, err := m.Encode()
			if (err == nil) != (tt.says == "") || (err != nil && !strings.Contains(err.Error(), tt.says)) {
				t.Fatalf("error %v, expected %q", err, tt.says)
			}
			if err == nil {
				if _, err := Parse(data); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestTariff puts prices beside their ceilings.
func TestTariff(t *testing.T) {
	m := paid()
	m.Models = append(m.Models, Model{Name: "chrysalis/free", Revision: "2", Disk: m.Models[0].Disk})
	m.Payment.Ceilings = append(m.Payment.Ceilings, pay.Price{})
	ceilings, ok := m.Ceilings()
	want := pay.Tariff{Step: 10_000_000, Models: map[string]pay.Price{"chrysalis/demo@1": {Prompt: 100, Completion: 300}, "chrysalis/free@2": {}}}
	if !ok || !reflect.DeepEqual(ceilings, want) || ceilings.Validate() != nil {
		t.Errorf("%+v", ceilings)
	}
	if lower, err := m.Tariff([]pay.Price{{Prompt: 99}, {}}); err != nil || lower.Models["chrysalis/demo@1"] != (pay.Price{Prompt: 99}) {
		t.Errorf("%+v, %v", lower, err)
	}
	for name, prices := range map[string][]pay.Price{
		"none": nil, "one": {{}}, "three": {{}, {}, {}}, "one above": {{Prompt: 101}, {}}, "a price for what is free": {{}, {Completion: 1}}, "one below 0": {{Completion: -1}, {}},
	} {
		if _, err := m.Tariff(prices); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, ok := sample().Ceilings(); ok {
		t.Error("ceilings of a VM that serves for free")
	}
	if _, err := sample().Tariff([]pay.Price{{}}); err == nil || !strings.Contains(err.Error(), "for free") {
		t.Errorf("prices of a VM that serves for free: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(encode(f, sample()))
	f.Add(encode(f, paid()))
	if data, err := os.ReadFile("testdata/canonical.json"); err == nil {
		f.Add(data)
	}
	for _, s := range []string{"{}", "[[[[", `{"version":1}`, `{"a":{"a":1},"a":2}`, `[]]`, `{"version":1,"version":1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Parse(data)
		if err != nil {
			return
		}
		again, err := m.Encode()
		if err != nil {
			t.Fatalf("read but not written: %v", err)
		}
		if !bytes.Equal(again, data) {
			t.Fatalf("read:\n%s\nwritten:\n%s", data, again)
		}
	})
}
