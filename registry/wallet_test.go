package registry

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Words of a wallet that holds nothing, made with tonutils-go, and its seed.
const (
	testWords = "quiz purse acquire marriage employ negative defy hope civil mesh share almost denial exhaust tennis online layer city faculty pill any slim section mail"
	testSeed  = "6d26433b6b0ed377fb11a9881102ca46ab522a359425f85f10a9e0564df1ace8"
)

// TestWords reads the words of a TON wallet, with any white space between them.
func TestWords(t *testing.T) {
	words := strings.Fields(testWords)
	path := filepath.Join(t.TempDir(), "words")
	if err := os.WriteFile(path, []byte(strings.Join(words[:12], " ")+"\n"+strings.Join(words[12:], "\t")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := LoadKey(path)
	if err != nil || hex.EncodeToString(key.Seed()) != testSeed {
		t.Errorf("%v", err)
	}
	// Words in another order, or one short, are nobody's.
	words[0], words[1] = words[1], words[0]
	for _, bad := range [][]string{words, words[:23]} {
		if err := os.WriteFile(path, []byte(strings.Join(bad, " ")), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); err == nil {
			t.Errorf("%d wrong words are a wallet's", len(bad))
		}
	}
}
