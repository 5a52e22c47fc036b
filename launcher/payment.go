package launcher

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	vouchers "chrysalis/channel/store"
	"chrysalis/guest"
	"chrysalis/launcher/till"
	"chrysalis/manifest"
	"chrysalis/models"
	"chrysalis/pay"
	"chrysalis/registry"
	"chrysalis/registry/lite"
)

// Payment says who is paid for what a VM serves, and how much.
type Payment struct {
	till.Terms
	// Ceilings go into the manifest, where clients see the most that they can be charged.
	// One is that of all models. With a manifest file there are none: they are in it.
	Ceilings []pay.Price
	Step     uint64       // nanotons that a voucher adds at least; 0 is a tenth of the highest ceiling
	Prices   []pay.Price  // to begin with; one is that of all models, none are the ceilings
	Auto     *Auto        // nil: the prices stay until they are set
	Network  till.Network // where channels are read, and claimed from
	// ClaimKey is the file of a wallet's key that pays for claims, of version ClaimWallet;
	// when it is empty the fees come out of what is claimed.
	ClaimKey, ClaimWallet string
}

// paid is what a supervisor needs to know of Payment.
type paid struct {
	Terms       till.Terms   `json:"terms"`
	Models      []string     `json:"models"` // NAME@REVISION
	Ceilings    []pay.Price  `json:"ceilings"`
	Prices      []pay.Price  `json:"prices"`
	Auto        *Auto        `json:"auto,omitempty"`
	Concurrency int          `json:"concurrency"`
	Network     till.Network `json:"network"`
	ClaimKey    string       `json:"claim_key,omitempty"`
	ClaimWallet string       `json:"claim_wallet,omitempty"`
}

// forEach is a list with one price for each of so many models.
func forEach(what string, prices []pay.Price, models int) ([]pay.Price, error) {
	switch len(prices) {
	case models:
		return slices.Clone(prices), nil
	case 1:
		return slices.Repeat(prices, models), nil
	}
	return nil, fmt.Errorf("%d %s for %d models; give one for each, or one for all", len(prices), what, models)
}

// manifest puts the ceilings into a manifest that is being made.
func (p *Payment) manifest(m *manifest.Manifest) (err error) {
	m.Payment, err = models.Payment(p.GlobalID, len(m.Models), p.Ceilings, p.Step)
	return err
}

// plan checks all that can be wrong before a VM is booted, which is much cheaper than
// to find it out afterwards.
func (p *Payment) plan(m *manifest.Manifest) (*paid, error) {
	if m.Payment == nil {
		return nil, errors.New("the manifest says that the VM serves for free; leave out prices and --payout, or use a manifest with payment")
	}
	if m.Payment.Network != p.GlobalID {
		return nil, fmt.Errorf("the manifest is for payments on the network %d, and this is %d; name that one with --ton-network", m.Payment.Network, p.GlobalID)
	}
	if p.Network.Network.GlobalID != p.GlobalID {
		return nil, fmt.Errorf("payments are on the network %d, and channels would be read on %d", p.GlobalID, p.Network.Network.GlobalID)
	}
	c := &paid{
		Terms: p.Terms, Ceilings: m.Payment.Ceilings, Prices: m.Payment.Ceilings, Concurrency: m.Limits.Concurrency,
		Network: p.Network, ClaimWallet: p.ClaimWallet,
	}
	for _, model := range m.Models {
		c.Models = append(c.Models, model.ID())
	}
	if len(p.Prices) > 0 {
		var err error
		if c.Prices, err = forEach("prices", p.Prices, len(m.Models)); err != nil {
			return nil, err
		}
	}
	if err := till.CheckPrices(c.Models, c.Prices, c.Ceilings); err != nil {
		return nil, err
	}
	if err := c.Terms.Validate(); err != nil {
		return nil, err
	}
	if p.MinDeposit <= uint64(m.Payment.Step) {
		return nil, fmt.Errorf("the least deposit is %s, and a voucher step %s; demand more, or take smaller steps", registry.TON(p.MinDeposit), registry.TON(uint64(m.Payment.Step)))
	}
	if p.Auto != nil {
		var err error
		if c.Auto, err = p.Auto.plan(c.Ceilings); err != nil {
			return nil, err
		}
	}
	if p.ClaimKey != "" {
		var err error
		if c.ClaimKey, err = absolute("key that pays for claims", p.ClaimKey); err != nil {
			return nil, err
		}
		if _, err := c.wallet(); err != nil {
			return nil, err
		}
	}
	client, err := p.Network.Open() // which asks nobody anything
	if err != nil {
		return nil, err
	}
	client.Close()
	return c, nil
}

func (c *paid) wallet() (*registry.Wallet, error) {
	key, err := registry.LoadKey(c.ClaimKey)
	if err != nil {
		return nil, err
	}
	return registry.NewWallet(key, c.ClaimWallet, c.Terms.GlobalID)
}

// chain is the network of the payments.
func (c *paid) chain() *till.TON {
	chain := &till.TON{Connect: c.Network.Open, Payee: c.Terms.Payee}
	if c.ClaimKey != "" {
		chain.Wallet = func(client *lite.Client) (*registry.Publisher, error) {
			wallet, err := c.wallet()
			if err != nil {
				return nil, err
			}
			return &registry.Publisher{Reader: registry.Reader{Client: client, Key: registry.DeriveKey}, Wallet: wallet}, nil
		}
	}
	return chain
}

// claimPatience is how long a VM that is stopped may take to claim. What is not claimed
// then stays in the store.
const claimPatience = time.Minute

// till is where a VM's vouchers on a network are kept, run after run.
func (s store) till(name string, globalID int32) string {
	return filepath.Join(s.vm(name), "till", strconv.FormatInt(int64(globalID), 10))
}

// controlPort is a VM as its till sees it.
type controlPort struct{ dialer Dialer }

// Control implements till.VM.
func (p controlPort) Control(ctx context.Context, request guest.ControlRequest) (guest.ControlReply, error) {
	return exchange(ctx, p.dialer, request)
}

// startTill begins to take money, which is before clients are let in: the VM serves
// nothing that has a price before it knows the price.
func (s *supervisor) startTill(dialer Dialer) error {
	c := s.cfg.Payment
	if c == nil {
		return nil
	}
	chain := c.chain()
	o := till.Options{
		Terms: c.Terms, Name: s.cfg.Name, Models: c.Models, Ceilings: c.Ceilings, Prices: c.Prices, Policy: vouchers.DefaultPolicy,
		Dir: s.store.till(s.cfg.Name, c.Terms.GlobalID), Holders: filepath.Join(s.store.dir, "channels"),
		VM: controlPort{dialer}, Chain: chain, Log: s.log.Printf,
	}
	use := &usage{}
	if c.Auto != nil {
		o.Source, o.Every = c.follow(use, chain), followEvery
		if c.Auto.OfferKey != "" {
			o.Every = followListEvery
		}
	}
	t, err := till.New(o)
	if err != nil {
		return err
	}
	if err := t.Open(); err != nil && !errors.Is(err, till.ErrNoStore) {
		return fmt.Errorf("open what the VM has earned: %w", err)
	}
	ctx, cancel := context.WithTimeout(s.now, 15*time.Second)
	defer cancel()
	if err := t.SetPrices(ctx, c.Prices); err != nil {
		t.Close()
		return fmt.Errorf("tell the VM its prices: %w; use the launcher that belongs to the image", err)
	}
	for _, note := range t.State().Trouble {
		s.tell(Event{Kind: EventNote, Note: note})
	}
	s.mu.Lock()
	s.till, s.chain = t, chain
	s.mu.Unlock()
	go func() {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if c.Auto != nil {
			go use.watch(ctx, func() (int64, bool) {
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.state.Guest == nil {
					return 0, false
				}
				return s.state.Guest.Counters.Active, true
			})
		}
		t.Run(ctx)
	}()
	return nil
}

func (s *supervisor) theTill() *till.Till {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.till
}

// settle takes the last of the money from a VM that serves nobody any more, and claims
// it unless somebody else is to.
func (s *supervisor) settle(req stopRequest) {
	t := s.theTill()
	if t == nil {
		return
	}
	base, limit := s.now, claimPatience
	if req.Now || s.now.Err() != nil {
		base, limit = context.Background(), 2*time.Second
	}
	ctx, cancel := context.WithTimeout(base, limit)
	defer cancel()
	if err := t.Finish(ctx, !req.Now && !req.Keep); err != nil {
		s.log.Print(err)
	}
	s.closeTill()
}

// closeTill ends the till, and keeps what it said last.
func (s *supervisor) closeTill() {
	s.mu.Lock()
	t, chain := s.till, s.chain
	s.mu.Unlock()
	if t == nil {
		return
	}
	if err := t.Close(); err != nil {
		s.log.Print(err)
	}
	chain.Close()
	last := t.State()
	s.mu.Lock()
	s.till, s.chain, s.state.Payment = nil, nil, &last
	s.mu.Unlock()
}

// Earned is what a VM has earned on a network, whatever became of the VM.
type Earned struct {
	Name     string         `json:"name"`
	GlobalID int32          `json:"global_id"`
	Rows     []vouchers.Row `json:"rows"`
	Pending  uint64         `json:"pending"`         // nanotons of vouchers that can be claimed
	Notes    []string       `json:"notes,omitempty"` // what the owner is to know of it
}

// errNoTill is said of a VM that has no till, or none any more.
var errNoTill = errors.New("the VM serves for free, or is ending")

func (s *supervisor) getEarnings(w http.ResponseWriter, _ *http.Request) {
	t := s.theTill()
	if t == nil {
		http.Error(w, errNoTill.Error(), http.StatusConflict)
		return
	}
	rows, err := t.Earnings()
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	st := t.State()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(Earned{s.cfg.Name, st.GlobalID, rows, st.Pending, st.Trouble})
}

func (s *supervisor) postPrices(w http.ResponseWriter, r *http.Request) {
	var prices []pay.Price
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10)).Decode(&prices); err != nil {
		http.Error(w, "not a list of prices", http.StatusBadRequest)
		return
	}
	t := s.theTill()
	if t == nil {
		http.Error(w, errNoTill.Error(), http.StatusConflict)
		return
	}
	if err := t.SetPrices(r.Context(), prices); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	s.log.Printf("prices are now %v", prices)
	s.save()
	w.WriteHeader(http.StatusNoContent)
}

// SetPrices changes what a running VM charges from now on. change gets what it charges
// for each model, and returns as many prices.
func SetPrices(ctx context.Context, stateDir, name string, change func([]till.ModelState) ([]pay.Price, error)) (State, error) {
	if err := checkName(name); err != nil {
		return State{}, err
	}
	st, err := openStore(stateDir)
	if err != nil {
		return State{}, err
	}
	alive, err := st.live(name)
	if err != nil {
		return State{}, err
	}
	if len(alive) == 0 {
		return State{}, fmt.Errorf("%w: %q; 'chrysalis status' lists those that are", ErrNotRunning, name)
	}
	r := alive[len(alive)-1]
	state, err := r.current(ctx)
	if err != nil {
		return state, err
	}
	if state.Payment == nil || state.Life != LifeReady {
		return state, fmt.Errorf("the VM %q is %s, and is not one whose clients pay", name, state.Life)
	}
	prices, err := change(state.Payment.Models)
	if err != nil {
		return state, err
	}
	if err := r.call(ctx, http.MethodPost, "/v1/prices", prices, nil); err != nil {
		return state, err
	}
	return r.current(ctx)
}

// Earnings returns what the VM of that name has earned, or what all have when name is
// empty, on each network by itself.
func Earnings(ctx context.Context, stateDir, name string) ([]Earned, error) {
	st, err := openStore(stateDir)
	if err != nil {
		return nil, err
	}
	names, err := st.named(name)
	if err != nil {
		return nil, err
	}
	var list []Earned
	for _, n := range names {
		ids, err := st.tills(n)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			e, err := st.earned(ctx, n, id)
			if err != nil {
				return nil, fmt.Errorf("what the VM %q has earned: %w", n, err)
			}
			list = append(list, e)
		}
	}
	return list, nil
}

// tills lists the networks on which a VM has earned something.
func (s store) tills(name string) (ids []int32, err error) {
	entries, err := os.ReadDir(filepath.Join(s.vm(name), "till"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if id, err := strconv.ParseInt(e.Name(), 10, 32); err == nil && e.IsDir() {
			ids = append(ids, int32(id))
		}
	}
	return ids, nil
}

// earned asks the supervisor that has a store, or opens one that nobody has.
func (s store) earned(ctx context.Context, name string, globalID int32) (Earned, error) {
	alive, err := s.live(name)
	if err != nil {
		return Earned{}, err
	}
	for _, r := range alive {
		var e Earned
		if err := r.call(ctx, http.MethodGet, "/v1/earnings", nil, &e); err == nil && e.GlobalID == globalID {
			return e, nil
		}
	}
	open, err := vouchers.Open(s.till(name, globalID))
	if err != nil {
		return Earned{}, err
	}
	defer open.Close()
	e := Earned{Name: name, GlobalID: globalID, Rows: open.Earnings(), Notes: open.Damage()}
	for _, c := range open.Channels() {
		e.Pending += c.Unclaimed()
	}
	return e, nil
}

// Settle claims what a VM has earned that does not run, and perhaps never will again.
// The key is that of Payment.ClaimKey.
func Settle(ctx context.Context, stateDir, name string, p Payment, log func(string, ...any)) error {
	if err := checkName(name); err != nil {
		return err
	}
	st, err := openStore(stateDir)
	if err != nil {
		return err
	}
	alive, err := st.live(name)
	if err != nil {
		return err
	}
	if len(alive) > 0 {
		return fmt.Errorf("the VM %q runs, and claims by itself; 'chrysalis down %s' has it claim everything", name, name)
	}
	c := &paid{Terms: p.Terms, Network: p.Network, ClaimKey: p.ClaimKey, ClaimWallet: p.ClaimWallet}
	if c.ClaimKey != "" {
		wallet, err := c.wallet()
		if err != nil {
			return err
		}
		c.Terms.Payee = wallet.Address
	}
	dir := st.till(name, p.GlobalID)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("the VM %q has earned nothing on the network %d", name, p.GlobalID)
	}
	chain := c.chain()
	defer chain.Close()
	return till.Settle(ctx, till.Options{
		Terms: c.Terms, Name: name, Policy: vouchers.DefaultPolicy, Dir: dir, Chain: chain, Log: log,
	})
}
