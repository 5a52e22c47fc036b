//go:build debug

package main

import (
	"fmt"
	"os"
)

var log console

// console prints the agent's log, which holds errors but nothing of a request.
// Images that are not published (mkosi.profiles) are built with it. They have
// names, and so measurements, of their own, which no policy approves.
type console struct{}

func (console) printf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "agent: "+format+"\n", args...)
}

func quietConsole() error { return nil }
