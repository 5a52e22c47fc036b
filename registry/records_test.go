package registry

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"reflect"
	"testing"
	"time"

	"chrysalis/measure/record"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

func hexOf(n byte, size int) record.Hex { return bytes.Repeat([]byte{n}, size) }

// recordFile is a measurement record of an image, two shapes, an engine and a model.
func recordFile(n byte) *record.File {
	f := &record.File{
		Version: record.Version,
		Image: record.Image{
			Version: record.Version, Kind: record.KindImage, Name: "chrysalis", Platform: record.TDX, Boot: record.BootKernel,
			MRTD: hexOf(n, 48), RTMR1: hexOf(n, 48), RTMR2: hexOf(n, 48), Commit: hexOf(n, 20).String(),
			Lock: hexOf(n, 32), UKI: hexOf(n, 32), Firmware: hexOf(n, 32), QEMU: "11.1.3",
		},
		Engines: []record.Engine{{Version: record.Version, Kind: record.KindEngine, Name: "llama.cpp", RootHash: hexOf(n, 32), Profile: hexOf(n, 32)}},
		Models:  []record.Model{{Version: record.Version, Kind: record.KindModel, Name: "acme/model", Revision: "1", RootHash: hexOf(n, 32)}},
	}
	key := f.Image.Key()
	for i, name := range []string{"small", "large"} {
		f.Shapes = append(f.Shapes, record.Shape{
			Version: record.Version, Kind: record.KindShape, Name: name, Platform: record.TDX, Image: key[:],
			RTMR0: hexOf(n+byte(i), 48), VCPUs: 2, Memory: 1 << 30, PhysBits: 46, Disks: 3,
		})
	}
	return f
}

// TestApproved publishes a measurement record, and reads back the same; then two
// auditors sign it, and last it is revoked.
func TestApproved(t *testing.T) {
	n := newNet(t, 2)
	n.reader.Key = DeriveKey
	p := n.publisher(1, "v5r1")
	p.Reader.Key = DeriveKey
	n.fund(p)
	n.do(p, Init())
	file := recordFile(1)
	data, err := file.Encode()
	if err != nil {
		t.Fatal(err)
	}
	list, err := Publications(data, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	if err != nil || len(list) != 5 {
		t.Fatalf("%d publications, %v", len(list), err)
	}
	for _, r := range list {
		n.do(p, Publish(r))
	}
	approved := func(policy Policy) ([]*record.File, []Refusal) {
		t.Helper()
		files, refused, err := n.reader.Approved(t.Context(), n.view(), []lite.Address{p.Registry}, policy)
		if err != nil {
			t.Fatal(err)
		}
		return files, refused
	}
	files, refused := approved(Policy{})
	if len(files) != 1 || len(refused) != 0 {
		t.Fatalf("%d files, refused %v", len(files), refused)
	}
	if files[0].Shapes[0].Name != "small" {
		files[0].Shapes[0], files[0].Shapes[1] = files[0].Shapes[1], files[0].Shapes[0]
	}
	if !reflect.DeepEqual(files[0], file) {
		t.Errorf("%+v", files[0])
	}

	policy := Policy{Signatures: 2}
	for seed := byte(8); seed <= 9; seed++ {
		auditor := ed25519.NewKeyFromSeed(hexOf(seed, 32))
		policy.Auditors = append(policy.Auditors, Key(auditor.Public().(ed25519.PublicKey)))
		if files, refused := approved(policy); len(files) != 0 || len(refused) != 5 || !errors.Is(refused[0].Err, ErrSignatures) {
			t.Errorf("%d signatures: %v, %v", seed-8, files, refused)
		}
		for _, r := range list {
			n.do(p, Cosign(r.Key, sha256.Sum256(r.Record), auditor))
		}
	}
	if files, refused := approved(policy); len(files) != 1 || len(refused) != 0 {
		t.Errorf("two signatures: %v, %v", files, refused)
	}
	n.do(p, Mark(list[0].Key, contract.Revoked))
	if files, refused := approved(policy); len(files) != 0 || len(refused) != 1 || !errors.Is(refused[0].Err, ErrRevoked) {
		t.Errorf("revoked: %v, %v", files, refused)
	}
	if _, _, err := n.reader.Approved(t.Context(), n.view(), []lite.Address{p.Wallet.Address}, policy); !errors.Is(err, ErrNotRegistry) {
		t.Errorf("a wallet: %v", err)
	}
	// One record alone, as a file.
	one, err := Publications(list[4].Record, time.Time{}, time.Time{})
	if err != nil || len(one) != 1 || one[0].Key != list[4].Key || one[0].Kind != contract.Model {
		t.Errorf("%+v, %v", one, err)
	}
	// Shapes are told apart on a TPM as well, but for those that measure the same.
	tpm := recordFile(2)
	tpm.Image.Platform, tpm.Image.MRTD, tpm.Image.RTMR1, tpm.Image.RTMR2 = record.TPM, nil, nil, nil
	for _, index := range record.ImagePCRs {
		tpm.Image.PCRs = append(tpm.Image.PCRs, record.PCR{Index: index, SHA256: hexOf(1, 32)})
	}
	id := tpm.Image.Key()
	for i := range tpm.Shapes {
		tpm.Shapes[i].Platform, tpm.Shapes[i].Image, tpm.Shapes[i].RTMR0 = record.TPM, id[:], nil
		tpm.Shapes[i].PCR1 = hexOf(byte(i), 32)
	}
	same := tpm.Shapes[0]
	same.Name = "same"
	tpm.Shapes = append(tpm.Shapes, same)
	if data, err = tpm.Encode(); err != nil {
		t.Fatal(err)
	}
	if list, err := Publications(data, time.Time{}, time.Time{}); err != nil || len(list) != 5 {
		t.Errorf("%d publications of a TPM's image, %v", len(list), err)
	}
	for _, text := range []string{"", "{}", `{"kind":"model"}`, string(list[0].Record) + " "} {
		if _, err := Publications([]byte(text), time.Time{}, time.Time{}); err == nil {
			t.Errorf("%.20q: no error", text)
		}
	}
}
