package api

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/pay"
)

// TestLargestReply has all that a reply can hold fit into a message, and the largest
// balance there can be into what is left beside the wanted channels.
func TestLargestReply(t *testing.T) {
	till := &till{}
	b := pay.Balance{Best: &voucher.Voucher{}}
	for i := range 16 {
		m := manifest.Model{Name: fmt.Sprintf("%s/%064d", strings.Repeat("x", 64), i), Revision: strings.Repeat("x", 64)}
		till.vm.Models = append(till.vm.Models, m)
		b.Uses = append(b.Uses, pay.Use{Model: m.ID(), Requests: math.MaxUint64, PromptTokens: math.MaxUint64, CompletionTokens: math.MaxUint64, Earned: math.MaxUint64})
	}
	balance := till.balance(b)
	for i, u := range balance.Uses {
		if u.Model != i {
			t.Fatalf("model %d at %d", u.Model, i)
		}
	}
	encoded, err := json.Marshal(balance)
	if err != nil {
		t.Fatal(err)
	}
	if room := guest.MaxControlMessage - envelope - guest.MaxWanted*wantedSize; len(encoded)+1 > room {
		t.Errorf("a balance of %d bytes, there is room for %d", len(encoded), room)
	}
	reply := guest.ControlReply{OK: true, Active: math.MaxInt64, Batch: math.MaxUint64, Balances: []guest.Balance{}}
	for range guest.MaxWanted {
		reply.Wanted = append(reply.Wanted, voucher.Channel{}.String())
	}
	rest, err := json.Marshal(reply)
	if err != nil {
		t.Fatal(err)
	}
	// Balances are left out of it, as there are none.
	if n := len(rest) + len(`,"balances":[]`) + len("\n"); n > envelope+guest.MaxWanted*wantedSize {
		t.Errorf("the rest has %d bytes, %d are set aside", n, envelope+guest.MaxWanted*wantedSize)
	}
}

// TestWanted is bounded, tells each channel now and then, and does not let those that
// have been told keep others out.
func TestWanted(t *testing.T) {
	w := newWanted()
	name := func(i int) voucher.Channel { return voucher.Channel{byte(i >> 8), byte(i)} }
	for i := range maxWanted {
		if !w.add(name(i)) {
			t.Fatal(i)
		}
	}
	if !w.add(name(0)) {
		t.Error("a channel that is wanted already")
	}
	if w.add(name(maxWanted)) {
		t.Error("one too many")
	}
	now := time.Now()
	seen := map[string]int{}
	for range maxWanted / guest.MaxWanted {
		list := w.take(now)
		if len(list) != guest.MaxWanted {
			t.Fatal(len(list))
		}
		for _, channel := range list {
			seen[channel]++
		}
	}
	if len(seen) != maxWanted || len(w.take(now)) != 0 || len(w.take(now.Add(wantedAgain-1))) != 0 {
		t.Errorf("%d channels", len(seen))
	}
	if !w.add(name(maxWanted)) {
		t.Error("those that were told leave no room")
	}
	if first := w.take(now.Add(wantedAgain)); len(first) != guest.MaxWanted || first[0] != name(maxWanted).String() {
		t.Errorf("%v", first)
	}
	for i := range maxWanted + 1 {
		w.remove(name(i))
	}
	w.remove(name(0)) // by the second request
	if len(w.channels) != 0 {
		t.Errorf("%d are left", len(w.channels))
	}
}

// TestPaidReceiptSize has every receipt that says what was charged take one size.
func TestPaidReceiptSize(t *testing.T) {
	x := &exchange{bill: new(pay.Request)}
	for _, n := range []int{900, 1100, 1300} {
		if out := new(padding).receipt(nil, make([]byte, n), x.receiptSize()); len(out) != paidReceiptSize {
			t.Errorf("a receipt of %d bytes takes %d", n, len(out))
		}
	}
}
