// Package softtpm gives the software TPM of a VM without TDX what a cloud's TPM
// has: an endorsement key, an attestation key, and a certificate of that key.
//
// The certificate's issuer is a development root that this machine makes for
// itself. Whoever has the machine has the root's key and the TPM: evidence that
// ends in it shows that the parts fit together, and nothing about who can read the
// VM's memory.
package softtpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// RootName is the common name of every development root, so that whoever reads a
// chain sees what it is worth.
const RootName = "Chrysalis DEVELOPMENT root (software TPM, not confidential)"

const (
	rootLife  = 10 * 365 * 24 * time.Hour
	rootSpare = 365 * 24 * time.Hour // a root with less than this left is replaced
	backdate  = 24 * time.Hour       // for verifiers whose clock is behind
)

// CA is a machine's development root.
type CA struct {
	Certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Files of a CA in its folder.
const (
	CertificateFile = "development-root.pem" // PEM, for a client's policy
	keyFile         = "development-root.key" // PEM, 0600
	lockName        = ".development-root.lock"
)

// OpenCA opens the development root in a folder, and makes it on first use.
func OpenCA(dir string) (*CA, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the development root: %w", err)
	}
	// One start of a VM makes it, others that come at the same time wait for it.
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the development root: %w", err)
	}
	defer lock.Close()
	for {
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("make the development root: %w", err)
	}
	ca, err := readCA(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && time.Until(ca.Certificate.NotAfter) < rootSpare {
		ca, err = makeCA(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open the development root: %w; remove %s and a new one will be made", err, filepath.Join(dir, keyFile))
	}
	return ca, nil
}

func readCA(dir string) (*CA, error) {
	path := filepath.Join(dir, keyFile)
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s is open to others", path)
	}
	der, err := readPEM(path, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds another kind of key", path)
	}
	if der, err = readPEM(filepath.Join(dir, CertificateFile), "CERTIFICATE"); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if !ec.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("its key and its certificate do not belong together")
	}
	return &CA{cert, ec}, nil
}

func readPEM(path, kind string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != kind || len(rest) > 0 {
		return nil, fmt.Errorf("%s is not one PEM block of type %s", path, kind)
	}
	return block.Bytes, nil
}

func makeCA(dir string) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: RootName},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLife),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	// The key last: without it there is no root, and the next try makes one.
	if err := writePEM(dir, CertificateFile, "CERTIFICATE", cert.Raw, 0o644); err != nil {
		return nil, err
	}
	if err := writePEM(dir, keyFile, "PRIVATE KEY", pkcs8, 0o600); err != nil {
		return nil, err
	}
	return &CA{cert, key}, nil
}

func writePEM(dir, name, kind string, der []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(dir, ".tmp-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := pem.Encode(f, &pem.Block{Type: kind, Bytes: der}); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Chmod(f.Name(), mode); err != nil {
		return err
	}
	return os.Rename(f.Name(), filepath.Join(dir, name))
}

// akUsage is tcg-kp-AIKCertificate: TCG EK Credential Profile, section 3.2.16.
var akUsage = asn1.ObjectIdentifier{2, 23, 133, 8, 3}

// Certify returns the certificate of an attestation key, DER.
func (ca *CA) Certify(key crypto.PublicKey) ([]byte, error) {
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	cert, err := sign(&x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Chrysalis development attestation key (software TPM)"},
		NotBefore:             time.Now().Add(-backdate),
		NotAfter:              ca.Certificate.NotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		UnknownExtKeyUsage:    []asn1.ObjectIdentifier{akUsage},
		BasicConstraintsValid: true,
	}, ca.Certificate, key, ca.key)
	if err != nil {
		return nil, fmt.Errorf("certify the TPM's attestation key: %w", err)
	}
	return cert.Raw, nil
}

func sign(template, parent *x509.Certificate, key crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func serialNumber() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}
