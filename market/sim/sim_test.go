package sim

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMarket holds what docs/market.md says of the simulation against a run of it.
func TestMarket(t *testing.T) {
	if testing.Short() {
		t.Skip("seven runs take some seconds; the race detector has nothing to find in them")
	}
	r := Run()
	for _, p := range r.Phases {
		// The price that the curves of costs and worth alone say, within a tenth.
		if off := max(p.Reached-p.Equilibrium, p.Equilibrium-p.Reached); off*10 > p.Equilibrium {
			t.Errorf("%s: %d was reached, the equilibrium is %d", p.Name, p.Reached, p.Equilibrium)
		}
		if p.Reached < p.Low || p.Reached > p.High {
			t.Errorf("%s: %d is not between %d and %d, where the rule rests", p.Name, p.Reached, p.Low, p.High)
		}
		if p.Intervals < 0 || p.Intervals > 30 {
			t.Errorf("%s: within a tenth after %d intervals", p.Name, p.Intervals)
		}
		if off := max(p.Held-p.Asked, p.Asked-p.Held); off*10 > p.Asked {
			t.Errorf("%s: %d places were held, %d are at the equilibrium", p.Name, p.Held, p.Asked)
		}
		last := p.points[len(p.points)-1]
		if last.Low*10 < p.Reached*9 || last.High*9 > p.Reached*10 {
			t.Errorf("%s: prices from %d to %d beside %d", p.Name, last.Low, last.High, p.Reached)
		}
	}
	honest := r.Manipulations[0]
	for i, m := range r.Manipulations {
		// As many attested workers as there are honest ones, a third as many, or any number
		// that are not attested.
		tolerance := int64(20) // per cent
		if i == 1 || strings.HasPrefix(m.Name, "60 ") {
			tolerance = 2
		}
		for _, price := range []int64{m.Lowest, m.Highest, m.End} {
			if off := max(price-honest.End, honest.End-price); off*100 > honest.End*tolerance {
				t.Errorf("%s: %d beside %d", m.Name, price, honest.End)
			}
		}
		if m.Requests*100 < honest.Requests*95 {
			t.Errorf("%s: %d requests beside %d", m.Name, m.Requests, honest.Requests)
		}
	}
	const docs = "../../docs"
	for name, picture := range r.Pictures() {
		if data, err := os.ReadFile(filepath.Join(docs, name)); err != nil || string(data) != picture {
			t.Errorf("docs/%s is stale (%v); make it anew with 'make market-sim'", name, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(docs, "market.md"))
	for _, table := range strings.Split(r.Table(), "\n\n") {
		if err != nil || !strings.Contains(string(text), strings.TrimSpace(table)) {
			t.Errorf("docs/market.md (%v) does not have this table, which 'make market-sim' prints:\n%s", err, table)
		}
	}
}

// The same seed gives the same run.
func TestSeed(t *testing.T) {
	run := func(seed uint64) []Point {
		m := newMarket(seed)
		m.addOwners(20, [2]int{forever, forever})
		m.addClients(30, 0)
		return m.Run(5)
	}
	a, b, c := run(1), run(1), run(2)
	same := true
	for i := range a {
		if a[i] != b[i] {
			t.Fatalf("%v and %v", a, b)
		}
		same = same && a[i] == c[i]
	}
	if same {
		t.Error("another seed gives the same run")
	}
}

// The equilibrium of curves that one can compute in one's head.
func TestEquilibrium(t *testing.T) {
	m := newMarket(1)
	for _, cost := range []int64{10, 20, 30, 40} {
		m.owners = append(m.owners, &owner{cost: cost, places: 10, away: [2]int{forever, forever}})
	}
	// Of 26 streams' time 20 parts are requests.
	for _, worth := range []int64{50, 35, 25, 15} {
		m.clients = append(m.clients, &client{worth: worth, streams: make([]int, 13)})
	}
	for _, tt := range []struct {
		utilisation int
		price, held int64
	}{
		{1000, 26, 20_000}, // 10 places at 10, 10 at 20; two clients that pay more than 25
		{500, 36, 10_000},  // 5 each at 10, 20 and 30; one client that pays more than 35
		{250, 40, 10_000},  // 2.5 each, of all four
		{100, 51, 0},       // too little for anybody
	} {
		if price, held := m.Equilibrium(tt.utilisation); price != tt.price || held != tt.held {
			t.Errorf("at %d: %d and %d, expected %d and %d", tt.utilisation, price, held, tt.price, tt.held)
		}
	}
}
