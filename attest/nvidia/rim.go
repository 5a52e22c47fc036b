package nvidia

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/beevik/etree"
	dsig "github.com/russellhaering/goxmldsig"
)

// MaxRIMSize is the largest RIM, in bytes. Those of Hopper have about 21,000.
const MaxRIMSize = 256 << 10

// Names in a RIM.
const (
	nsSWID   = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
	nsSHA384 = "http://www.w3.org/2001/04/xmlenc#sha384"

	algC14N      = string(dsig.CanonicalXML11AlgorithmId)
	algEnveloped = string(dsig.EnvelopedSignatureAltorithmId)
	algDigest    = "http://www.w3.org/2001/04/xmldsig-more#sha384"
)

// Bounds of what a RIM may hold.
const (
	maxXMLDepth     = 12
	maxXMLElements  = 900 // below the signature library's own limit of 1,000
	maxMeasurements = 256
	maxAlternatives = 16
)

// RIM is a reference integrity manifest whose signature was verified: what a
// driver or a VBIOS must measure as. It is an ISO 19770-2 SWID tag with TCG's
// attributes.
type RIM struct {
	Product string // the chip, for example GH100
	Version string // of the driver or VBIOS that it is for
	// Golden holds the accepted SHA-384 digests by index. Inactive entries of the
	// file are left out.
	Golden map[int][][]byte

	chain []*x509.Certificate // signer first
	raw   []byte
}

// Validity is when all certificates behind the signature are valid.
func (r *RIM) Validity() (from, to time.Time) { return validity(r.chain) }

// ParseRIM verifies a RIM under roots, given as the SHA-256 of their
// certificates, and parses it. It does not look at any clock.
func ParseRIM(data []byte, roots [][32]byte) (*RIM, error) {
	return parseRIM(data, roots, &links{})
}

func parseRIM(data []byte, roots [][32]byte, l *links) (*RIM, error) {
	if len(data) > MaxRIMSize {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(data), MaxRIMSize)
	}
	if err := checkXML(data); err != nil {
		return nil, err
	}
	doc := etree.NewDocument()
	if err := doc.ReadFromBytes(data); err != nil {
		return nil, fmt.Errorf("read XML: %w", err)
	}
	root := doc.Root()
	if root == nil || root.Tag != "SoftwareIdentity" || root.NamespaceURI() != nsSWID {
		return nil, errors.New("not a SoftwareIdentity of ISO 19770-2")
	}
	signature, err := theSignature(root)
	if err != nil {
		return nil, err
	}
	chain, err := signerChain(signature, roots, l)
	if err != nil {
		return nil, err
	}
	if err := convertSignature(signature); err != nil {
		return nil, err
	}
	validator := dsig.NewDefaultValidationContext(&dsig.MemoryX509CertificateStore{Roots: chain[:1]})
	// The library wants a time at which the signer is valid; ours is judged later.
	validator.Clock = dsig.NewFakeClockAt(chain[0].NotBefore)
	verified, err := validator.Validate(root)
	if err != nil {
		return nil, fmt.Errorf("XML signature: %w", err)
	}
	// Only what was signed is read, in the form in which it was signed.
	rim, err := readRIM(verified)
	if err != nil {
		return nil, err
	}
	rim.chain, rim.raw = chain, data
	return rim, nil
}

// checkXML refuses what no RIM has and what XML readers are known to see
// differently: document types, entities, processing instructions, comments,
// repeated attributes, nesting and numbers of elements out of bounds.
func checkXML(data []byte) error {
	d := xml.NewDecoder(bytes.NewReader(data))
	d.Entity = map[string]string{}
	depth, elements := 0, 0
	for {
		token, err := d.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read XML: %w", err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			depth++
			elements++
			if depth > maxXMLDepth || elements > maxXMLElements {
				return fmt.Errorf("XML with more than %d levels or %d elements", maxXMLDepth, maxXMLElements)
			}
			seen := map[xml.Name]bool{}
			for _, a := range token.Attr {
				if seen[a.Name] {
					return fmt.Errorf("XML attribute %.40q is there twice", a.Name.Local)
				}
				seen[a.Name] = true
			}
		case xml.EndElement:
			depth--
		case xml.ProcInst:
			if token.Target != "xml" || elements > 0 {
				return errors.New("XML with a processing instruction")
			}
		case xml.Directive:
			return errors.New("XML with a document type")
		case xml.Comment:
			return errors.New("XML with a comment")
		}
	}
}

// theSignature returns the one signature, which must be the last child of the
// root and use exactly what NVIDIA uses: one reference to the whole document,
// without the signature, in Canonical XML 1.1, SHA-384 and ECDSA.
func theSignature(root *etree.Element) (*etree.Element, error) {
	var found *etree.Element
	var walk func(e *etree.Element)
	count := 0
	walk = func(e *etree.Element) {
		if e.Tag == dsig.SignatureTag {
			count++
			found = e
		}
		for _, c := range e.ChildElements() {
			walk(c)
		}
	}
	walk(root)
	children := root.ChildElements()
	if count != 1 || len(children) == 0 || children[len(children)-1] != found || found.NamespaceURI() != dsig.Namespace {
		return nil, errors.New("expected exactly one XML signature, at the end")
	}
	info, err := only(found, dsig.SignedInfoTag)
	if err != nil {
		return nil, err
	}
	method, err := only(info, dsig.SignatureMethodTag)
	if err != nil {
		return nil, err
	}
	canonicalization, err := only(info, dsig.CanonicalizationMethodTag)
	if err != nil {
		return nil, err
	}
	reference, err := only(info, dsig.ReferenceTag)
	if err != nil {
		return nil, err
	}
	digest, err := only(reference, dsig.DigestMethodTag)
	if err != nil {
		return nil, err
	}
	transforms, err := only(reference, dsig.TransformsTag)
	if err != nil {
		return nil, err
	}
	var got []string
	for _, t := range transforms.ChildElements() {
		got = append(got, t.SelectAttrValue(dsig.AlgorithmAttr, ""))
	}
	for _, want := range []struct{ what, got, want string }{
		{"canonicalization", canonicalization.SelectAttrValue(dsig.AlgorithmAttr, ""), algC14N},
		{"signature method", method.SelectAttrValue(dsig.AlgorithmAttr, ""), dsig.ECDSASHA384SignatureMethod},
		{"reference", reference.SelectAttrValue(dsig.URIAttr, "none"), ""},
		{"digest method", digest.SelectAttrValue(dsig.AlgorithmAttr, ""), algDigest},
		{"transforms", strings.Join(got, " "), algEnveloped + " " + algC14N},
	} {
		if want.got != want.want {
			return nil, fmt.Errorf("XML signature: %s: %.80q, expected %q", want.what, want.got, want.want)
		}
	}
	return found, nil
}

// only returns the one child of that name, in the signature's namespace.
func only(parent *etree.Element, tag string) (*etree.Element, error) {
	var found *etree.Element
	for _, c := range parent.ChildElements() {
		if c.Tag != tag {
			continue
		}
		if found != nil || c.NamespaceURI() != dsig.Namespace {
			return nil, fmt.Errorf("XML signature: expected one %s in %s", tag, parent.Tag)
		}
		found = c
	}
	if found == nil {
		return nil, fmt.Errorf("XML signature: there is no %s in %s", tag, parent.Tag)
	}
	return found, nil
}

// signerChain verifies the chain that the signature carries.
func signerChain(signature *etree.Element, roots [][32]byte, l *links) ([]*x509.Certificate, error) {
	info, err := only(signature, dsig.KeyInfoTag)
	if err != nil {
		return nil, err
	}
	x509Data, err := only(info, dsig.X509DataTag)
	if err != nil {
		return nil, err
	}
	var der [][]byte
	for _, c := range x509Data.ChildElements() {
		if c.Tag != dsig.X509CertificateTag || len(der) == MaxCertificates {
			return nil, fmt.Errorf("XML signature: expected at most %d certificates in %s", MaxCertificates, x509Data.Tag)
		}
		raw, err := decode64(c.Text())
		if err != nil {
			return nil, fmt.Errorf("XML signature: certificate %d: %w", len(der), err)
		}
		der = append(der, raw)
	}
	chain, err := l.verifyChain(der, roots)
	if err != nil {
		return nil, fmt.Errorf("signer: %w", err)
	}
	return chain, nil
}

// convertSignature writes the signature's value, r ‖ s (XML Signature 1.1,
// section 6.4.3), as the ASN.1 that the library expects. The value is not part
// of what is signed.
func convertSignature(signature *etree.Element) error {
	value, err := only(signature, dsig.SignatureValueTag)
	if err != nil {
		return err
	}
	raw, err := decode64(value.Text())
	if err != nil {
		return fmt.Errorf("XML signature: value: %w", err)
	}
	der, err := signatureDER(raw)
	if err != nil {
		return fmt.Errorf("XML signature: %w", err)
	}
	value.SetText(base64.StdEncoding.EncodeToString(der))
	return nil
}

func decode64(s string) ([]byte, error) {
	raw, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		return nil, errors.New("not base64")
	}
	return raw, nil
}

// readRIM reads what was signed.
func readRIM(root *etree.Element) (*RIM, error) {
	if root == nil || root.Tag != "SoftwareIdentity" || root.NamespaceURI() != nsSWID {
		return nil, errors.New("the signature is over something else than a SoftwareIdentity")
	}
	rim := &RIM{Golden: map[int][][]byte{}}
	var meta, payload *etree.Element
	for _, c := range root.ChildElements() {
		if c.NamespaceURI() != nsSWID {
			continue
		}
		switch {
		case c.Tag == "Meta" && meta == nil:
			meta = c
		case c.Tag == "Payload" && payload == nil:
			payload = c
		case c.Tag == "Meta" || c.Tag == "Payload":
			return nil, fmt.Errorf("two elements %s", c.Tag)
		}
	}
	if meta == nil || payload == nil {
		return nil, errors.New("expected one element Meta and one Payload")
	}
	rim.Product = attribute(meta, "", "product")
	rim.Version = attribute(meta, "", "colloquialVersion")
	if !chipRE.MatchString(rim.Product) || len(rim.Version) < 1 || len(rim.Version) > 64 {
		return nil, fmt.Errorf("is for product %.40q, version %.80q, which is neither a driver nor a VBIOS", rim.Product, rim.Version)
	}
	seen := map[int]bool{}
	for _, c := range payload.ChildElements() {
		if c.Tag != "Resource" || c.NamespaceURI() != nsSWID || attribute(c, "", "type") != "Measurement" {
			return nil, fmt.Errorf("the payload has an element %.40q of type %.40q, expected measurements only", c.Tag, attribute(c, "", "type"))
		}
		index, err := strconv.Atoi(attribute(c, "", "index"))
		if err != nil || index < 0 || index >= maxMeasurements || seen[index] {
			return nil, fmt.Errorf("measurement index %.40q: expected each of 0 to %d at most once", attribute(c, "", "index"), maxMeasurements-1)
		}
		seen[index] = true
		switch attribute(c, "", "active") {
		case "True":
		case "False":
			continue
		default:
			return nil, fmt.Errorf("measurement %d: active is %.40q", index, attribute(c, "", "active"))
		}
		count, err := strconv.Atoi(attribute(c, "", "alternatives"))
		if err != nil || count < 1 || count > maxAlternatives || attribute(c, "", "size") != strconv.Itoa(digestSize) {
			return nil, fmt.Errorf("measurement %d: expected 1 to %d alternatives of %d bytes", index, maxAlternatives, digestSize)
		}
		for i := range count {
			digest, err := hex.DecodeString(attribute(c, nsSHA384, "Hash"+strconv.Itoa(i)))
			if err != nil || len(digest) != digestSize {
				return nil, fmt.Errorf("measurement %d: alternative %d is not a SHA-384 digest", index, i)
			}
			rim.Golden[index] = append(rim.Golden[index], digest)
		}
	}
	if len(rim.Golden) == 0 {
		return nil, errors.New("has no active measurement")
	}
	return rim, nil
}

// attribute returns an attribute's value in a namespace; without a prefix an
// attribute is in none.
func attribute(e *etree.Element, namespace, key string) string {
	for i := range e.Attr {
		a := &e.Attr[i]
		if a.Key != key {
			continue
		}
		if namespace == "" && a.Space == "" || namespace != "" && a.Space != "" && a.NamespaceURI() == namespace {
			return a.Value
		}
	}
	return ""
}
