package platform

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/cryptutil"
	"github.com/canonical/go-tpm2/mu"
	"github.com/canonical/go-tpm2/transportutil"

	"chrysalis/attest/evidence"
	"chrysalis/image/imagetest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher/softtpm"
	"chrysalis/measure/cel"
)

// swtpm runs the tools root's software TPM once and returns a connection to it.
func swtpm(t *testing.T, tools *toolsroot.Root, state string, flags string) net.Conn {
	t.Helper()
	socket := filepath.Join(state, "sock")
	ctx, cancel := context.WithCancel(t.Context())
	cmd := tools.Cmd(ctx, toolsroot.Command{
		Args: []string{"swtpm", "socket", "--tpm2", "--tpmstate", "dir=/vm", "--server", "type=unixio,path=/vm/sock",
			"--flags", flags, "--terminate"},
		Bind: []toolsroot.Bind{{Host: state, Inside: "/vm", Writable: true}}, Offline: true,
	})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return &waitConn{conn, done}
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// waitConn waits, when it is closed, until swtpm has ended.
type waitConn struct {
	net.Conn
	done chan struct{}
}

func (c *waitConn) Close() error {
	err := c.Conn.Close()
	<-c.done
	os.Remove(c.Conn.RemoteAddr().String())
	return err
}

// made starts a TPM that was made as the launcher makes it.
func made(t *testing.T) (tpm2.TPMDevice, *softtpm.CA) {
	t.Helper()
	tools := imagetest.Tools(t)
	ca, err := softtpm.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	if err := softtpm.Make(t.Context(), tools, state, ca); err != nil {
		t.Fatal(err)
	}
	return softtpm.Device{Conn: swtpm(t, tools, state, "not-need-init,startup-clear")}, ca
}

// A real software TPM, as the launcher provisions it.
func TestTPM(t *testing.T) {
	device, ca := made(t)
	p, err := newTPM(device, []byte("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.tpm.Close()
	if p.Register() != cel.PCR15 || p.CheckManifest([]byte("any")) != nil {
		t.Error("it is not PCR 15 or it knows of a manifest")
	}
	events := []cel.Event{cel.ManifestEvent([]byte("{}")), {Name: cel.Disk, Data: []byte("disk")}, cel.SeparatorEvent()}
	for i, e := range events {
		if err := p.Extend(e); err != nil {
			t.Fatal(err)
		}
		if err := p.Holds(events[:i+1]); err != nil {
			t.Error(err)
		}
		if err := p.Holds(events[:i]); err == nil {
			t.Errorf("PCR 15 after %d events passes for that after %d", i+1, i)
		}
	}

	d := evidence.Document{
		Version: evidence.Version, Nonces: []evidence.Bytes{bytes.Repeat([]byte{7}, 32)},
		TLSKey: []byte("key"), ReceiptKey: make([]byte, 32), Manifest: []byte("{}"), CEL: []byte("cel"),
	}
	if err := p.Prove(&d); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Encode(); err != nil {
		t.Error(err)
	}
	leaf, err := x509.ParseCertificate(d.TPM.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := leaf.CheckSignatureFrom(ca.Certificate); err != nil {
		t.Error(err)
	}
	var signature *tpm2.Signature
	if _, err := mu.UnmarshalFromBytes(d.TPM.Signature, &signature); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(d.TPM.Quote)
	if ok, err := cryptutil.VerifySignature(leaf.PublicKey.(crypto.PublicKey), digest[:], signature); !ok || err != nil {
		t.Errorf("the signature is not the certified key's: %v", err)
	}
	var attest *tpm2.Attest
	if _, err := mu.UnmarshalFromBytes(d.TPM.Quote, &attest); err != nil {
		t.Fatal(err)
	}
	if want := d.QualifyingData(); !bytes.Equal(attest.ExtraData, want[:]) {
		t.Errorf("the quote is over %x, expected %x", []byte(attest.ExtraData), want)
	}
	bank, _ := cel.Replay(events)
	if last := d.TPM.PCRs[len(d.TPM.PCRs)-1]; last.Index != 15 || !bytes.Equal(last.SHA256, bank[:]) {
		t.Errorf("PCR %d is %x", last.Index, last.SHA256)
	}
}

// meddler is a host that changes a PCR between when it is read and when it is
// quoted.
type meddler struct {
	tpm2.TPMDevice
	left int // how often it will
}

func (m *meddler) Open() (tpm2.Transport, error) {
	transport, err := m.TPMDevice.Open()
	if err != nil {
		return nil, err
	}
	commands := transportutil.BufferCommands(command(func(p []byte) (int, error) {
		if code := tpm2.CommandCode(binary.BigEndian.Uint32(p[6:])); code == tpm2.CommandQuote && m.left > 0 {
			m.left--
			// TPM2_PCR_Extend of PCR 14 by zeros, with an empty password: TPM 2.0 Library,
			// Part 3, section 22.2.
			extend := []byte{0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 14, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0b, 64: 0}
			if _, err := transport.Write(extend); err != nil {
				return 0, err
			}
			if reply, err := io.ReadAll(io.LimitReader(transport, 19)); err != nil || !bytes.Equal(reply[6:10], make([]byte, 4)) {
				return 0, fmt.Errorf("extend PCR 14: %x, %v", reply, err)
			}
		}
		return transport.Write(p)
	}), 4096)
	return &meddled{transport, commands}, nil
}

type meddled struct {
	tpm2.Transport
	commands transportutil.CommandBuffer
}

func (m *meddled) Write(p []byte) (int, error) { return m.commands.Write(p) }

// command is an io.Writer of whole commands.
type command func([]byte) (int, error)

func (c command) Write(p []byte) (int, error) { return c(p) }

func TestTPMReadsPCRsAgain(t *testing.T) {
	device, _ := made(t)
	m := &meddler{TPMDevice: device}
	p, err := newTPM(m, []byte("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.tpm.Close()
	m.left = quoteTries - 1
	if err := p.Prove(&evidence.Document{}); err != nil {
		t.Errorf("after %d changes: %v", quoteTries-1, err)
	}
	if m.left != 0 {
		t.Fatal("nothing was changed")
	}
	m.left = quoteTries
	if err := p.Prove(&evidence.Document{}); err == nil {
		t.Error("a quote of other PCRs passes")
	}
}

func TestTPMWithoutKey(t *testing.T) {
	tools := imagetest.Tools(t)
	device := softtpm.Device{Conn: swtpm(t, tools, t.TempDir(), "not-need-init,startup-clear")}
	defer device.Close()
	if _, err := newTPM(device, nil); err == nil || !strings.Contains(err.Error(), "attestation key") {
		t.Errorf("got %v", err)
	}
}

func TestOpenTPMRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
	}{
		{"nothing", nil},
		{"TPM 1.2", map[string]string{tpmVersion: "1\n", tpmLog: "log", tpmDevice: ""}},
		{"no log", map[string]string{tpmVersion: "2\n", tpmDevice: ""}},
		{"no device", map[string]string{tpmVersion: "2\n", tpmLog: "log"}},
		{"a device that answers nothing", map[string]string{tpmVersion: "2\n", tpmLog: "log", tpmDevice: ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for path, text := range c.files {
				path = filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if p, err := Open(root, false); err == nil {
				t.Errorf("got %T", p)
			}
		})
	}
}

func TestSplitCertificates(t *testing.T) {
	ca, err := softtpm.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	one := ca.Certificate.Raw
	for _, c := range []struct {
		name string
		data []byte
		want int // 0 is an error
	}{
		{"one", one, 1},
		{"a chain", append(bytes.Clone(one), one...), 2},
		{"zeros after it", append(bytes.Clone(one), 0, 0, 0), 1},
		{"0xff after it", append(bytes.Clone(one), 0xff, 0xff), 1},
		{"nothing", nil, 0},
		{"zeros", make([]byte, 100), 0},
		{"cut off", one[:len(one)-1], 0},
		{"text", []byte("certificate"), 0},
		{"too many", bytes.Repeat(one, 9), 0},
		{"text after it", append(bytes.Clone(one), "text"...), 0},
	} {
		list, err := splitCertificates(c.data)
		if len(list) != c.want || (err == nil) != (c.want > 0) {
			t.Errorf("%s: %d, %v", c.name, len(list), err)
		}
		for _, cert := range list {
			if !bytes.Equal(cert, one) {
				t.Errorf("%s: other bytes", c.name)
			}
		}
	}
}

// The kernel's device takes a command in one write and gives a response in one
// read.
func TestDevice(t *testing.T) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	d := &device{file: theirs}
	defer d.Close()
	command := []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0}
	for _, piece := range [][]byte{command[:1], command[1:10], command[10:]} {
		if n, err := d.Write(piece); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	buf := make([]byte, 100)
	if n, err := ours.Read(buf); err != nil || !bytes.Equal(buf[:n], command) {
		t.Errorf("the device was given %x, %v", buf[:n], err)
	}
	d.response = []byte("response")
	for want := range strings.SplitSeq("resp onse", " ") {
		if n, err := d.Read(buf[:4]); err != nil || string(buf[:n]) != want {
			t.Errorf("read %q, %v", buf[:n], err)
		}
	}
}
