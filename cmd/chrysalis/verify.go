package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"chrysalis/attest"
	"chrysalis/terminal"
)

// Exit statuses of verify, proxy and chat.
const (
	exitRefused    = 1
	exitNotChecked = 2 // no evidence came, or something to check it with is missing
)

type verifyCommands struct {
	Endpoint VerifyCmd        `cmd:"" default:"withargs" help:"Check what answers at an endpoint (the default)."`
	Receipt  VerifyReceiptCmd `cmd:"" help:"Check the receipt of an answer against saved evidence."`
}

// VerifyCmd checks the evidence of an endpoint, or saved evidence.
type VerifyCmd struct {
	trustFlags
	Endpoint string `arg:"" optional:"" placeholder:"URL|NAME" help:"https://HOST:PORT, or the name of a VM on this machine."`
	Offline  string `placeholder:"DIR" help:"Check what --save wrote instead, without a network and as of then; --record and --policy replace the saved ones."`
	Save     string `placeholder:"DIR" help:"Keep evidence, records, policy and verdict in this folder, for --offline."`
	JSON     bool   `name:"json" help:"Print one JSON document."`
}

// Run prints the checks and what they come to. Its exit status is 0 when all hold,
// 1 when the evidence is refused, 2 when it could not be checked.
func (c *VerifyCmd) Run(ctx context.Context) error {
	session, err := c.check(ctx)
	if session == nil {
		if err == nil {
			err = errors.New("no evidence")
		}
		if c.JSON {
			json.NewEncoder(os.Stdout).Encode(map[string]any{"ok": false, "error": terminal.Line(err.Error())})
		}
		return &exitError{exitNotChecked, cleanError(err)}
	}
	if c.JSON {
		if err := json.NewEncoder(os.Stdout).Encode(struct {
			Endpoint string `json:"endpoint"`
			*attest.Verdict
		}{"https://" + session.Host, session.Verdict}); err != nil {
			return err
		}
	} else if err := printVerdict(os.Stdout, session); err != nil {
		return err
	}
	return verdictError(session.Verdict)
}

// check returns a session unless there is nothing to judge.
func (c *VerifyCmd) check(ctx context.Context) (*attest.Session, error) {
	if (c.Endpoint == "") == (c.Offline == "") {
		return nil, errors.New("name an endpoint, or a saved one with --offline")
	}
	if c.Offline != "" {
		if c.Save != "" {
			return nil, errors.New("--save needs an endpoint")
		}
		if c.GPUCollateral != "" {
			return nil, errors.New("--gpu-collateral needs an endpoint: --offline uses what was saved")
		}
		t, err := c.load(ctx)
		if err != nil {
			return nil, err
		}
		if c.Policy == "" && !c.AllowNotConfidential {
			t.policy = nil // the saved one
		}
		return attest.Offline(ctx, c.Offline, t.policy, t.records)
	}
	t, err := c.load(ctx)
	if err != nil {
		return nil, err
	}
	endpoint, err := findEndpoint(ctx, c.Endpoint)
	if err != nil {
		return nil, err
	}
	session, err := t.transport().Attest(ctx, endpoint)
	if session != nil && c.Save != "" {
		if err := session.Save(c.Save, t.policy, t.records); err != nil {
			return nil, err
		}
	}
	return session, err
}

// verdictError is the exit status for a verdict whose checks have been printed.
func verdictError(v *attest.Verdict) error {
	switch {
	case v.OK:
		return nil
	case v.Refused():
		return &exitError{exitRefused, nil}
	}
	return &exitError{exitNotChecked, nil}
}

// printVerdict prints a line a check, and a sentence.
func printVerdict(w io.Writer, s *attest.Session) error {
	var b strings.Builder
	printChecksOf(&b, s.Verdict)
	b.WriteString("\n" + conclusion(s) + "\n")
	_, err := io.WriteString(w, terminal.Clean(b.String()))
	return err
}

func printChecksOf(b *strings.Builder, v *attest.Verdict) {
	width := 13
	for _, c := range v.Checks {
		width = max(width, len(c.Name))
	}
	for _, c := range v.Checks {
		title := c.Title
		if c.Subject != "" {
			title += ": " + c.Subject
		}
		fmt.Fprintf(b, "%s %-*s %s", c.Status.Mark(), width, c.Name, title)
		switch {
		case c.Status == attest.NotRun:
			b.WriteString(" (not run)")
		case c.Detail != "" && c.Status == attest.Passed:
			fmt.Fprintf(b, " (%s)", c.Detail)
		}
		b.WriteString("\n")
		if c.Status == attest.Passed || c.Status == attest.NotRun {
			continue
		}
		fmt.Fprintf(b, "    %s\n", c.Detail)
		if c.Expected != "" {
			fmt.Fprintf(b, "    expected  %s\n    found     %s\n", c.Expected, c.Found)
		}
	}
}

// machine is what a VM that was verified runs on.
func machine(v *attest.Verdict) string {
	if len(v.GPUs) == 0 {
		return ""
	}
	count := map[string]int{}
	var names []string
	for _, g := range v.GPUs {
		if count[g.String()]++; count[g.String()] == 1 {
			names = append(names, g.String())
		}
	}
	for i, name := range names {
		names[i] = fmt.Sprintf("%d × %s", count[name], name)
	}
	return " with " + strings.Join(names, " and ")
}

// conclusion is one sentence about a verdict.
func conclusion(s *attest.Session) string {
	v := s.Verdict
	who := "https://" + s.Host
	if time.Since(v.At) > time.Minute {
		who += ", as of " + v.At.Format(time.DateTime) + " UTC,"
	}
	switch first := v.First(); {
	case v.OK && v.Confidential:
		return fmt.Sprintf("%s is %s on TDX%s, running %s with %s; its owner cannot read what you send.", who, v.Image, machine(v), v.Engine, strings.Join(v.Models, ", "))
	case v.OK:
		return fmt.Sprintf("%s is %s%s, running %s with %s. NOT CONFIDENTIAL: nothing here keeps the machine's owner from reading what you send.", who, v.Image, machine(v), v.Engine, strings.Join(v.Models, ", "))
	case first != nil && first.Status == attest.Unchecked:
		return fmt.Sprintf("%s could not be checked (%s); nothing was sent to it.", who, first.Name)
	case first != nil:
		return fmt.Sprintf("%s is refused: %s does not hold; nothing was sent to it.", who, first.Name)
	}
	return who + " is refused; nothing was sent to it."
}
