package attest_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"chrysalis/attest"
	"chrysalis/measure/record"
)

func TestSaveOffline(t *testing.T) {
	for _, platform := range []record.Platform{record.TDX, record.TPM} {
		t.Run(string(platform), func(t *testing.T) {
			s := newScene(t, platform)
			session, err := s.client.Attest(t.Context(), s.server.URL)
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "saved")
			if err := session.Save(dir, s.client.Policy, s.client.Records); err != nil {
				t.Fatal(err)
			}
			if err := session.Save(dir, s.client.Policy, s.client.Records); err == nil {
				t.Error("a folder is overwritten")
			}
			s.server.Close()
			again, err := attest.Offline(t.Context(), dir, nil, nil)
			if err != nil || !again.Verdict.OK || !again.Verdict.At.Equal(session.Verdict.At) || len(again.Verdict.Checks) != len(session.Verdict.Checks) {
				t.Fatalf("%+v, %v", again, err)
			}
			strict, err := attest.Offline(t.Context(), dir, attest.NewPolicy(), nil)
			if err != nil || strict.Verdict.OK {
				t.Errorf("under the strictest policy: %+v, %v", strict, err)
			}
			none, err := attest.Offline(t.Context(), dir, nil, []*record.File{})
			if err != nil || none.Verdict.OK {
				t.Errorf("without records: %+v, %v", none, err)
			}
			path := filepath.Join(dir, attest.FileEvidence)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, bytes.Replace(data, []byte(`"manifest":"e`), []byte(`"manifest":"f`), 1), 0o600); err != nil {
				t.Fatal(err)
			}
			changed, err := attest.Offline(t.Context(), dir, nil, nil)
			if err != nil || changed.Verdict.Failed != attest.CheckReportData {
				t.Errorf("with a changed byte: %+v, %v", changed.Verdict.First(), err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 9<<20); err != nil {
				t.Fatal(err)
			}
			if _, err := attest.Offline(t.Context(), dir, nil, nil); err == nil {
				t.Error("9 MiB are read")
			}
		})
	}
}
