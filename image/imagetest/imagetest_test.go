package imagetest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/image"
)

// recorder is a test that notes how it would end first: unlike a real one it
// goes on.
type recorder struct {
	testing.TB
	ends []string
}

func (r *recorder) Helper()      {}
func (r *recorder) Fatal(...any) { r.ends = append(r.ends, "fails") }
func (r *recorder) Skip(...any)  { r.ends = append(r.ends, "skips") }

func TestMissing(t *testing.T) {
	for value, want := range map[string]string{"": "skips", "1": "fails"} {
		t.Setenv(Required, value)
		r := &recorder{TB: t}
		if Missing(r, errors.New("no image")); r.ends[0] != want {
			t.Errorf("with %s=%q it %s, expected that it %s", Required, value, r.ends[0], want)
		}
	}
}

func TestSource(t *testing.T) {
	dir, err := Source()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, image.LockName)); err != nil {
		t.Error(err)
	}
	t.Chdir(t.TempDir())
	if dir, err := Source(); err == nil || !strings.Contains(err.Error(), "checkout") {
		t.Errorf("outside of one: %s, %v", dir, err)
	}
}

// A command sees its folder and nothing else of the host.
func TestCommand(t *testing.T) {
	dir := t.TempDir()
	out, err := Command(t, dir, "sh", "-c", "echo here >file; pwd; ls").CombinedOutput()
	if err != nil || string(out) != dir+"\nfile\n" {
		t.Errorf("%v: %s", err, out)
	}
}
