package market

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"chrysalis/pay"
)

func TestOrder(t *testing.T) {
	const s = time.Second
	usual := Tokens{1000, 1000}
	for _, tt := range []struct {
		name       string
		taste      Taste
		size       Tokens
		candidates []Candidate
		want       []int
	}{
		{"none", DefaultTaste(), usual, nil, []int{}},
		{"the cheapest first", DefaultTaste(), usual, []Candidate{{Price: price(9e6, 9e6)}, {Price: price(1e6, 1e6)}, {Price: price(5e6, 5e6)}}, []int{1, 2, 0}},
		{"what the request costs counts", DefaultTaste(), Tokens{10_000, 10}, []Candidate{{Price: price(2e6, 1e6)}, {Price: price(1e6, 9e6)}}, []int{1, 0}},
		{"too dear", Taste{Max: price(5e6, 5e6)}, usual, []Candidate{{Price: price(1e6, 6e6)}, {Price: price(6e6, 1e6)}, {Price: price(5e6, 5e6)}}, []int{2}},
		{"one limit", Taste{Max: price(0, 5e6)}, usual, []Candidate{{Price: price(9e6, 1e6)}, {Price: price(1e6, 6e6)}}, []int{0}},
		{"no price", DefaultTaste(), usual, []Candidate{{Price: price(-1, 1)}, {Price: price(pay.MaxPrice+1, 1)}}, []int{}},
		{"load decides among the near", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), InFlight: 2}, {Price: price(1.1e6, 1.1e6), InFlight: 1}, {Price: price(1.11e6, 1.11e6)}}, []int{1, 0, 2}},
		{"busy ones last", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), Busy: true}, {Price: price(9e6, 9e6)}, {Price: price(2e6, 2e6), Busy: true}}, []int{1, 0, 2}},
		{"slow counts as dear", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), Latency: 2 * s}, {Price: price(1.2e6, 1.2e6), Latency: s}}, []int{1, 0}},
		{"so slow is no worse", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), Latency: math.MaxInt64}, {Price: price(1.7e6, 1.7e6), Latency: s}}, []int{0, 1}},
		{"one that nobody tried", DefaultTaste(), usual, []Candidate{{Price: price(1.2e6, 1.2e6), Latency: s}, {Price: price(1e6, 1e6)}}, []int{1, 0}},
		{"free, and slow", DefaultTaste(), usual, []Candidate{{Latency: 9 * s, InFlight: 1}, {Price: price(1, 1e6), Latency: s}, {Latency: s, InFlight: 1}}, []int{2, 0, 1}},
		{"too good to be true", DefaultTaste(), usual, []Candidate{{Price: price(0, 1)}, {Price: price(1e6, 1e6), InFlight: 2}, {Price: price(1.1e6, 1.1e6), InFlight: 1}, {Price: price(1.2e6, 1.2e6)}}, []int{0, 2, 1, 3}},
		{"more than fits", DefaultTaste(), Tokens{math.MaxInt64, math.MaxInt64}, []Candidate{{Price: price(pay.MaxPrice, pay.MaxPrice), Latency: 2 * s, InFlight: 1}, {Price: price(pay.MaxPrice, pay.MaxPrice), Latency: s}}, []int{1, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := uint32(math.MaxUint32)
			if got := tt.taste.Order(tt.candidates, tt.size, func() uint32 { n--; return n }); !slices.Equal(got, tt.want) {
				t.Errorf("%v, expected %v", got, tt.want)
			}
		})
	}
}

// Clients that know the same workers do not all ask the same one.
func TestSpread(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	list := []Candidate{{Price: price(100, 100)}, {Price: price(109, 109)}, {Price: price(110, 110)}, {Price: price(111, 111)}}
	var first [4]int
	for range 3000 {
		first[DefaultTaste().Order(list, Tokens{1e6, 1e6}, r.Uint32)[0]]++
	}
	for i, n := range first {
		if i < 3 && (n < 900 || n > 1100) || i == 3 && n != 0 {
			t.Errorf("%d of 3000 chose worker %d", n, i)
		}
	}
}

func TestShortlist(t *testing.T) {
	at := func(sum int64, proven, busy bool) Candidate {
		return Candidate{Price: price(sum, sum), Proven: proven, Busy: busy}
	}
	liars := []Candidate{at(1, false, false), at(2, false, false), at(3, false, false), at(4, false, false)}
	for _, tt := range []struct {
		name       string
		candidates []Candidate
		want       []int
	}{
		{"nobody", nil, []int{}},
		{"nobody has served yet", liars, []int{0, 1, 2, 3}},
		{"half are for those that have", append(slices.Clone(liars), at(100, true, false), at(200, true, false), at(300, true, false)), []int{0, 1, 4, 5}},
		{"fewer have", append(slices.Clone(liars), at(100, true, false)), []int{0, 1, 2, 4}},
		{"all have", []Candidate{at(5, true, false), at(4, true, false), at(3, true, false), at(2, true, false), at(1, true, false)}, []int{4, 3, 2, 1}},
		{"those that refuse", []Candidate{at(1, false, true), at(2, false, true), at(100, true, false), at(50, false, false), at(60, false, false)}, []int{3, 4, 2, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := DefaultTaste().Shortlist(tt.candidates, 4, Tokens{1e6, 1e6}, func() uint32 { return 0 }); !slices.Equal(got, tt.want) {
				t.Errorf("%v, expected %v", got, tt.want)
			}
		})
	}
}

func TestPause(t *testing.T) {
	for _, tt := range []struct {
		n      int
		proven bool
		want   time.Duration
	}{
		{1, true, 10 * time.Second}, {2, true, 20 * time.Second}, {4, true, 80 * time.Second}, {5, true, 80 * time.Second}, {math.MaxInt, true, 80 * time.Second},
		{0, false, time.Hour}, {1, false, time.Hour}, {2, false, 2 * time.Hour}, {6, false, 24 * time.Hour}, {math.MaxInt, false, 24 * time.Hour},
	} {
		if got := Pause(tt.n, tt.proven); got != tt.want {
			t.Errorf("%d, %v: %v", tt.n, tt.proven, got)
		}
	}
}
