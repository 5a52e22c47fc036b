package softtpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	// Several starts of VMs at the same time make one root.
	roots := make([]*CA, 8)
	var all sync.WaitGroup
	for i := range roots {
		all.Go(func() {
			var err error
			if roots[i], err = OpenCA(dir); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	for _, ca := range roots {
		if !ca.Certificate.Equal(roots[0].Certificate) {
			t.Error("there are two roots")
		}
	}
	root := roots[0].Certificate
	if !root.IsCA || !strings.Contains(root.Subject.CommonName, "DEVELOPMENT") || !strings.Contains(root.Subject.CommonName, "not confidential") {
		t.Errorf("the root is %q", root.Subject.CommonName)
	}
	for name, mode := range map[string]os.FileMode{keyFile: 0o600, CertificateFile: 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := roots[1].Certify(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if len(der) > 2048 {
		t.Errorf("the certificate has %d bytes; an NV index has at most 2048", len(der))
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if leaf.IsCA || !key.PublicKey.Equal(leaf.PublicKey) || len(leaf.UnknownExtKeyUsage) != 1 || !leaf.UnknownExtKeyUsage[0].Equal(akUsage) {
		t.Error("the leaf is not an attestation key's")
	}
}

func TestCARefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(dir string) error
	}{
		{"a key that others can read", func(dir string) error { return os.Chmod(filepath.Join(dir, keyFile), 0o640) }},
		{"a damaged key", func(dir string) error { return os.WriteFile(filepath.Join(dir, keyFile), []byte("x"), 0o600) }},
		{"a damaged certificate", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, CertificateFile), []byte("x"), 0o600)
		}},
		{"another root's certificate", func(dir string) error {
			if _, err := OpenCA(dir + "-other"); err != nil {
				return err
			}
			return os.Rename(filepath.Join(dir+"-other", CertificateFile), filepath.Join(dir, CertificateFile))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if _, err := OpenCA(dir); err != nil {
				t.Fatal(err)
			}
			if err := c.change(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenCA(dir); err == nil || !strings.Contains(err.Error(), "remove "+filepath.Join(dir, keyFile)) {
				t.Errorf("got %v", err)
			}
		})
	}
}
