package platform

import (
	"bytes"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/mu"
	"golang.org/x/sys/unix"

	"chrysalis/attest/evidence"
	"chrysalis/measure/cel"
)

// Where a TPM has its attestation key and the key's certificate, as on Azure.
const (
	akHandle          = 0x81000003
	certificateHandle = 0x01C101D0
)

const (
	tpmDevice  = "dev/tpm0"
	tpmVersion = "sys/class/tpm/tpm0/tpm_version_major"
	tpmLog     = "sys/kernel/security/tpm0/binary_bios_measurements"
)

// runtimePCR is where events go: TCG PC Client Platform Firmware Profile leaves
// it to the operating system.
const runtimePCR = 15

type tpm struct {
	tpm          *tpm2.TPMContext
	key          tpm2.ResourceContext
	public       []byte
	certificates []evidence.Bytes
	log          []byte
}

func openTPM(root string) (*tpm, error) {
	version, err := attribute(root, tpmVersion)
	if err != nil || strings.TrimSpace(string(version)) != "2" {
		return nil, errors.New("there is neither TDX nor a TPM 2.0")
	}
	log, err := readLog(filepath.Join(root, tpmLog))
	if err != nil {
		return nil, err
	}
	return newTPM(&device{path: filepath.Join(root, tpmDevice)}, log)
}

// newTPM reads what does not change for as long as the VM lives.
func newTPM(device tpm2.TPMDevice, log []byte) (t *tpm, err error) {
	t = &tpm{log: log}
	if t.tpm, err = tpm2.OpenTPMDevice(device); err != nil {
		return nil, fmt.Errorf("open %s: %w", device, err)
	}
	if t.key, err = t.tpm.NewResourceContext(akHandle); err != nil {
		return nil, fmt.Errorf("find the TPM's attestation key: %w", err)
	}
	public, _, _, err := t.tpm.ReadPublic(t.key)
	if err != nil {
		return nil, fmt.Errorf("read the TPM's attestation key: %w", err)
	}
	if t.public, err = mu.MarshalToBytes(public); err != nil {
		return nil, fmt.Errorf("read the TPM's attestation key: %w", err)
	}
	index, err := t.tpm.NewResourceContext(certificateHandle)
	if err != nil {
		return nil, fmt.Errorf("find the attestation key's certificate: %w", err)
	}
	area, _, err := t.tpm.NVReadPublic(index)
	if err != nil {
		return nil, fmt.Errorf("find the attestation key's certificate: %w", err)
	}
	data, err := t.tpm.NVRead(t.tpm.OwnerHandleContext(), index, area.Size, 0, nil)
	if err != nil {
		return nil, fmt.Errorf("read the attestation key's certificate: %w", err)
	}
	if t.certificates, err = splitCertificates(data); err != nil {
		return nil, fmt.Errorf("read the attestation key's certificate: %w", err)
	}
	return t, nil
}

// splitCertificates takes apart one DER certificate after the other. What an NV
// index is larger than its content is zeros or 0xff.
func splitCertificates(data []byte) (list []evidence.Bytes, err error) {
	for len(data) > 0 && data[0] != 0 && data[0] != 0xff {
		var outer asn1.RawValue
		rest, err := asn1.Unmarshal(data, &outer)
		if err != nil {
			return nil, err
		}
		if outer.Class != asn1.ClassUniversal || outer.Tag != asn1.TagSequence {
			return nil, errors.New("it is not DER")
		}
		list, data = append(list, outer.FullBytes), rest
	}
	if len(list) == 0 || len(list) > 8 {
		return nil, fmt.Errorf("there are %d certificates, expected 1 to 8", len(list))
	}
	return list, nil
}

func (t *tpm) Register() cel.Register { return cel.PCR15 }

// CheckManifest has nothing to compare with: a TPM does not say what the VM was
// started for.
func (t *tpm) CheckManifest([]byte) error { return nil }

func (t *tpm) Extend(e cel.Event) error {
	d256, d384 := e.SHA256(), e.SHA384()
	digests := tpm2.TaggedHashList{
		tpm2.MakeTaggedHash(tpm2.HashAlgorithmSHA256, d256[:]),
		tpm2.MakeTaggedHash(tpm2.HashAlgorithmSHA384, d384[:]),
	}
	if err := t.tpm.PCRExtend(t.tpm.PCRHandleContext(runtimePCR), digests, nil); err != nil {
		return fmt.Errorf("extend PCR %d: %w", runtimePCR, err)
	}
	return nil
}

func (t *tpm) Holds(events []cel.Event) error {
	want256, want384 := cel.Replay(events)
	for _, bank := range []struct {
		alg  tpm2.HashAlgorithmId
		want []byte
	}{{tpm2.HashAlgorithmSHA256, want256[:]}, {tpm2.HashAlgorithmSHA384, want384[:]}} {
		_, values, err := t.tpm.PCRRead(tpm2.PCRSelectionList{{Hash: bank.alg, Select: tpm2.PCRSelect{runtimePCR}}})
		if err != nil {
			return fmt.Errorf("read PCR %d of the %v bank: %w", runtimePCR, bank.alg, err)
		}
		if got := values[bank.alg][runtimePCR]; !bytes.Equal(got, bank.want) {
			return fmt.Errorf("PCR %d of the %v bank is %x, the events make it %x", runtimePCR, bank.alg, []byte(got), bank.want)
		}
	}
	return nil
}

// quoteTries is how often PCRs are read again because one of them changed before
// they were quoted. After the boot nothing extends them.
const quoteTries = 3

func (t *tpm) Prove(d *evidence.Document) error {
	data := d.QualifyingData()
	selection := tpm2.PCRSelectionList{{Hash: tpm2.HashAlgorithmSHA256, Select: evidence.QuotedPCRs}}
	for range quoteTries {
		_, values, err := t.tpm.PCRRead(selection)
		if err != nil {
			return fmt.Errorf("read PCRs: %w", err)
		}
		// No scheme: the key's own.
		attest, signature, err := t.tpm.Quote(t.key, data[:], nil, selection, nil)
		if err != nil {
			return fmt.Errorf("get a TPM quote: %w", err)
		}
		proof := &evidence.TPM{AK: t.public, Certificates: t.certificates, Log: t.log}
		alg := signature.HashAlg()
		if !alg.Available() {
			return fmt.Errorf("get a TPM quote: the key signs with %v", alg)
		}
		digest := alg.NewHash()
		for _, index := range evidence.QuotedPCRs {
			value := evidence.Bytes(values[tpm2.HashAlgorithmSHA256][index])
			digest.Write(value)
			proof.PCRs = append(proof.PCRs, evidence.PCR{Index: index, SHA256: value})
		}
		if attest.Attested == nil || attest.Attested.Quote == nil {
			return errors.New("get a TPM quote: the TPM attested something else")
		}
		if !bytes.Equal(attest.Attested.Quote.PCRDigest, digest.Sum(nil)) {
			continue
		}
		if proof.Quote, err = mu.MarshalToBytes(attest); err != nil {
			return fmt.Errorf("encode a TPM quote: %w", err)
		}
		if proof.Signature, err = mu.MarshalToBytes(signature); err != nil {
			return fmt.Errorf("encode a TPM quote: %w", err)
		}
		d.TPM = proof
		return nil
	}
	return errors.New("get a TPM quote: the PCRs keep changing")
}

// maxResponse bounds a TPM's response, in bytes: the kernel's TPM_BUFSIZE.
const maxResponse = 4096

// device is the kernel's TPM device as go-tpm2 wants it: a command may come in
// several pieces, where the device takes it whole, and a response may be read in
// several, where the device gives it whole. The kernel sends a command again when
// the TPM asks for that.
type device struct {
	path     string
	file     *os.File
	command  []byte
	response []byte
}

// Open implements tpm2.TPMDevice. It can be called once.
func (d *device) Open() (tpm2.Transport, error) {
	fd, err := unix.Open(d.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// A blocking file: os.Open would make it a non-blocking one, for which the
	// driver answers differently.
	d.file = os.NewFile(uintptr(fd), d.path)
	return d, nil
}

func (d *device) String() string { return d.path }

// headerSize is that of a command: tag, size and code (TPM 2.0 Library, Part 1,
// section 18.4).
const headerSize = 10

func (d *device) Write(p []byte) (int, error) {
	d.command = append(d.command, p...)
	if len(d.command) < headerSize || len(d.command) < int(binary.BigEndian.Uint32(d.command[2:])) {
		return len(p), nil
	}
	_, err := d.file.Write(d.command)
	d.command, d.response = d.command[:0], nil
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *device) Read(p []byte) (int, error) {
	if len(d.response) == 0 {
		buf := make([]byte, maxResponse)
		n, err := d.file.Read(buf)
		if err != nil {
			return 0, err
		}
		d.response = buf[:n]
	}
	n := copy(p, d.response)
	d.response = d.response[n:]
	return n, nil
}

func (d *device) Close() error { return d.file.Close() }
