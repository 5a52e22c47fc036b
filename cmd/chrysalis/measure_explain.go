package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"chrysalis/attest/evidence"
	"chrysalis/manifest"
	"chrysalis/measure"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
	"chrysalis/terminal"
)

// MeasureExplainCmd compares a VM's log with a record.
type MeasureExplainCmd struct {
	Record   string `required:"" placeholder:"FILE" help:"The record, as 'chrysalis measure -o' writes it."`
	Log      string `required:"" placeholder:"FILE" help:"The VM's TCG log or CCEL, or the evidence document that it serves."`
	Quote    string `placeholder:"FILE" help:"A TDX or TPM quote, to compare the log with; evidence has its own."`
	Manifest string `placeholder:"FILE" help:"The manifest that the VM should have; for evidence."`
	Shape    string `placeholder:"NAME" help:"The record's shape to compare with (default: the one that fits best)."`
	Guess    bool   `default:"true" negatable:"" help:"Where the machine differs, find out what it is by trying others (default: ${default})."`
	JSON     bool   `name:"json" help:"Print one JSON document."`
	Tools    string `hidden:"" env:"CHRYSALIS_TOOLS" placeholder:"DIR" help:"The tools root."`
}

// Help is what 'chrysalis measure explain --help' says below the usage.
func (*MeasureExplainCmd) Help() string {
	return "It exits with 0 if all is as in the record, 1 if something differs, 2 if a file cannot be used."
}

// Run says what differs.
func (c *MeasureExplainCmd) Run(ctx context.Context) error {
	bad := func(err error) error { return &exitError{exitBadInput, err} }
	data, err := readFile(c.Record, record.MaxFile)
	if err != nil {
		return bad(err)
	}
	f, err := record.ParseFile(data)
	if err != nil {
		return bad(fmt.Errorf("%s: %w", c.Record, err))
	}
	o, err := c.observed(f)
	if err != nil {
		return bad(err)
	}
	var guesses func(record.Shape, func(measure.Guess) bool)
	if c.Guess {
		// Without QEMU there is less to say, and what is said is still right.
		if tools, err := openToolsRoot(c.Tools); err == nil {
			guesses = plan.Guesses(ctx, tools, f)
		}
	}
	x, err := measure.Explain(f, o, c.Shape, guesses)
	if err != nil {
		return bad(fmt.Errorf("%s: %w", c.Log, err))
	}
	if c.JSON {
		err = json.NewEncoder(os.Stdout).Encode(x)
	} else {
		err = printExplanation(os.Stdout, x)
	}
	if err != nil {
		return err
	}
	if !x.Equal {
		return &exitError{code: exitDifferent}
	}
	return nil
}

// observed reads log and quote, each of which may be an evidence document.
func (c *MeasureExplainCmd) observed(f *record.File) (o measure.Observed, err error) {
	data, err := readFile(c.Log, max(measure.MaxLog, evidence.MaxSize))
	if err != nil {
		return o, err
	}
	quote, name := []byte(nil), c.Quote
	if bytes.HasPrefix(data, []byte("{")) {
		doc, err := evidence.Parse(data)
		if err != nil {
			return o, fmt.Errorf("%s: %w", c.Log, err)
		}
		switch {
		case doc.TPM != nil && f.Image.Platform == record.TPM:
			data, quote = doc.TPM.Log, doc.TPM.Quote
			o.Values = map[string][]byte{}
			for _, pcr := range doc.TPM.PCRs {
				o.Values[fmt.Sprintf("pcr%d", pcr.Index)] = pcr.SHA256
			}
		case doc.TDX != nil && f.Image.Platform == record.TDX:
			data, quote = doc.TDX.CCEL, doc.TDX.Quote
		default:
			return o, fmt.Errorf("%s is not evidence of platform %s, of which the record is", c.Log, f.Image.Platform)
		}
		o.Manifest, o.CEL = doc.Manifest, doc.CEL
		name = c.Log + ", its quote"
	}
	if o.Log, err = measure.ParseLog(c.Log, data); err != nil {
		return o, err
	}
	if c.Quote != "" {
		if quote, err = readFile(c.Quote, evidence.MaxSize); err != nil {
			return o, err
		}
		name = c.Quote
	}
	if c.Manifest != "" {
		if o.Want, err = readFile(c.Manifest, manifest.MaxSize); err != nil {
			return o, err
		}
	}
	if quote == nil {
		return o, nil
	}
	if f.Image.Platform == record.TDX {
		o.Values, err = measure.ParseTDXQuote(name, quote)
		return o, err
	}
	o.Covered, err = measure.CheckTPMQuote(name, quote, func(i int) []byte {
		if v, ok := o.Values[fmt.Sprintf("pcr%d", i)]; ok {
			return v
		}
		return o.Log.Replay(measure.SHA256, i)
	})
	return o, err
}

func printExplanation(out io.Writer, x *measure.Explanation) error {
	w := terminal.NewWriter(out)
	line := func(format string, args ...any) {
		fmt.Fprintln(w, terminal.Line(fmt.Sprintf(format, args...)))
	}
	where := ""
	if x.Shape != "" {
		where = ", shape " + x.Shape
	}
	if x.Equal {
		line("equal: every event that the record predicts was measured, and nothing else%s", where)
	} else {
		line("different%s", where)
	}
	for _, v := range x.Values {
		mark := "✔"
		if !v.Equal {
			mark = "✘"
		}
		line("%s %s", mark, v.Register)
		line("  predicted %s", v.Predicted)
		line("  reported  %s", v.Reported)
	}
	for _, c := range x.Causes {
		line("✘ %s", c.What)
		line("  → %s", c.Do)
	}
	for _, f := range x.Findings {
		line("%s, %s: %s", f.Register, f.Event, f.Text)
		line("  expected %s", f.Expected)
		line("  found    %s", f.Found)
	}
	for _, u := range x.Unknown {
		line("not compared: %s", u)
	}
	return nil
}
