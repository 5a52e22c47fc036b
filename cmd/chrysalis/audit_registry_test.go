package main

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/audit"
	"chrysalis/image/provenance"
	"chrysalis/registry"
)

// TestAuditRegistry audits what a registry has, and signs it only when every check was
// made and holds. Nothing is really built here.
func TestAuditRegistry(t *testing.T) {
	source, _, _ := fakeRelease(t)
	dir := t.TempDir()
	chain, _ := serveDevnet(t, dir)
	key, auditor := filepath.Join(dir, "publisher.key"), filepath.Join(dir, "auditor.key")
	address := fundedKey(t, chain, key)
	t.Setenv("CHRYSALIS_TON_KEY", key)
	do := func(args ...string) string {
		t.Helper()
		out, err := runCommand(t, args...)
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return out
	}
	public := strings.TrimSpace(do("registry", "new-key", auditor))
	do("registry", "init")
	file := vmRecords()
	write := func(name string) string {
		t.Helper()
		data, err := file.Encode()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write("good.json")
	do("registry", "publish", good)
	file.Engines[0].Name = "other"
	other := write("other.json")
	id := func(sum [32]byte) string { return hex.EncodeToString(sum[:]) }
	image, shape, engine := id(file.Image.Key()), id(file.Shapes[0].Key()), id(file.Engines[0].Key())

	flags := []string{"--source", source, "--mirror", t.TempDir(), "--registry", address, "--cosign", "--auditor-key", auditor}
	signed := func(key string) bool {
		t.Helper()
		return strings.Contains(do("registry", "show", address, key), "signed by")
	}
	for _, c := range []struct {
		name, what string
		code       int
		want       []string // in what is printed; of the error, where the status is 2
	}{
		{"an image of another commit", image, 1, []string{"✔  registry has " + image, "✘  working tree is at the record's commit", "not built"}},
		{"a shape", shape, 1, []string{"✔  registry has " + shape, "✔  registry has " + image, "not built"}},
		{"all records of a file", good, 1, []string{"✔  registry has " + image, "✔  registry has " + engine, "not built"}},
		{"a file with another record", other, 1, []string{"✘  registry has " + engine, "another than the file's", "✔  registry has " + image, "not built"}},
		{"a record that is not there", strings.Repeat("0", 64), 1, []string{"✘  registry has 0000", "not built"}},
		// The lock is too small to build anything.
		{"an engine, which no commit is named for", engine, 2, []string{"build what the record is about"}},
		{"neither key nor file", "nothing", 2, []string{"no key of 64"}},
	} {
		out, err := runCommand(t, append([]string{"audit", c.what}, flags...)...)
		if exitCode(err) != c.code {
			t.Errorf("%s: it ends with %d (%v), want %d", c.name, exitCode(err), err, c.code)
			continue
		}
		if c.code == 2 {
			out = err.Error()
		}
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: it prints\n%s\nand not %q", c.name, out, want)
			}
		}
	}

	cmd := AuditCmd{Release: good, Registry: address, Cosign: true, AuditorKey: auditor, TON: tonFlags{Network: "devnet", MaxAge: 120e9, Liteservers: 1}}
	cmd.KeyFile, cmd.payerFlags.Wallet = key, "v5r1"
	read, err := cmd.readRegistry(t.Context())
	if err != nil || len(read.found) != 4 || len(read.records) != 4 {
		t.Fatalf("%+v, %v", read, err)
	}
	conclude := func(checks ...provenance.Check) (string, error) {
		report := &audit.Report{OK: provenance.Passed(checks), Commit: strings.Repeat("c", 40), Checks: checks}
		return capture(t, func() error { return cmd.conclude(t.Context(), report, nil, read.found) })
	}
	pass, none, fail := provenance.Check{What: "a", Result: provenance.Pass}, provenance.Check{What: "b", Result: provenance.None}, provenance.Check{What: "c", Result: provenance.Fail}
	for name, c := range map[string]provenance.Check{"a check was not made": none, "a check fails": fail} {
		if _, err := conclude(pass, c); exitCode(err) != 1 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if signed(image) || signed(engine) {
		t.Fatal("it was signed before all checks held")
	}
	if out, err := conclude(pass, pass); err != nil || strings.Count(out, "cosign ") != 4 {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, key := range []string{image, shape, engine} {
		if out := do("registry", "show", address, key, "--auditor", public, "--signatures", "1"); !strings.Contains(out, public) {
			t.Errorf("it shows\n%s", out)
		}
	}
	do("registry", "revoke", image)
	if out, err := runCommand(t, append([]string{"audit", image}, flags...)...); exitCode(err) != 1 || !strings.Contains(out, registry.ErrRevoked.Error()) {
		t.Errorf("a revoked record: %v\n%s", err, out)
	}
}

func TestAuditFlags(t *testing.T) {
	t.Setenv("CHRYSALIS_TON_KEY", "")
	for want, args := range map[string][]string{
		"--registry":     {"audit", "r", "--cosign", "--key-file", "k"},
		"--key-file":     {"audit", "r", "--cosign", "--registry", "a"},
		"without --cosi": {"audit", "r", "--registry", "a", "--auditor-key", "k"},
	} {
		if _, err := parse(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}
