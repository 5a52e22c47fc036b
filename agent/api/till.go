package api

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/pay"
)

// maxChannels bounds how many channels are served at a time. One takes some 500
// bytes.
const maxChannels = 16 << 10

// tillHeap is what as many need, in bytes.
const tillHeap = 16 << 20

// till is what a server that is paid has besides: the book, who is paid, and the
// channels that are wanted. Its decisions are those of package pay; here is what
// waits for them.
type till struct {
	book   *pay.Book
	vm     manifest.Manifest // its models and payment
	wanted wanted

	mu    sync.Mutex
	owner *pay.Owner // nil until the launcher has said who is paid

	admitLimit, durableLimit, coverLimit time.Duration
}

// newTill opens the book of a VM with these models and this payment, both validated,
// and the certificate that clients verify.
func newTill(models []manifest.Model, payment *manifest.Payment, certificate []byte) *till {
	leaf, err := x509.ParseCertificate(certificate)
	if err != nil {
		panic(err) // the agent has made it
	}
	t := &till{
		vm:     manifest.Manifest{Models: models, Payment: payment},
		wanted: newWanted(),

		admitLimit: admitLimit, durableLimit: durableLimit, coverLimit: coverLimit,
	}
	ceilings, ok := t.vm.Ceilings()
	if ok {
		t.book, err = pay.NewBook(payment.Network, sha256.Sum256(leaf.RawSubjectPublicKeyInfo), ceilings, maxChannels)
	}
	if !ok || err != nil {
		panic("the manifest has been validated")
	}
	return t
}

func (t *till) payee() *pay.Owner {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.owner
}

// free reports whether a model costs nothing now.
func (t *till) free(id string) bool { return t.book.Prices().Models[id].Free() }

// allPriced reports whether no model is free now.
func (t *till) allPriced() bool {
	for _, price := range t.book.Prices().Models {
		if price.Free() {
			return false
		}
	}
	return true
}

// wait waits until ok, which is looked at whenever the book has changed, and reports
// whether it came to be.
func (t *till) wait(ctx context.Context, limit time.Duration, ok func() bool) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		changed := t.book.Changed()
		if ok() {
			return true
		}
		select {
		case <-changed:
		case <-timer.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// Payment carries out the operations of the control port that are about payment, and
// refuses others.
func (s *Server) Payment(r guest.ControlRequest) guest.ControlReply {
	reply := guest.ControlReply{Error: guest.ErrorPayment, Active: s.Active()}
	t := s.till
	if t == nil {
		return reply
	}
	var err error
	switch r.Op {
	case guest.OpPrices:
		err = t.prices(r.Payment)
	case guest.OpAdmit:
		err = t.admit(r.Admit)
	case guest.OpDrop:
		err = t.drop(r.Channel)
	case guest.OpCollect:
		err = t.collect(r.Ack, time.Duration(r.WaitMS)*time.Millisecond, &reply)
	default:
		reply.Error = guest.ErrorUnknownOp
		return reply
	}
	// What was wrong is an enumerated value; the launcher knows what it has sent.
	if reply.OK, reply.Error = err == nil, ""; err != nil {
		reply.Error = guest.ErrorRefused
	}
	return reply
}

var errRefused = errors.New("a value of the control message cannot be")

func (t *till) prices(p *guest.ControlPayment) error {
	if p == nil || p.MinDelay < 0 || p.MinDelay > maxDelay {
		return errRefused
	}
	payee, err := voucher.ParseChannel(p.Payee)
	if err != nil {
		return err
	}
	tariff, err := t.vm.Tariff(p.Prices)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.book.SetPrices(tariff); err != nil {
		return err
	}
	t.owner = &pay.Owner{Account: payee, MinDeposit: p.MinDeposit, MinDelay: p.MinDelay}
	return nil
}

// maxDelay is the longest closing delay that terms can have, in seconds.
const maxDelay = 1<<32 - 1

func (t *till) admit(a *guest.Admission) error {
	if a == nil {
		return errRefused
	}
	channel, err := voucher.ParseChannel(a.Channel)
	if err != nil {
		return err
	}
	admission := pay.Admission{Channel: channel, Limit: a.Limit, Used: a.Used, Closing: a.Closing}
	if n, err := hex.Decode(admission.Key[:], []byte(a.Key[:min(len(a.Key), 2*len(admission.Key))])); err != nil ||
		n != len(admission.Key) || hex.EncodeToString(admission.Key[:]) != a.Key {
		return errRefused
	}
	if a.Best != "" {
		best, err := voucher.Parse(a.Best)
		if err != nil {
			return err
		}
		admission.Best = &best
	}
	return t.book.Admit(admission)
}

func (t *till) drop(name string) error {
	channel, err := voucher.ParseChannel(name)
	if err == nil && !t.book.Drop(channel) {
		err = errRefused
	}
	return err
}

// envelope is what a reply takes beside balances and wanted channels, in bytes; it is
// more than it can be. wantedSize is what one of those takes, with quotes and comma.
const (
	envelope   = 128
	wantedSize = 2 + 64 + 3
)

// collect tells what there is, or waits for something to tell.
func (t *till) collect(ack uint64, limit time.Duration, reply *guest.ControlReply) error {
	timer := time.NewTimer(min(limit, guest.MaxControlWait*time.Millisecond))
	defer timer.Stop()
	for over := limit <= 0; ; {
		room := guest.MaxControlMessage - envelope - guest.MaxWanted*wantedSize
		batch, list, err := t.book.Collect(ack, func(b pay.Balance) bool {
			encoded, err := json.Marshal(t.balance(b))
			room -= len(encoded) + len(",")
			return err == nil && room >= 0
		})
		if err != nil {
			return err
		}
		reply.Batch, reply.Balances, reply.Wanted = batch, nil, t.wanted.take(time.Now())
		for _, b := range list {
			reply.Balances = append(reply.Balances, t.balance(b))
		}
		if over || batch > 0 || len(reply.Wanted) > 0 {
			return nil
		}
		select {
		case <-t.book.Tell():
		case <-t.wanted.tell:
		case <-timer.C:
			over = true
		}
	}
}

// balance is what the host is told of a channel.
func (t *till) balance(b pay.Balance) guest.Balance {
	told := guest.Balance{Channel: b.Channel.String()}
	if b.Best != nil {
		told.Voucher = b.Best.String()
	}
	for _, u := range b.Uses {
		at := slices.IndexFunc(t.vm.Models, func(m manifest.Model) bool { return m.ID() == u.Model })
		told.Uses = append(told.Uses, guest.Use{Model: at, Requests: u.Requests, PromptTokens: u.PromptTokens, CompletionTokens: u.CompletionTokens, Earned: u.Earned})
	}
	slices.SortFunc(told.Uses, func(a, b guest.Use) int { return a.Model - b.Model })
	return told
}

// wanted are the channels that requests wait for. Anyone can name any, so there are
// few, and each is told now and then only.
type wanted struct {
	tell chan struct{}

	mu       sync.Mutex
	channels map[voucher.Channel]*wish
}

type wish struct {
	waiting int       // requests
	told    time.Time // the last time
}

const (
	maxWanted   = 256
	wantedAgain = 3 * time.Second // before a channel is told again
)

func newWanted() wanted {
	return wanted{tell: make(chan struct{}, 1), channels: map[voucher.Channel]*wish{}}
}

// add notes that a request waits for a channel, and reports whether there was room.
// Where there is none, one that has been told makes room: its request goes on
// waiting for what comes of that.
func (w *wanted) add(channel voucher.Channel) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if known := w.channels[channel]; known != nil {
		known.waiting++
		return true
	}
	if len(w.channels) >= maxWanted {
		var oldest *wish
		var at voucher.Channel
		for c, v := range w.channels {
			if !v.told.IsZero() && (oldest == nil || v.told.Before(oldest.told)) {
				oldest, at = v, c
			}
		}
		if oldest == nil {
			return false
		}
		delete(w.channels, at)
	}
	w.channels[channel] = &wish{waiting: 1}
	select {
	case w.tell <- struct{}{}:
	default:
	}
	return true
}

// remove notes that a request waits no more.
func (w *wanted) remove(channel voucher.Channel) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := w.channels[channel]
	if known == nil {
		return // it made room
	}
	if known.waiting--; known.waiting <= 0 {
		delete(w.channels, channel)
	}
}

// take returns channels to tell now, those first that have not been told or not for
// the longest time.
func (w *wanted) take(now time.Time) (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var due []voucher.Channel
	for channel, v := range w.channels {
		if now.Sub(v.told) >= wantedAgain {
			due = append(due, channel)
		}
	}
	slices.SortFunc(due, func(a, b voucher.Channel) int {
		if order := w.channels[a].told.Compare(w.channels[b].told); order != 0 {
			return order
		}
		return slices.Compare(a[:], b[:])
	})
	for _, channel := range due[:min(len(due), guest.MaxWanted)] {
		w.channels[channel].told = now
		names = append(names, channel.String())
	}
	return names
}
