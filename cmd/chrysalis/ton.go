package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"chrysalis/devnet"
	"chrysalis/launcher"
	"chrysalis/launcher/till"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// exitUnknown is the status of a command that sent a message and does not know what
// became of it.
const exitUnknown = 3

// tonFlags say which network to read, and what to trust.
type tonFlags struct {
	Network      string        `default:"mainnet" env:"CHRYSALIS_TON_NETWORK" placeholder:"NAME" help:"mainnet, testnet, devnet, or a network's global id (default: ${default})."`
	GlobalConfig string        `env:"CHRYSALIS_TON_CONFIG" placeholder:"FILE" help:"The global config that lists liteservers; a devnet's is found by itself."`
	KeyBlock     string        `placeholder:"SEQNO:ROOT:FILE" help:"Prove everything from this key block rather than the one that the program has."`
	MaxAge       time.Duration `default:"2m" help:"How old the last block may be (default: ${default})."`
	Liteservers  int           `default:"3" help:"How many liteservers are asked for the last block (default: ${default})."`
}

// devnetDir is where a devnet is kept unless it is told otherwise.
func devnetDir() (string, error) {
	state, err := launcher.StateDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(state, "devnet"), nil
}

const globalConfigName = "global.config.json"

// named is the network without its liteservers.
func (f *tonFlags) named() (lite.Network, error) {
	if known, ok := lite.Known(f.Network); ok {
		return known, nil
	}
	if f.Network == "devnet" {
		return lite.Network{Name: "devnet", GlobalID: devnet.DefaultGlobalID}, nil
	}
	id, err := strconv.ParseInt(f.Network, 10, 32)
	if err != nil {
		return lite.Network{}, fmt.Errorf("--network: %q is neither mainnet, testnet, devnet nor a global id", f.Network)
	}
	return lite.Network{Name: f.Network, GlobalID: int32(id)}, nil
}

// config is where the global config of a network is; "" where nobody said.
func (f *tonFlags) config(n lite.Network) (string, error) {
	if f.GlobalConfig != "" || n.Name != "devnet" {
		return f.GlobalConfig, nil
	}
	dir, err := devnetDir()
	return filepath.Join(dir, globalConfigName), err
}

// network finds the network and its liteservers.
func (f *tonFlags) network() (n lite.Network, err error) {
	if n, err = f.named(); err != nil {
		return n, err
	}
	path, err := f.config(n)
	if err != nil {
		return n, err
	}
	if f.KeyBlock != "" {
		if n.KeyBlock, err = lite.ParseBlockID(f.KeyBlock); err != nil {
			return n, fmt.Errorf("--key-block: %w", err)
		}
	}
	if path == "" {
		return n, fmt.Errorf("give the global config of %s with --global-config; it lists liteservers, which are not trusted", n.Name)
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && n.Name == "devnet" {
		return n, fmt.Errorf("no devnet runs (there is no %s); start one with 'chrysalis devnet'", path)
	}
	if err != nil {
		return n, err
	}
	if err := n.ReadGlobalConfig(data); err != nil {
		return n, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}

// memory is the file that remembers what was seen of a network, one for each block
// that is trusted.
func memory(n lite.Network) (string, error) {
	state, err := launcher.StateDir()
	return filepath.Join(state, "ton", fmt.Sprintf("seen-%d-%x.json", n.GlobalID, n.KeyBlock.RootHash[:8])), err
}

// reader connects to the network. What was seen of it is remembered in the state
// folder.
func (f *tonFlags) reader() (registry.Reader, error) {
	n, err := f.network()
	if err != nil {
		return registry.Reader{}, err
	}
	path, err := memory(n)
	if err != nil {
		return registry.Reader{}, err
	}
	client, err := lite.New(n, lite.Options{Memory: lite.FileMemory(path), MaxAge: f.MaxAge, Servers: f.Liteservers})
	return registry.Reader{Client: client, Key: registry.DeriveKey}, err
}

// lasting is the network for a process that runs for months.
func (f *tonFlags) lasting() (n till.Network, err error) {
	if n.Network, err = f.network(); err != nil {
		return n, err
	}
	if n.GlobalConfig, err = f.config(n.Network); err == nil {
		n.GlobalConfig, err = filepath.Abs(n.GlobalConfig)
	}
	if err != nil {
		return n, err
	}
	n.Memory, err = memory(n.Network)
	n.MaxAge, n.Servers = f.MaxAge, f.Liteservers
	return n, err
}

// view is a proved state of the network that is recent, and what reads it. The
// reader's client is to be closed.
func (f *tonFlags) view(ctx context.Context) (registry.Reader, *lite.View, error) {
	reader, err := f.reader()
	if err != nil {
		return reader, nil, err
	}
	view, err := reader.Client.Sync(ctx)
	if err != nil {
		reader.Client.Close()
	}
	return reader, view, err
}

// wallet is the one that a key opens on the network, of a version.
func (f *tonFlags) wallet(keyFile, version string) (ed25519.PrivateKey, *registry.Wallet, error) {
	key, err := registry.LoadKey(keyFile)
	if err != nil {
		return nil, nil, err
	}
	network, err := f.named()
	if err != nil {
		return nil, nil, err
	}
	wallet, err := registry.NewWallet(key, version, network.GlobalID)
	return key, wallet, err
}

// walletFlags say who pays.
type walletFlags struct {
	KeyFile string `required:"" env:"CHRYSALIS_TON_KEY" placeholder:"FILE" help:"The wallet's 24 words, or its seed of 64 hexadecimal digits; nobody else may read the file."`
	Wallet  string `enum:"v4r2,v5r1" default:"v5r1" help:"The wallet's version, v4r2 or v5r1 (default: ${default})."`
	DryRun  bool   `help:"Show the message and what it costs, and send nothing."`
	JSON    bool   `name:"json" help:"Print one JSON document a line."`
}

// payerFlags are walletFlags of commands that can do without a wallet.
type payerFlags struct {
	KeyFile string `env:"CHRYSALIS_TON_KEY" placeholder:"FILE" help:"The key of the wallet that pays, as 'chrysalis registry' takes it."`
	Wallet  string `enum:"v4r2,v5r1" default:"v5r1" help:"The wallet's version, v4r2 or v5r1 (default: ${default})."`
}

func (f payerFlags) wallet(asJSON bool) *walletFlags {
	return &walletFlags{KeyFile: f.KeyFile, Wallet: f.Wallet, JSON: asJSON}
}

// publisher is the wallet's, of this registry, or with "" of its own.
func (f *walletFlags) publisher(ton *tonFlags, address string, show *steps) (*registry.Publisher, error) {
	key, err := registry.LoadKey(f.KeyFile)
	if err != nil {
		return nil, err
	}
	reader, err := ton.reader()
	if err != nil {
		return nil, err
	}
	wallet, err := registry.NewWallet(key, f.Wallet, reader.Client.Network().GlobalID)
	if err != nil {
		return nil, err
	}
	p := &registry.Publisher{
		Reader: reader, Wallet: wallet, Registry: registry.AddressOfWallet(wallet),
		Progress: func(what string) { show.step(what, 0, 0) },
	}
	if address != "" {
		if p.Registry, err = lite.ParseAddress(address); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// tonPrice is a price or an amount in nanotons, which people write in TON.
type tonPrice int64

var tonPriceRE = regexp.MustCompile(`^([0-9]{1,9})(?:\.([0-9]{1,9}))?$`)

// UnmarshalText reads TON in decimal, with up to 9 digits after the point.
func (p *tonPrice) UnmarshalText(text []byte) error {
	parts := tonPriceRE.FindSubmatch(text)
	if parts == nil {
		return fmt.Errorf("%.40q is not TON in decimal, like 0.0015", text)
	}
	n, err := strconv.ParseInt(string(parts[1])+string(parts[2])+strings.Repeat("0", 9-len(parts[2])), 10, 64)
	*p = tonPrice(n)
	return err
}

// tonAmount is an amount of TON in nanotons.
func tonAmount(ton int64) *big.Int { return new(big.Int).Mul(big.NewInt(ton), big.NewInt(1e9)) }
