package attesttest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"

	"chrysalis/attest"
)

// FMSPC is that of the forged platforms.
const FMSPC = "b0c06f000000"

// Intel stands in for Intel: a root of its own with the names of Intel's, a
// platform, and what Intel would say about it.
type Intel struct {
	Root, CA, Signer, PCK             *x509.Certificate
	rootKey, caKey, signerKey, pckKey *ecdsa.PrivateKey
	attestationKey                    *ecdsa.PrivateKey // the quoting enclave's

	// What the collateral says; change it before asking for it.
	PlatformStatus, ModuleStatus, QEStatus string
	Advisories                             []string
	Issued                                 time.Time
	NextUpdate                             time.Time
	Evaluation                             int
	Revoke                                 []*x509.Certificate
	OldModule                              bool // the levels ask for nothing of the module's major version
}

// NewIntel makes keys and certificates valid around now.
func NewIntel(now time.Time) *Intel {
	i := &Intel{
		rootKey: newKey(), caKey: newKey(), signerKey: newKey(), pckKey: newKey(), attestationKey: newKey(),
		PlatformStatus: "UpToDate", ModuleStatus: "UpToDate", QEStatus: "UpToDate",
		Issued: now.Add(-time.Hour), NextUpdate: now.Add(30 * 24 * time.Hour), Evaluation: 17,
	}
	from, until := now.Add(-24*time.Hour), now.Add(365*24*time.Hour)
	i.Root = i.certificate("Intel SGX Root CA", i.rootKey, nil, nil, from, until, true, nil)
	i.CA = i.certificate("Intel SGX PCK Platform CA", i.caKey, i.Root, i.rootKey, from, until, true, nil)
	i.Signer = i.certificate("Intel SGX TCB Signing", i.signerKey, i.Root, i.rootKey, from, until, false, nil)
	i.Reissue(from, until)
	return i
}

// Reissue makes the platform's certificate anew, with other dates.
func (i *Intel) Reissue(from, until time.Time) {
	i.PCK = i.certificate("Intel SGX PCK Certificate", i.pckKey, i.CA, i.caKey, from, until, false, []pkix.Extension{{
		Id: asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1}, Value: sgxExtension(),
	}})
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	return key
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func (i *Intel) certificate(name string, key *ecdsa.PrivateKey, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, from, until time.Time, ca bool, extra []pkix.Extension) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	must(err)
	usage := x509.KeyUsageDigitalSignature
	if ca {
		usage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
	public, err := key.PublicKey.Bytes()
	must(err)
	id := sha256.Sum256(public)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: []string{"Intel Corporation"}},
		NotBefore: from, NotAfter: until, KeyUsage: usage, IsCA: ca, BasicConstraintsValid: true,
		SubjectKeyId: id[:20], SignatureAlgorithm: x509.ECDSAWithSHA256, ExtraExtensions: extra,
		CRLDistributionPoints: []string{"https://certificates.example/root.der"},
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	return cert
}

// sgxExtension is a PCK certificate's extension (Intel SGX PCK Certificate and CRL
// Profile Specification, section 1.3.5) of a platform all of whose components are
// at 5, its PCE at 11.
func sgxExtension() []byte {
	oid := func(last ...int) asn1.ObjectIdentifier {
		return append(asn1.ObjectIdentifier{1, 2, 840, 113741, 1, 13, 1}, last...)
	}
	marshal := func(v any) asn1.RawValue {
		der, err := asn1.Marshal(v)
		must(err)
		return asn1.RawValue{FullBytes: der}
	}
	pair := func(id asn1.ObjectIdentifier, v any) asn1.RawValue {
		return marshal([]asn1.RawValue{marshal(id), marshal(v)})
	}
	var tcb []asn1.RawValue
	for n := 1; n <= 16; n++ {
		tcb = append(tcb, pair(oid(2, n), 5))
	}
	tcb = append(tcb, pair(oid(2, 17), 11), pair(oid(2, 18), make([]byte, 16)))
	fmspc, _ := hex.DecodeString(FMSPC)
	der, err := asn1.Marshal([]asn1.RawValue{
		pair(oid(1), make([]byte, 16)), pair(oid(2), tcb), pair(oid(3), make([]byte, 2)), pair(oid(4), fmspc),
	})
	must(err)
	return der
}

// PEM returns certificates as PEM.
func PEM(certs ...*x509.Certificate) string {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return string(out)
}

// Collateral is what this Intel says about its platform.
func (i *Intel) Collateral() *attest.Collateral {
	component := func(svn int) (out []map[string]any) {
		for range 16 {
			out = append(out, map[string]any{"svn": svn})
		}
		return out
	}
	zeros := func(n int) string { return hex.EncodeToString(make([]byte, n)) }
	ones := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = 0xff
		}
		return hex.EncodeToString(b)
	}
	level := func(status string, tcb map[string]any) map[string]any {
		l := map[string]any{"tcb": tcb, "tcbDate": "2026-08-13T00:00:00Z", "tcbStatus": status}
		if status != "UpToDate" && len(i.Advisories) > 0 {
			l["advisoryIDs"] = i.Advisories
		}
		return l
	}
	module := map[string]any{"mrsigner": zeros(48), "attributes": zeros(8), "attributesMask": ones(8)}
	identity := map[string]any{"id": "TDX_01", "mrsigner": zeros(48), "attributes": zeros(8), "attributesMask": ones(8),
		"tcbLevels": []any{level(i.ModuleStatus, map[string]any{"isvsvn": 4})}}
	tdx := component(3)
	if i.OldModule {
		tdx[1]["svn"] = 0
	}
	info := map[string]any{
		"id": "TDX", "version": 3, "issueDate": i.Issued.UTC().Format(time.RFC3339), "nextUpdate": i.NextUpdate.UTC().Format(time.RFC3339),
		"fmspc": FMSPC, "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": i.Evaluation,
		"tdxModule": module, "tdxModuleIdentities": []any{identity},
		"tcbLevels": []any{level(i.PlatformStatus, map[string]any{
			"sgxtcbcomponents": component(4), "pcesvn": 11, "tdxtcbcomponents": tdx,
		})},
	}
	qe := map[string]any{
		"id": "TD_QE", "version": 2, "issueDate": i.Issued.UTC().Format(time.RFC3339), "nextUpdate": i.NextUpdate.UTC().Format(time.RFC3339),
		"tcbEvaluationDataNumber": i.Evaluation, "miscselect": zeros(4), "miscselectMask": ones(4),
		"attributes": zeros(16), "attributesMask": ones(16), "mrsigner": zeros(32), "isvprodid": 2,
		"tcbLevels": []any{level(i.QEStatus, map[string]any{"isvsvn": 4})},
	}
	crl := func(issuer *x509.Certificate, key *ecdsa.PrivateKey) []byte {
		var entries []x509.RevocationListEntry
		for _, c := range i.Revoke {
			entries = append(entries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: i.Issued})
		}
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
			Number: big.NewInt(1), ThisUpdate: i.Issued, NextUpdate: i.NextUpdate, RevokedCertificateEntries: entries,
		}, issuer, key)
		must(err)
		return der
	}
	return &attest.Collateral{
		TCBInfo: i.Sign("tcbInfo", info), TCBInfoChain: PEM(i.Signer, i.Root),
		QEIdentity: i.Sign("enclaveIdentity", qe), QEIdentityChain: PEM(i.Signer, i.Root),
		PCKCRL: crl(i.CA, i.caKey), RootCRL: crl(i.Root, i.rootKey),
	}
}

// Sign makes a signed document of Intel's.
func (i *Intel) Sign(key string, body any) string {
	data, err := json.Marshal(body)
	must(err)
	return fmt.Sprintf(`{%q:%s,"signature":"%x"}`, key, data, rawSign(i.signerKey, data))
}

// rawSign is an ECDSA signature over SHA-256 as r ‖ s, 32 bytes each.
func rawSign(key *ecdsa.PrivateKey, message []byte) []byte {
	sum := sha256.Sum256(message)
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	must(err)
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

// TD is what a quote says.
type TD struct {
	Version        int // of the quote: 4 or 5
	TEETCBSVN      [16]byte
	MRSEAM         [48]byte
	MRSignerSEAM   [48]byte
	SEAMAttributes [8]byte
	Attributes     uint64
	XFAM           uint64
	MRTD           [48]byte
	MRConfigID     [48]byte
	MROwner        [48]byte
	MROwnerConfig  [48]byte
	RTMR           [4][48]byte
	ReportData     [64]byte
	MRServiceTD    [48]byte // only in version 5
}

// Quote makes a quote of this Intel's platform.
func (i *Intel) Quote(t *TD) []byte {
	header := make([]byte, 48)
	binary.LittleEndian.PutUint16(header, uint16(t.Version))
	binary.LittleEndian.PutUint16(header[2:], 2)    // ECDSA P-256
	binary.LittleEndian.PutUint32(header[4:], 0x81) // TDX
	body := append([]byte{}, t.TEETCBSVN[:]...)
	body = append(body, t.MRSEAM[:]...)
	body = append(body, t.MRSignerSEAM[:]...)
	body = append(body, t.SEAMAttributes[:]...)
	body = binary.LittleEndian.AppendUint64(body, t.Attributes)
	body = binary.LittleEndian.AppendUint64(body, t.XFAM)
	for _, b := range [][48]byte{t.MRTD, t.MRConfigID, t.MROwner, t.MROwnerConfig, t.RTMR[0], t.RTMR[1], t.RTMR[2], t.RTMR[3]} {
		body = append(body, b[:]...)
	}
	body = append(body, t.ReportData[:]...)
	message := header
	if t.Version == 5 {
		body = append(body, make([]byte, 16)...) // TEE_TCB_SVN_2
		body = append(body, t.MRServiceTD[:]...)
		message = binary.LittleEndian.AppendUint16(message, 3)
		message = binary.LittleEndian.AppendUint32(message, uint32(len(body)))
	}
	message = append(message, body...)

	public, err := i.attestationKey.PublicKey.Bytes()
	must(err)
	public = public[1:] // without the byte that says "uncompressed"
	auth := make([]byte, 32)
	report := make([]byte, 384)
	binary.LittleEndian.PutUint16(report[256:], 2) // ISVPRODID
	binary.LittleEndian.PutUint16(report[258:], 5) // ISVSVN
	bound := sha256.Sum256(append(append([]byte{}, public...), auth...))
	copy(report[320:], bound[:])
	chain := []byte(PEM(i.PCK, i.CA, i.Root))

	inner := append(append([]byte{}, report...), rawSign(i.pckKey, report)...)
	inner = binary.LittleEndian.AppendUint16(inner, uint16(len(auth)))
	inner = append(inner, auth...)
	inner = binary.LittleEndian.AppendUint16(inner, 5)
	inner = binary.LittleEndian.AppendUint32(inner, uint32(len(chain)))
	inner = append(inner, chain...)

	data := append(rawSign(i.attestationKey, message), public...)
	data = binary.LittleEndian.AppendUint16(data, 6)
	data = binary.LittleEndian.AppendUint32(data, uint32(len(inner)))
	data = append(data, inner...)
	message = binary.LittleEndian.AppendUint32(message, uint32(len(data)))
	return append(message, data...)
}
