package measure

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"chrysalis/image/imagetest"
)

// PCR 11 of our image is what systemd's own tool calculates from its sections.
func TestSystemdMeasure(t *testing.T) {
	data := artefact(t, "chrysalis.efi")
	m, err := ReadUKI("chrysalis.efi", bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	args := []string{"/usr/lib/systemd/systemd-measure", "calculate", "--json=short", "--bank=sha256", "--bank=sha384", "--phase=:"}
	for _, name := range []string{"linux", "osrel", "cmdline", "initrd", "uname", "sbat"} {
		s := m.pe.Section("." + name)
		if s == nil {
			continue
		}
		section, err := content(s)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, section, 0o644); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--"+name+"="+path)
	}
	out, err := imagetest.Command(t, dir, args...).Output()
	if err != nil {
		t.Fatal(err)
	}
	var theirs map[string][]struct {
		PCR  int    `json:"pcr"`
		Hash string `json:"hash"`
	}
	if err := json.Unmarshal(out, &theirs); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, a := range map[string]Algorithm{"sha256": SHA256, "sha384": SHA384} {
		_, rest, err := m.events(a)
		if err != nil {
			t.Fatal(err)
		}
		if len(theirs[name]) != 1 || theirs[name][0].PCR != 11 {
			t.Fatalf("%s", out)
		}
		wantHex(t, "PCR 11 in "+name, PCRs(a, rest)[11].Value, theirs[name][0].Hash)
	}
}
