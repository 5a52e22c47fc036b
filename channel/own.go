package channel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/outfile"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// Own is the list of channels that a payer has opened, in a file. What is not in it is
// not lost: the money stays in the channel, but who would look for it?
type Own struct{ Path string }

// An OwnChannel is one of them.
type OwnChannel struct {
	Address  lite.Address `json:"address"`
	PayerKey registry.Key `json:"payer_key"` // public, signs vouchers
	Payer    lite.Address `json:"payer"`
	Payee    lite.Address `json:"payee"`
	Salt     uint64       `json:"salt"`
	Delay    uint32       `json:"delay_seconds"`
	GlobalID int32        `json:"global_id"`
	Added    time.Time    `json:"added"`
}

// maxOwn bounds the file in bytes.
const maxOwn = 16 << 20

// Terms are those of the channel.
func (c OwnChannel) Terms() Terms {
	return Terms{
		PayerKey: voucher.Key(c.PayerKey), Payer: c.Payer.ID, Payee: c.Payee.ID, Salt: c.Salt, Delay: c.Delay, GlobalID: c.GlobalID,
	}
}

// List reads the file; of none the list is empty.
func (o Own) List() ([]OwnChannel, error) {
	f, err := os.Open(o.Path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxOwn+1))
	if err == nil && len(data) > maxOwn {
		err = errors.New("it is too large")
	}
	var list []OwnChannel
	if err == nil {
		err = json.Unmarshal(data, &list)
	}
	if err != nil {
		return nil, fmt.Errorf("the list of channels %s: %w", o.Path, err)
	}
	for _, c := range list {
		if Address(c.Terms()) != c.Address {
			return nil, fmt.Errorf("the list of channels %s: %s is not the channel of its terms", o.Path, c.Address)
		}
	}
	return list, nil
}

// Add adds a channel durably, which is to be done before it is opened.
func (o Own) Add(t Terms, now time.Time) (lite.Address, error) {
	a := Address(t)
	return a, o.change(func(list []OwnChannel) []OwnChannel {
		if slices.ContainsFunc(list, func(c OwnChannel) bool { return c.Address == a }) {
			return list
		}
		return append(list, OwnChannel{
			a, registry.Key(t.PayerKey), lite.Address{ID: t.Payer}, lite.Address{ID: t.Payee}, t.Salt, t.Delay, t.GlobalID, now.UTC().Truncate(time.Second),
		})
	})
}

// Remove takes channels off the list.
func (o Own) Remove(gone ...lite.Address) error {
	return o.change(func(list []OwnChannel) []OwnChannel {
		return slices.DeleteFunc(list, func(c OwnChannel) bool { return slices.Contains(gone, c.Address) })
	})
}

func (o Own) change(do func([]OwnChannel) []OwnChannel) error {
	if err := os.MkdirAll(filepath.Dir(o.Path), 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(o.Path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	list, err := o.List()
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(do(list), "", "  ")
	if err != nil {
		return err
	}
	return outfile.Write(o.Path, append(data, '\n'), 0o600)
}
