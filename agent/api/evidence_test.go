package api

import (
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/agent/proof"
	"chrysalis/attest/evidence"
	"chrysalis/manifest"
)

func TestEvidence(t *testing.T) {
	const doc = `{"version":1}`
	var asked [evidence.NonceSize]byte
	b := start(t, nil, func(c *Config) {
		c.Evidence = func(_ context.Context, nonce [evidence.NonceSize]byte) ([]byte, error) {
			asked = nonce
			return []byte(doc), nil
		}
	}, nil)
	// Whether the engine answers does not matter.
	b.ready.Store(false)
	nonce := [evidence.NonceSize]byte{0xff, 0xef, 31: 7}
	resp, body := b.do(t, b.request(t, "GET", evidence.Path+"?nonce="+base64.RawURLEncoding.EncodeToString(nonce[:]), ""))
	if resp.StatusCode != 200 || body != doc || asked != nonce {
		t.Errorf("%s %s, asked for %x", resp.Status, body, asked)
	}

	good := strings.Repeat("A", 43)
	for name, query := range map[string]string{
		"none": "", "empty": "?", "no value": "?nonce", "no nonce": "?nonce=", "short": "?nonce=" + good[1:], "long": "?nonce=" + good + "A",
		"padded": "?nonce=" + good + "=", "bits left over": "?nonce=" + good[1:] + "B", "the other alphabet": "?nonce=+/" + good[2:],
		"twice": "?nonce=" + good + "&nonce=" + good, "more": "?nonce=" + good + "&x", "another name": "?Nonce=" + good,
		"escaped": "?nonce=%41" + good[1:], "two marks": "??nonce=" + good, "a line break": "?nonce=" + good[2:] + "%0A",
	} {
		resp, body := b.do(t, b.request(t, "GET", evidence.Path+query, ""))
		if param := wantError(t, resp, body, 400, "nonce_invalid"); param != "nonce" {
			t.Errorf("%s: the parameter %q", name, param)
		}
	}
	resp, body = b.do(t, b.request(t, "POST", evidence.Path+"?nonce="+good, "{}"))
	wantError(t, resp, body, 405, "method_not_allowed")
	resp, body = b.do(t, b.request(t, "GET", evidence.Path+"?nonce="+good, "{}"))
	wantError(t, resp, body, 400, "body_not_allowed")
	b.Drain()
	resp, body = b.do(t, b.request(t, "GET", evidence.Path+"?nonce="+good, ""))
	wantError(t, resp, body, 503, "draining")
}

func TestEvidenceFails(t *testing.T) {
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{proof.ErrBusy, 429, "busy"},
		{proof.ErrTimeout, 503, "evidence_failed"},
		{errors.New("the TPM's own words"), 503, "evidence_failed"},
	} {
		b := start(t, nil, func(conf *Config) {
			conf.Evidence = func(context.Context, [evidence.NonceSize]byte) ([]byte, error) { return nil, c.err }
		}, nil)
		resp, body := b.do(t, b.request(t, "GET", evidence.Path+"?nonce="+strings.Repeat("A", 43), ""))
		wantError(t, resp, body, c.status, c.code)
		if resp.Header.Get("Retry-After") == "" || strings.Contains(body, "TPM") {
			t.Errorf("%v %s", resp.Header, body)
		}
	}
}

// What clients that read slowly hold is bounded by the memory for bodies.
func TestEvidenceMemory(t *testing.T) {
	doc := []byte(strings.Repeat("x", 100<<10))
	b := start(t, nil, func(c *Config) {
		c.Limits = manifest.DefaultLimits
		c.Limits.BodyBytes = 1 << 10
		c.BodyMemory = 64 << 10
		c.Evidence = func(context.Context, [evidence.NonceSize]byte) ([]byte, error) { return doc, nil }
	}, nil)
	query := evidence.Path + "?nonce=" + strings.Repeat("A", 43)
	resp, body := b.do(t, b.request(t, "GET", query, ""))
	wantError(t, resp, body, 429, "busy")
	b.memory.Add(100 << 10)
	if resp, _ := b.do(t, b.request(t, "GET", query, "")); resp.StatusCode != 200 {
		t.Error(resp.Status)
	}
}

// Who waits for evidence takes nobody's place.
func TestEvidenceTakesNoPlace(t *testing.T) {
	release := make(chan struct{})
	waiting := make(chan struct{}, 100)
	b := start(t, answer, func(c *Config) {
		c.Limits.Concurrency = 1
		c.Evidence = func(context.Context, [evidence.NonceSize]byte) ([]byte, error) {
			waiting <- struct{}{}
			<-release
			return []byte("{}"), nil
		}
	}, nil)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			resp, err := b.client.Do(b.request(t, "GET", evidence.Path+"?nonce="+strings.Repeat("A", 43), ""))
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			if resp.StatusCode != 200 {
				t.Error(resp.Status)
			}
		})
	}
	for n := range 100 { // as many handshakes take a busy machine seconds
		select {
		case <-waiting:
		case <-time.After(10 * time.Second):
			t.Fatalf("only %d wait", n)
		}
	}
	if resp, body := b.post(t, "/v1/chat/completions", hello); resp.StatusCode != 200 {
		t.Errorf("a client beside them got %s: %s", resp.Status, body)
	}
	close(release)
	all.Wait()
}

// A time limit that is about the engine does not end the wait for evidence.
func TestEvidenceOutlastsTotal(t *testing.T) {
	const total = 100 * time.Millisecond
	b := start(t, nil, func(c *Config) {
		c.Evidence = func(context.Context, [evidence.NonceSize]byte) ([]byte, error) {
			time.Sleep(total + 50*time.Millisecond)
			return []byte("{}"), nil
		}
	}, func(s *Server) { s.total = total })
	resp, body := b.do(t, b.request(t, "GET", evidence.Path+"?nonce="+strings.Repeat("A", 43), ""))
	if resp.StatusCode != 200 || body != "{}" {
		t.Errorf("%s %s", resp.Status, body)
	}
}

// Collateral is for everybody, and there in a VM with GPUs only.
func TestGPUCollateral(t *testing.T) {
	b := start(t, nil, nil, nil)
	resp, body := b.do(t, b.request(t, "GET", evidence.GPUCollateralPath, ""))
	wantError(t, resp, body, 404, "unknown_path")

	collateral := strings.Repeat("x", 4<<20)
	b = start(t, nil, func(c *Config) {
		c.GPUCollateral = []byte(collateral)
		c.Tokens = []string{manifest.TokenHash("somebody's")}
	}, nil)
	b.ready.Store(false)
	resp, body = b.do(t, b.request(t, "GET", evidence.GPUCollateralPath, ""))
	if resp.StatusCode != 200 || body != collateral || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%s, %d bytes", resp.Status, len(body))
	}
	resp, body = b.do(t, b.request(t, "GET", evidence.GPUCollateralPath+"?x", ""))
	wantError(t, resp, body, 400, "query_not_allowed")
	resp, body = b.do(t, b.request(t, "POST", evidence.GPUCollateralPath, "{}"))
	wantError(t, resp, body, 405, "method_not_allowed")
	resp, body = b.do(t, b.request(t, "GET", evidence.GPUCollateralPath, "{}"))
	wantError(t, resp, body, 400, "body_not_allowed")
}
