package attest

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tdx-guest/abi"
	"github.com/google/go-tdx-guest/pcs"
	pb "github.com/google/go-tdx-guest/proto/tdx"
	"github.com/google/go-tdx-guest/verify"

	"chrysalis/attest/evidence"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// td is what a quote says of a TD (Intel TDX DCAP Quoting Library API, A.3.2).
type td struct {
	version        uint16
	teeTCBSVN      []byte // 16
	mrSEAM         []byte // 48
	mrSignerSEAM   []byte // 48
	seamAttributes []byte // 8
	attributes     []byte // 8, little endian
	xfam           []byte // 8, little endian
	mrtd           []byte // 48
	mrConfigID     []byte // 48
	mrOwner        []byte // 48
	mrOwnerConfig  []byte // 48
	rtmr           [][]byte
	reportData     []byte // 64
	mrServiceTD    []byte // 48; nil in quotes of TDX 1.0's layout
}

// septVEDisable is the only attribute that a TD must have, and may have: without
// it the host can make private memory fault into the guest's handler at will.
const septVEDisable = 1 << 28

// The sizes of a quote's parts, in bytes.
const (
	quoteHeader   = 48
	quoteBodyV4   = 584
	bodyTypeTDX10 = 2
	bodyTypeTDX15 = 3
	quoteBodyV15  = 648
	ecdsaData     = 64 + 64      // signature, attestation key
	certHeader    = 2 + 4        // type, size
	qeReportData  = 384 + 64 + 2 // report, signature, size of the authentication data
)

// checkQuoteSize walks a quote's variable-sized parts. go-tdx-guest slices by the
// sizes that a quote states before it compares them with what is there, and
// panics.
func checkQuoteSize(q []byte) error {
	if len(q) < quoteHeader {
		return fmt.Errorf("%d bytes are too few", len(q))
	}
	body := 0
	switch version := binary.LittleEndian.Uint16(q); version {
	case 4:
		body = quoteHeader + quoteBodyV4
	case 5:
		if len(q) < quoteHeader+6 {
			return errors.New("it ends in its header")
		}
		kind, size := binary.LittleEndian.Uint16(q[quoteHeader:]), binary.LittleEndian.Uint32(q[quoteHeader+2:])
		switch {
		case kind == bodyTypeTDX10 && size == quoteBodyV4, kind == bodyTypeTDX15 && size == quoteBodyV15:
			body = quoteHeader + 6 + int(size)
		default:
			return fmt.Errorf("a body of type %d with %d bytes", kind, size)
		}
	default:
		return fmt.Errorf("version %d, expected 4 or 5", version)
	}
	rest := q[min(body, len(q)):]
	take := func(n uint32) ([]byte, error) {
		if uint64(n) > uint64(len(rest)) {
			return nil, fmt.Errorf("a part of %d bytes, and %d are left", n, len(rest))
		}
		part := rest[:n]
		rest = rest[n:]
		return part, nil
	}
	size, err := take(4)
	if err != nil {
		return err
	}
	data, err := take(binary.LittleEndian.Uint32(size))
	if err != nil {
		return err
	}
	// Firmware may hand out its whole buffer; nothing signs what follows the quote.
	if len(bytes.Trim(rest, "\x00")) > 0 {
		return fmt.Errorf("%d bytes follow it", len(rest))
	}
	if rest = data; len(rest) < ecdsaData {
		return errors.New("its signature is cut short")
	}
	rest = rest[ecdsaData:]
	cert := func(kind uint16) error {
		header, err := take(certHeader)
		if err != nil {
			return err
		}
		if got := binary.LittleEndian.Uint16(header); got != kind {
			return fmt.Errorf("certification data of type %d, expected %d", got, kind)
		}
		if n := binary.LittleEndian.Uint32(header[2:]); uint64(n) != uint64(len(rest)) {
			return fmt.Errorf("certification data of %d bytes, and %d are left", n, len(rest))
		}
		return nil
	}
	if err := cert(6); err != nil {
		return err
	}
	report, err := take(qeReportData)
	if err != nil {
		return err
	}
	if _, err := take(uint32(binary.LittleEndian.Uint16(report[qeReportData-2:]))); err != nil {
		return err
	}
	return cert(5)
}

// parseQuote reads a quote that checkQuoteSize accepts.
func parseQuote(raw []byte) (quote any, t *td, p *platform, err error) {
	if err := checkQuoteSize(raw); err != nil {
		return nil, nil, nil, err
	}
	if quote, err = abi.QuoteToProto(raw); err != nil {
		return nil, nil, nil, err
	}
	var signed *pb.Ecdsa256BitQuoteV4AuthData
	switch q := quote.(type) {
	case *pb.QuoteV4:
		b := q.GetTdQuoteBody()
		signed = q.GetSignedData()
		t = &td{4, b.GetTeeTcbSvn(), b.GetMrSeam(), b.GetMrSignerSeam(), b.GetSeamAttributes(), b.GetTdAttributes(), b.GetXfam(),
			b.GetMrTd(), b.GetMrConfigId(), b.GetMrOwner(), b.GetMrOwnerConfig(), b.GetRtmrs(), b.GetReportData(), nil}
	case *pb.QuoteV5:
		b := q.GetTdQuoteBodyDescriptor().GetTdQuoteBodyV5()
		signed = q.GetSignedData()
		t = &td{5, b.GetTeeTcbSvn(), b.GetMrSeam(), b.GetMrSignerSeam(), b.GetSeamAttributes(), b.GetTdAttributes(), b.GetXfam(),
			b.GetMrTd(), b.GetMrConfigId(), b.GetMrOwner(), b.GetMrOwnerConfig(), b.GetRtmrs(), b.GetReportData(), b.GetMrServiceTd()}
	default:
		return nil, nil, nil, errors.New("neither version 4 nor version 5")
	}
	chain, err := verify.ExtractChainFromQuote(quote)
	if err != nil {
		return nil, nil, nil, err
	}
	extensions, err := pcs.PckCertificateExtensions(chain.PCKCertificate)
	if err != nil {
		return nil, nil, nil, err
	}
	qe := signed.GetCertificationData().GetQeReportCertificationData().GetQeReport()
	return quote, t, &platform{
		chain: []*x509.Certificate{chain.PCKCertificate, chain.IntermediateCertificate, chain.RootCertificate},
		pck:   extensions, td: t,
		qe: qeReport{qe.GetMiscSelect(), qe.GetAttributes(), qe.GetMrSigner(), qe.GetIsvProdId(), qe.GetIsvSvn()},
	}, nil
}

// verifyTDX makes the checks of a TD's proof, from the quote to RTMR2.
func (r *run) verifyTDX(ctx context.Context, d *evidence.Document, in *Input) (events []cel.Event, mrConfigID []byte) {
	var t *td
	var p *platform
	r.must(CheckQuote, func() outcome {
		quote, parsed, about, err := parseQuote(d.TDX.Quote)
		if err != nil {
			return fail("the quote is malformed: %s", plain(err))
		}
		now := in.Time
		if err := verify.TdxQuote(quote, &verify.Options{
			TrustedRoots: pool(in.Policy.tdxRoots),
			Now:          &verify.TimeSet{PckCertChain: now, TcbInfo: now, QeIdentity: now, PckCrl: now, RootCaCrl: now},
		}); err != nil {
			return fail("%s", plain(err))
		}
		for _, c := range about.chain {
			if now.Before(c.NotBefore) {
				return fail("the certificate of %q is not valid before %s", c.Subject.CommonName, c.NotBefore.UTC().Format(time.DateTime))
			}
		}
		t, p = parsed, about
		r.verdict.Confidential = about.chain[2].Equal(intelRoot)
		return pass("version %d, of a platform with FMSPC %s", t.version, p.pck.FMSPC)
	})
	r.must(CheckTCB, func() outcome { return checkTCB(ctx, p, in) })
	r.must(CheckAttributes, func() outcome {
		if got := binary.LittleEndian.Uint64(t.attributes); got != septVEDisable {
			var bits []string
			for bit, name := range map[uint64]string{1: "DEBUG", 1 << 29: "MIGRATABLE", 1 << 30: "PKS", 1 << 31: "KL", 1 << 63: "PERFMON"} {
				if got&bit != 0 {
					bits = append(bits, name)
				}
			}
			slices.Sort(bits)
			detail := "ATTRIBUTES are not exactly SEPT_VE_DISABLE"
			if len(bits) > 0 {
				detail += "; set: " + strings.Join(bits, ", ")
			}
			return outcome{Failed, detail, fmt.Sprintf("%016x", uint64(septVEDisable)), fmt.Sprintf("%016x", got)}
		}
		return pass("")
	})
	r.must(CheckXFAM, func() outcome {
		got, allowed := binary.LittleEndian.Uint64(t.xfam), in.Policy.xfam
		if got&^allowed != 0 || got&xfamRequired != xfamRequired {
			return outcome{Failed, "XFAM has features that the policy does not allow, or lacks x87 or SSE", fmt.Sprintf("within %016x", allowed), fmt.Sprintf("%016x", got)}
		}
		return pass("%016x", got)
	})
	r.must(CheckModule, func() outcome {
		if !zero(t.mrSignerSEAM) {
			return outcome{Failed, "MRSIGNERSEAM is not Intel's", strings.Repeat("0", 96), hex.EncodeToString(t.mrSignerSEAM)}
		}
		if !zero(t.seamAttributes) {
			return outcome{Failed, "SEAMATTRIBUTES is not zero: a debug module", strings.Repeat("0", 16), hex.EncodeToString(t.seamAttributes)}
		}
		list := in.Policy.MRSEAM
		if len(list) > 0 && !slices.ContainsFunc(list, func(m record.Hex) bool { return bytes.Equal(m, t.mrSEAM) }) {
			return outcome{Failed, "MRSEAM is not in the policy", one(list), hex.EncodeToString(t.mrSEAM)}
		}
		return pass("version %d.%d, MRSEAM %x…", t.teeTCBSVN[1], t.teeTCBSVN[0], t.mrSEAM[:8])
	})
	r.must(CheckOwner, func() outcome {
		for _, r := range []struct {
			name  string
			value []byte
		}{{"MRSERVICETD", t.mrServiceTD}, {"MROWNER", t.mrOwner}, {"MROWNERCONFIG", t.mrOwnerConfig}} {
			if !zero(r.value) {
				return outcome{Failed, r.name + " is not zero", strings.Repeat("0", 96), hex.EncodeToString(r.value)}
			}
		}
		if t.mrServiceTD == nil {
			return pass("this layout of quote has no MRSERVICETD; a TD that is not migratable gives a service TD nothing")
		}
		return pass("")
	})
	r.must(CheckReportData, func() outcome {
		want := d.ReportData()
		return same("the quote is about other keys, nonces or another manifest", t.reportData, want[:])
	})
	if r.over {
		return nil, nil
	}

	// From here on the values are proven: every difference is worth seeing.
	files := ofPlatform(in.Records, record.TDX)
	narrow := func(name Name, got []byte, value func(*record.File) [][]byte) {
		r.check(name, "", func() outcome {
			if len(files) == 0 {
				return noRecord(name == CheckMRTD)
			}
			var fit []*record.File
			var values []record.Hex
			for _, f := range files {
				for _, want := range value(f) {
					values = append(values, want)
					if bytes.Equal(want, got) {
						fit = append(fit, f)
						break
					}
				}
			}
			if len(fit) == 0 {
				return outcome{Failed, "not in the records", one(values), hex.EncodeToString(got)}
			}
			files = fit
			return pass("")
		})
	}
	narrow(CheckMRTD, t.mrtd, func(f *record.File) [][]byte { return [][]byte{f.Image.MRTD} })
	narrow(CheckRTMR0, t.rtmr[0], func(f *record.File) (out [][]byte) {
		for i := range f.Shapes {
			if in.Policy.allowsShape(&f.Shapes[i]) {
				out = append(out, f.Shapes[i].RTMR0)
			}
		}
		return out
	})
	narrow(CheckRTMR1, t.rtmr[1], func(f *record.File) [][]byte { return [][]byte{f.Image.RTMR1} })
	narrow(CheckRTMR2, t.rtmr[2], func(f *record.File) [][]byte { return [][]byte{f.Image.RTMR2} })
	if len(files) > 0 {
		r.verdict.Image = files[0].Image.Name
		for i := range files[0].Shapes {
			if s := &files[0].Shapes[i]; bytes.Equal(s.RTMR0, t.rtmr[0]) && in.Policy.allowsShape(s) {
				r.verdict.Shape = s.Name
			}
		}
	}
	r.check(CheckFirmwareLog, "", func() outcome {
		return replayLog(d.TDX.CCEL, algSHA384, map[uint32][]byte{1: t.rtmr[0], 2: t.rtmr[1], 3: t.rtmr[2]}, "RTMR", 1)
	})
	r.check(CheckRTMR3, "", func() outcome {
		var o outcome
		events, o = replayCEL(d.CEL, cel.RTMR3, nil, t.rtmr[3])
		return o
	})
	return events, t.mrConfigID
}

// checkTCB judges the platform by Intel's collateral and the policy's waivers.
func checkTCB(ctx context.Context, p *platform, in *Input) outcome {
	if in.Collateral == nil {
		return unchecked("there is no collateral of Intel's to judge the platform by")
	}
	ca := "platform"
	if p.chain[0].Issuer.CommonName == "Intel SGX PCK Processor CA" {
		ca = "processor"
	}
	c, err := in.Collateral.Collateral(ctx, p.pck.FMSPC, ca)
	if err != nil {
		return unchecked("%s", plain(err))
	}
	in.used = c
	levels, err := c.judge(p, in.Policy.tdxRoots, in.Policy.MinTCBEvaluation, in.Time)
	if err != nil {
		if _, ok := errors.AsType[*expiredError](err); ok {
			return unchecked("%s; fetch it again", plain(err))
		}
		return fail("%s", plain(err))
	}
	var said []string
	for _, l := range levels {
		if l.status == string(pcs.TcbComponentStatusUpToDate) {
			continue
		}
		text := fmt.Sprintf("%s %s", l.component, l.status)
		if len(l.advisories) > 0 {
			text += " (" + strings.Join(l.advisories, ", ") + ")"
		}
		var waiver *TCBWaiver
		for i := range in.Policy.TCBWaivers {
			if w := &in.Policy.TCBWaivers[i]; w.allows(l.status, l.advisories, in.Time) {
				waiver = w
			}
		}
		if waiver == nil {
			return outcome{Failed, text + "; the policy has no waiver for it", "UpToDate", l.status}
		}
		said = append(said, text+", waived until "+waiver.Until)
	}
	return pass("%s", strings.Join(said, "; "))
}

// noRecord fails the first check that needs a record.
func noRecord(first bool) outcome {
	if !first {
		return outcome{status: NotRun}
	}
	return fail("there is no measurement record of an image on this platform to compare with")
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// one shows a value, or that there are several.
func one(values []record.Hex) string {
	switch len(values) {
	case 0:
		return "none is recorded"
	case 1:
		return values[0].String()
	}
	return fmt.Sprintf("one of %d, like %s", len(values), values[0])
}

func ofPlatform(files []*record.File, platform record.Platform) (out []*record.File) {
	for _, f := range files {
		if f.Image.Platform == platform {
			out = append(out, f)
		}
	}
	return out
}
