package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/measure/record"
)

// What cannot be used is told apart from what differs, by the exit status.
func TestMeasureExplainBadInput(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fill := func(n int) record.Hex { return make([]byte, n) }
	f := record.File{
		Version: 1, Shapes: []record.Shape{}, Engines: []record.Engine{}, Models: []record.Model{},
		Image: record.Image{
			Version: 1, Kind: record.KindImage, Name: "x", Platform: record.TDX, Boot: record.BootKernel,
			MRTD: fill(48), RTMR1: fill(48), RTMR2: fill(48), Commit: strings.Repeat("0", 40),
			Lock: fill(32), UKI: fill(32), Firmware: fill(32), QEMU: "11.1",
		},
	}
	encoded, err := f.Encode()
	if err != nil {
		t.Fatal(err)
	}
	good := write("record", encoded)
	other := write("other", []byte(strings.Replace(string(encoded), `"version":1}`, `"version":2}`, 1)))
	for name, tt := range map[string]struct{ record, log, quote, want string }{
		"no record":       {filepath.Join(dir, "none"), good, "", "no such file"},
		"other version":   {other, good, "", "version is 2"},
		"no log":          {good, filepath.Join(dir, "none"), "", "no such file"},
		"not a log":       {good, write("text", []byte("text")), "", "text: byte 0x0: "},
		"empty log":       {good, write("empty", nil), "", "the file is empty"},
		"not evidence":    {good, write("json", []byte("{}")), "", "json: evidence: "},
		"record as a log": {good, good, "", "evidence: "},
	} {
		t.Run(name, func(t *testing.T) {
			err := (&MeasureExplainCmd{Record: tt.record, Log: tt.log, Quote: tt.quote}).Run(t.Context())
			if err == nil || exitCode(err) != exitBadInput || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, exit status %d; expected %d and %q", err, exitCode(err), exitBadInput, tt.want)
			}
		})
	}
}
