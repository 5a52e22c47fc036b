//go:build debug

package main

import (
	"fmt"
	"os"
)

// imageName is the image that this agent is part of: the debug image has its
// own, and so measurements that no policy approves.
const imageName = "chrysalis-debug"

var log console

// console prints the agent's log, which holds errors but nothing of a request.
type console struct{}

func (console) printf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "agent: "+format+"\n", args...)
}

func quietConsole() error { return nil }
