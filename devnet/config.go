package devnet

import (
	"crypto/ed25519"
	"fmt"
	"math/big"

	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

// DefaultGlobalID is the network id of a devnet. Those of real networks are
// -239 and -3; a message that is signed for one network is no good on another.
const DefaultGlobalID = -7077

// fees are the prices of the mainnet's basechain in June 2026, and its limits.
// Prices per gas, bit and cell are in nanotons times 65536; those of storage
// are per second as well.
var (
	gasPrices = tlb.ConfigGasLimitsPrices{
		HasFlatPricing: true, FlatGasLimit: 100, FlatGasPrice: 6667,
		HasSeparateSpecialLimit: true,
		GasPrice:                4369067, GasLimit: 1_000_000, SpecialGasLimit: 1_000_000, GasCredit: 10_000,
		BlockGasLimit: 10_000_000, FreezeDueLimit: 100_000_000, DeleteDueLimit: 1_000_000_000,
	}
	forwardPrices = tlb.ConfigMsgForwardPrices{
		LumpPrice: 66667, BitPrice: 4369067, CellPrice: 436906667,
		IHRFactor: 98304, FirstFrac: 21845, NextFrac: 21845,
	}
	storagePrices = tlb.ConfigStoragePrices{BitPrice: 0, CellPrice: 135, MCBitPrice: 1000, MCCellPrice: 500_000}
)

// Config makes a blockchain configuration that is enough for wallets, contracts
// and light clients, with these validators, all of the same weight.
func Config(globalID int32, validators []ed25519.PublicKey) (*cell.Cell, error) {
	params := cell.NewDict(32)
	var failed error
	set := func(id int64, value any) {
		c, ok := value.(*cell.Cell)
		if !ok {
			var err error
			if c, err = tlb.ToCell(value); err != nil && failed == nil {
				failed = fmt.Errorf("parameter %d: %w", id, err)
				return
			}
		}
		if err := params.SetIntKey(big.NewInt(id), cell.BeginCell().MustStoreRef(c).EndCell()); err != nil && failed == nil {
			failed = fmt.Errorf("parameter %d: %w", id, err)
		}
	}

	// The configuration's own address, which nothing lives at here.
	set(0, cell.BeginCell().MustStoreSlice(configAddress[:], 256).EndCell())
	// The version of the TVM, and the capabilities of the mainnet.
	set(8, cell.BeginCell().MustStoreUInt(0xc4, 8).MustStoreUInt(14, 32).MustStoreUInt(0x3ee, 64).EndCell())
	set(12, workchains())
	prices := cell.NewDict(32)
	price, err := tlb.ToCell(storagePrices)
	if err != nil {
		return nil, err
	}
	if err := prices.SetIntKey(big.NewInt(0), price); err != nil {
		return nil, err
	}
	set(18, prices.AsCell())
	set(19, cell.BeginCell().MustStoreInt(int64(globalID), 32).EndCell())
	for _, id := range []int64{20, 21} {
		set(id, gasPrices)
	}
	for _, id := range []int64{24, 25} {
		set(id, forwardPrices)
	}
	set(28, tlb.CatchainConfigV2{
		ShuffleMcValidators: true, McCatchainLifetime: 250, ShardCatchainLifetime: 250, ShardValidatorsLifetime: 1000, ShardValidatorsNum: 1,
	})
	set(34, validatorSet(validators))
	if failed != nil {
		return nil, failed
	}
	return params.AsCell(), nil
}

var configAddress = [32]byte{0: 0x55, 31: 0x55}

// workchains describes the basechain (parameter 12).
func workchains() *cell.Cell {
	w, err := tlb.ToCell(tlb.WorkchainDescrV1{WorkchainDescrFields: tlb.WorkchainDescrFields{
		MaxSplit: 60, Basic: true, Active: true, AcceptMsgs: true,
		ZeroStateRootHash: make([]byte, 32), ZeroStateFileHash: make([]byte, 32),
		Format: tlb.WorkchainFormatBasic{VMVersion: -1},
	}})
	if err != nil {
		panic(err) // a constant
	}
	d := cell.NewDict(32)
	if err := d.SetIntKey(big.NewInt(0), w); err != nil {
		panic(err)
	}
	return cell.BeginCell().MustStoreDict(d).EndCell()
}

// weight is a validator's; their sum stays far below 2⁶³.
const weight = 1 << 40

// maxMain is how many validators sign masterchain blocks, as on the mainnet.
const maxMain = 100

func validatorSet(keys []ed25519.PublicKey) tlb.ValidatorSetExt {
	list := cell.NewDict(16)
	for i, key := range keys {
		v, err := tlb.ToCell(validatorAddr(key))
		if err != nil {
			panic(err)
		}
		if err := list.SetIntKey(big.NewInt(int64(i)), v); err != nil {
			panic(err)
		}
	}
	return tlb.ValidatorSetExt{
		UTimeUntil: 1<<32 - 1, Total: uint16(len(keys)), Main: uint16(min(len(keys), maxMain)),
		TotalWeight: uint64(len(keys)) * weight, List: list,
	}
}

func validatorAddr(key ed25519.PublicKey) tlb.ValidatorAddr {
	return tlb.ValidatorAddr{PublicKey: tlb.SigPubKeyED25519{Key: key}, Weight: weight, ADNLAddr: make([]byte, 32)}
}
