package proxy_test

import (
	"encoding/hex"
	"strings"
	"testing"

	"chrysalis/market"
	"chrysalis/pay"
	"chrysalis/proxy"
)

// TestSupply looks at the picture of what is offered: what this proxy has verified is
// marked, what strangers wrote is escaped.
func TestSupply(t *testing.T) {
	w := startPaid(t, 2, 1<<40, func(w *paidWorld, o *proxy.Options) {
		root, err := hex.DecodeString(w.vms[0].Manifest.Models[0].Disk.RootHash)
		if err != nil {
			t.Fatal(err)
		}
		w.vms[1].TD.Attributes |= 1 // refused
		offer := func(owner string, capacity int) market.Offer {
			return market.Offer{Owner: owner, Price: pay.Price{Prompt: 1, Completion: 2e9}, Capacity: capacity, Worker: [32]byte{1}}
		}
		o.Payment.Listed = []proxy.Listed{
			{Endpoint: w.servers[0].URL, Root: root, Offer: offer("0:good", 3)},
			{Endpoint: w.servers[0].URL, Root: make([]byte, 32), Offer: offer("0:other", 4)},
			{Endpoint: w.servers[1].URL, Root: root, Offer: offer("0:refused", 5)},
			{Endpoint: "https://else.example:1", Root: root, Offer: offer("<script>", 6)},
		}
	})
	page := w.get(t, "/")
	for _, want := range []string{
		"<svg ", "4 offers", "0:good: 2.000000001 TON, 3 at a time, verified", "0:other: 2.000000001 TON, 4 at a time, not verified",
		"0:refused: 2.000000001 TON, 5 at a time, not verified", "&lt;script&gt;: 2.000000001 TON, 6 at a time, not verified",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not on the page", want)
		}
	}
	if strings.Contains(page, "<script") {
		t.Error("a stranger's markup is on the page")
	}
}
