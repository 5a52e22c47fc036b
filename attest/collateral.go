package attest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-tdx-guest/pcs"
)

// Collateral is what Intel says about a kind of platform: the answers of its
// Provisioning Certification Service, version 4. Each is signed by Intel, so
// whoever carries it need not be trusted, only asked again before it expires.
type Collateral struct {
	TCBInfo         string `json:"tcb_info"`          // JSON, signed
	TCBInfoChain    string `json:"tcb_info_chain"`    // PEM: signing certificate, root
	QEIdentity      string `json:"qe_identity"`       // JSON, signed
	QEIdentityChain string `json:"qe_identity_chain"` // PEM
	PCKCRL          []byte `json:"pck_crl"`           // DER, signed by the platform CA
	RootCRL         []byte `json:"root_crl"`          // DER, signed by the root
}

// Source finds the collateral for the platforms with an FMSPC (6 bytes,
// lower-case hexadecimal) under a PCK certification authority ("platform").
type Source interface {
	Collateral(ctx context.Context, fmspc, ca string) (*Collateral, error)
}

// Collateral implements Source: collateral that was carried along is used for
// whatever platform is asked for. That it is the right one is checked.
func (c *Collateral) Collateral(context.Context, string, string) (*Collateral, error) { return c, nil }

const maxCollateral = 1 << 20 // bytes of one answer

// PCS fetches collateral from Intel's service.
type PCS struct {
	Base string       // "" is Intel's
	HTTP *http.Client // nil is http.DefaultClient, with a time limit
}

// rootCRLURL is where Intel's root publishes its revocations; it is in the root
// certificate's CRL distribution point.
const (
	pcsURL     = "https://api.trustedservices.intel.com"
	rootCRLURL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
)

// Collateral implements Source.
func (p *PCS) Collateral(ctx context.Context, fmspc, ca string) (*Collateral, error) {
	base, root := p.Base, rootCRLURL
	if base == "" {
		base = pcsURL
	} else {
		root = base + "/IntelSGXRootCA.der"
	}
	var c Collateral
	for _, part := range []struct {
		url, header string
		body        func([]byte)
		chain       *string
	}{
		{base + "/tdx/certification/v4/tcb?fmspc=" + url.QueryEscape(fmspc), "TCB-Info-Issuer-Chain", func(b []byte) { c.TCBInfo = string(b) }, &c.TCBInfoChain},
		{base + "/tdx/certification/v4/qe/identity", "SGX-Enclave-Identity-Issuer-Chain", func(b []byte) { c.QEIdentity = string(b) }, &c.QEIdentityChain},
		{base + "/sgx/certification/v4/pckcrl?encoding=der&ca=" + url.QueryEscape(ca), "", func(b []byte) { c.PCKCRL = b }, nil},
		{root, "", func(b []byte) { c.RootCRL = b }, nil},
	} {
		header, body, err := p.get(ctx, part.url)
		if err != nil {
			return nil, fmt.Errorf("fetch Intel's collateral: %w", err)
		}
		part.body(body)
		if part.chain != nil {
			if *part.chain, err = url.QueryUnescape(header.Get(part.header)); err != nil {
				return nil, fmt.Errorf("fetch Intel's collateral: %s: the header %s is not URL-encoded", part.url, part.header)
			}
		}
	}
	return &c, nil
}

func (p *PCS) get(ctx context.Context, where string) (http.Header, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, where, nil)
	if err != nil {
		return nil, nil, err
	}
	client := p.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s answered %d", where, answer.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxCollateral+1))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", where, err)
	}
	if len(body) > maxCollateral {
		return nil, nil, fmt.Errorf("%s: more than %d bytes", where, maxCollateral)
	}
	return answer.Header, body, nil
}

// Cache keeps collateral in a folder and asks for it again when it is a day old.
// When it cannot be had again, what is there is used until Intel's own date.
type Cache struct {
	Dir  string
	From Source
}

// refresh is how old collateral in a cache may grow while new is to be had.
const refresh = 24 * time.Hour

var fileRE = regexp.MustCompile(`^[0-9a-f]{12}-(platform|processor)$`)

// Collateral implements Source.
func (k *Cache) Collateral(ctx context.Context, fmspc, ca string) (*Collateral, error) {
	name := fmspc + "-" + ca
	if !fileRE.MatchString(name) {
		return nil, fmt.Errorf("%.40q names no platform", name)
	}
	path := filepath.Join(k.Dir, name+".json")
	old, made := readCollateral(path)
	if old != nil && time.Since(made) < refresh && time.Since(made) > -refresh {
		return old, nil
	}
	fresh, err := k.From.Collateral(ctx, fmspc, ca)
	if err != nil {
		if old != nil {
			return old, nil // whether it is still valid is checked where it is used
		}
		return nil, err
	}
	// A cache that cannot be written costs time, not trust.
	if data, err := json.Marshal(fresh); err == nil && os.MkdirAll(k.Dir, 0o755) == nil {
		_ = replaceFile(path, data)
	}
	return fresh, nil
}

func readCollateral(path string) (*Collateral, time.Time) {
	f, err := os.Open(path)
	if err != nil {
		return nil, time.Time{}
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() > 8*maxCollateral {
		return nil, time.Time{}
	}
	var c Collateral
	if json.NewDecoder(f).Decode(&c) != nil {
		return nil, time.Time{}
	}
	return &c, info.ModTime()
}

// platform is what collateral is asked about.
type platform struct {
	chain []*x509.Certificate // PCK, platform CA, root
	pck   *pcs.PckExtensions
	td    *td
	qe    qeReport
}

// level is one component's TCB level, as Intel judges it.
type level struct {
	component  string
	status     string
	advisories []string
}

// judge checks the collateral's signatures and validity and returns how Intel
// judges the parts of the platform (Intel TDX DCAP Quoting Library API, "TCB
// status evaluation"). An error is a reason to refuse; an *expiredError is one to
// fetch again.
func (c *Collateral) judge(p *platform, roots []*x509.Certificate, minEvaluation int, now time.Time) ([]level, error) {
	rootCRL, err := parseCRL("root's", c.RootCRL, p.chain[2], now)
	if err != nil {
		return nil, err
	}
	pckCRL, err := parseCRL("platform CA's", c.PCKCRL, p.chain[1], now)
	if err != nil {
		return nil, err
	}
	if revoked(rootCRL, p.chain[1]) {
		return nil, errors.New("the platform CA's certificate is revoked")
	}
	if revoked(pckCRL, p.chain[0]) {
		return nil, errors.New("the platform's certificate is revoked")
	}
	var info pcs.TcbInfo
	if err := signed("TCB info", "tcbInfo", c.TCBInfo, c.TCBInfoChain, rootCRL, roots, now, &info); err != nil {
		return nil, err
	}
	var identity pcs.EnclaveIdentity
	if err := signed("QE identity", "enclaveIdentity", c.QEIdentity, c.QEIdentityChain, rootCRL, roots, now, &identity); err != nil {
		return nil, err
	}
	if info.ID != "TDX" || info.Version != 3 {
		return nil, fmt.Errorf("TCB info: of %.20q, version %d; expected TDX, version 3", info.ID, info.Version)
	}
	if identity.ID != "TD_QE" || identity.Version != 2 {
		return nil, fmt.Errorf("QE identity: of %.20q, version %d; expected TD_QE, version 2", identity.ID, identity.Version)
	}
	for what, dates := range map[string][2]time.Time{"TCB info": {info.IssueDate, info.NextUpdate}, "QE identity": {identity.IssueDate, identity.NextUpdate}} {
		if err := current("the "+what+" of Intel's", dates[0], dates[1], now); err != nil {
			return nil, err
		}
	}
	if info.TcbEvaluationDataNumber < minEvaluation || identity.TcbEvaluationDataNumber < minEvaluation {
		return nil, fmt.Errorf("the TCB evaluation %d of Intel's is older than the policy's minimum, %d",
			min(info.TcbEvaluationDataNumber, identity.TcbEvaluationDataNumber), minEvaluation)
	}
	if !strings.EqualFold(info.Fmspc, p.pck.FMSPC) || !strings.EqualFold(info.PceID, p.pck.PCEID) {
		return nil, fmt.Errorf("TCB info: of FMSPC %.20s and PCE %.20s, the platform's are %s and %s", info.Fmspc, info.PceID, p.pck.FMSPC, p.pck.PCEID)
	}
	platformLevel, err := platformTCB(&info, p)
	if err != nil {
		return nil, err
	}
	module, err := moduleTCB(&info, p.td)
	if err != nil {
		return nil, err
	}
	qe, err := qeTCB(&identity, p.qe)
	if err != nil {
		return nil, err
	}
	levels := []level{platformLevel, qe}
	if module != nil {
		levels = append(levels, *module)
	}
	return levels, nil
}

// An expiredError is about collateral that was right once.
type expiredError struct{ text string }

func (e *expiredError) Error() string { return e.text }

func current(what string, from, until, now time.Time) error {
	if until.IsZero() || !now.Before(until) {
		return &expiredError{fmt.Sprintf("%s expired on %s", what, until.UTC().Format(time.DateOnly))}
	}
	if now.Before(from) {
		return fmt.Errorf("%s is valid from %s on; check this machine's clock", what, from.UTC().Format(time.DateTime))
	}
	return nil
}

func parseCRL(whose string, der []byte, issuer *x509.Certificate, now time.Time) (*x509.RevocationList, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("the %s revocation list is malformed", whose)
	}
	if !bytes.Equal(crl.RawIssuer, issuer.RawSubject) {
		return nil, fmt.Errorf("the %s revocation list is of another issuer", whose)
	}
	if err := crl.CheckSignatureFrom(issuer); err != nil {
		return nil, fmt.Errorf("the %s revocation list: %w", whose, err)
	}
	return crl, current("the "+whose+" revocation list", crl.ThisUpdate, crl.NextUpdate, now)
}

func revoked(crl *x509.RevocationList, cert *x509.Certificate) bool {
	for _, entry := range crl.RevokedCertificateEntries {
		if entry.SerialNumber.Cmp(cert.SerialNumber) == 0 {
			return true
		}
	}
	return false
}

// signed reads {"KEY":BODY,"signature":"HEX"} into out, having checked that
// Intel's TCB signing key signed BODY's very bytes.
//
// go-tdx-guest, which has this too, reads the document as a whole after checking
// the signature of the field KEY. encoding/json takes names in any case, so
// {"tcbInfo":SIGNED,"TcbInfo":FORGED} would be judged by what nobody signed.
func signed(what, key, document, chain string, rootCRL *x509.RevocationList, roots []*x509.Certificate, now time.Time, out any) error {
	var parts map[string]json.RawMessage
	if err := json.Unmarshal([]byte(document), &parts); err != nil {
		return fmt.Errorf("%s: not JSON", what)
	}
	var text string
	if json.Unmarshal(parts["signature"], &text) != nil {
		return fmt.Errorf("%s: it has no signature", what)
	}
	signature, err := hex.DecodeString(text)
	if err != nil || len(signature) != 64 {
		return fmt.Errorf("%s: the signature is not 64 bytes in hexadecimal", what)
	}
	certs, err := certificates([]byte(chain))
	if err != nil || len(certs) < 1 {
		return fmt.Errorf("%s: its certificate chain is missing or malformed", what)
	}
	signer := certs[0]
	if signer.Subject.CommonName != "Intel SGX TCB Signing" {
		return fmt.Errorf("%s: signed by %.60q, expected \"Intel SGX TCB Signing\"", what, signer.Subject.CommonName)
	}
	if _, err := signer.Verify(x509.VerifyOptions{Roots: pool(roots), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("%s: its signing certificate: %w", what, err)
	}
	if revoked(rootCRL, signer) {
		return fmt.Errorf("%s: its signing certificate is revoked", what)
	}
	pub, ok := signer.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return fmt.Errorf("%s: its signing key is not of the curve P-256", what)
	}
	sum := sha256.Sum256(parts[key])
	if !ecdsa.Verify(pub, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])) {
		return fmt.Errorf("%s: the signature is wrong", what)
	}
	if err := json.Unmarshal(parts[key], out); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// platformTCB finds the first, that is highest, level that the platform reaches.
func platformTCB(info *pcs.TcbInfo, p *platform) (level, error) {
	svn := p.td.teeTCBSVN
	from := 0
	if svn[1] > 0 {
		from = 2 // the first two are the module's, judged by its own identity
	}
	for _, l := range info.TcbLevels {
		if reaches(p.pck.TCB.CPUSvnComponents, l.Tcb.SgxTcbcomponents, 0) && p.pck.TCB.PCESvn >= l.Tcb.Pcesvn &&
			reaches(svn, l.Tcb.TdxTcbcomponents, from) {
			return level{"platform", string(l.TcbStatus), l.AdvisoryIDs}, nil
		}
	}
	return level{}, errors.New("the platform reaches no TCB level that Intel lists")
}

func reaches(have []byte, want []pcs.TcbComponent, from int) bool {
	if len(have) != 16 || len(want) != 16 {
		return false
	}
	for i := from; i < 16; i++ {
		if have[i] < want[i].Svn {
			return false
		}
	}
	return true
}

// moduleTCB checks that the TDX module is Intel's and finds its level. Modules of
// major version 0 have none of their own.
//
// go-tdx-guest judges a platform with a newer module by the module's level alone:
// an outdated microcode below an up-to-date module passes there.
func moduleTCB(info *pcs.TcbInfo, t *td) (*level, error) {
	signer, attributes, mask := info.TdxModule.Mrsigner.Bytes, info.TdxModule.Attributes.Bytes, info.TdxModule.AttributesMask.Bytes
	var levels []pcs.TcbLevel
	major, minor := t.teeTCBSVN[1], t.teeTCBSVN[0]
	if major > 0 {
		found := false
		for _, m := range info.TdxModuleIdentities {
			if strings.EqualFold(m.ID, fmt.Sprintf("TDX_%02x", major)) {
				signer, attributes, mask, levels, found = m.Mrsigner.Bytes, m.Attributes.Bytes, m.AttributesMask.Bytes, m.TcbLevels, true
				break
			}
		}
		if !found {
			return nil, fmt.Errorf("there is no TDX module of version %d in Intel's list", major)
		}
	}
	if !bytes.Equal(signer, t.mrSignerSEAM) {
		return nil, fmt.Errorf("the TDX module is signed by %x, Intel's is by %x", t.mrSignerSEAM, signer)
	}
	if !masked(t.seamAttributes, mask, attributes) {
		return nil, fmt.Errorf("the TDX module's attributes are %x, Intel's has %x", t.seamAttributes, attributes)
	}
	if major == 0 {
		return nil, nil
	}
	for _, l := range levels {
		if uint32(minor) >= l.Tcb.Isvsvn {
			return &level{"TDX module", string(l.TcbStatus), l.AdvisoryIDs}, nil
		}
	}
	return nil, errors.New("the TDX module reaches no TCB level that Intel lists")
}

func masked(value, mask, want []byte) bool {
	if len(value) != len(mask) || len(value) != len(want) || len(value) == 0 {
		return false
	}
	for i := range value {
		if value[i]&mask[i] != want[i] {
			return false
		}
	}
	return true
}

// qeReport is what is judged of the quoting enclave.
type qeReport struct {
	miscSelect uint32
	attributes []byte
	mrSigner   []byte
	prodID     uint32
	svn        uint32
}

// qeTCB checks that the quoting enclave is Intel's and finds its level.
func qeTCB(identity *pcs.EnclaveIdentity, qe qeReport) (level, error) {
	misc := []byte{byte(qe.miscSelect), byte(qe.miscSelect >> 8), byte(qe.miscSelect >> 16), byte(qe.miscSelect >> 24)}
	switch {
	case !masked(misc, identity.MiscselectMask.Bytes, identity.Miscselect.Bytes):
		return level{}, errors.New("the quoting enclave's MISCSELECT is not Intel's")
	case !masked(qe.attributes, identity.AttributesMask.Bytes, identity.Attributes.Bytes):
		return level{}, errors.New("the quoting enclave's attributes are not Intel's")
	case !bytes.Equal(qe.mrSigner, identity.Mrsigner.Bytes):
		return level{}, errors.New("the quoting enclave is not signed by Intel")
	case qe.prodID != uint32(identity.IsvProdID):
		return level{}, errors.New("the quoting enclave is another product of Intel's")
	}
	for _, l := range identity.TcbLevels {
		if qe.svn >= l.Tcb.Isvsvn {
			return level{"quoting enclave", string(l.TcbStatus), l.AdvisoryIDs}, nil
		}
	}
	return level{}, errors.New("the quoting enclave reaches no TCB level that Intel lists")
}
