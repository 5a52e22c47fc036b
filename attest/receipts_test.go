package attest_test

import (
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"chrysalis/attest"
	"chrysalis/attest/attesttest"
	"chrysalis/attest/receipt"
	"chrysalis/measure/record"
)

func TestReceipt(t *testing.T) {
	s := newScene(t, record.TDX)
	session, err := s.client.Attest(t.Context(), s.server.URL)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := s.vm.Manifest.Encode()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum384(encoded)
	good := receipt.Receipt{
		Version: 1, Sequence: 1, Manifest: hex.EncodeToString(sum[:]), Model: "test/model@1", RootHash: s.vm.Manifest.Models[0].Disk.RootHash,
		Request: strings.Repeat("0", 64), Response: strings.Repeat("1", 64),
	}
	sign := func(edit func(*receipt.Receipt), vm *attesttest.VM) []byte {
		r := good
		edit(&r)
		data, err := r.Sign(vm.ReceiptKey)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	same := func(*receipt.Receipt) {}
	if r, err := session.Receipt(sign(same, s.vm)); err != nil || r.Sequence != 1 {
		t.Errorf("%v", err)
	}
	for name, data := range map[string][]byte{
		"of another VM":         sign(same, attesttest.NewVM(record.TDX)),
		"of another manifest":   sign(func(r *receipt.Receipt) { r.Manifest = strings.Repeat("0", 96) }, s.vm),
		"of another model":      sign(func(r *receipt.Receipt) { r.Model = "evil/model@1" }, s.vm),
		"of another disk":       sign(func(r *receipt.Receipt) { r.RootHash = strings.Repeat("0", 64) }, s.vm),
		"with a changed byte":   []byte(strings.Replace(string(sign(same, s.vm)), `"sequence":1`, `"sequence":2`, 1)),
		"with something behind": append(sign(same, s.vm), '\n'),
	} {
		if _, err := session.Receipt(data); err == nil {
			t.Errorf("a receipt %s is accepted", name)
		}
	}
	s.vm.TD.Attributes |= 1
	bad, err := s.client.Attest(t.Context(), s.server.URL)
	if err == nil {
		t.Fatal("not refused")
	}
	if _, err := bad.Receipt(sign(same, s.vm)); !errors.Is(err, attest.ErrNotVerified) {
		t.Error(err)
	}
}
