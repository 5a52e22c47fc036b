package contract

import (
	"errors"

	"github.com/xssnick/tonutils-go/tvm/cell"
)

// snakeBytes is how many whole bytes fit into a cell of 1023 bits.
const snakeBytes = 127

var errSnake = errors.New("the bytes are not stored as a snake, or there are too many")

// Snake stores bytes in a chain of cells, all full but the last.
func Snake(data []byte) *cell.Cell {
	end := len(data) - len(data)%snakeBytes
	if end == len(data) && end > 0 {
		end -= snakeBytes
	}
	var next *cell.Cell
	for ; end >= 0; end -= snakeBytes {
		chunk := data[end:min(end+snakeBytes, len(data))]
		b := cell.BeginCell().MustStoreSlice(chunk, uint(len(chunk)*8))
		if next != nil {
			b.MustStoreRef(next)
		}
		next = b.EndCell()
	}
	return next
}

// Unsnake reads what Snake stored, at most limit bytes of it. A chain that Snake
// does not make is an error: the same bytes are always the same cells.
func Unsnake(c *cell.Cell, limit int) ([]byte, error) {
	var data []byte
	for c != nil {
		if c.IsSpecial() {
			return nil, errSnake
		}
		s, err := c.BeginParse()
		if err != nil {
			return nil, errSnake
		}
		bits, refs := s.BitsLeft(), s.RefsNum()
		if bits%8 != 0 || refs > 1 || refs == 1 && bits != snakeBytes*8 ||
			bits > snakeBytes*8 || len(data)+int(bits/8) > limit || bits == 0 && len(data) > 0 {
			return nil, errSnake
		}
		chunk, err := s.LoadSlice(bits)
		if err != nil {
			return nil, errSnake
		}
		data = append(data, chunk...)
		c = nil
		if refs == 1 {
			if c, err = s.LoadRefCell(); err != nil {
				return nil, errSnake
			}
		}
	}
	return data, nil
}
