package vmtest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/mu"
	"golang.org/x/sys/unix"

	"chrysalis/attest"
	"chrysalis/attest/evidence"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher/softtpm"
	"chrysalis/measure"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// What a VM measured is read out of its memory and out of its TPM, so that
// nothing in the VM has to cooperate: one that refuses to serve is measured all
// the same. QEMU is started with -no-shutdown for it, so that a VM that powers off
// stays there, stopped.

// stopped reports whether the VM has powered off.
func (vm *diskVM) stopped() bool {
	var status struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	if err := json.Unmarshal(vm.execute("query-status", nil), &status); err != nil {
		vm.t.Fatal(err)
	}
	return status.Status == "shutdown"
}

// memory returns the first n bytes of a stopped VM's memory.
func (vm *diskVM) memory(n int64) []byte {
	vm.t.Helper()
	vm.execute("stop", nil)
	vm.execute("pmemsave", map[string]any{"val": 0, "size": n, "filename": "/vm/io/memory"})
	data, err := os.ReadFile(filepath.Join(vm.dir, "memory"))
	if err != nil {
		vm.t.Fatal(err)
	}
	os.Remove(filepath.Join(vm.dir, "memory"))
	return data
}

// evidence ends QEMU and makes the evidence that a host could show of the VM,
// whatever it has booted, but for the log: signed by its TPM, over what is in it.
func (vm *diskVM) evidence(manifest []byte, events []cel.Event) *evidence.Document {
	vm.t.Helper()
	fatal := func(err error) {
		if err != nil {
			vm.t.Helper()
			vm.t.Fatal("the VM's TPM: ", err)
		}
	}
	// Killed, QEMU has no time to end the TPM as well.
	fatal(vm.qemu.Cancel())
	<-vm.ended
	ctrl, err := net.Dial("unix", filepath.Join(vm.dir, "tpm.sock"))
	fatal(err)
	defer ctrl.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	fatal(err)
	const cmdSetDataFD = 0x10 // swtpm's tpm_ioctl.h
	_, _, err = ctrl.(*net.UnixConn).WriteMsgUnix(binary.BigEndian.AppendUint32(nil, cmdSetDataFD), unix.UnixRights(pair[0]), nil)
	fatal(err)
	unix.Close(pair[0])
	answer := make([]byte, 4)
	if _, err := io.ReadFull(ctrl, answer); err != nil || !bytes.Equal(answer, make([]byte, 4)) {
		vm.t.Fatalf("swtpm: %v %x", err, answer)
	}
	file := os.NewFile(uintptr(pair[1]), "tpm")
	conn, err := net.FileConn(file)
	fatal(err)
	file.Close()
	tpm, err := tpm2.OpenTPMDevice(softtpm.Device{Conn: conn})
	fatal(err)
	defer tpm.Close()

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fatal(err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	fatal(err)
	encoded, err := cel.Encode(cel.PCR15, events)
	fatal(err)
	d := &evidence.Document{
		Version: evidence.Version, TLSKey: spki, ReceiptKey: make([]byte, 32), Manifest: manifest, CEL: encoded,
		Nonces: []evidence.Bytes{bytes.Repeat([]byte{1}, evidence.NonceSize)},
	}
	ak, err := tpm.NewResourceContext(akHandle)
	fatal(err)
	public, _, _, err := tpm.ReadPublic(ak)
	fatal(err)
	index, err := tpm.NewResourceContext(certificateHandle)
	fatal(err)
	area, _, err := tpm.NVReadPublic(index)
	fatal(err)
	certificate, err := tpm.NVRead(tpm.OwnerHandleContext(), index, area.Size, 0, nil)
	fatal(err)
	d.TPM = &evidence.TPM{Certificates: []evidence.Bytes{certificate}}
	d.TPM.AK, err = mu.MarshalToBytes(public)
	fatal(err)
	selection := tpm2.PCRSelectionList{{Hash: tpm2.HashAlgorithmSHA256, Select: evidence.QuotedPCRs}}
	_, values, err := tpm.PCRRead(selection)
	fatal(err)
	for _, i := range evidence.QuotedPCRs {
		d.TPM.PCRs = append(d.TPM.PCRs, evidence.PCR{Index: i, SHA256: evidence.Bytes(values[tpm2.HashAlgorithmSHA256][i])})
	}
	data := d.QualifyingData()
	attested, signature, err := tpm.Quote(ak, data[:], nil, selection, nil)
	fatal(err)
	d.TPM.Quote, err = mu.MarshalToBytes(attested)
	fatal(err)
	d.TPM.Signature, err = mu.MarshalToBytes(signature)
	fatal(err)
	return d
}

// Where a TPM has its attestation key and that key's certificate.
const (
	akHandle          = 0x81000003
	certificateHandle = 0x01C101D0
)

// judge is what a client says of evidence that it asked for: one whose policy
// trusts a root of TPMs, and names a shape.
func judge(t *testing.T, d *evidence.Document, root *x509.Certificate, shape string, f *record.File, change ...func(*attest.Policy)) *attest.Verdict {
	t.Helper()
	document, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	policy := &attest.Policy{
		Version: attest.PolicyVersion, AllowNotConfidential: true, Shapes: []string{shape},
		DevelopmentRoots: []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))},
	}
	for _, c := range change {
		c(policy)
	}
	if err := policy.Check(); err != nil {
		t.Fatal(err)
	}
	return attest.Verify(t.Context(), document, attest.Input{Policy: policy, Records: []*record.File{f}, Nonce: d.Nonces[0], TLSKey: d.TLSKey})
}

// firmwareLog is a copy of a firmware's event log.
type firmwareLog struct {
	*measure.Log
	data []byte
}

// firmwareLogs finds the firmware's event log in a VM's memory, in each of its
// copies. One of them has all: others were made before the last events, or lie in
// memory that is used for something else by now, and then only their beginning may
// be left, and lengths after it that are none.
func firmwareLogs(memory []byte) (logs []firmwareLog) {
	// A TCG_PCR_EVENT of PCR 0, EV_NO_ACTION, with a digest of zeros, before the
	// specification's signature.
	header := append(make([]byte, 4), 3, 0, 0, 0)
	header = append(header, make([]byte, 20)...)
	for at := 0; ; {
		i := bytes.Index(memory[at:], []byte("Spec ID Event03\x00"))
		if i < 0 {
			return logs
		}
		from := at + i - 32
		at += i + 16
		if from < 0 || !bytes.Equal(memory[from:from+28], header) {
			continue
		}
		data := wellFormed(memory[from:])
		if log, err := measure.ParseLog("log", data); err == nil {
			logs = append(logs, firmwareLog{log, data})
		}
	}
}

// wellFormed cuts a log where its next record would not be one.
func wellFormed(data []byte) []byte {
	data = data[:min(len(data), measure.MaxLog)]
	u32 := func(at int) int {
		if at > len(data)-4 {
			return len(data)
		}
		return int(binary.LittleEndian.Uint32(data[at:]))
	}
	end, next := 0, 32+u32(28)
	for next <= len(data) {
		end = next
		pcr, count := u32(end), u32(end+8)
		if pcr > 23 || count < 1 || count > 5 {
			break
		}
		next += 12
		for range count {
			size, ok := map[int]int{4: 20, 11: 32, 12: 48, 13: 64}[u32(next)&0xffff]
			if !ok {
				return data[:end]
			}
			next += 2 + size
		}
		next += 4 + u32(next)
	}
	return data[:end]
}

func disks(paths ...string) (binds []toolsroot.Bind) {
	for i, path := range paths {
		binds = append(binds, toolsroot.Bind{Host: path, Inside: fmt.Sprintf("/vm/disk%d", i)})
	}
	return binds
}
