package lite_test

import (
	"testing"
	"time"

	"chrysalis/devnet"
	"chrysalis/registry/lite"
)

// BenchmarkLink verifies links between key blocks of as many validators as the
// mainnet has.
func BenchmarkLink(b *testing.B) {
	chain, err := devnet.Open(devnet.Options{Validators: 392})
	if err != nil {
		b.Fatal(err)
	}
	server, err := chain.Serve("127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer server.Close()
	const links = 8
	for range links {
		if err := chain.Rotate(); err != nil {
			b.Fatal(err)
		}
	}
	n := lite.Network{GlobalID: chain.GlobalID()}
	if err := n.ReadGlobalConfig(chain.GlobalConfig(server)); err != nil {
		b.Fatal(err)
	}
	c, err := lite.New(n, lite.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	view, err := c.ProveFrom(b.Context(), n.KeyBlock)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := lite.VerifyChain(n.KeyBlock, view.Head.Block, n.GlobalID, view.Chain(), time.Hour, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N)/links, "ms/link")
}
