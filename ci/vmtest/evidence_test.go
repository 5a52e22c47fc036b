package vmtest

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/cryptutil"
	"github.com/canonical/go-tpm2/mu"

	"chrysalis/attest/evidence"
	"chrysalis/attest/receipt"
	"chrysalis/launcher"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
)

// TestEvidence fetches evidence out of a VM as a client would, and checks each
// part against the others and against what was booted.
func TestEvidence(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	const token = "sk-0123456789abcdef0123456789abcdef"
	tokens := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(tokens, []byte("# one client\n"+token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	endpoint := h.up("--engine", llama, "--model", demo, "--token-file", tokens)
	c := newClient(t, endpoint) // without a token

	// Asked for at the same time: the first alone, the others with one quote, or
	// two.
	const clients = 8
	documents := make([]*evidence.Document, clients)
	bodies := make([]string, clients)
	keys := make([][]byte, clients)
	nonces := make([][]byte, clients)
	var all sync.WaitGroup
	for i := range clients {
		nonces[i] = make([]byte, evidence.NonceSize)
		rand.Read(nonces[i])
		all.Go(func() {
			resp, body := c.send("GET", evidence.Path+"?nonce="+base64.RawURLEncoding.EncodeToString(nonces[i]), nil)
			if resp.StatusCode != 200 {
				t.Errorf("%s: %s", resp.Status, body)
				return
			}
			d, err := evidence.Parse([]byte(body))
			if err != nil {
				t.Error(err)
				return
			}
			documents[i], bodies[i], keys[i] = d, body, resp.TLS.PeerCertificates[0].RawSubjectPublicKeyInfo
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	different := map[string]bool{}
	for i, d := range documents {
		different[bodies[i]] = true
		if !d.Lists(nonces[i]) {
			t.Errorf("document %d does not list its nonce", i)
		}
		if !bytes.Equal(d.TLSKey, keys[i]) {
			t.Errorf("document %d is for another TLS key than its connection's", i)
		}
	}
	t.Logf("%d clients got %d documents, the first of %d bytes", clients, len(different), len(bodies[0]))
	if len(different) == clients {
		t.Error("no two nonces shared a quote")
	}

	d := documents[0]
	if d.TPM == nil {
		t.Fatal("the evidence is not a TPM's")
	}
	attested := checkQuote(t, h, d)

	// The event log and what it replays to.
	register, events, err := cel.Parse(d.CEL)
	if err != nil || register != cel.PCR15 {
		t.Fatalf("the VM's log is of %q: %v", register, err)
	}
	m, err := manifest.Parse(d.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	if m.Engine.RootHash != describe(t, llama).RootHash.String() || m.Models[0].Disk.RootHash != describe(t, demo).RootHash.String() {
		t.Errorf("the manifest names other disks: %s", d.Manifest)
	}
	expected, err := cel.Boot(d.Manifest, m, nil)
	if err != nil {
		t.Fatal(err)
	}
	want, err := cel.Encode(cel.PCR15, expected)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, d.CEL) {
		t.Errorf("the events are not those of a boot with this manifest: %d events", len(events))
	}
	bank, _ := cel.Replay(events)
	zero := make([]byte, sha256.Size)
	for _, pcr := range d.TPM.PCRs {
		switch {
		case pcr.Index == 15 && !bytes.Equal(pcr.SHA256, bank[:]):
			t.Errorf("PCR 15 is %x, the events make it %x", pcr.SHA256, bank)
		case (pcr.Index == 4 || pcr.Index == 9 || pcr.Index == 11) && bytes.Equal(pcr.SHA256, zero):
			t.Errorf("PCR %d is zero", pcr.Index)
		case (pcr.Index == 8 || pcr.Index >= 12 && pcr.Index <= 14) && !bytes.Equal(pcr.SHA256, zero):
			t.Errorf("PCR %d is %x, expected zeros", pcr.Index, pcr.SHA256)
		}
	}
	// The firmware's log begins with the event that names its format.
	if !bytes.Contains(d.TPM.Log[:min(64, len(d.TPM.Log))], []byte("Spec ID Event03")) {
		t.Errorf("the firmware's log of %d bytes does not begin as one", len(d.TPM.Log))
	}
	t.Logf("quote of %d bytes, firmware's log of %d, CEL of %d, clock %d", len(d.TPM.Quote), len(d.TPM.Log), len(d.CEL), attested.ClockInfo.Clock)

	if len(m.Tokens) != 1 || m.Tokens[0] != manifest.TokenHash(token) || bytes.Contains(d.Manifest, []byte(token)) {
		t.Errorf("the manifest does not hold the token's hash: %s", d.Manifest)
	}
	checkReceipt(t, c, d, token)

	for name, query := range map[string]string{
		"no nonce": "", "an empty query": "?", "an empty nonce": "?nonce=",
		"a short nonce":        "?nonce=" + strings.Repeat("A", 42),
		"a long nonce":         "?nonce=" + strings.Repeat("A", 44),
		"padding":              "?nonce=" + strings.Repeat("A", 43) + "=",
		"bits past the nonce":  "?nonce=" + strings.Repeat("A", 42) + "B",
		"another alphabet":     "?nonce=" + strings.Repeat("A", 41) + "+A",
		"two nonces":           "?nonce=" + strings.Repeat("A", 43) + "&nonce=" + strings.Repeat("A", 43),
		"another field":        "?nonce=" + strings.Repeat("A", 43) + "&a=b",
		"an escaped character": "?nonce=%41" + strings.Repeat("A", 42),
	} {
		if resp, body := c.send("GET", evidence.Path+query, nil); resp.StatusCode != 400 || !strings.Contains(body, "nonce_invalid") {
			t.Errorf("%s: %s: %s", name, resp.Status, body)
		}
	}
	if resp, body := c.send("POST", evidence.Path, strings.NewReader("{}")); resp.StatusCode != 405 {
		t.Errorf("POST: %s: %s", resp.Status, body)
	}
}

// checkReceipt asks with and without a token, and checks the receipt of the answer
// against the evidence.
func checkReceipt(t *testing.T, c *client, d *evidence.Document, token string) {
	t.Helper()
	for _, path := range []string{"/v1/models", "/v1/chat/completions"} {
		method, body := "GET", io.Reader(nil)
		if path != "/v1/models" {
			method, body = "POST", question("What is a TD?", false)
		}
		if resp, body := c.send(method, path, body); resp.StatusCode != 401 {
			t.Errorf("%s without a token: %s: %s", path, resp.Status, body)
		}
	}
	for _, stream := range []bool{false, true} {
		asked, err := io.ReadAll(question("What is a TD?", stream))
		if err != nil {
			t.Fatal(err)
		}
		salt := [receipt.SaltSize]byte{7}
		req, err := http.NewRequest("POST", c.endpoint+"/v1/chat/completions", bytes.NewReader(asked))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set(receipt.SaltHeader, receipt.FormatSalt(salt))
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s, %v: %s", resp.Status, err, body)
		}
		if stream {
			if body, _, err = receipt.SplitStream(body); err != nil {
				t.Fatal(err)
			}
		}
		r, err := receipt.Verify([]byte(resp.Trailer.Get(receipt.Trailer)), ed25519.PublicKey(d.ReceiptKey))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.CheckBodies(salt, asked, body), r.CheckManifest(d.Manifest)); err != nil {
			t.Error(err)
		}
		if r.Model != "chrysalis/demo@1" || r.RootHash != describe(t, demo).RootHash.String() || r.PromptTokens == nil || *r.PromptTokens == 0 ||
			r.CompletionTokens == nil || *r.CompletionTokens < 5 || *r.CompletionTokens > 96 {
			t.Errorf("got %+v", r)
		}
		t.Logf("a receipt of %d bytes, %d and %d tokens", len(resp.Trailer.Get(receipt.Trailer)), *r.PromptTokens, *r.CompletionTokens)
	}
}

// checkQuote checks the attestation key's chain to the host's development root,
// the signature, the nonces and keys that it covers, and the PCRs.
func checkQuote(t *testing.T, h *host, d *evidence.Document) *tpm2.Attest {
	t.Helper()
	path, err := launcher.DevelopmentRoot(h.dir + "/chrysalis")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(root.Subject.CommonName, "DEVELOPMENT") {
		t.Errorf("the development root is called %q", root.Subject.CommonName)
	}
	roots := x509.NewCertPool()
	roots.AddCert(root)
	leaf, err := x509.ParseCertificate(d.TPM.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("the attestation key's certificate: %v", err)
	}

	var public *tpm2.Public
	var attested *tpm2.Attest
	var signature *tpm2.Signature
	for _, part := range []struct {
		data []byte
		into any
	}{{d.TPM.AK, &public}, {d.TPM.Quote, &attested}, {d.TPM.Signature, &signature}} {
		if n, err := mu.UnmarshalFromBytes(part.data, part.into); err != nil || n != len(part.data) {
			t.Fatalf("%d of %d bytes: %v", n, len(part.data), err)
		}
	}
	if key, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(public.Public()) {
		t.Error("the certificate is of another key")
	}
	const restricted = tpm2.AttrFixedTPM | tpm2.AttrRestricted | tpm2.AttrSign
	if public.Attrs&restricted != restricted {
		t.Errorf("the attestation key's attributes are %v", public.Attrs)
	}
	digest := sha256.Sum256(d.TPM.Quote)
	if ok, err := cryptutil.VerifySignature(public.Public(), digest[:], signature); err != nil || !ok {
		t.Errorf("the quote's signature: %v, %v", ok, err)
	}
	if want := d.QualifyingData(); attested.Type != tpm2.TagAttestQuote || !bytes.Equal(attested.ExtraData, want[:]) {
		t.Errorf("the quote is of type %v over %x, expected %x", attested.Type, []byte(attested.ExtraData), want)
	}
	all := sha256.New()
	for _, pcr := range d.TPM.PCRs {
		all.Write(pcr.SHA256)
	}
	if !bytes.Equal(attested.Attested.Quote.PCRDigest, all.Sum(nil)) {
		t.Error("the PCRs are not those that were quoted")
	}
	return attested
}
