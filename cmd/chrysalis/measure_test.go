package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/measure/record"
	"chrysalis/models"
	"chrysalis/pay"
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

// A VM that is paid has ceilings in its manifest, and so has what is predicted of it.
func TestMeasurePayment(t *testing.T) {
	disks := []string{"measure", "--engine", "e", "--model", "m", "--ton-network", "devnet"}
	c, err := parse(t, append(disks, "--prompt-ceiling", "0.5", "--completion-ceiling", "1.5")...)
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Measure.Predict.payment()
	if err != nil || p.Step != 0 || len(p.Ceilings) != 1 || p.Ceilings[0] != (pay.Price{Prompt: 500_000_000, Completion: 1_500_000_000}) {
		t.Fatalf("%+v, %v", p, err)
	}
	m, err := models.Payment(p.Network, 2, p.Ceilings, p.Step)
	if err != nil || m.Network != p.Network || m.Step != 150_000_000 || len(m.Ceilings) != 2 || m.Ceilings[1] != p.Ceilings[0] {
		t.Fatalf("%+v, %v", m, err)
	}
	if c, err = parse(t, disks...); err != nil {
		t.Fatal(err)
	}
	if p, err := c.Measure.Predict.payment(); p != nil || err != nil {
		t.Errorf("%+v, %v", p, err)
	}
	for want, flags := range map[string][]string{
		"--voucher-step is given without": append(disks, "--voucher-step", "1"),
		"go into a manifest that is made": {"measure", "--prompt-ceiling", "1"},
		"is neither mainnet":              {"measure", "--engine", "e", "--model", "m", "--prompt-ceiling", "1", "--ton-network", "x"},
	} {
		if c, err = parse(t, flags...); err != nil {
			t.Fatal(err)
		}
		if err := c.Measure.Predict.Run(t.Context()); err == nil || exitCode(err) != exitBadInput || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if _, err := models.Payment(1, 2, make([]pay.Price, 3), 0); err == nil {
		t.Error("three ceilings for two models")
	}
	if _, err := models.Payment(1, 1, make([]pay.Price, 1), pay.MaxStep+1); err == nil {
		t.Error("a step that is too large")
	}
}
