package api

import (
	"bytes"
	"io"
	"net/http"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/pay"
)

// Whoever carries a stream sees how large its TLS records are and when they come.
// Without padding that is the length of each token, and with it often the text.
// So events go out on a fixed tick, and each takes a multiple of block bytes.
//
// That alone would show a token now and then, where it takes an event over the next
// multiple. So no event takes less than minSlot, which leaves a token some 200
// bytes beside the engine's own words; and once an event has taken more, all that
// follow take as much, up to maxSlot. What stays visible is how many tokens there
// are, about when each was made, and how long the whole takes.
const (
	block   = 256
	minSlot = 2 * block
	maxSlot = 16 * block
)

// tick is how often events go out.
const tick = 20 * time.Millisecond

// ticks are the times at which the events of one stream go out. Nothing runs while
// none waits for one: hundreds of streams would have the processor do little else.
type ticks struct {
	begin time.Time
	every time.Duration
	timer *time.Timer
}

func newTicks(every time.Duration) *ticks {
	t := &ticks{begin: time.Now(), every: every, timer: time.NewTimer(every)}
	t.timer.Stop()
	return t
}

// next returns a channel that receives at the next tick, and only then. It is the same
// one each time.
func (t *ticks) next() <-chan time.Time {
	t.timer.Reset(t.every - time.Since(t.begin)%t.every)
	return t.timer.C
}

func (t *ticks) stop() { t.timer.Stop() }

// maxTick bounds the events of one tick, in bytes but for the last event. An engine
// that makes more waits for the next one.
const maxTick = 64 << 10

// answerBlock is what answers that are not streams are padded to a multiple of.
const answerBlock = 1 << 10

// receiptSize is what the event of a receipt, or its trailer, takes: more than any
// receipt does. One that says what was charged takes paidReceiptSize.
const (
	receiptSize     = 1 << 10
	paidReceiptSize = 6 << 8
)

// receiptSize is what this exchange's receipt takes.
func (x *exchange) receiptSize() int {
	if x.bill != nil {
		return paidReceiptSize
	}
	return receiptSize
}

// padding pads the events of one stream.
type padding struct{ slot int }

// event appends an event and its padding.
func (p *padding) event(out, data []byte) []byte {
	from := len(out)
	out = append(append(append(out, "data: "...), data...), "\n\n"...)
	n := len(out) - from + minComment
	switch {
	case n > maxSlot:
		return comment(out, roundUp(n, maxSlot)-n)
	case n > p.slot:
		p.slot = max(minSlot, roundUp(n, block))
	}
	return comment(out, p.slot-n)
}

// receipt appends the comment that holds a receipt, and its padding to a multiple of
// size.
func (p *padding) receipt(out, signed []byte, size int) []byte {
	from := len(out)
	out = append(append(append(out, receipt.CommentPrefix...), signed...), '\n')
	n := len(out) - from + minComment
	return comment(out, roundUp(n, size)-n)
}

// minComment is the size of an empty comment.
const minComment = len(":\n\n")

// comment appends a comment with n bytes in it. Unlike white space in an event's
// data, every client passes over it (WHATWG HTML, section 9.2.6).
func comment(out []byte, n int) []byte {
	out = append(out, ':')
	for range n {
		out = append(out, '-')
	}
	return append(out, "\n\n"...)
}

func roundUp(n, multiple int) int { return (n + multiple - 1) / multiple * multiple }

// spaces pads an answer in JSON of n bytes.
func spaces(n int64) []byte {
	return bytes.Repeat([]byte{' '}, int(-n&(answerBlock-1)))
}

// source reads a stream's events on a goroutine of its own, so that they can be
// waited for together with the tick.
type source struct {
	events chan []byte   // good until resume
	resume chan struct{} // reads on
	quit   chan struct{} // closed when nobody waits any more
	done   chan struct{} // closed when nothing more comes
	err    error         // why, after done
}

func newSource(r io.Reader) *source {
	s := &source{events: make(chan []byte), resume: make(chan struct{}), quit: make(chan struct{}), done: make(chan struct{})}
	go s.read(newEvents(r))
	return s
}

func (s *source) read(stream *events) {
	defer close(s.done)
	defer func() {
		if recover() != nil {
			s.err = errInternal // the goroutine is not one that ServeHTTP contains
		}
	}()
	for {
		event, err := stream.next()
		if err != nil {
			s.err = err
			return
		}
		select {
		case s.events <- event:
		case <-s.quit:
			return
		}
		select {
		case <-s.resume:
		case <-s.quit:
			return
		}
	}
}

// relayEvents passes a stream on: on each tick the events that have come since the
// last one. Only [DONE] ends it well. cancel ends the engine's answer.
func (x *exchange) relayEvents(r io.Reader, req *request, cancel func()) error {
	src := newSource(r)
	defer func() {
		close(src.quit)
		cancel()
		<-src.done
	}()
	ticks := newTicks(x.s.tick)
	defer ticks.stop()
	var out []byte
	var due <-chan time.Time // nil while nothing is to go out
	flush := func() error {
		x.receipt.response.Write(out)
		err := x.writeEvents(out)
		out, due = out[:0], nil
		return err
	}
	for {
		events := src.events
		if len(out) >= maxTick {
			events = nil
		}
		select {
		case <-due:
			if err := flush(); err != nil {
				return err
			}
		case event := <-events:
			done := bytes.Equal(event, doneEvent)
			switch {
			case done:
				x.settle(true)
				return x.endEvents(x.padding.event(out, event), ticks)
			// The engine reports a failure halfway as an event of its own.
			case bytes.HasPrefix(event, []byte(`{"error":`)):
				if err := x.writeEvents(out); err != nil {
					return err
				}
				return errEngineFailed
			}
			e := pay.ReadEvent(event)
			if x.bill != nil && !x.bill.Send(e.Text) {
				// What is covered goes out before the wait for more.
				<-ticks.next()
				if err := flush(); err != nil {
					return err
				}
				switch ok, err := x.covered(e.Text); {
				case err != nil:
					return err
				case !ok && !x.started:
					return x.unpaid(pay.ErrNoCover, &x.session)
				case !ok:
					x.s.counters.count(errCutOff)
					x.settle(false)
					return x.endEvents(x.padding.event(out, errCutOff.body()), ticks)
				}
			}
			x.receipt.counts.add(e)
			if !e.OnlyUsage || req.usage {
				out = x.padding.event(out, event)
				if due == nil {
					due = ticks.next()
				}
			}
			src.resume <- struct{}{}
		case <-src.done:
			if err := x.writeEvents(out); err != nil {
				return err
			}
			if src.err == io.EOF || src.err == errEvent {
				return errEngineFailed
			}
			return src.err
		}
	}
}

// endEvents writes the last events of a stream, and its receipt, on the next tick.
func (x *exchange) endEvents(out []byte, ticks *ticks) error {
	x.receipt.response.Write(out)
	signed, err := x.s.sign(x.receipt)
	if err != nil {
		return errInternal
	}
	x.setTrailer(signed)
	out = x.padding.receipt(out, signed, x.receiptSize())
	<-ticks.next()
	return x.writeEvents(out)
}

// writeEvents writes what has come since the last tick.
func (x *exchange) writeEvents(out []byte) error {
	if len(out) == 0 {
		return nil
	}
	if !x.started {
		x.streaming = true
		x.startReceipt()
		x.start(http.StatusOK, "text/event-stream")
	}
	if err := x.write(out); err != nil {
		return err
	}
	if x.bill != nil {
		x.bill.Sent()
	}
	return nil
}
