package terminal

import (
	"strings"
	"testing"
	"unicode"
)

func TestClean(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"plain", "hello\n\tworld", "hello\n\tworld"},
		{"other scripts", "Grüße 你好 👩\u200d💻", "Grüße 你好 👩\u200d💻"},
		{"colour", "a\x1b[31mred\x1b[0m", "ared"},
		{"clear screen", "\x1b[2J\x1b[1;1Hx", "x"},
		{"title, BEL", "a\x1b]0;title\x07b", "ab"},
		{"title, ST", "a\x1b]0;title\x1b\\b", "ab"},
		{"an escape in a title", "a\x1b]0;ti\x1bxtle\x07b", "ab"},
		{"an unfinished title ends with the line", "a\x1b]0;title\nb", "a\nb"},
		{"clipboard", "\x1b]52;c;cm0gLXJm\x07", ""},
		{"device control", "a\x1bP1$r\x1b\\b", "ab"},
		{"C1 introducers", "a\u009b31mb\u009d0;t\u009cc", "abc"},
		{"an escape in a sequence", "a\x1b[3\x1b[31mb", "ab"},
		{"a newline in a sequence", "a\x1b[3\nb", "a\nb"},
		{"carriage return", "safe\rEVIL\r\n", "safeEVIL\n"},
		{"backspace, bell, NUL, DEL", "a\b\a\x00\x7fb", "ab"},
		{"bidirectional override", "a\u202eb\u2066c", "abc"},
		{"not UTF-8", "a\xffb", "a\ufffdb"},
		{"cut off", "a\xe4\xbd", "a\ufffd"},
		{"two-byte escape", "a\x1bcb", "ab"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Clean(tt.in); got != tt.want {
				t.Errorf("Clean(%q) = %q, want %q", tt.in, got, tt.want)
			}
			// Split anywhere, the result is the same.
			for i := range len(tt.in) + 1 {
				var out strings.Builder
				w := NewWriter(&out)
				w.Write([]byte(tt.in[:i]))
				w.Write([]byte(tt.in[i:]))
				w.Close()
				if out.String() != tt.want {
					t.Errorf("split at %d: %q, want %q", i, out.String(), tt.want)
				}
			}
		})
	}
	if got := Line("a\nb\tc"); got != "a b c" {
		t.Errorf("Line: %q", got)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\x1b[31mb\x1b]0;t\x07")
	f.Fuzz(func(t *testing.T, in string) {
		out := Clean(in)
		for _, r := range out {
			if r != '\n' && r != '\t' && unicode.IsControl(r) {
				t.Errorf("Clean(%q) = %q", in, out)
			}
		}
		if again := Clean(out); again != out {
			t.Errorf("not stable: %q, %q", out, again)
		}
	})
}
