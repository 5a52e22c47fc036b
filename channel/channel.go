// Package channel opens, reads, claims and closes payment channels on TON. A payer
// deposits once and then signs vouchers (package voucher), of which none goes to
// the chain but those that the payee claims.
//
// What is read of a channel is proved (package lite): its code, its terms, what it
// holds, how much of that has been claimed, whether it is closing.
package channel

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// Errors of channels.
var (
	ErrNoChannel  = errors.New("the channel is not there: it is closed, or was never opened")
	ErrNotChannel = errors.New("the contract is not a payment channel")
	ErrNotOpen    = errors.New("the channel is not open")
	ErrClosing    = errors.New("the channel is closing")
	ErrNetwork    = errors.New("the channel is for another network")
	ErrPayee      = errors.New("the channel pays somebody else")
	ErrPayer      = errors.New("the channel is somebody else's")
	ErrDelay      = errors.New("the channel's delay is too short")
	ErrCover      = errors.New("the channel holds too little")
)

// CodeHash is the hash of the code that every channel has.
var CodeHash = [32]byte(contract.ChannelCode().Hash())

// Terms are what is fixed with a channel's address.
type Terms = contract.ChannelTerms

// NewSalt makes a salt for a new channel. One that was used before makes vouchers of
// the old channel good for the new one.
func NewSalt() uint64 { return contract.NewSalt() }

// Address is where the channel of these terms is.
func Address(t Terms) lite.Address {
	a, err := lite.AddressOf(contract.ChannelAddress(t))
	if err != nil {
		panic(err) // it is in the basechain
	}
	return a
}

// State is a channel as it was proved.
type State struct {
	contract.ChannelState
	Address lite.Address
	Balance uint64 // nanotons
	Block   lite.BlockID
	Time    time.Time // of the block
}

// Cover is the largest total in nanotons that a voucher may have, so that the
// contract pays it also after some years' rent.
func (s *State) Cover() uint64 {
	free := uint64(0)
	if s.Balance > contract.ChannelRent {
		free = s.Balance - contract.ChannelRent
	}
	if free > math.MaxUint64-s.Claimed {
		return math.MaxUint64
	}
	return s.Claimed + free
}

// FinishAt is when the payer may take the rest of a closing channel; zero of one
// that is not closing.
func (s *State) FinishAt() time.Time {
	if s.Status != contract.ChannelClosing {
		return time.Time{}
	}
	return time.Unix(int64(s.ClosingAt), 0).UTC()
}

// Read proves a channel as of a view. The error is ErrNoChannel if every liteserver
// shows that there is no contract at the address, and ErrNotChannel if there is
// another one.
func Read(ctx context.Context, view *lite.View, a lite.Address) (*State, error) {
	account, err := view.Method(ctx, a, CodeHash, "channel")
	if absent(err) {
		return nil, fmt.Errorf("%w: %s", ErrNoChannel, a)
	}
	if errors.Is(err, lite.ErrCode) {
		return nil, fmt.Errorf("%w: %w", ErrNotChannel, err)
	}
	if err != nil {
		return nil, err
	}
	return readState(account)
}

// absent reports whether all that were asked say that there is no contract. One
// alone may hide it.
func absent(err error) bool {
	failures, ok := errors.AsType[lite.Failures](err)
	if !ok || len(failures) == 0 {
		return false
	}
	for _, f := range failures {
		if !errors.Is(f.Err, lite.ErrNoAccount) && !errors.Is(f.Err, lite.ErrInactive) {
			return false
		}
	}
	return true
}

// readState reads an account whose code is a channel's.
func readState(account *lite.Account) (*State, error) {
	s, err := contract.Channel(account.Data).Channel()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotChannel, err)
	}
	// The code could have been put there with any state to begin with, such as one
	// that is open and was never paid for.
	if Address(s.ChannelTerms) != account.Address {
		return nil, fmt.Errorf("%w: %s did not begin as one with its terms", ErrNotChannel, account.Address)
	}
	return &State{
		ChannelState: s, Address: account.Address, Balance: account.Balance,
		Block: account.Head.Block, Time: time.Unix(int64(account.Head.Time), 0).UTC(),
	}, nil
}

// A Demand is what a payee demands of a channel before it serves on it.
type Demand struct {
	GlobalID int32
	Payee    lite.Address
	MinDelay time.Duration // for the payee to claim when the payer closes
	MinCover uint64        // nanotons that the channel must hold beyond what is claimed
}

// Check says why a payee must not rely on a channel, or nil.
func (d Demand) Check(s *State) error {
	switch {
	case s.GlobalID != d.GlobalID:
		return fmt.Errorf("%w: global id %d, not %d", ErrNetwork, s.GlobalID, d.GlobalID)
	case s.Payee != d.Payee.ID:
		return fmt.Errorf("%w: %s, not %s", ErrPayee, lite.Address{ID: s.Payee}, d.Payee)
	case s.Status == contract.ChannelClosing:
		return fmt.Errorf("%w: the payer can take the rest from %s on", ErrClosing, s.FinishAt().Format(time.RFC3339))
	case s.Status != contract.ChannelOpen:
		return fmt.Errorf("%w: it is %s", ErrNotOpen, s.Status)
	case time.Duration(s.Delay)*time.Second < d.MinDelay:
		return fmt.Errorf("%w: %v; open one with %v", ErrDelay, time.Duration(s.Delay)*time.Second, d.MinDelay)
	case s.Cover()-s.Claimed < d.MinCover:
		return fmt.Errorf("%w: vouchers for %d nanotons more, and %d are demanded; top it up", ErrCover, s.Cover()-s.Claimed, d.MinCover)
	}
	return voucher.CheckKey(s.PayerKey)
}

// CheckVoucher says why the contract would not pay a voucher, or nil.
func (s *State) CheckVoucher(v voucher.Voucher) error {
	switch {
	case s.Status == contract.ChannelNew:
		return ErrNotOpen
	case v.GlobalID != s.GlobalID:
		return voucher.ErrNetwork
	case v.Channel != voucher.Channel(s.Address.ID):
		return voucher.ErrChannel
	case v.Total <= s.Claimed:
		return fmt.Errorf("%w: %d, and %d have been claimed", voucher.ErrStale, v.Total, s.Claimed)
	case v.Total-s.Claimed > s.Balance:
		return fmt.Errorf("%w: the voucher adds %d nanotons, the channel has %d", ErrCover, v.Total-s.Claimed, s.Balance)
	}
	return v.Verify(s.PayerKey)
}
