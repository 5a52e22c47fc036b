package evidence

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func fill(n int, b byte) Bytes { return bytes.Repeat([]byte{b}, n) }

func sampleTDX() *Document {
	return &Document{
		Version: 1, Nonces: []Bytes{fill(32, 1), fill(32, 2)}, TLSKey: fill(91, 3), ReceiptKey: fill(32, 4),
		Manifest: []byte(`{}`), CEL: fill(10, 5), TDX: &TDX{Quote: fill(1000, 6), CCEL: fill(100, 7)},
	}
}

func sampleTPM() *Document {
	d := sampleTDX()
	d.TDX = nil
	d.TPM = &TPM{Quote: fill(100, 8), Signature: fill(70, 9), AK: fill(90, 10), Certificates: []Bytes{fill(400, 11)}, Log: fill(1000, 12)}
	for _, index := range QuotedPCRs {
		d.TPM.PCRs = append(d.TPM.PCRs, PCR{index, fill(32, byte(index))})
	}
	d.GPU = []byte("{}")
	return d
}

func TestRoundTrip(t *testing.T) {
	largest := sampleTPM()
	for len(largest.Nonces) < MaxNonces {
		largest.Nonces = append(largest.Nonces, fill(32, 1))
	}
	largest.TPM.Log, largest.GPU, largest.CEL, largest.Manifest = fill(maxLog, 1), fill(maxGPU, 1), fill(256<<10, 1), fill(64<<10, 1)
	for len(largest.TPM.Certificates) < 8 {
		largest.TPM.Certificates = append(largest.TPM.Certificates, fill(maxCertificate, 1))
	}
	for name, d := range map[string]*Document{"TDX": sampleTDX(), "TPM": sampleTPM(), "largest": largest} {
		t.Run(name, func(t *testing.T) {
			data, err := d.Encode()
			if err != nil {
				t.Fatal(err)
			}
			got, err := Parse(data)
			if err != nil || !reflect.DeepEqual(got, d) {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}

// TestParseRefuses has a row for each way to write a document in another way, or
// to leave something out.
func TestParseRefuses(t *testing.T) {
	data, err := sampleTDX().Encode()
	if err != nil {
		t.Fatal(err)
	}
	good := string(data)
	swap := func(old, new string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q is %d times in %s", old, strings.Count(good, old), good)
		}
		return strings.Replace(good, old, new, 1)
	}
	for _, tt := range []struct{ name, data, says string }{
		{"empty", "", "EOF"},
		{"null", "null", "version is 0"},
		{"an array", "[]", "array"},
		{"another version", swap(`"version":1`, `"version":2`), "version is 2"},
		{"an unknown field", swap(`"version":1`, `"version":1,"xtra":1`), "xtra"},
		{"a field in other case", swap(`"manifest"`, `"Manifest"`), "Manifest"},
		{"a field twice", swap(`"version":1`, `"version":1,"version":1`), "twice"},
		{"space", swap(`"version":1`, `"version": 1`), "not canonical"},
		{"something behind it", good + "{}", "not canonical"},
		{"padding", swap(`"manifest":"e30"`, `"manifest":"e30="`), "base64url"},
		{"bits beyond the last byte", swap(`"manifest":"e30"`, `"manifest":"e31"`), "base64url"},
		{"the other alphabet", swap(`"manifest":"e30"`, `"manifest":"+/+/"`), "base64url"},
		{"a line's end in base64", swap(`"manifest":"e30"`, `"manifest":"e3\n0"`), ""},
		{"a number for bytes", swap(`"manifest":"e30"`, `"manifest":1`), "manifest"},
		{"null for bytes", swap(`"manifest":"e30"`, `"manifest":null`), ""},
		{"no proof", swap(`,"tdx":`, `,"tpm":`), ""},
		{"an empty GPU", swap(`"manifest"`, `"gpu":"","manifest"`), "gpu"},
		{"too large", good + strings.Repeat(" ", MaxSize), "at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Parse([]byte(tt.data)); err == nil || !strings.HasPrefix(err.Error(), "evidence: ") || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v does not say %q", err, tt.says)
			}
		})
	}
}

// TestBounds has a row for each bound.
func TestBounds(t *testing.T) {
	for _, tt := range []struct {
		says string
		edit func(d *Document)
	}{
		{"nonces: there are 0", func(d *Document) { d.Nonces = nil }},
		{"nonces: there are 257", func(d *Document) {
			for len(d.Nonces) <= MaxNonces {
				d.Nonces = append(d.Nonces, fill(32, 1))
			}
		}},
		{"nonces[1]: 31 bytes", func(d *Document) { d.Nonces[1] = fill(31, 1) }},
		{"receipt_key", func(d *Document) { d.ReceiptKey = fill(33, 1) }},
		{"tls_key", func(d *Document) { d.TLSKey = nil }},
		{"tls_key", func(d *Document) { d.TLSKey = fill(4<<10+1, 1) }},
		{"manifest", func(d *Document) { d.Manifest = fill(64<<10+1, 1) }},
		{"cel", func(d *Document) { d.CEL = nil }},
		{"gpu", func(d *Document) { d.GPU = fill(maxGPU+1, 1) }},
		{"either", func(d *Document) { d.TDX = &TDX{} }},
		{"either", func(d *Document) { d.TPM = nil }},
		{"tpm.quote", func(d *Document) { d.TPM.Quote = nil }},
		{"tpm.signature", func(d *Document) { d.TPM.Signature = nil }},
		{"tpm.ak", func(d *Document) { d.TPM.AK = nil }},
		{"tpm.log", func(d *Document) { d.TPM.Log = fill(maxLog+1, 1) }},
		{"tpm.certificates: there are 0", func(d *Document) { d.TPM.Certificates = nil }},
		{"tpm.certificates[0]", func(d *Document) { d.TPM.Certificates[0] = nil }},
		{"tpm.pcrs: there are 14", func(d *Document) { d.TPM.PCRs = d.TPM.PCRs[1:] }},
		{"tpm.pcrs[3]: PCR 10", func(d *Document) { d.TPM.PCRs[3].Index = 10 }},
		{"tpm.pcrs[3]: 20 bytes", func(d *Document) { d.TPM.PCRs[3].SHA256 = fill(20, 1) }},
		{"tdx.quote", func(d *Document) { d.TPM, d.TDX = nil, &TDX{CCEL: fill(1, 1)} }},
		{"tdx.ccel", func(d *Document) { d.TPM, d.TDX = nil, &TDX{Quote: fill(1, 1)} }},
		{"tdx.quote", func(d *Document) { d.TPM, d.TDX = nil, &TDX{Quote: fill(maxQuote+1, 1), CCEL: fill(1, 1)} }},
	} {
		t.Run(tt.says, func(t *testing.T) {
			d := sampleTPM()
			tt.edit(d)
			if err := d.Validate(); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v does not say %q", err, tt.says)
			}
			if _, err := d.Encode(); err == nil {
				t.Error("it is encoded")
			}
		})
	}
}

// TestReportData pins the binding with a second way to compute it, and that every
// part changes it.
func TestReportData(t *testing.T) {
	d := sampleTDX()
	n := sha256.Sum256(append(append([]byte("chrysalis/nonces/v1"), d.Nonces[0]...), d.Nonces[1]...))
	text := "chrysalis/report-data/v1" + string(n[:])
	for _, part := range [][]byte{d.TLSKey, d.ReceiptKey, d.Manifest, nil} {
		sum := sha256.Sum256(part)
		text += string(sum[:])
	}
	if got, want := d.ReportData(), sha512.Sum512([]byte(text)); got != want {
		t.Errorf("%x, expected %x", got, want)
	}
	data := d.ReportData()
	if d.QualifyingData() != sha256.Sum256(data[:]) {
		t.Error("qualifying data")
	}
	const pinned = "c3d5eb484b43f4fa048e3cda0228cf18ae9b360cd332aef917d5689acbd4cd94fa9db68a773c55a6a6038cb0426f518a8888add91c017d083b49c3f4e5e163d5"
	if got := hex.EncodeToString(data[:]); got != pinned {
		t.Errorf("report data %s, expected %s: evidence of other versions would not verify", got, pinned)
	}
	seen := map[string]bool{fmt.Sprint(data): true}
	for name, edit := range map[string]func(d *Document){
		"a nonce": func(d *Document) { d.Nonces[1] = fill(32, 9) }, "the order of nonces": func(d *Document) { d.Nonces[0], d.Nonces[1] = d.Nonces[1], d.Nonces[0] },
		"the TLS key": func(d *Document) { d.TLSKey[0]++ }, "the receipt key": func(d *Document) { d.ReceiptKey[0]++ },
		"the manifest": func(d *Document) { d.Manifest = []byte("{} ") }, "GPU evidence": func(d *Document) { d.GPU = []byte("{}") },
	} {
		d := sampleTDX()
		edit(d)
		if data := fmt.Sprint(d.ReportData()); seen[data] {
			t.Errorf("%s does not change the report data", name)
		} else {
			seen[data] = true
		}
	}
	if a, b := GPUNonce(d.Nonces, d.TLSKey), GPUNonce(d.Nonces[:1], d.TLSKey); a == b || a == d.NonceHash() {
		t.Error("the GPU nonce does not follow from the nonces")
	}
	if !d.Lists(fill(32, 2)) || d.Lists(fill(32, 3)) || d.Lists(nil) {
		t.Error("Lists")
	}
}

func FuzzParse(f *testing.F) {
	for _, d := range []*Document{sampleTDX(), sampleTPM()} {
		data, err := d.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Parse(data)
		if err != nil {
			return
		}
		again, err := d.Encode()
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("read:\n%s\nwritten:\n%s\n%v", data, again, err)
		}
		d.ReportData()
	})
}
