package image

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Debian's places that apt knows are all found, each once, and the one that
// packages are locked from is the main one.
func TestHostMirrors(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\nprintf 'Google\\tGoogle\\thttp://g/apt/\\nDebian\\tDebian-Security\\thttp://m/security/\\nDebian\\tDebian\\thttp://m/debian/\\n" +
		"Debian\\tDebian\\thttp://m/debian/\\nDebian Backports\\tDebian Backports\\thttp://m/backports\\n'\n"
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	if main, err := HostMirror(t.Context()); err != nil || main != "http://m/debian" {
		t.Errorf("%s, %v", main, err)
	}
	all, err := HostMirrors(t.Context())
	if want := []string{"http://m/security", "http://m/debian", "http://m/backports"}; err != nil || !slices.Equal(all, want) {
		t.Errorf("%q, %v, expected %q", all, err, want)
	}
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if all, err := HostMirrors(t.Context()); err == nil {
		t.Errorf("%q", all)
	}
}
