package main

import (
	"bytes"
	"os"
	"testing"

	"chrysalis/models"
)

func TestGrow(t *testing.T) {
	demo, err := os.ReadFile("../../models/demo/demo.gguf")
	if err != nil {
		t.Fatal(err)
	}
	grown, err := grow(demo, layers)
	if err != nil {
		t.Fatal(err)
	}
	if err := models.CheckGGUF(bytes.NewReader(grown), int64(len(grown))); err != nil || len(grown) < 64<<20 {
		t.Errorf("%d bytes: %v", len(grown), err)
	}
}
