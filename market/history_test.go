package market

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

var root = strings.Repeat("ab", 32)

func TestHistory(t *testing.T) {
	var h History
	if _, _, _, ok := h.Last("a:1", root); ok {
		t.Error("an empty history knows something")
	}
	for i := range 20 {
		p := Probe{At: int64(i), Result: Attested, Confidential: true, Latency: 5}
		if i%4 == 0 {
			p = Probe{At: int64(i), Result: Unreachable}
		}
		if err := h.Add("b:1", root, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Add("a:1", root, Probe{At: 100, Result: "pcr4", Latency: 7}); err != nil {
		t.Fatal(err)
	}
	data, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseHistory(data)
	if err != nil {
		t.Fatal(err)
	}
	if last, good, all, ok := again.Last("b:1", root); !ok || last.At != 19 || good != 12 || all != 16 {
		t.Errorf("%+v, %d of %d", last, good, all)
	}
	if last, good, all, ok := again.Last("a:1", root); !ok || last.Result != "pcr4" || good != 0 || all != 1 {
		t.Errorf("%+v, %d of %d", last, good, all)
	}
	// The one that was probed the longest ago makes room.
	for i := range maxEntries {
		if err := again.Add(fmt.Sprintf("c:%d", i+1), root, Probe{At: int64(1000 - i%2), Result: Unreachable}); err != nil {
			t.Fatal(err)
		}
	}
	if data, err = again.Encode(); err != nil || len(again.Entries) != maxEntries || len(data) > MaxHistory {
		t.Errorf("%d entries, %d bytes: %v", len(again.Entries), len(data), err)
	}
	if _, _, _, ok := again.Last("b:1", root); ok {
		t.Error("the oldest is still there")
	}
	if _, _, _, ok := again.Last(fmt.Sprintf("c:%d", maxEntries), root); !ok {
		t.Error("the newest is not there")
	}
}

// The largest history that can be written can be read.
func TestLargestHistory(t *testing.T) {
	var h History
	for i := range maxEntries {
		for range maxProbes {
			if err := h.Add(strings.Repeat("h", 252)+fmt.Sprintf("%03d:1", i%1000), fmt.Sprintf("%064d", i), Probe{1 << 40, strings.Repeat("x", 48), false, 1 << 30}); err != nil {
				t.Fatal(err)
			}
		}
	}
	data, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseHistory(data); err != nil || len(h.Entries) != maxEntries {
		t.Errorf("%d bytes of %d entries: %v", len(data), len(h.Entries), err)
	}
}

func TestHistoryRefuses(t *testing.T) {
	entry := func(endpoint, root, probes string) string {
		return `{"endpoint":"` + endpoint + `","probes":[` + probes + `],"root_hash":"` + root + `"}`
	}
	probe := func(at, result, confidential, latency string) string {
		return `{"at":` + at + `,"confidential":` + confidential + `,"latency_ms":` + latency + `,"result":"` + result + `"}`
	}
	history := func(entries ...string) string {
		return `{"entries":[` + strings.Join(entries, ",") + `],"version":1}`
	}
	good := probe("1", "attested", "true", "5")
	if _, err := ParseHistory([]byte(history(entry("a:1", root, good)))); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"nothing":                     "",
		"another version":             `{"entries":[],"version":2}`,
		"no list":                     `{"version":1}`,
		"an unknown field":            `{"entries":[],"more":1,"version":1}`,
		"white space":                 history(entry("a:1", root, good)) + "\n",
		"no endpoint":                 history(entry("a", root, good)),
		"an endpoint that is long":    history(entry(strings.Repeat("a", 260)+":1", root, good)),
		"no root hash":                history(entry("a:1", "ab", good)),
		"no probes":                   history(entry("a:1", root, "")),
		"too many probes":             history(entry("a:1", root, strings.Repeat(good+",", maxProbes)+good)),
		"an entry twice":              history(entry("a:1", root, good), entry("a:1", root, good)),
		"another order":               history(entry("b:1", root, good), entry("a:1", root, good)),
		"a time before all":           history(entry("a:1", root, probe("-1", "attested", "false", "5"))),
		"a time after all":            history(entry("a:1", root, probe("1099511627777", "attested", "false", "5"))),
		"a result that is none":       history(entry("a:1", root, probe("1", "A b", "false", "5"))),
		"a confidential refusal":      history(entry("a:1", root, probe("1", "pcr4", "true", "5"))),
		"latency that is negative":    history(entry("a:1", root, probe("1", "pcr4", "false", "-5"))),
		"latency without measure":     history(entry("a:1", root, probe("1", "pcr4", "false", "1073741825"))),
		"more entries than there are": history(entry("a:1", root, good) + strings.Repeat(","+entry("a:1", root, good), maxEntries)),
	} {
		if h, err := ParseHistory([]byte(text)); err == nil {
			t.Errorf("%s: %+v", name, h)
		}
	}
	var h History
	for name, err := range map[string]error{
		"no endpoint": h.Add("a", root, Probe{Result: Attested}), "no root": h.Add("a:1", "", Probe{Result: Attested}), "no result": h.Add("a:1", root, Probe{}),
	} {
		if err == nil {
			t.Errorf("%s was added", name)
		}
	}
}

// FuzzHistory reads what may have been written by something else, or half.
func FuzzHistory(f *testing.F) {
	var h History
	h.Add("a:1", root, Probe{1, Attested, true, 5})
	h.Add("b:1", root, Probe{2, "pcr4", false, 6})
	data, err := h.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"entries":[],"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := ParseHistory(data)
		if err != nil {
			return
		}
		again, err := h.Encode()
		if err != nil || !bytes.Equal(again, data) {
			t.Errorf("%q is read from %q: %v", again, data, err)
		}
		if err := h.Add("m:1", root, Probe{At: 3, Result: Unreachable}); err != nil {
			t.Error(err)
		}
		if _, err := h.Encode(); err != nil {
			t.Error(err)
		}
	})
}
