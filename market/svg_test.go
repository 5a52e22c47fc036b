package market

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"

	"chrysalis/pay"
)

// elements parses a picture strictly, and counts its elements by name.
func elements(t *testing.T, picture string) map[string]int {
	t.Helper()
	count := map[string]int{}
	d := xml.NewDecoder(strings.NewReader(picture))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return count
		}
		if err != nil {
			t.Fatalf("%v in %s", err, picture)
		}
		if e, ok := token.(xml.StartElement); ok {
			count[e.Name.Local]++
			for _, a := range e.Attr {
				if strings.HasPrefix(a.Name.Local, "on") || strings.Contains(a.Name.Local, "href") || a.Name.Local == "style" {
					t.Errorf("attribute %s", a.Name.Local)
				}
			}
		}
	}
}

func TestSupply(t *testing.T) {
	hostile := "</title><script>alert(1)</script>\"'&\x00\x1b[2J\u202e" + strings.Repeat("x", 1000)
	offers := append(sums(200*1e6, 400*1e6, 300*1e6),
		Offer{Owner: hostile, Price: price(1, 1), Capacity: 1e6},
		Offer{Owner: "0:dear", Price: price(pay.MaxPrice, pay.MaxPrice), Capacity: 1},
		Offer{Owner: "0:none", Price: price(-1, 1), Capacity: 1}, Offer{Owner: "0:nothing", Capacity: 0})
	got := Supply("acme/model@1 "+hostile, offers, 500*1e6)
	count := elements(t, got)
	if count["rect"] != 1+5 || count["script"] > 0 || strings.Contains(got, "alert(1)</script") || strings.ContainsAny(got, "\x00\x1b\u202e") || len(got) > 8000 {
		t.Errorf("%v\n%s", count, got)
	}
	for _, want := range []string{"5 offers", "0:1: 0.4 TON, 1 at a time, verified", "0:dear: 2000000 TON, 1 at a time, not verified", "stroke-dasharray"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if again := Supply("acme/model@1 "+hostile, []Offer{offers[6], offers[4], offers[2], offers[0], offers[5], offers[1], offers[3]}, 500*1e6); again != got {
		t.Error("it depends on the order of the offers")
	}
	var many []Offer
	for range 20_000 {
		many = append(many, offers[0])
	}
	if got := Supply("many", many, 0); elements(t, got)["rect"] != 1+maxDrawn || !strings.Contains(got, "20000 offers, the cheapest 256 are drawn") {
		t.Error("too much or too little is drawn")
	}
	for name, none := range map[string]string{"nothing": Supply("", nil, 0), "free": Supply("", []Offer{{Capacity: 1}}, 0), "an empty chart": Chart{Label: TON}.SVG()} {
		if count := elements(t, none); count["svg"] != 1 {
			t.Errorf("%s: %v", name, count)
		}
	}
}

func TestTON(t *testing.T) {
	for nano, want := range map[int64]string{0: "0", 1: "0.000000001", 1e9: "1", 1_500_000_000: "1.5", 20e9: "20"} {
		if got := TON(nano); got != want {
			t.Errorf("%d: %s", nano, got)
		}
	}
}
