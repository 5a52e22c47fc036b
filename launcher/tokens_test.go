package launcher

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/manifest"
)

func TestTokenHashes(t *testing.T) {
	long, other := strings.Repeat("a", 32), strings.Repeat("b", 64)
	for _, c := range []struct {
		name   string
		hashes []string
		file   string
		want   []string // of tokens; nil is an error that says says
		says   string
	}{
		{"a file", nil, "# ours\n" + long + "\n\n  " + other + "  \n", []string{long, other}, ""},
		{"one twice", []string{manifest.TokenHash(long)}, long, []string{long}, ""},
		{"short", nil, "secret", nil, "line 1"},
		{"with a space", nil, "#\n" + long + " x", nil, "line 2"},
		{"not ASCII", nil, long + "é", nil, "ASCII"},
		{"only comments", nil, "# none\n", nil, "everybody"},
		{"hashes and no token", []string{manifest.TokenHash(long)}, "# none\n", nil, "everybody"},
		{"no hash", []string{"abc"}, long, nil, "SHA-256"},
		{"an upper-case hash", []string{strings.ToUpper(manifest.TokenHash(long))}, long, nil, "SHA-256"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "tokens")
			if err := os.WriteFile(path, []byte(c.file), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := TokenHashes(c.hashes, path)
			if c.want == nil {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v", err)
				}
				if err != nil && (strings.Contains(err.Error(), long) || strings.Contains(err.Error(), "secret")) {
					t.Errorf("the error tells the token: %v", err)
				}
				return
			}
			var want []string
			for _, token := range c.want {
				want = append(want, manifest.TokenHash(token))
			}
			slices.Sort(want)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	if got, err := TokenHashes(nil, ""); err != nil || len(got) != 0 {
		t.Errorf("without tokens: %v, %v", got, err)
	}
	if _, err := TokenHashes(nil, filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that is not there is read")
	}
}
