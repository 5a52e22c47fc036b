package gpu

import (
	"testing"

	"chrysalis/agent/gpu/protocol"
)

// FuzzAnswer reads a line of the helper, which lives on the engine disk.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"id":1,"code":"ok","gpus":[{"index":0,"name":"H100"}]}`), uint8(0))
	f.Add([]byte(`{"id":1,"code":"ok","system":{"cc":true}}`), uint8(1))
	f.Add([]byte(`{"id":1,"code":"failed","detail":"x"}`), uint8(2))
	ops := []protocol.Op{protocol.OpInventory, protocol.OpSystem, protocol.OpAttest, protocol.OpHealth, protocol.OpSetReady}
	f.Fuzz(func(t *testing.T, line []byte, op uint8) {
		r := &protocol.Request{Version: protocol.Version, ID: 1, Op: ops[int(op)%len(ops)], Nonce: make([]byte, protocol.NonceSize)}
		if a, err := parseAnswer(line, r); err == nil && (a.ID != 1 || len(a.GPUs) > protocol.MaxGPUs) {
			t.Errorf("%+v", a)
		}
	})
}
