package till

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"chrysalis/channel"
	"chrysalis/channel/voucher"
	"chrysalis/registry"
	"chrysalis/registry/contract"
	"chrysalis/registry/lite"
)

// Network says how to reach a network, for a process that runs for months.
type Network struct {
	Network      lite.Network  `json:"network"`                 // with the liteservers that there were
	GlobalConfig string        `json:"global_config,omitempty"` // is read again where none of them answers
	Memory       string        `json:"memory,omitempty"`        // the file that says what was seen
	MaxAge       time.Duration `json:"max_age_ns"`
	Servers      int           `json:"servers"`
}

// Open makes a client, of the liteservers that there are now.
func (n Network) Open() (*lite.Client, error) {
	network := n.Network
	if data, err := os.ReadFile(n.GlobalConfig); err == nil && n.GlobalConfig != "" {
		again := network
		again.Liteservers = nil
		if again.ReadGlobalConfig(data) == nil {
			network = again
		}
	}
	o := lite.Options{MaxAge: n.MaxAge, Servers: n.Servers}
	if n.Memory != "" {
		o.Memory = lite.FileMemory(n.Memory)
	}
	return lite.New(network, o)
}

// TON is the chain. Claims are external messages, which need no wallet: their fees
// come out of what the payee gets.
type TON struct {
	// Connect makes a client; it is called again where nothing could be read a few times.
	Connect func() (*lite.Client, error)
	// Wallet, if it is not nil, pays for claims, many with one message.
	Wallet func(*lite.Client) (*registry.Publisher, error)
	Payee  lite.Address

	mu     sync.Mutex
	client *lite.Client
	failed int
}

const (
	reconnect    = 3 // failures in a row
	readers      = 8
	claimers     = 4
	claimPatient = 90 * time.Second
)

func (n *TON) connected() (*lite.Client, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client == nil {
		client, err := n.Connect()
		if err != nil {
			return nil, err
		}
		n.client = client
	}
	return n.client, nil
}

// went notes whether the network could be read.
func (n *TON) went(client *lite.Client, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil || n.client != client {
		n.failed = 0
		return
	}
	if n.failed++; n.failed >= reconnect {
		n.client.Close()
		n.client, n.failed = nil, 0
	}
}

// Close closes the client.
func (n *TON) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client != nil {
		n.client.Close()
		n.client = nil
	}
}

// each does something for each index, a few at a time.
func each(count, workers int, do func(int)) {
	next := make(chan int)
	var wait sync.WaitGroup
	for range min(count, workers) {
		wait.Go(func() {
			for i := range next {
				do(i)
			}
		})
	}
	for i := range count {
		next <- i
	}
	close(next)
	wait.Wait()
}

// Do does something else with the network.
func (n *TON) Do(do func(*lite.Client) error) error {
	client, err := n.connected()
	if err != nil {
		return err
	}
	return do(client)
}

// Read implements Chain.
func (n *TON) Read(ctx context.Context, ids []voucher.Channel) ([]Reading, error) {
	client, err := n.connected()
	if err != nil {
		return nil, err
	}
	view, err := client.Sync(ctx)
	if n.went(client, err); err != nil {
		return nil, err
	}
	list := make([]Reading, len(ids))
	each(len(ids), readers, func(i int) {
		mine := *view // it notes failures
		mine.Failures = nil
		list[i].State, list[i].Err = channel.Read(ctx, &mine, lite.Address{ID: ids[i]})
	})
	return list, nil
}

// Least implements Chain.
func (n *TON) Least() uint64 {
	if n.Wallet != nil {
		return 1
	}
	return contract.MinDifference
}

// Claim implements Chain.
func (n *TON) Claim(ctx context.Context, vouchers []voucher.Voucher) []Claimed {
	list := make([]Claimed, len(vouchers))
	client, err := n.connected()
	if err != nil {
		for i := range list {
			list[i].Err = err
		}
		return list
	}
	if n.Wallet != nil {
		if err = n.batch(ctx, client, vouchers, list); err != nil {
			for i := range list {
				if list[i].Err == nil {
					list[i].Err = err
				}
			}
		}
		return list
	}
	each(len(vouchers), claimers, func(i int) {
		list[i].Fees, list[i].Err = external(ctx, client, vouchers[i])
	})
	return list
}

// external claims without a wallet.
func external(ctx context.Context, client *lite.Client, v voucher.Voucher) (fees uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimPatient)
	defer cancel()
	view, err := client.Sync(ctx)
	if err != nil {
		return 0, err
	}
	s, err := channel.Read(ctx, view, lite.Address{ID: v.Channel})
	if err != nil {
		return 0, err
	}
	got, err := channel.ClaimExternal(ctx, client, v)
	if err != nil {
		return 0, err
	}
	if paid := v.Total - s.Claimed; v.Total > s.Claimed && paid > got {
		fees = paid - got
	}
	return fees, nil
}

// batch claims by the wallet's messages. What the wallet is poorer by are the fees,
// in parts alike.
func (n *TON) batch(ctx context.Context, client *lite.Client, vouchers []voucher.Voucher, list []Claimed) error {
	p, err := n.Wallet(client)
	if err != nil {
		return fmt.Errorf("the wallet that pays for claims: %w", err)
	}
	before, err := balance(ctx, client, p.Wallet.Address)
	if err != nil {
		return err
	}
	results, err := channel.ClaimAll(ctx, p, vouchers)
	if err != nil && len(results) < len(list) {
		return err
	}
	done := 0
	for i := range list {
		if list[i].Err = results[i].Err; list[i].Err == nil {
			done++
			if p.Wallet.Address == n.Payee {
				before += results[i].Paid
			}
		}
	}
	after, err := balance(ctx, client, p.Wallet.Address)
	if err != nil || done == 0 || after > before { // it has got something else meanwhile
		return nil
	}
	left, parts := before-after, uint64(done)
	for i := range list {
		if list[i].Err == nil {
			list[i].Fees = left / parts
			left -= list[i].Fees
			parts--
		}
	}
	return nil
}

func balance(ctx context.Context, client *lite.Client, a lite.Address) (uint64, error) {
	view, err := client.Sync(ctx)
	if err != nil {
		return 0, err
	}
	account, err := view.Account(ctx, a)
	if err != nil {
		return 0, err
	}
	return account.Balance, nil
}
