package api

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/pay"
)

// paymentPath is where a client reads the terms, sees its credit and pays. It pays
// there, on a connection of its own, while a stream runs that needs more cover.
const paymentPath = "/.well-known/payment"

// How long a request waits for the owner's launcher and for its client.
const (
	admitLimit   = 10 * time.Second // for a channel to be admitted
	durableLimit = 5 * time.Second  // for a voucher to be durable
	coverLimit   = 10 * time.Second // in a stream, for cover of the next event
)

// maxPaidAnswer bounds an answer that is paid for and no stream, in bytes. All of it
// is held until what it costs is known: what has gone out cannot be charged for
// afterwards, since a client may leave before its end.
const maxPaidAnswer = 8 << 20

// Errors of clients that pay.
var (
	errNoPayer    = errors.New("this costs: open a channel to the payee, and send " + pay.PayerHeader + " and vouchers for it")
	errNotDurable = errors.New("the voucher has not been put on disk yet, and does not count before; send the request again")

	errPaymentNotReady = &apiError{status: http.StatusServiceUnavailable, code: "payment_not_ready", message: "the owner has not said yet who is to be paid; try again", retry: retryUnavailable}
	errVoucherHeader   = badRequest("payment_header", pay.VoucherHeader, "the header must be there with POST, and not with GET")
	errCutOff          = &apiError{status: http.StatusPaymentRequired, code: "payment_required", message: "what was paid is used up, and no voucher for more came in time; what was sent until here is charged"}
)

// unpaid is the answer 402, with the terms, the reason, and where the channel of a
// session stands.
func (x *exchange) unpaid(why error, session *pay.Session) *apiError {
	owner := x.s.till.payee()
	if owner == nil {
		return errPaymentNotReady
	}
	terms, err := x.terms(owner, why.Error(), session)
	if err != nil {
		return errInternal
	}
	return &apiError{status: http.StatusPaymentRequired, code: "payment_required", message: why.Error(), terms: terms}
}

func (x *exchange) terms(owner *pay.Owner, why string, session *pay.Session) ([]byte, error) {
	book := x.s.till.book
	var credit *pay.Credit
	if session != nil {
		if c, ok := book.Credit(*session); ok {
			credit = &c
		}
	}
	why = strings.Map(func(r rune) rune { // what canonical JSON has no room for
		if r < 0x20 || r > 0x7e || strings.ContainsRune(`"\<>&`, r) {
			return '.'
		}
		return r
	}, why)
	terms := book.Terms(*owner, x.route.path, why, credit)
	return terms.Encode()
}

// payer finds out who pays before a request's body is here: bodies that wait for a
// channel that nobody knows would take the memory that there is for those of others.
// Who cannot pay is refused at once where nothing is free; where something is, the
// body says whether that was asked for.
func (x *exchange) payer() error {
	if x.s.till == nil {
		return nil
	}
	x.session, x.unknown = x.identify()
	if x.unknown == errGone || x.s.till.allPriced() {
		return x.unknown
	}
	return nil
}

// identify finds out who pays, and takes the voucher that has come along. It waits
// until the channel is admitted and the voucher is durable.
func (x *exchange) identify() (pay.Session, error) {
	t := x.s.till
	var none pay.Session
	if t.payee() == nil {
		return none, errPaymentNotReady
	}
	payer, v, err := pay.FromHeader(x.r.Header)
	switch {
	case err != nil:
		return none, x.unpaid(err, nil)
	case payer == nil:
		return none, x.unpaid(errNoPayer, nil)
	}
	session, err := t.book.Session(*payer)
	if errors.Is(err, pay.ErrNoChannel) && t.wanted.add(payer.Channel) {
		t.wait(x.r.Context(), x.within(t.admitLimit), func() bool {
			session, err = t.book.Session(*payer)
			return !errors.Is(err, pay.ErrNoChannel)
		})
		t.wanted.remove(payer.Channel)
	}
	switch {
	case x.r.Context().Err() != nil:
		return none, errGone
	case err != nil:
		return none, x.unpaid(err, nil)
	case v == nil:
		return session, nil
	}
	if err := t.book.Pay(*v); err != nil {
		return none, x.unpaid(err, &session)
	}
	covers := func() bool { return t.book.Covers(session, v.Total) }
	switch {
	case t.wait(x.r.Context(), x.within(t.durableLimit), covers):
		return session, nil
	case x.r.Context().Err() != nil:
		return none, errGone
	}
	return none, x.unpaid(errNotDurable, &session)
}

// within is a limit, or what is left of the whole request's.
func (x *exchange) within(limit time.Duration) time.Duration { return min(limit, time.Until(x.end)) }

// payment answers requests for the terms.
func (x *exchange) payment() error {
	t := x.s.till
	given := len(x.r.Header[pay.VoucherHeader]) > 0
	if given != (x.r.Method == http.MethodPost) {
		return errVoucherHeader
	}
	var session *pay.Session
	if given || len(x.r.Header[pay.PayerHeader]) > 0 {
		s, err := x.identify()
		if err != nil {
			return err
		}
		session = &s
	}
	owner := t.payee()
	if owner == nil {
		return errPaymentNotReady
	}
	terms, err := x.terms(owner, "", session)
	if err != nil {
		return errInternal
	}
	return x.answer(http.StatusOK, terms)
}

// charge has a request begin to be charged, unless its model is free. An answer that
// is no stream is made as short as what was paid covers.
func (x *exchange) charge(req *request, bodyBytes int) error {
	t := x.s.till
	if t == nil {
		return nil
	}
	id := x.s.served[req.model].ID()
	if t.free(id) {
		return nil
	}
	if x.unknown != nil {
		return x.unknown
	}
	var err error
	at := req.lengthField()
	asked := x.receipt.counts.Asked
	if req.stream || at < 0 {
		x.bill, err = t.book.Start(x.session, id, int64(bodyBytes), asked)
	} else {
		var most int64
		if x.bill, most, err = t.book.StartWhole(x.session, id, int64(bodyBytes), asked); err == nil && most < pay.MaxAsked {
			req.limit(at, most)
			x.receipt.counts.Asked = most
		}
	}
	if err != nil {
		return x.unpaid(err, &x.session)
	}
	return nil
}

// settle charges for an answer: one that the engine has ended well, or, if it is not
// whole, for what has gone out of it.
func (x *exchange) settle(whole bool) {
	if x.bill == nil {
		return
	}
	c := x.bill.End(x.receipt.counts.usage(), whole)
	x.receipt.payment = &receipt.Payment{
		Channel:     c.Credit.Channel.String(),
		PromptPrice: c.Price.Prompt, CompletionPrice: c.Price.Completion,
		PromptTokens: c.Prompt, CompletionTokens: c.Completion,
		Charged: pay.FormatAmount(c.Amount), Used: pay.FormatAmount(c.Credit.Used), Cover: pay.FormatAmount(c.Credit.Cover),
	}
}

// ended charges for what has gone out of an answer that has ended early, by the
// client's doing or by a limit that it can run into at will, and passes on why. What
// the engine broke off is not charged.
func (x *exchange) ended(err error) error {
	switch err {
	case errGone, errTotal, errAnswerTooLong:
		x.settle(false)
	}
	return err
}

// covered waits for cover of so many more bytes of text in a stream. It is false
// where none comes in time.
func (x *exchange) covered(text int64) (bool, error) {
	t := x.s.till
	ok := t.wait(x.r.Context(), x.within(t.coverLimit), func() bool { return x.bill.Send(text) })
	switch {
	case ok:
		return true, nil
	case x.r.Context().Err() != nil:
		return false, errGone
	case !time.Now().Before(x.end):
		return false, errTotal
	}
	return false, nil
}
