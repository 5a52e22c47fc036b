package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestReadAhead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weights")
	if err := os.WriteFile(path, make([]byte, prefetchPiece+12345), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1, 4096, prefetchPiece, prefetchPiece + 12345} {
		if err := readAhead(t.Context(), path, size); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	// A file that is shorter than its card says is the engine's to stumble over.
	if err := readAhead(t.Context(), path, 4*prefetchPiece); err != nil {
		t.Errorf("past the end: %v", err)
	}
	if err := readAhead(t.Context(), path+"x", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	// A folder opens, and cannot be read.
	if err := readAhead(t.Context(), t.TempDir(), 1); err == nil {
		t.Error("an error while reading was lost")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := readAhead(ended, path, prefetchPiece); err != nil {
		t.Errorf("after the end: %v", err)
	}
}
