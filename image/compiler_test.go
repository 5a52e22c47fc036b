package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSumsOf(t *testing.T) {
	got, err := sumsOf("..", helperModules)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || !moduleVersionRE.MatchString(got[0].Version) || !moduleSumRE.MatchString(got[0].Sum) {
		t.Errorf("%+v", got)
	}
	if _, err := sumsOf("..", []string{"example.org/none"}); err == nil || !strings.Contains(err.Error(), "example.org/none") {
		t.Error(err)
	}
}

func TestCopyLinks(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(t.TempDir(), "target"), filepath.Join(dir, "sub", "link")
	if err := os.WriteFile(target, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if err := copyLinks(dir); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(link)
	if err != nil || !info.Mode().IsRegular() || info.Size() != 7 {
		t.Errorf("%v, %v", info, err)
	}
}
