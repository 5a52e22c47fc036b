package market

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"chrysalis/pay"
)

func price(prompt, completion int64) pay.Price {
	return pay.Price{Prompt: prompt, Completion: completion}
}

var wide = Bounds{Floor: price(100, 300), Ceiling: price(100_000, 300_000)}

// sums are attested offers of different owners with these sums.
func sums(list ...int64) (offers []Offer) {
	for i, s := range list {
		offers = append(offers, Offer{Owner: fmt.Sprint("0:", i), Worker: [32]byte{1, byte(i), byte(i >> 8)}, Price: price(s/4, s-s/4), Capacity: 1})
	}
	return offers
}

func TestNext(t *testing.T) {
	own := price(1000, 3000)
	const up, down = Trend(1), Trend(-1)
	for _, tt := range []struct {
		name   string
		own    pay.Price
		bounds Bounds
		seen   int
		others []Offer
		trend  Trend
		want   Result
	}{
		{"at the target", own, wide, 750, nil, 0, Result{own, Steady, 0, 0}},
		{"above it", own, wide, 849, nil, 0, Result{own, Steady, 0, 0}},
		{"full", own, wide, 850, nil, 0, Result{price(1008, 3024), Full, up, 0}},
		{"still full", own, wide, 775, nil, up, Result{price(1002, 3006), Full, up, 0}},
		{"full no more", own, wide, 774, nil, up, Result{own, Steady, 0, 0}},
		{"quite full", own, wide, 1000, nil, up, Result{price(1020, 3060), Full, up, 0}},
		{"below it", own, wide, 651, nil, 0, Result{own, Steady, 0, 0}},
		{"idle", own, wide, 650, nil, 0, Result{price(992, 2976), Idle, down, 0}},
		{"still idle", own, wide, 725, nil, down, Result{price(998, 2994), Idle, down, 0}},
		{"idle no more", own, wide, 726, nil, down, Result{own, Steady, 0, 0}},
		{"quite idle", own, wide, 0, nil, down, Result{price(940, 2820), Idle, down, 0}},
		{"turning", own, wide, 850, nil, down, Result{price(1008, 3024), Full, up, 0}},
		{"not enough to turn", own, wide, 849, nil, down, Result{own, Steady, 0, 0}},
		{"far below the others", own, wide, 1000, sums(5333, 5333, 5333), 0, Result{price(1040, 3120), Full, up, 5333}},
		{"below the others", own, wide, 1000, sums(5332, 5332, 5332), 0, Result{price(1020, 3060), Full, up, 5332}},
		{"far above the others", own, wide, 0, sums(3200, 3200, 3200), 0, Result{price(880, 2640), Idle, down, 3200}},
		{"above the others", own, wide, 0, sums(3201, 3201, 3201), 0, Result{price(940, 2820), Idle, down, 3201}},
		{"full, and the others cheaper", own, wide, 1000, sums(1, 1, 1), 0, Result{price(1020, 3060), Full, up, 1}},
		{"idle, and the others dearer", own, wide, 0, sums(8000, 8000, 8000), 0, Result{price(940, 2820), Idle, down, 8000}},
		{"neither, and the others cheaper", own, wide, 700, sums(1, 1, 1), 0, Result{own, Steady, 0, 1}},
		{"at the ceiling", own, Bounds{price(0, 0), own}, 1000, nil, 0, Result{own, AtCeiling, up, 0}},
		{"at the floor", own, Bounds{own, price(9000, 9000)}, 0, nil, 0, Result{own, AtFloor, down, 0}},
		{"nearly at the ceiling", own, Bounds{price(0, 0), price(1001, 3003)}, 1000, nil, 0, Result{price(1001, 3003), Full, up, 0}},
		{"from nothing", price(0, 0), Bounds{price(0, 0), price(100_000, 300_000)}, 1000, nil, 0, Result{price(1, 3), Full, up, 0}},
		{"from nothing, in the smallest steps", price(0, 0), Bounds{price(0, 0), price(0, 9)}, 1000, nil, 0, Result{price(0, 1), Full, up, 0}},
		{"above the ceiling", own, Bounds{price(0, 0), price(900, 2700)}, 1000, nil, up, Result{price(900, 2700), OutOfBounds, 0, 0}},
		{"one part above the ceiling", price(1000, 0), Bounds{price(0, 0), price(900, 2700)}, 1000, nil, up, Result{price(250, 750), OutOfBounds, 0, 0}},
		{"below the floor", own, Bounds{price(2000, 6000), price(3000, 9000)}, 0, nil, down, Result{price(2000, 6000), OutOfBounds, 0, 0}},
		{"a fixed price", own, Bounds{own, own}, 1000, nil, 0, Result{own, AtCeiling, up, 0}},
		{"not seen", own, wide, -1, nil, up, Result{own, Unseen, up, 0}},
		{"impossible", own, wide, 1001, nil, up, Result{own, Unseen, up, 0}},
		{"a trend that is none", own, wide, 849, nil, 7, Result{own, Steady, 0, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Default().Next(tt.own, tt.bounds, tt.seen, tt.others, tt.trend)
			if err != nil || got != tt.want {
				t.Errorf("%+v, %v, expected %+v", got, err, tt.want)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	own := price(1, 1)
	for name, b := range map[string]Bounds{
		"crossed":          {price(2, 2), price(1, 3)},
		"nothing between":  {},
		"a negative floor": {price(-1, 0), price(1, 1)},
		"too high":         {price(0, 0), price(pay.MaxPrice+1, 1)},
	} {
		_, err := Default().Next(own, b, 0, nil, 0)
		_, start := Default().Start(b, nil)
		if !errors.Is(err, ErrBounds) && !errors.Is(err, pay.ErrPrice) || start == nil {
			t.Errorf("%s: %v, %v", name, err, start)
		}
	}
	if _, err := Default().Next(price(-1, 0), wide, 0, nil, 0); !errors.Is(err, pay.ErrPrice) {
		t.Errorf("a negative price: %v", err)
	}
	for i, change := range []func(r *Rule){
		func(r *Rule) { r.End = 0 }, func(r *Rule) { r.Begin = r.End - 1 }, func(r *Rule) { r.Target = 99 }, func(r *Rule) { r.Target = 901 },
		func(r *Rule) { r.Gain = 0 }, func(r *Rule) { r.Gain = 501 }, func(r *Rule) { r.Far = -1 }, func(r *Rule) { r.Far = 1001 },
		func(r *Rule) { r.MinOwners = 0 },
	} {
		r := Default()
		change(&r)
		if _, err := r.Next(own, wide, 0, nil, 0); err == nil {
			t.Errorf("rule %d was accepted", i)
		}
	}
}

func TestStart(t *testing.T) {
	for _, tt := range []struct {
		name   string
		others []Offer
		want   int64
	}{
		{"nobody", nil, 400_000},
		{"too few", sums(500, 500), 400_000},
		{"a market", sums(5000, 1000, 6000), 5000},
		{"a market below the floor", sums(1, 2, 3), 400},
		{"a market above the ceiling", sums(1e9, 2e9, 3e9), 400_000},
	} {
		got, err := Default().Start(wide, tt.others)
		if err != nil || Sum(got.Price) != tt.want || got.Reason != First || got.Price.Under(wide.Ceiling) != nil || wide.Floor.Under(got.Price) != nil {
			t.Errorf("%s: %+v, %v", tt.name, got, err)
		}
	}
}

func TestReference(t *testing.T) {
	honest := sums(1000, 1100, 1200, 1300)
	with := func(more ...Offer) []Offer { return append(append([]Offer{}, more...), honest...) }
	fake := func(i byte) Offer { return Offer{Owner: fmt.Sprint("0:f", i), Price: price(0, 1), Capacity: 1e6} }
	attested := func(o Offer, worker byte) Offer { o.Worker = [32]byte{2, worker}; return o }
	for _, tt := range []struct {
		name   string
		others []Offer
		want   int64
	}{
		{"honest", honest, 1100},
		{"too few", honest[:2], 0},
		{"many that are not attested", with(fake(1), fake(2), fake(3), fake(4), fake(5), fake(6)), 1100},
		{"one worker for many owners", with(attested(fake(1), 1), attested(fake(2), 1), attested(fake(3), 1)), 1100},
		{"one owner with many workers", with(attested(fake(1), 1), attested(fake(1), 2), attested(fake(1), 3)), 1100},
		{"as many workers as the honest", with(attested(fake(1), 1), attested(fake(2), 2), attested(fake(3), 3), attested(fake(4), 4)), 1},
		{"one fewer", with(attested(fake(1), 1), attested(fake(2), 2), attested(fake(3), 3)), 1000},
		{"no price", with(Offer{Owner: "0:x", Worker: [32]byte{3}, Price: price(-5, 1)}), 1100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, ok := Default().Reference(tt.others); got != tt.want || ok != (tt.want != 0) {
				t.Errorf("%d, expected %d", got, tt.want)
			}
		})
	}
}

// TestNobodyElseDecides: whatever is offered, an owner's price goes the way that its
// own VM says, within its bounds and in bounded steps, and the same input gives the
// same price in whatever order the offers come.
func TestNobodyElseDecides(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	anything := func() int64 { return r.Int64N(1 << (1 + r.IntN(49))) }
	for range 50_000 {
		low, high := price(anything(), anything()), price(anything(), anything())
		b := Bounds{price(min(low.Prompt, high.Prompt), min(low.Completion, high.Completion)), price(max(low.Prompt, high.Prompt)+1, max(low.Completion, high.Completion)+1)}
		b.Floor.Prompt, b.Ceiling.Prompt = min(b.Floor.Prompt, pay.MaxPrice), min(b.Ceiling.Prompt, pay.MaxPrice)
		b.Floor.Completion, b.Ceiling.Completion = min(b.Floor.Completion, pay.MaxPrice), min(b.Ceiling.Completion, pay.MaxPrice)
		start, err := Default().Start(b, sums(anything(), anything(), anything()))
		if err != nil {
			t.Fatal(err)
		}
		own := start.Price
		seen := r.IntN(1001)
		trend := Trend(r.IntN(3) - 1)
		alone, err := Default().Next(own, b, seen, nil, trend)
		if err != nil {
			t.Fatal(err)
		}
		others := sums(anything(), anything(), anything(), anything())
		got, err := Default().Next(own, b, seen, others, trend)
		if err != nil {
			t.Fatal(err)
		}
		r.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
		if again, _ := Default().Next(own, b, seen, others, trend); again != got {
			t.Fatalf("%+v and %+v of the same", got, again)
		}
		if got.Reason != alone.Reason || got.Trend != alone.Trend {
			t.Fatalf("alone %+v, among others %+v", alone, got)
		}
		if got.Price.Under(b.Ceiling) != nil || b.Floor.Under(got.Price) != nil {
			t.Fatalf("%+v is not within %+v", got, b)
		}
		moved := Sum(got.Price) - Sum(own)
		up, down := Default().Stride()
		if least := max(Sum(b.Ceiling)/least, 1); moved > max(Sum(own)*up/1000, least) || -moved > max(Sum(own)*down/1000, least) {
			t.Fatalf("moved by %d from %d", moved, Sum(own))
		}
		switch {
		case got.Reason == Full && moved <= 0, got.Reason == Idle && moved >= 0, got.Reason != Full && got.Reason != Idle && moved != 0:
			t.Fatalf("%s, and moved by %d", got.Reason, moved)
		}
	}
}
