package lite

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/xssnick/tonutils-go/ton"
)

// A BlockID names a block of the masterchain.
type BlockID struct {
	SeqNo    uint32   `json:"seqno"`
	RootHash [32]byte `json:"-"`
	FileHash [32]byte `json:"-"`
}

type blockIDText struct {
	Workchain *int32 `json:"workchain,omitempty"`
	Shard     *int64 `json:"shard,omitempty"`
	SeqNo     uint32 `json:"seqno"`
	RootHash  []byte `json:"root_hash"`
	FileHash  []byte `json:"file_hash"`
}

// MarshalJSON writes a block id as global configs have it.
func (b BlockID) MarshalJSON() ([]byte, error) {
	workchain, shard := int32(masterchain), int64(wholeShard)
	return json.Marshal(blockIDText{&workchain, &shard, b.SeqNo, b.RootHash[:], b.FileHash[:]})
}

// UnmarshalJSON reads what MarshalJSON writes.
func (b *BlockID) UnmarshalJSON(data []byte) error {
	var t blockIDText
	if err := json.Unmarshal(data, &t); err != nil {
		return err
	}
	if t.Workchain != nil && *t.Workchain != masterchain || t.Shard != nil && *t.Shard != wholeShard {
		return errors.New("a block id that is not of the masterchain")
	}
	if len(t.RootHash) != 32 || len(t.FileHash) != 32 {
		return errors.New("a block id whose hashes do not have 32 bytes")
	}
	*b = BlockID{t.SeqNo, [32]byte(t.RootHash), [32]byte(t.FileHash)}
	return nil
}

// String is SEQNO:ROOTHASH:FILEHASH in hexadecimal, which ParseBlockID reads.
func (b BlockID) String() string { return fmt.Sprintf("%d:%x:%x", b.SeqNo, b.RootHash, b.FileHash) }

// ParseBlockID reads SEQNO:ROOTHASH:FILEHASH.
func ParseBlockID(s string) (b BlockID, err error) {
	bad := fmt.Errorf("%q is not a block: write SEQNO:ROOTHASH:FILEHASH, hashes in hexadecimal", s)
	fields := strings.Split(s, ":")
	if len(fields) != 3 {
		return b, bad
	}
	seqno, err := strconv.ParseUint(fields[0], 10, 32)
	if err != nil {
		return b, bad
	}
	root, err := hex.DecodeString(fields[1])
	if err != nil || len(root) != 32 {
		return b, bad
	}
	file, err := hex.DecodeString(fields[2])
	if err != nil || len(file) != 32 {
		return b, bad
	}
	return BlockID{uint32(seqno), [32]byte(root), [32]byte(file)}, nil
}

const (
	masterchain = -1
	wholeShard  = -1 << 63
)

func (b BlockID) ext() *ton.BlockIDExt {
	return &ton.BlockIDExt{
		Workchain: masterchain, Shard: wholeShard, SeqNo: b.SeqNo,
		RootHash: bytes.Clone(b.RootHash[:]), FileHash: bytes.Clone(b.FileHash[:]),
	}
}

// blockID takes an id from a liteserver.
func blockID(e *ton.BlockIDExt) (b BlockID, err error) {
	if e == nil || len(e.RootHash) != 32 || len(e.FileHash) != 32 {
		return b, errors.New("a block id that is not whole")
	}
	if e.Workchain != masterchain || e.Shard != wholeShard {
		return b, fmt.Errorf("a block of workchain %d where one of the masterchain belongs", e.Workchain)
	}
	return BlockID{e.SeqNo, [32]byte(e.RootHash), [32]byte(e.FileHash)}, nil
}

// A Liteserver answers queries. It is trusted with nothing.
type Liteserver struct {
	Address string // HOST:PORT
	Key     ed25519.PublicKey
}

// A Network is a TON network, and the key block that all its state is proved from.
type Network struct {
	Name        string
	GlobalID    int32
	KeyBlock    BlockID
	Liteservers []Liteserver
}

// Known networks, by name. The key blocks are those of the public global configs,
// which others have published as well.
var known = map[string]Network{
	"mainnet": {Name: "mainnet", GlobalID: -239, KeyBlock: mustBlock(46894135,
		"MEjmmhLPlG68mbTPnKYcP/Sz/MiMQBV2OsASBOzBv58=", "u9rAtFQ+kUFEnOs3w8Y7punMTiyQTXf1bRfkSs8dG+0=")},
	"testnet": {Name: "testnet", GlobalID: -3, KeyBlock: mustBlock(17908219,
		"y6qWqhCnLgzWHjUFmXysaiOljuK5xVoCRMLzUwGInVM=", "Y/GziXxwuYte0AM4WT7tTWsCx+6rcfLpGmRaEQwhUKI=")},
}

func mustBlock(seqno uint32, root, file string) BlockID {
	b := BlockID{SeqNo: seqno}
	for text, to := range map[string]*[32]byte{root: &b.RootHash, file: &b.FileHash} {
		hash, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			panic(err)
		}
		*to = [32]byte(hash)
	}
	return b
}

// Known returns a network by its name, mainnet or testnet; it has no liteservers
// yet.
func Known(name string) (Network, bool) {
	n, ok := known[name]
	return n, ok
}

// maxLiteservers bounds how many liteservers of a file are used.
const maxLiteservers = 64

// ReadGlobalConfig takes liteservers from a global config file. Of a network with a
// key block nothing else is taken from it; else its init block is trusted, which
// makes the file as good as the network.
func (n *Network) ReadGlobalConfig(data []byte) error {
	var file struct {
		Liteservers []struct {
			IP   int64 `json:"ip"`
			Port int   `json:"port"`
			ID   struct {
				Type string `json:"@type"`
				Key  []byte `json:"key"`
			} `json:"id"`
		} `json:"liteservers"`
		Validator struct {
			InitBlock *BlockID `json:"init_block"`
		} `json:"validator"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return fmt.Errorf("the global config: %w", err)
	}
	for i, s := range file.Liteservers {
		if len(n.Liteservers) == maxLiteservers {
			break
		}
		if len(s.ID.Key) != ed25519.PublicKeySize || s.Port < 1 || s.Port > 65535 || s.IP != int64(int32(s.IP)) && s.IP != int64(uint32(s.IP)) {
			return fmt.Errorf("the global config: liteserver %d is malformed", i)
		}
		var ip [4]byte
		binary.BigEndian.PutUint32(ip[:], uint32(s.IP))
		n.Liteservers = append(n.Liteservers, Liteserver{
			net.JoinHostPort(net.IP(ip[:]).String(), strconv.Itoa(s.Port)), s.ID.Key,
		})
	}
	if len(n.Liteservers) == 0 {
		return errors.New("the global config has no liteservers")
	}
	if n.KeyBlock.SeqNo == 0 {
		if file.Validator.InitBlock == nil || file.Validator.InitBlock.SeqNo == 0 {
			return errors.New("the global config has no init block, and no key block is given to prove from")
		}
		n.KeyBlock = *file.Validator.InitBlock
	}
	return nil
}
