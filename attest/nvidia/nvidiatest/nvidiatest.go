// Package nvidiatest makes GPUs, certificates, RIMs and OCSP responses that are
// like NVIDIA's in form and lead to roots of its own, for tests. Nothing made
// here verifies under NVIDIA's roots.
package nvidiatest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"sync/atomic"
	"time"

	"github.com/beevik/etree"
	dsig "github.com/russellhaering/goxmldsig"
	"golang.org/x/crypto/ocsp"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
)

// What the test GPUs run.
const (
	Chip   = "GH100"
	Model  = "NVIDIA H100 TEST"
	Driver = "999.10.01"
	VBIOS  = "96.00.AA.00.01"
)

// Now is a time at which everything made here is valid.
var Now = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// Validity of the certificates made here.
var (
	NotBefore = Now.AddDate(-1, 0, 0)
	NotAfter  = Now.AddDate(1, 0, 0)
)

// Certificate is a certificate with its key.
type Certificate struct {
	*x509.Certificate
	Key    *ecdsa.PrivateKey
	Issuer *Certificate // nil of a root
}

// Chain lists the certificate and those above it, in DER.
func (c *Certificate) Chain() [][]byte {
	var out [][]byte
	for ; c != nil; c = c.Issuer {
		out = append(out, c.Raw)
	}
	return out
}

// PEM is the chain as NVML returns it.
func (c *Certificate) PEM() []byte {
	var out []byte
	for _, der := range c.Chain() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// SHA256 is how roots are pinned.
func (c *Certificate) SHA256() [32]byte { return sha256.Sum256(c.Raw) }

var serial atomic.Int64

// Issue makes a certificate for a new P-384 key, valid as long as its issuer's.
// change, when not nil, may edit the template. A nil issuer makes a root.
func Issue(commonName string, issuer *Certificate, ca bool, change func(*x509.Certificate)) *Certificate {
	key := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1<<40 + serial.Add(1)),
		Subject:      pkix.Name{CommonName: commonName, Organization: []string{"Chrysalis tests"}},
		NotBefore:    NotBefore, NotAfter: NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if ca {
		template.KeyUsage, template.IsCA, template.BasicConstraintsValid = x509.KeyUsageCertSign|x509.KeyUsageCRLSign, true, true
	}
	if issuer != nil {
		template.NotBefore, template.NotAfter = issuer.NotBefore, issuer.NotAfter
	}
	if change != nil {
		change(template)
	}
	parent, signer := template, key
	if issuer != nil {
		parent, signer = issuer.Certificate, issuer.Key
	}
	der := must(x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer))
	return &Certificate{must(x509.ParseCertificate(der)), key, issuer}
}

// Vendor stands in for NVIDIA.
type Vendor struct {
	Chip                                 string
	Now                                  time.Time // what it makes is valid around then
	DeviceRoot, Identity, Provisioner    *Certificate
	RIMRoot, RIMAuthority, RIML3, Signer *Certificate
}

// NewVendor makes the authorities of Chip, around Now.
func NewVendor() *Vendor { return NewVendorOf(Chip, Now) }

// NewVendorOf makes the authorities of a chip, like GB100, around a time.
func NewVendorOf(chip string, now time.Time) *Vendor {
	v := &Vendor{Chip: chip, Now: now}
	around := func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0) }
	v.DeviceRoot = Issue("Test Device Identity CA", nil, true, around)
	v.Identity = Issue("Test "+chip+" Identity", v.DeviceRoot, true, nil)
	v.Provisioner = Issue("Test "+chip+" Provisioner ICA 1", v.Identity, true, nil)
	v.RIMRoot = Issue("Test RIM signing Root CA", nil, true, around)
	v.RIMAuthority = Issue("Test Reference Value "+chip+" CA", v.RIMRoot, true, nil)
	v.RIML3 = Issue("Test Reference Value L3 "+chip, v.RIMAuthority, true, nil)
	v.Signer = Issue("Test RIM L4 Signer", v.RIML3, false, nil)
	return v
}

// Roots are what a verifier of this vendor's GPUs trusts.
func (v *Vendor) Roots() nvidia.Roots {
	return nvidia.Roots{Device: [][32]byte{v.DeviceRoot.SHA256()}, RIM: [][32]byte{v.RIMRoot.SHA256()}}
}

// GPU is a device.
type GPU struct {
	Device, Leaf *Certificate
	// Measurements are by index; Opaque fields are in order.
	Measurements [][]byte
	Opaque       []Opaque
}

// Opaque is a field of a report.
type Opaque struct {
	Field nvidia.Field
	Value []byte
}

// NewGPU makes a device that measures as the vendor's RIMs say.
func (v *Vendor) NewGPU() *GPU {
	g := &GPU{Device: Issue(v.Chip+" A01 GSP BROM", v.Provisioner, true, nil)}
	fwid := sha512.Sum384([]byte("firmware"))
	g.Leaf = Issue(v.Chip+" A01 GSP FMC LF", g.Device, false, func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}, Value: DeviceID(g.Device.Certificate, fwid[:])}}
	})
	for i := range 64 {
		g.Measurements = append(g.Measurements, Measurement(i))
	}
	g.Opaque = []Opaque{
		{nvidia.FieldVBIOSVersion, []byte{0x00, 0xaa, 0x00, 0x96, 0x01, 0, 0, 0}},
		{nvidia.FieldChipSKU, []byte("882\x00\x00")},
		{nvidia.FieldProject, []byte("1010\x00")},
		{nvidia.FieldProjectSKU, []byte("0200\x00")},
		{nvidia.FieldDriverVersion, []byte(Driver + "\x00")},
		{nvidia.FieldNVDEC0, []byte{0xaa}},
		{nvidia.FieldFWID, fwid[:]},
		{nvidia.FieldProtectedPCIe, []byte{0x55}},
	}
	if strings.HasPrefix(v.Chip, "GB") {
		g.Opaque = append(g.Opaque, Opaque{nvidia.FieldChip, []byte(v.Chip + "\x00")}, Opaque{nvidia.FieldFeatureFlag, []byte{0}})
	}
	return g
}

// DeviceID is the value of a leaf's extension that names its firmware.
func DeviceID(device *x509.Certificate, fwid []byte) []byte {
	type digest struct {
		Algorithm asn1.ObjectIdentifier
		Digest    []byte
	}
	return must(asn1.Marshal(struct {
		Version int
		Device  asn1.RawValue
		FWID    digest
	}{1, asn1.RawValue{FullBytes: device.RawSubjectPublicKeyInfo}, digest{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, fwid}}))
}

// Set replaces an opaque field.
func (g *GPU) Set(f nvidia.Field, value []byte) {
	for i := range g.Opaque {
		if g.Opaque[i].Field == f {
			g.Opaque[i].Value = value
		}
	}
}

// Measurement is the digest of a test GPU at an index.
func Measurement(index int) []byte {
	sum := sha512.Sum384(fmt.Appendf(nil, "measurement %d", index))
	return sum[:]
}

// Unsigned returns a report without its signature.
func (g *GPU) Unsigned(nonce [32]byte) []byte {
	out := append([]byte{0x11, 0xe0, 0x01, 0xff}, nonce[:]...)
	out = append(out, 0) // slot
	var record []byte
	for i, m := range g.Measurements {
		record = append(record, byte(i+1), 1)
		record = binary.LittleEndian.AppendUint16(record, uint16(len(m)+3))
		record = append(record, 1)
		record = binary.LittleEndian.AppendUint16(record, uint16(len(m)))
		record = append(record, m...)
	}
	n := len(record)
	out = append(out, 0x11, 0x60, 0, 0, byte(len(g.Measurements)), byte(n), byte(n>>8), byte(n>>16))
	out = append(out, record...)
	own := make([]byte, 32)
	rand.Read(own)
	out = append(out, own...)
	var opaque []byte
	for _, o := range g.Opaque {
		opaque = binary.LittleEndian.AppendUint16(opaque, uint16(o.Field))
		opaque = binary.LittleEndian.AppendUint16(opaque, uint16(len(o.Value)))
		opaque = append(opaque, o.Value...)
	}
	out = binary.LittleEndian.AppendUint16(out, uint16(len(opaque)))
	return append(out, opaque...)
}

// Report answers a nonce.
func (g *GPU) Report(nonce [32]byte) []byte {
	unsigned := g.Unsigned(nonce)
	return append(unsigned, Sign(g.Leaf.Key, unsigned)...)
}

// Evidence is the GPU's entry in a VM's evidence.
func (g *GPU) Evidence(nonce [32]byte) nvidia.GPU {
	out := nvidia.GPU{Model: Model, State: nvidia.State{CC: true, MultiGPU: nvidia.MultiGPUNone}, Report: g.Report(nonce)}
	for _, c := range g.Leaf.Chain() {
		out.Certificates = append(out.Certificates, c)
	}
	return out
}

// Sign returns r ‖ s over SHA-384.
func Sign(key *ecdsa.PrivateKey, data []byte) []byte {
	sum := sha512.Sum384(data)
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		panic(err)
	}
	out := make([]byte, 96)
	r.FillBytes(out[:48])
	s.FillBytes(out[48:])
	return out
}

// The indices that the RIMs made here measure.
var (
	DriverIndices = []int{7, 23, 32, 35}
	VBIOSIndices  = []int{0, 1, 2, 3}
)

// DriverRIM and VBIOSRIM are what a test GPU measures as.
func (v *Vendor) DriverRIM() []byte { return v.RIM(v.Signer, Driver, DriverIndices) }

// VBIOSRIM is the VBIOS's.
func (v *Vendor) VBIOSRIM() []byte { return v.RIM(v.Signer, VBIOS, VBIOSIndices) }

// RIM makes and signs a RIM for measurements of a test GPU. The first index has
// a second alternative.
func (v *Vendor) RIM(signer *Certificate, version string, indices []int) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, `<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" name="%[1]s" tagId="%[2]s" version="1.0">
    <ns0:Entity name="Chrysalis tests" role="softwareCreator tagCreator"/>
    <ns0:Meta colloquialVersion="%[2]s" edition="GPU" product="%[1]s"/>
    <ns0:Payload>
`, v.Chip, version)
	for i := range 64 {
		active, values := "False", []string{strings.Repeat("0", 96)}
		for n, index := range indices {
			if index != i {
				continue
			}
			active, values = "True", []string{hex.EncodeToString(Measurement(i))}
			if n == 0 {
				values = []string{strings.Repeat("f", 96), values[0]}
			}
		}
		fmt.Fprintf(&b, `        <ns0:Resource type="Measurement" index="%d" active="%s" alternatives="%d"`, i, active, len(values))
		for n, value := range values {
			fmt.Fprintf(&b, ` ns2:Hash%d="%s"`, n, value)
		}
		fmt.Fprintf(&b, ` name="Measurement_%d" size="48"/>`+"\n", i)
	}
	b.WriteString("    </ns0:Payload>\n</SoftwareIdentity>")
	return SignXML(b.String(), signer)
}

// SignXML adds an enveloped signature in the form that NVIDIA uses. The document
// must be one whose root closes with </SoftwareIdentity> and declares the default
// namespace, ns0 and ns2, in this order and no other.
func SignXML(document string, signer *Certificate) []byte {
	doc := etree.NewDocument()
	if err := doc.ReadFromString(document); err != nil {
		panic(err)
	}
	canonical := must(dsig.MakeC14N11Canonicalizer().Canonicalize(doc.Root()))
	digest := sha512.Sum384(canonical)
	// Written in its canonical form, with the namespaces that it inherits, so that
	// the signature does not depend on the library that is tested with it.
	info := fmt.Sprintf(`<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:CanonicalizationMethod>`+
		`<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"></ds:SignatureMethod>`+
		`<ds:Reference URI=""><ds:Transforms><ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"></ds:Transform>`+
		`<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:Transform></ds:Transforms>`+
		`<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"></ds:DigestMethod>`+
		`<ds:DigestValue>%s</ds:DigestValue></ds:Reference></ds:SignedInfo>`, base64.StdEncoding.EncodeToString(digest[:]))
	inherited := `<ds:SignedInfo xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ds="http://www.w3.org/2000/09/xmldsig#" xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384">`
	value := Sign(signer.Key, []byte(inherited+info))
	var b strings.Builder
	fmt.Fprintf(&b, `<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"><ds:SignedInfo>%s<ds:SignatureValue>%s</ds:SignatureValue><ds:KeyInfo><ds:X509Data>`,
		info, base64.StdEncoding.EncodeToString(value))
	for _, der := range signer.Chain() {
		fmt.Fprintf(&b, "<ds:X509Certificate>%s</ds:X509Certificate>", base64.StdEncoding.EncodeToString(der))
	}
	b.WriteString("</ds:X509Data></ds:KeyInfo></ds:Signature></SoftwareIdentity>")
	body, ok := strings.CutSuffix(document, "</SoftwareIdentity>")
	if !ok {
		panic("not a SoftwareIdentity")
	}
	return []byte(body + b.String())
}

// OCSP answers for a certificate, through a responder of its issuer.
func OCSP(c *Certificate, status int, at time.Time) []byte {
	responder := Issue("Test OCSP Responder", c.Issuer, false, func(t *x509.Certificate) {
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}
	})
	return OCSPFrom(responder, c, status, at)
}

// OCSPFrom answers for a certificate through any responder.
func OCSPFrom(responder, c *Certificate, status int, at time.Time) []byte {
	return must(ocsp.CreateResponse(c.Issuer.Certificate, responder.Certificate, ocsp.Response{
		Status: status, SerialNumber: c.SerialNumber, ThisUpdate: at, NextUpdate: at.AddDate(0, 0, 1), RevokedAt: at,
		Certificate: responder.Certificate, IssuerHash: crypto.SHA384, SignatureAlgorithm: x509.ECDSAWithSHA384,
	}, responder.Key))
}

// Collateral is all that a verifier needs for these GPUs at v.Now.
func (v *Vendor) Collateral(gpus ...*GPU) *nvidia.Collateral {
	c := &nvidia.Collateral{Version: nvidia.Version, RIMs: []evidence.Bytes{v.DriverRIM(), v.VBIOSRIM()}, OCSP: []evidence.Bytes{}}
	certificates := []*Certificate{v.Identity, v.Provisioner, v.RIMAuthority, v.RIML3, v.Signer}
	for _, g := range gpus {
		certificates = append(certificates, g.Device)
	}
	for _, each := range certificates {
		c.OCSP = append(c.OCSP, OCSP(each, ocsp.Good, v.Now.Add(-time.Hour)))
	}
	return c
}

// Set makes n GPUs, their evidence for a nonce, and the collateral for them.
func (v *Vendor) Set(n int, nonce [32]byte) (*nvidia.Evidence, *nvidia.Collateral) {
	e := &nvidia.Evidence{Version: nvidia.Version}
	var gpus []*GPU
	for range n {
		g := v.NewGPU()
		gpus = append(gpus, g)
		e.GPUs = append(e.GPUs, g.Evidence(nonce))
	}
	return e, v.Collateral(gpus...)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
