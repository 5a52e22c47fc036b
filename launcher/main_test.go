package launcher

import (
	"fmt"
	"os"
	"testing"
)

// TestMain lets the test program be its own supervisor, as cmd/chrysalis is.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "supervise" {
		if err := Supervise(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}
