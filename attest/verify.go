// Package attest checks, before anything is sent, that whoever answers is a
// published image with an approved engine and approved models in a confidential
// VM.
//
// # Who is not trusted
//
// The VM's host and its owner, the network and whatever relays on it, the disks,
// and everything that a server sends: it is bounded in size and time, parsed
// strictly, and refused unless every check passes. What is trusted is Intel's
// root, NVIDIA's where a VM has GPUs, the records and the policy that the caller gives, and this program's
// clock.
//
// # What is checked
//
// Evidence (package attest/evidence) is fetched over the very TLS connection that
// will carry the request, and must name that connection's key and a nonce made
// for it. The checks are made in a fixed order; see the constants. The first that
// fails names the reason for the refusal. Nothing is taken from the server's word:
// the host writes the manifest and picks the disks, so that they agree with each
// other proves nothing until a record or the policy approves them.
//
// # How to use it
//
//	client := &http.Client{Transport: &attest.Transport{
//		Policy:  attest.NewPolicy(),
//		Records: records,
//		Collateral: &attest.Cache{Dir: dir, From: &attest.PCS{}},
//		GPU:        &attest.GPUCollateral{Dir: gpuDir, Fetch: fetch.NVIDIA()},
//	}}
//
// A request of this client is sent to a verified VM or fails with a
// *RefusedError whose Verdict lists the checks.
package attest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// Input is what evidence is checked against.
type Input struct {
	Policy     *Policy        // parsed or made by NewPolicy
	Records    []*record.File // what is approved; nothing is when there are none
	Collateral Source         // for TDX; nil leaves the TCB unchecked, and so refused
	GPU        *GPUCollateral // for GPUs, besides what the VM carries
	Nonce      []byte         // evidence.NonceSize bytes, random, never used before
	TLSKey     []byte         // SubjectPublicKeyInfo (DER) of the connection's peer
	Time       time.Time      // zero is now

	carried carrier // what the VM carries for its GPUs; nil carries nothing
	used    *Collateral
	usedGPU *nvidia.Verifier
}

// Verify checks a document of evidence. It never returns nil; a verdict that is
// not OK says why, check by check.
func Verify(ctx context.Context, document []byte, in Input) *Verdict {
	return verifyAll(ctx, document, &in)
}

// verifyAll also says, in its input, which collateral was used.
func verifyAll(ctx context.Context, document []byte, in *Input) *Verdict {
	if in.Time.IsZero() {
		in.Time = time.Now()
	}
	v := &Verdict{At: in.Time.UTC().Truncate(time.Second)}
	r := &run{verdict: v}
	var d *evidence.Document
	r.must(CheckEvidence, func() outcome {
		parsed, err := evidence.Parse(document)
		if err != nil {
			return fail("%s", plain(err))
		}
		d = parsed
		return pass("%d bytes", len(document))
	})
	checks := checksTDX
	if d != nil {
		v.Platform = record.TDX
		if d.TPM != nil {
			v.Platform, checks = record.TPM, checksTPM
		}
	}
	r.must(CheckPlatform, func() outcome {
		if why := in.Policy.allowsPlatform(v.Platform); why != "" {
			return fail("%s", why)
		}
		return pass("%s", strings.ToUpper(string(v.Platform)))
	})
	r.must(CheckTLSKey, func() outcome {
		if !bytes.Equal(d.TLSKey, in.TLSKey) || len(in.TLSKey) == 0 {
			want, got := sha256.Sum256(in.TLSKey), sha256.Sum256(d.TLSKey)
			return outcome{Failed, "it is of another key: someone is in between, or it is another VM's", fmt.Sprintf("SHA-256 %x", want), fmt.Sprintf("SHA-256 %x", got)}
		}
		sum := sha256.Sum256(in.TLSKey)
		v.TLSKey, v.ReceiptKey = sum[:], record.Hex(d.ReceiptKey)
		return pass("SHA-256 %x", sum)
	})
	r.must(CheckNonce, func() outcome {
		if len(in.Nonce) != evidence.NonceSize || !d.Lists(in.Nonce) {
			return fail("this client's nonce is not among the %d that it answers: it was made earlier, or for others", len(d.Nonces))
		}
		return pass("one of %d", len(d.Nonces))
	})
	var events []cel.Event
	var mrConfigID []byte
	switch {
	case d == nil:
	case d.TDX != nil:
		events, mrConfigID = r.verifyTDX(ctx, d, in)
	default:
		events = r.verifyTPM(d, in)
	}
	if d != nil {
		r.verifyWorkload(ctx, d, events, mrConfigID, in)
	}
	return r.finish(checks)
}

// plain makes an error's text fit for one line of a verdict: the peer's words may
// be in it.
func plain(err error) string {
	text := strings.Map(func(c rune) rune {
		if c < 0x20 || c == 0x7f || c > 0x2000 && c < 0x2070 {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(err.Error(), "?"))
	if len(text) > 400 {
		text = strings.ToValidUTF8(text[:400], "") + "…"
	}
	return text
}
