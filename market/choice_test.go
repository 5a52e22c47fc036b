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
		{"load decides among the near", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), InFlight: 2}, {Price: price(1.05e6, 1.05e6), InFlight: 1}, {Price: price(1.06e6, 1.06e6)}}, []int{1, 0, 2}},
		{"busy ones last", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), Busy: true}, {Price: price(9e6, 9e6)}, {Price: price(2e6, 2e6), Busy: true}}, []int{1, 0, 2}},
		{"slow counts as dear", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), Latency: 2 * s}, {Price: price(1.2e6, 1.2e6), Latency: s}}, []int{1, 0}},
		{"so slow is no worse", DefaultTaste(), usual, []Candidate{{Price: price(1e6, 1e6), Latency: math.MaxInt64}, {Price: price(1.6e6, 1.6e6), Latency: s}}, []int{0, 1}},
		{"one that nobody tried", DefaultTaste(), usual, []Candidate{{Price: price(1.2e6, 1.2e6), Latency: s}, {Price: price(1e6, 1e6)}}, []int{1, 0}},
		{"free, and slow", DefaultTaste(), usual, []Candidate{{Latency: 9 * s, InFlight: 1}, {Price: price(1, 1e6), Latency: s}, {Latency: s, InFlight: 1}}, []int{2, 0, 1}},
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
	list := []Candidate{{Price: price(100, 100)}, {Price: price(104, 104)}, {Price: price(105, 105)}, {Price: price(106, 106)}}
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
