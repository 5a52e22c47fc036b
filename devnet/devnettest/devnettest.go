// Package devnettest runs chains for tests, and workers that are paid on them.
package devnettest

import (
	"context"
	"encoding/hex"
	"testing"
	"time"

	"chrysalis/agent/api"
	"chrysalis/agent/api/apitest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/evidence"
	"chrysalis/channel"
	"chrysalis/channel/voucher"
	"chrysalis/devnet"
	"chrysalis/guest"
	"chrysalis/pay"
	"chrysalis/registry/lite"
)

// Serve runs a chain with one liteserver until the test ends.
func Serve(t testing.TB, o devnet.Options) (*devnet.Chain, *devnet.Server) {
	t.Helper()
	chain, err := devnet.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { chain.Close() })
	server, err := chain.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return chain, server
}

// Client reads a chain with proofs, by its liteserver.
func Client(t testing.TB, chain *devnet.Chain, server *devnet.Server, o lite.Options) *lite.Client {
	t.Helper()
	network := lite.Network{GlobalID: chain.GlobalID()}
	if err := network.ReadGlobalConfig(chain.GlobalConfig(server)); err != nil {
		t.Fatal(err)
	}
	client, err := lite.New(network, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// PaidWorker runs the agent's own server behind evidence that holds: that of a VM that
// has booted, with payment in its manifest. Its launcher admits the channels that demand
// accepts, as client reads them, and sets the prices.
func PaidWorker(t testing.TB, vm *attesttest.VM, client *lite.Client, demand channel.Demand, price pay.Price) (*apitest.Worker, *apitest.Till) {
	t.Helper()
	worker, err := apitest.Start(vm.Manifest, nil, func(c *api.Config) {
		c.Certificate, c.ReceiptKey = vm.TLS, vm.ReceiptKey
		c.Evidence = func(_ context.Context, nonce [evidence.NonceSize]byte) ([]byte, error) {
			return vm.Evidence(nonce[:]), nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(worker.Close)
	till := &apitest.Till{Admit: func(name string) (guest.Admission, bool) {
		id, err := voucher.ParseChannel(name)
		if err != nil {
			return guest.Admission{}, false
		}
		view, err := client.Sync(context.Background())
		if err != nil {
			return guest.Admission{}, false
		}
		s, err := channel.Read(context.Background(), view, lite.Address{ID: id})
		if err != nil || demand.Check(s) != nil {
			return guest.Admission{}, false
		}
		return guest.Admission{Channel: name, Key: hex.EncodeToString(s.PayerKey[:]), Limit: s.Cover(), Used: s.Claimed}, true
	}}
	till.Open(worker)
	t.Cleanup(till.Close)
	reply, err := worker.Ask(guest.ControlRequest{Op: guest.OpPrices, Payment: &guest.ControlPayment{
		Payee: voucher.Channel(demand.Payee.ID).String(), MinDeposit: 100_000_000, MinDelay: int64(demand.MinDelay / time.Second), Prices: []pay.Price{price},
	}})
	if err != nil || !reply.OK {
		t.Fatalf("%+v, %v", reply, err)
	}
	return worker, till
}
