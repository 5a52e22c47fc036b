//go:build !cgo || !nvml

package main

import (
	"chrysalis/agent/gpu/protocol"
)

// none is what a helper built without the library's binding has in place of the library.
type none struct{}

func newLibrary(string) nvml { return none{} }

var errNone = &failure{protocol.CodeNoLibrary, "built without the tag nvml"}

func (none) inventory() ([]protocol.GPU, error)                            { return nil, errNone }
func (none) system() (*protocol.System, error)                             { return nil, errNone }
func (none) attest(int, [protocol.NonceSize]byte) (*protocol.Proof, error) { return nil, errNone }
func (none) health(int) (*protocol.Health, error)                          { return nil, errNone }
func (none) setReady(bool) error                                           { return errNone }
