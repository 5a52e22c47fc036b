package vmtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"chrysalis/attest"
	"chrysalis/models"
)

// recordOf makes a measurement record from files alone, as a user does.
func recordOf(t *testing.T, h *host, image, engine, model string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "record.json")
	if r := h.run(time.Minute, "measure", "--platform", "tpm", "--image", image, "--engine", engine, "--model", model, "-o", path); r.code != 0 {
		t.Fatalf("measure: %s", r)
	}
	return path
}

// verdict is what 'chrysalis verify --json' prints.
type verdict struct {
	attest.Verdict
	Error string `json:"error"`
}

// verify runs 'chrysalis verify', which must end with a status and name a check,
// or none.
func (h *host) verify(code int, check attest.Name, args ...string) verdict {
	h.t.Helper()
	r := h.run(time.Minute, append([]string{"verify", "--json"}, args...)...)
	var v verdict
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || r.code != code || v.Failed != check || v.OK != (code == 0) || v.Confidential {
		h.t.Errorf("verify %s: expected status %d and the check %q: %s", strings.Join(args, " "), code, check, r)
	}
	return v
}

// verified is what a client that verifies sees of a VM with the demo model.
func verified(t *testing.T, h *host, endpoint string) {
	rec := recordOf(t, h, uki, llama, demo)
	trust := []string{"--record", rec, "--allow-not-confidential"}
	with := func(args ...string) []string { return append(slices.Clone(trust), args...) }

	t.Run("verify", func(t *testing.T) {
		v := h.verify(0, "", with(endpoint)...)
		if len(v.Checks) != 19 || strings.Join(v.Models, " ") != "chrysalis/demo@1" {
			t.Errorf("%+v", v)
		}
		r := h.run(time.Minute, append([]string{"verify", "default"}, trust...)...)
		if r.code != 0 || strings.Count(r.stdout, "✔") != 19 || !strings.Contains(r.stdout, "NOT CONFIDENTIAL") {
			t.Errorf("verify: %s", r)
		}
	})
	t.Run("the strictest policy", func(t *testing.T) { h.verify(1, attest.CheckPlatform, "--record", rec, endpoint) })
	t.Run("no record", func(t *testing.T) { h.verify(1, attest.CheckPCR4, "--allow-not-confidential", endpoint) })
	t.Run("nobody there", func(t *testing.T) { h.verify(2, "", with("https://127.0.0.1:1")...) })
	t.Run("another image's record", func(t *testing.T) {
		debug := strings.Replace(uki, "chrysalis.efi", "chrysalis-debug.efi", 1)
		if _, err := os.Stat(debug); err != nil {
			t.Skip(err)
		}
		h.verify(1, attest.CheckPCR4, "--allow-not-confidential", "--record", recordOf(t, h, debug, llama, demo), endpoint)
	})
	t.Run("saved", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "saved")
		h.verify(0, "", with("--save", dir, endpoint)...)
		h.verify(0, "", "--offline", dir)
		path := filepath.Join(dir, attest.FileEvidence)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Replace(data, []byte(`"manifest":"ey`), []byte(`"manifest":"fy`), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		h.verify(1, attest.CheckReportData, "--offline", dir)
	})
	t.Run("chat", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "saved")
		r := h.run(2*time.Minute, append([]string{"chat", "What is a TD?", "--checks", "--save", dir}, trust...)...)
		if r.code != 0 || !strings.Contains(r.stdout, "TDX") || strings.Count(r.stderr, "✔") != 19 {
			t.Errorf("chat: %s", r)
		}
		if r := h.run(time.Minute, "verify", "receipt", dir); r.code != 0 || !strings.Contains(r.stdout, "chrysalis/demo@1 answered these bodies") {
			t.Errorf("verify receipt: %s", r)
		}
		path := filepath.Join(dir, "request.json")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Replace(data, []byte("What is"), []byte("Who is "), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := h.run(time.Minute, "verify", "receipt", dir); r.code != 1 || !strings.Contains(r.stderr, "another request") {
			t.Errorf("verify receipt with another question: %s", r)
		}
		if r := h.run(time.Minute, "chat", "What is a TD?"); r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "✘ platform") {
			t.Errorf("chat under the strictest policy: %s", r)
		}
	})
	t.Run("an unmodified OpenAI client, through the proxy", func(t *testing.T) {
		base := startProxy(t, h, with("--worker", endpoint)...)
		openaiClient(t, base)
		for path, want := range map[string]string{"/": "chrysalis/demo@1", "/metrics": `chrysalis_proxy_worker_verified{worker="` + endpoint + `"} 1`} {
			answer, err := http.Get(strings.TrimSuffix(base, "/v1") + path)
			if err != nil {
				t.Fatal(err)
			}
			data, err := io.ReadAll(answer.Body)
			answer.Body.Close()
			if err != nil || !strings.Contains(string(data), want) || strings.Contains(string(data), "Who can read") {
				t.Errorf("%s: %v: %s", path, err, data)
			}
		}
	})
	t.Run("the proxy under the strictest policy", func(t *testing.T) {
		base := startProxy(t, h, "--record", rec, "--worker", endpoint)
		answer, err := http.Post(base+"/chat/completions", "application/json", question("What is a TD?", false))
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		data, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode != 503 || !strings.Contains(string(data), "platform") {
			t.Errorf("%d: %s, %v", answer.StatusCode, data, err)
		}
	})
}

// startProxy runs 'chrysalis proxy' until the test ends, and returns its base URL.
func startProxy(t *testing.T, h *host, args ...string) string {
	t.Helper()
	base, _ := startProxyLog(t, h, args...)
	return base
}

// startProxyLog returns the file that has all that it writes, too.
func startProxyLog(t *testing.T, h *host, args ...string) (base, said string) {
	t.Helper()
	said = filepath.Join(t.TempDir(), "proxy.log")
	log, err := os.Create(said)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	cmd := exec.Command(program, append([]string{"proxy", "--listen", "127.0.0.1:0"}, args...)...)
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+h.dir)
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			text, _ := os.ReadFile(said)
			t.Errorf("proxy: %v\n%s", err, text)
		}
	})
	if _, err := fmt.Fscanln(io.TeeReader(stdout, log), &base); err != nil {
		t.Fatalf("proxy: %v", err)
	}
	go io.Copy(log, stdout)
	return base, said
}

// TestChangedByte boots what differs in one byte from what a client expects: the
// VM runs, and every client refuses it under the right name.
func TestChangedByte(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	rec := recordOf(t, h, uki, llama, demo)
	trust := []string{"--record", rec, "--allow-not-confidential"}

	t.Run("image", func(t *testing.T) {
		data, err := os.ReadFile(uki)
		if err != nil {
			t.Fatal(err)
		}
		// A letter of the section .osrel, which nothing in the VM reads.
		if n := bytes.Count(data, []byte("NAME=")); n == 0 {
			t.Fatal("the image has no os-release")
		}
		at := bytes.Index(data, []byte("NAME="))
		data[at+len("NAME=")+1] ^= 0x20
		changed := filepath.Join(t.TempDir(), "chrysalis.efi")
		if err := os.WriteFile(changed, data, 0o644); err != nil {
			t.Fatal(err)
		}
		endpoint := h.up("image", "--image", changed, "--engine", llama, "--model", demo)
		v := h.verify(1, attest.CheckPCR4, append(trust, endpoint)...)
		for _, c := range v.Checks {
			if c.Name == attest.CheckPCR4 && (c.Expected == "" || c.Found == "" || c.Expected == c.Found) {
				t.Errorf("%+v", c)
			}
		}
		if r := h.run(time.Minute, append([]string{"chat", "What is a TD?", "--endpoint", "image"}, trust...)...); r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "✘ pcr4") {
			t.Errorf("chat: %s", r)
		}
	})
	t.Run("model and manifest", func(t *testing.T) {
		gguf := filepath.Join(source, "models", "demo", "demo.gguf")
		data, err := os.ReadFile(gguf)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)-1] ^= 1 // a weight
		changed, disk := filepath.Join(t.TempDir(), "demo.gguf"), filepath.Join(t.TempDir(), "demo.disk")
		if err := os.WriteFile(changed, data, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := models.Pack(t.Context(), changed, models.PackOptions{Name: "chrysalis/demo", Revision: "1", Out: disk}); err != nil {
			t.Fatal(err)
		}
		endpoint := h.up("model", "--engine", llama, "--model", disk)
		v := h.verify(1, attest.CheckModel, append(trust, endpoint)...)
		if last := v.First(); last == nil || last.Expected == "" || last.Subject != "chrysalis/demo@1" {
			t.Errorf("%+v", last)
		}
		// A client that pins the manifest sees that first.
		policy := filepath.Join(t.TempDir(), "policy.json")
		if err := os.WriteFile(policy, []byte(`{"version":1,"manifests":["`+strings.Repeat("0", 64)+`"]}`), 0o644); err != nil {
			t.Fatal(err)
		}
		h.verify(1, attest.CheckManifest, append(trust, "--policy", policy, endpoint)...)
	})
}
