package vmtest

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/channel/voucher"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/pay"
)

// A token costs a nanoton in prompts and answers alike, and a voucher adds a
// thousandth of a TON at least.
const (
	payNetwork = -7
	payStep    = 1_000_000
)

// priced gives a manifest of one model a payment.
func priced(t *testing.T) func([]byte) []byte {
	return func(data []byte) []byte {
		m, err := manifest.Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		m.Payment = &manifest.Payment{Network: payNetwork, Step: payStep, Ceilings: []pay.Price{{Prompt: 1_000_000, Completion: 1_000_000}}}
		if data, err = m.Encode(); err != nil {
			t.Fatal(err)
		}
		return data
	}
}

// control asks the control port.
func (vm *handVM) control(t *testing.T, r guest.ControlRequest) (reply guest.ControlReply) {
	t.Helper()
	conn, err := vm.dialPort(guest.PortControl, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(append(request, '\n')); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(io.LimitReader(conn, guest.MaxControlMessage)).ReadBytes('\n')
	if err != nil {
		t.Fatalf("%s: %v", r.Op, err)
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		t.Fatalf("%s: %v: %s", r.Op, err, line)
	}
	return reply
}

// prices sets the price of all tokens, in nanotons a million.
func (vm *handVM) prices(t *testing.T, price int64) guest.ControlReply {
	t.Helper()
	return vm.control(t, guest.ControlRequest{Op: guest.OpPrices, Payment: &guest.ControlPayment{
		Payee: "0:" + strings.Repeat("77", 32), Prices: []pay.Price{{Prompt: price, Completion: price}},
	}})
}

// isPaid has a client pay a VM, with the test as its launcher, through the real ports.
// Nothing costs anything when it is done.
func (vm *handVM) isPaid(t *testing.T) {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{5}, 32))
	channel := voucher.Channel{1, 2, 3}
	send := func(method, path string, header ...string) (*http.Response, []byte) {
		t.Helper()
		var body io.Reader
		if path != "/.well-known/payment" {
			body = question("hello", false)
		}
		failed := func(err error) (*http.Response, []byte) {
			t.Errorf("%s %s: %v", method, path, err)
			return &http.Response{}, nil
		}
		req, err := http.NewRequest(method, vm.client.endpoint+path, body)
		if err != nil {
			return failed(err)
		}
		req.Header.Set("Content-Type", "application/json")
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := vm.client.http.Do(req)
		if err != nil {
			return failed(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		if err != nil {
			return failed(err)
		}
		return resp, data
	}
	const chat = "/v1/chat/completions"
	resp, body := send("POST", chat)
	if resp.StatusCode != 503 {
		t.Fatalf("before there are prices: %d %s", resp.StatusCode, body)
	}
	if reply := vm.prices(t, 1_000_001); reply.OK || reply.Error != guest.ErrorRefused {
		t.Errorf("a price above the ceiling: %+v", reply)
	}
	if reply := vm.prices(t, 1_000_000); !reply.OK {
		t.Fatalf("%+v", reply)
	}
	resp, body = send("POST", chat)
	if _, err := pay.ParseTerms(body); err != nil || resp.StatusCode != 402 {
		t.Fatalf("%d %s: %v", resp.StatusCode, body, err)
	}
	payer := pay.SignPayer(key, channel, sha256.Sum256(resp.TLS.PeerCertificates[0].RawSubjectPublicKeyInfo)).String()
	paid := voucher.Sign(key, payNetwork, channel, payStep).String()

	// The launcher hears of the channel while the client waits, admits it, and
	// acknowledges the voucher.
	served := make(chan struct{})
	go func() {
		defer close(served)
		resp, body = send("POST", chat, pay.PayerHeader, payer, pay.VoucherHeader, paid)
	}()
	var ack uint64
	for deadline := time.Now().Add(time.Minute); ; {
		reply := vm.control(t, guest.ControlRequest{Op: guest.OpCollect, Ack: ack, WaitMS: 1000})
		for _, wanted := range reply.Wanted {
			if wanted != channel.String() {
				t.Errorf("%s is wanted", wanted)
			}
			vm.control(t, guest.ControlRequest{Op: guest.OpAdmit, Admit: &guest.Admission{
				Channel: wanted, Key: hex.EncodeToString(key.Public().(ed25519.PublicKey)), Limit: 10 * payStep,
			}})
		}
		if reply.Batch > 0 {
			ack = reply.Batch
		}
		if len(reply.Balances) == 1 && len(reply.Balances[0].Uses) == 1 {
			if use := reply.Balances[0].Uses[0]; use.Requests != 1 || use.Earned != use.PromptTokens+use.CompletionTokens || use.Earned == 0 {
				t.Errorf("%+v", use)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing was used: %+v", reply)
		}
	}
	<-served
	if resp.StatusCode != 200 {
		t.Fatalf("%d %s", resp.StatusCode, body)
	}
	var r receipt.Receipt
	if err := json.Unmarshal([]byte(resp.Trailer.Get(receipt.Trailer)), &r); err != nil || r.Payment == nil ||
		r.Payment.Channel != channel.String() || r.Payment.Used != r.Payment.Charged || r.Payment.Cover != pay.FormatAmount(payStep) {
		t.Errorf("%v: %s", err, resp.Trailer.Get(receipt.Trailer))
	}
	resp, body = send("GET", "/.well-known/payment", pay.PayerHeader, payer)
	if terms, err := pay.ParseTerms(body); err != nil || resp.StatusCode != 200 || r.Payment == nil || terms.Accepts[0].Extra.Credit.Used != r.Payment.Used {
		t.Errorf("%d %s: %v", resp.StatusCode, body, err)
	}
	vm.control(t, guest.ControlRequest{Op: guest.OpCollect, Ack: ack})
	if reply := vm.control(t, guest.ControlRequest{Op: guest.OpDrop, Channel: channel.String()}); !reply.OK {
		t.Errorf("%+v", reply)
	}
	if reply := vm.prices(t, 0); !reply.OK {
		t.Fatalf("%+v", reply)
	}
	vm.well(t)
}
