// Command helper is the NVML helper (package agent/gpu): it loads NVIDIA's
// management library by dlopen and answers one request after the other until its
// standard input ends.
//
// The binding of the library needs cgo and the build tag nvml. Without both every
// request is answered with no-library, so that the tree builds and vets anywhere.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"syscall"

	"chrysalis/agent/gpu/protocol"
)

// memoryLimit is what Go's heap may take. The library's own memory comes on top.
const memoryLimit = 12 << 20

func main() {
	library := flag.String("library", "libnvidia-ml.so.1", "NVIDIA's management library, by path or by name")
	flag.Parse()
	debug.SetMemoryLimit(memoryLimit)
	answers, err := keepOutput()
	if err == nil {
		err = serve(os.Stdin, answers, newLibrary(*library))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gpu helper:", err)
		os.Exit(1)
	}
}

// keepOutput takes standard output for the answers alone: what the library or
// anything that it loads prints goes to standard error.
func keepOutput() (*os.File, error) {
	fd, err := syscall.Dup(1)
	if err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
	if err := syscall.Dup3(2, 1, 0); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "answers"), nil
}

// failure is an answer other than CodeOK.
type failure struct {
	code   protocol.Code
	detail string
}

func (f *failure) Error() string { return string(f.code) + " " + f.detail }

// nvml is NVIDIA's library. All errors are of type *failure.
type nvml interface {
	inventory() ([]protocol.GPU, error)
	system() (*protocol.System, error)
	attest(index int, nonce [protocol.NonceSize]byte) (*protocol.Proof, error)
	health(index int) (*protocol.Health, error)
	setReady(ready bool) error
}

func serve(in io.Reader, out io.Writer, n nvml) error {
	requests := bufio.NewReaderSize(in, protocol.MaxRequest)
	for {
		line, err := requests.ReadSlice('\n')
		if err == io.EOF && len(line) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a request: %w", err)
		}
		encoded, err := json.Marshal(answer(line, n))
		if err != nil {
			return err
		}
		if _, err := out.Write(append(encoded, '\n')); err != nil {
			return fmt.Errorf("write an answer: %w", err)
		}
	}
}

func answer(line []byte, n nvml) (a protocol.Answer) {
	var r protocol.Request
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil || r.Version != protocol.Version {
		return protocol.Answer{Code: protocol.CodeBadRequest}
	}
	a.ID = r.ID
	var err error
	switch r.Op {
	case protocol.OpInventory:
		a.GPUs, err = n.inventory()
		if err == nil && a.GPUs == nil {
			err = &failure{protocol.CodeNoGPU, ""}
		}
	case protocol.OpSystem:
		a.System, err = n.system()
	case protocol.OpAttest:
		if len(r.Nonce) != protocol.NonceSize {
			err = &failure{protocol.CodeBadRequest, "nonce"}
			break
		}
		a.Proof, err = n.attest(r.GPU, [protocol.NonceSize]byte(r.Nonce))
	case protocol.OpHealth:
		a.Health, err = n.health(r.GPU)
	case protocol.OpSetReady:
		err = n.setReady(r.Ready)
	default:
		err = &failure{protocol.CodeBadRequest, "op"}
	}
	a.Code = protocol.CodeOK
	if err != nil {
		a = protocol.Answer{ID: r.ID, Code: protocol.CodeFailed}
		if f, ok := errors.AsType[*failure](err); ok {
			a.Code, a.Detail = f.code, f.detail
		}
	}
	return a
}
