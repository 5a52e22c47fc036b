package lite

import (
	"testing"
	"time"

	"github.com/xssnick/tonutils-go/tl"
	"github.com/xssnick/tonutils-go/ton"
)

// FuzzAnswer feeds answers to everything that reads them: whatever a liteserver sends
// is an error, and never a panic.
func FuzzAnswer(f *testing.F) {
	id := BlockID{SeqNo: 7}
	for _, message := range []tl.Serializable{
		ton.MasterchainInfo{Last: id.ext(), StateRootHash: make([]byte, 32), Init: &ton.ZeroStateIDExt{RootHash: make([]byte, 32), FileHash: make([]byte, 32)}},
		ton.LSError{Code: 651, Text: "no"},
		ton.BlockHeader{ID: id.ext(), HeaderProof: []byte{1}},
		ton.AccountState{ID: id.ext(), Shard: id.ext()},
		ton.RunMethodResult{Mode: 3, ID: id.ext(), ShardBlock: id.ext()},
		ton.ConfigAll{ID: id.ext(), StateProof: []byte{1}, ConfigProof: []byte{2}},
		ton.PartialBlockProof{From: id.ext(), To: id.ext(), Steps: []any{
			ton.BlockLinkForward{From: id.ext(), To: id.ext(), DestProof: []byte{1}, ConfigProof: []byte{2}, SignatureSet: ton.SignatureSet{}},
		}},
	} {
		b, err := tl.Serialize(message, true)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		head := Head{Block: id}
		if _, err := verifyAccount(head, Address{}, answer); err == nil {
			t.Error("an account")
		}
		if _, err := verifyMethod(head, Address{}, [32]byte{}, answer); err == nil {
			t.Error("a method")
		}
		if _, err := verifyConfig(head, answer, []int32{18}); err == nil {
			t.Error("a configuration")
		}
		if _, err := VerifyChain(BlockID{SeqNo: 1}, id, -239, [][]byte{answer}, time.Hour, time.Now()); err == nil {
			t.Error("a chain")
		}
		if _, err := VerifyChain(id, id, -239, [][]byte{answer}, time.Hour, time.Now()); err == nil {
			t.Error("a header")
		}
		parse[ton.MasterchainInfo](answer)
		parse[ton.SendMessageStatus](answer)
	})
}

// FuzzFrame reads what frames an answer.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{3, 1, 2, 3})
	f.Add([]byte{0xfe, 0, 1, 0})
	f.Add([]byte{0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := tlBytes(b); err == nil && len(got) > len(b) {
			t.Errorf("%d bytes out of %d", len(got), len(b))
		}
	})
}
