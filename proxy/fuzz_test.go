package proxy

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"strings"
	"testing"

	"chrysalis/attest/receipt"
	"chrysalis/channel/voucher"
	"chrysalis/manifest"
	"chrysalis/pay"
	"chrysalis/pay/purse"
)

// FuzzTerms has a VM say anything about how it is to be paid: what is accepted is
// within what was verified of it.
func FuzzTerms(f *testing.F) {
	m := &manifest.Manifest{
		Models:  []manifest.Model{{Name: "test/model", Revision: "1"}},
		Payment: &manifest.Payment{Network: -7, Step: 5, Ceilings: []pay.Price{{Prompt: 10, Completion: 20}}},
	}
	ceilings, _ := m.Ceilings()
	book, err := pay.NewBook(-7, [32]byte{}, ceilings, 1)
	if err != nil {
		f.Fatal(err)
	}
	ledger, err := purse.Open(f.TempDir(), -7, ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, 32)), 1)
	if err != nil {
		f.Fatal(err)
	}
	p := &Payment{Purse: ledger, MaxPrice: 20}
	terms := book.Terms(pay.Owner{Account: [32]byte{1}, MinDeposit: 7, MinDelay: 60}, PaymentPath, "why", &pay.Credit{Channel: voucher.Channel{2}, Used: 1, Cover: 2, Limit: 3})
	good, err := terms.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"prompt_price":10`), []byte(`"prompt_price":11`), 1))
	f.Add(bytes.Replace(good, []byte("ton:-7"), []byte("ton:-3"), 1))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		terms, err := pay.ParseTerms(data)
		if err != nil {
			return
		}
		for _, offered := range [][]voucher.Channel{{{1}}, nil} {
			a, err := p.terms(terms, m, offered)
			if err != nil {
				continue
			}
			if id, err := a.GlobalID(); err != nil || id != -7 || a.Extra.CodeHash != hex.EncodeToString(voucher.CodeHash[:]) || a.Amount != "5" {
				t.Fatalf("%+v", a)
			}
			if offered != nil && payeeOf(a) != [32]byte{1} {
				t.Fatalf("it pays %s", a.PayTo)
			}
			if len(a.Extra.Models) != 1 || a.Extra.Models[0].Under(ceilings.Models["test/model@1"]) != nil {
				t.Fatalf("%+v", a.Extra.Models)
			}
		}
	})
}

// FuzzMeter reads any answer: in whatever pieces it comes, the same is found.
func FuzzMeter(f *testing.F) {
	f.Add([]byte("data: {\"choices\":[{\"delta\":{\"content\":\"word\"}}]}\n\ndata: [DONE]\n\n: chrysalis-receipt {}\n\n"), 3, true)
	f.Add([]byte(`{"choices":[{"message":{"content":"word"}}]}`), 7, false)
	f.Add([]byte("data: {\"error\":{}}\n\n"+strings.Repeat(":\n", 9)), 1, true)
	f.Fuzz(func(t *testing.T, data []byte, piece int, stream bool) {
		read := func(size int) (*meter, int64) {
			text := int64(0)
			m := newMeter([receipt.SaltSize]byte{1}, stream, func(n int64) {
				if n <= 0 {
					t.Fatal("no text is told of")
				}
				text += n
			})
			for rest := data; len(rest) > 0; {
				n := min(len(rest), size)
				m.write(rest[:n])
				rest = rest[n:]
			}
			m.end()
			return m, text
		}
		whole, text := read(len(data) + 1)
		pieces, same := read(min(max(piece, 1), 1<<20))
		if text != same || text > 3*int64(len(data)) || !bytes.Equal(whole.receipt, pieces.receipt) || whole.done != pieces.done || whole.beyond != pieces.beyond ||
			!bytes.Equal(whole.covered.Sum(nil), pieces.covered.Sum(nil)) {
			t.Fatalf("in pieces %d of text, else %d", same, text)
		}
		if !stream || whole.receipt == nil || whole.beyond {
			return
		}
		// It is the receipt that package receipt finds, too.
		covered, signed, err := receipt.SplitStream(data)
		h := receipt.NewHash([receipt.SaltSize]byte{1})
		h.Write(covered)
		if err == nil && (!bytes.Equal(signed, whole.receipt) || !bytes.Equal(h.Sum(nil), whole.covered.Sum(nil))) {
			t.Fatalf("%q, not %q", whole.receipt, signed)
		}
	})
}
