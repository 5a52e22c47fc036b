package lite

import (
	"testing"

	"github.com/xssnick/tonutils-go/tvm/cell"
)

// FuzzGlobalConfig reads a network's configuration file, and what a person writes.
func FuzzGlobalConfig(f *testing.F) {
	f.Add([]byte(`{"liteservers":[{"ip":1,"port":1,"id":{"key":"n4VDnSCUuSpjnCyUk9e3QOOd6o0ItSWYbTnW3Wnn8wk="}}],"validator":{"init_block":{"seqno":1,"root_hash":"AA==","file_hash":"AA=="}}}`), "1:00:00")
	f.Fuzz(func(t *testing.T, data []byte, text string) {
		var n Network
		if n.ReadGlobalConfig(data) == nil && len(n.Liteservers) > maxLiteservers {
			t.Errorf("%d liteservers", len(n.Liteservers))
		}
		if b, err := ParseBlockID(text); err == nil {
			if again, err := ParseBlockID(b.String()); err != nil || again != b {
				t.Errorf("%q: %v, %v", text, again, err)
			}
		}
		if a, err := ParseAddress(text); err == nil {
			if again, err := ParseAddress(a.String()); err != nil || again != a {
				t.Errorf("%q: %v, %v", text, again, err)
			}
		}
	})
}

// FuzzBOC reads bags of cells.
func FuzzBOC(f *testing.F) {
	f.Add(cell.BeginCell().MustStoreUInt(1, 8).MustStoreRef(cell.BeginCell().EndCell()).EndCell().ToBOC())
	f.Fuzz(func(t *testing.T, data []byte) {
		if cells, err := parseBOC(data, 1); err == nil && len(cells) != 1 {
			t.Errorf("%d roots", len(cells))
		}
	})
}
