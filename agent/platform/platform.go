// Package platform is what a VM proves itself with: Intel TDX, or a TPM 2.0
// where there is no TDX.
//
// What a TPM and a quoting service answer comes from the host, or through it.
// Nothing of it is believed here: it is bounded, and handed to the client, who
// checks it.
package platform

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-configfs-tsm/configfs/linuxtsm"

	"chrysalis/attest/evidence"
	"chrysalis/measure/cel"
)

// Platform measures events and proves them. Its methods are not called at the
// same time.
type Platform interface {
	// Register is where events go.
	Register() cel.Register
	// CheckManifest compares an encoded manifest with the one that the VM was
	// started for, where the platform tells.
	CheckManifest(encoded []byte) error
	// Extend measures an event.
	Extend(cel.Event) error
	// Holds reports an error unless the register holds these events and no other.
	Holds([]cel.Event) error
	// Prove adds the platform's proof to a document that is complete but for it.
	Prove(*evidence.Document) error
}

// Open opens the platform of this VM. In a TD (tdx) a TPM is never looked at: it
// is the host's. root is "/", but in tests.
func Open(root string, tdx bool) (Platform, error) {
	if tdx {
		return openTDX(root, linuxtsm.MakeClient)
	}
	return openTPM(root)
}

// maxLog bounds a firmware's event log, in bytes, as attest/evidence does.
const maxLog = 512 << 10

// readLog reads a firmware's event log.
func readLog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the firmware's event log: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxLog+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the firmware's event log: %w", err)
	case len(data) > maxLog:
		return nil, fmt.Errorf("the firmware's event log has more than %d bytes", maxLog)
	case len(data) == 0:
		return nil, errors.New("the firmware's event log is empty")
	}
	return data, nil
}

// attribute reads a small file of sysfs below root.
func attribute(root string, path ...string) ([]byte, error) {
	f, err := os.Open(filepath.Join(append([]string{root}, path...)...))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 4<<10))
}
