package main

import "errors"

// An exitError makes the program end with a status other than 1. Only a command
// of this program makes one: that a program which it ran ended with some status,
// as exec.ExitError says, is no reason to end with the same.
type exitError struct {
	code int
	err  error // what to print, or nil if the command has said it all
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// ExitCode is the status that the program ends with.
func (e *exitError) ExitCode() int { return e.code }

// exitCode is the status for the error that a command returned.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[*exitError](err); ok {
		return exit.ExitCode()
	}
	return 1
}
