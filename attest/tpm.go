package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/cryptutil"
	"github.com/canonical/go-tpm2/mu"

	"chrysalis/attest/evidence"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// unusedPCRs are those in which only what was added to the image shows: command
// lines, credentials, extensions, shim's and MOK's variables.
var unusedPCRs = []int{8, 12, 13, 14}

// verifyTPM makes the checks of a TPM's proof, from the quote to PCR 15.
func (r *run) verifyTPM(d *evidence.Document, in *Input) (events []cel.Event) {
	pcr := map[int][]byte{}
	for _, p := range d.TPM.PCRs {
		pcr[p.Index] = p.SHA256
	}
	var attested *tpm2.Attest
	var key crypto.PublicKey
	r.must(CheckQuote, func() outcome {
		var root *x509.Certificate
		var err error
		if key, root, err = attestationKey(d.TPM, in); err != nil {
			return fail("%s", plain(err))
		}
		if attested, err = verifyTPMQuote(d.TPM, key); err != nil {
			return fail("%s", plain(err))
		}
		return pass("a TPM's, under %q", root.Subject.CommonName)
	})
	r.must(CheckReportData, func() outcome {
		want := d.QualifyingData()
		o := same("the quote is about other keys, nonces or another manifest", attested.ExtraData, want[:])
		if o.status == Passed {
			if err := secondOpinion(d.TPM, key, want); err != nil {
				return fail("%s", plain(err))
			}
		}
		return o
	})
	if r.over {
		return nil
	}

	files := ofPlatform(in.Records, record.TPM)
	for i, name := range []Name{CheckPCR4, CheckPCR7, CheckPCR9, CheckPCR11} {
		index := record.ImagePCRs[i]
		r.check(name, "", func() outcome {
			if len(files) == 0 {
				return noRecord(name == CheckPCR4)
			}
			var fit []*record.File
			var values []record.Hex
			for _, f := range files {
				want := f.Image.PCRs[i].SHA256
				if values = append(values, want); bytes.Equal(want, pcr[index]) {
					fit = append(fit, f)
				}
			}
			if len(fit) == 0 {
				return outcome{Failed, "not in the records", one(values), hex.EncodeToString(pcr[index])}
			}
			files = fit
			return pass("")
		})
	}
	r.check(CheckPCR1, "", func() outcome { return r.checkPCR1(files, pcr[1], in.Policy) })
	if len(files) > 0 {
		r.verdict.Image = files[0].Image.Name
	}
	r.check(CheckUnused, "", func() outcome {
		for _, index := range unusedPCRs {
			if !zero(pcr[index]) {
				return outcome{Failed, fmt.Sprintf("PCR %d is not zero", index), strings.Repeat("0", 64), hex.EncodeToString(pcr[index])}
			}
		}
		return pass("")
	})
	r.check(CheckFirmwareLog, "", func() outcome {
		want := map[uint32][]byte{}
		for _, index := range evidence.QuotedPCRs {
			if index != 15 { // the agent's, in its own log
				want[uint32(index)] = pcr[index]
			}
		}
		return replayLog(d.TPM.Log, algSHA256, want, "PCR ", 0)
	})
	r.check(CheckPCR15, "", func() outcome {
		var o outcome
		events, o = replayCEL(d.CEL, cel.PCR15, pcr[15], nil)
		return o
	})
	return events
}

// checkPCR1 compares the machine with the shapes of the records that fit the image.
func (r *run) checkPCR1(files []*record.File, got []byte, p *Policy) outcome {
	if len(files) == 0 {
		return noRecord(false)
	}
	var values []record.Hex
	for _, f := range files {
		for i := range f.Shapes {
			s := &f.Shapes[i]
			if !p.allowsShape(s) {
				continue
			}
			if bytes.Equal(s.PCR1, got) {
				r.verdict.Shape = s.Name
				return pass("%s", s.Name)
			}
			values = append(values, s.PCR1)
		}
	}
	if len(p.Shapes) == 0 {
		return pass("not a recorded shape, and the policy names none")
	}
	return outcome{Failed, "not in the records of the policy's shapes", one(values), hex.EncodeToString(got)}
}

// attestationKey returns the key whose certificate ends at a root of the policy.
func attestationKey(t *evidence.TPM, in *Input) (crypto.PublicKey, *x509.Certificate, error) {
	var chain []*x509.Certificate
	for i, der := range t.Certificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d of the attestation key's chain is malformed", i)
		}
		chain = append(chain, cert)
	}
	leaf := chain[0]
	// A TPM's certificate names the TPM in its alternative name, which then is
	// critical (TCG EK Credential Profile 2.5, section 3.2.9).
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(leaf.UnhandledCriticalExtensions, func(id asn1.ObjectIdentifier) bool {
		return id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17})
	})
	roots := append(slices.Clone(in.Policy.tpmRoots), in.Policy.developmentRoots...)
	if len(roots) == 0 {
		return nil, nil, errors.New("the policy trusts no root of TPMs: neither tpm_roots nor development_roots")
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: pool(roots), Intermediates: pool(chain[1:]), CurrentTime: in.Time, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
			last := chain[len(chain)-1]
			return nil, nil, fmt.Errorf("the attestation key's certificate is of %q, which the policy does not trust", last.Issuer.CommonName)
		}
		return nil, nil, fmt.Errorf("the attestation key's certificate: %w", err)
	}
	var ak tpm2.Public
	if n, err := mu.UnmarshalFromBytes(t.AK, &ak); err != nil || n != len(t.AK) {
		return nil, nil, errors.New("the attestation key is not a TPMT_PUBLIC")
	}
	// Restricted keys sign nothing that says TPM_GENERATED but what their TPM says.
	// Whoever issued the certificate vouches for the key being one; that the key says
	// so of itself only finds a TPM that was set up wrongly.
	const must = tpm2.AttrFixedTPM | tpm2.AttrFixedParent | tpm2.AttrSensitiveDataOrigin | tpm2.AttrRestricted | tpm2.AttrSign
	if ak.Attrs&must != must || ak.Attrs&tpm2.AttrDecrypt != 0 {
		return nil, nil, errors.New("the attestation key is not a restricted signing key that cannot leave its TPM")
	}
	key := ak.Public()
	same := false
	switch k := key.(type) {
	case *rsa.PublicKey:
		same = k.Equal(leaf.PublicKey) && k.N.BitLen() >= 2048
	case *ecdsa.PublicKey:
		same = k.Equal(leaf.PublicKey) && k.Curve.Params().BitSize >= 256
	}
	if !same {
		return nil, nil, errors.New("the attestation key is not the one in its certificate")
	}
	return key, chains[0][len(chains[0])-1], nil
}

// verifyTPMQuote checks that the key signed a quote over exactly the PCRs given
// (TPM 2.0 Library, part 2, sections 10.12 and 11.3).
func verifyTPMQuote(t *evidence.TPM, key crypto.PublicKey) (*tpm2.Attest, error) {
	var signature tpm2.Signature
	if n, err := mu.UnmarshalFromBytes(t.Signature, &signature); err != nil || n != len(t.Signature) {
		return nil, errors.New("the signature is not a TPMT_SIGNATURE")
	}
	if signature.SigAlg != tpm2.SigSchemeAlgRSASSA && signature.SigAlg != tpm2.SigSchemeAlgRSAPSS && signature.SigAlg != tpm2.SigSchemeAlgECDSA {
		return nil, errors.New("the signature is of another scheme than RSASSA, RSAPSS and ECDSA")
	}
	alg := signature.HashAlg()
	if alg != tpm2.HashAlgorithmSHA256 && alg != tpm2.HashAlgorithmSHA384 && alg != tpm2.HashAlgorithmSHA512 {
		return nil, errors.New("the signature is over another hash than SHA-2")
	}
	h := alg.NewHash()
	h.Write(t.Quote)
	if ok, err := cryptutil.VerifySignature(key, h.Sum(nil), &signature); err != nil || !ok {
		return nil, errors.New("the quote's signature is wrong")
	}
	var a tpm2.Attest
	if n, err := mu.UnmarshalFromBytes(t.Quote, &a); err != nil || n != len(t.Quote) {
		return nil, errors.New("the quote is not a TPMS_ATTEST")
	}
	if a.Magic != tpm2.TPMGeneratedValue || a.Type != tpm2.TagAttestQuote || a.Attested == nil || a.Attested.Quote == nil {
		return nil, errors.New("what is signed is not a quote of a TPM")
	}
	q := a.Attested.Quote
	if len(q.PCRSelect) != 1 || q.PCRSelect[0].Hash != tpm2.HashAlgorithmSHA256 || !slices.Equal(sorted(q.PCRSelect[0].Select), evidence.QuotedPCRs) {
		return nil, fmt.Errorf("the quote covers other PCRs than %v of the SHA-256 bank", evidence.QuotedPCRs)
	}
	h = alg.NewHash()
	for _, p := range t.PCRs {
		h.Write(p.SHA256)
	}
	if !bytes.Equal(h.Sum(nil), q.PCRDigest) {
		return nil, errors.New("the PCRs are not those that were quoted")
	}
	return &a, nil
}

func sorted(s []int) []int {
	s = slices.Clone(s)
	slices.Sort(s)
	return s
}
