package main

import (
	"testing"

	"chrysalis/agent/gpu/protocol"
)

// FuzzRequest reads a line of the agent.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":1,"op":"inventory"}`))
	f.Add([]byte(`{"version":1,"id":2,"op":"attest","gpu":0,"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	n := newLibrary("/nowhere")
	f.Fuzz(func(t *testing.T, line []byte) {
		if a := answer(line, n); a.Code == protocol.CodeOK {
			t.Errorf("%+v without a library", a)
		}
	})
}
