package provenance

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"chrysalis/image"
	"chrysalis/image/inspect"
)

// A Result is how a check ended.
type Result string

// Results, as they stand in JSON.
const (
	Pass Result = "pass"
	Fail Result = "fail"
	// None is a check that could not be made, for the reason that it gives.
	None Result = "none"
)

// A Check is one thing that was looked at. Its JSON form is part of the command
// line's interface.
type Check struct {
	What   string `json:"check"`
	Result Result `json:"result"`
	Detail string `json:"detail,omitempty"`
	// Differences are why an artefact is not the same, A being the release's.
	Differences []inspect.Difference `json:"differences,omitempty"`
}

// Passed says whether no check failed.
func Passed(checks []Check) bool {
	for _, c := range checks {
		if c.Result == Fail {
			return false
		}
	}
	return true
}

// Verify compares the statement at path with the files beside it and with the
// lock of the source tree. An error means that something cannot be read.
func Verify(path, source string) ([]Check, error) {
	s, err := ReadStatement(path)
	if err != nil {
		return nil, err
	}
	lock, err := image.ReadLock(source)
	if err != nil {
		return nil, err
	}
	checks, err := s.CheckFiles(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	return append(checks, s.CheckLock(lock, "the source tree's")), nil
}

// CheckFiles compares each subject with the file of that name in a folder. A file
// that is not there, or is no regular file, is an error.
func (s *Statement) CheckFiles(dir string) ([]Check, error) {
	var checks []Check
	for _, subject := range s.Subject {
		path := filepath.Join(dir, subject.Name)
		info, err := os.Lstat(path)
		if err != nil {
			return nil, fmt.Errorf("the provenance names %s: %w", subject.Name, err)
		}
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is not a regular file", path)
		}
		sum, _, err := image.HashFile(path)
		if err != nil {
			return nil, err
		}
		checks = append(checks, equal(subject.Name+" is what the provenance names", "its SHA-256", sum, subject.Digest.SHA256))
	}
	return checks, nil
}

// CheckLock compares the lock that the statement names with another, and what it
// says about the builder with what that lock says.
func (s *Statement) CheckLock(lock *image.Lock, whose string) Check {
	sum := sha256.Sum256(lock.Encode())
	what := image.LockName + " is " + whose
	if c := equal(what, "the SHA-256 of "+whose, hex.EncodeToString(sum[:]), s.LockSHA256()); c.Result != Pass {
		return c
	}
	return equal(what, "the Go toolchain", lock.Go.Toolchain, s.Predicate.RunDetails.Builder.Version.Go)
}

func equal(what, of, is, named string) Check {
	if is == named {
		return Check{What: what, Result: Pass}
	}
	return Check{What: what, Result: Fail, Detail: fmt.Sprintf("%s is %s, the provenance says %s", of, is, named)}
}
