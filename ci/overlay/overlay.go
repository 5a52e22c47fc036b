// Package overlay gives the go command other texts for some files, which stay as
// they are.
package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Files are the texts, by absolute path.
type Files map[string]string

// Replace replaces what a file must hold exactly once.
func (f Files) Replace(path, old, new string) error {
	text, ok := f[path]
	if !ok {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text = string(data)
	}
	if n := strings.Count(text, old); n != 1 {
		return fmt.Errorf("%s has it %d times, expected once: tell this program where it is now", path, n)
	}
	f[path] = strings.Replace(text, old, new, 1)
	return nil
}

// Flag writes the texts into a folder, and returns the go command's flag.
func (f Files) Flag(dir string) (string, error) {
	replace := map[string]string{}
	var errs []error
	for path, text := range f {
		other := filepath.Join(dir, strconv.Itoa(len(replace))+".go")
		replace[path] = other
		errs = append(errs, os.WriteFile(other, []byte(text), 0o644))
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	name := filepath.Join(dir, "overlay.json")
	return "-overlay=" + name, errors.Join(append(errs, err, os.WriteFile(name, list, 0o644))...)
}
