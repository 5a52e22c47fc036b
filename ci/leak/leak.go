// Package leak looks for a secret in what should not hold it, in each form in which
// a program could have written it there.
package leak

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf16"
)

// part is how much of a secret is looked for at once, in bytes: one that is cut in
// two by a line, a record or a buffer is found by what is left of it.
const part = 12

// Form is how a part of a secret is written.
type Form struct {
	Name string
	Text []byte
}

// Forms returns each part of a secret of 12 bytes or more in each form.
func Forms(secret []byte) (forms []Form) {
	add := func(name string, text []byte) { forms = append(forms, Form{name, text}) }
	for at := 0; at+part <= len(secret); at += part / 2 {
		p := secret[at : at+part]
		backwards := slices.Clone(p)
		slices.Reverse(backwards)
		add("as it is", p)
		add("reversed", backwards)
		add("hexadecimal", []byte(hex.EncodeToString(p)))
		add("HEXADECIMAL", bytes.ToUpper([]byte(hex.EncodeToString(p))))
		add("percent-encoded", []byte(url.QueryEscape(string(p))))
		var escaped, percent strings.Builder
		for _, c := range p {
			fmt.Fprintf(&escaped, `\u%04x`, c)
			fmt.Fprintf(&percent, "%%%02X", c)
		}
		add("JSON-escaped", []byte(escaped.String()))
		add("percent-encoded throughout", []byte(percent.String()))
		var little, big []byte
		for _, u := range utf16.Encode([]rune(string(p))) {
			little, big = append(little, byte(u), byte(u>>8)), append(big, byte(u>>8), byte(u))
		}
		add("UTF-16LE", little)
		add("UTF-16BE", big)
		// At each of the three places in a group that it can begin at; the characters
		// at the ends also depend on what is around it.
		for skip := range 3 {
			for name, e := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
				text := e.EncodeToString(append(make([]byte, skip), p...))
				from := []int{0, 2, 3}[skip]
				end := len(text)
				if (skip+part)%3 != 0 {
					end--
				}
				add(name, []byte(text[from:end]))
			}
		}
	}
	return forms
}

// Find returns the forms in which a secret is in data.
func Find(data, secret []byte) (found []string) {
	for _, f := range Forms(secret) {
		if bytes.Contains(data, f.Text) && !slices.Contains(found, f.Name) {
			found = append(found, f.Name)
		}
	}
	return found
}

// FindInFiles looks through all files below a folder, and returns where it found a
// secret, and how many bytes it looked through.
func FindInFiles(dir string, secret []byte) (found []string, size int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil // written under a name for the time being
		}
		if err != nil {
			return err
		}
		size += int64(len(data))
		for _, form := range Find(data, secret) {
			found = append(found, path+": "+form)
		}
		for _, form := range Find([]byte(path), secret) {
			found = append(found, "the name "+path+": "+form)
		}
		return nil
	})
	return found, size, err
}
