//go:build !cgo || !nvml

package main

import (
	"chrysalis/agent/gpu"
	"chrysalis/attest/nvidia"
)

// none is what a helper built without the library's binding has in place of the library.
type none struct{}

func newLibrary(string) nvml { return none{} }

var errNone = &failure{gpu.CodeNoLibrary, "built without the tag nvml"}

func (none) inventory() ([]gpu.GPU, error)                          { return nil, errNone }
func (none) system() (*gpu.System, error)                           { return nil, errNone }
func (none) attest(int, [nvidia.NonceSize]byte) (*gpu.Proof, error) { return nil, errNone }
func (none) health(int) (*gpu.Health, error)                        { return nil, errNone }
func (none) setReady(bool) error                                    { return errNone }
