package channel

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/channel/voucher"
)

func TestOwn(t *testing.T) {
	o := Own{filepath.Join(t.TempDir(), "ton", "channels.json")}
	if list, err := o.List(); err != nil || list != nil {
		t.Fatalf("%v, %v", list, err)
	}
	one := Terms{PayerKey: voucher.Key{1}, Payer: [32]byte{2}, Payee: [32]byte{3}, Salt: 1<<64 - 1, Delay: 60, GlobalID: -239}
	two := one
	two.Salt--
	for _, terms := range []Terms{one, two, one} {
		if a, err := o.Add(terms, time.Unix(1000, 0)); err != nil || a != Address(terms) {
			t.Fatal(a, err)
		}
	}
	list, err := o.List()
	if err != nil || len(list) != 2 || list[0].Terms() != one || list[1].Terms() != two {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := o.Remove(Address(one)); err != nil {
		t.Fatal(err)
	}
	if list, err := o.List(); err != nil || len(list) != 1 || list[0].Terms() != two {
		t.Errorf("%+v, %v", list, err)
	}
	data, err := os.ReadFile(o.Path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"another delay": strings.Replace(string(data), `"delay_seconds": 60`, `"delay_seconds": 61`, 1),
		"cut short":     string(data[:len(data)/2]),
		"no list":       "{}",
		"no address":    strings.Replace(string(data), Address(two).String(), "x", 1),
	} {
		if err := os.WriteFile(o.Path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if list, err := o.List(); err == nil {
			t.Errorf("%s: %+v", name, list)
		}
		if _, err := o.Add(one, time.Now()); err == nil {
			t.Errorf("%s: it was written over", name)
		}
	}
}
