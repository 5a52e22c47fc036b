package registry

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/ton/wallet"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/registry/lite"
)

// maxKeyFile bounds a key file in bytes.
const maxKeyFile = 4096

// LoadKey reads a private key from a file: the 24 words of a TON wallet, or a seed of
// 64 hexadecimal digits. Others than the owner must not be able to read the file.
func LoadKey(path string) (ed25519.PrivateKey, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("others can read the key in %s; run: chmod 600 %s", path, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("%s is too large for a key", path)
	}
	words := strings.Fields(string(data))
	if len(words) == 1 {
		seed, err := hex.DecodeString(words[0])
		if err != nil || len(seed) != ed25519.SeedSize {
			return nil, fmt.Errorf("%s holds neither 24 words nor a seed of 64 hexadecimal digits", path)
		}
		return ed25519.NewKeyFromSeed(seed), nil
	}
	key, err := wallet.SeedToPrivateKeyWithOptions(words)
	if err != nil {
		return nil, fmt.Errorf("the words in %s are not a TON wallet's: %w", path, err)
	}
	return key, nil
}

// NewKey makes a key and writes its seed to a file, which must not be there.
func NewKey(path string) (ed25519.PrivateKey, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	var seed [ed25519.SeedSize]byte
	rand.Read(seed[:])
	_, err = fmt.Fprintf(f, "%x\n", seed)
	return ed25519.NewKeyFromSeed(seed[:]), errors.Join(err, f.Sync(), f.Close())
}

// WalletVersions are the contracts that a wallet can be.
var WalletVersions = []string{"v4r2", "v5r1"}

// messageLife is how long a message may be executed after it was made.
const messageLife = 2 * time.Minute

// A Wallet pays for messages.
type Wallet struct {
	Address lite.Address

	key     ed25519.PrivateKey
	version string
	wallet  *wallet.Wallet
	code    [32]byte
	seqno   uint32
}

// NewWallet is the wallet of a key, of one of WalletVersions. That of version 5 has
// another address on each network.
func NewWallet(key ed25519.PrivateKey, version string, globalID int32) (*Wallet, error) {
	var config wallet.VersionConfig
	switch version {
	case "v4r2":
		config = wallet.V4R2
	case "v5r1":
		config = wallet.ConfigV5R1Final{NetworkGlobalID: globalID}
	default:
		return nil, fmt.Errorf("there is no wallet version %q; there are %s", version, strings.Join(WalletVersions, " and "))
	}
	inner, err := wallet.FromPrivateKeyWithOptions(key, config)
	if err != nil {
		return nil, err
	}
	w := &Wallet{key: key, version: version, wallet: inner}
	fetch := func(context.Context, uint32) (uint32, error) { return w.seqno, nil }
	switch spec := inner.GetSpec().(type) {
	case *wallet.SpecV4R2:
		spec.SetSeqnoFetcher(fetch)
		spec.SetMessagesTTL(uint32(messageLife / time.Second))
	case *wallet.SpecV5R1Final:
		spec.SetSeqnoFetcher(fetch)
		spec.SetMessagesTTL(uint32(messageLife / time.Second))
	default:
		return nil, fmt.Errorf("the library's wallet %s is of type %T", version, spec)
	}
	init, err := wallet.GetStateInit(key.Public().(ed25519.PublicKey), config, inner.GetSubwalletID())
	if err != nil {
		return nil, err
	}
	w.code = [32]byte(init.Code.Hash())
	w.Address, err = lite.AddressOf(inner.WalletAddress())
	return w, err
}

// readSeqno is the number of the wallet's next message.
func (w *Wallet) readSeqno(a *lite.Account) (seqno uint32, err error) {
	if !a.Active {
		return 0, nil
	}
	if a.Code != w.code {
		return 0, fmt.Errorf("%w: the account %s is not a wallet %s", lite.ErrCode, w.Address, w.version)
	}
	s, err := a.Data.BeginParse()
	if err != nil {
		return 0, err
	}
	if w.version == "v5r1" {
		if _, err := s.LoadBoolBit(); err != nil {
			return 0, err
		}
	}
	v, err := s.LoadUInt(32)
	return uint32(v), err
}

// MaxBatch is how many messages the wallet can send at once.
func (w *Wallet) MaxBatch() int {
	if w.version == "v4r2" {
		return 4
	}
	return 255
}

// message signs an external message that has the wallet send others.
func (w *Wallet) message(ctx context.Context, seqno uint32, deploy bool, outs []*tlb.InternalMessage) (*cell.Cell, error) {
	w.seqno = seqno
	var list []*wallet.Message
	for _, out := range outs {
		list = append(list, &wallet.Message{Mode: wallet.PayGasSeparately + wallet.IgnoreErrors, InternalMessage: out})
	}
	external, err := w.wallet.PrepareExternalMessageForMany(ctx, deploy, list)
	if err != nil {
		return nil, err
	}
	return tlb.ToCell(external)
}
