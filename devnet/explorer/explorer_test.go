package explorer

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/devnet"
	"chrysalis/registry/contract"
)

func TestPages(t *testing.T) {
	chain, err := devnet.Open(devnet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer chain.Close()
	server := httptest.NewServer(Handler(chain, []byte(`{"liteservers":[]}`)))
	defer server.Close()
	get := func(path string) (int, string) {
		t.Helper()
		answer, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(body)
	}

	owner := address.NewAddress(0, 0, bytes.Repeat([]byte{1}, 32)).Bounce(true)
	answer, err := http.PostForm(server.URL+"/faucet", url.Values{"address": {owner.String()}})
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != 200 || chain.Account(owner).Balance.Nano().Int64() != 10e9 {
		t.Errorf("faucet: %d", answer.StatusCode)
	}
	registry := contract.Address(owner)
	put, err := contract.Put{Kind: contract.Model, NotBefore: 1, NotAfter: 2, Record: []byte(`{"name":"<script>"}`)}.Body(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []tlb.InternalMessage{
		{StateInit: contract.StateInit(owner), Body: cell.BeginCell().EndCell()}, {Body: put},
	} {
		m.SrcAddr, m.DstAddr, m.Amount, m.IHRDisabled = owner, registry, tlb.MustFromTON("0.1"), true
		c, err := tlb.ToCell(&m)
		if err != nil {
			t.Fatal(err)
		}
		if err := chain.Send(c); err != nil {
			t.Fatal(err)
		}
	}
	registryAddress := registry.Bounce(true).String()
	for path, want := range map[string]string{
		"/":                           registryAddress,
		"/account/" + registryAddress: "&lt;script&gt;",
		"/account/" + owner.String():  "Transactions",
		"/global.config.json":         "liteservers",
	} {
		if status, body := get(path); status != 200 || !strings.Contains(body, want) || strings.Contains(body, "<script>") {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	for path, want := range map[string]int{"/account/me": 400, "/nothing": 404} {
		if status, _ := get(path); status != want {
			t.Errorf("%s: %d", path, status)
		}
	}
	// Another site's page cannot use it.
	request, err := http.NewRequest(http.MethodPost, server.URL+"/faucet", strings.NewReader("address="+owner.String()))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.Header.Set("Origin", "https://example.com")
	if answer, err = http.DefaultClient.Do(request); err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != 403 {
		t.Errorf("from another site: %d", answer.StatusCode)
	}
}
