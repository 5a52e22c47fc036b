package launcher

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAttempts(t *testing.T) {
	yes, no := func() bool { return true }, func() bool { return false }
	works, fails := func() error { return nil }, func() error { return errors.New("permission denied") }
	for _, tt := range []struct {
		name   string
		choice Accel
		host   host
		gpus   int
		known  verdict
		want   string // platforms in order, '?' after an unproven one; or the error's words
	}{
		{"TDX host", AccelAuto, host{tdx: yes, kvm: works}, 0, verdictNone, "tdx"},
		{"TDX host never falls back", AccelAuto, host{tdx: yes, kvm: works}, 0, verdictFails, "tdx"},
		{"KVM not seen yet", AccelAuto, host{tdx: no, kvm: works}, 0, verdictNone, "kvm? tcg"},
		{"KVM seen to work", AccelAuto, host{tdx: no, kvm: works}, 0, verdictWorks, "kvm"},
		{"KVM seen to fail", AccelAuto, host{tdx: no, kvm: works}, 0, verdictFails, "tcg"},
		{"no KVM", AccelAuto, host{tdx: no, kvm: fails}, 0, verdictNone, "tcg"},
		{"GPU needs KVM", AccelAuto, host{tdx: no, kvm: fails}, 1, verdictNone, "needs KVM"},
		{"GPU with KVM", AccelAuto, host{tdx: no, kvm: works}, 1, verdictFails, "kvm"},
		{"forced TCG", AccelTCG, host{tdx: yes, kvm: works}, 0, verdictNone, "tcg"},
		{"forced KVM does not fall back", AccelKVM, host{tdx: no, kvm: works}, 0, verdictFails, "kvm"},
		{"forced KVM without it", AccelKVM, host{tdx: no, kvm: fails}, 0, verdictNone, "--accel tcg"},
		{"forced TDX without it", AccelTDX, host{tdx: no, kvm: works}, 0, verdictNone, "cannot run TDs"},
		{"nonsense", "xen", host{tdx: no, kvm: works}, 0, verdictNone, "no accelerator"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tries, err := attempts(tt.choice, tt.host, tt.gpus, tt.known)
			if err != nil {
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %q, want %q", err, tt.want)
				}
				return
			}
			var got []string
			for i, try := range tries {
				name := string(try.platform)
				if try.unproven {
					name += "?"
				}
				got = append(got, name)
				if (i > 0 || tt.choice == AccelAuto && try.platform == PlatformTCG) && try.note == "" {
					t.Errorf("a fall back to %s without a word", try.platform)
				}
			}
			if strings.Join(got, " ") != tt.want {
				t.Errorf("%v, want %s", got, tt.want)
			}
		})
	}
}

func TestVerdicts(t *testing.T) {
	s := store{t.TempDir()}
	if v := s.verdict("a"); v != verdictNone {
		t.Errorf("before anything was remembered: %q", v)
	}
	s.remember("a", verdictFails)
	s.remember("b", verdictWorks)
	if a, b := s.verdict("a"), s.verdict("b"); a != verdictFails || b != verdictWorks {
		t.Errorf("%q, %q", a, b)
	}
	for name, content := range map[string]string{
		"another boot": `{"boot":"x","kernel":"y","kvm":{"a":"fails"}}`,
		"not JSON":     `{`,
		"empty":        ``,
		"a list":       `[]`,
	} {
		if err := os.WriteFile(filepath.Join(s.dir, "accel.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if v := s.verdict("a"); v != verdictNone {
			t.Errorf("%s: %q", name, v)
		}
	}
	for i := range 2 * maxVerdicts {
		s.remember(strings.Repeat("x", i), verdictFails)
	}
	if n := len(s.verdicts().KVM); n > maxVerdicts {
		t.Errorf("%d verdicts are kept", n)
	}
}
