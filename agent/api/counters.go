package api

import (
	"net/http"
	"sync/atomic"

	"chrysalis/agent/port"
	"chrysalis/guest"
)

// Counters count since boot. None is tied to a client or to a request's content.
type Counters struct {
	Connections  atomic.Int64 // accepted
	Requests     atomic.Int64 // admitted to the engine
	Active       atomic.Int64 // being served now
	Paid         atomic.Int64 // covered by what was paid, and begun
	Unpaid       atomic.Int64 // answered 402, or a stream cut off because its next event was not covered
	Refused      atomic.Int64 // answered 4xx by the agent itself, but for 402 and 429
	Busy         atomic.Int64 // answered 429
	Unavailable  atomic.Int64 // answered 503
	EngineErrors atomic.Int64 // the engine broke off, fell silent, took too long or answered 5xx but for 503
	Cancelled    atomic.Int64 // the client went away first, or was hung up on to let another in
}

// Fill copies the counters into the table that the status port serves. It leaves
// alone what the API knows nothing of.
func (c *Counters) Fill(t *guest.CounterTable) {
	t.Connections = c.Connections.Load()
	t.Requests = c.Requests.Load()
	t.Active = c.Active.Load()
	t.Paid = c.Paid.Load()
	t.Unpaid = c.Unpaid.Load()
	t.Refused = c.Refused.Load()
	t.Busy = c.Busy.Load()
	t.Unavailable = c.Unavailable.Load()
	t.EngineErrors = c.EngineErrors.Load()
	t.Cancelled = c.Cancelled.Load()
}

// count counts an answer that is an error. What the engine refused is in Requests
// only.
func (c *Counters) count(e *apiError) {
	switch {
	case e.engine:
	case e.status == http.StatusPaymentRequired:
		c.Unpaid.Add(1)
	case e.status == http.StatusTooManyRequests:
		c.Busy.Add(1)
	case e.status == http.StatusServiceUnavailable:
		c.Unavailable.Add(1)
	case e.status < 500:
		c.Refused.Add(1)
	case e == errInternal:
		port.Bugs.Add(1)
	default:
		c.EngineErrors.Add(1)
	}
}
