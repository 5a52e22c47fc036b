package registry

import (
	"testing"

	"chrysalis/registry/contract"
)

// BenchmarkList proves the last block and the list of 100 records, the liteserver's
// work included.
func BenchmarkList(b *testing.B) {
	n := newNet(b, 1)
	p := n.publisher(1, "v5r1")
	n.fund(p)
	n.do(p, Init())
	for i := range 100 {
		r := publication(string(rune('a'+i%26))+string(rune('a'+i/26)), "")
		r.Kind = contract.Image
		if _, err := p.Do(b.Context(), Publish(r)); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if err := n.chain.Mine(); err != nil {
			b.Fatal(err)
		}
		list, err := n.reader.List(b.Context(), n.view(), p.Registry)
		if err != nil || len(list) != 100 {
			b.Fatal(len(list), err)
		}
	}
}
