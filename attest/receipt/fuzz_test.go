package receipt

import (
	"bytes"
	"testing"
)

// FuzzSplitStream takes streams and headers apart that a hostile VM or relay made.
func FuzzSplitStream(f *testing.F) {
	f.Add([]byte("data: {}\n\n"+CommentPrefix+"{}\n\n: x\n"), "AAAAAAAAAAAAAAAAAAAAAA", "1780000000000")
	f.Fuzz(func(t *testing.T, body []byte, salt, at string) {
		if covered, receipt, err := SplitStream(body); err == nil {
			if !bytes.HasPrefix(body, covered) || !bytes.Contains(body[len(covered):], receipt) || bytes.Contains(receipt, []byte("\n")) {
				t.Errorf("%q is split into %q and %q", body, covered, receipt)
			}
		}
		if s, err := ParseSalt(salt); err == nil && FormatSalt(s) != salt {
			t.Errorf("the salt %q is read as %x", salt, s)
		}
		if ms, err := ParseTime(at); err == nil && ms < 0 {
			t.Errorf("the time %q is read as %d", at, ms)
		}
	})
}
