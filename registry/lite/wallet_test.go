package lite_test

import (
	"context"
	"crypto/ed25519"
	"testing"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton/wallet"

	"chrysalis/registry/lite"
)

// deploy puts a wallet onto the chain, as some account with code and data.
func deploy(t *testing.T, n *net) (ed25519.PrivateKey, lite.Address) {
	t.Helper()
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	w, err := wallet.FromPrivateKeyWithOptions(key, wallet.V4R2)
	if err != nil {
		t.Fatal(err)
	}
	w.GetSpec().(*wallet.SpecV4R2).SetSeqnoFetcher(func(context.Context, uint32) (uint32, error) { return 0, nil })
	if err := n.chain.Fund(w.WalletAddress(), oneTON); err != nil {
		t.Fatal(err)
	}
	transfer, err := w.BuildTransfer(somebody, tlb.MustFromTON("0.1"), false, "")
	if err != nil {
		t.Fatal(err)
	}
	message, err := w.PrepareExternalMessageForMany(t.Context(), true, []*wallet.Message{transfer})
	if err != nil {
		t.Fatal(err)
	}
	c, err := tlb.ToCell(message)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.chain.Send(c); err != nil {
		t.Fatal(err)
	}
	addr, err := lite.AddressOf(w.WalletAddress())
	if err != nil {
		t.Fatal(err)
	}
	return key, addr
}
