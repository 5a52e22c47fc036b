package measure

import (
	"bytes"
	"crypto"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/image/imagetest"

	efi "github.com/canonical/go-efilib"
	mr "github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
)

// artefact opens what 'make image' makes, or ends the test as it must.
func artefact(t testing.TB, name string) []byte {
	t.Helper()
	source, err := imagetest.Source()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(source, "out", name))
	if err != nil {
		imagetest.Missing(t, fmt.Errorf("%w; run 'make image' first", err))
	}
	return data
}

// The Authenticode digests of our image and of a bare kernel are those of an
// implementation that shares no code with ours.
func TestAuthenticodeOracle(t *testing.T) {
	for name, data := range map[string][]byte{
		"UKI": artefact(t, "chrysalis.efi"), "kernel": debianKernel(t), "tiny": tinyPE(),
	} {
		t.Run(name, func(t *testing.T) {
			m, err := readImage(name, bytes.NewReader(data), int64(len(data)))
			if err != nil {
				t.Fatal(err)
			}
			for a, h := range map[Algorithm]crypto.Hash{SHA256: crypto.SHA256, SHA384: crypto.SHA384} {
				want, err := efi.ComputePeImageDigest(h, bytes.NewReader(data), int64(len(data)))
				if err != nil {
					t.Fatal(err)
				}
				got, err := m.Authenticode(a)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%v: %x, %v; expected %x", a, got, err, want)
				}
			}
		})
	}
}

// eventlogs lists go-eventlog's logs of real machines.
func eventlogs(t testing.TB) []string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-eventlog").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "testdata", "eventlogs", "*", "*"))
	if err != nil || len(files) < 20 {
		t.Fatalf("%d logs, %v", len(files), err)
	}
	return files
}

// replayed is a register as go-eventlog wants it.
type replayed struct {
	index  int
	digest []byte
	hash   crypto.Hash
}

func (r replayed) Idx() int             { return r.index }
func (r replayed) Dgst() []byte         { return r.digest }
func (r replayed) DgstAlg() crypto.Hash { return r.hash }

// What logs of real machines replay to here, another implementation accepts as
// their registers' values; and it finds as many events.
func TestLogOracle(t *testing.T) {
	compared := 0
	for _, file := range eventlogs(t) {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			log, err := ParseLog(file, data)
			theirs, refused := tcg.ParseEventLog(data, tcg.ParseOpts{AllowPadding: true})
			// The ACPI table that says where a log is, and a log in the format of TPM 1.2.
			if len(data) == 56 || filepath.Base(file) == "debian-10.bin" {
				if err == nil {
					t.Error("it is taken for a log")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if refused != nil {
				t.Fatalf("the other implementation refuses it: %v", refused)
			}
			compared++
			for _, a := range log.Algorithms {
				if a == SHA512 {
					continue
				}
				var registers []mr.MR
				for i := range 24 {
					registers = append(registers, replayed{i, log.Replay(a, i), algorithms[a]})
				}
				events, err := theirs.Verify(registers)
				if err != nil {
					t.Errorf("%v: %v", a, err)
				}
				n := 0
				for _, e := range log.Events {
					if e.Type != EvNoAction {
						n++
					}
				}
				if n != len(events) {
					t.Errorf("%v: %d events, expected %d", a, n, len(events))
				}
			}
		})
	}
	if compared < 20 {
		t.Errorf("%d logs were compared, expected 20 or more", compared)
	}
}
