package contract

import (
	"crypto/rand"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"

	"chrysalis/channel/voucher"
)

//go:embed channel.boc
var channelCode []byte

// ChannelVersion is what the channel's get-method version returns.
const ChannelVersion = 1

// Amounts of channel.tolk in nanotons.
const (
	// MinDifference is what a voucher must add to what has been claimed, so that an
	// external message can claim it.
	MinDifference = 10_000_000
	// ChannelRent is what a channel must be opened with at least. It pays for the
	// storage of some six years; a voucher should leave it in the channel.
	ChannelRent = 10_000_000
)

// ChannelCode is the code of a payment channel.
func ChannelCode() *cell.Cell { return mustParse(channelCode) }

// ChannelTerms are what is fixed with a channel's address. Accounts are in the
// basechain.
type ChannelTerms struct {
	PayerKey voucher.Key // signs vouchers
	Payer    [32]byte    // account that opens, begins to close and gets the rest
	Payee    [32]byte    // account that is paid
	Salt     uint64      // tells one channel from the others between the two; must never be used again
	Delay    uint32      // seconds from the beginning of a closing by the payer to its end
	GlobalID int32       // of the network
}

// NewSalt makes a salt that nobody has used.
func NewSalt() uint64 {
	var b [8]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint64(b[:])
}

// ChannelStateInit is what the first message to a channel brings along.
func ChannelStateInit(t ChannelTerms) *tlb.StateInit {
	return &tlb.StateInit{Code: ChannelCode(), Data: channelData(ChannelState{ChannelTerms: t})}
}

func channelData(s ChannelState) *cell.Cell {
	return cell.BeginCell().
		MustStoreUInt(uint64(s.Status), 2).
		MustStoreUInt(s.Claimed, 64).
		MustStoreUInt(s.ClosingAt, 40).
		MustStoreSlice(s.PayerKey[:], 256).
		MustStoreSlice(s.Payer[:], 256).
		MustStoreSlice(s.Payee[:], 256).
		MustStoreUInt(s.Salt, 64).
		MustStoreUInt(uint64(s.Delay), 32).
		MustStoreInt(int64(s.GlobalID), 32).
		EndCell()
}

// ChannelAddress is where the channel of these terms is.
func ChannelAddress(t ChannelTerms) *address.Address { return addressOf(ChannelStateInit(t)) }

const (
	opOpenChannel   = 0x43430001
	opClaim         = 0x43430002
	opCloseChannel  = 0x43430003
	opBeginClose    = 0x43430004
	opFinishClose   = 0x43430005
	opExternalClaim = 0x43430006
)

// Operations of the messages that the channel sends.
const (
	OpPaid          = 0x43430010 // to the payee; 64 bits follow, the voucher's total
	OpChannelClosed = 0x43430011 // to the payer; 64 bits follow, what has been claimed
)

// OpenChannel opens a channel with what is attached.
func OpenChannel(queryID uint64) *cell.Cell { return begin(opOpenChannel, queryID).EndCell() }

func storeVoucher(b *cell.Builder, v voucher.Voucher) *cell.Builder {
	return b.MustStoreInt(int64(v.GlobalID), 32).
		MustStoreSlice(v.Channel[:], 256).
		MustStoreUInt(v.Total, 64).
		MustStoreSlice(v.Signature[:], 512)
}

// Claim has the payee paid what a voucher adds, by an internal message of anyone.
func Claim(queryID uint64, v voucher.Voucher) *cell.Cell {
	return storeVoucher(begin(opClaim, queryID), v).EndCell()
}

// CloseChannel closes a channel at once, for the payee, with a last voucher or nil.
func CloseChannel(queryID uint64, last *voucher.Voucher) *cell.Cell {
	b := begin(opCloseChannel, queryID).MustStoreBoolBit(last != nil)
	if last != nil {
		storeVoucher(b, *last)
	}
	return b.EndCell()
}

// BeginClose begins to close a channel, for the payer.
func BeginClose(queryID uint64) *cell.Cell { return begin(opBeginClose, queryID).EndCell() }

// FinishClose closes a channel once the delay is over, for the payer.
func FinishClose(queryID uint64) *cell.Cell { return begin(opFinishClose, queryID).EndCell() }

// TopUp adds what is attached to the deposit, by anyone.
func TopUp() *cell.Cell { return cell.BeginCell().EndCell() }

// ExternalClaim is an external message that has the payee paid what a voucher adds,
// less the fees. Anyone may send it.
func ExternalClaim(v voucher.Voucher) *cell.Cell {
	body := storeVoucher(cell.BeginCell().MustStoreUInt(opExternalClaim, 32), v).EndCell()
	// The contract wants the body in a cell of its own, so that the fee is known.
	return cell.BeginCell().
		MustStoreUInt(0b10, 2). // ext_in_msg_info$10
		MustStoreUInt(0, 2).    // from nowhere
		MustStoreAddr(address.NewAddress(0, 0, v.Channel[:])).
		MustStoreUInt(0, 4). // no import fee is offered
		MustStoreBoolBit(false).
		MustStoreBoolBit(true).
		MustStoreRef(body).
		EndCell()
}

var channelExitCodes = map[int32]string{
	200: "the sender is not the channel's payer",
	201: "the sender is not the channel's payee",
	202: "the channel has not been opened",
	203: "the channel is open already",
	204: "the channel is closing",
	205: "the channel's delay is not over; the payer must begin to close it, and wait",
	206: "the voucher or the channel is for another network",
	207: "the voucher is for another channel",
	208: "the voucher's signature is not by the channel's key",
	209: "the voucher is for no more than has been claimed",
	210: "the voucher adds too little to be claimed by an external message",
	211: "the value attached does not pay for the gas, or for the channel's rent",
	212: "the voucher is for more than the channel holds",
	213: "the external message is larger than a claim is",
}

// ExplainChannel says in words why a channel refused a message.
func ExplainChannel(exitCode int32) string { return explain(channelExitCodes, exitCode) }

// ChannelStatus is how far a channel is. There is no status after it is closed: the
// contract is gone.
type ChannelStatus uint8

// The statuses.
const (
	ChannelNew     ChannelStatus = iota // made, not opened: nothing counts
	ChannelOpen                         // vouchers are paid
	ChannelClosing                      // vouchers are paid until the payer finishes
)

var channelStatusNames = [...]string{ChannelNew: "not opened", ChannelOpen: "open", ChannelClosing: "closing"}

func (s ChannelStatus) String() string {
	if int(s) >= len(channelStatusNames) {
		return fmt.Sprintf("status %d", uint8(s))
	}
	return channelStatusNames[s]
}

// ChannelState is what a channel stores.
type ChannelState struct {
	ChannelTerms
	Status    ChannelStatus
	Claimed   uint64 // nanotons
	ClosingAt uint64 // Unix time in seconds from which the payer may finish; 0 unless it is closing
}

// Channel runs the methods of a channel on its data.
func Channel(data *cell.Cell) Methods { return Methods{ChannelCode(), data} }

// Channel returns what the channel stores.
func (m Methods) Channel() (s ChannelState, err error) {
	values, err := m.call("channel")
	if err != nil {
		return s, err
	}
	if len(values) == 9 {
		// The last one is the only number with a sign.
		if s.GlobalID, err = signed32(values[8]); err != nil {
			return s, err
		}
		values = values[:8]
	}
	r := reader{values: values}
	s.Status, s.Claimed, s.ClosingAt = ChannelStatus(r.uint(2)), r.uint(64), r.uint(40)
	s.PayerKey, s.Payer, s.Payee = r.hash(), r.hash(), r.hash()
	s.Salt, s.Delay = r.uint(64), uint32(r.uint(32))
	if err := r.end("channel"); err != nil {
		return ChannelState{}, err
	}
	switch {
	case s.Status > ChannelClosing:
		err = fmt.Errorf("channel: its status is %d", s.Status)
	case s.Status == ChannelOpen && s.ClosingAt != 0, s.Status == ChannelNew && (s.Claimed != 0 || s.ClosingAt != 0):
		err = errors.New("channel: its state contradicts itself")
	}
	if err != nil {
		return ChannelState{}, err
	}
	return s, nil
}
