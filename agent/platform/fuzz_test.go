package platform

import "testing"

// FuzzSplitCertificates reads the certificates out of a TPM's NV index.
func FuzzSplitCertificates(f *testing.F) {
	f.Add([]byte{0x30, 3, 2, 1, 1, 0x30, 0, 0, 0, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := splitCertificates(data)
		if err != nil {
			return
		}
		total := 0
		for _, c := range list {
			total += len(c)
		}
		if len(list) == 0 || len(list) > 8 || total > len(data) {
			t.Errorf("%d certificates of %d bytes out of %d", len(list), total, len(data))
		}
	})
}
