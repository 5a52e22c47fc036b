package main

import (
	"os"
	"testing"
)

func TestTDXFlag(t *testing.T) {
	for _, tt := range []struct {
		name, cpuinfo string
		want          bool
	}{
		{"a TD", "processor\t: 0\nflags\t\t: fpu tdx_guest lm\nbugs\t\t:\n", true},
		{"the last flag", "flags\t\t: fpu lm tdx_guest\n", true},
		{"no TD", "processor\t: 0\nflags\t\t: fpu lm\n", false},
		{"a host of TDs", "flags\t\t: fpu tdx_host_platform\n", false},
		{"a longer flag", "flags\t\t: fpu tdx_guest2\n", false},
		{"in the model's name", "model name\t: tdx_guest\nflags\t\t: fpu\n", false},
		{"in other flags", "vmx flags\t: tdx_guest\nflags\t\t: fpu\n", false},
		{"nothing", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tdxFlag(tt.cpuinfo); got != tt.want {
				t.Errorf("%v, expected %v", got, tt.want)
			}
		})
	}
}

func TestResidentMemory(t *testing.T) {
	// A Go program takes more than a megabyte and this test less than a gigabyte.
	now, peak := residentMemory(os.Getpid())
	if now < 1<<10 || peak < now || peak > 1<<20 {
		t.Errorf("%d KiB now, %d KiB at the peak", now, peak)
	}
	if now, peak := residentMemory(1 << 30); now != 0 || peak != 0 {
		t.Errorf("a process that is not there: %d KiB, %d KiB", now, peak)
	}
}
