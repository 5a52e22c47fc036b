package vmtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/engine/enginetest"
	"chrysalis/models"
	"chrysalis/models/card"
	"chrysalis/verity/disk"
)

// pack packs the demo model under a name, with the CLI.
func (h *host) pack(name, revision string) string {
	h.t.Helper()
	out := filepath.Join(h.t.TempDir(), "model.disk")
	r := h.run(time.Minute, "model", "pack", "models/demo/demo.gguf", "--name", name, "--revision", revision, "-o", out)
	if r.code != 0 {
		h.t.Fatalf("pack: %s", r)
	}
	return out
}

// ask asks a model and returns the status and the answer.
func (c *client) ask(model string) (int, string) {
	c.t.Helper()
	data, _ := json.Marshal(map[string]any{
		"model": model, "temperature": 0, "max_tokens": 32,
		"messages": []map[string]string{{"role": "user", "content": "What is a TD?"}},
	})
	resp, body := c.send("POST", "/v1/chat/completions", bytes.NewReader(data))
	return resp.StatusCode, body
}

// TestTwoModels boots llama.cpp with two models; each is served by an engine of its
// own, under each of the ways to name it.
func TestTwoModels(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	second := h.pack("acme/second", "v2")
	c := newClient(t, h.up("--engine", llama, "--model", demo, "--model", second, "--shape", "small"))
	one, err := models.Inspect(demo)
	if err != nil {
		t.Fatal(err)
	}
	two, err := models.Inspect(second)
	if err != nil {
		t.Fatal(err)
	}
	_, list := c.send("GET", "/v1/models", nil)
	for _, m := range []models.Info{one, two} {
		if !strings.Contains(list, `"id":"`+m.ID()+`"`) || !strings.Contains(list, m.Disk.RootHash.String()) {
			t.Errorf("the list lacks %s: %s", m.Ref(), list)
		}
		for _, name := range []string{m.Name, m.ID(), m.Ref()} {
			status, body := c.ask(name)
			// The engine answers under the name that it was given.
			if status != 200 || !strings.Contains(body, `"model":"`+m.Name+`"`) {
				t.Errorf("%s: %d %s", name, status, body)
			}
		}
	}
	for _, name := range []string{
		one.ID() + ":" + two.Disk.RootHash.String(), one.Name + "@2", one.Name + ":" + one.Disk.RootHash.String(),
		one.ID() + ":" + strings.ToUpper(one.Disk.RootHash.String()), "acme/third",
	} {
		if status, body := c.ask(name); status != 404 || !strings.Contains(body, "model_not_found") {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
}

// TestWrongFormat boots an engine with a model that it does not read, and a model
// that is not the one that the manifest says.
func TestWrongFormat(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	header := `{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}`
	for name, data := range map[string]string{
		"config.json": "{}", "model.safetensors": string([]byte{byte(len(header)), 0, 0, 0, 0, 0, 0, 0}) + header + "12345678",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "x.disk")
	if _, err := models.Pack(t.Context(), dir, models.PackOptions{Name: "a/b", Revision: "1", Out: out}); err != nil {
		t.Fatal(err)
	}
	newHost(t).upFails("engine-profile", "--engine", llama, "--model", out)

	renamed := writeManifest(t, llama, demo, func(b []byte) []byte {
		return bytes.Replace(b, []byte("chrysalis/demo"), []byte("chrysalis/fake"), 1)
	})
	newHost(t).upFails("disk-format", "--engine", llama, "--model", demo, "--manifest", renamed)
}

// TestOCIEngine makes an OCI layout whose server stands in for vLLM: it is started
// by vLLM's profile, with vLLM's arguments, and talks to itself over the loopback
// device as vLLM's processes do. Only the need of a GPU is taken out of the profile.
func TestOCIEngine(t *testing.T) {
	t.Parallel()
	server, err := os.ReadFile(testProgram(t, "engine"))
	if err != nil {
		t.Fatal(err)
	}
	profile, err := os.ReadFile(filepath.Join(source, "image/engines/vllm/profile.json"))
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(profile, []byte(`"needs": {"memory_mib": 16384, "gpus": {"min": 1,`), []byte(`"needs": {"memory_mib": 64, "gpus": {"min": 0,`), 1)
	if bytes.Equal(changed, profile) {
		t.Fatal("the profile has other needs than this test thinks")
	}
	path := filepath.Join(t.TempDir(), "profile.json")
	if err := os.WriteFile(path, changed, 0o644); err != nil {
		t.Fatal(err)
	}
	src := enginetest.New(t,
		enginetest.Layer{enginetest.Dir("usr/"), enginetest.Dir("usr/bin/"), enginetest.File("usr/bin/python3", "an old one", 0o755), enginetest.File("etc/old", "x", 0o644)},
		enginetest.Layer{enginetest.File("etc/.wh.old", "", 0), enginetest.File("opt/server", string(server), 0o755)},
		enginetest.Layer{enginetest.File("usr/bin/.wh.python3", "", 0), enginetest.Link("usr/bin/python3", "/opt/server")},
	).Write(t)
	h := newHost(t)
	out := filepath.Join(t.TempDir(), "vllm.disk")
	r := h.run(time.Minute, "engine", "pack", src, "--profile", path, "-o", out)
	if r.code != 0 || !strings.HasPrefix(r.stdout, "vllm:") || !strings.Contains(r.stderr, "not been run") {
		t.Fatalf("pack: %s", r)
	}

	// Two weights files and an index, as vLLM reads them.
	dir := t.TempDir()
	header := `{"%s":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]}}`
	write := func(name, data string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("config.json", `{"max_position_embeddings":128}`)
	write("model.safetensors.index.json", `{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}`)
	for i, name := range []string{"a", "b"} {
		text := fmt.Sprintf(header, name)
		write(fmt.Sprintf("model-%05d-of-00002.safetensors", i+1), string([]byte{byte(len(text)), 0, 0, 0, 0, 0, 0, 0})+text+strings.Repeat("x", 4096))
	}
	model := filepath.Join(t.TempDir(), "model.disk")
	if r := h.run(time.Minute, "model", "pack", dir, "--name", "acme/sharded", "--revision", "r1", "-o", model); r.code != 0 {
		t.Fatalf("pack: %s", r)
	}
	c := newClient(t, h.up("--engine", out, "--model", model, "--parameter", "context=64"))
	log := h.run(time.Minute, "logs", "--engine").stdout
	for _, want := range []string{
		"--model /models/acme/sharded --served-model-name acme/sharded", "--tensor-parallel-size 1", "--gpu-memory-utilization 0.90", "--max-model-len 64",
		"engine: sees config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.json model.safetensors.index.json in /models/acme/sharded",
		"engine: talks to itself over 127.0.0.1", "engine: nothing else can be reached",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the engine's log lacks %q:\n%s", want, log)
		}
	}
	if status, body := c.ask("acme/sharded@r1"); status != 200 || !strings.Contains(body, "done") {
		t.Errorf("%d %s", status, body)
	}
}

// TestHugeDisk boots a VM with a model disk of 1 TiB, of which nothing but the
// metadata is there. It is opened at once; reading the weights ahead then meets what
// does not match, and that ends the VM.
func TestHugeDisk(t *testing.T) {
	t.Parallel()
	path := sparseModel(t, 1<<40)
	begin := time.Now()
	info, err := models.Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 5*time.Second || info.Size() < 1<<40 {
		t.Errorf("inspected %d bytes in %v", info.Size(), took)
	}
	stdout := newHost(t).upFails("disk-corrupt", "--engine", testEngine(t, "serve"), "--model", path)
	if !strings.Contains(stdout, `"phase":"engine"`) {
		t.Errorf("the disk was not opened: %s", stdout)
	}
}

// sparseModel makes a model disk of which only the metadata, the card and their
// part of the hash tree are there: whatever else is read is corrupt.
func sparseModel(t *testing.T, size int64) string {
	t.Helper()
	c := &card.Card{
		Version: card.Version, Name: "huge/model", Revision: "1", Format: card.GGUF, Entry: "model.gguf",
		Files: []card.File{{Path: "model.gguf", Size: size, SHA256: strings.Repeat("0", 64)}},
	}
	data, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "huge.disk")
	if _, err := disk.WriteSparse(path, "model.gguf", size, card.Path, data); err != nil {
		t.Fatal(err)
	}
	return path
}
