package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"chrysalis/attest"
	"chrysalis/attest/receipt"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/terminal"
)

// The files that chat --save adds to a saved verification.
const (
	fileReceipt  = "receipt.json"
	fileRequest  = "request.json"
	fileResponse = "response.txt" // a stream as it came
	fileSalt     = "salt.txt"
)

// maxBody is the largest request or answer that is read, in bytes.
const maxBody = 64 << 20

// VerifyReceiptCmd checks a receipt.
type VerifyReceiptCmd struct {
	trustFlags
	Evidence string `arg:"" type:"existingdir" placeholder:"DIR" help:"The evidence of the VM, as 'verify --save' or 'chat --save' wrote it."`
	Receipt  string `placeholder:"FILE" help:"The receipt (default: receipt.json there)."`
	Request  string `placeholder:"FILE" help:"The request's body, as sent (default: request.json there, if any)."`
	Response string `placeholder:"FILE" help:"The answer's body, as received (default: response.txt there, if any)."`
	Salt     string `placeholder:"BASE64URL" help:"The salt of both (default: in salt.txt there)."`
	JSON     bool   `name:"json" help:"Print one JSON document."`
}

// Run prints what the receipt says. Its exit status is 0 when it holds, 1 when it
// does not, 2 when it could not be checked.
func (c *VerifyReceiptCmd) Run(ctx context.Context) error {
	t, err := c.load(ctx)
	if err != nil {
		return &exitError{exitNotChecked, err}
	}
	if c.Policy == "" && !c.AllowNotConfidential {
		t.policy = nil // the saved one
	}
	session, err := attest.Offline(ctx, c.Evidence, t.policy, t.records)
	if err != nil {
		return &exitError{exitNotChecked, err}
	}
	if !session.Verdict.OK {
		fmt.Fprintln(os.Stderr, terminal.Line(conclusion(session)))
		return &exitError{exitRefused, attest.ErrNotVerified}
	}
	data, err := readFile(c.at(c.Receipt, fileReceipt), receipt.MaxSize)
	if err != nil {
		return &exitError{exitNotChecked, err}
	}
	r, err := session.Receipt(data)
	if err != nil {
		return &exitError{exitRefused, cleanError(err)}
	}
	bodies, err := c.bodies(r)
	if err != nil {
		return err
	}
	if c.JSON {
		return json.NewEncoder(os.Stdout).Encode(struct {
			OK           bool `json:"ok"`
			Confidential bool `json:"confidential"`
			Bodies       bool `json:"bodies"` // compared
			*receipt.Receipt
		}{true, session.Verdict.Confidential, bodies, r})
	}
	counts := ""
	if r.PromptTokens != nil && r.CompletionTokens != nil {
		counts = fmt.Sprintf(", %d tokens in and %d out", *r.PromptTokens, *r.CompletionTokens)
	}
	if p := r.Payment; p != nil {
		charged, err := pay.ParseAmount(p.Charged)
		if err != nil {
			return &exitError{exitRefused, err}
		}
		counts += fmt.Sprintf(", %s charged", registry.TON(charged))
	}
	about := "these bodies"
	if !bodies {
		about = "bodies that were not given"
	}
	fmt.Println(terminal.Line(fmt.Sprintf("receipt %d of https://%s: %s answered %s%s", r.Sequence, session.Host, r.Model, about, counts)))
	return nil
}

func (c *VerifyReceiptCmd) at(given, name string) string {
	if given != "" {
		return given
	}
	return filepath.Join(c.Evidence, name)
}

// bodies compares the bodies, if they are there.
func (c *VerifyReceiptCmd) bodies(r *receipt.Receipt) (bool, error) {
	request, err := readFile(c.at(c.Request, fileRequest), maxBody)
	if c.Request == "" && errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, &exitError{exitNotChecked, err}
	}
	response, err := readFile(c.at(c.Response, fileResponse), maxBody)
	if err != nil {
		return false, &exitError{exitNotChecked, err}
	}
	text := c.Salt
	if text == "" {
		data, err := readFile(filepath.Join(c.Evidence, fileSalt), 1<<10)
		if err != nil {
			return false, &exitError{exitNotChecked, err}
		}
		text = strings.TrimSpace(string(data))
	}
	salt, err := receipt.ParseSalt(text)
	if err != nil {
		return false, &exitError{exitNotChecked, err}
	}
	if covered, _, err := receipt.SplitStream(response); err == nil {
		response = covered
	}
	if err := r.CheckBodies(salt, request, response); err != nil {
		return false, &exitError{exitRefused, err}
	}
	return true, nil
}
