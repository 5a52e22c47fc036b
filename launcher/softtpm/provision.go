package softtpm

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/canonical/go-tpm2"
	"github.com/canonical/go-tpm2/transportutil"
)

// Where the keys and the certificate go: where Azure's TPMs have them, so that the
// guest looks in one place.
const (
	ekHandle          = 0x81010001
	akHandle          = 0x81000003
	certificateHandle = 0x01C101D0
)

// ekPolicy is PolicySecret(TPM_RH_ENDORSEMENT): TCG EK Credential Profile,
// section B.3.3, template L-1.
var ekPolicy = tpm2.Digest{
	0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24,
	0xfd, 0x52, 0xd7, 0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
}

func ekTemplate() *tpm2.Public {
	return &tpm2.Public{
		Type:    tpm2.ObjectTypeRSA,
		NameAlg: tpm2.HashAlgorithmSHA256,
		Attrs: tpm2.AttrFixedTPM | tpm2.AttrFixedParent | tpm2.AttrSensitiveDataOrigin | tpm2.AttrAdminWithPolicy |
			tpm2.AttrRestricted | tpm2.AttrDecrypt,
		AuthPolicy: ekPolicy,
		Params: &tpm2.PublicParamsU{RSADetail: &tpm2.RSAParams{
			Symmetric: tpm2.SymDefObject{
				Algorithm: tpm2.SymObjectAlgorithmAES,
				KeyBits:   &tpm2.SymKeyBitsU{Sym: 128},
				Mode:      &tpm2.SymModeU{Sym: tpm2.SymModeCFB},
			},
			Scheme:  tpm2.RSAScheme{Scheme: tpm2.RSASchemeNull},
			KeyBits: 2048,
		}},
		Unique: &tpm2.PublicIDU{RSA: make(tpm2.PublicKeyRSA, 256)},
	}
}

// akTemplate is a restricted signing key: it signs what the TPM itself made, and
// nothing that anybody hands to it.
func akTemplate() *tpm2.Public {
	return &tpm2.Public{
		Type:    tpm2.ObjectTypeRSA,
		NameAlg: tpm2.HashAlgorithmSHA256,
		Attrs: tpm2.AttrFixedTPM | tpm2.AttrFixedParent | tpm2.AttrSensitiveDataOrigin | tpm2.AttrUserWithAuth |
			tpm2.AttrRestricted | tpm2.AttrSign,
		Params: &tpm2.PublicParamsU{RSADetail: &tpm2.RSAParams{
			Symmetric: tpm2.SymDefObject{Algorithm: tpm2.SymObjectAlgorithmNull},
			Scheme: tpm2.RSAScheme{
				Scheme:  tpm2.RSASchemeRSASSA,
				Details: &tpm2.AsymSchemeU{RSASSA: &tpm2.SigSchemeRSASSA{HashAlg: tpm2.HashAlgorithmSHA256}},
			},
			KeyBits: 2048,
		}},
		Unique: &tpm2.PublicIDU{RSA: make(tpm2.PublicKeyRSA, 256)},
	}
}

// Provision starts up the TPM at conn, gives it its keys and the certificate, and
// shuts it down so that a VM can start it. It closes conn.
func Provision(ctx context.Context, conn net.Conn, ca *CA) error {
	tpm, err := tpm2.OpenTPMDevice(Device{conn})
	if err != nil {
		return err
	}
	defer tpm.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	return provision(tpm, ca)
}

func provision(tpm *tpm2.TPMContext, ca *CA) error {
	if err := tpm.Startup(tpm2.StartupClear); err != nil {
		return err
	}
	if _, err := makeKey(tpm, ekTemplate(), ekHandle); err != nil {
		return fmt.Errorf("make its endorsement key: %w", err)
	}
	ak, err := makeKey(tpm, akTemplate(), akHandle)
	if err != nil {
		return fmt.Errorf("make its attestation key: %w", err)
	}
	cert, err := ca.Certify(ak.Public())
	if err != nil {
		return err
	}
	index, err := tpm.NVDefineSpace(tpm.OwnerHandleContext(), nil, &tpm2.NVPublic{
		Index:   certificateHandle,
		NameAlg: tpm2.HashAlgorithmSHA256,
		Attrs: tpm2.NVTypeOrdinary.WithAttrs(tpm2.AttrNVOwnerWrite | tpm2.AttrNVOwnerRead | tpm2.AttrNVAuthRead |
			tpm2.AttrNVNoDA),
		Size: uint16(len(cert)),
	}, nil)
	if err != nil {
		return fmt.Errorf("make room for its certificate: %w", err)
	}
	if err := tpm.NVWrite(tpm.OwnerHandleContext(), index, cert, 0, nil); err != nil {
		return fmt.Errorf("write its certificate: %w", err)
	}
	return tpm.Shutdown(tpm2.StartupClear)
}

// makeKey makes a primary key below the endorsement seed and keeps it at a handle.
func makeKey(tpm *tpm2.TPMContext, template *tpm2.Public, handle tpm2.Handle) (*tpm2.Public, error) {
	object, public, _, _, _, err := tpm.CreatePrimary(tpm.EndorsementHandleContext(), nil, template, nil, nil, nil)
	if err != nil {
		return nil, err
	}
	if _, err := tpm.EvictControl(tpm.OwnerHandleContext(), object, handle, nil); err != nil {
		return nil, err
	}
	return public, tpm.FlushContext(object)
}

// maxMessage bounds a command and a response, in bytes: swtpm's buffer.
const maxMessage = 4096

// Device is a connection to swtpm's data socket, as go-tpm2 wants it. Commands are
// sent again where the TPM asks for it: nobody else does that on a socket.
type Device struct{ net.Conn }

// Open implements tpm2.TPMDevice. It can be called once.
func (d Device) Open() (tpm2.Transport, error) {
	return transportutil.NewRetrierTransport(&socket{
		conn: d.Conn,
		r:    transportutil.BufferResponses(d.Conn, maxMessage),
		w:    transportutil.BufferCommands(d.Conn, maxMessage),
	}, transportutil.RetryParams{MaxRetries: 8, InitialBackoff: 5 * time.Millisecond, BackoffRate: 2}), nil
}

func (d Device) String() string { return "software TPM" }

type socket struct {
	conn net.Conn
	r    transportutil.ResponseBuffer
	w    transportutil.CommandBuffer
}

func (s *socket) Read(p []byte) (int, error)  { return s.r.Read(p) }
func (s *socket) Write(p []byte) (int, error) { return s.w.Write(p) }
func (s *socket) Close() error                { return s.conn.Close() }
